"""The sum, over patients, of each patient's clipped gradient: exact, microbatched, nothing left hooked.

For each patient the loss is averaged over K draws of (scan, timestep, noise); the gradient of that mean, over
all trained parameters together, is scaled to norm at most C: one factor for all that a patient contributes,
never one per scan or draw (noise multiplicity, De et al. 2022, and user-level grouping in one). Where the
gradients come from is a backend, a performance setting of the site alone:

- ``engine`` (default): book-keeping, :mod:`privacy.dp.book_keeping`;
- ``opacus`` and ``functorch``: Opacus' per-sample gradients, :mod:`privacy.dp.opacus_gradients`.

Formal guarantees, whatever the backend:

- Adding or removing one patient changes the returned sum by at most C (1 + eta) plus the summation error of
  :mod:`privacy.dp.sensitivity`: norms and sums are binary64, measured on the numbers that are added.
- A patient's own gradient depends on that patient alone. Layers that mix samples are refused (batch
  normalisation by name, anything else by :meth:`PatientGradients.verify`); and each microbatch is filled up
  with empty patients to one public size, so that the same kernels run whatever the number of patients.
- A patient whose gradient is not finite contributes exactly zero.

A parameter that the backend did not see (used outside its layer's forward, not used at all) is an error that
names it: silently skipped, it would be released without clipping or stay untrained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from privacy.dp.book_keeping import BookKeeping
from privacy.dp.clipping import clip_factors
from privacy.dp.layer_gradients import UnsupportedLayerError
from privacy.dp.microbatch_gradients import ClippedTotal, MicrobatchGradients
from privacy.dp.patient_sampling import PatientDraws, TimestepDraw, draw_for_patient, uniform_timesteps
from privacy.dp.patients import PatientScans
from privacy.secret_random import SecretRandom
from shared.errors import InternalError, UsageError

NamedParameters = Sequence[tuple[str, nn.Parameter]]
Progress = Callable[[int, int], None]
"""Called with (patients done, patients in this step). It is private: for the site's own screen alone."""

Backend = Literal["engine", "opacus", "functorch"]

MICROBATCH_BYTES = {"cpu": 256 * 2**20, "cuda": 4 * 2**30}
"""Default bound on the memory of one microbatch's gradients, if each patient's is kept whole."""

MAX_DEFAULT_SAMPLES = {"cpu": 32, "cuda": 128}
"""Default bound on the samples (patients times draws) of one forward pass; at least one patient."""

VERIFY_TOLERANCE = {None: 1e-3, torch.bfloat16: 0.25}
"""Relative error allowed between a backend's gradients and a batch of one, per parameter, in float32 and
under bfloat16 autocast (where a batch of one rounds differently; a wrong rule is off by about 1)."""


class PerSampleLoss(Protocol):
    """Loss of each sample, shape [B]; sample i's loss depends on row i of the arguments alone."""

    def __call__(
        self, denoiser: Any, z_BCDHW: Tensor, condition_B: Tensor, t_B: Tensor, noise_BCDHW: Tensor, /
    ) -> Tensor: ...


class GradientSource(Protocol):
    """A backend at work on one network."""

    def hooked(self) -> Any:
        """Context manager: the network to call, hooked; afterwards as it was."""

    def collect(self) -> MicrobatchGradients:
        """Per-patient gradients after one backward pass of (sum of losses) / K."""

    def paused(self) -> Any:
        """Context manager within :meth:`hooked`: plain autograd for the trained parameters."""


