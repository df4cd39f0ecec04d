"""The discrete Gaussian sampler has the distribution it claims, also where every coin is decided exactly."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import chi2, norm

from privacy.dp import noise
from privacy.dp.closeness import tail_probability
from privacy.dp.noise import discrete_gaussian
from privacy.secret_random import SecretRandom
from shared.errors import UsageError

ONE_IN_A_MILLION = 1e-6


def pmf(std: float, support: np.ndarray) -> np.ndarray:
    wide = np.arange(-int(20 * std) - 20, int(20 * std) + 21)
    return np.exp(-(support**2) / (2 * std**2)) / np.exp(-(wide**2) / (2 * std**2)).sum()


def chi_square_p(draws: np.ndarray, std: float) -> float:
    """p-value over the integers with expected count above 10, the two tails pooled."""
    edge = next(k for k in range(1, 10**6) if pmf(std, np.array([k]))[0] * len(draws) < 10)
    support = np.arange(-edge + 1, edge)
    expected = pmf(std, support) * len(draws)
    observed = np.array([(draws == k).sum() for k in support])
    rest = (len(draws) - expected.sum(), len(draws) - observed.sum())
    statistic = ((observed - expected) ** 2 / expected).sum() + (rest[1] - rest[0]) ** 2 / max(rest[0], 1e-9)
    return float(chi2.sf(statistic, len(support)))


@pytest.mark.parametrize("std", [0.7, 4.0, 5.656])
def test_distribution_on_the_integers(std: float) -> None:
    """False-failure probability 1e-6 a case (up to the chi-square approximation; threshold 1e-7)."""
    assert chi_square_p(discrete_gaussian(SecretRandom(), std, 300_000), std) > 1e-7


def test_the_test_sees_a_wrong_scale() -> None:
    assert chi_square_p(discrete_gaussian(SecretRandom(), 4.08, 300_000), 4.0) < 1e-7


def test_exact_path_has_the_same_distribution() -> None:
    """Every coin decided by exact arithmetic (margin 10). False-failure probability 1e-6."""
    secret = SecretRandom()
    draws = np.concatenate([noise._gaussian_candidates(secret, 4.0, 4000, margin=10.0) for _ in range(3)])
    assert len(draws) > 4000
    assert chi_square_p(draws, 4.0) > 1e-7


def test_exact_coin_follows_its_uniform() -> None:
    """U < exp(-x) decided for words on either side of the threshold, and on it."""
    secret = SecretRandom()
    for x in (Fraction(1), Fraction(1, 3), Fraction(40), Fraction(0)):
        threshold = math.floor(noise._scaled_exp(x, 64)[0])
        assert noise._exact_coin(secret, threshold - 1, x)
        if x != 0:
            assert not noise._exact_coin(secret, threshold + 1, x)
            assert noise._exact_coin(secret, threshold, x) in (True, False)
    assert noise._exact_geometric(secret, noise._geometric_thresholds(64)[1]) in (1, 2)
    assert abs(noise._geometric_thresholds(64)[0] - 2**64 / math.e) < 2**14


@pytest.mark.parametrize("std", [57.3, 3.1e6, 2.0**39])
def test_variance_mean_tails_and_independence(std: float) -> None:
    """200,000 draws. Each of 5 statistics within its two-sided 1e-7 interval: together below 1e-6."""
    n = 200_000
    draws = discrete_gaussian(SecretRandom(), std, n) / std
    z = float(norm.isf(0.5e-7))
    assert abs(draws.mean()) < z / math.sqrt(n)
    assert abs((draws**2).mean() - 1) < z * math.sqrt(2 / n)
    assert abs((draws**4).mean() - 3) < z * math.sqrt(96 / n)
    assert abs((draws[1:] * draws[:-1]).mean()) < z / math.sqrt(n)
    beyond = 2 * norm.sf(3.0)
    assert abs((np.abs(draws) > 3.0).mean() - beyond) < z * math.sqrt(beyond / n) + 0.5 / std


def test_large_noise_is_fine_grained() -> None:
    """Low bits are uniform: parity of 100,000 draws within 5.4 deviations (probability below 1e-7)."""
    draws = discrete_gaussian(SecretRandom(), 1e6, 100_000)
    assert abs((draws & 1).mean() - 0.5) < 5.4 * 0.5 / math.sqrt(100_000)
    assert np.abs(draws).max() < 7.5e6


def test_tail_bound_holds() -> None:
    """P[|X| >= 5 s] is bounded by 2 exp(-12.5); 10^5 draws exceed it at most a few times."""
    draws = discrete_gaussian(SecretRandom(), 10.0, 100_000)
    assert (np.abs(draws) >= 50).mean() <= tail_probability(50, 10.0) + 5e-4


def test_seeds_do_not_reach_the_noise() -> None:
    """Two sites with the same seeds everywhere draw different noise (equal with probability 2^-1000)."""
    seen = []
    for _ in range(2):
        torch.manual_seed(7)
        np.random.seed(7)
        seen.append(discrete_gaussian(SecretRandom(), 100.0, 300))
    assert not np.array_equal(*seen)


@pytest.mark.parametrize("std", [0.0, -1.0, math.nan, math.inf, 2.0**41])
def test_impossible_scales_are_refused(std: float) -> None:
    with pytest.raises(UsageError):
        discrete_gaussian(SecretRandom(), std, 3)


def test_seeded_generators_are_refused() -> None:
    with pytest.raises(UsageError):
        discrete_gaussian(np.random.default_rng(0), 5.0, 3)  # type: ignore[arg-type]


def test_no_draws() -> None:
    assert len(discrete_gaussian(SecretRandom(), 5.0, 0)) == 0
