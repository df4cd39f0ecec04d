"""Plausibility: planted faults are refused, scans of test patients are not.

The rejection of real scans is a count on fixed data; no test here is random.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hippocampus import Scan, hippocampus_scans
from numpy.typing import NDArray
from scipy import ndimage

from shared.errors import CoordinatorError, MalformedMessageError
from shared.model.shipped import shipped_pair
from shared.volumes.intensity import normalise_intensity
from shared.volumes.phantom import LABELS, MICRO_SPACING_MM, simulate_cohort
from shared.volumes.plausibility import (
    MIN_SCANS,
    PlausibilityRanges,
    faults,
    figures,
    learn_ranges,
    read_ranges,
    write_ranges,
)

MM1 = (1.0, 1.0, 1.0)


def _box(image: NDArray[np.float32], mask: NDArray[np.uint8], value: int, corner: int) -> Scan:
    edge = [n // 8 for n in mask.shape]
    where = tuple(slice(2, 2 + n) if corner > 0 else slice(-2 - n, -2) for n in edge)
    second = mask.copy()
    second[where] = value
    return image, second


def _voxel(image: NDArray[np.float32], mask: NDArray[np.uint8], value: float) -> Scan:
    changed = image.copy()
    changed[3, 3, 3] = value
    return changed, mask


def _swap(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.array([0, 2, 1], dtype=np.uint8)[mask]


def _dilate(mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(ndimage.binary_dilation(mask > 0, iterations=8), np.maximum(mask, 1), 0).astype(np.uint8)


FAULTS: dict[str, Callable[[NDArray[np.float32], NDArray[np.uint8]], Scan]] = {
    "first label missing": lambda i, m: (i, np.where(m == 1, 0, m).astype(np.uint8)),
    "second label missing": lambda i, m: (i, np.where(m == 2, 0, m).astype(np.uint8)),
    "no mask": lambda i, m: (i, m * 0),
    "two pieces of the first label": lambda i, m: _box(i, m, 1, 1),
    "two pieces of the second label": lambda i, m: _box(i, m, 2, -1),
    "mask shifted to the left": lambda i, m: (i, np.roll(m, -(m.shape[0] // 3), axis=0)),
    "mask shifted to the front": lambda i, m: (i, np.roll(m, m.shape[1] // 3, axis=1)),
    "mask shifted to the head": lambda i, m: (i, np.roll(m, m.shape[2] // 3, axis=2)),
    "intensities inverted": lambda i, m: (1 - i, m),
    "constant": lambda i, m: (np.full_like(i, 0.5), m),
    "black": lambda i, m: (i * 0, m),
    "white": lambda i, m: (i * 0 + 1, m),
    "range clipped at both ends": lambda i, m: (np.clip(i, 0.4, 0.6), m),
    "saturated": lambda i, m: (np.clip(i * 3, 0, 1), m),
    "dark half lost": lambda i, m: (np.clip(i - 0.4, 0, 1), m),
    "a voxel is not a number": lambda i, m: _voxel(i, m, np.nan),
    "a voxel is infinite": lambda i, m: _voxel(i, m, np.inf),
    "a voxel above 1": lambda i, m: _voxel(i, m, 1.5),
    "a voxel below 0": lambda i, m: _voxel(i, m, -0.5),
    "noise alone": lambda i, m: (np.random.default_rng(1).random(i.shape, dtype=np.float32), m),
    "blurred": lambda i, m: (ndimage.gaussian_filter(i, 3), m),
    "half the image empty": lambda i, m: (np.where(np.arange(i.shape[2]) < i.shape[2] // 2, i, 0), m),
    "labels swapped": lambda i, m: (i, _swap(m)),
    "a label that the study does not have": lambda i, m: (i, np.where(m == 2, 7, m).astype(np.uint8)),
    "mask worn down": lambda i, m: (i, (m * ndimage.binary_erosion(m > 0, iterations=5)).astype(np.uint8)),
    "mask swollen": lambda i, m: (i, _dilate(m)),
    "mask everywhere": lambda i, m: (i, np.maximum(m, 1)),
    "slices shuffled": lambda i, m: (i[np.random.default_rng(2).permutation(i.shape[0])], m),
    "salt": lambda i, m: (np.where(np.random.default_rng(3).random(i.shape) < 0.1, 1, i), m),
    "stripes": lambda i, m: (np.where((np.arange(i.shape[1]) % 2 == 0)[None, :, None], 0, i), m),
    "image empty under the mask": lambda i, m: (np.where(m > 0, 0, i), m),
    "mask of another shape": lambda i, m: (i, m[:-1]),
}
MIRRORED: dict[str, Callable[[NDArray[np.float32], NDArray[np.uint8]], Scan]] = {
    "anatomy mirrored front to back": lambda i, m: (np.flip(i, 1), np.flip(m, 1)),
    "anatomy mirrored head to foot": lambda i, m: (np.flip(i, 2), np.flip(m, 2)),
    "mask mirrored front to back": lambda i, m: (i, np.flip(m, 1)),
}
"""For scans whose anatomy has a front and a back; the simulated one has none."""


def _phantoms(n: int, seed: int, condition: str) -> list[Scan]:
    cohort = simulate_cohort(n_patients=n, conditions_fractions={condition: 1.0}, seed=seed)
    return [(normalise_intensity(scan.image), scan.mask) for scan in cohort]


@pytest.fixture(scope="module")
def shipped() -> PlausibilityRanges:
    return read_ranges(shipped_pair("micro").prior_path.with_name("plausibility.json"))


@pytest.fixture(scope="module")
def hippocampus() -> tuple[PlausibilityRanges, list[Scan]]:
    """Ranges from 30 public patients, and the scans of 40 others."""
    public, test = hippocampus_scans(slice(30), slice(-40, None))
    return learn_ranges(public, labels=("anterior", "posterior"), spacing_mm=MM1), test


@pytest.mark.parametrize("condition", ["common", "rare"])
def test_simulated_scans_of_test_patients_pass_also_of_the_condition_never_seen(
    shipped: PlausibilityRanges, condition: str
) -> None:
    scans = _phantoms(60, 77, condition)
    refused = [found for scan in scans if (found := faults(*scan, shipped, spacing_mm=MICRO_SPACING_MM))]
    assert len(refused) <= 0.02 * len(scans), refused


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_in_simulated_scans_are_all_refused(shipped: PlausibilityRanges, name: str) -> None:
    for scan in [*_phantoms(3, 78, "common"), *_phantoms(3, 79, "rare")]:
        assert faults(*FAULTS[name](*scan), shipped, spacing_mm=MICRO_SPACING_MM), name


def test_real_scans_of_test_patients_pass(hippocampus: tuple[PlausibilityRanges, list[Scan]]) -> None:
    ranges, scans = hippocampus
    refused = [found for scan in scans if (found := faults(*scan, ranges, spacing_mm=MM1))]
    assert len(scans) >= 50 and len(refused) <= 0.02 * len(scans), refused


@pytest.mark.parametrize("name", [*FAULTS, *MIRRORED])
def test_planted_faults_in_real_scans_are_all_refused(
    hippocampus: tuple[PlausibilityRanges, list[Scan]], name: str
) -> None:
    ranges, scans = hippocampus
    plant = (FAULTS | MIRRORED)[name]
    for scan in scans[::6]:
        assert faults(*plant(*scan), ranges, spacing_mm=MM1), name


def test_a_fault_says_what_and_how_far(shipped: PlausibilityRanges) -> None:
    image, mask = _phantoms(1, 80, "common")[0]
    found = faults(image, np.where(mask == 2, 0, mask).astype(np.uint8), shipped, spacing_mm=MICRO_SPACING_MM)
    assert str(found[0]) == "lesion present is 0, plausible is 1 to 1"
    assert any("plausible is" in str(fault) for fault in found)


def test_ranges_come_from_enough_scans_and_know_what_is_always_there(tmp_path: Path) -> None:
    scans = _phantoms(8, 81, "common")
    with pytest.raises(CoordinatorError, match="too few"):
        learn_ranges(scans[: MIN_SCANS - 1], labels=LABELS, spacing_mm=MICRO_SPACING_MM)
    without = (scans[0][0], np.minimum(scans[0][1], 1))
    ranges = learn_ranges([without, *scans], labels=LABELS, spacing_mm=MICRO_SPACING_MM)
    assert ranges.required == ("organ",) and ranges.scans == len(scans) + 1
    for scan in scans:
        measured = figures(*scan, labels=LABELS, spacing_mm=MICRO_SPACING_MM)
        assert all(ranges.low[k] < v < ranges.high[k] for k, v in measured.items() if k in ranges.low)
    path = tmp_path / "ranges.json"
    write_ranges(path, ranges)
    assert read_ranges(path) == ranges
    text = path.read_text()
    for wrong in (
        text.replace('"scans"', '"scan"'),
        text.replace("lacuna/plausibility/v1", "lacuna/plausibility/v9"),
        text.replace('"image mean"', '"image means"', 1),
        "[]",
        text[:-5],
    ):
        path.write_text(wrong)
        with pytest.raises(MalformedMessageError):
            read_ranges(path)
    with pytest.raises(MalformedMessageError):
        read_ranges(tmp_path / "none.json")
