"""One study's evidence for all tests of this folder; tests copy what they change."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from release_study import ASKING, Study, make_study


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return make_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="session")
def asking(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study whose plan asks for a mechanism audit, in-run canaries and a pooled secondary attack."""
    return make_study(tmp_path_factory.mktemp("asking"), audit=ASKING)
