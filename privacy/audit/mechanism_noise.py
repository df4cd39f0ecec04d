"""Mechanism audit, part 1: whole attempts at the plan's noise, with canaries behind fair coins.

Each share before masking and each unmasked total is held, two-sided, against its exact variance (m / (t - c)
sigma^2 C^2 for m shares: one missing share is otherwise hidden by the surplus, and equal shares show as too
much variance), shape, and independence across sites and rounds; canaries against their exact law with and
without them, which is the mechanism's trade-off curve.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from privacy.audit.canaries import KINDS, WIDTH, Canary, broken_patient, canary_law, plant_canaries
from privacy.audit.mechanism_path import (
    ROUNDING_SHIFT,
    AuditedStep,
    AuditSize,
    Progress,
    claimed_share_std,
    probe_consortium,
    probe_rows,
)
from privacy.audit.mechanism_statistics import (
    TestFamily,
    correlation_p,
    curve_p,
    gaussian_cdf,
    mixture_cdf,
    sub_gaussian_p,
    sum_p,
    variance_p,
)
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.patients import PatientScans
from privacy.secret_random import SecretRandom

MAX_LAGGED_PAIRS = 4000
"""Beyond so many pairs of shares, correlation is tested at equal positions alone."""


@dataclass(frozen=True, kw_only=True)
class RecordedStep:
    """An attempt, and which canaries were put into it (not who the Poisson coins chose)."""

    step: AuditedStep
    included: frozenset[int]


def noise_families(
    execution: ExecutionPlan,
    site_ids: Sequence[str],
    *,
    study_digest: str,
    size: AuditSize,
    device: str,
    progress: Progress | None,
) -> list[TestFamily]:
    """Part 1: whole attempts at the plan's noise."""
    rows = probe_rows(execution, size)
    consortium = probe_consortium(
        execution, site_ids, rows, width=WIDTH, study_digest=study_digest, device=device
    )
    canaries = plant_canaries(execution, consortium.site_ids, size.canaries)
    coins = SecretRandom()
    recorded = []
    total_steps = size.empty_steps + size.canary_steps
    for number in range(total_steps):
        empty = number < size.empty_steps
        chosen = set() if empty else set(np.flatnonzero(coins.below(2, len(canaries))).tolist())
        dropped = _dropouts(execution, consortium.site_ids, last=number == total_steps - 1)
        cohorts = _cohorts(consortium.site_ids, canaries, chosen, broken=not empty)
        recorded.append(
            RecordedStep(step=consortium.step(cohorts, dropped=dropped), included=frozenset(chosen))
        )
        if progress is not None:
            progress("noise", number + 1, total_steps)
    return [
        *_path_families(execution, recorded),
        *_share_families(execution, canaries, recorded, consortium.site_ids),
        *_canary_families(execution, canaries, recorded),
    ]


def _dropouts(execution: ExecutionPlan, site_ids: tuple[str, ...], *, last: bool) -> tuple[str, ...]:
    """In the last attempt as many sites drop as the threshold allows."""
    return site_ids[execution.threshold :] if last else ()


def _cohorts(
    site_ids: tuple[str, ...], canaries: tuple[Canary, ...], chosen: set[int], *, broken: bool
) -> dict[str, list[PatientScans]]:
    cohorts: dict[str, list[PatientScans]] = {site_id: [] for site_id in site_ids}
    for canary in canaries:
        if canary.row in chosen:
            cohorts[canary.site_id].append(canary.patient)
    if broken:
        for place, site_id in enumerate(site_ids):
            cohorts[site_id].append(broken_patient(len(canaries) + place))
    return cohorts


