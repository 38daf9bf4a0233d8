"""Refuse a run that cannot work, before anything has started."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from kedro.utils import load_obj

from qvl_pipeline.errors import UserError, did_you_mean
from qvl_pipeline.pipeline_registry import STAGES
from qvl_pipeline.profiles.checking import check_parameters
from qvl_pipeline.profiles.loader import LOCAL, ProfileLoader, profile_names
from qvl_pipeline.tracking.lineage.locked import installed_otherwise
from qvl_pipeline.training.in_use import READ_WHILE_TRAINING

logger = logging.getLogger(__name__)

# What these make is under the name of the dataset, which several profiles may have.
SHARED = {"ingest", "validate"}


class EarlyChecks:
    """Checks the profile and the parameters of a session, the inputs of a pipeline, and what training is for."""

    @hook_impl(tryfirst=True)
    def after_context_created(self, context: KedroContext) -> None:
        """Refuse an unknown profile, and parameters that no stage could use.

        Raises:
            UserError: `conf/` has no such profile, it would write where another one does, or a parameters block is
                wrong; also one of a later stage.
        """
        loader: ProfileLoader = context.config_loader
        _check_profile(loader)
        _check_place(loader.profile, loader["globals"])
        # Paths in parameters and tables start at the project root, wherever the command was started.
        os.chdir(context.project_path)
        parameters = loader["parameters"]  # before their origins: of a file that cannot be read, it says which
        self._origins = loader.origins
        self._blocks = check_parameters(parameters, self._origins)

    @hook_impl
    def after_catalog_created(self, conf_catalog: dict[str, Any]) -> None:
        """Remember where every entry is, for messages."""
        self._paths = {name: entry.get("filepath", "") for name, entry in conf_catalog.items()}
        self._schemas = {name: entry.get("schema") for name, entry in conf_catalog.items()}
        # Where something is if it is there: whoever looks there checks what he finds.
        self._places = {name for name, entry in conf_catalog.items() if entry.get("type", "").endswith("PlaceDataset")}

    @hook_impl(tryfirst=True)
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Refuse a pipeline whose inputs are not there yet, damaged, or made with other parameters than this run has.

        And one that prepares data for a training that cannot run here: see `training/early.py`.

        Raises:
            UserError: Names every missing input, the pipeline that makes it, and the command to run first; or an input
                that is damaged or was made otherwise, and how. Or this is one of several nodes, and not the one that
                runs other pipelines than training. Or the training that follows could not run.
        """
        self._stages = [node.short_name for node in pipeline.nodes if node.short_name in ("train", "generate")]
        self._evaluation_checked_before = self._stages[0] if "generate" in self._stages else None
        waiting = [node.short_name for node in pipeline.nodes if "valid_samples" in node.inputs]
        self._split_checked_before = waiting[0] if waiting and self._stages else None
        _check_node(pipeline, catalog)
        self._warn_of_what_dvc_does_not_see(pipeline)
        wrong = self._unusable(pipeline, catalog)
        if not wrong:
            self._check_what_follows(pipeline)
            return
        names = ", ".join(run_params["pipeline_names"] or ["the run"])
        root = Path(run_params["project_path"])
        stages = self._needed(wrong, catalog)
        command = _command(stages, run_params["env"], params=bool(run_params.get("runtime_params")))
        if missing := [name for name, problem in wrong.items() if problem is None]:
            lines = [f"  {name} ({_shown(self._paths.get(name), root)})" for name in missing]
            unmade = ", ".join(name for name in missing if name not in _makers())
            advice = f"No pipeline makes {unmade}: put it there." if unmade else f"Run {command} first."
            raise UserError("\n".join([f"{names} cannot start, inputs do not exist yet:", *lines, advice]))
        name, problem = next(iter(wrong.items()))
        place = _shown(self._paths[name], root)
        sharing = "Profiles that are to differ in this need a `dataset` each, in their globals.yml."
        hint = "" if SHARED.isdisjoint(stages) else f" {sharing}"
        raise UserError(f"{names} cannot start, because {name} ({place}) {problem} by {command}.{hint}")

    def _check_what_follows(self, pipeline: Pipeline) -> None:
        """Ask now what training and evaluation would only find out when the data for them are made, hours from now."""
        if not pipeline.all_outputs() & READ_WHILE_TRAINING:
            return  # the stages themselves ask at once
        if "generate" in self._stages:
            from qvl_pipeline.evaluation.benchmarks.harness import check_lmms_eval
            from qvl_pipeline.evaluation.generation import check_generation
            from qvl_pipeline.evaluation.servers.models import check_servers

            check_generation(self._blocks["evaluate"])
            check_lmms_eval(self._blocks["evaluate"].lmms_eval)
            check_servers(self._blocks["evaluate"])
        if "train" in self._stages:
            from qvl_pipeline.training.early import check_before_preparing

            blocks = {
                name: self._blocks[name] for name in ("sample", "model", "batching", "train", "adapter", "ingest")
            }
            check_before_preparing(**blocks, scratch=Path(self._paths["base_model"]).parent / "scratch")

    def _check_eval_split(self) -> None:
        from qvl_pipeline.training.early import check_eval_samples

        strategy = self._blocks["train"].eval_strategy if "train" in self._stages else "no"
        evaluates, samples = "generate" in self._stages, Path(self._paths["valid_samples"])
        if strategy != "no":
            check_eval_samples(samples, "'evaluate'" if evaluates else f"train.eval_strategy '{strategy}'")
        elif evaluates:
            check_eval_samples(samples, "'evaluate'", ("eval", "benchmark"))

    def _unusable(self, pipeline: Pipeline, catalog: DataCatalog) -> dict[str, str | None]:
        """Return the inputs of `pipeline` that cannot be used, sorted: what is wrong, or `None` if never written."""
        inputs = {name for name in pipeline.inputs() if name != "parameters" and not name.startswith("params:")}
        inputs -= self._places
        there = [name for name in sorted(inputs) if catalog.exists(name)]
        problems = {name: self._damage(name) or self._made_otherwise(name) for name in there}
        missing = dict.fromkeys(sorted(inputs - problems.keys()))
        return missing | {name: problem for name, problem in problems.items() if problem}

    def _warn_of_what_dvc_does_not_see(self, pipeline: Pipeline) -> None:
        """Under DVC, name what decides what is written and is no dependency: values of `conf/local`, other packages."""
        if "DVC_STAGE" not in os.environ:
            return
        for package, (locked, installed) in installed_otherwise().items():
            logger.warning(
                "%s %s is installed, and requirements.lock, by which DVC goes, has %s: results of both versions pass "
                "for the same; install the locked one, or lock that",
                *(package, installed, locked),
            )
        read = {name.removeprefix("params:") for name in pipeline.inputs() if name.startswith("params:")}
        keys = [(name, key) for name in self._blocks if name in read for key in self._blocks[name].decisive()]
        if own := [".".join(key) for key in keys if self._origins.of(key).startswith(f"conf/{LOCAL}/")]:
            logger.warning(
                "DVC does not see what conf/%s sets: after a change of %s there, it takes old results for new ones; "
                "put what decides results into the profile",
                *(LOCAL, ", ".join(own)),
            )

    def _damage(self, name: str) -> str | None:
        from qvl_pipeline.storage.soundness import damage

        schema = load_obj(self._schemas[name]) if self._schemas.get(name) else None
        wrong = damage(Path(self._paths[name]), schema) if self._paths.get(name) else None
        return f"cannot be read ({wrong}): make it again" if wrong else None

    def _made_otherwise(self, name: str) -> str | None:
        from qvl_pipeline.data.made_with import RECORDED, first_difference, read_record

        if name not in RECORDED or name not in self._paths:
            return None
        declared = {block: self._blocks[block].decisive("frames") for block in RECORDED[name]}
        try:
            recorded = read_record(Path(self._paths[name]))
        except (OSError, ValueError) as error:  # cut off, or no such file at all
            return f"cannot be read ({' '.join(str(error).split())}): make it again"
        return first_difference(recorded, declared)

    def _needed(self, wrong: Iterable[str], catalog: DataCatalog) -> list[str]:
        """Return the stages that make `wrong`, and before them what they need in turn."""
        makers, todo = _makers(), list(wrong)
        needed: set[str] = set()
        while todo:
            stage = makers.get(todo.pop())
            if stage is not None and stage not in needed:
                needed.add(stage)
                todo += self._unusable(pipelines[stage], catalog)
        return [stage for stage in STAGES if stage in needed]

    @hook_impl
    def before_node_run(self, node: Node, catalog: DataCatalog) -> None:
        """Refuse what the evaluation would refuse, and warn of answers that it will cut: before it or its training.

        And a run whose valid samples have no eval split, though it is needed: before any frame is decoded.

        Raises:
            UserError: Says what, and how to train all the same.
        """
        if node.short_name == self._split_checked_before:
            self._check_eval_split()
        if node.short_name != self._evaluation_checked_before:
            return
        from qvl_pipeline.evaluation.checks import checked_samples, warn_of_cut_answers

        tokenized, evaluate = catalog.load("tokenized_samples"), catalog.load("params:evaluate")
        try:
            chosen = checked_samples(tokenized, evaluate)
            warn_of_cut_answers(tokenized, chosen, evaluate.max_new_tokens)
        except UserError as error:
            if node.short_name == "generate":
                raise
            raise UserError(
                f"nothing was trained, because 'evaluate', which follows, would fail: {error}. To train without an "
                "evaluation, run `kedro run --pipelines train` (with the same --env)"
            ) from error


