"""Models of chosen steps, exported while training goes on: what one may want to go back to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

BEST, LAST, EVERY = "best", "last", "every"
# In the run's folder.
FOLDER = "kept"


class KeptModels:
    """Knows which steps are kept, and has them exported; all ranks ask the same."""

    def __init__(self, wanted: tuple[str, ...], output_dir: Path, *, leads: bool) -> None:
        """Keep nothing yet.

        Args:
            wanted: `best`, `last`, and `every:<steps>`.
            output_dir: Folder of the run.
            leads: This rank writes.
        """
        every = next((kind.partition(":")[2] for kind in wanted if kind.startswith(EVERY)), "0")
        self._wanted, self._every = wanted, int(every)
        self._folder, self._leads = output_dir / FOLDER, leads

    def reasons(self, step: int, best_step: int, max_steps: int) -> list[str]:
        """Return why a step is kept; empty for one that is not."""
        every = bool(self._every) and step % self._every == 0
        known = {BEST: step == best_step, LAST: step == max_steps, EVERY: every}
        return [kind for kind in (BEST, LAST, EVERY) if known[kind] and (kind == EVERY or kind in self._wanted)]

    def place(self, step: int) -> Path:
        """Return the folder of a step."""
        return self._folder / f"step-{step}"

    def forget_outdated(self, best_step: int, saved_step: int) -> None:
        """Delete former bests: the checkpoint that was just saved knows the present one."""
        for step in self._steps() if self._leads else []:
            if step <= saved_step and not self.reasons(step, best_step, max_steps=0):
                shutil.rmtree(self.place(step), ignore_errors=True)

    def finish(self, best_step: int, max_steps: int, exported: dict[int, Path], write: Callable[[int], None]) -> None:
        """Complete what is kept, once training has ended; called by all ranks.

        Args:
            best_step: The step with the lowest evaluation loss; 0 without one.
            max_steps: The last step.
            exported: Folder of the final export by its step, whose files are shared and not written again.
            write: Exports the weights as they are now, those of the last step, into the folder of a step.
        """
        for step in {best_step, max_steps} - {0}:
            if self.place(step).exists() or not self.reasons(step, best_step, max_steps):
                continue
            if step in exported:
                if self._leads:
                    shutil.copytree(exported[step], self.place(step), copy_function=os.link)
            elif step == max_steps:
                write(step)

    def facts(self, best_step: int, max_steps: int) -> dict[str, list[str]]:
        """Return why each folder that there is was kept, by its name; those of no reason are deleted."""
        steps = {step: self.reasons(step, best_step, max_steps) for step in self._steps()}
        for step in (step for step, reasons in steps.items() if not reasons):
            shutil.rmtree(self.place(step), ignore_errors=True)
        return {self.place(step).name: reasons for step, reasons in steps.items() if reasons}

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*"))
