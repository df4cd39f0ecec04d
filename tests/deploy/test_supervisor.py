"""No process outlives its consortium, however the consortium ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.supervised import SupervisedProcesses
from shared.errors import CoordinatorError

REPOSITORY = Path(__file__).parents[2]

DAEMON = (
    "import os, sys, time, signal\n"
    "if len(sys.argv) > 2:\n"
    "    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "if os.fork() == 0:\n"
    "    os.setsid()\n"
    "    if os.fork() == 0:\n"
    "        open(sys.argv[1], 'w').write(str(os.getpid()))\n"
    "        time.sleep(300)\n"
    "    os._exit(0)\n"
    "time.sleep(300)\n"
)
"""Leaves a grandchild in a session of its own whose parent is dead; ignores SIGTERM if told to."""


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def written_pid(path: Path) -> int:
    wait_for(lambda: path.exists() and path.read_text().strip() != "")
    return int(path.read_text())


def start_daemon(
    processes: SupervisedProcesses, folder: Path, *options: str, name: str = "daemon"
) -> tuple[int, int]:
    file = folder / f"{name}.pid"
    pid = processes.start(
        name, [sys.executable, "-c", DAEMON, str(file), *options], log=folder / f"{name}.log", cwd=folder
    )
    return pid, written_pid(file)


def test_close_ends_stubborn_and_orphaned_processes(tmp_path: Path) -> None:
    keepsake = tmp_path / "sockets"
    keepsake.mkdir()
    processes = SupervisedProcesses(remove_at_end=[keepsake])
    child, orphan = start_daemon(processes, tmp_path, "ignore SIGTERM")
    assert runs(child)
    assert runs(orphan)
    processes.close()
    assert not runs(child)
    assert not runs(orphan)
    assert not runs(processes.pid)
    assert not keepsake.exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_everything_ends_with_a_parent_that_a_signal_ends(tmp_path: Path, number: int) -> None:
    code = (
        "import signal, sys, time\nfrom pathlib import Path\n"
        "from tests.deploy.test_supervisor import SupervisedProcesses, start_daemon\n"
        # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "processes = SupervisedProcesses()\n"
        "folder = Path(sys.argv[1])\n"
        "child, _ = start_daemon(processes, folder)\n"
        "(folder / 'supervisor').write_text(str(processes.pid))\n"
        "(folder / 'child').write_text(str(child))\n"
        "time.sleep(300)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    child, supervisor = written_pid(tmp_path / "child"), written_pid(tmp_path / "supervisor")
    orphan = written_pid(tmp_path / "daemon.pid")
    parent.send_signal(number)
    parent.wait()
    wait_for(lambda: not any(map(runs, (child, orphan, supervisor))))


def test_what_it_started_dies_with_a_killed_supervisor(tmp_path: Path) -> None:
    processes = SupervisedProcesses()
    pid = processes.start(
        "sleep", [sys.executable, "-c", "import time; time.sleep(300)"], log=tmp_path / "log", cwd=tmp_path
    )
    os.kill(processes.pid, signal.SIGKILL)
    wait_for(lambda: not runs(pid))
    processes.close()


def test_names_exit_codes_and_descendants_are_told(tmp_path: Path) -> None:
    processes = SupervisedProcesses()
    try:
        processes.start(
            "three", [sys.executable, "-c", "raise SystemExit(3)"], log=tmp_path / "l", cwd=tmp_path
        )
        wait_for(lambda: processes.exit_code("three") == 3)
        shell = ["sh", "-c", "echo said; sleep 300 & wait"]
        pid = processes.start("shell", shell, log=tmp_path / "log", cwd=tmp_path)
        with pytest.raises(CoordinatorError, match="runs already"):
            processes.start("shell", shell, log=tmp_path / "log", cwd=tmp_path)
        wait_for(lambda: len(processes.processes()) == 2)
        assert {(entry.name, entry.argv[0]) for entry in processes.processes()} == {
            ("shell", "sh"),
            ("shell", "sleep"),
        }
        assert processes.pid_of("shell") == pid
        processes.stop("shell")
        assert processes.processes() == []
        assert (tmp_path / "log").read_text() == "said\n"
        with pytest.raises(CoordinatorError, match="nothing was started"):
            processes.exit_code("nobody")
        with pytest.raises(CoordinatorError, match="no-such-program"):
            processes.start("x", ["no-such-program"], log=tmp_path / "l", cwd=tmp_path)
    finally:
        processes.close()
