"""From the keys of a configuration of LMMS Engine to parameters, and a reason for each that has none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qvl_pipeline.errors import UserError
from qvl_pipeline.profiles.lmms.keys import DATASET, MODEL, TRAINER
from qvl_pipeline.profiles.lmms.reading import Entry
from qvl_pipeline.profiles.lmms.rules import Noted, Refused, Same, To, Together

_DEFAULT = "LMMS Engine's default"
# Keys of a source, with what LMMS Engine takes for what is not there.
_SOURCE = {"path": None, "data_folder": None, "data_type": "json"}
# Of the rows, as in the profiles of this project.
EVAL_FRACTION = 0.02
_FEWEST_FRAMES = 2


@dataclass
class Mapped:
    """What was made of a file.

    Attributes:
        values: Parameters by block.
        comments: Of a parameter, `block.key`, what stands behind it: its name in the file, or that it is not there.
        notes: `(key in the file, value, reason)` of those that decide nothing here.
    """

    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    comments: dict[str, str] = field(default_factory=dict)
    notes: list[tuple[str, Any, str]] = field(default_factory=list)

    def set(self, key: str, value: Any, comment: str) -> None:
        """Write a parameter, `block.key` or `block.key.inner`.

        Raises:
            ValueError: It is there with another value.
        """
        block, *inner, name = key.split(".")
        place = self.values.setdefault(block, {})
        for part in inner:
            place = place.setdefault(part, {})
        if name in place and place[name] != value:
            raise ValueError(f"{key} was {place[name]!r} by {self.comments[key] or 'a key of that name'}: keep one")
        place[name] = value
        self.comments[key] = comment


def map_entries(entries: Mapping[str, Entry], file: Path) -> Mapped:
    """Give every key its place.

    Args:
        entries: The keys of a file.
        file: The file, for messages.

    Raises:
        UserError: Lists every key that cannot be kept to, each with the reason.
    """
    mapped, refused = Mapped(), []
    for entry in entries.values():
        try:
            _apply(entry, mapped)
        except (ValueError, TypeError) as error:
            refused.append(f"{entry.path}: {entry.value!r} cannot be kept to: {error}")
    for together in (_sources, _order, _passes, _frames, _schedule):
        try:
            together(entries, mapped)
        except ValueError as error:
            refused.append(str(error))
    if refused:
        raise UserError("\n".join([f"{file} cannot become a profile:", *(f"  {line}" for line in refused)]))
    _fill_in(mapped)
    return mapped


def _apply(entry: Entry, mapped: Mapped) -> None:
    match entry.rule:
        case To(key, convert):
            value = convert(entry.value)
            mapped.set(key, value, _named(entry, key, value))
            if key == "train.report_to":
                _installed_trackers(mapped, entry)
        case Same(values, reason):
            if entry.value not in values:
                raise ValueError(reason)
            mapped.notes.append((entry.path, entry.value, reason))
        case Noted(reason):
            mapped.notes.append((entry.path, entry.value, reason))
        case Refused(reason):
            raise ValueError(reason)
        case Together():
            return


def _named(entry: Entry, key: str, value: Any) -> str:
    """Return the comment behind a parameter: its old name if that changed, and the old value if that did."""
    renamed = entry.name != key.rpartition(".")[2]
    if value != entry.value:
        return f"{entry.name}: {entry.value}"
    return entry.name if renamed else ""


def _installed_trackers(mapped: Mapped, entry: Entry) -> None:
    """Leave out trackers that are not installed, and say so: the first run would end with that."""
    trackers = mapped.values["train"]["report_to"]
    missing = [name for name in trackers if name == "wandb" and importlib.util.find_spec(name) is None]
    if missing:
        mapped.values["train"]["report_to"] = [name for name in trackers if name not in missing]
        mapped.comments["train.report_to"] = f"{entry.name}: {entry.value}; `uv pip install {missing[0]}`, and add it"


def _fill_in(mapped: Mapped) -> None:
    """Write what LMMS Engine would do where a file says nothing, and here something else would be done."""
    for rules in (DATASET, MODEL, TRAINER):
        for rule in rules.values():
            if isinstance(rule, To) and rule.default is not None and rule.key not in mapped.comments:
                mapped.set(rule.key, rule.default, _DEFAULT)


def _sources(entries: Mapping[str, Entry], mapped: Mapped) -> None:
    declared = _value(entries, "dataset_format", "yaml")
    if "dataset_path" in entries and "datasets" in entries:
        raise ValueError("dataset_path and datasets both declare sources: keep one of them")
    if "dataset_path" in entries:
        path = entries["dataset_path"].value
        if declared == "yaml":
            mapped.set("ingest.dataset_path", path, "")
        else:
            mapped.set("ingest.datasets", [{"path": path, "data_type": declared}], f"dataset_path: {path}")
    elif "datasets" in entries:
        mapped.set("ingest.datasets", [_source(number, said) for number, said in _listed(entries["datasets"])], "")
    else:
        raise ValueError("neither datasets nor dataset_path says what to train on")
    if "dataset_format" in entries and declared == "yaml":
        mapped.set("ingest.dataset_format", "yaml", "")
    if "eval_dataset_path" in entries:
        if declared == "yaml" or "datasets" not in mapped.values["ingest"]:
            raise ValueError("eval_dataset_path: its sources belong into `datasets`, each with `split: eval`, here")
        path = entries["eval_dataset_path"].value
        mapped.values["ingest"]["datasets"].append({"path": path, "data_type": declared, "split": "eval"})
        mapped.comments["ingest.datasets"] += f"; eval_dataset_path: {path}"
    else:
        mapped.set("ingest.eval_fraction", EVAL_FRACTION, "for the stage `evaluate`; LMMS Engine trains on all rows")


def _listed(entry: Entry) -> Iterator[tuple[int, Any]]:
    if not isinstance(entry.value, list) or not entry.value:
        raise ValueError(f"{entry.path} must be a list of sources")
    yield from enumerate(entry.value)


def _source(number: int, said: Any) -> dict[str, Any]:
    if not isinstance(said, dict) or "path" not in said:
        raise ValueError(f"datasets[{number}] must have a path")
    if unknown := [key for key in said if key not in _SOURCE]:
        raise ValueError(f"datasets[{number}].{unknown[0]} is no key of LMMS Engine: it has {', '.join(_SOURCE)}")
    return {key: said.get(key) or otherwise for key, otherwise in _SOURCE.items() if said.get(key) or otherwise}


def _order(entries: Mapping[str, Entry], mapped: Mapped) -> None:
    """`shuffle: false` keeps the order of rows, which only a stream can."""
    if "shuffle" not in entries:
        return
    streamed = str(_value(entries, "dataset_type", "")).endswith("iterable")
    if entries["shuffle"].value:
        mapped.notes.append(("dataset_config.shuffle", True, "samples are drawn in a shuffled order"))
    elif streamed:
        mapped.set("batching.shuffle_buffer_size", 1, "shuffle: False")
    else:
        raise ValueError("shuffle: False: the plan of a map-style dataset is always shuffled; take an iterable type")


def _passes(entries: Mapping[str, Entry], mapped: Mapped) -> None:
    """`max_steps` wins over passes, which LMMS Engine counts in fractions."""
    if _value(entries, "max_steps", -1) > 0:
        if "num_train_epochs" in entries:
            entry = entries["num_train_epochs"]
            mapped.notes.append((entry.path, entry.value, "max_steps says how long"))
        return
    passes = _value(entries, "num_train_epochs", 3)
    if not float(passes).is_integer():
        raise ValueError(f"num_train_epochs: {passes}: passes are whole here, give a whole number or max_steps")
    mapped.set("batching.num_train_epochs", int(passes), "" if "num_train_epochs" in entries else _DEFAULT)


def _frames(entries: Mapping[str, Entry], mapped: Mapped) -> None:
    """Of `fps` and `frame_num`, one is used."""
    used, unused = ("fps", "frame_num")
    defaults = {"fps": 1, "frame_num": 64}
    if _value(entries, "video_sampling_strategy", "fps") == "frame_num":
        used, unused = unused, used
    mapped.set(f"sample.{used}", _value(entries, used, defaults[used]), "" if used in entries else _DEFAULT)
    if unused in entries:
        entry = entries[unused]
        mapped.notes.append((entry.path, entry.value, f"video_sampling_strategy {used} has no use for it"))
    if used == "fps":
        mapped.set("sample.video_min_frames", _FEWEST_FRAMES, "LMMS Engine asks for 1; frames are taken in pairs")


def _schedule(entries: Mapping[str, Entry], mapped: Mapped) -> None:
    """The schedules of LMMS Engine's own trainer, under the names that transformers has for them."""
    stated = "lr_scheduler_type" in entries
    name = _value(entries, "lr_scheduler_type", "linear")
    arguments = dict(_value(entries, "lr_scheduler_kwargs", {}))
    if name == "wsd":
        raise ValueError(
            "lr_scheduler_type: wsd is warmup_stable_decay here, which wants num_decay_steps in lr_scheduler_kwargs"
        )
    comment = "" if stated else _DEFAULT
    if name == "cosine" and "min_lr_ratio" in arguments:
        arguments["min_lr_rate"] = arguments.pop("min_lr_ratio")
        name, comment = "cosine_with_min_lr", "lr_scheduler_type: cosine, with min_lr_ratio"
    mapped.set("train.lr_scheduler_type", name, comment)
    if arguments:
        mapped.set("train.lr_scheduler_kwargs", arguments, "")


def _value(entries: Mapping[str, Entry], name: str, otherwise: Any) -> Any:
    return entries[name].value if name in entries else otherwise
