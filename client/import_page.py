"""What an import did, for the hospital's own people: rows for a table, JSON, and a page with pictures.

All three name the hospital's patients and files and show scans. They stay in the hospital.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from client.ingest.thumbnails import Gallery
from client.scan_import import ImportReport
from privacy.compliance.page import Verbatim, render_page
from shared.study_plan import StudyPlan
from shared.volumes.contact_sheet import LABEL_COLOURS

PRIVATE = "Stays in the hospital: never send, upload or publish this page."


@dataclass(frozen=True, kw_only=True)
class ScanOutcome:
    """One scan or file of an import.

    Attributes:
        name: As the source names it.
        result: ``imported``, ``present`` (already in the store) or ``refused``.
        reasons: Why it was refused, or what was repaired or cut.
        repaired: Whether something was set right.
    """

    name: str
    result: str
    reasons: tuple[str, ...]
    repaired: bool


def outcomes(report: ImportReport) -> list[ScanOutcome]:
    """Every scan once: refused first, then the repaired ones, then the others."""
    reasons: dict[str, list[str]] = defaultdict(list)
    for problem in report.problems:
        reasons[problem.file].append(str(problem).removeprefix(f"{problem.file}: "))
    refused = [
        ScanOutcome(name=name, result="refused", reasons=tuple(reasons[name]), repaired=False)
        for name in report.refused
    ]
    notes: dict[str, list[str]] = defaultdict(list)
    for name, repair in report.repaired:
        notes[name].append(repair)
    repaired = set(notes)
    for name, lost, total in report.cut:
        notes[name].append(f"{lost} of {total} label voxels lie outside the grid")
    accepted = [
        ScanOutcome(name=name, result=result, reasons=tuple(notes[name]), repaired=name in repaired)
        for result, names in (("imported", report.imported), ("present", report.present))
        for name in names
    ]
    return [*refused, *sorted(accepted, key=lambda scan: not scan.reasons)]


def report_dict(report: ImportReport) -> dict[str, Any]:
    """The report as ``--json`` prints it."""
    return {
        "imported": list(report.imported),
        "present": list(report.present),
        "repaired": [{"scan": name, "repair": repair} for name, repair in report.repaired],
        "refused": [
            {"scan": problem.file, "kind": problem.kind.name.lower(), "reason": str(problem.kind),
             "detail": problem.detail}
            for problem in report.problems
        ],
        "problems": [str(problem) for problem in report.problems],
        "cut": [list(entry) for entry in report.cut],
        "skipped": list(report.skipped),
    }  # fmt: skip


def report_table(report: ImportReport) -> tuple[list[str], list[list[str]]]:
    """Columns, and a row for each scan that a person has to know of."""
    rows = [
        [scan.name, "repaired" if scan.repaired else scan.result, "; ".join(scan.reasons)]
        for scan in outcomes(report)
        if scan.reasons or scan.result == "refused"
    ]
    return ["scan", "result", "why"], rows


def import_page(report: ImportReport, gallery: Gallery, plan: StudyPlan, *, site_id: str, at: str) -> str:
    """A self-contained page: counts, refused files with reasons, and a picture of every scan.

    Args:
        report: What the import did.
        gallery: Pictures, by the names in the report.
        plan: The plan that scans were imported for.
        at: Time, for the head of the page.
    """
    scans = outcomes(report)
    return render_page(
        "import_report.html",
        package="client",
        private=PRIVATE,
        at=at,
        site_id=site_id,
        plan=plan,
        report=report,
        refused=[scan for scan in scans if scan.result == "refused"],
        accepted=[scan for scan in scans if scan.result != "refused"],
        n_repaired=sum(scan.repaired for scan in scans),
        pictures={name: Verbatim(address) for name, address in gallery.pictures.items()},
        left_out=gallery.left_out,
        legend=[
            (label, LABEL_COLOURS[value % len(LABEL_COLOURS)]) for value, label in enumerate(plan.data.labels)
        ],
    )
