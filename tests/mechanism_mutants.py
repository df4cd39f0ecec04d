"""Broken mechanisms: what a site's installation must not do, each one change of production code.

The defects that an audit of the mechanism can see; they change trainer, clipping, noise and accounting, and
nothing of any audit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.noise import noise_share
from privacy.dp.patient_gradients import PatientGradients
from privacy.dp.patients import PatientScans
from privacy.dp.sensitivity import Sensitivity, clipped_sum_sensitivity
from privacy.dp.trainer import PatientTrainer
from privacy.secret_random import SecretRandom


class Seeded(SecretRandom):
    """What no site may have: a stream that somebody else has too."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        super().__init__()

    def _fresh_key(self) -> bytes:
        return self._key


Draw = Callable[[ExecutionPlan, SecretRandom], np.ndarray]


def scaled(factor: float) -> Draw:
    return lambda plan, secret: np.rint(factor * noise_share(plan, secret)).astype(np.int64)


def missing_at_one_site() -> Draw:
    first: list[SecretRandom] = []

    def draw(plan: ExecutionPlan, secret: SecretRandom) -> np.ndarray:
        first[:] = first or [secret]
        share = noise_share(plan, secret)
        return np.zeros_like(share) if secret is first[0] else share

    return draw


def same_seed_at_two_sites() -> Draw:
    streams: dict[int, tuple[SecretRandom, SecretRandom]] = {}

    def draw(plan: ExecutionPlan, secret: SecretRandom) -> np.ndarray:
        if id(secret) not in streams:
            own = Seeded(bytes(32)) if len(streams) < 2 else secret
            streams[id(secret)] = (secret, own)
        return noise_share(plan, streams[id(secret)][1])

    return draw


def same_seed_in_two_rounds() -> Draw:
    keys: dict[int, tuple[SecretRandom, bytes]] = {}

    def draw(plan: ExecutionPlan, secret: SecretRandom) -> np.ndarray:
        _, key = keys.setdefault(id(secret), (secret, secret.bytes(32)))
        return noise_share(plan, Seeded(key))

    return draw


def by_scan(patients: Sequence[PatientScans]) -> list[PatientScans]:
    return [
        PatientScans(
            patient_key=f"{patient.patient_key}/{scan}",
            latents_SCDHW=patient.latents_SCDHW[scan : scan + 1],
            conditions_S=patient.conditions_S[scan : scan + 1],
        )
        for patient in patients
        for scan in range(patient.n_scans)
    ]


def clip_per_scan(monkeypatch: pytest.MonkeyPatch, share: float = 1.0) -> None:
    """Every scan clipped by itself, then added up (times ``share``)."""
    original = PatientGradients.clipped_sum

    def wrong(self: PatientGradients, patients: Sequence[PatientScans], *rest: Any, **options: Any) -> Any:
        return share * original(self, by_scan(patients), *rest, **options)

    monkeypatch.setattr(PatientGradients, "clipped_sum", wrong)


def sum_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss summed over a patient's draws: the gradient is K times too long before it is clipped."""
    original = PatientGradients.__init__

    def wrong(self: PatientGradients, denoiser: Any, params: Any, loss: Any, **options: Any) -> None:
        draws = options["draws_per_patient"]
        original(self, denoiser, params, lambda *batch: draws * loss(*batch), **options)

    monkeypatch.setattr(PatientGradients, "__init__", wrong)


def divide_by_actual_batch(monkeypatch: pytest.MonkeyPatch, constant: float | None) -> None:
    """The sum divided by who took part, times ``constant``; None: times the site's expected number."""
    original, update = PatientGradients.clipped_sum, PatientTrainer.distributed_update
    expected = [constant]

    def watched(self: PatientTrainer, patients: Sequence[PatientScans]) -> np.ndarray:
        if constant is None:
            expected[0] = self._plan.sampling_rate * len(patients)
        return update(self, patients)

    def wrong(self: PatientGradients, patients: Sequence[PatientScans], *rest: Any, **options: Any) -> Any:
        return original(self, patients, *rest, **options) * expected[0] / max(len(patients), 1)

    monkeypatch.setattr(PatientTrainer, "distributed_update", watched)
    monkeypatch.setattr(PatientGradients, "clipped_sum", wrong)


def without_rounding(**options: Any) -> Sensitivity:
    return replace(clipped_sum_sensitivity(**options), rounding=0.0)
