"""Hospitals with hippocampus scans in one process: real agents, workbenches, ledgers, masks and driver.

Only the clock is not real (deadlines are far away) and only the audit is left out. What a site adds before
noise, and its noise, are read off inside the process; no message carries them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from client.ingest.decathlon import (
    VOLUME_CONDITIONS,
    DecathlonFolder,
    public_mask_paths,
    split_patients,
    volume_condition_cut,
)
from client.workbench import SiteWorkbench
from deploy.public_networks import PublicSource, read_public
from privacy.dp import trainer as trainer_module
from privacy.dp.calibration import propose_privacy
from privacy.dp.noise import noise_share
from privacy.dp.trainer import PatientTrainer
from server.global_model import GlobalModel
from server.pretrain import PublicVolume, default_recipe, held_out_patients, pretrain
from shared.model.autoencoder import build_autoencoder
from shared.model.candidate import load_prior
from shared.model.denoiser import assign, build_denoiser, flatten, parameter_subset
from shared.model.presets import preset_named
from shared.model.training import TrainingSchedule, encode_batches, held_out_loss
from shared.model.weights import load_weights
from shared.plan_package import PlanPackage
from shared.study_plan import default_threshold
from shared.volumes.canonical_grid import CanonicalGrid
from tests.benchmarks.modes_compared.comparison import MAX_COLLUDING
from tests.benchmarks.training_consortium import TrainingConsortium

TASK = "Task04_Hippocampus"
LABELS = ("anterior", "posterior")
PRESET = "micro"
GRID, SPACING_MM = (16, 24, 16), (2.0, 2.0, 2.0)
PUBLIC_PATIENTS, HELD_OUT_PATIENTS, SPLIT_SEED = 36, 24, 7
AUTOENCODER_STEPS, PRIOR_STEPS = 400, 60

EPSILON, DELTA, CLIP, DRAWS, TRAINABLE = 8.0, 1e-5, 0.5, 4, "all"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One private training. ``learning_rate``: the server's in ``distributed``, the sites' in ``local``."""

    mode: Literal["distributed", "local"]
    n_sites: int
    local_steps: int
    rounds: int
    learning_rate: float
    repeat: int

    @property
    def max_attempts(self) -> int:
        """A retry reserve of a fifth, so that all settings are charged for as many steps."""
        return self.rounds + self.rounds // 5

    @property
    def name(self) -> str:
        return (
            f"{self.mode}-{self.n_sites}-sites-{self.rounds}x{self.local_steps}-"
            f"lr-{self.learning_rate:g}-{self.repeat}"
        )


