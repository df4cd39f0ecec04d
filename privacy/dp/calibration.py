"""From a budget to noise and ranges: what ``lacuna coordinator plan new`` proposes.

The split between training and audit is on mu^2, which is what adds up for Gaussian mechanisms: of the mu^2
that (epsilon, delta) allows, ``audit_share`` goes to the audit's attempts, all of them together, and the
rest to training. Noise is calibrated for every attempt that may be charged (``max_attempts`` and
``max_audit_attempts``), with the same functions that check a plan: what is proposed passes ``check_plan``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from privacy.dp.accounting import AccountantsDisagreeError, gaussian_epsilon, gaussian_mu
from privacy.dp.closeness import MIN_SHARE_STEPS
from privacy.dp.execution_plan import (
    LOCAL_ROUNDING_SHARE,
    MAX_WRAP_PROBABILITY,
    ExecutionPlan,
    power_of_two_at_most,
)
from shared.errors import InternalError, UsageError
from shared.study_plan import Mode, PrivacyClause, SecureAggregationClause, default_max_attempts

DEFAULT_AUDIT_SHARE = 0.1
"""Share of mu^2 that the audit's attempts may spend together."""

EPSILON_MARGIN = 1e-4
"""Calibration aims this much (relative) below epsilon, so that rounding of digits cannot pass it."""

WEIGHT_GRID_STEP = 2.0**-22
"""Modes ``local`` and ``unprotected``: grid of a site's change of weights."""

MAX_WEIGHT_CHANGE = 16.0
"""Modes ``local`` and ``unprotected``: clamp of each coordinate's change, where 32 bits have room for it."""


@dataclass(frozen=True, kw_only=True)
class ProposedPrivacy:
    """The two clauses of a plan that belong together."""

    privacy: PrivacyClause
    secure_aggregation: SecureAggregationClause
    execution: ExecutionPlan


def propose_privacy(
    *,
    mode: Mode,
    epsilon: float | None,
    delta: float,
    clip_norm: float,
    rounds: int,
    n_sites: int,
    threshold: int,
    max_colluding: int,
    dimension: int,
    declared_patients: int,
    sampling_rate: float = 1.0,
    draws_per_patient: int = 4,
    local_steps: int = 1,
    max_attempts: int | None = None,
    max_audit_attempts: int = 2,
    audit_share: float = DEFAULT_AUDIT_SHARE,
    local_learning_rate: float = 1e-3,
) -> ProposedPrivacy:
    """Noise multipliers and ranges that reach ``epsilon`` and pass ``check_plan``.

    Args:
        epsilon: Total over training and audit against the world; None in mode ``unprotected``.
        dimension: d, length of the vector.
        declared_patients: Public, rounded number of members over all sites.
        max_attempts: Training attempts that may be charged; default rounds plus a reserve of max(3, 20%).
        audit_share: Share of mu^2 for the audit (all its attempts together), in (0, 1).

    Raises:
        UsageError: the arguments contradict one another, or no noise reaches the budget.
    """
    if (mode == "unprotected") != (epsilon is None):
        raise UsageError("epsilon is left out in mode unprotected and nowhere else")
    if not 0 < audit_share < 1:
        raise UsageError(f"audit_share {audit_share:g} is not between 0 and 1")
    draft = ExecutionPlan(
        mode=mode, n_sites=n_sites, threshold=threshold, max_colluding=max_colluding, modulus_bits=32,
        dimension=dimension, clip=clip_norm, sampling_rate=sampling_rate,
        draws_per_patient=draws_per_patient, declared_patients=declared_patients, local_steps=local_steps,
        local_learning_rate=local_learning_rate, grid_step=1.0, clamp_steps=1,
        noise_multiplier=0.0, audit_noise_multiplier=0.0,
        max_attempts=default_max_attempts(rounds) if max_attempts is None else max_attempts,
        max_audit_attempts=max_audit_attempts, epsilon=epsilon, delta=delta,
    )  # fmt: skip
    execution = choose_ranges(draft) if mode != "distributed" else replace(draft, grid_step=_fine_grid(draft))
    if epsilon is not None:
        rough = 0.05 if mode == "distributed" else 2e-5
        audit_mu_squared = audit_share * gaussian_mu(epsilon, delta) ** 2
        audit_sigma = _round_up(math.sqrt(max_audit_attempts / audit_mu_squared))
        execution = replace(execution, audit_noise_multiplier=audit_sigma)
        execution = replace(execution, noise_multiplier=calibrate(execution, precision=rough))
    if mode == "distributed":
        execution = choose_ranges(execution)
        execution = replace(execution, noise_multiplier=calibrate(execution))
        if execution.wrap_probability > MAX_WRAP_PROBABILITY:
            raise InternalError("the proposed ranges do not hold the proposed noise")
    if mode == "unprotected":
        # Audit noise is zero there; only the ranges matter.
        execution = replace(execution, noise_multiplier=0.0, audit_noise_multiplier=0.0)
    return ProposedPrivacy(
        execution=execution,
        privacy=PrivacyClause(
            unit="patient", neighbouring="add_or_remove_one_patient", mode=mode, epsilon=epsilon, delta=delta,
            clip_norm=clip_norm, sampling_rate=sampling_rate, draws_per_patient=draws_per_patient,
            declared_patients=declared_patients, rounds=rounds, max_attempts=execution.max_attempts,
            local_steps=local_steps, noise_multiplier=execution.noise_multiplier,
            audit_noise_multiplier=execution.audit_noise_multiplier, max_audit_attempts=max_audit_attempts,
        ),
        secure_aggregation=SecureAggregationClause(
            threshold=threshold, max_colluding=max_colluding,
            modulus_bits=32 if execution.modulus_bits == 32 else 64,
            grid_step=execution.grid_step, clamp_steps=execution.clamp_steps,
        ),
    )  # fmt: skip


