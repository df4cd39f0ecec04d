"""An embedding in which a copy of a scan stays near that scan and other patients are far. Public.

A small 3D network maps a volume to a unit vector. It is trained on public volumes alone by contrasting two
random disguises of the same scan with other scans (normalised temperature-scaled cross-entropy, Chen et al.,
ICML 2020; in the place of photographs' colour jitter the disguises are those of a memorising generator:
shift, gain, noise, a share of another patient). Mirror images are not learned: whoever compares embeds the
eight mirrored views of one side (:func:`mirrored`), which makes them exact.

What the audit does with it is in :mod:`privacy.audit.copies`; its threshold is calibrated on public patients
that this training did not see.

Shape suffixes: B batch, E embedding, V views, D H W voxels.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UsageError
from shared.model.autoencoder import space_to_depth
from shared.model.public_network import check_label_count, frozen, seeded_initialisation, standardised

EMBEDDING_SIZE = 128
CHANNELS = (32, 64, 64)
_EDGE = 2
_POOLED = 3
MIRRORS = tuple(axes for n in range(4) for axes in itertools.combinations((0, 1, 2), n))
"""The spatial axes of each of the eight mirrored views; the first is the volume as it is."""


class CopyEmbedding(nn.Module):
    """Unit vectors of volumes; nearness is Euclidean distance, 0 to 2.

    The image is standardised (mean 0, standard deviation 1 over the volume), so gain and offset do not count.

    Args:
        n_labels: Number of mask labels, background not counted.
    """

    def __init__(self, *, n_labels: int) -> None:
        super().__init__()
        check_label_count(n_labels)
        self.n_labels = n_labels
        widths = ((1 + n_labels) * _EDGE**3, *CHANNELS)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(itertools.pairwise(widths)):
            layers += [
                nn.Conv3d(before, after, 3, padding=1, stride=2 if index == 1 else 1),
                nn.GroupNorm(8, after),
                nn.SiLU(),
            ]
        self.network = nn.Sequential(*layers)
        self.head = nn.Linear(CHANNELS[-1] * _POOLED**3, EMBEDDING_SIZE)

    def forward(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor:
        """Unit vectors, float [B, E].

        Args:
            image_B1DHW: Floating point, any scale.
            mask_BDHW: Integer labels, 0 (background) to ``n_labels``; or, for blends, float shares of each
                label above background, [B, K, D, H, W].

        Raises:
            UsageError: an edge of the grid is odd.
        """
        maps = self._maps(image_B1DHW, mask_BDHW)
        return F.normalize(self.head(F.adaptive_avg_pool3d(maps, _POOLED).flatten(1)), dim=1)

    def plane_features(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of slices: the last layer's maps, averaged over each plane; [B, slices, channels].

        The planes are those across D, H and W. Arguments and errors as in :meth:`forward`.
        """
        maps = self._maps(image_B1DHW, mask_BDHW)
        across_d, across_h, across_w = (
            maps.mean(dim=tuple(other for other in (2, 3, 4) if other != axis)).movedim(1, 2)
            for axis in (2, 3, 4)
        )
        return across_d, across_h, across_w

    def _maps(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor:
        if any(side % _EDGE for side in image_B1DHW.shape[2:]):
            raise UsageError(f"grid {tuple(image_B1DHW.shape[2:])}: the copy embedding needs even edges")
        x = torch.cat([standardised(image_B1DHW), self.label_shares(mask_BDHW).to(image_B1DHW.dtype)], dim=1)
        maps: Tensor = self.network(space_to_depth(x, _EDGE))
        return maps

    def label_shares(self, mask: Tensor) -> Tensor:
        """One channel for each label above background, [B, K, D, H, W]."""
        if mask.ndim == 5:
            return mask
        return F.one_hot(mask.long(), self.n_labels + 1).movedim(-1, 1)[:, 1:]


def mirrored(image_B1DHW: Tensor, mask_BDHW: Tensor) -> tuple[Tensor, Tensor]:
    """The eight mirrored views of each volume, [B * 8, ...]: those of volume i in rows 8 i to 8 i + 7."""
    images = [image_B1DHW.flip([2 + axis for axis in axes]) for axes in MIRRORS]
    masks = [mask_BDHW.flip([1 + axis for axis in axes]) for axes in MIRRORS]
    return torch.stack(images, 1).flatten(0, 1), torch.stack(masks, 1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Disguise:
    """What a copy may have been through and still be a copy.

    Attributes:
        shift: Largest translation in voxels along each axis.
        gain: Range of the image's gain; clipped to [0, 1] afterwards, as a generator's output is.
        noise: Largest standard deviation of added Gaussian noise.
        blend: Largest share of another patient's volume.
        blur: Share of volumes that are smoothed by a 3^3 mean.
    """

    shift: int = 3
    gain: tuple[float, float] = (0.7, 1.3)
    noise: float = 0.08
    blend: float = 0.25
    blur: float = 0.2


def disguise(
    image_B1DHW: Tensor,
    shares_BKDHW: Tensor,
    how: Disguise,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """One random disguise of each volume; the other patient of a blend is the next row of the batch.

    Args:
        image_B1DHW: In [0, 1].
        shares_BKDHW: Float shares of the labels (:meth:`CopyEmbedding.label_shares`).
    """
    b = image_B1DHW.shape[0]

    def uniform(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(b, generator=generator)).view(b, 1, 1, 1, 1)

    both = torch.cat([image_B1DHW, shares_BKDHW], dim=1)
    share = uniform(-how.blend, how.blend).clamp_min(0.0)
    both = (1 - share) * both + share * both.roll(1, 0)
    shifts = torch.randint(-how.shift, how.shift + 1, (b, 3), generator=generator).tolist()
    both = torch.stack([_shifted(volume, shift) for volume, shift in zip(both, shifts, strict=True)])
    image, shares = both[:, :1], both[:, 1:]
    smooth = F.avg_pool3d(image, 3, stride=1, padding=1, count_include_pad=False)
    image = torch.where(uniform(0, 1) < how.blur, smooth, image)
    noise = torch.randn(image.shape, generator=generator) * uniform(-how.noise, how.noise).clamp_min(0.0)
    return (image * uniform(*how.gain) + noise).clamp(0.0, 1.0), shares


def _shifted(volume_CDHW: Tensor, shift: list[int]) -> Tensor:
    """Moved by whole voxels; what comes in at the border repeats the border."""
    for axis, n in enumerate(shift, start=1):
        size = volume_CDHW.shape[axis]
        index = (torch.arange(size) - n).clamp(0, size - 1)
        volume_CDHW = volume_CDHW.index_select(axis, index)
    return volume_CDHW


def contrast_loss(
    first_BE: Tensor, second_BE: Tensor, *, patient_B: Tensor, temperature: float = 0.1
) -> Tensor:
    """Each disguise must find the other of its scan among all disguises of the batch. Scalar.

    Other scans of the same patient are neither near nor far on purpose: they are left out.
    """
    b = first_BE.shape[0]
    both = torch.cat([first_BE, second_BE]).float()
    with torch.autocast(both.device.type, enabled=False):  # bfloat16 would round near pairs together
        logits = both @ both.T / temperature
    patient = patient_B.repeat(2)
    row = torch.arange(2 * b, device=both.device)
    partner = (row + b) % (2 * b)
    left_out = patient[:, None] == patient[None, :]
    left_out[row, partner] = False
    return F.cross_entropy(logits.masked_fill(left_out, float("-inf")), partner)


def build_copy_embedding(*, n_labels: int, seed: int = 0) -> CopyEmbedding:
    """A freshly initialised embedding; initialisation depends on the public seed alone."""
    with seeded_initialisation(seed):
        return CopyEmbedding(n_labels=n_labels)


def load_copy_embedding(path: Path | None, *, n_labels: int) -> CopyEmbedding | None:
    """The embedding of a file, frozen, in evaluation mode; None where a plan names none."""
    return None if path is None else frozen(build_copy_embedding(n_labels=n_labels), path)
