"""What synthetic scans are for: a segmenter and a classifier, trained on them and tested on real scans.

Segmenter: MONAI's UNet. Classifier: MONAI's 3D ResNet-18. Both see the same augmentation whatever they train
on: small affine changes, gain, gamma, noise. Scans out of an autoencoder lack the fine texture of real ones
(DESIGN section 11), so those also get texture: what the autoencoder loses of public scans, moved about at
random. It is public, and costs no privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from monai.losses import DiceCELoss
from monai.networks.nets import UNet, resnet18
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.nn import functional as F

from tests.benchmarks.utility.settings import Task


@dataclass(frozen=True, kw_only=True)
class Scans:
    """Labelled scans: image_N1DHW in [0, 1], mask_NDHW (labels), target_N (1: the rare condition).

    ``texture_M1DHW``: residuals to add at random to these scans, None for real ones.
    """

    image_N1DHW: Tensor
    mask_NDHW: Tensor
    target_N: Tensor
    texture_M1DHW: Tensor | None = None

    def __len__(self) -> int:
        return len(self.target_N)

    def to(self, device: str) -> Scans:
        texture = None if self.texture_M1DHW is None else self.texture_M1DHW.to(device)
        return Scans(
            image_N1DHW=self.image_N1DHW.to(device), mask_NDHW=self.mask_NDHW.to(device),
            target_N=self.target_N.to(device), texture_M1DHW=texture,
        )  # fmt: skip


def train_and_test(
    task: str,
    sources: list[Scans],
    test: Scans,
    labels: tuple[str, ...],
    *,
    how: Task,
    seed: int,
    device: str,
) -> dict[str, float]:
    """Train on batches drawn in equal parts from ``sources``; figures on ``test``."""
    steps = how.steps
    sources, test = [source.to(device) for source in sources], test.to(device)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _segmenter(len(labels)) if task == "segmentation" else _classifier(small=how.small)
    network.to(device)
    batch = how.batch_size or (8 if task == "segmentation" else 32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
    dice_and_entropy = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    network.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 30) * 0.5 * (1 + math.cos(math.pi * step / steps))
        image, mask, target = _batch(sources, batch, generator, balanced=task == "classification")
        optimizer.zero_grad()
        if task == "segmentation":
            loss = dice_and_entropy(network(image), mask[:, None])
        else:
            loss = F.cross_entropy(network(image), target)
        loss.backward()
        optimizer.step()
    network.eval()
    if task == "segmentation":
        return _dice(network, test, labels)
    return {"auc": _auc(network, test)}


def _batch(
    sources: list[Scans], size: int, generator: torch.Generator, *, balanced: bool
) -> tuple[Tensor, Tensor, Tensor]:
    images, masks, targets = [], [], []
    for place, source in enumerate(sources):
        n = size // len(sources) + (1 if place < size % len(sources) else 0)
        rows = _rows(source.target_N.cpu(), n, generator, balanced=balanced)
        image = source.image_N1DHW[rows]
        if source.texture_M1DHW is not None:
            image = image + _texture(source.texture_M1DHW, n, generator)
        images.append(image)
        masks.append(source.mask_NDHW[rows])
        targets.append(source.target_N[rows])
    image, mask = _deform(torch.cat(images), torch.cat(masks), generator)
    return _intensities(image, generator), mask, torch.cat(targets)


def _rows(target_N: Tensor, n: int, generator: torch.Generator, *, balanced: bool) -> Tensor:
    classes = [torch.nonzero(target_N == value).flatten() for value in (0, 1)]
    if not balanced or not all(len(rows) for rows in classes):
        return torch.randint(len(target_N), (n,), generator=generator)
    pick = torch.rand(n, generator=generator) < 0.5
    return torch.stack(
        [
            rows[torch.randint(len(rows), (1,), generator=generator)[0]]
            for rows in (classes[int(p)] for p in pick)
        ]
    )


def _texture(texture_M1DHW: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Residuals of public scans, each moved in a circle and mirrored at random."""
    pieces = []
    for _ in range(n):
        row = int(torch.randint(texture_M1DHW.shape[0], (1,), generator=generator))
        piece = texture_M1DHW[row]
        shifts = [int(torch.randint(side, (1,), generator=generator)) for side in piece.shape[1:]]
        flips = [axis for axis in (1, 2, 3) if torch.rand(1, generator=generator) < 0.5]
        strength = 0.6 + 0.8 * float(torch.rand(1, generator=generator))
        pieces.append(strength * torch.roll(piece, shifts, dims=(1, 2, 3)).flip(flips))
    return torch.stack(pieces)