class PublicPart:
    """What is public: two networks trained on public patients, and public patients that neither saw.

    Args:
        data: Folder with the Decathlon task.
        root: Where the networks are kept; training goes on where it was stopped.
    """

    def __init__(self, data: Path, root: Path, *, progress: Callable[[str], None]) -> None:
        self.task, self.table = data / TASK, data / TASK / "patients.csv"
        self.root = root
        patients = sorted(set(pd.read_csv(self.table)["patient_id"].astype(str)))
        self.patients, _ = split_patients(patients, public=PUBLIC_PATIENTS, sites=1, seed=SPLIT_SEED)
        self.members = sorted(set(patients) - set(self.patients))
        self.cut_mm3 = volume_condition_cut(public_mask_paths(self.task, self.table, self.patients))
        self._train(progress)
        self._encode_held_out()

    def site_patients(self, n_sites: int) -> list[list[str]]:
        """The same patients whatever the number of sites, dealt out evenly."""
        everybody = sorted([*self.patients, *self.members])
        public, sites = split_patients(everybody, public=PUBLIC_PATIENTS, sites=n_sites, seed=SPLIT_SEED)
        assert public == self.patients
        return sites

    def _volumes(self) -> list[PublicVolume]:
        listing = self.root / "public.txt"
        listing.write_text("\n".join(self.patients))
        source = PublicSource(
            nifti=None, decathlon=self.task, patients=self.table, only=listing, volume_cut_mm3=self.cut_mm3
        )
        grid = CanonicalGrid(shape=GRID, spacing_mm=SPACING_MM)
        return read_public(source, grid, conditions=VOLUME_CONDITIONS, labels=LABELS)

    def _train(self, progress: Callable[[str], None]) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        preset, share = preset_named(PRESET), HELD_OUT_PATIENTS / PUBLIC_PATIENTS
        self._public = self._volumes()
        self.unseen = set(held_out_patients(self.patients, share))
        recipe = replace(
            default_recipe(preset, seed=1),
            autoencoder=TrainingSchedule(
                steps=AUTOENCODER_STEPS, batch_size=8, learning_rate=2e-3, seed=1, ema_decay=0.99
            ),
            prior=TrainingSchedule(steps=PRIOR_STEPS, batch_size=32, learning_rate=2e-3, seed=1),
            held_out_share=share,
        )
        self.autoencoder = self.root / "autoencoder.safetensors"
        self.prior = self.root / "prior.safetensors"
        if not (self.root / "recipe.json").exists():
            pretrain(
                preset=preset, volumes=self._public, conditions=VOLUME_CONDITIONS, labels=LABELS,
                out_dir=self.root, recipe=recipe, data_description="public hippocampus scans at 2 mm",
                progress=lambda stage, done, total, _: progress(f"{stage} {done}/{total}"),
            )  # fmt: skip

    def _encode_held_out(self) -> None:
        own = [volume for volume in self._public if volume.patient_id in self.unseen]
        autoencoder = build_autoencoder(preset_named(PRESET), n_labels=len(LABELS))
        load_weights(autoencoder, self.autoencoder)
        image = torch.from_numpy(np.stack([v.image for v in own]).astype(np.float32))[:, None]
        mask = torch.from_numpy(np.stack([v.mask for v in own]).astype(np.uint8))
        self.z_MCDHW = encode_batches(autoencoder, image, mask)
        self.condition_M = torch.tensor([VOLUME_CONDITIONS.index(v.condition) for v in own])


class HippocampusConsortium(TrainingConsortium):
    """Every site with its own patients, imported and encoded as ``lacuna site`` does it."""

    def __init__(self, root: Path, setting: Setting, public: PublicPart) -> None:
        self.setting, self.public = setting, public
        self.trained: dict[int, int] = {}
        threshold = default_threshold(setting.n_sites, MAX_COLLUDING)
        super().__init__(root, n=setting.n_sites, rounds=setting.rounds, threshold=threshold)

    def sign_plan(self, rounds: int, threshold: int) -> PlanPackage:
        setting, public = self.setting, self.public
        denoiser = build_denoiser(preset_named(PRESET), n_conditions=len(VOLUME_CONDITIONS))
        dimension = len(flatten(parameter_subset(denoiser, TRAINABLE)))
        proposed = propose_privacy(
            mode=setting.mode, epsilon=EPSILON, delta=DELTA, clip_norm=CLIP, rounds=rounds,
            n_sites=setting.n_sites, threshold=threshold, max_colluding=MAX_COLLUDING, dimension=dimension,
            declared_patients=len(public.members), draws_per_patient=DRAWS, local_steps=setting.local_steps,
            max_attempts=setting.max_attempts, local_learning_rate=setting.learning_rate,
        )  # fmt: skip
        self.execution = proposed.execution
        return self.sign_training_plan(
            study_id="modes-compared", title=setting.name, proposed=proposed,
            data={
                "conditions": list(VOLUME_CONDITIONS), "rare_condition": VOLUME_CONDITIONS[0],
                "labels": list(LABELS), "grid_shape": list(GRID), "spacing_mm": list(SPACING_MM),
            },
            model={
                "preset": PRESET, "trainable": TRAINABLE, "dimension": dimension,
                "server_learning_rate": setting.learning_rate,
                "local_learning_rate": setting.learning_rate,
            },
            autoencoder=public.autoencoder, prior=public.prior,
        )  # fmt: skip

    def make_workbench(self, i: int, directory: Path) -> SiteWorkbench:
        public = self.public
        own = frozenset(public.site_patients(self.setting.n_sites)[i])
        bench = self.import_site(
            i,
            DecathlonFolder(
                path=public.task, patients_csv=public.table, patient_ids=own, volume_cut_mm3=public.cut_mm3
            ),
        )
        self.trained[i] = len(bench.members)
        assert len(bench.members) == len(own)
        return bench