def _check_profile(loader: ProfileLoader) -> None:
    folder = loader.profile
    profiles = profile_names(Path(loader.conf_source))
    known = f"the profiles in conf/ are {', '.join(profiles)}"
    for name, what in ((loader.base_env, "what all profiles share"), (LOCAL, "your own values, which every run gets")):
        if folder.name == name:
            raise UserError(f"'{name}' is no profile, but {what}: leave out --env, or name a profile; {known}")
    if not folder.is_dir():
        hint = did_you_mean(folder.name, profiles, otherwise="")
        raise UserError(
            f"there is no profile '{folder.name}': {f'{hint} T' if hint else 't'}{known[1:]}; "
            f"`kedro profile new {folder.name} --data FILE` makes it"
        )


def _check_place(folder: Path, names: dict[str, Any]) -> None:
    """Refuse a profile that was copied and still writes where the other does: it would replace its model."""
    file = f"{'/'.join(folder.parts[-2:])}/globals.yml"
    if missing := [f"`{key}: …`" for key in ("profile", "dataset") if not names.get(key)]:
        raise UserError(
            f"the profile '{folder.name}' does not say where its results go: write {' and '.join(missing)} into {file}"
        )
    place = names["profile"]
    if place == folder.name or not (folder.parent / str(place) / "globals.yml").exists():
        return
    from qvl_pipeline.tracking.replay.repeat import PROFILE

    if folder.name != PROFILE:  # which repeats another one, in a worktree of its own
        raise UserError(
            f"the profile '{folder.name}' would overwrite the results of the profile '{place}': write `profile: "
            f"{folder.name}` into {file}"
        )


def _check_node(pipeline: Pipeline, catalog: DataCatalog) -> None:
    """Refuse to make on every node what one of them makes."""
    if "params:train" not in pipeline.inputs():
        return
    nodes = catalog.load("params:train").launch.nodes()
    if nodes.node_rank > 0 and not {node.short_name for node in pipeline.nodes} <= {"preflight", "train"}:
        raise UserError(
            f"node {nodes.node_rank} of {nodes.nnodes} can only join the training: run `kedro run --pipelines train` "
            "on every node, and the other pipelines on one"
        )


def _makers() -> dict[str, str]:
    """Return the stage of every entry that one makes."""
    return {output: stage for stage in STAGES for output in pipelines[stage].all_outputs()}


def _command(stages: list[str], env: str | None, *, params: bool) -> str:
    command = f"`kedro run --pipelines {','.join(stages)}{f' --env {env}' if env else ''}`"
    return f"{command} with the same --params" if params else command


def _shown(path: str | None, root: Path) -> str:
    if not path:
        return "in memory only"
    return str(Path(path).relative_to(root)) if Path(path).is_relative_to(root) else path
