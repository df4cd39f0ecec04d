"""Controls of the membership attack: what must come out by chance, and what must be seen.

Two controls are read from the same pooled counts as the attack (:mod:`privacy.audit.counts`): plain loss on
the public model, which has seen neither group, and members against members, split by :func:`member_coin`.

The third is a planted leak. A copy of the candidate is overfitted on a few of the candidate's own samples,
and the attack has to tell those from fresh samples. Nothing private is in it: it is post-processing of the
candidate. (A copy overfitted on members would make every patient's score depend on every other patient, and
the sensitivity of the counts would have no bound.)
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from privacy.audit.bounds import auc
from privacy.audit.membership import AttackNoise, LossPerSample, Progress, attack_losses
from privacy.audit.verdict import PlantedLeak
from shared.canonical import digest
from shared.errors import UsageError

PLANTED = 8
"""Samples that the copy is overfitted on; as many fresh ones are compared with them."""


def member_coin(patient_key: str, plan_digest: bytes) -> bool:
    """The coin that splits members, fair and independent between patients.

    ``patient_key`` is already a hash under the site's secret key, so nobody else can compute the coin; it
    depends on no other patient.
    """
    return bool(digest("lacuna/audit-coin/v1", plan_digest, patient_key.encode())[0] & 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sample:
    """A generated sample in the place of a patient."""

    patient_key: str
    latents_SCDHW: Tensor
    conditions_S: Tensor


def planted_leak(
    candidate_denoiser: nn.Module,
    samples_NCDHW: Tensor,
    conditions_N: Tensor,
    *,
    loss: LossPerSample,
    noise: AttackNoise,
    seed: int,
    steps: int = 60,
    learning_rate: float = 2e-3,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> PlantedLeak:
    """Overfit a copy of the candidate on samples 0 to PLANTED - 1; attack it, the candidate as reference.

    Args:
        samples_NCDHW: Generated from the candidate, at least 2 PLANTED of them; further ones are not used.
        noise: The attack's own. Training uses other noises (from ``seed``).
        seed: Public seed.
        steps: Adam steps over all planted samples; stops once the attack's groups separate.

    Raises:
        UsageError: fewer than 2 PLANTED samples.
    """
    if samples_NCDHW.shape[0] < 2 * PLANTED:
        raise UsageError(f"the planted leak needs {2 * PLANTED} samples, not {samples_NCDHW.shape[0]}")
    planted = copy.deepcopy(candidate_denoiser).to(device).train()
    planted.requires_grad_(True)
    z_BCDHW = samples_NCDHW[:PLANTED].to(device)
    condition_B = conditions_N[:PLANTED].to(device)
    optimizer = torch.optim.Adam(planted.parameters(), lr=learning_rate)
    generator = torch.Generator().manual_seed(seed % 2**63)
    groups = [
        [
            _Sample(patient_key=str(i), latents_SCDHW=z_CDHW[None], conditions_S=condition[None])
            for i, (z_CDHW, condition) in enumerate(zip(samples_NCDHW[part], conditions_N[part], strict=True))
        ]
        for part in (slice(0, PLANTED), slice(PLANTED, 2 * PLANTED))
    ]

    def separation() -> float:
        scores = [
            attack_losses(candidate_denoiser, planted, group, loss=loss, noise=noise, device=device).score_P
            for group in groups
        ]
        return auc(*scores)

    for step in range(steps):
        t_B = torch.rand(PLANTED, generator=generator).to(device)
        noise_BCDHW = torch.randn(z_BCDHW.shape, generator=generator).to(device)
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss(planted, z_BCDHW, condition_B, t_B, noise_BCDHW).mean())
            optimizer.step()
        if progress is not None:
            progress("planted leak", step + 1, steps)
        if step % 20 == 19 and step + 1 < steps and separation() == 1.0:
            break
    value = separation()
    return PlantedLeak(auc=value, n_planted=PLANTED, n_fresh=PLANTED)
