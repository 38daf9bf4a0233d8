"""What `kedro run` is asked to run: names that are not there are refused with the nearest that is."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

from kedro.framework.project import pipelines
from kedro.pipeline import Pipeline

from qvl_pipeline.errors import UserError, did_you_mean

# Options that take a part of the pipelines: what they name, and how that is called.
_NODES, _ENTRIES, _TAGS = "nodes", "entries", "tags"
_PARTS = {
    "node_names": ("--nodes", _NODES),
    "from_nodes": ("--from-nodes", _NODES),
    "to_nodes": ("--to-nodes", _NODES),
    "from_inputs": ("--from-inputs", _ENTRIES),
    "to_outputs": ("--to-outputs", _ENTRIES),
    "tags": ("--tags", _TAGS),
}


def check_selection(options: Mapping[str, Any]) -> None:
    """Refuse names of pipelines, nodes, entries and tags that nothing has, and a choice that leaves nothing to run.

    Args:
        options: Those of Kedro's command, by the names of its arguments.

    Raises:
        UserError: Names the option, and the nearest name.
    """
    for name in options["pipelines"]:
        if name not in pipelines:
            hint = did_you_mean(name, pipelines, f"the pipelines are {', '.join(pipelines)}")
            raise UserError(f"there is no pipeline '{name}': {hint}")
    asked = {key: list(names) for key in _PARTS if (names := options.get(key))}
    if not asked:
        return
    where = " or ".join(f"'{name}'" for name in options["pipelines"])
    chosen = sum((pipelines[name] for name in options["pipelines"] or ["__default__"]), start=Pipeline([]))
    for key, names in asked.items():
        option, kind = _PARTS[key]
        known = _known(chosen, kind)
        for name in names:
            if name not in known:
                place = f"in {where}" if where else "in the default pipeline"
                raise UserError(
                    f"{option} names '{name}', which is none of the {kind} {place}: {_hint(name, kind, known)}"
                )
    try:
        chosen.filter(**{key: names for key, names in asked.items()})
    except ValueError as error:
        options_given = " and ".join(_PARTS[key][0] for key in asked)
        raise UserError(f"{options_given} leave nothing to run: no node fits all of them") from error


def _known(pipeline: Pipeline, kind: str) -> Set[str]:
    if kind == _NODES:
        return {node.name for node in pipeline.nodes}
    return pipeline.datasets() if kind == _ENTRIES else {tag for node in pipeline.nodes for tag in node.tags}


def _hint(name: str, kind: str, known: Set[str]) -> str:
    of_a_stage = sorted(node for node in known if kind == _NODES and node.rpartition(".")[2] == name)
    if of_a_stage:
        return f"did you mean '{of_a_stage[0]}'?"
    elsewhere = [stage for stage in pipelines if stage != "__default__" and name in _known(pipelines[stage], kind)]
    if elsewhere:
        return f"it is in '{elsewhere[0]}'"
    return did_you_mean(name, known, f"there {'are ' + ', '.join(sorted(known)) if known else 'are none'}")
