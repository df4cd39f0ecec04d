"""Median times, in one process, the peers taken in turn so that a slow moment hits all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable


def median_seconds(tasks: dict[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median wall time of each task over ``repeats`` turns, after one turn to warm up."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            started = time.perf_counter()
            task()
            if turn:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def ratio_table(title: str, seconds: dict[str, float], *, base: str) -> str:
    """Lines of name, median and ratio to ``base``."""
    lines = [title, f"{'':44}{'median s':>12}{'ratio':>10}"]
    lines += [f"{name:44}{value:12.4f}{value / seconds[base]:10.2f}" for name, value in seconds.items()]
    return "\n".join(lines)
