"""Each p-value is a bound: under the null at most a share a is below a; and a real difference makes it small.

The null is simulated 1,500 times, seeded; the share below 0.1 may pass 0.1 by 5 binomial deviations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from privacy.audit.canaries import canary_law
from privacy.audit.mechanism_statistics import (
    TestFamily,
    correlation_p,
    count_p,
    curve_p,
    dispersion_p,
    gaussian_cdf,
    judge,
    mixture_cdf,
    sub_gaussian_p,
    sum_p,
    variance_p,
)

RUNS = 1500
OUTCOMES, CHANCES = np.array([0.0, 1.0, 3.0]), np.array([0.5, 0.3, 0.2])
Rng = np.random.Generator


def mixture(rng: Rng, n: int) -> np.ndarray:
    return rng.choice(OUTCOMES, n, p=CHANCES) + 0.7 * rng.standard_normal(n)


def shifted(rng: Rng, length: float, n: int) -> np.ndarray:
    return 2.0 * rng.standard_normal(n) + length / math.sqrt(n)


NULLS: dict[str, Callable[[Rng], float]] = {
    "variance": lambda r: variance_p(2.0 * r.standard_normal(50), 2.0),
    "variance, shifted": lambda r: variance_p(shifted(r, 6.0, 50), 2.0, shift=6.0),
    "sub-gaussian": lambda r: sub_gaussian_p(3.0 * r.standard_normal(), 3.0),
    "correlation": lambda r: correlation_p(
        r.standard_normal(40), 2.0 * r.standard_normal(40), 2.0, lags=False
    ),
    "correlation, lags": lambda r: correlation_p(
        r.standard_normal(40), 2.0 * r.standard_normal(40), 2.0, lags=True
    ),
    "curve": lambda r: curve_p(mixture(r, 60), mixture_cdf(OUTCOMES, CHANCES, 0.7)),
    "curve, rounded": lambda r: curve_p(
        np.rint(4.0 * r.standard_normal(60)), gaussian_cdf(4.0), shift=0.5
    ),
    "sum": lambda r: sum_p(
        float(mixture(r, 30).sum()), 30, OUTCOMES, CHANCES, std=0.7 * math.sqrt(30)
    ),
    "sum, shifted": lambda r: sum_p(
        float(mixture(r, 30).sum()) + 4.0, 30, OUTCOMES, CHANCES, std=0.7 * math.sqrt(30), shift=4.0
    ),
    "count": lambda r: count_p(int(r.binomial(40, 0.3)), 40, 0.3),
    "dispersion": lambda r: dispersion_p(
        r.binomial(40, 0.3, 12), np.full(12, 40), 0.3, r.uniform(size=12)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(NULLS))
def test_p_values_are_bounds(name: str) -> None:
    rng = np.random.default_rng(5)
    found = np.array([NULLS[name](rng) for _ in range(RUNS)])
    for level in (0.1, 0.01):
        assert (found <= level).mean() <= level + 5 * math.sqrt(level * (1 - level) / RUNS)


WRONG: dict[str, Callable[[Rng], float]] = {
    "variance, too small": lambda r: variance_p(1.6 * r.standard_normal(500), 2.0),
    "variance, too large": lambda r: variance_p(2.5 * r.standard_normal(2000), 2.0),
    "variance, with a shift": lambda r: variance_p(0.5 * r.standard_normal(500), 2.0, shift=6.0),
    "correlation": lambda r: (lambda x: correlation_p(x, x, 1.0, lags=False))(r.standard_normal(200)),
    "correlation at lag 30": lambda r: (
        lambda x: correlation_p(x[:300], x[30:330], 1.0, lags=True)
    )(r.standard_normal(400)),
    "curve": lambda r: curve_p(mixture(r, 800) + 0.5, mixture_cdf(OUTCOMES, CHANCES, 0.7)),
    "sum, too large": lambda r: sum_p(
        float(mixture(r, 300).sum()) * 2.0, 300, OUTCOMES, CHANCES, std=0.7 * math.sqrt(300)
    ),
    "sum, too small": lambda r: sum_p(
        float(mixture(r, 300).sum()) * 0.5, 300, OUTCOMES, CHANCES, std=0.7 * math.sqrt(300)
    ),
    "sum without chance": lambda _: sum_p(31.0, 30, np.array([1.0]), np.array([1.0]), std=0.0),
    "count": lambda _: count_p(200, 400, 0.3),
    "dispersion, none": lambda r: dispersion_p(np.full(40, 12), np.full(40, 40), 0.3, r.uniform(size=40)),
    "dispersion, too large": lambda r: dispersion_p(
        3 * r.binomial(13, 0.3, 60), np.full(60, 40), 0.3, r.uniform(size=60)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_differences_are_seen(name: str) -> None:
    assert WRONG[name](np.random.default_rng(7)) < 1e-8


def test_the_level_is_split_over_families_and_their_tests() -> None:
    one = TestFamily(name="a", title="", p_values=(0.3, 2e-7), figure="", expected="")
    many = TestFamily(name="b", title="", p_values=(1e-9,) * 10_000, figure="", expected="")
    exact = TestFamily(name="c", title="", p_values=(1.0,), figure="", expected="", exact=True)
    broken = TestFamily(name="d", title="", p_values=(1.0, 0.0), figure="", expected="", exact=True)
    unseen = TestFamily(name="e", title="", p_values=(), figure="", expected="", exact=True)
    checks = {check.name: check for check in judge([one, many, exact, broken, unseen], total=1e-6)}
    assert checks["a"].level == pytest.approx(2.5e-7) and not checks["a"].passed
    assert checks["b"].level == pytest.approx(5e-11) and checks["b"].passed
    assert checks["c"].passed and checks["c"].level == 0
    assert not checks["d"].passed and not checks["e"].passed
    assert sum(check.tests * check.level for check in checks.values()) == pytest.approx(1e-6)


def test_a_canarys_law_follows_from_clip_and_draws() -> None:
    """Four draws, C = 2: halves on each scan give C whole; all on one give C / sqrt(2) along the diagonal."""
    law = canary_law("clipped", clip=2.0, draws=4)
    assert law.signal[2] == pytest.approx(2.0) and law.signal[0] == pytest.approx(math.sqrt(2.0))
    assert law.balance[4] == pytest.approx(math.sqrt(2.0)) and law.balance[2] == 0
    np.testing.assert_allclose(law.probabilities, np.array([1, 4, 6, 4, 1]) / 16)
    small = canary_law("unclipped", clip=2.0, draws=4)
    np.testing.assert_allclose(small.signal, 0.5 / math.sqrt(2.0))
