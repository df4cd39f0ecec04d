"""Which parameters should train privately? A measurement on simulated patients, before any hospital is asked.

Central simulation of a study in mode ``distributed``: the clipped sum over all patients, Gaussian noise of
the variance that all sites' shares add up to, the server's Adam and EMA. Secure aggregation and the integer
grid change none of these figures visibly and are left out; so is every guarantee. The randomness is seeded
and public: this module must never see a real patient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from torch import Tensor

from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.denoiser import (
    Denoiser,
    NamedParameters,
    assign,
    build_denoiser,
    flatten,
    parameter_subset,
)
from shared.model.diffusion import timesteps_from_normal
from shared.model.presets import preset_named
from shared.model.sampling import generate_volumes
from shared.model.shipped import shipped_pair
from shared.model.training import encode_batches
from shared.model.weights import load_weights
from shared.volumes.intensity import normalise_intensity
from shared.volumes.phantom import (
    COMMON,
    CONDITIONS,
    LABELS,
    RARE,
    PhantomScan,
    lesion_contrast,
    lesion_volume_mm3,
    simulate_cohort,
)


@dataclass(frozen=True, kw_only=True)
class StudySetting:
    """One private training, as a plan would describe it.

    Attributes:
        subset: Which parameters train.
        clip_norm: C.
        learning_rate: Of the server's Adam (betas 0.9 and 0.999).
        ema_decay: Of the server's moving average.
        rounds: T, one step each.
        draws_per_patient: Draws of (scan, timestep, noise) averaged into one patient's gradient.
        noise_multiplier: sigma: what t - c honest shares add up to, in units of C. 0 for none.
        shares_ratio: m / (t - c): all m sites add a share, so the sum has more noise than is accounted for.
        declared_patients: The public constant that sums are divided by.
        seed: Public seed of the simulation.
    """

    subset: str
    clip_norm: float
    learning_rate: float
    noise_multiplier: float
    ema_decay: float = 0.9
    rounds: int = 30
    draws_per_patient: int = 4
    shares_ratio: float = 1.5
    declared_patients: int = 120
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class StudyOutcome:
    """What one simulated training did.

    Attributes:
        dimension: d, the number of parameters that trained.
        median_norm: Median gradient norm of a patient in the first round (private in a real study).
        held_out_loss_rare: Flow loss on unseen rare patients, averaged weights, by round evaluated.
        seconds_per_round: Wall time of one round for all patients.
    """

    dimension: int
    median_norm: float
    held_out_loss_rare: list[tuple[int, float]] = field(default_factory=list)
    seconds_per_round: float = 0.0


@dataclass(frozen=True, kw_only=True)
class SimulatedPatient:
    """Latents of one patient's scans, [S, C, D, H, W], and the condition's row."""

    z_SCDHW: Tensor
    condition: int


def encode_patients(autoencoder: LatentAutoencoder, scans: Sequence[PhantomScan]) -> list[SimulatedPatient]:
    """Group simulated scans by patient and encode them."""
    image = torch.from_numpy(np.stack([normalise_intensity(scan.image) for scan in scans]))[:, None]
    mask = torch.from_numpy(np.stack([scan.mask for scan in scans]))
    z = encode_batches(autoencoder, image, mask)
    rows: dict[str, list[int]] = {}
    for row, scan in enumerate(scans):
        rows.setdefault(scan.patient_id, []).append(row)
    return [
        SimulatedPatient(z_SCDHW=z[own], condition=CONDITIONS.index(scans[own[0]].condition))
        for own in rows.values()
    ]


def train_privately(
    denoiser: Denoiser,
    patients: Sequence[SimulatedPatient],
    setting: StudySetting,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    evaluate_every: int = 10,
) -> StudyOutcome:
    """Train ``denoiser`` in place; it ends with the averaged weights.

    Args:
        held_out: Latents and conditions of unseen patients, for the outcome's loss.
    """
    rng = np.random.default_rng([setting.seed, 0x5357])
    params = parameter_subset(denoiser, setting.subset)
    hooked = GradSampleModule(denoiser, loss_reduction="sum")
    vector = flatten(params).astype(np.float64)
    average = vector.copy()
    first, second = np.zeros_like(vector), np.zeros_like(vector)
    outcome = StudyOutcome(dimension=vector.size, median_norm=0.0)
    noise_std = setting.noise_multiplier * setting.clip_norm * math.sqrt(setting.shares_ratio)
    median, seconds, losses = 0.0, 0.0, []
    for step in range(1, setting.rounds + 1):
        started = time.monotonic()
        total, norms = clipped_gradient_sum(hooked, params, patients, setting, rng)
        if step == 1:
            median = float(np.median(norms))
        seconds += time.monotonic() - started
        gradient = (total + noise_std * rng.standard_normal(vector.size)) / setting.declared_patients
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        vector -= (
            setting.learning_rate * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        )
        average = setting.ema_decay * average + (1.0 - setting.ema_decay) * vector
        if held_out is not None and (step % evaluate_every == 0 or step == setting.rounds):
            assign(params, average)
            losses.append((step, flow_loss(denoiser, *held_out)))
        assign(params, vector)
    assign(params, average)
    hooked.remove_hooks()
    return StudyOutcome(
        dimension=outcome.dimension,
        median_norm=median,
        held_out_loss_rare=losses,
        seconds_per_round=seconds / setting.rounds,
    )


def clipped_gradient_sum(
    hooked: GradSampleModule,
    params: NamedParameters,
    patients: Sequence[SimulatedPatient],
    setting: StudySetting,
    rng: np.random.Generator,
    *,
    patients_per_batch: int = 20,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum over patients of their clipped gradients [d], and the norms before clipping."""
    draws = setting.draws_per_patient
    loss = hooked._module.diffusion.per_sample_loss
    total = np.zeros(sum(parameter.numel() for _, parameter in params))
    norms = []
    for i in range(0, len(patients), patients_per_batch):
        batch = patients[i : i + patients_per_batch]
        z_BCDHW = torch.stack(
            [p.z_SCDHW[int(rng.integers(p.z_SCDHW.shape[0]))] for p in batch for _ in range(draws)]
        )
        condition_B = torch.tensor([p.condition for p in batch for _ in range(draws)])
        t_B = timesteps_from_normal(torch.from_numpy(rng.standard_normal(len(condition_B), np.float32)))
        noise = torch.from_numpy(rng.standard_normal(tuple(z_BCDHW.shape), np.float32))
        hooked.zero_grad(set_to_none=True)
        loss_B = loss(hooked, z_BCDHW, condition_B, t_B, noise)
        loss_B.sum().backward()
        gradient_Pd = torch.cat(
            [
                parameter.grad_sample.view(len(batch), draws, -1).mean(dim=1)  # type: ignore[attr-defined]
                for _, parameter in params
            ],
            dim=1,
        )
        norm_P = gradient_Pd.norm(dim=1)
        factor_P = (setting.clip_norm / norm_P.clamp_min(1e-12)).clamp_max(1.0)
        total += (factor_P @ gradient_Pd).double().numpy()
        norms.append(norm_P.double().numpy())
        for _, parameter in params:
            parameter.grad_sample = None  # type: ignore[attr-defined]
    return total, np.concatenate(norms)


