"""Small denoisers for the tests, and a loss of the contract's signature."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from privacy.dp.patients import PatientScans
from privacy.secret_random import SecretRandom

SHAPE = (2, 4, 4, 4)


class FixedSecret(SecretRandom):
    """The same "secret" bytes each time: for comparing two computations on equal draws, in tests alone."""

    def _fresh_key(self) -> bytes:
        return bytes(32)


class SmallDenoiser(nn.Module):
    """Conv3d (3^3, strided, 1^3), GroupNorm, LayerNorm, Linear, Embedding; one Linear is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.down = nn.Conv3d(8, 8, 3, stride=2, padding=1)
        self.embed = nn.Embedding(3, 8)
        self.time = nn.Linear(1, 8)
        self.twice = nn.Linear(8, 8)
        self.layer_norm = nn.LayerNorm(8)
        self.out = nn.Conv3d(8, 2, 1)

    def forward(self, z_BCDHW: Tensor, t_B: Tensor, condition_B: Tensor) -> Tensor:
        context = self.embed(condition_B) + self.time(t_B[:, None])
        context = self.twice(torch.tanh(self.twice(context)))
        h = torch.nn.functional.silu(self.norm(self.conv(z_BCDHW))) + context[:, :, None, None, None]
        low = self.down(h).flatten(2).transpose(1, 2)
        low = self.layer_norm(low).mean(dim=1)
        return self.out(h + low[:, :, None, None, None])


def loss(
    denoiser: nn.Module, z_BCDHW: Tensor, condition_B: Tensor, t_B: Tensor, noise_BCDHW: Tensor
) -> Tensor:
    t = t_B.view(-1, 1, 1, 1, 1)
    velocity = denoiser((1 - t) * z_BCDHW + t * noise_BCDHW, t_B, condition_B)
    return (velocity - (noise_BCDHW - z_BCDHW)).square().flatten(1).mean(dim=1)


def small_denoiser(dtype: torch.dtype = torch.float32) -> SmallDenoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallDenoiser().to(dtype)


def cohort(
    scans: tuple[int, ...], *, shape: tuple[int, ...] = SHAPE, scale: float = 1.0
) -> list[PatientScans]:
    generator = torch.Generator().manual_seed(1)
    return [
        PatientScans(
            patient_key=f"patient-{index}",
            latents_SCDHW=scale * torch.randn((n, *shape), generator=generator),
            conditions_S=torch.randint(0, 3, (n,), generator=generator),
        )
        for index, n in enumerate(scans)
    ]


def parameters(network: nn.Module, *only: str) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in network.named_parameters() if not only or name.startswith(only)]


def flat(tensors: list[Tensor]) -> np.ndarray:
    return torch.cat([t.detach().flatten().to(torch.float64) for t in tensors]).numpy()
