"""``lacuna site``: the hospital's data engineer."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import click

from client.site_home import SiteHome, init_site
from client.site_policy import save_policy
from client.site_status import named_study
from deploy.cli.output import (
    json_option,
    print_json,
    print_table,
    progress_bars,
    read_input,
    write_output,
)
from deploy.cli.site_import import import_command, simulate
from deploy.cli.site_network import add_network_commands
from deploy.cli.site_operations import add_operations_commands
from shared.errors import RefusedError, SiteError, UsageError
from shared.home import private_directory, write_private
from shared.plan_package import open_plan_package
from shared.study_plan import StudyPlan

PathType = click.Path(path_type=Path)
study_argument = click.argument("study", required=False)
STORAGE_CHECK_S = 1.0


@click.group(name="site")
def command() -> None:
    """Bring scans in, approve a plan against your own policy, serve, and watch your budget.

    State lives in LACUNA_HOME/site (default ~/.lacuna/site).
    """


@command.command("init")
@click.option("--name", required=True, help="Site id: a-z, 0-9 and '-'.")
def init(name: str) -> None:
    """Make this site's keys and a policy file."""
    home = SiteHome.default()
    init_site(home, name=name)
    click.echo(f"site {name} is set up in {home.root}")
    click.echo(f"fingerprint: {home.identity().verify_key.fingerprint}")
    click.echo(f"policy, to be read and edited: {home.policy_path}")


@command.command("pin")
@click.argument("name")
@click.argument("fingerprint")
def pin(name: str, fingerprint: str) -> None:
    """Pin the key of a peer (its site id), of the 'coordinator' or of the 'officer'.

    Take the fingerprint from the person, not from a file that the coordinator sent.
    """
    home = SiteHome.default()
    save_policy(home.policy().pinned(name, fingerprint), home.policy_path)
    click.echo(f"pinned {name}: {fingerprint}")


@command.command("policy")
@click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change a clause (TOML value).")
def policy(changes: tuple[str, ...]) -> None:
    """Show this site's policy, or change clauses of it."""
    home = SiteHome.default()
    if not changes:
        home.policy()
        click.echo(home.policy_path.read_text(encoding="utf-8").rstrip())
        return
    policy = home.policy()
    for change in changes:
        policy = policy.changed(change)
    save_policy(policy, home.policy_path)
    for line in policy.clauses(re.split("[.=]", change)[0].strip() for change in changes):
        click.echo(line)


command.add_command(simulate)
command.add_command(import_command)


@command.command("approve")
@click.argument("plan_root", metavar="PLAN", type=PathType)
@click.option("--out", type=PathType, help="Signed approval, a file for the coordinator.")
def approve(plan_root: Path, out: Path | None) -> None:
    """Approve a plan package, if every clause of this site's policy holds and its budget has room.

    The plan's whole epsilon is reserved in the site's budget from then on.
    """
    from client.reservations import check_room_at
    from privacy.compliance.approvals import approve_plan
    from privacy.dp.execution_plan import check_plan

    home = SiteHome.default()
    plan = open_plan_package(plan_root).plan
    key = home.identity()
    home.policy().check(plan, own_site=home.site_id, own_key=key.verify_key)
    check_plan(plan)
    check_room_at(home, plan)
    _keep_plan(plan_root, plan, private_directory(home.study(plan.study_id)) / "plan")
    epsilon = "infinite" if plan.privacy.epsilon is None else f"{plan.privacy.epsilon:g}"
    click.echo(
        f"approved plan {plan.study_id} ({plan.digest().hex()[:16]}): mode {plan.privacy.mode}, "
        f"epsilon {epsilon} at delta {plan.privacy.delta:g} per patient, {plan.privacy.rounds} rounds"
    )
    if out is not None:
        write_output(out, approve_plan(plan, key=key, site_id=home.site_id), what="plan approval")


