"""A folder of DICOM series with its masks: who, which condition, which SEG; and what reaches the agent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from datetime import UTC, datetime
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_series import Series, blob, identifying_values, write_multiframe, write_segmentation

from client.ingest.dicom import DicomFolder, DicomPairing
from client.ingest.dicom_index import SeriesSelection
from client.ingest.dicom_segmentation import SegmentationFile
from client.ingest.dicom_volume import DicomSeries
from client.ingest.manifest import ManifestError
from client.ingest.nifti_file import REORDERED, turned_to
from client.ingest.scan import ProblemKind, UnusableScanError
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from shared.errors import UsageError
from shared.study_plan import CovariateClause, DataClause
from shared.volumes.dicom_series import DicomSeries as SyntheticSeries
from shared.volumes.nifti import Volume, centred_affine
from shared.volumes.phantom import simulate_cohort
from shared.volumes.synthetic import Provenance, write_sample

LABELS = ("organ", "lesion")
CLAUSE = DataClause(
    conditions=("common", "rare"),
    rare_condition="rare",
    labels=LABELS,
    grid_shape=(24, 24, 24),
    spacing_mm=(2.0, 2.0, 2.0),
)
SHAPE = (10, 24, 20)


class Hospital:
    """A folder of three patients' series, each with its SEG, and a manifest."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.series: dict[str, Series] = {}
        self.files: dict[str, list[Path]] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.rows: list[str] = []
        for seed, patient in enumerate(("P-0001", "P-0002", "P-0003")):
            voxels, self.masks[patient] = blob(SHAPE, seed=seed)
            self.series[patient] = Series(voxels=voxels, patient_id=patient)
            self.files[patient] = self.series[patient].write(root / patient)
            write_segmentation(root / f"{patient}.dcm", self.files[patient], self.masks[patient])
            self.rows.append(f"{patient},,{'rare' if seed else 'common'},")

    def copied_to(self, root: Path) -> Hospital:
        shutil.copytree(self.root, root)
        copy = deepcopy(self)
        copy.root = root
        copy.files = {patient: sorted((root / patient).iterdir()) for patient in self.files}
        return copy

    def source(self, header: str = "patient,scan,condition,mask", **options: object) -> DicomFolder:
        (self.root / "manifest.csv").write_text("\n".join([header, *self.rows]) + "\n")
        options.setdefault("manifest", self.root / "manifest.csv")
        return DicomFolder(path=self.root, pairing=DicomPairing(labels=LABELS, **options))  # type: ignore[arg-type]

    def change(self, path: Path, **values: object) -> None:
        dataset = pydicom.dcmread(path)
        for keyword, value in values.items():
            setattr(dataset, keyword, value)
        dataset.save_as(path)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return Hospital(tmp_path_factory.mktemp("template"))


@pytest.fixture
def hospital(template: Hospital, tmp_path: Path) -> Hospital:
    return template.copied_to(tmp_path / "hospital")


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore.create(tmp_path / "store")


def test_series_are_paired_with_conditions_and_segmentations(hospital: Hospital, store: SiteStore) -> None:
    source = hospital.source()
    for entry in source.listing(CLAUSE.conditions).entries:
        image = entry.image.read()
        series = hospital.series[entry.patient_id]
        np.testing.assert_array_equal(image.volume.voxels_DHW, series.voxels)
        mask = entry.mask.read(image.volume).volume
        np.testing.assert_array_equal(mask.voxels_DHW, hospital.masks[entry.patient_id])
    report = import_scans(source, store, CLAUSE)
    assert report.problems == () and len(report.imported) == 3
    conditions = {scan.patient_key: scan.condition for scan in store.scans()}
    assert conditions == {
        store.patient_key("P-0001"): "common",
        store.patient_key("P-0002"): "rare",
        store.patient_key("P-0003"): "rare",
    }
    again = import_scans(source, store, CLAUSE)
    assert again.imported == () and len(again.present) == 3


def test_no_value_of_any_header_reaches_the_store(hospital: Hospital, store: SiteStore) -> None:
    import_scans(hospital.source(), store, CLAUSE)
    values = identifying_values(list(hospital.root.rglob("*.dcm"))) - set(LABELS)
    assert {"Mustermann^Erika", "P-0001", "19640812", "20240229", "131415.678", "ACC-77-1"} <= values
    assert hospital.series["P-0002"].uid in values
    files = [path for path in store.root.rglob("*") if path.is_file()]
    content = b"".join(path.name.encode() + path.read_bytes() for path in files)
    content += (repr(store.scans()) + store.table().to_csv()).encode()
    assert len(files) > 4 and not {value for value in values if value.encode() in content}


