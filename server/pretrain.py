"""Pretraining on public volumes: the frozen autoencoder, the prior that the hospitals start from, the copy
check's embedding, and the segmenter that synthetic masks are held against.

The volumes are declared public by the coordinator; no member's scan may be among them. Patients, not scans,
are held out to choose the prior. A condition without a public volume gets a row in the embedding table all
the same, a copy of the most frequent seen condition's row: whatever a release knows of it was then learned
privately.

Also here: :func:`pretrain_micro`, which reproduces the pair that ships for the simulated volumes.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from server.public_segmenter import (
    SEGMENTER_AUGMENTATION,
    SEGMENTER_DISGUISES,
    default_segmenter_schedule,
    pretrain_segmenter,
)
from shared.checkpoint import file_sha256, load_tensors
from shared.errors import CoordinatorError
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.conditioning import ConditionTable
from shared.model.copy_embedding import Disguise, build_copy_embedding
from shared.model.denoiser import build_denoiser
from shared.model.maisi import fix_image_scale, load_image_autoencoder, load_image_denoiser
from shared.model.presets import ModelPreset, preset_named
from shared.model.shipped import (
    AUTOENCODER_FILE,
    PRIOR_FILE,
    RANGES_FILE,
    RECIPE_FILE,
    PretrainedPair,
)
from shared.model.training import (
    Augmentation,
    AutoencoderLossWeights,
    Progress,
    TrainingSchedule,
    augment,
    decode_batches,
    encode_batches,
    held_out_loss,
    local_std,
    train_autoencoder,
    train_copy_embedding,
    train_denoiser,
)
from shared.model.weights import load_weights, save_weights
from shared.plan_package import COPY_EMBEDDING_FILE, SEGMENTER_FILE
from shared.study_plan import CovariateClause
from shared.volumes import phantom
from shared.volumes.intensity import normalise_intensity
from shared.volumes.nifti import Spacing3
from shared.volumes.plausibility import MIN_SCANS, learn_ranges, write_ranges


@dataclass(frozen=True, kw_only=True)
class PublicVolume:
    """One public scan on the canonical grid.

    Attributes:
        patient_id: Scans of one patient are held out together.
        condition: One of the study's conditions.
        image: float32 [D, H, W] in [0, 1], normalised as the sites will normalise theirs.
        mask: uint8 [D, H, W], labels 0 (background) to the number of labels.
        covariates: Value of each of the study's covariates that is known.
    """

    patient_id: str
    condition: str
    image: NDArray[np.float32]
    mask: NDArray[np.uint8]
    covariates: Mapping[str, str] = field(default_factory=dict)

    def class_index(self, table: ConditionTable) -> int:
        """The integer of condition and covariates."""
        return table.class_index(self.condition, self.covariates)


WIDE_AUGMENTATION = Augmentation(zoom=(0.9, 1.4), stretch=0.08, shift=0.05)


@dataclass(frozen=True, kw_only=True)
class PretrainingRecipe:
    """Everything that decides the result besides the volumes.

    Attributes:
        autoencoder: Schedule of the autoencoder.
        prior: Schedule of the prior.
        copy_embedding: Schedule of the copy check's embedding.
        loss_weights: Terms of the autoencoder's loss.
        autoencoder_augmentation: Wide, so that the autoencoder can show shapes that are rare in public.
        prior_augmentation: Mild, so that the prior stays true to the public volumes.
        embedding_augmentation: Makes further "patients" for the embedding to tell apart.
        disguises: What a copy may have been through and must still be near.
        segmenter: Schedule of the segmenter; None, or too few volumes to learn ranges from, trains none.
        segmenter_augmentation, segmenter_disguises: What the segmenter has to cope with.
        copies: Augmented copies of each public volume whose latents the prior trains on.
        held_out_share: Share of public patients held out (at least one patient).
    """

    autoencoder: TrainingSchedule
    prior: TrainingSchedule
    copy_embedding: TrainingSchedule
    loss_weights: AutoencoderLossWeights = field(default_factory=AutoencoderLossWeights)
    autoencoder_augmentation: Augmentation = WIDE_AUGMENTATION
    prior_augmentation: Augmentation = field(default_factory=Augmentation)
    embedding_augmentation: Augmentation = field(default_factory=Augmentation)
    disguises: Disguise = field(default_factory=Disguise)
    segmenter: TrainingSchedule | None = None
    segmenter_augmentation: Augmentation = SEGMENTER_AUGMENTATION
    segmenter_disguises: Disguise = SEGMENTER_DISGUISES
    copies: int = 4
    held_out_share: float = 0.15

    def to_json(self) -> dict[str, Any]:
        """For the recipe's file; without a segmenter, nothing of one."""
        document = asdict(self)
        if self.segmenter is None:
            document = {key: value for key, value in document.items() if not key.startswith("segmenter")}
        return document


