"""A battery for integer noise: support, scale, tails, low bits, independence in a vector and between calls.

The true sampler fails the battery of one scale with probability at most 2e-7 (up to the chi-square
approximation, with at least 100 draws expected in each cell), the module's tests together at most 1e-6. Each
mutant is made in the sampler and must be named by the part of the battery that is there for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy.stats import chi2, norm

from privacy.audit.mechanism_statistics import correlation_p, count_p, sub_gaussian_p, variance_p
from privacy.dp import noise
from privacy.dp.noise import discrete_gaussian
from privacy.secret_random import SecretRandom

N = 1 << 18
FAILURE = 2e-7
TAILS = (3.0, 3.5, 4.0)
SCALES = (4.0, 57.3, 1.15e6)
"""The smallest share there is, an odd one, and that of a plan of 100,000 parameters at epsilon 8."""


def cell_edges(std: float) -> np.ndarray:
    """Cells [a, b) of integers: every integer where the noise is coarse, else 128 of equal probability."""
    if std < 10:
        reach = math.floor(3.2 * std)
        return np.concatenate([[-np.inf], np.arange(-reach, reach + 2), [np.inf]])
    return np.concatenate([[-np.inf], np.ceil(norm.ppf(np.arange(1, 128) / 128) * std), [np.inf]])


def probability_below(edges: np.ndarray, std: float) -> np.ndarray:
    """P[X < edge] of the discrete Gaussian: summed over the integers, or, above 1,000 steps, the normal's."""
    if std > 1000:
        return np.asarray(norm.cdf((edges - 0.5) / std))
    half = math.ceil(30 * std)
    weights = np.exp(-(np.arange(-half, half + 1, dtype=np.float64) ** 2) / (2 * std**2))
    sums = np.concatenate([[0.0], np.cumsum(weights) / weights.sum()])
    return sums[np.clip(edges + half, 0, 2 * half + 1).astype(np.int64)]


def support_p(draws: np.ndarray, std: float) -> float:
    edges = cell_edges(std)
    below = probability_below(edges, std)
    expected = np.diff(below) * len(draws)
    assert expected.min() >= 100
    places = np.searchsorted(edges, draws, side="right") - 1
    observed = np.bincount(places, minlength=len(expected))
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1))


def tail_p(draws: np.ndarray, std: float) -> float:
    """Both sides together, beyond each of TAILS: exact binomial."""
    found = []
    for reach in TAILS:
        edge = math.ceil(reach * std)
        rate = 2.0 * float(probability_below(np.array([-edge + 1.0]), std)[0])
        found.append(count_p(int((np.abs(draws) >= edge).sum()), len(draws), rate))
    return min(1.0, len(TAILS) * min(found))


def battery(std: float) -> dict[str, float]:
    """p-values by what they look at; two calls of one stream, N draws each."""
    secret = SecretRandom()
    first, second = (discrete_gaussian(secret, std, N) for _ in range(2))
    both = np.concatenate([first, second])
    halves = np.split(first, 2)
    odd = int((both & 1).sum())
    even_share = float(np.exp(-(np.arange(-200, 201, 2) ** 2) / 32.0).sum() / (4.0 * math.sqrt(2 * math.pi)))
    return {
        "support": support_p(both, std),
        "scale": variance_p(both, std),
        "mean": sub_gaussian_p(float(both.sum()), std * math.sqrt(2 * N)),
        "tails": tail_p(both, std),
        "parity": count_p(odd, 2 * N, 1.0 - even_share if std == 4.0 else 0.5),
        "neighbours": correlation_p(first[1:], first[:-1], std, lags=False),
        "halves": correlation_p(halves[0], halves[1], std, lags=True),
        "calls": correlation_p(first, second, std, lags=True),
        "magnitudes": magnitude_p(halves[0], halves[1], std),
    }


def magnitude_p(first: np.ndarray, second: np.ndarray, std: float) -> float:
    """Do large draws meet large draws? |X| above its median on both sides: binomial, rate p^2."""
    edge = math.ceil(0.6745 * std)
    rate = 2.0 * float(probability_below(np.array([-edge + 1.0]), std)[0])
    both = (np.abs(first) >= edge) & (np.abs(second) >= edge)
    return count_p(int(both.sum()), len(first), rate**2)


def faults(std: float) -> set[str]:
    found = battery(std)
    return {name for name, p in found.items() if p <= FAILURE / len(found)}


