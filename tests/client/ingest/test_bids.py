"""A BIDS data set as a source: participants, sessions, segmentations with and without a look-up table."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from client.ingest.bids import BidsFolder
from client.ingest.manifest import ManifestError
from client.ingest.scan import ProblemKind
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from shared.study_plan import CovariateClause, DataClause

CLAUSE = DataClause(
    conditions=("common", "rare"),
    rare_condition="rare",
    labels=("organ", "lesion"),
    grid_shape=(16, 16, 16),
    spacing_mm=(2.0, 2.0, 2.0),
    covariates=(CovariateClause(name="sex", values=("f", "m")),),
)
SHAPE = (14, 16, 15)


def write(path: Path, voxels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0])), path)


def mask() -> np.ndarray:
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[4:10, 4:10, 4:10] = 1
    drawn[6:8, 6:8, 6:8] = 2
    return drawn


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """sub-01 with two sessions, sub-02 with a mask of other values and a table, sub-03 with a FLAIR."""
    root = tmp_path / "bids"
    root.mkdir()
    (root / "dataset_description.json").write_text(json.dumps({"Name": "x", "BIDSVersion": "1.9.0"}))
    (root / "participants.tsv").write_text(
        "participant_id\tage\tsex\tcondition\nsub-01\t44\tf\tcommon\nsub-02\t51\tm\trare\nsub-03\tn/a\t\trare\n"
    )
    rng = np.random.default_rng(3)
    derived = root / "derivatives" / "manual"
    for session in ("1", "2"):
        stem = f"sub-01_ses-{session}"
        write(root / "sub-01" / f"ses-{session}" / "anat" / f"{stem}_T1w.nii.gz", rng.normal(size=SHAPE))
        write(derived / "sub-01" / f"ses-{session}" / "anat" / f"{stem}_desc-manual_dseg.nii.gz", mask())
    write(root / "sub-02" / "anat" / "sub-02_T1w.nii.gz", rng.normal(size=SHAPE))
    other = np.array([0, 17, 53], np.int16)[mask()]
    write(derived / "sub-02" / "anat" / "sub-02_dseg.nii.gz", other)
    (derived / "sub-02" / "anat" / "sub-02_dseg.tsv").write_text("index\tname\n17\tOrgan\n53\tTumour\n")
    write(root / "sub-03" / "anat" / "sub-03_T1w.nii.gz", rng.normal(size=SHAPE))
    write(root / "sub-03" / "anat" / "sub-03_FLAIR.nii.gz", rng.normal(size=SHAPE))
    write(derived / "sub-03" / "anat" / "sub-03_space-orig_label-L_mask.nii.gz", mask())
    return root


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore.create(tmp_path / "store")


def source(root: Path, **options: object) -> BidsFolder:
    options.setdefault("segment_names", {"tumour": "lesion"})
    return BidsFolder(path=root, labels=CLAUSE.labels, covariates=("sex",), **options)  # type: ignore[arg-type]


def test_participants_are_patients_whatever_their_sessions(dataset: Path, store: SiteStore) -> None:
    report = import_scans(source(dataset), store, CLAUSE)
    assert report.problems == () and len(report.imported) == 4
    found = sorted((scan.patient_key, scan.condition, scan.covariates) for scan in store.scans())
    first = (store.patient_key("sub-01"), "common", (("sex", "f"),))
    second = (store.patient_key("sub-02"), "rare", (("sex", "m"),))
    third = (store.patient_key("sub-03"), "rare", ())
    assert found == sorted([first, first, second, third])
    for scan in store.scans():
        assert set(np.unique(store.read(scan)[1])) == {0, 1, 2}


def test_the_look_up_table_says_what_values_mean(dataset: Path, store: SiteStore) -> None:
    (entry,) = [
        one for one in source(dataset).listing(CLAUSE.conditions).entries if one.patient_id == "sub-02"
    ]
    loaded = entry.mask.read(entry.image.read().volume)
    np.testing.assert_array_equal(loaded.volume.voxels_DHW, mask())
    report = import_scans(source(dataset, segment_names={}), store, CLAUSE)
    (problem,) = report.problems
    assert problem.kind is ProblemKind.UNKNOWN_LABEL and "'Tumour'" in problem.detail
    assert len(report.imported) == 3


def test_other_suffixes_and_columns_can_be_chosen(dataset: Path) -> None:
    listing = source(dataset, suffix="FLAIR").listing(CLAUSE.conditions)
    assert [entry.name for entry in listing.entries] == ["sub-03/anat/sub-03_FLAIR.nii.gz"]
    with pytest.raises(ManifestError, match="no column diagnosis"):
        source(dataset, condition_column="diagnosis").listing(CLAUSE.conditions)


def test_faults_are_named_and_the_rest_listed(dataset: Path) -> None:
    table = dataset / "participants.tsv"
    table.write_text(table.read_text().replace("sub-02\t51\tm\trare\n", ""))
    (dataset / "derivatives/manual/sub-01/ses-1/anat/sub-01_ses-1_desc-manual_dseg.nii.gz").unlink()
    second = dataset / "derivatives/other/sub-03/anat/sub-03_dseg.nii.gz"
    write(second, mask())
    listing = source(dataset).listing(CLAUSE.conditions)
    assert {(problem.file, problem.kind) for problem in listing.problems} == {
        ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", ProblemKind.NO_MASK),
        ("sub-02/anat/sub-02_T1w.nii.gz", ProblemKind.NO_PATIENT),
        ("sub-03/anat/sub-03_T1w.nii.gz", ProblemKind.AMBIGUOUS_MASK),
    }
    assert [entry.name for entry in listing.entries] == ["sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz"]


def test_what_is_no_data_set_is_refused_whole(dataset: Path) -> None:
    table = dataset / "participants.tsv"
    table.write_text(table.read_text() + "sub-01\t4\tf\trare\n")
    with pytest.raises(ManifestError, match="more than once: sub-01"):
        source(dataset).listing(CLAUSE.conditions)
    table.unlink()
    with pytest.raises(ManifestError, match=r"participants\.tsv"):
        source(dataset).listing(CLAUSE.conditions)
    (dataset / "dataset_description.json").unlink()
    with pytest.raises(ManifestError, match="not a BIDS data set"):
        source(dataset).listing(CLAUSE.conditions)
