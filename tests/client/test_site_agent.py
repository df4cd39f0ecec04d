"""The site agent: what is outside the approved plan is refused and logged, and costs and changes nothing.

Real protocol, ledgers and keys; the sites' arithmetic is known vectors. Each refusal test ends by completing
an honest attempt, so that "state is sound" is shown and not only claimed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_trio import Trio

from client.audit_part import AuditPart
from client.audit_view import signed_lines
from client.budget_report import site_budget
from client.serving import open_ledger
from client.site_agent import SiteAgent, log_to
from client.site_home import SiteHome, init_site
from privacy.audit.counts import CountsLayout
from privacy.audit.verdict_statement import open_verdict
from privacy.dp.accounting import epsilon
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import Ledger, read_ledger
from privacy.ledger_chain import CHARGE, read_export
from privacy.secagg.messages import AdvertiseRequest
from shared.agent_messages import (
    EXCHANGE,
    REFUSED,
    VERDICT_REPLY,
    Hello,
    HelloReply,
    VerdictRequest,
)
from shared.errors import LedgerError, PeerError, ProtocolRefusedError, SiteError, UsageError
from shared.wire import Envelope, encode


@pytest.fixture
def trio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trio]:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    trio = Trio(tmp_path)
    yield trio
    trio.close()


def reason(reply: Envelope) -> str:
    assert reply.kind == REFUSED, reply
    assert set(reply.body) == {"reason", "message"}
    return str(reply.body["reason"])


def refused_and_sound(
    trio: Trio, caplog: pytest.LogCaptureFixture, expected: str, reply: Envelope, *, charges: int = 0
) -> None:
    """The refusal is named, logged, shown as status and free; and an honest attempt then completes."""
    assert reason(reply) == expected
    assert any(expected in record.getMessage() for record in caplog.records if record.name == "lacuna.site")
    assert trio.status()["reason"] == expected
    assert len(trio.charges()) == charges
    before = len(trio.benches[0].calls)
    _, total = trio.complete()
    assert total.tolist() == [7] * trio.plan.model.dimension
    assert len(trio.charges()) == charges + 1
    assert len(trio.benches[0].calls) == before + 1


def test_an_honest_attempt_charges_once_and_sums_up(trio: Trio) -> None:
    _, total = trio.complete()
    assert total.tolist() == [7] * trio.plan.model.dimension
    assert [trio.charges(i) for i in range(3)] == [[("train", 1)]] * 3
    assert trio.status()["state"] == "uploaded"


def hello(trio: Trio, **changes: Any) -> Envelope:
    fields = {"nonce": "ab" * 32, "plan_sha256": trio.plan.digest().hex(), "run_id": "1", **changes}
    return Hello(**fields).to_envelope()


def test_hello_is_answered_with_a_signature_over_this_very_hello(trio: Trio) -> None:
    trio.complete()
    reply = HelloReply.from_envelope(trio.agents[0].handle(hello(trio)))
    assert (reply.site_id, reply.last_attempt) == ("site-0", 1)
    asked = Hello.from_envelope(hello(trio))
    reply.verify(asked, trio.homes[0].identity().verify_key)
    for other in (replace(asked, nonce="00" * 32), replace(asked, run_id="2")):
        with pytest.raises(PeerError):
            reply.verify(other, trio.homes[0].identity().verify_key)
    with pytest.raises(PeerError):
        replace(reply, last_attempt=9).verify(asked, trio.homes[0].identity().verify_key)


def test_another_plan_in_the_hello_is_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    reply = trio.agents[0].handle(hello(trio, plan_sha256="0" * 64))
    refused_and_sound(trio, caplog, "other_plan", reply)


def test_a_coordinator_of_another_version_is_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    reply = trio.agents[0].handle(hello(trio, version="0.2.0"))
    refused_and_sound(trio, caplog, "version_mismatch", reply)


def test_nothing_is_served_under_an_expired_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    trio = Trio(tmp_path, expires="2026-01-31")
    try:
        assert reason(trio.agents[0].handle(hello(trio))) == "plan_expired"
        assert trio.charges() == [] and trio.benches[0].calls == []
    finally:
        trio.close()


def test_keys_for_another_plan_are_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    server = trio.set_up()
    request = server.build_upload_requests(weights_hash=bytes(32), request_hash=bytes(32))["site-0"]
    other = replace(request, attempt=replace(server.attempt, study_digest="0" * 64))
    (reply,) = trio.ask(0, trio.work(server).to_envelope(), other.to_envelope())
    refused_and_sound(trio, caplog, "wrong_study", reply)


def test_a_round_beyond_the_plan_is_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    server = trio.set_up(round_number=trio.plan.privacy.rounds + 1)
    (reply,) = trio.ask(0, *trio.uploads(server)[0])
    refused_and_sound(trio, caplog, "round_outside_plan", reply)


@pytest.mark.parametrize("purpose", ["train", "audit"])
def test_a_vector_of_another_length_is_refused(
    trio: Trio, caplog: pytest.LogCaptureFixture, purpose: str
) -> None:
    server = trio.set_up(purpose=purpose, vector_length=5)
    (reply,) = trio.ask(0, *trio.uploads(server)[0])
    refused_and_sound(trio, caplog, "vector_outside_plan", reply)


def test_an_audit_cannot_be_asked_for_as_training_nor_the_reverse(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    """The audit's counts with training's length, or a step with the counts' length."""
    for purpose, length in (("audit", trio.plan.model.dimension), ("train", trio.length)):
        server = trio.set_up(purpose=purpose, vector_length=length)
        (reply,) = trio.ask(0, *trio.uploads(server)[0])
        assert reason(reply) == "vector_outside_plan"
    refused_and_sound(trio, caplog, "vector_outside_plan", reply)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(
    trio: Trio, caplog: pytest.LogCaptureFixture, bad: float
) -> None:
    server = trio.set_up()
    trio.weights[3] = bad
    (reply,) = trio.ask(0, *trio.uploads(server)[0])
    trio.weights[3] = 0
    assert any("a weight is not finite" in record.getMessage() for record in caplog.records)
    refused_and_sound(trio, caplog, "work_missing", reply)