def calibrate(execution: ExecutionPlan, *, precision: float = 2e-5) -> float:
    """Smallest noise multiplier (to ``precision``, relative) that keeps the whole plan within its epsilon.

    Args:
        execution: Everything but ``noise_multiplier``, which is ignored.

    Raises:
        UsageError: no noise reaches it: the audit alone spends the budget.
    """
    if execution.epsilon is None:
        raise UsageError("mode unprotected has nothing to calibrate")
    target = execution.epsilon * (1.0 - EPSILON_MARGIN)
    steps = execution.max_attempts * execution.local_steps

    def spent(sigma: float) -> float:
        candidate = replace(execution, noise_multiplier=sigma)
        if execution.sampling_rate < 1:
            try:
                return candidate.planned_epsilon().reported
            except AccountantsDisagreeError:
                return math.inf  # far too little noise: the Renyi bound is no check there
        # The closed form is within 1e-5 of the reported figure and a hundred times faster; the result is
        # checked below against what is reported.
        training, audit = candidate.training_event(), candidate.audit_event()
        mu = math.sqrt(
            steps / training.noise_multiplier_world**2
            + execution.max_audit_attempts / audit.noise_multiplier_world**2
        )
        return gaussian_epsilon(mu, execution.delta)

    # Below this a share has less than MIN_SHARE_STEPS grid steps, and there is no event to account for.
    unit_share = replace(execution, noise_multiplier=1.0).noise_share_steps
    low = _round_up(MIN_SHARE_STEPS / unit_share * (1.0 + 1e-9))
    high = max(2.0 * low, math.sqrt(steps) / gaussian_mu(execution.epsilon, execution.delta))
    while spent(high) > target:
        high *= 1.5
        if high > 1e6:
            raise UsageError(
                f"no noise reaches epsilon {execution.epsilon:g} at delta {execution.delta:g}",
                remedy="a larger epsilon, or a smaller audit share",
            )
    if low < high / 64:
        low = high / 64
    elif spent(low) <= target:
        high = low
    while high - low > precision * high:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if spent(middle) <= target else (middle, high)
    sigma = _round_up(high)
    if replace(execution, noise_multiplier=sigma).planned_epsilon().reported > execution.epsilon:
        raise InternalError(f"the calibrated noise multiplier {sigma:g} does not reach its epsilon")
    return sigma


def choose_ranges(execution: ExecutionPlan) -> ExecutionPlan:
    """Set ``grid_step``, ``clamp_steps`` and ``modulus_bits``: 32 bits where they are enough.

    Mode ``distributed``: the grid is a power of two such that rounding adds at most 2^-10 of C to the
    sensitivity; where 32 bits cannot hold it, at most 2^-6; else 64 bits. A site's sum is clamped at four
    times the norm that an average site's patients could reach together, which honest sums do not meet.
    """
    if execution.mode != "distributed":
        room = (2**31 - 1) // (2 * execution.n_sites)
        clamp = min(room, math.ceil(MAX_WEIGHT_CHANGE / WEIGHT_GRID_STEP))
        chosen = replace(execution, grid_step=WEIGHT_GRID_STEP, clamp_steps=clamp, modulus_bits=32)
        return _with_room_for_audit(chosen)
    largest = execution.clip * max(8.0, 4.0 * execution.declared_patients / execution.n_sites)
    grid = _fine_grid(execution)
    for bits, coarser in ((32, 1.0), (32, 4.0), (32, 16.0), (64, 1.0)):
        step = grid * coarser
        chosen = replace(execution, grid_step=step, clamp_steps=math.ceil(largest / step), modulus_bits=bits)
        if chosen.noise_share_steps >= MIN_SHARE_STEPS and chosen.wrap_probability <= MAX_WRAP_PROBABILITY:
            return _with_room_for_audit(chosen)
    raise UsageError("no grid fits clip norm, noise and dimension together")


def _with_room_for_audit(execution: ExecutionPlan) -> ExecutionPlan:
    if execution.audit_wrap_probability <= MAX_WRAP_PROBABILITY:
        return execution
    return replace(execution, modulus_bits=64)


def _fine_grid(execution: ExecutionPlan) -> float:
    return power_of_two_at_most(execution.clip * LOCAL_ROUNDING_SHARE / math.sqrt(execution.dimension))


def _round_up(value: float) -> float:
    """Round up to 6 significant digits, so that a plan's TOML is readable and noise never shrinks."""
    digits = 5 - math.floor(math.log10(value))
    return math.ceil(value * 10.0**digits) / 10.0**digits
