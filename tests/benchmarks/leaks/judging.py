"""Scores of the attacked networks before the gate's own verdict: table and plot.

The gate is :func:`privacy.audit.verdict.compute_verdict` under a plan as ``lacuna coordinator plan new``
proposes one (three hospitals, significance 0.05, the default ``max_auc`` of 0.55), in four settings:

- ``exact``: a plan in mode ``unprotected``, which these networks were trained in: counts carry no noise. (A
  plan without noise exists for simulated data only; the flag is set here for that reason alone.)
- ``noised``: a plan for epsilon 8 at delta 1e-5 that promised protection which was not there; counts carry
  the noise that the plan charges for.
- ``exact, 0.60`` and ``noised, 0.60``: the same with a laxer ``max_auc``.

A repetition's ``true`` AUC is nobody's to know; the mean over repetitions of the AUC against all non-members
stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privacy.audit.bounds import auc, auc_interval
from privacy.audit.counts import CountsLayout, PatientFigures, pooled_noise_std
from privacy.audit.proposal import propose_audit
from privacy.audit.verdict import PlantedLeak, PooledVerdict, attack_bound, compute_verdict, level_of_test
from privacy.dp.calibration import propose_privacy
from server.planning import _audit_share
from shared.study_plan import AuditClause, StudyPlan, parse_plan
from tests.small_plan import Keys, plan_document

FOLDER = Path(__file__).parent
SCORES = FOLDER / "scores.npz"
GRADIENTS = FOLDER / "gradients.npz"
"""One draw with gradient norms (``training --gradients``), as :mod:`.training` wrote it."""
SITES = ("site-0", "site-1", "site-2")
DEFAULT_MAX_AUC: float = AuditClause.model_fields["max_auc"].default
NOISE_DRAWS = 8
"""Draws of the counts' noise (and of the members' coins) for each repetition and step."""

LEAST_SCORES = 20
"""Of a group; an attack that its time limit left with fewer has no figure."""

ATTACKS = ("calibrated_loss", "sima", "pia", "secmi")
"""Of the large runs; the gradient norm has a run of its own (:func:`judge_gradients`)."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Repetition:
    """Scores of one attacked run: [K, U] for each attack, members first told by ``member_U``."""

    study: str
    number: int
    steps_K: NDArray[np.int64]
    member_U: NDArray[np.bool_]
    public_loss_U: Floats
    chosen_by_loss: Floats
    planted_auc: float
    scores: dict[str, Floats]

    @property
    def n_members(self) -> int:
        return int(self.member_U.sum())

    def at(self, attack: str, step: int) -> tuple[Floats, Floats]:
        """Scores of members and of non-members that have one."""
        row_U = self.scores[attack][int(np.flatnonzero(self.steps_K == step)[0])]
        known_U = np.isfinite(row_U)
        return row_U[known_U & self.member_U], row_U[known_U & ~self.member_U]


def collect_scores(folder: Path, out: Path = SCORES) -> None:
    """Put the files that :mod:`.training` wrote into one; repetitions cut short by its time limit stay out.

    Of the secondary attacks, whose figures differ by orders of magnitude and are only compared, ranks are
    kept: from 1, and 0 where there is no figure.
    """
    arrays: dict[str, NDArray[np.generic]] = {}
    paths = sorted(folder.glob("*-*-*.npz"))
    most = max(len(np.load(path)["steps_K"]) for path in paths)
    for path in paths:
        with np.load(path) as archive:
            if len(archive["steps_K"]) < most:
                continue
            for name in archive.files:
                if name == "gradient_norm":
                    continue
                value = archive[name]
                if name in ATTACKS[1:]:
                    ranks = stats.rankdata(value, axis=1, method="min", nan_policy="omit")
                    value = np.nan_to_num(ranks).astype(np.uint16)
                arrays[f"{path.stem}/{name}"] = value
    np.savez_compressed(out, **arrays)


