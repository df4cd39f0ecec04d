"""Scans in the layout of the Medical Segmentation Decathlon (Antonelli et al., Nature Communications 2022).

MONAI's ``DecathlonDataset`` lists the files; its own split is never used (section "training", ``val_frac``
0), because it splits volumes and not patients. The Decathlon names no patients: a patients' table says which
file is whose.

Where there is no diagnosis, the condition of a scan is derived from its mask: ``small`` below a volume cut,
``normal`` at or above it. The cut is the lower tertile of PUBLIC patients' scans, so that it says nothing
about a hospital's own.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from client.ingest.manifest import ManifestError, drop_repeated_files, named_cells, read_csv_table
from client.ingest.nifti_file import NiftiFile
from client.ingest.scan import Listing, Problem, ProblemKind, ScanEntry
from shared.canonical import framed
from shared.errors import SiteError, UsageError
from shared.volumes.nifti import VolumeFileError, read_volume

SMALL, NORMAL = "small", "normal"
VOLUME_CONDITIONS = (SMALL, NORMAL)
"""Conditions derived from the mask's volume. They are not diagnoses."""


@dataclass(frozen=True, kw_only=True)
class DecathlonFolder:
    """Training scans of one Decathlon task.

    Attributes:
        path: Folder of the task, named as the Decathlon names it (``Task04_Hippocampus``).
        patients_csv: Table with the columns ``file`` and ``patient_id``; ``condition``, ``sha256_image`` and
            ``sha256_label`` are used where they are there, other columns are not read.
        patient_ids: Only these patients; None is all.
        volume_cut_mm3: Cut for derived conditions; needed where the table has no column ``condition``.
        covariates: Names of covariates that the table may have as columns.
    """

    path: Path
    patients_csv: Path
    patient_ids: frozenset[str] | None = None
    volume_cut_mm3: float | None = None
    covariates: tuple[str, ...] = ()

    def listing(self, conditions: Sequence[str]) -> Listing:
        """Scans, with conditions, and problems. Masks are opened where conditions are derived from them.

        Raises:
            ManifestError: the folder is not a Decathlon task, or the table is unusable.
        """
        table = _read_patients(self.patients_csv)
        derived = "condition" not in table.columns
        if derived and self.volume_cut_mm3 is None:
            raise ManifestError(
                f"{self.patients_csv}: there is no column condition, and no volume cut to derive it from",
                remedy="pass the lower tertile of the public scans' mask volumes (volume_condition_cut)",
            )
        rows = {str(row["file"]).strip(): row for row in table.to_dict("records")}
        entries: list[ScanEntry] = []
        problems: list[Problem] = []
        for image_path, mask_path in list_decathlon_files(self.path):
            row = rows.get(image_path.name)
            patient = str(row["patient_id"]).strip() if row else ""
            if self.patient_ids is not None and patient and patient not in self.patient_ids:
                continue
            entry = ScanEntry(
                patient_id=patient,
                name=image_path.name,
                image=NiftiFile(path=image_path, sha256=_checksum(row, "sha256_image")),
                mask=NiftiFile(path=mask_path, sha256=_checksum(row, "sha256_label")),
                condition="" if derived or not row else str(row["condition"]).strip(),
                covariates=named_cells(row or {}, self.covariates),
            )
            checked = self._checked(entry, mask_path if derived else None, conditions)
            if isinstance(checked, Problem):
                problems.append(checked)
            else:
                entries.append(checked)
        unique, repeated = drop_repeated_files(entries)
        return Listing(entries=unique, problems=(*problems, *repeated))

    def _checked(
        self, entry: ScanEntry, derive_from: Path | None, conditions: Sequence[str]
    ) -> ScanEntry | Problem:
        if not entry.patient_id:
            return Problem(
                file=entry.name, kind=ProblemKind.NO_PATIENT, detail=f"not in {self.patients_csv.name}"
            )
        for source in (entry.image, entry.mask):
            if source.missing is not None:
                return Problem(file=entry.name, kind=ProblemKind.MISSING_FILE, detail=source.missing)
        condition = entry.condition
        if derive_from is not None and self.volume_cut_mm3 is not None:
            try:
                volume = mask_volume_mm3(derive_from)
            except VolumeFileError as error:
                return Problem(
                    file=entry.name, kind=ProblemKind.UNREADABLE_FILE, detail=f"mask {error.message}"
                )
            condition = SMALL if volume < self.volume_cut_mm3 else NORMAL
        if condition not in conditions:
            known = ", ".join(conditions)
            return Problem(
                file=entry.name,
                kind=ProblemKind.UNKNOWN_CONDITION,
                detail=f"{condition!r}; the plan knows {known}",
            )
        return replace(entry, condition=condition)


