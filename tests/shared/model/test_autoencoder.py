"""The autoencoder's wrapper: shapes, normalisation, determinism, and refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shared.errors import UsageError
from shared.model.autoencoder import build_autoencoder, depth_to_space, space_to_depth
from shared.model.presets import PRESETS, preset_named

MICRO = preset_named("micro")


def _volumes(n: int, labels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.rand((n, 1, *MICRO.grid_shape), generator=generator)
    return image, torch.randint(0, labels + 1, (n, *MICRO.grid_shape), generator=generator).to(torch.uint8)


def test_space_to_depth_moves_blocks_and_comes_back() -> None:
    x = torch.arange(2 * 3 * 4 * 6 * 8).reshape(2, 3, 4, 6, 8)
    y = space_to_depth(x, 2)
    assert y.shape == (2, 24, 2, 3, 4)
    assert set(y[0, :8, 0, 0, 0].tolist()) == set(x[0, 0, :2, :2, :2].flatten().tolist())
    assert torch.equal(depth_to_space(y, 2), x)


def test_encode_and_decode_have_the_promised_shapes_and_ranges() -> None:
    autoencoder = build_autoencoder(MICRO, n_labels=2, seed=1)
    image, mask = _volumes(2)
    with torch.no_grad():
        z = autoencoder.encode(image, mask)
        decoded, labels = autoencoder.decode(z * 50)
        assert torch.equal(z, autoencoder.encode(image, mask.long()))
    assert z.shape == (2, *MICRO.latent_shape(MICRO.grid_shape))
    assert decoded.shape == image.shape and float(decoded.min()) >= 0.0 and float(decoded.max()) <= 1.0
    assert labels.shape == mask.shape and labels.dtype == torch.uint8 and labels.max() <= 2


def test_latents_are_normalised_by_the_public_buffers_and_decode_undoes_it() -> None:
    autoencoder = build_autoencoder(MICRO, n_labels=2, seed=1)
    image, mask = _volumes(1)
    with torch.no_grad():
        raw = autoencoder.encode(image, mask)
        plain = autoencoder.decode(raw)
        autoencoder.latent_mean_C.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
        autoencoder.latent_std_C.copy_(torch.tensor([2.0, 1.0, 0.5, 4.0]))
        z = autoencoder.encode(image, mask)
        assert torch.allclose(z[:, 0], (raw[:, 0] - 1.0) / 2.0, atol=1e-6)
        assert torch.allclose(autoencoder.decode(z)[0], plain[0], atol=1e-5)
    assert {"latent_mean_C", "latent_std_C"} <= set(autoencoder.state_dict())


def test_initialisation_is_a_function_of_the_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    a = build_autoencoder(MICRO, n_labels=1, seed=3)
    b = build_autoencoder(MICRO, n_labels=1, seed=3)
    c = build_autoencoder(MICRO, n_labels=1, seed=4)
    assert torch.equal(before, torch.random.get_rng_state())
    weights = [next(iter(m.network.encoder.parameters())) for m in (a, b, c)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("labels", [0, 65])
def test_number_of_labels_is_bounded(labels: int) -> None:
    with pytest.raises(UsageError):
        build_autoencoder(MICRO, n_labels=labels)


def test_wrong_inputs_are_refused() -> None:
    autoencoder = build_autoencoder(MICRO, n_labels=2)
    image, mask = _volumes(1)
    for bad_image, bad_mask in [
        (image[:, 0], mask),
        (image, mask[:, :20]),
        (image, mask.float()),
        (image, mask + 1),
        (image[:, :, :22], mask[:, :22]),
    ]:
        with pytest.raises(UsageError):
            autoencoder.encode(bad_image, bad_mask)


def test_presets_check_grids_and_names() -> None:
    assert set(PRESETS) >= {"micro", "tiny"}
    assert preset_named("tiny").latent_shape((32, 48, 32)) == (4, 8, 12, 8)
    for grid in [(24, 24, 20), (0, 24, 24), (-12, 24, 24)]:
        with pytest.raises(UsageError, match="does not fit"):
            MICRO.latent_shape(grid)
    with pytest.raises(UsageError, match="giant"):
        preset_named("giant")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_builds_and_micro_and_tiny_have_their_size(name: str) -> None:
    from shared.model.denoiser import build_denoiser

    preset = PRESETS[name]
    # Sizes alone: nothing of the large presets is allocated.
    with torch.device("meta"):
        autoencoder = build_autoencoder(preset, n_labels=2)
        denoiser = build_denoiser(preset, n_conditions=2)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (autoencoder, denoiser)]
    if name == "micro":
        assert 2 * sum(sizes) <= 3_000_000
    if name == "tiny":
        assert 0.5e6 < sizes[0] < 1.0e6 and 2.0e6 < sizes[1] < 4.0e6
    if name == "base":
        assert 28e6 < sizes[1] < 34e6 and preset.latent_shape(preset.grid_shape)[1:] == (16, 16, 16)
    if name == "h200":
        assert 170e6 < sizes[1] < 190e6 and preset.latent_shape(preset.grid_shape)[1:] == (64, 64, 64)


def test_a_mask_with_a_network_of_its_own() -> None:
    """Image and mask meet in the latent alone: each half depends on its own input, and decodes to it."""
    preset = replace(MICRO, latent_channels=6, mask_latent_channels=2)
    autoencoder = build_autoencoder(preset, n_labels=2, seed=3)
    image, mask = _volumes(2)
    z = autoencoder.encode(image, mask)
    assert z.shape[1:] == preset.latent_shape(MICRO.grid_shape)
    other = autoencoder.encode(image.flip(2), mask)
    assert torch.equal(z[:, 4:], other[:, 4:]) and not torch.equal(z[:, :4], other[:, :4])
    other = autoencoder.encode(image, (mask + 1) % 3)
    assert torch.equal(z[:, :4], other[:, :4]) and not torch.equal(z[:, 4:], other[:, 4:])
    decoded, labels = autoencoder.decode(z)
    assert decoded.shape == image.shape and labels.shape == mask.shape and labels.dtype == torch.uint8
