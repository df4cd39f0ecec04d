"""Bounds against published figures, closed forms and other implementations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from privacy.audit.bounds import (
    auc,
    auc_interval,
    clopper_pearson,
    epsilon_lower_bound,
    gaussian_auc_ceiling,
    gaussian_trade_off,
    mann_whitney_p_value,
    smallest_n_for_rate,
)
from privacy.dp.accounting import gaussian_delta, gaussian_mu
from shared.errors import UsageError


@pytest.mark.parametrize(
    ("epsilon", "ceiling"), [(1.0, 0.575), (2.0, 0.639), (3.0, 0.694), (4.0, 0.743), (8.0, 0.881)]
)
def test_ceiling_of_a_gaussian_mechanism(epsilon: float, ceiling: float) -> None:
    assert gaussian_auc_ceiling(epsilon, 1e-5) == pytest.approx(ceiling, abs=0.0006)


def test_without_a_budget_there_is_no_ceiling() -> None:
    assert gaussian_auc_ceiling(None, 1e-5) == 1.0


def test_mu_inverts_delta_and_agrees_with_the_textbook_formula() -> None:
    mu = gaussian_mu(8.0, 1e-5)
    assert mu == pytest.approx(1.666, abs=1e-3)
    assert gaussian_delta(8.0, mu) == pytest.approx(1e-5, rel=1e-6)
    direct = stats.norm.cdf(-8 / mu + mu / 2) - np.exp(8) * stats.norm.cdf(-8 / mu - mu / 2)
    assert gaussian_delta(8.0, mu) == pytest.approx(direct, rel=1e-6)
    assert gaussian_delta(8.0, 0.05) >= 0.0


def test_trade_off_curve_has_the_ceiling_as_its_area() -> None:
    rates = np.linspace(1e-6, 1 - 1e-6, 200_001)
    area = np.trapezoid(gaussian_trade_off(gaussian_mu(2.0, 1e-5), rates), rates)
    assert area == pytest.approx(gaussian_auc_ceiling(2.0, 1e-5), abs=1e-4)


@pytest.mark.parametrize(("n", "proved"), [(50, 2.6), (100, 3.3), (200, 4.0), (500, 4.9)])
def test_what_a_perfect_attack_can_prove(n: int, proved: float) -> None:
    assert epsilon_lower_bound(n, n, 0, n, delta=0.0, error=0.05) == pytest.approx(proved, abs=0.05)


def test_an_inverted_attack_proves_nothing_and_a_blind_one_neither() -> None:
    assert epsilon_lower_bound(0, 100, 100, 100, delta=1e-5, error=0.05) == 0.0
    assert epsilon_lower_bound(50, 100, 50, 100, delta=1e-5, error=0.05) == 0.0


def test_a_false_positive_rate_of_a_thousandth_needs_2995_non_members() -> None:
    assert smallest_n_for_rate(0.001) == 2995


def test_clopper_pearson_against_scipy() -> None:
    for successes, trials in ((0, 10), (3, 17), (10, 10), (200, 1000)):
        ours = clopper_pearson(successes, trials, error=0.025)
        theirs = stats.binomtest(successes, trials).proportion_ci(0.95, "exact")
        assert (ours.low, ours.high) == (pytest.approx(theirs.low), pytest.approx(theirs.high))
    with pytest.raises(UsageError):
        clopper_pearson(3, 2, error=0.05)


def test_auc_counts_ties_as_halves_and_has_the_right_sign() -> None:
    assert auc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert auc([0.0, 1.0], [2.0, 3.0]) == 0.0
    assert auc([1.0, 1.0], [1.0]) == 0.5
    with pytest.raises(UsageError):
        auc([], [1.0])


def test_perfect_separation_still_has_an_interval() -> None:
    interval = auc_interval(np.arange(20.0) + 100, np.arange(10.0), error=0.025)
    assert interval.estimate == interval.high == 1.0
    assert 0.6 < interval.low < 0.95


@pytest.mark.parametrize(("shift", "n_members", "n_held_out"), [(0.0, 40, 20), (1.0, 40, 20), (1.8, 27, 13)])
def test_raw_interval_covers(shift: float, n_members: int, n_held_out: int) -> None:
    """Each end errs at nominal 2.5%; over 2,000 runs more than 4.4% would fail: at a true rate of 2.5% with
    probability below 1e-6 (binomial tail)."""
    rng = np.random.default_rng(20)
    truth = stats.norm.cdf(shift / np.sqrt(2))
    misses = np.zeros(2)
    for _ in range(2000):
        i = auc_interval(rng.normal(shift, 1, n_members), rng.normal(0, 1, n_held_out), error=0.025)
        misses += (i.low > truth, i.high < truth)
    assert stats.binom.sf(2000 * 0.044, 2000, 0.025) < 1e-6
    assert (misses / 2000 <= 0.044).all()


def test_exact_mann_whitney_against_scipy() -> None:
    rng = np.random.default_rng(3)
    for n, m in ((8, 8), (5, 9), (3, 2), (1, 6)):
        members, held_out = rng.normal(0.7, 1, n), rng.normal(0, 1, m)
        theirs = stats.mannwhitneyu(members, held_out, alternative="greater", method="exact").pvalue
        assert mann_whitney_p_value(auc(members, held_out), n, m) == pytest.approx(theirs)
    assert mann_whitney_p_value(1.0, 8, 8) == pytest.approx(1 / 12870)
