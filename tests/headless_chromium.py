"""Pages in a real browser without a screen: document, picture, print. (No tests of its own.)"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


class Chromium:
    """Headless Chromium with a profile of its own; it is given no network."""

    def __init__(self, program: str, profile: Path) -> None:
        self._command = [
            program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--disable-background-networking", "--proxy-server=127.0.0.1:9", f"--user-data-dir={profile}",
        ]  # fmt: skip

    def dom(self, page: Path) -> str:
        """The document as it is after loading, scripts (if any) run."""
        return self._run("--dump-dom", page)

    def picture(self, page: Path, out: Path, *, width: int = 1100, height: int = 1600) -> Path:
        self._run(f"--screenshot={out}", page, f"--window-size={width},{height}")
        return out

    def print(self, page: Path, out: Path) -> Path:
        """The page as PDF, by its print style."""
        self._run(f"--print-to-pdf={out}", page, "--no-pdf-header-footer")
        return out

    def _run(self, what: str, page: Path, *more: str) -> str:
        done = subprocess.run(
            [*self._command, *more, what, page.as_uri()],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


def find_chromium(profile: Path) -> Chromium:
    """Skip, with the reason, where there is no Chromium; fail where LACUNA_REQUIRE_SERVERS forbids that."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        reason = "no Chromium is installed (Debian: apt-get install chromium)"
        if os.environ.get("LACUNA_REQUIRE_SERVERS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return Chromium(program, profile)
