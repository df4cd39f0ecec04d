"""Epsilon of a ledger's charges, computed apart from the accounting that the sites charge with.

Two accountants: Google's privacy loss distributions, and for sampling rate 1 the closed form of the Gaussian
mechanism (Balle and Wang, ICML 2018, Theorem 8, with mu added up in squares; Dong, Roth and Su 2022), else
the contour integral of :mod:`privacy.dp.saddle_point`, with Google's Renyi accountant as a bound from above.
They must agree; the larger of the tight figures counts.

The accountants of ``dp-accounting`` and that integral are common with :mod:`privacy.dp.accounting`; events
are read and added up here by code of its own, and tests hold the two against each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import optimize, stats

from privacy.compliance.dsse import EvidenceError
from privacy.compliance.ledger_check import ChargedEvent
from privacy.dp.saddle_point import saddle_point_epsilon

Observer = Literal["world", "colluding"]
SecondAccountant = Literal["closed form", "saddle point", "renyi"]
AGREEMENT = 0.01
"""Largest relative difference between privacy loss distributions and the second tight figure."""


@dataclass(frozen=True, kw_only=True)
class SpentEpsilon:
    """Epsilon at ``delta``; ``second`` is the closed form, or where a sampling rate is below 1 the contour
    integral (``saddle point``), or the Renyi bound where that cannot be had."""

    delta: float
    first: float
    second: float
    second_is: SecondAccountant
    reported: float

    def to_json(self) -> Any:
        """The reported figure for JSON: a number, or the word ``infinite``."""
        return self.reported if math.isfinite(self.reported) else "infinite"


def spent_epsilon(events: Iterable[ChargedEvent], *, delta: float, observer: Observer) -> SpentEpsilon:
    """Epsilon of all events together.

    Args:
        events: Charges of one site.
        delta: In (0, 1).
        observer: ``world``: everybody, up to max_colluding sites included; ``colluding``: all other sites.

    Raises:
        EvidenceError: the two accountants disagree; no figure is given.
    """
    steps: Counter[tuple[float, float]] = Counter()
    divergence = 0.0
    for event in events:
        if event.kind == "unprotected/v1":
            return SpentEpsilon(
                delta=delta, first=math.inf, second=math.inf, second_is="closed form", reported=math.inf
            )
        noise = event.noise_multiplier_world if observer == "world" else event.noise_multiplier_colluding
        steps[(event.sampling_rate, noise)] += event.steps
        divergence += event.max_divergence
    if not steps:
        return SpentEpsilon(delta=delta, first=0.0, second=0.0, second_is="closed form", reported=0.0)
    # Max-divergence of the integer noise from a Gaussian: e^D on delta, 2 D on epsilon.
    groups = tuple(sorted((rate, noise, count) for (rate, noise), count in steps.items()))
    first, second, name = _two_accountants(groups, delta * math.exp(-divergence))
    reported = first if name == "renyi" else max(first, second)
    extra = 2 * divergence
    return SpentEpsilon(
        delta=delta,
        first=float(first + extra),
        second=float(second + extra),
        second_is=name,
        reported=float(reported + extra),
    )


@lru_cache(maxsize=1024)
def _two_accountants(
    groups: tuple[tuple[float, float, int], ...], delta: float
) -> tuple[float, float, SecondAccountant]:
    """(PLD, the second figure, its name) of (rate, noise multiplier, steps) groups."""
    renyi = float(_compose(RdpAccountant(), groups).get_epsilon(delta))
    interval = min(max(renyi / 20_000, 1e-5), 1e6)
    first = float(_compose(PLDAccountant(value_discretization_interval=interval), groups).get_epsilon(delta))
    name: SecondAccountant = "closed form"
    if any(rate < 1 for rate, _, _ in groups):
        # Renyi is so loose at few steps and small rates that it catches gross errors alone.
        if not 0.99 * first - 1e-3 <= renyi <= 4.0 * first + 4.0:
            raise EvidenceError(f"two accountants disagree: epsilon {first:.6g}, Renyi bound {renyi:.6g}")
        saddle = saddle_point_epsilon(groups, delta)
        if saddle is None:
            return first, renyi, "renyi"
        second, name = saddle, "saddle point"
    else:
        mu = math.sqrt(math.fsum(count / noise**2 for _, noise, count in groups))
        second = gaussian_epsilon(mu, delta)
    if abs(first - second) > AGREEMENT * max(first, second) + 1e-3:
        raise EvidenceError(f"two accountants disagree: epsilon {first:.6g} and {second:.6g}")
    return first, second, name


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon at which a Gaussian mechanism with sensitivity over deviation mu has this delta."""

    def excess(epsilon: float) -> float:
        first = stats.norm.logcdf(mu / 2 - epsilon / mu)
        second = epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu)
        return float(math.exp(first) - math.exp(min(second, first))) - delta

    if excess(0.0) <= 0:
        return 0.0
    high = 1.0
    while excess(high) > 0:
        high *= 2
    return float(optimize.brentq(excess, 0.0, high, xtol=1e-10, rtol=1e-12))


def _compose(accountant: Any, groups: tuple[tuple[float, float, int], ...]) -> Any:
    for rate, noise, count in groups:
        event = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(event if rate == 1 else dp_accounting.PoissonSampledDpEvent(rate, event), count)
    return accountant
