"""A site's in-run canaries: coins that it commits to before round 1, and their opening after the audit.

Coins and the nonce that hides them come from the site's secret key, so that a restarted agent trains on the
same canaries, and nothing has to be kept but what is kept anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from client.patient_dataset import SiteStore
from privacy.audit.bounds import FloatArray
from privacy.audit.canary_opening import COMMITMENT_KIND, CanaryOpening, coin_commitment
from privacy.audit.in_run_canaries import canary_patients
from privacy.dp.patients import PatientScans
from privacy.ledger import Ledger
from shared.errors import SiteError
from shared.study_plan import StudyPlan


@dataclass(frozen=True, kw_only=True, repr=False)
class CanaryCoins:
    """Who of a site's canaries is trained on, and the nonce of the commitment. Secret until opened."""

    plan: StudyPlan
    site_id: str
    nonce: bytes
    coins: tuple[bool, ...]

    def __repr__(self) -> str:
        return "CanaryCoins(<secret>)"

    @classmethod
    def of_store(cls, store: SiteStore, plan: StudyPlan, *, site_id: str) -> CanaryCoins:
        """Derive them from the key of the study's store; none where the plan asks for none."""
        nonce, coins = store.canary_coins(plan.digest(), plan.audit.canaries_per_site)
        return cls(plan=plan, site_id=site_id, nonce=nonce, coins=coins)

    @property
    def commitment(self) -> str:
        """What goes into the ledger, hexadecimal."""
        return coin_commitment(self.plan.digest(), self.site_id, self.nonce, self.coins)

    def patients(self, latent_shape: tuple[int, ...]) -> list[PatientScans]:
        """All canaries, in or out."""
        return canary_patients(
            self.plan.digest(),
            self.site_id,
            len(self.coins),
            latent_shape=latent_shape,
            n_conditions=len(self.plan.data.conditions),
        )

    def trained_on(self, canaries: Sequence[PatientScans]) -> list[PatientScans]:
        """Those of them that take part in training, as members do."""
        return [canary for canary, coin in zip(canaries, self.coins, strict=True) if coin]

    def opening(self, scores: FloatArray, *, candidate_sha256: str, attempt: int) -> CanaryOpening:
        """What is told after the audit."""
        return CanaryOpening(
            study_id=self.plan.study_id,
            plan_sha256=self.plan.digest().hex(),
            candidate_sha256=candidate_sha256,
            attempt=attempt,
            site_id=self.site_id,
            nonce=self.nonce.hex(),
            coins=self.coins,
            scores=tuple(float(score) if np.isfinite(score) else None for score in scores),
        )


def commit_to_canaries(coins: CanaryCoins, ledger: Ledger) -> None:
    """Record the commitment, once, before anything is charged; nothing where the plan has no canaries.

    Raises:
        SiteError: the ledger commits to other coins, or the study was charged before.
    """
    study_id = coins.plan.study_id
    if not coins.coins:
        return
    recorded = [
        entry.body["details"].get("commitment")
        for entry in ledger.entries()
        if entry.kind == COMMITMENT_KIND and entry.body["details"].get("study_id") == study_id
    ]
    if recorded:
        if recorded[0] != coins.commitment:
            raise SiteError(
                f"the ledger commits study {study_id!r} to other canaries than this site's key gives",
                remedy="put the study's first store back: coins must not change during a study",
            )
        return
    if ledger.last_registered_attempt(study_id) is not None:
        raise SiteError(f"study {study_id!r} began without a commitment to its canaries")
    details = {"study_id": study_id, "count": len(coins.coins), "commitment": coins.commitment}
    ledger.record(COMMITMENT_KIND, details)
