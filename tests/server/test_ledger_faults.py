"""A ledger that fails in the middle of a study: training stops, says why, sends nothing, and goes on later.

Real agents, ledgers and driver over the in-memory transport. Full disks are in tests/client.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from in_memory_consortium import Consortium

from client.serving import open_ledger
from client.site_policy import SitePolicy, save_policy
from privacy.dp.accounting import epsilon
from privacy.dp.execution_plan import ExecutionPlan
from server.transport import Fate
from shared.agent_messages import EXCHANGE_REPLY, REFUSED
from shared.errors import CoordinatorError, LedgerError
from shared.wire import Envelope, unpack

Mend = Callable[[], None]


class Struck:
    """Lets a study run, calls ``strike`` once its first round is done, and notes what site 0 says after."""

    def __init__(self, consortium: Consortium, strike: Callable[[], None]) -> None:
        self._consortium, self._strike, self.struck = consortium, strike, False
        self.said: list[Envelope] = []
        consortium.faults = self._leg

    def _leg(self, node: int, leg: str, envelope: Envelope) -> Fate:
        if not self.struck and self._consortium.store.completed_rounds() == 1:
            self.struck = True
            self._strike()
        if self.struck and node == 0 and leg == "reply" and envelope.kind == EXCHANGE_REPLY:
            self.said += unpack(envelope)
        return Fate.DELIVER

    def stops(self, *words: str) -> None:
        """The run ends with an error of these words, and the model of the first round."""
        consortium = self._consortium
        with pytest.raises(CoordinatorError) as caught:
            consortium.driver().run()
        for word in (*words, "1 of 3 rounds are completed and kept"):
            assert word in str(caught.value), str(caught.value)
        assert self.struck and consortium.store.completed_rounds() == 1
        assert consortium.store.checkpoint_path(1).exists()

    def goes_on(self) -> None:
        """Site 0 starts again, and a new run ends the study."""
        consortium = self._consortium
        consortium.faults = lambda *_: Fate.DELIVER
        consortium.transport.revive(0, consortium.start_agent(0))
        assert consortium.driver("2").run().rounds == 3
        for i in range(3):
            assert 3 <= consortium.charges(i) <= consortium.plan.privacy.max_attempts


@pytest.fixture
def consortium(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Consortium:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    return Consortium(tmp_path, n=3, rounds=3)


def locked(path: Path, witness: Path) -> Mend:
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    return other.close


def replaced(path: Path, witness: Path) -> Mend:
    Path(shutil.copy(path, path.with_name("copy"))).replace(path)
    return lambda: None


def corrupt(path: Path, witness: Path) -> Mend:
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.write(os.urandom(len(whole)))

    def mend() -> None:
        path.write_bytes(whole)

    return mend


def witness_not_writable(path: Path, witness: Path) -> Mend:
    blocked = witness.with_name(witness.name + ".new")
    blocked.mkdir()
    return blocked.rmdir


@pytest.mark.parametrize("fault", [locked, replaced, corrupt, witness_not_writable])
def test_a_ledger_that_fails_stops_the_study_by_name(
    consortium: Consortium, fault: Callable[[Path, Path], Mend]
) -> None:
    """Site 0 says nothing but refusals; the others are charged once in vain, not for every try."""
    home = consortium.homes[0]
    mends: list[Mend] = []
    study = Struck(consortium, lambda: mends.append(fault(home.ledger_path, home.counter_path)))
    study.stops("site-0: ledger_unavailable")
    assert study.said and {part.kind for part in study.said} == {REFUSED}
    assert {part.body["reason"] for part in study.said} <= {"ledger_unavailable", "attempt_closed"}
    assert consortium.benches[0].trained == 1
    assert max(consortium.charges(i) for i in range(3)) == 2
    consortium.ledgers[0].close()
    if fault is corrupt:
        with pytest.raises(LedgerError):
            open_ledger(home)
    mends[0]()
    study.goes_on()


def test_an_old_copy_is_noticed_by_peers_at_the_next_round(consortium: Consortium, tmp_path: Path) -> None:
    """Ledger and witness are put back to the state before round 1, and the agent starts again on them."""
    home = consortium.homes[0]
    files = (home.ledger_path, home.counter_path)
    old = [path.read_bytes() for path in files]
    newest: list[bytes] = []

    def strike() -> None:
        consortium.ledgers[0].close()
        newest.extend(path.read_bytes() for path in files)
        for path, data in zip(files, old, strict=True):
            path.write_bytes(data)
        consortium.transport.revive(0, consortium.start_agent(0))

    study = Struck(consortium, strike)
    study.stops("site-1: peer_misbehaved", "site-2: peer_misbehaved", "site-0: ledger_unavailable")
    assert consortium.benches[0].trained == 0, "the restarted site computes nothing"
    consortium.ledgers[0].close()
    for path, data in zip(files, newest, strict=True):
        path.write_bytes(data)
    study.goes_on()


def test_a_cap_that_is_reached_stops_the_study_by_name_and_costs_nobody_else(consortium: Consortium) -> None:
    """The hospital lowered its cap, and the agent restarts; no other site computes or is charged again."""
    home = consortium.homes[0]
    event = ExecutionPlan.from_study_plan(consortium.plan).training_event()
    before = home.policy()

    def strike() -> None:
        cap = epsilon([event], before.max_delta).reported * 1.001
        changed = {**before.model_dump(), "max_total_epsilon": cap}
        save_policy(SitePolicy.model_validate(changed), home.policy_path)
        consortium.transport.revive(0, consortium.start_agent(0))

    study = Struck(consortium, strike)
    study.stops("site-0: budget_exhausted")
    assert [consortium.charges(i) for i in range(3)] == [1, 2, 2]
    save_policy(before, home.policy_path)
    study.goes_on()


def test_a_second_agent_is_refused_and_the_first_goes_on(consortium: Consortium) -> None:
    refused: list[str] = []

    def strike() -> None:
        with pytest.raises(LedgerError, match="in use by another process") as caught:
            open_ledger(consortium.homes[0])
        refused.append(str(caught.value))

    study = Struck(consortium, strike)
    assert consortium.driver().run().rounds == 3
    assert study.struck and len(refused) == 1
