"""Public pretraining end to end, small: files, recipe, held-out patients, resume, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from server.pretrain import (
    PretrainingRecipe,
    PublicVolume,
    _held_out_rows,
    default_recipe,
    held_out_patients,
    mask_sha256,
    pretrain,
    pretrain_micro,
    public_phantoms,
    recipe_covariates,
)
from shared.checkpoint import file_sha256
from shared.errors import CoordinatorError, UsageError
from shared.model.denoiser import build_denoiser
from shared.model.presets import PRESETS, preset_named
from shared.model.shipped import PretrainedPair, read_pair
from shared.model.training import TrainingSchedule
from shared.model.weights import load_weights
from shared.study_plan import parse_covariate
from shared.volumes.plausibility import read_ranges

SMALL = replace(preset_named("micro"), autoencoder_channels=(8, 8), denoiser_channels=(8, 8), head_channels=8)
RECIPE = PretrainingRecipe(
    autoencoder=TrainingSchedule(steps=6, batch_size=2, learning_rate=1e-3, seed=1, save_every=3),
    prior=TrainingSchedule(steps=6, batch_size=4, learning_rate=1e-3, seed=1, save_every=3),
    copy_embedding=TrainingSchedule(steps=4, batch_size=4, learning_rate=1e-3, seed=1, save_every=2),
    copies=1,
)
CONDITIONS = ("common", "rare")
LABELS = ("organ", "lesion")


@pytest.fixture(scope="module")
def volumes() -> list[PublicVolume]:
    return public_phantoms(n_patients=6, seed=1, fractions={"common": 1.0})


def _pretrain(out: Path, volumes: list[PublicVolume], **changes: object) -> PretrainedPair:
    arguments: dict[str, object] = {
        "preset": SMALL,
        "volumes": volumes,
        "conditions": CONDITIONS,
        "labels": LABELS,
        "out_dir": out,
        "recipe": RECIPE,
        "data_description": "six phantoms",
        **changes,
    }
    return pretrain(**arguments)  # type: ignore[arg-type]


def test_it_writes_a_pair_that_reads_back_with_its_recipe(
    tmp_path: Path, volumes: list[PublicVolume]
) -> None:
    pair = _pretrain(tmp_path, volumes)
    assert read_pair(tmp_path).recipe == json.loads(json.dumps(pair.recipe))
    recipe = pair.recipe
    assert recipe["conditions_never_seen"] == ["rare"]
    unseen = set(held_out_patients([volume.patient_id for volume in volumes], RECIPE.held_out_share))
    trained = {mask_sha256(volume.mask) for volume in volumes if volume.patient_id not in unseen}
    assert recipe["data"]["trained_masks_sha256"] == sorted(trained) and len(trained) >= 5
    assert recipe["data"]["patients"] == 6 and recipe["data"]["held_out_patients"] == 1
    assert set(recipe["autoencoder_held_out"]) == {"l1", "texture", "dice_organ", "dice_lesion"}
    assert [step for step, _ in recipe["prior_held_out_loss"]["by_step"]] == [1, 2, 3, 4, 5, 6]
    denoiser = build_denoiser(SMALL, n_conditions=2)
    load_weights(denoiser, pair.prior_path)
    table = denoiser.unet.class_embedding.table.weight
    assert torch.equal(table[0], table[1]) and not torch.equal(table[0], table[2])


def test_covariates_are_learned_and_values_never_seen_start_as_unknown(
    tmp_path: Path, volumes: list[PublicVolume]
) -> None:
    covariates = (parse_covariate("field=low,high,mobile"), parse_covariate("age=40,60"))
    told = [
        replace(volume, covariates={"field": ("low", "high")[row % 2], "age": str(30 + 20 * (row % 2))})
        for row, volume in enumerate(volumes)
    ]
    pair = _pretrain(tmp_path, told, covariates=covariates)
    assert recipe_covariates(pair.recipe) == covariates
    assert pair.recipe["covariates_never_seen"] == ["field: mobile", "age: from 60"]
    denoiser = build_denoiser(SMALL, n_conditions=2, covariate_sizes=(3, 3))
    load_weights(denoiser, pair.prior_path)
    field, age = (table.weight for table in denoiser.unet.class_embedding.covariate_tables)
    assert torch.equal(field[3], field[0]) and torch.equal(age[3], age[0])
    assert not torch.equal(field[1], field[0]) and not torch.equal(field[1], field[2])
    with pytest.raises(UsageError, match="field: 'huge' is none of"):
        _pretrain(tmp_path, [replace(told[0], covariates={"field": "huge"}), *told], covariates=covariates)


def test_a_prior_by_v_prediction(tmp_path: Path, volumes: list[PublicVolume]) -> None:
    pair = _pretrain(tmp_path, volumes, preset=replace(SMALL, diffusion="v_prediction", noise_shift=1.5))
    assert [step for step, _ in pair.recipe["prior_held_out_loss"]["by_step"]] == [1, 2, 3, 4, 5, 6]


def test_a_segmenter_is_named_by_recipe_and_ranges_and_a_recipe_without_one_says_nothing_of_it(
    tmp_path: Path,
) -> None:
    volumes = public_phantoms(n_patients=8, seed=1, fractions={"common": 1.0})
    schedule = TrainingSchedule(steps=4, batch_size=2, learning_rate=1e-3, seed=1, save_every=2)
    pair = _pretrain(tmp_path / "with", volumes, recipe=replace(RECIPE, segmenter=schedule))
    assert pair.segmenter_path is not None and read_pair(tmp_path / "with").segmenter_path is not None
    ranges = read_ranges(tmp_path / "with" / "plausibility.json")
    assert ranges.agreement is not None and ranges.agreement.scans == 2  # one scan, as it is and as decoded
    sha256 = file_sha256(pair.segmenter_path)
    assert ranges.agreement.segmenter_sha256 == sha256 == pair.recipe["sha256"]["segmenter.safetensors"]
    plain = _pretrain(tmp_path / "without", volumes)
    assert plain.segmenter_path is None and "segmenter" not in json.dumps(plain.recipe)
    assert b"agreement" not in (tmp_path / "without" / "plausibility.json").read_bytes()
    assert {k: v for k, v in pair.recipe["sha256"].items() if "segmenter" not in k} == plain.recipe["sha256"]
    pair.segmenter_path.write_bytes(b"other")
    with pytest.raises(UsageError, match="segmenter"):
        read_pair(tmp_path / "with")


def test_a_killed_run_resumes_to_the_same_files(tmp_path: Path, volumes: list[PublicVolume]) -> None:
    whole = _pretrain(tmp_path / "whole", volumes)

    class _KilledError(Exception):
        pass

    stopped = []
    for stage in ("autoencoder", "prior", "copy embedding"):

        def kill(name: str, step: int, steps: int, loss: float, wanted: str = stage) -> None:
            if name == wanted:
                stopped.append((name, step))
                raise _KilledError

        with pytest.raises(_KilledError):
            _pretrain(tmp_path / "killed", volumes, progress=kill)
    resumed = _pretrain(tmp_path / "killed", volumes)
    assert [name for name, _ in stopped] == ["autoencoder", "prior", "copy embedding"]
    assert resumed.recipe["sha256"] == whole.recipe["sha256"]
    anew = _pretrain(tmp_path / "killed", volumes, resume=False)
    assert anew.recipe["sha256"] == whole.recipe["sha256"]


def test_patients_not_scans_are_held_out() -> None:
    ids = ["a", "a", "b", "b", "b", "c", "d", "e", "e", "f"]
    rows = _held_out_rows(ids, 0.34)
    chosen = {name for name, held in zip(ids, rows, strict=True) if held}
    assert len(chosen) == 2
    assert all(bool(held) == (name in chosen) for name, held in zip(ids, rows, strict=True))
    assert 1 <= int(_held_out_rows(["a", "b"], 0.99).sum()) < 2
    assert torch.equal(rows.flip(0), _held_out_rows(ids[::-1], 0.34))


def test_another_seed_or_other_data_give_other_weights(tmp_path: Path, volumes: list[PublicVolume]) -> None:
    first = _pretrain(tmp_path / "a", volumes).recipe
    again = _pretrain(tmp_path / "a2", volumes).recipe
    reseeded = replace(
        RECIPE, autoencoder=replace(RECIPE.autoencoder, seed=2), prior=replace(RECIPE.prior, seed=2)
    )
    other = _pretrain(tmp_path / "b", volumes, recipe=reseeded).recipe
    fewer = _pretrain(tmp_path / "c", volumes[:-1]).recipe
    assert first["sha256"] == again["sha256"]
    assert first["sha256"]["prior.safetensors"] != other["sha256"]["prior.safetensors"]
    assert first["data"]["sha256"] != fewer["data"]["sha256"]


def test_unfit_volumes_are_refused(tmp_path: Path, volumes: list[PublicVolume]) -> None:
    one = volumes[0]
    bright = replace(one, image=one.image * 3)
    hole = replace(one, image=np.where(one.image > 0.5, np.nan, one.image).astype(np.float32))
    label = replace(one, mask=np.full_like(one.mask, 3))
    small = replace(one, image=one.image[:12], mask=one.mask[:12])
    for wrong in (bright, hole, label, small):
        with pytest.raises(CoordinatorError):
            _pretrain(tmp_path, [*volumes[1:], wrong])
    with pytest.raises(CoordinatorError, match="two public patients"):
        _pretrain(tmp_path, volumes[:1])
    with pytest.raises(UsageError, match="other"):
        _pretrain(tmp_path, [*volumes, replace(one, condition="other")])
    with pytest.raises(UsageError, match="does not fit"):
        cut = [replace(v, image=v.image[:20], mask=v.mask[:20]) for v in volumes]
        _pretrain(tmp_path, cut)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_has_a_recipe(name: str) -> None:
    recipe = default_recipe(preset_named(name), seed=1)
    assert recipe.autoencoder.steps > 0 and 0 < recipe.held_out_share < 1


@pytest.mark.slow
def test_the_shipped_recipe_runs(tmp_path: Path) -> None:
    """The real volumes and networks of the shipped pair, for a hundredth of its steps."""
    pair = pretrain_micro(tmp_path, steps_factor=0.01)
    assert pair.recipe["preset"] == "micro" and read_pair(tmp_path).recipe["data"]["patients"] == 400
