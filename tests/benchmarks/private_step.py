"""One private step of the micro denoiser against a plain step on the same samples, one thread.

A step: 16 patients, 4 draws each, clipped per patient, summed, rounded and noised. The peer is a plain
forward and backward pass over the same 64 samples.
"""

from __future__ import annotations

import torch

from privacy.dp.calibration import propose_privacy
from privacy.dp.patients import PatientScans
from privacy.dp.trainer import PatientTrainer
from privacy.secret_random import SecretRandom
from shared.model.denoiser import build_denoiser, parameter_subset
from shared.model.diffusion import per_sample_loss, timesteps_from_uniform
from shared.model.presets import preset_named
from tests.benchmarks.measuring import median_seconds, ratio_table

PATIENTS, DRAWS = 16, 4


def run() -> str:
    """A table for each of the subsets ``conditioning`` and ``all``."""
    torch.set_num_threads(1)
    return "\n\n".join(_subset(name) for name in ("conditioning", "all"))


def _subset(name: str) -> str:
    preset = preset_named("micro")
    shape = preset.latent_shape(preset.grid_shape)
    generator = torch.Generator().manual_seed(0)
    patients = [
        PatientScans(
            patient_key=f"p{i}",
            latents_SCDHW=torch.randn((1, *shape), generator=generator),
            conditions_S=torch.tensor([i % 2]),
        )
        for i in range(PATIENTS)
    ]
    denoiser = build_denoiser(preset, n_conditions=2)
    parameters = parameter_subset(denoiser, name)
    proposed = propose_privacy(
        mode="distributed", epsilon=8.0, delta=1e-5, clip_norm=0.3, rounds=30, n_sites=3, threshold=3,
        max_colluding=1, dimension=sum(p.numel() for _, p in parameters), declared_patients=48,
        draws_per_patient=DRAWS,
    )  # fmt: skip
    trainer = PatientTrainer(
        denoiser,
        parameters,
        per_sample_loss,
        proposed.execution,
        SecretRandom(),
        draw_timesteps=timesteps_from_uniform,
    )
    plain = build_denoiser(preset, n_conditions=2)
    plain_parameters = [p for _, p in parameter_subset(plain, name)]
    z = torch.cat([p.latents_SCDHW for p in patients]).repeat(DRAWS, 1, 1, 1, 1)
    condition = torch.cat([p.conditions_S for p in patients]).repeat(DRAWS)

    def plain_step() -> None:
        t = torch.rand(len(z), generator=generator)
        noise = torch.randn(z.shape, generator=generator)
        loss = per_sample_loss(plain, z, condition, t, noise).mean()
        torch.autograd.grad(loss, plain_parameters)

    seconds = median_seconds(
        {"plain step": plain_step, "private step": lambda: trainer.distributed_update(patients)}, repeats=5
    )
    return ratio_table(
        f"micro, subset {name}, {PATIENTS} patients x {DRAWS} draws", seconds, base="plain step"
    )