def test_weights_of_another_number_are_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    server = trio.set_up()
    work = trio.work(server, weights=trio.weights[:-1])
    (reply,) = trio.ask(0, *trio.uploads(server, work)[0])
    refused_and_sound(trio, caplog, "work_missing", reply)


def test_an_upload_without_work_is_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    _, upload = trio.uploads(trio.set_up())[0]
    (reply,) = trio.ask(0, upload)
    refused_and_sound(trio, caplog, "work_missing", reply)


def test_work_after_the_upload_does_not_count(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    work, upload = trio.uploads(trio.set_up())[0]
    (reply,) = trio.ask(0, upload, work)
    refused_and_sound(trio, caplog, "work_missing", reply)


@pytest.mark.parametrize("change", [{"attempt": 2}, {"round": 2}, {"purpose": "audit"}])
def test_work_for_another_attempt_is_refused(
    trio: Trio, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    server = trio.set_up()
    (reply,) = trio.ask(0, *trio.uploads(server, trio.work(server, **change))[0])
    refused_and_sound(trio, caplog, "work_mismatch", reply)


def test_other_weights_than_the_request_names_are_refused(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    """The coordinator tells the peers one model and gives this site another."""
    server = trio.set_up()
    _, upload = trio.uploads(server)[0]
    (reply,) = trio.ask(0, trio.work(server, weights=trio.weights * 2).to_envelope(), upload)
    refused_and_sound(trio, caplog, "wrong_weights", reply)


def test_an_upload_before_keys_and_shares_is_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    parts = trio.uploads(trio.set_up())[0]
    trio.restart(0)
    (reply,) = trio.ask(0, *parts)
    refused_and_sound(trio, caplog, "attempt_closed", reply)


def test_a_replayed_upload_is_refused_and_not_charged_again(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    parts = trio.uploads(trio.set_up())[0]
    (first,) = trio.ask(0, *parts)
    assert first.kind != REFUSED
    (reply,) = trio.ask(0, *parts)
    refused_and_sound(trio, caplog, "out_of_order", reply, charges=1)


def test_a_replayed_upload_after_a_restart_is_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    parts = trio.uploads(trio.set_up())[0]
    trio.ask(0, *parts)
    trio.restart(0)
    (reply,) = trio.ask(0, *parts)
    assert trio.benches[0].calls == ["train"]
    refused_and_sound(trio, caplog, "attempt_closed", reply, charges=1)


def test_an_attempt_number_that_was_used_is_refused_after_a_restart(
    trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    trio.complete()
    trio.restart(0)
    trio.last = 0
    with pytest.raises(PeerError, match="attempt_not_new"):
        trio.set_up()
    assert len(trio.charges()) == 1
    trio.last = 1
    _, total = trio.complete()
    assert total.tolist() == [7] * trio.plan.model.dimension


@pytest.mark.parametrize(
    "kind", ["train", "export", "refused", "hello_reply", "exchange_reply", "verdict_reply"]
)
def test_unknown_kinds_are_refused(trio: Trio, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    refused_and_sound(trio, caplog, "unknown_request", trio.agents[0].handle(Envelope(kind, {})))
    (part,) = trio.ask(0, Envelope(kind, {}))
    assert reason(part) == "unknown_request"


@pytest.mark.parametrize(
    "envelope",
    [
        Envelope("hello", {}),
        Envelope("hello", {"nonce": 3, "plan_sha256": "0" * 64, "run_id": "1"}),
        Envelope("verdict_request", {"attempt": 1}),
        Envelope(EXCHANGE, {}),
        Envelope(EXCHANGE, {"parts": [{"kind": "work"}]}),
        Envelope(EXCHANGE, {"parts": []}, (b"left over",)),
    ],
)
def test_malformed_messages_are_refused(
    trio: Trio, caplog: pytest.LogCaptureFixture, envelope: Envelope
) -> None:
    refused_and_sound(trio, caplog, "malformed", trio.agents[0].handle(envelope))


@pytest.mark.parametrize("kind", ["advertise", "share", "upload", "confirm", "unmask"])
def test_malformed_parts_are_refused(trio: Trio, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    server = trio.set_up()
    (reply,) = trio.ask(
        0,
        *([trio.work(server).to_envelope()] if kind == "upload" else []),
        Envelope(f"secagg_{kind}", {"attempt": 1}),
    )
    refused_and_sound(trio, caplog, "malformed", reply)


# charging


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


# verdicts and what leaves


def verdict_request(trio: Trio, **changes: Any) -> Envelope:
    fields: dict[str, Any] = {
        "attempt": 1,
        "run_id": "1",
        "candidate_sha256": "c" * 64,
        "survivors": ("site-0", "site-1", "site-2"),
        "pooled_counts": (7,) * trio.length,
    }
    return VerdictRequest(**{**fields, **changes}).to_envelope()


def test_a_verdict_is_signed_for_the_audited_candidate_and_carries_the_ledger(trio: Trio) -> None:
    _, total = trio.complete(purpose="audit", round_number=3)
    assert total.tolist() == [7] * trio.length
    reply = trio.agents[0].handle(verdict_request(trio))
    assert reply.kind == VERDICT_REPLY
    key = trio.homes[0].identity().verify_key
    statement = open_verdict(reply.blobs[0], key=key)
    statement.check(trio.plan)
    assert not statement.veto
    export = read_export(reply.blobs[1], key)
    assert [entry.kind for entry in export.entries].count(CHARGE) == 1
    (trio.homes[0].study(trio.plan.study_id) / "veto").touch()
    assert open_verdict(trio.agents[0].handle(verdict_request(trio)).blobs[0], key=key).veto


def test_no_verdict_before_an_audit(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    refused_and_sound(trio, caplog, "candidate_not_audited", trio.agents[0].handle(verdict_request(trio)))


@pytest.mark.parametrize("change", [{"candidate_sha256": "d" * 64}, {"attempt": 2}])
def test_no_verdict_for_a_candidate_that_was_not_audited(
    trio: Trio, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    trio.complete(purpose="audit", round_number=3)
    reply = trio.agents[0].handle(verdict_request(trio, **change))
    refused_and_sound(trio, caplog, "candidate_not_audited", reply, charges=1)


@pytest.mark.parametrize("change", [{"pooled_counts": (7,)}])
def test_no_verdict_from_counts_that_cannot_be_the_plans(
    trio: Trio, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    trio.complete(purpose="audit", round_number=3)
    reply = trio.agents[0].handle(verdict_request(trio, **change))
    refused_and_sound(trio, caplog, "counts_outside_plan", reply, charges=1)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_site_signs_one_set_of_counts_of_an_attempt(
    trio: Trio, caplog: pytest.LogCaptureFixture, restarted: bool
) -> None:
    """The same may be asked for again, as after a lost answer; other counts get nothing."""
    trio.complete(purpose="audit", round_number=3)
    first = trio.agents[0].handle(verdict_request(trio))
    if restarted:
        trio.restart(0)
    again = trio.agents[0].handle(verdict_request(trio))
    assert (first.kind, again.kind) == (VERDICT_REPLY, VERDICT_REPLY)
    counts = (8,) + (7,) * (trio.length - 1)
    reply = trio.agents[0].handle(verdict_request(trio, pooled_counts=counts))
    refused_and_sound(trio, caplog, "other_counts_signed", reply, charges=1)


@pytest.mark.parametrize("restarted", [False, True])
def test_a_site_signs_for_the_contributors_that_it_revealed_shares_for(
    trio: Trio, caplog: pytest.LogCaptureFixture, restarted: bool
) -> None:
    trio.complete(purpose="audit", round_number=3)
    if restarted:
        trio.restart(0)
    reply = trio.agents[0].handle(verdict_request(trio, survivors=("site-0", "site-1")))
    refused_and_sound(trio, caplog, "other_survivors", reply, charges=1)
    assert trio.agents[0].handle(verdict_request(trio)).kind == VERDICT_REPLY


def test_contributors_are_those_of_the_sum_or_lie_within_the_peers() -> None:
    """Four sites masked with one another, three are in the sum."""
    part = AuditPart.of_upload(
        attempt=4, run_id="1", peers=("a", "b", "c", "d"), vector=np.zeros(3, dtype=np.int64)
    )
    counts = {"run_id": "1", "pooled_counts": (1, 2, 3)}
    assert part.refusal(survivors=("a", "b", "c"), **counts) is None
    for strange in (("a", "b", "e"), ("a", "a", "b", "c")):
        assert (part.refusal(survivors=strange, **counts) or ("",))[0] == "other_survivors"
    opened = part.with_survivors(("a", "b", "c"))
    assert opened.refusal(survivors=("c", "b", "a"), **counts) is None
    for others in (("a", "b", "d"), ("a", "b", "c", "d"), ("a", "b")):
        assert (opened.refusal(survivors=others, **counts) or ("",))[0] == "other_survivors"


def test_a_verdict_of_another_run_is_refused(trio: Trio, caplog: pytest.LogCaptureFixture) -> None:
    trio.complete(purpose="audit", round_number=3)
    reply = trio.agents[0].handle(verdict_request(trio, run_id="2"))
    refused_and_sound(trio, caplog, "candidate_not_audited", reply, charges=1)


def test_counts_without_the_sites_own_part_are_signed_and_told_to_the_hospital_alone(trio: Trio) -> None:
    """A refusal would tell the coordinator about one site's vector; so the answer is the same, to the byte.

    Site-0's part is 1 in each cell, and what the others add is noise of at most a few hundred steps.
    """
    trio.complete(purpose="audit", round_number=3)
    directory = trio.homes[0].study(trio.plan.study_id)
    part = AuditPart.load(directory)
    assert part is not None and part.vector == (1,) * trio.length
    assert part.survivors == ("site-0", "site-1", "site-2")
    low = (-(10**6),) + (7,) * (trio.length - 1)
    assert trio.agents[0].handle(verdict_request(trio, pooled_counts=low)).kind == VERDICT_REPLY
    signed = AuditPart.load(directory)
    assert signed is not None
    first = CountsLayout.from_plan(trio.plan).names[0]
    assert signed.missing_cells(trio.plan, site_id="site-0") == (first,)
    (_, warning) = signed_lines(signed, trio.plan, site_id="site-0")
    assert warning.startswith("WARNING") and first in warning
    honest = replace(signed, signed=(signed.signed[0], (7,) * trio.length)) if signed.signed else signed
    assert honest.missing_cells(trio.plan, site_id="site-0") == ()
    assert signed.missing_cells(trio.plan, site_id="site-3") == ()
    assert (directory / "audit-part.json").stat().st_mode & 0o777 == 0o600
    assert "private" in repr(signed) and str(signed.vector) not in repr(signed)


# site files


def test_init_makes_private_files_and_never_overwrites(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    home = SiteHome(tmp_path / "site")
    with pytest.raises(UsageError, match="is not a name"):
        init_site(home, name="No Name")
    assert not home.root.exists()
    with pytest.raises(SiteError, match="no site is set up"):
        home.site_id  # noqa: B018
    init_site(home, name="north")
    for path in home.root.iterdir():
        assert path.stat().st_mode & 0o077 == 0, path
    assert home.counter_path.exists()
    before = home.identity_path.read_bytes()
    with pytest.raises(SiteError, match="holds site 'north' already"):
        init_site(home, name="south")
    assert (home.identity_path.read_bytes(), home.site_id) == (before, "north")
    with pytest.raises(SiteError, match="has not approved"):
        home.approved_plan("study")


def test_two_sites_never_share_a_witness(tmp_path: Path) -> None:
    paths = {SiteHome(Path(root)).counter_path for root in ("/a/b-c", "/a-b/c", "/a/b/c")}
    assert len(paths) == 3


def test_the_log_is_private_and_ends_with_the_agent(tmp_path: Path) -> None:
    log = logging.getLogger("lacuna.site")
    end = log_to(tmp_path / "agent.log")
    log.info("first")
    end()
    log.info("second")
    assert (tmp_path / "agent.log").stat().st_mode & 0o777 == 0o600
    text = (tmp_path / "agent.log").read_text()
    assert "first" in text
    assert "second" not in text


def test_a_ledger_serves_one_agent_at_a_time(trio: Trio) -> None:
    with pytest.raises(LedgerError, match="in use"):
        open_ledger(trio.homes[0])
    assert isinstance(trio.ledgers[0], Ledger)
    assert os.environ["LACUNA_COUNTER_DIR"]
