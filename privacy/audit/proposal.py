"""Audit clause of a new plan, from public figures only. No torch.

Edges are multiples of the prior's loss on public patients that it was not trained on. They have to serve
candidates that moved a little and candidates that memorised, so they are spaced geometrically around zero. A
secondary attack that is pooled gets edges from its own figures of the same patients
(:func:`propose_secondary_edges`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from privacy.audit.bounds import gaussian_auc_ceiling
from privacy.audit.counts import PRIMARY_WEIGHT, CountsLayout
from privacy.audit.pooled_auc import planned_power
from privacy.audit.verdict import level_share
from shared.errors import UsageError
from shared.study_plan import AuditClause, SecondaryAttackClause, StudyPlan

SCORE_EDGE_MULTIPLES = (-0.12, -0.07, -0.05, -0.035, -0.02, 0.0, 0.02, 0.04, 0.07, 0.12, 0.25)
"""For noised counts: each further bin adds noise to the AUC. As dense below zero as above: a candidate that
was trained with noise, or fast without, may describe everybody worse than the prior, members less so."""

_FINE = (*(0.002 * 1.3**i for i in range(25)),)
EXACT_EDGE_MULTIPLES = (*(-edge for edge in reversed(_FINE)), 0.0, *_FINE)
"""For counts without noise (mode ``unprotected``), where bins cost nothing."""

CONTROL_QUANTILES = (1 / 3, 2 / 3)

SECONDARY_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
TOWARDS_MEMBERS = (0.85, 0.65, 0.4)
"""Further edges of a pooled secondary attack: shares of the tenth of public figures that looks most like a
member's."""

_EXACT_QUANTILES = tuple(step / 40 for step in range(1, 40))
_EXACT_TOWARDS = tuple(1.0 - step / 20 for step in range(1, 19))

DEFAULT_POOLED_WEIGHT = 8
"""Of a pooled secondary attack: its cells carry twice the noise of the primary attack's."""
RECOMMENDED_AUDIT_NOISE = 2.0
"""audit_noise_multiplier with power at least 0.5 against AUC 0.9 from about 80 members and 40 held-out
patients on; two attempts of it cost mu 0.71 of the 1.67 that epsilon 8 at delta 1e-5 allows."""


