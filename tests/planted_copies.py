"""Copies of scans as a memorising generator might give them back, planted on purpose. No tests of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Volumes = tuple[Tensor, Tensor]
"""image_N1DHW in [0, 1] and mask_NDHW."""


def exact(volumes: Volumes, generator: torch.Generator) -> Volumes:
    return volumes


def mirrored(volumes: Volumes, generator: torch.Generator) -> Volumes:
    """Each along one of the three axes."""
    image, mask = volumes[0].clone(), volumes[1].clone()
    axis_N = torch.randint(3, (len(image),), generator=generator)
    for axis in range(3):
        own = axis_N == axis
        image[own], mask[own] = image[own].flip(2 + axis), mask[own].flip(1 + axis)
    return image, mask


def shifted(volumes: Volumes, generator: torch.Generator) -> Volumes:
    """Each by 2 voxels along every axis, either way; the border is repeated."""
    image, mask = volumes[0].clone(), volumes[1].clone()
    for axis in range(3):
        size = mask.shape[1 + axis]
        forth_N = torch.rand(len(image), generator=generator) < 0.5
        for by, own in ((2, forth_N), (-2, ~forth_N)):
            index = (torch.arange(size) - by).clamp(0, size - 1)
            image[own] = image[own].index_select(2 + axis, index)
            mask[own] = mask[own].index_select(1 + axis, index)
    return image, mask


def scaled(volumes: Volumes, generator: torch.Generator) -> Volumes:
    """Intensities times 0.75 or 1.25."""
    high_N = torch.rand(len(volumes[0]), generator=generator) < 0.5
    gain_N = torch.where(high_N, 1.25, 0.75).view(-1, 1, 1, 1, 1)
    return (volumes[0] * gain_N).clamp(0, 1), volumes[1]


def noised(volumes: Volumes, generator: torch.Generator) -> Volumes:
    """Gaussian noise of standard deviation 0.05 in the image."""
    noise = 0.05 * torch.randn(volumes[0].shape, generator=generator)
    return (volumes[0] + noise).clamp(0, 1), volumes[1]


def blended(volumes: Volumes, generator: torch.Generator) -> Volumes:
    """80% of the scan, 20% of the next patient's (give one scan a patient); the outline is the scan's own."""
    return 0.8 * volumes[0] + 0.2 * volumes[0].roll(1, 0), volumes[1]


KINDS: dict[str, Callable[[Volumes, torch.Generator], Volumes]] = {
    "exact": exact,
    "mirrored": mirrored,
    "shifted by 2 voxels": shifted,
    "intensity-scaled": scaled,
    "noised": noised,
    "blended 80/20": blended,
}