def _deform(image: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    b, device = image.shape[0], image.device
    angle_B3 = 0.2 * (2 * torch.rand(b, 3, generator=generator) - 1)
    scale_B = 0.9 + 0.2 * torch.rand(b, generator=generator)
    shift_B3 = 0.1 * (2 * torch.rand(b, 3, generator=generator) - 1)
    rotation = torch.eye(3).expand(b, 3, 3)
    for axis in range(3):
        i, j = [a for a in range(3) if a != axis]
        turn = torch.eye(3).repeat(b, 1, 1)
        cosine, sine = angle_B3[:, axis].cos(), angle_B3[:, axis].sin()
        turn[:, i, i], turn[:, j, j], turn[:, i, j], turn[:, j, i] = cosine, cosine, -sine, sine
        rotation = rotation @ turn
    theta = torch.cat([rotation * scale_B[:, None, None], shift_B3[:, :, None]], dim=2).to(device)
    grid = F.affine_grid(theta, list(image.shape), align_corners=False)
    moved = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
    labels = F.grid_sample(mask[:, None].float(), grid, mode="nearest", align_corners=False)
    return moved, labels[:, 0].round().long()


def _intensities(image: Tensor, generator: torch.Generator) -> Tensor:
    b, device = image.shape[0], image.device

    def column(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(b, 1, 1, 1, 1, generator=generator)).to(device)

    gamma, gain, shift, noise = column(0.8, 1.25), column(0.9, 1.1), column(-0.05, 0.05), column(0, 0.06)
    seed = int(torch.randint(2**31, (1,), generator=generator))
    own = torch.Generator(device=device).manual_seed(seed)
    grain = torch.randn(image.shape, generator=own, device=device)
    return image.clamp(0, 1) ** gamma * gain + shift + noise * grain


def _segmenter(n_labels: int) -> nn.Module:
    return UNet(
        spatial_dims=3, in_channels=1, out_channels=n_labels + 1, channels=(16, 32, 64, 128),
        strides=(2, 2, 2), num_res_units=1, norm="instance",
    )  # fmt: skip


def _classifier(*, small: bool) -> nn.Module:
    network: nn.Module = resnet18(
        spatial_dims=3, n_input_channels=1, num_classes=2, conv1_t_size=3, conv1_t_stride=2,
        no_max_pool=not small, widen_factor=0.5 if small else 1.0,
    )  # fmt: skip
    return network


@torch.no_grad()
def _dice(network: nn.Module, test: Scans, labels: tuple[str, ...]) -> dict[str, float]:
    """Mean Dice over scans, by label."""
    found = torch.cat([network(image).argmax(dim=1) for image in test.image_N1DHW.split(8)])
    values = {}
    for value, name in enumerate(labels, start=1):
        a, b = found == value, test.mask_NDHW == value
        overlap = (
            2.0 * (a & b).sum(dim=(1, 2, 3)) / (a.sum(dim=(1, 2, 3)) + b.sum(dim=(1, 2, 3))).clamp_min(1)
        )
        values[name] = float(overlap.mean())
    return {**values, "dice": float(np.mean(list(values.values())))}


@torch.no_grad()
def _auc(network: nn.Module, test: Scans) -> float:
    score = torch.cat([network(image).softmax(dim=1)[:, 1] for image in test.image_N1DHW.split(64)])
    score_N, target_N = score.cpu().numpy(), test.target_N.cpu().numpy()
    positive, negative = score_N[target_N == 1], score_N[target_N == 0]
    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))
