"""Contact sheets: they are pictures of the right thing, and they do not depend on the moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from shared.errors import UsageError
from shared.volumes.contact_sheet import LABEL_COLOURS, comparison_sheet, contact_sheet, mask_centre


def _scan(seed: int, shape: tuple[int, int, int] = (16, 20, 12)) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(seed).random(shape).astype(np.float32)
    mask = np.zeros(shape, np.uint8)
    mask[5:11, 6:12, 3:9] = 1
    mask[7:10, 8:11, 5:8] = 2
    return image, mask


def _near(path: Path, colour: str) -> int:
    """Number of pixels close to a colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float) / 255
    return int((np.abs(pixels - np.array(to_rgb(colour))).max(axis=-1) < 0.06).sum())


def test_a_sheet_shows_contours_of_the_labels_that_are_there(tmp_path: Path) -> None:
    scans = [_scan(seed) for seed in range(3)]
    images, masks = [s[0] for s in scans], [s[1] for s in scans]
    common = {
        "title": "study: rare",
        "labels": ("organ", "lesion"),
        "spacing_mm": (2.0, 2.0, 3.0),
        "badge": "",
    }
    contact_sheet(images, masks, tmp_path / "both.png", **common)
    contact_sheet(images, [np.minimum(m, 1) for m in masks], tmp_path / "organ.png", **common)
    lesion = LABEL_COLOURS[1]
    assert _near(tmp_path / "both.png", lesion) > _near(tmp_path / "organ.png", lesion) + 500
    assert Image.open(tmp_path / "both.png").size[0] > 900


def test_the_badge_says_synthetic_and_so_does_the_file(tmp_path: Path) -> None:
    image, mask = _scan(0)
    sheets = {badge: tmp_path / f"{badge or 'none'}.png" for badge in ("SYNTHETIC", "")}
    for badge, path in sheets.items():
        contact_sheet([image], [0 * mask], path, title="t", labels=("a",), spacing_mm=(1, 1, 1), badge=badge)
    assert Image.open(sheets["SYNTHETIC"]).text["Title"] == "SYNTHETIC t"
    assert _near(sheets["SYNTHETIC"], LABEL_COLOURS[0]) > _near(sheets[""], LABEL_COLOURS[0]) + 1000


def test_the_same_scans_give_the_same_picture(tmp_path: Path) -> None:
    image, mask = _scan(1)
    for name in ("a", "b"):
        contact_sheet(
            [image], [mask], tmp_path / f"{name}.png", title="t", labels=("a", "b"), spacing_mm=(1, 1, 1)
        )
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


def test_a_comparison_has_a_band_for_each_group(tmp_path: Path) -> None:
    scans = [_scan(seed) for seed in range(5)]
    group = ([s[0] for s in scans], [s[1] for s in scans])
    heights = []
    for rows in ([("one", *group)], [("one", *group), ("two", *group)]):
        comparison_sheet(
            rows, tmp_path / "c.png", title="t", labels=("a", "b"), spacing_mm=(1, 1, 1), focus="b"
        )
        heights.append(Image.open(tmp_path / "c.png").size[1])
    assert heights[1] > heights[0] * 1.5


def test_slices_go_through_the_centre() -> None:
    _, mask = _scan(0)
    assert mask_centre(mask) == (8, 8, 6)
    assert mask_centre(mask, 2) == (8, 9, 6)
    assert mask_centre(mask, 3) == mask_centre(mask)
    assert mask_centre(0 * mask) == (8, 10, 6)
    ring = np.pad(np.zeros((8, 8, 4), np.uint8), ((3, 3), (3, 3), (3, 3)), constant_values=1)
    assert ring[mask_centre(ring)] == 1, "slices through a hollow structure miss it"


def test_pictures_of_nothing_are_refused(tmp_path: Path) -> None:
    image, mask = _scan(0)
    common = {"title": "t", "labels": ("a", "b"), "spacing_mm": (1, 1, 1)}
    for images, masks, extra in (
        ([], [], {}),
        ([image], [], {}),
        ([image], [mask[:-1]], {}),
        ([image], [mask], {"focus": "c"}),
        ([image], [mask], {"captions": []}),
    ):
        with pytest.raises(UsageError):
            contact_sheet(images, masks, tmp_path / "x.png", **common, **extra)
    assert not list(tmp_path.iterdir())
