"""What is measured: each job is one JSON file of figures, named after all that decides it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

VERSION = 3
"""Raise it when figures of an earlier version do not compare any more."""


@dataclass(frozen=True, kw_only=True)
class Public:
    """Public networks of a cohort. None leaves what preset and recipe say.

    Attributes:
        coarse: Half the grid along each axis, voxels twice as long: an eighth of the work.
        preset: Architecture; None: the cohort's.
        latent_channels: In place of the preset's.
        batch_size: Volumes of an autoencoder's step.
        embedding_steps: Of the copy check's embedding.
        bfloat16: For the autoencoder alone. On grids as small as a coarse latent's, gradients under autocast
            were not finite on a CPU (torch 2.13): neither denoiser nor segmenter trained.
    """

    cohort: str
    autoencoder_steps: int
    prior_steps: int
    coarse: bool = False
    preset: str | None = None
    latent_channels: int | None = None
    batch_size: int | None = None
    embedding_steps: int | None = None
    bfloat16: bool = False
    seed: int = 1

    @property
    def key(self) -> str:
        return _key("public", asdict(self))


@dataclass(frozen=True, kw_only=True)
class Task:
    """Training of a segmenter or classifier.

    Attributes:
        batch_size: None: 8 for a segmenter, 32 for a classifier.
        small: A classifier with half of ResNet-18's channels, which halves the grid once more.
    """

    steps: int = 600
    batch_size: int | None = None
    small: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file of figures.

    Attributes:
        kind: ``real`` (trained on real scans: everybody's, each hospital's), ``ceiling`` (on the members as
            the autoencoder gives them back), ``prior`` (on samples of the prior) or ``study`` (on samples of
            what a consortium trained).
        repeats: Trainings of the segmenter or classifier, each with a seed of its own.
        task: How segmenter or classifier train.
        with_real: Whose real scans synthetic ones are joined with: the ``smallest`` hospital's, ``all``.
        copy_samples: Samples that members are compared with; 0: those that the task trains on.
        study: For kind ``study``: see :class:`Study`.
        guidance: Classifier-free guidance when sampling; 1 is none.
        same_noise: Samples of each condition start from the same noise, as those of ``lacuna generate`` under
            one seed do: what differs between conditions is then the condition alone.
        repeat: Decides the seeds of trainings and samples; the noise of a study is new every time.
    """

    kind: Literal["real", "ceiling", "prior", "study"]
    public: Public
    repeats: int = 1
    samples: int = 200
    task: Task = Task()
    with_real: tuple[str, ...] = ("smallest", "all")
    copy_samples: int = 512
    study: Study | None = None
    guidance: float = 1.0
    same_noise: bool = False
    repeat: int = 0

    @property
    def key(self) -> str:
        return _key(f"{self.public.cohort}-{self.kind}", asdict(self))

    @property
    def weights_key(self) -> str:
        """Of what the study trains, however it is then sampled."""
        return _key("weights", {name: asdict(self)[name] for name in ("public", "study", "repeat")})


@dataclass(frozen=True, kw_only=True)
class Study:
    """A private training by three hospitals.

    Attributes:
        epsilon: None: clipped as always, but no noise (no guarantee).
        clip: C; gradient norms of all patients are above it.
    """

    mode: Literal["distributed", "local"] = "distributed"
    epsilon: float | None
    trainable: str = "all"
    rounds: int = 30
    draws: int = 4
    clip: float = 0.5
    learning_rate: float = 1e-3
    ema_decay: float = 0.9
    delta: float = 1e-5
    local_steps: int = 1


def _key(prefix: str, value: dict[str, Any]) -> str:
    canonical = json.dumps([VERSION, value], sort_keys=True).encode()
    return f"{prefix}-{hashlib.sha256(canonical).hexdigest()[:12]}"
