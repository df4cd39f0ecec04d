"""A site that is killed anywhere in a round: its ledger covers all that left, and no number is used twice."""

from __future__ import annotations

import random
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from crash_points import POINTS, CrashPoints
from crash_study import AgentProcesses, InProcessStudy, ProcessStudy, check_recovered
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], InProcessStudy]]:
    """Studies in this process, each in a folder of its own."""
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    points = CrashPoints()
    studies: list[InProcessStudy] = []

    def build() -> InProcessStudy:
        root = tmp_path / f"study-{len(studies)}"
        root.mkdir()
        studies.append(InProcessStudy(root, points))
        return studies[-1]

    with points.installed():
        yield build
        for study in studies:
            study.close()


def test_without_a_death_each_point_is_passed(make: Callable[[], InProcessStudy]) -> None:
    study = make()
    study.run()
    assert {number: study.sent[number] for number in study.sent} == {1: "train", 2: "train", 3: "audit"}
    assert [point for point in POINTS if not study.points.passed[point]] == []


@pytest.mark.parametrize("point", POINTS)
def test_a_site_that_dies_at_a_named_point_recovers(make: Callable[[], InProcessStudy], point: str) -> None:
    """The second passage, so that a round was completed before."""
    study = make()
    study.points.arm(point, 1 if "count" in point else 2)
    study.run()
    assert len(study.deaths) == 1 and study.finished
    check_recovered(study)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deaths=st.lists(st.tuples(st.sampled_from(POINTS), st.integers(1, 8)), min_size=1, max_size=4),
)
@example(deaths=[("before-check", 3), ("before-begin", 3)])
def test_random_crash_schedules(make: Callable[[], InProcessStudy], deaths: list[tuple[str, int]]) -> None:
    """Up to four deaths in one study, each armed when the site is back from the one before."""
    study = make()
    waiting = list(reversed(deaths))
    study.points.arm(*waiting.pop())
    revive = study.revive

    def revive_and_arm() -> None:
        revive()
        if waiting:
            study.points.arm(*waiting.pop())

    study.revive = revive_and_arm  # type: ignore[method-assign]
    study.run()
    study.points.disarm()
    check_recovered(study)


@pytest.fixture
def processes() -> Iterator[AgentProcesses]:
    processes = AgentProcesses()
    yield processes
    processes.close()


@contextmanager
def process_study(
    processes: AgentProcesses, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> Iterator[ProcessStudy]:
    """In a folder with a short name: a unix socket's path has at most 100 bytes."""
    with tempfile.TemporaryDirectory(prefix="lc") as folder:
        monkeypatch.setenv("LACUNA_COUNTER_DIR", f"{folder}/counters")
        study = ProcessStudy(Path(folder), processes, counters=f"{folder}/counters", **options)
        try:
            yield study
        finally:
            study.close()


@pytest.mark.parametrize(("point", "how"), [("before-commit", "kill"), ("mid-answer", "exit")])
def test_a_killed_agent_process_recovers(
    processes: AgentProcesses, monkeypatch: pytest.MonkeyPatch, point: str, how: str
) -> None:
    with process_study(processes, monkeypatch, point=point, passage=2, how=how) as study:
        study.run()
        assert study.exit_codes == [-signal.SIGKILL if how == "kill" else 1]
        assert study.finished
        check_recovered(study)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_an_agent_process_that_dies_at_any_named_point_recovers(
    processes: AgentProcesses, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    for point in POINTS:
        with process_study(processes, monkeypatch, point=point, how=how) as study:
            study.run()
            assert len(study.exit_codes) == 1 and study.finished, point
            check_recovered(study)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_random_deaths_of_agent_processes(
    processes: AgentProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random passage of a random point, so in a random round and attempt; each counts if it killed.

    A passage that the study does not come to leaves the process armed: the checks would set it off.
    """
    rng = random.Random(20)
    died: list[tuple[str, int, int]] = []
    while len(died) < 200:
        point, passage = rng.choice(POINTS), rng.randint(1, 6)
        with process_study(processes, monkeypatch, point=point, passage=passage) as study:
            study.run()
            if not study.deaths:
                assert study.exit_codes == [] and study.finished
                continue
            died += [(point, *where) for where in study.deaths]
            assert study.exit_codes == [-signal.SIGKILL]
            check_recovered(study)
    assert len({point for point, _, _ in died}) > 25
    assert {round_number for _, round_number, _ in died} >= {1, 2, 3}
    assert len({attempt for _, _, attempt in died}) >= 3


@pytest.mark.parametrize("point", ["mid-answer", "after-answer"])
def test_these_checks_see_a_site_that_charges_after_it_has_sent(
    processes: AgentProcesses, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Broken on purpose: the recovered ledger undercounts, and that shows."""
    with process_study(processes, monkeypatch, point=point, passage=3, late=True) as study:
        study.run()
        with pytest.raises(AssertionError, match=r"sent .*charged"):
            check_recovered(study)
