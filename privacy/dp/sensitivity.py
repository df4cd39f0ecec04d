"""Sensitivity of what really happens: clip, add up in floating point, round to a grid.

Neighbours differ by one patient of one site, so one site's integer vector changes. Before rounding, the two
exact sums differ by one clipped gradient; computed in binary64 (u = 2^-53):

- **clip**: the norm of d float32 or float64 entries and the scaled vector carry relative error gamma_{d+8},
  gamma_n = n u / (1 - n u) (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1), so a
  clipped gradient has norm at most C (1 + eta), eta = gamma_{d+8};
- **sum**: a sum of N terms, in any order, with or without fused multiply-add, errs by at most gamma_{N+2}
  times the sum of the terms' absolute values (Higham, section 4.2; two more for the scaling and the
  division by the grid step), so by at most gamma_{N+2} N C (1 + eta) in L2. Each of the two neighbours
  errs, hence twice that;
- **rounding**: to the nearest integer, |round(a) - round(b)| <= |a - b| + 1 in each coordinate (half a step
  of error on either side, and the two may point away from each other), hence gamma sqrt(d) in L2. This is
  tight: a patient who moves every coordinate by next to nothing across the middle between two integers
  moves each by 1;
- **clamp**: 1-Lipschitz in each coordinate, adds nothing.

Not in this bound: how one patient's float32 gradient depends on the patients beside it in a batch. The
trainer removes that dependence (fixed microbatch shapes, see :mod:`privacy.dp.patient_gradients`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from shared.errors import UsageError

UNIT_ROUNDOFF = 2.0**-53
"""u of binary64 with rounding to nearest."""

MAX_PATIENTS_PER_SITE = 2**17
"""The bound on floating-point summation holds up to this many patients at one site."""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """L2 sensitivity of a site's vector to one patient, and what it is made of. All in the vector's units."""

    clip: float
    clip_error: float
    summation: float
    rounding: float

    @property
    def l2(self) -> float:
        """C (1 + eta) + twice the summation error + gamma sqrt(d)."""
        return self.clip + self.clip_error + self.summation + self.rounding


def relative_error(n_operations: int) -> float:
    """Higham's gamma_n for binary64. Raises UsageError where n u is not small."""
    product = n_operations * UNIT_ROUNDOFF
    if product >= 0.01:
        raise UsageError(f"no floating-point bound for {n_operations} operations")
    return product / (1.0 - product)


def clipped_sum_sensitivity(
    *, clip: float, grid_step: float, dimension: int, max_patients: int = MAX_PATIENTS_PER_SITE
) -> Sensitivity:
    """Sensitivity of round(sum of clipped gradients / grid_step), times grid_step.

    Args:
        clip: C, the clip norm.
        grid_step: gamma, in the units of the vector.
        dimension: d, the length of the vector.
        max_patients: N, public bound on the patients of one site.
    """
    eta = relative_error(dimension + 8)
    per_sum = relative_error(max_patients + 2) * max_patients * clip * (1.0 + eta)
    return Sensitivity(
        clip=clip,
        clip_error=clip * eta,
        summation=2.0 * per_sum,
        rounding=grid_step * math.sqrt(dimension),
    )