def test_covariates_are_columns_that_the_plan_names(hospital: Hospital, store: SiteStore) -> None:
    clause = CLAUSE.model_copy(
        update={
            "covariates": (
                CovariateClause(name="age", edges=(40.0, 60.0)),
                CovariateClause(name="field", values=("low", "high")),
            )
        }
    )
    hospital.rows = ["P-0001,,common,,61,low", "P-0002,,rare,,,high", "P-0003,,rare,,old,low"]
    header = "patient,scan,condition,mask,age,field"
    with pytest.raises(ManifestError, match="not known: age, field"):
        hospital.source(header).listing(CLAUSE.conditions)
    report = import_scans(hospital.source(header, covariates=("age", "field")), store, clause)
    assert {problem.kind for problem in report.problems} == {ProblemKind.UNKNOWN_COVARIATE}
    found = {scan.patient_key: scan.covariates for scan in store.scans()}
    assert found == {
        store.patient_key("P-0001"): (("age", "61"), ("field", "low")),
        store.patient_key("P-0002"): (("field", "high"),),
    }


def _named_files(hospital: Hospital) -> None:
    uid = pydicom.dcmread(hospital.root / "P-0003.dcm").SeriesInstanceUID
    hospital.rows = [
        f"P-0001,{hospital.series['P-0001'].uid},common,P-0001.dcm",
        "P-0002,P-0002,common,",
        f"P-0003,P-0003/slice004.dcm,common,{uid}",
    ]


def _other_patient_of_a_scan(hospital: Hospital) -> None:
    hospital.rows[1] = f"P-0001,{hospital.series['P-0002'].uid},common,"


def _other_patient_of_a_mask(hospital: Hospital) -> None:
    hospital.rows[1] = "P-0002,,common,P-0003.dcm"


def _no_row(hospital: Hospital) -> None:
    del hospital.rows[1]


def _two_rows(hospital: Hospital) -> None:
    hospital.rows.append(hospital.rows[1])


def _no_seg(hospital: Hospital) -> None:
    (hospital.root / "P-0002.dcm").unlink()


def _two_segs(hospital: Hospital) -> None:
    write_segmentation(hospital.root / "second.dcm", hospital.files["P-0002"], hospital.masks["P-0002"])


def _lost_mask_file(hospital: Hospital) -> None:
    hospital.rows[1] = "P-0002,,common,nowhere.nii.gz"


def _unknown_condition(hospital: Hospital) -> None:
    hospital.rows[1] = "P-0002,,odd,"


def _unknown_segment(hospital: Hospital) -> None:
    path = hospital.root / "P-0002.dcm"
    write_segmentation(path, hospital.files["P-0002"], hospital.masks["P-0002"], ("organ", "oedema"))


def _shifted_mask(hospital: Hospital) -> None:
    path = hospital.root / "P-0002.dcm"
    dataset = pydicom.dcmread(path)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        position = frame.PlanePositionSequence[0]
        x, y, z = position.ImagePositionPatient
        position.ImagePositionPatient = [x + 0.6, y, z]
    dataset.save_as(path)


def _mask_outside(hospital: Hospital) -> None:
    path = hospital.root / "P-0002.dcm"
    dataset = pydicom.dcmread(path)
    position = dataset.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0]
    position.ImagePositionPatient = [*position.ImagePositionPatient[:2], 401.0]
    dataset.save_as(path)


def _broken_mask(hospital: Hospital) -> None:
    path = hospital.root / "P-0002.dcm"
    path.write_bytes(path.read_bytes()[:-40])


def _two_patients_in_a_series(hospital: Hospital) -> None:
    hospital.change(hospital.files["P-0002"][3], PatientID="P-0009")


def _no_patient(hospital: Hospital) -> None:
    for path in hospital.files["P-0002"]:
        hospital.change(path, PatientID="")


