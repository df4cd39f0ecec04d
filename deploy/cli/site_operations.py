"""``lacuna site``: how this site is, for the people who run it."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from client.site_home import SiteHome
from deploy.cli.output import (
    json_option,
    plain_table,
    print_findings,
    print_json,
    print_table,
    show_live,
    write_metrics,
)
from shared.exit_codes import ExitCode

PathType = click.Path(path_type=Path)


def add_operations_commands(group: click.Group) -> None:
    """Give the group the commands of this module."""
    for command in (status, doctor, health, metrics):
        group.add_command(command)


@click.command("status")
@click.argument("study", required=False)
@click.option("--socket", type=PathType, help="The agent's socket, if not in its study's folder.")
@click.option("--watch", is_flag=True, help="Draw it anew every two seconds.")
@json_option
def status(study: str | None, socket: Path | None, watch: bool, as_json: bool) -> None:
    """What the agent of a study is doing: round, budget, refusals, certificate."""
    from client.site_status import named_study, site_status, status_rows

    home = SiteHome.default()
    study_id = named_study(home, study)
    value = site_status(home, study_id, socket=socket)
    title = f"site {home.site_id}, study {study_id}"
    if as_json:
        print_json(value)
    elif watch:
        show_live(
            lambda: plain_table(
                title, ["what", "value"], status_rows(site_status(home, study_id, socket=socket))
            ),
            every_s=2.0,
        )
    else:
        print_table(title, ["what", "value"], status_rows(value))


@click.command("doctor")
@click.option("--socket", type=PathType, default="/run/lacuna/agent.sock", show_default=True)
@click.option("--perimeter", default="127.0.0.1:9443", show_default=True, help="Of this site's nginx.")
@click.option("--node-port", type=click.IntRange(1, 65535), default=9094, show_default=True)
@click.option("--device", default="cpu", show_default=True, help="As given to site serve.")
@json_option
def doctor(socket: Path, perimeter: str, node_port: int, device: str, as_json: bool) -> None:
    """Look at everything a site needs, from keys to the coordinator's door, and say how to mend it."""
    from deploy.doctor.checks import report
    from deploy.doctor.site import SiteParts, examine_site

    parts = SiteParts(socket=socket, perimeter=perimeter, node_port=node_port, device=device)
    found = report(examine_site(SiteHome.default(), parts))
    if as_json:
        print_json(found)
    else:
        print_findings("site doctor", found)
    if not found["fit"]:
        sys.exit(ExitCode.SITE_MUST_ACT)


@click.command("health")
@click.option("--socket", type=PathType, default="/run/lacuna/agent.sock", show_default=True)
def health(socket: Path) -> None:
    """Ask the agent over its socket whether it is alive; exit code 0 if so. For service managers."""
    from client.health import agent_is_healthy

    agent_is_healthy(socket)
    click.echo("alive")


@click.command("metrics")
@click.option("--out", type=PathType, help="File for a textfile collector, replaced at once.")
@click.option("--listen", metavar="127.0.0.1:PORT", help="Serve /metrics on loopback until interrupted.")
def metrics(out: Path | None, listen: str | None) -> None:
    """Prometheus metrics of this site; nothing in them depends on a patient."""
    from client.site_metrics import site_metrics

    home = SiteHome.default()
    write_metrics(lambda: site_metrics(home), out=out, listen=listen)
