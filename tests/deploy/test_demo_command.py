"""``lacuna demo`` as its user runs it: two side by side, Ctrl-C in the middle, again into the same folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from privacy.compliance.verify import verify_bundle
from server.study_store import StudyStore
from shared.errors import LacunaError
from shared.exit_codes import ExitCode

pytestmark = [pytest.mark.slow, pytest.mark.flower, pytest.mark.timeout(5400)]

REPOSITORY = Path(__file__).resolve().parents[2]
INTERRUPTED = 130
AS_FROM_A_TERMINAL = (
    # A shell starts what it puts in the background with SIGINT ignored, and children inherit that.
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "from deploy.cli.main import main; main()"
)


@contextmanager
def demo(out: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", AS_FROM_A_TERMINAL, "demo", "--out", str(out), "--rounds", "3"],
            cwd=REPOSITORY,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def processes_of(out: Path) -> list[str]:
    """Command lines of the processes that name the demo's folder, in arguments or environment."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if process.pid != os.getpid() and f"{out}/" in " ".join([*words, *process.environ().values()]):
                found.append(" ".join(words))
    return found


def rounds_done(out: Path) -> int:
    """Completed rounds of the demo's study; -1 before there is one."""
    try:
        store = StudyStore(out / "coordinator" / "coordinator" / "demo")
        try:
            return store.completed_rounds()
        finally:
            store.close()
    except LacunaError:
        return -1


def wait_for_round(out: Path, number: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 600
    while rounds_done(out) < number:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def test_side_by_side_interrupted_and_again(tmp_path: Path) -> None:
    """One demo is stopped in the middle of a round while another runs: it leaves no process and does not
    disturb the other, and the next one in the same folder goes through."""
    first, second = tmp_path / "first", tmp_path / "second"
    with demo(first, tmp_path / "1.log") as stopped, demo(second, tmp_path / "2.log") as other:
        wait_for_round(first, 1, stopped, tmp_path / "1.log")
        wait_for_round(second, 1, other, tmp_path / "2.log")
        running = processes_of(first)
        assert sum("serve" in words for words in running) >= 3, "the agents were running"
        os.killpg(stopped.pid, signal.SIGINT)  # as a terminal does: to its whole process group
        assert stopped.wait(60) == INTERRUPTED, (tmp_path / "1.log").read_text()
        assert "Traceback" not in (tmp_path / "1.log").read_text()
        deadline = time.monotonic() + 30
        while processes_of(first) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert processes_of(first) == []
        assert rounds_done(first) < 3

        with demo(first, tmp_path / "3.log") as again:
            assert again.wait(2400) in (ExitCode.DONE, ExitCode.REFUSED), (tmp_path / "3.log").read_text()
        assert other.wait(2400) in (ExitCode.DONE, ExitCode.REFUSED), (tmp_path / "2.log").read_text()
    for out in (first, second):
        assert rounds_done(out) == 3
        assert processes_of(out) == []
        if (out / "bundle").exists():
            assert verify_bundle(out / "bundle").passed


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with demo(mine, tmp_path / "log") as process:
        assert process.wait(120) == ExitCode.USAGE
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert "was not made by lacuna demo" in (tmp_path / "log").read_text().replace("\n", " ")
