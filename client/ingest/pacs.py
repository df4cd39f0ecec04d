"""Scans that are still in the hospital's archive (PACS): found, fetched series by series, then read as files.

Series wait in an inbox beside the store until the import is done. A series that arrived whole is moved there
in one step, so an import that was killed fetches only what is not there yet. The inbox has DICOM files with
all their identifiers: it belongs to the hospital's engineer (0700), the agent never looks into it, and
:meth:`PacsSource.discard` removes it after a finished import.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from client.ingest.dicom import DicomFolder, DicomPairing
from client.ingest.manifest import ManifestRow
from client.ingest.scan import Listing, Problem, ProblemKind
from shared.errors import SiteError
from shared.home import private_directory
from shared.volumes.nifti import NIFTI_SUFFIXES

NOT_IMAGES = frozenset(
    {"SR", "PR", "KO", "DOC", "RTSTRUCT", "RTPLAN", "RTDOSE", "RTRECORD", "ECG", "AU", "REG", "PLAN", "FID"}
)
"""Modalities of objects that never are images of a patient; not fetched."""


class PacsError(SiteError):
    """The archive cannot be reached, refuses us, or breaks off. What was fetched is kept."""


class NotRetrievedError(SiteError):
    """The archive does not give one series; the others go on."""


def object_file(uid: str) -> str:
    """File name of an object in the inbox. Raises NotRetrievedError where the archive's UID is none."""
    if re.fullmatch(r"[0-9.]{1,64}", uid) is None:
        raise NotRetrievedError(f"an object has the UID {uid[:80]!r}")
    return f"{uid}.dcm"


@dataclass(frozen=True, kw_only=True)
class RemoteSeries:
    """A series as the archive describes it.

    Attributes:
        patient_id, study_uid, series_uid: Who and what.
        modality, body_part, description, number: None where the archive does not say.
        n_objects: How many objects it has, where the archive says so.
    """

    patient_id: str
    study_uid: str
    series_uid: str
    modality: str | None = None
    body_part: str | None = None
    description: str | None = None
    number: str | None = None
    n_objects: int | None = None

    @classmethod
    def described(cls, study: Callable[[str], str], series: Callable[[str], str]) -> RemoteSeries:
        """From an archive's answers: functions from keyword to text, empty where it does not say."""
        count = series("NumberOfSeriesRelatedInstances")
        return cls(
            patient_id=study("PatientID"),
            study_uid=study("StudyInstanceUID"),
            series_uid=series("SeriesInstanceUID"),
            modality=series("Modality") or None,
            body_part=series("BodyPartExamined") or None,
            description=series("SeriesDescription") or None,
            number=series("SeriesNumber") or None,
            n_objects=int(count) if count.isdigit() else None,
        )

    @property
    def name(self) -> str:
        number = f" series {self.number}" if self.number else ""
        description = f" {self.description!r}" if self.description else ""
        return f"{self.patient_id}:{number}{description} ({self.series_uid})"


class Archive(Protocol):
    """A PACS."""

    def find(self, patient_id: str | None, modalities: frozenset[str]) -> Iterable[RemoteSeries]:
        """All series of a patient, or of everybody.

        Args:
            patient_id: Patient ID; None is everybody.
            modalities: A hint that the archive may use to answer with less; empty is all.

        Raises:
            PacsError: the archive cannot be asked.
        """
        ...

    def fetch(self, series: RemoteSeries, folder: Path) -> None:
        """Write the objects of a series into an empty folder, as they are stored.

        Raises:
            NotRetrievedError: the archive does not give all of them.
            PacsError: the connection fails.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class PacsSource:
    """Series of an archive, selected by the manifest's patients and the pairing's selection.

    Attributes:
        archive: Where to ask.
        inbox: Folder where series wait; made if it does not exist.
        series_key: What a series' folder in the inbox is called, from its UID.
        pairing: How series become scans.
        progress: Called as (stage, done, total) with the stages "finding" and "fetching".
    """

    archive: Archive
    inbox: Path
    series_key: Callable[[str], str]
    pairing: DicomPairing
    progress: Callable[[str, int, int], None] | None = None

    def listing(self, conditions: Sequence[str]) -> Listing:
        """Fetch what is wanted and not there yet, then list the inbox.

        Raises:
            ManifestError: the manifest as a whole is unusable.
            UsageError: the pairing's condition is not one of the plan.
            PacsError: the archive cannot be used; repeat the import to go on.
        """
        rows, _ = self.pairing.rows(conditions)
        private_directory(self.inbox)
        for partial in self.inbox.glob("*.partial"):
            shutil.rmtree(partial)
        wanted = self._find(rows)
        keys = {self.series_key(series.series_uid) for series in wanted}
        for folder in self.inbox.iterdir():
            if folder.name not in keys:  # of an import with another manifest or selection
                shutil.rmtree(folder)
        problems = []
        for done, series in enumerate(wanted, start=1):
            try:
                self._fetch(series)
            except NotRetrievedError as error:
                problems.append(
                    Problem(file=series.name, kind=ProblemKind.NOT_RETRIEVED, detail=error.message)
                )
            self._tell("fetching", done, len(wanted))
        folder_source = DicomFolder(path=self.inbox, pairing=self.pairing, from_archive=True)
        listing = folder_source.listing(conditions)
        return Listing(
            entries=listing.entries, problems=(*problems, *listing.problems), skipped=listing.skipped
        )

    def discard(self) -> None:
        """Remove the inbox with all that was fetched."""
        shutil.rmtree(self.inbox, ignore_errors=True)

    def _find(self, rows: Sequence[ManifestRow]) -> list[RemoteSeries]:
        modalities = self.pairing.selection.modalities
        modalities = frozenset({*modalities, "SEG"}) if modalities else modalities
        patients = [None] if self.pairing.manifest is None else sorted({row.patient for row in rows})
        found: dict[str, RemoteSeries] = {}
        for done, patient in enumerate(patients, start=1):
            own = [row for row in rows if row.patient == patient]
            for series in self.archive.find(patient, modalities):
                if (patient is None or series.patient_id == patient) and self._wanted(series, own):
                    found[series.series_uid] = series
            self._tell("finding", done, len(patients))
        return [found[uid] for uid in sorted(found)]

    def _wanted(self, series: RemoteSeries, rows: Sequence[ManifestRow]) -> bool:
        """What the archive does not say is decided by the files' own headers, after they are here."""
        modality = (series.modality or "").upper()
        everything = self.pairing.manifest is None
        if modality == "SEG":
            return everything or any(not row.mask.endswith(NIFTI_SUFFIXES) for row in rows)
        if modality in NOT_IMAGES:
            return False
        if not everything and not any(row.scan in ("", series.series_uid) for row in rows):
            return False
        rejected = self.pairing.selection.rejects(
            modality=series.modality, body_part=series.body_part, description=series.description
        )
        return rejected is None

    def _fetch(self, series: RemoteSeries) -> None:
        target = self.inbox / self.series_key(series.series_uid)
        if target.exists():
            return
        partial = target.with_name(f"{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        try:
            self.archive.fetch(series, partial)
        except NotRetrievedError:
            shutil.rmtree(partial)
            raise
        arrived = sum(1 for _ in partial.iterdir())
        if arrived == 0 or (series.n_objects is not None and arrived < series.n_objects):
            shutil.rmtree(partial)
            raise NotRetrievedError(f"{arrived} of {series.n_objects or 'its'} objects arrived")
        partial.rename(target)

    def _tell(self, stage: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, total)
