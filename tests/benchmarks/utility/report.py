"""Tables, curves and pictures from the figures of finished jobs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image

from tests.benchmarks.utility.plan import STAGES, chosen_by
from tests.benchmarks.utility.settings import Public, Study

Row = dict[str, Any]
HERE = Path(__file__).parent
MEASURE = {"hippocampus": "dice", "adrenal": "auc"}
AXIS = {"hippocampus": "mean Dice", "adrenal": "AUC"}
WHAT = {"hippocampus": "segmenter", "adrenal": "classifier"}
HOSPITALS = ("large", "middling", "small")
WORDS = {"hippocampus": "mean Dice of anterior and posterior", "adrenal": "AUC for hyperplasia"}


def read_jobs(cache: Path, run: str) -> list[Row]:
    """All finished jobs of a run (a name of ``plan.STAGES``), in its order."""
    keys = dict.fromkeys(job.key for stage in STAGES[run] for job in stage(cache))
    paths = [cache / f"{key}.json" for key in keys]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def write_report(cache: Path, out: Path = HERE, *, run: str = "two_cores") -> str:
    """Write ``tables.md`` and ``curve.png``; returns the tables."""
    jobs = read_jobs(cache, run)
    mark_chosen(jobs, chosen_by(run, cache))
    parts, cohorts = [f"Made by `python -m tests.benchmarks.utility --jobs {run}`."], {}
    for cohort in MEASURE:
        own = [job for job in jobs if job["job"]["public"]["cohort"] == cohort]
        if own:
            parts += [f"## {cohort}: {WORDS[cohort]} on real test scans", *_cohort(cohort, own)]
            cohorts[cohort] = own
    _curves(cohorts, out / "curve.png")
    text = "\n\n".join(parts) + "\n"
    (out / "tables.md").write_text(text)
    return text


def _cohort(cohort: str, jobs: Sequence[Row]) -> list[str]:
    tables = [_real(cohort, jobs), _by_epsilon(cohort, jobs), _tries(cohort, jobs)]
    return [table for table in tables if table]


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
    patients: dict[str, str] = {}
    scores: dict[str, list[float]] = {}

    def add(what: str, n: Any, entries: Iterable[dict[str, float]]) -> None:
        patients[what] = str(n)
        scores.setdefault(what, []).extend(score(cohort, entries))

    for job in _of_kind(jobs, "real"):
        values = job["values"]
        add("real, all hospitals", sum(values["patients"]), values["everybody"])
        for name, n, alone in zip(HOSPITALS, values["patients"], values["alone"], strict=True):
            add(f"real, the {name} hospital alone", n, alone)
        add("real, public scans", "", values.get("public", []))
    for job in _of_kind(jobs, "ceiling"):
        variant = _variant(job)
        add(f"members through the autoencoder{variant}", "", job["values"]["synthetic"])
        add(f"the same without texture{variant}", "", job["values"].get("without_texture", []))
    rows = [(what, patients[what], _show(values)) for what, values in scores.items() if values]
    return markdown(("trained on", "patients", "score"), rows)


def _variant(job: Row) -> str:
    channels = job["job"]["public"]["latent_channels"]
    return "" if job["own_networks"] else f" ({channels} latent channels)"


def study_key(job: Row) -> tuple[Any, ...]:
    """All that distinguishes studies, repeats aside."""
    study = job["job"]["study"]
    return (
        job["job"]["public"]["latent_channels"],
        job["job"]["guidance"],
        *(study[name] for name in sorted(study)),
    )


def grouped(jobs: Sequence[Row]) -> dict[str, list[Row]]:
    """Studies by setting, repeats together."""
    groups: dict[str, list[Row]] = {}
    for job in _of_kind(jobs, "study"):
        groups.setdefault(json.dumps(study_key(job)), []).append(job)
    return groups


def way(jobs: Sequence[Row], value: float, figure: Callable[[Row], list[float]]) -> float | None:
    """(value - prior) / (noiseless - prior) of a figure, by the means of prior and chosen noiseless studies.

    None where one of them is missing, or they do not differ.
    """
    prior = [x for job in _of_kind(jobs, "prior") if job["own_sampling"] for x in figure(job)]
    noiseless = [
        x
        for job in headline(jobs)
        if job["job"]["study"]["epsilon"] is None and job["job"]["study"]["mode"] == "distributed"
        for x in figure(job)
    ]
    if not prior or not noiseless:
        return None
    start, end = statistics.mean(prior), statistics.mean(noiseless)
    return None if start == end else (value - start) / (end - start)


def headline(jobs: Sequence[Row]) -> list[Row]:
    """Studies under the chosen setting, whatever their mode and epsilon."""
    return [job for job in _of_kind(jobs, "study") if job["chosen"]]


def mark_chosen(jobs: Sequence[Row], chosen: dict[str, tuple[Public, Study, float]]) -> None:
    """Set ``own_networks``, ``own_sampling`` and ``chosen`` of every job.

    Are its public networks those of the tables, is its guidance, and does its study differ from theirs in
    mode and epsilon alone?
    """
    for job in jobs:
        setting, study = job["job"], job["job"]["study"]
        public, wanted_study, guidance = chosen[setting["public"]["cohort"]]
        wanted = asdict(wanted_study)
        job["own_networks"] = setting["public"] == asdict(public)
        job["own_sampling"] = job["own_networks"] and setting["guidance"] == guidance
        job["chosen"] = (
            study is not None
            and job["own_sampling"]
            and all(study[k] == v for k, v in wanted.items() if k not in ("epsilon", "mode"))
        )


def _by_epsilon(cohort: str, jobs: Sequence[Row]) -> str:
    rows = []
    priors: dict[str, list[Row]] = {}
    for job in _of_kind(jobs, "prior"):
        guided = "" if job["own_sampling"] else f", guidance {job['job']['guidance']:g}"
        priors.setdefault(f"prior{guided}{_variant(job)}", []).append(job)
    rows += [_line(cohort, jobs, name, "", group) for name, group in priors.items()]
    chosen = headline(jobs)
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
    "all real + synthetic", "loss on test scans", "share, by loss", "copied members", "copied test",
    "condition's effect",
)  # fmt: skip


def _line(cohort: str, jobs: Sequence[Row], name: str, epsilon: str, group: Sequence[Row]) -> tuple[str, ...]:
    def scores(what: str) -> list[float]:
        return [x for job in group for x in score(cohort, job["values"].get(what, []))]

    def copies(what: str) -> str:
        found = [job["values"]["copies"][what] for job in group]
        return f"{sum(a for a, _ in found)}/{sum(b for _, b in found)}"

    loss = statistics.mean(_loss(job)[0] for job in group)
    synthetic = statistics.mean(scores("synthetic"))
    effects = [x for job in group for x in _effect(job)]
    return (
        name, epsilon, _show(scores("synthetic")),
        _percent(way(jobs, synthetic, lambda job: score(cohort, job["values"]["synthetic"]))),
        _show(scores("smallest_and_synthetic")), _show(scores("all_and_synthetic")), f"{loss:.3f}",
        _percent(way(jobs, loss, _loss)), copies("members"), copies("test"),
        _percent(statistics.mean(effects) if effects else None),
    )  # fmt: skip


def _loss(job: Row) -> list[float]:
    return [job["values"]["held_out_loss"]]


def _effect(job: Row) -> list[float]:
    """How much larger labels are under the rare condition, as a share of what they are among members."""

    def difference(volumes: dict[str, dict[str, float]]) -> float:
        return sum(volumes["rare"].values()) - sum(volumes["others"].values())

    if "members_label_mm3" not in job["values"]:
        return []
    return [difference(job["values"]["label_mm3"]) / difference(job["values"]["members_label_mm3"])]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{round(100 * share) + 0}%"


TRIED = ("mode", "epsilon", "trainable", "rounds", "learning_rate", "draws", "clip", "ema_decay")


def _tries(cohort: str, jobs: Sequence[Row]) -> str:
    rows = []
    for group in grouped(jobs).values():
        study = group[0]["job"]["study"]
        channels = group[0]["job"]["public"]["latent_channels"]
        line = _line(cohort, jobs, "", "", group)
        tried = [_value(study[name]) for name in TRIED]
        tried += [_value(group[0]["job"]["guidance"]), "preset's" if channels is None else str(channels)]
        rows.append((*tried, *line[2:4], *line[6:9], line[10]))
    if not rows:
        return ""
    rows.sort(key=lambda row: float(row[-4]))
    columns = (*TRIED, "guidance", "latent channels", *COLUMNS[2:4], *COLUMNS[6:9], COLUMNS[10])
    return "Every try, lowest loss first (losses of different latents do not compare):\n\n" + markdown(
        columns, rows
    )


def _value(value: Any) -> str:
    return "none" if value is None else value if isinstance(value, str) else f"{value:g}"


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, without columns in which nothing stands."""
    rows = list(rows)
    filled = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    columns, rows = [columns[k] for k in filled], [[row[k] for k in filled] for row in rows]
    if not rows:
        return ""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


