"""Privacy events, and the epsilon they add up to.

A ledger holds events; epsilons are computed from them, whenever somebody asks, by two accountants that share
no code: Google's ``dp-accounting`` (privacy loss distributions, with its Renyi accountant as a cross-check)
and, where every event has sampling rate 1, the closed form of the Gaussian mechanism (Balle and Wang, ICML
2018, Theorem 8), mu = sqrt(sum of steps / sigma^2) (Dong, Roth, Su 2022, Corollary 3.3); where one has not,
the contour integral of :mod:`privacy.dp.saddle_point`. The larger of the tight figures counts. For sampling
rates below 1 the agent also holds Opacus' accountant against these before it starts, see
:mod:`privacy.dp.second_accountant`.

Neighbouring relation: one patient added or removed, all of the patient's scans at the site at once.

This module imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import dp_accounting
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.optimize import brentq
from scipy.special import log_ndtr

from privacy.dp.saddle_point import saddle_point_epsilon
from shared.errors import InternalError, MalformedMessageError, UsageError

View = Literal["world", "all_others_collude"]
"""``world``: the server, c sites and everybody else, whose noise the honest t - c shares hide.
``all_others_collude``: every other site and the server pool what they have; one share of noise is left."""

EventKind = Literal["gaussian/v1", "unprotected/v1"]

TIGHT_TOLERANCE = 2e-3
"""Relative difference allowed between PLD and closed form or contour integral (plus 1e-3 absolute, for
epsilons near zero)."""

RDP_BELOW_TOLERANCE = 1e-3
RDP_ABOVE = (1.5, 0.3)
RDP_ABOVE_SAMPLED = (4.0, 4.0)
"""The Renyi figure is an upper bound, so it is at least (1 - 1e-3) times the tight one; and at most this
factor of it plus this offset. Below sampling rate 1 it is so loose at few steps and small rates (2.3 where
the truth is 0.04) that it catches gross errors only; the contour integral is the tight second there."""

_MAX_STEPS = 10**9
_RDP_ORDERS = (
    [1 + k / 50 for k in range(1, 50)]
    + [2 + k / 10 for k in range(40)]
    + [float(k) for k in range(6, 64)]
    + [float(2**k) for k in range(6, 16)]
)
_RDP_ORDERS_SAMPLED = [float(k) for k in range(2, 64)] + [float(2**k) for k in range(6, 11)]


class AccountantsDisagreeError(InternalError):
    """Two accountants give figures further apart than their stated tolerance. No figure is reported."""


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """What one charged attempt spends. The meaning of a kind never changes; new kinds are added.

    ``gaussian/v1``: ``steps`` adaptive uses of a mechanism that includes each patient with probability
    ``sampling_rate`` and is, up to ``max_divergence`` over all its steps together, a post-processing of a
    Gaussian mechanism with the given noise multipliers (standard deviation over L2 sensitivity).
    ``unprotected/v1``: no guarantee at all; the numbers are 0.
    """

    kind: EventKind
    sampling_rate: float
    steps: int
    noise_multiplier_world: float
    noise_multiplier_colluding: float
    max_divergence: float = 0.0

    def __post_init__(self) -> None:
        if self.kind == "unprotected/v1":
            return
        if self.kind != "gaussian/v1":
            raise UsageError(f"unknown kind of privacy event {self.kind!r}")
        if not 0 < self.sampling_rate <= 1 or not 1 <= self.steps <= _MAX_STEPS:
            raise UsageError("a privacy event has a sampling rate in (0, 1] and at least one step")
        for value in (self.noise_multiplier_world, self.noise_multiplier_colluding):
            if not 0 < value < math.inf:
                raise UsageError("a Gaussian privacy event has noise multipliers above 0")
        if not 0 <= self.max_divergence < math.inf:
            raise UsageError("a privacy event's max_divergence is a number of at least 0")

    @classmethod
    def unprotected(cls) -> PrivacyEvent:
        """An attempt without protection: its epsilon is infinite."""
        return cls(
            kind="unprotected/v1",
            sampling_rate=1.0,
            steps=1,
            noise_multiplier_world=0.0,
            noise_multiplier_colluding=0.0,
        )

    def noise_multiplier(self, view: View) -> float:
        """Standard deviation over sensitivity, as ``view`` sees it."""
        return self.noise_multiplier_world if view == "world" else self.noise_multiplier_colluding

    def to_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps,
            "noise_multiplier_world": self.noise_multiplier_world,
            "noise_multiplier_colluding": self.noise_multiplier_colluding,
            "max_divergence": self.max_divergence,
        }

    @classmethod
    def from_dict(cls, value: Any) -> PrivacyEvent:
        """Parse :meth:`to_dict`'s form. Raises MalformedMessageError for anything else."""
        names = {
            "kind", "sampling_rate", "steps", "noise_multiplier_world",
            "noise_multiplier_colluding", "max_divergence",
        }  # fmt: skip
        if not isinstance(value, dict) or set(value) != names:
            raise MalformedMessageError("a privacy event has other fields than it must have")
        numbers = {name: value[name] for name in names - {"kind", "steps"}}
        if any(isinstance(x, bool) or not isinstance(x, int | float) for x in numbers.values()):
            raise MalformedMessageError("a privacy event's numbers are not numbers")
        if isinstance(value["steps"], bool) or not isinstance(value["steps"], int):
            raise MalformedMessageError("a privacy event's steps are not an integer")
        try:
            event = cls(kind=value["kind"], steps=value["steps"], **{k: float(v) for k, v in numbers.items()})
        except (UsageError, OverflowError) as error:
            raise MalformedMessageError(str(error)) from error
        if event.kind == "unprotected/v1" and event != cls.unprotected():
            raise MalformedMessageError("an unprotected event carries no numbers")
        return event