@pytest.mark.parametrize("std", SCALES)
def test_the_sampler_is_the_discrete_gaussian(std: float) -> None:
    """False-failure probability 2e-7 a scale."""
    assert faults(std) == set()


Candidates = Callable[..., np.ndarray]


def patched(monkeypatch: pytest.MonkeyPatch, change: Callable[[Candidates], Candidates]) -> None:
    monkeypatch.setattr(noise, "_gaussian_candidates", change(noise._gaussian_candidates))


def rescaled(original: Candidates) -> Candidates:
    return lambda secret, std, n, **rest: original(secret, 1.03 * std, n, **rest)


def truncated(original: Candidates) -> Candidates:
    def wrong(secret: SecretRandom, std: float, n: int, **rest: Any) -> np.ndarray:
        draws = original(secret, std, n, **rest)
        return draws[np.abs(draws) < 3.5 * std]

    return wrong


def doubled_steps(original: Candidates) -> Candidates:
    """Half the noise on a grid twice as coarse: the right variance on even integers alone."""
    return lambda secret, std, n, **rest: 2 * original(secret, std / 2, n, **rest)


def same_signs(original: Candidates) -> Candidates:
    """Magnitudes are drawn once and used again with fresh signs: no correlation, and no independence."""
    kept: dict[int, np.ndarray] = {}

    def wrong(secret: SecretRandom, std: float, n: int, **rest: Any) -> np.ndarray:
        draws = kept.setdefault(n, original(secret, std, n, **rest))
        signs = 1 - 2 * (np.frombuffer(secret.bytes(len(draws)), dtype=np.uint8) & 1).astype(np.int64)
        return draws * signs

    return wrong


@pytest.mark.parametrize("std", [4.0, 1.15e6])
@pytest.mark.parametrize(
    ("change", "names"),
    [
        (rescaled, {"scale", "support"}),
        (truncated, {"tails"}),
        (doubled_steps, {"parity"}),
    ],
)
def test_a_broken_sampler_is_seen(
    monkeypatch: pytest.MonkeyPatch,
    std: float,
    change: Callable[[Candidates], Candidates],
    names: set[str],
) -> None:
    patched(monkeypatch, change)
    assert names <= faults(std)


@pytest.mark.parametrize("sign", [1, -1])
def test_correlated_halves_are_seen(monkeypatch: pytest.MonkeyPatch, sign: int) -> None:
    """The second half of a vector is the first, 1,000 places on, with a twentieth of fresh noise."""
    original = discrete_gaussian

    def wrong(secret: SecretRandom, std: float, count: int) -> np.ndarray:
        draws = original(secret, std, count)
        fresh = np.abs(draws) % 20 == 0
        half = count // 2
        draws[half:] = np.where(fresh[half:], draws[half:], sign * np.roll(draws[:half], 1000))
        return draws

    monkeypatch.setitem(globals(), "discrete_gaussian", wrong)
    assert "halves" in faults(57.3)


def test_magnitudes_used_again_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 2^17 candidates give about 0.48 as many draws, so blocks of one vector repeat."""
    monkeypatch.setattr(noise, "_CHUNK", N)
    patched(monkeypatch, same_signs)
    secret = SecretRandom()
    draws = discrete_gaussian(secret, 57.3, N // 4), discrete_gaussian(secret, 57.3, N // 4)
    assert correlation_p(*draws, 57.3, lags=False) > 1e-7
    assert magnitude_p(*draws, 57.3) < FAILURE


def test_a_stream_that_starts_again_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call draws from the start of one key's stream."""
    original = discrete_gaussian
    key = bytes(32)

    def wrong(secret: SecretRandom, std: float, count: int) -> np.ndarray:
        monkeypatch.setattr(SecretRandom, "_fresh_key", lambda _: key)
        return original(SecretRandom(), std, count)

    monkeypatch.setitem(globals(), "discrete_gaussian", wrong)
    assert "calls" in faults(57.3)


def test_noise_comes_from_the_operating_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is 32 bytes of os.urandom, and nothing else moves the draws."""
    asked: list[int] = []

    def urandom(size: int) -> bytes:
        asked.append(size)
        return bytes(range(size))

    monkeypatch.setattr("privacy.secret_random.os.urandom", urandom)
    first, second = (discrete_gaussian(SecretRandom(), 100.0, 5000) for _ in range(2))
    assert asked == [32, 32]
    np.testing.assert_array_equal(first, second)
