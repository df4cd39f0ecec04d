"""Flower's own commands: how they are found, with which environment, and what their JSON answers say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from shared.errors import CoordinatorError

COMMAND_TIMEOUT_S = 120.0
TASK_POLL_INTERVAL_S = 0.25
"""How often a SuperExec asks for work. Flower's default is 1 s; at 0.1 s a consortium of three idles at
20% of a core."""


class FlowerCommands:
    """Runs ``flwr`` against one SuperLink, whose connection is in ``HOME/flower/flwr/config.toml``."""

    def __init__(self, home: Path) -> None:
        self._home = home

    def home_of(self, name: str) -> Path:
        """``FLWR_HOME`` of one process."""
        return self._home / "flower" / name

    def environment(self, name: str) -> dict[str, str]:
        """Environment of one of Flower's processes: nothing global, no proxies, nothing sent home."""
        kept = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
        return {
            **kept,
            # One FLWR_HOME each: processes that unpack the same bundle into one folder at the same time
            # take each other's half-written files for finished ones.
            "FLWR_HOME": str(self.home_of(name)),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(TASK_POLL_INTERVAL_S),
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
            # Flower's processes find each other, and Python, by name.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}",
        }

    def write_config(self, connection: str, port: int, authority: Path) -> None:
        """The ``config.toml`` with one SuperLink connection, on loopback."""
        folder = self.home_of("flwr")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(
            f'[superlink]\ndefault = "{connection}"\n\n[superlink.{connection}]\n'
            f'address = "127.0.0.1:{port}"\nroot-certificates = {json.dumps(str(authority))}\n'
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start ``flwr ARGUMENTS --format json``; :func:`flower_answer` waits for it."""
        return self._popen(*arguments, "--format", "json")

    def run(self, *arguments: str) -> dict[str, Any]:
        """``flwr ARGUMENTS --format json``. Raises CoordinatorError with Flower's words if it fails."""
        return flower_answer(self.start(*arguments))

    def text(self, *arguments: str) -> str:
        """Standard output of ``flwr ARGUMENTS``, for commands without JSON."""
        return self._popen(*arguments).communicate(timeout=COMMAND_TIMEOUT_S)[0]

    def _popen(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [flower_executable("flwr"), *arguments],
            env=self.environment("flwr"),
            cwd=self._home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def flower_answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """Wait for a ``flwr`` command and return its JSON. Raises CoordinatorError: it failed, or is late."""
    arguments = process.args if isinstance(process.args, list) else [process.args]
    command = " ".join(map(str, arguments))
    try:
        stdout, stderr = process.communicate(timeout=COMMAND_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise CoordinatorError(
            f"`{command}` did not end within {COMMAND_TIMEOUT_S:.0f} s and was stopped",
            remedy="see that the SuperLink answers (lacuna coordinator health), then try again",
        ) from error
    start = stdout.find("{")
    try:
        answer: dict[str, Any] = json.loads(stdout[start:]) if start >= 0 else {}
    except ValueError:
        answer = {}
    if process.returncode != 0 or not answer.get("success"):
        words = str(answer.get("error-message") or stderr.strip() or stdout.strip())
        raise CoordinatorError(f"`{command}` failed: {words[-600:]}")
    return answer


def flower_executable(name: str) -> str:
    """Path of a console script: beside this Python, else on the path. Raises CoordinatorError."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise CoordinatorError(f"{name} is not installed", remedy="pip install 'lacuna[coordinator]'")
    return found
