"""What computes on patients: latents, networks and device of one site, warm between messages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from client.auditor import LocalAudit, audit_candidate
from client.canaries import CanaryCoins
from client.latent_cache import LatentCache
from client.patient_dataset import SiteStore
from client.site_agent import AuditedCandidate
from client.site_home import SiteHome
from privacy.audit.bounds import FloatArray
from privacy.audit.canary_opening import CanaryOpening
from privacy.audit.counts import CountsLayout
from privacy.audit.membership import AttackNoise, attack_losses
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.noise import audit_noise_share
from privacy.dp.patient_gradients import Backend, Performance
from privacy.dp.trainer import PatientTrainer
from privacy.secret_random import SecretRandom
from shared.canonical import canonical_json, parse_json
from shared.errors import SiteError
from shared.home import write_private
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.candidate import candidate_network, load_prior, write_candidate
from shared.model.conditioning import ConditionTable
from shared.model.copy_embedding import load_copy_embedding
from shared.model.denoiser import Denoiser, assign
from shared.model.diffusion import timesteps_from_uniform
from shared.model.presets import preset_named
from shared.model.weights import load_weights
from shared.plan_package import PlanPackage
from shared.study_plan import StudyPlan
from shared.volumes.canonical_grid import CanonicalGrid

log = logging.getLogger("lacuna.site")

Progress = Callable[[str, int, int], None]


def load_autoencoder(plan: StudyPlan, path: Path) -> LatentAutoencoder:
    """The plan's public autoencoder, frozen."""
    autoencoder = build_autoencoder(preset_named(plan.model.preset), n_labels=len(plan.data.labels))
    load_weights(autoencoder, path)
    return autoencoder.requires_grad_(False).eval()


