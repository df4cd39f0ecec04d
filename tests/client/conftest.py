"""Makes the modules beside the tests importable; three site agents of one study."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from agent_trio import Trio

TESTS = str(Path(__file__).parent.parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

CLIENT_TESTS = str(Path(__file__).parent)
if CLIENT_TESTS not in sys.path:
    sys.path.insert(0, CLIENT_TESTS)


@pytest.fixture
def trio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trio]:
    from agent_trio import Trio

    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    trio = Trio(tmp_path)
    yield trio
    trio.close()
