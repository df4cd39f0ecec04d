"""Import from a real Orthanc, by DICOMweb and C-GET: voxels as SimpleITK has them, faults named, kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from dicom_series import Series, blob, identifying_values, write_multiframe, write_segmentation
from itk_volume import assert_same_scan, itk_volume
from orthanc_server import Orthanc, running_orthanc
from pydicom import Dataset
from pydicom.uid import CTImageStorage, JPEGLSLossless

from client.ingest.dicom import DicomPairing
from client.ingest.dicom_index import SeriesSelection
from client.ingest.dicom_volume import DicomSeries
from client.ingest.dicomweb_archive import DicomWebArchive
from client.ingest.dimse_archive import DimseArchive
from client.ingest.pacs import Archive, PacsError, PacsSource, RemoteSeries
from client.ingest.scan import ProblemKind
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from shared.errors import UsageError
from shared.study_plan import DataClause

ROOT = Path(os.environ.get("LACUNA_DATA", Path(__file__).parents[4] / "shared" / "data"))
T1 = ROOT / "t1_dicom_series"
PYDICOM = Path(pydicom.data.__file__).parent / "test_files"
ROUTES = ("dicomweb", "dimse")
CLAUSE = DataClause(
    conditions=("common", "rare"),
    rare_condition="rare",
    labels=("organ", "lesion"),
    grid_shape=(24, 24, 24),
    spacing_mm=(2.0, 2.0, 2.0),
)
SHAPE = (10, 24, 20)


@dataclass
class Pacs:
    """The archive, and what was put into it."""

    server: Orthanc
    masks: Path
    sound: dict[str, tuple[list[Path], np.ndarray | None]] = field(default_factory=dict)
    """Files and mask of each sound series, by its UID."""
    series: dict[str, str] = field(default_factory=dict)
    """UID of each series of ours, by the name of its patient."""
    files: list[Path] = field(default_factory=list)


FEW_ODD_FILES = ("MR_small*.dcm", "examples_*.dcm", "liver_*.dcm", "rtdose*.dcm", "test-SR.dcm", "UN_*.dcm",
                 "CT_small.dcm", "693_J2KI.dcm", "98892003/**/*")  # fmt: skip


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pacs]:
    """Series of ours, sound and broken, and some of pydicom's odd files."""
    with filled_pacs(tmp_path_factory.mktemp("pacs"), FEW_ODD_FILES, real_head=False) as filled:
        yield filled


@pytest.fixture(scope="module")
def full_pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pacs]:
    """With all of pydicom's odd files, and the real head both as a series and made multi-frame."""
    with filled_pacs(tmp_path_factory.mktemp("full"), ("*",), real_head=T1.is_dir()) as filled:
        yield filled


@contextmanager
def filled_pacs(root: Path, odd_patterns: Sequence[str], *, real_head: bool) -> Iterator[Pacs]:
    (root / "orthanc").mkdir()
    with running_orthanc(root / "orthanc") as server:
        pacs = Pacs(server, root / "masks")
        pacs.masks.mkdir()
        _sound_series(pacs, root)
        if real_head:
            _real_head(pacs, root)
        _broken_series(pacs, root)
        assert server.store(pacs.files) == []
        odd = sorted({path for pattern in odd_patterns for path in PYDICOM.rglob(pattern) if path.is_file()})
        assert len(server.store(odd)) < len(odd) / 2  # what is no DICOM at all
        yield pacs


