"""The canonical grid: geometry is kept, nothing is cut in silence."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.study_plan import DataClause
from shared.volumes.canonical_grid import CanonicalGrid, to_canonical
from shared.volumes.nifti import Volume, VolumeFileError


def _blob(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return np.linalg.norm(grid - np.array(centre), axis=-1) <= radius


def _pair(image: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> tuple[Volume, Volume]:
    return Volume(voxels_DHW=image, affine=affine), Volume(voxels_DHW=mask, affine=affine)


GRID = CanonicalGrid(shape=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.0), percentiles=(0.0, 100.0))


def test_a_scan_on_the_grid_stays_as_it_is() -> None:
    rng = np.random.default_rng(0)
    image = rng.random((16, 16, 16)).astype(np.float32)
    image.flat[:2] = 0.0, 1.0
    mask = _blob((16, 16, 16), (8, 7, 9), 4).astype(np.uint8)
    scan = to_canonical(*_pair(image, mask, np.diag([1.0, 1, 1, 1])), GRID)
    np.testing.assert_allclose(scan.image_DHW, image, atol=1e-6)
    np.testing.assert_array_equal(scan.mask_DHW, mask)
    assert scan.lost_label_voxels == 0 and scan.lost_labels == ()


@pytest.mark.parametrize("codes", ["LPS", "LAS", "SAR", "PIR", "ILA"])
def test_every_orientation_of_one_scan_gives_one_canonical_scan(codes: str) -> None:
    rng = np.random.default_rng(1)
    image = rng.random((14, 16, 12)).astype(np.float32)
    mask = _blob(image.shape, (4, 9, 6), 3).astype(np.uint8)
    reference = nib.Nifti1Image(image, np.eye(4))
    turn = nib.orientations.ornt_transform(
        nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes)
    )
    turned_image = reference.as_reoriented(turn)
    turned_mask = nib.Nifti1Image(mask, np.eye(4)).as_reoriented(turn)
    assert nib.aff2axcodes(turned_image.affine) == tuple(codes)
    expected = to_canonical(*_pair(image, mask, np.eye(4)), GRID)
    found = to_canonical(
        *_pair(np.asarray(turned_image.dataobj), np.asarray(turned_mask.dataobj), turned_image.affine), GRID
    )
    np.testing.assert_allclose(found.image_DHW, expected.image_DHW, atol=1e-5)
    np.testing.assert_array_equal(found.mask_DHW, expected.mask_DHW)


def test_resampling_keeps_world_positions_and_volume() -> None:
    mask = _blob((40, 40, 20), (22, 18, 9), 9)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[:3, 3] = [-7.0, 11.0, 3.0]
    image = mask.astype(np.float32) + 0.1 * np.random.default_rng(2).random(mask.shape).astype(np.float32)
    grid = CanonicalGrid(shape=(24, 24, 24), spacing_mm=(2.0, 2.0, 2.0))
    scan = to_canonical(*_pair(image, mask.astype(np.uint8), affine), grid)

    def centre_mm(labels: np.ndarray, to_world: np.ndarray) -> np.ndarray:
        return nib.affines.apply_affine(to_world, np.argwhere(labels > 0).mean(axis=0))

    np.testing.assert_allclose(centre_mm(scan.mask_DHW, scan.affine), centre_mm(mask, affine), atol=0.4)
    assert (scan.mask_DHW > 0).sum() * 8.0 == pytest.approx(mask.sum() * 2.0, rel=0.05)
    inside, outside = scan.image_DHW[scan.mask_DHW > 0].mean(), scan.image_DHW[scan.mask_DHW == 0].mean()
    assert inside > 0.75 and outside < 0.2


def test_a_coarser_grid_does_not_alias() -> None:
    stripes = np.zeros((48, 48, 48), np.float32)
    stripes[::2] = 1.0
    mask = _blob(stripes.shape, (24, 24, 24), 6).astype(np.uint8)
    grid = CanonicalGrid(shape=(8, 8, 8), spacing_mm=(4.0, 4.0, 4.0), percentiles=(0.0, 100.0))
    inner = to_canonical(*_pair(stripes, mask, np.eye(4)), grid).image_DHW[2:6, 2:6, 2:6]
    np.testing.assert_allclose(inner, 0.5, atol=0.05)


def test_the_window_moves_rather_than_cut_the_mask() -> None:
    mask = _blob((40, 40, 40), (36, 3, 20), 3).astype(np.uint8)
    image = np.random.default_rng(3).random(mask.shape).astype(np.float32)
    scan = to_canonical(*_pair(image, mask, np.eye(4)), GRID)
    assert scan.lost_label_voxels == 0
    assert (scan.mask_DHW > 0).sum() == mask.sum() == scan.label_voxels


def test_what_a_window_must_cut_is_counted() -> None:
    mask = np.zeros((40, 10, 10), np.uint8)
    mask[5:35, 4:6, 4:6] = 1
    mask[33:35, 4:6, 4:6] = 2
    image = np.random.default_rng(4).random(mask.shape).astype(np.float32)
    scan = to_canonical(*_pair(image, mask, np.eye(4)), GRID)
    assert scan.label_voxels == 120
    assert scan.lost_label_voxels == (30 - 16) * 4
    assert scan.lost_share == pytest.approx(14 / 30)
    assert scan.lost_labels == (2,)


def test_a_label_too_small_for_the_spacing_is_named() -> None:
    mask = _blob((32, 32, 32), (16, 16, 16), 8).astype(np.uint8)
    mask[17, 17, 17] = 2
    image = np.random.default_rng(5).random(mask.shape).astype(np.float32)
    grid = CanonicalGrid(shape=(8, 8, 8), spacing_mm=(4.0, 4.0, 4.0))
    assert to_canonical(*_pair(image, mask, np.eye(4)), grid).lost_labels == (2,)


def test_intensities_are_normalised_by_the_volume_alone() -> None:
    mask = _blob((16, 16, 16), (8, 8, 8), 4).astype(np.uint8)
    image = np.random.default_rng(6).normal(size=mask.shape)
    grid = CanonicalGrid(shape=(16, 16, 16), spacing_mm=(1.0, 1.0, 1.0))
    one = to_canonical(*_pair(image, mask, np.eye(4)), grid).image_DHW
    other = to_canonical(*_pair(1.7e6 * image + 40.0, mask, np.eye(4)), grid).image_DHW
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert one.min() == 0.0 and one.max() == 1.0
    assert 0.002 < (one == 0.0).mean() < 0.01


def test_image_and_mask_of_different_shapes_are_refused() -> None:
    with pytest.raises(VolumeFileError, match="different shapes"):
        to_canonical(
            Volume(voxels_DHW=np.ones((4, 4, 4)), affine=np.eye(4)),
            Volume(voxels_DHW=np.ones((4, 4, 5)), affine=np.eye(4)),
            GRID,
        )


@settings(max_examples=25, deadline=None)
@given(
    shape=st.tuples(*[st.integers(6, 28)] * 3),
    start=st.tuples(*[st.floats(0, 0.8)] * 3),
    spacing=st.sampled_from([0.7, 1.0, 1.6]),
)
def test_labels_are_either_kept_or_counted(
    shape: tuple[int, int, int], start: tuple[float, float, float], spacing: float
) -> None:
    """Whatever the shape: voxels in the window plus lost ones are all there are, and bounds hold."""
    mask = np.zeros(shape, np.uint8)
    mask[tuple(slice(int(share * side), None) for share, side in zip(start, shape, strict=True))] = 1
    image = np.linspace(0, 9, mask.size).reshape(shape)
    scan = to_canonical(
        *_pair(image, mask, np.eye(4)), CanonicalGrid(shape=(16,) * 3, spacing_mm=(spacing,) * 3)
    )
    assert scan.image_DHW.shape == scan.mask_DHW.shape == (16, 16, 16)
    assert int((scan.mask_DHW > 0).sum()) + scan.lost_label_voxels == scan.label_voxels > 0
    assert 0.0 <= scan.image_DHW.min() <= scan.image_DHW.max() <= 1.0
    extents = [np.ptp(np.argwhere(mask)[:, axis]) for axis in range(3)]
    if max(extents) + 1 <= 15 * spacing:
        assert scan.lost_label_voxels == 0


def test_the_digest_tells_grids_apart() -> None:
    clause = DataClause(
        conditions=("a",), rare_condition="a", labels=("x",), grid_shape=(16, 16, 16), spacing_mm=(1, 1, 1)
    )
    grids = [
        CanonicalGrid.from_clause(clause),
        CanonicalGrid.from_clause(clause.model_copy(update={"grid_shape": (16, 16, 24)})),
        CanonicalGrid.from_clause(clause.model_copy(update={"spacing_mm": (1.0, 1.0, 1.5)})),
        CanonicalGrid.from_clause(clause.model_copy(update={"intensity_percentiles": (1.0, 99.0)})),
    ]
    assert len({grid.digest() for grid in grids}) == 4
    assert grids[0].digest() == CanonicalGrid.from_clause(clause).digest()
