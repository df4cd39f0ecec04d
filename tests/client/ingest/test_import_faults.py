"""Every planted fault is refused, with the name of its file, and the sound scans are imported."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from client.ingest.manifest import ManifestError, read_manifest
from client.ingest.nifti import NiftiFolder
from client.ingest.scan import ProblemKind
from client.patient_dataset import SiteStore
from client.scan_import import ImportRefusedError, import_scans
from shared.study_plan import DataClause

CLAUSE = DataClause(
    conditions=("common", "rare"),
    rare_condition="rare",
    labels=("organ", "lesion"),
    grid_shape=(16, 16, 16),
    spacing_mm=(2.0, 2.0, 2.0),
)
SHAPE = (14, 16, 15)


class Folder:
    """A folder of five sound scans of three patients, to plant faults in."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)
        self.rows: list[dict[str, str]] = []
        for number, patient in enumerate(("MRN-1", "MRN-1", "MRN-2", "MRN-3", "MRN-3")):
            self.add(number, patient)

    def add(self, number: int, patient: str, *, seed: int | None = None) -> None:
        rng = np.random.default_rng(number if seed is None else seed)
        self.save(f"scan{number}.nii.gz", rng.normal(100, 30, SHAPE).astype(np.float32))
        mask = np.zeros(SHAPE, np.uint8)
        mask[4:10, 4:10, 4:10] = 1
        mask[6:8, 6:8, 6:8] = 2
        self.save(f"mask{number}.nii.gz", mask)
        self.rows.append(
            {
                "patient": patient,
                "scan": f"scan{number}.nii.gz",
                "condition": "rare" if number % 2 else "common",
                "mask": f"mask{number}.nii.gz",
            }
        )

    def save(self, name: str, voxels: np.ndarray, *, affine: np.ndarray | None = None) -> None:
        affine = np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine
        nib.save(nib.Nifti1Image(voxels, affine), self.root / name)

    def voxels(self, name: str) -> np.ndarray:
        return np.array(nib.load(self.root / name).dataobj)

    def change(self, name: str, edit: Callable[[np.ndarray], object]) -> None:
        voxels = self.voxels(name)
        edit(voxels)
        self.save(name, voxels)

    def source(self) -> NiftiFolder:
        pd.DataFrame(self.rows).to_csv(self.root / "manifest.csv", index=False)
        return NiftiFolder(path=self.root)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "hospital")


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore.create(tmp_path / "store")


def _missing(folder: Folder) -> None:
    (folder.root / "scan1.nii.gz").unlink()


def _missing_mask(folder: Folder) -> None:
    (folder.root / "mask1.nii.gz").unlink()


def _no_mask(folder: Folder) -> None:
    folder.rows[1]["mask"] = ""


def _truncated(folder: Folder) -> None:
    path = folder.root / "scan1.nii.gz"
    path.write_bytes(path.read_bytes()[:500])


def _broken_gzip(folder: Folder) -> None:
    path = folder.root / "mask1.nii.gz"
    path.write_bytes(gzip.compress(b"no header here"))


def _other_shape(folder: Folder) -> None:
    folder.save("mask1.nii.gz", folder.voxels("mask1.nii.gz")[:-1])


def _other_affine(folder: Folder) -> None:
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    affine[0, 3] = 4.0
    folder.save("mask1.nii.gz", folder.voxels("mask1.nii.gz"), affine=affine)


def _flipped_mask(folder: Folder) -> None:
    folder.save("mask1.nii.gz", folder.voxels("mask1.nii.gz"), affine=np.diag([-2.0, 2.0, 2.0, 1.0]))


def _nan(folder: Folder) -> None:
    folder.change("scan1.nii.gz", lambda voxels: voxels.__setitem__((3, 3, 3), np.nan))


def _infinite(folder: Folder) -> None:
    folder.change("scan1.nii.gz", lambda voxels: voxels.__setitem__((3, 3, 3), np.inf))


def _constant(folder: Folder) -> None:
    folder.change("scan1.nii.gz", lambda voxels: voxels.fill(7.0))


def _empty_mask(folder: Folder) -> None:
    folder.change("mask1.nii.gz", lambda voxels: voxels.fill(0))


def _unknown_label(folder: Folder) -> None:
    folder.change("mask1.nii.gz", lambda voxels: voxels.__setitem__((3, 3, 3), 3))