def _sound_series(pacs: Pacs, root: Path) -> None:
    """A plain series, a compressed one, an oblique one made multi-frame, two series of the real data."""

    def compress(dataset: Dataset, index: int) -> None:
        dataset.PixelRepresentation = 0
        dataset.compress(JPEGLSLossless, generate_instance_uid=False)

    def hounsfield(dataset: Dataset, index: int) -> None:
        dataset.Modality, dataset.SOPClassUID = "CT", CTImageStorage
        dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
        dataset.RescaleSlope, dataset.RescaleIntercept = "2", "-1024"

    edits = {"MRN-PLAIN": None, "MRN-JPEGLS": compress, "MRN-CT": hounsfield}
    for number, (patient, edit) in enumerate(edits.items()):
        voxels, mask = blob(SHAPE, seed=number)
        series = Series(voxels=voxels, patient_id=patient)
        _keep(pacs, series.uid, patient, series.write(root / patient, edit), mask)
    voxels, mask = blob(SHAPE, seed=5)
    series = Series(
        voxels=voxels, patient_id="MRN-FRAMES", row=(0.96, 0.28, 0.0), column=(0.0, 0.0, -1.0),
        step=(-0.56, 1.92, 0.0),
    )  # fmt: skip
    frames = write_multiframe(root / "frames.dcm", series.write(root / "parts"))
    _keep(pacs, str(pydicom.dcmread(frames).SeriesInstanceUID), "MRN-FRAMES", [frames], mask)
    ct = sorted((PYDICOM / "dicomdirtests" / "98892001" / "CT5N").iterdir())
    _keep(pacs, str(pydicom.dcmread(ct[0]).SeriesInstanceUID), "98890234", ct, None)


def _real_head(pacs: Pacs, root: Path) -> None:
    head = sorted(T1.glob("*.dcm"))
    mask = np.zeros((64, 384, 274), np.uint8)
    mask[20:40, 150:220, 100:160] = 1
    mask[25:30, 160:170, 110:120] = 2
    _keep(pacs, str(pydicom.dcmread(head[0]).SeriesInstanceUID), "02", head, mask)
    frames = write_multiframe(root / "head.dcm", head)
    _keep(pacs, str(pydicom.dcmread(frames).SeriesInstanceUID), "02", [frames], None)


def _keep(pacs: Pacs, uid: str, patient: str, paths: list[Path], mask: np.ndarray | None) -> None:
    pacs.series[patient] = uid
    pacs.sound[uid] = (paths, mask)
    pacs.files += paths
    if mask is not None:
        pacs.files.append(write_segmentation(pacs.masks / f"{patient}.dcm", paths, mask))


def _broken_series(pacs: Pacs, root: Path) -> None:
    """Faults that an archive stores without a murmur."""

    def short_pixels(dataset: Dataset, index: int) -> None:
        if index == 6:
            dataset.PixelData = dataset.PixelData[:-100]

    def colour(dataset: Dataset, index: int) -> None:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = dataset.PixelData * 3

    for patient, edit in (("MRN-SHORT", short_pixels), ("MRN-COLOUR", colour), ("MRN-GAP", None)):
        series = Series(voxels=blob(SHAPE, seed=9)[0], patient_id=patient)
        paths = series.write(root / patient, edit)
        if patient == "MRN-GAP":
            paths.pop(3).unlink()
        pacs.series[patient] = series.uid
        pacs.files += paths
        pacs.files.append(
            write_segmentation(pacs.masks / f"{patient}.dcm", paths[:2], np.ones((2, 24, 20), np.uint8))
        )


def archive(pacs: Pacs, route: str) -> Archive:
    return DicomWebArchive(pacs.server.dicomweb) if route == "dicomweb" else DimseArchive(pacs.server.dimse)


def manifest(path: Path, *patients: str) -> Path:
    rows = [f"{patient},,{'rare' if index % 2 else 'common'}," for index, patient in enumerate(patients)]
    path.write_text("\n".join(["patient,scan,condition,mask", *rows]) + "\n")
    return path


def source_of(
    pacs: Pacs,
    route: str,
    store: SiteStore,
    pairing: DicomPairing,
    progress: Callable[..., None] | None = None,
) -> PacsSource:
    return PacsSource(
        archive=archive(pacs, route), inbox=store.root.parent / "inbox", series_key=store.series_key,
        pairing=pairing, progress=progress,
    )  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> SiteStore:
    return SiteStore.create(tmp_path / "store")


@pytest.mark.parametrize("route", ROUTES)
def test_everything_in_the_archive_is_imported_or_refused_by_name(
    pacs: Pacs, store: SiteStore, route: str
) -> None:
    import_everything(pacs, store, route)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_all_odd_files_and_the_real_head_are_imported_or_refused_by_name(
    full_pacs: Pacs, store: SiteStore, route: str
) -> None:
    import_everything(full_pacs, store, route)


