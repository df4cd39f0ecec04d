"""What did the hospitals add? Samples of the release beside samples of the public prior.

Both are made with the same seeds, sampler and autoencoder, so sample i differs by the private training
alone. The figure is the volume of chosen labels in the generated masks; its interval is a paired bootstrap
over samples (Efron and Tibshirani 1993, chapter 8), fixed seed. It describes two generators, not patients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.errors import UsageError
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.candidate import load_candidate, load_prior
from shared.model.denoiser import Denoiser
from shared.model.presets import preset_named
from shared.model.sampling import generate_volumes
from shared.model.weights import load_weights
from shared.plan_package import PlanPackage
from shared.volumes.contact_sheet import comparison_sheet

BOOTSTRAP_DRAWS = 2000
SHEET_SAMPLES = 4

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Mean volume of ``labels`` (mm3) in ``count`` samples of one condition, prior against candidate.

    ``low`` and ``high`` bound the mean difference, candidate minus prior, at 95%.
    """

    condition: str
    labels: tuple[str, ...]
    count: int
    prior_mm3: float
    candidate_mm3: float
    difference_mm3: float
    low: float
    high: float
    prior_empty: int
    candidate_empty: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "labels": list(self.labels), "excludes_zero": self.excludes_zero}


def compare_with_prior(
    package: PlanPackage,
    candidate: Path,
    *,
    condition: str,
    labels: tuple[str, ...],
    count: int,
    seed: int,
    sheet: Path | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Sample both generators and measure.

    Args:
        labels: Names of the mask labels whose volume is measured.
        sheet: Where to draw a picture of the first samples of both.

    Raises:
        UsageError: an unknown condition or label, or fewer than 2 samples.
    """
    plan = package.plan
    if condition not in plan.data.conditions:
        raise UsageError(f"no condition {condition!r}: the plan has {', '.join(plan.data.conditions)}")
    unknown = [name for name in labels if name not in plan.data.labels]
    if unknown or not labels:
        raise UsageError(f"no label {', '.join(unknown)!r}: the plan has {', '.join(plan.data.labels)}")
    if count < 2:
        raise UsageError("a comparison needs at least 2 samples")
    autoencoder = build_autoencoder(preset_named(plan.model.preset), n_labels=len(plan.data.labels))
    load_weights(autoencoder, package.autoencoder)
    autoencoder.eval()
    prior, _ = load_prior(plan, package.prior)
    values = [plan.data.labels.index(name) + 1 for name in labels]
    row = plan.data.conditions.index(condition)
    voxel_mm3 = float(np.prod(plan.data.spacing_mm))
    volumes: list[NDArray[np.float64]] = []
    pictures: list[tuple[str, list[NDArray[np.float32]], list[NDArray[np.uint8]]]] = []
    networks: list[tuple[str, Denoiser]] = [
        (f"Public prior, {condition}", prior.eval()),
        (f"After private training, {condition}", load_candidate(plan, candidate)),
    ]
    for heading, denoiser in networks:
        measured, images, masks = _sample(
            autoencoder, denoiser, plan.data.grid_shape, row, values, count, seed,
            steps=plan.model.sampling_steps, guidance=plan.model.guidance_scale,
            report=partial(_report, progress, heading, count),
        )  # fmt: skip
        volumes.append(measured * voxel_mm3)
        pictures.append((heading, images, masks))
    if sheet is not None:
        comparison_sheet(
            pictures,
            sheet,
            title=f"{plan.study_id}: what the hospitals added",
            labels=plan.data.labels,
            spacing_mm=plan.data.spacing_mm,
            badge="SYNTHETIC",
            subtitle="The same seeds before and after private training",
            focus=labels[0],
        )
    before, after = volumes
    low, high = _paired_interval(after - before)
    return Comparison(
        condition=condition,
        labels=labels,
        count=count,
        prior_mm3=float(before.mean()),
        candidate_mm3=float(after.mean()),
        difference_mm3=float((after - before).mean()),
        low=low,
        high=high,
        prior_empty=int((before == 0).sum()),
        candidate_empty=int((after == 0).sum()),
    )


def _sample(
    autoencoder: LatentAutoencoder,
    denoiser: Denoiser,
    grid_shape: tuple[int, int, int],
    condition: int,
    values: list[int],
    count: int,
    seed: int,
    *,
    steps: int,
    guidance: float,
    report: Callable[[int], None],
) -> tuple[NDArray[np.float64], list[NDArray[np.float32]], list[NDArray[np.uint8]]]:
    voxels = np.zeros(count)
    images: list[NDArray[np.float32]] = []
    masks: list[NDArray[np.uint8]] = []
    samples = generate_volumes(
        autoencoder, denoiser, condition=condition, count=count, seed=seed, grid_shape=grid_shape,
        steps=steps, guidance_scale=guidance,
    )  # fmt: skip
    for index, (image_DHW, mask_DHW) in enumerate(samples):
        mask = mask_DHW.numpy()
        voxels[index] = np.isin(mask, values).sum()
        if index < SHEET_SAMPLES:
            images.append(image_DHW.numpy())
            masks.append(mask)
        report(index + 1)
    return voxels, images, masks


def _report(progress: Progress | None, heading: str, count: int, done: int) -> None:
    if progress is not None:
        progress(heading, done, count)


def _paired_interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(differences), size=(BOOTSTRAP_DRAWS, len(differences)))
    low, high = np.quantile(differences[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