@dataclass(frozen=True, kw_only=True)
class Performance:
    """How a site computes; no privacy depends on it, and it is never part of a plan.

    Attributes:
        backend: Where per-patient gradients come from.
        microbatch: Patients of one forward pass; None: what fits into the default bounds. The result depends
            on it by float error alone.
        draws_per_pass: Draws of each patient in one forward pass, a divisor of the draws per patient; None:
            all of them. A patient's gradient adds up over passes before it is measured, so that memory is
            bounded also where one patient's draws alone do not fit.
        autocast: Lower precision of forward and backward pass (torch.bfloat16), or None. Clipping is as exact
            as ever: norms and sums are of the numbers that come out, in binary64.
    """

    backend: Backend = "engine"
    microbatch: int | None = None
    draws_per_pass: int | None = None
    autocast: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.backend not in ("engine", "opacus", "functorch"):
            raise UsageError(f"no such backend: {self.backend!r}", remedy="engine, opacus or functorch")
        if self.microbatch is not None and self.microbatch < 1:
            raise UsageError("a microbatch has at least one patient")
        if self.autocast not in VERIFY_TOLERANCE:
            raise UsageError(f"autocast to {self.autocast} is not supported", remedy="torch.bfloat16 or None")


class PatientGradients:
    """Clipped sums for one network and one list of trained parameters. Keeps nothing between calls.

    Args:
        denoiser: The network; hooked only while a sum is computed, then as before.
        params: Trained parameters in the order of the result; everything else is frozen during a call.
        loss: The per-sample loss.
        clip: C.
        draws_per_patient: K.
        performance: Backend, microbatch, precision.
        device: Where the network is.

    Raises:
        UsageError: the list of parameters is empty, names one twice or one that is not the network's.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        params: NamedParameters,
        loss: PerSampleLoss,
        *,
        clip: float,
        draws_per_patient: int,
        performance: Performance | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        self._denoiser, self._params, self._loss = denoiser, list(params), loss
        self._clip, self._draws, self._device = clip, draws_per_patient, torch.device(device)
        own = {id(p) for p in denoiser.parameters()}
        if not self._params or len({id(p) for _, p in self._params}) != len(self._params):
            raise UsageError("the list of trained parameters is empty, or names one twice")
        if missing := [name for name, p in self._params if id(p) not in own]:
            raise UsageError(f"trained parameters {missing[:5]} are not in the network")
        self.dimension = sum(p.numel() for _, p in self._params)
        self._dtype = self._params[0][1].dtype
        self._performance = performance or Performance()
        self._microbatch = self._performance.microbatch or self._default_microbatch()
        self._pass = self._performance.draws_per_pass or draws_per_patient
        if self._pass < 1 or draws_per_patient % self._pass:
            raise UsageError(
                f"{self._pass} draws in a pass do not divide a patient's {draws_per_patient}",
                remedy="choose a divisor for draws_per_pass",
            )
        self._verified = False

    def _default_microbatch(self) -> int:
        kind = self._device.type if self._device.type in MICROBATCH_BYTES else "cpu"
        row_bytes = self.dimension * self._params[0][1].element_size()
        if self._performance.backend != "engine":
            row_bytes *= self._draws
        return max(1, min(MAX_DEFAULT_SAMPLES[kind] // self._draws, MICROBATCH_BYTES[kind] // row_bytes))

    def clipped_sum(
        self,
        patients: Sequence[PatientScans],
        secret: SecretRandom,
        *,
        draw_timesteps: TimestepDraw = uniform_timesteps,
        progress: Progress | None = None,
    ) -> NDArray[np.float64]:
        """Sum of the patients' clipped gradients, float64 [d]; zeros for no patients.

        Draws are taken patient by patient, so that they do not depend on the microbatch.

        Raises:
            UnsupportedLayerError: a parameter without proper per-patient gradients (whatever the data).
        """
        total = ClippedTotal(torch.zeros(self.dimension, dtype=torch.float64, device=self._device))
        if not patients:
            return total.vector().cpu().numpy()
        with self._hooked() as (source, network):
            if not self._verified:
                self.verify(source, network, tuple(patients[0].latents_SCDHW.shape[1:]))
                self._verified = True
            for start in range(0, len(patients), self._microbatch):
                group = patients[start : start + self._microbatch]
                draws = self._draw(group, secret, draw_timesteps)
                gradients = self._microbatch_gradients(source, network, *self._batch(group, draws))
                factors_P = clip_factors(gradients.squared_norms(), self._clip)
                factors_P[len(group) :] = 0.0
                gradients.add_scaled(total, factors_P)
                if progress is not None:
                    progress(start + len(group), len(patients))
        return total.vector().cpu().numpy()

    def mean_gradient(
        self,
        patients: Sequence[PatientScans],
        secret: SecretRandom,
        *,
        draw_timesteps: TimestepDraw = uniform_timesteps,
        progress: Progress | None = None,
    ) -> NDArray[np.float64]:
        """Mode ``unprotected``: mean over the patients of their mean losses' gradients, float64 [d],
        unclipped.

        Zeros for no patients.
        """
        total_d = np.zeros(self.dimension)
        was_trained = [p.requires_grad for _, p in self._params]
        for _, p in self._params:
            p.requires_grad_(True)
        try:
            for start in range(0, len(patients), self._microbatch):
                group = patients[start : start + self._microbatch]
                draws = self._draw(group, secret, draw_timesteps)
                rows = len(group) * self._draws
                loss_B = self._loss(self._denoiser, *(x[:rows] for x in self._batch(group, draws)))
                grads = torch.autograd.grad(loss_B.sum() / self._draws, [p for _, p in self._params])
                total_d += torch.cat([g.flatten().to(torch.float64) for g in grads]).cpu().numpy()
                if progress is not None:
                    progress(start + len(group), len(patients))
        finally:
            for (_, p), flag in zip(self._params, was_trained, strict=True):
                p.requires_grad_(flag)
        return total_d / max(len(patients), 1)

    def _draw(
        self, group: Sequence[PatientScans], secret: SecretRandom, draw_timesteps: TimestepDraw
    ) -> list[PatientDraws]:
        return [
            draw_for_patient(
                secret,
                n_scans=patient.n_scans,
                latent_shape=tuple(patient.latents_SCDHW.shape[1:]),
                draws=self._draws,
                draw_timesteps=draw_timesteps,
            )
            for patient in group
        ]

    def verify(self, source: GradientSource, network: Any, latent_shape: tuple[int, ...]) -> None:
        """Hold the backend's gradients of this network against batches of one patient, on made-up latents.

        Runs once, before the first private sample, on public input; so no private value can make it fail.

        Raises:
            UnsupportedLayerError: names a parameter that has none, or wrong ones.
        """
        generator = torch.Generator().manual_seed(0)
        shape = (self._microbatch * self._draws, *latent_shape)
        z_BCDHW = torch.randn(shape, generator=generator).to(self._device, self._dtype)
        noise_BCDHW = torch.randn(shape, generator=generator).to(self._device, self._dtype)
        t_B = torch.rand(shape[0], generator=generator).to(self._device, self._dtype)
        condition_B = torch.zeros(shape[0], dtype=torch.int64, device=self._device)
        batch = (z_BCDHW, condition_B, t_B, noise_BCDHW)
        gradients = self._microbatch_gradients(source, network, *batch)
        norms_P = gradients.squared_norms().sqrt()
        for patient in sorted({0, self._microbatch - 1}):
            row_d = gradients.row(patient)
            rows = slice(patient * self._draws, (patient + 1) * self._draws)
            with source.paused():
                loss_B = self._losses(network, *(part[rows] for part in batch))
                grads = torch.autograd.grad(loss_B.mean(), [p for _, p in self._params], allow_unused=True)
            self._compare(row_d, grads)
            norm = float(row_d.to(torch.float64).norm())
            if not abs(norm - float(norms_P[patient])) <= VERIFY_TOLERANCE[None] * norm:
                raise InternalError(f"a patient's norm {float(norms_P[patient]):.6g} should be {norm:.6g}")

    def _compare(self, row_d: Tensor, grads: Sequence[Tensor | None]) -> None:
        scale = float(row_d.norm())
        tolerance = VERIFY_TOLERANCE[self._performance.autocast]
        start = 0
        for (name, p), grad in zip(self._params, grads, strict=True):
            own = row_d[start : start + p.numel()]
            start += p.numel()
            expected = torch.zeros_like(own) if grad is None else grad.flatten()
            error = float((own - expected).norm())
            # Gradients that are zero but for rounding (a bias before a norm) are held against the whole.
            if not error <= tolerance * (float(expected.norm()) + 1e-2 * scale):
                raise UnsupportedLayerError(
                    f"per-patient gradients of parameter {name!r} are wrong (relative error "
                    f"{error / max(float(expected.norm()), 1e-30):.2g}): it is used outside its own layer's "
                    "forward, or a layer mixes samples of a batch"
                )

    def _batch(
        self, group: Sequence[PatientScans], draws: Sequence[PatientDraws]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(z_BCDHW, condition_B, t_B, noise_BCDHW), patient-major, filled up to the microbatch's size."""
        b = self._microbatch * self._draws
        shape = (b, *group[0].latents_SCDHW.shape[1:])
        z_BCDHW, noise_BCDHW = torch.zeros(shape), torch.zeros(shape)
        condition_B, t_B = torch.zeros(b, dtype=torch.int64), torch.full((b,), 0.5)
        z_BCDHW, noise_BCDHW, t_B = (x.to(self._dtype) for x in (z_BCDHW, noise_BCDHW, t_B))
        for index, (patient, drawn) in enumerate(zip(group, draws, strict=True)):
            rows = slice(index * self._draws, (index + 1) * self._draws)
            scan_K = torch.from_numpy(drawn.scan_K)
            z_BCDHW[rows] = patient.latents_SCDHW.cpu()[scan_K].to(self._dtype)
            condition_B[rows] = patient.conditions_S.cpu()[scan_K]
            t_B[rows] = torch.from_numpy(drawn.t_K).to(self._dtype)
            noise_BCDHW[rows] = torch.from_numpy(drawn.noise_KCDHW).to(self._dtype)
        return (
            z_BCDHW.to(self._device), condition_B.to(self._device), t_B.to(self._device),
            noise_BCDHW.to(self._device),
        )  # fmt: skip

    def _losses(self, network: Any, *batch: Tensor) -> Tensor:
        low = self._performance.autocast
        with torch.autocast(self._device.type, dtype=low, enabled=low is not None):
            return self._loss(network, *batch)

    def _microbatch_gradients(
        self, source: GradientSource, network: Any, z_BCDHW: Tensor, *rest: Tensor
    ) -> MicrobatchGradients:
        """Gradient of each patient's mean loss."""
        by_patient = [p.reshape(-1, self._draws, *p.shape[1:]) for p in (z_BCDHW, *rest)]
        for start in range(0, self._draws, self._pass):
            some = [part[:, start : start + self._pass].flatten(0, 1) for part in by_patient]
            loss_B = self._losses(network, *some)
            if loss_B.shape != some[0].shape[:1]:
                raise InternalError(
                    f"the loss has shape {tuple(loss_B.shape)}, not ({len(some[0])},): one loss per sample, "
                    "ndim 1, or clipping would be silently wrong"
                )
            if loss_B.requires_grad:
                torch.autograd.backward(loss_B.sum() / self._draws)
        return source.collect()

    @contextmanager
    def _hooked(self) -> Iterator[tuple[GradientSource, Any]]:
        """The backend and the network to call; afterwards the network is as it was, also after an error."""
        parameters = [(p, p.requires_grad, p.grad) for p in self._denoiser.parameters()]
        training = [(module, module.training) for module in self._denoiser.modules()]
        for p, _, _ in parameters:
            p.grad = None
        # Opacus skips layers in eval mode without a word.
        self._denoiser.train()
        try:
            source = self._source()
            with source.hooked() as network:
                yield source, network
        finally:
            for p, requires_grad, grad in parameters:
                p.requires_grad_(requires_grad)
                p.grad = grad
            for module, mode in training:
                module.training = mode

    def _source(self) -> GradientSource:
        if self._performance.backend == "engine":
            return BookKeeping(self._denoiser, self._params, self._microbatch)
        from privacy.dp.opacus_gradients import OpacusGradients

        return OpacusGradients(
            self._denoiser,
            self._params,
            patients=self._microbatch,
            functorch=self._performance.backend == "functorch",
        )
