"""The public segmenter that synthetic masks are held against, and how much agreement is enough.

It trains on public volumes alone, both as they are and as the autoencoder shows them (whose output is
smoother than scans are); the least agreement is learned from the public patients that are held out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shared.checkpoint import file_sha256
from shared.model.copy_embedding import Disguise
from shared.model.segmenter import build_segmenter, load_segmenter
from shared.model.training import (
    Augmentation,
    Progress,
    TrainingSchedule,
    train_segmenter,
)
from shared.model.weights import save_weights
from shared.volumes.plausibility import Agreement, learn_agreement

SEGMENTER_AUGMENTATION = Augmentation(flip_axes=(), zoom=(0.85, 1.2), stretch=0.05, shift=0.08)
SEGMENTER_DISGUISES = Disguise(shift=0, blend=0.0, blur=0.3, noise=0.1)


def default_segmenter_schedule(*, seed: int) -> TrainingSchedule:
    """About a minute on one core for preset ``tiny``."""
    return TrainingSchedule(steps=300, batch_size=8, learning_rate=3e-3, seed=seed, ema_decay=0.98)


def pretrain_segmenter(
    path: Path,
    scans: tuple[Tensor, Tensor],
    shown: tuple[Tensor, Tensor],
    held_out_N: Tensor,
    *,
    labels: Sequence[str],
    schedule: TrainingSchedule,
    augmentation: Augmentation,
    disguises: Disguise,
    metadata: dict[str, str],
    device: str = "cpu",
    progress: Progress | None = None,
    state_path: Path | None = None,
) -> Agreement:
    """Train on the public volumes that are not held out, write the weights, and learn from the others.

    Args:
        path: Receives the weights (half precision); what is learned is about those.
        scans: image_N1DHW in [0, 1] and mask_NDHW of all public volumes.
        shown: The same, encoded and decoded.
        held_out_N: Which volumes are of held-out patients, bool.
        metadata: Goes into the file.
    """
    (image_N1DHW, mask_NDHW), (shown_N1DHW, drawn_NDHW) = scans, shown
    segmenter = build_segmenter(n_labels=len(labels), seed=schedule.seed).to(device)
    train_segmenter(
        segmenter,
        image_N1DHW[~held_out_N],
        shown_N1DHW[~held_out_N],
        mask_NDHW[~held_out_N],
        schedule=schedule,
        augmentation=augmentation,
        disguises=disguises,
        progress=progress,
        state_path=state_path,
    )
    save_weights(segmenter, path, {**metadata, "network": "segmenter"}, half=True)
    kept = load_segmenter(path, n_labels=len(labels))
    assert kept is not None
    images = torch.cat([image_N1DHW[held_out_N], shown_N1DHW[held_out_N]])[:, 0].numpy()
    masks = torch.cat([mask_NDHW[held_out_N], drawn_NDHW[held_out_N].to(mask_NDHW.dtype)]).numpy()
    found = kept.to(device).segment(images.astype(np.float32))
    return learn_agreement(zip(masks, found, strict=True), labels=labels, segmenter_sha256=file_sha256(path))
