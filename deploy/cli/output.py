"""What commands print: tables for people, JSON for programs, progress bars for long work."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.live import Live
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
    console().print(plain_table(title, columns, rows))


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """What :func:`print_table` prints."""
    table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def show_live(draw: Callable[[], RenderableType], *, every_s: float) -> None:
    """Draw anew again and again, until the person interrupts it."""
    with (
        Live(draw(), console=console(), auto_refresh=False, screen=False) as live,
        suppress(KeyboardInterrupt),
    ):
        while True:
            time.sleep(every_s)
            live.update(draw(), refresh=True)


def print_findings(title: str, report: dict[str, Any]) -> None:
    """A doctor's findings, worst first within their order, and how to mend each."""
    mark = {"good": "ok", "look": "look", "bad": "BAD"}
    rows = [[mark[f["state"]], f["name"], f["found"], f["mend"]] for f in report["findings"]]
    print_table(title, ["", "what", "found", "how to mend it"], rows)


def write_metrics(scrape: Callable[[], bytes], *, out: Path | None, listen: str | None) -> None:
    """Prometheus text: to a file, to a loopback port until interrupted, or to standard output."""
    if listen is not None:
        host, _, number = listen.rpartition(":")
        if host not in ("127.0.0.1", "localhost", "[::1]") or not number.isdigit():
            raise UsageError("--listen takes a loopback address: 127.0.0.1:PORT")
        serve_text(host.strip("[]"), int(number), scrape)
    elif out is not None:
        part = out.with_name(out.name + ".part")
        write_output(part, scrape(), what="metrics", silent=True)
        part.replace(out)
    else:
        click.echo(scrape().decode(), nl=False)


def serve_text(host: str, port: int, scrape: Callable[[], bytes]) -> None:
    """Answer GET /metrics until interrupted."""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/metrics"
            body = scrape() if found else b"see /metrics\n"
            self.send_response(200 if found else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Scrapes are not news."""

    with HTTPServer((host, port), Handler) as server, suppress(KeyboardInterrupt):
        click.echo(f"metrics: http://{host}:{server.server_port}/metrics", err=True)
        server.serve_forever()


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
