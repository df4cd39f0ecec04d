"""Options that say where PUBLIC scans are, for the commands that read some."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

PathType = click.Path(path_type=Path)

_OPTIONS = (
    click.option("--nifti", type=PathType, help="Folder of PUBLIC NIfTI scans with manifest.csv."),
    click.option("--decathlon", type=PathType, help="Folder of a Medical Segmentation Decathlon task."),
    click.option("--patients", type=PathType, help="With --decathlon: table of patients (CSV)."),
    click.option("--only", type=PathType, help="With --decathlon: file with the ids of the PUBLIC patients."),
    click.option(
        "--volume-cut", type=float, help="With --decathlon: mm3 below which a scan counts as small."
    ),
)


def public_source_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of one source: nifti, decathlon, patients, only, volume_cut."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
