"""A complete small study's evidence, made with real keys, ledgers, verdicts and weights. No training."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from privacy.audit.canary_opening import (
    COMMITMENT_KIND,
    CanaryOpening,
    coin_commitment,
)
from privacy.audit.counts import CONTROL_WEIGHT, PRIMARY_WEIGHT, CountsLayout
from privacy.audit.mechanism_statement import CLAIMS, make_statement
from privacy.audit.mechanism_statistics import Check
from privacy.audit.site_evidence import sign_mechanism, sign_opening
from privacy.audit.verdict import PlantedLeak
from privacy.audit.verdict_statement import make_verdict_statement, sign_verdict
from privacy.compliance.approvals import approve_decision, approve_plan
from privacy.dp.accounting import PrivacyEvent
from privacy.dp.calibration import propose_privacy
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import Budget, Charge, Ledger
from server.release.bundle import ReleasedBundle, ReleaseEvidence, write_bundle
from server.release.gate import GateDecision, GateInputs, evaluate_gate, sign_decision
from server.study_store import AttemptRecord
from shared.attestation import Statement, Subject, sign_statement
from shared.checkpoint import file_sha256, save_tensors
from shared.identity import SigningKey
from shared.plan_package import sign_plan
from shared.study_plan import StudyPlan, parse_plan

SITES = ("alpha", "beta", "gamma")
ROUNDS = 4
AT = "2026-01-31T12:00:00Z"
AUDIT_ATTEMPT = 100


@dataclass
class Study:
    """Keys and evidence of one study; tests change single parts."""

    root: Path
    keys: dict[str, SigningKey]
    plan: StudyPlan
    inputs: GateInputs
    autoencoder: Path
    prior: Path
    candidate: Path
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def coordinator(self) -> SigningKey:
        return self.keys["coordinator"]

    def decide(self, **changes: Any) -> GateDecision:
        return evaluate_gate(replace(self.inputs, **changes))

    def signed_decision(self, decision: GateDecision | None = None) -> bytes:
        return sign_decision(decision or self.decide(), self.coordinator, at=AT)

    def approvals(self, decision: bytes) -> list[bytes]:
        signed = [
            approve_decision(decision, plan=self.plan, key=self.keys[s], role="site", site_id=s, at=AT)
            for s in SITES[:2]
        ]
        officer = self.keys["officer"]
        return [*signed, approve_decision(decision, plan=self.plan, key=officer, role="officer", at=AT)]

    def evidence(self, decision: bytes | None = None, **changes: Any) -> ReleaseEvidence:
        decision = decision or self.signed_decision()
        values: dict[str, Any] = {
            "plan": self.plan,
            "plan_envelope": self.inputs.plan_envelope,
            "plan_approvals": self.inputs.plan_approvals,
            "ledgers": self.inputs.ledgers,
            "verdicts": self.inputs.verdicts,
            "site_evidence": self.inputs.site_evidence,
            "decision": decision,
        }
        if "approvals" not in changes:
            values["approvals"] = self.approvals(decision)
        return ReleaseEvidence(**{**values, **changes})

    def release(self, path: Path, *, log_path: Path | None = None, **changes: Any) -> ReleasedBundle:
        return write_bundle(
            path,
            self.evidence(**changes),
            autoencoder=self.autoencoder,
            candidate=self.candidate,
            key=self.coordinator,
            at=AT,
            license_text="No licence is granted; ask the sites.\n",
            log_path=log_path,
        )


def make_keys() -> dict[str, SigningKey]:
    return {name: SigningKey.generate() for name in ("coordinator", "officer", *SITES)}


def plan_value(
    keys: dict[str, SigningKey],
    *,
    autoencoder_sha256: str,
    prior_sha256: str,
    mode: str = "distributed",
    title: str = "Rare lesions at three hospitals",
    audit: dict[str, Any] | None = None,
    epsilon: float = 8.0,
    plausibility_sha256: str | None = None,
    segmenter_sha256: str | None = None,
) -> dict[str, Any]:
    """A plan as a parsed document, calibrated."""
    proposed = propose_privacy(
        mode=mode, epsilon=None if mode == "unprotected" else epsilon, delta=1e-5, clip_norm=1.0,
        rounds=ROUNDS, n_sites=3, threshold=3, max_colluding=1, dimension=1000, declared_patients=120,
    )  # fmt: skip
    return {
        "format": "lacuna/study-plan/v1",
        "study_id": "rare-lesion",
        "title": title,
        "expires": "2099-12-31",
        "roster": {
            "coordinator_key": keys["coordinator"].verify_key.hex(),
            "officer_key": keys["officer"].verify_key.hex(),
            "sites": [{"site_id": s, "identity_key": keys[s].verify_key.hex()} for s in SITES],
        },
        "data": {
            "conditions": ["common", "rare"],
            "rare_condition": "rare",
            "labels": ["organ", "lesion"],
            "grid_shape": [24, 24, 24],
            "spacing_mm": [4.0, 4.0, 4.0],
            "simulated": True,
            "plausibility_sha256": plausibility_sha256,
            "segmenter_sha256": segmenter_sha256,
        },
        "model": {
            "preset": "micro",
            "autoencoder_sha256": autoencoder_sha256,
            "prior_sha256": prior_sha256,
            "trainable": "conditioning",
            "dimension": 1000,
        },
        "privacy": proposed.privacy.model_dump(mode="json"),
        "secure_aggregation": proposed.secure_aggregation.model_dump(mode="json"),
        "audit": {
            "score_edges": [-0.1, -0.05, 0.0, 0.05, 0.1],
            "control_edges": [0.4, 0.6, 0.8],
            "copy_distance": 0.5,
            **(audit or {}),
        },
        "release": {"site_approvals": 2, "officer_approval": True},
    }


def attempt_records(run_id: str = "run-1") -> tuple[AttemptRecord, ...]:
    """Four rounds, the second of which was aborted once, and an audit."""

    def record(attempt: int, round_number: int, purpose: Any, status: Any) -> AttemptRecord:
        return AttemptRecord(
            attempt=attempt, run_id=run_id, round=round_number, purpose=purpose, status=status,
            participants=() if status == "void" else SITES,
            survivors=SITES if status == "completed" else (), reason="",
        )  # fmt: skip

    return (
        record(1, 1, "train", "completed"),
        record(2, 2, "train", "aborted"),
        record(3, 2, "train", "completed"),
        record(4, 3, "train", "completed"),
        record(5, 4, "train", "completed"),
        record(6, 5, "train", "void"),
        record(AUDIT_ATTEMPT, ROUNDS, "audit", "completed"),
    )


def make_ledger(
    root: Path,
    key: SigningKey,
    plan: StudyPlan,
    records: tuple[AttemptRecord, ...],
    *,
    event: Callable[[str, PrivacyEvent], PrivacyEvent] = lambda _, event: event,
    also: tuple[Charge, ...] = (),
    commitment: str | None = None,
) -> bytes:
    """Charge every opened attempt in a real ledger and export it."""
    root.mkdir(parents=True)
    execution = ExecutionPlan.from_study_plan(plan)
    events = {"train": execution.training_event(), "audit": execution.audit_event()}
    cap = Budget(epsilon=None, delta=plan.privacy.delta)
    with Ledger.open(root / "ledger.sqlite", key=key, counter_path=root / "counter", create=True) as ledger:
        ledger.record("plan-approved", {"plan_sha256": plan.digest().hex()})
        if commitment is not None:
            count = plan.audit.canaries_per_site
            details = {"study_id": plan.study_id, "count": count, "commitment": commitment}
            ledger.record(COMMITMENT_KIND, details)
        charges = [
            Charge(
                study_id=plan.study_id, plan_sha256=plan.digest().hex(), purpose=r.purpose, round=r.round,
                attempt=r.attempt, event=event(r.purpose, events[r.purpose]), run_id=r.run_id,
            )
            for r in records
            if r.status not in ("prepared", "void")
        ]  # fmt: skip
        for charge in (*charges, *also):
            ledger.reserve(charge, cap)
        ledger.export(root / "export.json")
    return (root / "export.json").read_bytes()


def honest_counts(plan: StudyPlan, *, leak: bool = False, secondary_leak: bool = False) -> tuple[int, ...]:
    """Pooled counts of 480 members and 240 held-out patients; ``leak``: members score high."""
    layout = CountsLayout.from_plan(plan)
    s, c = layout.score_bins, layout.control_bins
    half = np.array([20, 40, 60, 60, 40, 20])
    high = np.array([0, 0, 0, 10, 60, 170])
    members = high if leak else half
    public = np.array([40, 80, 80, 40])
    cells = np.concatenate(
        [
            np.concatenate([members, members, half]) * PRIMARY_WEIGHT,
            np.concatenate([2 * public, public, [0]]) * CONTROL_WEIGHT,
        ]
    )
    assert cells.size == 3 * s + 2 * c + 1
    for attack in plan.audit.pooled_attacks:
        held_out = np.array([40, 120, 60, 20])
        shown = np.array([0, 0, 40, 440]) if secondary_leak else 2 * held_out
        cells = np.concatenate([cells, attack.pooled_weight * shown, attack.pooled_weight * held_out])
    assert cells.size == layout.length
    return tuple(int(n) for n in cells)


NONCE = b"n" * 32
COINS = (True, False, True, True, False, False)
ASKING: dict[str, Any] = {
    "secondary_attacks": [
        {"attack": "sima", "timesteps": [0.2], "edges": [-0.1, 0.0, 0.1], "pooled_weight": 8}
    ],
    "mechanism_canaries": 100,
    "canaries_per_site": len(COINS),
}
"""Clauses of a plan that asks for everything that a plan can ask for."""


def committed(plan: StudyPlan, site: str) -> str | None:
    """What the site's ledger commits to; None where the plan has no in-run canaries."""
    if not plan.audit.canaries_per_site:
        return None
    return coin_commitment(plan.digest(), site, NONCE, COINS)


