"""Mechanism audit, part 4: the plan's own network and loss, at full dimension, on simulated latents.

The gradients are not known here, so two things are tested that hold whatever they are: at the smallest noise
one patient's clipped gradient has norm C (the loss is scaled up until every gradient is longer), and at the
plan's noise the vector is noise plus something of norm at most C.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from privacy.audit.mechanism_path import AuditConsortium, Progress, claimed_share_std
from privacy.audit.mechanism_signal import with_smallest_noise
from privacy.audit.mechanism_statistics import TestFamily, correlation_p, sub_gaussian_p, variance_p
from privacy.dp.closeness import MIN_SHARE_STEPS
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.patient_gradients import NamedParameters, PerSampleLoss
from privacy.dp.patient_sampling import TimestepDraw, uniform_timesteps
from privacy.dp.patients import PatientScans

LOSS_SCALE = 1e6

PERTURBATION = 0.02
"""Moves weights off zero: layers that start at zero, as adapters do, would have no gradient to clip."""

SCANS = 2
NETWORK_STEPS = 2


@dataclass(frozen=True, kw_only=True)
class NetworkUnderAudit:
    """The plan's network.

    Attributes:
        build: Makes the network, its privately trained parameters and its loss.
        latent_shape: (C, D, H, W).
        n_conditions: Conditions of the plan.
        draw_timesteps: How a site draws timesteps.
    """

    build: Callable[[], tuple[nn.Module, NamedParameters, PerSampleLoss]]
    latent_shape: tuple[int, ...]
    n_conditions: int
    draw_timesteps: TimestepDraw = uniform_timesteps


def network_families(
    execution: ExecutionPlan,
    site_ids: Sequence[str],
    network: NetworkUnderAudit,
    *,
    study_digest: str,
    device: str,
    progress: Progress | None,
) -> list[TestFamily]:
    """Part 4; ``execution`` has the network's own dimension."""
    return [
        _clip_family(execution, site_ids, network, study_digest=study_digest, device=device),
        *_noise_families(
            execution, site_ids, network, study_digest=study_digest, device=device, progress=progress
        ),
    ]


def simulated_patient(key: str, network: NetworkUnderAudit) -> PatientScans:
    """Standard normal latents: simulated, public, of no patient."""
    conditions = torch.arange(SCANS) % network.n_conditions
    return PatientScans(
        patient_key=key,
        latents_SCDHW=torch.randn(SCANS, *network.latent_shape),
        conditions_S=conditions.to(torch.int64),
    )


def _clip_family(
    execution: ExecutionPlan,
    site_ids: Sequence[str],
    network: NetworkUnderAudit,
    *,
    study_digest: str,
    device: str,
) -> TestFamily:
    """One patient's vector, noise taken off its squared norm: C^2, up to rounding and noise.

    |x|^2 = |g|^2 + 2 <g, e> + |e|^2 with |g| = C; e is noise of 4 steps in each of d coordinates, plus
    rounding of at most half a step, which is at most sqrt(d) / 2 long.
    """

    def scaled() -> tuple[nn.Module, NamedParameters, PerSampleLoss]:
        denoiser, parameters, loss = network.build()
        with torch.no_grad():
            for p in denoiser.parameters():
                p.add_(PERTURBATION * torch.randn_like(p))

        def louder(denoiser: Any, z: Tensor, condition: Tensor, t: Tensor, noise: Tensor) -> Tensor:
            return LOSS_SCALE * max(1.0, execution.clip) * loss(denoiser, z, condition, t, noise)

        return denoiser, parameters, louder

    quiet = replace(with_smallest_noise(execution), sampling_rate=1.0)
    consortium = AuditConsortium(
        quiet, site_ids, study_digest=study_digest, build=scaled, device=device,
        draw_timesteps=network.draw_timesteps,
    )  # fmt: skip
    dimension, clip = execution.dimension, execution.clip / execution.grid_step
    p_values, norms = [], []
    for site_id in consortium.site_ids[:3]:
        vector = consortium.update(site_id, [simulated_patient(f"simulated-{site_id}", network)])
        squared = float((vector.astype(np.float64) ** 2).sum()) - dimension * MIN_SHARE_STEPS**2
        rounding = 0.5 * math.sqrt(dimension)
        norms.append(math.sqrt(max(squared, 0.0)) / clip)
        # Linear part: sub-Gaussian along the rounded gradient. Quadratic part: chi-square's own deviation.
        slack = 2.0 * clip * rounding + rounding**2
        excess = max(abs(squared - clip**2) - slack, 0.0)
        linear = sub_gaussian_p(excess / 2.0, 2.0 * MIN_SHARE_STEPS * (clip + rounding))
        p_values.append(min(1.0, linear + _square_tail(excess / 2.0, dimension)))
    return TestFamily(
        name="network-clipping", title="A patient's gradient of the plan's own network is clipped to C",
        p_values=tuple(p_values), figure=f"norms {min(norms):.5f} to {max(norms):.5f} of C", expected="1",
    )  # fmt: skip


