"""Sampling below full participation: rates, independence, empty steps, and what a step is divided by.

The tests of this module fail together, by chance, with probability at most 1e-6: 3e-7 for each of three.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from privacy.audit.canaries import build_probe, probe_patient
from privacy.audit.mechanism_signal import with_smallest_noise
from privacy.audit.mechanism_statistics import correlation_p, count_p, dispersion_p, variance_p
from privacy.dp.calibration import propose_privacy
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.patient_sampling import sample_patients
from privacy.dp.trainer import PatientTrainer
from privacy.secret_random import SecretRandom

FAILURE = 3e-7
PATIENTS, STEPS = 64, 512
Sampler = Callable[[SecretRandom, float], np.ndarray]


def coins(secret: SecretRandom, q: float) -> np.ndarray:
    return sample_patients(secret, sampling_rate=q, n_patients=PATIENTS)


def sampling_faults(sampler: Sampler, q: float) -> set[str]:
    """Rate of each patient and of all, spread of batch sizes, pairs of patients, successive steps."""
    secret = SecretRandom()
    joined = np.zeros((STEPS, PATIENTS), dtype=bool)
    for step in joined:
        step[sampler(secret, q)] = True
    sizes = joined.sum(axis=1)
    neighbours = joined[:, 0::2] & joined[:, 1::2]
    successive = joined[0::2] & joined[1::2]
    found = {
        "rate": count_p(int(joined.sum()), joined.size, q),
        "each patient": PATIENTS * min(count_p(int(n), STEPS, q) for n in joined.sum(axis=0)),
        "spread": dispersion_p(sizes, np.full(STEPS, PATIENTS), q, SecretRandom().uniform(STEPS)),
        "pairs": count_p(int(neighbours.sum()), neighbours.size, q * q),
        "steps": count_p(int(successive.sum()), successive.size, q * q),
    }
    return {name for name, p in found.items() if p <= FAILURE / 4 / len(found)}


@pytest.mark.parametrize("q", [0.02, 0.25, 0.5, 0.97])
def test_each_patient_joins_by_an_own_coin_in_each_step(q: float) -> None:
    """False-failure probability 3e-7 for the four rates together; all five statistics are exact."""
    assert sampling_faults(coins, q) == set()


def fixed_size(secret: SecretRandom, q: float) -> np.ndarray:
    return np.argsort(secret.uniform(PATIENTS))[: round(q * PATIENTS)]


def whole_batches(secret: SecretRandom, q: float) -> np.ndarray:
    """A shuffled epoch's idea of a rate: everybody, every 1/q-th step."""
    return np.arange(PATIENTS if secret.uniform(1)[0] < q else 0)


def in_couples(secret: SecretRandom, q: float) -> np.ndarray:
    return np.flatnonzero(np.repeat(secret.uniform(PATIENTS // 2) < q, 2))


def rate_off_by_a_tenth(secret: SecretRandom, q: float) -> np.ndarray:
    return coins(secret, 0.9 * q)


def one_is_favoured(secret: SecretRandom, q: float) -> np.ndarray:
    return np.union1d(coins(secret, q), np.arange(1))


def every_second_step_again() -> Sampler:
    kept: list[np.ndarray] = []

    def wrong(secret: SecretRandom, q: float) -> np.ndarray:
        if kept:
            return kept.pop()
        kept.append(coins(secret, q))
        return kept[0]

    return wrong


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        (fixed_size, "spread"),
        (whole_batches, "spread"),
        (in_couples, "pairs"),
        (rate_off_by_a_tenth, "rate"),
        (one_is_favoured, "each patient"),
        (every_second_step_again(), "steps"),
    ],
    ids=["fixed size", "whole batches", "couples", "rate", "favoured", "coins again"],
)
def test_other_samplings_are_seen(sampler: Sampler, name: str) -> None:
    assert name in sampling_faults(sampler, 0.25)


ROWS = 256


def plan(q: float) -> ExecutionPlan:
    return replace(
        propose_privacy(
            mode="distributed", epsilon=8.0, delta=1e-5, clip_norm=0.5, rounds=10, n_sites=3, threshold=3,
            max_colluding=1, dimension=2 * ROWS, declared_patients=60,
        ).execution,
        sampling_rate=q,
    )  # fmt: skip


def trainer(execution: ExecutionPlan) -> PatientTrainer:
    return PatientTrainer(*build_probe(ROWS), execution, SecretRandom())


def test_an_empty_step_is_noise_of_the_whole_share() -> None:
    """At q = 2^-40 nobody joins in 40 steps of one patient. False-failure probability 3e-7."""
    execution = plan(2.0**-40)
    one = trainer(execution)
    patient = probe_patient("a", [0, 0], 100.0 * np.eye(2))
    steps = [one.distributed_update([patient]) for _ in range(40)]
    noise = np.concatenate(steps)
    share = execution.noise_multiplier * execution.clip / math.sqrt(2) / execution.grid_step
    assert variance_p(noise, share) > FAILURE / 2
    pairs = [correlation_p(a, b, share, lags=False) for a, b in pairwise(steps)]
    assert min(pairs) > FAILURE / 2 / len(pairs)


def test_a_step_is_divided_by_a_public_constant_whoever_came() -> None:
    """60 patients of gradient C at q = 0.5 and noise at its floor: after the server's division each that came
    counts C / (declared q), so the mean over steps is the mean gradient. Sizes differ from step to step.

    Every coordinate is off by at most 8 deviations of 4 steps; the counts are binomial: 3e-7 together.
    """
    execution = with_smallest_noise(plan(0.5))
    one = trainer(execution)
    patients = [probe_patient(str(i), [i, i], 100.0 * np.eye(2)[[0, 0]]) for i in range(60)]
    parts = []
    for _ in range(30):
        average = one.distributed_update(patients) * execution.grid_step / execution.sum_divisor
        parts.append(average[: 2 * 60 : 2])
    unit = execution.clip / (60 * 0.5)
    tolerance = (8 * 4 + 1) * execution.grid_step / execution.sum_divisor
    came = np.array(parts) > unit / 2
    np.testing.assert_allclose(np.array(parts), np.where(came, unit, 0.0), atol=tolerance)
    assert tolerance < unit / 100 and len(set(came.sum(axis=1))) > 3
    assert count_p(int(came.sum()), came.size, 0.5) > FAILURE / 2
