"""The answer of the preflight as one self-contained HTML page, the same bytes for the same answer."""

from __future__ import annotations

from typing import Any

from qvl_pipeline.reports.page import count, percent, render

_GIB = 1 << 30
_RESERVE = "context, communication and fragments"


def render_preflight(profile: str, report: dict[str, Any]) -> str:
    """Write the page; it makes no request to anywhere.

    Args:
        profile: Name of the profile.
        report: The entry `preflight_report`.
    """
    if report["verdict"] in ("off", "unknown"):
        return render("preflight", profile=profile, report=report, off=True)
    memory = report["memory"]
    scale = 1.04 * max(memory["device_bytes"], memory["high_bytes"])
    return render(
        "preflight",
        profile=profile,
        report=report,
        off=False,
        bar=_bar(memory, scale),
        device_at=f"{100 * memory['device_bytes'] / scale:.2f}",
        low_at=f"{100 * memory['low_bytes'] / scale:.2f}",
        high_at=f"{100 * memory['high_bytes'] / scale:.2f}",
        tiles=_tiles(report),
        changes=[
            {**change, "needed": gib(change["needed_bytes"]), "spare": _signed(change["spare_bytes"])}
            for change in report["changes"]
        ],
        needed=gib(memory["needed_bytes"]),
        device=gib(memory["device_bytes"]),
        low=gib(memory["low_bytes"]),
        high=gib(memory["high_bytes"]),
        pack=_pack(memory["pack"], memory["moment"]),
        facts=_facts(report),
    )


def gib(number: float) -> str:
    """Return bytes in GiB, or in MiB where they are few."""
    return f"{number / _GIB:,.1f} GiB" if abs(number) >= 0.1 * _GIB else f"{number / (1 << 20):,.1f} MiB"


def _signed(number: float) -> str:
    return f"{gib(number)} to spare" if number >= 0 else f"{gib(-number)} too much"


def _bar(memory: dict[str, Any], scale: float) -> list[dict[str, Any]]:
    """The stacked bar of a rank: parts with their place, width and share."""
    left, rows = 0.0, []
    parts = {**memory["parts"], _RESERVE: memory["reserve_bytes"]}
    for number, (name, size) in enumerate(parts.items()):
        width = 100 * max(0, size) / scale
        rows.append(
            {
                "name": name,
                "colour": f"part{number}",
                "x": f"{left:.3f}",
                "width": f"{width:.3f}",
                "size": gib(size),
                "share": percent(max(0, size) / memory["needed_bytes"]),
                "shown": size > 0,
            }
        )
        left += width
    return rows


def _tiles(report: dict[str, Any]) -> list[dict[str, str]]:
    memory, time, work = report["memory"], report["time"], report["work"]
    fits = memory["spare_bytes"] >= 0
    tiles = [
        {
            "title": "Memory of a rank",
            "value": gib(memory["needed_bytes"]),
            "note": f"of {gib(memory['device_bytes'])}",
            "good": fits,
        },
        {
            "title": "To spare" if fits else "Too much",
            "value": gib(abs(memory["spare_bytes"])),
            "note": f"the estimate: {gib(memory['low_bytes'])} to {gib(memory['high_bytes'])}",
            "good": fits,
        },
    ]
    if time:
        cost = f", costs {count(time['cost'])}" if time["cost"] else ""
        tiles.append(
            {
                "title": "Time",
                "value": _hours(time["hours"]),
                "note": f"{time['gpu_hours']:,.1f} device hours{cost}",
                "good": True,
            }
        )
    else:
        note = "known once tokenize has made a plan"
        tiles.append({"title": "Time", "value": "none yet", "note": note, "good": True})
    steps = count(work["steps"]) if work else "none yet"
    tokens = f"{count(work['tokens'])} tokens" if work else "known once tokenize has made a plan"
    return [*tiles, {"title": "Steps", "value": steps, "note": tokens, "good": True}]


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{60 * hours:.1f} min" if hours * 60 >= 1 else f"{3600 * hours:.0f} s"


def _pack(pack: dict[str, Any], moment: str) -> str:
    samples = f"{count(pack['samples'])} sample{'' if pack['samples'] == 1 else 's'}"
    sizes = f"{samples}, {count(pack['tokens'])} tokens, {count(pack['patches'])} patches"
    return f"Highest in {moment}, in {pack['what']}: {sizes}."


def _facts(report: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Groups of facts, by their heading."""
    model, disk, host, kernels = report["model"], report["disk"], report["host"], report["kernels"]
    trained = percent(model["trained_parameters"] / model["parameters"])
    recompute = report["recompute"]
    groups = [
        (
            "Model and kernels",
            [
                ("Model", model["path"]),
                ("Parameters", count(model["parameters"])),
                ("of them trained", trained),
                ("Attention, language model", kernels["text"]),
                ("Attention, vision tower", kernels["vision"]),
                ("Norms and MLPs", "fused" if kernels["fused"] else "as they are"),
                ("Recomputation, language model", recompute["llm"]),
                ("Recomputation, vision tower", recompute["vit"]),
            ],
        ),
        (
            "Disk",
            [
                ("A checkpoint", gib(disk["checkpoint_bytes"])),
                ("Checkpoints at once", count(disk["checkpoints"])),
                ("Exported model", gib(disk["export_bytes"])),
                ("Needed in all", gib(disk["needed_bytes"])),
                ("Free", gib(disk["free_bytes"])),
                ("Frames that are stored", gib(disk["frames_bytes"])),
            ],
        ),
        (
            "Memory of the host",
            [
                ("Loaders of a rank", gib(host["loaders_bytes"])),
                ("A rank in all", gib(host["rank_bytes"])),
                ("A machine in all", gib(host["needed_bytes"])),
                ("This machine has", gib(host["this_machine_bytes"])),
            ],
        ),
    ]
    if not disk["enough"]:
        groups[1][1].append(("Too little", gib(disk["needed_bytes"] - disk["free_bytes"])))
    if time := report["time"]:
        work = report["work"]
        share = percent(time["mfu"]) if time["mfu"] else "no peak is known"
        groups.insert(
            0,
            (
                "Work and time",
                [
                    ("Images", count(work["images"])),
                    ("Frames of clips", count(work["frames"])),
                    ("FLOPs", f"{time['flops']:.3g}"),
                    ("FLOPs a second of a rank", f"{time['rank_flops']:.3g}"),
                    ("Share of the peak", share),
                    ("This speed is from", time["source"]),
                ],
            ),
        )
    return groups
