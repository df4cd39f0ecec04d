"""Public volumes to public networks: for ``lacuna coordinator pretrain``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from client.ingest.decathlon import DecathlonFolder, read_patient_list
from client.ingest.nifti import NiftiFolder
from client.ingest.quality import CheckedScan, check_scan
from client.scan_import import keep_covariates
from privacy.audit.copies import CopyCalibration
from privacy.audit.proposal import usual_attacks
from server.pretrain import (
    PublicVolume,
    default_recipe,
    held_out_patients,
    pretrain,
    public_phantoms,
    recipe_covariates,
)
from server.public_calibration import calibrate_public, save_calibration
from server.public_segmenter import default_segmenter_schedule
from server.release_quality import PublicScans, split_by_training
from shared.errors import CoordinatorError, UsageError
from shared.home import private_directory
from shared.model.presets import preset_named
from shared.model.shipped import (
    AUTOENCODER_FILE,
    PRIOR_FILE,
    RANGES_FILE,
    RECIPE_FILE,
    PretrainedPair,
    read_pair,
    shipped_pair,
)
from shared.plan_package import COPY_EMBEDDING_FILE, SEGMENTER_FILE
from shared.study_plan import CovariateClause
from shared.volumes.canonical_grid import CanonicalGrid, to_canonical

Progress = Callable[[str, int, int], None]

CALIBRATION_PATIENTS = 120
CALIBRATION_SEED = 20_002
EVALUATION_SEED = 20_003


@dataclass(frozen=True, kw_only=True)
class PublicSource:
    """Where PUBLIC scans come from: a NIfTI folder, or chosen patients of a Decathlon task."""

    nifti: Path | None
    decathlon: Path | None
    patients: Path | None
    only: Path | None
    volume_cut_mm3: float | None


def take_shipped(folder: Path, *, preset: str, progress: Progress | None = None) -> None:
    """Copy the pair that ships, and calibrate on fresh simulated patients that it never saw."""
    pair = shipped_pair(preset)
    private_directory(folder)
    names = [AUTOENCODER_FILE, PRIOR_FILE, RECIPE_FILE, RANGES_FILE]
    if pair.copy_embedding_path is not None:
        names.append(COPY_EMBEDDING_FILE)
    if pair.segmenter_path is not None:
        names.append(SEGMENTER_FILE)
    for name in names:
        shutil.copyfile(pair.autoencoder_path.with_name(name), folder / name)
    if progress is not None:
        progress("calibrating on simulated patients", 0, 1)
    volumes = public_phantoms(
        n_patients=CALIBRATION_PATIENTS, seed=CALIBRATION_SEED, fractions={"common": 1.0}
    )
    _calibrate(folder, pair, volumes, unseen=None)
    if progress is not None:
        progress("calibrating on simulated patients", 1, 1)


def train_on(
    folder: Path,
    source: PublicSource,
    *,
    preset_name: str,
    conditions: tuple[str, ...],
    labels: tuple[str, ...],
    covariates: tuple[CovariateClause, ...] = (),
    autoencoder_steps: int | None,
    prior_steps: int | None,
    embedding_steps: int | None,
    segmenter_steps: int | None = None,
    bfloat16: bool = False,
    copy_samples: int = 500,
    seed: int,
    image_autoencoder: Path | None = None,
    image_denoiser: Path | None = None,
    device: str = "cpu",
    calibrate_attacks: bool = False,
    progress: Progress | None = None,
) -> None:
    """Train the networks on public scans, then calibrate on those that were held out.

    Args:
        calibrate_attacks: Whether the secondary attacks are measured on those too, for plans that pool them.

    Raises:
        CoordinatorError: a public scan is not sound; every problem is named.
    """
    preset = preset_named(preset_name)
    grid = CanonicalGrid(shape=preset.grid_shape, spacing_mm=preset.spacing_mm)
    volumes = read_public(source, grid, conditions=conditions, labels=labels, covariates=covariates)
    private_directory(folder)
    recipe = default_recipe(preset, seed=seed)
    if autoencoder_steps is not None:
        recipe = replace(recipe, autoencoder=replace(recipe.autoencoder, steps=autoencoder_steps))
    if prior_steps is not None:
        recipe = replace(recipe, prior=replace(recipe.prior, steps=prior_steps))
    if embedding_steps is not None:
        recipe = replace(recipe, copy_embedding=replace(recipe.copy_embedding, steps=embedding_steps))
    if segmenter_steps == 0:
        recipe = replace(recipe, segmenter=None)
    elif segmenter_steps is not None:
        schedule = recipe.segmenter or default_segmenter_schedule(seed=seed)
        recipe = replace(recipe, segmenter=replace(schedule, steps=segmenter_steps))
    if bfloat16:
        recipe = replace(
            recipe,
            autoencoder=replace(recipe.autoencoder, bfloat16=True),
            prior=replace(recipe.prior, bfloat16=True),
            copy_embedding=replace(recipe.copy_embedding, bfloat16=True),
            segmenter=None if recipe.segmenter is None else replace(recipe.segmenter, bfloat16=True),
        )
    patients = sorted({volume.patient_id for volume in volumes})
    pair = pretrain(
        preset=preset,
        volumes=volumes,
        conditions=conditions,
        labels=labels,
        covariates=covariates,
        out_dir=folder,
        image_autoencoder=image_autoencoder,
        image_denoiser=image_denoiser,
        recipe=recipe,
        data_description=f"{len(volumes)} public scans of {len(patients)} patients",
        device=device,
        progress=None if progress is None else lambda stage, done, total, _: progress(stage, done, total),
    )
    _calibrate(
        folder,
        pair,
        volumes,
        unseen=held_out_patients(patients, recipe.held_out_share),
        copy_samples=copy_samples,
        calibrate_attacks=calibrate_attacks,
        progress=progress,
    )


def read_public(
    source: PublicSource,
    grid: CanonicalGrid,
    *,
    conditions: tuple[str, ...],
    labels: tuple[str, ...],
    covariates: tuple[CovariateClause, ...] = (),
) -> list[PublicVolume]:
    """Public scans on the canonical grid. Raises CoordinatorError naming every problem."""
    names = tuple(covariate.name for covariate in covariates)
    if source.nifti is not None:
        listing = NiftiFolder(path=source.nifti, covariates=names).listing(conditions)
    else:
        if source.decathlon is None or source.patients is None:
            raise UsageError("--decathlon needs --patients")
        chosen = None
        if source.only is not None:
            chosen = read_patient_list(source.only)
        listing = DecathlonFolder(
            path=source.decathlon,
            patients_csv=source.patients,
            patient_ids=chosen,
            volume_cut_mm3=source.volume_cut_mm3,
            covariates=names,
        ).listing(conditions)
    problems = [str(problem) for problem in listing.problems]
    volumes = []
    for entry in listing.entries:
        entry, faults = keep_covariates(entry, covariates)
        problems += [str(problem) for problem in faults]
        checked = check_scan(entry, n_labels=len(labels))
        if not isinstance(checked, CheckedScan):
            problems += [str(problem) for problem in checked]
            continue
        scan = to_canonical(checked.image, checked.mask, grid)
        volumes.append(
            PublicVolume(
                patient_id=entry.patient_id,
                condition=entry.condition,
                image=scan.image_DHW,
                mask=scan.mask_DHW,
                covariates=entry.covariates,
            )
        )
    if problems:
        raise CoordinatorError(
            "public scans are not sound:\n  " + "\n  ".join(problems),
            remedy="mend or leave out what is listed",
        )
    return volumes


def scans_to_evaluate(folder: Path, source: PublicSource | None) -> tuple[PretrainedPair, PublicScans]:
    """The study's public networks, and public scans to hold its release against.

    A patient counts if pretraining trained on none of the patient's scans, known by their masks. Without a
    source: simulated scans of all conditions, for the pair that ships.

    Raises:
        CoordinatorError: a public scan is not sound (every problem is named), or the recipe does not say what
            its networks were trained on.
        UsageError: the folder has no networks.
    """
    pair = read_pair(folder)
    recipe = pair.recipe
    preset = preset_named(str(recipe["preset"]))
    names = tuple(str(name) for name in recipe["conditions"])
    labels = tuple(str(name) for name in recipe["labels"])
    if source is None:
        fresh = public_phantoms(
            n_patients=CALIBRATION_PATIENTS,
            seed=EVALUATION_SEED,
            fractions={name: 1.0 / len(names) for name in names},
        )
        first = set(held_out_patients((volume.patient_id for volume in fresh), 0.5))
        return pair, PublicScans(
            held_out=[volume for volume in fresh if volume.patient_id in first],
            further=[volume for volume in fresh if volume.patient_id not in first],
            description="They are simulated, of patients that nobody trained on",
        )
    covariates = recipe_covariates(recipe)
    grid = CanonicalGrid(shape=preset.grid_shape, spacing_mm=preset.spacing_mm)
    volumes = read_public(source, grid, conditions=names, labels=labels, covariates=covariates)
    return pair, split_by_training(volumes, recipe)


def _calibrate(
    folder: Path,
    pair: PretrainedPair,
    volumes: list[PublicVolume],
    *,
    unseen: list[str] | None,
    copy_samples: int = 500,
    calibrate_attacks: bool = False,
    progress: Progress | None = None,
) -> None:
    recipe = pair.recipe
    advice = recipe.get("private_training", {})
    chosen = advice.get("chosen", {}) if isinstance(advice, dict) else {}
    guidance = float(chosen.get("guidance_scale", preset_named(str(recipe["preset"])).guidance_scale))
    kept = recipe.get("secondary_figures", {})
    save_calibration(
        folder,
        calibrate_public(
            preset_name=str(recipe["preset"]),
            conditions=[str(name) for name in recipe["conditions"]],
            covariates=recipe_covariates(recipe),
            labels=[str(name) for name in recipe["labels"]],
            autoencoder_path=pair.autoencoder_path,
            prior_path=pair.prior_path,
            copy_embedding_path=pair.copy_embedding_path,
            volumes=volumes,
            unseen=unseen,
            subset=str(chosen.get("trainable", "all")),
            copies=_kept_copy_calibration(recipe),
            copy_samples=copy_samples,
            attacks=usual_attacks(guidance_scale=guidance) if calibrate_attacks and not kept else (),
            progress=progress,
        )
        | ({"secondary_figures": kept} if kept else {}),
    )


def _kept_copy_calibration(recipe: dict[str, Any]) -> CopyCalibration | None:
    """The copy distance of a shipped pair, calibrated once; None where it has to be done now."""
    kept = recipe.get("copy_check")
    if kept is None:
        return None
    return CopyCalibration(**{field.name: kept[field.name] for field in fields(CopyCalibration)})
