"""Gradient canaries: simulated patients whose gradients are known, orthogonal, and of two scans each.

The network under audit is a codebook (an ``Embedding``): a scan's condition picks a row, and the gradient of
its loss is the scan's latent, in that row. Timestep and diffusion noise do nothing, so a patient's mean
gradient depends on one secret thing alone: how many of its K draws fell on the first scan. Each canary owns a
row of two coordinates; its scans have orthogonal gradients a e_0 and a e_1. With k draws on the first, the
patient's mean gradient is a (k, K - k) / K, and after clipping to C:

- ``clipped`` (a = 64 C): C (k, K - k) / |(k, K - k)|, of norm C exactly. Clipped by scan or by draw, the norm
  would be C sqrt(2), or below C.
- ``unclipped`` (a = C / 4): left as it is, so its coordinates add up to C / 4 whatever k is. Summed over the
  draws in place of averaged, they would add up to K C / 4.

Canaries of Nasr et al. ("Tight Auditing of Differentially Private Machine Learning", USENIX Security 2023)
insert a gradient behind the clipping; these come in before it, as patients do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import binom
from torch import Tensor, nn

from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.patient_gradients import NamedParameters, PerSampleLoss
from privacy.dp.patients import PatientScans
from shared.errors import UsageError

Kind = Literal["clipped", "unclipped"]
KINDS: tuple[Kind, ...] = ("clipped", "unclipped")

NORM_IN_CLIPS: dict[Kind, float] = {"clipped": 64.0, "unclipped": 0.25}
"""a / C: norm of each scan's gradient in units of the clip norm."""

WIDTH = 2
"""Coordinates of a row: one for each scan of a canary."""


class CodebookProbe(nn.Module):
    """<row of the scan's condition, latent>: the gradient of the loss is the latent, in that row."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.codebook = nn.Embedding(rows, width)
        nn.init.zeros_(self.codebook.weight)

    def forward(self, z_BCDHW: Tensor, condition_B: Tensor) -> Tensor:
        rows_BW: Tensor = self.codebook(condition_B)
        return (rows_BW * z_BCDHW.flatten(1)).sum(dim=1)


def probe_loss(
    denoiser: Any,
    z_BCDHW: Tensor,
    condition_B: Tensor,
    t_B: Tensor,  # noqa: ARG001
    noise_BCDHW: Tensor,  # noqa: ARG001
) -> Tensor:
    """The probe's output itself; timestep and noise are not used."""
    value_B: Tensor = denoiser(z_BCDHW, condition_B)
    return value_B


def build_probe(rows: int, width: int = WIDTH) -> tuple[nn.Module, NamedParameters, PerSampleLoss]:
    """A probe of dimension rows x width, its parameters and its loss."""
    probe = CodebookProbe(rows, width)
    return probe, list(probe.named_parameters()), probe_loss


def probe_patient(key: str, rows_S: list[int], gradients_SW: NDArray[np.float64]) -> PatientScans:
    """A patient whose scan s has the gradient ``gradients_SW[s]`` in row ``rows_S[s]``."""
    latents = torch.from_numpy(np.ascontiguousarray(gradients_SW, dtype=np.float32))
    return PatientScans(
        patient_key=key,
        latents_SCDHW=latents.view(len(rows_S), 1, 1, 1, -1),
        conditions_S=torch.tensor(rows_S, dtype=torch.int64),
    )


@dataclass(frozen=True, kw_only=True)
class Canary:
    """One canary of one site. ``row`` is its own in the whole consortium."""

    site_id: str
    kind: Kind
    row: int
    patient: PatientScans


