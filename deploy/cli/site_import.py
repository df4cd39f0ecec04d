"""``lacuna site import``: scans from folders and archives into the site's store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from client.site_home import SiteHome
from deploy.cli.output import json_option, print_json, print_table, progress_bars
from shared.errors import SiteError, UsageError
from shared.home import private_directory, write_private
from shared.plan_package import open_plan_package

if TYPE_CHECKING:
    from client.ingest.dicom import DicomPairing
    from client.ingest.pacs import Archive
    from client.ingest.scan import ScanSource
    from client.patient_dataset import SiteStore
    from client.scan_import import ImportReport
    from shared.study_plan import StudyPlan

PathType = click.Path(path_type=Path)
Progress = Callable[[str, int, int], None]
SOURCES = ("nifti", "bids", "decathlon", "dicom", "dicomweb", "pacs")


@click.command("simulate")
@click.option("--out", type=PathType, required=True, help="New folder for scans and manifest.csv.")
@click.option("--patients", type=click.IntRange(3, 1000), default=20, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), required=True, help="Another one at each hospital.")
def simulate(out: Path, patients: int, seed: int) -> None:
    """Write simulated scans of nobody, for a first study with the shipped networks.

    Two conditions, `common` and `rare`, half of the patients each. A plan for them says --simulated.
    """
    from client.ingest.phantoms import write_phantom_folder
    from shared.volumes.phantom import simulate_cohort

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is there already and not empty", remedy="name a new folder")
    shares = {"common": 0.5, "rare": 0.5}
    scans = simulate_cohort(n_patients=patients, conditions_fractions=shares, seed=seed)
    try:
        write_phantom_folder(scans, out)
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error
    click.echo(f"{len(scans)} scans of {patients} simulated patients: {out}")


@click.command("import")
@click.option("--plan", "plan_root", type=PathType, required=True, help="Plan package (a directory).")
@click.option("--nifti", type=PathType, help="Folder of NIfTI scans with manifest.csv, or the manifest.")
@click.option("--bids", type=PathType, help="BIDS data set, with participants.tsv.")
@click.option("--decathlon", type=PathType, help="Folder of a Medical Segmentation Decathlon task.")
@click.option("--dicom", type=PathType, help="Folder of DICOM files, in any subfolders.")
@click.option("--dicomweb", metavar="URL", help="PACS by DICOMweb (QIDO-RS and WADO-RS).")
@click.option("--pacs", metavar="AET@HOST:PORT", help="PACS by C-FIND and C-GET.")
@click.option("--manifest", type=PathType, help="DICOM: table with the columns patient,scan,condition,mask.")
@click.option("--condition", help="DICOM: condition of all scans, in place of a manifest.")
@click.option("--modality", "modalities", multiple=True, help="DICOM: only these modalities (MR, CT).")
@click.option("--body-part", "body_parts", multiple=True, help="DICOM: only these body parts examined.")
@click.option("--description", metavar="PATTERN", help="DICOM: only such series descriptions (* and ?).")
@click.option("--segment", "segments", multiple=True, metavar="NAME=LABEL",
              help="DICOM SEG, BIDS: the plan's label of a segment; empty leaves it out.")  # fmt: skip
@click.option("--suffix", default="T1w", show_default=True, help="BIDS: suffix of the images.")
@click.option("--condition-column", default="condition", show_default=True,
              help="BIDS: column of participants.tsv.")  # fmt: skip
@click.option("--patients", type=PathType, help="Decathlon: table of patients (CSV).")
@click.option("--only", type=PathType, help="Decathlon: file with the ids of this site's patients.")
@click.option("--volume-cut", type=float, help="Decathlon: mm3 below which a scan counts as small.")
@click.option(
    "--aet", default="LACUNA", show_default=True, help="C-GET: our own title, as the PACS knows it."
)
@click.option("--token-file", type=PathType, help="DICOMweb: bearer token (passwords: ~/.netrc).")
@click.option("--authority", type=PathType, help="PACS: who signs its certificate (PEM); C-GET: use TLS.")
@click.option("--certificate", type=PathType, help="PACS: our certificate (PEM).")
@click.option("--tls-key", type=PathType, help="PACS: its key (PEM).")
@click.option("--report", type=PathType, help="Page with pictures; default: import-report.html of the study.")
@click.option("--strict", is_flag=True, help="Import nothing if anything is wrong.")
@json_option
def import_command(plan_root: Path, report: Path | None, strict: bool, as_json: bool, **options: Any) -> None:
    """Check scans and bring them into this site's store.

    Give one source: --nifti, --bids, --decathlon, --dicom, --dicomweb or --pacs. Repeat the command to go on
    after an interruption: nothing is lost and nothing counts twice. Ends with what was imported, repaired
    and refused, and why, also as a page with pictures that stays in the hospital.
    """
    from client.ingest.pacs import PacsSource
    from client.ingest.thumbnails import Gallery
    from client.patient_dataset import SiteStore
    from client.scan_import import import_scans

    given = [name for name in SOURCES if options[name] is not None]
    if len(given) != 1:
        raise UsageError(f"give one source: --{', --'.join(SOURCES[:-1])} or --{SOURCES[-1]}")
    home = SiteHome.default()
    plan = open_plan_package(plan_root).plan
    folder = private_directory(home.study(plan.study_id))
    store_path = home.store_path(plan.study_id)
    store = SiteStore.open(store_path) if (store_path / "site.key").exists() else SiteStore.create(store_path)
    gallery = Gallery()
    with progress_bars() as progress:
        source = _source(given[0], options, plan, store, folder / "inbox", progress)
        done = import_scans(source, store, plan.data, strict=strict, progress=progress, show=gallery.show)
    page = _write_page(done, gallery, plan, home, report or folder / "import-report.html")
    if isinstance(source, PacsSource):
        source.discard()
    _print(done, page, as_json)
    if not done.imported and not done.present:
        raise SiteError("no scan was imported", remedy="mend what is listed above and import again")


def _source(
    kind: str, options: dict[str, Any], plan: StudyPlan, store: SiteStore, inbox: Path, progress: Progress
) -> ScanSource:
    covariates = tuple(covariate.name for covariate in plan.data.covariates)
    if kind == "nifti":
        from client.ingest.nifti import NiftiFolder

        return NiftiFolder(path=options["nifti"], covariates=covariates)
    if kind == "bids":
        from client.ingest.bids import BidsFolder

        return BidsFolder(
            path=options["bids"],
            labels=plan.data.labels,
            suffix=options["suffix"],
            condition_column=options["condition_column"],
            segment_names=_segment_names(options["segments"]),
            covariates=covariates,
        )
    if kind == "decathlon":
        from client.ingest.decathlon import DecathlonFolder, read_patient_list

        if options["patients"] is None:
            raise UsageError("--decathlon needs --patients: the layout itself does not name patients")
        return DecathlonFolder(
            path=options["decathlon"],
            patients_csv=options["patients"],
            patient_ids=None if options["only"] is None else read_patient_list(options["only"]),
            volume_cut_mm3=options["volume_cut"],
            covariates=covariates,
        )
    pairing = _pairing(options, plan)
    if kind == "dicom":
        from client.ingest.dicom import DicomFolder

        return DicomFolder(path=options["dicom"], pairing=pairing)
    from client.ingest.pacs import PacsSource

    return PacsSource(
        archive=_archive(kind, options),
        inbox=inbox,
        series_key=store.series_key,
        pairing=pairing,
        progress=progress,
    )


def _pairing(options: dict[str, Any], plan: StudyPlan) -> DicomPairing:
    from client.ingest.dicom import DicomPairing
    from client.ingest.dicom_index import SeriesSelection

    return DicomPairing(
        labels=plan.data.labels,
        manifest=options["manifest"],
        condition=options["condition"],
        selection=SeriesSelection(
            modalities=frozenset(options["modalities"]),
            body_parts=frozenset(options["body_parts"]),
            description=options["description"],
        ),
        segment_names=_segment_names(options["segments"]),
        covariates=tuple(covariate.name for covariate in plan.data.covariates),
    )


def _archive(kind: str, options: dict[str, Any]) -> Archive:
    tls = {
        "authority": options["authority"],
        "certificate": options["certificate"],
        "key": options["tls_key"],
    }
    if kind == "dicomweb":
        from client.ingest.dicomweb_archive import DicomWebArchive

        return DicomWebArchive(options["dicomweb"], token_file=options["token_file"], **tls)
    from client.ingest.dimse_archive import DimseArchive

    return DimseArchive(options["pacs"], own_title=options["aet"], **tls)


def _segment_names(words: tuple[str, ...]) -> dict[str, str]:
    names: dict[str, str] = {}
    for word in words:
        name, sign, label = word.partition("=")
        if not sign or not name.strip():
            raise UsageError(f"--segment {word!r} is not NAME=LABEL")
        names[name.strip()] = label.strip()
    return names


def _write_page(done: ImportReport, gallery: Any, plan: StudyPlan, home: SiteHome, path: Path) -> Path:
    from datetime import UTC, datetime

    from client.import_page import import_page

    at = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    site_id = home.site_id if (home.root / "site.json").exists() else "this site"
    page = import_page(done, gallery, plan, site_id=site_id, at=at)
    try:
        write_private(path, page.encode())
    except OSError as error:
        raise UsageError(f"the page cannot be written to {path}: {error.strerror}") from error
    return path


def _print(done: ImportReport, page: Path, as_json: bool) -> None:
    from client.import_page import PRIVATE, report_dict, report_table

    if as_json:
        print_json({**report_dict(done), "page": str(page)})
        return
    columns, rows = report_table(done)
    if rows:
        print_table("what to know of", columns, rows)
    repaired = len({name for name, _ in done.repaired})
    click.echo(
        f"imported {len(done.imported)}, already here {len(done.present)}, refused {len(done.refused)}"
        + (f"; {repaired} of the accepted were repaired" if repaired else "")
    )
    if done.skipped:
        click.echo(f"left alone: {'; '.join(done.skipped)}")
    click.echo(f"{PRIVATE} {page}")
