"""Real agents in one process for benchmarks that train: a plan and a driver without an audit.

Only the clock is not real (deadlines are far away).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from client.ingest.scan import ScanSource
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from client.workbench import SiteWorkbench
from privacy.dp.calibration import ProposedPrivacy
from privacy.secret_random import SecretRandom
from server.attempt import AttemptTask
from server.exchange import Pace
from server.round_driver import RoundDriver
from shared.plan_package import PlanPackage, hash_file
from shared.study_plan import parse_plan

TESTS = Path(__file__).resolve().parents[1]
for folder in (str(TESTS), str(TESTS / "server")):  # as the conftest files do for tests
    if folder not in sys.path:
        sys.path.insert(0, folder)

from in_memory_consortium import Consortium  # noqa: E402

NO_HURRY = Pace(exchange_s=36_000, quorum_s=60, hello_s=60, poll_s=0.0, node_check_s=0.0)


class TrainingConsortium(Consortium):
    """Every hospital with its own patients, imported and encoded as ``lacuna site`` does it."""

    def sign_training_plan(
        self,
        *,
        study_id: str,
        title: str,
        data: dict[str, Any],
        model: dict[str, Any],
        proposed: ProposedPrivacy,
        autoencoder: Path,
        prior: Path,
    ) -> PlanPackage:
        """A plan whose patients are all members; ``model`` without the networks' hashes."""
        hashes = {"autoencoder_sha256": hash_file(autoencoder), "prior_sha256": hash_file(prior)}
        plan = parse_plan(
            {
                "format": "lacuna/study-plan/v1",
                "study_id": study_id,
                "title": title,
                "roster": self.roster(),
                "data": data,
                "model": {**model, **hashes},
                "privacy": proposed.privacy.model_dump(),
                "secure_aggregation": proposed.secure_aggregation.model_dump(),
                "audit": {
                    "score_edges": [0.0], "control_edges": [0.0], "copy_distance": 1.0,
                    "holdout_share": 1e-9,
                },
                "release": {"site_approvals": 2},
            },
            what=f"plan of {title}",
        )  # fmt: skip
        return self.write_package(plan, autoencoder=autoencoder, prior=prior)

    def import_site(self, i: int, source: ScanSource, *, device: str = "cpu") -> SiteWorkbench:
        """Site i's own workbench, on the scans of ``source``, all of which must be sound."""
        store = SiteStore.create(self.homes[i].store_path(self.package.plan.study_id))
        report = import_scans(source, store, self.package.plan.data)
        assert not report.problems, report.problems
        return SiteWorkbench(home=self.homes[i], package=self.package, secret=SecretRandom(), device=device)

    def training(self) -> RoundDriver:
        """The round driver, which stops where the audit would begin."""
        return _TrainingAlone(self.transport, self.store, run_id="1", pace=NO_HURRY)

    def close(self) -> None:
        """Close ledgers and store."""
        for ledger in self.ledgers.values():
            ledger.close()
        self.store.close()


class _TrainingAlone(RoundDriver):
    def _next_task(self, *, ahead: int) -> AttemptTask | None:
        task = super()._next_task(ahead=ahead)
        return task if task is None or task.purpose == "train" else None

    def _collect_verdicts(self) -> tuple[str, ...]:
        return ()
