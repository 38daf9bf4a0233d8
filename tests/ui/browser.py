"""Debian's Chromium without a window: opens a page, returns what it shows, and keeps a picture of it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

# Looked at by people; git ignores it.
SCREENSHOTS = Path(__file__).parents[2] / "build" / "screenshots"
NAMES = ("chromium", "chromium-browser", "google-chrome")


def open_page(url: str, name: str, *, height: int = 1000, wait_ms: int = 10_000, shows: str = "") -> str:
    """Open a page, and return its DOM as text once scripts have run for `wait_ms` of the page's own time.

    Args:
        url: Address of the page.
        name: Name of the picture in `SCREENSHOTS`.
        height: Height of the window, in pixels.
        wait_ms: Time of the page, which runs faster than real time while nothing is loading.
        shows: What must be in the DOM: a page that draws late, on a busy machine, is opened again with twice the time.
    """
    for times in range(4):
        page = _open(url, name, height, wait_ms << times)
        if shows in page:
            break
    return page


def _open(url: str, name: str, height: int, wait_ms: int) -> str:
    command = next(filter(None, map(shutil.which, NAMES)), None)
    assert command, "install Chromium (Debian: apt-get install chromium); `make test` does when it may"
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    picture = SCREENSHOTS / f"{name}.png"
    picture.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        options += [f"--window-size=1400,{height}", f"--virtual-time-budget={wait_ms}"]
        done = subprocess.run(
            [command, *options, f"--screenshot={picture}", "--dump-dom", url],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert picture.exists(), done.stderr
    return done.stdout
