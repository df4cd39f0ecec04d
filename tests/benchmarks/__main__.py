"""``make bench``: each benchmark compares with a named peer in the same run and prints ratios.

Tables are written to ``tests/benchmarks/results/`` (not under version control: they are of one machine).
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

NAMES = (
    "mask_expansion",
    "private_step",
    "known_break",
    "secagg_cost",
    "leaks",
    "null_runs",
    "operating_characteristic",
    "copies",
    "generation",
)
LONG = ("modes_compared", "load")
"""Only where it is named: an hour or more."""
RESULTS = Path(__file__).parent / "results"


def main(chosen: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    for name in chosen or NAMES:
        table = importlib.import_module(f"tests.benchmarks.{name}").run()
        print(table, flush=True)
        (RESULTS / f"{name}.txt").write_text(table + "\n")
    print(f"tables: {RESULTS}")


main(sys.argv[1:])
