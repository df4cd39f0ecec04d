"""What a site's audit finds stays at the site: no figure, key or count of it is in any byte that leaves.

The workbench writes a complete local audit, as the real one does, with figures that can be recognised; every
reply of the agents (audit upload, unmasking, verdict with ledger, refusals) is searched for them.
"""

from __future__ import annotations

import base64
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_trio import PLANTED, Trio, WatchedWorkbench
from numpy.typing import NDArray

from client.audit_view import audit_lines
from client.auditor import LocalAudit
from client.nearest_neighbours import Neighbour
from client.site_agent import AuditedCandidate
from privacy.audit.bounds import Interval
from shared.agent_messages import VerdictRequest
from shared.canonical import canonical_json
from shared.home import write_private
from shared.wire import Envelope, encode

RNG = np.random.default_rng(7)


def local_audit(length: int) -> LocalAudit:
    """Figures with six digits that occur nowhere else."""
    scores = RNG.normal(0, 1, 6)
    return LocalAudit(
        n_members=987_654_321_987,
        n_held_out=876_543_210_876,
        attack=Interval(estimate=0.731_357, low=0.612_468, high=0.854_246, error=0.025_791),
        power=0.513_579,
        epsilon_lower_bound=1.297_531,
        true_positive_rates=((0.1, 0.351_537),),
        public_control=None,
        member_control=None,
        planted_leak=PLANTED,
        member_keys=("deadbeef" * 8,),
        held_out_keys=("facade00" * 8,),
        member_scores=scores[:3],
        held_out_scores=scores[3:],
        member_distances=RNG.uniform(1, 2, 3),
        held_out_distances=RNG.uniform(1, 2, 3),
        copy_distance=0.493_827,
        copied=("cafe0123" * 8,),
        counts=np.full(length, 7_654_321, dtype=np.int64),
        neighbours=(
            Neighbour(
                patient_key="0123beef" * 8,
                distance=0.864_209,
                sample=3,
                patient_picture=RNG.integers(0, 256, (8, 24), dtype=np.uint8),
                sample_picture=RNG.integers(0, 256, (8, 24), dtype=np.uint8),
            ),
        ),
    )


class RecordingBench(WatchedWorkbench):
    """Keeps its audit on disk as :class:`client.workbench.SiteWorkbench` does."""

    def __init__(self, length: int, position: int, directory: Path) -> None:
        super().__init__(length, position)
        self.path = directory / "audit.json"
        self.audit = local_audit(length)

    def audit_vector(self, weights: NDArray[np.float32], *, attempt: int) -> NDArray[np.int64]:
        record = {"attempt": attempt, "candidate_sha256": "c" * 64, "figures": self.audit.to_dict()}
        write_private(self.path, canonical_json(record))
        return self.audit.counts + RNG.integers(-50, 50, len(self.audit.counts))

    def last_audit(self) -> AuditedCandidate | None:
        record = json.loads(self.path.read_bytes())
        figures = LocalAudit.from_dict(record["figures"])
        return AuditedCandidate(
            attempt=record["attempt"],
            candidate_sha256=record["candidate_sha256"],
            planted_leak=figures.planted_leak,
        )


@pytest.fixture
def trio(trio: Trio) -> Trio:
    for i in range(3):
        trio.benches[i] = RecordingBench(trio.length, i, trio.homes[i].study(trio.plan.study_id))
        trio.restart(i)
    return trio


def renderings(audit: LocalAudit) -> set[bytes]:
    """Each private figure as text with four digits or more, rounded or cut, and as IEEE or integer bytes.

    Each is long enough that random bytes of what leaves (under 1 MB) hold one with probability below 1e-9.
    """
    value = audit.to_dict()
    del value["planted_leak"], value["format"], value["true_positive_rates"]
    found: set[bytes] = set()

    def take(item: Any) -> None:
        if isinstance(item, dict):
            for inner in item.values():
                take(inner)
        elif isinstance(item, list):
            for inner in item:
                take(inner)
        elif isinstance(item, float) and item != 0:
            found.update(f"{abs(item):.{digits}f}".encode() for digits in (4, 6))
            found.add(f"{abs(item):.12f}"[:-8].encode())
            found.update((struct.pack("<d", item), struct.pack(">d", item)))
        elif isinstance(item, int) and item > 10**11:
            found.update((struct.pack("<q", item), str(item).encode()))
        elif isinstance(item, str):
            found.update((item.encode(), bytes.fromhex(item)))

    for neighbour in value["neighbours"]:
        del neighbour["sample"], neighbour["shape"]
        for name in ("patient_picture", "sample_picture"):
            text = neighbour.pop(name)
            found.update((text.encode(), base64.b64decode(text), base64.b64decode(text)[:16]))
    counts = value.pop("counts")
    found.update((struct.pack("<2q", *counts[:2]), canonical_json(counts[:2])[1:-1]))
    found.add(audit.member_scores.astype("<f4").tobytes())
    take(value)
    return found


def everything_in(frame: bytes) -> bytes:
    """The bytes themselves and what is base64 inside them (the payloads of signed statements)."""
    inner = [base64.b64decode(text) for text in re.findall(rb'"payload":"([A-Za-z0-9+/=]+)"', frame)]
    return b"\n".join([frame, *inner])


def test_no_figure_of_the_local_audit_is_in_anything_that_leaves(
    trio: Trio, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    for agent in trio.agents:
        real = agent.handle

        def watched(envelope: Envelope, peer: object = None, real: Any = real) -> Envelope:
            reply = real(envelope, peer)
            sent.append(encode(reply))
            return reply

        monkeypatch.setattr(agent, "handle", watched)
    _, total = trio.complete(purpose="audit", round_number=3)
    request = VerdictRequest(
        attempt=1,
        run_id="1",
        candidate_sha256="c" * 64,
        survivors=("site-0", "site-1", "site-2"),
        pooled_counts=tuple(int(count) for count in total),
    )
    for agent in trio.agents:
        reply = agent.handle(request.to_envelope())
        assert reply.kind == "verdict_reply"
        agent.handle(Envelope("audit", {}))
    left = b"\n".join(everything_in(frame) for frame in sent)
    assert b"pooled_counts" in left, "the signed verdicts were looked into"
    for i in range(3):
        bench = trio.benches[i]
        assert isinstance(bench, RecordingBench)
        secrets = renderings(bench.audit)
        assert len(secrets) > 40
        assert not [secret for secret in secrets if secret in left]


def test_the_search_finds_a_figure_that_leaks(trio: Trio) -> None:
    bench = trio.benches[0]
    assert isinstance(bench, RecordingBench)
    score = float(bench.audit.member_scores[1])
    inner = base64.b64encode(canonical_json({"score": abs(score)}))
    for leak in (
        struct.pack("<d", score) * 2,
        bench.audit.member_scores.astype("<f4").tobytes(),
        canonical_json({"auc": 0.731357}),
        b'{"payload":"' + inner + b'"}',
        struct.pack("<3q", *[7_654_321] * 3),
    ):
        assert any(secret in everything_in(leak) for secret in renderings(bench.audit)), leak


def test_the_sites_own_view_says_whose_figures_these_are(trio: Trio) -> None:
    trio.complete(purpose="audit", round_number=3)
    path = trio.homes[0].study(trio.plan.study_id) / "audit.json"
    assert path.stat().st_mode & 0o777 == 0o600
    lines = audit_lines(json.loads(path.read_bytes()))
    assert "do not send them" in lines[0]
    text = "\n".join(lines)
    assert "0.731 (interval 0.612 to 0.854" in text
    assert "987654321987 members" in text
    assert "not computed (too few patients)" in text