def import_everything(pacs: Pacs, store: SiteStore, route: str) -> None:
    """Voxels and geometry are SimpleITK's, read from the same files; masks are the ones that were drawn."""
    pairing = DicomPairing(labels=CLAUSE.labels, condition="common")
    source = source_of(pacs, route, store, pairing)
    listing = source.listing(CLAUSE.conditions)
    read = {entry.image.identity: entry for entry in listing.entries}
    drawn = {uid for uid, (_, mask) in pacs.sound.items() if mask is not None}
    assert drawn <= set(read)
    for uid, (paths, mask) in pacs.sound.items():
        if mask is None:  # nobody drew on it
            folder = source.inbox / store.series_key(uid)
            image = DicomSeries(series_uid=uid, paths=tuple(folder.iterdir())).read()
        else:
            image = read[uid].image.read()
            np.testing.assert_array_equal(read[uid].mask.read(image.volume).volume.voxels_DHW, mask)
        assert_same_scan(image.volume, itk_volume(paths))
    report = import_scans(source, store, CLAUSE)
    assert len(report.imported) >= 4, report
    assert {uid for uid in drawn if uid in str(report.imported)} == drawn
    for patient, kind in (
        ("MRN-SHORT", ProblemKind.UNDECODABLE_PIXELS),
        ("MRN-COLOUR", ProblemKind.COLOUR_IMAGE),
        ("MRN-GAP", ProblemKind.MISSING_SLICES),
        ("4MR1", ProblemKind.NO_MASK),
        ("13US1", ProblemKind.NO_MASK),
    ):
        assert [problem.kind for problem in report.problems if problem.file.startswith(f"{patient}:")] == [
            kind
        ]
    fetched = {path.parent.name for path in source.inbox.rglob("*.dcm")}
    named = {
        uid for uid in _all_series(pacs) if any(uid in name for name in (*report.imported, *report.refused))
    }
    assert named == {uid for uid in _all_series(pacs) if store.series_key(uid) in fetched} - _segmentations(
        pacs
    )
    source.discard()
    assert not source.inbox.exists()


def _all_series(pacs: Pacs) -> set[str]:
    return {series.series_uid for series in archive(pacs, "dicomweb").find(None, frozenset())}


def _segmentations(pacs: Pacs) -> set[str]:
    found = archive(pacs, "dicomweb").find(None, frozenset())
    return {series.series_uid for series in found if series.modality == "SEG"}


def test_both_routes_fill_the_same_store(pacs: Pacs, tmp_path: Path) -> None:
    stores = []
    for route in ROUTES:
        (tmp_path / route).mkdir()
        store = SiteStore.create(tmp_path / route / "store")
        (store.root / "site.key").write_bytes(b"\7" * 32)
        store = SiteStore.open(store.root)
        pairing = DicomPairing(
            labels=CLAUSE.labels,
            manifest=manifest(tmp_path / "m.csv", "MRN-PLAIN", "MRN-JPEGLS", "MRN-FRAMES"),
        )
        report = import_scans(source_of(pacs, route, store, pairing), store, CLAUSE)
        assert len(report.imported) == 3 and report.problems == (), report
        stores.append({path.name: path.read_bytes() for path in (store.root / "scans").iterdir()})
    assert stores[0] == stores[1] and len(stores[0]) == 3


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_that_identifies_a_patient_reaches_the_agent(
    pacs: Pacs, store: SiteStore, tmp_path: Path, route: str
) -> None:
    """No name, number, date, time or unique identifier of any header is anywhere in the agent's store."""
    patients = ("MRN-PLAIN", "MRN-JPEGLS", "MRN-FRAMES")
    pairing = DicomPairing(labels=CLAUSE.labels, manifest=manifest(tmp_path / "m.csv", *patients))
    source = source_of(pacs, route, store, pairing)
    import_scans(source, store, CLAUSE)
    waiting = [path for path in source.inbox.rglob("*") if path.is_file()]
    values = identifying_values(waiting)
    assert {
        "Mustermann^Erika",
        "MRN-PLAIN",
        "19640812",
        "20240229",
        "ACC-77-1",
        pacs.series["MRN-PLAIN"],
    } <= values
    assert source.inbox.stat().st_mode & 0o077 == 0
    files = [path for path in store.root.rglob("*") if path.is_file()]
    assert len(files) > 4
    content = b"".join(path.name.encode() + path.read_bytes() for path in files)
    content += (repr(store.scans()) + store.table().to_csv()).encode()
    values -= set(CLAUSE.labels)  # the plan names them too
    assert not {value for value in values if value.encode() in content}
    names = " ".join(folder.name for folder in source.inbox.iterdir())
    assert not {value for value in values if value in names}


