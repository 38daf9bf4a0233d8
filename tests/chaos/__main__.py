"""`python -m tests.chaos --trials 100 --seed 0 [kind …]`: as many trials as one likes, each of a disturbed run."""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
import time
from itertools import cycle
from pathlib import Path

from tests.chaos.harness import trial, undisturbed
from tests.chaos.kills import DISTURBANCES


def main() -> int:
    """Run the trials; return how many failed. The project and the log of each that did are kept, and named."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(DISTURBANCES)}; all by default")
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.kinds) - DISTURBANCES.keys():
        parser.error(f"there is no kind {sorted(unknown)[0]}; known are {', '.join(DISTURBANCES)}")
    place = Path(tempfile.mkdtemp(prefix="chaos-"))
    reference = undisturbed(place / "reference" / "project")
    print(f"an undisturbed run takes {reference.seconds:.0f} s", flush=True)
    failed = counted = 0
    for number, kind in enumerate(cycle(options.kinds or DISTURBANCES), start=1):
        if counted == options.trials:
            break
        folder, started, done = place / f"trial-{number}", time.monotonic(), []
        rng = random.Random(f"{options.seed}/{number}")
        try:
            trial(folder / "project", reference, [DISTURBANCES[kind]], rng, done)
            outcome = "recovered"
            shutil.rmtree(folder)
        except AssertionError as error:
            failed += 1
            outcome = f"FAILED, see {folder}: {error}"
        counted += bool(done) or outcome != "recovered"
        what = "; ".join(done) or "came too late, and is not counted"
        print(f"{number:3}  {time.monotonic() - started:4.0f} s  {kind:12} {what}: {outcome}", flush=True)
    print(f"{options.trials - failed} of {options.trials} recovered", flush=True)
    if not failed:
        shutil.rmtree(place)
    return failed


if __name__ == "__main__":
    raise SystemExit(min(main(), 1))
