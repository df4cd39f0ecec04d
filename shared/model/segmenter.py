"""A segmenter that never sees the generator: does a synthetic mask show what its image shows. Public.

A small U-Net (Ronneberger et al., MICCAI 2015, as MONAI builds it) finds the labels in an image alone. It is
trained on public volumes alone, apart from the generator, so that image and mask of a synthetic scan can be
held against each other: a generator that makes both together can make both wrong in the same way of its own,
but hardly in a way that a network of real scans agrees with. What agreement is enough is learned from public
patients that this training did not see (:class:`shared.volumes.plausibility.Agreement`).

Shape suffixes: B batch, K label values (background first), D H W voxels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from monai.networks.nets import UNet
from numpy.typing import NDArray
from torch import Tensor, nn

from shared.errors import UsageError
from shared.model.public_network import check_label_count, frozen, seeded_initialisation, standardised

CHANNELS = (16, 32, 64, 128)
_DIVISOR = 2 ** (len(CHANNELS) - 1)


class Segmenter(nn.Module):
    """Logits of labels from an image.

    The image is standardised (mean 0, standard deviation 1 over the volume), so gain and offset do not count.

    Args:
        n_labels: Number of mask labels, background not counted.
    """

    def __init__(self, *, n_labels: int) -> None:
        super().__init__()
        check_label_count(n_labels)
        self.n_labels = n_labels
        self.network = UNet(
            spatial_dims=3,
            in_channels=1,
            out_channels=1 + n_labels,
            channels=CHANNELS,
            strides=(2,) * (len(CHANNELS) - 1),
            num_res_units=1,
        )

    def forward(self, image_B1DHW: Tensor) -> Tensor:
        """Logits, float [B, K, D, H, W].

        Raises:
            UsageError: an edge of the grid is no multiple of 8.
        """
        if any(side % _DIVISOR for side in image_B1DHW.shape[2:]):
            raise UsageError(
                f"grid {tuple(image_B1DHW.shape[2:])}: the segmenter needs multiples of {_DIVISOR}"
            )
        logits: Tensor = self.network(standardised(image_B1DHW))
        return logits

    @torch.no_grad()
    def segment(self, image_BDHW: NDArray[np.float32], *, batch_size: int = 16) -> NDArray[np.uint8]:
        """The most likely label of every voxel, mask_BDHW."""
        device = next(self.parameters()).device
        pieces = [
            self(torch.from_numpy(image_BDHW[i : i + batch_size])[:, None].to(device)).argmax(dim=1).cpu()
            for i in range(0, len(image_BDHW), batch_size)
        ]
        return torch.cat(pieces).numpy().astype(np.uint8)


def build_segmenter(*, n_labels: int, seed: int = 0) -> Segmenter:
    """A freshly initialised segmenter; initialisation depends on the public seed alone."""
    with seeded_initialisation(seed):
        return Segmenter(n_labels=n_labels)


def load_segmenter(path: Path | None, *, n_labels: int) -> Segmenter | None:
    """The segmenter of a file, frozen, in evaluation mode; None where there is none."""
    return None if path is None else frozen(build_segmenter(n_labels=n_labels), path)
