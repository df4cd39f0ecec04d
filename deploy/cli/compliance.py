"""``lacuna compliance``: the officer, offline, without torch and without the server's code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploy.cli.output import console, json_option, print_json, read_input, write_output
from shared.enrolment import make_request
from shared.errors import SiteError, UsageError
from shared.exit_codes import ExitCode
from shared.home import lacuna_home, private_directory
from shared.identity import SigningKey
from shared.plan_package import open_plan_package

if TYPE_CHECKING:
    from privacy.compliance.release_log import LogHead

PathType = click.Path(path_type=Path)


@click.group(name="compliance")
def command() -> None:
    """Check budgets, audits and releases without trusting the coordinator.

    The officer's key lives in LACUNA_HOME/compliance (default ~/.lacuna/compliance).
    """


def _key_path() -> Path:
    return lacuna_home() / "compliance" / "officer.key"


def _key() -> SigningKey:
    if not _key_path().exists():
        raise SiteError("no officer's key is here", remedy="lacuna compliance init --name NAME --out FILE")
    return SigningKey.load(_key_path())


@command.command("init")
@click.option("--name", required=True, help="Name of the officer: a-z, 0-9 and '-'.")
@click.option("--out", type=PathType, required=True, help="Enrolment request for the coordinator.")
def init(name: str, out: Path) -> None:
    """Make the officer's key and an enrolment request for the coordinator."""
    key = SigningKey.generate()
    request = make_request(role="officer", name=name, key=key)
    private_directory(_key_path().parent)
    key.save(_key_path())
    write_output(out, request, what="enrolment request")
    click.echo(f"read this fingerprint to the coordinator and the sites: {key.verify_key.fingerprint}")


@command.command("verify")
@click.argument("bundle", type=PathType)
@click.option("--coordinator", help="The coordinator's key or fingerprint, read out of band.")
@click.option("--log", "log_path", type=PathType, help="Release log; finds withdrawals.")
@click.option("--log-before", type=PathType, help="The log as you kept it earlier; finds a log cut short.")
@click.option("--heads", type=PathType, multiple=True, help="Receipts of ledger heads; find old copies.")
@click.option("--all", "everything", is_flag=True, help="List every check, not only what matters.")
@json_option
def verify(
    bundle: Path,
    coordinator: str | None,
    log_path: Path | None,
    log_before: Path | None,
    heads: tuple[Path, ...],
    everything: bool,
    as_json: bool,
) -> None:
    """Check a release bundle: every file, signature, ledger, verdict, the gate and the approvals."""
    from privacy.compliance.budget import read_receipts
    from privacy.compliance.report import print_verification
    from privacy.compliance.verify import verify_bundle

    report = verify_bundle(
        bundle,
        trusted_coordinator=coordinator,
        log=log_path,
        log_at_least=_kept_head(log_before, log_path),
        seen_heads=read_receipts(heads),
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print_verification(report, console(), everything=everything)
    if not report.passed:
        sys.exit(ExitCode.REFUSED)


@command.command("report")
@click.argument("bundle", type=PathType)
@click.argument("ledgers", nargs=-1, type=PathType, metavar="[LEDGER...]")
@click.option("--out", type=PathType, required=True, help="The page: one HTML file, to be kept or printed.")
@click.option("--coordinator", help="The coordinator's key or fingerprint, read out of band.")
@click.option("--log", "log_path", type=PathType, help="Release log; finds withdrawals.")
@click.option("--log-before", type=PathType, help="The log as you kept it earlier; finds a log cut short.")
@click.option("--heads", type=PathType, multiple=True, help="Receipts of ledger heads; find old copies.")
def report(
    bundle: Path,
    ledgers: tuple[Path, ...],
    out: Path,
    coordinator: str | None,
    log_path: Path | None,
    log_before: Path | None,
    heads: tuple[Path, ...],
) -> None:
    """Verify a release bundle and write a page about it that a person can read from the top down.

    LEDGERs are exports that sites gave since the release; each must continue the one in the bundle.
    """
    from datetime import UTC, datetime

    from privacy.compliance.budget import read_receipts
    from privacy.compliance.officer_report import officer_report

    made = officer_report(
        bundle,
        at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        trusted_coordinator=coordinator,
        log=log_path,
        log_at_least=_kept_head(log_before, log_path),
        seen_heads=read_receipts(heads),
        ledgers=ledgers,
    )
    write_output(out, made.html.encode(), what="report")
    for check in made.failed:
        click.echo(f"FAIL {check.name}: {check.detail}")
    click.echo("every check that was made passes" if made.passed else "DO NOT USE THIS BUNDLE")
    if made.passed and not made.anchored:
        click.echo("whose bundle it is was not checked: give --coordinator, from a call or a letter")
    if not made.passed:
        sys.exit(ExitCode.REFUSED)


def _kept_head(log_before: Path | None, log_path: Path | None) -> LogHead | None:
    from privacy.compliance.release_log import log_head, read_log_file

    if log_before is None:
        return None
    if log_path is None:
        raise UsageError("--log-before is compared with --log: give both")
    return log_head(read_log_file(log_before))


@command.command("budget")
@click.argument("ledgers", nargs=-1, type=PathType, required=True, metavar="LEDGER...")
@click.option("--plan", "plan_root", type=PathType, help="Plan package; names sites and gives delta.")
@click.option("--heads", type=PathType, multiple=True, help="Receipts of ledger heads; find old copies.")
@json_option
def budget(ledgers: tuple[Path, ...], plan_root: Path | None, heads: tuple[Path, ...], as_json: bool) -> None:
    """Check signed ledgers and recompute epsilon, by two accountants and the closed form."""
    from privacy.compliance.budget import budget as check_ledgers
    from privacy.compliance.budget import read_receipts
    from privacy.compliance.report import print_budget

    plan = None if plan_root is None else open_plan_package(plan_root).plan
    rows = check_ledgers(ledgers, plan=plan, heads=read_receipts(heads) if heads else None)
    if as_json:
        print_json([row.to_dict() for row in rows])
    else:
        print_budget(rows, console())
    if any(row.fault for row in rows):
        sys.exit(ExitCode.PEER_MISBEHAVED)


@command.command("approve")
@click.argument("decision", type=PathType)
@click.option("--plan", "plan_root", type=PathType, required=True, help="Plan package that the officer has.")
@click.option("--out", type=PathType, required=True, help="Approval for the coordinator.")
def approve(decision: Path, plan_root: Path, out: Path) -> None:
    """Sign a gate decision that says release."""
    from privacy.compliance.approvals import approve_decision

    plan = open_plan_package(plan_root).plan
    data = read_input(decision, what="gate decision")
    write_output(out, approve_decision(data, plan=plan, key=_key(), role="officer"), what="approval")