def propose_edges(
    public_losses: ArrayLike, *, noised: bool = True
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(score_edges, control_edges) from the prior's loss on each of some public patients.

    Args:
        public_losses: ``AttackLosses.public_P`` of public patients on the prior.
        noised: False in mode ``unprotected``, whose counts carry no noise and can have many bins.

    Raises:
        UsageError: fewer than 3 finite positive losses, or all the same.
    """
    losses = np.asarray(public_losses, dtype=np.float64)
    if losses.ndim != 1 or losses.size < 3 or not np.all(np.isfinite(losses) & (losses > 0)):
        raise UsageError("edges need the finite, positive losses of at least 3 public patients")
    middle = float(np.median(losses))
    multiples = SCORE_EDGE_MULTIPLES if noised else EXACT_EDGE_MULTIPLES
    scores = tuple(_rounded(multiple * middle) for multiple in multiples)
    controls = tuple(_rounded(float(value)) for value in np.quantile(losses, CONTROL_QUANTILES))
    if len(set(scores)) != len(scores) or len(set(controls)) != len(controls):
        raise UsageError("the public losses are too much alike to place edges")
    return scores, controls


def propose_secondary_edges(
    attack: SecondaryAttackClause, public_figures: ArrayLike, *, noised: bool = True
) -> tuple[float, ...]:
    """Edges of a pooled secondary attack, on its score.

    Without calibration a candidate's score of a patient that it never saw lies about where the prior's lie:
    edges are quantiles of those, and go on towards the side that speaks for membership. With calibration
    scores lie about zero, as the primary attack's do: edges are multiples of the prior's median figure.

    Args:
        public_figures: The attack's figure, not its score, of public patients on the prior, uncalibrated.
        noised: False in mode ``unprotected``, where bins cost nothing.

    Raises:
        UsageError: fewer than 3 finite positive figures, or all the same.
    """
    figures = np.asarray(public_figures, dtype=np.float64)
    if figures.ndim != 1 or figures.size < 3 or not np.all(np.isfinite(figures) & (figures > 0)):
        raise UsageError(
            f"edges of {attack.attack_id} need the positive figures of at least 3 public patients"
        )
    if attack.calibrated:
        multiples = SCORE_EDGE_MULTIPLES if noised else EXACT_EDGE_MULTIPLES
        edges = {_rounded(multiple * float(np.median(figures))) for multiple in multiples}
    else:
        low = attack.member_side == "low"
        quantiles, towards = (
            (SECONDARY_QUANTILES, TOWARDS_MEMBERS) if noised else (_EXACT_QUANTILES, _EXACT_TOWARDS)
        )
        nearest = float(np.quantile(figures, quantiles[0] if low else quantiles[-1]))
        places = [float(value) for value in np.quantile(figures, quantiles)]
        places += [nearest * share if low else nearest / share for share in towards]
        edges = {_rounded(-place if low else place) for place in places}
        if len(edges) != len(places):
            raise UsageError(f"the public figures of {attack.attack_id} are too much alike to place edges")
    return tuple(sorted(edges))


def pool_attacks(
    clause: AuditClause,
    names: Sequence[str],
    *,
    public_figures: Mapping[str, ArrayLike],
    weight: int = DEFAULT_POOLED_WEIGHT,
    noised: bool = True,
) -> AuditClause:
    """The clause with some of its secondary attacks pooled, their edges placed.

    Args:
        names: ``attack_id`` of each attack to pool.
        public_figures: By ``attack_id``; see :func:`propose_secondary_edges`.

    Raises:
        UsageError: the plan makes no such attack, or there are no public figures of it.
    """
    known = [attack.attack_id for attack in clause.secondary_attacks]
    for name in names:
        if name not in known:
            made = ", ".join(known) if known else "no secondary attacks"
            raise UsageError(f"no attack {name!r} to pool: the plan makes {made}")
        if name not in public_figures:
            raise UsageError(
                f"the calibration has no public figures of {name!r}, so its thresholds cannot be placed",
                remedy="lacuna coordinator pretrain ... --calibrate-attacks",
            )
    return clause.model_copy(
        update={
            "secondary_attacks": tuple(
                attack.model_copy(
                    update={
                        "edges": propose_secondary_edges(
                            attack, public_figures[attack.attack_id], noised=noised
                        ),
                        "pooled_weight": weight,
                    }
                )
                if attack.attack_id in names
                else attack
                for attack in clause.secondary_attacks
            )
        }
    )


SecondaryChoice = Literal["all", "unguided", "none"]


def propose_audit(
    public_losses: ArrayLike,
    *,
    copy_distance: float,
    false_copy_rate: float,
    declared_patients: int,
    timesteps: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    draws_per_timestep: int = 2,
    copy_samples: int = 500,
    noised: bool = True,
    guidance_scale: float = 1.0,
    secondary: SecondaryChoice = "all",
) -> AuditClause:
    """All values of an audit clause.

    ``secondary`` says which secondary attacks a site makes for itself: all of :func:`usual_attacks`, those
    without guidance alone (about a third of the work where generation is guided), or none.

    ``max_copied_patients`` is the number of false copies among the declared members that is exceeded with
    probability at most 0.1%, given the calibrated false-copy rate.
    """
    score_edges, control_edges = propose_edges(public_losses, noised=noised)
    return AuditClause(
        holdout_share=1 / 3,
        timesteps=tuple(timesteps),
        draws_per_timestep=draws_per_timestep,
        score_edges=score_edges,
        control_edges=control_edges,
        copy_samples=copy_samples,
        copy_distance=copy_distance,
        max_copied_patients=int(
            stats.binom.isf(1e-3, declared_patients, min(max(false_copy_rate, 0.0), 1.0))
        ),
        secondary_attacks=()
        if secondary == "none"
        else usual_attacks(
            guidance_scale=1.0 if secondary == "unguided" else guidance_scale, timesteps=timesteps
        ),
    )


def pooling_outlook(plan: StudyPlan) -> str:
    """What pooling costs the figures of the plan that are there anyway, before any data."""
    alone = plan.audit.model_copy(update={"secondary_attacks": ()})
    layout, plain = (CountsLayout.from_clause(clause) for clause in (plan.audit, alone))
    names = ", ".join(f"{a.attack_id} ({len(a.edges)} thresholds)" for a in plan.audit.pooled_attacks)
    more = layout.sensitivity / plain.sensitivity - 1.0
    return (
        f"pooled secondary attacks: {names}; the audit's other counts carry {100 * more:.0f}% more noise for "
        "them, and they take half of the primary attack's significance"
    )


def usual_attacks(
    *, guidance_scale: float = 1.0, timesteps: Sequence[float] = (0.2, 0.4, 0.6, 0.8)
) -> tuple[SecondaryAttackClause, ...]:
    """The secondary attacks of a new plan, for the site alone; signs and norms as published.

    Args:
        guidance_scale: Of generation under the plan; other than 1, every attack on the candidate's outputs
            is made a second time under it, the primary attack's figure included.
        timesteps: Of the loss that is differentiated, or guided.
    """
    plain = (
        SecondaryAttackClause(attack="sima", timesteps=(0.1, 0.2, 0.3), norm=4),
        SecondaryAttackClause(attack="pia", timesteps=(0.05, 0.2, 0.4), norm=4),
        SecondaryAttackClause(attack="secmi", timesteps=(0.0, 0.1, 0.2, 0.3), norm=2),
        SecondaryAttackClause(attack="gradient_norm", timesteps=tuple(timesteps), draws_per_timestep=2),
    )
    if guidance_scale == 1.0:
        return plain
    loss = SecondaryAttackClause(
        attack="loss", timesteps=tuple(timesteps), draws_per_timestep=2, calibrated=True
    )
    return plain + tuple(
        attack.model_copy(update={"guidance_scale": guidance_scale}) for attack in (loss, *plain)
    )


def expected_power(
    clause: AuditClause,
    *,
    n_members: float,
    n_held_out: float,
    audit_noise_multiplier: float,
    survivors_per_share: float,
    max_audit_attempts: int,
    epsilon: float | None,
    delta: float,
) -> float:
    """Power of the pooled attack before any data, scores spread evenly over the middle bins.

    Args:
        survivors_per_share: m / (t - c): how many shares of noise are in the sum, relative to those needed.
    """
    layout = CountsLayout.from_clause(clause)
    cell = audit_noise_multiplier * layout.sensitivity * math.sqrt(survivors_per_share) / PRIMARY_WEIGHT
    return planned_power(
        edges=np.linspace(-2.0, 3.0, len(clause.score_edges)),
        n_members=n_members,
        n_held_out=n_held_out,
        members_std=cell * math.sqrt(2.0),
        held_out_std=cell,
        true_auc=clause.power_at_auc,
        bound=min(clause.max_auc, gaussian_auc_ceiling(epsilon, delta)),
        error=clause.significance * level_share(clause, "membership_attack") / max_audit_attempts,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
