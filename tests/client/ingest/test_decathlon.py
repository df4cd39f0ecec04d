"""The Decathlon layout, on the real hippocampus scans where they are, and on a small copy of the layout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.ingest.decathlon import (
    NORMAL,
    SMALL,
    VOLUME_CONDITIONS,
    DecathlonFolder,
    mask_volume_mm3,
    patient_ids,
    public_mask_paths,
    split_patients,
    volume_condition_cut,
)
from client.ingest.manifest import ManifestError
from client.ingest.scan import ProblemKind
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from shared.errors import SiteError, UsageError
from shared.study_plan import DataClause

ROOT = Path(os.environ.get("LACUNA_DATA", Path(__file__).parents[4] / "shared" / "data"))
TASK = ROOT / "Task04_Hippocampus"
PATIENTS = TASK / "patients.csv"
needs_data = pytest.mark.skipif(not PATIENTS.is_file(), reason="no hippocampus scans (set LACUNA_DATA)")

CLAUSE = DataClause(
    conditions=VOLUME_CONDITIONS,
    rare_condition=SMALL,
    labels=("anterior", "posterior"),
    grid_shape=(32, 48, 32),
    spacing_mm=(1.0, 1.0, 1.0),
)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Six scans of four patients in the Decathlon's layout; mask volumes 8, 27, ..., 343 mm3."""
    path = tmp_path / "Task04_Hippocampus"
    (path / "imagesTr").mkdir(parents=True)
    (path / "labelsTr").mkdir()
    rows, training = [], []
    for number, patient in enumerate(("A", "A", "B", "C", "C", "D")):
        name = f"hippocampus_{number:03d}.nii.gz"
        image = np.random.default_rng(number).normal(size=(20, 24, 20)).astype(np.float32)
        mask = np.zeros(image.shape, np.uint8)
        mask[5 : 7 + number, 5 : 7 + number, 5 : 7 + number] = 1
        mask[5, 5, 5] = 2
        nib.save(nib.Nifti1Image(image, np.eye(4)), path / "imagesTr" / name)
        nib.save(nib.Nifti1Image(mask, np.eye(4)), path / "labelsTr" / name)
        rows.append({"file": name, "patient_id": patient})
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    keys = ("name", "description", "reference", "licence", "tensorImageSize", "modality")
    document = dict.fromkeys(keys, "test") | {"labels": {}, "numTraining": 6, "numTest": 0, "test": []}
    (path / "dataset.json").write_text(json.dumps(document | {"training": training}))
    pd.DataFrame(rows).to_csv(path / "patients.csv", index=False)
    return path


def test_scans_are_listed_with_patients_and_derived_conditions(task: Path) -> None:
    source = DecathlonFolder(path=task, patients_csv=task / "patients.csv", volume_cut_mm3=100.0)
    listing = source.listing(VOLUME_CONDITIONS)
    assert listing.problems == ()
    assert [(entry.patient_id, entry.condition) for entry in listing.entries] == [
        ("A", SMALL),
        ("A", SMALL),
        ("B", SMALL),
        ("C", NORMAL),
        ("C", NORMAL),
        ("D", NORMAL),
    ]
    assert mask_volume_mm3(listing.entries[3].mask.path) == 125.0


def test_the_cut_belongs_to_the_larger_side(task: Path) -> None:
    source = DecathlonFolder(path=task, patients_csv=task / "patients.csv", volume_cut_mm3=125.0)
    assert source.listing(VOLUME_CONDITIONS).entries[3].condition == NORMAL


def test_only_the_chosen_patients_are_listed(task: Path) -> None:
    source = DecathlonFolder(
        path=task,
        patients_csv=task / "patients.csv",
        patient_ids=frozenset({"C", "D"}),
        volume_cut_mm3=100.0,
    )
    assert {entry.patient_id for entry in source.listing(VOLUME_CONDITIONS).entries} == {"C", "D"}


def test_conditions_of_the_table_come_first(task: Path) -> None:
    table = pd.read_csv(task / "patients.csv")
    table["condition"] = ["x", "y", "x", "x", "z", "x"]
    table.to_csv(task / "patients.csv", index=False)
    listing = DecathlonFolder(path=task, patients_csv=task / "patients.csv").listing(("x", "y"))
    assert [entry.condition for entry in listing.entries] == ["x", "y", "x", "x", "x"]
    assert [(p.file, p.kind) for p in listing.problems] == [
        ("hippocampus_004.nii.gz", ProblemKind.UNKNOWN_CONDITION)
    ]


