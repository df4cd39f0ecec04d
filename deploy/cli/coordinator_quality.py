"""``lacuna coordinator evaluate``: how good is the released generator, against public scans."""

from __future__ import annotations

from pathlib import Path

import click

from deploy.cli.output import json_option, print_json, print_table, progress_bars
from deploy.cli.public_source import PathType, public_source_options
from shared.errors import CoordinatorError, UsageError


@click.command("evaluate")
@click.option("--study", "study_id", required=True, help="Study id.")
@public_source_options
@click.option("--simulated", is_flag=True, help="Against fresh simulated scans (--shipped networks).")
@click.option("--bundle", type=PathType, help="Another bundle of the study than the one released here.")
@click.option("--count", type=click.IntRange(8, 100_000), default=60, show_default=True, help="By condition.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--segmenter-steps",
    type=click.IntRange(0, 100_000),
    default=0,
    show_default=True,
    help="Also train segmenters on synthetic scans, public ones and both, and test them (300 take minutes).",
)
@click.option("--report", type=PathType, help="Write a page with figures and pictures here (HTML).")
@click.option("--device", default="cpu", show_default=True, help="Torch device.")
@json_option
def evaluate(
    study_id: str,
    nifti: Path | None,
    decathlon: Path | None,
    patients: Path | None,
    only: Path | None,
    volume_cut: float | None,
    simulated: bool,
    bundle: Path | None,
    count: int,
    seed: int,
    segmenter_steps: int,
    report: Path | None,
    device: str,
    as_json: bool,
) -> None:
    """Hold samples of the released bundle against PUBLIC scans that no network of the study saw.

    Give the scans that pretraining got: of those, the patients that it held out count. Other scans count
    all. A member's scan must never be among them.
    """
    from deploy import public_networks
    from privacy.compliance.validity import now_utc
    from server.coordinator_home import CoordinatorHome
    from server.quality_page import quality_page
    from server.release_quality import evaluate_release
    from server.study_store import StudyStore

    if sum((nifti is not None, decathlon is not None, simulated)) != 1:
        raise UsageError("give one of --nifti, --decathlon, --simulated")
    home = CoordinatorHome.default()
    released = bundle or StudyStore(home.study(study_id)).bundle_path
    if not released.exists():
        raise CoordinatorError("nothing is released yet", remedy="lacuna coordinator release, or --bundle")
    source = public_networks.PublicSource(
        nifti=nifti, decathlon=decathlon, patients=patients, only=only, volume_cut_mm3=volume_cut
    )
    pair, scans = public_networks.scans_to_evaluate(home.public(study_id), None if simulated else source)
    with progress_bars() as progress:
        quality = evaluate_release(
            released,
            scans,
            copy_embedding=pair.copy_embedding_path,
            count=count,
            seed=seed,
            segmenter_steps=segmenter_steps,
            device=device,
            progress=progress,
        )
    if report is not None:
        report.write_text(quality_page(quality, at=now_utc()), encoding="utf-8")
    if as_json:
        print_json(quality.to_dict())
        return
    rows = []
    for condition in quality.conditions:
        name = condition.condition
        rows.append([name, "implausible samples", f"{condition.rejected} of {condition.tried}", "", ""])
        for row in condition.distances:
            rows.append(
                [
                    name,
                    row.name,
                    f"{row.value:.4g} {row.unit}",
                    f"{row.low:.4g} to {row.high:.4g}",
                    "" if row.floor is None else f"{row.floor:.4g}",
                ]
            )
        alike = condition.diversity
        interval = f"{alike.synthetic_low:.3f} to {alike.synthetic_high:.3f}"
        real = "" if alike.real is None else f"{alike.real:.3f}"
        rows.append([name, "MS-SSIM of two scans", f"{alike.synthetic:.3f}", interval, real])
    columns = ("condition", "figure", "synthetic", "95% interval", "real against real")
    print_table(f"{quality.study_id}: synthetic against public scans", columns, rows)
    if quality.segmenters:
        print_table(
            "segmenters, tested on the public scans that were held out",
            ("trained on", "scans", "label", "Dice", "95% interval"),
            [
                [s.trained_on, str(s.n_scans), s.label, f"{s.dice:.3f}", f"{s.low:.3f} to {s.high:.3f}"]
                for s in quality.segmenters
            ],
        )
    n_patients = len({volume.patient_id for volume in scans.held_out})
    click.echo(f"{len(scans.held_out)} public scans of {n_patients} patients. {scans.description}.")
    if not quality.verified:
        click.echo("the bundle does NOT pass lacuna compliance verify, which says why", err=True)
    copies = "no verified verdict" if quality.copies is None else quality.copies.text
    click.echo(f"copies, as released: {copies}")
    if report is not None:
        click.echo(f"page: {report}")
