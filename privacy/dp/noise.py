"""Integer noise: discrete Gaussians, sampled exactly, vectorised, from secret randomness.

Algorithm: Canonne, Kamath, Steinke, "The Discrete Gaussian for Differential Privacy" (NeurIPS 2020),
Algorithms 1-3: rejection from a discrete Laplace, all probabilities of the form exp(-x) with x rational.

Exactness: each coin with probability exp(-x) compares a uniform real U in [0, 1), known by its first 64 bits,
with exp(-x) in floating point. Where the two are further apart than a margin that exceeds all rounding errors
(relative 2^-40; the errors are below 2^-44), the comparison is decided as it would be for the real numbers.
Where they are nearer, which happens with probability below 2^-38, U's further bits are drawn and exp(-x) is
computed to as many digits as it takes. So given uniform bits the samples have exactly the distribution
N_Z(0, sigma^2), sigma being the binary64 number passed: statistical distance 0. The bits come from
AES-256-CTR keyed by the operating system (:mod:`privacy.secret_random`), whose distance from uniform is a
standard assumption. (It rests on ``numpy.exp`` erring by less than 2^-44 relatively; numpy's tests allow 4
units in the last place, 2^-50.)

Floating-point Gaussians are not used anywhere near privacy: their low bits give the noiseless value away
(Mironov, CCS 2012).
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import Context, Decimal
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from privacy.dp.execution_plan import ExecutionPlan
from privacy.secret_random import SecretRandom
from shared.errors import UsageError

MAX_STD_STEPS = 2.0**40
"""Largest standard deviation, in grid steps: all integers met stay exact in binary64."""

_MARGIN = 2.0**-40
_CHUNK = 1 << 17


def noise_share(execution: ExecutionPlan, secret: SecretRandom) -> NDArray[np.int64]:
    """One site's noise for one clipped sum: int64 [d], in steps of ``execution.gradient_grid_step``.

    Formal guarantee: coordinates are independent N_Z(0, ``execution.noise_share_steps``^2).
    """
    return discrete_gaussian(secret, execution.noise_share_steps, execution.dimension)


def audit_noise_share(
    execution: ExecutionPlan, secret: SecretRandom, *, counts_sensitivity: float, length: int
) -> NDArray[np.int64]:
    """One site's noise for its audit counts: int64 [length], grid step 1; zeros in mode ``unprotected``."""
    std_steps = execution.audit_share_steps(counts_sensitivity)
    if std_steps == 0:
        return np.zeros(length, dtype=np.int64)
    return discrete_gaussian(secret, std_steps, length)


