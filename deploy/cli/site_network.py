"""``lacuna site``: commands about the link to the coordinator and to the other hospitals."""

from __future__ import annotations

from pathlib import Path

import click

from client.site_home import SiteHome
from client.site_policy import save_policy
from deploy.cli.output import print_table, read_input, write_output

PathType = click.Path(path_type=Path)


def add_network_commands(group: click.Group) -> None:
    """Give the group the commands of this module."""
    for command in (request, install_certificate, export_sheet, import_sheet, perimeter):
        group.add_command(command)


@click.command("request")
@click.option("--out", type=PathType, required=True, help="File for the coordinator.")
@click.option("--renew", is_flag=True, help="For a new TLS key, before the certificate ends.")
def request(out: Path, renew: bool) -> None:
    """Write the enrolment request for the coordinator: public keys of this site and its machines.

    Private keys are made here and stay here.
    """
    from client.site_network import SiteNetwork

    home = SiteHome.default()
    data = SiteNetwork(home).request(renew=renew)
    write_output(out, data, what="enrolment request")
    click.echo(f"read this fingerprint to the coordinator: {home.identity().verify_key.fingerprint}")


@click.command("install-certificate")
@click.argument("certificate", type=PathType)
def install_certificate(certificate: Path) -> None:
    """Take the certificate that the coordinator sent back for the last request."""
    from client.site_network import SiteNetwork

    data = read_input(certificate, what="certificate")
    installed = SiteNetwork(SiteHome.default()).install(data)
    click.echo(f"certificate of {installed.site_id} for {installed.address}")
    click.echo(f"it ends on {installed.not_after:%Y-%m-%d}; next: lacuna site perimeter --out DIR")


@click.command("export-sheet")
@click.option("--out", type=PathType, required=True, help="File for the other hospitals.")
@click.option("--own-only", is_flag=True, help="This site's fingerprint alone, not those it has pinned.")
def export_sheet(out: Path, own_only: bool) -> None:
    """Write a signed sheet of fingerprints for the other hospitals: this site's, and those it pinned."""
    from shared.fingerprint_sheet import FingerprintSheet, sign_sheet

    home = SiteHome.default()
    entries = {} if own_only else home.policy().pins()
    sheet = FingerprintSheet(writer=home.site_id, entries=entries)
    write_output(out, sign_sheet(sheet, home.identity()), what="fingerprint sheet")
    click.echo(f"read this fingerprint to whoever gets it: {home.identity().verify_key.fingerprint}")


@click.command("import-sheet")
@click.argument("sheet", type=PathType)
@click.option("--fingerprint", required=True, help="Of the sheet's writer, read to you by the writer.")
@click.option("--all", "take_all", is_flag=True, help="Also pin those that the writer vouches for.")
def import_sheet(sheet: Path, fingerprint: str, take_all: bool) -> None:
    """Pin the writer of a sheet; with --all, everybody on it. What is pinned otherwise is refused."""
    from shared.fingerprint_sheet import open_sheet

    home = SiteHome.default()
    read = open_sheet(read_input(sheet, what="fingerprint sheet"), fingerprint=fingerprint)
    wanted = dict(read.entries) if take_all else {read.writer: fingerprint}
    own = wanted.pop(home.site_id, None)
    policy, fresh = home.policy().pinned_together(
        wanted, own=(home.identity().verify_key.fingerprint, own), writer=read.writer
    )
    save_policy(policy, home.policy_path)
    rows = [
        [name, value, "pinned now" if name in fresh else "pinned" if name in policy.pins() else "not pinned"]
        for name, value in sorted(read.entries.items())
        if name != home.site_id
    ]
    print_table(f"sheet of {read.writer}", ["name", "fingerprint", "in your policy"], rows)


@click.command("perimeter")
@click.option("--out", type=PathType, required=True, help="Folder to write, or to write anew.")
@click.option("--listen", default="127.0.0.1:9443", show_default=True, help="Of nginx, for the SuperNode.")
@click.option("--address", metavar="HOST:PORT", help="Of the coordinator, if not as in the certificate.")
@click.option("--node-port", type=click.IntRange(1, 65535), default=9094, show_default=True)
@click.option("--socket", default="/run/lacuna/agent.sock", show_default=True, help="The agent's socket.")
@click.option("--agent-uid", type=int, help="Uid of the agent, where the courier has another one.")
def perimeter(
    out: Path, listen: str, address: str | None, node_port: int, socket: str, agent_uid: int | None
) -> None:
    """Write nginx's configuration, keys and secrets of this site, from its certificate.

    Write it anew after every renewal, and reload nginx.
    """
    from client.site_network import SiteNetwork
    from deploy.perimeter import write_site_perimeter

    reached = write_site_perimeter(
        SiteNetwork(SiteHome.default()),
        out,
        listen=listen,
        address=address,
        node_port=node_port,
        socket=socket,
        agent_uid=agent_uid,
    )
    click.echo(f"perimeter: {out}; the one destination is {address or reached}")
