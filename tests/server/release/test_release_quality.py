"""Quality figures of a released bundle: each distance sees what it is about, floors, refusals, the page.

Samples and scans come from fixed seeds: no test here is random.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from headless_chromium import find_chromium
from monai.metrics.fid import get_fid_score
from PIL import Image
from release_study import make_study

from client.ingest.phantoms import write_phantom_folder
from deploy.cli.main import cli
from deploy.public_networks import PublicSource, read_public
from server.distribution_distance import (
    diversity,
    frechet_distance,
    histogram_distance,
    intensity_histogram,
    kernel_distance,
    set_distance,
    volume_distance,
)
from server.pretrain import PublicVolume, mask_sha256, public_phantoms
from server.public_segmenter import default_segmenter_schedule
from server.quality_page import quality_page
from server.release_quality import PublicScans, ReleaseQuality, evaluate_release, split_by_training
from server.segmenter_utility import SegmenterScore, segmenter_scores
from shared.errors import CoordinatorError, UsageError
from shared.model.copy_embedding import load_copy_embedding
from shared.model.presets import preset_named
from shared.model.shipped import shipped_pair
from shared.volumes.canonical_grid import CanonicalGrid
from shared.volumes.phantom import simulate_cohort

RNG = np.random.default_rng(5)
EMBEDDING = shipped_pair("micro").copy_embedding_path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release whose generator is the public prior of the simulated scans."""
    pair, root = shipped_pair("micro"), tmp_path_factory.mktemp("study")
    assert pair.copy_embedding_path is not None
    sha256 = pair.recipe["sha256"]["copy_embedding.safetensors"]
    study = make_study(
        root,
        networks=(pair.autoencoder_path, pair.prior_path),
        audit={"copy_embedding_sha256": sha256},
    )
    return study.release(root / "bundle").path


@pytest.fixture(scope="module")
def scans() -> PublicScans:
    half = {name: public_phantoms(n_patients=8, seed=seed, fractions={"common": 1.0})
            for name, seed in (("held_out", 31), ("further", 32))}  # fmt: skip
    return PublicScans(**half, description="They are simulated")


@pytest.fixture(scope="module")
def quality(bundle: Path, scans: PublicScans) -> ReleaseQuality:
    return evaluate_release(bundle, scans, copy_embedding=EMBEDDING, count=10, seed=1)


def test_figures_by_condition_beside_their_floor(quality: ReleaseQuality, scans: PublicScans) -> None:
    assert quality.verified and quality.copies is not None and quality.copies.name == "copies"
    common, rare = quality.conditions
    names = [distance.name for distance in common.distances]
    assert names == [
        "volume of organ",
        "volume of lesion",
        "intensities of the whole image",
        "intensities of organ",
        "intensities of lesion",
        "Frechet distance of sagittal slices",
        "Frechet distance of coronal slices",
        "Frechet distance of axial slices",
        "kernel distance (KID, squared MMD)",
    ]
    for distance in common.distances:
        assert distance.floor is not None and distance.low <= distance.high
        assert distance.n_real == len(scans.held_out) and distance.n_synthetic == 10
    lesion = common.distances[1]
    real, synthetic = common.volumes["lesion"]
    assert lesion.value == pytest.approx(volume_distance(np.array(real), np.array(synthetic)))
    assert real == [64.0 * int((volume.mask == 2).sum()) for volume in scans.held_out]
    # A copy of the real scans in the place of the synthetic ones would have no distance at all.
    assert lesion.value > 0 == volume_distance(np.array(real), np.array(real))
    assert rare.n_real == 0 and not rare.distances and rare.n_synthetic == 10 and rare.diversity.real is None
    assert (
        0 < common.diversity.synthetic < 1
        and len(common.nearest) == 3
        and common.nearer_than_copy is not None
    )
    json.dumps(quality.to_dict(), allow_nan=False)


def test_the_page_stands_alone_and_shows_every_figure(quality: ReleaseQuality) -> None:
    html = quality_page(quality, at="2026-11-26T18:00:00Z")
    assert html == quality_page(quality, at="2026-11-26T18:00:00Z")
    assert "<script" not in html and not re.search(r"(src|href)=\"(?!data:image/png;base64,|#)", html)
    for distance in quality.conditions[0].distances:
        assert f"{distance.value:.4g}" in html and f"{distance.floor:.4g}" in html
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert len(pictures) == 4
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture, validate=True))) as image:
            image.load()
            assert image.width > 400
    assert "there is nothing to hold its samples against" in html


@pytest.mark.slow
def test_the_page_opens_in_a_browser_with_its_pictures(quality: ReleaseQuality, tmp_path: Path) -> None:
    chromium = find_chromium(tmp_path / "profile")
    page = tmp_path / "quality.html"
    page.write_text(quality_page(quality, at="2026-11-26T18:00:00Z"), encoding="utf-8")
    assert "Condition common" in chromium.dom(page)
    with Image.open(chromium.picture(page, tmp_path / "page.png", height=6000)) as picture:
        assert picture.size == (1100, 6000) and len(picture.getcolors(2**24) or []) > 200


