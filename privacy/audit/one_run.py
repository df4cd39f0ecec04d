"""Auditing in one training run: what the number of right guesses about m fair coins proves. No torch.

Each of m canaries is in the training set or not, by an independent fair coin. An auditor who sees the model
guesses some of the coins; ``n_correct`` of ``n_guesses`` guesses are right. If the training is private, the
number of right guesses cannot be large. Guesses may depend on all of the model and on one another; they must
be made before the coins are looked at.

- (epsilon, delta) [1, theorem 5.2]: with q = e^epsilon / (1 + e^epsilon) and f the upper tail,
  f(v) = P[Binomial(n_guesses, q) >= v], the number of right guesses is dominated:
  P[n_correct >= v] <= f(v) + 2 m delta max over i in 1..m of (f(v - i) - f(v)) / i.
- mu-GDP [2]: a recursion over the number of right guesses that uses the whole trade-off curve, and so proves
  far more than one (epsilon, delta) of it.

Canaries of several hospitals are pooled: every coin is independent, the claim is about every one of them.

    [1] Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, NeurIPS 2023.
    [2] Mahloujifar, Melis, Chaudhuri, Auditing f-Differential Privacy in One Run, ICML 2025.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from scipy import stats

from privacy.dp.accounting import gaussian_epsilon
from shared.errors import UsageError

LARGEST_EPSILON = 64.0
LARGEST_MU = 64.0
_PRECISION = 1e-6


def one_run_p_value(
    n_correct: int, n_guesses: int, n_canaries: int, *, epsilon: float, delta: float = 0.0
) -> float:
    """Bound on the probability of at least ``n_correct`` right guesses under (epsilon, delta)-DP [1].

    Raises:
        UsageError: counts that do not fit together, or parameters out of range.
    """
    _check(n_correct, n_guesses, n_canaries)
    if not epsilon >= 0 or not 0 <= delta < 1:
        raise UsageError(f"epsilon {epsilon} and delta {delta}: epsilon >= 0 and 0 <= delta < 1 are needed")
    right = 1.0 / (1.0 + math.exp(-epsilon))
    beyond = _tail(n_correct, n_guesses, right)
    if delta == 0.0 or n_correct == 0:
        return beyond
    # f(v - i) is 1 from i = v on, and the quotient falls from there.
    shift = np.arange(1, n_correct + 1)
    shifted = stats.binom.sf(n_correct - shift - 1, n_guesses, right)
    steepest = float(np.max((shifted - beyond) / shift))
    return min(1.0, beyond + 2.0 * n_canaries * delta * max(steepest, 0.0))


def one_run_epsilon(n_correct: int, n_guesses: int, n_canaries: int, *, delta: float, error: float) -> float:
    """Lower confidence bound on epsilon at ``delta``, at least 0; wrong with probability <= ``error``."""
    _check_error(error)
    return _largest_refuted(
        lambda epsilon: (
            one_run_p_value(n_correct, n_guesses, n_canaries, epsilon=epsilon, delta=delta) <= error
        ),
        LARGEST_EPSILON,
    )


def gaussian_claim_refuted(
    n_correct: int, n_guesses: int, n_canaries: int, *, mu: float, error: float
) -> bool:
    """Whether so many right guesses are impossible, at level ``error``, for a mu-GDP training [2].

    With fair coins. False also where the numbers merely prove nothing.
    """
    _check(n_correct, n_guesses, n_canaries)
    _check_error(error)
    if mu < 0:
        raise UsageError(f"mu {mu} is below 0")
    if n_guesses == 0:
        return False
    right = error * n_correct / n_canaries
    wrong = error * (n_guesses - n_correct) / n_canaries
    for i in range(n_correct - 1, -1, -1):
        # Of the guesses, those that are right i times take at most the blow-up of the wrong ones' mass.
        grown = max(wrong, float(stats.norm.cdf(stats.norm.ppf(min(right, 1.0)) - mu)))
        right, wrong = right + i / (n_guesses - i) * (grown - wrong), grown
    return right + wrong > n_guesses / n_canaries


def one_run_mu(n_correct: int, n_guesses: int, n_canaries: int, *, error: float) -> float:
    """Lower confidence bound on mu of a Gaussian mechanism [2]: at least 0; wrong with at most ``error``."""
    return _largest_refuted(
        lambda mu: gaussian_claim_refuted(n_correct, n_guesses, n_canaries, mu=mu, error=error), LARGEST_MU
    )


def one_run_gaussian_epsilon(
    n_correct: int, n_guesses: int, n_canaries: int, *, delta: float, error: float
) -> float:
    """The same as an epsilon at ``delta``, for a mechanism known to be Gaussian."""
    return gaussian_epsilon(one_run_mu(n_correct, n_guesses, n_canaries, error=error), delta)


def one_run_power(n_guesses: int, refuted: Callable[[int], bool], *, accuracy: float) -> float:
    """Probability of a refutation if each guess is right with probability ``accuracy``, independently.

    Args:
        refuted: The test: whether so many right guesses refute the claim.
    """
    if not 0.0 <= accuracy <= 1.0:
        raise UsageError(f"an accuracy lies between 0 and 1, not {accuracy}")
    needed = right_guesses_needed(n_guesses, refuted)
    return 0.0 if needed is None else _tail(needed, n_guesses, accuracy)


def right_guesses_needed(n_guesses: int, refuted: Callable[[int], bool]) -> int | None:
    """Smallest number of right guesses that refutes the claim; None where even all of them do not."""
    if not refuted(n_guesses):
        return None
    low, high = -1, n_guesses  # refuted at high, not at low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def _tail(at_least: int, trials: int, probability: float) -> float:
    return float(stats.binom.sf(at_least - 1, trials, probability))


def _largest_refuted(refuted: Callable[[float], bool], largest: float) -> float:
    """Supremum of the parameters below which every claim is refuted, from below."""
    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while high < largest and refuted(high):
        low, high = high, 2.0 * high
    while high - low > _PRECISION:
        middle = (low + high) / 2.0
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def _check(n_correct: int, n_guesses: int, n_canaries: int) -> None:
    if not 0 <= n_correct <= n_guesses <= n_canaries or n_canaries < 1:
        raise UsageError(f"{n_correct} of {n_guesses} guesses right, of {n_canaries} canaries, is no outcome")


def _check_error(error: float) -> None:
    if not 0 < error < 1:
        raise UsageError(f"an error probability lies between 0 and 1, not {error}")
