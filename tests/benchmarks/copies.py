"""Planted copies and false alarms of the copy check: ``python -m tests.benchmarks copies``.

Simulated patients from a seed that no training and no calibration saw, a quarter of them of the rare
condition, against :data:`SAMPLES` samples of the public prior, which knows none of them; then one planted
copy of each patient, six kinds. The peer is the comparison of decoded and encoded latents, which plans
without an embedding use, calibrated the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from privacy.audit.bounds import FloatArray, clopper_pearson
from privacy.audit.copies import CopySpace, calibrate_copy_distance, nearest_distances
from server.pretrain import public_phantoms
from server.public_calibration import public_patients, unrelated_samples
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.conditioning import ConditionTable
from shared.model.copy_embedding import load_copy_embedding
from shared.model.denoiser import build_denoiser
from shared.model.presets import preset_named
from shared.model.shipped import shipped_pair
from shared.model.training import encode_batches
from shared.model.weights import load_weights
from shared.volumes import phantom
from tests.planted_copies import KINDS, Volumes

MEMBERS = 400
MEMBERS_SEED = 30_003
CALIBRATION = (400, 20_002)
"""Public patients and their seed."""
SAMPLES = 500


@dataclass(frozen=True, kw_only=True, eq=False)
class Member:
    """One patient; a :class:`privacy.audit.membership.ScansOfPatient`."""

    patient_key: str
    latents_SCDHW: Tensor
    conditions_S: Tensor


def run() -> str:
    """Recall of each kind and the false-copy rate, with exact 95% bounds (one-sided)."""
    torch.set_num_threads(1)
    autoencoder, samples = shipped_networks(SAMPLES)
    public = public_patients(
        autoencoder,
        public_phantoms(n_patients=CALIBRATION[0], seed=CALIBRATION[1], fractions={phantom.COMMON: 1.0}),
        ConditionTable(phantom.CONDITIONS),
    )
    members, firsts = simulated_members(autoencoder, MEMBERS)
    embedding = load_copy_embedding(shipped_pair("micro").copy_embedding_path, n_labels=2)
    lines = [f"{MEMBERS} patients, {SAMPLES} samples; recall of planted copies (lower bound), false copies"]
    for name, space in (
        ("embedding", CopySpace(autoencoder=autoencoder, embedding=embedding)),
        ("latents", CopySpace(autoencoder=autoencoder)),
    ):
        threshold = calibrate_copy_distance(space, public, unrelated_NCDHW=samples)
        clean = nearest_distances(space, members, space.of_samples(samples))
        rate = threshold.false_copy_rate
        lines.append(f"{name}: threshold {threshold.distance:.4f}, calibrated rate {rate:.4f}")
        lines.append(f"  false copies {_share(clean < threshold.distance, upper=True)}")
        for kind, found in planted_distances(space, autoencoder, members, firsts).items():
            lines.append(f"  {kind:22} {_share(found < threshold.distance, upper=False)}")
    return "\n".join(lines)


def shipped_networks(samples: int) -> tuple[LatentAutoencoder, Tensor]:
    """The public autoencoder that ships, and samples of the public prior [N, C, D, H, W]."""
    pair, preset = shipped_pair("micro"), preset_named("micro")
    autoencoder = build_autoencoder(preset, n_labels=len(phantom.LABELS))
    load_weights(autoencoder, pair.autoencoder_path)
    prior = build_denoiser(preset, n_conditions=len(phantom.CONDITIONS))
    load_weights(prior, pair.prior_path)
    shape = preset.latent_shape(preset.grid_shape)
    return autoencoder.eval(), unrelated_samples(
        prior.eval(), samples, n_conditions=len(phantom.CONDITIONS), latent_shape=shape
    )


def simulated_members(
    autoencoder: LatentAutoencoder, count: int, *, seed: int = MEMBERS_SEED
) -> tuple[list[Member], Volumes]:
    """Patients with all their scans as latents, and the volumes of each one's first scan."""
    scans = public_phantoms(n_patients=count, seed=seed, fractions={phantom.COMMON: 0.75, phantom.RARE: 0.25})
    patients = [
        Member(patient_key=p.patient_key, latents_SCDHW=p.latents_SCDHW, conditions_S=p.conditions_S)
        for p in public_patients(autoencoder, scans, ConditionTable(phantom.CONDITIONS))
    ]
    firsts = {scan.patient_id: scan for scan in reversed(scans)}
    own = [firsts[patient.patient_key] for patient in patients]
    image = torch.from_numpy(np.stack([scan.image for scan in own]))[:, None]
    return patients, (image, torch.from_numpy(np.stack([scan.mask for scan in own])))


def planted_distances(
    space: CopySpace,
    autoencoder: LatentAutoencoder,
    members: Sequence[Member],
    firsts: Volumes,
    kinds: dict[str, Callable[[Volumes, torch.Generator], Volumes]] = KINDS,
) -> dict[str, FloatArray]:
    """For each kind, each member's distance to the planted copy of its first scan."""
    own = [space.of_patient(member.latents_SCDHW) for member in members]
    found = {}
    for kind, plant in kinds.items():
        planted = plant(firsts, torch.Generator().manual_seed(0))
        embedded = space.of_samples(encode_batches(autoencoder, *planted))
        found[kind] = np.array(
            [float(space.distances(mine, copy[None]).min()) for mine, copy in zip(own, embedded, strict=True)]
        )
    return found


def _share(flags: np.ndarray, *, upper: bool) -> str:
    interval = clopper_pearson(int(flags.sum()), len(flags), error=0.05)
    bound = f"at most {interval.high:.4f}" if upper else f"at least {interval.low:.4f}"
    return f"{int(flags.sum())} of {len(flags)} = {flags.mean():.4f} ({bound})"
