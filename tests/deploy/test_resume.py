"""`coordinator resume` ends the run that a killed round driver left behind, and none that is at work."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from in_memory_consortium import Consortium
from loopback_ports import free_port
from loopback_services import LoopbackServices, OperationFailedError
from perimeter_pair import find_program

from deploy.flower_run import run_flower
from server.coordinator_home import CoordinatorHome
from server.study_store import StudyStore

pytestmark = [pytest.mark.slow, pytest.mark.flower, pytest.mark.timeout(900)]


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a signed study, whose sites never come."""
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    home = CoordinatorHome(tmp_path / "coordinator" / "coordinator")
    home.root.mkdir(mode=0o700, parents=True)
    consortium = Consortium(tmp_path / "coordinator", n=3, rounds=2)
    consortium.store.close()
    for ledger in consortium.ledgers.values():
        ledger.close()
    return consortium.store.root


def runs_started(study: Path) -> list[str]:
    store = StudyStore(study)
    try:
        return [str(body["run_id"]) for _, _, kind, body in store.events() if kind == "run_started"]
    finally:
        store.close()


def test_resume(study: Path, tmp_path: Path) -> None:
    find_program("nginx", "nginx")
    port = free_port()
    CoordinatorHome(study.parent).authority.create(address=f"127.0.0.1:{port}")
    with LoopbackServices(
        tmp_path, (), agent=lambda *_: [], environment=lambda _: {}, sockets=tmp_path, port=port, seed=1
    ) as services:
        words = ("--study", study.name, "--flwr-home", str(services.operator_home), "--json")

        def status(run_id: str) -> str:
            answer = run_flower(services.operator_home, "lacuna", "list", "lacuna", "--run-id", run_id)
            return str(answer["runs"][0]["status"])

        first = str(json.loads(services.operate("launch", *words))["run_id"])
        services.until(lambda: runs_started(study) == [first], "the round driver does not start")
        with pytest.raises(OperationFailedError, match="is at work; there is nothing to resume"):
            services.operate("resume", *words)
        assert status(first) == "running"

        pid = services.descendant("superexec", "flwr-serverapp")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        time.sleep(1)
        answer = json.loads(services.operate("resume", *words))
        assert answer["stopped"] == [first]
        assert status(first).startswith("finished")
        second = str(answer["run_id"])
        services.until(lambda: runs_started(study) == [first, second], "the second driver does not start")