@pytest.mark.parametrize("route", ROUTES)
def test_series_are_selected_before_they_are_fetched(
    pacs: Pacs, store: SiteStore, tmp_path: Path, route: str
) -> None:
    stages: list[tuple[str, int, int]] = []
    pairing = DicomPairing(
        labels=CLAUSE.labels,
        manifest=manifest(tmp_path / "m.csv", "MRN-CT", "MRN-PLAIN"),
        selection=SeriesSelection(modalities=frozenset({"CT"})),
    )
    source = source_of(pacs, route, store, pairing, lambda *call: stages.append(call))
    listing = source.listing(CLAUSE.conditions)
    assert [entry.image.identity for entry in listing.entries] == [pacs.series["MRN-CT"]]
    assert ("finding", 2, 2) in stages
    assert {total for stage, _, total in stages if stage == "fetching"} == {3}  # one CT, two SEG
    assert [(problem.file, problem.kind) for problem in listing.problems] == [
        ("patient MRN-PLAIN", ProblemKind.MISSING_FILE)
    ]


_IMPORT = """
import json, sys
from pathlib import Path
from client.ingest.dicom import DicomPairing
from client.ingest.dicomweb_archive import DicomWebArchive
from client.ingest.dimse_archive import DimseArchive
from client.ingest.pacs import PacsSource
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from shared.study_plan import DataClause
route, address, root, manifest, clause = sys.argv[1:]
clause = DataClause.model_validate_json(clause)
def progress(stage, done, total):
    print(stage, done, flush=True)
    sys.stdin.readline()
store = SiteStore.open(Path(root))
archive = DicomWebArchive(address) if route == "dicomweb" else DimseArchive(address)
pairing = DicomPairing(labels=clause.labels, manifest=Path(manifest))
source = PacsSource(archive=archive, inbox=store.root.parent / "inbox", series_key=store.series_key,
                    pairing=pairing, progress=progress)
import_scans(source, store, clause, progress=progress)
"""