class WatchedSums:
    """Signal and noise of the sum over all sites, by round: norms in units of the clip norm.

    In mode ``local`` a round has several steps; the signal and the noise of a round are those of the sums
    over sites of the first step's, the second's, and so on, root mean square.
    """

    def __init__(self, setting: Setting) -> None:
        self._setting = setting
        self._calls = 0
        self._noise: NDArray[np.int64] | None = None
        self._sums: dict[int, list[NDArray[np.float64]]] = {}
        self.rounds: list[tuple[float, float]] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        noised_sum = PatientTrainer._noised_sum

        def drawn(*arguments: Any) -> NDArray[np.int64]:
            self._noise = noise_share(*arguments)
            return self._noise

        def summed(trainer: PatientTrainer, patients: Any) -> NDArray[np.int64]:
            vector = noised_sum(trainer, patients)
            plan = trainer._plan
            assert self._noise is not None
            scale = plan.gradient_grid_step / plan.clip
            self._add((vector - self._noise) * scale, self._noise * scale)
            self._noise = None
            return vector

        with (
            mock.patch.object(trainer_module, "noise_share", drawn),
            mock.patch.object(PatientTrainer, "_noised_sum", summed),
        ):
            yield

    def _add(self, signal: NDArray[np.float64], noise: NDArray[np.float64]) -> None:
        step = self._calls % self._setting.local_steps
        self._calls += 1
        sums = self._sums.setdefault(step, [np.zeros_like(signal), np.zeros_like(noise)])
        sums[0] += signal
        sums[1] += noise
        if self._calls % (self._setting.local_steps * self._setting.n_sites) == 0:
            norms = np.array([[np.linalg.norm(part) for part in sums] for sums in self._sums.values()])
            signal_norm, noise_norm = np.sqrt((norms**2).mean(axis=0))
            self.rounds.append((float(signal_norm), float(noise_norm)))
            self._sums = {}


def train(root: Path, setting: Setting, public: PublicPart) -> dict[str, Any]:
    """One training over the in-memory transport; its figures."""
    watched = WatchedSums(setting)
    consortium = HippocampusConsortium(root, setting, public)
    plan = consortium.plan
    with watched.installed():
        outcome = consortium.training().run()
    assert outcome.rounds == setting.rounds and len(watched.rounds) == setting.rounds
    denoiser, parameters = load_prior(plan, public.prior)

    def loss() -> float:
        return held_out_loss(denoiser, public.z_MCDHW, public.condition_M)

    losses = [loss()]
    for number in range(1, setting.rounds + 1):
        model = GlobalModel.restore(plan, consortium.store.checkpoint_path(number))
        assign(parameters, model.ema)
        losses.append(loss())
    charged = [consortium.charges(i) for i in range(setting.n_sites)]
    consortium.close()
    execution = consortium.execution
    return {
        **asdict(setting),
        "threshold": execution.threshold,
        "dimension": execution.dimension,
        "members": sum(consortium.trained.values()),
        "planned_epsilon": execution.planned_epsilon().reported,
        "steps_accounted": execution.max_attempts * execution.local_steps,
        "attempts_charged": max(charged),
        "noise_multiplier": execution.noise_multiplier,
        "signal_and_noise": watched.rounds,
        "held_out_loss": losses,
    }
