"""Two-sided tests of a mechanism, with p-values that are bounds and one level split over all of them.

Each function here returns a number p such that, if the mechanism is what it claims, P[p <= a] <= a for every
a in (0, 1): the false-failure probability of a whole audit is at most the sum of the levels (Bonferroni).
Integer noise is treated as Gaussian where it is one up to a factor of 1 + 1e-30 in every probability
(:mod:`privacy.dp.closeness`: shares have at least 4 steps).

This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scipy.stats import binom, chi2, norm

FloatArray = NDArray[np.float64]

FALSE_FAILURE_PROBABILITY = 1e-6
"""Bound on the probability that a true mechanism fails one audit, whatever the number of its tests."""


@dataclass(frozen=True, kw_only=True)
class TestFamily:
    """Tests of one claim, before the level is split.

    Attributes:
        name: Stable identifier.
        title: The claim, for a person.
        p_values: One for each test; exact conditions give 1 or 0 and spend no significance.
        figure: What was measured.
        expected: What the mechanism claims.
        exact: The condition holds or does not; chance plays no part.
    """

    __test__ = False

    name: str
    title: str
    p_values: tuple[float, ...]
    figure: str
    expected: str
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Check:
    """One claim with its verdict. ``level`` is that of each of its ``tests``, 0 for exact conditions."""

    name: str
    title: str
    tests: int
    smallest_p: float
    level: float
    figure: str
    expected: str
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def judge(families: list[TestFamily], *, total: float = FALSE_FAILURE_PROBABILITY) -> tuple[Check, ...]:
    """Split ``total`` evenly over the families that need significance, then over each one's tests.

    A family without a test has not been looked at, and fails.
    """
    sharing = sum(not family.exact for family in families)
    checks = []
    for family in families:
        tests = len(family.p_values)
        level = 0.0 if family.exact or not tests else total / sharing / tests
        smallest = min(family.p_values, default=0.0)
        checks.append(
            Check(
                name=family.name, title=family.title, tests=tests, smallest_p=smallest, level=level,
                figure=family.figure, expected=family.expected, passed=smallest > level,
            )
        )  # fmt: skip
    return tuple(checks)


def variance_p(values: NDArray[Any], std: float, *, shift: float = 0.0) -> float:
    """Independent N(0, std^2) plus an unknown vector of L2 norm at most ``shift``, against their variance.

    Chi-square on either side, each widened by the triangle inequality. For integer noise of few grid steps
    only with many values: a handful may well all be 0.
    """
    length = float(np.linalg.norm(values.astype(np.float64))) / std
    high = chi2.sf(max(length - shift / std, 0.0) ** 2, values.size)
    low = chi2.cdf((length + shift / std) ** 2, values.size)
    return float(min(1.0, 2.0 * min(high, low)))


def sub_gaussian_p(value: float, std: float) -> float:
    """|value| of a sub-Gaussian variable with mean 0 and parameter ``std``: 2 exp(-z^2 / 2)."""
    return min(1.0, 2.0 * math.exp(-0.5 * (value / std) ** 2))


def correlation_p(
    first: NDArray[Any], second: NDArray[Any], std: float, *, lags: bool, shift: float = 0.0
) -> float:
    """Independent noise vectors against one another: at lag 0, or at every lag.

    Given ``first``, each inner product with ``second`` (independent, N(0, std^2) or 0 in each coordinate) is
    sub-Gaussian with parameter std times the norm of ``first``. At all lags the largest counts, with a union
    bound over them: the same stream of noise shows also where it was taken up at another place. ``second``
    may hold an unknown vector of norm at most ``shift`` besides its noise.
    """
    x, y = first.astype(np.float64), second.astype(np.float64)
    scale = std * float(np.linalg.norm(x))
    if scale == 0:
        return 1.0
    allowed = shift * scale / std
    if not lags:
        return sub_gaussian_p(max(abs(float(x @ y)) - allowed, 0.0), scale)
    size = 2 * len(x)
    products = np.fft.irfft(np.conj(np.fft.rfft(x, size)) * np.fft.rfft(y, size), size)
    return min(1.0, size * sub_gaussian_p(max(float(np.abs(products).max()) - allowed, 0.0), scale))


def curve_p(values: NDArray[Any], cdf: Callable[[FloatArray], FloatArray], *, shift: float = 0.0) -> float:
    """Largest distance of the empirical distribution from ``cdf``: Dvoretzky-Kiefer-Wolfowitz, Massart 1990.

    Args:
        values: Independent draws, each off by an unknown amount of at most ``shift``.
        cdf: Distribution function that each has under the claim; may have jumps.
        shift: See above.
    """
    ordered = np.sort(values.astype(np.float64))
    n = len(ordered)
    if n == 0:
        return 1.0
    above = np.arange(1, n + 1) / n - cdf(ordered + shift)
    below = cdf(ordered - shift) - np.arange(n) / n
    distance = max(float(above.max()), float(below.max()), 0.0)
    return min(1.0, 2.0 * math.exp(-2.0 * n * distance**2))


def gaussian_cdf(std: float) -> Callable[[FloatArray], FloatArray]:
    """N(0, std^2)."""
    return lambda x: np.asarray(norm.cdf(x / std), dtype=np.float64)


def mixture_cdf(
    outcomes: FloatArray, probabilities: FloatArray, std: float
) -> Callable[[FloatArray], FloatArray]:
    """An outcome drawn with its probability, plus N(0, std^2)."""
    return lambda x: np.asarray(
        norm.cdf((x[:, None] - outcomes[None, :]) / std) @ probabilities, dtype=np.float64
    )


def sum_p(
    total: float,
    n: int,
    outcomes: FloatArray,
    probabilities: FloatArray,
    *,
    std: float,
    shift: float = 0.0,
) -> float:
    """A sum of ``n`` independent outcomes plus N(0, std^2), up to ``shift``: Chernoff on either side."""
    mean = n * float(outcomes @ probabilities)
    distance = max(abs(total - mean) - shift, 0.0)
    if distance == 0:
        return 1.0
    centred = (outcomes - float(outcomes @ probabilities)) * math.copysign(1.0, total - mean)
    spread = math.sqrt(n * float(centred**2 @ probabilities) + std**2)
    if spread == 0:
        return 0.0
    logs = np.log(np.maximum(probabilities, 1e-300))

    def exponent(scaled: float) -> float:
        rate = scaled / spread
        moment = n * float(logsumexp(rate * centred + logs)) + 0.5 * (rate * std) ** 2
        return moment - rate * distance

    best = minimize_scalar(exponent, bounds=(0.0, 2.0 * distance / spread), method="bounded")
    return min(1.0, 2.0 * math.exp(min(float(best.fun), 0.0)))


def count_p(count: int, n: int, rate: float) -> float:
    """A binomial count, two-sided, exact."""
    return float(min(1.0, 2.0 * min(binom.cdf(count, n, rate), binom.sf(count - 1, n, rate))))


def dispersion_p(
    counts: NDArray[np.int64], sizes: NDArray[np.int64], rate: float, uniforms: FloatArray
) -> float:
    """Are binomial counts spread as binomial counts are?

    Each count becomes a standard normal by its randomised distribution function, exactly; the sum of their
    squares is chi-square. Batches of a fixed size give far too small a sum.

    Args:
        counts: Observed, [n].
        sizes: Trials of each, [n].
        rate: Probability of each trial.
        uniforms: [n] independent of the counts, uniform in [0, 1).
    """
    below = binom.cdf(counts - 1, sizes, rate)
    at = binom.pmf(counts, sizes, rate)
    levels = np.clip(below + uniforms * at, 1e-300, 1.0 - 1e-16)
    return variance_p(norm.ppf(levels), 1.0)