@dataclass(frozen=True, kw_only=True)
class EpsilonReport:
    """Epsilon at ``delta`` by each accountant; ``reported`` is the larger of the tight ones.

    ``closed_form`` and ``mu`` are None where an event has a sampling rate below 1, ``saddle_point`` where
    none has (or where it cannot be had: :func:`privacy.dp.saddle_point.saddle_point_epsilon`). All epsilons
    are infinite where an event is unprotected.
    """

    view: View
    delta: float
    n_events: int
    pld: float
    rdp: float
    closed_form: float | None
    mu: float | None
    reported: float
    saddle_point: float | None = None

    @property
    def second(self) -> float | None:
        """The tight figure beside ``pld``: closed form or contour integral."""
        return self.closed_form if self.closed_form is not None else self.saddle_point


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta of a Gaussian mechanism with sensitivity over deviation ``mu`` (Balle and Wang 2018, Thm 8)."""
    if mu == 0:
        return 0.0
    log_first = float(log_ndtr(mu / 2 - epsilon / mu))
    log_second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    if log_second >= log_first:
        return 0.0
    return math.exp(log_first) * -math.expm1(log_second - log_first)


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Smallest epsilon with ``gaussian_delta(epsilon, mu) <= delta``."""
    if gaussian_delta(0.0, mu) <= delta:
        return 0.0
    high = 1.0
    while gaussian_delta(high, mu) > delta:
        high *= 2.0
    root = brentq(lambda e: gaussian_delta(e, mu) - delta, 0.0, high, xtol=1e-12, rtol=1e-12)
    return float(root)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Largest mu with ``gaussian_delta(epsilon, mu) <= delta``. Raises UsageError: delta is not in (0, 1)."""
    if not 0 < delta < 1:
        raise UsageError(f"delta {delta:g} is not between 0 and 1")
    high = 1.0
    while gaussian_delta(epsilon, high) <= delta:
        high *= 2.0
    root = brentq(lambda m: gaussian_delta(epsilon, m) - delta, 1e-12, high, xtol=1e-14, rtol=1e-12)
    return float(root)


def epsilon(events: Iterable[PrivacyEvent], delta: float, *, view: View = "world") -> EpsilonReport:
    """Epsilon, at ``delta``, of all ``events`` together (adaptive composition, any order).

    Formal guarantee: for one patient of one site, everything released in these attempts to the observer
    ``view`` is (reported, delta)-DP under adding or removing that patient, if the events describe it truly.

    Raises:
        UsageError: delta is not in (0, 1).
        AccountantsDisagreeError: the accountants differ by more than the tolerances of this module.
    """
    if not 0 < delta < 1:
        raise UsageError(f"delta {delta:g} is not between 0 and 1")
    counts: dict[tuple[float, float], int] = {}
    divergence = 0.0
    n_events = 0
    unprotected = False
    for event in events:
        n_events += 1
        if event.kind == "unprotected/v1":
            unprotected = True
            continue
        group = (event.sampling_rate, event.noise_multiplier(view))
        counts[group] = counts.get(group, 0) + event.steps
        divergence += event.max_divergence
    if unprotected:
        return EpsilonReport(
            view=view, delta=delta, n_events=n_events,
            pld=math.inf, rdp=math.inf, closed_form=math.inf, mu=math.inf, reported=math.inf,
        )  # fmt: skip
    if not counts:
        return EpsilonReport(
            view=view, delta=delta, n_events=0, pld=0.0, rdp=0.0, closed_form=0.0, mu=0.0, reported=0.0
        )
    groups = tuple(sorted((q, sigma, steps) for (q, sigma), steps in counts.items()))
    pld, rdp, closed, mu, saddle = _compose(groups, delta * math.exp(-divergence))
    extra = 2.0 * divergence
    reported = max(figure for figure in (pld, closed, saddle) if figure is not None)
    return EpsilonReport(
        view=view, delta=delta, n_events=n_events, pld=pld + extra, rdp=rdp + extra,
        closed_form=None if closed is None else closed + extra, mu=mu, reported=reported + extra,
        saddle_point=None if saddle is None else saddle + extra,
    )  # fmt: skip


@lru_cache(maxsize=4096)
def _compose(
    groups: tuple[tuple[float, float, int], ...], delta: float
) -> tuple[float, float, float | None, float | None, float | None]:
    """(pld, rdp, closed form, mu, contour integral) of (sampling rate, noise multiplier, steps) groups."""
    sampled = any(q < 1 for q, _, _ in groups)
    rdp_accountant = RdpAccountant(orders=_RDP_ORDERS_SAMPLED if sampled else _RDP_ORDERS)
    for q, sigma, steps in groups:
        rdp_accountant.compose(_dp_event(q, sigma), steps)
    rdp = max(0.0, float(rdp_accountant.get_epsilon(delta)))
    interval = min(max(rdp / 1e4, 1e-5), 1e6)
    pld_accountant = PLDAccountant(value_discretization_interval=interval)
    for q, sigma, steps in groups:
        pld_accountant.compose(_dp_event(q, sigma), steps)
    pld = float(pld_accountant.get_epsilon(delta))
    mu = closed = saddle = None
    if sampled:
        second, name = saddle_point_epsilon(groups, delta), "contour integral"
        saddle = second
    else:
        mu = math.sqrt(math.fsum(steps / sigma**2 for _, sigma, steps in groups))
        second, name = gaussian_epsilon(mu, delta), "closed form"
        closed = second
    tight = pld if second is None else max(pld, second)
    if second is not None and abs(second - pld) > TIGHT_TOLERANCE * tight + 1e-3:
        raise AccountantsDisagreeError(
            f"epsilon by privacy loss distribution is {pld:.6g}, by {name} {second:.6g}"
        )
    low = tight * (1 - RDP_BELOW_TOLERANCE) - 1e-3
    factor, offset = RDP_ABOVE_SAMPLED if sampled else RDP_ABOVE
    if not low <= rdp <= factor * tight + offset:
        raise AccountantsDisagreeError(
            f"epsilon by privacy loss distribution is {tight:.6g}, its Renyi bound {rdp:.6g}"
        )
    return pld, rdp, closed, mu, saddle


def _dp_event(sampling_rate: float, noise_multiplier: float) -> dp_accounting.DpEvent:
    gaussian = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_rate == 1:
        return gaussian
    return dp_accounting.PoissonSampledDpEvent(sampling_rate, gaussian)