def default_recipe(preset: ModelPreset, *, seed: int) -> PretrainingRecipe:
    """Schedules that one core finishes in minutes (micro), two cores in about twenty minutes (tiny)."""
    if preset.name == "micro":
        return PretrainingRecipe(
            autoencoder=TrainingSchedule(
                steps=1800, batch_size=8, learning_rate=2e-3, seed=seed, ema_decay=0.99
            ),
            prior=TrainingSchedule(steps=1000, batch_size=64, learning_rate=2e-3, seed=seed),
            copy_embedding=TrainingSchedule(
                steps=600, batch_size=64, learning_rate=2e-3, seed=seed, ema_decay=0.98
            ),
        )
    return PretrainingRecipe(
        autoencoder=TrainingSchedule(steps=1500, batch_size=8, learning_rate=1e-3, seed=seed),
        prior=TrainingSchedule(steps=1200, batch_size=32, learning_rate=1e-3, seed=seed),
        copy_embedding=TrainingSchedule(
            steps=300, batch_size=32, learning_rate=2e-3, seed=seed, ema_decay=0.98
        ),
        autoencoder_augmentation=Augmentation(flip_axes=(2,), zoom=(0.85, 1.2), stretch=0.05, shift=0.08),
        prior_augmentation=Augmentation(flip_axes=(), zoom=(0.93, 1.07), stretch=0.03, shift=0.06),
        segmenter=default_segmenter_schedule(seed=seed),
        copies=24,
        held_out_share=0.2,
    )


