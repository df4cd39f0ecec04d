"""The sum, over patients, of each patient's clipped gradient: exact, microbatched, nothing left hooked.

For each patient the loss is averaged over K draws of (scan, timestep, noise); the gradient of that mean, over
all trained parameters together, is scaled to norm at most C. Per-sample gradients come from Opacus'
``GradSampleModule`` (a hook on each layer), are summed over a patient's draws, and are clipped per patient,
never per scan or draw: one factor for all that a patient contributes (noise multiplicity, De et al. 2022, and
user-level grouping in one).

Formal guarantees:

- Adding or removing one patient changes the returned sum by at most C (1 + eta) plus the summation error of
  :mod:`privacy.dp.sensitivity`: norms and sums are binary64, patient after patient.
- A patient's own gradient depends on that patient alone. Layers that mix samples are refused (buffers as in
  BatchNorm by Opacus, anything else by :meth:`PatientGradients.verify`); and each microbatch is filled up
  with empty patients to one public size, so that the same kernels run whatever the number of patients.
- A patient whose gradient is not finite contributes exactly zero.

A parameter that Opacus did not see (used outside its layer's forward, not used at all) is an error that names
it: silently skipped, it would be released without clipping or stay untrained.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from opacus.grad_sample import GradSampleModule
from torch import Tensor, nn

from privacy.dp.patient_sampling import PatientDraws, TimestepDraw, draw_for_patient, uniform_timesteps
from privacy.dp.patients import PatientScans
from privacy.secret_random import SecretRandom
from shared.errors import InternalError, UsageError

NamedParameters = Sequence[tuple[str, nn.Parameter]]
Progress = Callable[[int, int], None]
"""Called with (patients done, patients in this step). It is private: for the site's own screen alone."""

MICROBATCH_BYTES = 256 * 2**20
"""Default bound on the memory of one microbatch's per-sample gradients."""

MAX_DEFAULT_MICROBATCH = 8

VERIFY_TOLERANCE = 1e-3
"""Relative error allowed between Opacus' per-sample gradients and a batch of one, in float32, per
parameter."""

_OPACUS_PARAMETER_ATTRIBUTES = ("grad_sample", "_forward_counter", "_current_grad_sample")
_OPACUS_MODULE_ATTRIBUTES = (
    "activations", "max_batch_len", "ft_compute_sample_grad", "autograd_grad_sample_hooks",
)  # fmt: skip


class PerSampleLoss(Protocol):
    """Loss of each sample, shape [B]; sample i's loss depends on row i of the arguments alone."""

    def __call__(
        self, denoiser: Any, z_BCDHW: Tensor, condition_B: Tensor, t_B: Tensor, noise_BCDHW: Tensor, /
    ) -> Tensor: ...


class UnsupportedLayerError(InternalError):
    """A trained parameter has no proper per-sample gradient. The network or the subset must change."""


