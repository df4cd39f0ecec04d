"""Printing: gate decisions, verification reports and budgets as tables that are read from the top down.

Each function prints to the console that it is given; the same content as JSON comes from the objects'
``to_dict``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from privacy.compliance.budget import BudgetRow
from privacy.compliance.recheck import Check
from privacy.compliance.verify import VerificationReport

_MARKS = {"pass": "[green]pass[/]", "fail": "[bold red]FAIL[/]", "unchecked": "[yellow]unchecked[/]"}


def print_verification(report: VerificationReport, console: Console, *, everything: bool = False) -> None:
    """A bundle's checks: the conclusion first, then what failed, then the rest.

    Args:
        report: From :func:`privacy.compliance.verify.verify_bundle`.
        console: Where to.
        everything: List every file instead of their number.
    """
    conclusion = (
        "[bold green]This bundle passes every check that was made.[/]"
        if report.passed
        else f"[bold red]DO NOT USE THIS BUNDLE: {len(report.failed)} checks failed.[/]"
    )
    console.print(conclusion)
    console.print(
        f"study {escape(report.study_id or 'unknown')}, bundle {report.bundle_sha256[:16] or 'unknown'}"
    )
    for check in report.failed:
        console.print(f"  {_MARKS['fail']} [bold]{escape(check.name)}[/]: {escape(check.detail)}")
    for check in report.unchecked:
        console.print(f"  {_MARKS['unchecked']} [bold]{escape(check.name)}[/]: {escape(check.detail)}")
    table = _table("check", "result", "what was found")
    files = [check for check in report.checks if check.name.startswith("file ")]
    if not everything and files and all(check.status == "pass" for check in files):
        shown = [check for check in report.checks if check not in files]
        summary = Check(name="files", status="pass", detail=f"{len(files)} files have the released SHA-256")
        shown.insert(1, summary)
    else:
        shown = list(report.checks)
    for check in shown:
        table.add_row(escape(check.name), _MARKS[check.status], escape(check.detail))
    console.print(table)


def print_decision(decision: Mapping[str, Any], console: Console) -> None:
    """A gate decision's predicate: the decision, what failed, every condition, what each site spent."""
    released = decision.get("decision") == "release"
    conditions: Sequence[Mapping[str, Any]] = decision.get("conditions", [])
    failed = [condition for condition in conditions if condition.get("passed") is not True]
    if released and not failed:
        console.print(f"[bold green]RELEASE[/]: all {len(conditions)} conditions hold.")
    else:
        console.print(f"[bold red]REFUSED[/]: {len(failed)} of {len(conditions)} conditions do not hold.")
        for condition in failed:
            console.print(
                f"  {_MARKS['fail']} [bold]{escape(str(condition.get('name')))}[/]: "
                f"{escape(str(condition.get('figure')))}, must be {escape(str(condition.get('bound')))}. "
                f"{escape(str(condition.get('reason')))}"
            )
    table = _table("condition", "result", "figure", "must be", "remark")
    for condition in conditions:
        table.add_row(
            escape(str(condition.get("title"))),
            _MARKS["pass" if condition.get("passed") is True else "fail"],
            escape(str(condition.get("figure"))),
            escape(str(condition.get("bound"))),
            escape(str(condition.get("reason"))),
        )
    console.print(table)
    spending = _table("site", "training attempts", "audit attempts", "epsilon", "if all others collude")
    for row in decision.get("spending", []):
        spending.add_row(
            escape(str(row.get("site_id"))),
            str(row.get("train_attempts")),
            str(row.get("audit_attempts")),
            epsilon_words(row.get("epsilon_world")),
            epsilon_words(row.get("epsilon_colluding")),
        )
    console.print(spending)


def print_budget(rows: Sequence[BudgetRow], console: Console) -> None:
    """Budgets of ledgers: faults first, by name, then one line a study."""
    for row in rows:
        if row.fault:
            console.print(f"{_MARKS['fail']} [bold]{escape(row.ledger)}[/]: {escape(row.fault)}")
    table = _table(
        "ledger",
        "site",
        "study",
        "training",
        "audit",
        "epsilon",
        "if all others collude",
        "delta",
        "freshness",
    )
    for row in rows:
        if row.fault:
            continue
        table.add_row(
            escape(row.ledger),
            escape(row.site),
            escape(row.study_id),
            str(row.train_attempts),
            str(row.audit_attempts),
            epsilon_words(row.epsilon_world),
            epsilon_words(row.epsilon_colluding),
            f"{row.delta:g}",
            escape(row.freshness),
        )
    if table.row_count:
        console.print(table)
    if any(row.freshness == "unchecked" for row in rows):
        console.print("Freshness is unchecked: without receipts (--heads) an old copy looks like the newest.")


def epsilon_words(value: Any) -> str:
    """Two decimals, ``infinite``, or ``unknown``."""
    if value == "infinite" or (isinstance(value, float) and math.isinf(value)):
        return "infinite"
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        return "unknown"
    return f"{value:.2f}"


def _table(*columns: str) -> Table:
    table = Table(show_lines=False, pad_edge=False, box=None, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
