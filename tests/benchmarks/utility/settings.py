"""What is measured: each job is one JSON file of figures, named after all that decides it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

VERSION = 1
"""Raise it when figures of an earlier version do not compare any more."""


@dataclass(frozen=True, kw_only=True)
class Public:
    """Public networks of a cohort.

    Attributes:
        latent_channels: None: the preset's.
    """

    cohort: str
    autoencoder_steps: int
    prior_steps: int
    latent_channels: int | None = None
    seed: int = 1

    @property
    def key(self) -> str:
        return _key("public", asdict(self))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One file of figures.

    Attributes:
        kind: ``real`` (trained on real scans: everybody's, each hospital's), ``ceiling`` (on the members as
            the autoencoder gives them back), ``prior`` (on samples of the prior) or ``study`` (on samples of
            what a consortium trained).
        repeats: Trainings of the segmenter or classifier, each with a seed of its own.
        copy_samples: Samples that members are compared with.
        study: For kind ``study``: see :class:`Study`.
    """

    kind: Literal["real", "ceiling", "prior", "study"]
    public: Public
    repeats: int = 1
    samples: int = 200
    task_steps: int = 600
    copy_samples: int = 512
    study: Study | None = None
    repeat: int = 0

    @property
    def key(self) -> str:
        return _key(f"{self.public.cohort}-{self.kind}", asdict(self))


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