@pytest.mark.slow
def test_the_command_prints_a_table_json_and_a_page(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path))
    assert shipped_pair("micro").prior_path.parent.is_dir()
    shutil.copytree(shipped_pair("micro").prior_path.parent, tmp_path / "coordinator" / "s" / "public")
    command = ["coordinator", "evaluate", "--study", "s", "--bundle", str(bundle), "--count", "8"]
    refused = CliRunner().invoke(cli, command)
    assert refused.exit_code != 0 and "one of --nifti" in str(refused.exception)
    page = tmp_path / "page.html"
    told = CliRunner().invoke(
        cli,
        [*command, "--simulated", "--segmenter-steps", "5", "--report", str(page)],
        catch_exceptions=False,
    )
    assert told.exit_code == 0 and "synthetic against public scans" in told.output
    assert "copies, as released: " in told.output
    assert "Condition rare" in page.read_text(encoding="utf-8")
    assert "segmenters, tested on" in told.output and "What a segmenter learns" in page.read_text()


@pytest.mark.slow
def test_the_command_reads_a_folder_of_nifti_and_leaves_out_what_pretraining_saw(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shipped networks, with a recipe that names half of the folder's patients as trained on."""
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path))
    public, folder = tmp_path / "coordinator" / "s" / "public", tmp_path / "nifti"
    shutil.copytree(shipped_pair("micro").prior_path.parent, public)
    cohort = simulate_cohort(n_patients=12, conditions_fractions={"common": 1.0}, seed=33)
    write_phantom_folder(cohort, folder, spacing_mm=(4.0, 4.0, 4.0))
    preset = preset_named("micro")
    grid = CanonicalGrid(shape=preset.grid_shape, spacing_mm=preset.spacing_mm)
    source = PublicSource(nifti=folder, decathlon=None, patients=None, only=None, volume_cut_mm3=None)
    read = read_public(source, grid, conditions=("common", "rare"), labels=("organ", "lesion"))
    trained = sorted({volume.patient_id for volume in read})[:6]
    command = ["coordinator", "evaluate", "--study", "s", "--bundle", str(bundle), "--count", "8"]
    command += ["--nifti", str(folder), "--json"]
    unsure = CliRunner().invoke(cli, command)
    assert unsure.exit_code != 0 and "does not say" in str(unsure.exception)
    recipe = json.loads((public / "recipe.json").read_text())
    masks = [mask_sha256(volume.mask) for volume in read if volume.patient_id in trained]
    recipe["data"]["trained_masks_sha256"] = masks
    (public / "recipe.json").write_text(json.dumps(recipe))
    told = CliRunner().invoke(cli, command, catch_exceptions=False)
    figures = json.loads(told.stdout)["public_scans"]
    assert figures["held_out_patients"] == 6 and figures["further"] == len(masks)
    assert figures["held_out"] + figures["further"] == len(read)


def test_what_cannot_be_measured_is_refused(bundle: Path, scans: PublicScans, tmp_path: Path) -> None:
    nobody = PublicScans(held_out=[], further=[], description="")
    with pytest.raises(UsageError, match="held out"):
        evaluate_release(bundle, nobody, copy_embedding=EMBEDDING, count=10, seed=1)
    with pytest.raises(UsageError, match="at least 8"):
        evaluate_release(bundle, scans, copy_embedding=EMBEDDING, count=7, seed=1)
    other = tmp_path / "other.safetensors"
    other.write_bytes(b"other")
    with pytest.raises(CoordinatorError, match="not the embedding"):
        evaluate_release(bundle, scans, copy_embedding=other, count=10, seed=1)
    with pytest.raises(CoordinatorError, match="plan cannot be read"):
        evaluate_release(tmp_path, scans, copy_embedding=EMBEDDING, count=10, seed=1)


def test_distances_know_alike_from_apart() -> None:
    assert volume_distance(np.arange(5.0), np.arange(5.0) + 3) == pytest.approx(3.0)
    dark, bright = (intensity_histogram(np.full(50, x, dtype=np.float32))[None] for x in (0.25, 0.5))
    assert histogram_distance(dark, bright) == pytest.approx(0.25) and histogram_distance(dark, dark) == 0
    assert intensity_histogram(np.zeros(0, dtype=np.float32)).sum() == 0

    def unit(centre: float, n: int) -> np.ndarray:
        x = RNG.standard_normal((n, 16)) + centre * np.eye(16)[0]
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    same, apart = kernel_distance(unit(0, 200), unit(0, 200)), kernel_distance(unit(0, 200), unit(3, 200))
    assert abs(same) < 0.02 < 0.2 < apart
    twice = unit(0, 40)
    assert kernel_distance(np.repeat(twice, 2, axis=0), twice) == pytest.approx(kernel_distance(twice, twice))


