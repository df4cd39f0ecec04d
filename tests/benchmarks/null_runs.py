"""How often the gate blocks a network for nothing: ``python -m tests.benchmarks null_runs``.

Each run takes glands of the validation and test part that a network was NOT trained on, from the leak
benchmark's kept scores, calls a random 100 (or 200) of them members and the others held out, and asks for the
gate's verdict. The network has learned none of them, so the label tells nothing: every block is a false one.
The settings are those of the leak benchmark; coins and noise are drawn anew.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from privacy.audit.bounds import clopper_pearson
from tests.benchmarks.leaks.judging import DEFAULT_MAX_AUC, FOLDER, SETTINGS, Gate, Repetition, read_scores

RUNS = 200
"""For each setting and number of members."""

HEADER = (
    "# Null runs\n\n"
    "`python -m tests.benchmarks null_runs`: random relabelings of glands that the network was trained on "
    "none of. A block is a condition that a test found broken; a refusal because the noised counts were too "
    "blind is none. The same relabelings are judged in all settings, so that rows are not independent of one "
    "another."
)


def run() -> str:
    """A list with exact 95% intervals, also written to ``leaks/null_runs.md``."""
    studies = {"adrenal-100": 100, "adrenal-200": 200}
    by_study: dict[str, list[Repetition]] = {name: [] for name in studies}
    for repetition in read_scores():
        if repetition.study in by_study:
            by_study[repetition.study].append(repetition)
    lines = []
    total, blocks, level = 0, 0, 0.0
    for name, members in studies.items():
        for setting, arguments in SETTINGS.items():
            outcomes, level = null_outcomes(by_study[name], members=members, runs=RUNS, **arguments)
            blind = outcomes["too blind"]
            found = RUNS - blind - outcomes["pass"]
            total, blocks = total + RUNS, blocks + found
            lines.append(f"{members} members, {setting} counts: {_words(found, RUNS)}; too blind: {blind}")
    lines.append(f"all: {_words(blocks, total)}")
    lines.append(f"stated level of one audit, all tests together: {level:.4f}")
    listed = "\n".join(f"- {line}" for line in lines)
    (FOLDER / "null_runs.md").write_text(f"{HEADER}\n\n{listed}\n")
    return listed


def null_outcomes(
    repetitions: list[Repetition], *, members: int, runs: int, noised: bool, max_auc: float = DEFAULT_MAX_AUC
) -> tuple[Counter[str], float]:
    """Outcomes of ``runs`` relabelings, the repetitions and their later steps in turn; and the level.

    An outcome is ``pass``, ``too blind`` (nothing but the power is short: not an error of a test), or the
    conditions that a test found broken, which are all false.
    """
    outcomes: Counter[str] = Counter()
    level = 0.0
    for index in range(runs):
        repetition = repetitions[index % len(repetitions)]
        steps = [int(step) for step in repetition.steps_K if step > 0]
        step = steps[(index // len(repetitions)) % len(steps)]
        generator = np.random.default_rng([members, noised, index])
        _, scores = repetition.at("calibrated_loss", step)
        losses = repetition.public_loss_U[~repetition.member_U]
        order = generator.permutation(scores.size)
        first, rest = order[:members], order[members:]
        gate = Gate.of(repetition, noised=noised, max_auc=max_auc)
        level = gate.plan.audit.significance / gate.plan.privacy.max_audit_attempts
        verdict = gate.judge((scores[first], losses[first]), (scores[rest], losses[rest]), generator)
        broken = [c.name for c in verdict.conditions if c.status != "pass"]
        outcomes["too blind" if broken == ["power"] else ", ".join(broken) or "pass"] += 1
    return outcomes, level


def _words(found: int, runs: int) -> str:
    interval = clopper_pearson(found, runs, error=0.025)
    share = f"{found / runs:.4f}, 95% interval {interval.low:.4f} to {interval.high:.4f}"
    return f"{found} of {runs} blocked ({share})"
