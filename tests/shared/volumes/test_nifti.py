"""NIfTI in and out: what is written is what is read, and every bad file is refused by name."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from shared.volumes import nifti
from shared.volumes.nifti import VolumeFileError, centred_affine, read_volume, write_volume


def test_a_written_volume_reads_back_with_its_geometry(tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((5, 7, 6)).astype(np.float32)
    affine = centred_affine((5, 7, 6), (1.5, 2.0, 0.5))
    write_volume(tmp_path / "a.nii.gz", image, affine=affine, description="SYNTHETIC")
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.voxels_DHW, image)
    np.testing.assert_allclose(volume.affine, affine, atol=1e-6)
    assert volume.spacing_mm == pytest.approx((1.5, 2.0, 0.5))
    assert volume.voxel_volume_mm3 == pytest.approx(1.5)
    header = nib.load(tmp_path / "a.nii.gz").header
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert header["descrip"].tobytes().rstrip(b"\0") == b"SYNTHETIC"
    assert header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(header.get_qform(), affine, atol=1e-5)


def test_the_grids_centre_is_the_worlds_origin() -> None:
    affine = centred_affine((5, 7, 6), (1.5, 2.0, 0.5))
    np.testing.assert_allclose(affine @ [2.0, 3.0, 2.5, 1.0], [0, 0, 0, 1], atol=1e-12)


def test_the_same_volume_gives_the_same_bytes(tmp_path: Path) -> None:
    voxels = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
    for name in ("a", "b"):
        write_volume(tmp_path / f"{name}.nii.gz", voxels, affine=np.eye(4))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz"]


def test_a_fourth_axis_of_length_one_is_dropped(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.ones((3, 4, 5, 1), np.float32), np.diag([2, 2, 2, 1])), tmp_path / "a.nii")
    assert read_volume(tmp_path / "a.nii").shape == (3, 4, 5)


def _cut_short(path: Path) -> None:
    whole = gzip.compress(_nifti_bytes())
    path.write_bytes(whole[: len(whole) // 2])


def _nifti_bytes() -> bytes:
    rng = np.random.default_rng(0)
    return nib.Nifti1Image(rng.random((6, 6, 6)).astype(np.float32), np.diag([2, 2, 2, 1])).to_bytes()


def _without_orientation(path: Path) -> None:
    image = nib.Nifti1Image(np.ones((3, 3, 3), np.float32), None)
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(image, path)


def _singular(path: Path) -> None:
    image = nib.Nifti1Image(np.ones((3, 3, 3), np.float32), np.diag([2, 2, 2, 1]))
    image.header["qform_code"] = 0
    image.header["srow_z"] = image.header["srow_y"]
    path.write_bytes(gzip.compress(image.to_bytes()))
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[312:328] = raw[296:312]
    path.write_bytes(gzip.compress(bytes(raw)))


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("missing.nii.gz", lambda _: None, "does not exist"),
        ("text.nii.gz", lambda path: path.write_text("not a scan"), "cannot be read"),
        ("empty.nii", lambda path: path.write_bytes(b""), "cannot be read"),
        ("short.nii.gz", _cut_short, "cannot be read"),
        ("short.nii", lambda path: path.write_bytes(_nifti_bytes()[:700]), "cannot be read"),
        ("flat.nii", lambda path: nib.save(nib.Nifti1Image(np.ones((3, 4)), np.eye(4)), path), "not a 3D"),
        (
            "series.nii",
            lambda path: nib.save(nib.Nifti1Image(np.ones((3, 4, 5, 2)), np.eye(4)), path),
            "not a 3D",
        ),
        ("lost.nii.gz", _without_orientation, "left and right are unknown"),
        ("singular.nii.gz", _singular, "singular"),
        ("scan.mha", lambda path: path.write_bytes(b"x"), "not a NIfTI file"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path: Path, name: str, make: object, reason: str) -> None:
    make(tmp_path / name)  # type: ignore[operator]
    with pytest.raises(VolumeFileError, match=reason) as refusal:
        read_volume(tmp_path / name)
    assert name in str(refusal.value)


def test_a_huge_header_is_refused_before_its_data_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nifti, "MAX_VOXELS", 100)
    (tmp_path / "huge.nii").write_bytes(_nifti_bytes())
    with pytest.raises(VolumeFileError, match="exceeds the bound"):
        read_volume(tmp_path / "huge.nii")


def test_unwritable_volumes_are_refused(tmp_path: Path) -> None:
    for voxels, description in (
        (np.ones((2, 2, 2), np.int64), ""),
        (np.ones((2, 2), np.float32), ""),
        (np.ones((2, 2, 2), np.float32), "x" * 80),
    ):
        with pytest.raises(VolumeFileError):
            write_volume(tmp_path / "a.nii.gz", voxels, affine=np.eye(4), description=description)
    assert not list(tmp_path.iterdir())
