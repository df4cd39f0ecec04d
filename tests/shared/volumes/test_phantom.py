"""The simulated cohort: deterministic, several scans a patient, and a rare condition that is measurable."""

from __future__ import annotations

import numpy as np
import pytest

from shared.errors import SiteError, UsageError
from shared.volumes.intensity import normalise_intensity
from shared.volumes.phantom import (
    BACKGROUND,
    COMMON,
    CONDITIONS,
    LABELS,
    LESION,
    MICRO_SPACING_MM,
    ORGAN,
    RARE,
    PhantomScan,
    lesion_contrast,
    lesion_volume_mm3,
    simulate_cohort,
)

HALF = {COMMON: 0.5, RARE: 0.5}


@pytest.fixture(scope="module")
def cohort() -> list[PhantomScan]:
    return simulate_cohort(n_patients=120, conditions_fractions=HALF, seed=5)


def test_same_seed_gives_the_same_bytes_and_a_prefix_of_a_larger_cohort(cohort: list[PhantomScan]) -> None:
    smaller = simulate_cohort(n_patients=10, conditions_fractions=HALF, seed=5)
    for a, b in zip(smaller, cohort, strict=False):
        assert a.scan_id == b.scan_id and a.condition == b.condition
        assert a.image.tobytes() == b.image.tobytes() and a.mask.tobytes() == b.mask.tobytes()
    other = simulate_cohort(n_patients=10, conditions_fractions=HALF, seed=6)
    assert other[0].image.tobytes() != smaller[0].image.tobytes()


def test_scans_are_finite_labelled_and_show_every_label(cohort: list[PhantomScan]) -> None:
    assert len({scan.scan_id for scan in cohort}) == len(cohort)
    assert len(LABELS) == max(ORGAN, LESION)
    for scan in cohort:
        assert scan.image.dtype == np.float32 and scan.mask.dtype == np.uint8
        assert scan.image.shape == scan.mask.shape == (24, 24, 24)
        assert np.isfinite(scan.image).all()
        assert set(np.unique(scan.mask)) == {BACKGROUND, ORGAN, LESION}


def test_some_patients_have_several_scans_of_one_anatomy(cohort: list[PhantomScan]) -> None:
    by_patient: dict[str, list[PhantomScan]] = {}
    for scan in cohort:
        by_patient.setdefault(scan.patient_id, []).append(scan)
    counts = np.bincount([len(scans) for scans in by_patient.values()], minlength=4)
    assert counts[1:4].min() > 0 and counts.sum() == counts[1:4].sum() == 120
    spread_within, volumes = [], []
    for scans in by_patient.values():
        assert len({scan.condition for scan in scans}) == 1
        own = [np.log(lesion_volume_mm3(scan.mask, MICRO_SPACING_MM)) for scan in scans]
        volumes.append(own[0])
        if len(own) > 1:
            assert scans[0].image.tobytes() != scans[1].image.tobytes()
            spread_within.append(np.std(own))
    assert np.mean(spread_within) < 0.25 * np.std(volumes)


def test_rare_lesions_are_larger_and_brighter_and_overlap_with_common_ones(cohort: list[PhantomScan]) -> None:
    volume = {
        name: np.array([lesion_volume_mm3(s.mask, MICRO_SPACING_MM) for s in cohort if s.condition == name])
        for name in CONDITIONS
    }
    contrast = {
        name: np.array(
            [lesion_contrast(normalise_intensity(s.image), s.mask) for s in cohort if s.condition == name]
        )
        for name in CONDITIONS
    }
    assert volume[RARE].mean() > 2.0 * volume[COMMON].mean()
    assert volume[RARE].min() < volume[COMMON].max()
    assert contrast[RARE].mean() > contrast[COMMON].mean()


def test_anatomy_follows_another_grid() -> None:
    scan = simulate_cohort(
        n_patients=1, conditions_fractions={RARE: 1.0}, seed=1, grid_shape=(32, 48, 32), spacing_mm=(3, 3, 3)
    )[0]
    assert scan.image.shape == (32, 48, 32)
    assert 0.05 < (scan.mask == ORGAN).mean() < 0.4


@pytest.mark.parametrize(
    "wrong",
    [
        {"conditions_fractions": {"unheard": 1.0}},
        {"conditions_fractions": {COMMON: 0.5}},
        {"conditions_fractions": {COMMON: 1.5, RARE: -0.5}},
        {"conditions_fractions": {}},
        {"grid_shape": (8, 24, 24)},
        {"spacing_mm": (0.0, 1.0, 1.0)},
        {"n_patients": -1},
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, object]) -> None:
    arguments: dict[str, object] = {"n_patients": 2, "conditions_fractions": HALF, "seed": 0, **wrong}
    with pytest.raises(UsageError):
        simulate_cohort(**arguments)  # type: ignore[arg-type]


def test_lesion_measures_count_voxels() -> None:
    mask = np.zeros((16, 16, 16), dtype=np.uint8)
    image = np.full(mask.shape, 0.25, dtype=np.float32)
    assert lesion_volume_mm3(mask, (1.0, 2.0, 3.0)) == 0.0
    assert np.isnan(lesion_contrast(image, mask))
    mask[:4] = ORGAN
    mask[0, 0, :5] = LESION
    image[mask == LESION] = 0.75
    assert lesion_volume_mm3(mask, (1.0, 2.0, 3.0)) == 30.0
    assert lesion_contrast(image, mask) == pytest.approx(0.5)


def test_intensity_is_normalised_by_the_volume_itself() -> None:
    rng = np.random.default_rng(0)
    image = rng.normal(1000.0, 200.0, size=(16, 16, 16))
    result = normalise_intensity(image)
    assert result.dtype == np.float32 and result.min() == 0.0 and result.max() == 1.0
    assert np.allclose(result, normalise_intensity(7.0 * image - 3.0), atol=1e-5)
    assert normalise_intensity(np.ones((4, 4, 4))).max() == 0.0
    image[0, 0, 0] = np.nan
    with pytest.raises(SiteError, match="NaN"):
        normalise_intensity(image)
