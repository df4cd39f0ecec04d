"""For which candidate, counts and contributors a site agent signs a verdict, and for which it does not.

Real protocol, ledgers and keys; the sites' arithmetic is known vectors.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from agent_trio import Trio
from refusals import refused_and_sound

from client.audit_part import AuditPart
from client.audit_view import signed_lines
from privacy.audit.counts import CountsLayout
from privacy.audit.verdict_statement import open_verdict
from privacy.ledger_chain import CHARGE, read_export
from shared.agent_messages import (
    VERDICT_REPLY,
    VerdictRequest,
)
from shared.wire import Envelope


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