def read_scores(path: Path = SCORES) -> list[Repetition]:
    """All repetitions, by study and number."""
    with np.load(path) as archive:
        found: dict[str, dict[str, NDArray[np.generic]]] = {}
        for key in archive.files:
            stem, name = key.split("/")
            found.setdefault(stem, {})[name] = archive[key]
    repetitions = []
    for stem, own in found.items():
        study, number = stem.rsplit("-", 1)
        repetitions.append(
            Repetition(
                study=study,
                number=int(number),
                steps_K=own["steps_K"].astype(np.int64),
                member_U=own["member_U"].astype(bool),
                public_loss_U=own["public_loss_U"].astype(np.float64),
                chosen_by_loss=own["chosen_by_loss"].astype(np.float64),
                planted_auc=float(own["planted_auc"]),
                scores={
                    "calibrated_loss": own["calibrated_loss"].astype(np.float64),
                    **{name: np.where(own[name] > 0, own[name], np.nan) for name in ATTACKS[1:]},
                },
            )
        )
    return sorted(repetitions, key=lambda r: (r.study, r.number))


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The verdict on one group of members and one of held-out units."""

    plan: StudyPlan
    planted: PlantedLeak

    @classmethod
    def of(cls, repetition: Repetition, *, noised: bool, max_auc: float = DEFAULT_MAX_AUC) -> Gate:
        """As a plan for this repetition's public figures would have it."""
        return cls(
            plan=plan_of_benchmark(
                tuple(repetition.chosen_by_loss),
                members=repetition.n_members,
                epsilon=8.0 if noised else None,
                max_auc=max_auc,
            ),
            planted=PlantedLeak(auc=repetition.planted_auc, n_planted=8, n_fresh=8),
        )

    def judge(
        self,
        members: tuple[Floats, Floats],
        held_out: tuple[Floats, Floats],
        generator: np.random.Generator,
    ) -> PooledVerdict:
        """Count, add noise, judge. Groups are (score, public loss) of each unit."""
        layout = CountsLayout.from_plan(self.plan)
        figures = [
            PatientFigures(
                member=is_member,
                coin=is_member and bool(generator.integers(2)),
                score=float(score),
                public_loss=float(loss),
                copied=False,
            )
            for is_member, group in ((True, members), (False, held_out))
            for score, loss in zip(*group, strict=True)
        ]
        std = pooled_noise_std(self.plan, len(SITES))
        noise = np.rint(generator.normal(0.0, std, layout.length)).astype(np.int64)
        return compute_verdict(self.plan, layout.count(figures) + noise, SITES, planted_leak=self.planted)