@pytest.mark.parametrize(
    ("plant", "kind", "says"),
    [
        (_other_patient_of_a_scan, ProblemKind.OTHER_PATIENT, "manifest.csv line 3"),
        (_other_patient_of_a_mask, ProblemKind.OTHER_PATIENT, "mask P-0003.dcm"),
        (_no_row, ProblemKind.NO_PATIENT, "not in the manifest"),
        (_two_rows, ProblemKind.DUPLICATE_NAME, "line 3, manifest.csv line 5"),
        (_no_seg, ProblemKind.NO_MASK, "no SEG was drawn"),
        (_two_segs, ProblemKind.AMBIGUOUS_MASK, "2 SEG objects"),
        (_lost_mask_file, ProblemKind.MISSING_FILE, "mask nowhere.nii.gz"),
        (_unknown_condition, ProblemKind.UNKNOWN_CONDITION, "'odd'"),
        (_unknown_segment, ProblemKind.UNKNOWN_LABEL, "'oedema'"),
        (_shifted_mask, ProblemKind.AFFINE_MISMATCH, "does not lie on a slice"),
        (_mask_outside, ProblemKind.AFFINE_MISMATCH, "outside the image"),
        (_broken_mask, ProblemKind.UNDECODABLE_PIXELS, "P-0002.dcm"),
        (_two_patients_in_a_series, ProblemKind.OTHER_PATIENT, "files of 2 patients"),
        (_no_patient, ProblemKind.NO_PATIENT, "no Patient ID"),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else None,
)
def test_a_planted_fault_is_named_and_the_rest_imported(
    hospital: Hospital, store: SiteStore, plant: Callable[[Hospital], None], kind: ProblemKind, says: str
) -> None:
    plant(hospital)
    report = import_scans(hospital.source(), store, CLAUSE)
    assert any(problem.kind is kind and says in problem.detail for problem in report.problems), (
        report.problems
    )
    assert [name[:6] for name in report.imported] == ["P-0001", "P-0003"] and len(store.scans()) == 2
    assert not any("P-0001" in problem.file for problem in report.problems)


def test_rows_may_name_series_folders_files_and_masks(hospital: Hospital, store: SiteStore) -> None:
    _named_files(hospital)
    report = import_scans(hospital.source(), store, CLAUSE)
    assert report.problems == () and len(report.imported) == 3


def test_a_selection_leaves_series_alone_and_counts_them(hospital: Hospital, store: SiteStore) -> None:
    Series(voxels=blob(SHAPE)[0], patient_id="P-0001", description="Localizer").write(hospital.root / "loc")
    source = hospital.source(selection=SeriesSelection(description="T1*"))
    report = import_scans(source, store, CLAUSE)
    assert report.problems == () and len(report.imported) == 3
    assert "1 series not selected (description)" in report.skipped


def test_one_condition_of_all_needs_no_manifest(hospital: Hospital, store: SiteStore) -> None:
    report = import_scans(hospital.source(manifest=None, condition="rare"), store, CLAUSE)
    assert len(report.imported) == 3 and {scan.condition for scan in store.scans()} == {"rare"}
    with pytest.raises(UsageError, match="'odd'"):
        hospital.source(manifest=None, condition="odd").listing(CLAUSE.conditions)
    with pytest.raises(UsageError, match="manifest or a condition"):
        hospital.source(condition="rare")
    with pytest.raises(ManifestError, match="no such folder"):
        DicomFolder(path=hospital.root / "x", pairing=hospital.source().pairing).listing(CLAUSE.conditions)


def test_nifti_masks_with_axes_in_another_order_are_turned(hospital: Hospital, store: SiteStore) -> None:
    """As dcm2niix writes them: columns, rows from below, slices."""
    image = DicomSeries(series_uid="1", paths=tuple(hospital.files["P-0002"])).read().volume
    mask = hospital.masks["P-0002"].transpose(2, 1, 0)[:, ::-1, :]
    affine = image.affine[:, [2, 1, 0, 3]].copy()
    affine[:3, 3] += affine[:3, 1] * (SHAPE[1] - 1)
    affine[:3, 1] *= -1
    nib.save(nib.Nifti1Image(np.ascontiguousarray(mask), affine), hospital.root / "mask.nii.gz")
    hospital.rows[1] = "P-0002,,rare,mask.nii.gz"
    (entry,) = [
        one for one in hospital.source().listing(CLAUSE.conditions).entries if one.patient_id == "P-0002"
    ]
    loaded = entry.mask.read(image)
    np.testing.assert_array_equal(loaded.volume.voxels_DHW, hospital.masks["P-0002"])
    report = import_scans(hospital.source(), store, CLAUSE)
    assert len(report.imported) == 3 and [repair for _, repair in report.repaired] == [REORDERED]


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_every_kind_of_segmentation_gives_the_drawn_mask(tmp_path: Path, kind: str) -> None:
    voxels, mask = blob(SHAPE)
    paths = Series(voxels=voxels, step=(0.0, 0.4, 2.0)).write(tmp_path / "series")  # a tilted stack
    image = DicomSeries(series_uid="1", paths=tuple(paths)).read().volume
    drawn = write_segmentation(tmp_path / "seg.dcm", paths, mask, kind=kind)
    read = SegmentationFile(path=drawn, labels=LABELS).read(image)
    np.testing.assert_array_equal(read.volume.voxels_DHW, mask)


def test_a_segmentation_of_a_multiframe_object(tmp_path: Path) -> None:
    voxels, mask = blob(SHAPE)
    frames = write_multiframe(tmp_path / "frames.dcm", Series(voxels=voxels).write(tmp_path / "series"))
    image = DicomSeries(series_uid="1", paths=(frames,)).read().volume
    drawn = write_segmentation(tmp_path / "seg.dcm", [frames], mask)
    read = SegmentationFile(path=drawn, labels=LABELS).read(image)
    np.testing.assert_array_equal(read.volume.voxels_DHW, mask)


def test_segments_are_named_renamed_or_left_out(hospital: Hospital) -> None:
    paths, mask = hospital.files["P-0001"], hospital.masks["P-0001"]
    image = DicomSeries(series_uid="1", paths=tuple(paths)).read().volume
    drawn = write_segmentation(hospital.root / "s.dcm", paths, mask, ("Hippocampus, anterior", "Skull"))

    def read(labels: tuple[str, ...], **names: str) -> Volume:
        segments = {"hippocampus anterior": names.get("first", ""), "skull": names.get("second", "")}
        return SegmentationFile(path=drawn, labels=labels, names=segments).read(image).volume

    swapped = read(("lesion", "organ"), first="organ", second="lesion").voxels_DHW
    np.testing.assert_array_equal(swapped, np.where(mask > 0, 3 - mask, 0))
    np.testing.assert_array_equal(read(("organ",), first="organ").voxels_DHW, mask == 1)
    with pytest.raises(UnusableScanError, match="--segment NAME=LABEL"):
        SegmentationFile(path=drawn, labels=LABELS).read(image)


def test_our_own_synthetic_scans_are_recognised_and_read_right(tmp_path: Path) -> None:
    """What `lacuna generate` writes is refused as synthetic; without the mark it is what was written."""
    drawn = simulate_cohort(n_patients=1, conditions_fractions={"rare": 1.0}, seed=2)[0]
    image = np.clip(drawn.image, 0, 1).astype(np.float32)[:, :20, :17]
    mask = drawn.mask[:, :20, :17]
    provenance = Provenance(
        bundle_sha256="ab" * 32,
        bundle_files_sha256="cd" * 32,
        study_id="study",
        condition="rare",
        seed=3,
        sampler="rectified-flow-euler",
        steps=20,
        guidance_scale=1.5,
        labels=LABELS,
    )
    spacing, released = (4.0, 3.0, 2.0), datetime(2026, 1, 2, tzinfo=UTC)
    how = SyntheticSeries(spacing_mm=spacing, modality="MR", released=released)
    pair = write_sample(how, tmp_path, provenance, 0, image_DHW=image, mask_DHW=mask)
    series = DicomSeries(series_uid="1", paths=tuple(pair.image.glob("*.dcm")))
    with pytest.raises(UnusableScanError, match="marked as synthetic"):
        series.read()
    for path in series.paths:
        dataset = pydicom.dcmread(path)
        del dataset.SyntheticData
        dataset.save_as(path)
    read = series.read().volume
    d, h, w = image.shape
    affine = centred_affine((d, h, w), spacing)
    expected = turned_to(Volume(voxels_DHW=image, affine=affine), read)
    assert expected is not None
    np.testing.assert_allclose(expected.affine, read.affine, atol=1e-4)
    np.testing.assert_allclose(read.voxels_DHW / 4095, expected.voxels_DHW, atol=0.6 / 4095)
    drawn_mask = turned_to(Volume(voxels_DHW=mask, affine=affine), read)
    assert drawn_mask is not None
    laid = SegmentationFile(path=pair.mask, labels=LABELS).read(read).volume
    np.testing.assert_array_equal(laid.voxels_DHW, drawn_mask.voxels_DHW)
