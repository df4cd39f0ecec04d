"""The signed outcome of a mechanism audit (predicate ``mechanism-audit/v1``). No torch.

Nothing in it comes from patients: the audit runs on simulated ones. It says which installation was audited
under which plan, every claim with its figure, and whether all of them held. ``passed`` follows from the
checks and is computed again by whoever reads it.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from privacy.audit.mechanism_statistics import FALSE_FAILURE_PROBABILITY, Check
from shared.errors import MalformedMessageError, PeerError
from shared.study_plan import StudyPlan

PREDICATE_TYPE = "mechanism-audit/v1"

CLAIMS = (
    "unmasking", "masking", "share-variance", "share-mean", "share-shape", "total-variance", "independence",
    "canary-sum", "canary-curve", "clipping", "averaging", "scan-balance", "nothing-else", "participation",
    "rounding", "charged-sensitivity", "charged-event", "network-clipping", "network-variance",
    "network-independence", "network-unmasking",
)  # fmt: skip
"""What every audit of an installation tests."""

CLAIMS_BELOW_FULL_PARTICIPATION = ("batch-spread", "fresh-coins")
"""And what it tests besides where the sampling rate is below 1."""

PACKAGES = ("lacuna", "torch", "opacus", "monai", "numpy", "cryptography", "dp-accounting")

_FIELDS = {
    "study_id", "plan_sha256", "site_id", "canaries", "false_failure_probability", "software", "checks",
    "passed",
}  # fmt: skip
_CHECK_FIELDS = {"name", "title", "tests", "smallest_p", "level", "figure", "expected", "passed"}
_MAX_TEXT = 300
_LEAST_SPENT = 0.99
"""Of the significance that an audit has: it is split over its tests without remainder."""


class MechanismMismatchError(PeerError):
    """A signed mechanism audit is not about this plan, or does not say what its own figures say."""


@dataclass(frozen=True, kw_only=True)
class MechanismStatement:
    """Fields of the predicate; ``software`` names versions of what was audited."""

    study_id: str
    plan_sha256: str
    site_id: str
    canaries: int
    false_failure_probability: float
    software: dict[str, str]
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "study_id": self.study_id,
            "plan_sha256": self.plan_sha256,
            "site_id": self.site_id,
            "canaries": self.canaries,
            "false_failure_probability": self.false_failure_probability,
            "software": dict(self.software),
            "checks": [check.to_dict() for check in self.checks],
            "passed": self.passed,
        }

    @classmethod
    def from_dict(cls, value: Any) -> MechanismStatement:
        """Strict inverse of :meth:`to_dict`. Raises MalformedMessageError."""
        if not isinstance(value, dict) or set(value) != _FIELDS:
            raise MalformedMessageError("mechanism audit: fields missing or unknown")
        for name in ("study_id", "plan_sha256", "site_id"):
            _text(value[name], name)
        software, checks = value["software"], value["checks"]
        if not isinstance(software, dict) or not isinstance(checks, list) or len(checks) > 100:
            raise MalformedMessageError("mechanism audit: software is a table, checks are a list")
        for key, text in software.items():
            _text(text, f"software {str(key)[:40]}")
        if type(value["canaries"]) is not int or type(value["passed"]) is not bool:
            raise MalformedMessageError("mechanism audit: canaries is an integer, passed is true or false")
        statement = cls(
            study_id=value["study_id"],
            plan_sha256=value["plan_sha256"],
            site_id=value["site_id"],
            canaries=value["canaries"],
            false_failure_probability=_number(value["false_failure_probability"]),
            software=dict(software),
            checks=tuple(_check_from(check) for check in checks),
        )
        if statement.passed is not value["passed"]:
            raise MalformedMessageError("mechanism audit: `passed` is not what its checks say")
        return statement

    def check(self, plan: StudyPlan) -> None:
        """Is this a whole audit by a site of this plan, and is each verdict what its figures say?

        Raises:
            MechanismMismatchError: another plan, an unknown site, claims left out or named twice, more or
                less significance spent than an audit spends (at level 0 everything passes), or a verdict that
                its own p-value does not give.
        """
        who = f"the mechanism audit of {self.site_id!r}"
        if self.study_id != plan.study_id or self.plan_sha256 != plan.digest().hex():
            raise MechanismMismatchError(f"{who} belongs to another plan")
        if self.site_id not in {entry.site_id for entry in plan.roster.sites}:
            raise MechanismMismatchError(
                f"{self.site_id!r} signed a mechanism audit and is not in the roster"
            )
        names = [check.name for check in self.checks]
        expected = set(CLAIMS)
        if plan.privacy.sampling_rate < 1:
            expected |= set(CLAIMS_BELOW_FULL_PARTICIPATION)
        if set(names) != expected or len(names) != len(expected):
            missing = sorted(expected - set(names))
            raise MechanismMismatchError(f"{who} has other claims than an audit has (missing: {missing})")
        spent = math.fsum(check.tests * check.level for check in self.checks)
        if spent > FALSE_FAILURE_PROBABILITY * (1.0 + 1e-9):
            raise MechanismMismatchError(f"{who} spends more significance than there is")
        if self.passed and spent < _LEAST_SPENT * FALSE_FAILURE_PROBABILITY:
            raise MechanismMismatchError(f"{who} spends less significance than an audit does: it is blunt")
        for check in self.checks:
            if check.passed is not (check.tests > 0 and check.smallest_p > check.level):
                raise MechanismMismatchError(f"{who}: {check.name} is not what its figures say")


def make_statement(
    plan: StudyPlan,
    *,
    site_id: str,
    canaries: int,
    false_failure_probability: float,
    checks: tuple[Check, ...],
) -> MechanismStatement:
    """The statement of the installation that runs this."""
    return MechanismStatement(
        study_id=plan.study_id,
        plan_sha256=plan.digest().hex(),
        site_id=site_id,
        canaries=canaries,
        false_failure_probability=false_failure_probability,
        software=installed_software(),
        checks=checks,
    )


def installed_software() -> dict[str, str]:
    """Versions of what computes, as installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _check_from(value: Any) -> Check:
    if not isinstance(value, dict) or set(value) != _CHECK_FIELDS:
        raise MalformedMessageError("mechanism audit: a check has other fields than it must have")
    for name in ("name", "title", "figure", "expected"):
        _text(value[name], name)
    if type(value["tests"]) is not int or type(value["passed"]) is not bool or value["tests"] < 0:
        raise MalformedMessageError("mechanism audit: a check's tests are a count, passed is true or false")
    return Check(
        **{name: value[name] for name in ("name", "title", "tests", "figure", "expected", "passed")},
        smallest_p=_number(value["smallest_p"]),
        level=_number(value["level"]),
    )


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise MalformedMessageError("mechanism audit: a probability is not in [0, 1]")
    return float(value)


def _text(value: Any, name: str) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= _MAX_TEXT:
        raise MalformedMessageError(f"mechanism audit: {name} is not a short text")
