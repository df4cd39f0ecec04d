"""Low-rank adapters (Hu et al., ICLR 2022) made of plain Linear and Conv3d layers.

Opacus has per-sample gradient samplers for both, so nothing new has to be registered. An adapter adds
up(down(x)) to a layer; ``up`` starts at zero, so inserting adapters changes nothing; ``down`` starts from a
public seed bound to the layer's name, so that every hospital inserts the same ones.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_SEED_DOMAIN = b"lacuna/low-rank/v1:"


class LowRankLinear(nn.Module):
    """A Linear layer with an adapter of rank ``rank`` beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer it stands for."""
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result

    def merged(self) -> nn.Linear:
        """The plain layer that computes the same."""
        self.base.weight.data += self.up.weight.data @ self.down.weight.data
        return self.base


class LowRankConv3d(nn.Module):
    """A Conv3d layer with an adapter: a thin convolution of its kernel, then one of kernel 1."""

    def __init__(self, base: nn.Conv3d, rank: int) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Conv3d(
            base.in_channels,
            rank,
            kernel_size=base.kernel_size,  # type: ignore[arg-type]
            stride=base.stride,  # type: ignore[arg-type]
            padding=base.padding,  # type: ignore[arg-type]
            bias=False,
        )
        self.up = nn.Conv3d(rank, base.out_channels, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """As the layer it stands for."""
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result

    def merged(self) -> nn.Conv3d:
        """The plain layer that computes the same."""
        self.base.weight.data += torch.einsum(
            "or,ridhw->oidhw", self.up.weight.data[:, :, 0, 0, 0], self.down.weight.data
        )
        return self.base


def insert_low_rank(network: nn.Module, rank: int) -> None:
    """Put adapters beside every attention projection and every 3x3x3 convolution; a second call does nothing.

    Layers that already have an adapter keep it, with its weights.
    """
    for path, module in list(network.named_modules()):
        if isinstance(module, LowRankLinear | LowRankConv3d):
            continue
        for name, child in list(module.named_children()):
            full_name = f"{path}.{name}" if path else name
            adapted: LowRankLinear | LowRankConv3d
            if isinstance(child, nn.Linear) and ".attn." in f"{full_name}.":
                adapted = LowRankLinear(child, rank)
            elif isinstance(child, nn.Conv3d) and child.kernel_size == (3, 3, 3):
                adapted = LowRankConv3d(child, rank)
            else:
                continue
            _initialise(adapted, full_name)
            adapted.to(child.weight.device)
            setattr(module, name, adapted)


def merge_low_rank(network: nn.Module) -> None:
    """Fold every adapter into its layer: the plain network's names again, and the same function."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LowRankLinear | LowRankConv3d):
                setattr(module, name, child.merged())


def _initialise(adapted: LowRankLinear | LowRankConv3d, name: str) -> None:
    seed = int.from_bytes(hashlib.sha256(_SEED_DOMAIN + name.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        weight = adapted.down.weight
        fan_in = weight[0].numel()
        weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
        adapted.up.weight.zero_()
