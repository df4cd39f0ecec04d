"""Which jobs there are, in the order in which they matter."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.benchmarks.utility.settings import Job, Public, Study, Task

HIPPOCAMPUS = Public(cohort="hippocampus", autoencoder_steps=2500, prior_steps=600)
ADRENAL = Public(cohort="adrenal", autoencoder_steps=1500, prior_steps=1500)
COHORTS = (HIPPOCAMPUS, ADRENAL)
LARGER_LATENTS = replace(HIPPOCAMPUS, latent_channels=8)
REPEATS = 3
"""Trainings behind the cells that the issue asks for most."""

UNTUNED = {
    "hippocampus": Study(epsilon=8.0),
    "adrenal": Study(epsilon=8.0, trainable="conditioning", clip=0.3),
}
CHANGES: dict[str, list[dict[str, Any]]] = {
    "hippocampus": [
        {},
        {"learning_rate": 3e-4},
        {"learning_rate": 2e-3},
        {"rounds": 60},
        {"rounds": 60, "learning_rate": 3e-4},
        {"rounds": 15, "learning_rate": 2e-3},
        {"draws": 16},
        {"trainable": "low_rank", "learning_rate": 3e-3},
        {"trainable": "conditioning"},
        {"trainable": "attention"},
        {"trainable": "class_embedding", "clip": 0.3, "draws": 8},
    ],
    "adrenal": [
        {},
        {"trainable": "class_embedding", "draws": 8},
        {"learning_rate": 3e-3},
        {"trainable": "all"},
        {"trainable": "all", "learning_rate": 3e-4},
    ],
}


def tries(cache: Path) -> list[Job]:
    """Real scans, the autoencoder's ceiling, the prior; then choices at epsilon 8."""
    del cache
    jobs = [
        Job(kind=kind, public=public, repeats=REPEATS)
        for public in COHORTS
        for kind in ("prior", "real", "ceiling")
    ]
    for public in COHORTS:
        base = UNTUNED[public.cohort]
        jobs += [
            Job(kind="study", public=public, study=replace(base, **change))
            for change in CHANGES[public.cohort]
        ]
    jobs += [Job(kind=kind, public=LARGER_LATENTS) for kind in ("ceiling", "prior")]
    return jobs


def choose(cache: Path) -> dict[str, Study]:
    """The setting of the tables.

    Hippocampus: the try with the lowest loss on public patients that the prior was not trained on. Adrenal:
    chosen beforehand (the public glands have no hyperplasia, so public loss says nothing about it).
    """
    best: dict[str, tuple[float, Study]] = {}
    for job in tries(cache):
        path = cache / f"{job.key}.json"
        if job.study is None or job.public != HIPPOCAMPUS or not path.exists():
            continue
        loss = json.loads(path.read_text())["values"]["public_loss"]
        best["hippocampus"] = min(
            best.get("hippocampus", (loss, job.study)), (loss, job.study), key=lambda x: x[0]
        )
    return {name: best.get(name, (0.0, study))[1] for name, study in UNTUNED.items()}


def headline(cache: Path) -> list[Job]:
    """Every epsilon in both modes, under the chosen setting."""
    chosen = choose(cache)
    jobs = []
    for public in COHORTS:
        study = chosen[public.cohort]
        changes: list[tuple[dict[str, Any], int]] = [({"epsilon": None}, 0), ({}, 0)]
        changes += [({"mode": "local"}, 0)]
        changes += [({"epsilon": epsilon}, 0) for epsilon in (3.0, 1.0, 10.0)]
        changes += [({"epsilon": e}, repeat) for repeat in range(1, REPEATS) for e in (8.0, None)]
        changes += [({"mode": "local", "epsilon": e}, 0) for e in (1.0, 3.0, 10.0, None)]
        jobs += [
            Job(kind="study", public=public, study=replace(study, **change), repeat=repeat)
            for change, repeat in changes
        ]
    jobs.sort(key=lambda job: job.repeat)
    base = chosen["hippocampus"]
    jobs += [
        Job(kind="study", public=LARGER_LATENTS, study=replace(base, epsilon=epsilon))
        for epsilon in (8.0, None)
    ]
    return jobs


def toy(cache: Path) -> list[Job]:
    """Seconds instead of minutes: does every part run?"""
    del cache
    jobs: list[Job] = []
    for cohort in ("hippocampus", "adrenal"):
        public = Public(cohort=cohort, coarse=True, autoencoder_steps=3, prior_steps=3)
        small: dict[str, Any] = {"public": public, "samples": 4, "task": Task(steps=2), "copy_samples": 4}
        study = Study(epsilon=8.0, rounds=1, draws=1, trainable="low_rank")
        jobs += [Job(kind="real", **small), Job(kind="ceiling", **small), Job(kind="prior", **small)]
        jobs += [Job(kind="study", study=study, **small)]
        jobs += [Job(kind="study", study=replace(study, epsilon=None, trainable="all"), **small)]
        jobs += [Job(kind="study", study=replace(study, mode="local", trainable="conditioning"), **small)]
    return jobs


