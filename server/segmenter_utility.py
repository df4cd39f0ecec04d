"""What a release teaches: a segmenter trained on synthetic scans alone, tested on real PUBLIC ones.

The same network, schedule and augmentation (movement, gain, blur, noise) for every training set; only the
scans differ. Synthetic scans are smooth, and without blur and noise a segmenter learns to expect that. A
generator that replays its training patients teaches well, too: read the copies beside these figures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from server.pretrain import PublicVolume
from server.public_segmenter import SEGMENTER_AUGMENTATION, SEGMENTER_DISGUISES
from shared.model.segmenter import build_segmenter
from shared.model.training import TrainingSchedule, train_segmenter
from shared.volumes.plausibility import label_dice

ImagesAndMasks = tuple[NDArray[np.float32], NDArray[np.uint8]]
Progress = Callable[[str, int, int], None]

BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class SegmenterScore:
    """Overlap with the masks of held-out public scans.

    Attributes:
        trained_on: Words for the training set.
        n_scans: How many scans are in it.
        label: Of which label.
        dice: Mean over patients of a patient's mean over scans.
        low, high: Ends of its 95% interval, a bootstrap over patients; training anew is not in it.
    """

    trained_on: str
    n_scans: int
    label: str
    dice: float
    low: float
    high: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def segmenter_scores(
    synthetic: ImagesAndMasks,
    *,
    further: Sequence[PublicVolume],
    held_out: Sequence[PublicVolume],
    labels: Sequence[str],
    schedule: TrainingSchedule,
    device: str = "cpu",
    progress: Progress | None = None,
) -> tuple[SegmenterScore, ...]:
    """Train on synthetic scans, on public ones and on both; test each on other public patients.

    Args:
        synthetic: image_NDHW in [0, 1] and mask_NDHW.
        further: Public scans to train on, of no patient in ``held_out``; none leaves out what needs them.
        held_out: Public scans to test on.

    Returns:
        One score for each training set and label.
    """
    sets = {"synthetic scans": synthetic}
    if further:
        sets["public scans"] = real = stacked(further)
        sets["both"] = _joined(synthetic, real)
    sizes = {"both": len(synthetic[0]) + len(further)}
    tested, _ = stacked(held_out)
    scores = []
    for name, (images, masks) in sets.items():
        image_N1DHW, mask_NDHW = torch.from_numpy(images)[:, None], torch.from_numpy(masks)
        segmenter = build_segmenter(n_labels=len(labels), seed=schedule.seed).to(device)
        train_segmenter(
            segmenter, image_N1DHW, image_N1DHW, mask_NDHW, schedule=schedule,
            augmentation=SEGMENTER_AUGMENTATION, disguises=SEGMENTER_DISGUISES,
            progress=_steps(f"segmenter on {name}", progress),
        )  # fmt: skip
        found = segmenter.eval().segment(tested)
        rows = [label_dice(v.mask, seen, labels) for v, seen in zip(held_out, found, strict=True)]
        for label in labels:
            mean, low, high = _by_patient(
                [v.patient_id for v in held_out], np.array([row[label] for row in rows])
            )
            scores.append(
                SegmenterScore(
                    trained_on=name, n_scans=sizes.get(name, len(images)), label=label, dice=mean, low=low,
                    high=high,
                )
            )  # fmt: skip
    return tuple(scores)


def stacked(volumes: Sequence[PublicVolume]) -> ImagesAndMasks:
    """image_NDHW and mask_NDHW of public scans."""
    return np.stack([volume.image for volume in volumes]), np.stack([volume.mask for volume in volumes])


def _joined(one: ImagesAndMasks, other: ImagesAndMasks) -> ImagesAndMasks:
    """Both, the smaller set repeated until it weighs about as much."""
    n = max(len(one[0]), len(other[0]))
    rows = [np.repeat(np.arange(len(part[0])), max(1, round(n / len(part[0])))) for part in (one, other)]
    images = np.concatenate([one[0][rows[0]], other[0][rows[1]]])
    masks = np.concatenate([one[1][rows[0]], other[1][rows[1]]])
    return images, masks


def _by_patient(patient_ids: Sequence[str], dice_N: NDArray[np.float64]) -> tuple[float, float, float]:
    ids = np.array(patient_ids)
    mean_P = np.array([dice_N[ids == patient].mean() for patient in dict.fromkeys(patient_ids)])
    rng = np.random.default_rng(0)
    drawn = mean_P[rng.integers(0, len(mean_P), (BOOTSTRAP_DRAWS, len(mean_P)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(mean_P.mean()), float(low), float(high)


def _steps(name: str, progress: Progress | None) -> Callable[[str, int, int, float], None] | None:
    if progress is None:
        return None
    return lambda _stage, step, steps, _loss: progress(name, step, steps)
