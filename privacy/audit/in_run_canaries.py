"""In-run canaries: synthetic patients of whom a fair coin decided whether training saw them.

Anybody who has the plan can make them: white noise in latent space, of the variance that latents have. That
is far from every real scan, so a network that keeps single patients keeps these first; and their gradients
are nearly orthogonal to one another's. A canary in training is a patient like any other: its draws are
averaged, its gradient is clipped, it adds no noise and costs no budget. It never enters the counts of members
and held-out patients.
"""

from __future__ import annotations

import numpy as np
import torch

from privacy.dp.patients import PatientScans
from shared.canonical import digest


def canary_patients(
    plan_digest: bytes, site_id: str, count: int, *, latent_shape: tuple[int, ...], n_conditions: int
) -> list[PatientScans]:
    """The canaries of one site, one scan each; public and the same for whoever makes them."""
    patients = []
    for index in range(count):
        seed = digest("lacuna/in-run-canary/v1", plan_digest, site_id.encode(), index.to_bytes(4, "big"))
        rng = np.random.Generator(np.random.Philox(int.from_bytes(seed[:16], "big")))
        z_1CDHW = rng.standard_normal((1, *latent_shape), dtype=np.float32)
        patients.append(
            PatientScans(
                patient_key=f"canary-{index}",
                latents_SCDHW=torch.from_numpy(z_1CDHW),
                conditions_S=torch.tensor([index % n_conditions]),
            )
        )
    return patients
