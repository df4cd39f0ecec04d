"""How often the gate blocks, by true AUC: ``python -m tests.benchmarks operating_characteristic``.

The gate's own arithmetic (bound, level, interval) on simulated histograms: held-out scores are normal,
members' are shifted by the distance that gives the AUC, bins are spread evenly from -2 to 3 standard
deviations. Real candidates' scores can crowd in few bins, where noised counts see less; ``leaks`` has that
for real networks.

Settings are those of ``leaks``: exact counts (mode ``unprotected``), and counts with the noise that a plan
for epsilon 8 at delta 1e-5 with three hospitals proposes. The peers are the two bounds, 0.55 and 0.60.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from privacy.audit.bounds import gaussian_auc_ceiling
from privacy.audit.counts import PRIMARY_WEIGHT, pooled_noise_std
from privacy.audit.pooled_auc import lies_above, noised_histograms
from privacy.audit.verdict import level_of_test
from shared.study_plan import StudyPlan
from tests.benchmarks.leaks.judging import SITES, plan_of_benchmark

BOUNDS = (0.55, 0.60)
GROUPS = {
    "100 members, 396 held out, as in `leaks`": (100, 396),
    "100 members, 50 held out, as a hold-out share of one third gives": (100, 50),
    "168 members, 84 held out, as in `lacuna demo`": (168, 84),
}
TRUE_AUC = (0.50, 0.53, 0.55, 0.575, 0.60, 0.65, 0.70, 0.75, 0.80, 0.85, 0.90, 0.95)
EPSILONS = (1.0, 2.0, 3.0, 4.0, 8.0)
DRAWS = 2000
_PUBLIC_LOSSES = tuple(0.8 + 0.002 * k for k in range(60))
"""Any: the edges that follow from them are not used."""

Floats = NDArray[np.float64]


def run() -> str:
    """Tables in Markdown; kept beside this file as ``operating_characteristic.md``."""
    lines = ["# How often the gate blocks", "", "`python -m tests.benchmarks operating_characteristic`", ""]
    level = level_of_test(_plan(100, 8.0), "membership_attack")
    lines += [
        f"Share of {DRAWS} simulated audits in which the lower end of the attack's interval is above the "
        "bound. Where the true AUC is the bound or less, that is a false block; the stated level of this "
        f"test is {level:g}."
    ]
    columns = [f"{kind}, {bound:.2f}" for kind in ("exact", "noised") for bound in BOUNDS]
    for title, (members, held_out) in GROUPS.items():
        lines += ["", f"## {title}", "", f"| true AUC | {' | '.join(columns)} |"]
        lines += ["| ---: |" + " ---: |" * len(columns)]
        for true_auc in TRUE_AUC:
            cells = []
            for epsilon in (None, 8.0):
                found = shares_blocked(_plan(members, epsilon), members, held_out, true_auc)
                cells += [f"{share:.4f}" for share in found]
            lines.append(f"| {true_auc:.3f} | {' | '.join(cells)} |")
    lines += ["", *_of_promises()]
    return "\n".join(lines)


def _of_promises() -> list[str]:
    """At the largest AUC that a kept promise permits: what a block there costs is the plan's own choice."""
    members, held_out = GROUPS["100 members, 396 held out, as in `leaks`"]
    lines = [
        "## A promise that is kept, at the largest attack that it permits",
        "",
        "100 members, 396 held out. The bound is the smaller of `max_auc` and the ceiling. A mechanism that "
        "keeps its promise may leak up to the ceiling; the gate is stricter on purpose.",
        "",
        "| epsilon | ceiling | exact, 0.55 | exact, 0.60 | noised, 0.55 | noised, 0.60 |",
        "| ---: |" + " ---: |" * 5,
    ]
    for epsilon in EPSILONS:
        ceiling = gaussian_auc_ceiling(epsilon, 1e-5)
        cells = []
        for of_noise in (None, epsilon):
            bounds = [min(bound, ceiling) for bound in BOUNDS]
            found = shares_blocked(_plan(members, of_noise), members, held_out, ceiling, bounds)
            cells += [f"{share:.4f}" for share in found]
        lines.append(f"| {epsilon:g} | {ceiling:.3f} | {' | '.join(cells)} |")
    return lines


def shares_blocked(
    plan: StudyPlan,
    n_members: int,
    n_held_out: int,
    true_auc: float,
    bounds: Sequence[float] = BOUNDS,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Floats:
    """Share of audits whose interval lies above each of the bounds; the same audits for all of them."""
    generator = np.random.default_rng([seed, n_members, n_held_out, round(1e6 * true_auc)])
    edges = np.linspace(-2.0, 3.0, len(plan.audit.score_edges))
    shift = math.sqrt(2.0) * float(stats.norm.ppf(true_auc))
    members, held_out = (
        generator.multinomial(n, np.diff(stats.norm.cdf(edges - by), prepend=0.0, append=1.0), size=draws)
        for n, by in ((n_members, shift), (n_held_out, 0.0))
    )
    steps = pooled_noise_std(plan, len(SITES))
    halves, out = (
        np.rint(generator.normal(0.0, steps, (k, *members.shape))).sum(axis=0) / PRIMARY_WEIGHT
        for k in (2, 1)
    )
    std, level = steps / PRIMARY_WEIGHT, level_of_test(plan, "membership_attack")
    audits = [
        noised_histograms(m_B, h_B, members_std=std * math.sqrt(2.0), held_out_std=std)
        for m_B, h_B in zip(members + halves, held_out + out, strict=True)
    ]
    return np.array(
        [np.mean([lies_above(audit, bound, error=level) for audit in audits]) for bound in bounds]
    )


def _plan(members: int, epsilon: float | None) -> StudyPlan:
    """For its noise and its levels; the bound is the caller's."""
    return plan_of_benchmark(_PUBLIC_LOSSES, members=members, epsilon=epsilon, max_auc=BOUNDS[0])
