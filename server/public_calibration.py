"""What a plan takes from public data alone: clip norm, audit edges, copy distance.

Everything here is computed from public volumes and public networks, before any hospital is asked, and goes
into the plan in clear. No hospital's scan may ever reach this module.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from privacy.audit.attacks import secondary_scores
from privacy.audit.copies import CopyCalibration, CopySpace, calibrate_copy_distance
from privacy.audit.membership import AttackNoise, attack_losses
from privacy.dp.patient_gradients import PatientGradients
from privacy.dp.patients import PatientScans
from privacy.secret_random import SecretRandom
from server.pretrain import PublicVolume
from shared.errors import CoordinatorError
from shared.home import write_private
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.conditioning import ConditionTable
from shared.model.copy_embedding import load_copy_embedding
from shared.model.denoiser import Denoiser, build_denoiser, parameter_subset
from shared.model.presets import preset_named
from shared.model.sampling import sample_latents
from shared.model.training import encode_batches
from shared.model.weights import load_weights
from shared.study_plan import CovariateClause, SecondaryAttackClause

CALIBRATION_FILE = "calibration.json"
FIGURE_QUANTILES = tuple(step / 10 for step in range(11))
"""Of each secondary attack's figures: what a calibration keeps."""

MOST_ATTACKED = 64
"""Public patients that the secondary attacks are measured on."""

_SAMPLING_BATCH = 32

Progress = Callable[[str, int, int], None]


