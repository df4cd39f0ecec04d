"""The one table of model sizes. A preset fixes architecture, not what the study is about.

The number of mask labels, the conditions and (within the rule of divisibility) the grid come from the
plan and are passed to the builders. This module imports no torch, so that a plan can be checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shared.errors import UsageError

Shape3 = tuple[int, int, int]
Parametrisation = Literal["rectified_flow", "v_prediction"]


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """Architecture of an autoencoder and a denoiser.

    Attributes:
        name: Key in :data:`PRESETS`.
        grid_shape: Usual canonical grid in voxels (D, H, W); a plan may choose another that divides.
        spacing_mm: Usual voxel size of that grid.
        space_to_depth: Edge of the voxel blocks moved to channels before the first convolution.
        autoencoder_channels: Channels per autoencoder level; each level after the first halves the grid.
        autoencoder_res_blocks: Residual blocks per level.
        latent_channels: Channels of a latent.
        mask_latent_channels: How many of them come from a network of the mask's own; 0: image and mask share
            one network. The image's network then has one channel in and out, as public image autoencoders do.
        denoiser_channels: Channels per denoiser level.
        denoiser_res_blocks: Residual blocks per level.
        attention_levels: Which denoiser levels have self-attention.
        head_channels: Channels per attention head.
        norm_groups: Groups of every GroupNorm; divides all channel counts, several channels a group: with one
            channel a group, normalisation would take a condition's shift out again.
        resblock_updown: Residual blocks instead of plain convolutions between the denoiser's levels.
        diffusion: Path from latents to noise and what the denoiser predicts on it, see
            :mod:`shared.model.diffusion`.
        noise_shift: The log signal-to-noise ratio is lowered by 2 log of this at every timestep. Neighbouring
            cells of a large latent repeat each other, and the same noise hides less of it.
        condition_gain: Constant factor on the condition embedding. A larger gain puts a larger part of a
            clipped gradient into the embedding's rows, see the table beside the micro weights.
        low_rank: Rank of the adapters of the private subset ``low_rank``.
        sampling_steps: Default sampling steps.
        guidance_scale: Default classifier-free guidance (1 is none).
    """

    name: str
    grid_shape: Shape3
    spacing_mm: tuple[float, float, float]
    space_to_depth: int
    autoencoder_channels: tuple[int, ...]
    autoencoder_res_blocks: int
    latent_channels: int
    denoiser_channels: tuple[int, ...]
    denoiser_res_blocks: int
    attention_levels: tuple[bool, ...]
    head_channels: int
    norm_groups: int
    mask_latent_channels: int = 0
    resblock_updown: bool = False
    diffusion: Parametrisation = "rectified_flow"
    noise_shift: float = 1.0
    condition_gain: float = 1.0
    low_rank: int = 2
    sampling_steps: int = 30
    guidance_scale: float = 1.0

    @property
    def latent_factor(self) -> int:
        """Voxels per latent cell along each axis."""
        return int(self.space_to_depth * 2 ** (len(self.autoencoder_channels) - 1))

    @property
    def grid_divisor(self) -> int:
        """Every edge of a grid is a multiple of this, so that the denoiser's levels halve evenly too."""
        return int(self.latent_factor * 2 ** (len(self.denoiser_channels) - 1))

    def latent_shape(self, grid_shape: Shape3) -> tuple[int, int, int, int]:
        """Shape (C, D, H, W) of one latent of a volume on ``grid_shape``.

        Raises:
            UsageError: the grid has an edge that is not a positive multiple of :attr:`grid_divisor`.
        """
        if len(grid_shape) != 3 or any(n <= 0 or n % self.grid_divisor for n in grid_shape):
            raise UsageError(
                f"grid {grid_shape} does not fit preset {self.name!r}",
                remedy=f"choose three multiples of {self.grid_divisor}, for example {self.grid_shape}",
            )
        d, h, w = (n // self.latent_factor for n in grid_shape)
        return (self.latent_channels, d, h, w)


PRESETS: dict[str, ModelPreset] = {
    preset.name: preset
    for preset in (
        ModelPreset(
            name="micro",
            grid_shape=(24, 24, 24),
            spacing_mm=(4.0, 4.0, 4.0),
            space_to_depth=2,
            autoencoder_channels=(32, 48),
            autoencoder_res_blocks=1,
            latent_channels=4,
            denoiser_channels=(32, 32),
            denoiser_res_blocks=1,
            attention_levels=(False, True),
            head_channels=16,
            norm_groups=8,
            condition_gain=128.0,
            sampling_steps=20,
            guidance_scale=2.0,
        ),
        ModelPreset(
            name="tiny",
            grid_shape=(32, 48, 32),
            spacing_mm=(1.0, 1.0, 1.0),
            space_to_depth=2,
            autoencoder_channels=(32, 64),
            autoencoder_res_blocks=1,
            latent_channels=4,
            denoiser_channels=(48, 96),
            denoiser_res_blocks=1,
            attention_levels=(False, True),
            head_channels=48,
            norm_groups=8,
            condition_gain=16.0,
            low_rank=4,
            sampling_steps=30,
        ),
        # One GPU: 32 million parameters on 16^3 latents of 64^3 voxels.
        ModelPreset(
            name="base",
            grid_shape=(64, 64, 64),
            spacing_mm=(2.0, 2.0, 2.0),
            space_to_depth=2,
            autoencoder_channels=(64, 128),
            autoencoder_res_blocks=2,
            latent_channels=4,
            denoiser_channels=(96, 192, 224),
            denoiser_res_blocks=1,
            attention_levels=(False, True, True),
            head_channels=32,
            norm_groups=16,
            diffusion="v_prediction",
            condition_gain=16.0,
            low_rank=8,
        ),
        # A large GPU: the networks of MAISI (Guo et al., WACV 2025; its rectified-flow release), whose public
        # weights fit the image's autoencoder and the denoiser. The shift is MAISI's for 64^3 latents.
        ModelPreset(
            name="h200",
            grid_shape=(256, 256, 256),
            spacing_mm=(1.5, 1.5, 1.5),
            space_to_depth=1,
            autoencoder_channels=(64, 128, 256),
            autoencoder_res_blocks=2,
            latent_channels=8,
            mask_latent_channels=4,
            denoiser_channels=(64, 128, 256, 512),
            denoiser_res_blocks=2,
            attention_levels=(False, False, True, True),
            head_channels=32,
            norm_groups=32,
            resblock_updown=True,
            noise_shift=2.0,
            low_rank=8,
        ),
    )
}


def preset_named(name: str) -> ModelPreset:
    """Look a preset up by name.

    Raises:
        UsageError: there is none of that name.
    """
    try:
        return PRESETS[name]
    except KeyError:
        raise UsageError(
            f"no such model preset: {name!r}", remedy=f"choose one of {', '.join(PRESETS)}"
        ) from None