def pretrain(
    *,
    preset: ModelPreset,
    volumes: Sequence[PublicVolume],
    conditions: Sequence[str],
    labels: Sequence[str],
    covariates: Sequence[CovariateClause] = (),
    out_dir: Path,
    recipe: PretrainingRecipe,
    data_description: str,
    spacing_mm: Spacing3 | None = None,
    image_autoencoder: Path | None = None,
    image_denoiser: Path | None = None,
    progress: Progress | None = None,
    resume: bool = True,
    device: str = "cpu",
) -> PretrainedPair:
    """Train autoencoder, prior and copy embedding on public volumes and write them with their recipe.

    Args:
        volumes: Public scans, all on one grid that fits the preset.
        conditions: The study's conditions in the plan's order; some may have no public volume.
        labels: Names of mask labels 1, 2, ... in the plan's order.
        covariates: What else the plan will declare; values without a public volume start as unknown.
        out_dir: Receives the three safetensors files (half precision), ``recipe.json``, and while training
            a resumable state under ``state/``.
        recipe: Schedules, losses, augmentation, public seeds.
        spacing_mm: Voxel size of the volumes; None is the preset's.
        image_autoencoder, image_denoiser: Public MAISI weights to start from (:mod:`shared.model.maisi`); the
            image's autoencoder then stays as it is.
        data_description: One line for the recipe: where the public volumes come from.
        resume: Continue a state of the same recipe in ``out_dir``; otherwise begin anew.
        device: Torch device to train on.

    Raises:
        CoordinatorError: volumes that do not fit each other or the plan, fewer than two patients, or a loss
            that stops being finite.
    """
    started = time.monotonic()
    table = ConditionTable(tuple(conditions), tuple(covariates))
    image_N1DHW, mask_NDHW, condition_N = _stack(volumes, table, len(labels), preset)
    held_out_N = _held_out_rows([volume.patient_id for volume in volumes], recipe.held_out_share)
    image_shape = image_N1DHW.shape[2:]
    state_dir = out_dir / "state"
    state_dir.mkdir(parents=True, exist_ok=True)
    fingerprint = _data_sha256(image_N1DHW, mask_NDHW, condition_N)
    states = {
        stage: state_dir / f"{stage}-{fingerprint[:16]}.safetensors"
        for stage in ("autoencoder", "prior", "copy-embedding", "segmenter")
    }
    if not resume:
        for path in states.values():
            path.unlink(missing_ok=True)

    autoencoder = build_autoencoder(preset, n_labels=len(labels), seed=recipe.autoencoder.seed).to(device)
    public_denoiser = None if image_denoiser is None else load_tensors(image_denoiser)[0]
    if image_autoencoder is not None:
        load_image_autoencoder(autoencoder, load_tensors(image_autoencoder)[0], what=str(image_autoencoder))
    train_autoencoder(
        autoencoder,
        image_N1DHW[~held_out_N],
        mask_NDHW[~held_out_N],
        schedule=recipe.autoencoder,
        weights=recipe.loss_weights,
        augmentation=recipe.autoencoder_augmentation,
        image_is_public=image_autoencoder is not None,
        progress=progress,
        state_path=states["autoencoder"],
    )
    if public_denoiser is not None:
        fix_image_scale(autoencoder, public_denoiser, what=str(image_denoiser))
    header = {"preset": preset.name, "labels": json.dumps(list(labels))}
    autoencoder_path = out_dir / AUTOENCODER_FILE
    save_weights(autoencoder, autoencoder_path, {**header, "network": "autoencoder"}, half=True)
    load_weights(autoencoder, autoencoder_path)

    z_MCDHW, condition_M = _augmented_latents(
        autoencoder, image_N1DHW[~held_out_N], mask_NDHW[~held_out_N], condition_N[~held_out_N], recipe
    )
    held_out_z = encode_batches(autoencoder, image_N1DHW[held_out_N], mask_NDHW[held_out_N])
    denoiser = build_denoiser(
        preset, n_conditions=len(table), covariate_sizes=table.covariate_sizes, seed=recipe.prior.seed
    ).to(device)
    if public_denoiser is not None:
        load_image_denoiser(
            denoiser, public_denoiser, spacing_mm=spacing_mm or preset.spacing_mm, what=str(image_denoiser)
        )
    history = train_denoiser(
        denoiser,
        z_MCDHW,
        condition_M,
        held_out_z,
        condition_N[held_out_N],
        schedule=recipe.prior,
        progress=progress,
        state_path=states["prior"],
    )
    embedding_path = out_dir / COPY_EMBEDDING_FILE
    pretrain_copy_embedding(
        embedding_path,
        autoencoder,
        image_N1DHW[~held_out_N],
        mask_NDHW[~held_out_N],
        _patient_numbers(volumes)[~held_out_N],
        recipe=recipe,
        metadata=header,
        progress=progress,
        state_path=states["copy-embedding"],
    )
    segmenter_path, agreement = None, None
    if recipe.segmenter is not None and len(volumes) >= MIN_SCANS:
        segmenter_path = out_dir / SEGMENTER_FILE
        agreement = pretrain_segmenter(
            segmenter_path,
            (image_N1DHW, mask_NDHW),
            decode_batches(autoencoder, encode_batches(autoencoder, image_N1DHW, mask_NDHW)),
            held_out_N,
            labels=labels,
            schedule=recipe.segmenter,
            augmentation=recipe.segmenter_augmentation,
            disguises=recipe.segmenter_disguises,
            metadata=header,
            device=device,
            progress=progress,
            state_path=states["segmenter"],
        )
    counts = Counter(volume.condition for volume in volumes)
    most_frequent = table.index_of(max(table.names, key=lambda name: counts[name]))
    unseen = [name for name in table.names if counts[name] == 0]
    for name in unseen:
        denoiser.copy_condition(source=most_frequent, target=table.index_of(name))
    for k, row in _unseen_covariates(table, volumes):
        denoiser.forget_covariate(covariate=k, row=row)
    prior_path = out_dir / PRIOR_FILE
    header["conditions"] = json.dumps(list(table.names))
    save_weights(denoiser, prior_path, {**header, "network": "prior"}, half=True)
    load_weights(denoiser, prior_path)

    networks = [AUTOENCODER_FILE, PRIOR_FILE, COPY_EMBEDDING_FILE]
    if segmenter_path is not None:
        networks.append(SEGMENTER_FILE)
    document = {
        "format": "lacuna/pretraining-recipe/v1",
        "preset": preset.name,
        "grid_shape": list(image_shape),
        "labels": list(labels),
        "conditions": list(table.names),
        "conditions_never_seen": unseen,
        "data": {
            "description": data_description,
            "scans": len(volumes),
            "patients": len({volume.patient_id for volume in volumes}),
            "held_out_patients": len({v.patient_id for v, h in zip(volumes, held_out_N, strict=True) if h}),
            "scans_by_condition": dict(sorted(counts.items())),
            "sha256": fingerprint,
            "trained_masks_sha256": sorted(
                {mask_sha256(v.mask) for v, held_out in zip(volumes, held_out_N, strict=True) if not held_out}
            ),
        },
        "recipe": recipe.to_json(),
        "parameters": {
            "autoencoder": sum(p.numel() for p in autoencoder.parameters()),
            "denoiser": sum(p.numel() for p in denoiser.parameters()),
            "copy_embedding": sum(p.numel() for p in build_copy_embedding(n_labels=len(labels)).parameters()),
        },
        "autoencoder_held_out": reconstruction_figures(
            autoencoder, image_N1DHW[held_out_N], mask_NDHW[held_out_N], labels
        ),
        "prior_held_out_loss": {
            "by_step": [[step, round(loss, 5)] for step, loss in history],
            "shipped_half_precision": round(held_out_loss(denoiser, held_out_z, condition_N[held_out_N]), 5),
        },
        "torch": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "wall_seconds_of_this_process": round(time.monotonic() - started, 1),
        "sha256": {name: file_sha256(out_dir / name) for name in networks},
    }
    if segmenter_path is not None and agreement is not None:
        document["segmenter_held_out"] = {"scans": agreement.scans, "least_dice": agreement.low}
    if image_autoencoder is not None or image_denoiser is not None:
        document["public_weights_sha256"] = {
            path.name: file_sha256(path) for path in (image_autoencoder, image_denoiser) if path is not None
        }
    if covariates:
        document["covariates"] = [covariate.model_dump(mode="json") for covariate in covariates]
        document["covariates_never_seen"] = [
            f"{covariates[k].name}: {covariates[k].describe(row)}"
            for k, row in _unseen_covariates(table, volumes)
        ]
    ranges = (
        learn_ranges(
            ((volume.image, volume.mask) for volume in volumes),
            labels=labels,
            spacing_mm=spacing_mm or preset.spacing_mm,
        )
        if len(volumes) >= MIN_SCANS
        else None
    )
    if ranges is not None:
        write_ranges(out_dir / RANGES_FILE, ranges.model_copy(update={"agreement": agreement}))
    write_recipe(out_dir / RECIPE_FILE, document)
    return PretrainedPair(
        autoencoder_path=autoencoder_path,
        prior_path=prior_path,
        copy_embedding_path=embedding_path,
        segmenter_path=segmenter_path,
        recipe=document,
    )


