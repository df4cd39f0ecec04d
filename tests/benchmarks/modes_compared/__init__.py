"""Modes ``distributed`` and ``local`` at the same epsilon, with 3 and 10 hospitals, on hippocampus scans.

``python -m tests.benchmarks modes_compared`` writes ``table.csv`` and ``plot.png`` beside this file. It takes
an hour or more; each training that is finished is kept, so it goes on where it was stopped. The scans are
looked for in ``LACUNA_DATA`` (default ``../shared/data``).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.modes_compared.comparison import compare, print_table, write_plot, write_table

HERE = Path(__file__).parent
KEPT = HERE.parent / "results" / "modes_compared"
REPEATS = 3
RATES = (3e-3, 1e-2, 1e-3)
"""Every mode gets the same choice of learning rates; the first repeat of each decides which one is used."""
CASES = (
    {"mode": "distributed", "rounds": 10, "local_steps": 1, "n_sites": 3},
    {"mode": "local", "rounds": 10, "local_steps": 1, "n_sites": 3},
    {"mode": "distributed", "rounds": 10, "local_steps": 1, "n_sites": 10},
    {"mode": "local", "rounds": 10, "local_steps": 1, "n_sites": 10},
)
FEWER_ROUNDS = (
    {"mode": "local", "rounds": 5, "local_steps": 2, "n_sites": 3},
    {"mode": "local", "rounds": 5, "local_steps": 2, "n_sites": 10},
)
"""As many steps, charged for as many, in half the rounds: what mode ``local`` is for."""


def run() -> str:
    """Train what is missing, then write table and plot. Returns the table as text."""
    import torch

    from tests.benchmarks.modes_compared.consortium import PublicPart, train

    torch.set_num_threads(1)
    data = Path(os.environ.get("LACUNA_DATA", HERE.parents[3] / "shared" / "data"))
    public = PublicPart(data, KEPT / "public", progress=lambda words: print(words, end="\r", flush=True))
    (KEPT / "trainings").mkdir(parents=True, exist_ok=True)
    for setting in missing_settings():
        print(f"training {setting.name}", flush=True)
        with tempfile.TemporaryDirectory(prefix="lacuna-modes-") as folder:
            os.environ["LACUNA_COUNTER_DIR"] = f"{folder}/counters"
            row = train(Path(folder), setting, public)
        path = KEPT / "trainings" / f"{setting.name}.json"
        part = path.with_suffix(".part")
        part.write_text(json.dumps(row))
        part.replace(path)
    return report()


def report() -> str:
    """Table and plot of the trainings that are there."""
    rows = compare(kept_rows())
    write_table(rows, HERE / "table.csv")
    write_plot(kept_rows(), rows, HERE / "plot.png")
    return print_table(rows)


def kept_rows() -> list[dict[str, Any]]:
    """Figures of the trainings that are finished."""
    return [json.loads(path.read_text()) for path in sorted((KEPT / "trainings").glob("*.json"))]


def missing_settings() -> Iterator[Any]:
    """First every mode once, then other learning rates, then repeats at the best rate of each."""
    from tests.benchmarks.modes_compared.consortium import Setting

    def kept(setting: Setting) -> bool:
        return (KEPT / "trainings" / f"{setting.name}.json").exists()

    for cases in (CASES, FEWER_ROUNDS):
        for learning_rate in RATES:
            settings = [Setting(**case, learning_rate=learning_rate, repeat=0) for case in cases]
            yield from (setting for setting in settings if not kept(setting))
        for repeat in range(1, REPEATS):
            for case in cases:
                row = next(r for r in compare(kept_rows()) if all(r[name] == case[name] for name in case))
                setting = Setting(**case, learning_rate=row["learning_rate"], repeat=repeat)
                if not kept(setting):
                    yield setting
