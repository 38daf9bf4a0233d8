"""Records every `kedro run` as one MLflow run: parameters, lineage, metrics, artifacts, and how it ended.

It stands in for kedro-mlflow, whose command-line plugin imports MLflow at every `kedro` command: three times as slow.
Here MLflow is imported when a run starts, after everything that can be checked without it has been checked.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from kedro.framework.context import KedroContext
from kedro.framework.hooks import hook_impl
from kedro.framework.project import pipelines
from kedro.io import DataCatalog
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node
from pydantic import Field, ValidationError, model_validator

from qvl_pipeline.config.base import Block
from qvl_pipeline.errors import UserError
from qvl_pipeline.secrets import without_secrets
from qvl_pipeline.tracking.flattening import flattened
from qvl_pipeline.tracking.lineage.code import dvc_tags, git_tags
from qvl_pipeline.tracking.lineage.uncommitted import MASKED, PATCH, uncommitted
from qvl_pipeline.tracking.mlflow.chain import ABOVE, CHAIN, EVALUATES, PARENT, chain_run, dvc_process, run_name
from qvl_pipeline.tracking.mlflow.sinks import check_installed
from qvl_pipeline.tracking.mlflow.system_metrics import SystemMetrics

if TYPE_CHECKING:
    from qvl_pipeline.tracking.mlflow.run import MlflowRun

logger = logging.getLogger(__name__)

# Stages that keep a machine busy for long.
LONG_STAGES = ("sample", "train", "evaluate")

# What a model is called in the names of metrics, where `base` would say nothing.
MODELS = {"base": "untrained"}
MODEL_ENTRY, KEPT_ENTRY, DATA_ENTRY = "trained_model", "kept_checkpoints", "tokenized_samples"
# Beside the base model: where an average of checkpoints is evaluated.
AVERAGE = "scratch/average"
# What all runs of a chain have in common.
_OF_CHAINS = ("profile", "dataset", "dvc_experiment", "mlflow.source.git.commit", "git_dirty")

# The parameters without defaults: what a replay gives. Some mean something only by being given.
GIVEN = "given_parameters.yml"
# The catalog entry that names the MLflow run of the training; an evaluation writes its metrics into that run too.
TRAIN_RESULT = "train_result"
# The model that an evaluation is of, unless `evaluate` names a checkpoint or several to average.
TRAINED = "trained"
# What it is compared with, under the name that `metrics.json` has for it.
UNTRAINED = "base"
# By the dotted name of every parameter: the file that sets it, `--params`, or `default`.
ORIGIN = "parameters_origin.yml"


class PromoteConfig(Block):
    """When a version gets an alias that others may rely on.

    Attributes:
        alias: The alias.
        when: `better_than_champion`: its answers are better than those of the version that has the alias, to the same
            samples; the first version gets it.
        on: Kind of the samples that count, or `overall`.
        by: `paired_bootstrap`: the 95 % interval of the mean difference lies above 0.
    """

    alias: str = Field("champion", pattern=r"^[A-Za-z][\w-]*$")
    when: Literal["better_than_champion"] = "better_than_champion"
    on: str = "overall"
    by: Literal["paired_bootstrap"] = "paired_bootstrap"

    @model_validator(mode="before")
    @classmethod
    def _on_is_a_key(cls, values: Any) -> Any:
        """Take `on` for what it says: as a word of its own, it is `true` in YAML."""
        if isinstance(values, dict) and True in values:
            return {"on" if key is True else key: value for key, value in values.items()}
        return values


class MlflowConfig(Block):
    """`mlflow.yml`.

    Attributes:
        tracking_uri: Database or server that records runs.
        artifact_location: Folder of artifacts, when `tracking_uri` is a local database.
        experiment: Experiment of every run.
        run_name: Name of the run; that of single stages has their names behind it, as in `qwen3_vl_8b/train`.
        system_metrics_interval_s: Seconds between two samples of CPU, memory, disk, network and GPUs in the stages that
            take long (`sample`, `train`, `evaluate`); 0 takes none.
        register_model: Name under which a model becomes a version in the model registry once it was evaluated and no
            gate refused it, by default none. A version is a pointer to the model: folder and DVC's md5, not weights;
            `mlflow.pyfunc.load_model` finds it by that.
        alias: Alias that the newest version gets, such as `candidate`.
        promote: Alias that only a better version gets.
    """

    tracking_uri: str
    artifact_location: str
    experiment: str
    run_name: str
    system_metrics_interval_s: float = Field(10.0, ge=0)
    register_model: str | None = None
    alias: str | None = Field("candidate", pattern=r"^[A-Za-z][\w-]*$")
    promote: PromoteConfig | None = None


class MlflowHook:
    """Starts, fills and ends the MLflow run of a session.

    Catalog entries say in `metadata.mlflow` what is recorded once they are saved: `metrics` (the numbers of a JSON
    file), `artifact` (the file), `input` (the run's data, though the run itself wrote it), `tags` (tag name to key of a
    JSON file), `sources` (the raw files it lists are the run's data) and `model` (a pointer to the folder).

    A pipeline all of whose nodes have the tag `not_recorded` has no run.
    """

    def __init__(self, blocks: Mapping[str, type[Block]]) -> None:
        """Start without a run.

        Args:
            blocks: Models of the parameters blocks, for the defaults of those that no node of a pipeline reads.
        """
        self._blocks = blocks
        self._run: MlflowRun | None = None
        self._system_metrics: SystemMetrics | None = None
        self._training_run: str | None = None
        self._above: str | None = None
        self._evaluated = TRAINED
        self._made: dict[str, str] | None = None
        self._scored: dict[str, str] | None = None
        self._made_by: dict[str, Any] = {}

    @hook_impl
    def after_context_created(self, context: KedroContext) -> None:
        """Read `mlflow.yml`.

        Raises:
            UserError: A key of it is unknown or missing.
        """
        self._context = context
        try:
            self._config = MlflowConfig.model_validate(context.config_loader["mlflow"])
        except ValidationError as error:
            problem = error.errors()[0]
            text = problem["msg"].removeprefix("Value error, ")
            raise UserError(f"mlflow.yml: {'.'.join(map(str, problem['loc']))} {text}") from error

    @hook_impl
    def after_catalog_created(self, conf_catalog: dict[str, Any], parameters: dict[str, Any]) -> None:
        """Remember where entries are, what to record of them, and the parameters."""
        entries = {name: entry for name, entry in conf_catalog.items() if not entry["type"].endswith("PlaceDataset")}
        self._paths = {name: Path(entry["filepath"]) for name, entry in entries.items() if "filepath" in entry}
        self._wanted = {name: (entry.get("metadata") or {}).get("mlflow", {}) for name, entry in conf_catalog.items()}
        merged = parameters["parameters"]
        given = {name: {} if merged.get(name) is None else merged[name] for name in self._blocks}
        models = {name: block.model_validate(given[name]) for name, block in self._blocks.items()}
        self._parameters = {name: model.model_dump(mode="json") for name, model in models.items()}

    @hook_impl(trylast=True)
    def before_pipeline_run(self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Start the run and record what is known of it: parameters, tags, input data.

        Of the nodes that train together, only node 0 has a run.

        Raises:
            UserError: The tracking server or database cannot be used, or a tracker that the training reports to is not
                installed.
        """
        from qvl_pipeline.tracking.lineage.environment import environment_freeze
        from qvl_pipeline.tracking.mlflow.run import going_on, start_run
        from qvl_pipeline.tracking.mlflow.server import use_server

        config = self._config
        if all("not_recorded" in node.tags for node in pipeline.nodes) and pipeline.nodes:
            use_server(config.tracking_uri)
            return
        if "params:train" in pipeline.inputs():
            train = catalog.load("params:train")
            if train.launch.nodes().node_rank > 0:
                return
            check_installed(train.report_to)
        # An interrupt (Ctrl-C, SIGTERM) passes no hook: what is still open at exit, or when the next session of a
        # notebook starts, was killed. Registered after MLflow's own exit handler, ours is called before it.
        self._finish("KILLED")
        atexit.register(self._finish, "KILLED")
        names = sorted(run_params["pipeline_names"] or ["__default__"], key=list(pipelines).index)
        given = flattened(without_secrets(run_params.get("runtime_params") or {}), ".")
        changed = {key: value for key, value in given if value != {}}
        experiment = dvc_tags().get("dvc_experiment")
        title = run_name(config.run_name, [name for name in names if name != "__default__"], experiment, changed)
        self._run = start_run(config.tracking_uri, config.experiment, config.artifact_location, title)
        if TRAIN_RESULT in pipeline.inputs():
            self._training_run = self._known(catalog.load(TRAIN_RESULT).get("mlflow_run_id"))
        self._evaluated = self._blocks["evaluate"].model_validate(self._parameters["evaluate"]).evaluated
        self._made_by = {name: self._parameters[name] for name in _blocks(_up_to(pipeline))}
        self._long_nodes = {node.name for stage in LONG_STAGES if stage in pipelines for node in pipelines[stage].nodes}
        tags: dict[str, Any] = {}
        with going_on("the parameters and tags of this run"):
            tags = self._tags(names, pipeline, catalog)
            self._run.set_tags(tags)
            if tags.get("git_dirty") == "true":
                patch, masked = uncommitted(self._context.project_path)
                self._run.log_text(patch, PATCH)
                if masked:
                    self._run.set_tags({MASKED: "true"})
            self._run.log_yaml(self._parameters, "parameters.yml")
            self._run.log_yaml(self._context.config_loader["parameters"], GIVEN)
            self._run.log_yaml(self._origin(), ORIGIN)
            self._run.log_parameters(self._made_by)
            for name in sorted(pipeline.inputs() & self._paths.keys()):
                self._run.log_input(name, self._paths[name], context="+".join(names))
        with going_on("the environment of this run"):
            self._run.log_text(environment_freeze(), "environment.txt")
        with going_on("the run above those of this chain"):
            self._go_below(run_name(config.run_name, [], experiment, changed), tags)
        logger.info("MLflow run %s (%s)", title, self._run.id)

    @hook_impl
    def before_node_run(self, node: Node) -> None:
        """Watch the machine from the first node on that takes long."""
        interval_s = self._config.system_metrics_interval_s
        if self._run and interval_s and self._system_metrics is None and node.name in self._long_nodes:
            self._system_metrics = SystemMetrics(self._run.id, interval_s)

    @hook_impl
    def after_dataset_saved(self, dataset_name: str, data: Any) -> None:
        """Record what the entry's `metadata.mlflow` names."""
        wanted = self._wanted.get(dataset_name)
        if self._run is None or not wanted:
            return
        from qvl_pipeline.tracking.mlflow.models import pointer_to
        from qvl_pipeline.tracking.mlflow.run import going_on

        with going_on(f"'{dataset_name}'"):
            if wanted.get("tags"):
                self._run.set_tags({tag: data[key] for tag, key in wanted["tags"].items()})
            if wanted.get("input"):
                self._run.log_input(dataset_name, self._paths[dataset_name], context="raw data")
            if wanted.get("sources"):
                self._log_sources(data["files"])
            if wanted.get("model"):
                self._made = pointer_to(self._paths[dataset_name])
                self._run.log_pointer(self._made)
                self._run.log_model(self._config.run_name, self._made, self._made_by)
            if wanted.get("models"):
                for folder in sorted(self._paths[dataset_name].glob("step-*")):
                    name = f"{self._config.run_name}-{folder.name}"
                    self._run.log_model(name, pointer_to(folder), self._made_by)
            if wanted.get("artifact"):
                self._run.log_artifact(self._paths[dataset_name])
            if wanted.get("metrics") and data:
                # Scores of another model than the trained one have no place in its row.
                of_training = self._training_run if self._evaluated == TRAINED else None
                named = {MODELS.get(model, model): scores for model, scores in data.items()}
                for run_id in filter(None, (self._run.id, of_training, self._above)):
                    self._run.log_metrics(named, run_id=run_id)
                if of_training:
                    self._run.complete_parameters(self._made_by, of_training)
                self._log_model_scores(data)

    @hook_impl
    def after_pipeline_run(self) -> None:
        """Register the model that was evaluated, since no gate refused it, and end the run as finished."""
        config = self._config
        if self._run and self._scored and config.register_model:
            from qvl_pipeline.tracking.mlflow.run import going_on

            promote = config.promote.model_dump() if config.promote else None
            with going_on(f"a version of '{config.register_model}'"):
                self._run.register(config.register_model, self._scored, self._training_run, config.alias, promote)
        self._finish("FINISHED")

    @hook_impl
    def on_pipeline_error(self) -> None:
        """End the run as failed."""
        self._finish("FAILED")

    def _log_model_scores(self, metrics: dict[str, Any]) -> None:
        """Log the scores of the evaluated and of the untrained model to their entries in the table of models."""
        from qvl_pipeline.tracking.mlflow.models import pointer_to, pointer_to_base

        folder, name = self._paths[MODEL_ENTRY], self._config.run_name
        if self._evaluated != TRAINED:
            chosen = self._blocks["evaluate"].model_validate(self._parameters["evaluate"])
            kept = self._paths[KEPT_ENTRY] / chosen.checkpoint if chosen.checkpoint else None
            folder, name = kept or self._paths["base_model"].parent / AVERAGE, f"{name}-{self._evaluated}"
        samples, made_by = self._paths[DATA_ENTRY], self._training_run
        data = (DATA_ENTRY, samples) if samples.exists() else None
        if UNTRAINED in metrics:
            untrained, made = pointer_to_base(self._paths["base_model"]), {"model": self._parameters["model"]}
            name_of_it = f"{self._config.run_name}-untrained"
            self._run.log_model_scores(name_of_it, untrained, made, made_by, metrics[UNTRAINED], data)
        if not folder.is_dir():
            return
        pointer = self._made if self._made and self._evaluated == TRAINED else pointer_to(folder)
        self._run.log_model_scores(name, pointer, self._made_by, made_by, metrics[TRAINED], data)
        # An average is in no stage's outputs: nobody could get it.
        self._scored = pointer if folder.name != Path(AVERAGE).name else None

    def _go_below(self, name: str, tags: dict[str, Any]) -> None:
        """Let MLflow show this run below that of its sweep, of its `dvc repro`, or of the training it evaluates."""
        above = os.environ.get(ABOVE)
        if not above and (process := dvc_process()):
            chain = f"{process}-{self._context.config_loader['globals']['profile']}"
            shared = {key: str(tags[key]) for key in _OF_CHAINS if key in tags}
            above, is_new = chain_run(self._run.id, chain, name, {CHAIN: "dvc repro", **shared})
            self._above = above
            if is_new:
                self._run.log_parameters(self._parameters, run_id=above)
        if above := above or self._training_run:
            self._run.set_tags({PARENT: above})

    def _finish(self, status: str) -> None:
        run, self._run, self._training_run = self._run, None, None
        above, self._above = self._above, None
        self._made = self._scored = None
        watched, self._system_metrics = self._system_metrics, None
        if watched is not None:
            watched.stop()
        if run is not None:
            from qvl_pipeline.tracking.mlflow.run import going_on

            with going_on(f"the end of this run ({status})"):
                run.finish(status, above)

    def _known(self, training: str | None) -> str | None:
        """Return the run of a training, unless it was recorded elsewhere, as that of a model which DVC has brought."""
        from qvl_pipeline.tracking.mlflow.server import is_recorded

        if training is None or is_recorded(training):
            return training
        logger.info("run %s, which trained this model, is in another MLflow: scores are in this run only", training)
        return None

    def _origin(self) -> dict[str, str]:
        origins = self._context.config_loader.origins
        keys = [key.split("\0") for key, _ in flattened(self._parameters, "\0")]  # a name may hold a dot
        return {".".join(key): origins.of(tuple(key)) for key in keys}

    def _log_sources(self, files: list[dict[str, Any]]) -> None:
        """Record every declared source of data: where it is, and its version."""
        declared = {source["name"]: source["path"] for source in self._parameters["ingest"]["datasets"]}
        for name, path in declared.items():
            hashes = {file["path"]: file["sha256"] for file in files if file["source"] == name}
            if hashes:
                self._run.log_source(name, path, hashes)

    def _tags(self, names: list[str], pipeline: Pipeline, catalog: DataCatalog) -> dict[str, Any]:
        tags = {"pipelines": "+".join(names), **self._context.config_loader["globals"]}
        tags |= git_tags(self._context.project_path) | dvc_tags()
        for name in sorted(_up_to(pipeline).all_outputs() - pipeline.all_outputs()):
            if (wanted := self._wanted.get(name, {}).get("tags")) and catalog.exists(name):
                content = catalog.load(name)
                tags |= {tag: content[key] for tag, key in wanted.items()}
        if self._training_run:
            tags |= {EVALUATES: self._training_run} if self._evaluated == TRAINED else {"evaluated": self._evaluated}
        return tags


def _up_to(pipeline: Pipeline) -> Pipeline:
    """Return `pipeline` with all that its inputs were made by."""
    chain = pipelines["__default__"]
    inputs = pipeline.inputs() & chain.all_outputs()
    return pipeline + chain.to_outputs(*inputs) if inputs else pipeline


def _blocks(pipeline: Pipeline) -> list[str]:
    """Return the parameters blocks that `pipeline` reads, sorted."""
    names = (name.removeprefix("params:") for name in pipeline.inputs() if name.startswith("params:"))
    return sorted({name.split(".")[0] for name in names})
