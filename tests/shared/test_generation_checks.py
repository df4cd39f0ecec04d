"""Generation that checks, interpolates, and writes DICOM: what is left out, counted and replaced."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from click.testing import CliRunner
from known_bundle import GRID, make_bundle
from PIL import Image

from deploy.cli.main import cli
from shared.checkpoint import file_sha256
from shared.errors import UsageError
from shared.generation import BundleError, GenerationReport, ImplausibleError, generate_volumes
from shared.model.segmenter import build_segmenter, load_segmenter
from shared.model.weights import save_weights
from shared.volumes.nifti import read_volume
from shared.volumes.plausibility import Agreement, PlausibilityRanges, figures, label_dice, write_ranges
from shared.volumes.surface import label_surface, surface_sheet

LABELS = ("organ", "lesion")
TRIED = 12


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose ranges refuse about a third of its samples by their brightness alone."""
    root = make_bundle(tmp_path_factory.mktemp("release") / "bundle")
    seen = _generate(root, tmp_path_factory.mktemp("seen"), count=TRIED)
    assert not seen.checked
    brightness = [_brightness(pair.image) for pair in seen.pairs]
    limit = float(np.sort(brightness)[-5:-3].mean())
    ranges = PlausibilityRanges(
        labels=LABELS, required=(), scans=8, low={"image mean": 0.0}, high={"image mean": limit}
    )
    write_ranges(root / "configs/plausibility.json", ranges)
    return root


def _brightness(path: Path) -> float:
    image = read_volume(path).voxels_DHW.astype(np.float32)
    none = np.zeros(image.shape, dtype=np.uint8)
    return figures(image, none, labels=LABELS, spacing_mm=(1.0, 1.0, 1.0))["image mean"]


def _generate(bundle: Path, out: Path, **choices: object) -> GenerationReport:
    request: dict[str, object] = {"condition": "rare", "count": 6, "seed": 5, "batch_size": 4, **choices}
    return generate_volumes(bundle_dir=bundle, out_dir=out, **request)  # type: ignore[arg-type]


def _numbers(report: GenerationReport) -> list[int]:
    return [int(pair.sidecar.stem.rsplit("_", 1)[1]) for pair in report.pairs]


def test_implausible_samples_are_counted_and_replaced(bundle: Path, tmp_path: Path) -> None:
    report = _generate(bundle, tmp_path / "out")
    refused = [index for index, _ in report.rejected]
    assert report.checked and refused and len(report.pairs) == report.written == 6
    assert sorted(_numbers(report) + refused) == list(range(6 + len(refused)))
    limit = json.loads((bundle / "configs/plausibility.json").read_text())["high"]["image mean"]
    assert all(_brightness(pair.image) <= limit for pair in report.pairs)
    for _, found in report.rejected:
        assert [fault.figure for fault in found] == ["image mean"] and found[0].value > limit
    assert report.common_faults() == [("image mean", len(refused))]
    assert not any(f"_{index:05d}" in path.name for index in refused for path in (tmp_path / "out").iterdir())
    assert json.loads(report.pairs[0].sidecar.read_text())["plausibility_sha256"]


def test_masks_that_the_segmenter_does_not_find_are_counted_and_replaced(
    bundle: Path, tmp_path: Path
) -> None:
    """Fresh networks on both sides: agreement is poor, but the threshold splits the samples all the same."""
    root = tmp_path / "bundle"
    shutil.copytree(bundle, root)
    (root / "configs/plausibility.json").unlink()
    segmenter = build_segmenter(n_labels=2, seed=3)
    save_weights(segmenter, root / "models/segmenter.safetensors", {}, half=True)
    kept = load_segmenter(root / "models/segmenter.safetensors", n_labels=2)
    assert kept is not None
    overlaps = []
    for pair in _generate(root, tmp_path / "seen", count=TRIED).pairs:
        image, mask = (read_volume(path).voxels_DHW for path in (pair.image, pair.mask))
        found = kept.segment(image[None].astype(np.float32))[0]
        overlaps.append(label_dice(mask, found, LABELS)["organ"])
    low = float(np.sort(overlaps)[3:5].mean())
    assert sum(overlap < low for overlap in overlaps) == 4
    ranges = PlausibilityRanges(
        labels=LABELS,
        required=(),
        scans=8,
        low={},
        high={},
        agreement=Agreement(
            segmenter_sha256=file_sha256(root / "models/segmenter.safetensors"),
            scans=4,
            low={"organ": low, "lesion": 0.0},
        ),
    )
    write_ranges(root / "configs/plausibility.json", ranges)
    report = _generate(root, tmp_path / "out")
    assert len(report.pairs) == 6 and report.rejected
    assert {fault.figure for _, found in report.rejected for fault in found} == {"organ agreement"}
    refused = [index for index in range(TRIED) if overlaps[index] < low]
    assert [index for index, _ in report.rejected] == [i for i in refused if i < 6 + len(report.rejected)]
    (root / "models/segmenter.safetensors").unlink()
    with pytest.raises(BundleError, match="not the segmenter"):
        _generate(root, tmp_path / "none")


