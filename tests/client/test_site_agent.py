"""The site agent: what is outside the approved plan is refused and logged, and costs and changes nothing.

Real protocol, ledgers and keys; the sites' arithmetic is known vectors. Each refusal test ends by completing
an honest attempt, so that "state is sound" is shown and not only claimed.
"""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_trio import Trio
from refusals import reason, refused_and_sound

from client.serving import open_ledger
from client.site_agent import log_to
from client.site_home import SiteHome, init_site
from privacy.ledger import Ledger
from shared.agent_messages import (
    EXCHANGE,
    REFUSED,
    Hello,
    HelloReply,
)
from shared.errors import LedgerError, PeerError, SiteError, UsageError
from shared.wire import Envelope


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
