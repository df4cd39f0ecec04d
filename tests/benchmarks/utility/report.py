"""Tables, curves and pictures from the figures of finished jobs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks.utility.plan import choose
from tests.benchmarks.utility.settings import Study

Row = dict[str, Any]
HERE = Path(__file__).parent
MEASURE = {"hippocampus": "dice", "adrenal": "auc"}
WORDS = {"hippocampus": "mean Dice of anterior and posterior", "adrenal": "AUC for hyperplasia"}


def read_jobs(cache: Path) -> list[Row]:
    """All finished jobs."""
    return [json.loads(path.read_text()) for path in sorted(cache.glob("*.json"))]


def write_report(cache: Path, out: Path = HERE) -> str:
    """Write ``tables.md`` and a curve for each cohort; returns the tables."""
    jobs = read_jobs(cache)
    mark_chosen(jobs, choose(cache))
    parts = []
    for cohort in MEASURE:
        own = [job for job in jobs if job["job"]["public"]["cohort"] == cohort]
        if own:
            parts += [f"## {cohort}: {WORDS[cohort]} on real test scans", *_cohort(cohort, own)]
            _curve(cohort, own, out / f"{cohort}.png")
    text = "\n\n".join(parts) + "\n"
    (out / "tables.md").write_text(text)
    return text


def _cohort(cohort: str, jobs: Sequence[Row]) -> list[str]:
    return [_real(cohort, jobs), _by_epsilon(cohort, jobs), _tries(cohort, jobs)]


def score(cohort: str, entries: Iterable[dict[str, float]]) -> list[float]:
    """The cohort's measure of several trainings."""
    return [entry[MEASURE[cohort]] for entry in entries]


