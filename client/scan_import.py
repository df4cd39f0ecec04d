"""The import: every scan of a source is checked, then the sound ones go into the site's store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from client.ingest.quality import Show, check_scan, find_duplicates
from client.ingest.scan import Problem, ProblemKind, ScanEntry, ScanSource
from client.patient_dataset import SiteStore, StoredScan
from shared.errors import SiteError, UsageError
from shared.study_plan import CovariateClause, DataClause
from shared.volumes.canonical_grid import CanonicalGrid, CanonicalScan, to_canonical
from shared.volumes.nifti import Volume

MAX_LOST_SHARE = 0.1
"""A scan is refused when the canonical window would cut off more than this share of its mask."""

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total); stages are named "finding", "fetching", "checking", "importing"."""


class ImportRefusedError(SiteError):
    """A strict import met problems; nothing was imported. ``report`` names them."""

    def __init__(self, report: ImportReport) -> None:
        lines = "\n  ".join(str(problem) for problem in report.problems)
        super().__init__(
            f"nothing was imported: {len(report.problems)} problems\n  {lines}",
            remedy="mend or remove these scans, or import without strict to leave them out",
        )
        self.report = report


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What an import did. Shown at the site only: it names the hospital's files.

    Attributes:
        imported: Files that were added now.
        present: Files that were in the store already, with the same facts.
        problems: Everything that was refused, each naming its file; a file may have several.
        cut: (file, label voxels lost, of how many) for imported scans whose mask the window cuts.
        repaired: (file, what was set right) for accepted scans, imported now or before.
        skipped: What the source left alone because nobody asked for it, in words.
    """

    imported: tuple[str, ...] = ()
    present: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()
    cut: tuple[tuple[str, int, int], ...] = ()
    repaired: tuple[tuple[str, str], ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def refused(self) -> tuple[str, ...]:
        """Refused files, each once."""
        return tuple(dict.fromkeys(problem.file for problem in self.problems))


@dataclass(frozen=True, kw_only=True)
class _SoundScan:
    """What is remembered of a checked scan; its voxels are not."""

    entry: ScanEntry
    content_sha256: bytes
    mask_sha256: bytes
    repairs: tuple[str, ...]


def import_scans(
    source: ScanSource,
    store: SiteStore,
    clause: DataClause,
    *,
    strict: bool = False,
    max_lost_share: float = MAX_LOST_SHARE,
    progress: Progress | None = None,
    show: Show | None = None,
) -> ImportReport:
    """Check every scan of a source, then import the sound ones. Repeat it to go on after an interruption.

    Args:
        source: Where scans come from.
        store: Where they go; filled for the grid of ``clause``.
        clause: The plan's conditions, labels and grid.
        strict: Refuse all if there is any problem.
        max_lost_share: Largest share of a mask that the canonical window may cut off.
        progress: Called after each scan.
        show: Called once for each scan that can be read: with the canonical scan and mask where it is
            sound, with the image alone where it is refused.

    Raises:
        ImportRefusedError: ``strict``, and there are problems. Nothing was imported.
        ManifestError: the source as a whole is unusable.
        StoreError: the store is in use, damaged, or was filled for another grid.
    """
    with store.exclusively():
        grid = store.bind(clause)
        listing = source.listing(clause.conditions)
        problems = list(listing.problems)
        sound: list[_SoundScan] = []
        for done, entry in enumerate(listing.entries, start=1):
            checked = _check(entry, clause, grid, max_lost_share, show)
            if isinstance(checked, _SoundScan):
                sound.append(checked)
            else:
                problems.extend(checked)
            if progress is not None:
                progress("checking", done, len(listing.entries))
        fresh, present, more = _sort_out(sound, store)
        problems.extend(more)
        if strict and problems:
            raise ImportRefusedError(ImportReport(problems=tuple(problems), skipped=listing.skipped))
        imported: list[_SoundScan] = []
        cut: list[tuple[str, int, int]] = []
        for done, scan in enumerate(fresh, start=1):
            added = _add(scan, store, clause, grid)
            if isinstance(added, StoredScan):
                imported.append(scan)
                if added.lost_label_voxels:
                    cut.append((scan.entry.name, added.lost_label_voxels, added.label_voxels))
            else:
                problems.extend(added)
            if progress is not None:
                progress("importing", done, len(fresh))
        return ImportReport(
            imported=tuple(scan.entry.name for scan in imported),
            present=tuple(scan.entry.name for scan in present),
            problems=tuple(problems),
            cut=tuple(cut),
            repaired=tuple(
                (scan.entry.name, repair) for scan in (*imported, *present) for repair in scan.repairs
            ),
            skipped=listing.skipped,
        )


def _check(
    entry: ScanEntry, clause: DataClause, grid: CanonicalGrid, max_lost_share: float, show: Show | None
) -> _SoundScan | list[Problem]:
    entry, faults = keep_covariates(entry, clause.covariates)
    checked = check_scan(entry, n_labels=len(clause.labels), show=show)
    if isinstance(checked, list) or faults:
        return faults + (checked if isinstance(checked, list) else [])
    scan = to_canonical(checked.image, checked.mask, grid)
    if show is not None:
        image = Volume(voxels_DHW=scan.image_DHW, affine=scan.affine)
        show(entry.name, image, Volume(voxels_DHW=scan.mask_DHW, affine=scan.affine))
    fault = _cut_problem(entry, scan, max_lost_share)
    if fault is not None:
        return [fault]
    return _SoundScan(
        entry=entry,
        content_sha256=checked.content_sha256,
        mask_sha256=checked.mask_sha256,
        repairs=checked.repairs,
    )


def _sort_out(
    sound: list[_SoundScan], store: SiteStore
) -> tuple[list[_SoundScan], list[_SoundScan], list[Problem]]:
    """Scans to be added, scans that are in the store already, and scans that contradict others."""
    duplicates = find_duplicates((scan.entry, scan.content_sha256, scan.mask_sha256) for scan in sound)
    problems = list(duplicates.values())
    stored = {scan.scan_key: scan for scan in store.scans()}
    fresh: list[_SoundScan] = []
    present: list[_SoundScan] = []
    for scan in sound:
        if scan.entry.name in duplicates:
            continue
        before = stored.get(store.scan_key(scan.content_sha256))
        if before is None:
            fresh.append(scan)
        elif (differ := store.conflict(before, scan.entry, scan.mask_sha256)) is None:
            present.append(scan)
        else:
            detail = f"other {differ}"
            problems.append(Problem(file=scan.entry.name, kind=ProblemKind.CONFLICT, detail=detail))
    return fresh, present, problems


def _add(
    scan: _SoundScan, store: SiteStore, clause: DataClause, grid: CanonicalGrid
) -> StoredScan | list[Problem]:
    """Open a scan again and write it, if it is still the one that was checked."""
    checked = check_scan(scan.entry, n_labels=len(clause.labels))
    if isinstance(checked, list):
        return checked
    if (checked.content_sha256, checked.mask_sha256) != (scan.content_sha256, scan.mask_sha256):
        detail = "it changed while it was imported"
        return [Problem(file=scan.entry.name, kind=ProblemKind.CHANGED_FILE, detail=detail)]
    return store.add(scan.entry, to_canonical(checked.image, checked.mask, grid), checked)


def keep_covariates(
    entry: ScanEntry, covariates: Sequence[CovariateClause]
) -> tuple[ScanEntry, list[Problem]]:
    """The entry with these covariates alone, empty ones left out; and the values that they do not have."""
    kept: dict[str, str] = {}
    faults: list[Problem] = []
    for covariate in covariates:
        text = entry.covariates.get(covariate.name, "").strip()
        if not text:
            continue
        try:
            covariate.row(text)
            kept[covariate.name] = text
        except UsageError as error:
            kind = ProblemKind.UNKNOWN_COVARIATE
            faults.append(Problem(file=entry.name, kind=kind, detail=error.message))
    return replace(entry, covariates=kept), faults


def _cut_problem(entry: ScanEntry, scan: CanonicalScan, max_lost_share: float) -> Problem | None:
    if scan.lost_share <= max_lost_share and not scan.lost_labels:
        return None
    lost = f"{scan.lost_label_voxels} of {scan.label_voxels} label voxels lie outside"
    names = "".join(f"; label {label} vanishes" for label in scan.lost_labels)
    return Problem(file=entry.name, kind=ProblemKind.CUT_MASK, detail=lost + names)
