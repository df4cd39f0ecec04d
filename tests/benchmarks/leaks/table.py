"""The leak benchmark's table and plot."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.benchmarks.leaks.judging import (
    ATTACKS,
    DEFAULT_MAX_AUC,
    SETTINGS,
    GradientRow,
    Repetition,
    Row,
    blocking_step,
)

TITLES = {
    "hippocampus-40": "hippocampus MR, 40 patients",
    "adrenal-100": "adrenal shapes, 100 glands",
    "adrenal-200": "adrenal shapes, 200 glands",
}
NAMES = {
    "calibrated_loss": "primary",
    "sima": "SimA",
    "pia": "PIA",
    "secmi": "SecMI",
}
AUC_LIMIT = 0.70

INTRO = (
    "Settings of the gate: `exact`, counts without noise, as in the mode `unprotected` that these "
    "networks were trained in; `noised`, the pooled counts of a plan for epsilon 8 that promised protection "
    f"which was not there; both with the default `max_auc = {DEFAULT_MAX_AUC:.2f}`, and with 0.60. "
    "`invalid` is a refusal too: too blind to say anything. At step 0 the candidate is the prior, all "
    "scores are 0, and exact counts are refused as blind.\n\n"
    "The unit of the adrenal sets is the gland: the files name no patients, and two glands of one person "
    "may stand on both sides of the split within the training part. Members are of that part, non-members "
    "of validation and test. The gradient norm, a backward pass for each patient, has a run and a table of "
    "its own, at the end."
)


def write_table(
    rows: Mapping[str, Sequence[Row]],
    examples: Mapping[str, Repetition],
    gradients: Sequence[GradientRow] = (),
) -> str:
    """Markdown: a table for each study and the step at which the gate blocks; the gradient norm's."""
    parts = [
        "# What the audit sees without protection",
        "",
        "`python -m tests.benchmarks leaks`",
        "",
        INTRO,
        "",
    ]
    for study, own in rows.items():
        example = examples[study]
        others = int((~example.member_U).sum())
        parts += [
            f"## {TITLES.get(study, study)}",
            "",
            f"{example.n_members} members and {others} non-members in each of {own[0].repetitions} draws. "
            "For each attack: mean AUC, and in brackets its power: the share of draws in which its interval, "
            f"on exact scores as a hospital sees them, lies above {DEFAULT_MAX_AUC:.2f}. Gate: share of "
            "verdicts that block.",
            "",
            f"| step | {' | '.join([NAMES[a] for a in ATTACKS] + [f'gate, {s}' for s in SETTINGS])} |",
            "| ---: |" + " ---: |" * (len(ATTACKS) + len(SETTINGS)),
        ]
        parts += [_line(row) for row in own]
        parts += ["", *_conclusions(own), ""]
    if gradients:
        parts += [*_gradients(gradients), ""]
    return "\n".join(parts)


def _gradients(rows: Sequence[GradientRow]) -> list[str]:
    return [
        "## The gradient norm",
        "",
        "`python -m tests.benchmarks.leaks.training --gradients`: one draw of 100 adrenal glands, with "
        "public networks that trained for less than those above, so that steps do not compare with the "
        f"tables above. Both attacks on the same {rows[0].n_members} members and {rows[0].n_others} "
        "non-members; AUC and its 95% interval.",
        "",
        "| step | primary | gradient norm |",
        "| ---: | ---: | ---: |",
        *(
            f"| {row.step} | "
            + " | ".join(
                f"{a:.3f} ({low:.3f} to {high:.3f})" for a, low, high in (row.primary, row.gradient_norm)
            )
            + " |"
            for row in rows
        ),
    ]


def _line(row: Row) -> str:
    cells = [str(row.step)]
    for name in ATTACKS:
        value, seen = row.aucs[name], row.seen[name]
        cells.append("" if value is None or seen is None else f"{value:.3f} ({seen:.2f})")
    for setting in SETTINGS:
        blind = f", {row.blind[setting]:.2f} invalid" if row.blind[setting] else ""
        cells.append(f"{row.blocked[setting]:.2f}{blind}")
    return "| " + " | ".join(cells) + " |"


def _conclusions(rows: Sequence[Row]) -> list[str]:
    lines = []
    passed = next((row.step for row in rows if row.true_auc > AUC_LIMIT), None)
    lines.append(
        f"- The primary attack's AUC passes {AUC_LIMIT:.2f} at step {passed}."
        if passed is not None
        else f"- The primary attack's AUC stays at or below {AUC_LIMIT:.2f}."
    )
    for setting in SETTINGS:
        share_at = _share_at(rows, AUC_LIMIT, setting)
        if share_at is not None:
            lines.append(
                f"- Gate, {setting} counts: {share_at:.0%} of the verdicts block at AUC {AUC_LIMIT:.2f}, on "
                "the line between the neighbouring steps."
            )
        for share in (0.5, 0.95):
            row = blocking_step(rows, setting, share)
            lines.append(
                f"- Gate, {setting} counts: at least {share:.0%} of the verdicts block from "
                + (
                    f"step {row.step} on, at AUC {row.true_auc:.3f}."
                    if row is not None
                    else "no step up to the last one on."
                )
            )
    return lines


def _share_at(rows: Sequence[Row], value: float, setting: str) -> float | None:
    """Share of blocking verdicts where the true AUC crosses a value, linearly between two steps."""
    for before, after in itertools.pairwise(rows):
        if before.true_auc <= value < after.true_auc:
            weight = (value - before.true_auc) / (after.true_auc - before.true_auc)
            return (1 - weight) * before.blocked[setting] + weight * after.blocked[setting]
    return None


def draw_plot(rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """One panel for each study: AUC of each attack, and the share of verdicts that block."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(rows), figsize=(4.6 * len(rows), 4.2), sharey=True, squeeze=False)
    for panel, (study, own) in zip(panels[0], rows.items(), strict=True):
        steps = [row.step for row in own]
        panel.axhline(0.5, color="0.8", linewidth=1)
        panel.axhline(AUC_LIMIT, color="0.8", linewidth=1, linestyle="--")
        low = [row.true_auc - row.spread for row in own]
        high = [row.true_auc + row.spread for row in own]
        panel.fill_between(steps, low, high, color="tab:blue", alpha=0.15, linewidth=0)
        for name in ATTACKS:
            known = [(row.step, row.aucs[name]) for row in own if row.aucs[name] is not None]
            width = 2.0 if name == "calibrated_loss" else 1.0
            panel.plot(*zip(*known, strict=True), label=f"AUC, {NAMES[name]}", linewidth=width, marker=".")
        for setting, style in zip(SETTINGS, ("-", "--", ":", "-."), strict=True):
            blocked = [row.blocked[setting] for row in own]
            panel.plot(steps, blocked, color="black", linestyle=style, label=f"blocked, {setting} counts")
        panel.set_xscale("symlog", linthresh=10)
        panel.set_ylim(0, 1.02)
        panel.set_title(TITLES.get(study, study), fontsize=10)
        panel.set_xlabel("unprotected fine-tuning steps")
    panels[0][0].set_ylabel("AUC; share of verdicts that block")
    panels[0][-1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