def pretrain_copy_embedding(
    path: Path,
    autoencoder: LatentAutoencoder,
    image_N1DHW: Tensor,
    mask_NDHW: Tensor,
    patient_N: Tensor,
    *,
    recipe: PretrainingRecipe,
    metadata: dict[str, str],
    progress: Progress | None = None,
    state_path: Path | None = None,
) -> None:
    """Train the copy check's embedding on public volumes as the autoencoder shows them, and write it.

    Args:
        path: Receives the weights (half precision).
        patient_N: Whose each volume is, int64.
        metadata: Goes into the file.
    """
    embedding = build_copy_embedding(n_labels=autoencoder.n_labels, seed=recipe.copy_embedding.seed)
    embedding.to(next(autoencoder.parameters()).device)
    seen_N1DHW, seen_NDHW = decode_batches(autoencoder, encode_batches(autoencoder, image_N1DHW, mask_NDHW))
    train_copy_embedding(
        embedding,
        seen_N1DHW,
        seen_NDHW,
        patient_N,
        schedule=recipe.copy_embedding,
        augmentation=recipe.embedding_augmentation,
        disguises=recipe.disguises,
        progress=progress,
        state_path=state_path,
    )
    save_weights(embedding, path, {**metadata, "network": "copy embedding"}, half=True)


