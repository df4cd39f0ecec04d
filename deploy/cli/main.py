"""``lacuna``: one door for everybody. Handlers are thin; work is imported when a command runs."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from typing import Any

import click

from shared.errors import LacunaError
from shared.exit_codes import ExitCode

_GROUPS = {
    "site": ("deploy.cli.site", "Hospital: bring scans in, approve a plan, serve, watch the budget."),
    "coordinator": ("deploy.cli.coordinator", "Coordinator: plan, launch, gate and release a study."),
    "compliance": ("deploy.cli.compliance", "Compliance officer: verify bundles and ledgers, offline."),
    "generate": ("deploy.cli.generate", "Researcher: make labelled synthetic scans from a bundle."),
    "demo": ("deploy.cli.demo", "Newcomer: a whole study on this machine."),
}

EPILOG = """\b
Exit codes: 0 done, 2 usage, 10 the site must act, 20 the coordinator must act,
30 a peer misbehaved, 40 refused by policy, budget or gate, 70 a bug."""


class LazyGroup(click.Group):
    """Imports a subcommand's module only when it is called, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_GROUPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _GROUPS:
            return None
        command: Any = importlib.import_module(_GROUPS[cmd_name][0]).command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in _GROUPS.items()])


@click.command(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lacuna")
def cli() -> None:
    """Hospitals train one generator of synthetic 3D scans together; no scan leaves a hospital."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with a documented code."""
    # MONAI warns of an optional decoder for GPUs wherever it is imported.
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    try:
        code = cli.main(args=arguments, prog_name="lacuna", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(ExitCode.USAGE)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except LacunaError as error:
        click.echo(f"error: {error.diagnostics()}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(ExitCode.DONE)
    except Exception as error:
        if os.environ.get("LACUNA_TRACEBACK"):
            raise
        click.echo(
            f"bug: {type(error).__name__}: {error}\n"
            "  what to do: report it, with what LACUNA_TRACEBACK=1 shows",
            err=True,
        )
        sys.exit(ExitCode.BUG)
    sys.exit(code if isinstance(code, int) else ExitCode.DONE)
