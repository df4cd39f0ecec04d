"""How far two sets of scans lie apart, with intervals, and what distance real scans have among themselves.

All distances grow smaller with more scans, and none is zero for finite sets. So beside each stands its floor:
the same distance between the real scans and as many other real scans as there are synthetic ones (or the
other way round). Intervals are percentile bootstraps over scans on both sides (Efron and Tibshirani 1993,
chapter 13), fixed seed: they tell how far other scans of the same kind would move the figure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from monai.metrics.regression import compute_ms_ssim
from numpy.typing import NDArray
from scipy.stats import wasserstein_distance

FloatArray = NDArray[np.float64]
DistanceOfSets = Callable[[FloatArray, FloatArray], float]

BOOTSTRAP_DRAWS = 400
FLOOR_DRAWS = 100
HISTOGRAM_BINS = 64
MS_SSIM_WEIGHTS = (0.0710, 0.4530, 0.4760)
"""The first three of Wang et al. (2003), scaled to sum 1: small grids have no more scales."""
MAX_PAIRS = 200


@dataclass(frozen=True, kw_only=True)
class SetDistance:
    """A distance of synthetic from real scans.

    Attributes:
        name, unit: What was measured.
        value: The distance.
        low, high: Ends of its 95% interval.
        floor: The same among real scans alone, the mean over draws; None where there are too few.
        n_real, n_synthetic: How many scans stood on each side.
    """

    name: str
    unit: str
    value: float
    low: float
    high: float
    floor: float | None
    n_real: int
    n_synthetic: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def set_distance(
    name: str,
    unit: str,
    distance: DistanceOfSets,
    *,
    real: FloatArray,
    synthetic: FloatArray,
    other_real: FloatArray | None = None,
    seed: int = 0,
) -> SetDistance:
    """Measure ``distance(real, synthetic)`` with its interval and floor; rows are scans.

    Args:
        other_real: Further real scans of other patients; the floor compares ``real`` with as many of them as
            there are synthetic ones, the synthetic ones cut to that number where there are more.
    """
    rng = np.random.default_rng(seed)
    n = len(synthetic)
    floor = None
    if other_real is not None and len(other_real) >= 2:
        n = min(n, len(other_real))
        times = 1 if n == len(other_real) else FLOOR_DRAWS
        draws = [other_real[rng.choice(len(other_real), n, replace=False)] for _ in range(times)]
        floor = float(np.mean([distance(real, drawn) for drawn in draws]))
    synthetic = synthetic[:n]
    resampled = [
        distance(real[rng.integers(0, len(real), len(real))], synthetic[rng.integers(0, n, n)])
        for _ in range(BOOTSTRAP_DRAWS)
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return SetDistance(
        name=name,
        unit=unit,
        value=float(distance(real, synthetic)),
        low=float(low),
        high=float(high),
        floor=floor,
        n_real=len(real),
        n_synthetic=n,
    )


def volume_distance(real_N: FloatArray, synthetic_M: FloatArray) -> float:
    """Wasserstein-1 distance of two sets of numbers, in their unit."""
    return float(wasserstein_distance(real_N, synthetic_M))


def histogram_distance(real_NB: FloatArray, synthetic_MB: FloatArray) -> float:
    """Wasserstein-1 distance of mean histograms over [0, 1]: the least mean shift that makes them equal."""
    apart = np.cumsum(real_NB.mean(axis=0) - synthetic_MB.mean(axis=0))
    return float(np.abs(apart).sum() / real_NB.shape[1])


def intensity_histogram(values: NDArray[np.float32]) -> FloatArray:
    """Shares of intensities in :data:`HISTOGRAM_BINS` bins of [0, 1]; zeros where there are none."""
    counts, _ = np.histogram(values, bins=HISTOGRAM_BINS, range=(0.0, 1.0))
    shares: FloatArray = counts / max(1, int(counts.sum()))
    return shares


def kernel_distance(real_NE: FloatArray, synthetic_ME: FloatArray) -> float:
    """Squared maximum mean discrepancy, unbiased, kernel (x . y + 1)^3 on unit vectors.

    The estimator of KID (Binkowski et al., ICLR 2018) in an embedding of our own: not comparable with
    published KIDs. May come out negative. Rows that stand twice (a bootstrap's) do not count as pairs.
    """

    def within(x_NE: FloatArray) -> float:
        kernel = (x_NE @ x_NE.T + 1.0) ** 3
        same = (x_NE[:, None] == x_NE[None]).all(axis=2)
        return float(kernel[~same].mean()) if (~same).any() else 8.0

    between = (real_NE @ synthetic_ME.T + 1.0) ** 3
    return within(real_NE) + within(synthetic_ME) - 2.0 * float(between.mean())


def frechet_distance(real_NSC: FloatArray, synthetic_MSC: FloatArray) -> float:
    """Frechet distance of normal distributions fitted to two sets of slices (Heusel et al., NeurIPS 2017).

    |m - n|^2 + tr(A + B - 2 (A B)^(1/2)) with means m, n and covariances A, B of all slices of all scans, in
    features of our own: not comparable with published FIDs, and larger for fewer scans. Read its floor.
    """
    real, synthetic = (x.reshape(-1, x.shape[-1]) for x in (real_NSC, synthetic_MSC))
    a, b = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (real, synthetic))
    values, vectors = np.linalg.eigh(a)
    root_a = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    shared = np.linalg.eigvalsh(root_a @ b @ root_a).clip(min=0.0)
    apart = float(np.square(real.mean(axis=0) - synthetic.mean(axis=0)).sum())
    return apart + float(np.trace(a) + np.trace(b) - 2.0 * np.sqrt(shared).sum())


@dataclass(frozen=True, kw_only=True)
class Diversity:
    """Mean MS-SSIM of pairs of different scans, with a 95% interval: 1 is all alike, lower more diverse."""

    synthetic: float
    synthetic_low: float
    synthetic_high: float
    real: float | None
    pairs: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diversity(
    synthetic_NDHW: NDArray[np.float32], real_NDHW: NDArray[np.float32] | None, *, seed: int = 0
) -> Diversity:
    """MS-SSIM (Wang et al. 2003, as MONAI computes it) within synthetic scans, and within real ones."""
    values = _pair_similarities(synthetic_NDHW, seed)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (BOOTSTRAP_DRAWS, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    real = (
        None if real_NDHW is None or len(real_NDHW) < 2 else float(_pair_similarities(real_NDHW, seed).mean())
    )
    return Diversity(
        synthetic=float(values.mean()),
        synthetic_low=float(low),
        synthetic_high=float(high),
        real=real,
        pairs=len(values),
    )


def _pair_similarities(image_NDHW: NDArray[np.float32], seed: int) -> FloatArray:
    """MS-SSIM of all pairs, or of a drawn :data:`MAX_PAIRS` of them."""
    first, second = np.triu_indices(len(image_NDHW), k=1)
    if len(first) > MAX_PAIRS:
        chosen = np.sort(np.random.default_rng(seed).choice(len(first), MAX_PAIRS, replace=False))
        first, second = first[chosen], second[chosen]
    pieces = []
    for i in range(0, len(first), 25):
        one, other = (torch.from_numpy(image_NDHW[index[i : i + 25]])[:, None] for index in (first, second))
        pieces.append(
            compute_ms_ssim(
                one,
                other,
                spatial_dims=3,
                data_range=1.0,
                kernel_size=[5, 5, 5],
                kernel_sigma=[1.0, 1.0, 1.0],
                weights=MS_SSIM_WEIGHTS,
            )
        )
    return torch.cat(pieces).flatten().double().numpy()
