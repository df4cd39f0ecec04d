"""What leaves a hospital from its audit: one short vector of weighted patient counts. No torch.

Bins are fixed in the plan before training. One patient falls in at most one cell of each block, and in no
other: figures of one patient depend on that patient's scans and on public things alone (the candidate, the
plan, a keyed coin), never on another patient.

    block        cells              who                    weight
    score/a      score_edges + 1    members, coin 0        PRIMARY_WEIGHT
    score/b      score_edges + 1    members, coin 1        PRIMARY_WEIGHT
    score/out    score_edges + 1    held-out               PRIMARY_WEIGHT
    public/in    control_edges + 1  members                CONTROL_WEIGHT
    public/out   control_edges + 1  held-out               CONTROL_WEIGHT
    copied       1                  members copied         CONTROL_WEIGHT

and for each secondary attack that the plan pools, in its order, with edges and weight w from the plan:

    ATTACK/in    edges + 1          members                w
    ATTACK/out   edges + 1          held-out               w

The primary attack reads score/a + score/b against score/out; the control "member against member" reads
score/a against score/b, so it costs no sensitivity of its own. A member moves the vector by at most
sqrt(PRIMARY_WEIGHT^2 + 2 CONTROL_WEIGHT^2 + sum of w^2) in L2, a held-out patient by less: every attack,
threshold and control that one patient touches is in it. Weights are public constants: they say how the noise
is shared among the figures (the primary attack gets half the noise of the controls), and are large enough
that integer noise of every share spans several steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from privacy.audit.pooled_auc import NoisedHistograms, noised_histograms
from privacy.dp.execution_plan import ExecutionPlan
from shared.errors import UsageError
from shared.study_plan import AuditClause, SecondaryAttackClause, StudyPlan

PRIMARY_WEIGHT = 16
CONTROL_WEIGHT = 8

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, repr=False)
class PatientFigures:
    """Private figures of one patient; they never leave the site agent, and the repr hides them.

    Attributes:
        member: False for a held-out patient.
        coin: The keyed coin that splits members for the control "member against member".
        score: Primary attack; higher speaks for membership.
        public_loss: Plain loss on the public model.
        copied: A generated sample lies nearer than the plan's copy distance. Ignored for held-out patients.
        secondary: Scores of the pooled secondary attacks, in the plan's order.
    """

    member: bool
    coin: bool
    score: float
    public_loss: float
    copied: bool
    secondary: tuple[float, ...] = ()

    def __repr__(self) -> str:
        return "PatientFigures(<private>)"


@dataclass(frozen=True, kw_only=True)
class CountsLayout:
    """Blocks of the vector; the only place that knows their order."""

    score_edges: tuple[float, ...]
    control_edges: tuple[float, ...]
    secondary: tuple[SecondaryAttackClause, ...] = ()

    @classmethod
    def from_plan(cls, plan: StudyPlan) -> CountsLayout:
        """The layout that every site and the checker use for a plan."""
        return cls.from_clause(plan.audit)

    @classmethod
    def from_clause(cls, clause: AuditClause) -> CountsLayout:
        """The same before there is a whole plan."""
        return cls(
            score_edges=clause.score_edges,
            control_edges=clause.control_edges,
            secondary=clause.pooled_attacks,
        )

    @property
    def score_bins(self) -> int:
        return len(self.score_edges) + 1

    @property
    def control_bins(self) -> int:
        return len(self.control_edges) + 1

    @property
    def length(self) -> int:
        """Number of cells."""
        return self._copied + 1 + sum(2 * _bins(attack) for attack in self.secondary)

    @property
    def _copied(self) -> int:
        return 3 * self.score_bins + 2 * self.control_bins

    def _secondary_blocks(self) -> list[tuple[SecondaryAttackClause, int]]:
        """Each pooled attack with the first cell of its members' histogram."""
        blocks, start = [], self._copied + 1
        for attack in self.secondary:
            blocks.append((attack, start))
            start += 2 * _bins(attack)
        return blocks

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each cell, in order."""
        blocks = [("score/a", self.score_bins), ("score/b", self.score_bins), ("score/out", self.score_bins)]
        blocks += [("public/in", self.control_bins), ("public/out", self.control_bins)]
        names = [f"{name}/{cell}" for name, bins in blocks for cell in range(bins)] + ["copied"]
        names += [
            f"{attack.attack_id}/{group}/{cell}"
            for attack in self.secondary
            for group in ("in", "out")
            for cell in range(_bins(attack))
        ]
        return tuple(names)

    @property
    def sensitivity(self) -> float:
        """Largest L2 change of the vector when one patient is added or removed."""
        secondary = sum(attack.pooled_weight**2 for attack in self.secondary)
        return math.sqrt(PRIMARY_WEIGHT**2 + 2 * CONTROL_WEIGHT**2 + secondary)

    def count(self, patients: Iterable[PatientFigures]) -> Counts:
        """Weighted counts, int64[length]. A figure that is not finite is counted nowhere.

        Raises:
            UsageError: a patient has scores of other secondary attacks than the plan pools.
        """
        counts = np.zeros(self.length, dtype=np.int64)
        blocks = self._secondary_blocks()
        for patient in patients:
            if len(patient.secondary) != len(blocks):
                raise UsageError(f"{len(patient.secondary)} secondary scores, the plan pools {len(blocks)}")
            if math.isfinite(patient.score):
                block = (1 if patient.coin else 0) if patient.member else 2
                counts[block * self.score_bins + _bin(self.score_edges, patient.score)] += PRIMARY_WEIGHT
            if math.isfinite(patient.public_loss):
                start = 3 * self.score_bins + (0 if patient.member else self.control_bins)
                counts[start + _bin(self.control_edges, patient.public_loss)] += CONTROL_WEIGHT
            if patient.member and patient.copied:
                counts[self._copied] += CONTROL_WEIGHT
            for (attack, start), score in zip(blocks, patient.secondary, strict=True):
                if math.isfinite(score):
                    place = start + (0 if patient.member else _bins(attack))
                    counts[place + _bin(attack.edges, score)] += attack.pooled_weight
        return counts

    def read(self, counts: Sequence[int] | Counts, *, noise_std: float) -> PooledCounts:
        """Split a pooled vector into figures in patients.

        Args:
            counts: Sum over sites, with noise.
            noise_std: Standard deviation of the noise in each cell of the vector, in its integer steps.

        Raises:
            UsageError: the vector has another length.
        """
        values = np.asarray(counts, dtype=np.float64)
        if values.shape != (self.length,):
            raise UsageError(
                f"pooled audit counts have {values.size} cells, the plan's layout has {self.length}"
            )
        s, c = self.score_bins, self.control_bins
        a, b, out = (values[i * s : (i + 1) * s] / PRIMARY_WEIGHT for i in range(3))
        public_in, public_out = (
            values[3 * s + i * c : 3 * s + (i + 1) * c] / CONTROL_WEIGHT for i in range(2)
        )
        primary, control = noise_std / PRIMARY_WEIGHT, noise_std / CONTROL_WEIGHT
        secondary = []
        for attack, start in self._secondary_blocks():
            bins, weight = _bins(attack), attack.pooled_weight
            members, held_out = values[start : start + bins], values[start + bins : start + 2 * bins]
            std = noise_std / weight
            secondary.append(
                noised_histograms(members / weight, held_out / weight, members_std=std, held_out_std=std)
            )
        return PooledCounts(
            attack=noised_histograms(a + b, out, members_std=primary * math.sqrt(2.0), held_out_std=primary),
            member_halves=noised_histograms(a, b, members_std=primary, held_out_std=primary),
            # A smaller loss speaks for membership, so the bins are reversed.
            public_loss=noised_histograms(
                public_in[::-1], public_out[::-1], members_std=control, held_out_std=control
            ),
            copied=float(values[self._copied] / CONTROL_WEIGHT),
            copied_std=control,
            secondary=tuple(secondary),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PooledCounts:
    """Pooled counts in patients, with the standard deviation of their noise."""

    attack: NoisedHistograms
    member_halves: NoisedHistograms
    public_loss: NoisedHistograms
    copied: float
    copied_std: float
    secondary: tuple[NoisedHistograms, ...] = ()


def pooled_noise_std(plan: StudyPlan, n_survivors: int) -> float:
    """Standard deviation of the noise in each cell of the pooled vector, in its integer steps.

    Each survivor adds a share of :meth:`ExecutionPlan.audit_share_steps`.
    """
    execution = ExecutionPlan.from_study_plan(plan)
    share = execution.audit_share_steps(CountsLayout.from_plan(plan).sensitivity)
    return share * math.sqrt(n_survivors)


def _bins(attack: SecondaryAttackClause) -> int:
    return len(attack.edges) + 1


def _bin(edges: tuple[float, ...], value: float) -> int:
    return int(np.searchsorted(np.asarray(edges), value, side="right"))
