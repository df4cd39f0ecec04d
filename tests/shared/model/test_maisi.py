"""Public MAISI weights: small networks in the same format, through the files, give MONAI's own outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi

from server.pretrain import PretrainingRecipe, pretrain, public_phantoms
from shared.checkpoint import load_tensors, save_tensors
from shared.errors import UsageError
from shared.model.autoencoder import build_autoencoder
from shared.model.denoiser import build_denoiser
from shared.model.maisi import fix_image_scale, load_image_autoencoder, load_image_denoiser
from shared.model.presets import preset_named
from shared.model.training import TrainingSchedule
from shared.model.weights import WeightsMismatchError, load_weights

SMALL = replace(
    preset_named("h200"), autoencoder_channels=(8, 8, 16), autoencoder_res_blocks=1,
    denoiser_channels=(8, 16), denoiser_res_blocks=1, attention_levels=(False, True), head_channels=8,
    norm_groups=4, condition_gain=4.0, spacing_mm=(4.0, 4.0, 4.0),
)  # fmt: skip
SPACING = (4.0, 3.0, 2.0)


def _random(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return module.eval()


def _save(module: torch.nn.Module, path: Path, **more: np.ndarray) -> Path:
    save_tensors(path, {name: t.numpy() for name, t in module.state_dict().items()} | more, {})
    return path


def _maisi_autoencoder() -> torch.nn.Module:
    return _random(
        AutoencoderKlMaisi(
            spatial_dims=3, in_channels=1, out_channels=1, num_res_blocks=(1, 1, 1), num_channels=(8, 8, 16),
            attention_levels=(False,) * 3, latent_channels=4, norm_num_groups=4, num_splits=1, save_mem=False,
        ),
        1,
    )  # fmt: skip


def _maisi_denoiser(*, regions: bool) -> torch.nn.Module:
    return _random(
        DiffusionModelUNetMaisi(
            spatial_dims=3, in_channels=4, out_channels=4, num_res_blocks=1, num_channels=(8, 16),
            attention_levels=(False, True), num_head_channels=8, norm_num_groups=4, resblock_updown=True,
            include_fc=True, num_class_embeds=5, include_spacing_input=True,
            include_top_region_index_input=regions, include_bottom_region_index_input=regions,
        ),
        2,
    )  # fmt: skip


@torch.no_grad()
def test_the_image_autoencoder_is_maisis(tmp_path: Path) -> None:
    theirs = _maisi_autoencoder()
    tensors, _ = load_tensors(_save(theirs, tmp_path / "a.safetensors"))
    ours = build_autoencoder(SMALL, n_labels=2).eval()
    load_image_autoencoder(ours, tensors, what="a")
    image = torch.rand((1, 1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros((1, 16, 16, 16), dtype=torch.uint8)
    fix_image_scale(ours, {"scale_factor": np.array([1.25])}, what="a")
    z = ours.encode(image, mask)
    mean, _ = theirs.encode(image)
    assert torch.allclose(z[:, :4], mean * 1.25, atol=1e-5)
    assert torch.allclose(
        ours.decode_logits(torch.cat([mean, z[:, 4:]], dim=1))[0], theirs.decode(mean), atol=1e-5
    )
    with pytest.raises(WeightsMismatchError, match="scale_factor"):
        fix_image_scale(ours, {}, what="a")


@pytest.mark.parametrize("regions", [False, True])
@torch.no_grad()
def test_the_denoiser_is_maisis_with_its_constants_and_its_sign_turned(tmp_path: Path, regions: bool) -> None:
    theirs = _maisi_denoiser(regions=regions)
    tensors, _ = load_tensors(_save(theirs, tmp_path / "d.safetensors", scale_factor=np.ones(1, np.float32)))
    ours = build_denoiser(SMALL, n_conditions=2).eval()
    load_image_denoiser(
        ours, tensors, spacing_mm=SPACING, class_row=3, top_region=1, bottom_region=2, what="d"
    )
    generator = torch.Generator().manual_seed(0)
    z = torch.randn((2, 8, 4, 4, 4), generator=generator)
    level = torch.tensor([0.3, 0.9])
    more = {}
    if regions:
        rows = torch.eye(4)
        more = {"top_region_index_tensor": rows[[1, 1]], "bottom_region_index_tensor": rows[[2, 2]]}
    expected = theirs(
        z[:, :4], timesteps=level * 1000, class_labels=torch.tensor([3, 3]),
        spacing_tensor=torch.tensor([SPACING, SPACING]) * 100, **more,
    )  # fmt: skip
    found = ours(z, level, torch.tensor([0, 1]))
    assert torch.allclose(found[:, :4], -expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert not found[:, 4:].any() and float(expected.abs().max()) > 0.1
    for change in ({"class_row": 9}, {"top_region": 7}):
        with pytest.raises(UsageError):
            load_image_denoiser(ours, tensors, spacing_mm=SPACING, what="d", **change)  # type: ignore[arg-type]
    with pytest.raises(WeightsMismatchError, match="not the denoiser"):
        load_image_denoiser(ours, {"a": np.zeros(1)}, spacing_mm=SPACING, what="d")
    with pytest.raises(UsageError, match="network of its own"):
        load_image_denoiser(
            build_denoiser(preset_named("micro"), n_conditions=2), tensors, spacing_mm=SPACING, what="d"
        )


def test_pretraining_starts_from_both_files_and_keeps_the_image_autoencoder(tmp_path: Path) -> None:
    theirs = _maisi_autoencoder()
    autoencoder = _save(theirs, tmp_path / "a.safetensors")
    denoiser = _save(
        _maisi_denoiser(regions=False), tmp_path / "d.safetensors", scale_factor=np.full(1, 1.5, np.float32)
    )
    schedule = TrainingSchedule(steps=2, batch_size=2, learning_rate=1e-4, seed=1)
    pair = pretrain(
        preset=SMALL,
        volumes=public_phantoms(n_patients=3, seed=1, fractions={"common": 1.0}),
        conditions=("common", "rare"),
        labels=("organ", "lesion"),
        out_dir=tmp_path / "out",
        recipe=PretrainingRecipe(autoencoder=schedule, prior=schedule, copy_embedding=schedule, copies=1),
        data_description="phantoms",
        image_autoencoder=autoencoder,
        image_denoiser=denoiser,
    )
    ours = build_autoencoder(SMALL, n_labels=2)
    load_weights(ours, pair.autoencoder_path)
    for name, tensor in theirs.state_dict().items():
        assert torch.allclose(ours.network.state_dict()[name], tensor, atol=1e-3), name
    fresh = build_autoencoder(SMALL, n_labels=2, seed=1)
    trained = ours.mask_network.state_dict()
    assert any(
        not torch.allclose(trained[n], t, atol=1e-5) for n, t in fresh.mask_network.state_dict().items()
    )
    assert torch.allclose(ours.latent_std_C[:4], torch.full((4,), 1 / 1.5), atol=1e-3)
    assert not ours.latent_mean_C[:4].any() and set(pair.recipe["public_weights_sha256"]) == {
        "a.safetensors", "d.safetensors",
    }  # fmt: skip
