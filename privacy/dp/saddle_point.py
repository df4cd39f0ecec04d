"""A second tight accountant without torch: a contour integral of the loss's moment generating function.

For neighbours P, Q with privacy loss L = log dP/dQ, hockey-stick delta is E_P[(1 - e^(epsilon - L))_+]. The
Laplace transform of that payoff is e^(-s epsilon) / (s (s + 1)), so for any c > 0

    delta(epsilon) = 1 / (2 pi) * integral over y of  M(s) e^(-s epsilon) / (s (s + 1)),   s = c + i y,

with M(s) = E_P[e^(s L)] (Alghamdi, Asoodeh, Calmon, Gomez, Kosut, Sankar, "The Saddle-Point Method in
Differential Privacy", ICML 2023). Composition multiplies M. The integral is exact; c near the saddle point
keeps all of it at the size of delta, so that nothing cancels, and the trapezoidal rule converges
geometrically (Trefethen and Weideman, SIAM Review 2014).

One step of a Gaussian mechanism under Poisson sampling at rate q has, with A(u) = E_Q[e^(u L)],

    M(s) = A(s + 1)  where the patient is removed,    M(s) = A(-s)  where added,
    Q = N(0, sigma^2),    L(x) = log(1 - q + q e^((2 x - 1) / (2 sigma^2))),

and A(u) = e^((u^2 - u) / (2 sigma^2)) at q = 1. These two pairs dominate all neighbours (Zhu, Dong, Wang,
AISTATS 2022). No code is shared with ``dp-accounting`` or Opacus.

This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize_scalar
from scipy.special import logsumexp, ndtr

Groups = tuple[tuple[float, float, int], ...]
"""(sampling rate, noise multiplier, steps) of mechanisms composed."""

RELATIVE_ERROR = 1e-4
"""What is left out of the integral for delta, relative to it, is below this; epsilon errs by this over c."""

_MAX_POINTS = 1 << 12
_MAX_NODES = 1 << 16
_CHUNK = 1 << 20


class _SlowIntegralError(Exception):
    """The integral would take too many points: its integrand hardly decays."""


@lru_cache(maxsize=4096)
def saddle_point_epsilon(groups: Groups, delta: float) -> float | None:
    """Smallest epsilon at which all of ``groups`` together have this delta, for adding and for removing.

    One sampled step alone is solved in closed form. None where the integral would take too long: a few steps
    at rates of 1% and less, with no other mechanism beside them.
    """
    if len(groups) == 1 and groups[0][0] < 1 and groups[0][2] == 1:
        return max(
            _single_step_epsilon(groups[0][0], groups[0][1], delta, removed) for removed in (True, False)
        )
    try:
        removing = _epsilon(groups, delta, True, at_least=0.0)
        return _epsilon(groups, delta, False, at_least=removing)
    except _SlowIntegralError:
        return None


def _epsilon(groups: Groups, delta: float, removed: bool, *, at_least: float) -> float:
    """The larger of ``at_least`` and the epsilon of one direction."""

    def cumulant(c: float) -> float:
        return float(_log_moment(groups, np.array([c], dtype=np.complex128), removed)[0].real)

    def bound(log_c: float) -> float:
        """(1 - e^-l)_+ <= e^(c l) c^c / (c + 1)^(c + 1) (Canonne, Kamath, Steinke 2020, Proposition 12)."""
        c = math.exp(log_c)
        payoff = c * math.log(c / (c + 1.0)) - math.log(c + 1.0)
        return (cumulant(c) + payoff - math.log(delta)) / c

    best = minimize_scalar(bound, bounds=(math.log(1e-3), math.log(1e4)), method="bounded")
    c, highest = math.exp(float(best.x)), float(best.fun)
    if highest <= at_least:
        return at_least
    curve = _delta_curve(groups, c, removed, cumulant)
    if curve(at_least) <= delta:
        return at_least
    if curve(highest) >= delta:
        return highest
    return float(brentq(lambda e: curve(e) - delta, at_least, highest, xtol=1e-12, rtol=1e-12))


def _single_step_epsilon(rate: float, sigma: float, delta: float, removed: bool) -> float:
    """L is monotone in x, so the event {L > epsilon} is a half line."""

    def curve(epsilon: float) -> float:
        # Removed: (1 - q) Q + q N(1, .) against Q. Added: the other way round, where the loss is below
        # -log(1 - q).
        ratio = (math.exp(epsilon if removed else -epsilon) - (1.0 - rate)) / rate
        if ratio <= 0:
            return 0.0
        edge = sigma**2 * math.log(ratio) + 0.5
        sign = -1.0 if removed else 1.0
        without, shifted = float(ndtr(sign * edge / sigma)), float(ndtr(sign * (edge - 1.0) / sigma))
        mixture = (1.0 - rate) * without + rate * shifted
        return mixture - math.exp(epsilon) * without if removed else without - math.exp(epsilon) * mixture

    if curve(0.0) <= delta:
        return 0.0
    high = 1.0
    while curve(high) > delta:
        high *= 2.0
    return float(brentq(lambda e: curve(e) - delta, 0.0, high, xtol=1e-12, rtol=1e-12))


def _delta_curve(
    groups: Groups, c: float, removed: bool, cumulant: Callable[[float], float]
) -> Callable[[float], float]:
    """delta as a function of epsilon, with the contour at ``c``."""
    spread = 1e-3 * c
    curvature = max((cumulant(c + spread) - 2 * cumulant(c) + cumulant(c - spread)) / spread**2, 1e-12)
    step = min(2.0 * math.pi * c / 60.0, 0.5 / math.sqrt(curvature))
    y: NDArray[np.float64] = np.empty(0)
    logs: NDArray[np.complex128] = np.empty(0, dtype=np.complex128)
    base = cumulant(c)
    count = 64
    while True:
        fresh = step * np.arange(len(y), count)
        y = np.concatenate([y, fresh])
        logs = np.concatenate(
            [logs, _log_moment(groups, np.asarray(c + 1j * fresh, dtype=np.complex128), removed)]
        )
        # The rest of the integral, if it decays no faster than 1 / y^2 from here, against its first point.
        last = math.exp(float(logs[-8:].real.max()) - base)
        if last * c * (c + 1.0) / (y[-1] * step) < RELATIVE_ERROR:
            break
        if count >= _MAX_POINTS:
            raise _SlowIntegralError
        count *= 2
    s = c + 1j * y
    weights = np.exp(logs - base) / (s * (s + 1.0))
    weights[0] *= 0.5

    def curve(epsilon: float) -> float:
        scale = base - c * epsilon
        total = float((weights * np.exp(-1j * y * epsilon)).real.sum())
        return step / math.pi * math.exp(scale) * total

    return curve


def _log_moment(groups: Groups, s: NDArray[np.complex128], removed: bool) -> NDArray[np.complex128]:
    """log M(s), up to multiples of 2 pi i."""
    u = s + 1.0 if removed else -s
    total = np.zeros(len(s), dtype=np.complex128)
    for rate, sigma, steps in groups:
        if rate == 1:
            total += steps * (u * u - u) / (2.0 * sigma**2)
        else:
            total += steps * _log_sampled(u, rate, sigma)
    return total


def _log_sampled(u: NDArray[np.complex128], rate: float, sigma: float) -> NDArray[np.complex128]:
    """log A(u) of one sampled step: trapezoidal rule on the real line, all u with one real part."""
    real = float(u[0].real)
    fastest = float(np.abs(u.imag).max())
    spacing = min(sigma / 16.0, sigma**2 / max(fastest, 1e-9))
    if (abs(real) + 24.0 * sigma) / spacing > _MAX_NODES:
        raise _SlowIntegralError
    x = np.arange(min(0.0, real) - 12.0 * sigma, max(0.0, real) + 12.0 * sigma, spacing)
    exponent = (2.0 * x - 1.0) / (2.0 * sigma**2)
    loss = np.logaddexp(math.log1p(-rate), math.log(rate) + exponent)
    density = -0.5 * (x / sigma) ** 2 + math.log(spacing / (sigma * math.sqrt(2.0 * math.pi)))
    tilted = density + real * loss
    norm = float(logsumexp(tilted))
    weights = np.exp(tilted - norm)
    kept = weights > 1e-22
    weights, loss = weights[kept], loss[kept]
    result = np.empty(len(u), dtype=np.complex128)
    chunk = max(1, _CHUNK // len(loss))
    for start in range(0, len(u), chunk):
        imaginary = u[start : start + chunk].imag
        result[start : start + chunk] = np.exp(1j * imaginary[:, None] * loss[None, :]) @ weights
    return np.asarray(np.log(result) + norm, dtype=np.complex128)
