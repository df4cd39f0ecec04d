"""Quality figures of a released bundle: each distance sees what it is about, floors, refusals, the page.

Samples and scans come from fixed seeds: no test here is random.
"""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from headless_chromium import find_chromium
from PIL import Image
from release_study import make_study

from deploy.cli.main import cli
from server.distribution_distance import (
    diversity,
    histogram_distance,
    intensity_histogram,
    kernel_distance,
    set_distance,
    volume_distance,
)
from server.pretrain import public_phantoms
from server.quality_page import quality_page
from server.release_quality import PublicScans, ReleaseQuality, evaluate_release
from shared.errors import CoordinatorError, UsageError
from shared.model.shipped import shipped_pair

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
        "kernel distance in the copy check's embedding",
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
    told = CliRunner().invoke(cli, [*command, "--simulated", "--report", str(page)], catch_exceptions=False)
    assert told.exit_code == 0 and "synthetic against public scans" in told.output
    assert "copies, as released: " in told.output
    assert "Condition rare" in page.read_text(encoding="utf-8")


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
