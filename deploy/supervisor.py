"""Starts processes and lets none of them outlive it, however it ends.

A supervisor is a process of its own, so that it can clean up after a parent that was killed. It reads
one JSON command per line from standard input and answers each with one line on standard output. When
its input ends, because the parent closed it or died, it ends everything that descends from it: it is the
reaper of its descendants (``PR_SET_CHILD_SUBREAPER``), so a process that started a session of its own or
lost its parent still belongs to it. Should the supervisor itself be killed, the kernel kills the
processes that it started (``PR_SET_PDEATHSIG``).

Commands: ``start`` (name, argv, env, log, cwd), ``signal`` (name, number), ``status`` (name),
``processes`` (every descendant with its command line and the name it descends from), ``stop`` (name).
Arguments: directories to remove when everything has ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 4.0
"""How long a process may take to end after SIGTERM; Flower's own take 1 to 2 s."""

_libc = ctypes.CDLL(None, use_errno=True)


class Supervisor:
    """Runs until its input ends. Linux only: prctl and /proc."""

    def __init__(self, remove_at_end: list[str]) -> None:
        self._remove_at_end = remove_at_end
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._parent = os.getppid()

    def run(self) -> None:
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        # Ctrl-C reaches the whole terminal: the parent decides, not we.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        try:
            self._serve()
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self._end_all()
            for directory in self._remove_at_end:
                shutil.rmtree(directory, ignore_errors=True)

    def _serve(self) -> None:
        buffer = b""
        while True:
            ready, _, _ = select.select([0], [], [], 1.0)
            self._reap()
            if os.getppid() != self._parent:
                return
            if not ready:
                continue
            data = os.read(0, 65536)
            if not data:
                return
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                answer = self._obey(json.loads(line))
                os.write(1, json.dumps(answer).encode() + b"\n")

    def _obey(self, command: dict[str, Any]) -> dict[str, Any]:
        name = command.get("name", "")
        try:
            match command["do"]:
                case "start":
                    return self._start(command)
                case "signal":
                    self._children[name].send_signal(command["number"])
                    return {"ok": True}
                case "status":
                    child = self._children[name]
                    return {"ok": True, "pid": child.pid, "exit": child.poll()}
                case "stop":
                    _end([self._children[name].pid, *_descendants(self._children[name].pid)])
                    return {"ok": True, "exit": self._children[name].wait()}
                case "processes":
                    return {"ok": True, "processes": self._processes()}
                case other:
                    return {"ok": False, "error": f"unknown command {other!r}"}
        except KeyError:
            return {"ok": False, "error": f"nothing was started under the name {name!r}"}
        except OSError as error:
            return {"ok": False, "error": f"{name}: {error}"}

    def _start(self, command: dict[str, Any]) -> dict[str, Any]:
        name = command["name"]
        running = self._children.get(name)
        if running is not None and running.poll() is None:
            return {"ok": False, "error": f"{name} runs already, as {running.pid}"}
        with Path(command["log"]).open("ab") as log:
            child = subprocess.Popen(
                command["argv"],
                env=command["env"],
                cwd=command["cwd"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        self._children[name] = child
        return {"ok": True, "pid": child.pid}

    def _processes(self) -> list[dict[str, Any]]:
        parents = _parents()
        return [
            {"name": name, "pid": pid, "argv": _argv(pid)}
            for name, child in self._children.items()
            if child.poll() is None
            for pid in (child.pid, *_descendants(child.pid, parents))
            if _alive(pid)
        ]

    def _reap(self) -> None:
        """Take note of dead children; orphans that were adopted are reaped here too."""
        known = {child.pid: child for child in self._children.values()}
        while True:
            try:
                dead = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if dead is None:
                return
            if dead.si_pid in known:
                known[dead.si_pid].poll()
            else:
                os.waitpid(dead.si_pid, 0)

    def _end_all(self) -> None:
        _end(_descendants(os.getpid()))
        while True:
            # Whoever is left is ours by adoption: no descendant can leave a subreaper.
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                for left in _descendants(os.getpid()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(left, signal.SIGKILL)
                time.sleep(0.02)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _end(pids: list[int]) -> None:
    """SIGTERM, and SIGKILL for those that are still there after a grace period."""
    for number, grace_s in ((signal.SIGTERM, GRACE_S), (signal.SIGKILL, GRACE_S)):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + grace_s
        while time.monotonic() < deadline:
            pids = [pid for pid in pids if _alive(pid)]
            if not pids:
                return
            time.sleep(0.05)


def _stat(pid: int) -> tuple[str, int] | None:
    """State letter and parent of a process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, int(parent)


def _alive(pid: int) -> bool:
    stat = _stat(pid)
    return stat is not None and stat[0] != "Z"


def _parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) is not None:
            found[int(entry.name)] = stat[1]
    return found


def _descendants(pid: int, parents: dict[int, int] | None = None) -> list[int]:
    parents = _parents() if parents is None else parents
    found: list[int] = []
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier} - set(found)
        found.extend(frontier)
    return found


def _argv(pid: int) -> list[str]:
    try:
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return [part.decode(errors="replace") for part in raw.split(b"\0")[:-1]]


if __name__ == "__main__":
    Supervisor(sys.argv[1:]).run()
