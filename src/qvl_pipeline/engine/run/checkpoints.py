"""Checkpoints that are whole or absent: written aside while training goes on, then published by one rename."""

from __future__ import annotations

import logging
import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from qvl_pipeline.engine.model.adapters.adapted import adapter_parameters
from qvl_pipeline.engine.run.checkpoint_files import (
    COMPLETE,
    CheckpointError,
    DamagedCheckpointError,
    DigestingWriter,
    completed,
    damage,
    mark_complete,
    read_marker,
    set_aside,
)
from qvl_pipeline.storage.room import bytes_in, free_bytes, is_full, size_text

logger = logging.getLogger(__name__)


class ModelState:
    """The weights of a (sharded) model that are not the base model's: what is trained, and what adapters add.

    Frozen weights are in the base model, which a checkpoint's identity names by its digest.
    """

    def __init__(self, model: nn.Module) -> None:
        """Refer to the model."""
        self._model = model
        parameters = model.named_parameters(remove_duplicate=False)
        self._names = {name for name, parameter in parameters if parameter.requires_grad}
        self._names |= adapter_parameters(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights under the names of the unsharded model."""
        return {name: weight for name, weight in get_model_state_dict(self._model).items() if name in self._names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put weights back."""
        set_model_state_dict(self._model, state_dict, options=StateDictOptions(strict=False))


class OptimizerState:
    """The state of all optimizers, under the names of the model's parameters: it fits any number of ranks."""

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Refer to them."""
        self._model, self._optimizers = model, tuple(optimizers)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each parameter."""
        return get_optimizer_state_dict(self._model, self._optimizers)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put the state of the parameters back; rates, decay and the like stay those of this run, which may differ."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        set_optimizer_state_dict(self._model, self._optimizers, state_dict)
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, own in zip(groups, settings, strict=True):
            group.update(own)


class RandomState:
    """The random number generators of one rank."""

    def __init__(self, device: torch.device) -> None:
        """Remember which device's generator counts."""
        self._device = device

    def state_dict(self) -> dict[str, Any]:
        """Return the states of Python's and torch's generators."""
        state = {"python": random.getstate(), "cpu": torch.get_rng_state()}
        if self._device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self._device)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the generators go on where they were."""
        random.setstate(state_dict["python"])
        torch.set_rng_state(state_dict["cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state_dict["cuda"], self._device)


class _LoadPlanner(DefaultLoadPlanner):
    """Does without the state that a checkpoint cannot have, which then starts as in a first step.

    That is the optimizer's of parameters that had no gradient before the checkpoint, those of a vision tower that saw
    no media yet: DCP makes state to load into by taking a step of size zero, which counts. And it is the loss scale, in
    the checkpoint of a run in another precision than float16.
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        super().set_up_planner(state_dict, metadata, is_coordinator)
        absent = [name for name in self.state_dict if name not in metadata.state_dict_metadata]
        for name in absent:
            if name.startswith(("optimizer.state.", "loss_scale.")):
                value = self.state_dict.pop(name)
                if name.endswith(".step"):
                    value.zero_()


