"""The manifest of a folder of scans: who, which file, which condition, which mask.

A manifest is a CSV file with the columns ``patient, scan, condition, mask`` and, where the plan declares
covariates, columns of their names; ``scan`` and ``mask`` are files, relative to the manifest's own folder (or
absolute). What is wrong with it is listed whole: one :class:`Problem` for each, naming its file, never only
the first.
"""

from __future__ import annotations

import csv
import warnings
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pandas.errors import ParserWarning

from client.ingest.nifti_file import NiftiFile
from client.ingest.scan import Listing, Problem, ProblemKind, ScanEntry
from shared.errors import SiteError

COLUMNS = ("patient", "scan", "condition", "mask")
MAX_MANIFEST_BYTES = 64 * 1024 * 1024


class ManifestError(SiteError):
    """The manifest as a whole cannot be used: missing, not CSV, or with wrong columns."""


@dataclass(frozen=True, kw_only=True)
class ManifestRow:
    """One row as it stands, without surrounding spaces. ``where`` names its line."""

    patient: str
    scan: str
    condition: str
    mask: str
    where: str
    covariates: Mapping[str, str] = field(default_factory=dict)


def read_manifest(path: Path, conditions: Sequence[str], covariates: Sequence[str] = ()) -> Listing:
    """Read and check a manifest of NIfTI files; they are looked for, not opened.

    Args:
        path: The manifest.
        conditions: Conditions that the plan knows.
        covariates: Names of further columns that it may have.

    Raises:
        ManifestError: the manifest is missing, is not CSV, is empty, or its columns are not
            :data:`COLUMNS` and covariates.
    """
    problems: list[Problem] = []
    entries: list[ScanEntry] = []
    for row in _rows(path, covariates):
        name = row.scan or row.where
        image, mask = (NiftiFile(path=path.parent / file) for file in (row.scan, row.mask))
        found: list[tuple[ProblemKind, str]] = []
        if not row.scan:
            found.append((ProblemKind.NO_SCAN, ""))
        elif image.missing is not None:
            found.append((ProblemKind.MISSING_FILE, row.where))
        found.extend(_row_faults(row, conditions))
        if not row.mask:
            found.append((ProblemKind.NO_MASK, row.where))
        elif mask.missing is not None:
            found.append((ProblemKind.MISSING_FILE, f"mask {row.mask}"))
        if found:
            problems.extend(Problem(file=name, kind=kind, detail=detail) for kind, detail in found)
            continue
        entries.append(
            ScanEntry(
                patient_id=row.patient,
                name=name,
                image=image,
                mask=mask,
                condition=row.condition,
                covariates=row.covariates,
            )
        )
    unique, repeated = drop_repeated_files(entries)
    return Listing(entries=unique, problems=(*problems, *repeated))


def read_manifest_rows(
    path: Path, conditions: Sequence[str], covariates: Sequence[str] = ()
) -> tuple[list[ManifestRow], list[Problem]]:
    """Rows with a patient and a known condition, and problems of the others; files are not looked for.

    Raises:
        ManifestError: see :func:`read_manifest`.
    """
    rows: list[ManifestRow] = []
    problems: list[Problem] = []
    for row in _rows(path, covariates):
        faults = _row_faults(row, conditions)
        problems.extend(Problem(file=row.scan or row.where, kind=kind, detail=text) for kind, text in faults)
        if not faults:
            rows.append(row)
    return rows, problems


def _row_faults(row: ManifestRow, conditions: Sequence[str]) -> list[tuple[ProblemKind, str]]:
    faults = [] if row.patient else [(ProblemKind.NO_PATIENT, row.where)]
    if row.condition not in conditions:
        known = ", ".join(conditions)
        faults.append((ProblemKind.UNKNOWN_CONDITION, f"{row.condition!r}; the plan knows {known}"))
    return faults


def _rows(path: Path, covariates: Sequence[str]) -> list[ManifestRow]:
    table = _read_table(path, covariates)
    rows = []
    for number, cells in enumerate(table.to_dict("records"), start=2):
        text = {str(name): str(cell).strip() for name, cell in cells.items()}
        rows.append(
            ManifestRow(
                **{name: text[name] for name in COLUMNS},
                where=f"{path.name} line {number}",
                covariates=named_cells(cells, covariates),
            )
        )
    return rows


def drop_repeated_files(entries: Iterable[ScanEntry]) -> tuple[tuple[ScanEntry, ...], tuple[Problem, ...]]:
    """Refuse files that are listed more than once.

    Where all rows agree on patient, condition and mask, the first stays. Where they do not, it is unknown
    which is true, and all of them are refused: a scan under two patients would break the unit of privacy.
    """
    by_file: dict[str, list[ScanEntry]] = defaultdict(list)
    for entry in entries:
        by_file[entry.image.identity].append(entry)
    kept: list[ScanEntry] = []
    problems: list[Problem] = []
    for group in by_file.values():
        agree = len({(entry.patient_id, entry.condition, entry.mask.identity) for entry in group}) == 1
        kept.extend(group[:1] if agree else [])
        for entry in group[1:] if agree else (group if len(group) > 1 else []):
            detail = f"{len(group)} times" + (
                "" if agree else ", with different patients, conditions or masks"
            )
            problems.append(Problem(file=entry.name, kind=ProblemKind.DUPLICATE_NAME, detail=detail))
    return tuple(kept), tuple(problems)


def named_cells(cells: Mapping[Hashable, Any], names: Sequence[str]) -> dict[str, str]:
    """Cells of a row by name, without surrounding spaces; what is empty or not there is left out."""
    texts = {name: str(cells.get(name, "")).strip() for name in names}
    return {name: text for name, text in texts.items() if text}


def read_csv_table(path: Path) -> pd.DataFrame:
    """:func:`read_table` of a file with commas. Raises ManifestError."""
    return read_table(path, separator=",")


def read_table(path: Path, *, separator: str) -> pd.DataFrame:
    """A table with every cell as text, as it stands: "007" and "NA" are names, nothing is missing.

    Raises:
        ManifestError: the file cannot be read, is too large, or is not such a table.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, not a table of scans")
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # a row longer than the header loses cells
            return pd.read_csv(
                path, sep=separator, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig"
            )
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, csv.Error, ParserWarning) as error:
        raise ManifestError(f"{path}: not a CSV table in UTF-8 ({error})") from error


def _read_table(path: Path, covariates: Sequence[str]) -> pd.DataFrame:
    table = read_csv_table(path)
    missing = [column for column in COLUMNS if column not in table.columns]
    surplus = [str(column) for column in table.columns if column not in (*COLUMNS, *covariates)]
    if missing or surplus:
        raise ManifestError(
            f"{path}: wrong columns"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; not known: {', '.join(surplus)}" if surplus else ""),
            remedy=f"the columns are {', '.join(COLUMNS)}, and the plan's covariates"
            + (f" ({', '.join(covariates)})" if covariates else ", of which it has none"),
        )
    if table.empty:
        raise ManifestError(f"{path}: the manifest lists no scan")
    return table