LEAST_SPAN = 0.08
"""Of an axis of scores, so that differences within the scatter of trainings do not look large."""

NO_NOISE = 25.0
"""Where the figure without noise stands on the axis of epsilon."""


def _curves(cohorts: dict[str, list[Row]], path: Path) -> None:
    """Score against epsilon, both modes, between prior and real: a panel for each cohort."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = len(cohorts) + ("adrenal" in cohorts)
    figure = Figure(figsize=(4.3 * max(1, panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    if "adrenal" in cohorts:
        _effect_curve(figure.add_subplot(1, panels, panels), cohorts["adrenal"])
    for place, (cohort, jobs) in enumerate(cohorts.items(), start=1):
        axes = figure.add_subplot(1, panels, place)
        _curve(axes, cohort, jobs)
        axes.set_title(f"{cohort}: {WHAT[cohort]} trained on synthetic scans", fontsize=10)
    if cohorts:
        handles = {
            label: handle
            for axes in figure.axes
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=78)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(256, method=Image.Quantize.MAXCOVERAGE)
    small.save(path, optimize=True)


def _curve(axes: Any, cohort: str, jobs: Sequence[Row]) -> None:
    for mode, colour in (("distributed", "#1b6ca8"), ("local", "#d1495b")):
        points: dict[float, list[float]] = {}
        for job in headline(jobs):
            study = job["job"]["study"]
            if study["mode"] == mode:
                x = NO_NOISE if study["epsilon"] is None else study["epsilon"]
                points.setdefault(x, []).extend(score(cohort, job["values"]["synthetic"]))
        if points:
            xs = sorted(points)
            means = [statistics.mean(points[x]) for x in xs]
            axes.plot(xs, means, "o-", color=colour, label=f"mode {mode} (mean)")
            for x in xs:
                axes.plot([x] * len(points[x]), points[x], ".", color=colour, alpha=0.4)
    levels = {
        "real, all hospitals": ("real", "everybody", "#333333"),
        "real, the small hospital alone": ("real", "alone", "#999999"),
        "members through the autoencoder": ("ceiling", "synthetic", "#2e933c"),
        "prior": ("prior", "synthetic", "#edae49"),
    }
    for name, (kind, what, colour) in levels.items():
        values = [
            x
            for job in _of_kind(jobs, kind)
            if (job["own_sampling"] if kind == "prior" else job["own_networks"])
            for x in score(cohort, job["values"][what][-1] if what == "alone" else job["values"][what])
        ]
        if values:
            axes.axhline(statistics.mean(values), color=colour, linestyle="--", linewidth=1.2, label=name)
    low, high = axes.get_ylim()
    spare = max(0.0, LEAST_SPAN - (high - low)) / 2
    axes.set_ylim(low - spare, high + spare)
    _of_epsilon(axes)
    axes.set_ylabel(f"{AXIS[cohort]} on real test scans")


def _effect_curve(axes: Any, jobs: Sequence[Row]) -> None:
    """How far the rare condition changes glands, against epsilon, in mode ``distributed``."""
    points: dict[float, list[float]] = {}
    for job in headline(jobs):
        study = job["job"]["study"]
        if study["mode"] == "distributed":
            x = NO_NOISE if study["epsilon"] is None else study["epsilon"]
            points.setdefault(x, []).extend(100 * share for share in _effect(job))
    xs = sorted(x for x in points if points[x])
    axes.plot(xs, [statistics.mean(points[x]) for x in xs], "o-", color="#1b6ca8")
    for x in xs:
        axes.plot([x] * len(points[x]), points[x], ".", color="#1b6ca8", alpha=0.4)
    axes.axhline(0.0, color="#edae49", linestyle="--", linewidth=1.2)
    axes.set_ylim(-5, 105)
    _of_epsilon(axes)
    axes.set_ylabel("volume, rare minus normal, % of real")
    axes.set_title("adrenal: what the rare condition does", fontsize=10)


def _of_epsilon(axes: Any) -> None:
    axes.set_xscale("log")
    axes.set_xlim(0.8, 1.25 * NO_NOISE)
    axes.set_xticks([1, 3, 8, 10, NO_NOISE], labels=["1", "3", "8", "10", "no noise"])
    axes.minorticks_off()
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel("epsilon per patient, at delta 1e-5")
