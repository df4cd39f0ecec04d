"""Mechanism audit, without patients: is the production path the mechanism that a plan claims?

The path (clip, sum, quantize, noise share, mask, unmask) runs on simulated patients with known gradients
(:mod:`privacy.audit.canaries`), at the plan's clip norm, grid, noise, sampling rate, thresholds and modulus,
in four parts: noise, signal, grid, network (a module each). All tests are two-sided; one level is split over
them before anything is looked at.

Formal guarantee: a path that is the mechanism fails with probability at most FALSE_FAILURE_PROBABILITY. A
path that passes is not thereby private. What an audit of this kind cannot see: a noise generator that is
predictable and looks random, inputs that it does not try, behaviour that knows an audit from a study, charges
that are never written, and defects smaller than its power.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from privacy.audit.mechanism_network import NetworkUnderAudit, network_families
from privacy.audit.mechanism_noise import noise_families
from privacy.audit.mechanism_path import AuditSize, Progress
from privacy.audit.mechanism_signal import grid_families, signal_families
from privacy.audit.mechanism_statistics import FALSE_FAILURE_PROBABILITY, Check, judge
from privacy.dp.execution_plan import ExecutionPlan
from shared.errors import UsageError

__all__ = ["AuditSize", "MechanismAudit", "NetworkUnderAudit", "audit_mechanism"]


@dataclass(frozen=True, kw_only=True)
class MechanismAudit:
    """Every claim that was tested.

    Attributes:
        false_failure_probability: Bound, added up over all tests that were made.
        canaries: How many, over all sites.
        checks: Claims with their verdicts.
    """

    canaries: int
    false_failure_probability: float
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


def audit_mechanism(
    execution: ExecutionPlan,
    site_ids: Sequence[str],
    *,
    study_digest: str,
    network: NetworkUnderAudit | None = None,
    size: AuditSize | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MechanismAudit:
    """Run all parts; part 4 where a network is given.

    Args:
        execution: The plan's mechanism.
        site_ids: The plan's sites.
        study_digest: Digest of the plan in hex.

    Raises:
        UsageError: the plan's mode is not ``distributed``, or its grid is too coarse to be audited.
    """
    if execution.mode != "distributed":
        raise UsageError(
            f"the mechanism audit covers mode distributed; this plan is in mode {execution.mode}",
            remedy="mode unprotected has nothing to audit; mode local is covered by tests of the code alone",
        )
    size = AuditSize() if size is None else size
    families = []
    for part in (noise_families, signal_families, grid_families):
        families += part(
            execution, site_ids, study_digest=study_digest, size=size, device=device, progress=progress
        )
    if network is not None:
        families += network_families(
            execution, site_ids, network, study_digest=study_digest, device=device, progress=progress
        )
    checks = judge(families, total=FALSE_FAILURE_PROBABILITY)
    return MechanismAudit(
        canaries=size.canaries,
        false_failure_probability=sum(check.tests * check.level for check in checks),
        checks=checks,
    )