def plant_canaries(execution: ExecutionPlan, site_ids: tuple[str, ...], count: int) -> tuple[Canary, ...]:
    """``count`` canaries, dealt to the sites in turn, kinds alternating at each site."""
    canaries = []
    for row in range(count):
        kind = KINDS[row // len(site_ids) % 2]
        norm = NORM_IN_CLIPS[kind] * execution.clip
        patient = probe_patient(f"canary-{row}", [row, row], norm * np.eye(2))
        canaries.append(Canary(site_id=site_ids[row % len(site_ids)], kind=kind, row=row, patient=patient))
    return tuple(canaries)


def broken_patient(row: int) -> PatientScans:
    """A patient whose gradients are not finite: it has to contribute exactly nothing."""
    return probe_patient(f"broken-{row}", [row, row], np.array([[math.inf, 0.0], [0.0, math.nan]]))


@dataclass(frozen=True, kw_only=True)
class CanaryLaw:
    """What a canary that takes part contributes, by the number k of its draws on the first scan.

    Attributes:
        probabilities: Binomial(K, 1/2), [K + 1].
        signal: Sum of its two coordinates over sqrt(2), [K + 1].
        balance: Their difference over sqrt(2), [K + 1].
    """

    probabilities: NDArray[np.float64]
    signal: NDArray[np.float64]
    balance: NDArray[np.float64]


def canary_law(kind: Kind, *, clip: float, draws: int) -> CanaryLaw:
    """The exact law, in the units of ``clip``."""
    first = np.arange(draws + 1, dtype=np.float64)
    both = np.stack([first, draws - first])
    norms = np.linalg.norm(both, axis=0) * NORM_IN_CLIPS[kind] / draws
    both *= clip * NORM_IN_CLIPS[kind] / draws * np.minimum(1.0, 1.0 / norms)
    return CanaryLaw(
        probabilities=np.asarray(binom.pmf(first, draws, 0.5), dtype=np.float64),
        signal=both.sum(axis=0) / math.sqrt(2.0),
        balance=(both[0] - both[1]) / math.sqrt(2.0),
    )


@dataclass(frozen=True, kw_only=True)
class GridPair:
    """Two neighbouring cohorts whose rounded sums are as far apart as the bound on sensitivity allows.

    Attributes:
        base: Patients who bring every coordinate just below the middle between two grid points.
        canary: A patient of norm below C who carries ``moved`` coordinates past it.
        moved: Number of coordinates that the canary moves.
        steps: By how many grid steps it moves each.
    """

    base: tuple[PatientScans, ...]
    canary: PatientScans
    moved: int
    steps: int

    @property
    def distance_steps(self) -> float:
        """L2 distance of the two rounded sums, in grid steps."""
        return self.steps * math.sqrt(self.moved)


OFF_MIDDLE = 2.0**-6
"""How far below the middle between two grid points the base lies, in grid steps."""


def grid_pair(execution: ExecutionPlan) -> GridPair:
    """The pair for a codebook of one row and ``execution.dimension`` coordinates.

    A canary with (s + 2 OFF_MIDDLE) gamma in each of m coordinates moves each by s + 1 steps. Its norm has to
    stay below C; s and m are chosen for the largest move.

    Raises:
        UsageError: the grid is so coarse that no patient moves anything.
    """
    step, clip, dimension = execution.gradient_grid_step, execution.clip, execution.dimension
    moved = np.arange(dimension // 2, dimension + 1)
    room = clip * (1.0 - 1e-5) / (step * np.sqrt(moved)) - 2.0 * OFF_MIDDLE
    whole = np.floor(room)
    distance = np.where(whole >= 0, (whole + 1.0) * np.sqrt(moved), -1.0)
    best = int(np.argmax(distance))
    m, s = int(moved[best]), int(whole[best])
    if s < 0:
        raise UsageError(f"a grid step of {step:g} is too coarse for clip norm {clip:g} to be audited")
    canary = np.zeros((2, dimension))
    canary[:, :m] = (s + 2.0 * OFF_MIDDLE) * step
    below = (0.5 - OFF_MIDDLE) * step
    patients = math.ceil(below * math.sqrt(dimension) / (0.9 * clip))
    base = np.full((2, dimension), below / patients)
    return GridPair(
        base=tuple(probe_patient(f"base-{i}", [0, 0], base) for i in range(patients)),
        canary=probe_patient("grid-canary", [0, 0], canary),
        moved=m,
        steps=s + 1,
    )
