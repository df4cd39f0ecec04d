"""Exact and asymptotic bounds behind the audit's figures. numpy and scipy only, no torch.

What a test on n patients can show at all is part of every figure here: :func:`smallest_n_for_rate` says which
rates n patients can carry, and a figure that they cannot carry is not printed.

Sources:
    [1] Clopper and Pearson, Biometrika 26 (1934).
    [2] DeLong, DeLong and Clarke-Pearson, Biometrics 44 (1988); Hanley and McNeil, Radiology 143 (1982).
    [3] Newcombe, Statistics in Medicine 25 (2006), method 5: a score-type interval for the AUC.
    [4] Dong, Roth and Su, Gaussian Differential Privacy, JRSS-B 84 (2022), corollary 2.13.
    [5] Kairouz, Oh and Viswanath, The Composition Theorem for Differential Privacy, ICML 2015, theorem 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from privacy.dp.accounting import gaussian_mu
from shared.errors import UsageError

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided confidence interval; ``error`` is the probability of each end to be on the wrong side."""

    estimate: float
    low: float
    high: float
    error: float


def clopper_pearson(successes: int, trials: int, *, error: float) -> Interval:
    """Exact interval for a binomial proportion [1]; each end errs with probability at most ``error``.

    Raises:
        UsageError: not 0 <= successes <= trials, no trials, or an error outside (0, 0.5).
    """
    if not 0 <= successes <= trials or trials < 1:
        raise UsageError(f"{successes} successes in {trials} trials are no proportion")
    _check_error(error)
    low = 0.0 if successes == 0 else float(stats.beta.ppf(error, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(stats.beta.isf(error, successes + 1, trials - successes))
    return Interval(estimate=successes / trials, low=low, high=high, error=error)


def smallest_n_for_rate(rate: float, *, error: float = 0.05) -> int:
    """How many patients it takes before zero events among them bound a rate by ``rate``.

    2,995 non-members for a false positive rate of 0.1% at error 0.05.
    """
    if not 0 < rate < 1:
        raise UsageError(f"a rate lies between 0 and 1, not {rate}")
    _check_error(error)
    return math.ceil(math.log(error) / math.log1p(-rate))


def gaussian_auc_ceiling(epsilon: float | None, delta: float) -> float:
    """Largest AUC of any membership attack on a Gaussian mechanism with (epsilon, delta).

    The trade-off curve of mu-GDP is the ROC of N(0, 1) against N(mu, 1), whose area is Phi(mu / sqrt 2).
    With epsilon None (infinite) there is no ceiling: 1.
    """
    if epsilon is None:
        return 1.0
    if epsilon <= 0 or not 0 < delta < 1:
        raise UsageError(f"epsilon {epsilon} and delta {delta}: epsilon > 0 and 0 < delta < 1 are needed")
    return float(stats.norm.cdf(gaussian_mu(epsilon, delta) / math.sqrt(2.0)))


def gaussian_trade_off(mu: float, false_positive_rate: ArrayLike) -> FloatArray:
    """Largest true positive rate that a mu-GDP mechanism permits at each false positive rate [4]."""
    rates = np.asarray(false_positive_rate, dtype=np.float64)
    return np.asarray(stats.norm.cdf(stats.norm.ppf(rates) + mu), dtype=np.float64)


def epsilon_lower_bound(
    true_positives: int, n_members: int, false_positives: int, n_held_out: int, *, delta: float, error: float
) -> float:
    """epsilon that an attack's counts at one threshold, fixed in advance, prove: at least 0.

    From TPR <= e^eps FPR + delta and its mirror image [5], with exact bounds on both rates; the total error
    is ``error``, half for each rate. A perfect attack on n against n proves 2.6 / 3.3 / 4.0 / 4.9 at
    n = 50 / 100 / 200 / 500 (error 0.05), and no more.
    """
    tpr = clopper_pearson(true_positives, n_members, error=error / 2)
    fpr = clopper_pearson(false_positives, n_held_out, error=error / 2)
    candidates = [0.0]
    for numerator, denominator in ((tpr.low - delta, fpr.high), (1.0 - fpr.high - delta, 1.0 - tpr.low)):
        if numerator > 0 and denominator > 0:
            candidates.append(math.log(numerator / denominator))
    return max(candidates)


def mu_lower_bound(
    true_positives: int, n_members: int, false_positives: int, n_held_out: int, *, error: float
) -> float:
    """mu of a Gaussian mechanism that the same counts prove: at least 0.

    TPR <= Phi(Phi^-1(FPR) + mu) [4], with exact bounds on both rates, half of ``error`` for each (Nasr et
    al., USENIX Security 2023, section 4). It is its own mirror image. ``gaussian_epsilon`` makes an epsilon
    of it, larger than that of :func:`epsilon_lower_bound`, and true of Gaussian mechanisms only.
    """
    tpr = clopper_pearson(true_positives, n_members, error=error / 2)
    fpr = clopper_pearson(false_positives, n_held_out, error=error / 2)
    if tpr.low <= fpr.high:
        return 0.0
    return float(stats.norm.ppf(tpr.low) - stats.norm.ppf(fpr.high))


def auc(members: ArrayLike, held_out: ArrayLike) -> float:
    """P(member's score > held-out score) + half the ties: the Mann-Whitney estimate.

    Raises:
        UsageError: one of the groups is empty.
    """
    return float(placements(members, held_out)[0].mean())


def placements(members: ArrayLike, held_out: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """For each member the share of held-out patients below it, for each held-out of members above it [2]."""
    m, h = np.asarray(members, dtype=np.float64), np.asarray(held_out, dtype=np.float64)
    if m.size == 0 or h.size == 0:
        raise UsageError("an AUC needs at least one member and one held-out patient")
    order_h, order_m = np.sort(h), np.sort(m)
    below = np.searchsorted(order_h, m, "left") + np.searchsorted(order_h, m, "right")
    above = 2 * m.size - np.searchsorted(order_m, h, "left") - np.searchsorted(order_m, h, "right")
    return below / (2.0 * h.size), above / (2.0 * m.size)


def auc_interval(members: ArrayLike, held_out: ArrayLike, *, error: float) -> Interval:
    """AUC with a patient-level interval; each end errs with probability about ``error``.

    Score-type (the variance belongs to the hypothesis, so that AUC 1 still has an interval) [3]; the variance
    is the larger of that model's and DeLong's [2].
    """
    _check_error(error)
    of_members, of_held_out = placements(members, held_out)
    n_m, n_h = of_members.size, of_held_out.size
    estimate = float(of_members.mean())
    delong = 0.0
    if n_m > 1 and n_h > 1:
        delong = float(of_members.var(ddof=1) / n_m + of_held_out.var(ddof=1) / n_h)
    low, high = invert_score_test(
        estimate, lambda a: max(auc_variance(a, n_m, n_h), delong), z=float(stats.norm.isf(error))
    )
    return Interval(estimate=estimate, low=low, high=high, error=error)


def mann_whitney_p_value(value: float, n_members: int, n_held_out: int) -> float:
    """Exact one-sided p-value of an AUC of at least ``value`` when the two groups do not differ.

    For small groups (at most 64 each); ties count against significance.

    Raises:
        UsageError: a group is empty or larger than 64, or the value is no AUC.
    """
    if not (1 <= n_members <= 64 and 1 <= n_held_out <= 64 and 0.0 <= value <= 1.0):
        raise UsageError(f"no exact test for AUC {value} with {n_members} and {n_held_out} in the groups")
    largest = n_members * n_held_out
    # Coefficients of the Gaussian binomial: arrangements by the number of (member above held-out) pairs.
    numerator = np.zeros(largest + 1, dtype=object)
    numerator[0] = 1
    for i in range(1, n_members + 1):
        step = n_held_out + i
        if step <= largest:
            numerator[step:] = numerator[step:] - numerator[: largest + 1 - step].copy()
        for j in range(i, largest + 1):
            numerator[j] += numerator[j - i]
    threshold = math.floor(value * largest + 1e-9)
    return float(sum(numerator[threshold:]) / math.comb(n_members + n_held_out, n_members))


def auc_variance(value: float, n_members: float, n_held_out: float) -> float:
    """Sampling variance of the AUC if its true value were ``value``: Newcombe's method 5 [3]."""
    a = min(max(value, 0.0), 1.0)
    extra = (n_members + n_held_out) / 2.0 - 1.0
    spread = 1.0 + extra * (1.0 - a) / (2.0 - a) + extra * a / (1.0 + a)
    return a * (1.0 - a) * spread / (n_members * n_held_out)


def invert_score_test(
    estimate: float, variance: Callable[[float], float], *, z: float
) -> tuple[float, float]:
    """The values in [0, 1] that a two-sided test with |estimate - value| <= z sqrt(variance(value)) keeps."""

    def end(sign: float, far: float) -> float:
        near = min(max(estimate, 0.0), 1.0)

        def rejected(value: float) -> bool:
            return sign * (estimate - value) > z * math.sqrt(variance(value))

        if not rejected(far):
            return far
        if rejected(near):  # an estimate outside [0, 1], which noise can give
            return near
        outside, inside = far, near
        for _ in range(40):
            middle = (outside + inside) / 2.0
            outside, inside = (middle, inside) if rejected(middle) else (outside, middle)
        return inside

    return end(1.0, 0.0), end(-1.0, 1.0)


def _check_error(error: float) -> None:
    if not 0 < error < 0.5:
        raise UsageError(f"a confidence error lies between 0 and 0.5, not {error}")
