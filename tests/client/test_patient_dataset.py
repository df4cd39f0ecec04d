"""The site store: keyed hashes, hold-out, interruption, and nothing of the hospital's names in it."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from client.ingest.nifti import NiftiFolder
from client.ingest.phantoms import write_phantom_folder
from client.ingest.scan import Listing
from client.patient_dataset import SiteStore, StoreError, holdout_draw, is_held_out
from client.scan_import import import_scans
from shared.errors import UsageError
from shared.study_plan import DataClause
from shared.volumes.intensity import normalise_intensity
from shared.volumes.phantom import PhantomScan, simulate_cohort

CLAUSE = DataClause(
    conditions=("common", "rare"),
    rare_condition="rare",
    labels=("organ", "lesion"),
    grid_shape=(16, 16, 16),
    spacing_mm=(6.0, 6.0, 6.0),
)


@pytest.fixture(scope="module")
def cohort() -> list[PhantomScan]:
    return simulate_cohort(
        n_patients=20,
        conditions_fractions={"common": 0.5, "rare": 0.5},
        seed=4,
        grid_shape=(16, 16, 16),
        spacing_mm=(6.0, 6.0, 6.0),
    )


@pytest.fixture(scope="module")
def folder(cohort: list[PhantomScan], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hospital")
    write_phantom_folder(cohort, path, spacing_mm=(6.0, 6.0, 6.0))
    return path


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore.create(tmp_path / "store")


def test_simulated_scans_pass_through_files_unchanged(
    cohort: list[PhantomScan], folder: Path, store: SiteStore
) -> None:
    report = import_scans(NiftiFolder(path=folder), store, CLAUSE)
    assert report.problems == () and report.cut == () and len(report.imported) == len(cohort)
    assert len(store.scans()) == len(cohort)
    by_patient = {store.patient_key(scan.patient_id): scan for scan in cohort}
    assert {scan.patient_key for scan in store.scans()} == set(by_patient)
    masks = {scan.mask.tobytes(): scan for scan in cohort}
    for row in store.scans():
        image, mask = store.read(row)
        original = masks[mask.tobytes()]
        np.testing.assert_allclose(image, normalise_intensity(original.image), atol=1e-6)
        assert row.condition == original.condition
        assert row.patient_key == store.patient_key(original.patient_id)


def test_nothing_in_the_store_names_a_patient_or_a_file(
    cohort: list[PhantomScan], folder: Path, store: SiteStore
) -> None:
    import_scans(NiftiFolder(path=folder), store, CLAUSE)
    forbidden = {scan.patient_id for scan in cohort} | {scan.scan_id for scan in cohort}
    forbidden |= {str(folder), folder.name, ".nii", "manifest"}
    for path in store.root.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        for text in forbidden:
            assert text not in path.name and text.encode() not in content, path
    assert not any(text in repr(store.scans()) + store.table().to_csv() for text in forbidden)


def test_only_the_owner_can_look(store: SiteStore) -> None:
    assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.root / "site.key").stat().st_mode) == 0o600
    (store.root / "site.key").chmod(0o640)
    with pytest.raises(StoreError, match="others can read it"):
        SiteStore.open(store.root)


def test_the_site_key_is_made_once_and_committed_to(store: SiteStore, tmp_path: Path) -> None:
    key = (store.root / "site.key").read_bytes()
    assert len(key) == 32
    with pytest.raises(StoreError, match="already"):
        SiteStore.create(store.root)
    assert (store.root / "site.key").read_bytes() == key
    other = SiteStore.create(tmp_path / "other")
    assert SiteStore.open(store.root).key_commitment == store.key_commitment != other.key_commitment
    assert key.hex() not in store.key_commitment + repr(store)
    assert store.patient_key("P1") == SiteStore.open(store.root).patient_key("P1") != other.patient_key("P1")
    with pytest.raises(StoreError, match="no site store"):
        SiteStore.open(tmp_path / "nowhere")


class _Told:
    """A source that knows more of its scans than the plan asks for."""

    def __init__(self, folder: Path, covariates: dict[str, str]) -> None:
        self.folder, self.covariates = NiftiFolder(path=folder), covariates

    def listing(self, conditions: Sequence[str]) -> Listing:
        listing = self.folder.listing(conditions)
        told = tuple(replace(entry, covariates=self.covariates) for entry in listing.entries)
        return replace(listing, entries=told)


def test_the_plans_covariates_come_along_and_no_others(folder: Path, store: SiteStore) -> None:
    clause = DataClause.model_validate(
        {
            **CLAUSE.model_dump(),
            "covariates": [{"name": "sex", "values": ["f", "m"]}, {"name": "age", "edges": [40]}],
        }
    )
    import_scans(_Told(folder, {"sex": "f", "age": " ", "ward": "secret-7"}), store, clause)
    assert {scan.covariates for scan in store.scans()} == {(("sex", "f"),)}
    assert not any(b"secret-7" in path.read_bytes() for path in store.root.rglob("*.safetensors"))
    again = import_scans(_Told(folder, {"sex": "f"}), store, clause)
    assert len(again.present) == len(store.scans()) and again.problems == ()
    for other, words in (({"sex": "x"}, "none of f, m"), ({"sex": "m"}, "other covariates")):
        problems = import_scans(_Told(folder, other), store, clause).problems
        assert len(problems) == len(store.scans()) and all(words in p.detail for p in problems)
    with pytest.raises(StoreError, match="other covariates"):
        import_scans(NiftiFolder(path=folder), store, CLAUSE)


def test_members_and_held_out_split_patients_and_not_scans(folder: Path, store: SiteStore) -> None:
    import_scans(NiftiFolder(path=folder), store, CLAUSE)
    members, held_out = store.members(0.4), store.held_out(0.4)
    assert sorted([*members, *held_out], key=lambda scan: scan.scan_key) == store.scans()
    assert not {scan.patient_key for scan in members} & {scan.patient_key for scan in held_out}
    assert store.members(0.0) == store.scans() == store.held_out(1.0)
    assert {scan.scan_key for scan in store.held_out(0.2)} <= {scan.scan_key for scan in held_out}


def test_hold_out_is_keyed_fair_and_independent_of_others(folder: Path, store: SiteStore) -> None:
    """Fixed keys, so nothing here can fail by chance. The share of 10,000 ids lies within 4 sigma."""
    key, other = b"\1" * 32, b"\2" * 32
    ids = [f"MRN-{number}" for number in range(10_000)]
    held = {patient for patient in ids if is_held_out(key, patient, 1 / 3)}
    assert abs(len(held) - 10_000 / 3) < 4 * (10_000 * 2 / 9) ** 0.5
    assert held != {patient for patient in ids if is_held_out(other, patient, 1 / 3)}
    both = sum(is_held_out(key, patient, 1 / 3) and is_held_out(other, patient, 1 / 3) for patient in ids)
    assert abs(both - 10_000 / 9) < 4 * (10_000 * 8 / 81) ** 0.5
    import_scans(NiftiFolder(path=folder), store, CLAUSE)
    site_key = (store.root / "site.key").read_bytes()
    for number in range(20):
        patient = f"P{number:05d}"
        stored = {s.holdout_draw for s in store.scans() if s.patient_key == store.patient_key(patient)}
        assert stored == {holdout_draw(site_key, patient)}


def test_a_patients_key_does_not_reveal_the_hold_out_draw() -> None:
    """Two purposes of one key are two functions: the draw is not the beginning of the patient's key."""
    store = SiteStore(Path(), b"\7" * 32)
    first = int(store.patient_key("P1")[:16], 16) / 2**64
    assert abs(first - holdout_draw(b"\7" * 32, "P1")) > 1e-6