def recipe_covariates(recipe: Mapping[str, Any]) -> tuple[CovariateClause, ...]:
    """The covariates that networks were trained with. Raises CoordinatorError if they are not sound."""
    try:
        return tuple(CovariateClause.model_validate(value) for value in recipe.get("covariates", []))
    except (TypeError, ValueError) as error:
        raise CoordinatorError(f"{RECIPE_FILE}: covariates are not sound: {error}") from error


def write_recipe(path: Path, document: dict[str, Any]) -> None:
    """Write a recipe as readable JSON, atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.replace(path)


@torch.no_grad()
def reconstruction_figures(
    autoencoder: LatentAutoencoder, image_N1DHW: Tensor, mask_NDHW: Tensor, labels: Sequence[str]
) -> dict[str, float]:
    """How well volumes survive encoding and decoding.

    Returns:
        ``l1`` (mean absolute error), ``texture`` (local standard deviation of the reconstruction over that of
        the original, where a mask is; 1 is as sharp), and per label ``dice_NAME`` (mean over volumes).
    """
    z_NCDHW = encode_batches(autoencoder, image_N1DHW, mask_NDHW)
    output_N1DHW, output_NDHW = decode_batches(autoencoder, z_NCDHW)
    inside = (mask_NDHW > 0)[:, None]
    figures = {
        "l1": float((output_N1DHW - image_N1DHW).abs().mean()),
        "texture": float(local_std(output_N1DHW)[inside].mean() / local_std(image_N1DHW)[inside].mean()),
    }
    for value, name in enumerate(labels, start=1):
        a, b = output_NDHW == value, mask_NDHW == value
        overlap_N = (2.0 * (a & b).sum(dim=(1, 2, 3)) + 1e-6) / (
            a.sum(dim=(1, 2, 3)) + b.sum(dim=(1, 2, 3)) + 1e-6
        )
        figures[f"dice_{name}"] = float(overlap_N.mean())
    return {name: round(value, 4) for name, value in figures.items()}


def public_phantoms(*, n_patients: int, seed: int, fractions: dict[str, float]) -> list[PublicVolume]:
    """Simulated scans as public volumes, normalised as a site normalises its own."""
    return [
        PublicVolume(
            patient_id=scan.patient_id,
            condition=scan.condition,
            image=normalise_intensity(scan.image),
            mask=scan.mask,
        )
        for scan in phantom.simulate_cohort(n_patients=n_patients, conditions_fractions=fractions, seed=seed)
    ]


MICRO_PATIENTS = 400
MICRO_DATA_SEED = 20_001
"""Seed of the public phantoms; the demo's hospitals simulate their patients from other seeds."""


def pretrain_micro(
    out_dir: Path,
    *,
    seed: int = 7,
    progress: Progress | None = None,
    resume: bool = True,
    steps_factor: float = 1.0,
) -> PretrainedPair:
    """Reproduce the pair that ships for the simulated volumes: public phantoms, no rare condition among them.

    ``steps_factor`` shortens the schedules (for tests).
    """
    preset = preset_named("micro")
    recipe = default_recipe(preset, seed=seed)
    recipe = replace(
        recipe,
        autoencoder=replace(recipe.autoencoder, steps=max(1, round(recipe.autoencoder.steps * steps_factor))),
        prior=replace(recipe.prior, steps=max(1, round(recipe.prior.steps * steps_factor))),
        copy_embedding=replace(
            recipe.copy_embedding, steps=max(1, round(recipe.copy_embedding.steps * steps_factor))
        ),
    )
    return pretrain(
        preset=preset,
        volumes=public_phantoms(
            n_patients=MICRO_PATIENTS, seed=MICRO_DATA_SEED, fractions={phantom.COMMON: 1.0}
        ),
        conditions=phantom.CONDITIONS,
        labels=phantom.LABELS,
        out_dir=out_dir,
        recipe=recipe,
        data_description=(
            f"simulated: {MICRO_PATIENTS} phantom patients of condition {phantom.COMMON!r} alone, "
            f"seed {MICRO_DATA_SEED}"
        ),
        progress=progress,
        resume=resume,
    )


