"""The project's own networks: clipped sums of denoiser and autoencoder against one backward pass a patient.

Each parameter's part is held to 1e-4 of its norm in float32 and to 1e-10 in float64, for each trainable
subset.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from privacy.dp.book_keeping import BookKeeping
from privacy.dp.clipping import clip_factors
from privacy.dp.microbatch_gradients import ClippedTotal, DirectRows, LateRows
from shared.model.autoencoder import build_autoencoder
from shared.model.denoiser import PRIVATE_SUBSETS, build_denoiser, parameter_subset
from shared.model.presets import preset_named

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}
SMALL = replace(
    preset_named("micro"), name="small", denoiser_channels=(8, 16, 32), attention_levels=(False, True, True),
    norm_groups=4, head_channels=8, autoencoder_channels=(8, 16), low_rank=2,
)  # fmt: skip
CLIP = 0.05


def randomised(network: nn.Module) -> nn.Module:
    """MONAI starts some layers at zero; behind them all gradients would be zero."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for p in network.parameters():
            if not p.any():
                p.normal_(std=0.05, generator=generator)
    return network


def denoiser_losses(network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    z, t, condition = batch
    return (network(z, t, condition) - z.flip(1)).square().flatten(1).mean(dim=1)


def autoencoder_losses(network: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Reconstruction and divergence from a standard normal, without the posterior's noise."""
    (x,) = batch
    mean, std = network.encode(x)
    reconstructed = network.decode(mean + 0.1 * std)
    divergence = (mean**2 + std**2 - 2 * std.log()).flatten(1).mean(dim=1)
    return (reconstructed - x).square().flatten(1).mean(dim=1) + 1e-2 * divergence


def compare(
    network: nn.Module, params: list[tuple[str, nn.Parameter]], losses: object, batch: tuple[Tensor, ...],
    patients: int, dtype: torch.dtype,
) -> set[type]:  # fmt: skip
    """Hold one microbatch's clipped sum against autograd; returns the kinds of pieces that were in use."""
    draws = len(batch[0]) // patients
    wanted = torch.zeros(sum(p.numel() for _, p in params), dtype=torch.float64)
    for patient in range(patients):
        rows = slice(patient * draws, (patient + 1) * draws)
        loss = losses(network, tuple(part[rows] for part in batch)).mean()  # type: ignore[operator]
        grads = torch.autograd.grad(loss, [p for _, p in params])
        row = torch.cat([grad.flatten() for grad in grads]).double()
        wanted += row * min(1.0, CLIP / float(row.norm()))
    book = BookKeeping(network, params, patients)
    with book.hooked() as called:
        torch.autograd.backward(losses(called, batch).sum() / draws)  # type: ignore[operator]
        gradients = book.collect()
    kinds = {type(piece) for piece in gradients.pieces}
    total = ClippedTotal(torch.zeros_like(wanted))
    gradients.add_scaled(total, clip_factors(gradients.squared_norms(), CLIP))
    found, at = total.vector(), 0
    for name, p in params:
        mine, theirs = found[at : at + p.numel()], wanted[at : at + p.numel()]
        at += p.numel()
        # Biases before a normalisation have gradients of rounding alone: held to the whole sum.
        assert (mine - theirs).norm() <= TOLERANCE[dtype] * (theirs.norm() + 1e-2 * wanted.norm()), name
    return kinds


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("subset", PRIVATE_SUBSETS)
def test_denoiser_is_exact_in_every_subset(subset: str, dtype: torch.dtype) -> None:
    network = build_denoiser(SMALL, n_conditions=2)
    params = parameter_subset(network, subset)
    randomised(network).to(dtype)
    generator = torch.Generator().manual_seed(12)
    for patients, draws in ((1, 2), (3, 1), (2, 4)):
        b = patients * draws
        batch = (
            torch.randn((b, 4, 8, 8, 8), generator=generator).to(dtype),
            torch.rand(b, generator=generator).to(dtype),
            torch.randint(0, 3, (b,), generator=generator),
        )
        kinds = compare(network, params, denoiser_losses, batch, patients, dtype)
        assert patients == 1 or subset not in ("all", "conditioning") or kinds == {DirectRows, LateRows}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_autoencoder_is_exact(dtype: torch.dtype) -> None:
    autoencoder = build_autoencoder(SMALL, n_labels=1).network
    randomised(autoencoder).to(dtype)
    params = list(autoencoder.named_parameters())
    generator = torch.Generator().manual_seed(13)
    for patients, draws in ((1, 2), (3, 1), (2, 4)):
        shape = (patients * draws, params[0][1].shape[1], 4, 6, 4)
        x = torch.randn(shape, generator=generator).to(dtype)
        compare(autoencoder, params, autoencoder_losses, (x,), patients, dtype)
