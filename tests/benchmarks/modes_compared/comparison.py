"""Table and plot of the compared modes, from the figures of single trainings."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
CASE = ("mode", "n_sites", "rounds", "local_steps")
MAX_COLLUDING = 1
COLUMNS = (
    *CASE, "threshold", "learning_rate", "repeats", "planned_epsilon", "steps_accounted", "noise_multiplier",
    "noise_over_its_claim", "signal_to_noise_first_round", "signal_to_noise_median",
    "held_out_loss_prior", "held_out_loss", "held_out_loss_lowest", "held_out_loss_highest", "other_rates",
)  # fmt: skip


def compare(trainings: Sequence[Row]) -> list[Row]:
    """One row a case, at the learning rate with the lowest held-out loss in its first repeat.

    ``held_out_loss`` is the median over repeats of the last round's averaged weights.
    """
    rows = []
    for key in sorted({tuple(t[name] for name in CASE) for t in trainings}):
        own = [t for t in trainings if tuple(t[name] for name in CASE) == key]
        first = {t["learning_rate"]: t["held_out_loss"][-1] for t in own if t["repeat"] == 0}
        rate = min(first, key=lambda r: first[r])
        chosen = [t for t in own if t["learning_rate"] == rate]
        final = [t["held_out_loss"][-1] for t in chosen]
        noise = [norm / claimed_noise(t) for t in chosen for _, norm in t["signal_and_noise"]]
        ratios = [[signal / noise for signal, noise in t["signal_and_noise"]] for t in chosen]
        rows.append(
            {
                **dict(zip(CASE, key, strict=True)),
                "threshold": chosen[0]["threshold"],
                "learning_rate": rate,
                "repeats": len(chosen),
                "planned_epsilon": chosen[0]["planned_epsilon"],
                "steps_accounted": chosen[0]["steps_accounted"],
                "noise_multiplier": chosen[0]["noise_multiplier"],
                "noise_over_its_claim": statistics.median(noise),
                "signal_to_noise_first_round": statistics.median(r[0] for r in ratios),
                "signal_to_noise_median": statistics.median(x for r in ratios for x in r),
                "held_out_loss_prior": chosen[0]["held_out_loss"][0],
                "held_out_loss": statistics.median(final),
                "held_out_loss_lowest": min(final),
                "held_out_loss_highest": max(final),
                "other_rates": " ".join(f"{r:g}:{first[r]:.4f}" for r in sorted(first) if r != rate),
            }
        )
    return rows


def claimed_noise(training: Row) -> float:
    """Expected norm of the noise in a sum over all sites, in units of the clip norm, from the plan alone."""
    shares = training["threshold"] - MAX_COLLUDING if training["mode"] == "distributed" else 1
    variance = training["noise_multiplier"] ** 2 * training["n_sites"] / shares
    return math.sqrt(variance * training["dimension"])


def write_table(rows: Sequence[Row], path: Path) -> None:
    """CSV, figures to 5 digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in (row[c] for c in COLUMNS)])


def print_table(rows: Sequence[Row]) -> str:
    """The same for people."""
    lines = [
        f"{'mode':22}{'sites':>6}{'sigma':>8}{'S/N, round 1':>14}{'S/N, median':>13}"
        f"{'prior':>9}{'held-out loss':>15}{'(range)':>18}{'repeats':>9}"
    ]
    for row in rows:
        spread = f"{row['held_out_loss_lowest']:.4f}-{row['held_out_loss_highest']:.4f}"
        lines.append(
            f"{case_name(row):22}{row['n_sites']:6d}{row['noise_multiplier']:8.3f}"
            f"{row['signal_to_noise_first_round']:14.4f}{row['signal_to_noise_median']:13.4f}"
            f"{row['held_out_loss_prior']:9.4f}{row['held_out_loss']:15.4f}{spread:>18}{row['repeats']:9d}"
        )
    return "\n".join(lines)


def case_name(row: Row) -> str:
    """``distributed, 15 x 1``: rounds times steps in each."""
    return f"{row['mode']}, {row['rounds']} x {row['local_steps']}"


def write_plot(trainings: Sequence[Row], rows: Sequence[Row], path: Path) -> None:
    """Left: signal-to-noise of the aggregate. Right: held-out loss over steps, one line a training."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    bars, *losses = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    colours = {("distributed", 1): "#1b6ca8", ("local", 1): "#d1495b", ("local", 2): "#edae49"}
    names = [f"{case_name(row)}\n{row['n_sites']} sites" for row in rows]
    bars.barh(
        names,
        [row["signal_to_noise_median"] for row in rows],
        color=[colours[row["mode"], row["local_steps"]] for row in rows],
    )
    for place, row in enumerate(rows):
        bars.text(row["signal_to_noise_median"], place, f" {row['signal_to_noise_median']:.3f}", va="center")
    bars.margins(x=0.15)
    bars.set_xlabel("signal to noise of the aggregate, median over rounds")
    for axes, n_sites in zip(losses, (3, 10), strict=True):
        for row in (row for row in rows if row["n_sites"] == n_sites):
            same = [
                t for t in trainings
                if all(t[name] == row[name] for name in (*CASE, "learning_rate"))
            ]  # fmt: skip
            for place, training in enumerate(same):
                steps = [number * training["local_steps"] for number in range(training["rounds"] + 1)]
                axes.plot(
                    steps, training["held_out_loss"], color=colours[row["mode"], row["local_steps"]],
                    label=case_name(row) if place == 0 else None, linewidth=1.4,
                )  # fmt: skip
        axes.set_title(f"{n_sites} sites")
        axes.set_xlabel("steps")
        axes.legend()
    losses[0].set_ylabel("flow loss on held-out public patients")
    losses[1].sharey(losses[0])
    figure.suptitle("Modes at the same epsilon (8 at delta 1e-5), hippocampus MR at 2 mm")
    figure.savefig(path, dpi=110)
