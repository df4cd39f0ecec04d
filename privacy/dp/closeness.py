"""How close integer noise is to the Gaussian noise that the accountants know.

Notation: N_Z(0, s^2) is the discrete Gaussian, P[x] proportional to exp(-x^2 / (2 s^2)) on the integers. Two
distributions are tau-close when each event's probabilities differ by a factor of at most exp(tau), both ways
(max divergence). Adaptive composition adds the taus up.

1. **A sum of shares is one discrete Gaussian.** Kairouz, Liu, Steinke (ICML 2021), Theorem 12: the sum of m
   independent N_Z(0, s^2) is tau-close to N_Z(0, m s^2) with
   tau = 10 sum_{k=1}^{m-1} exp(-2 pi^2 s^2 k / (k + 1)) per coordinate.

2. **One discrete Gaussian is a rounded continuous one.** Let Y ~ N(0, s^2 - r^2), and X the integer x drawn
   with probability proportional to exp(-(x - Y)^2 / (2 r^2)). The two Gaussians convolve exactly, and the sum
   that normalises the second, taken over Z - Y, is r sqrt(2 pi) (1 +- e_r), e_r = 2 sum_j exp(-2 pi^2 r^2
   j^2) (Poisson summation). So P[X = x] = phi_s(x) / (1 +- e_r), and N_Z(0, s^2) at x is phi_s(x) / (1 +-
   e_s): they are (2 e_r + 2 e_s)-close. (Peikert, CRYPTO 2010, Theorem 3.1; Micciancio and Walter, CRYPTO
   2017.) Rounding commutes with integer shifts: the mechanism "integer vector plus N_Z(0, s^2)" is
   tau-close to a post-processing of "integer vector plus N(0, s^2 - r^2)".

So an integer mechanism is (epsilon + 2 tau, exp(tau) delta)-DP wherever the continuous Gaussian of variance
s^2 - r^2 is (epsilon, delta)-DP, in any dimension d with tau = d (tau_sum + tau_rounding), also under Poisson
sampling (a mixture of shifts). We take r = 2: tau_rounding is below 3e-34 per coordinate, and where noise has
thousands of steps the four steps^2 of variance given away are nothing.
"""

from __future__ import annotations

import math

from shared.errors import UsageError

SMOOTHING_STEPS = 2.0
"""r above, in grid steps: the part of the noise that only pays for being integer."""

MIN_SHARE_STEPS = 4.0
"""Smallest standard deviation of one site's share of noise, in grid steps (DESIGN section 5)."""


def _aliasing(std_steps: float) -> float:
    """Bound on 2 sum_{j>=1} exp(-2 pi^2 s^2 j^2): the geometric series of its first term."""
    first = math.exp(-2.0 * math.pi**2 * std_steps**2)
    return 2.0 * first / (1.0 - first)


def rounding_divergence(std_steps: float) -> float:
    """tau per coordinate between N_Z(0, s^2) and the rounded N(0, s^2 - SMOOTHING_STEPS^2).

    Raises:
        UsageError: ``std_steps`` (s, in grid steps) is not above SMOOTHING_STEPS.
    """
    if not std_steps > SMOOTHING_STEPS:
        raise UsageError(f"noise of {std_steps:g} grid steps is too coarse to be compared with a Gaussian")
    return 2.0 * _aliasing(SMOOTHING_STEPS) + 2.0 * _aliasing(std_steps)


def sum_divergence(share_steps: float, n_shares: int) -> float:
    """tau per coordinate between a sum of ``n_shares`` discrete Gaussians and one (Kairouz et al., Thm 12).

    Args:
        share_steps: Standard deviation of each share, in grid steps.
        n_shares: Number of independent shares, at least 1.
    """
    exponent = 2.0 * math.pi**2 * share_steps**2
    return 10.0 * math.fsum(math.exp(-exponent * k / (k + 1)) for k in range(1, n_shares))


def continuous_std(std_steps: float) -> float:
    """Standard deviation, in grid steps, of the continuous Gaussian that N_Z(0, std_steps^2) is as good as.

    Zero where the noise is too coarse for the comparison: no guarantee at all.
    """
    return math.sqrt(max(std_steps**2 - SMOOTHING_STEPS**2, 0.0))


def tail_probability(bound_steps: float, std_steps: float) -> float:
    """Bound on P[|X| >= bound] for a sum of discrete Gaussians of total standard deviation ``std_steps``.

    Discrete Gaussians are sub-Gaussian with their own parameter (Canonne, Kamath, Steinke 2020, Corollary 17
    and its moment generating function), so sums of independent ones are too, and Chernoff's bound applies.
    """
    if bound_steps <= 0:
        return 1.0
    if std_steps == 0:
        return 0.0
    return min(1.0, 2.0 * math.exp(-0.5 * (bound_steps / std_steps) ** 2))
