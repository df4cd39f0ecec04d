"""``lacuna coordinator``: commands about its authority and its perimeter."""

from __future__ import annotations

from pathlib import Path

import click

from deploy.cli.output import json_option, print_json, print_table, read_input, write_output

PathType = click.Path(path_type=Path)


def add_network_commands(group: click.Group) -> None:
    """Give the group the commands of this module."""
    for command in (
        init_network,
        renew_server,
        certify,
        revoke,
        certificates,
        perimeter,
        register_nodes,
    ):
        group.add_command(command)


@click.command("init-network")
@click.option("--address", required=True, metavar="HOST:PORT", help="Where hospitals will reach you.")
def init_network(address: str) -> None:
    """Make this coordinator's authority and the certificate of its own perimeter."""
    from server.coordinator_home import CoordinatorHome

    authority = CoordinatorHome.default().authority
    authority.create(address=address)
    click.echo(f"authority for {address}: {authority.root}; back ca.key up where nobody else reads it")


@click.command("renew-server")
def renew_server() -> None:
    """Make a new key and certificate for this coordinator's own perimeter."""
    from server.coordinator_home import CoordinatorHome

    CoordinatorHome.default().authority.renew_server()
    click.echo("renewed; now write the perimeter anew and reload nginx")


@click.command("certify")
@click.argument("request", type=PathType)
@click.option("--out", type=PathType, required=True, help="The certificate, a file for the site.")
@click.option("--days", type=click.IntRange(1, 825), default=365, show_default=True)
def certify(request: Path, out: Path, days: int) -> None:
    """Sign a certificate for a site that is enrolled already: a renewal, or its first one."""
    from server.coordinator_home import CoordinatorHome
    from shared.site_certificate import sign_certificate

    home = CoordinatorHome.default()
    certificate = home.certify(read_input(request, what="enrolment request"), days=days)
    write_output(out, sign_certificate(certificate, home.key()), what="certificate for the site")
    click.echo(
        f"{certificate.site_id}: until {certificate.not_after:%Y-%m-%d}; then write the perimeter anew"
    )


@click.command("revoke")
@click.argument("site")
@click.option("--reason", required=True, help="For your own index.")
def revoke(site: str, reason: str) -> None:
    """Revoke a site: its certificates, and its part in every study from the next round on.

    It cannot be undone: the site would come back under a new identity and name.
    """
    from server.coordinator_home import CoordinatorHome

    count = CoordinatorHome.default().authority.revoke(site, reason=reason)
    click.echo(f"revoked {site}: {count} certificates; the round driver leaves it out from the next round")
    click.echo("now write the perimeter anew and reload nginx: its link stands until then")


@click.command("certificates")
@json_option
def certificates(as_json: bool) -> None:
    """Every certificate issued: to whom, until when, and what was revoked."""
    from dataclasses import asdict
    from datetime import UTC, datetime

    from server.coordinator_home import CoordinatorHome

    index = CoordinatorHome.default().authority.index()
    if as_json:
        print_json([asdict(line) for line in index])
        return
    now = datetime.now(UTC)
    rows = [
        [
            line.site_id,
            line.serial[:16],
            f"{datetime.fromtimestamp(line.not_after, UTC):%Y-%m-%d}",
            "good" if line.good(now) else f"revoked: {line.reason}" if line.revoked_at else "expired",
        ]
        for line in index
    ]
    print_table("certificates", ["site", "serial", "ends", "state"], rows)


@click.command("perimeter")
@click.option("--out", type=PathType, required=True, help="Folder to write, or to write anew.")
@click.option("--listen", metavar="ADDRESS:PORT", help="Of nginx. Default: every address, announced port.")
@click.option("--superlink-port", type=click.IntRange(1, 65535), default=23900, show_default=True)
@click.option("--user", "users", multiple=True, help="May open the SuperLink's port (for coordinator.nft).")
def perimeter(out: Path, listen: str | None, superlink_port: int, users: tuple[str, ...]) -> None:
    """Write nginx's configuration, keys and secrets of this coordinator, from its roster.

    Write it anew after every enrolment, renewal and revocation, and reload nginx.
    """
    from deploy import perimeter as perimeters
    from server.coordinator_home import CoordinatorHome

    sites = perimeters.write_coordinator_perimeter(
        CoordinatorHome.default(),
        out,
        listen=listen,
        superlink_port=superlink_port,
        users=users or perimeters.PORT_USERS,
    )
    click.echo(f"perimeter: {out}; lets in {', '.join(sites) or 'nobody yet'}")


@click.command("register-nodes")
@click.option("--flwr-home", type=PathType, required=True, help="FLWR_HOME with the operator's config.toml.")
@click.option("--connection", default="lacuna", show_default=True, help="Its name in config.toml.")
@click.option(
    "--wait",
    "wait_s",
    type=click.FloatRange(0, 3600),
    default=90,
    show_default=True,
    metavar="SECONDS",
    help="For a SuperLink that starts.",
)
def register_nodes(flwr_home: Path, connection: str, wait_s: float) -> None:
    """Register the SuperNodes of enrolled sites at the SuperLink, and take off revoked ones."""
    from deploy.flower_run import await_superlink
    from deploy.node_registration import register_nodes as register
    from server.coordinator_home import CoordinatorHome

    await_superlink(flwr_home, connection, wait_s=wait_s, say=lambda words: click.echo(words, err=True))
    changes = register(CoordinatorHome.default(), flwr_home=flwr_home, connection=connection)
    click.echo(f"registered: {', '.join(changes.registered) or 'nobody new'}")
    click.echo(f"taken off: {', '.join(changes.removed) or 'nobody'}")