def list_decathlon_files(path: Path) -> list[tuple[Path, Path]]:
    """Image and mask files of a task's training section, sorted by name; nothing is loaded.

    Raises:
        ManifestError: MONAI does not take the folder for a Decathlon task.
    """
    from monai.apps.datasets import DecathlonDataset  # imports torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about readers of other formats
            dataset = DecathlonDataset(
                root_dir=path.parent,
                task=path.name,
                section="training",
                val_frac=0.0,
                download=False,
                cache_num=0,
                progress=False,
            )
        items = [(Path(item["image"]), Path(item["label"])) for item in dataset.data]
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(
            f"{path}: not a task of the Medical Segmentation Decathlon ({error})",
            remedy="the folder has dataset.json, imagesTr and labelsTr, and the task's own name",
        ) from error
    return sorted(items)


def patient_ids(patients_csv: Path) -> list[str]:
    """Distinct patients of a table, sorted. Raises ManifestError."""
    return sorted({value.strip() for value in _read_patients(patients_csv)["patient_id"] if value.strip()})


def read_patient_list(path: Path) -> frozenset[str]:
    """One patient id a line. Raises UsageError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"list of patients {path} cannot be read as text: {error}") from error
    return frozenset(line.strip() for line in lines if line.strip())


def mask_volume_mm3(path: Path) -> float:
    """Volume of all labels of a mask, in cubic millimetres. Raises VolumeFileError."""
    mask = read_volume(path)
    return float(np.count_nonzero(mask.voxels_DHW > 0)) * mask.voxel_volume_mm3


def volume_condition_cut(mask_paths: Iterable[Path]) -> float:
    """Lower tertile of the mask volumes of PUBLIC scans, in cubic millimetres.

    Never pass a hospital's own scans: the cut becomes part of the plan.

    Raises:
        SiteError: fewer than 3 scans, or an unreadable mask.
    """
    volumes = [mask_volume_mm3(path) for path in mask_paths]
    if len(volumes) < 3:
        raise SiteError(f"a tertile needs at least 3 public scans, not {len(volumes)}")
    return float(np.quantile(volumes, 1 / 3))


def public_mask_paths(path: Path, patients_csv: Path, public: Collection[str]) -> list[Path]:
    """Masks of the public patients of a task, for :func:`volume_condition_cut`. Raises ManifestError."""
    owners = {
        str(row["file"]).strip(): str(row["patient_id"]).strip()
        for row in _read_patients(patients_csv).to_dict("records")
    }
    return [mask for image, mask in list_decathlon_files(path) if owners.get(image.name) in set(public)]


def split_patients(
    patient_ids: Iterable[str], *, public: int, sites: int, seed: int
) -> tuple[list[str], list[list[str]]]:
    """Deal patients out: ``public`` of them to nobody, the others evenly to sites. Nobody stands twice.

    Patients are ordered by SHA-256 of (seed, id), so the result depends on the set of ids and the seed
    alone, not on any order, and needs no generator.

    Returns:
        Public patients, and one list for each site; sizes of sites differ by at most one.

    Raises:
        UsageError: not at least one patient for each site.
    """
    prefix = seed.to_bytes(8, "big", signed=True)
    ordered = sorted(
        set(patient_ids),
        key=lambda patient: hashlib.sha256(
            framed("lacuna/patient-split/v1", prefix, patient.encode())
        ).digest(),
    )
    if public < 0 or sites < 1 or len(ordered) < public + sites:
        raise UsageError(f"{len(ordered)} patients cannot be split into {public} public and {sites} sites")
    rest = ordered[public:]
    return sorted(ordered[:public]), [sorted(rest[site::sites]) for site in range(sites)]


def _checksum(row: Mapping[Hashable, Any] | None, column: str) -> str | None:
    value = str(row.get(column, "")).strip().lower() if row else ""
    return value or None


def _read_patients(path: Path) -> pd.DataFrame:
    table = read_csv_table(path)
    missing = [column for column in ("file", "patient_id") if column not in table.columns]
    if missing or table.empty:
        raise ManifestError(f"{path}: a patients' table has the columns file and patient_id, and rows")
    repeated = sorted(set(table["file"][table["file"].duplicated()]))
    if repeated:
        raise ManifestError(f"{path}: listed more than once: {', '.join(repeated[:10])}")
    return table