def make_opening(
    study_keys: dict[str, SigningKey], plan: StudyPlan, site: str, candidate: str, **changes: Any
) -> bytes:
    """The coins that the site committed to, with scores that tell nothing."""
    values: dict[str, Any] = {
        "study_id": plan.study_id, "plan_sha256": plan.digest().hex(), "candidate_sha256": candidate,
        "attempt": AUDIT_ATTEMPT, "site_id": site, "nonce": NONCE.hex(), "coins": COINS,
        "scores": (0.1, 0.2, 0.3, -0.1, 0.25, -0.2),
    }  # fmt: skip
    return sign_opening(CanaryOpening(**{**values, **changes}), study_keys[site])


def make_mechanism(
    study_keys: dict[str, SigningKey],
    plan: StudyPlan,
    site: str,
    *,
    key: str | None = None,
    broken: Sequence[str] = (),
    level: float = 1e-6 / len(CLAIMS),
    **changes: Any,
) -> bytes:
    """A mechanism audit's statement; claims in ``broken`` failed."""
    checks = tuple(
        Check(
            name=name, title=name, tests=1, smallest_p=0.0 if name in broken else 0.5,
            level=level, figure="1", expected="1", passed=name not in broken,
        )
        for name in CLAIMS
    )  # fmt: skip
    values: dict[str, Any] = {
        "site_id": site, "canaries": 100, "false_failure_probability": 1e-6, "checks": checks,
    }  # fmt: skip
    return sign_mechanism(make_statement(plan, **{**values, **changes}), study_keys[key or site])


