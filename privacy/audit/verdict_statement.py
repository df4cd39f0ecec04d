"""The signed verdict of one site (predicate ``verdict/v1``): what the gate and the officer read. No torch.

Everything in it is public: pooled noised counts, who contributed, and a verdict that anybody computes again
from them with :func:`VerdictStatement.check`. A site may veto without a reason; a veto set by a person says
nothing that the counts would have to account for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from privacy.audit.verdict import PlantedLeak, PooledVerdict, compute_verdict
from shared.attestation import Statement, Subject, open_statement, sign_statement
from shared.errors import LacunaError, MalformedMessageError, PeerError
from shared.identity import SigningKey, VerifyKey
from shared.study_plan import StudyPlan

PREDICATE_TYPE = "verdict/v1"
_FIELDS = (
    "study_id",
    "plan_sha256",
    "candidate_sha256",
    "run_id",
    "attempt",
    "site_id",
    "survivors",
    "pooled_counts",
    "planted_leak",
    "verdict",
    "veto",
)
_LARGEST_COUNT = 2**53


class VerdictMismatchError(PeerError):
    """A signed verdict is not what its own counts, or the plan, give."""


@dataclass(frozen=True, kw_only=True)
class VerdictStatement:
    """Fields of the predicate; ``plan_sha256`` and ``candidate_sha256`` are 64 hex digits."""

    study_id: str
    plan_sha256: str
    candidate_sha256: str
    run_id: str
    attempt: int
    site_id: str
    survivors: tuple[str, ...]
    pooled_counts: tuple[int, ...]
    planted_leak: PlantedLeak
    verdict: PooledVerdict
    veto: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "study_id": self.study_id,
            "plan_sha256": self.plan_sha256,
            "candidate_sha256": self.candidate_sha256,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "site_id": self.site_id,
            "survivors": list(self.survivors),
            "pooled_counts": list(self.pooled_counts),
            "planted_leak": self.planted_leak.to_dict(),
            "verdict": self.verdict.to_dict(),
            "veto": self.veto,
        }

    @classmethod
    def from_dict(cls, value: Any) -> VerdictStatement:
        """Strict inverse of :meth:`to_dict`. Raises MalformedMessageError."""
        if not isinstance(value, dict) or set(value) != set(_FIELDS):
            raise MalformedMessageError("verdict: fields missing or unknown")
        for name in ("study_id", "plan_sha256", "candidate_sha256", "run_id", "site_id"):
            if not isinstance(value[name], str) or not 1 <= len(value[name]) <= 200:
                raise MalformedMessageError(f"verdict: {name} is not a short text")
        counts, survivors = value["pooled_counts"], value["survivors"]
        if not isinstance(counts, list) or not all(
            type(n) is int and abs(n) <= _LARGEST_COUNT for n in counts
        ):
            raise MalformedMessageError("verdict: pooled_counts are not integers")
        if not isinstance(survivors, list) or not all(isinstance(site, str) for site in survivors):
            raise MalformedMessageError("verdict: survivors are not site ids")
        if type(value["attempt"]) is not int or type(value["veto"]) is not bool:
            raise MalformedMessageError("verdict: attempt is an integer, veto is true or false")
        return cls(
            study_id=value["study_id"],
            plan_sha256=value["plan_sha256"],
            candidate_sha256=value["candidate_sha256"],
            run_id=value["run_id"],
            attempt=value["attempt"],
            site_id=value["site_id"],
            survivors=tuple(survivors),
            pooled_counts=tuple(counts),
            planted_leak=PlantedLeak.from_dict(value["planted_leak"]),
            verdict=PooledVerdict.from_dict(value["verdict"]),
            veto=value["veto"],
        )

    def check(self, plan: StudyPlan) -> None:
        """Compute the verdict again from the counts.

        Raises:
            VerdictMismatchError: another plan, an unknown site, or a verdict that the counts do not give.
        """
        if self.study_id != plan.study_id or self.plan_sha256 != plan.digest().hex():
            raise VerdictMismatchError(f"the verdict of {self.site_id!r} belongs to another plan")
        if self.site_id not in {entry.site_id for entry in plan.roster.sites}:
            raise VerdictMismatchError(f"{self.site_id!r} signed a verdict and is not in the roster")
        try:
            expected = compute_verdict(
                plan, self.pooled_counts, self.survivors, planted_leak=self.planted_leak
            )
        except LacunaError as error:
            raise VerdictMismatchError(f"the verdict of {self.site_id!r}: {error}") from error
        if expected.to_dict() != self.verdict.to_dict():
            raise VerdictMismatchError(f"the verdict of {self.site_id!r} does not follow from its counts")


def make_verdict_statement(
    plan: StudyPlan,
    *,
    candidate_sha256: str,
    run_id: str,
    attempt: int,
    site_id: str,
    survivors: tuple[str, ...],
    pooled_counts: tuple[int, ...],
    planted_leak: PlantedLeak,
    veto: bool,
) -> VerdictStatement:
    """The statement of one site about one audit attempt; the verdict is computed, never passed in."""
    counts = tuple(int(count) for count in pooled_counts)
    return VerdictStatement(
        study_id=plan.study_id,
        plan_sha256=plan.digest().hex(),
        candidate_sha256=candidate_sha256,
        run_id=run_id,
        attempt=attempt,
        site_id=site_id,
        survivors=tuple(survivors),
        pooled_counts=counts,
        planted_leak=planted_leak,
        verdict=compute_verdict(plan, counts, survivors, planted_leak=planted_leak),
        veto=veto,
    )


def sign_verdict(statement: VerdictStatement, key: SigningKey) -> bytes:
    """DSSE envelope; subjects are the candidate and the plan."""
    subjects = (
        Subject(name="candidate", sha256=statement.candidate_sha256),
        Subject(name="plan", sha256=statement.plan_sha256),
    )
    return sign_statement(
        Statement(predicate_type=PREDICATE_TYPE, subjects=subjects, predicate=statement.to_dict()), key
    )


def open_verdict(data: bytes, *, key: VerifyKey, what: str = "verdict") -> VerdictStatement:
    """Verify the signature, then parse. Call :meth:`VerdictStatement.check` next.

    Raises:
        MalformedMessageError: not such an envelope, or its subjects are not those of its predicate.
        BadSignatureError: no valid signature of that key.
    """
    opened = open_statement(data, key=key, predicate_type=PREDICATE_TYPE, what=what)
    statement = VerdictStatement.from_dict(opened.predicate)
    digests = {subject.name: subject.sha256 for subject in opened.subjects}
    if digests != {"candidate": statement.candidate_sha256, "plan": statement.plan_sha256}:
        raise MalformedMessageError(f"{what}: subjects and predicate name different artefacts")
    return statement
