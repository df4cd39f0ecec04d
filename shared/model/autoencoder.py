"""Autoencoder: an image and its mask, together, to a small latent and back.

MONAI's ``AutoencoderKL`` (Rombach et al. 2022; Pinaya et al. 2022) works on space-to-depth input: blocks of
voxels move to channels first, which makes it about ten times cheaper than at full resolution (DESIGN,
section 11). It is trained on public data only. Presets with ``mask_latent_channels`` have two networks, one
for the image at full resolution and one for the mask, whose latents are concatenated: so that a public image
autoencoder fits.

Shape suffixes: B batch, C latent channels, K labels with background, D H W voxels or latent cells.
"""

from __future__ import annotations

import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.networks.nets import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F

from shared.errors import UsageError
from shared.model.presets import ModelPreset
from shared.model.public_network import check_label_count, seeded_initialisation

INITIAL_LOG_VARIANCE = -5.0


class LatentAutoencoder(nn.Module):
    """Encode image and mask to a normalised latent, decode a latent to image and mask.

    Args:
        preset: Architecture.
        n_labels: Number of mask labels, background (0) not counted: masks hold 0 to ``n_labels``.

    Buffers:
        latent_mean_C, latent_std_C: Statistics of PUBLIC latents, set at pretraining and saved with the
            weights. They are public constants: no private latent ever changes them.
    """

    latent_mean_C: Tensor
    latent_std_C: Tensor

    def __init__(self, preset: ModelPreset, *, n_labels: int) -> None:
        super().__init__()
        check_label_count(n_labels)
        self.preset = preset
        self.n_labels = n_labels
        shared = preset.mask_latent_channels == 0
        self.network = (
            _network(
                preset,
                in_channels=(2 + n_labels) * preset.space_to_depth**3,
                channels=preset.autoencoder_channels,
                latent_channels=preset.latent_channels,
            )
            if shared
            else _image_network(preset)
        )
        if not shared:
            self.mask_network = _network(
                preset,
                in_channels=(1 + n_labels) * preset.latent_factor**3,
                channels=preset.autoencoder_channels[:1],
                latent_channels=preset.mask_latent_channels,
            )
        self.register_buffer("latent_mean_C", torch.zeros(preset.latent_channels))
        self.register_buffer("latent_std_C", torch.ones(preset.latent_channels))

    def trained_network(self, *, image_is_public: bool = False) -> nn.Module:
        """What pretraining trains: everything, or the mask's network alone beside public image weights."""
        network: nn.Module = self.network
        if self.preset.mask_latent_channels == 0:
            return network
        mask_network: nn.Module = self.mask_network
        return mask_network if image_is_public else nn.ModuleList([network, mask_network])

    def encode(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> Tensor:
        """Latents z_BCDHW: the posterior's mean (no randomness), normalised by the public statistics.

        Args:
            image_B1DHW: Floating point in [0, 1].
            mask_BDHW: Integer labels, 0 (background) to ``n_labels``.

        Raises:
            UsageError: shapes that do not fit each other or the preset, or a label out of range.
        """
        mean_BCDHW, _ = self.posterior(image_B1DHW, mask_BDHW)
        return (mean_BCDHW - self._column(self.latent_mean_C)) / self._column(self.latent_std_C)

    def decode(self, z_BCDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Image_B1DHW in [0, 1] and mask_BDHW (uint8) of normalised latents."""
        raw_BCDHW = z_BCDHW * self._column(self.latent_std_C) + self._column(self.latent_mean_C)
        image_B1DHW, logits_BKDHW = self.decode_logits(raw_BCDHW)
        return image_B1DHW.clamp(0.0, 1.0), logits_BKDHW.argmax(dim=1).to(torch.uint8)

    def posterior(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of raw (not normalised) latents, each [B, C, D, H, W]."""
        self._check(image_B1DHW, mask_BDHW)
        onehot_BKDHW = F.one_hot(mask_BDHW.long(), self.n_labels + 1).movedim(-1, 1).to(image_B1DHW.dtype)
        edge = self.preset.space_to_depth
        if self.preset.mask_latent_channels == 0:
            x_BCDHW = torch.cat([image_B1DHW, onehot_BKDHW], dim=1) * 2.0 - 1.0
            mean_BCDHW, std_BCDHW = self.network.encode(space_to_depth(x_BCDHW, edge))
            return mean_BCDHW, std_BCDHW
        parts = (
            self.network.encode(space_to_depth(image_B1DHW, edge)),
            self.mask_network.encode(space_to_depth(onehot_BKDHW * 2.0 - 1.0, self.preset.latent_factor)),
        )
        return torch.cat([mean for mean, _ in parts], dim=1), torch.cat([std for _, std in parts], dim=1)

    def decode_logits(self, raw_BCDHW: Tensor) -> tuple[Tensor, Tensor]:
        """Unclamped image_B1DHW and mask logits_BKDHW of raw (not normalised) latents."""
        edge, own = self.preset.space_to_depth, self.preset.mask_latent_channels
        if own == 0:
            x_BCDHW = depth_to_space(self.network.decode(raw_BCDHW), edge)
            return x_BCDHW[:, :1] * 0.5 + 0.5, x_BCDHW[:, 1:]
        image_B1DHW = depth_to_space(self.network.decode(raw_BCDHW[:, :-own]), edge)
        logits_BKDHW = self.mask_network.decode(raw_BCDHW[:, -own:])
        return image_B1DHW, depth_to_space(logits_BKDHW, self.preset.latent_factor)

    @staticmethod
    def _column(values_C: Tensor) -> Tensor:
        return values_C.view(1, -1, 1, 1, 1)

    def _check(self, image_B1DHW: Tensor, mask_BDHW: Tensor) -> None:
        if image_B1DHW.ndim != 5 or image_B1DHW.shape[1] != 1:
            raise UsageError(f"image has shape {tuple(image_B1DHW.shape)}, expected (B, 1, D, H, W)")
        if mask_BDHW.shape != image_B1DHW.shape[:1] + image_B1DHW.shape[2:]:
            raise UsageError(f"mask {tuple(mask_BDHW.shape)} does not fit image {tuple(image_B1DHW.shape)}")
        if mask_BDHW.is_floating_point() or mask_BDHW.dtype == torch.bool:
            raise UsageError(f"mask has dtype {mask_BDHW.dtype}, expected integer labels")
        d, h, w = mask_BDHW.shape[1:]
        self.preset.latent_shape((d, h, w))
        if mask_BDHW.numel() and not 0 <= int(mask_BDHW.min()) <= int(mask_BDHW.max()) <= self.n_labels:
            raise UsageError(f"mask holds labels outside 0 to {self.n_labels}")


def _network(
    preset: ModelPreset, *, in_channels: int, channels: tuple[int, ...], latent_channels: int
) -> AutoencoderKL:
    network = AutoencoderKL(
        spatial_dims=3,
        in_channels=in_channels,
        out_channels=in_channels,
        num_res_blocks=preset.autoencoder_res_blocks,
        channels=channels,
        attention_levels=(False,) * len(channels),
        latent_channels=latent_channels,
        norm_num_groups=preset.norm_groups,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    # MONAI's posterior starts with a deviation of about 1, above its mean's: hundreds of steps of noise.
    nn.init.zeros_(network.quant_conv_log_sigma.conv.weight)
    nn.init.constant_(network.quant_conv_log_sigma.conv.bias, INITIAL_LOG_VARIANCE)
    return network


def _image_network(preset: ModelPreset) -> AutoencoderKlMaisi:
    """MAISI's autoencoder: one channel at full resolution, upsampling by interpolation."""
    levels = len(preset.autoencoder_channels)
    return AutoencoderKlMaisi(
        spatial_dims=3,
        in_channels=preset.space_to_depth**3,
        out_channels=preset.space_to_depth**3,
        num_res_blocks=(preset.autoencoder_res_blocks,) * levels,
        num_channels=preset.autoencoder_channels,
        attention_levels=(False,) * levels,
        latent_channels=preset.latent_channels - preset.mask_latent_channels,
        norm_num_groups=preset.norm_groups,
        num_splits=1,
        dim_split=1,
        save_mem=False,
    )


def space_to_depth(x_BCDHW: Tensor, edge: int) -> Tensor:
    """Move blocks of edge^3 voxels to channels: [B, C, D, H, W] to [B, C edge^3, D/edge, H/edge, W/edge]."""
    b, c, d, h, w = x_BCDHW.shape
    x = x_BCDHW.reshape(b, c, d // edge, edge, h // edge, edge, w // edge, edge)
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, c * edge**3, d // edge, h // edge, w // edge)


def depth_to_space(x_BCDHW: Tensor, edge: int) -> Tensor:
    """Inverse of :func:`space_to_depth`."""
    b, c, d, h, w = x_BCDHW.shape
    x = x_BCDHW.reshape(b, c // edge**3, edge, edge, edge, d, h, w)
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // edge**3, d * edge, h * edge, w * edge)


def build_autoencoder(preset: ModelPreset, *, n_labels: int, seed: int = 0) -> LatentAutoencoder:
    """A freshly initialised autoencoder; initialisation depends on the public seed alone."""
    with seeded_initialisation(seed):
        return LatentAutoencoder(preset, n_labels=n_labels)
