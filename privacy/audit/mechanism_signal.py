"""Mechanism audit, parts 2 and 3: what a patient adds, read off at the smallest noise a share may have.

The noise multiplier is the only thing that is changed: shares of 4 grid steps in place of the plan's. What a
canary adds is then known to a fraction of C, whatever the plan's epsilon, so clipping, averaging over draws,
sampling and rounding are each seen in a few updates. With the plan's noise they would drown: at epsilon 1 a
share is a dozen times C.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from privacy.audit.canaries import (
    NORM_IN_CLIPS,
    WIDTH,
    Canary,
    broken_patient,
    canary_law,
    grid_pair,
    plant_canaries,
)
from privacy.audit.mechanism_path import (
    ROUNDING_SHIFT,
    AuditConsortium,
    AuditSize,
    Progress,
    claimed_share_std,
    probe_consortium,
    probe_rows,
)
from privacy.audit.mechanism_statistics import (
    TestFamily,
    count_p,
    dispersion_p,
    sub_gaussian_p,
    sum_p,
    variance_p,
)
from privacy.dp.closeness import MIN_SHARE_STEPS
from privacy.dp.execution_plan import ExecutionPlan
from privacy.secret_random import SecretRandom
from shared.errors import UsageError

FINEST_RATIO = 512.0
"""C is at least so many grid steps, or canaries cannot be told from none at noise of 4 steps."""

GRID_DIMENSION = 4096


def with_smallest_noise(execution: ExecutionPlan) -> ExecutionPlan:
    """The same mechanism with shares of MIN_SHARE_STEPS grid steps. Gives no privacy; for audits alone."""
    honest = execution.threshold - execution.max_colluding
    multiplier = MIN_SHARE_STEPS * execution.grid_step * math.sqrt(honest) / execution.clip
    return replace(execution, noise_multiplier=multiplier)


def signal_families(
    execution: ExecutionPlan,
    site_ids: Sequence[str],
    *,
    study_digest: str,
    size: AuditSize,
    device: str,
    progress: Progress | None,
) -> list[TestFamily]:
    """Part 2. Every canary is in every cohort; at q < 1 the sites' own coins choose.

    Raises:
        UsageError: the grid is too coarse for canaries to be told apart.
    """
    if execution.clip < FINEST_RATIO * execution.grid_step:
        raise UsageError(
            f"the grid step {execution.grid_step:g} is above 1/{FINEST_RATIO:g} of the clip norm "
            f"{execution.clip:g}: canaries cannot be told apart",
            remedy="a plan with a finer grid, as `lacuna coordinator plan new` proposes",
        )
    rows = probe_rows(execution, size)
    consortium = probe_consortium(
        with_smallest_noise(execution), site_ids, rows, width=WIDTH, study_digest=study_digest, device=device
    )
    canaries = plant_canaries(execution, consortium.site_ids, size.canaries)
    steps = size.signal_steps if execution.sampling_rate == 1 else size.sampled_signal_steps
    reading = SignalReading(execution, canaries)
    done, total = 0, steps * len(consortium.site_ids)
    for _ in range(steps):
        for place, site_id in enumerate(consortium.site_ids):
            own = [canary for canary in canaries if canary.site_id == site_id]
            broken = broken_patient(len(canaries) + place)
            update = consortium.update(site_id, [*(canary.patient for canary in own), broken])
            reading.add(site_id, own, update)
            done += 1
            if progress is not None:
                progress("signal", done, total)
    return reading.families()


class SignalReading:
    """Updates at the smallest noise, decoded canary by canary. Numbers are in grid steps."""

    def __init__(self, execution: ExecutionPlan, canaries: tuple[Canary, ...]) -> None:
        self._execution, self._n_canaries = execution, len(canaries)
        self._clip = execution.clip / execution.grid_step
        self._clipped_p: list[float] = []
        self._averaged_p: list[float] = []
        self._silent_p: list[float] = []
        self._norms: list[float] = []
        self._sums: list[float] = []
        self._balance: list[float] = []
        self._balance_n = 0
        self._present: dict[str, list[NDArray[np.bool_]]] = {}

    def add(self, site_id: str, own: list[Canary], update: NDArray[np.int64]) -> None:
        """Decode one update of a site whose cohort was ``own`` and a patient that is not finite."""
        rows = update.astype(np.float64).reshape(-1, WIDTH)
        present = np.zeros(len(own), dtype=bool)
        for place, canary in enumerate(own):
            x, y = rows[canary.row]
            if canary.kind == "clipped":
                norm = math.hypot(x, y)
                present[place] = norm > 0.5 * self._clip
                if present[place]:
                    self._clipped_p.append(_norm_p(norm - self._clip))
                    self._norms.append(norm / self._clip)
                    self._balance.append((x - y) / math.sqrt(2.0))
                    self._balance_n += 1
            else:
                amount = NORM_IN_CLIPS["unclipped"] * self._clip
                present[place] = x + y > 0.5 * amount
                if present[place]:
                    self._averaged_p.append(_projection_p((x + y - amount) / math.sqrt(2.0)))
                    self._sums.append((x + y) / amount)
            if not present[place]:
                self._silent_p.append(_norm_p(math.hypot(x, y)))
        self._present.setdefault(site_id, []).append(present)
        others = np.ones(len(rows), dtype=bool)
        others[[canary.row for canary in own]] = False
        self._silent_p.append(variance_p(rows[others], MIN_SHARE_STEPS))
        # A broken patient's own rows count by themselves as well.
        for row in range(self._n_canaries, self._n_canaries + self._execution.n_sites):
            self._silent_p.append(_norm_p(math.hypot(*rows[row])))

    def families(self) -> list[TestFamily]:
        law = canary_law("clipped", clip=self._clip, draws=self._execution.draws_per_patient)
        n = self._balance_n
        balance = sum_p(
            math.fsum(self._balance), n, law.balance, law.probabilities,
            std=MIN_SHARE_STEPS * math.sqrt(n), shift=ROUNDING_SHIFT * n,
        )  # fmt: skip
        return [
            TestFamily(
                name="clipping", title="A patient with two scans is clipped once, to C",
                p_values=tuple(self._clipped_p), figure=f"norms {_span(self._norms)} of C", expected="1",
            ),
            TestFamily(
                name="averaging", title="A patient counts by the mean of the draws, divided by nothing else",
                p_values=tuple(self._averaged_p), figure=f"{_span(self._sums)} of the mean gradient",
                expected="1",
            ),
            TestFamily(
                name="scan-balance", title="Draws fall on a patient's scans evenly",
                p_values=(balance,) if n else (), figure=f"{n} clipped canaries",
                expected=f"binomial, {self._execution.draws_per_patient} draws",
            ),
            TestFamily(
                name="nothing-else", title="Who takes no part, or is not finite, adds nothing",
                p_values=tuple(self._silent_p), figure=f"{len(self._silent_p)} groups of coordinates",
                expected="noise alone",
            ),
            *self._sampling_families(),
        ]  # fmt: skip

    def _sampling_families(self) -> list[TestFamily]:
        """Poisson coins: the rate, the spread of batch sizes, fresh coins in each step."""
        q = self._execution.sampling_rate
        whole = [present for steps in self._present.values() for present in steps]
        counts = np.array([int(present.sum()) for present in whole])
        sizes = np.array([len(present) for present in whole])
        share = f"{counts.sum()} of {sizes.sum()} took part"
        if q == 1:
            everybody = tuple(1.0 if all(present) else 0.0 for present in whole)
            return [
                TestFamily(
                    name="participation", title="Everybody takes part in every step", p_values=everybody,
                    figure=share, expected="all", exact=True,
                )
            ]  # fmt: skip
        rates = [count_p(int(c), int(n), q) for c, n in zip(counts, sizes, strict=True)]
        by_canary = [
            count_p(int(count), len(steps), q)
            for steps in self._present.values()
            for count in np.sum(steps, axis=0)
        ]
        overlaps = [
            count_p(int((first & second).sum()), int(first.sum()), q)
            for steps in self._present.values()
            for first, second in pairwise(steps)
        ]
        # Steps 1 and 2, 3 and 4, ...: given the first of each two, overlaps of all of them are one binomial.
        firsts, seconds = (
            np.concatenate(
                [np.concatenate(steps[start : len(steps) // 2 * 2 : 2]) for steps in self._present.values()]
            )
            for start in (0, 1)
        )
        overlaps.append(count_p(int((firsts & seconds).sum()), int(firsts.sum()), q))
        spread = dispersion_p(counts, sizes, q, SecretRandom().uniform(len(counts)))
        return [
            TestFamily(
                name="participation", title="Patients join with the plan's probability",
                p_values=(count_p(int(counts.sum()), int(sizes.sum()), q), *rates, *by_canary),
                figure=share, expected=f"rate {q:g}",
            ),
            TestFamily(
                name="batch-spread", title="Batch sizes are spread as independent coins spread them",
                p_values=(spread,), figure=f"{len(counts)} batches", expected="binomial",
            ),
            TestFamily(
                name="fresh-coins", title="Each step throws its own coins", p_values=tuple(overlaps),
                figure=f"{len(overlaps)} pairs of steps", expected=f"overlap at rate {q:g}",
            ),
        ]  # fmt: skip


def grid_families(
    execution: ExecutionPlan,
    site_ids: Sequence[str],
    *,
    study_digest: str,
    size: AuditSize,
    device: str,
    progress: Progress | None,
) -> list[TestFamily]:
    """Part 3: rounding's part in the sensitivity, and the event that is charged.

    Each pair of neighbouring cohorts goes through the path at the smallest noise and with everybody in; the
    distance of the two is measured along the direction in which it is known.
    """
    narrow = replace(execution, dimension=GRID_DIMENSION)
    pair = grid_pair(narrow)
    consortium: AuditConsortium = probe_consortium(
        replace(with_smallest_noise(execution), sampling_rate=1.0), site_ids, 1, width=GRID_DIMENSION,
        study_digest=study_digest, device=device,
    )  # fmt: skip
    distances = []
    for number in range(size.grid_pairs):
        site_id = consortium.site_ids[number % len(consortium.site_ids)]
        alone = consortium.update(site_id, list(pair.base))
        joined = consortium.update(site_id, [*pair.base, pair.canary])
        moved = (joined - alone)[: pair.moved].astype(np.float64)
        distances.append(float(moved.sum()) / math.sqrt(pair.moved))
        if progress is not None:
            progress("grid", number + 1, size.grid_pairs)
    measured = math.fsum(distances) / len(distances)
    std = MIN_SHARE_STEPS * math.sqrt(2.0 / len(distances))
    event = narrow.training_event()
    share = claimed_share_std(execution)
    whole = share * math.sqrt(execution.threshold - execution.max_colluding)
    allowed = [
        whole / event.noise_multiplier_world,
        share / event.noise_multiplier_colluding,
    ]
    clip = execution.clip / execution.grid_step
    return [
        TestFamily(
            name="rounding", title="Neighbouring cohorts are as far apart as rounding makes them",
            p_values=(sub_gaussian_p(measured - pair.distance_steps, std),),
            figure=f"{measured / clip:.6f} C, {measured - clip:+.4g} grid steps",
            expected=f"{pair.distance_steps / clip:.6f} C",
        ),
        TestFamily(
            name="charged-sensitivity", title="The event that is charged covers that distance",
            p_values=tuple(sub_gaussian_p(max(measured - bound, 0.0), std) for bound in allowed),
            figure=f"distance {measured / clip:.6f} C", expected=f"at most {min(allowed) / clip:.6f} C",
        ),
        _charge_at_plan(execution, share, whole),
    ]  # fmt: skip


def _charge_at_plan(execution: ExecutionPlan, share: float, whole: float) -> TestFamily:
    """At the plan's own dimension: noise multipliers of the event against noise over C + gamma sqrt(d)."""
    event = execution.training_event()
    sensitivity = execution.clip / execution.grid_step + math.sqrt(execution.dimension)
    most = {"world": whole / sensitivity, "all others collude": share / sensitivity}
    charged = {"world": event.noise_multiplier_world, "all others collude": event.noise_multiplier_colluding}
    rated = event.sampling_rate == execution.sampling_rate and event.steps >= 1
    return TestFamily(
        name="charged-event", title="The event that is charged claims no more noise than there is",
        p_values=tuple(1.0 if rated and charged[view] <= most[view] else 0.0 for view in most), exact=True,
        figure=", ".join(f"{view}: {charged[view]:.6g}" for view in most),
        expected=", ".join(f"at most {value:.6g}" for value in most.values()),
    )  # fmt: skip


def _projection_p(residual: float) -> float:
    return sub_gaussian_p(max(abs(residual) - ROUNDING_SHIFT, 0.0), MIN_SHARE_STEPS)


def _norm_p(residual: float) -> float:
    """The norm errs by at most the length of noise and rounding, of which one coordinate has half."""
    length = max(abs(residual) - ROUNDING_SHIFT, 0.0)
    return min(1.0, 2.0 * sub_gaussian_p(length / math.sqrt(2.0), MIN_SHARE_STEPS))


def _span(values: list[float]) -> str:
    return f"{min(values):.4f} to {max(values):.4f}" if values else "none"