def test_planted_faults_are_named(task: Path) -> None:
    table = pd.read_csv(task / "patients.csv")
    table["sha256_image"] = ["0" * 64, "", "", "", "", ""]
    table[table.file != "hippocampus_001.nii.gz"].to_csv(task / "patients.csv", index=False)
    (task / "imagesTr" / "hippocampus_002.nii.gz").unlink()
    (task / "labelsTr" / "hippocampus_003.nii.gz").write_bytes(b"broken")
    source = DecathlonFolder(path=task, patients_csv=task / "patients.csv", volume_cut_mm3=100.0)
    report = import_scans(source, SiteStore.create(task.parent / "store"), CLAUSE)
    assert {(problem.file, problem.kind) for problem in report.problems} == {
        ("hippocampus_000.nii.gz", ProblemKind.CHANGED_FILE),
        ("hippocampus_001.nii.gz", ProblemKind.NO_PATIENT),
        ("hippocampus_002.nii.gz", ProblemKind.MISSING_FILE),
        ("hippocampus_003.nii.gz", ProblemKind.UNREADABLE_FILE),
    }
    assert report.imported == ("hippocampus_004.nii.gz", "hippocampus_005.nii.gz")


def test_unusable_tables_and_folders_are_refused(task: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no volume cut"):
        DecathlonFolder(path=task, patients_csv=task / "patients.csv").listing(VOLUME_CONDITIONS)
    other = task.rename(tmp_path / "Task99_Other")
    with pytest.raises(ManifestError, match="Task99_Other"):
        DecathlonFolder(path=other, patients_csv=other / "patients.csv", volume_cut_mm3=1.0).listing(("x",))
    for text in ("file,who\na,b\n", "file,patient_id\n", "file,patient_id\na,P\na,Q\n"):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ManifestError, match=r"bad\.csv"):
            patient_ids(tmp_path / "bad.csv")


def test_a_tertile_needs_scans(task: Path) -> None:
    masks = public_mask_paths(task, task / "patients.csv", ["A", "B", "D"])
    assert [path.name[-10:-7] for path in masks] == ["000", "001", "002", "005"]
    assert volume_condition_cut(masks) == pytest.approx(np.quantile([8.0, 27.0, 64.0, 343.0], 1 / 3))
    with pytest.raises(SiteError, match="at least 3"):
        volume_condition_cut(masks[:2])


@settings(max_examples=40, deadline=None)
@given(
    ids=st.lists(st.text(min_size=1, max_size=6), min_size=9, max_size=40, unique=True),
    public=st.integers(0, 5),
    sites=st.integers(1, 4),
    seed=st.integers(-5, 5),
)
def test_a_split_deals_everybody_out_once(ids: list[str], public: int, sites: int, seed: int) -> None:
    aside, dealt = split_patients(ids, public=public, sites=sites, seed=seed)
    assert len(aside) == public and len(dealt) == sites
    assert sorted([*aside, *(patient for site in dealt for patient in site)]) == sorted(ids)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    assert split_patients([*reversed(ids), ids[0]], public=public, sites=sites, seed=seed) == (aside, dealt)


def test_a_split_depends_on_the_seed_and_needs_enough_patients() -> None:
    ids = [f"P{number}" for number in range(60)]
    splits = {tuple(split_patients(ids, public=20, sites=2, seed=seed)[0]) for seed in range(5)}
    assert len(splits) == 5
    with pytest.raises(UsageError, match="60 patients"):
        split_patients(ids, public=58, sites=3, seed=0)


@needs_data
def test_real_hippocampus_scans_go_to_three_sites(tmp_path: Path) -> None:
    """Public patients stand aside, no patient is at two sites, and no scan is lost on the way."""
    ids = patient_ids(PATIENTS)
    assert len(ids) == 114
    public, sites = split_patients(ids, public=30, sites=3, seed=0)
    cut = volume_condition_cut(public_mask_paths(TASK, PATIENTS, public))
    assert 2500 < cut < 3400
    table = pd.read_csv(PATIENTS)
    table["volume"] = table.anterior_mm3 + table.posterior_mm3
    chosen = frozenset(sites[0][:8])
    store = SiteStore.create(tmp_path / "site")
    source = DecathlonFolder(path=TASK, patients_csv=PATIENTS, patient_ids=chosen, volume_cut_mm3=cut)
    report = import_scans(source, store, CLAUSE)
    rows = table[table.patient_id.isin(chosen)]
    assert report.problems == () and set(report.imported) == set(rows.file)
    assert len({scan.patient_key for scan in store.scans()}) == 8
    assert sum(scan.condition == SMALL for scan in store.scans()) == (rows.volume < cut).sum()
    assert sum(scan.label_voxels for scan in store.scans()) == rows.volume.sum()
    for scan in store.scans():
        image, mask = store.read(scan)
        assert image.shape == mask.shape == (32, 48, 32) and image.dtype == np.float32
        assert 0.0 <= image.min() < 0.1 and image.max() > 0.9
        assert scan.lost_label_voxels <= 0.02 * scan.label_voxels


@needs_data
def test_the_derived_tertile_is_a_third_of_the_public_scans() -> None:
    public, _ = split_patients(patient_ids(PATIENTS), public=30, sites=3, seed=0)
    masks = public_mask_paths(TASK, PATIENTS, public)
    cut = volume_condition_cut(masks)
    small = sum(mask_volume_mm3(path) < cut for path in masks)
    assert abs(small - len(masks) / 3) <= 1