def _show(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def _of_kind(jobs: Sequence[Row], kind: str) -> list[Row]:
    """Jobs of a kind, those on the preset's own networks first."""
    return [job for job in jobs if job["job"]["kind"] == kind]


def _real(cohort: str, jobs: Sequence[Row]) -> str:
    rows = []
    for job in _of_kind(jobs, "real"):
        values = job["values"]
        names = ("large", "middling", "small")
        rows.append(("real, all hospitals", sum(values["patients"]), values["everybody"]))
        rows += [
            (f"real, the {name} hospital alone", patients, alone)
            for name, patients, alone in zip(names, values["patients"], values["alone"], strict=True)
        ]
        rows.append(("real, public scans", "", values["public"]))
    for job in _of_kind(jobs, "ceiling"):
        variant = _variant(job)
        rows.append((f"members through the autoencoder{variant}", "", job["values"]["synthetic"]))
        rows.append((f"the same without texture{variant}", "", job["values"]["without_texture"]))
    table = [(what, str(n), _show(score(cohort, entries))) for what, n, entries in rows]
    return markdown(("trained on", "patients", "score"), table)


def _variant(job: Row) -> str:
    channels = job["job"]["public"]["latent_channels"]
    return "" if channels is None else f" ({channels} latent channels)"


def study_key(job: Row) -> tuple[Any, ...]:
    """All that distinguishes studies, repeats aside."""
    study = job["job"]["study"]
    return (job["job"]["public"]["latent_channels"], *(study[name] for name in sorted(study)))


def grouped(jobs: Sequence[Row]) -> dict[str, list[Row]]:
    """Studies by setting, repeats together."""
    groups: dict[str, list[Row]] = {}
    for job in _of_kind(jobs, "study"):
        groups.setdefault(json.dumps(study_key(job)), []).append(job)
    return groups


def way(cohort: str, jobs: Sequence[Row], value: float, *, what: str = "synthetic") -> float | None:
    """(value - prior) / (noiseless - prior), by mean scores of the headline studies."""
    prior = [x for job in _of_kind(jobs, "prior") for x in score(cohort, job["values"][what])]
    noiseless = [
        x
        for job in headline(cohort, jobs)
        if job["job"]["study"]["epsilon"] is None and job["job"]["study"]["mode"] == "distributed"
        for x in score(cohort, job["values"][what])
    ]
    if not prior or not noiseless:
        return None
    low, high = statistics.mean(prior), statistics.mean(noiseless)
    return (value - low) / (high - low) if high > low else None


def headline(cohort: str, jobs: Sequence[Row]) -> list[Row]:
    """Studies under the chosen setting, whatever their mode and epsilon."""
    return [job for job in _of_kind(jobs, "study") if job["chosen"]]


def mark_chosen(jobs: Sequence[Row], chosen: dict[str, Study]) -> None:
    """Set ``chosen`` of every job: does its study differ from the chosen one in mode and epsilon alone?"""
    for job in jobs:
        setting, study = job["job"], job["job"]["study"]
        wanted = asdict(chosen[setting["public"]["cohort"]])
        job["chosen"] = (
            study is not None
            and setting["public"]["latent_channels"] is None
            and all(study[k] == v for k, v in wanted.items() if k not in ("epsilon", "mode"))
        )


def _by_epsilon(cohort: str, jobs: Sequence[Row]) -> str:
    rows = []
    for job in _of_kind(jobs, "prior"):
        rows.append(_line(cohort, jobs, "prior", "", [job]))
    chosen = headline(cohort, jobs)
    for mode in ("distributed", "local"):
        for epsilon in (None, 10.0, 8.0, 3.0, 1.0):
            group = [
                job
                for job in chosen
                if job["job"]["study"]["mode"] == mode and job["job"]["study"]["epsilon"] == epsilon
            ]
            if group:
                name = "no noise" if epsilon is None else f"{epsilon:g}"
                rows.append(_line(cohort, jobs, mode, name, group))
    return markdown(COLUMNS, rows)


COLUMNS = (
    "generator", "epsilon", "synthetic alone", "share of the way", "small hospital + synthetic",
    "all real + synthetic", "loss on test scans", "copied members", "copied test",
)  # fmt: skip


def _line(cohort: str, jobs: Sequence[Row], name: str, epsilon: str, group: Sequence[Row]) -> tuple[str, ...]:
    def scores(what: str) -> list[float]:
        return [x for job in group for x in score(cohort, job["values"][what])]

    def copies(what: str) -> str:
        found = [job["values"]["copies"][what] for job in group]
        return f"{sum(a for a, _ in found)}/{sum(b for _, b in found)}"

    share = way(cohort, jobs, statistics.mean(scores("synthetic")))
    return (
        name, epsilon, _show(scores("synthetic")), "" if share is None else f"{share:.0%}",
        _show(scores("smallest_and_synthetic")), _show(scores("all_and_synthetic")),
        f"{statistics.mean(job['values']['held_out_loss'] for job in group):.3f}",
        copies("members"), copies("test"),
    )  # fmt: skip


TRIED = ("mode", "epsilon", "trainable", "rounds", "learning_rate", "draws", "clip", "ema_decay")


def _tries(cohort: str, jobs: Sequence[Row]) -> str:
    rows = []
    for group in grouped(jobs).values():
        study = group[0]["job"]["study"]
        variant = group[0]["job"]["public"]["latent_channels"]
        line = _line(cohort, jobs, "", "", group)
        tried = [_value(study[name]) for name in TRIED]
        rows.append((*tried, "" if variant is None else str(variant), line[2], line[3], line[6], line[7]))
    rows.sort(key=lambda row: row[-2])
    columns = (*TRIED, "latent channels", "synthetic alone", "share of the way", "loss", "copied members")
    return "Every try, lowest loss first (losses of different latents do not compare):\n\n" + markdown(
        columns, rows
    )


def _value(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else f"{value:g}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _curve(cohort: str, jobs: Sequence[Row], path: Path) -> None:
    """Score against epsilon, both modes, between prior and real."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    chosen = headline(cohort, jobs)
    for mode, colour in (("distributed", "#1b6ca8"), ("local", "#d1495b")):
        points: dict[float, list[float]] = {}
        for job in chosen:
            study = job["job"]["study"]
            if study["mode"] == mode and study["epsilon"] is not None:
                points.setdefault(study["epsilon"], []).extend(score(cohort, job["values"]["synthetic"]))
        if points:
            xs = sorted(points)
            axes.plot(xs, [statistics.mean(points[x]) for x in xs], "o-", color=colour, label=f"{mode} mode")
            for x in xs:
                axes.plot([x] * len(points[x]), points[x], ".", color=colour, alpha=0.4)
    levels = {
        "real, all hospitals": ("real", "everybody", "#333333"),
        "real, the small hospital alone": ("real", "alone", "#999999"),
        "members through the autoencoder": ("ceiling", "synthetic", "#2e933c"),
        "prior": ("prior", "synthetic", "#edae49"),
    }
    for name, (kind, what, colour) in levels.items():
        for job in _of_kind(jobs, kind)[:1]:
            entries = job["values"][what]
            values = score(cohort, entries[-1] if what == "alone" else entries)
            axes.axhline(float(np.mean(values)), color=colour, linestyle="--", linewidth=1.2, label=name)
    noiseless = [
        x
        for job in chosen
        if job["job"]["study"]["epsilon"] is None and job["job"]["study"]["mode"] == "distributed"
        for x in score(cohort, job["values"]["synthetic"])
    ]
    if noiseless:
        axes.axhline(float(np.mean(noiseless)), color="#1b6ca8", linestyle=":", label="no noise")
    axes.set_xscale("log")
    axes.set_xticks([1, 3, 8, 10], labels=["1", "3", "8", "10"])
    axes.minorticks_off()
    axes.set_xlabel("epsilon per patient, at delta 1e-5")
    axes.set_ylabel(WORDS[cohort])
    axes.set_title(f"{cohort}: trained on synthetic scans alone, tested on real ones")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)
