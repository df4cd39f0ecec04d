"""Public MAISI weights (Guo et al., WACV 2025, and its rectified-flow release) as starting points of ours.

Presets with a mask network of their own have MAISI's autoencoder for the image, under MAISI's names, so its
file is loaded as it is. MAISI's denoiser is told spacing and body region by further embeddings beside the
timestep's, and predicts data minus noise. A study has one grid, so these inputs are constants: their part of
every residual block's projection is added to its bias, the last convolution changes its sign, and what is
left is exactly our network (tests hold the two against each other). Channels of the mask's latents start at
zero; every condition starts as one class of MAISI's.

Files are safetensors with the names of the released state dicts, and for the denoiser a tensor
``scale_factor``; how a released ``.pt`` becomes one is in ``deploy/decisions/0010``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit

from shared.errors import UsageError
from shared.model.autoencoder import LatentAutoencoder
from shared.model.denoiser import Denoiser
from shared.model.weights import WeightsMismatchError, load_state_arrays

Arrays = Mapping[str, NDArray[Any]]

SPACING_FACTOR = 100.0
"""MAISI is told spacings in hundredths of a millimetre."""

_REGIONS = ("top_region_index_layer", "bottom_region_index_layer")
_OUT = "out.2.conv"


def load_image_autoencoder(autoencoder: LatentAutoencoder, tensors: Arrays, *, what: str) -> None:
    """Put MAISI's weights into the image's network.

    Raises:
        UsageError: the preset has no image network of its own.
        WeightsMismatchError: the file is not of this architecture.
    """
    _needs_own_mask(autoencoder.preset.mask_latent_channels)
    load_state_arrays(autoencoder.network, tensors, what=what)


@torch.no_grad()
def fix_image_scale(autoencoder: LatentAutoencoder, tensors: Arrays, *, what: str) -> None:
    """Normalise the image's latents as MAISI's denoiser expects them: times its scale factor alone."""
    scale = np.asarray(tensors.get("scale_factor", np.zeros(0)), dtype=np.float64).ravel()
    if scale.size != 1 or not np.isfinite(scale[0]) or scale[0] <= 0:
        raise WeightsMismatchError(f"{what}: there is no scale_factor, one positive number")
    image_channels = autoencoder.preset.latent_channels - autoencoder.preset.mask_latent_channels
    autoencoder.latent_mean_C[:image_channels] = 0.0
    autoencoder.latent_std_C[:image_channels] = 1.0 / float(scale[0])


@torch.no_grad()
def load_image_denoiser(
    denoiser: Denoiser,
    tensors: Arrays,
    *,
    spacing_mm: tuple[float, float, float],
    class_row: int = 1,
    top_region: int = 0,
    bottom_region: int = 1,
    what: str,
) -> None:
    """Put MAISI's denoiser into ours.

    Args:
        tensors: Its state dict.
        spacing_mm: The study's voxel size.
        class_row: MAISI's class (modality) that every condition starts as.
        top_region, bottom_region: Body regions, 0 to 3, that the volumes span; used where the file has them.

    Raises:
        UsageError: the preset has no image network of its own, or a region or class that there is not.
        WeightsMismatchError: the file is not of this architecture.
    """
    preset = denoiser.preset
    _needs_own_mask(preset.mask_latent_channels)
    given = {name: np.asarray(array, dtype=np.float32) for name, array in tensors.items()}
    given.pop("scale_factor", None)
    classes = given.pop("class_embedding.weight", None)
    constant = _constant_embedding(given, spacing_mm, top_region, bottom_region)
    state = {name: tensor.cpu().numpy().copy() for name, tensor in denoiser.unet.state_dict().items()}
    own = {name for name in state if not name.startswith("class_embedding.")}
    if missing := sorted(own - set(given)) or sorted(set(given) - own):
        raise WeightsMismatchError(f"{what}: not the denoiser of preset {preset.name!r} ({missing[:3]})")
    channels = preset.latent_channels - preset.mask_latent_channels
    for name in own:
        array, start = given[name], state[name]
        if "time_emb_proj.weight" in name and constant is not None:
            width = start.shape[1]
            state[name.replace("weight", "bias")] = (
                given[name.replace("weight", "bias")] + array[:, width:] @ constant
            )
            array = array[:, :width]
        elif "time_emb_proj.bias" in name and constant is not None:
            continue
        elif name == "conv_in.conv.weight":
            array = np.concatenate([array, np.zeros_like(start[:, channels:])], axis=1)
        elif name.startswith(_OUT):
            array = np.concatenate([-array, np.zeros_like(start[channels:])])
        if array.shape != start.shape:
            raise WeightsMismatchError(f"{what}: {name} has shape {array.shape}, here it is {start.shape}")
        state[name] = array
    rows = state["class_embedding.table.weight"]
    if classes is None:
        rows[:] = 0.0
    elif not 0 <= class_row < len(classes) or classes.shape[1] != rows.shape[1]:
        raise UsageError(f"{what}: class {class_row} is none of its {len(classes)}")
    else:
        rows[:] = classes[class_row] / preset.condition_gain
    for name in state:
        if name.startswith("class_embedding.covariate_tables."):
            state[name][:] = 0.0
    load_state_arrays(denoiser.unet, state, what=what)


def _constant_embedding(
    given: dict[str, NDArray[Any]], spacing_mm: tuple[float, float, float], top: int, bottom: int
) -> NDArray[Any] | None:
    """silu of the embeddings that a study's constants have; takes their layers out of ``given``."""
    inputs: list[tuple[str, NDArray[Any]]] = []
    for layer, index in zip(_REGIONS, (top, bottom), strict=True):
        if not 0 <= index <= 3:
            raise UsageError(f"body region {index}: choose 0 to 3")
        inputs.append((layer, np.eye(4, dtype=np.float32)[index]))
    inputs.append(("spacing_layer", np.asarray(spacing_mm, dtype=np.float32) * SPACING_FACTOR))
    parts = []
    for layer, value in inputs:
        if f"{layer}.0.weight" not in given:
            continue
        w0, b0, w2, b2 = (
            given.pop(f"{layer}.{part}") for part in ("0.weight", "0.bias", "2.weight", "2.bias")
        )
        parts.append(w2 @ _silu(w0 @ value + b0) + b2)
    return _silu(np.concatenate(parts)) if parts else None


def _silu(x: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(x * expit(x), dtype=np.float32)


def _needs_own_mask(mask_latent_channels: int) -> None:
    if mask_latent_channels == 0:
        raise UsageError(
            "public image weights fit presets whose mask has a network of its own",
            remedy="choose preset h200",
        )