def discrete_gaussian(secret: SecretRandom, std_steps: float, count: int) -> NDArray[np.int64]:
    """``count`` independent draws of N_Z(0, std_steps^2), P[x] proportional to exp(-x^2 / (2 std_steps^2)).

    Raises:
        UsageError: ``std_steps`` is not in (0, 2^40], or the randomness is not a SecretRandom.
    """
    if not isinstance(secret, SecretRandom):
        raise UsageError("noise is drawn from SecretRandom alone, never from a seeded generator")
    if not 0 < std_steps <= MAX_STD_STEPS:
        raise UsageError(f"noise of {std_steps:g} grid steps: must be above 0 and at most 2^40")
    result = np.empty(count, dtype=np.int64)
    filled = 0
    while filled < count:
        draws = _gaussian_candidates(secret, std_steps, min(_CHUNK, (count - filled) * 5 // 2 + 32))
        taken = min(len(draws), count - filled)
        result[filled : filled + taken] = draws[:taken]
        filled += taken
    return result


def _gaussian_candidates(
    secret: SecretRandom, std_steps: float, n: int, *, margin: float = _MARGIN
) -> NDArray[np.int64]:
    """Algorithm 3: about 0.48 n draws of the discrete Gaussian."""
    scale = int(std_steps) + 1
    laplace = _laplace_candidates(secret, scale, n, margin=margin)
    variance = std_steps * std_steps
    gap = np.abs(laplace).astype(np.float64) - variance / scale
    exact_variance = Fraction(std_steps) ** 2

    def exact(index: int) -> Fraction:
        distance = abs(int(laplace[index])) - exact_variance / scale
        return distance * distance / (2 * exact_variance)

    accepted = _coins(secret, gap * gap / (2.0 * variance), exact, margin=margin)
    draws: NDArray[np.int64] = laplace[accepted]
    return draws


def _laplace_candidates(secret: SecretRandom, scale: int, n: int, *, margin: float) -> NDArray[np.int64]:
    """Algorithm 2: about 0.63 n draws of the discrete Laplace, P[x] proportional to exp(-|x| / scale)."""
    remainder = secret.below(scale, n)
    remainder = remainder[
        _coins(
            secret,
            remainder.astype(np.float64) / scale,
            lambda index: Fraction(int(remainder[index]), scale),
            margin=margin,
        )
    ]
    magnitude = remainder + scale * _geometric(secret, len(remainder))
    words = np.frombuffer(secret.bytes(len(magnitude)), dtype=np.uint8)
    negative = (words & 1).astype(bool)
    keep = ~(negative & (magnitude == 0))
    signed = np.where(negative, -magnitude, magnitude)
    draws: NDArray[np.int64] = signed[keep]
    return draws


def _coins(
    secret: SecretRandom,
    exponents: NDArray[np.float64],
    exact: Callable[[int], Fraction],
    *,
    margin: float,
) -> NDArray[np.bool_]:
    """Independent coins, heads with probability exp(-exponent), decided exactly (see the module's text).

    Args:
        exponents: x of each coin, in floating point.
        exact: Gives the exact x of the coin at an index.
        margin: Relative distance within which the floating-point comparison is not trusted.
    """
    words = secret.uint64(len(exponents))
    uniform = words.astype(np.float64) * 2.0**-64
    probability = np.exp(-exponents)
    heads: NDArray[np.bool_] = uniform < probability
    close = np.abs(uniform - probability) <= margin * probability + 2.0**-63
    for index in np.flatnonzero(close):
        heads[index] = _exact_coin(secret, int(words[index]), exact(int(index)))
    return heads


def _exact_coin(secret: SecretRandom, word: int, exponent: Fraction) -> bool:
    """Is U < exp(-exponent), for the uniform real U whose first 64 bits are ``word``?"""
    bits = 64
    while True:
        low, high = _scaled_exp(exponent, bits)
        if word + 1 <= low:
            return True
        if word >= high:
            return False
        word = (word << 64) | int(secret.uint64(1)[0])
        bits += 64


def _scaled_exp(exponent: Fraction, bits: int) -> tuple[Fraction, Fraction]:
    """Bounds on 2^bits exp(-exponent), nearer than 2^-20 to one another."""
    context = Context(prec=bits // 3 + 40)
    quotient = context.divide(Decimal(-exponent.numerator), Decimal(exponent.denominator))
    # Rounding of the quotient and of exp: relative error below (1 + |x|) 10^(1 - prec), |x| below 10^6.
    value = Fraction(context.exp(quotient)) * (1 << bits)
    slack = value * Fraction(1, 10 ** (context.prec - 10))
    return value - slack, value + slack


def _geometric(secret: SecretRandom, n: int) -> NDArray[np.int64]:
    """V with P[V >= v] = exp(-v): how many of exp(-1), exp(-2), ... are above one uniform real."""
    thresholds = _geometric_thresholds(64)
    ascending = np.array(thresholds[::-1], dtype=np.uint64)
    words = secret.uint64(n)
    place = np.searchsorted(ascending, words, side="right")
    result = (len(ascending) - place).astype(np.int64)
    tied = np.zeros(n, dtype=bool)
    at_or_below = place > 0
    tied[at_or_below] = ascending[place[at_or_below] - 1] == words[at_or_below]
    for index in np.flatnonzero(tied):
        result[index] = _exact_geometric(secret, int(words[index]))
    return result


def _exact_geometric(secret: SecretRandom, word: int) -> int:
    """The same for one real whose first 64 bits equal a threshold's: draw more bits until it differs."""
    bits = 64
    while True:
        word = (word << 64) | int(secret.uint64(1)[0])
        bits += 64
        thresholds = _geometric_thresholds(bits)
        if word not in thresholds:
            return sum(word < threshold for threshold in thresholds)


@lru_cache(maxsize=8)
def _geometric_thresholds(bits: int) -> tuple[int, ...]:
    """floor(2^bits exp(-v)) for v = 1, 2, ... down to the first 0."""
    result: list[int] = []
    while not result or result[-1] > 0:
        low, high = _scaled_exp(Fraction(len(result) + 1), bits)
        if low.__floor__() != high.__floor__():
            raise ArithmeticError("a threshold is not decided at this precision")
        result.append(low.__floor__())
    return tuple(result)