def test_importing_again_changes_nothing(folder: Path, store: SiteStore) -> None:
    first = import_scans(NiftiFolder(path=folder), store, CLAUSE)
    before = {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()}
    again = import_scans(NiftiFolder(path=folder), store, CLAUSE)
    assert again.imported == () and sorted(again.present) == sorted(first.imported)
    assert {path: path.read_bytes() for path in store.root.rglob("*") if path.is_file()} == before


_IMPORT = """
import sys, time
from pathlib import Path
from client.ingest.nifti import NiftiFolder
from client.ingest.scan import Listing
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from shared.study_plan import DataClause
clause = DataClause.model_validate_json(sys.argv[3])
def progress(stage, done, total):
    print(stage, done, flush=True)
    time.sleep(0.01)
store = SiteStore.open(Path(sys.argv[2]))
import_scans(NiftiFolder(path=Path(sys.argv[1])), store, clause, progress=progress)
"""


@pytest.mark.parametrize("moment", ["checking 3", "importing 1", "importing 9"])
def test_a_killed_import_goes_on_where_it_stopped(
    cohort: list[PhantomScan], folder: Path, store: SiteStore, tmp_path: Path, moment: str
) -> None:
    """kill -9 of a real process: nothing is lost, nothing is doubled, and the result is the same."""
    process = subprocess.Popen(
        [sys.executable, "-c", _IMPORT, str(folder), str(store.root), CLAUSE.model_dump_json()],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == moment:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    done = len(store.scans())
    assert done < len(cohort) and (done >= 1 if moment.startswith("importing") else done == 0)
    (store.root / "scans" / ".torn.safetensors.123.partial").write_bytes(b"half a scan")
    report = import_scans(NiftiFolder(path=folder), store, CLAUSE)
    assert len(report.present) == done and len(report.imported) == len(cohort) - done
    assert report.problems == ()
    whole = tmp_path / "whole"
    whole.mkdir(mode=0o700)
    shutil.copy2(store.root / "site.key", whole / "site.key")
    import_scans(NiftiFolder(path=folder), SiteStore.open(whole), CLAUSE)
    files = [
        {path.name: path.read_bytes() for path in (root / "scans").iterdir()} for root in (store.root, whole)
    ]
    assert files[0] == files[1] and len(files[0]) == len(cohort)


def test_two_imports_at_once_are_refused(folder: Path, store: SiteStore) -> None:
    with store.exclusively(), pytest.raises(StoreError, match="another import"):
        import_scans(NiftiFolder(path=folder), SiteStore.open(store.root), CLAUSE)
    assert store.scans() == []


@pytest.mark.parametrize(
    "change",
    [
        {"grid_shape": (16, 16, 24)},
        {"spacing_mm": (5.0, 6.0, 6.0)},
        {"labels": ("lesion", "organ")},
        {"conditions": ("rare", "common")},
        {"intensity_percentiles": (1.0, 99.0)},
    ],
)
def test_a_store_serves_one_grid(folder: Path, store: SiteStore, change: dict[str, object]) -> None:
    import_scans(NiftiFolder(path=folder), store, CLAUSE)
    with pytest.raises(StoreError, match=next(iter(change))):
        import_scans(NiftiFolder(path=folder), store, CLAUSE.model_copy(update=change))


def test_a_damaged_scan_is_named(folder: Path, store: SiteStore) -> None:
    import_scans(NiftiFolder(path=folder), store, CLAUSE)
    scan = store.scans()[0]
    path = store.root / "scans" / f"{scan.scan_key}.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(StoreError, match=scan.scan_key):
        store.read(scan)
    path.write_bytes(b"nothing")
    with pytest.raises(StoreError, match=scan.scan_key):
        store.scans()


def test_progress_is_told(folder: Path, store: SiteStore, cohort: list[PhantomScan]) -> None:
    calls: list[tuple[str, int, int]] = []
    import_scans(NiftiFolder(path=folder), store, CLAUSE, progress=lambda *call: calls.append(call))
    n = len(cohort)
    assert calls == [
        *(("checking", k, n) for k in range(1, n + 1)),
        *(("importing", k, n) for k in range(1, n + 1)),
    ]


def test_phantom_folders_need_distinct_scans(cohort: list[PhantomScan], tmp_path: Path) -> None:
    for scans in ([], [cohort[0], cohort[0]]):
        with pytest.raises(UsageError):
            write_phantom_folder(scans, tmp_path / "x")
