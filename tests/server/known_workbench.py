"""A site's workbench with known integers in place of patients: powers of two, so that a site that is counted
twice or left out shows in every coordinate of a sum."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.site_agent import AuditedCandidate
from privacy.audit.counts import CountsLayout
from privacy.audit.verdict import PlantedLeak
from shared.model.candidate import write_candidate
from shared.plan_package import PlanPackage


class KnownWorkbench:
    """Uploads ``1 << position`` in every coordinate, and counts calls."""

    def __init__(self, package: PlanPackage, directory: Path, position: int) -> None:
        self._package = package
        self._directory = directory
        self._value = 1 << position
        self._last: AuditedCandidate | None = None
        self.trained = 0
        self.before_upload: Callable[[], None] = lambda: None

    def training_vector(self, weights: NDArray[np.float32]) -> NDArray[np.int64]:
        self.trained += 1
        self.before_upload()
        return np.full(len(weights), self._value, dtype=np.int64)

    def audit_vector(self, weights: NDArray[np.float32], *, attempt: int) -> NDArray[np.int64]:
        plan = self._package.plan
        sha256 = write_candidate(plan, self._package.prior, weights, self._directory / "c.safetensors")
        leak = PlantedLeak(auc=0.9, n_planted=16, n_fresh=16)
        self._last = AuditedCandidate(attempt=attempt, candidate_sha256=sha256, planted_leak=leak)
        return np.full(CountsLayout.from_plan(plan).length, self._value, dtype=np.int64)

    def last_audit(self) -> AuditedCandidate | None:
        return self._last