@cache
def plan_of_benchmark(
    public_losses: tuple[float, ...], *, members: int, epsilon: float | None, max_auc: float
) -> StudyPlan:
    """As ``plan new`` would propose one; counts carry no noise where ``epsilon`` is None."""
    noised = epsilon is not None
    document = plan_document(Keys.of(len(SITES)))
    proposed = propose_privacy(
        mode="distributed" if noised else "unprotected", epsilon=epsilon, delta=1e-5, clip_norm=1.0,
        rounds=30, n_sites=3, threshold=3, max_colluding=1, dimension=document["model"]["dimension"],
        declared_patients=members, audit_share=_audit_share(epsilon, 1e-5),
    )  # fmt: skip
    audit = propose_audit(
        public_losses, copy_distance=1.0, false_copy_rate=0.01, declared_patients=members, copy_samples=0,
        noised=noised,
    ).model_copy(update={"max_auc": max_auc})  # fmt: skip
    document["privacy"] = proposed.privacy.model_dump(mode="json")
    document["secure_aggregation"] = proposed.secure_aggregation.model_dump(mode="json")
    document["audit"] = audit.model_dump(mode="json")
    return parse_plan(document, what="plan of the benchmark")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One step of one study, over its repetitions.

    Attributes:
        true_auc: Primary attack, mean over repetitions; ``spread`` is their standard deviation.
        aucs: Each attack's mean AUC; None where it was not run.
        seen: Share of repetitions in which the attack's own interval, on exact scores as a hospital sees
            them, lies above the gate's bound: its power there.
        blocked: Share of verdicts that find a violation, by setting of the gate.
        blind: Share of verdicts that are refused as invalid (power, controls), by setting.
    """

    step: int
    repetitions: int
    true_auc: float
    spread: float
    aucs: dict[str, float | None]
    seen: dict[str, float | None]
    blocked: dict[str, float]
    blind: dict[str, float]


SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"noised": False},
    "exact, 0.60": {"noised": False, "max_auc": 0.60},
    "noised": {"noised": True},
    "noised, 0.60": {"noised": True, "max_auc": 0.60},
}
"""Arguments of :meth:`Gate.of`."""


def judge_study(repetitions: Sequence[Repetition], *, draws: int = NOISE_DRAWS) -> list[Row]:
    """A row for each step that every repetition reached."""
    steps = sorted(set.intersection(*({int(s) for s in r.steps_K} for r in repetitions)))
    return [_row(repetitions, step, draws) for step in steps]


def _row(repetitions: Sequence[Repetition], step: int, draws: int) -> Row:
    aucs: dict[str, list[float]] = {name: [] for name in ATTACKS}
    seen: dict[str, list[bool]] = {name: [] for name in ATTACKS}
    verdicts: dict[str, list[str]] = {name: [] for name in SETTINGS}
    for repetition in repetitions:
        plan = Gate.of(repetition, noised=False).plan
        for name in ATTACKS:
            members, others = repetition.at(name, step)
            if min(members.size, others.size) < LEAST_SCORES:
                continue
            aucs[name].append(auc(members, others))
            interval = auc_interval(members, others, error=level_of_test(plan, "membership_attack"))
            seen[name].append(interval.low > attack_bound(plan))
        losses = repetition.public_loss_U
        members, others = repetition.at("calibrated_loss", step)
        groups = ((members, losses[repetition.member_U]), (others, losses[~repetition.member_U]))
        for name, setting in SETTINGS.items():
            gate = Gate.of(repetition, **setting)
            for draw in range(draws):
                generator = np.random.default_rng([repetition.number, step, draw])
                verdicts[name].append(gate.judge(*groups, generator).outcome)
    primary = np.array(aucs["calibrated_loss"])
    return Row(
        step=step,
        repetitions=len(repetitions),
        true_auc=float(primary.mean()),
        spread=float(primary.std(ddof=1)) if primary.size > 1 else 0.0,
        aucs={name: float(np.mean(values)) if values else None for name, values in aucs.items()},
        seen={name: float(np.mean(values)) if values else None for name, values in seen.items()},
        blocked={name: float(np.mean([v == "violation" for v in found])) for name, found in verdicts.items()},
        blind={name: float(np.mean([v == "invalid" for v in found])) for name, found in verdicts.items()},
    )


def blocking_step(rows: Sequence[Row], setting: str, share: float = 0.5) -> Row | None:
    """The first step from which on the gate finds a violation in at least ``share`` of the verdicts."""
    for index, row in enumerate(rows):
        if all(later.blocked[setting] >= share for later in rows[index:]):
            return row
    return None


@dataclass(frozen=True, kw_only=True)
class GradientRow:
    """Gradient norm beside the primary attack on the same units: AUC and its interval (95%)."""

    step: int
    n_members: int
    n_others: int
    primary: tuple[float, float, float]
    gradient_norm: tuple[float, float, float]


def judge_gradients(path: Path) -> list[GradientRow]:
    """A row for each step at which every unit of both groups was given a gradient norm."""
    with np.load(path) as archive:
        steps_K, member_U = archive["steps_K"], archive["member_U"].astype(bool)
        primary_KU, norm_KU = archive["calibrated_loss"], archive["gradient_norm"]
    rows = []
    for step, primary_U, norm_U in zip(steps_K, primary_KU, norm_KU, strict=True):
        known_U = np.isfinite(norm_U)
        if not known_U.any():
            continue
        groups = known_U & member_U, known_U & ~member_U
        figures = []
        for score_U in (primary_U, norm_U):
            members, others = (score_U[group].astype(np.float64) for group in groups)
            interval = auc_interval(members, others, error=0.05)
            figures.append((auc(members, others), interval.low, interval.high))
        rows.append(
            GradientRow(
                step=int(step), n_members=int(groups[0].sum()), n_others=int(groups[1].sum()),
                primary=figures[0], gradient_norm=figures[1],
            )
        )  # fmt: skip
    return rows


def judge_kept_scores(path: Path = SCORES, out: Path = FOLDER) -> str:
    """Write ``table.md`` and ``plot.png``; return the table."""
    from tests.benchmarks.leaks.table import draw_plot, write_table

    if not path.exists():
        raise FileNotFoundError(f"{path}: run python -m tests.benchmarks.leaks.training, then collect_scores")
    repetitions = read_scores(path)
    studies: dict[str, list[Repetition]] = {r.study: [] for r in repetitions}
    for repetition in repetitions:
        studies[repetition.study].append(repetition)
    rows = {study: judge_study(own) for study, own in studies.items()}
    examples = {study: own[0] for study, own in studies.items()}
    table = write_table(rows, examples, judge_gradients(GRADIENTS) if GRADIENTS.exists() else [])
    (out / "table.md").write_text(table)
    draw_plot(rows, out / "plot.png")
    return table
