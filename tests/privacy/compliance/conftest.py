"""One released bundle for all tests of this folder; tests copy it before they change it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[2] / "server" / "release"))

from release_study import Study, make_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "release-log.jsonl"


@pytest.fixture(scope="session")
def bundle(study: Study, log: Path) -> Path:
    return study.release(study.root / "bundle", log_path=log).path
