"""The parent's side of :mod:`deploy.supervisor`: start, watch and end processes that cannot be orphaned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.errors import CoordinatorError, InternalError

CLOSE_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class RunningProcess:
    """One process and the started process that it descends from (or is)."""

    name: str
    pid: int
    argv: tuple[str, ...]


class SupervisedProcesses:
    """A supervisor process and what runs under it. Close it, or die: either way all of it ends.

    Args:
        remove_at_end: Directories that the supervisor removes when everything has ended.
    """

    def __init__(self, *, remove_at_end: Sequence[Path] = ()) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "deploy.supervisor", *map(str, remove_at_end)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            cwd=Path(__file__).parents[1],
        )

    @property
    def pid(self) -> int:
        """The supervisor's own process id."""
        return self._process.pid

    def start(
        self, name: str, argv: Sequence[str], *, log: Path, cwd: Path, env: Mapping[str, str] | None = None
    ) -> int:
        """Start a process and return its id. Output goes to ``log``, appended.

        Raises:
            CoordinatorError: it cannot be started, or one of that name still runs.
        """
        answer = self._ask(
            do="start",
            name=name,
            argv=list(argv),
            log=str(log),
            cwd=str(cwd),
            env=dict(os.environ if env is None else env),
        )
        return int(answer["pid"])

    def exit_code(self, name: str) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        code = self._ask(do="status", name=name)["exit"]
        return None if code is None else int(code)

    def pid_of(self, name: str) -> int:
        return int(self._ask(do="status", name=name)["pid"])

    def signal(self, name: str, number: int) -> None:
        self._ask(do="signal", name=name, number=number)

    def stop(self, name: str) -> None:
        """End a process and its descendants: SIGTERM, then SIGKILL."""
        self._ask(do="stop", name=name)

    def processes(self) -> list[RunningProcess]:
        """Everything that runs under the supervisor, descendants included."""
        return [
            RunningProcess(name=entry["name"], pid=entry["pid"], argv=tuple(entry["argv"]))
            for entry in self._ask(do="processes")["processes"]
        ]

    def close(self) -> None:
        """End everything, and wait until nothing is left."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()
        try:
            self._process.wait(CLOSE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            # Its children die with it.
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ask(self, **command: Any) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise InternalError("the supervisor was closed already")
        with self._lock:
            try:
                stdin.write(json.dumps(command).encode() + b"\n")
                stdin.flush()
                line = stdout.readline()
            except (BrokenPipeError, ValueError) as error:
                raise InternalError("the supervisor of the local processes is gone") from error
        if not line:
            raise InternalError("the supervisor of the local processes is gone")
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            raise CoordinatorError(str(answer["error"]))
        return answer
