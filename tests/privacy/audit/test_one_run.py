"""One-run auditing: against another implementation, enumeration, and mechanisms that reach the bound."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from privacy.audit.bounds import clopper_pearson, epsilon_lower_bound, mu_lower_bound
from privacy.audit.one_run import (
    gaussian_claim_refuted,
    one_run_epsilon,
    one_run_gaussian_epsilon,
    one_run_mu,
    one_run_p_value,
    one_run_power,
    right_guesses_needed,
)
from privacy.dp.accounting import gaussian_epsilon
from shared.errors import UsageError

sys.path.insert(0, str(Path(__file__).parent / "vectors"))

import jax_privacy_figures as other

KNOWN: dict[str, Any] = json.loads(other.PATH.read_bytes())


def needed(n_guesses: int, n_canaries: int, *, mu: float, error: float) -> int | None:
    return right_guesses_needed(
        n_guesses, lambda v: gaussian_claim_refuted(v, n_guesses, n_canaries, mu=mu, error=error)
    )


def power(n: int, *, mu: float, error: float, accuracy: float) -> float:
    return one_run_power(n, lambda v: gaussian_claim_refuted(v, n, n, mu=mu, error=error), accuracy=accuracy)


# Another implementation's figures.


def test_the_known_answers_are_those_of_the_package_where_it_is_installed() -> None:
    package = other.installed()
    if package is None:
        pytest.skip(
            f"{other.PACKAGE} {other.VERSION} is not installed; its stored figures are compared below"
        )
    assert other.figures(package) == KNOWN


@pytest.mark.parametrize("case", KNOWN["one_run"])
def test_epsilon_of_one_run_agrees(case: list[float]) -> None:
    canaries, guesses, right, error, delta, expected = case
    found = one_run_epsilon(int(right), int(guesses), int(canaries), delta=delta, error=error)
    assert found == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("case", KNOWN["one_run_gaussian"])
def test_epsilon_of_one_run_of_a_gaussian_mechanism_agrees(case: list[float]) -> None:
    canaries, guesses, right, error, delta, expected = case
    found = one_run_gaussian_epsilon(int(right), int(guesses), int(canaries), delta=delta, error=error)
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("case", KNOWN["p_values"])
def test_p_values_agree(case: list[float]) -> None:
    canaries, guesses, right, epsilon, delta, expected = case
    found = one_run_p_value(int(right), int(guesses), int(canaries), epsilon=epsilon, delta=delta)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("case", KNOWN["counts"])
def test_clopper_pearson_and_its_epsilon_agree(case: list[float]) -> None:
    tp, n_in, fp, n_out, delta, epsilon, upper = case
    counts = int(tp), int(n_in), int(fp), int(n_out)
    assert clopper_pearson(counts[2], counts[3], error=0.025).high == pytest.approx(upper, rel=1e-12)
    found = epsilon_lower_bound(*counts, delta=delta, error=0.05)
    assert found == pytest.approx(epsilon, rel=1e-9, abs=1e-9)


# Derived anew, by brute force.


def distribution(m: int, probability: Any) -> Iterator[tuple[int, float]]:
    """(number of right guesses, probability) over every vector of m coins and every vector of answers."""
    for coins in itertools.product((0, 1), repeat=m):
        for answers in itertools.product((0, 1), repeat=m):
            right = sum(coin == answer for coin, answer in zip(coins, answers, strict=True))
            yield right, 2.0**-m * probability(coins, answers)


@pytest.mark.parametrize("epsilon", [0.0, 0.7, 2.0])
def test_randomized_response_reaches_the_bound_exactly(epsilon: float) -> None:
    """With delta 0 the bound is attained: each coin answered truly with probability e^eps / (1 + e^eps)."""
    m, q = 5, math.exp(epsilon) / (1 + math.exp(epsilon))

    def probability(coins: tuple[int, ...], answers: tuple[int, ...]) -> float:
        return math.prod(q if c == a else 1 - q for c, a in zip(coins, answers, strict=True))

    outcomes = list(distribution(m, probability))
    assert math.fsum(p for _, p in outcomes) == pytest.approx(1)
    for v in range(m + 1):
        tail = math.fsum(p for right, p in outcomes if right >= v)
        assert one_run_p_value(v, m, m, epsilon=epsilon) == pytest.approx(tail, abs=1e-12)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.02), (1.0, 0.1), (2.0, 0.001)])
def test_no_approximate_mechanism_passes_the_bound(epsilon: float, delta: float) -> None:
    """Two (epsilon, delta) mechanisms, enumerated: each coin shown with probability delta, or all of them at
    once with probability delta; randomized response otherwise."""
    m, q = 4, math.exp(epsilon) / (1 + math.exp(epsilon))

    def answered(coins: tuple[int, ...], answers: tuple[int, ...], right: float) -> float:
        return math.prod(right if c == a else 1 - right for c, a in zip(coins, answers, strict=True))

    mechanisms = (
        lambda coins, answers: answered(coins, answers, delta + (1 - delta) * q),
        lambda coins, answers: delta * (coins == answers) + (1 - delta) * answered(coins, answers, q),
    )
    for mechanism in mechanisms:
        outcomes = list(distribution(m, mechanism))
        for v in range(m + 1):
            tail = math.fsum(p for right, p in outcomes if right >= v)
            assert tail <= one_run_p_value(v, m, m, epsilon=epsilon, delta=delta) + 1e-12


@pytest.mark.parametrize("mu", [0.3, 1.0, 1.67])
@pytest.mark.parametrize("m", [8, 40, 200])
def test_a_true_gaussian_mechanism_is_refuted_at_most_at_the_level(m: int, mu: float) -> None:
    """Exactly: of m independent Gaussian releases each guess is right with probability Phi(mu / 2)."""
    for error in (0.05, 0.005):
        least = needed(m, m, mu=mu, error=error)
        refuted = 0.0 if least is None else stats.binom.sf(least - 1, m, stats.norm.cdf(mu / 2))
        assert refuted <= error


def test_guesses_of_the_surest_coins_are_covered_too() -> None:
    """Guessing the highest and lowest quarter alone, simulated: 2,000 runs at mu = 1, level 5%.

    More than 170 refusals have probability below 1e-6 at 5%.
    """
    rng, m, k, mu = np.random.default_rng(4), 64, 16, 1.0
    least = needed(2 * k, m, mu=mu, error=0.05)
    assert least is not None
    refused = 0
    for _ in range(2000):
        coins = rng.random(m) < 0.5
        order = np.argsort(mu * coins + rng.normal(size=m))
        refused += int(coins[order[-k:]].sum() + (~coins[order[:k]]).sum() >= least)
    assert stats.binom.sf(170, 2000, 0.05) < 1e-6
    assert refused <= 170


# What the figures mean.


def test_more_right_guesses_never_prove_less() -> None:
    epsilons = [one_run_epsilon(v, 30, 30, delta=1e-5, error=0.05) for v in range(0, 31, 3)]
    assert epsilons == sorted(epsilons) and epsilons[0] == 0 < epsilons[-1]
    mus = [one_run_mu(v, 30, 30, error=0.05) for v in range(0, 31, 3)]
    assert mus == sorted(mus) and mus[0] == 0 < mus[-1]


def test_guessing_proves_nothing_and_a_whole_curve_proves_more_than_one_point_of_it() -> None:
    assert one_run_epsilon(15, 30, 30, delta=1e-5, error=0.05) == 0.0
    assert one_run_mu(15, 30, 30, error=0.05) == 0.0
    point = one_run_epsilon(30, 30, 30, delta=1e-5, error=0.05)
    curve = one_run_gaussian_epsilon(30, 30, 30, delta=1e-5, error=0.05)
    assert (round(point, 2), round(curve, 2)) == (2.25, 5.71)


def test_power_is_that_of_the_binomial_tail() -> None:
    least = needed(60, 60, mu=0.5, error=0.01)
    assert least is not None and not gaussian_claim_refuted(least - 1, 60, 60, mu=0.5, error=0.01)
    assert gaussian_claim_refuted(least, 60, 60, mu=0.5, error=0.01)
    expected = float(stats.binom.sf(least - 1, 60, 0.9))
    assert power(60, mu=0.5, error=0.01, accuracy=0.9) == pytest.approx(expected)
    assert power(60, mu=0.5, error=0.01, accuracy=0.5) < 0.01
    # Two dozen canaries cannot refute epsilon 8 whatever they do: that is what the report has to say.
    assert needed(24, 24, mu=1.67, error=0.01) is None
    assert power(24, mu=1.67, error=0.01, accuracy=1.0) == 0.0


@pytest.mark.parametrize("n", [50, 200])
def test_mu_that_a_perfect_attack_proves(n: int) -> None:
    found = mu_lower_bound(n, n, 0, n, error=0.05)
    upper = 1 - 0.025 ** (1 / n)  # of no events among n
    assert found == pytest.approx(-2 * stats.norm.ppf(upper))
    assert gaussian_epsilon(found, 1e-5) > epsilon_lower_bound(n, n, 0, n, delta=1e-5, error=0.05)
    assert mu_lower_bound(n // 2, n, n // 2, n, error=0.05) == 0.0


def test_outcomes_that_cannot_be_are_refused() -> None:
    for counts in ((3, 2, 5), (1, 6, 5), (-1, 2, 5), (0, 0, 0)):
        with pytest.raises(UsageError, match="no outcome"):
            one_run_p_value(*counts, epsilon=1.0)
    with pytest.raises(UsageError, match="epsilon"):
        one_run_p_value(1, 1, 1, epsilon=-1.0)
    with pytest.raises(UsageError, match="error probability"):
        one_run_epsilon(1, 1, 1, delta=0.0, error=0.0)
