"""The mechanism audit of this installation: this code and these libraries, a plan's network and numbers.

It plays all sites of the plan in one process with identities of its own, on simulated patients. It reads the
plan package and nothing else: no scan, no ledger, no key of a study.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from privacy.audit.mechanism import AuditSize, MechanismAudit, NetworkUnderAudit, audit_mechanism
from privacy.audit.mechanism_path import Progress
from privacy.audit.mechanism_statement import (
    MechanismStatement,
    installed_software,
    make_statement,
)
from privacy.audit.site_evidence import open_mechanism, sign_mechanism
from privacy.dp.execution_plan import check_plan
from privacy.dp.patient_gradients import NamedParameters, PerSampleLoss
from shared.errors import LacunaError, RefusedError
from shared.home import write_private
from shared.identity import SigningKey
from shared.model.candidate import load_prior
from shared.model.diffusion import timesteps_from_uniform
from shared.model.presets import preset_named
from shared.plan_package import PlanPackage


def audit_installation(
    package: PlanPackage,
    *,
    size: AuditSize | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> MechanismAudit:
    """Run the audit with the package's plan and prior.

    Raises:
        InvalidPlanError: the plan does not keep its own promise, whatever the code does.
        UsageError: the plan's mode cannot be audited.
    """
    plan = package.plan
    network = NetworkUnderAudit(
        build=partial(_build_network, package),
        latent_shape=preset_named(plan.model.preset).latent_shape(plan.data.grid_shape),
        n_conditions=len(plan.data.conditions),
        draw_timesteps=timesteps_from_uniform,
    )
    return audit_mechanism(
        check_plan(plan),
        [entry.site_id for entry in plan.roster.sites],
        study_digest=plan.digest().hex(),
        network=network,
        size=size,
        device=device,
        progress=progress,
    )


def _build_network(package: PlanPackage) -> tuple[nn.Module, NamedParameters, PerSampleLoss]:
    denoiser, parameters = load_prior(package.plan, package.prior)
    return denoiser, parameters, denoiser.diffusion.per_sample_loss


def installation_statement(
    package: PlanPackage, audit: MechanismAudit, *, site_id: str
) -> MechanismStatement:
    """What the site signs about its installation."""
    return make_statement(
        package.plan,
        site_id=site_id,
        canaries=audit.canaries,
        false_failure_probability=audit.false_failure_probability,
        checks=audit.checks,
    )


def audit_for_plan(
    package: PlanPackage,
    *,
    site_id: str,
    key: SigningKey,
    path: Path,
    device: str = "cpu",
    progress: Progress | None = None,
) -> None:
    """Audit this installation as the plan asks and keep the signed outcome at ``path``, pass or fail.

    Nothing is run where the plan asks for no audit, or where ``path`` holds this site's audit of this plan
    by the same software.

    Raises:
        RefusedError: this installation is not the mechanism that the plan claims.
    """
    canaries = package.plan.audit.mechanism_canaries
    if not canaries:
        return
    statement = _kept_statement(package, site_id=site_id, key=key, path=path)
    if statement is None:
        audit = audit_installation(
            package, size=AuditSize(canaries=canaries), device=device, progress=progress
        )
        statement = installation_statement(package, audit, site_id=site_id)
        write_private(path, sign_mechanism(statement, key))
    broken = [check.name for check in statement.checks if not check.passed]
    if broken:
        raise RefusedError(
            "this installation is not the mechanism that the plan claims: " + ", ".join(broken),
            remedy="do not serve with it; compare versions with the other sites and report what was measured",
        )


def _kept_statement(
    package: PlanPackage, *, site_id: str, key: SigningKey, path: Path
) -> MechanismStatement | None:
    if not path.exists():
        return None
    try:
        statement = open_mechanism(path.read_bytes(), key=key.verify_key)
        statement.check(package.plan)
    except LacunaError:
        return None
    same = statement.site_id == site_id and statement.software == installed_software()
    enough = statement.canaries >= package.plan.audit.mechanism_canaries
    return statement if same and enough else None


def audit_table(audit: MechanismAudit) -> tuple[list[str], list[list[str]]]:
    """Columns and rows for a person."""
    rows = [
        [check.title, check.figure, check.expected, "holds" if check.passed else "BROKEN"]
        for check in audit.checks
    ]
    return ["claim", "measured", "claimed", "verdict"], rows


def audit_dict(audit: MechanismAudit) -> dict[str, Any]:
    """JSON form."""
    return {
        "passed": audit.passed,
        "canaries": audit.canaries,
        "false_failure_probability": audit.false_failure_probability,
        "checks": [check.to_dict() for check in audit.checks],
    }