class SiteWorkbench:
    """Members and held-out patients as latents, the trainer, and the audit.

    Args:
        home: The site's files.
        package: The approved plan.
        secret: Secret randomness of noise, coins and draws.
        device: Torch device.
        progress: Called as (stage, done, total).
        performance: How gradients are computed.

    Raises:
        SiteError: no scans were imported, or none of them is a member's.
    """

    def __init__(
        self,
        *,
        home: SiteHome,
        package: PlanPackage,
        secret: SecretRandom,
        device: str = "cpu",
        progress: Progress | None = None,
        performance: Performance | None = None,
    ) -> None:
        self._package = package
        self._plan = plan = package.plan
        self._directory = home.study(plan.study_id)
        self._secret = secret
        self._device = device
        self._progress = progress
        self._execution = ExecutionPlan.from_study_plan(plan)
        self._counts = CountsLayout.from_plan(plan)
        self._autoencoder = load_autoencoder(plan, package.autoencoder).to(device)
        embedding = load_copy_embedding(package.copy_embedding, n_labels=len(plan.data.labels))
        self._copy_embedding = None if embedding is None else embedding.to(device)
        store = SiteStore.open(home.store_path(plan.study_id))
        self._load_patients(store)
        self._coins = CanaryCoins.of_store(store, plan, site_id=home.site_id)
        self._canaries = self._coins.patients(
            preset_named(plan.model.preset).latent_shape(plan.data.grid_shape)
        )
        self._training_set = [*self.members, *self._coins.trained_on(self._canaries)]
        self._denoiser, self._parameters = load_prior(plan, package.prior)
        self._denoiser.to(device)
        public, _ = load_prior(plan, package.prior)
        self._public = public.requires_grad_(False).eval().to(device)
        self._trainer = PatientTrainer(
            self._denoiser,
            self._parameters,
            loss=self._denoiser.diffusion.per_sample_loss,
            execution_plan=self._execution,
            secret=secret,
            device=device,
            draw_timesteps=timesteps_from_uniform,
            performance=performance,
        )

    def _load_patients(self, store: SiteStore) -> None:
        plan = self._plan
        cache = LatentCache(
            self._directory / "latents",
            autoencoder=self._autoencoder,
            autoencoder_sha256=plan.model.autoencoder_sha256,
            grid=CanonicalGrid.from_clause(plan.data),
            device=self._device,
        )
        table, share = ConditionTable.from_clause(plan.data), plan.audit.holdout_share
        self.members, self.held_out = (
            cache.patients(store, scans, table=table, progress=self._progress)
            for scans in (store.members(share), store.held_out(share))
        )
        if not self.members:
            raise SiteError(
                f"no member's scan is in {store.root}",
                remedy="lacuna site import, with more patients; a share of them is always held out",
            )
        log.info("latents are ready")

    def training_vector(self, weights: NDArray[np.float32]) -> NDArray[np.int64]:
        """See :class:`client.site_agent.Workbench`."""
        assign(self._parameters, weights)
        privacy = self._plan.privacy
        match privacy.mode:
            case "distributed":
                return self._trainer.distributed_update(self._training_set)
            case "local":
                return self._trainer.local_update(self._training_set, steps=privacy.local_steps)
            case "unprotected":
                return self._trainer.unprotected_update(self._training_set, steps=privacy.local_steps)

    def audit_vector(self, weights: NDArray[np.float32], *, attempt: int) -> NDArray[np.int64]:
        """See :class:`client.site_agent.Workbench`. Raw figures go to the site's own ``audit.json``."""
        audit = self._audit(weights, attempt)
        counts = audit.counts.astype(np.int64)
        noise = audit_noise_share(
            self._execution,
            self._secret,
            counts_sensitivity=self._counts.sensitivity,
            length=self._counts.length,
        )
        return counts + noise

    def _audit(self, weights: NDArray[np.float32], attempt: int) -> LocalAudit:
        candidate = candidate_network(self._plan, self._package.prior, weights)
        audit = audit_candidate(
            plan=self._plan,
            public_denoiser=self._public,
            candidate_denoiser=candidate.requires_grad_(False).eval().to(self._device),
            autoencoder=self._autoencoder,
            copy_embedding=self._copy_embedding,
            members=self.members,
            held_out=self.held_out,
            device=self._device,
            progress=self._progress,
        )
        path = self._directory / "candidate.safetensors"
        sha256 = write_candidate(self._plan, self._package.prior, weights, path)
        opening = self._coins.opening(
            self._canary_scores(candidate), candidate_sha256=sha256, attempt=attempt
        )
        record = {
            "attempt": attempt,
            "candidate_sha256": sha256,
            "figures": audit.to_dict(),
            "canaries": opening.to_dict(),
        }
        write_private(self._directory / "audit.json", canonical_json(record))
        return audit

    def _canary_scores(self, candidate: Denoiser) -> FloatArray:
        """The primary attack on the in-run canaries, in or out."""
        clause = self._plan.audit
        noise = AttackNoise.from_plan_digest(
            self._plan.digest(),
            timesteps=clause.timesteps,
            draws_per_timestep=clause.draws_per_timestep,
            latent_shape=candidate.preset.latent_shape(self._plan.data.grid_shape),
        )
        losses = attack_losses(
            self._public,
            candidate,
            self._canaries,
            loss=candidate.diffusion.per_sample_loss,
            noise=noise,
            device=self._device,
            stage="canaries",
            progress=self._progress,
        )
        return losses.score_P

    def last_audit(self) -> AuditedCandidate | None:
        """See :class:`client.site_agent.Workbench`."""
        path = self._directory / "audit.json"
        if not path.exists():
            return None
        record = parse_json(path.read_bytes(), what=str(path))
        return AuditedCandidate(
            attempt=record["attempt"],
            candidate_sha256=record["candidate_sha256"],
            planted_leak=LocalAudit.from_dict(record["figures"]).planted_leak,
            canaries=CanaryOpening.from_dict(record["canaries"]) if "canaries" in record else None,
        )


def set_threads(count: int | None) -> None:
    """Limit torch to a number of CPU threads; None leaves its default."""
    if count is not None:
        torch.set_num_threads(count)


def performance(
    gradients: str, *, microbatch: int | None, draws_per_pass: int | None, bfloat16: bool
) -> Performance:
    """Performance settings by the names of the command line. Raises UsageError where one means nothing."""
    return Performance(
        backend=cast(Backend, gradients),
        microbatch=microbatch,
        draws_per_pass=draws_per_pass,
        autocast=torch.bfloat16 if bfloat16 else None,
    )