class PatientGradients:
    """Clipped sums for one network and one list of trained parameters. Keeps nothing between calls.

    Args:
        denoiser: The network; hooked only while a sum is computed, then as before.
        params: Trained parameters in the order of the result; everything else is frozen during a call.
        loss: The per-sample loss.
        clip: C.
        draws_per_patient: K.
        microbatch: Patients per forward pass; the result depends on it by float error alone.
        device: Where the network is.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        params: NamedParameters,
        loss: PerSampleLoss,
        *,
        clip: float,
        draws_per_patient: int,
        microbatch: int | None = None,
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
        sample_bytes = self.dimension * self._params[0][1].element_size() * draws_per_patient
        fitting = max(1, min(MAX_DEFAULT_MICROBATCH, MICROBATCH_BYTES // sample_bytes))
        self._microbatch = fitting if microbatch is None else microbatch
        if self._microbatch < 1:
            raise UsageError("a microbatch has at least one patient")
        self._verified = False

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
            UnsupportedLayerError: a parameter without proper per-sample gradients (whatever the data).
        """
        total_d = torch.zeros(self.dimension, dtype=torch.float64, device=self._device)
        if not patients:
            return total_d.cpu().numpy()
        with self._hooked() as wrapped:
            if not self._verified:
                self.verify(wrapped, tuple(patients[0].latents_SCDHW.shape[1:]))
                self._verified = True
            for start in range(0, len(patients), self._microbatch):
                group = patients[start : start + self._microbatch]
                draws = self._draw(group, secret, draw_timesteps)
                gradients_Pd = self._patient_gradients(wrapped, *self._batch(group, draws))
                for row_d in gradients_Pd[: len(group)]:
                    add_clipped(total_d, row_d, self._clip)
                if progress is not None:
                    progress(start + len(group), len(patients))
        return total_d.cpu().numpy()

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

    def verify(self, wrapped: GradSampleModule, latent_shape: tuple[int, ...]) -> None:
        """Hold Opacus' per-sample gradients of this network against batches of one, on made-up latents.

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
        gradients_Pd = self._patient_gradients(wrapped, *batch)
        wrapped.disable_hooks()
        try:
            for patient in {0, self._microbatch - 1}:
                rows = slice(patient * self._draws, (patient + 1) * self._draws)
                loss_B = self._loss(wrapped, *(part[rows] for part in batch))
                grads = torch.autograd.grad(loss_B.mean(), [p for _, p in self._params], allow_unused=True)
                self._compare(gradients_Pd[patient], grads)
        finally:
            wrapped.enable_hooks()

    def _compare(self, row_d: Tensor, grads: Sequence[Tensor | None]) -> None:
        scale = float(row_d.norm())
        start = 0
        for (name, p), grad in zip(self._params, grads, strict=True):
            own = row_d[start : start + p.numel()]
            start += p.numel()
            expected = torch.zeros_like(own) if grad is None else grad.flatten()
            error = float((own - expected).norm())
            # Gradients that are zero but for rounding (a bias before a norm) are held against the whole.
            if not error <= VERIFY_TOLERANCE * float(expected.norm()) + 1e-5 * scale:
                raise UnsupportedLayerError(
                    f"per-sample gradients of parameter {name!r} are wrong (relative error "
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

    def _patient_gradients(
        self,
        wrapped: GradSampleModule,
        z_BCDHW: Tensor,
        condition_B: Tensor,
        t_B: Tensor,
        noise_BCDHW: Tensor,
    ) -> Tensor:
        """Gradient of each patient's mean loss, [microbatch, d]."""
        b = z_BCDHW.shape[0]
        loss_B = self._loss(wrapped, z_BCDHW, condition_B, t_B, noise_BCDHW)
        if loss_B.shape != (b,):
            raise InternalError(
                f"the loss has shape {tuple(loss_B.shape)}, not ({b},): one loss per sample, ndim 1, or "
                "clipping would be silently wrong"
            )
        torch.autograd.backward(loss_B.sum() / self._draws)
        gradients_Pd = torch.empty(self._microbatch, self.dimension, dtype=self._dtype, device=self._device)
        start = 0
        for name, p in self._params:
            sample = _grad_sample(name, p, b)
            by_patient = sample.reshape(self._microbatch, self._draws, p.numel())
            torch.sum(by_patient, dim=1, out=gradients_Pd[:, start : start + p.numel()])
            start += p.numel()
            p.grad = None
            p.grad_sample = None  # type: ignore[attr-defined]
        return gradients_Pd

    @contextmanager
    def _hooked(self) -> Iterator[GradSampleModule]:
        """The network wrapped for per-sample gradients; afterwards as it was, also after an error."""
        trained = {id(p) for _, p in self._params}
        flags = [(p, p.requires_grad, p.grad) for p in self._denoiser.parameters()]
        training = [(module, module.training) for module in self._denoiser.modules()]
        for p, _, _ in flags:
            p.requires_grad_(id(p) in trained)
            p.grad = None
        # Opacus skips layers in eval mode without a word.
        self._denoiser.train()
        try:
            wrapped = GradSampleModule(self._denoiser, loss_reduction="sum", strict=True)
        except NotImplementedError as error:
            self._restore(flags, training)
            raise UnsupportedLayerError(f"Opacus refuses the network: {error}") from error
        try:
            with warnings.catch_warnings():
                # torch warns wherever a layer's input needs no gradient, as the first layer's never does.
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                yield wrapped
        finally:
            wrapped.remove_hooks()
            self._restore(flags, training)

    def _restore(
        self,
        flags: list[tuple[nn.Parameter, bool, Tensor | None]],
        training: list[tuple[nn.Module, bool]],
    ) -> None:
        for p, requires_grad, grad in flags:
            p.requires_grad_(requires_grad)
            p.grad = grad
            for name in _OPACUS_PARAMETER_ATTRIBUTES:
                p.__dict__.pop(name, None)
        for module, mode in training:
            module.training = mode
            for name in _OPACUS_MODULE_ATTRIBUTES:
                module.__dict__.pop(name, None)


def add_clipped(total_d: Tensor, row_d: Tensor, clip: float) -> None:
    """Add one patient's gradient, scaled to norm at most ``clip``, to a float64 total; zero if not finite."""
    row64_d = row_d.to(torch.float64)
    norm = float(torch.linalg.vector_norm(row64_d))
    if math.isfinite(norm):
        total_d.add_(row64_d, alpha=min(1.0, clip / norm) if norm > 0 else 0.0)


def _grad_sample(name: str, p: nn.Parameter, batch: int) -> Tensor:
    found = getattr(p, "grad_sample", None)
    if isinstance(found, list):
        found = torch.stack(found).sum(dim=0)
    if not isinstance(found, Tensor) or found.shape != (batch, *p.shape):
        raise UnsupportedLayerError(
            f"parameter {name!r} has no gradient for each sample: its layer was not called with one row per "
            "sample, or not at all"
        )
    return found