def test_the_frechet_distance_is_monais_and_that_of_known_distributions() -> None:
    far = np.zeros(8)
    far[0] = 2.0
    real, same = RNG.standard_normal((300, 6, 8)), RNG.standard_normal((300, 6, 8))
    moved, wider = same + far, 3.0 * same
    theirs = get_fid_score(torch.from_numpy(moved.reshape(-1, 8)), torch.from_numpy(real.reshape(-1, 8)))
    assert frechet_distance(real, moved) == pytest.approx(float(theirs), rel=1e-4)
    assert frechet_distance(real, real) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(real, same) < 0.05
    # |m - n|^2 = 4; sum over 8 directions of (3 - 1)^2.
    assert frechet_distance(real, moved) == pytest.approx(4.0, abs=0.4)
    assert frechet_distance(real, wider) == pytest.approx(32.0, rel=0.1)
    assert np.isfinite(frechet_distance(real[:1, :3], same[:1, :2])), "fewer slices than channels"


def test_slices_are_told_apart_by_their_plane() -> None:
    embedding = load_copy_embedding(EMBEDDING, n_labels=2)
    assert embedding is not None
    image, mask = torch.zeros((1, 1, 24, 24, 24)), torch.zeros((1, 24, 24, 24), dtype=torch.long)
    image[:, :, 4:8] = 1.0
    planes = embedding.plane_features(image, mask)
    assert all(plane.shape == (1, 6, 64) for plane in planes)
    spread = [float(plane.std(dim=1).mean()) for plane in planes]
    assert spread[0] > 1.5 * max(spread[1:]), "a slab across D differs from slice to slice along D"


def test_pretraining_scans_are_known_whatever_is_given_with_them(scans: PublicScans) -> None:
    volumes = [*scans.held_out, *(replace(v, patient_id=f"other {v.patient_id}") for v in scans.further)]
    several = [v.patient_id for v in volumes]
    seen = next(patient for patient in several if several.count(patient) > 1 and patient.startswith("other"))
    # One scan of the patient is enough; other conditions and a subset of the scans change nothing.
    others = [replace(volume, condition="rare") for volume in volumes if volume.patient_id == seen]
    recipe = {"data": {"trained_masks_sha256": [mask_sha256(others[1].mask)]}}
    found = split_by_training([*others, *scans.held_out], recipe)
    assert list(found.further) == others and list(found.held_out) == list(scans.held_out)
    with pytest.raises(CoordinatorError, match="does not say"):
        split_by_training(volumes, {"data": {}})


def test_a_segmenter_learns_from_scans_and_not_from_wrong_masks(scans: PublicScans) -> None:
    images = np.stack([volume.image for volume in scans.further])
    masks = np.stack([volume.mask for volume in scans.further])
    schedule = replace(default_segmenter_schedule(seed=1), steps=60)

    def dice(masks_NDHW: np.ndarray, further: list[PublicVolume]) -> dict[str, SegmenterScore]:
        scores = segmenter_scores(
            (images, masks_NDHW), further=further, held_out=scans.held_out, labels=("organ", "lesion"),
            schedule=schedule,
        )  # fmt: skip
        return {f"{score.trained_on}: {score.label}": score for score in scores}

    good, wrong = dice(masks, []), dice(np.roll(masks, 9, axis=1), list(scans.further))
    assert set(good) == {"synthetic scans: organ", "synthetic scans: lesion"} and len(wrong) == 6
    organ = good["synthetic scans: organ"]
    assert organ.low <= organ.dice <= organ.high and organ.n_scans == len(images)
    assert organ.dice > 0.7 > 0.45 > wrong["synthetic scans: organ"].dice
    assert wrong["public scans: organ"].dice == pytest.approx(organ.dice, abs=1e-6)
    assert wrong["both: organ"].n_scans == 2 * len(images)


def test_intervals_and_floors() -> None:
    real, other, synthetic = RNG.normal(0, 1, 60), RNG.normal(0, 1, 40), RNG.normal(2, 1, 90)
    found = set_distance("x", "mm3", volume_distance, real=real, synthetic=synthetic, other_real=other)
    assert found.n_synthetic == 40 and found.floor is not None
    assert found.floor < 0.6 < 1.2 < found.low < found.value < found.high < 2.8
    alone = set_distance("x", "mm3", volume_distance, real=real, synthetic=synthetic)
    assert alone.floor is None and alone.n_synthetic == 90


def test_diversity_sees_samples_that_are_all_alike() -> None:
    smooth = [np.linspace(0, 1, 24, dtype=np.float32) ** power for power in (0.3, 0.6, 1, 2, 4, 8)]
    varied = np.stack([np.broadcast_to(line[:, None, None], (24, 24, 24)) for line in smooth])
    varied = (varied + 0.05 * RNG.random(varied.shape)).clip(0, 1).astype(np.float32)
    alike = np.repeat(varied[:1], 6, axis=0) + 0.001 * RNG.random((6, 24, 24, 24)).astype(np.float32)
    found, collapsed = diversity(varied, alike), diversity(alike, varied)
    assert collapsed.synthetic > 0.99 > found.synthetic + 0.1 and found.real == pytest.approx(
        collapsed.synthetic
    )
    assert found.pairs == 15
