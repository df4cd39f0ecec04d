"""The shipped pair for the simulated volumes: small, hashed, ignorant of the rare condition, usable."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.checkpoint import load_tensors
from shared.errors import UsageError
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.denoiser import Denoiser, build_denoiser
from shared.model.presets import preset_named
from shared.model.sampling import generate_volumes
from shared.model.shipped import PretrainedPair, read_pair, shipped_pair
from shared.model.weights import load_weights
from shared.volumes.intensity import normalise_intensity
from shared.volumes.phantom import (
    COMMON,
    CONDITIONS,
    LABELS,
    LESION,
    MICRO_GRID_SHAPE,
    MICRO_SPACING_MM,
    ORGAN,
    RARE,
    simulate_cohort,
)

MICRO = preset_named("micro")


@pytest.fixture(scope="module")
def pair() -> PretrainedPair:
    return shipped_pair("micro")


@pytest.fixture(scope="module")
def autoencoder(pair: PretrainedPair) -> LatentAutoencoder:
    built = build_autoencoder(MICRO, n_labels=len(LABELS))
    metadata = load_weights(built, pair.autoencoder_path)
    assert metadata["preset"] == "micro" and json.loads(metadata["labels"]) == list(LABELS)
    return built


@pytest.fixture(scope="module")
def prior(pair: PretrainedPair) -> Denoiser:
    built = build_denoiser(MICRO, n_conditions=len(CONDITIONS))
    assert json.loads(load_weights(built, pair.prior_path)["conditions"]) == list(CONDITIONS)
    return built


def test_both_files_are_half_precision_and_at_most_3_mb_together(pair: PretrainedPair) -> None:
    paths = (pair.autoencoder_path, pair.prior_path)
    assert sum(path.stat().st_size for path in paths) <= 3_000_000
    for path in paths:
        assert {array.dtype for array in load_tensors(path)[0].values()} == {np.dtype(np.float16)}


def test_the_recipe_says_what_was_seen(pair: PretrainedPair) -> None:
    assert pair.recipe["conditions_never_seen"] == [RARE]
    assert set(pair.recipe["data"]["scans_by_condition"]) == {COMMON}
    assert pair.recipe["grid_shape"] == list(MICRO_GRID_SHAPE)


def test_the_prior_cannot_tell_the_rare_condition_from_the_common_one(prior: Denoiser) -> None:
    table = prior.unet.class_embedding.table.weight
    assert torch.equal(table[CONDITIONS.index(RARE)], table[CONDITIONS.index(COMMON)])


def test_unseen_rare_volumes_survive_the_autoencoder(autoencoder: LatentAutoencoder) -> None:
    """Rare lesions were never trained on; their masks come back (Dice) at their size."""
    scans = simulate_cohort(n_patients=24, conditions_fractions={RARE: 1.0}, seed=90_210)
    image = torch.from_numpy(np.stack([normalise_intensity(scan.image) for scan in scans]))[:, None]
    mask = torch.from_numpy(np.stack([scan.mask for scan in scans]))
    with torch.no_grad():
        output, labels = autoencoder.decode(autoencoder.encode(image, mask))
    for label, least in ((ORGAN, 0.93), (LESION, 0.85)):
        a, b = labels == label, mask == label
        dice = 2.0 * (a & b).sum() / (a.sum() + b.sum())
        assert dice > least, f"label {label}: Dice {float(dice):.3f}"
    ratio = float((labels == LESION).sum() / (mask == LESION).sum())
    assert 0.85 < ratio < 1.15
    assert (output - image).abs().mean() < 0.06


def test_generated_volumes_have_an_organ_with_a_lesion_in_it(
    autoencoder: LatentAutoencoder, prior: Denoiser
) -> None:
    pairs = list(
        generate_volumes(autoencoder, prior, condition=0, count=16, seed=1, grid_shape=MICRO_GRID_SHAPE)
    )
    organ = [float((mask == ORGAN).float().mean()) for _, mask in pairs]
    lesion = [int((mask == LESION).sum()) for _, mask in pairs]
    assert min(organ) > 0.06 and max(organ) < 0.25
    assert sum(count > 0 for count in lesion) >= 12
    assert np.prod(MICRO_SPACING_MM) == 64.0
    for image, mask in pairs:
        assert image[mask == ORGAN].mean() > image[mask == 0].mean()


def test_a_changed_or_missing_file_is_refused(pair: PretrainedPair, tmp_path: Path) -> None:
    copy = tmp_path / "pair"
    shutil.copytree(pair.prior_path.parent, copy)
    assert read_pair(copy).recipe == pair.recipe
    data = bytearray((copy / "prior.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "prior.safetensors").write_bytes(bytes(data))
    with pytest.raises(UsageError, match=r"prior\.safetensors"):
        read_pair(copy)
    (copy / "prior.safetensors").unlink()
    with pytest.raises(UsageError, match="missing"):
        read_pair(copy)
    for name in ("tiny", "..", "nonsense"):
        with pytest.raises(UsageError, match="ships"):
            shipped_pair(name)


def test_presets_weights_files_and_phantoms_need_no_torch() -> None:
    code = (
        "import sys, shared.checkpoint, shared.model.conditioning, shared.model.presets;"
        "import shared.model.shipped, shared.volumes.phantom;"
        "print(sorted({'torch', 'monai', 'opacus', 'safetensors'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