def _path_families(execution: ExecutionPlan, recorded: list[RecordedStep]) -> list[TestFamily]:
    """Masked vectors are uniform, and the unmasked total is the survivors' sum, exactly."""
    exact, uniform = [], []
    size = 2.0**execution.modulus_bits
    for item in recorded:
        step = item.step
        expected = np.sum([step.shares[site_id] for site_id in step.survivors], axis=0)
        same = set(step.survivors) == set(step.masked) and np.array_equal(step.total, expected)
        exact.append(1.0 if same else 0.0)
        for words in step.masked.values():
            uniform.append(
                curve_p(words.astype(np.float64) / size, lambda x: np.clip(x, 0.0, 1.0), shift=1e-9)
            )
    kept = sorted({len(item.step.survivors) for item in recorded})
    return [
        TestFamily(
            name="unmasking", title="The unmasked total is the sum of the survivors' vectors",
            p_values=tuple(exact), exact=True,
            figure=f"{sum(p == 1 for p in exact)} of {len(exact)} attempts, {kept} survivors",
            expected="all, exactly",
        ),
        TestFamily(
            name="masking", title="Masked vectors are uniform modulo the plan's range",
            p_values=tuple(uniform), figure=f"{len(uniform)} uploads",
            expected=f"uniform modulo 2^{execution.modulus_bits}",
        ),
    ]  # fmt: skip


def _silent(own: set[int], length: int) -> NDArray[np.bool_]:
    mask = np.ones(length, dtype=bool)
    for row in own:
        mask[WIDTH * row : WIDTH * (row + 1)] = False
    return mask


def _share_families(
    execution: ExecutionPlan,
    canaries: tuple[Canary, ...],
    recorded: list[RecordedStep],
    site_ids: tuple[str, ...],
) -> list[TestFamily]:
    """Each share before masking, and each total, where no canary put anything."""
    std = claimed_share_std(execution)
    owner = {canary.row: canary.site_id for canary in canaries}
    silent: dict[str, list[NDArray[np.int64]]] = {site_id: [] for site_id in site_ids}
    vectors, ratios, total_ratios = [], [], []
    share_p, mean_p, total_p = [], [], []
    for item in recorded:
        step = item.step
        length = len(step.total)
        for site_id in site_ids:
            mask = _silent({row for row in item.included if owner[row] == site_id}, length)
            noise = step.shares[site_id]
            quiet = noise[mask]
            share_p.append(variance_p(quiet, std))
            mean_p.append(sub_gaussian_p(float(quiet.sum()), std * math.sqrt(len(quiet))))
            ratios.append(float((quiet.astype(np.float64) ** 2).mean()) / std**2)
            silent[site_id].append(quiet)
            vectors.append(np.where(mask, noise, 0))
        mask = _silent({row for row in item.included if owner[row] in step.survivors}, length)
        expected = std * math.sqrt(len(step.survivors))
        total_p.append(variance_p(step.total[mask], expected))
        total_ratios.append(float((step.total[mask].astype(np.float64) ** 2).mean()) / expected**2)
    pooled = [np.concatenate(parts) for parts in silent.values()]
    share_p += [variance_p(values, std) for values in (*pooled, np.concatenate(pooled))]
    shape_p = [
        curve_p(values, gaussian_cdf(std), shift=ROUNDING_SHIFT)
        for values in (*pooled, np.concatenate(pooled))
    ]
    pairs = list(combinations(range(len(vectors)), 2))
    lags = len(pairs) <= MAX_LAGGED_PAIRS
    independence = [correlation_p(vectors[a], vectors[b], std, lags=lags) for a, b in pairs]
    shares = execution.threshold - execution.max_colluding
    return [
        TestFamily(
            name="share-variance", title="Every site's noise, before masking, has exactly its share",
            p_values=tuple(share_p), figure=f"variance over its claim {_span(ratios)}",
            expected=f"1, of sigma^2 C^2 / {shares}, at every site in every attempt",
        ),
        TestFamily(
            name="share-mean", title="Noise has mean zero", p_values=tuple(mean_p),
            figure=f"{len(mean_p)} shares", expected="0",
        ),
        TestFamily(
            name="share-shape", title="Noise is Gaussian on the integers", p_values=tuple(shape_p),
            figure=f"{sum(len(values) for values in pooled)} draws",
            expected=f"normal, {std:.6g} grid steps",
        ),
        TestFamily(
            name="total-variance", title="The total has the noise of its survivors, no more and no less",
            p_values=tuple(total_p), figure=f"variance over its claim {_span(total_ratios)}",
            expected=f"1, of m/{shares} sigma^2 C^2 for m survivors",
        ),
        TestFamily(
            name="independence", title="Noise of different sites and rounds is independent",
            p_values=tuple(independence),
            figure=f"{len(pairs)} pairs of shares" + (", at every lag" if lags else ""),
            expected="no correlation",
        ),
    ]  # fmt: skip


