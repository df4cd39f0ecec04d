"""``lacuna coordinator``: how a study and this machine are, for the people who run them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Group, RenderableType
from rich.text import Text

from deploy.cli.output import (
    console,
    json_option,
    plain_table,
    print_findings,
    print_json,
    show_live,
    write_metrics,
)
from shared.errors import CoordinatorError
from shared.exit_codes import ExitCode

PathType = click.Path(path_type=Path)
study_option = click.option("--study", "study_id", required=True, help="Study id.")
LAST_ATTEMPTS, LAST_EVENTS = 8, 5


def add_operations_commands(group: click.Group) -> None:
    """Give the group the commands of this module."""
    for command in (status, doctor, health, metrics, backup):
        group.add_command(command)


@click.command("status")
@study_option
@click.option("--watch", is_flag=True, help="Draw it anew every two seconds.")
@json_option
def status(study_id: str, watch: bool, as_json: bool) -> None:
    """Sites, rounds, time left, drops and their reasons, epsilon, and what happened last."""
    from server.study_status import study_status

    value = study_status(study_id)
    if as_json:
        print_json(value)
    elif watch:
        show_live(lambda: _drawn(study_status(study_id)), every_s=2.0)
    else:
        console().print(_drawn(value))


def _drawn(value: dict[str, Any]) -> RenderableType:
    spent = "infinite" if value["epsilon"] is None else f"{value['epsilon']:.2f}"
    head = (
        f"study {value['study_id']}: {value['completed_rounds']} of {value['rounds']} rounds, "
        f"{value['charged_attempts']} of {value['max_attempts']} attempts; "
        f"epsilon {spent} of {value['planned_epsilon']} at delta {value['delta']:g}"
    )
    if value["seconds_left"] is not None:
        head += f"; {value['seconds_a_round']:.0f} s a round, about {_duration(value['seconds_left'])} left"
    sites = plain_table(
        "sites",
        ["site", "state", "rounds", "drops", "last drop"],
        [[s["site"], s["state"], str(s["rounds"]), str(s["drops"]), s["last_drop"]] for s in value["sites"]],
    )
    shown = [entry for entry in value["attempts"] if entry["status"] != "void"][-LAST_ATTEMPTS:]
    attempts = plain_table(
        "last attempts",
        ["attempt", "round", "purpose", "status", "survivors", "reason"],
        [
            [
                str(entry["attempt"]),
                str(entry["round"]),
                entry["purpose"],
                entry["status"],
                ", ".join(entry["survivors"]),
                entry["reason"],
            ]
            for entry in shown
        ],
    )
    lines = [Text(f"  {e['at']}  {e['kind']}  {e['body']}") for e in value["events"][-LAST_EVENTS:]]
    return Group(Text(head), sites, attempts, *lines)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"


@click.command("doctor")
@click.option(
    "--perimeter", type=PathType, default="/etc/lacuna", show_default=True, help="Folder of perimeter --out."
)
@click.option("--superlink-port", type=click.IntRange(1, 65535), default=23900, show_default=True)
@json_option
def doctor(perimeter: Path, superlink_port: int, as_json: bool) -> None:
    """Look at authority, certificates, perimeter, SuperLink and disk, and say how to mend each."""
    from deploy.doctor.checks import report
    from deploy.doctor.coordinator import CoordinatorParts, examine_coordinator
    from server.coordinator_home import CoordinatorHome

    parts = CoordinatorParts(perimeter=perimeter, superlink_port=superlink_port)
    found = report(examine_coordinator(CoordinatorHome.default(), parts))
    if as_json:
        print_json(found)
    else:
        print_findings("coordinator doctor", found)
    if not found["fit"]:
        sys.exit(ExitCode.COORDINATOR_MUST_ACT)


@click.command("health")
@click.option("--perimeter", type=PathType, default="/etc/lacuna", show_default=True)
@click.option("--superlink-port", type=click.IntRange(1, 65535), default=23900, show_default=True)
def health(perimeter: Path, superlink_port: int) -> None:
    """Ask the SuperLink on loopback whether it is alive; exit code 0 if so. For service managers."""
    from deploy.superlink_health import superlink_answers

    authority = perimeter / "operator" / "superlink-ca.pem"
    if not authority.exists():
        raise CoordinatorError(f"{authority} is missing", remedy="lacuna coordinator perimeter --out DIR")
    if not superlink_answers(superlink_port, authority):
        raise CoordinatorError(
            f"the SuperLink does not answer on 127.0.0.1:{superlink_port}",
            remedy="systemctl status lacuna-superlink",
        )
    click.echo("alive")


@click.command("metrics")
@study_option
@click.option("--out", type=PathType, help="File for a textfile collector, replaced at once.")
@click.option("--listen", metavar="127.0.0.1:PORT", help="Serve /metrics on loopback until interrupted.")
def metrics(study_id: str, out: Path | None, listen: str | None) -> None:
    """Prometheus metrics of a study."""
    from server.study_metrics import study_metrics

    write_metrics(lambda: study_metrics(study_id), out=out, listen=listen)


@click.command("backup")
@click.option("--out", type=PathType, required=True, help="Folder of the copy; brought up to date.")
def backup(out: Path) -> None:
    """Copy keys, certificates and studies to a folder; also while a study runs, from a timer.

    To restore: put the copy in the place of LACUNA_HOME/coordinator, then register-nodes and resume.
    """
    from server.coordinator_backup import back_up
    from server.coordinator_home import CoordinatorHome

    written = back_up(CoordinatorHome.default().root, out)
    click.echo(f"{out} is up to date: {written} files written; it holds private keys")
