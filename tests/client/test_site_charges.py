"""What a site agent charges, and when; budgets, ledgers and peers that have seen more of them.

Real protocol, ledgers and keys; the sites' arithmetic is known vectors.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from agent_trio import Trio
from refusals import reason, refused_and_sound

from client.budget_report import site_budget
from client.serving import open_ledger
from client.site_agent import SiteAgent
from privacy.dp.accounting import epsilon
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import read_ledger
from privacy.ledger_chain import CHARGE
from privacy.secagg.messages import AdvertiseRequest
from shared.agent_messages import (
    REFUSED,
)
from shared.errors import LedgerError, PeerError, ProtocolRefusedError
from shared.wire import encode


def charges_on_disk(trio: Trio, i: int = 0) -> list[int]:
    """Attempts charged, as another process reads them from the file."""
    home = trio.homes[i]
    entries = read_ledger(home.ledger_path, key=home.identity().verify_key)
    return [entry.body["attempt"] for entry in entries if entry.kind == CHARGE]


@pytest.mark.parametrize("purpose", ["train", "audit"])
def test_the_charge_is_durable_before_the_workbench_computes(trio: Trio, purpose: str) -> None:
    seen: list[list[int]] = []
    trio.benches[0].watch = lambda: seen.append(charges_on_disk(trio))
    trio.complete(purpose=purpose, round_number=1)
    assert seen == [[1]]


@pytest.mark.parametrize("purpose", ["train", "audit"])
def test_that_test_fails_where_the_charge_comes_later(
    trio: Trio, monkeypatch: pytest.MonkeyPatch, purpose: str
) -> None:
    """Broken on purpose: an agent that charges after it has computed is seen by the test above."""
    agent = trio.agents[0]
    late: list[Any] = []
    real = trio.ledgers[0].reserve
    monkeypatch.setattr(trio.ledgers[0], "reserve", lambda *a, **k: late.append((a, k)))
    seen: list[list[int]] = []
    trio.benches[0].watch = lambda: seen.append(charges_on_disk(trio))
    trio.complete(purpose=purpose, round_number=1)
    (arguments, options) = late[0]
    real(*arguments, **options)
    assert seen == [[]]
    assert charges_on_disk(trio) == [1]
    assert isinstance(agent, SiteAgent)


def test_a_workbench_that_fails_stays_charged_and_tells_nothing(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    """The error names a patient and a path; neither leaves, and the agent goes on."""
    secret = "patient 4711 in /data/scans has loss 0.123456789"

    def fail() -> None:
        raise RuntimeError(secret)

    trio.benches[0].watch = fail
    parts = trio.uploads(trio.set_up())[0]
    (reply,) = trio.ask(0, *parts)
    assert charges_on_disk(trio) == [1]
    frame = encode(reply)
    for piece in (b"4711", b"/data", b"0.1234", b"RuntimeError", b"patient"):
        assert piece not in frame
    trio.benches[0].watch = lambda: None
    refused_and_sound(trio, caplog, "site_error", reply, charges=1)


def set_cap(trio: Trio, cap: float) -> None:
    policy = trio.homes[0].policy_path
    policy.write_text(re.sub("max_total_epsilon = .*", f"max_total_epsilon = {cap}", policy.read_text()))
    trio.restart(0)


def test_a_full_budget_is_refused_before_anybody_computes(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    """Already when keys are asked for, so that no other site computes, or is charged, in vain."""
    set_cap(trio, 0.01)
    _, answers = trio.keys_and_shares()
    assert reason(answers[0]) == "budget_exhausted"
    assert "0.01" not in answers[0].body["message"]
    assert any("its cap is 0.01" in record.getMessage() for record in caplog.records)
    assert trio.status()["reason"] == "budget_exhausted" and "its cap is 0.01" in trio.status()["error"]
    assert [bench.calls for bench in trio.benches] == [[], [], []]
    assert [trio.charges(i) for i in range(3)] == [[], [], []]
    assert trio.ledgers[0].last_registered_attempt(trio.plan.study_id) is None
    set_cap(trio, 16.0)
    trio.complete()
    assert trio.charges() == [("train", 2)]


def test_an_upload_past_the_cap_is_refused_whatever_was_said_when_keys_were_given(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The charge itself is a wall too: here without the check that comes before it."""
    event = ExecutionPlan.from_study_plan(trio.plan).training_event()
    set_cap(trio, epsilon([event], trio.plan.privacy.delta).reported * 1.01)
    monkeypatch.setattr(SiteAgent, "_check_budget", lambda *_: None)
    trio.complete()
    (reply,) = trio.ask(0, *trio.uploads(trio.set_up())[0])
    assert reason(reply) == "budget_exhausted"
    assert trio.benches[0].calls == ["train"] and trio.charges() == [("train", 1)]


