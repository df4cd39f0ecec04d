"""Synthetic scans as DICOM: valid objects, the geometry of the NIfTI, and a real archive that takes them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
from orthanc_server import running_orthanc

from shared.errors import UsageError
from shared.volumes.dicom_series import DicomSeries, Modality
from shared.volumes.nifti import VolumeFileError
from shared.volumes.phantom import simulate_cohort
from shared.volumes.synthetic import (
    NiftiPairs,
    OutputConflictError,
    Provenance,
    SyntheticPair,
    is_complete,
    write_sample,
)

SPACING = (4.0, 3.0, 2.0)
RELEASED = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
RUN = Provenance(
    bundle_sha256="ab" * 32,
    bundle_files_sha256="cd" * 32,
    study_id="rare-lesion",
    condition="rare",
    seed=3,
    sampler="rectified-flow-euler",
    steps=20,
    guidance_scale=1.5,
    labels=("organ", "lesion", "never there"),
)


def _scan() -> tuple[np.ndarray, np.ndarray]:
    scan = simulate_cohort(n_patients=1, conditions_fractions={"rare": 1.0}, seed=2)[0]
    image = np.clip(scan.image, 0, 1).astype(np.float32)[:, :20, :17]
    return image, scan.mask[:, :20, :17]


def _write(folder: Path, modality: Modality = "MR", **choices: object) -> SyntheticPair:
    folder.mkdir(exist_ok=True)
    image, mask = _scan()
    facts: dict[str, Any] = {"spacing_mm": SPACING, "modality": modality, "released": RELEASED, **choices}
    how = DicomSeries(**facts)
    return write_sample(how, folder, RUN, 0, image_DHW=image, mask_DHW=mask)


def _objects(pair: SyntheticPair) -> list[Path]:
    return [*sorted(pair.image.glob("*.dcm")), pair.mask]


@pytest.mark.parametrize("modality", ["MR", "CT"])
def test_dciodvfy_finds_no_error_but_that_it_does_not_know_synthetic_data(
    tmp_path: Path, modality: Modality
) -> None:
    program = shutil.which("dciodvfy")
    if program is None:
        reason = "no dciodvfy (Debian: apt-get install dicom3tools)"
        pytest.fail(reason) if os.environ.get("LACUNA_REQUIRE_SERVERS") == "1" else pytest.skip(reason)
    first, *_, last, mask = _objects(_write(tmp_path, modality))
    for path in (first, last, mask):
        told = subprocess.run([program, str(path)], capture_output=True, text=True, check=False)
        lines = (told.stdout + told.stderr).splitlines()
        assert {"MR": "MRImage", "CT": "CTImage"}[modality] in lines or "Segmentation" in lines
        errors = [line for line in lines if line.startswith("Error")]
        assert len(errors) == 1 and "(0x0008,0x001c)" in errors[0], errors
    broken = pydicom.dcmread(first)
    del broken.ImageType
    broken.save_as(tmp_path / "broken.dcm")
    told = subprocess.run(
        [program, str(tmp_path / "broken.dcm")], capture_output=True, text=True, check=False
    )
    assert "Error - Missing attribute" in told.stdout + told.stderr, "this check cannot fail"


def test_every_object_says_what_it_is_and_whose_it_is_not(tmp_path: Path) -> None:
    datasets = [pydicom.dcmread(path) for path in _objects(_write(tmp_path))]
    for dataset in datasets:
        assert dataset[0x0008, 0x001C].value == "YES" and dataset.ImageType[0] == "DERIVED"
        assert "Synthetic" in dataset.DerivationDescription and "ab" * 32 in dataset.DerivationDescription
        assert str(dataset.PatientName).startswith("SYNTHETIC") and dataset.PatientIdentityRemoved == "YES"
        assert dataset.StudyDate == "20260102" and dataset.StudyInstanceUID.startswith("2.25.")
    uids = [dataset.SOPInstanceUID for dataset in datasets]
    assert len(set(uids)) == len(uids) and len({d.SeriesInstanceUID for d in datasets}) == 2
    assert len({(d.StudyInstanceUID, d.FrameOfReferenceUID, d.PatientID) for d in datasets}) == 1
    for left, right in ((datasets[0], datasets[1]),):
        assert left.SOPInstanceUID == left.file_meta.MediaStorageSOPInstanceUID != right.SOPInstanceUID
    segments = datasets[-1].SegmentSequence
    assert [(s.SegmentNumber, s.SegmentLabel) for s in segments] == [(1, "organ"), (2, "lesion")]


def test_voxels_and_places_are_those_of_the_nifti(tmp_path: Path) -> None:
    image, mask = _scan()
    pair = _write(tmp_path / "dicom")
    (tmp_path / "nifti").mkdir()
    twin = write_sample(
        NiftiPairs(spacing_mm=SPACING), tmp_path / "nifti", RUN, 0, image_DHW=image, mask_DHW=mask
    )
    volume = nib.load(twin.image)
    world = np.linalg.inv(volume.affine)
    seen = np.zeros(image.shape, dtype=bool)
    for path in sorted(pair.image.glob("*.dcm")):
        dataset = pydicom.dcmread(path)
        # PS3.3 C.7.6.2.1.1, written out; then left and posterior turn to right and anterior.
        row_step, column_step = (float(step) for step in dataset.PixelSpacing)
        x, y = np.array(dataset.ImageOrientationPatient, dtype=float).reshape(2, 3)
        for row, column in ((0, 0), (3, 5), (dataset.Rows - 1, dataset.Columns - 1)):
            lps = (
                np.array(dataset.ImagePositionPatient, dtype=float)
                + x * column_step * column
                + y * row_step * row
            )
            voxel = nib.affines.apply_affine(world, lps * [-1, -1, 1])
            d, h, w = np.rint(voxel).astype(int)
            assert np.abs(voxel - (d, h, w)).max() < 1e-6
            seen[d, h, w] = True
            assert dataset.pixel_array[row, column] / 4095 == pytest.approx(image[d, h, w], abs=1.3e-4)
    assert seen.any(axis=(0, 1)).all()
    how = DicomSeries(spacing_mm=SPACING, modality="MR", released=RELEASED)
    back, labels = how.read(pair)
    np.testing.assert_allclose(back, image, atol=1.3e-4)
    np.testing.assert_array_equal(labels, mask)
    pair.mask.write_bytes(b"no dicom")
    with pytest.raises(VolumeFileError):
        how.read(pair)


def test_the_same_run_gives_the_same_bytes_and_another_run_other_identifiers(tmp_path: Path) -> None:
    one, other = _write(tmp_path / "a"), _write(tmp_path / "b")
    for left, right in zip(_objects(one), _objects(other), strict=True):
        assert left.read_bytes() == right.read_bytes()
    how = DicomSeries(spacing_mm=SPACING, modality="MR", released=RELEASED)
    assert is_complete(how, tmp_path / "a", RUN, 0) and not is_complete(how, tmp_path / "a", RUN, 1)
    _objects(one)[3].write_bytes(b"changed")
    with pytest.raises(OutputConflictError, match="files_sha256"):
        is_complete(how, tmp_path / "a", RUN, 0)
    image, mask = _scan()
    (tmp_path / "c").mkdir()
    again = write_sample(how, tmp_path / "c", replace(RUN, seed=4), 0, image_DHW=image, mask_DHW=mask)
    uids = [pydicom.dcmread(_objects(pair)[0]).SOPInstanceUID for pair in (other, again)]
    assert uids[0] != uids[1]


def test_a_root_of_ones_own_is_used_and_a_wrong_one_refused(tmp_path: Path) -> None:
    root = "1.2.826.0.1.3680043.10"
    for path in _objects(_write(tmp_path, uid_root=root)):
        dataset = pydicom.dcmread(path)
        for uid in (dataset.SOPInstanceUID, dataset.StudyInstanceUID, dataset.FrameOfReferenceUID):
            assert uid.startswith(f"{root}.") and uid.is_valid
    for wrong in ("1.02", "hospital", "1." * 20 + "1", "1.2."):
        with pytest.raises(UsageError, match="no root"):
            _write(tmp_path, uid_root=wrong)


def test_a_scan_without_a_mask_has_no_segmentation(tmp_path: Path) -> None:
    image, mask = _scan()
    how = DicomSeries(spacing_mm=SPACING, modality="CT", released=RELEASED)
    pair = write_sample(how, tmp_path, RUN, 0, image_DHW=image, mask_DHW=mask * 0)
    assert not pair.mask.exists() and not how.read(pair)[1].any()


def test_orthanc_takes_the_series_and_gives_it_back_with_its_segmentation(tmp_path: Path) -> None:
    pair = _write(tmp_path / "out")
    (tmp_path / "server").mkdir()
    with running_orthanc(tmp_path / "server") as server:
        assert server.store(_objects(pair)) == []
        session = requests.Session()
        session.trust_env = False
        series = session.get(f"{server.web}/series?expand", timeout=30).json()
        found = {s["MainDicomTags"]["Modality"]: s for s in series}
        assert set(found) == {"MR", "SEG"} and len({s["ParentStudy"] for s in series}) == 1
        assert len(found["MR"]["Instances"]) == len(_objects(pair)) - 1
        instance = found["MR"]["Instances"][0]
        tags = session.get(f"{server.web}/instances/{instance}/tags?simplify", timeout=30).json()
        assert tags["PatientName"].startswith("SYNTHETIC")
        picture = session.get(f"{server.web}/instances/{instance}/preview", timeout=30)
        assert picture.status_code == 200 and picture.headers["content-type"] == "image/png"
        raw = session.get(f"{server.web}/instances/{found['SEG']['Instances'][0]}/file", timeout=30).content
    assert raw == pair.mask.read_bytes()
    referenced = pydicom.dcmread(pair.mask).ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == found["MR"]["MainDicomTags"]["SeriesInstanceUID"]