def _keep_plan(plan_root: Path, plan: StudyPlan, target: Path) -> None:
    """Copy the package to where the agent reads it, once; another plan of the study is refused."""
    if target.exists():
        if open_plan_package(target).plan.digest() == plan.digest():
            click.echo(f"plan {plan.study_id} was approved already")
            return
        raise RefusedError(
            f"this site has approved another plan of study {plan.study_id!r}",
            remedy="a changed plan is a new study: ask the coordinator for a new study id",
        )
    part = target.with_name("plan.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    for name in open_plan_package(plan_root).files:
        shutil.copyfile(plan_root / name, part / name)
    if open_plan_package(part).plan != plan:
        raise RefusedError(f"{plan_root} changed while it was being approved")
    part.rename(target)


@command.command("audit-mechanism")
@click.argument("plan_root", metavar="PLAN", type=PathType)
@click.option("--out", type=PathType, help="Statement signed by this site, a file for the coordinator.")
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--threads", type=int, help="CPU threads for torch.")
@json_option
def audit_mechanism(
    plan_root: Path, out: Path | None, device: str, threads: int | None, as_json: bool
) -> None:
    """Check that this installation does what a plan claims: noise, clipping, sampling, masks.

    Runs the production path for all sites of the plan in one process, on simulated patients. It reads no
    scan, no ledger and no key of a study; whoever has the plan package can run it.
    """
    from client.mechanism_audit import audit_dict, audit_installation, audit_table, installation_statement
    from client.workbench import set_threads
    from privacy.audit.site_evidence import sign_mechanism

    package = open_plan_package(plan_root)
    home = None if out is None else SiteHome.default()
    key = None if home is None else home.identity()
    set_threads(threads)
    with progress_bars() as progress:
        found = audit_installation(package, device=device, progress=progress)
    if as_json:
        print_json(audit_dict(found))
    else:
        print_table(f"mechanism audit, plan {package.plan.study_id}", *audit_table(found))
        click.echo(
            f"{found.canaries} canaries; a true mechanism fails this audit with probability at most "
            f"{found.false_failure_probability:.1g}"
        )
    if out is not None and home is not None and key is not None:
        statement = installation_statement(package, found, site_id=home.site_id)
        write_output(out, sign_mechanism(statement, key), what="mechanism audit", silent=as_json)
    if not found.passed:
        raise RefusedError(
            "this installation is not the mechanism that the plan claims: "
            + ", ".join(check.name for check in found.failed),
            remedy="do not serve with it; compare versions with the other sites and report what was measured",
        )
    if not as_json:
        click.echo("no violation found, at this power")


@command.command("serve")
@study_argument
@click.option("--socket", "socket_path", type=PathType, help="Unix socket for the courier.")
@click.option("--group", help="Group that may use the socket.")
@click.option("--allow-uid", "uids", type=int, multiple=True, help="Uid that may speak to the agent.")
@click.option("--allow-user", "users", multiple=True, help="User, by name, that may speak to the agent.")
@click.option("--listen", metavar="HOST:PORT", help="TCP with mutual TLS in place of the socket.")
@click.option("--certificate", type=PathType, help="With --listen: the agent's certificate (PEM).")
@click.option("--tls-key", type=PathType, help="With --listen: its key (PEM).")
@click.option("--client-authority", type=PathType, help="With --listen: who signs couriers' certificates.")
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@click.option("--threads", type=int, help="CPU threads for torch.")
@click.option(
    "--gradients",
    type=click.Choice(["engine", "opacus", "functorch"]),
    default="engine",
    show_default=True,
    help="Where per-patient gradients come from; the guarantee is the same.",
)
@click.option("--microbatch", type=click.IntRange(min=1), help="Patients in one forward pass.")
@click.option("--draws-per-pass", type=click.IntRange(min=1), help="Draws of a patient in one forward pass.")
@click.option("--bfloat16", is_flag=True, help="Compute in bfloat16 where torch's autocast would.")
def serve(
    study: str | None,
    socket_path: Path | None,
    group: str | None,
    uids: tuple[int, ...],
    users: tuple[str, ...],
    listen: str | None,
    certificate: Path | None,
    tls_key: Path | None,
    client_authority: Path | None,
    device: str,
    threads: int | None,
    gradients: str,
    microbatch: int | None,
    draws_per_pass: int | None,
    bfloat16: bool,
) -> None:
    """Run the site agent for an approved study, until it is stopped. It needs no network."""
    from client.serving import ServeOptions, serve_study
    from client.unix_listener import user_id

    home = SiteHome.default()
    study_id = named_study(home, study)
    tls: tuple[str, Path, Path, Path] | None = None
    if listen is not None:
        if certificate is None or tls_key is None or client_authority is None:
            raise UsageError("--listen needs --certificate, --tls-key and --client-authority")
        tls = (listen, certificate, tls_key, client_authority)
    options = ServeOptions(
        socket_path=socket_path or home.study(study_id) / "agent.sock",
        group=group,
        allowed_uids=frozenset(uids) | {user_id(user) for user in users},
        tls=tls,
        device=device,
        threads=threads,
        gradients=gradients,
        microbatch=microbatch,
        draws_per_pass=draws_per_pass,
        bfloat16=bfloat16,
    )
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    with progress_bars() as progress:
        running = serve_study(home, study_id, options, progress=progress)
    with running:
        click.echo(f"site {home.site_id} serves study {study_id} on {running.address}")
        while not stopped.wait(STORAGE_CHECK_S):
            running.check_storage()
    click.echo("stopped")


@command.command("budget")
@click.option("--plot", type=PathType, metavar="FILE.png", help="Draw epsilon over rounds.")
@json_option
def budget(plot: Path | None, as_json: bool) -> None:
    """Privacy spent, reserved and left, for each study and in all.

    Reserved is what approved plans may still charge. A study that is over gives it back when it expires, or
    by `lacuna site end-study`.
    """
    from client.budget_report import site_budget

    report = site_budget(SiteHome.default(), with_history=as_json or plot is not None)
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(
            f"privacy budget of site {report.site_id}: epsilon per patient, at each plan's delta",
            *report.table(),
        )
        click.echo("\n" + "\n".join(report.bars()))
    if plot is not None:
        from client.budget_picture import budget_picture

        write_output(plot, budget_picture(report), what="plot", silent=as_json)


@command.command("end-study")
@click.argument("study")
@click.option("--yes", is_flag=True, help="Do not ask.")
def end_study(study: str, yes: bool) -> None:
    """End a study at this site for good: it charges nothing any more, and what it had reserved is free.

    What was spent stays spent. Stop the agent first. Verdicts that were not given yet never will be.
    """
    from client.serving import open_ledger

    home = SiteHome.default()
    study_id = named_study(home, study)
    if not yes:
        click.confirm(f"end study {study_id} at site {home.site_id} for good?", abort=True)
    with open_ledger(home) as ledger:
        ledger.end_study(study_id)
    click.echo(f"study {study_id} is ended at this site; `lacuna site budget` shows what that frees")


@command.command("export-ledger")
@click.option("--out", type=PathType, required=True, help="File for the coordinator or the officer.")
def export_ledger(out: Path) -> None:
    """Write this site's ledger, signed, to a file; also while an agent is serving, or where none can.

    It holds every charge of every study of this site, and nothing about a patient.
    """
    from client.ledger_export import signed_ledger

    write_output(out, signed_ledger(SiteHome.default()), what="ledger")


@command.command("audit")
@study_argument
@click.option("--veto", is_flag=True, help="Refuse the release without giving a reason.")
@click.option("--report", type=PathType, help="Write a page with curves and nearest pairs; it stays here.")
@json_option
def audit(study: str | None, veto: bool, report: Path | None, as_json: bool) -> None:
    """This site's own figures of the last audit. They never leave the hospital."""
    from client.audit_part import AuditPart
    from client.audit_view import audit_lines, signed_lines

    home = SiteHome.default()
    directory = home.study(named_study(home, study))
    if veto:
        (directory / "veto").touch(mode=0o600)
        click.echo("veto recorded: the next verdict of this site carries it")
        return
    path = directory / "audit.json"
    if not path.exists():
        raise SiteError("no candidate was audited here yet")
    value = json.loads(path.read_bytes())
    plan, part = home.approved_plan(directory.name).plan, AuditPart.load(directory)
    signed = signed_lines(part, plan, site_id=home.site_id)
    if report is not None:
        _write_audit_page(home, plan, value, signed, report)
    elif as_json:
        missing = () if part is None else part.missing_cells(plan, site_id=home.site_id)
        print_json({**value, "missing_from_signed_counts": list(missing)})
    else:
        for line in (*audit_lines(value), *signed):
            click.echo(line)


def _write_audit_page(
    home: SiteHome, plan: StudyPlan, record: dict[str, Any], signed: list[str], path: Path
) -> None:
    from datetime import UTC, datetime

    from client.audit_page import PRIVATE, site_audit_page

    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    page = site_audit_page(record, plan, site_id=home.site_id, at=at, signed=signed)
    try:
        write_private(path, page.encode())
    except OSError as error:
        raise UsageError(f"the page cannot be written to {path}: {error.strerror}") from error
    click.echo(f"{PRIVATE} {path}")


@command.command("approve-release")
@click.argument("decision", type=PathType)
@click.option("--out", type=PathType, required=True, help="File for the coordinator.")
@study_argument
def approve_release(decision: Path, out: Path, study: str | None) -> None:
    """Sign a gate decision that says release, after checking it against the approved plan."""
    from privacy.compliance.approvals import approve_decision

    home = SiteHome.default()
    plan = home.approved_plan(named_study(home, study)).plan
    data = read_input(decision, what="gate decision")
    approval = approve_decision(data, plan=plan, key=home.identity(), role="site", site_id=home.site_id)
    write_output(out, approval, what="approval")


add_network_commands(command)
add_operations_commands(command)
