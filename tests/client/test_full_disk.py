"""A disk that is really full: the agent refuses before it computes, and goes on when there is room again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "full_disk_site.py"
FOLDERS = (SCRIPT.parents[2], SCRIPT.parents[1], SCRIPT.parents[0])
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode == 0


def on_a_full_disk(root: Path, **order: str) -> dict[str, Any]:
    words = [sys.executable, str(SCRIPT), json.dumps({"root": str(root), **order})]
    if order["disk"] == "tmpfs":
        if not may_mount():
            if os.environ.get("LACUNA_REQUIRE_SERVERS") == "1":
                pytest.fail("a mount namespace of our own is not to be had here")
            pytest.skip("a mount namespace of our own is not to be had here")
        words = [*NAMESPACE, *words]
    path = os.pathsep.join(map(str, (*FOLDERS, *sys.path)))
    done = subprocess.run(
        words,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(seen, dict)
    return seen


CASES = [
    ("upload", "ledger", "tmpfs"),
    ("keys", "ledger", "rlimit"),
    ("upload", "witness", "tmpfs"),
    pytest.param("keys", "ledger", "tmpfs", marks=pytest.mark.slow),
    pytest.param("keys", "witness", "tmpfs", marks=pytest.mark.slow),
    pytest.param("upload", "ledger", "rlimit", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("asked", "full", "disk"), CASES)
def test_a_full_disk_sends_nothing_and_is_got_over(tmp_path: Path, asked: str, full: str, disk: str) -> None:
    """One attempt before, the one that meets the full disk, and one after a restart with room again."""
    seen = on_a_full_disk(tmp_path / "r", asked=asked, full=full, disk=disk)
    assert {tuple(answer) for answer in seen["answers"]} == {("refused", "ledger_unavailable")}
    assert seen["blobs"] == 0
    assert re.search("disk is full|disk I/O error|No space left|File too large", seen["told"]), seen["told"]
    assert "start the site agent again" in seen["told"]
    assert seen["computed"] == ["train"], "only the attempt before"
    overcharged = 1 if (asked, full) == ("upload", "witness") else 0
    assert seen["charged_while_full"] <= 1 + overcharged
    assert seen["charged_at_the_end"] == 2 + overcharged
    assert seen["status"] == "uploaded"