def test_batches_and_interruptions_choose_the_same_samples(bundle: Path, tmp_path: Path) -> None:
    whole = _generate(bundle, tmp_path / "whole")
    assert _numbers(_generate(bundle, tmp_path / "one", batch_size=1)) == _numbers(whole)
    _generate(bundle, tmp_path / "grown", count=2)
    grown = _generate(bundle, tmp_path / "grown")
    assert _numbers(grown) == _numbers(whole) and grown.present >= 2
    again = _generate(bundle, tmp_path / "whole")
    assert again.written == 0 and again.present == 6
    for pair, twin in zip(whole.pairs, again.pairs, strict=True):
        assert pair.image.read_bytes() == twin.image.read_bytes()


def test_a_generator_that_fails_too_often_is_given_up(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(ImplausibleError, match=r"of \d+ samples are implausible; most often: image mean"):
        _generate(bundle, tmp_path / "out", count=100, max_rejected_share=0.1)
    assert list((tmp_path / "out").glob("*.json"))
    with pytest.raises(UsageError, match="rejected share"):
        _generate(bundle, tmp_path / "out", max_rejected_share=1.0)
    ranges = (bundle / "configs/plausibility.json").read_text()
    other = make_bundle(tmp_path / "other")
    for text, words in (("{}", "not ranges"), (ranges.replace("lesion", "cyst"), "other labels")):
        (other / "configs/plausibility.json").write_text(text)
        with pytest.raises(BundleError, match=words):
            _generate(other, tmp_path / "none")


def test_interpolation_begins_and_ends_at_two_seeds_samples(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    report = _generate(bundle, tmp_path / "way", count=5, seed=5, to_seed=6)
    images = [read_volume(pair.image).voxels_DHW for pair in report.pairs]
    for seed, image in ((5, images[0]), (6, images[-1])):
        alone = _generate(bundle, tmp_path / f"end{seed}", count=1, seed=seed)
        assert np.abs(read_volume(alone.pairs[0].image).voxels_DHW - image).max() <= 1e-4
    steps = [np.abs(b - a).mean() for a, b in itertools.pairwise(images)]
    assert min(steps) > 0 and max(steps) < np.abs(images[-1] - images[0]).mean()
    sidecar = json.loads(report.pairs[2].sidecar.read_text())
    assert sidecar["interpolation"] == {"to_seed": 6, "position": 0.5} and sidecar["seed"] == 5
    with pytest.raises(UsageError, match="choose 2 to"):
        _generate(bundle, tmp_path / "none", count=1, to_seed=6)


def test_dicom_needs_a_modality_and_a_time_of_release(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    with pytest.raises(UsageError, match="which modality"):
        _generate(bundle, tmp_path / "none", file_format="dicom")
    out = tmp_path / "out"
    told = CliRunner().invoke(
        cli,
        ["generate", str(bundle), "--condition", "rare", "--count", "2", "--out", str(out),
         "--format", "dicom", "--modality", "CT"],
    )  # fmt: skip
    assert told.exit_code == 0, told.output
    assert "2 written" in told.output and "NOT checked for plausibility" in told.output
    slices = sorted((out / "rare_seed0_00000" / "image").glob("*.dcm"))
    assert len(slices) == GRID[2]
    dataset = pydicom.dcmread(slices[0])
    assert dataset.Modality == "CT" and dataset.StudyDate == "20260102"
    sidecar = json.loads((out / "rare_seed0_00000.json").read_text())
    assert sidecar["files"] == "dicom" and "rare_seed0_00000/image/00001.dcm" in sidecar["files_sha256"]
    (bundle / "attestations/release.dsse.json").write_text("{}")
    with pytest.raises(BundleError, match="when the bundle was released"):
        _generate(bundle, tmp_path / "none", file_format="dicom", modality="MR")


def test_surfaces_enclose_their_label(tmp_path: Path) -> None:
    z, y, x = np.ogrid[:24, :24, :24]
    ball = (((z - 12) ** 2 + (y - 12) ** 2 + (x - 12) ** 2) <= 64).astype(np.uint8)
    ball[12:14, 12:14, 12:14] = 2
    vertices, triangles = label_surface(ball, 1, (2.0, 1.0, 1.0))
    outer = vertices[np.abs(vertices - np.array([24.0, 12.0, 12.0])).max(axis=1) > 6]
    assert np.allclose(np.abs(outer[:, 0] - 24).max(), 16, atol=1.5)
    assert np.allclose(np.abs(outer[:, 1] - 12).max(), 8, atol=1.0) and triangles.max() < len(vertices)
    assert label_surface(ball, 3, (1.0, 1.0, 1.0))[0].shape == (0, 3)
    path = tmp_path / "surfaces.png"
    surface_sheet(
        [ball, ball * 0], path, title="study", labels=("organ", "lesion"), spacing_mm=(1.0, 1.0, 1.0)
    )
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert Image.open(path).text["Title"] == "study   SYNTHETIC"
    panels = picture[150:520]
    orange = (panels[:, :, 0] - panels[:, :, 2]) > 25
    middle = picture.shape[1] // 2
    assert orange[:, :middle].sum() > 5_000 and orange[:, middle:].sum() == 0
    with pytest.raises(UsageError, match="one 3D shape"):
        surface_sheet([ball, ball[1:]], path, title="", labels=("organ",), spacing_mm=(1.0, 1.0, 1.0))
