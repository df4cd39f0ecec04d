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
    ],
    "adrenal": [
        {},
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
        cohort="hippocampus", coarse=True, preset="micro", latent_channels=8, autoencoder_steps=600,
        prior_steps=200, embedding_steps=50, bfloat16=True,
    ),
    "adrenal": Public(
        cohort="adrenal", coarse=True, preset="micro", latent_channels=8, autoencoder_steps=600,
        batch_size=16, prior_steps=200, embedding_steps=50, bfloat16=True,
    ),
}  # fmt: skip
"""Networks that one core trains in minutes: a hippocampus is 8 x 4 x 6 x 4 numbers, a gland 8 x 4 x 4 x 4."""

SMALL_TASK = {
    "hippocampus": Task(steps=150),
    "adrenal": Task(steps=150, batch_size=16, small=True),
}
SMALL_STUDY = {
    "hippocampus": Study(epsilon=8.0, rounds=20),
    "adrenal": Study(epsilon=8.0, rounds=20, trainable="conditioning", clip=0.3),
}
SMALL_CHANGES: dict[str, list[dict[str, Any]]] = {
    "hippocampus": [{"learning_rate": 3e-4}, {"trainable": "conditioning", "clip": 0.3}],
    "adrenal": [{"learning_rate": 3e-3}, {"trainable": "all", "clip": 0.5, "learning_rate": 3e-4}],
}
FURTHER_CHANGES: list[dict[str, Any]] = [
    {"trainable": "low_rank", "clip": 0.3},
    {"trainable": "attention", "clip": 0.3},
]


SMALL_GUIDANCE = {"hippocampus": 1.0, "adrenal": 2.0}
"""That of the cohort's own preset."""


def _small(
    cohort: str, kind: Any, *, study: Study | None = None, repeat: int = 0, guidance: float | None = None
) -> Job:
    own = SMALL_GUIDANCE[cohort] if kind in ("prior", "study") else 1.0
    return Job(
        kind=kind, public=SMALL[cohort], samples=160, copy_samples=0, task=SMALL_TASK[cohort],
        with_real=("smallest",), study=study, repeat=repeat, guidance=own if guidance is None else guidance,
        same_noise=cohort == "adrenal",
    )  # fmt: skip


def _levels(cohort: str, study: Study, repeat: int = 0) -> list[Job]:
    """Real scans, the autoencoder's ceiling, the prior, no noise, the study's epsilon."""
    jobs = [_small(cohort, kind, repeat=repeat) for kind in ("real", "ceiling", "prior")]
    studies = (replace(study, epsilon=None), study)
    return jobs + [_small(cohort, "study", study=each, repeat=repeat) for each in studies]


def _tried(cohort: str) -> list[Job]:
    studies = [replace(SMALL_STUDY[cohort], **change) for change in ({}, *SMALL_CHANGES[cohort])]
    return [_small(cohort, "study", study=study) for study in studies]


def small_choice(cache: Path) -> dict[str, Study]:
    """As :func:`choose`: hippocampus by public loss, adrenal beforehand."""
    studies = {**SMALL_STUDY}
    losses = {
        job.study: json.loads(path.read_text())["values"]["public_loss"]
        for job in _tried("hippocampus")
        if (path := cache / f"{job.key}.json").exists() and job.study is not None
    }
    if losses:
        studies["hippocampus"] = min(losses, key=lambda study: losses[study])
    return studies


def hippocampus(cache: Path) -> list[Job]:
    """Real scans, ceiling, prior, no noise and epsilon 8, untuned."""
    del cache
    return _levels("hippocampus", SMALL_STUDY["hippocampus"])


def adrenal(cache: Path) -> list[Job]:
    """The same."""
    del cache
    return _levels("adrenal", SMALL_STUDY["adrenal"])


def tries_of_hippocampus(cache: Path) -> list[Job]:
    """Other choices at epsilon 8."""
    del cache
    return _tried("hippocampus")


def tries_of_adrenal(cache: Path) -> list[Job]:
    """Without guidance; other choices at epsilon 8."""
    del cache
    study = SMALL_STUDY["adrenal"]
    unguided = [
        _small("adrenal", "study", study=each, guidance=1.0) for each in (study, replace(study, epsilon=None))
    ]
    return [_small("adrenal", "prior", guidance=1.0), *unguided, *_tried("adrenal")]


def epsilons(cache: Path) -> list[Job]:
    """Epsilon 1 and 3, mode ``local`` and no noise, under the chosen setting."""
    chosen = small_choice(cache)
    changes: list[dict[str, Any]] = [{"epsilon": 1.0}, {"epsilon": 3.0}, {"mode": "local"}, {"epsilon": None}]
    return [
        _small(cohort, "study", study=replace(chosen[cohort], **change))
        for cohort in ("adrenal", "hippocampus")
        for change in changes
    ]


def repeated(cache: Path) -> list[Job]:
    """The levels once more, with other seeds and noise."""
    chosen = small_choice(cache)
    return [
        job
        for cohort in ("adrenal", "hippocampus")
        for job in _levels(cohort, chosen[cohort], repeat=1)[::-1]
    ]


def further_tries(cache: Path) -> list[Job]:
    """Subsets that hold no row of the conditions."""
    del cache
    return [
        _small("hippocampus", "study", study=replace(SMALL_STUDY["hippocampus"], **change))
        for change in FURTHER_CHANGES
    ]


STAGES: dict[str, tuple[Callable[[Path], list[Job]], ...]] = {
    "two_cores": (
        hippocampus,
        adrenal,
        tries_of_hippocampus,
        epsilons,
        tries_of_adrenal,
        repeated,
        further_tries,
    ),
    "all": (tries, headline),
    "toy": (toy,),
}
"""One after the other: what a stage asks for may depend on the figures before it."""


def chosen_by(name: str, cache: Path) -> dict[str, tuple[Public, Study, float]]:
    """Networks, setting and guidance of a run's tables; its other studies are tries."""
    if name == "two_cores":
        studies = small_choice(cache)
        return {cohort: (SMALL[cohort], studies[cohort], SMALL_GUIDANCE[cohort]) for cohort in SMALL}
    studies = choose(cache)
    return {public.cohort: (public, studies[public.cohort], 1.0) for public in COHORTS}
