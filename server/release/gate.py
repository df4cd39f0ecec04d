"""The gate: a conjunction of named conditions, each evaluated, each listed, nothing compensates.

:func:`evaluate_gate` is pure. It fails closed: evidence that is missing, unreadable, or makes a check crash
fails the condition it belongs to, with the reason; it never raises. The decision is then signed by the
coordinator over the hashes of everything it rests on, so that approvals and the officer's checker, which
evaluates the same evidence again with code of its own (:mod:`privacy.compliance.recheck`), speak of the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

from privacy.compliance.approvals import DECISION_PREDICATE
from server.release.gate_conditions import CHECKS, conditions_of
from server.release.gate_evidence import (
    GateEvidence,
    GateInputs,
    SiteSpending,
    in_words,
    site_evidence_files,
)
from shared.attestation import Statement, Subject, sign_statement
from shared.errors import CoordinatorError
from shared.identity import SigningKey

__all__ = [
    "GateCondition",
    "GateDecision",
    "GateInputs",
    "SiteSpending",
    "evaluate_gate",
    "sign_decision",
]


@dataclass(frozen=True, kw_only=True)
class GateCondition:
    """One condition: what was found, what it must be, and why it fails (or a remark)."""

    name: str
    title: str
    passed: bool
    figure: str
    bound: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "title": self.title,
            "passed": self.passed,
            "figure": self.figure,
            "bound": self.bound,
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """Every condition, and their conjunction."""

    inputs: GateInputs = field(repr=False)
    conditions: tuple[GateCondition, ...]
    spending: tuple[SiteSpending, ...]

    @property
    def released(self) -> bool:
        return bool(self.conditions) and all(condition.passed for condition in self.conditions)

    @property
    def failed(self) -> tuple[GateCondition, ...]:
        return tuple(condition for condition in self.conditions if not condition.passed)

    def condition(self, name: str) -> GateCondition:
        return next(condition for condition in self.conditions if condition.name == name)

    def to_dict(self) -> dict[str, Any]:
        """The predicate of ``gate-decision/v1``, without the time."""
        plan = self.inputs.plan
        return {
            "study_id": plan.study_id,
            "plan_sha256": plan.digest().hex(),
            "candidate_sha256": self.inputs.candidate_sha256,
            "decision": "release" if self.released else "refuse",
            "conditions": [condition.to_dict() for condition in self.conditions],
            "spending": [site.to_dict() for site in self.spending],
            "attempts": [
                {
                    "attempt": record.attempt,
                    "run_id": record.run_id,
                    "round": record.round,
                    "purpose": record.purpose,
                    "status": record.status,
                    "participants": list(record.participants),
                    "survivors": list(record.survivors),
                }
                for record in self.inputs.attempts
            ],
        }


def evaluate_gate(inputs: GateInputs) -> GateDecision:
    """Evaluate every condition. Never raises: what cannot be evaluated has failed."""
    evidence = GateEvidence(inputs)
    conditions = []
    for name, title in conditions_of(inputs.plan).items():
        try:
            passed, figure, bound, reason = CHECKS[name](evidence)
        except Exception as error:  # fail closed: a crash in a check is a failed check
            passed, figure, bound, reason = False, "not known", "", f"cannot be evaluated: {in_words(error)}"
        conditions.append(
            GateCondition(name=name, title=title, passed=passed, figure=figure, bound=bound, reason=reason)
        )
    return GateDecision(inputs=inputs, conditions=tuple(conditions), spending=evidence.spending())


def sign_decision(decision: GateDecision, key: SigningKey, *, at: str) -> bytes:
    """The coordinator's ``gate-decision/v1`` envelope; subjects are named as the bundle will name them.

    Raises:
        CoordinatorError: the key is not the plan's coordinator's, or the gate was evaluated at another time.
    """
    inputs = decision.inputs
    if inputs.at not in ("", at):
        raise CoordinatorError(f"the gate was evaluated at {inputs.at}, not at {at}")
    if key.verify_key.hex() != inputs.plan.roster.coordinator_key:
        raise CoordinatorError("a gate decision is signed with the coordinator's key that the plan names")
    files = {
        "attestations/plan.json": inputs.plan.canonical(),
        "attestations/plan.dsse.json": inputs.plan_envelope,
        **{f"attestations/plan-approvals/{s}.dsse.json": d for s, d in (inputs.plan_approvals or {}).items()},
        **{f"attestations/ledgers/{s}.dsse.json": d for s, d in inputs.ledgers.items()},
        **{f"attestations/verdicts/{s}.dsse.json": d for s, d in inputs.verdicts.items()},
        **site_evidence_files(inputs.site_evidence),
    }
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} | {
        "models/autoencoder.safetensors": inputs.autoencoder_sha256,
        "models/denoiser.safetensors": inputs.candidate_sha256,
    }
    return sign_statement(
        Statement(
            predicate_type=DECISION_PREDICATE,
            subjects=tuple(Subject(name=name, sha256=digests[name]) for name in sorted(digests)),
            predicate={**decision.to_dict(), "evaluated_at": at},
        ),
        key,
    )