def _square_tail(excess: float, dimension: int) -> float:
    """Bound on P[| |e|^2 - d s^2 | >= excess] for noise e (Laurent and Massart, Ann. Stat. 2000, Lemma 1)."""
    relative = excess / MIN_SHARE_STEPS**2
    # 2 sqrt(d x) + 2 x = relative, solved for x.
    root = (-math.sqrt(dimension) + math.sqrt(dimension + 2.0 * relative)) / 2.0
    return min(1.0, 2.0 * math.exp(-(root**2)))


def _noise_families(
    execution: ExecutionPlan,
    site_ids: Sequence[str],
    network: NetworkUnderAudit,
    *,
    study_digest: str,
    device: str,
    progress: Progress | None,
) -> list[TestFamily]:
    """Whole attempts at full dimension: a patient of the network at each site."""
    consortium = AuditConsortium(
        execution, site_ids, study_digest=study_digest, build=network.build, device=device,
        draw_timesteps=network.draw_timesteps,
    )  # fmt: skip
    std = claimed_share_std(execution)
    longest = (execution.clip * (1.0 + 1e-6)) / execution.grid_step + 0.5 * math.sqrt(execution.dimension)
    share_p, total_p, exact, ratios, vectors = [], [], [], [], []
    for number in range(NETWORK_STEPS):
        step = consortium.step(
            {
                site_id: [simulated_patient(f"simulated-{number}-{site_id}", network)]
                for site_id in consortium.site_ids
            }
        )
        for share in step.shares.values():
            share_p.append(variance_p(share, std, shift=longest))
            ratios.append(float((share.astype(np.float64) ** 2).mean()) / std**2)
            vectors.append(share)
        m = len(step.survivors)
        total_p.append(variance_p(step.total, std * math.sqrt(m), shift=longest * m))
        same = np.array_equal(step.total, np.sum([step.shares[s] for s in step.survivors], axis=0))
        exact.append(1.0 if same and m == execution.n_sites else 0.0)
        if progress is not None:
            progress("network", number + 1, NETWORK_STEPS)
    # Signals of two vectors may point the same way: each adds at most its norm along the other.
    correlated = [
        correlation_p(vectors[a], vectors[b], std, lags=False, shift=longest)
        for a, b in combinations(range(len(vectors)), 2)
    ]
    return [
        TestFamily(
            name="network-variance", title="Shares and totals at full dimension have exactly their noise",
            p_values=(*share_p, *total_p),
            figure=f"{execution.dimension} parameters, variance over its claim {min(ratios):.5f} to "
            f"{max(ratios):.5f}",
            expected="1, up to one patient's gradient",
        ),
        TestFamily(
            name="network-independence", title="Shares at full dimension are independent",
            p_values=tuple(correlated), figure=f"{len(correlated)} pairs", expected="no correlation",
        ),
        TestFamily(
            name="network-unmasking", title="The unmasked total at full dimension is the sum of the vectors",
            p_values=tuple(exact), exact=True, figure=f"{len(exact)} attempts", expected="exactly",
        ),
    ]  # fmt: skip
