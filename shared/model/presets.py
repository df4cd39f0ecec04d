"""The one table of model sizes. A preset fixes architecture, not what the study is about.

The number of mask labels, the conditions and (within the rule of divisibility) the grid come from the
plan and are passed to the builders. This module imports no torch, so that a plan can be checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.errors import UsageError

Shape3 = tuple[int, int, int]


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
        denoiser_channels: Channels per denoiser level.
        denoiser_res_blocks: Residual blocks per level.
        attention_levels: Which denoiser levels have self-attention.
        head_channels: Channels per attention head.
        norm_groups: Groups of every GroupNorm; divides all channel counts, several channels a group: with one
            channel a group, normalisation would take a condition's shift out again.
        condition_gain: Constant factor on the condition embedding. A larger gain puts a larger part of a
            clipped gradient into the embedding's rows, see the table beside the micro weights.
        low_rank: Rank of the adapters of the private subset ``low_rank``.
        sampling_steps: Default Euler steps.
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
