"""One object per study that yields sampler, clipper, grid, noise and accounting event together.

Nothing else takes a sigma: the trainer, the ledger's charges, the offline checker and the calibration all
read this object, so that the noise that is added and the event that is charged cannot disagree (the
execution-plan pattern of google-deepmind/jax_privacy).

Three modes, see DESIGN section 5:

- ``distributed``: in one attempt each site rounds its clipped sum to the grid and adds integer noise with
  standard deviation sigma C / sqrt(t - c); at least t - c honest shares are in every unmasked total.
- ``local``: in one attempt each site takes ``local_steps`` noisy steps of its own, each with the full noise
  sigma C on a grid of its own (:attr:`ExecutionPlan.gradient_grid_step`), then uploads its change of weights,
  which is post-processing.
- ``unprotected``: no clipping, no noise, infinite epsilon.

The audit's counts travel the same way in every mode: integers (grid step 1) plus a share of noise.

This module imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from privacy.dp.accounting import EpsilonReport, PrivacyEvent, View, epsilon
from privacy.dp.closeness import (
    MIN_SHARE_STEPS,
    SMOOTHING_STEPS,
    continuous_std,
    rounding_divergence,
    sum_divergence,
    tail_probability,
)
from privacy.dp.sensitivity import MAX_PATIENTS_PER_SITE, Sensitivity, clipped_sum_sensitivity
from shared.study_plan import InvalidPlanError, Mode, StudyPlan

MAX_WRAP_PROBABILITY = 2.0**-40
"""Bound, for each attempt, on the probability that the masked sum leaves the range of the modulus."""

LOCAL_ROUNDING_SHARE = 2.0**-10
"""Mode ``local``: grid of a step's gradient, such that rounding adds at most this share of C to
sensitivity."""

MAX_COUNTS_SENSITIVITY = 1024.0
"""Largest L2 sensitivity of audit counts for which the ranges of a plan are checked."""

MAX_COUNT_WEIGHT = 16
"""Largest amount by which one patient moves one cell of the audit counts (:mod:`privacy.audit.counts`)."""

MAX_COUNTS_LENGTH = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ExecutionPlan:
    """What a site does in an attempt, and what that costs. All fields are public.

    Units: ``clip``, ``grid_step`` in the units of the vector; ``*_steps`` standard deviations and bounds in
    grid steps; noise multipliers in units of the clip norm (training) or of the counts' sensitivity (audit).
    """

    mode: Mode
    n_sites: int
    threshold: int
    max_colluding: int
    modulus_bits: int
    dimension: int
    clip: float
    sampling_rate: float
    draws_per_patient: int
    declared_patients: int
    local_steps: int
    local_learning_rate: float
    grid_step: float
    clamp_steps: int
    noise_multiplier: float
    audit_noise_multiplier: float
    max_attempts: int
    max_audit_attempts: int
    epsilon: float | None
    delta: float

    @classmethod
    def from_study_plan(cls, plan: StudyPlan) -> ExecutionPlan:
        """Read the plan's clauses; checks nothing (see :func:`check_plan`)."""
        privacy, aggregation = plan.privacy, plan.secure_aggregation
        return cls(
            mode=privacy.mode,
            n_sites=plan.n_sites,
            threshold=aggregation.threshold,
            max_colluding=aggregation.max_colluding,
            modulus_bits=aggregation.modulus_bits,
            dimension=plan.model.dimension,
            clip=privacy.clip_norm,
            sampling_rate=privacy.sampling_rate,
            draws_per_patient=privacy.draws_per_patient,
            declared_patients=privacy.declared_patients,
            local_steps=privacy.local_steps,
            local_learning_rate=plan.model.local_learning_rate,
            grid_step=aggregation.grid_step,
            clamp_steps=aggregation.clamp_steps,
            noise_multiplier=privacy.noise_multiplier,
            audit_noise_multiplier=privacy.audit_noise_multiplier,
            max_attempts=privacy.max_attempts,
            max_audit_attempts=privacy.max_audit_attempts,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
        )

    @property
    def honest_shares(self) -> int:
        """t - c: shares of noise that are in every unmasked total and unknown to its observers."""
        return max(self.threshold - self.max_colluding, 1)

    @property
    def gradient_grid_step(self) -> float:
        """gamma of the grid that clipped sums are rounded to: the plan's, or, in mode ``local``, a power of
        two of which gamma sqrt(d) is at most LOCAL_ROUNDING_SHARE of C."""
        if self.mode != "local":
            return self.grid_step
        return power_of_two_at_most(self.clip * LOCAL_ROUNDING_SHARE / math.sqrt(self.dimension))

    @property
    def sensitivity(self) -> Sensitivity:
        """L2 sensitivity of a rounded clipped sum, in the vector's units (:mod:`privacy.dp.sensitivity`)."""
        return clipped_sum_sensitivity(
            clip=self.clip, grid_step=self.gradient_grid_step, dimension=self.dimension
        )

    @property
    def noise_shares(self) -> int:
        """How many sites' draws make up the noise of one clipped sum: t - c, or 1 in mode ``local``."""
        return self.honest_shares if self.mode == "distributed" else 1

    @property
    def noise_share_steps(self) -> float:
        """Standard deviation, in steps of ``gradient_grid_step``, of the integer noise that a site adds to
        each clipped sum: sigma C / sqrt(t - c) in mode ``distributed``, sigma C in ``local``, 0 in
        ``unprotected``.
        """
        if self.mode == "unprotected":
            return 0.0
        return self.noise_multiplier * self.clip / math.sqrt(self.noise_shares) / self.gradient_grid_step

    @property
    def sum_divisor(self) -> float:
        """The public constant that an aggregate of clipped sums is divided by (mode ``distributed``)."""
        return self.declared_patients * self.sampling_rate

    @property
    def local_divisor(self) -> float:
        """The public constant that one site's clipped sum is divided by (mode ``local``)."""
        return self.declared_patients * self.sampling_rate / self.n_sites

    def audit_share_steps(self, counts_sensitivity: float) -> float:
        """Standard deviation of the integer noise that a site adds to its audit counts.

        The share's variance is (sigma_audit * sensitivity)^2 / (t - c) + SMOOTHING_STEPS^2, and at least
        MIN_SHARE_STEPS^2: whatever the counts' sensitivity, the noise is worth sigma_audit at least, so that
        the event charged does not depend on it. 0 in mode ``unprotected``.

        Raises:
            InvalidPlanError: the sensitivity is not in (0, MAX_COUNTS_SENSITIVITY].
        """
        if not 0 < counts_sensitivity <= MAX_COUNTS_SENSITIVITY:
            raise InvalidPlanError(
                f"audit counts of L2 sensitivity {counts_sensitivity:g}: must be above 0 and at most "
                f"{MAX_COUNTS_SENSITIVITY:g}"
            )
        if self.mode == "unprotected":
            return 0.0
        variance = (self.audit_noise_multiplier * counts_sensitivity) ** 2 / self.honest_shares
        return max(math.sqrt(variance + SMOOTHING_STEPS**2), MIN_SHARE_STEPS)

    def training_event(self) -> PrivacyEvent:
        """What one training attempt spends: one step, or all local steps up front.

        Raises:
            InvalidPlanError: the noise is too coarse for any guarantee.
        """
        if self.mode == "unprotected":
            return PrivacyEvent.unprotected()
        share, shares = self.noise_share_steps, self.noise_shares
        if share < MIN_SHARE_STEPS:
            raise InvalidPlanError(
                f"a site's share of noise is {share:.3g} grid steps, at least {MIN_SHARE_STEPS:g} are needed",
                remedy="a smaller secure_aggregation.grid_step",
            )
        sensitivity_steps = self.sensitivity.l2 / self.gradient_grid_step
        per_coordinate = rounding_divergence(share) + sum_divergence(share, shares)
        return PrivacyEvent(
            kind="gaussian/v1",
            sampling_rate=self.sampling_rate,
            steps=self.local_steps,
            noise_multiplier_world=continuous_std(share * math.sqrt(shares)) / sensitivity_steps,
            noise_multiplier_colluding=continuous_std(share) / sensitivity_steps,
            max_divergence=self.local_steps * self.dimension * per_coordinate,
        )

    def audit_event(self) -> PrivacyEvent:
        """What one audit attempt spends. Audits read every member: sampling rate 1."""
        if self.mode == "unprotected":
            return PrivacyEvent.unprotected()
        per_coordinate = rounding_divergence(MIN_SHARE_STEPS) + sum_divergence(
            MIN_SHARE_STEPS, self.honest_shares
        )
        return PrivacyEvent(
            kind="gaussian/v1",
            sampling_rate=1.0,
            steps=1,
            noise_multiplier_world=self.audit_noise_multiplier,
            noise_multiplier_colluding=self.audit_noise_multiplier / math.sqrt(self.honest_shares),
            max_divergence=MAX_COUNTS_LENGTH * per_coordinate,
        )

    def planned_epsilon(self, *, view: View = "world") -> EpsilonReport:
        """Epsilon, at the plan's delta, when every training and audit attempt has been charged."""
        events = [self.training_event()] * self.max_attempts + [self.audit_event()] * self.max_audit_attempts
        return epsilon(events, self.delta, view=view)

    @property
    def wrap_probability(self) -> float:
        """Bound on the probability that an honest training attempt's total leaves the modulus' range.

        n sites' clamped vectors reach n clamp_steps at most, for certain; the rest of the range is for the
        sum of n shares of noise: Chernoff's bound (:func:`privacy.dp.closeness.tail_probability`) for each
        coordinate, times their number. In mode ``local`` noise is inside the clamp, and the bound is 0.
        """
        noise = self.noise_share_steps if self.mode == "distributed" else 0.0
        return self._wrap(self.clamp_steps, noise, self.dimension)

    @property
    def audit_wrap_probability(self) -> float:
        """The same for audit counts of any permitted sensitivity and length."""
        share = self.audit_share_steps(MAX_COUNTS_SENSITIVITY)
        return self._wrap(MAX_COUNT_WEIGHT * MAX_PATIENTS_PER_SITE, share, MAX_COUNTS_LENGTH)

    def _wrap(self, clamp: int, share: float, length: int) -> float:
        room = 2 ** (self.modulus_bits - 1) - 1 - self.n_sites * clamp
        return min(1.0, length * tail_probability(float(room), share * math.sqrt(self.n_sites)))


