"""The command ``python -m tests.benchmarks generation``, for one batch."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
for folder in (ROOT, ROOT / "tests" / "shared"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

from tests.benchmarks import generation  # noqa: E402


def test_every_part_is_in_the_table_and_the_parts_are_the_whole(monkeypatch) -> None:
    monkeypatch.setattr(generation, "STEPS", 2)
    monkeypatch.setattr(generation, "BATCH", 2)
    table = generation.run(count=2)
    figures = [float(number) for number in re.findall(r" ([\d.]+) CPU s", table)]
    assert len(figures) == len(generation.PARTS) + 3 and "ratio" in table
    assert abs(sum(figures[:-2]) - figures[-2]) < 0.1 * len(figures)
