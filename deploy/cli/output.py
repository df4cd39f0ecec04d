"""What commands print: tables for people, JSON for programs, progress bars for long work."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from shared.errors import UsageError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON in place of tables.")


def console() -> Console:
    return Console(highlight=False)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, sort_keys=True))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table. Cells are shown as they are: they may come from elsewhere, so they are no markup."""
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console().print(table)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Bars by stage; yields a callback (stage, done, total)."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console(),
        transient=not console().is_terminal,
    ) as progress:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield report


def read_input(path: Path, *, what: str) -> bytes:
    """Bytes of a file that a person named. Raises UsageError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{what} {path} cannot be read: {error.strerror}") from error


def write_output(path: Path, data: bytes, *, what: str, silent: bool = False) -> None:
    """Write an artefact for somebody else; ``silent`` where JSON is printed. Raises UsageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UsageError(f"{what} cannot be written to {path}: {error.strerror}") from error
    if not silent:
        click.echo(f"{what}: {path}")