@pytest.mark.parametrize(
    ("route", "moment"),
    [
        ("dicomweb", "importing 1"),
        ("dimse", "fetching 3"),
        pytest.param("dicomweb", "fetching 2", marks=pytest.mark.slow),
        pytest.param("dimse", "checking 2", marks=pytest.mark.slow),
    ],
)
def test_a_killed_import_loses_and_doubles_nothing(
    pacs: Pacs, store: SiteStore, tmp_path: Path, route: str, moment: str
) -> None:
    patients = ("MRN-PLAIN", "MRN-JPEGLS", "MRN-FRAMES")
    table = manifest(tmp_path / "m.csv", *patients)
    address = pacs.server.dicomweb if route == "dicomweb" else pacs.server.dimse
    words = [route, address, str(store.root), str(table), CLAUSE.model_dump_json()]
    process = subprocess.Popen(
        [sys.executable, "-c", _IMPORT, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        cwd=Path(__file__).parents[3], env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None and process.stdin is not None
    for line in process.stdout:
        if line.strip() == moment:
            process.send_signal(signal.SIGKILL)
            break
        process.stdin.write("\n")
        process.stdin.flush()
    process.wait()
    process.stdout.close()
    process.stdin.close()
    assert process.returncode == -signal.SIGKILL
    stage, count = moment.split()
    waiting = {folder.name for folder in (tmp_path / "inbox").iterdir()}
    assert len(waiting) == (int(count) if stage == "fetching" else 6)
    (
        tmp_path / "inbox" / ("0" * 64 + ".partial")
    ).mkdir()  # half a series, as a kill at another moment leaves it
    done = len(store.scans())
    assert done == (1 if stage == "importing" else 0)
    pairing = DicomPairing(labels=CLAUSE.labels, manifest=table)
    again = source_of(pacs, route, store, pairing)
    asked: list[str] = []
    fetch = again.archive.fetch

    def counted(series: RemoteSeries, folder: Path) -> None:
        asked.append(store.series_key(series.series_uid))
        fetch(series, folder)

    again.archive.fetch = counted  # type: ignore[method-assign]
    report = import_scans(again, store, CLAUSE)
    assert set(asked) & waiting == set() and len(asked) == len(set(asked)) == 6 - len(waiting)
    assert (len(report.present), len(report.imported), report.problems) == (done, 3 - done, ())
    assert {scan.patient_key for scan in store.scans()} == {
        store.patient_key(patient) for patient in patients
    }
    assert len(store.scans()) == 3


def test_an_archive_that_cannot_be_used_is_named_with_what_to_do(
    pacs: Pacs, store: SiteStore, tmp_path: Path
) -> None:
    host = pacs.server.dimse.partition("@")[2]
    pairing = DicomPairing(labels=CLAUSE.labels, manifest=manifest(tmp_path / "m.csv", "MRN-PLAIN"))
    for unusable, said in (
        (DicomWebArchive("http://127.0.0.1:1/dicom-web"), "cannot be used"),
        (DicomWebArchive(f"{pacs.server.web}/nothing-here"), "status 404"),
        (DimseArchive("ORTHANC@127.0.0.1:1"), "cannot be reached"),
        (DimseArchive(f"NOBODY@{host}"), "rejects us"),
    ):
        source = PacsSource(
            archive=unusable, inbox=tmp_path / "inbox", series_key=store.series_key, pairing=pairing
        )
        with pytest.raises(PacsError, match=said) as refusal:
            source.listing(CLAUSE.conditions)
        assert refusal.value.remedy
    wild = DicomPairing(labels=CLAUSE.labels, manifest=manifest(tmp_path / "wild.csv", "MRN*"))
    with pytest.raises(UsageError, match="wildcard"):
        source_of(pacs, "dimse", store, wild).listing(CLAUSE.conditions)
    for address in ("ORTHANC", "A@b", "A@b:0", "A@b:99999", "much-too-long-a-title@b:104"):
        with pytest.raises(UsageError, match="AET@HOST:PORT"):
            DimseArchive(address)
    with pytest.raises(UsageError, match="DICOMweb"):
        DicomWebArchive("pacs.example")


def test_a_series_that_does_not_arrive_whole_is_named_and_the_rest_goes_on(
    pacs: Pacs, store: SiteStore, tmp_path: Path
) -> None:
    pairing = DicomPairing(
        labels=CLAUSE.labels, manifest=manifest(tmp_path / "m.csv", "MRN-PLAIN", "MRN-JPEGLS")
    )
    source = source_of(pacs, "dicomweb", store, pairing)
    fetch = source.archive.fetch

    def lossy(series: RemoteSeries, folder: Path) -> None:
        fetch(series, folder)
        if series.series_uid == pacs.series["MRN-PLAIN"]:
            next(folder.iterdir()).unlink()

    source.archive.fetch = lossy  # type: ignore[method-assign]
    report = import_scans(source, store, CLAUSE)
    assert len(report.imported) == 1
    lost = [problem for problem in report.problems if problem.kind is ProblemKind.NOT_RETRIEVED]
    assert len(lost) == 1 and "9 of 10" in lost[0].detail and pacs.series["MRN-PLAIN"] in lost[0].file
    assert json.dumps([str(problem) for problem in report.problems])