class Checkpoints:
    """The checkpoints of one run; all methods are called by all ranks, in the same order.

    At most one save is under way. An asynchronous one stops training only while the state is copied to (pinned, reused)
    host memory; a thread then writes it, over a process group of its own, because two threads must not mix their
    collectives in one. It is published once *all* ranks have written, at the end of the step in which all of them know.

    Attributes:
        protected_step: The checkpoint after this step is kept, however many newer ones there are.
    """

    def __init__(
        self,
        folder: Path,
        state: Mapping[str, Stateful | Mapping[str, Any]],
        *,
        rank_state: Mapping[str, Stateful],
        identity: Mapping[str, Any],
        keep: int,
        asynchronous: bool,
        timeout_s: float = 1800.0,
    ) -> None:
        """Clean the folder of what a killed run left half-written.

        Args:
            folder: Where the `checkpoint-<step>` folders are.
            state: What is common to all ranks or sharded over them, by name: objects, or tensors that
                loading overwrites; loads on any number of ranks.
            rank_state: What each rank has of its own, by name; loads on the same number of ranks only.
            identity: Facts of the run that whoever continues a checkpoint must agree in; written into each.
            keep: Checkpoints kept; two are, whatever it says.
            asynchronous: Write in the background.
            timeout_s: Seconds after which a rank that neither writes nor reads on fails the save or the load.
        """
        self._folder, self._state, self._rank_state = folder, dict(state), dict(rank_state)
        # While one is written, two are there: the newest may turn out to be damaged.
        self._identity, self._keep = dict(identity), max(keep, 2)
        self._rank = f"rank{dist.get_rank()}"
        timeout = timedelta(seconds=timeout_s)
        self._control = dist.new_group(backend="gloo", timeout=timeout)
        self._stager: DefaultStager | None = None
        if asynchronous:
            self._writers = dist.new_group(backend="gloo", timeout=timeout)
            cuda = torch.cuda.is_available()
            self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))
        self.protected_step = 0
        self._saving: tuple[int, Future[Any]] | None = None
        self._newest = max((step for step, _ in completed(folder)), default=0)
        if dist.get_rank() == 0:
            whole = {path for _, path in completed(folder)}
            for left_behind in [*folder.glob(".checkpoint-*.partial"), *(set(folder.glob("checkpoint-*")) - whole)]:
                _remove(left_behind)
        dist.barrier()

    def save(self, step: int) -> None:
        """Save the state after `step`, unless it is saved already; waits for a save that is still under way.

        Raises:
            CheckpointError: This or the save before it failed.
        """
        self.wait()
        if step == self._newest:
            return
        state = {**self._state, self._rank: self._rank_states()}
        partial = self._partial(step)
        if self._stager is None:
            writer = DigestingWriter(partial)
            self._saving = step, _done(lambda: dcp.save(state, storage_writer=writer, process_group=self._control))
            self.wait()
        else:
            writing = dcp.async_save(
                state,
                storage_writer=DigestingWriter(partial),
                process_group=self._writers,
                async_stager=self._stager,
            )
            self._saving = step, writing

    def end_step(self, *, stop_requested: bool) -> bool:
        """Publish a save that all ranks have finished, and let all ranks know of a request to stop.

        Ranks agree through one small reduction among the hosts, which waits for no GPU.

        Args:
            stop_requested: This rank was asked to stop.

        Returns:
            Whether any rank was asked to stop: the same answer on all.

        Raises:
            CheckpointError: The save under way failed on some rank.
        """
        writing = self._saving[1] if self._saving else None
        unfinished = writing is not None and not writing.done()
        failed = writing is not None and writing.done() and writing.exception() is not None
        flags = torch.tensor([stop_requested, unfinished, failed], dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._control)
        any_stop, any_unfinished, any_failed = map(bool, flags.tolist())
        if any_failed or (writing is not None and not any_unfinished):
            self._finish(failed=any_failed)
        return any_stop

    def wait(self) -> None:
        """Wait for the save under way, if there is one, and publish it.

        Raises:
            CheckpointError: It failed on some rank.
        """
        if self._saving is None:
            return
        failed = torch.tensor([self._saving[1].exception() is not None], dtype=torch.int32)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=self._control)
        self._finish(failed=bool(failed))

    def load(self, path: Path) -> int:
        """Load a checkpoint, of this run or another that agrees in its identity; return its step.

        Generators and other state of single ranks are taken over when the number of ranks is the same.

        Raises:
            CheckpointError: It is missing, incomplete, of another base model or kind of run, or does not hold what this
                run needs.
            DamagedCheckpointError: It is not what was written; all ranks raise it.
        """
        self._check(path)
        marker = read_marker(path)
        self._check_identity(path, marker.get("identity", {}))
        state: dict[str, Any] = dict(self._state)
        own = marker["world_size"] == dist.get_world_size()
        if own:
            state[self._rank] = self._rank_states()
        try:
            dcp.load(state, checkpoint_id=path, process_group=self._control, planner=_LoadPlanner())
        except CheckpointException as error:
            raise CheckpointError(f"{path} cannot be loaded: {_reasons(error)}") from error
        for name, stateful in self._rank_state.items() if own else ():
            stateful.load_state_dict(state[self._rank][name])
        self._newest = int(marker["step"]) if path.parent == self._folder else self._newest
        return int(marker["step"])

    def load_newest(self) -> int:
        """Load the newest checkpoint of this run that is not damaged; return its step, 0 when there is none.

        Those that are damaged are set aside, and named in the log.
        """
        for _, path in reversed(completed(self._folder)):
            try:
                return self.load(path)
            except DamagedCheckpointError as error:
                logger.error("%s: going on from the checkpoint before it", error)
                self._newest = 0
                if dist.get_rank() == 0:
                    set_aside(path)
                dist.barrier(self._control)
        return 0

    def _check(self, path: Path) -> None:
        """Check the files, each on one of the ranks."""
        found: list[str | None] = [None] * dist.get_world_size()
        mine = damage(path, slice(dist.get_rank(), None, dist.get_world_size()))
        dist.all_gather_object(found, mine, group=self._control)
        if wrong := next(filter(None, found), None):
            raise DamagedCheckpointError(wrong)

    def _check_identity(self, path: Path, found: Mapping[str, Any]) -> None:
        """Refuse a checkpoint of another base model, or of other parts: it holds only what was trained of them."""
        own = self._identity
        differing = sorted(name for name in {*own, *found} if found.get(name) != own.get(name))
        if differing:
            name = differing[0]
            raise CheckpointError(
                f"{path} belongs to a run of another kind ({name}: {found.get(name)} there, {own.get(name)} "
                "here): put that back, or start afresh with train.resume_from_checkpoint=none"
            )

    def _rank_states(self) -> dict[str, Any]:
        return {name: stateful.state_dict() for name, stateful in self._rank_state.items()}

    def _finish(self, *, failed: bool) -> None:
        assert self._saving is not None
        step, writing = self._saving
        self._saving = None
        if failed:
            self._refuse(step, writing)
        if dist.get_rank() == 0:
            self._publish(step)
        self._newest = step

    def _refuse(self, step: int, writing: Future[Any]) -> None:
        error = writing.exception() if writing.done() else None
        reason = _reasons(error) if error else "another rank failed"
        last = completed(self._folder)
        if _no_room(error):
            needed = f"about {size_text(bytes_in(last[-1][1]))} are needed, " if last else ""
            reason += f" ({needed}{size_text(free_bytes(self._folder))} are free there)"
        kept = f"the last complete one is {last[-1][1].name}" if last else "there is no earlier one"
        raise CheckpointError(
            f"the checkpoint after step {step} could not be written to {self._folder}: {reason}; {kept}. Make room or "
            "mend the storage, then run the same command to go on from there"
        )

    def _publish(self, step: int) -> None:
        """Rename the folder, then delete all but the newest: an older one goes only after this one is there."""
        partial, target = self._partial(step), self._folder / f"checkpoint-{step}"
        facts = {"step": step, "world_size": dist.get_world_size(), "time": time.time(), "identity": self._identity}
        mark_complete(partial, facts)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        for number, path in completed(self._folder)[: -self._keep]:
            if number != self.protected_step:
                _remove(path)

    def _partial(self, step: int) -> Path:
        return self._folder / f".checkpoint-{step}.partial"


def _remove(path: Path) -> None:
    """Delete a checkpoint, its marker first: a kill in between leaves none that looks whole. Training goes on."""
    try:
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path)
    except OSError as error:
        logger.warning("%s is no longer needed, but cannot be deleted: %s", path, error)


def _done(action: Callable[[], Any]) -> Future[Any]:
    """Run an action at once, as a future that is done."""
    future: Future[Any] = Future()
    try:
        future.set_result(action())
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        future.set_exception(error)
    return future


def _no_room(error: BaseException | None) -> bool:
    if isinstance(error, CheckpointException):
        return any(is_full(failure) for failure, _ in error.failures.values())
    return is_full(error)


def _reasons(error: BaseException | None) -> str:
    """Say in one line what went wrong on which rank; DCP's own text holds a traceback for each."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in sorted(error.failures.items()))
    return f"{type(error).__name__}: {error}"
