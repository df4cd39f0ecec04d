"""``lacuna demo``: a whole study on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from deploy.cli.output import console
from shared.errors import UsageError

PathType = click.Path(path_type=Path)


@click.command(name="demo")
@click.option("--out", type=PathType, default=Path("lacuna-demo"), show_default=True, help="Output folder.")
@click.option(
    "--data", type=PathType, help="Folder of a Medical Segmentation Decathlon task, for real scans."
)
@click.option("--patients", type=PathType, help="With --data: table of patients (CSV).")
@click.option("--sites", type=click.IntRange(3, 10), default=3, show_default=True)
@click.option("--rounds", type=click.IntRange(min=1), help="Default: 22, on real scans 20, leaky 5.")
@click.option("--epsilon", type=click.FloatRange(min=0, min_open=True), default=8.0, show_default=True)
@click.option("--leaky", is_flag=True, help="No protection at all, on simulated scans: the gate must refuse.")
def command(
    out: Path,
    data: Path | None,
    patients: Path | None,
    sites: int,
    rounds: int | None,
    epsilon: float,
    leaky: bool,
) -> None:
    """A whole study on this machine: hospitals, rounds, audit, gate, release, synthetic scans.

    Exit code 0 after a verified release, 40 where the gate refused.
    """
    from deploy.demo import DemoOptions, run_demo

    if (data is None) != (patients is None):
        raise UsageError("--data and --patients belong together")
    options = DemoOptions(
        out=out.absolute(),
        data=data,
        patients=patients,
        sites=sites,
        rounds=rounds,
        epsilon=epsilon,
        leaky=leaky,
    )
    sys.exit(run_demo(options, console()))