def _stack(
    volumes: Sequence[PublicVolume], table: ConditionTable, n_labels: int, preset: ModelPreset
) -> tuple[Tensor, Tensor, Tensor]:
    if len({volume.patient_id for volume in volumes}) < 2:
        raise CoordinatorError(
            "pretraining needs at least two public patients, one of them held out",
            remedy="declare more patients public",
        )
    grid = volumes[0].image.shape
    if len(grid) != 3:
        raise CoordinatorError(f"public volumes must be [D, H, W], not {grid}")
    preset.latent_shape((grid[0], grid[1], grid[2]))
    for volume in volumes:
        where = f"public volume of patient {volume.patient_id!r}"
        if volume.image.shape != grid or volume.mask.shape != grid:
            raise CoordinatorError(f"{where}: image or mask is not on the others' grid {grid}")
        if not np.isfinite(volume.image).all() or volume.image.min() < 0 or volume.image.max() > 1:
            raise CoordinatorError(f"{where}: intensities are not in [0, 1]", remedy="normalise it first")
        if volume.mask.max() > n_labels:
            raise CoordinatorError(f"{where}: mask label {volume.mask.max()}, the plan has {n_labels}")
    image_N1DHW = torch.from_numpy(np.stack([volume.image for volume in volumes]).astype(np.float32))[:, None]
    mask_NDHW = torch.from_numpy(np.stack([volume.mask for volume in volumes]).astype(np.uint8))
    condition_N = torch.tensor([volume.class_index(table) for volume in volumes], dtype=torch.int64)
    return image_N1DHW, mask_NDHW, condition_N


def _unseen_covariates(table: ConditionTable, volumes: Sequence[PublicVolume]) -> list[tuple[int, int]]:
    """(covariate, row) of every value that no public volume has."""
    seen = {(k, row) for v in volumes for k, row in enumerate(table.covariate_rows(v.class_index(table)))}
    return [
        (k, row)
        for k, size in enumerate(table.covariate_sizes)
        for row in range(1, size + 1)
        if (k, row) not in seen
    ]


def held_out_patients(patient_ids: Iterable[str], share: float) -> list[str]:
    """Public patients that no training sees: those whose hash comes first, a share and at least one."""
    patients = sorted(set(patient_ids), key=lambda name: hashlib.sha256(name.encode()).digest())
    return patients[: max(1, min(len(patients) - 1, round(share * len(patients))))]


def _held_out_rows(patient_ids: Sequence[str], share: float) -> Tensor:
    chosen = set(held_out_patients(patient_ids, share))
    return torch.tensor([name in chosen for name in patient_ids])


def _patient_numbers(volumes: Sequence[PublicVolume]) -> Tensor:
    numbers = {name: i for i, name in enumerate(dict.fromkeys(volume.patient_id for volume in volumes))}
    return torch.tensor([numbers[volume.patient_id] for volume in volumes])


def _augmented_latents(
    autoencoder: LatentAutoencoder,
    image_N1DHW: Tensor,
    mask_NDHW: Tensor,
    condition_N: Tensor,
    recipe: PretrainingRecipe,
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(recipe.prior.seed)
    pieces = []
    for _ in range(recipe.copies):
        image, mask = augment(image_N1DHW, mask_NDHW, recipe.prior_augmentation, generator)
        pieces.append(encode_batches(autoencoder, image, mask))
    return torch.cat(pieces), condition_N.repeat(recipe.copies)


def mask_sha256(mask_DHW: NDArray[np.uint8]) -> str:
    """What a recipe calls a scan that it trained on, whatever its condition and the scans beside it."""
    return _data_sha256(torch.from_numpy(np.ascontiguousarray(mask_DHW, dtype=np.uint8)))


def _data_sha256(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
