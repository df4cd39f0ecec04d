"""A module's parameters and buffers, to and from a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from shared.checkpoint import load_tensors, save_tensors
from shared.errors import CoordinatorError


class WeightsMismatchError(CoordinatorError):
    """A file of weights is sound, but not for this network."""


def save_weights(module: nn.Module, path: Path, metadata: Mapping[str, str], *, half: bool = False) -> str:
    """Save a module's state; ``half`` stores floating-point tensors in half precision.

    Returns:
        SHA-256 of the file, hexadecimal.
    """
    return save_tensors(path, state_arrays(module, half=half), metadata)


def load_weights(module: nn.Module, path: Path) -> dict[str, str]:
    """Load a file into a module of exactly its names and shapes. Half precision is widened.

    Returns:
        The file's metadata.

    Raises:
        MalformedMessageError: the file is not a weights file.
        WeightsMismatchError: names or shapes differ, or a value is not finite. The module is unchanged.
    """
    tensors, metadata = load_tensors(path)
    load_state_arrays(module, tensors, what=str(path))
    return metadata


def state_arrays(module: nn.Module, *, half: bool = False) -> dict[str, NDArray[Any]]:
    """Parameters and buffers by name, as numpy copies."""
    arrays: dict[str, NDArray[Any]] = {}
    for name, tensor in module.state_dict().items():
        array = tensor.detach().cpu().numpy()
        arrays[name] = array.astype(np.float16 if half and tensor.is_floating_point() else array.dtype)
    return arrays


def load_state_arrays(module: nn.Module, tensors: Mapping[str, NDArray[Any]], *, what: str) -> None:
    """The checks and the copy of :func:`load_weights`, for tensors in memory."""
    own = module.state_dict()
    missing, surplus = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or surplus:
        raise WeightsMismatchError(
            f"{what}: not the weights of this network (missing {missing[:3]}, unexpected {surplus[:3]})",
            remedy="check preset, labels and conditions of the plan against those of the file",
        )
    for name, tensor in own.items():
        if tuple(tensor.shape) != tensors[name].shape:
            raise WeightsMismatchError(
                f"{what}: {name} has shape {tensors[name].shape}, the network has {tuple(tensor.shape)}",
                remedy="check preset, labels and conditions of the plan against those of the file",
            )
        if not np.isfinite(tensors[name]).all():
            raise WeightsMismatchError(f"{what}: {name} holds values that are not finite")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(torch.from_numpy(np.ascontiguousarray(tensors[name])))