def make_verdict(
    study_keys: dict[str, SigningKey], plan: StudyPlan, site: str, candidate: str, **changes: Any
) -> bytes:
    values: dict[str, Any] = {
        "candidate_sha256": candidate,
        "run_id": "run-1",
        "attempt": AUDIT_ATTEMPT,
        "site_id": site,
        "survivors": SITES,
        "pooled_counts": honest_counts(plan),
        "planted_leak": PlantedLeak(auc=1.0, n_planted=16, n_fresh=16),
        "veto": False,
    }
    return sign_verdict(make_verdict_statement(plan, **{**values, **changes}), study_keys[site])


def make_study(root: Path, *, networks: tuple[Path, Path] | None = None, **plan_choices: Any) -> Study:
    """Everything up to the gate; with real networks where (autoencoder, denoiser) are given."""
    keys = make_keys()
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((16, 16)).astype(np.float32)}
    autoencoder, prior, candidate = (
        root / f"{name}.safetensors" for name in ("autoencoder", "prior", "candidate")
    )
    prior_sha256 = save_tensors(prior, {"w": weights["w"] + 2}, {"what": "prior"})
    autoencoder_sha256 = save_tensors(autoencoder, weights, {"what": "autoencoder"})
    candidate_sha256 = save_tensors(candidate, {"w": weights["w"] + 1}, {"what": "denoiser"})
    if networks is not None:
        for target, source in zip((autoencoder, candidate), networks, strict=True):
            shutil.copyfile(source, target)
        autoencoder_sha256, candidate_sha256 = file_sha256(autoencoder), file_sha256(candidate)
    plan = parse_plan(
        plan_value(keys, autoencoder_sha256=autoencoder_sha256, prior_sha256=prior_sha256, **plan_choices),
        what="fixture",
    )
    records = attempt_records()
    inputs = GateInputs(
        plan=plan,
        plan_envelope=sign_plan(plan, keys["coordinator"]),
        plan_approvals={s: approve_plan(plan, key=keys[s], site_id=s) for s in SITES},
        ledgers={
            s: make_ledger(root / "sites" / s, keys[s], plan, records, commitment=committed(plan, s))
            for s in SITES
        },
        verdicts={s: make_verdict(keys, plan, s, candidate_sha256) for s in SITES},
        candidate_sha256=candidate_sha256,
        autoencoder_sha256=autoencoder_sha256,
        attempts=records,
        at=AT,
        site_evidence={
            "mechanism-audits": {s: make_mechanism(keys, plan, s) for s in SITES}
            if plan.audit.mechanism_canaries
            else {},
            "canary-openings": {s: make_opening(keys, plan, s, candidate_sha256) for s in SITES}
            if plan.audit.canaries_per_site
            else {},
        },
    )
    return Study(
        root=root, keys=keys, plan=plan, inputs=inputs, autoencoder=autoencoder, prior=prior,
        candidate=candidate,
    )  # fmt: skip


def reseal(path: Path, study: Study, **predicate: Any) -> None:
    """The coordinator signs a changed bundle again: hashes hold, so content has to speak."""
    release = "attestations/release.dsse.json"
    names = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    digests = {name: sha256((path / name).read_bytes()) for name in names if name != release}
    plan = study.plan
    statement = Statement(
        predicate_type="release/v1",
        subjects=tuple(Subject(name=name, sha256=digests[name]) for name in digests),
        predicate={
            "format": "lacuna/release-bundle/v1",
            "study_id": plan.study_id,
            "plan_sha256": plan.digest().hex(),
            "candidate_sha256": digests["models/denoiser.safetensors"],
            "decision_sha256": digests.get("attestations/gate-decision.dsse.json", ""),
            "synthetic": True,
            "at": AT,
            **predicate,
        },
    )
    (path / release).write_bytes(sign_statement(statement, study.coordinator))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
