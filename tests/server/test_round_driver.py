"""The round driver over the in-memory transport: real agents, ledgers, protocol and store.

The sites' arithmetic is replaced by known integer vectors (powers of two a site, so that a site counted
twice or left out shows in every coordinate); everything around it is what a study runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_memory_consortium import Consortium

from client.ledger_export import signed_ledger
from privacy.audit.verdict_statement import make_verdict_statement, open_verdict, sign_verdict
from server.authority import CertificateAuthority
from server.gating import decide, keep_ledger
from server.transport import Fate
from shared.agent_messages import VERDICT_REPLY
from shared.certificates import make_request as make_csr
from shared.certificates import new_key
from shared.checkpoint import load_tensors
from shared.enrolment import MachineKeys, make_request, open_request
from shared.errors import CoordinatorError, RefusedError
from shared.node_keys import make_node_key
from shared.study_plan import StudyPlan
from shared.wire import Envelope


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Consortium]:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    return lambda **options: Consortium(tmp_path, **options)


def survivors_of(consortium: Consortium, purpose: str = "train") -> list[tuple[str, ...]]:
    return [r.survivors for r in consortium.store.attempts(purpose) if r.status == "completed"]  # type: ignore[arg-type]


def adam_direction(consortium: Consortium, round_number: int) -> float:
    tensors, _ = load_tensors(consortium.store.checkpoint_path(round_number))
    return float(tensors["adam.exp_avg"][0])


def test_a_whole_study_in_two_exchanges_a_round(make: Callable[..., Consortium]) -> None:
    consortium = make(n=3, rounds=4)
    sent: list[str] = []

    def count(node: int, leg: str, envelope: Envelope) -> Fate:
        if leg == "request" and node == 0:
            sent.append(envelope.kind)
        return Fate.DELIVER

    consortium.faults = count
    outcome = consortium.driver().run()
    assert outcome.rounds == 4
    assert outcome.verdicts == ("site-0", "site-1", "site-2")
    # hello, two set-up exchanges, two for each of 4 rounds and the audit, one for the verdict
    assert sent == ["hello", *["exchange"] * (2 + 2 * 5), "verdict_request"]
    assert survivors_of(consortium) == [("site-0", "site-1", "site-2")] * 4
    # The first moment after round 1 is 0.1 of the average gradient: every site exactly once (1 + 2 + 4).
    gradient = 7 * consortium.plan.secure_aggregation.grid_step / 100
    assert adam_direction(consortium, 1) == pytest.approx(0.1 * gradient, rel=1e-5)
    for i in range(3):
        assert consortium.charges(i) == 4
        assert consortium.charges(i, "audit") == 1
        verdict = (consortium.store.evidence / "verdicts" / f"site-{i}.dsse.json").read_bytes()
        statement = open_verdict(verdict, key=consortium.homes[i].identity().verify_key)
        assert statement.pooled_counts == (7,) * len(statement.pooled_counts)
        statement.check(consortium.plan)


def other_verdict(**changes: Any) -> Callable[[Consortium, Envelope], tuple[bytes, ...]]:
    """Site 0 signs a verdict about something else than it was asked about."""

    def forge(consortium: Consortium, reply: Envelope) -> tuple[bytes, ...]:
        key = consortium.homes[0].identity()
        honest = open_verdict(reply.blobs[0], key=key.verify_key)
        fields = {name: getattr(honest, name) for name in MADE_FROM} | changes
        return sign_verdict(make_verdict_statement(consortium.plan, **fields), key), reply.blobs[1]

    return forge


MADE_FROM = (
    "candidate_sha256", "run_id", "attempt", "site_id", "survivors", "pooled_counts", "planted_leak", "veto",
)  # fmt: skip
FORGED: list[tuple[str, Callable[[Consortium, Envelope], tuple[bytes, ...]], str]] = [
    ("another candidate", other_verdict(candidate_sha256="9" * 64), "not about the audit"),
    ("another attempt", other_verdict(attempt=77), "not about the audit"),
    ("another run", other_verdict(run_id="earlier"), "not about the audit"),
    ("another site's name", other_verdict(site_id="site-1"), "not about the audit"),
    ("fewer contributors", other_verdict(survivors=("site-2", "site-1", "site-0")), "not about the audit"),
    ("unsigned", lambda _, reply: (b"{}", reply.blobs[1]), "not a DSSE envelope"),
    ("in place of the ledger", lambda _, reply: (reply.blobs[0], reply.blobs[0]), "ledger of site-0"),
]


@pytest.mark.parametrize(("forge", "why"), [case[1:] for case in FORGED], ids=[case[0] for case in FORGED])
def test_a_verdict_about_something_else_is_not_kept(
    make: Callable[..., Consortium], forge: Callable[[Consortium, Envelope], tuple[bytes, ...]], why: str
) -> None:
    consortium = make(n=3, rounds=1)
    honest = consortium.transport._agents[0]

    def lie(envelope: Envelope, peer: object = None) -> Envelope:
        reply = honest(envelope)
        if reply.kind != VERDICT_REPLY:
            return reply
        return Envelope(reply.kind, reply.body, forge(consortium, reply))

    consortium.transport._agents[0] = lie
    assert consortium.driver().run().verdicts == ("site-1", "site-2")
    assert not (consortium.store.evidence / "ledgers" / "site-0.dsse.json").exists()
    told = [
        body["lost"]["site-0"] for _, _, kind, body in consortium.store.events() if kind == "verdicts_missing"
    ]
    assert told and why in told[0]


def test_nothing_is_run_again_when_the_study_is_done(make: Callable[..., Consortium]) -> None:
    consortium = make(n=3, rounds=2)
    consortium.driver("1").run()
    consortium.driver("2").run()
    assert [bench.trained for bench in consortium.benches.values()] == [2, 2, 2]
    assert [consortium.charges(i) for i in range(3)] == [2, 2, 2]


def test_a_lost_upload_below_the_threshold_is_charged_and_tried_again(
    make: Callable[..., Consortium],
) -> None:
    """n = 3, t = 3: one lost reply aborts the attempt; nothing is unmasked; the retry is charged."""
    consortium = make(n=3, rounds=2)
    lost = []

    def lose_one_upload(node: int, leg: str, envelope: Envelope) -> Fate:
        if leg == "reply" and node == 1 and consortium.benches[1].trained == 1 and not lost:
            lost.append(node)
            return Fate.DROP
        return Fate.DELIVER

    consortium.faults = lose_one_upload
    outcome = consortium.driver().run()
    assert outcome.rounds == 2
    assert lost
    assert [record.status for record in consortium.store.attempts("train")].count("aborted") == 1
    assert [consortium.charges(i) for i in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("leg", ["request", "reply"])
@pytest.mark.parametrize("exchange", range(3, 9))
def test_a_site_that_drops_anywhere_does_not_stop_five(
    make: Callable[..., Consortium], exchange: int, leg: str
) -> None:
    """n = 5, t = 4: one site dies for good in a given exchange; the others finish, with the right sums."""
    consortium = make(n=5, rounds=3)
    assert consortium.plan.secure_aggregation.threshold == 4
    seen = []

    def die(node: int, at: str, envelope: Envelope) -> Fate:
        if node == 2 and at == leg:
            seen.append(envelope.kind)
            if len(seen) == exchange:
                return Fate.KILL
        return Fate.DELIVER

    consortium.faults = die
    outcome = consortium.driver().run()
    assert outcome.rounds == 3
    everybody, others = tuple(f"site-{i}" for i in range(5)), ("site-0", "site-1", "site-3", "site-4")
    assert set(survivors_of(consortium)) <= {everybody, others}
    assert survivors_of(consortium)[-1] == others
    for record in consortium.store.attempts("train"):
        if record.status == "completed" and record.round == 1:
            total = sum(1 << int(site[-1]) for site in record.survivors)
            gradient = total * consortium.plan.secure_aggregation.grid_step / 100
            assert adam_direction(consortium, 1) == pytest.approx(0.1 * gradient, rel=1e-5)
    # Whoever is in a sum was charged for it: never undercounted.
    for i in range(5):
        in_sums = sum(f"site-{i}" in survivors for survivors in survivors_of(consortium))
        assert consortium.charges(i) >= in_sums


def test_the_ledger_of_a_site_that_died_for_good_can_come_as_a_file(
    make: Callable[..., Consortium],
) -> None:
    """The gate names the missing ledger; the file that the site writes without its agent takes its place."""
    consortium = make(n=5, rounds=3)
    store, home = consortium.store, consortium.homes[2]
    early = signed_ledger(home)

    def die(node: int, at: str, envelope: Envelope) -> Fate:
        died = node == 2 and consortium.charges(2) >= 2
        return Fate.KILL if died else Fate.DELIVER

    consortium.faults = die
    assert consortium.driver().run().rounds == 3
    assert not (store.evidence / "ledgers" / "site-2.dsse.json").exists()

    def missing() -> set[str]:
        return {c.name for c in decide(store, consortium.coordinator).failed}

    assert {"ledgers-present", "ledgers-verify", "budget"} <= missing()
    with pytest.raises(RefusedError, match="no ledger that a site"):
        keep_ledger(store, b"{}")
    with pytest.raises(RefusedError, match="site-2"):
        keep_ledger(store, early)
    assert not (store.evidence / "ledgers" / "site-2.dsse.json").exists()
    assert keep_ledger(store, signed_ledger(home)) == "site-2"
    assert (
        not {"ledgers-present", "ledgers-verify", "ledgers-fresh", "budget", "attempts-charged"} & missing()
    )
    with pytest.raises(RefusedError, match="site-2"):
        keep_ledger(store, early)


def test_a_restarted_agent_rejoins(make: Callable[..., Consortium]) -> None:
    """An agent that lost its memory refuses its old attempts and takes part in the next."""
    consortium = make(n=5, rounds=5)

    def restart() -> None:
        consortium.benches[3].before_upload = lambda: None
        consortium.transport.revive(3, consortium.start_agent(3))

    def restart_once(node: int, leg: str, envelope: Envelope) -> Fate:
        if node == 3 and leg == "reply" and consortium.benches[3].trained == 2:
            restart()
            return Fate.DROP
        return Fate.DELIVER

    consortium.faults = restart_once
    outcome = consortium.driver().run()
    assert outcome.rounds == 5
    rounds = survivors_of(consortium)
    assert any("site-3" not in survivors for survivors in rounds)
    assert "site-3" in rounds[-1]


@pytest.mark.parametrize("first", range(4, 22, 3))
def test_the_run_can_die_anywhere_and_a_new_one_continues(
    make: Callable[..., Consortium], first: int
) -> None:
    """The driver dies at three messages; each time a new run goes on from the store."""
    consortium = make(n=3, rounds=3)
    for run, message in enumerate((first, first + 1, first + 2), start=1):
        left = message

        def stop(node: int, leg: str, envelope: Envelope) -> Fate:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return Fate.DELIVER

        consortium.faults = stop
        before = consortium.store.completed_rounds()
        with pytest.raises(KeyboardInterrupt):
            consortium.driver(str(run)).run()
        assert consortium.store.completed_rounds() >= before
    consortium.faults = lambda *_: Fate.DELIVER
    assert consortium.driver("last").run().rounds == 3
    rounds = [r.round for r in consortium.store.attempts("train") if r.status == "completed"]
    assert rounds == sorted(set(rounds)), "no completed round is run again"
    for i in range(3):
        assert len(rounds) <= consortium.charges(i) <= consortium.plan.privacy.max_attempts


def test_attempts_used_up_end_training_with_the_last_good_model(make: Callable[..., Consortium]) -> None:
    consortium = make(n=3, rounds=2)

    def never_upload(node: int, leg: str, envelope: Envelope) -> Fate:
        uploads = any(len(blob) >= 4 * consortium.plan.model.dimension for blob in envelope.blobs)
        lost = leg == "reply" and node == 0 and consortium.benches[0].trained > 1 and uploads
        return Fate.DROP if lost else Fate.DELIVER

    consortium.faults = never_upload
    outcome = consortium.driver().run()
    assert outcome.rounds == 1
    assert consortium.charges(0) == consortium.plan.privacy.max_attempts
    assert outcome.verdicts


def test_too_few_sites_end_the_run_with_a_clear_error(make: Callable[..., Consortium]) -> None:
    consortium = make(n=3, rounds=1)
    consortium.transport.kill(2)
    with pytest.raises(CoordinatorError, match="site-2"):
        consortium.driver().run()
    assert [consortium.charges(i) for i in range(3)] == [0, 0, 0]


def test_plan_of_the_test_is_a_whole_plan(make: Callable[..., Consortium]) -> None:
    assert isinstance(make(n=3, rounds=1).plan, StudyPlan)


def test_a_revoked_site_is_out_from_the_next_round(make: Callable[..., Consortium]) -> None:
    """It answers as before, and its keys for the next round were delivered: all the same it is not asked."""
    consortium = make(n=4, rounds=4)
    consortium.store.root.parent.chmod(0o700)
    authority = CertificateAuthority(consortium.store.root.parent)
    authority.create(address="127.0.0.1:8443")
    key = consortium.homes[3].identity()
    machines = MachineKeys(
        tls_request=make_csr(new_key(), name="site-3").decode(),
        node_key=make_node_key(consortium.root, "node").public.read_text(),
    )
    asked: list[int] = []

    def revoke_in_round_two(node: int, leg: str, envelope: Envelope) -> Fate:
        if node == 3 and leg == "request":
            asked.append(consortium.store.completed_rounds())
            if consortium.store.completed_rounds() == 1 and not authority.revoked_identities():
                authority.revoke("site-3", reason="test")
        return Fate.DELIVER

    request = make_request(role="site", name="site-3", key=key, machines=machines)
    authority.issue(open_request(request))
    consortium.faults = revoke_in_round_two
    assert consortium.driver().run().rounds == 4
    everybody = tuple(f"site-{i}" for i in range(4))
    assert survivors_of(consortium) == [everybody, everybody, everybody[:3], everybody[:3]]
    assert survivors_of(consortium, "audit") == [everybody[:3]]
    assert max(asked) == 1, "nothing was asked of it after the round in which it was revoked"
    assert [body["site"] for _, _, kind, body in consortium.store.events() if kind == "site_revoked"] == [
        "site-3"
    ]