@torch.no_grad()
def flow_loss(denoiser: Denoiser, z_NCDHW: Tensor, condition_N: Tensor, *, draws: int = 6) -> float:
    """Mean flow loss at fixed timesteps and noise."""
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for _ in range(draws):
        t_N = timesteps_from_normal(torch.randn(z_NCDHW.shape[0], generator=generator))
        noise = torch.randn(z_NCDHW.shape, generator=generator)
        total += float(denoiser.diffusion.per_sample_loss(denoiser, z_NCDHW, condition_N, t_N, noise).mean())
    return total / draws


@dataclass(frozen=True, kw_only=True)
class LesionFigures:
    """Lesion properties of a set of volumes: one value per volume (contrast NaN where there is no lesion)."""

    volume_mm3: NDArray[np.float64]
    contrast: NDArray[np.float64]


def generated_lesions(
    autoencoder: LatentAutoencoder,
    denoiser: Denoiser,
    *,
    condition: int,
    count: int,
    seed: int,
    grid_shape: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> LesionFigures:
    """Lesion properties of generated volumes, measured on the generated masks."""
    pairs = [
        (image.numpy(), mask.numpy())
        for image, mask in generate_volumes(
            autoencoder,
            denoiser,
            condition=condition,
            count=count,
            seed=seed,
            grid_shape=grid_shape,
            steps=steps,
            guidance_scale=guidance_scale,
            batch_size=50,
        )
    ]
    return LesionFigures(
        volume_mm3=np.array([lesion_volume_mm3(mask, spacing_mm) for _, mask in pairs]),
        contrast=np.array([lesion_contrast(image, mask) for image, mask in pairs]),
    )


@dataclass(frozen=True, kw_only=True)
class PropertyShift:
    """Difference of means, release minus prior, with its 95% bootstrap interval."""

    difference: float
    low: float
    high: float


def property_shift(
    prior: NDArray[np.float64], release: NDArray[np.float64], *, seed: int = 0, resamples: int = 4000
) -> PropertyShift:
    """Shift of a property's mean between two sets of samples (unpaired percentile bootstrap, 95%)."""
    rng = np.random.default_rng(seed)
    a = rng.choice(prior, size=(resamples, prior.size)).mean(axis=1)
    b = rng.choice(release, size=(resamples, release.size)).mean(axis=1)
    low, high = np.percentile(b - a, [2.5, 97.5])
    return PropertyShift(difference=float(release.mean() - prior.mean()), low=float(low), high=float(high))


MEMBERS_SEED, UNSEEN_SEED, TRUTH_SEED, SAMPLES_SEED = 501, 777, 778, 9
"""Public seeds of the measurement whose table stands beside the micro weights."""


def measure_micro(
    setting: StudySetting, *, samples: int = 200, guidance_scale: float = 1.0
) -> dict[str, Any]:
    """One row of the table beside the shipped micro pair.

    120 simulated patients, half of them rare, train the shipped prior as ``setting`` says; then ``samples``
    volumes of the rare condition are generated from prior and result, from the same noise, and the lesion
    volumes of their masks are compared.
    """
    pair, preset = shipped_pair("micro"), preset_named("micro")
    autoencoder = build_autoencoder(preset, n_labels=len(LABELS))
    load_weights(autoencoder, pair.autoencoder_path)
    denoiser = build_denoiser(preset, n_conditions=len(CONDITIONS))
    load_weights(denoiser, pair.prior_path)
    rare = CONDITIONS.index(RARE)
    unseen = encode_patients(
        autoencoder, simulate_cohort(n_patients=60, conditions_fractions={RARE: 1.0}, seed=UNSEEN_SEED)
    )
    z_NCDHW = torch.cat([patient.z_SCDHW for patient in unseen])
    held_out = (z_NCDHW, torch.full((z_NCDHW.shape[0],), rare))
    truth = simulate_cohort(n_patients=100, conditions_fractions={RARE: 1.0}, seed=TRUTH_SEED)
    members = encode_patients(
        autoencoder,
        simulate_cohort(n_patients=120, conditions_fractions={COMMON: 0.5, RARE: 0.5}, seed=MEMBERS_SEED),
    )

    def volumes() -> NDArray[np.float64]:
        return generated_lesions(
            autoencoder,
            denoiser,
            condition=rare,
            count=samples,
            seed=SAMPLES_SEED,
            grid_shape=preset.grid_shape,
            spacing_mm=preset.spacing_mm,
            guidance_scale=guidance_scale,
        ).volume_mm3

    before, loss_before = volumes(), flow_loss(denoiser, *held_out)
    outcome = train_privately(denoiser, members, setting, held_out=held_out)
    after = volumes()
    return {
        "setting": asdict(setting),
        "guidance_scale": guidance_scale,
        "dimension": outcome.dimension,
        "median_norm": outcome.median_norm,
        "seconds_per_round": outcome.seconds_per_round,
        "rare_flow_loss": [loss_before, outcome.held_out_loss_rare[-1][1]],
        "mean_lesion_mm3": {
            "prior": float(before.mean()),
            "trained": float(after.mean()),
            "simulated_truth": float(np.mean([lesion_volume_mm3(s.mask, preset.spacing_mm) for s in truth])),
        },
        "shift_mm3": asdict(property_shift(before, after)),
        "without_lesion": [float((before == 0).mean()), float((after == 0).mean())],
    }
