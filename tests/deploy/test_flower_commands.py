"""Flower's commands: an answer, words of a failure, or an error that says that there was none in time."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deploy import flower_commands
from deploy.flower_commands import flower_answer
from shared.errors import CoordinatorError


def program(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_an_answer_and_a_failure() -> None:
    said = """print('starting {not json'[:8]); print('{"success": true, "run-id": 7}')"""
    assert flower_answer(program(said))["run-id"] == 7
    with pytest.raises(CoordinatorError, match="failed: no such run"):
        flower_answer(program("""print('{"success": false, "error-message": "no such run"}')"""))


def test_a_command_that_does_not_end_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_commands, "COMMAND_TIMEOUT_S", 0.5)
    process = program("import time; time.sleep(600)")
    with pytest.raises(CoordinatorError, match=r"did not end within .* s and was stopped") as told:
        flower_answer(process)
    assert "SuperLink answers" in told.value.diagnostics()
    assert process.returncode == -9
