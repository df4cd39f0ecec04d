"""``lacuna coordinator evaluate --report``: the figures of a release, with pictures, on one page."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path
from typing import Any

from markupsafe import Markup

from privacy.compliance.drawings import dots_on_axis, interval_on_axis
from privacy.compliance.page import Verbatim, render_page
from server.distribution_distance import SetDistance
from server.release_quality import ConditionQuality, ReleaseQuality
from shared.volumes.contact_sheet import comparison_sheet


def quality_page(quality: ReleaseQuality, *, at: str) -> str:
    """Render the page; a function of the figures and of the time ``at``."""
    return render_page(
        "quality.html",
        package="server",
        at=at,
        quality=quality,
        held_out_patients=len({volume.patient_id for volume in quality.public.held_out}),
        tried=sum(condition.tried for condition in quality.conditions),
        rejected=sum(condition.rejected for condition in quality.conditions),
        sections=[_section(quality, condition) for condition in quality.conditions],
    )


def _section(quality: ReleaseQuality, condition: ConditionQuality) -> dict[str, Any]:
    rows = [("Synthetic", condition.shown)]
    if condition.real_shown is not None:
        rows.insert(0, ("Real, public, held out", condition.real_shown))
    pairs = condition.nearest
    return {
        "condition": condition,
        "distances": [{"row": distance, "drawing": _drawing(distance)} for distance in condition.distances],
        "volumes": [
            (label, _dots(real, synthetic)) for label, (real, synthetic) in condition.volumes.items() if real
        ],
        "pictures": _sheet(quality, f"{condition.condition}", rows, []),
        "nearest": _sheet(
            quality,
            f"{condition.condition}: nearest public scans",
            [
                ("Synthetic, nearest to a public scan", tuple(_column(pairs, "synthetic"))),
                ("That public scan", tuple(_column(pairs, "public"))),
            ],
            [f"distance {pair.distance:.3f}" for pair in pairs],
        )
        if pairs
        else None,
    }


def _column(pairs: Any, name: str) -> list[list[Any]]:
    return [[getattr(pair, name)[part] for pair in pairs] for part in (0, 1)]


def _drawing(distance: SetDistance) -> Markup:
    marks = [] if distance.floor is None else [(distance.floor, "real against real", "limit")]
    end = max(distance.high, distance.value, distance.floor or 0.0)
    start = min(0.0, distance.low, distance.value, distance.floor or 0.0)
    room = 0.06 * (end - start) or 1e-6
    return interval_on_axis(
        estimate=distance.value,
        low=distance.low,
        high=distance.high,
        marks=marks,
        axis=(start if start == 0.0 else start - room, end + room),
        label=f"{distance.name}: {distance.value:.4g}, {distance.low:.4g} to {distance.high:.4g}",
    )


def _dots(real: list[float], synthetic: list[float]) -> Markup:
    rows = [("real", "held-out", real), ("synthetic", "member", synthetic)]
    return dots_on_axis(rows=rows, marks=[], label="one dot for each scan's volume in mm3")


def _sheet(
    quality: ReleaseQuality, title: str, rows: list[tuple[str, Any]], captions: list[str]
) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sheet.png"
        comparison_sheet(
            [(heading, list(images), list(masks)) for heading, (images, masks) in rows],
            path,
            title=title,
            labels=quality.metadata.labels,
            spacing_mm=quality.metadata.spacing_mm,
            subtitle="; ".join(captions),
        )
        data = base64.b64encode(path.read_bytes()).decode()
    return {"title": title, "source": Verbatim(f"data:image/png;base64,{data}")}
