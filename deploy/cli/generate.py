"""``lacuna generate``: labelled synthetic scans from a released bundle."""

from __future__ import annotations

from pathlib import Path

import click

from deploy.cli.output import progress_bars
from shared.errors import UsageError

PathType = click.Path(path_type=Path)


@click.command(name="generate")
@click.argument("bundle", type=PathType)
@click.option("--condition", required=True, help="One of the study's conditions.")
@click.option("--covariate", "covariates", multiple=True, help="NAME=VALUE of a covariate of the study.")
@click.option("--count", type=int, default=8, show_default=True, help="How many scans.")
@click.option("--seed", type=int, default=0, show_default=True, help="Sample i depends on (seed, i).")
@click.option("--out", type=PathType, required=True, help="Folder for scans, sidecars and contact sheet.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Scans sampled at once.")
@click.option("--steps", type=int, help="Sampling steps; the bundle says the default.")
@click.option("--guidance", type=float, help="Classifier-free guidance; the bundle says the default.")
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
def command(
    bundle: Path,
    condition: str,
    covariates: tuple[str, ...],
    count: int,
    seed: int,
    out: Path,
    batch_size: int,
    steps: int | None,
    guidance: float | None,
    device: str,
) -> None:
    """Write NIfTI image and mask pairs with sidecars and a contact sheet, marked as synthetic.

    BUNDLE is a release bundle. Check it first: lacuna compliance verify BUNDLE.
    """
    from shared.generation import generate_volumes

    with progress_bars() as progress:
        report = generate_volumes(
            bundle_dir=bundle,
            condition=condition,
            covariates=dict(_named_value(text) for text in covariates),
            count=count,
            seed=seed,
            out_dir=out,
            batch_size=batch_size,
            steps=steps,
            guidance=guidance,
            device=device,
            progress=progress,
        )
    click.echo(f"{report.written} written, {report.present} there before, in {out}")
    click.echo(f"contact sheet: {report.contact_sheet}")


def _named_value(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"covariate {text!r}: write NAME=VALUE")
    return name.strip(), value.strip()
