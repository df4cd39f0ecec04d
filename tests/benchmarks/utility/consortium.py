"""Three hospitals in one process, with real agents, workbenches, ledgers, masks and round driver.

The audit at the end of a study is left out; what it would look for is measured apart (:mod:`jobs`).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from client.workbench import SiteWorkbench
from privacy.dp import trainer as trainer_module
from privacy.dp.calibration import propose_privacy
from privacy.dp.execution_plan import ExecutionPlan
from server.global_model import GlobalModel
from shared.model.denoiser import build_denoiser, flatten, parameter_subset
from shared.model.presets import preset_named
from shared.model.shipped import PretrainedPair
from shared.plan_package import PlanPackage
from shared.study_plan import default_threshold
from tests.benchmarks.training_consortium import TrainingConsortium
from tests.benchmarks.utility.cohorts import Cohort
from tests.benchmarks.utility.settings import Study

LARGEST_EPSILON = 15.0
"""Within a site's usual cap; studies without noise are planned with it, for their ranges."""


class UtilityConsortium(TrainingConsortium):
    """The hospitals of a cohort."""

    def __init__(
        self, root: Path, cohort: Cohort, study: Study, pair: PretrainedPair, preset: str, *, device: str
    ) -> None:
        self.cohort, self.study, self.pair, self.device = cohort, study, pair, device
        self.preset = preset
        n = len(cohort.hospitals)
        super().__init__(root, n=n, rounds=study.rounds, threshold=default_threshold(n, 1))

    def sign_plan(self, rounds: int, threshold: int) -> PlanPackage:
        cohort, study = self.cohort, self.study
        denoiser = build_denoiser(preset_named(self.preset), n_conditions=len(cohort.conditions))
        dimension = len(flatten(parameter_subset(denoiser, study.trainable)))
        proposed = propose_privacy(
            mode=study.mode, epsilon=LARGEST_EPSILON if study.epsilon is None else study.epsilon,
            delta=study.delta, clip_norm=study.clip, rounds=rounds, n_sites=len(self.homes),
            threshold=threshold, max_colluding=1, dimension=dimension,
            declared_patients=cohort.n_members, draws_per_patient=study.draws,
            local_steps=study.local_steps, local_learning_rate=study.learning_rate,
        )  # fmt: skip
        self.execution: ExecutionPlan = proposed.execution
        return self.sign_training_plan(
            study_id="utility", title="the utility benchmark", proposed=proposed,
            data={
                "conditions": list(cohort.conditions), "rare_condition": cohort.rare,
                "labels": list(cohort.labels), "grid_shape": list(cohort.grid_shape),
                "spacing_mm": list(cohort.spacing_mm),
            },
            model={
                "preset": self.preset, "trainable": study.trainable, "dimension": dimension,
                "server_learning_rate": study.learning_rate,
                "local_learning_rate": study.learning_rate,
                "ema_decay": study.ema_decay,
            },
            autoencoder=self.pair.autoencoder_path, prior=self.pair.prior_path,
        )  # fmt: skip

    def make_workbench(self, i: int, directory: Path) -> SiteWorkbench:
        source = self.cohort.source(i, self.root / f"scans-{i}")
        bench = self.import_site(i, source, device=self.device)
        assert len(bench.members) == len({v.patient_id for v in self.cohort.hospitals[i]})
        return bench


@contextmanager
def no_noise() -> Iterator[None]:
    """Clipping, grid and masks as always; the noise is left out. For the noiseless ceiling alone."""

    def zeros(execution: ExecutionPlan, *_: Any, **__: Any) -> NDArray[np.int64]:
        return np.zeros(execution.dimension, dtype=np.int64)

    with mock.patch.object(trainer_module, "noise_share", zeros):
        yield


def train_together(
    cohort: Cohort, study: Study, pair: PretrainedPair, preset: str, *, device: str
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """One study; the averaged weights after its last round, and what it was planned with."""
    with tempfile.TemporaryDirectory(prefix="lacuna-utility-") as folder:
        root = Path(folder)
        with mock.patch.dict(os.environ, {"LACUNA_COUNTER_DIR": str(root / "counters")}):
            consortium = UtilityConsortium(root, cohort, study, pair, preset, device=device)
            driver = consortium.training()
            if study.epsilon is None:
                with no_noise():
                    outcome = driver.run()
            else:
                outcome = driver.run()
            assert outcome.rounds == study.rounds
            path = consortium.store.checkpoint_path(study.rounds)
            weights = GlobalModel.restore(consortium.plan, path).ema
            execution = consortium.execution
            planned = {
                "dimension": execution.dimension,
                "noise_multiplier": execution.noise_multiplier if study.epsilon is not None else 0.0,
                "planned_epsilon": None if study.epsilon is None else execution.planned_epsilon().reported,
                "attempts_charged": max(consortium.charges(i) for i in range(len(consortium.homes))),
            }
            consortium.close()
    return weights, planned
