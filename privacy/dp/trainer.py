"""What a site computes in one attempt: an integer vector, ready to be masked.

One object holds the network, the execution plan and the site's secret randomness for the whole study, so that
nothing is set up anew (and no past forgotten) between rounds. The ledger's charge is made by the agent,
before it calls any of these; the trainer cannot spend another noise than the plan's.

Trainable weights are assigned by the caller before each call and are the same after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.noise import noise_share
from privacy.dp.patient_gradients import (
    NamedParameters,
    PatientGradients,
    Performance,
    PerSampleLoss,
    Progress,
)
from privacy.dp.patient_sampling import TimestepDraw, sample_patients, uniform_timesteps
from privacy.dp.patients import PatientScans
from privacy.dp.quantization import quantize
from privacy.dp.sensitivity import MAX_PATIENTS_PER_SITE
from privacy.secret_random import SecretRandom
from shared.errors import InternalError, PeerError, SiteError, UsageError
from shared.study_plan import Mode

ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


class PatientTrainer:
    """Updates of one site under one execution plan.

    Args:
        denoiser: The network, on ``device``.
        params: Trained parameters with their names, in the order of the vector.
        loss: Per-sample loss (see :class:`privacy.dp.patient_gradients.PerSampleLoss`).
        execution_plan: The checked plan; the only source of clip norm, rates and noise.
        secret: The site's secret randomness.
        performance: Backend, microbatch and precision: the site's own business.
        draw_timesteps: Inverse distribution function of the timesteps.
        progress: For the site's own screen; sees private counts.

    Raises:
        UsageError: the parameters do not have the plan's dimension, or the randomness is not secret.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        params: NamedParameters,
        loss: PerSampleLoss,
        execution_plan: ExecutionPlan,
        secret: SecretRandom,
        *,
        device: str | torch.device = "cpu",
        performance: Performance | None = None,
        draw_timesteps: TimestepDraw = uniform_timesteps,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(secret, SecretRandom):
            raise UsageError("the trainer's randomness is SecretRandom, never a seeded generator")
        self._plan, self._secret, self._params = execution_plan, secret, list(params)
        self._draw_timesteps, self._progress = draw_timesteps, progress
        self._gradients = PatientGradients(
            denoiser,
            params,
            loss,
            clip=execution_plan.clip,
            draws_per_patient=execution_plan.draws_per_patient,
            performance=performance,
            device=device,
        )
        if self._gradients.dimension != execution_plan.dimension:
            raise UsageError(
                f"the trained parameters have {self._gradients.dimension} numbers, the plan says "
                f"{execution_plan.dimension}"
            )

    def distributed_update(self, patients: Sequence[PatientScans]) -> NDArray[np.int64]:
        """Mode ``distributed``: clipped sum, rounded and clamped, plus this site's share of noise.

        Formal guarantee: the sum of this vector over t sites, of which t - c keep their noise to
        themselves, is covered by ``execution_plan.training_event()``.

        Args:
            patients: All members at the site; who takes part is drawn here.

        Returns:
            int64 [d], in steps of the plan's grid. Noised also where nobody takes part.
        """
        self._check("distributed", patients)
        return self._noised_sum(patients)

    def local_update(self, patients: Sequence[PatientScans], *, steps: int) -> NDArray[np.int64]:
        """Mode ``local``: ``steps`` noisy steps (Adam on noised means) from the given weights.

        Formal guarantee: each step is one Gaussian step of ``execution_plan.training_event()``, which charges
        all of them; optimizer, difference and rounding are post-processing.

        Returns:
            int64 [d]: the change of the weights, clamped, in steps of the plan's grid.
        """
        self._check("local", patients)
        if steps != self._plan.local_steps:
            raise InternalError(f"{steps} local steps asked for, {self._plan.local_steps} charged")
        scale = self._plan.gradient_grid_step / self._plan.local_divisor

        def gradient() -> NDArray[np.float64]:
            return self._noised_sum(patients).astype(np.float64) * scale

        return self._local_change(gradient, steps)

    def unprotected_update(self, patients: Sequence[PatientScans], *, steps: int) -> NDArray[np.int64]:
        """Mode ``unprotected``: ``steps`` plain Adam steps on the mean gradient. No guarantee whatever.

        Returns:
            int64 [d], as :meth:`local_update`.
        """
        self._check("unprotected", patients)

        def gradient() -> NDArray[np.float64]:
            chosen = self._chosen(patients)
            return self._gradients.mean_gradient(
                chosen, self._secret, draw_timesteps=self._draw_timesteps, progress=self._progress
            )

        return self._local_change(gradient, steps)

    def _noised_sum(self, patients: Sequence[PatientScans]) -> NDArray[np.int64]:
        total_d = self._gradients.clipped_sum(
            self._chosen(patients),
            self._secret,
            draw_timesteps=self._draw_timesteps,
            progress=self._progress,
        )
        plan = self._plan
        clamp = plan.clamp_steps if plan.mode == "distributed" else None
        steps_d = quantize(total_d, grid_step=plan.gradient_grid_step, clamp_steps=clamp)
        return steps_d + noise_share(plan, self._secret)

    def _chosen(self, patients: Sequence[PatientScans]) -> list[PatientScans]:
        chosen = sample_patients(
            self._secret, sampling_rate=self._plan.sampling_rate, n_patients=len(patients)
        )
        return [patients[index] for index in chosen]

    def _local_change(self, gradient: Callable[[], NDArray[np.float64]], steps: int) -> NDArray[np.int64]:
        """Adam (Kingma and Ba 2015) with fresh moments, the weights restored at the end."""
        start_d = self._weights()
        weights_d, first_d, second_d = start_d.copy(), np.zeros_like(start_d), np.zeros_like(start_d)
        try:
            for step in range(1, steps + 1):
                gradient_d = gradient()
                first_d += (1.0 - ADAM_BETAS[0]) * (gradient_d - first_d)
                second_d += (1.0 - ADAM_BETAS[1]) * (gradient_d**2 - second_d)
                mean_d = first_d / (1.0 - ADAM_BETAS[0] ** step)
                spread_d = np.sqrt(second_d / (1.0 - ADAM_BETAS[1] ** step)) + ADAM_EPSILON
                weights_d -= self._plan.local_learning_rate * mean_d / spread_d
                self._assign(weights_d)
        finally:
            self._assign(start_d)
        plan = self._plan
        return quantize(weights_d - start_d, grid_step=plan.grid_step, clamp_steps=plan.clamp_steps)

    def _check(self, mode: Mode, patients: Sequence[PatientScans]) -> None:
        if self._plan.mode != mode:
            raise InternalError(f"a {mode} update was asked for under a plan in mode {self._plan.mode}")
        if len({patient.patient_key for patient in patients}) != len(patients):
            raise SiteError("a patient stands twice in the list of members; the patient is the unit")
        if len(patients) > MAX_PATIENTS_PER_SITE:
            raise SiteError(f"more than {MAX_PATIENTS_PER_SITE} patients at one site are not supported")
        for name, p in self._params:
            if not bool(torch.isfinite(p.detach()).all()):
                raise PeerError(f"the weights received for {name!r} are not finite")

    def _weights(self) -> NDArray[np.float64]:
        flat = torch.cat([p.detach().flatten().to(torch.float64) for _, p in self._params])
        return flat.cpu().numpy().copy()

    def _assign(self, weights_d: NDArray[np.float64]) -> None:
        start = 0
        with torch.no_grad():
            for _, p in self._params:
                piece = torch.from_numpy(weights_d[start : start + p.numel()])
                p.copy_(piece.view(p.shape).to(p.device, p.dtype))
                start += p.numel()
