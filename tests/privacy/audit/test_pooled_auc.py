"""Estimate, coverage and power of the pooled AUC under the noise that really is added."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from privacy.audit.bounds import auc
from privacy.audit.pooled_auc import (
    NoisedHistograms,
    lies_above,
    noised_histograms,
    planned_power,
    pooled_auc_interval,
    pooled_power,
)
from shared.errors import UsageError

EDGES = np.linspace(-1.0, 3.0, 7)
ERROR = 0.0125
CELL = 2.0 * 1.5
"""Noise of a held-out cell in patients: multiplier 2, 3 survivors, t - c = 2 (members: sqrt 2 of it)."""


def _draw(
    rng: np.random.Generator, shift: float, n_members: int, n_held_out: int, cell: float
) -> tuple[NoisedHistograms, float]:
    p = np.diff(stats.norm.cdf(EDGES - shift), prepend=0.0, append=1.0)
    q = np.diff(stats.norm.cdf(EDGES), prepend=0.0, append=1.0)
    histograms = noised_histograms(
        rng.multinomial(n_members, p) + np.rint(rng.normal(0, cell * np.sqrt(2) * 16, p.size)) / 16,
        rng.multinomial(n_held_out, q) + np.rint(rng.normal(0, cell * 16, q.size)) / 16,
        members_std=cell * np.sqrt(2),
        held_out_std=cell,
    )
    return histograms, float(p @ np.cumsum(q) - 0.5 * p @ q)


def test_without_noise_the_estimate_is_the_auc_of_the_binned_scores() -> None:
    rng = np.random.default_rng(1)
    members, held_out = rng.normal(1, 1, 50), rng.normal(0, 1, 25)
    m_bin, h_bin = np.digitize(members, EDGES), np.digitize(held_out, EDGES)
    histograms = noised_histograms(
        np.bincount(m_bin, minlength=8), np.bincount(h_bin, minlength=8), members_std=0, held_out_std=0
    )
    interval = pooled_auc_interval(histograms, error=ERROR)
    assert interval is not None
    assert interval.estimate == pytest.approx(auc(m_bin, h_bin))
    assert interval.low < interval.estimate < interval.high


@pytest.mark.parametrize("cell", [0.0, CELL])
@pytest.mark.parametrize(("n_members", "n_held_out"), [(120, 60), (81, 39)])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_interval_covers_under_noise(cell: float, n_members: int, n_held_out: int, shift: float) -> None:
    """Nominal error 1.25% at each end; up to 2% is tolerated for the skewness of small samples. 1,500 runs
    with more than 4.2% errors have probability below 1e-6 at a true rate of 2%."""
    rng = np.random.default_rng(7)
    misses = np.zeros(2)
    runs = 1500
    for _ in range(runs):
        histograms, truth = _draw(rng, shift, n_members, n_held_out, cell)
        interval = pooled_auc_interval(histograms, error=ERROR)
        if interval is not None:
            misses += (interval.low > truth, interval.high < truth)
    assert stats.binom.sf(0.042 * runs, runs, 0.02) < 1e-6
    assert (misses <= 0.042 * runs).all()


def test_an_interval_that_forgot_the_noise_would_not_cover() -> None:
    """The test above can fail: with noise of this size ignored, errors are far above 4.2%."""
    rng = np.random.default_rng(7)
    misses = 0
    for _ in range(500):
        noised, truth = _draw(rng, 0.0, 120, 60, CELL)
        ignorant = noised_histograms(noised.members_B, noised.held_out_B, members_std=0, held_out_std=0)
        interval = pooled_auc_interval(ignorant, error=ERROR)
        misses += interval is not None and not interval.low <= truth <= interval.high
    assert misses > 0.1 * 500


@pytest.mark.parametrize(("n_members", "n_held_out", "least"), [(120, 60, 0.85), (81, 39, 0.5)])
def test_power_is_what_simulation_gives(n_members: int, n_held_out: int, least: float) -> None:
    """Power against AUC 0.9 at multiplier 2. The planned figure and 1,000 simulated audits agree within 0.11:
    more than six standard errors (0.016) on top of the approximation's own error of about 0.03."""
    planned = planned_power(
        edges=EDGES,
        n_members=n_members,
        n_held_out=n_held_out,
        members_std=CELL * np.sqrt(2),
        held_out_std=CELL,
        true_auc=0.9,
        bound=0.6,
        error=ERROR,
    )
    rng = np.random.default_rng(5)
    shift = np.sqrt(2) * stats.norm.ppf(0.9)
    rejected = 0
    for _ in range(1000):
        interval = pooled_auc_interval(_draw(rng, shift, n_members, n_held_out, CELL)[0], error=ERROR)
        rejected += interval is not None and interval.low > 0.6
    assert planned > least
    assert rejected / 1000 == pytest.approx(planned, abs=0.11)


@pytest.mark.parametrize("cell", [0.0, CELL])
def test_what_lies_above_a_value_is_what_the_interval_says(cell: float) -> None:
    """Values next to the low end on both sides, 1e-6 away: the search for the end stops at 1e-12."""
    rng = np.random.default_rng(9)
    for _ in range(100):
        histograms, _ = _draw(rng, float(rng.uniform(0.3, 2.0)), 120, 60, cell)
        interval = pooled_auc_interval(histograms, error=ERROR)
        assert interval is not None
        if 1e-6 < interval.low < interval.estimate:
            assert lies_above(histograms, interval.low - 1e-6, error=ERROR)
            assert not lies_above(histograms, interval.low + 1e-6, error=ERROR)
    assert not lies_above(noised_histograms([3, 2], [1, 1], members_std=0, held_out_std=0), 0.1, error=ERROR)


def test_bins_that_everybody_shares_have_no_power() -> None:
    one_bin = noised_histograms([0, 0, 120, 0], [0, 0, 60, 0], members_std=0, held_out_std=0)
    spread = noised_histograms([30, 30, 30, 30], [15, 15, 15, 15], members_std=0, held_out_std=0)
    assert pooled_power(one_bin, true_auc=0.9, bound=0.6, error=ERROR) < 0.5
    assert pooled_power(spread, true_auc=0.9, bound=0.6, error=ERROR) > 0.95


def test_numbers_that_carry_nothing_give_no_figure() -> None:
    few = noised_histograms([3, 2], [1, 1], members_std=0, held_out_std=0)
    drowned = noised_histograms([30, 20], [15, 10], members_std=40, held_out_std=40)
    for histograms in (few, drowned):
        assert pooled_auc_interval(histograms, error=ERROR) is None
        assert pooled_power(histograms, true_auc=0.9, bound=0.6, error=ERROR) == 0.0


def test_bins_must_agree() -> None:
    with pytest.raises(UsageError):
        noised_histograms([1, 2], [1, 2, 3], members_std=0, held_out_std=0)
