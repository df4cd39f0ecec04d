"""AUC of an attack from pooled, noised histograms: estimate, interval, power. No torch.

Over all hospitals only histograms leave, and each cell carries integer noise of known variance. With
histograms m, h (members, held-out) over the bins and K[b, b'] = 1 if b > b', 1/2 if b = b', the estimate is

    A = m' K h / (sum m  sum h)

and for a hypothetical value a the statistic m' (K - a) h has mean zero if A = a, whatever the noise in the
totals (Fieller's device: nothing is divided by a noised number). Its variance is a sampling part (Newcombe's
score-type variance or DeLong's, the larger) and a noise part that covers the second order. The interval
consists of the values a that the test keeps; its coverage is checked by simulation in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from privacy.audit.bounds import FloatArray, Interval, auc_variance, invert_score_test
from shared.errors import UsageError

SMALLEST_GROUP = 4
"""Patients of a group below which no AUC is printed, pooled or at a site."""

_TOTAL_STANDARD_DEVIATIONS = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class NoisedHistograms:
    """Two histograms over the same bins, higher bins speaking for membership.

    Attributes:
        members_B, held_out_B: Cells in patients, with noise added; may be negative.
        members_std, held_out_std: Standard deviation of the noise in each cell, in patients.
    """

    members_B: FloatArray
    held_out_B: FloatArray
    members_std: float
    held_out_std: float

    def __post_init__(self) -> None:
        if self.members_B.ndim != 1 or self.members_B.shape != self.held_out_B.shape:
            raise UsageError("members and held-out histograms need the same bins")

    @property
    def n_members(self) -> float:
        """Noised number of members."""
        return float(self.members_B.sum())

    @property
    def n_held_out(self) -> float:
        """Noised number of held-out patients."""
        return float(self.held_out_B.sum())

    @property
    def carries_figure(self) -> bool:
        """False where noise or small numbers leave nothing to say: no figure is then printed."""
        bins = math.sqrt(self.members_B.size)
        return all(
            total >= SMALLEST_GROUP and total > _TOTAL_STANDARD_DEVIATIONS * std * bins
            for total, std in ((self.n_members, self.members_std), (self.n_held_out, self.held_out_std))
        )


def noised_histograms(
    members: ArrayLike, held_out: ArrayLike, *, members_std: float, held_out_std: float
) -> NoisedHistograms:
    """Histograms from any numbers, as float64."""
    return NoisedHistograms(
        members_B=np.asarray(members, dtype=np.float64),
        held_out_B=np.asarray(held_out, dtype=np.float64),
        members_std=float(members_std),
        held_out_std=float(held_out_std),
    )


def pooled_auc_interval(histograms: NoisedHistograms, *, error: float) -> Interval | None:
    """AUC with an interval for sampling and noise; each end errs with probability about ``error``.

    None where the noised totals cannot carry a figure.
    """
    if not histograms.carries_figure:
        return None
    estimate = _auc(histograms.members_B, histograms.held_out_B)
    low, high = invert_score_test(estimate, _variance_curve(histograms), z=float(stats.norm.isf(error)))
    return Interval(estimate=min(max(estimate, 0.0), 1.0), low=low, high=high, error=error)


def lies_above(histograms: NoisedHistograms, value: float, *, error: float) -> bool:
    """Whether the low end of :func:`pooled_auc_interval` is above ``value``, without the search for that end.

    False where the noised totals cannot carry a figure. For simulations, which ask it thousands of times.
    """
    if not histograms.carries_figure:
        return False
    excess = _auc(histograms.members_B, histograms.held_out_B) - value
    return excess > float(stats.norm.isf(error)) * math.sqrt(_variance_curve(histograms)(value))


def pooled_power(histograms: NoisedHistograms, *, true_auc: float, bound: float, error: float) -> float:
    """Probability that the interval's low end would exceed ``bound`` under an attack of AUC ``true_auc``.

    The held-out histogram places the bins' edges on a normal scale; members are then shifted by the distance
    that gives ``true_auc`` before binning. Bins too coarse for the scores (everybody in one of them) show as
    a lack of power, as do small numbers and noise. Cells are shrunk by one standard deviation of noise first,
    so that noise does not pass for resolution.
    """
    if not histograms.carries_figure:
        return 0.0
    cells_B = np.clip(histograms.held_out_B - histograms.held_out_std, 0.0, None)
    if cells_B.sum() <= 0.0:
        return 0.0
    n_held_out = histograms.n_held_out
    share_B = cells_B / cells_B.sum()
    # A cell seen empty may hold up to about one patient in n: the edges stay at finite places.
    cumulative = np.clip(np.cumsum(share_B)[:-1], 0.5 / n_held_out, 1.0 - 0.5 / n_held_out)
    edges = stats.norm.ppf(cumulative)
    return planned_power(
        edges=edges,
        n_members=histograms.n_members,
        n_held_out=n_held_out,
        members_std=histograms.members_std,
        held_out_std=histograms.held_out_std,
        true_auc=true_auc,
        bound=bound,
        error=error,
    )


def planned_power(
    *,
    edges: ArrayLike,
    n_members: float,
    n_held_out: float,
    members_std: float,
    held_out_std: float,
    true_auc: float,
    bound: float,
    error: float,
) -> float:
    """The same before any data: held-out scores N(0, 1), members N(shift, 1), bins at ``edges``.

    Args:
        edges: Bin edges in standard deviations of the held-out scores.
        members_std, held_out_std: Noise of one cell, in patients.
        true_auc: AUC of the attack without bins.
        bound: What the interval's low end has to exceed.
        error: Error of that end.
    """
    shift = math.sqrt(2.0) * float(stats.norm.ppf(true_auc))
    places = np.asarray(edges, dtype=np.float64)
    expected = noised_histograms(
        n_members * np.diff(stats.norm.cdf(places - shift), prepend=0.0, append=1.0),
        n_held_out * np.diff(stats.norm.cdf(places), prepend=0.0, append=1.0),
        members_std=members_std,
        held_out_std=held_out_std,
    )
    if not expected.carries_figure:
        return 0.0
    binned_auc = _auc(expected.members_B, expected.held_out_B)
    variance = _variance_curve(expected)
    z = float(stats.norm.isf(error))
    margin = binned_auc - bound - z * math.sqrt(variance(bound))
    spread = math.sqrt(variance(binned_auc))
    if spread == 0.0:
        return float(margin > 0)
    return float(stats.norm.cdf(margin / spread))


def _kernel(bins: int) -> FloatArray:
    return np.tril(np.ones((bins, bins)), -1) + 0.5 * np.eye(bins)


def _auc(members_B: FloatArray, held_out_B: FloatArray) -> float:
    return float(members_B @ _kernel(members_B.size) @ held_out_B / (members_B.sum() * held_out_B.sum()))


def _variance_curve(histograms: NoisedHistograms) -> Callable[[float], float]:
    """Variance of the estimate as a function of the true AUC: sampling and noise."""
    m_B, h_B = histograms.members_B, histograms.held_out_B
    n_m, n_h = histograms.n_members, histograms.n_held_out
    bins = m_B.size
    kernel_BB = _kernel(bins)
    v_m, v_h = histograms.members_std**2, histograms.held_out_std**2
    # v_m |(K - a) h|^2 + v_h |m' (K - a)|^2, as a polynomial in a. The noised cells inside these squares
    # contain the product term of second order twice, where once would do: it stays, against the skewness of
    # small samples.
    of_h, of_m = kernel_BB @ h_B, m_B @ kernel_BB
    constant = float(v_m * (of_h @ of_h) + v_h * (of_m @ of_m))
    linear = float(-2.0 * (v_m * n_h * of_h.sum() + v_h * n_m * of_m.sum()))
    square = float(bins * (v_m * n_h**2 + v_h * n_m**2))
    delong = _delong(m_B, h_B)
    scale = (n_m * n_h) ** 2

    def variance(value: float) -> float:
        noise = max(constant + value * (linear + value * square), 0.0)
        return noise / scale + max(auc_variance(value, n_m, n_h), delong)

    return variance


def _delong(members_B: FloatArray, held_out_B: FloatArray) -> float:
    m_B, h_B = np.clip(members_B, 0.0, None), np.clip(held_out_B, 0.0, None)
    n_m, n_h = m_B.sum(), h_B.sum()
    if n_m <= 1.0 or n_h <= 1.0:
        return 0.0
    kernel_BB = _kernel(m_B.size)
    of_members, of_held_out = kernel_BB @ h_B / n_h, m_B @ kernel_BB / n_m
    mean = float(m_B @ of_members / n_m)
    return float(
        m_B @ np.square(of_members - mean) / n_m / (n_m - 1.0)
        + h_B @ np.square(of_held_out - mean) / n_h / (n_h - 1.0)
    )