def test_no_attempt_beyond_the_plans_number_is_computed(trio: Trio) -> None:
    """Aborted attempts count too: the coordinator cannot draw more than the plan allows from one site."""
    for _ in range(trio.plan.privacy.max_attempts):
        (reply,) = trio.ask(0, *trio.uploads(trio.set_up())[0])
        assert reply.kind != REFUSED
    with pytest.raises(ProtocolRefusedError, match="budget_exhausted"):
        trio.set_up()
    repeated = AdvertiseRequest(attempt=replace(trio.attempt_id(), attempt=1)).to_envelope()
    assert reason(trio.ask(0, repeated)[0]) == "attempt_not_new", "what is wrong with a number comes first"
    assert len(trio.benches[0].calls) == trio.plan.privacy.max_attempts == len(trio.charges())
    spent = site_budget(trio.homes[0]).studies[0]
    assert 0 < spent.world.reported < (trio.plan.privacy.epsilon or 0)
    assert spent.all_others_collude.reported > spent.world.reported
    assert (spent.train_attempts, spent.audit_attempts) == (trio.plan.privacy.max_attempts, 0)


def test_a_study_that_was_ended_gives_no_keys(trio: Trio) -> None:
    trio.complete()
    trio.ledgers[0].end_study(trio.plan.study_id)
    with pytest.raises(ProtocolRefusedError, match="budget_exhausted"):
        trio.set_up()
    assert trio.benches[0].calls == ["train"]


def test_a_ledger_that_fails_sends_nothing(trio: Trio, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = trio.uploads(trio.set_up())[0]

    def fail(*_: object, **__: object) -> None:
        raise LedgerError("disk full at /var/lib/site")

    monkeypatch.setattr(trio.ledgers[0], "reserve", fail)
    (reply,) = trio.ask(0, *parts)
    assert reason(reply) == "ledger_unavailable"
    assert b"/var" not in encode(reply)
    assert trio.benches[0].calls == []


# ledgers of peers


def test_a_peer_whose_ledger_went_back_is_noticed(
    trio: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """site-1 restores ledger and witness from an old copy; site-0 and site-2 refuse to deal shares."""
    home = trio.homes[1]
    trio.ledgers[1].close()
    for path in (home.ledger_path, home.counter_path):
        shutil.copy(path, tmp_path / f"old-{path.name}")
    trio.restart(1)
    for _ in range(2):
        trio.complete()
    trio.ledgers[1].close()
    for path in (home.ledger_path, home.counter_path):
        shutil.copy(tmp_path / f"old-{path.name}", path)
    trio.agents[1] = trio.start(1)
    trio.last += 1
    with pytest.raises(PeerError, match="peer_misbehaved"):
        trio.set_up()
    assert any("an old or a second copy" in record.getMessage() for record in caplog.records)
    assert trio.status(0)["reason"] == "peer_misbehaved"
    assert [len(trio.charges(i)) for i in (0, 2)] == [2, 2]


def test_an_old_ledger_that_a_cheating_coordinator_lets_grow_is_noticed_by_all(
    trio: Trio, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator asks the restored site for keys until its ledger is the longer one, shows the last.

    Its peers deal nothing to it, and the site itself stops when it hears from them.
    """
    home = trio.homes[1]
    trio.complete()
    trio.ledgers[1].close()
    for path in (home.ledger_path, home.counter_path):
        shutil.copy(path, tmp_path / f"old-{path.name}")
    trio.restart(1)
    trio.complete()
    seen = trio.complete()[0].ledger_heads["site-1"]["latest"]["head"]["length"]
    trio.ledgers[1].close()
    for path in (home.ledger_path, home.counter_path):
        shutil.copy(tmp_path / f"old-{path.name}", path)
    trio.agents[1] = trio.start(1)
    while trio.ledgers[1].head().length <= seen + 2:
        trio.last += 1
        attempt = replace(trio.attempt_id(), attempt=trio.last)
        trio.ask(1, AdvertiseRequest(attempt=attempt).to_envelope())
    server, replies = trio.keys_and_shares()
    assert server.ledger_heads["site-1"]["latest"]["head"]["length"] > seen + 2
    assert [reason(replies[i]) for i in range(3)] == [
        "peer_misbehaved", "ledger_unavailable", "peer_misbehaved",
    ]  # fmt: skip
    assert any("an old copy that grew" in record.getMessage() for record in caplog.records)
    assert any("a peer has seen another state of this ledger" in r.getMessage() for r in caplog.records)
    assert [len(trio.charges(i)) for i in range(3)] == [3, 1, 3]
    _, replies = trio.keys_and_shares()
    assert reason(replies[1]) == "ledger_unavailable"


def test_a_lost_ledger_is_missed_and_never_begun_again(trio: Trio) -> None:
    trio.complete()
    home = trio.homes[0]
    trio.ledgers[0].close()
    home.ledger_path.unlink()
    with pytest.raises(LedgerError, match="missing"):
        open_ledger(home)
    home.counter_path.unlink()
    with pytest.raises(LedgerError, match="missing"):
        open_ledger(home)
    assert not home.ledger_path.exists()