def _span(values: list[float]) -> str:
    return f"{min(values):.4f} to {max(values):.4f}"


def _canary_families(
    execution: ExecutionPlan, canaries: tuple[Canary, ...], recorded: list[RecordedStep]
) -> list[TestFamily]:
    """Canaries at the plan's noise: their sum at each site, and their scores in the totals."""
    std, step_size, q = claimed_share_std(execution), execution.grid_step, execution.sampling_rate
    sums, curves, aucs = [], [], []
    for kind in KINDS:
        law = canary_law(kind, clip=execution.clip, draws=execution.draws_per_patient)
        outcomes = np.append(0.0, law.signal) / step_size
        chances = np.append(1.0 - q, q * law.probabilities)
        own: dict[str, list[float]] = {}
        scores: dict[tuple[int, bool], list[float]] = {}
        for item in recorded:
            for canary in canaries:
                if canary.kind != kind:
                    continue
                inside = canary.row in item.included
                at = slice(WIDTH * canary.row, WIDTH * (canary.row + 1))
                if inside:
                    share = item.step.shares[canary.site_id][at]
                    own.setdefault(canary.site_id, []).append(float(share.sum()) / math.sqrt(2.0))
                if canary.site_id in item.step.survivors:
                    score = float(item.step.total[at].sum()) / math.sqrt(2.0)
                    scores.setdefault((len(item.step.survivors), inside), []).append(score)
        for values in own.values():
            n = len(values)
            sums.append(
                sum_p(
                    math.fsum(values), n, outcomes, chances,
                    std=std * math.sqrt(n), shift=ROUNDING_SHIFT * n,
                )
            )  # fmt: skip
        for (survivors, inside), found in scores.items():
            spread = std * math.sqrt(survivors)
            cdf = mixture_cdf(outcomes, chances, spread) if inside else gaussian_cdf(spread)
            curves.append(curve_p(np.array(found), cdf, shift=ROUNDING_SHIFT * survivors))
        aucs.append(_auc_words(kind, scores, outcomes, chances, std))
    return [
        TestFamily(
            name="canary-sum", title="What canaries add at each site is their clipped mean gradient",
            p_values=tuple(sums), figure=f"{len(canaries)} canaries behind fair coins",
            expected="the exact law of clip, draws and rate",
        ),
        TestFamily(
            name="canary-curve", title="Canaries show in the totals as the mechanism's curve says",
            p_values=tuple(curves), figure="; ".join(aucs), expected="the exact curve, two-sided",
        ),
    ]  # fmt: skip


def _auc_words(
    kind: str,
    scores: dict[tuple[int, bool], list[float]],
    outcomes: NDArray[np.float64],
    chances: NDArray[np.float64],
    std: float,
) -> str:
    """AUC of telling canaries in from canaries out by one total: measured and exact, at the largest m."""
    survivors = max((m for m, _ in scores), default=0)
    inside, outside = (np.sort(np.array(scores.get((survivors, side), []))) for side in (True, False))
    if not len(inside) or not len(outside):
        return f"{kind}: no scores"
    measured = float(np.searchsorted(outside, inside).mean()) / len(outside)
    exact = float(gaussian_cdf(std * math.sqrt(2.0 * survivors))(outcomes) @ chances)
    return f"{kind}: AUC {measured:.3f}, exact {exact:.3f}"