def calibrate_public(
    *,
    preset_name: str,
    conditions: Sequence[str],
    covariates: Sequence[CovariateClause] = (),
    labels: Sequence[str],
    autoencoder_path: Path,
    prior_path: Path,
    copy_embedding_path: Path | None = None,
    volumes: Sequence[PublicVolume],
    unseen: Sequence[str] | None = None,
    subset: str = "all",
    timesteps: Sequence[float] = (0.2, 0.4, 0.6, 0.8),
    draws_per_timestep: int = 2,
    copies: CopyCalibration | None = None,
    copy_samples: int = 500,
    attacks: Sequence[SecondaryAttackClause] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Figures for ``plan new``.

    Args:
        copy_embedding_path: The copy check's embedding; None compares latents.
        volumes: Public scans on the canonical grid.
        copies: The copy distance, where it was calibrated before; None: now, against
            ``copy_samples`` samples of the prior.
        copy_samples: As many as an audit will check: with more of them, more patients come near one by
            chance.
        unseen: Public patients that the networks were not trained on; None: all of ``volumes``.
        subset: Which parameters the gradient norms are measured over.
        attacks: Secondary attacks that a plan may pool.

    Returns:
        ``public_losses`` (the prior's loss on each unseen public patient), ``copy_distance``,
        ``false_copy_rate`` (for audits of at most ``copy_samples`` samples), ``gradient_norms`` (quartiles
        over public patients), ``secondary_figures`` (see :func:`secondary_figures`).
    """
    preset = preset_named(preset_name)
    autoencoder = build_autoencoder(preset, n_labels=len(labels))
    load_weights(autoencoder, autoencoder_path)
    autoencoder.eval()
    table = ConditionTable(tuple(conditions), tuple(covariates))
    prior = build_denoiser(preset, n_conditions=len(table), covariate_sizes=table.covariate_sizes)
    load_weights(prior, prior_path)
    patients = public_patients(autoencoder, volumes, table)
    fresh = [p for p in patients if unseen is None or p.patient_key in set(unseen)]
    if len(fresh) < 3:
        raise CoordinatorError(
            f"{len(fresh)} public patients were held out of pretraining; calibration needs at least 3",
            remedy="declare more patients public",
        )
    latent_shape = preset.latent_shape(_grid(volumes))
    noise = AttackNoise.from_plan_digest(
        bytes(32), timesteps=timesteps, draws_per_timestep=draws_per_timestep, latent_shape=latent_shape
    )
    prior.eval()
    per_sample_loss = prior.diffusion.per_sample_loss
    losses = attack_losses(
        public_denoiser=prior, candidate_denoiser=prior, patients=fresh, noise=noise, loss=per_sample_loss
    )
    if copies is None:
        space = CopySpace(
            autoencoder=autoencoder, embedding=load_copy_embedding(copy_embedding_path, n_labels=len(labels))
        )
        unrelated = unrelated_samples(
            prior,
            copy_samples,
            n_conditions=len(conditions),
            latent_shape=latent_shape,
            progress=progress,
        )
        copies = calibrate_copy_distance(space, fresh, unrelated_NCDHW=unrelated, progress=progress)
    parameters = parameter_subset(prior, subset)
    secret = SecretRandom()
    norms = [
        float(
            np.linalg.norm(
                PatientGradients(
                    prior, parameters, per_sample_loss, clip=1.0, draws_per_patient=4
                ).mean_gradient([patient], secret)
            )
        )
        for patient in fresh[:16]
    ]
    return {
        "format": "lacuna/public-calibration/v1",
        "public_patients": len(patients),
        "unseen_patients": len(fresh),
        "public_losses": [round(float(value), 6) for value in losses.public_P],
        "copy_distance": copies.distance,
        "false_copy_rate": copies.false_copy_rate,
        "copy_samples": copies.n_samples,
        "subset": subset,
        "gradient_norms": [round(float(q), 5) for q in np.quantile(norms, [0.25, 0.5, 0.75])],
        "secondary_figures": secondary_figures(prior, fresh[:MOST_ATTACKED], attacks, progress=progress),
    }


def secondary_figures(
    prior: Denoiser,
    patients: Sequence[PatientScans],
    attacks: Sequence[SecondaryAttackClause],
    *,
    progress: Progress | None = None,
) -> dict[str, list[float]]:
    """By ``attack_id``: :data:`FIGURE_QUANTILES` of the attack's figure of public patients on the prior.

    Figures, not scores: the side that speaks for membership and the calibration are left out.
    """
    found = {}
    for attack in attacks:
        plain = attack.model_copy(update={"calibrated": False, "member_side": "high"})
        figures = secondary_scores(
            plain, prior, patients, public_denoiser=prior, plan_digest=bytes(32), progress=progress
        )
        quantiles = np.quantile(figures[np.isfinite(figures)], FIGURE_QUANTILES)
        found[attack.attack_id] = [float(f"{value:.6g}") for value in quantiles]
    return found


def unrelated_samples(
    prior: Denoiser,
    count: int,
    *,
    n_conditions: int,
    latent_shape: tuple[int, int, int, int],
    progress: Progress | None = None,
) -> torch.Tensor:
    """Samples of the public prior, all conditions in turn: copies of nobody in the calibration."""
    parts = []
    for first in range(0, count, _SAMPLING_BATCH):
        parts.append(
            sample_latents(
                prior,
                torch.arange(first, min(first + _SAMPLING_BATCH, count)) % n_conditions,
                steps=prior.preset.sampling_steps,
                guidance_scale=prior.preset.guidance_scale,
                seed=1,
                latent_shape=latent_shape,
                first_index=first,
            )
        )
        if progress is not None:
            progress("unrelated samples", min(first + _SAMPLING_BATCH, count), count)
    return torch.cat(parts)


def public_patients(
    autoencoder: LatentAutoencoder, volumes: Sequence[PublicVolume], table: ConditionTable
) -> list[PatientScans]:
    """Public volumes as latents, grouped by patient."""
    image = torch.from_numpy(np.stack([v.image for v in volumes]).astype(np.float32))[:, None]
    mask = torch.from_numpy(np.stack([v.mask for v in volumes]))
    z_NCDHW = encode_batches(autoencoder, image, mask)
    rows: dict[str, list[int]] = {}
    for row, volume in enumerate(volumes):
        rows.setdefault(volume.patient_id, []).append(row)
    return [
        PatientScans(
            patient_key=patient,
            latents_SCDHW=z_NCDHW[own],
            conditions_S=torch.tensor([volumes[row].class_index(table) for row in own]),
        )
        for patient, own in sorted(rows.items())
    ]


def save_calibration(folder: Path, value: dict[str, Any]) -> None:
    """Write calibration.json beside the public networks."""
    write_private(folder / CALIBRATION_FILE, json.dumps(value, indent=1).encode())


def load_calibration(folder: Path) -> dict[str, Any]:
    """Read calibration.json. Raises CoordinatorError."""
    try:
        value = json.loads((folder / CALIBRATION_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise CoordinatorError(
            f"{folder} has no public networks with their calibration", remedy="lacuna coordinator pretrain"
        ) from error
    if not isinstance(value, dict) or value.get("format") != "lacuna/public-calibration/v1":
        raise CoordinatorError(f"{folder / CALIBRATION_FILE} is damaged")
    needed = {"public_losses", "copy_distance", "false_copy_rate", "copy_samples", "gradient_norms"}
    missing = needed - set(value)
    if missing:
        raise CoordinatorError(
            f"{folder / CALIBRATION_FILE} is damaged: it lacks {', '.join(sorted(missing))}"
        )
    return value


def _grid(volumes: Sequence[PublicVolume]) -> tuple[int, int, int]:
    depth, height, width = volumes[0].image.shape
    return depth, height, width
