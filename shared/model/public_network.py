"""What the networks over whole public volumes share: how they begin, what they take, how they are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from shared.errors import UsageError
from shared.model.weights import load_weights

Network = TypeVar("Network", bound=nn.Module)


def check_label_count(n_labels: int) -> None:
    """Raises UsageError where a mask cannot have so many labels."""
    if not 1 <= n_labels <= 64:
        raise UsageError(f"{n_labels} mask labels: at least 1 (background not counted) and at most 64")


@contextmanager
def seeded_initialisation(seed: int) -> Iterator[None]:
    """Networks made within depend on the public seed alone; torch's own generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def standardised(image_B1DHW: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over each volume, so that gain and offset do not count."""
    centred = image_B1DHW - image_B1DHW.mean(dim=(2, 3, 4), keepdim=True)
    scale = centred.square().mean(dim=(2, 3, 4), keepdim=True).sqrt()
    return centred / (scale + 1e-3)


def frozen(network: Network, path: Path) -> Network:
    """The network with a file's weights, frozen, in evaluation mode. Raises what ``load_weights`` does."""
    load_weights(network, path)
    return network.requires_grad_(False).eval()