def power_of_two_at_most(value: float) -> float:
    """The largest power of two that is at most ``value``: dividing by it is exact."""
    return math.ldexp(1.0, math.frexp(value)[1] - 1)


def check_plan(plan: StudyPlan) -> ExecutionPlan:
    """Refuse a plan whose numbers do not carry the guarantee that it states.

    Returns:
        The checked execution plan.

    Raises:
        InvalidPlanError: names each reason: a range that can wrap, a share of noise below MIN_SHARE_STEPS
            grid steps, a sigma that does not reach ``privacy.epsilon`` over all training and audit attempts.
    """
    execution = ExecutionPlan.from_study_plan(plan)
    problems = []
    for name, probability in (
        ("training", execution.wrap_probability),
        ("audit", execution.audit_wrap_probability),
    ):
        if probability > MAX_WRAP_PROBABILITY:
            problems.append(
                f"secure_aggregation: the {name} sum of {execution.n_sites} sites can leave the range of "
                f"{execution.modulus_bits} bits (probability {probability:.2g} an attempt, at most 2^-40 is "
                "allowed): fewer clamp_steps, a larger grid_step, or modulus_bits = 64"
            )
    if execution.mode != "unprotected":
        try:
            planned = execution.planned_epsilon()
        except InvalidPlanError as error:
            problems.append(f"secure_aggregation.grid_step: {error}")
        else:
            if execution.epsilon is None or planned.reported > execution.epsilon:
                problems.append(
                    f"privacy: the noise multipliers give epsilon {planned.reported:.4g} at delta "
                    f"{execution.delta:g} over {execution.max_attempts} training and "
                    f"{execution.max_audit_attempts} audit attempts, the plan says {execution.epsilon}"
                )
    if problems:
        raise InvalidPlanError(
            f"study plan {plan.study_id!r} cannot keep its promise:\n  " + "\n  ".join(problems),
            remedy="let `lacuna coordinator plan new` propose noise and ranges",
        )
    return execution