SMALL = {
    "hippocampus": Public(
        cohort="hippocampus", coarse=True, preset="micro", latent_channels=8, autoencoder_steps=1200,
        prior_steps=600, embedding_steps=50, bfloat16=True,
    ),
    "adrenal": Public(
        cohort="adrenal", coarse=True, preset="micro", latent_channels=8, autoencoder_steps=1500,
        batch_size=16, prior_steps=1500, embedding_steps=50, bfloat16=True,
    ),
}  # fmt: skip
"""Networks that one core trains in minutes: a hippocampus is 8 x 4 x 6 x 4 numbers, a gland 8 x 4 x 4 x 4."""

SMALL_TASK = {
    "hippocampus": Task(steps=150),
    "adrenal": Task(steps=300, batch_size=16, small=True),
}
SMALL_SAMPLES = {"hippocampus": 160, "adrenal": 320}
SMALL_GUIDANCE = {"hippocampus": 1.0, "adrenal": 3.0}
SMALL_STUDY = Study(epsilon=8.0, rounds=20, draws=8, trainable="class_embedding", clip=0.3)
SMALL_CHANGES: dict[str, list[dict[str, Any]]] = {
    "hippocampus": [
        {"trainable": "conditioning"},
        {"trainable": "conditioning", "epsilon": None},
        {"trainable": "attention"},
        {"trainable": "low_rank"},
        {"trainable": "all", "clip": 0.5, "learning_rate": 3e-4},
        {"trainable": "all", "clip": 0.5, "learning_rate": 3e-4, "epsilon": None},
        {"draws": 32},
        {"rounds": 40, "ema_decay": 0.95},
        {"clip": 0.1},
        {"learning_rate": 3e-3},
    ],
    "adrenal": [
        {"trainable": "conditioning"},
        {"trainable": "conditioning", "epsilon": None},
        {"trainable": "all", "clip": 0.5, "learning_rate": 3e-4},
        {"draws": 4},
        {"rounds": 40, "ema_decay": 0.95},
    ],
}


def _small(
    cohort: str,
    kind: Any,
    *,
    study: Study | None = None,
    repeat: int = 0,
    repeats: int = 1,
    with_real: tuple[str, ...] = ("smallest", "all"),
    guidance: float | None = None,
) -> Job:
    own = SMALL_GUIDANCE[cohort] if kind in ("prior", "study") else 1.0
    return Job(
        kind=kind, public=SMALL[cohort], samples=SMALL_SAMPLES[cohort], copy_samples=0,
        task=SMALL_TASK[cohort], with_real=with_real, study=study, repeat=repeat, repeats=repeats,
        guidance=own if guidance is None else guidance, same_noise=cohort == "adrenal",
    )  # fmt: skip


def _levels(cohort: str, repeat: int) -> list[Job]:
    """Real scans, the autoencoder's ceiling, the prior, no noise, epsilon 8."""
    jobs = [_small(cohort, kind, repeat=repeat) for kind in ("real", "ceiling", "prior")]
    studies = (replace(SMALL_STUDY, epsilon=None), SMALL_STUDY)
    return jobs + [_small(cohort, "study", study=study, repeat=repeat) for study in studies]


def levels(cache: Path) -> list[Job]:
    """The cells that everything else is compared with."""
    del cache
    return [job for cohort in SMALL for job in _levels(cohort, 0)]


def epsilons(cache: Path) -> list[Job]:
    """Other budgets, and mode ``local``."""
    del cache
    changes: list[dict[str, Any]] = [{"epsilon": 1.0}, {"epsilon": 3.0}, {"epsilon": 10.0}]
    changes += [{"mode": "local", "epsilon": epsilon} for epsilon in (8.0, 1.0, 3.0, 10.0, None)]
    return [
        _small(cohort, "study", study=replace(SMALL_STUDY, **change), repeats=2)
        for cohort in SMALL
        for change in changes
    ]


def repeated(cache: Path) -> list[Job]:
    """The levels twice more, with other seeds and noise."""
    del cache
    return [job for repeat in range(1, REPEATS) for cohort in SMALL for job in _levels(cohort, repeat)]


def small_tries(cache: Path) -> list[Job]:
    """Other choices at epsilon 8 (some without noise); other guidance of the same release."""
    del cache
    jobs = [
        _small("adrenal", kind, study=study, guidance=guidance, repeats=2, with_real=())
        for guidance in (2.0, 1.0)
        for kind, study in (("prior", None), ("study", SMALL_STUDY))
    ]
    return jobs + [
        _small(cohort, "study", study=replace(SMALL_STUDY, **change), repeats=2, with_real=())
        for cohort in SMALL
        for change in SMALL_CHANGES[cohort]
    ]


STAGES: dict[str, tuple[Callable[[Path], list[Job]], ...]] = {
    "two_cores": (levels, epsilons, repeated, small_tries),
    "all": (tries, headline),
    "toy": (toy,),
}
"""One after the other: what a stage asks for may depend on the figures before it."""


def chosen_by(name: str, cache: Path) -> dict[str, tuple[Public, Study, float]]:
    """Networks, setting and guidance of a run's tables; its other studies are tries."""
    if name == "two_cores":
        return {cohort: (SMALL[cohort], SMALL_STUDY, SMALL_GUIDANCE[cohort]) for cohort in SMALL}
    studies = choose(cache)
    return {public.cohort: (public, studies[public.cohort], 1.0) for public in COHORTS}