def _fractional_label(folder: Folder) -> None:
    folder.save("mask1.nii.gz", folder.voxels("mask1.nii.gz").astype(np.float32) * 0.5)


def _no_patient(folder: Folder) -> None:
    folder.rows[1]["patient"] = "  "


def _unknown_condition(folder: Folder) -> None:
    folder.rows[1]["condition"] = "Rare"


def _mask_too_large(folder: Folder) -> None:
    mask = np.zeros((40, 16, 15), np.uint8)
    mask[2:38, 4:8, 4:8] = 1
    folder.save("mask1.nii.gz", mask)
    folder.save("scan1.nii.gz", np.random.default_rng(9).normal(size=mask.shape).astype(np.float32))


FAULTS = [
    (_missing, ProblemKind.MISSING_FILE),
    (_missing_mask, ProblemKind.MISSING_FILE),
    (_no_mask, ProblemKind.NO_MASK),
    (_truncated, ProblemKind.UNREADABLE_FILE),
    (_broken_gzip, ProblemKind.UNREADABLE_FILE),
    (_other_shape, ProblemKind.SHAPE_MISMATCH),
    (_other_affine, ProblemKind.AFFINE_MISMATCH),
    (_flipped_mask, ProblemKind.AFFINE_MISMATCH),
    (_nan, ProblemKind.NOT_FINITE),
    (_infinite, ProblemKind.NOT_FINITE),
    (_constant, ProblemKind.CONSTANT_IMAGE),
    (_empty_mask, ProblemKind.EMPTY_MASK),
    (_unknown_label, ProblemKind.UNKNOWN_LABEL),
    (_fractional_label, ProblemKind.UNKNOWN_LABEL),
    (_no_patient, ProblemKind.NO_PATIENT),
    (_unknown_condition, ProblemKind.UNKNOWN_CONDITION),
    (_mask_too_large, ProblemKind.CUT_MASK),
]


@pytest.mark.parametrize(("plant", "kind"), FAULTS, ids=[plant.__name__[1:] for plant, _ in FAULTS])
def test_a_planted_fault_is_named_and_the_rest_imported(
    folder: Folder, store: SiteStore, plant: Callable[[Folder], None], kind: ProblemKind
) -> None:
    plant(folder)
    report = import_scans(folder.source(), store, CLAUSE)
    assert [(problem.file, problem.kind) for problem in report.problems] == [("scan1.nii.gz", kind)]
    assert "scan1.nii.gz" in str(report.problems[0]) and str(kind) in str(report.problems[0])
    assert report.imported == ("scan0.nii.gz", "scan2.nii.gz", "scan3.nii.gz", "scan4.nii.gz")
    assert len(store.scans()) == 4


def test_sound_scans_have_no_problems(folder: Folder, store: SiteStore) -> None:
    report = import_scans(folder.source(), store, CLAUSE)
    assert report.problems == () and len(report.imported) == 5 and report.cut == ()


def test_all_faults_at_once_are_all_listed(folder: Folder, store: SiteStore) -> None:
    for number in range(5, 8):
        folder.add(number, f"MRN-{number}")
    for plant in (_nan, _empty_mask, _other_affine):
        plant(folder)
    folder.rows[5]["condition"] = "typo"
    folder.rows[5]["patient"] = ""
    report = import_scans(folder.source(), store, CLAUSE)
    found = {(problem.file, problem.kind) for problem in report.problems}
    assert found == {
        ("scan1.nii.gz", ProblemKind.NOT_FINITE),
        ("scan1.nii.gz", ProblemKind.EMPTY_MASK),
        ("scan1.nii.gz", ProblemKind.AFFINE_MISMATCH),
        ("scan5.nii.gz", ProblemKind.UNKNOWN_CONDITION),
        ("scan5.nii.gz", ProblemKind.NO_PATIENT),
    }
    assert set(report.refused) == {"scan1.nii.gz", "scan5.nii.gz"} and len(report.imported) == 6


def test_strict_imports_nothing_and_names_all(folder: Folder, store: SiteStore) -> None:
    _nan(folder)
    _no_patient(folder)
    folder.change("mask3.nii.gz", lambda voxels: voxels.fill(0))
    with pytest.raises(ImportRefusedError, match="2 problems") as refusal:
        import_scans(folder.source(), store, CLAUSE, strict=True)
    assert "scan1.nii.gz" in str(refusal.value) and "scan3.nii.gz" in str(refusal.value)
    assert store.scans() == []


