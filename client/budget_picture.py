"""Epsilon over rounds as a picture: one panel a study, one for the site. No global state of matplotlib."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from client.budget_report import HistoryPoint, Shares, SiteBudget

SPENT, RESERVED, CAP = "#1b6ca8", "#edae49", "#b3261e"
COLUMNS = 3


def budget_picture(report: SiteBudget) -> bytes:
    """A PNG. Steps: spent. Band: reserved on top of it. Line: the cap of the plan, or of the site."""
    panels = [
        (f"study {study.study_id} ({study.state})", study.history, study.shares, study.world.delta, "round")
        for study in report.studies
    ]
    panels.append(
        ("all studies of this site", report.history, report.shares, report.total.delta, "attempts charged")
    )
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.8 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, history, shares, delta, unit) in zip(grid, panels, strict=False):
        _panel(axes, history, shares, over_rounds=unit == "round")
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(unit)
        axes.set_ylabel(f"epsilon at delta {delta:g}")
    figure.suptitle(f"Privacy budget of site {report.site_id}, per patient")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _panel(axes: Any, history: Sequence[HistoryPoint], shares: Shares, *, over_rounds: bool) -> None:
    finite = [point for point in history if math.isfinite(point.epsilon)]
    x = [0, *(point.round if over_rounds else point.charge for point in finite)]
    y = [0.0, *(point.epsilon for point in finite)]
    axes.step(x, y, where="post", color=SPENT, label="spent")
    audits = [(place, value) for place, value, point in zip(x[1:], y[1:], finite, strict=True)
              if point.purpose == "audit"]  # fmt: skip
    if audits:
        axes.plot(*zip(*audits, strict=True), "o", color=SPENT, markersize=5, label="spent by an audit")
    right = max(max(x) * 1.25, 1)
    axes.hlines(y[-1], x[-1], right, color=SPENT)
    if len(finite) < len(history):
        axes.text(0.5, 0.5, "infinite: unprotected attempts", transform=axes.transAxes, ha="center")
    elif math.isfinite(shares.reserved) and shares.reserved > 0:
        axes.fill_between([x[-1], right], y[-1], y[-1] + shares.reserved, color=RESERVED, alpha=0.5,
                          label="reserved", linewidth=0)  # fmt: skip
    if shares.cap is not None:
        axes.axhline(shares.cap, color=CAP, linestyle="--", label=f"cap {shares.cap:g}")
    axes.set_xlim(0, right)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8, loc="lower right")
