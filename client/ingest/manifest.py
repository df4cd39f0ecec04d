"""The manifest of a folder of scans: who, which file, which condition, which mask.

A manifest is a CSV file with exactly the columns ``patient, scan, condition, mask``; ``scan`` and ``mask``
are NIfTI files, relative to the manifest's own folder (or absolute). What is wrong with it is listed whole:
one :class:`Problem` for each, naming its file, never only the first.
"""

from __future__ import annotations

import csv
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd
from pandas.errors import ParserWarning

from client.ingest.nifti_file import NiftiFile
from client.ingest.scan import Listing, Problem, ProblemKind, ScanEntry
from shared.errors import SiteError

COLUMNS = ("patient", "scan", "condition", "mask")
MAX_MANIFEST_BYTES = 64 * 1024 * 1024


class ManifestError(SiteError):
    """The manifest as a whole cannot be used: missing, not CSV, or with wrong columns."""


def read_manifest(path: Path, conditions: Sequence[str]) -> Listing:
    """Read and check a manifest; files are looked for, not opened.

    Raises:
        ManifestError: the manifest is missing, is not CSV, is empty, or its columns are not
            :data:`COLUMNS`.
    """
    table = _read_table(path)
    problems: list[Problem] = []
    entries: list[ScanEntry] = []
    for number, row in enumerate(table.itertuples(index=False), start=2):
        patient, scan, condition, mask = (str(getattr(row, column)).strip() for column in COLUMNS)
        name = scan or f"{path.name} line {number}"
        image_path, mask_path = path.parent / scan, path.parent / mask
        found: list[tuple[ProblemKind, str]] = []
        if not scan:
            found.append((ProblemKind.NO_SCAN, ""))
        elif not image_path.is_file():
            found.append((ProblemKind.MISSING_FILE, f"{path.name} line {number}"))
        if not patient:
            found.append((ProblemKind.NO_PATIENT, f"{path.name} line {number}"))
        if condition not in conditions:
            known = ", ".join(conditions)
            found.append((ProblemKind.UNKNOWN_CONDITION, f"{condition!r}; the plan knows {known}"))
        if not mask:
            found.append((ProblemKind.NO_MASK, f"{path.name} line {number}"))
        elif not mask_path.is_file():
            found.append((ProblemKind.MISSING_FILE, f"mask {mask}"))
        if found:
            problems.extend(Problem(file=name, kind=kind, detail=detail) for kind, detail in found)
            continue
        entries.append(
            ScanEntry(
                patient_id=patient,
                name=name,
                image=NiftiFile(path=image_path),
                mask=NiftiFile(path=mask_path),
                condition=condition,
            )
        )
    unique, repeated = drop_repeated_files(entries)
    return Listing(entries=unique, problems=(*problems, *repeated))


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


def read_csv_table(path: Path) -> pd.DataFrame:
    """A CSV table with every cell as text, as it stands: "007" and "NA" are names, nothing is missing.

    Raises:
        ManifestError: the file cannot be read, is too large, or is not a CSV table.
    """
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes, not a table of scans")
        with warnings.catch_warnings():
            warnings.simplefilter("error", ParserWarning)  # a row longer than the header loses cells
            return pd.read_csv(path, dtype=str, keep_default_na=False, index_col=False, encoding="utf-8-sig")
    except OSError as error:
        raise ManifestError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, csv.Error, ParserWarning) as error:
        raise ManifestError(f"{path}: not a CSV table in UTF-8 ({error})") from error


def _read_table(path: Path) -> pd.DataFrame:
    table = read_csv_table(path)
    missing = [column for column in COLUMNS if column not in table.columns]
    surplus = [str(column) for column in table.columns if column not in COLUMNS]
    if missing or surplus:
        raise ManifestError(
            f"{path}: wrong columns"
            + (f"; missing: {', '.join(missing)}" if missing else "")
            + (f"; not known: {', '.join(surplus)}" if surplus else ""),
            remedy=f"the columns are {', '.join(COLUMNS)}",
        )
    if table.empty:
        raise ManifestError(f"{path}: the manifest lists no scan")
    return table