def test_a_copy_under_another_name_is_refused_even_if_written_differently(
    folder: Folder, store: SiteStore
) -> None:
    folder.add(5, "MRN-1")
    folder.rows[5]["condition"] = folder.rows[0]["condition"]
    copy = folder.voxels("scan0.nii.gz").astype(np.float64)
    nib.save(
        nib.Nifti1Image(copy, np.diag([2.0, 2.0, 2.0, 1.0]), dtype=np.float64), folder.root / "other.nii"
    )
    folder.rows[5]["scan"] = "other.nii"
    report = import_scans(folder.source(), store, CLAUSE)
    assert [(p.file, p.kind) for p in report.problems] == [("other.nii", ProblemKind.DUPLICATE_CONTENT)]
    assert "scan0.nii.gz" in report.problems[0].detail and len(report.imported) == 5


@pytest.mark.parametrize("as_file", [True, False], ids=["same file", "copied file"])
def test_one_scan_under_two_patients_is_refused_for_both(
    folder: Folder, store: SiteStore, as_file: bool
) -> None:
    """It would let one person count as two, and break the unit of privacy."""
    folder.add(5, "MRN-9")
    if as_file:
        folder.rows[5]["scan"] = "./scan0.nii.gz"
    else:
        (folder.root / "scan5.nii.gz").write_bytes((folder.root / "scan0.nii.gz").read_bytes())
    report = import_scans(folder.source(), store, CLAUSE)
    kind = ProblemKind.DUPLICATE_NAME if as_file else ProblemKind.DUPLICATE_CONTENT
    assert {(p.file, p.kind) for p in report.problems} == {
        ("scan0.nii.gz", kind),
        (folder.rows[5]["scan"], kind),
    }
    assert len(report.imported) == 4


def test_a_row_that_stands_twice_counts_once(folder: Folder, store: SiteStore) -> None:
    folder.rows.append(dict(folder.rows[2]))
    report = import_scans(folder.source(), store, CLAUSE)
    assert [(p.file, p.kind) for p in report.problems] == [("scan2.nii.gz", ProblemKind.DUPLICATE_NAME)]
    assert len(report.imported) == 5 and len(store.scans()) == 5


@pytest.mark.parametrize("field", ["patient", "condition", "mask"])
def test_a_stored_scan_is_not_changed_by_a_later_manifest(
    folder: Folder, store: SiteStore, field: str
) -> None:
    import_scans(folder.source(), store, CLAUSE)
    before = store.scans()
    folder.rows[0][field] = {"patient": "MRN-8", "condition": "rare", "mask": "mask9.nii.gz"}[field]
    mask = folder.voxels("mask0.nii.gz")
    mask[5, 5, 5] = 0
    folder.save("mask9.nii.gz", mask)
    report = import_scans(folder.source(), store, CLAUSE)
    assert [(p.file, p.kind) for p in report.problems] == [("scan0.nii.gz", ProblemKind.CONFLICT)]
    assert field in report.problems[0].detail and store.scans() == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("patient,scan,condition\nA,a.nii,rare\n", "missing: mask"),
        ("patient,scan,condition,mask,age\nA,a.nii,rare,m.nii,7\n", "not known: age"),
        ("patient;scan;condition;mask\nA;a.nii;rare;m.nii\n", "wrong columns"),
        ("patient,scan,condition,mask\n", "lists no scan"),
        ("", "not a CSV table"),
        ('patient,scan,condition,mask\n"A,a.nii,rare,m.nii\n', "not a CSV table"),
        ("patient,scan,condition,mask\nA,a.nii,rare,m.nii,extra,more\n", "not a CSV table"),
    ],
)
def test_an_unusable_manifest_is_refused_whole(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "manifest.csv"
    path.write_text(text)
    with pytest.raises(ManifestError, match=reason) as refusal:
        read_manifest(path, ("rare",))
    assert "manifest.csv" in str(refusal.value)


def test_a_missing_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="there is no manifest"):
        NiftiFolder(path=tmp_path).listing(("rare",))


def test_patient_ids_are_text(folder: Folder, store: SiteStore) -> None:
    """007 and 7 are two patients, and NA is a name, not a missing value."""
    for row, patient in zip(folder.rows, ("007", "7", "NA", "7.0", "null"), strict=True):
        row["patient"] = patient
    report = import_scans(folder.source(), store, CLAUSE)
    assert report.problems == () and len({scan.patient_key for scan in store.scans()}) == 5
