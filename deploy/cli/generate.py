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
@click.option(
    "--interpolate", type=int, nargs=2, metavar="SEED_A SEED_B", help="Steps from one to the other."
)
@click.option(
    "--format", "file_format", type=click.Choice(["nifti", "dicom"]), default="nifti", show_default=True
)
@click.option(
    "--modality", type=click.Choice(["MR", "CT"]), help="With --format dicom; the study says the default."
)
@click.option("--uid-root", help="With --format dicom: your own root of identifiers, in place of UUIDs.")
@click.option(
    "--max-rejected-share",
    type=float,
    default=0.5,
    show_default=True,
    help="Give up when more of the samples are implausible.",
)
@click.option("--focus", help="Label whose middle the contact sheet shows. Default: the smallest.")
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
    interpolate: tuple[int, int] | None,
    file_format: str,
    modality: str | None,
    uid_root: str | None,
    max_rejected_share: float,
    focus: str | None,
    batch_size: int,
    steps: int | None,
    guidance: float | None,
    device: str,
) -> None:
    """Write image and mask pairs (NIfTI, or DICOM series with segmentations), marked as synthetic.

    Each has a sidecar; a contact sheet and a picture of the masks' surfaces show the first of them. Samples
    outside the bundle's ranges of plausibility are counted and replaced. Where the bundle has a segmenter
    (lacuna coordinator pretrain --segmenter-steps), so are samples whose mask is not what it finds in the
    image.

    BUNDLE is a release bundle. Check it first: lacuna compliance verify BUNDLE.
    """
    from shared.generation import generate_volumes

    with progress_bars() as progress:
        report = generate_volumes(
            bundle_dir=bundle,
            condition=condition,
            covariates=dict(_named_value(text) for text in covariates),
            count=count,
            seed=interpolate[0] if interpolate else seed,
            to_seed=interpolate[1] if interpolate else None,
            out_dir=out,
            file_format=file_format,  # type: ignore[arg-type]
            modality=modality,  # type: ignore[arg-type]
            uid_root=uid_root,
            max_rejected_share=max_rejected_share,
            focus=focus,
            batch_size=batch_size,
            steps=steps,
            guidance=guidance,
            device=device,
            progress=progress,
        )
    click.echo(f"{report.written} written, {report.present} there before, in {out}")
    if not report.checked:
        click.echo("NOT checked for plausibility: the bundle carries no ranges", err=True)
    elif not report.segmented:
        click.echo("masks are not held against the images: the bundle has no segmenter")
    if report.rejected:
        why = ", ".join(f"{figure} ({times})" for figure, times in report.common_faults())
        click.echo(f"{len(report.rejected)} implausible and left out: {why}")
    click.echo(f"contact sheet: {report.contact_sheet}")
    click.echo(f"surfaces: {report.surfaces}")


def _named_value(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not separator:
        raise UsageError(f"covariate {text!r}: write NAME=VALUE")
    return name.strip(), value.strip()
