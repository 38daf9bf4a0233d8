"""A sweep from its file to its page; run again after it was cut off, it goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from qvl_pipeline.config import TrainConfig
from qvl_pipeline.config.sweep import SweepConfig
from qvl_pipeline.errors import UserError
from qvl_pipeline.locks import holding
from qvl_pipeline.profiles.loader import profile_names
from qvl_pipeline.reports.page import render
from qvl_pipeline.storage.whole import write_whole
from qvl_pipeline.sweeps import trial as trials
from qvl_pipeline.sweeps.search import Grid, Optuna, Search, importances, is_hopeless
from qvl_pipeline.sweeps.trial import Trial
from qvl_pipeline.tracking.mlflow.chain import ABOVE

FOLDER = Path("data/sweeps")
_ABOVE = "above.json"


def read_sweep(path: Path) -> SweepConfig:
    """Read the file of a sweep.

    Raises:
        UserError: It cannot be read, or a key is unknown, missing or of no use; all of them are listed.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return SweepConfig.model_validate({"name": path.stem, **(content or {})})
    except (OSError, UnicodeDecodeError, TypeError) as error:
        raise UserError(f"{path} cannot be read as a sweep: {error}") from error
    except ValidationError as error:
        problems = [
            f"  {'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors(include_url=False, include_context=False)
        ]
        raise UserError("\n".join([f"{path} is no sweep:", *problems])) from error


