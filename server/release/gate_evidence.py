"""What the gate looks at: its inputs, and the same opened and verified once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from privacy.audit.verdict import PooledVerdict, compute_verdict
from privacy.audit.verdict_statement import VerdictStatement, open_verdict
from privacy.dp.accounting import EpsilonReport, epsilon
from privacy.ledger_chain import CHARGE, LedgerEntry, LedgerExport, LedgerHead, read_export
from server.study_store import AttemptRecord
from shared.errors import CoordinatorError, LacunaError
from shared.study_plan import StudyPlan


@dataclass(frozen=True, kw_only=True)
class GateInputs:
    """Everything that a decision rests on; maps are by site id, files as bytes.

    Attributes:
        plan: The plan, as parsed; ``plan_envelope`` is the coordinator's signature over it.
        plan_approvals: ``plan-approval/v1`` of each site; None where they were not collected, then the sites'
            signed ledgers, which name the plan in every charge, stand for them.
        ledgers: Signed exports.
        verdicts: Signed ``verdict/v1`` statements.
        candidate_sha256: Hex SHA-256 of the denoiser file that would be released.
        autoencoder_sha256: The same of the autoencoder file.
        attempts: The coordinator's record of every attempt, of both purposes.
        at: Time of the decision, ``2026-01-31T12:00:00Z``; needed where the plan has a last day.
        seen_heads: Heads of the sites' ledgers that the coordinator saw in key messages.
        site_evidence: What sites signed beside their verdicts, by kind (``SITE_EVIDENCE``) and site.
    """

    plan: StudyPlan
    plan_envelope: bytes
    ledgers: Mapping[str, bytes]
    verdicts: Mapping[str, bytes]
    candidate_sha256: str
    autoencoder_sha256: str
    attempts: Sequence[AttemptRecord]
    at: str = ""
    plan_approvals: Mapping[str, bytes] | None = None
    seen_heads: Mapping[str, Sequence[LedgerHead]] = field(default_factory=dict)
    site_evidence: Mapping[str, Mapping[str, bytes]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SiteSpending:
    """What one site charged. Epsilons are infinite without protection, NaN where nothing can be read."""

    site_id: str
    train_attempts: int
    audit_attempts: int
    epsilon_world: float
    epsilon_colluding: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "site_id": self.site_id,
            "train_attempts": self.train_attempts,
            "audit_attempts": self.audit_attempts,
            "epsilon_world": _json_epsilon(self.epsilon_world),
            "epsilon_colluding": _json_epsilon(self.epsilon_colluding),
        }


class GateEvidence:
    """The inputs, opened once; what does not open is kept as the reason why."""

    def __init__(self, inputs: GateInputs) -> None:
        self.inputs = inputs
        self.plan = inputs.plan
        self.sites = [entry.site_id for entry in inputs.plan.roster.sites]
        self.plan_sha256 = inputs.plan.digest().hex()
        self.ledgers: dict[str, LedgerExport] = {}
        self.ledger_faults: dict[str, str] = {}
        self.verdicts: dict[str, VerdictStatement] = {}
        self.verdict_faults: dict[str, str] = {}
        for entry in self.plan.roster.sites:
            site_id = entry.site_id
            try:
                if site_id in inputs.ledgers:
                    self.ledgers[site_id] = read_export(
                        inputs.ledgers[site_id], entry.verify_key, what=f"ledger of {site_id}"
                    )
            except Exception as error:  # fail closed, see evaluate_gate
                words, name = in_words(error), f"ledger of {site_id}"
                self.ledger_faults[site_id] = words if name in words else f"{name}: {words}"
            try:
                if site_id in inputs.verdicts:
                    verdict = open_verdict(
                        inputs.verdicts[site_id], key=entry.verify_key, what=f"verdict of {site_id}"
                    )
                    if verdict.site_id != site_id:
                        raise CoordinatorError(f"{site_id} signed a verdict in the name of another site")
                    self.verdicts[site_id] = verdict
            except Exception as error:
                self.verdict_faults[site_id] = in_words(error)

    def all_ledgers(self) -> dict[str, LedgerExport]:
        """Every site's ledger. Raises where one is missing: no statement about all is possible then."""
        missing = [site_id for site_id in self.sites if site_id not in self.ledgers]
        if missing:
            raise CoordinatorError(f"no valid ledger of {', '.join(missing)}")
        return self.ledgers

    def charges(self, site_id: str, purpose: str | None = None) -> list[LedgerEntry]:
        """Charges of this study."""
        return [
            entry
            for entry in self.ledgers[site_id].entries
            if entry.kind == CHARGE
            and entry.body["study_id"] == self.plan.study_id
            and (purpose is None or entry.body["purpose"] == purpose)
        ]

    def completed(self, purpose: str) -> list[AttemptRecord]:
        return [r for r in self.inputs.attempts if r.purpose == purpose and r.status == "completed"]

    @cached_property
    def epsilons(self) -> dict[str, tuple[EpsilonReport, EpsilonReport]]:
        """By site: epsilon against the world, and if all others collude."""
        delta = self.plan.privacy.delta
        found = {}
        for site_id in self.ledgers:
            events = [entry.event for entry in self.charges(site_id)]
            found[site_id] = (
                epsilon(events, delta, view="world"),
                epsilon(events, delta, view="all_others_collude"),
            )
        return found

    def spending(self) -> tuple[SiteSpending, ...]:
        try:
            epsilons = self.epsilons
        except Exception:  # the condition `budget` says why
            epsilons = {}
        rows = []
        for site_id in self.sites:
            known = site_id in self.ledgers
            world, colluding = epsilons.get(site_id, (None, None))
            rows.append(
                SiteSpending(
                    site_id=site_id,
                    train_attempts=len(self.charges(site_id, "train")) if known else 0,
                    audit_attempts=len(self.charges(site_id, "audit")) if known else 0,
                    epsilon_world=math.nan if world is None else world.reported,
                    epsilon_colluding=math.nan if colluding is None else colluding.reported,
                )
            )
        return tuple(rows)

    def auditors(self) -> list[str]:
        """Sites that took part in the completed audit; all of the roster where there is none."""
        done = self.completed("audit")
        return list(done[-1].survivors) if done else self.sites

    def beside_verdicts(self, kind: str) -> Mapping[str, bytes]:
        """What sites signed beside their verdicts, of one kind of ``SITE_EVIDENCE``."""
        return self.inputs.site_evidence.get(kind, {})

    @cached_property
    def recomputed(self) -> dict[str, PooledVerdict]:
        """By site: the verdict computed here from the counts that the site signed."""
        if not self.verdicts:
            raise CoordinatorError("there is no valid verdict")
        return {
            site_id: compute_verdict(
                self.plan, verdict.pooled_counts, verdict.survivors, planted_leak=verdict.planted_leak
            )
            for site_id, verdict in self.verdicts.items()
        }


def site_evidence_files(evidence: Mapping[str, Mapping[str, bytes]]) -> dict[str, bytes]:
    """Bundle path to bytes of what sites signed beside their verdicts."""
    return {
        f"attestations/{kind}/{site}.dsse.json": data
        for kind, by_site in evidence.items()
        for site, data in by_site.items()
    }


def in_words(error: Exception) -> str:
    """An error as a reason in a condition."""
    text = error.message if isinstance(error, LacunaError) else f"{type(error).__name__}: {error}"
    return text[:500]


def _json_epsilon(value: float) -> Any:
    if math.isnan(value):
        return None
    return "infinite" if math.isinf(value) else value