class Sweep:
    """The trials of a sweep and what is known of them, in `data/sweeps/<name>/<trial>.json`."""

    def __init__(self, config: SweepConfig, project: Path, say: Callable[[str], None]) -> None:
        """Read what is known.

        Args:
            config: The sweep.
            project: Root of the project, the current folder.
            say: Is called with each line that is to be shown.

        Raises:
            UserError: There is no such profile, or the parameters vary what trials share.
        """
        if config.env not in (names := profile_names(project / "conf")):
            raise UserError(f"env: there is no profile '{config.env}', only {', '.join(names)}")
        self._config, self._project, self._say = config, project, say
        self._stages = trials.affected_stages(list(config.parameters))
        if config.objective.metric.startswith("train/") and "train" in self._stages:
            self._stages.remove("evaluate")
        facts = yaml.safe_load((project / "conf" / config.env / "globals.yml").read_text(encoding="utf-8"))
        self._profile = facts["profile"]
        self._folder = project / FOLDER / config.name
        self._folder.mkdir(parents=True, exist_ok=True)
        known = [Trial.load(path) for path in sorted(self._folder.glob("*.json")) if path.name != _ABOVE]
        self._trials = {each.id: each for each in known if set(each.values) == set(config.parameters)}
        # Those that were cut off go on, those that failed are tried again.
        self._again = [each.values for each in self._trials.values() if each.state in ("running", "failed")]
        self._search: Search = (Grid if config.method == "grid" else Optuna)(config, list(self._trials.values()))
        self._lock, self._stop = threading.Lock(), threading.Event()

    def run(self) -> list[Trial]:
        """Try all values; return the trials, the best first.

        Raises:
            UserError: The sweep goes on in another process, or no trial came to its end.
        """
        settings = self._settings()
        self._check_losses_are_reported(TrainConfig.model_validate(settings["parameters"]["train"]))
        with self._alone(), self._above_in_mlflow(settings["mlflow"]) as above:
            slots = self._config.parallel
            with ThreadPoolExecutor(slots) as pool:
                waiting = [pool.submit(self._work, slot, above) for slot in range(slots)]
                try:
                    for work in waiting:
                        work.result()
                except BaseException:
                    self._stop.set()
                    raise
            ranked = self.ranked()
            if not ranked:
                raise UserError(f"no trial came to its end: {self._folder}/<trial>/run.log says why")
            self._show(ranked)
        return ranked

    def ranked(self) -> list[Trial]:
        """Return the trials that are done, the best first."""
        done = [each for each in self._trials.values() if each.state == "done"]
        return sorted(done, key=lambda each: self._config.objective.sign * each.objective)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        try:
            with holding(self._folder):
                yield
        except BlockingIOError as error:
            raise UserError(f"the sweep '{self._config.name}' goes on in another process") from error

    def _work(self, slot: int, above: str | None) -> None:
        """Try one after the other, until there are no more."""
        while not self._stop.is_set() and (trial := self._next()):
            self._try(trial, slot, above)

    def _next(self) -> Trial | None:
        with self._lock:
            if self._again:
                values, known = self._again.pop(0), True
            else:
                values, known = self._search.ask(), False
            if values is None:
                return None
            trial = Trial(values)
            self._trials[trial.id] = trial
            trial.save(self._folder)
            number = len(self._trials)
            self._say(f"{'again' if known else 'trial'} {number}: {trial.label}")
            return trial

    def _try(self, trial: Trial, slot: int, above: str | None) -> None:
        config = self._config
        name, conf = trials.prepare(self._project, config.env, self._profile, trial, config.name, self._stages)

        def on_poll(losses: dict[int, float]) -> bool:
            if self._stop.is_set():
                raise KeyboardInterrupt
            trial.reported = losses or trial.reported
            rule, others = config.prune, list(self._trials.values())
            return bool(rule) and is_hopeless(trial, others, rule.after_trials, rule.after_steps)

        try:
            environment = self._environment(slot, above)
            trial.state = trials.run(self._project, name, conf, self._stages, environment, on_poll)
        finally:
            shutil.rmtree(conf, ignore_errors=True)  # it may hold credentials
        if trial.state == "done":
            trial.objective = trials.objective_of(self._project, name, config.objective)
        with self._lock:
            trial.save(self._folder)
            self._search.tell(trial)
            self._say(self._outcome(trial))
            self._tidy(trial, name)

    def _outcome(self, trial: Trial) -> str:
        if trial.state == "failed":
            return f"  failed: {self._folder / trial.id / 'run.log'}"
        figure = f"{self._config.objective.metric} = {trial.objective:.6g}" if trial.state == "done" else trial.state
        return f"  {trial.label}: {figure}"

    def _tidy(self, trial: Trial, name: str) -> None:
        """Keep the results of the best trial only, where that is asked for."""
        if self._config.keep == "all" or trial.state == "failed":
            return
        best = self.ranked()[:1]
        for other in self._trials.values():
            if other.state in ("done", "pruned") and other not in best:
                trials.remove(self._project, f"{self._profile}-{self._config.name}-{other.id}")

    def _environment(self, slot: int, above: str | None) -> dict[str, str]:
        environment = {key: value for key, value in os.environ.items() if not key.startswith("DVC_")}
        if above:
            environment[ABOVE] = above
        if self._config.parallel > 1 and (gpus := _gpus()):
            share = len(gpus) // self._config.parallel
            if not share:
                raise UserError(
                    f"parallel is {self._config.parallel}, but there are {len(gpus)} GPUs: each trial needs one"
                )
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * share : (slot + 1) * share])
        return environment

    @contextlib.contextmanager
    def _above_in_mlflow(self, settings: dict[str, Any]) -> Iterator[str | None]:
        """Have a run in MLflow below which those of the trials are, and at the end the best figures in it."""
        from qvl_pipeline.tracking.mlflow.sweep_run import SweepRun

        noted = self._folder / _ABOVE
        known = json.loads(noted.read_text(encoding="utf-8"))["run_id"] if noted.exists() else None
        run = SweepRun(settings, f"{self._profile} {self._config.name}", self._config.model_dump(mode="json"), known)
        write_whole(noted, json.dumps({"run_id": run.id}))
        try:
            yield run.id
        except BaseException:
            run.finish("KILLED", None, {})
            raise
        best = self.ranked()[0]
        run.finish("FINISHED", self._page_path, {self._config.objective.metric: best.objective} | best.values)

    def _settings(self) -> Mapping[str, Any]:
        """Return the configuration of the profile, checked."""
        from kedro.framework.session import KedroSession

        with KedroSession.create(project_path=self._project, env=self._config.env) as session:
            return session.load_context().config_loader

    def _check_losses_are_reported(self, train: TrainConfig) -> None:
        config = self._config
        needed = config.objective.metric.startswith("train/eval_") or config.prune is not None
        asked = "train.eval_strategy" in config.parameters or train.eval_strategy != "no"
        if needed and not asked:
            raise UserError(
                "objective train/eval_loss and prune need evaluations while training: set train.eval_strategy to steps "
                f"with train.eval_steps, or to epoch, in conf/{config.env}/parameters.yml"
            )

    @property
    def _page_path(self) -> Path:
        return self._project / "data/08_reporting" / self._profile / f"sweep-{self._config.name}.html"

    def _show(self, ranked: list[Trial]) -> None:
        config, best = self._config, ranked[0]
        shares = importances(ranked)
        page = render(
            "sweep",
            name=config.name,
            profile=self._profile,
            metric=config.objective.metric,
            sought="lowest" if config.objective.sign > 0 else "highest",
            parameters=list(config.parameters),
            trials=ranked,
            others=[each for each in self._trials.values() if each.state != "done"],
            importances=shares,
        )
        write_whole(self._page_path, page)
        self._say(f"best of {len(ranked)}: {best.label} ({config.objective.metric} = {best.objective:.6g})")
        if shares:
            self._say("what mattered: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
        self._say(f"page: {self._page_path.relative_to(self._project)}; to keep it, write into {self._values_of(best)}")

    def _values_of(self, best: Trial) -> str:
        values: dict[str, Any] = best.values
        return f"conf/{self._config.env}/parameters.yml: " + ", ".join(
            f"{name}: {value}" for name, value in values.items()
        )


def _gpus() -> list[str]:
    """Return the names of the GPUs that may be used."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    return [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
