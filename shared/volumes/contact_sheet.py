"""Pictures of scans with the contours of their masks, for people to look at.

Each scan is a card: its sagittal, coronal and axial slice through the mask's centre of mass, at one scale,
with the mask's outlines, and the volume of each label underneath. The patient's right is on the right of
the picture, front and head are up. Pictures depend on their input alone; no global state of matplotlib is
read or changed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import patheffects
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from shared.errors import UsageError
from shared.volumes.nifti import Spacing3

ImageVolume = NDArray[np.float32]
MaskVolume = NDArray[np.uint8]

BACKGROUND = "#14171c"
PANEL = "#000000"
TEXT = "#e9ecf1"
FAINT = "#98a1ae"
WARNING = "#ff6b5e"
LABEL_COLOURS = ("#f5a623", "#4fc3f7", "#7ee081", "#f06292", "#b39ddb", "#fff176", "#ff8a65", "#4db6ac")
"""Outlines of mask values 1, 2, ...: told apart on grey also with a colour vision deficiency (1 to 3)."""

DPI = 150
_SLICES_WIDTH_IN = 4.3
_GAP_IN = 0.05
_CARD_GAP_IN = 0.28
_MARGIN_IN = 0.35
_CAPTION_IN = 0.30
_HEADING_IN = 0.42
_MAX_CARDS = 96


@dataclass(frozen=True, kw_only=True)
class _Group:
    heading: str | None
    images: Sequence[ImageVolume]
    masks: Sequence[MaskVolume]
    captions: Sequence[str]


def contact_sheet(
    images: Sequence[ImageVolume],
    masks: Sequence[MaskVolume],
    path: Path,
    *,
    title: str,
    labels: Sequence[str],
    spacing_mm: Spacing3,
    subtitle: str = "",
    captions: Sequence[str] | None = None,
    badge: str = "SYNTHETIC",
    focus: str | None = None,
) -> None:
    """Write a PNG of scans, two or three cards a row.

    Args:
        images: float32 [D, H, W] in [0, 1] each, all of one shape; axes along R, A, S.
        masks: uint8 [D, H, W] each.
        path: PNG file, replaced if it exists.
        title: Headline.
        labels: Names of mask values 1, 2, ...
        spacing_mm: Voxel size along D, H, W.
        subtitle: Smaller line under the headline.
        captions: One short text for each scan.
        badge: Word that stands out beside the headline; empty for none.
        focus: Label whose centre the slices go through; None is the centre of the whole mask.

    Raises:
        UsageError: no scan, too many, shapes that differ, or a focus that is not a label.
    """
    captions = [f"#{index}" for index in range(len(images))] if captions is None else captions
    _draw(
        [_Group(heading=None, images=images, masks=masks, captions=captions)],
        path,
        title=title,
        subtitle=subtitle,
        badge=badge,
        labels=labels,
        spacing_mm=spacing_mm,
        focus=focus,
        per_row=1 if len(images) == 1 else 2 if len(images) <= 8 else 3,
    )


def comparison_sheet(
    rows: Sequence[tuple[str, Sequence[ImageVolume], Sequence[MaskVolume]]],
    path: Path,
    *,
    title: str,
    labels: Sequence[str],
    spacing_mm: Spacing3,
    subtitle: str = "",
    badge: str = "",
    focus: str | None = None,
    per_row: int = 4,
) -> None:
    """Write a PNG that sets groups of scans against one another, each under its heading.

    Args:
        rows: (heading, images, masks) for each group; say in the heading what is real and what is synthetic.
        per_row: Cards in a row, 1 to 6.

    The other arguments and errors are those of :func:`contact_sheet`.
    """
    if not 1 <= per_row <= 6:
        raise UsageError(f"{per_row} cards in a row: choose 1 to 6")
    widest = max((len(images) for _, images, _ in rows), default=1)
    _draw(
        [
            _Group(heading=heading, images=images, masks=masks, captions=[""] * len(images))
            for heading, images, masks in rows
        ],
        path,
        title=title,
        subtitle=subtitle,
        badge=badge,
        labels=labels,
        spacing_mm=spacing_mm,
        focus=focus,
        per_row=max(1, min(per_row, widest)),
    )


def mask_centre(mask_DHW: MaskVolume, value: int | None = None) -> tuple[int, int, int]:
    """Labelled voxel nearest to the centre of mass of one label, or of all where it is None or absent.

    So the slices cut through the label also where it bends around its centre. The grid's centre for an
    empty mask.
    """
    chosen = mask_DHW == value if value is not None else mask_DHW > 0
    if not chosen.any():
        chosen = mask_DHW > 0
    occupied = np.argwhere(chosen)
    centre = occupied.mean(axis=0) if len(occupied) else (np.array(mask_DHW.shape) - 1) / 2
    d, h, w = np.rint(centre).astype(int)
    if len(occupied) and not chosen[d, h, w]:
        d, h, w = occupied[np.square(occupied - centre).sum(axis=1).argmin()]
    return int(d), int(h), int(w)


def _draw(
    groups: Sequence[_Group],
    path: Path,
    *,
    title: str,
    subtitle: str,
    badge: str,
    labels: Sequence[str],
    spacing_mm: Spacing3,
    focus: str | None,
    per_row: int,
) -> None:
    _check(groups)
    if focus is not None and focus not in labels:
        raise UsageError(f"no such label: {focus!r}", remedy=f"choose one of {', '.join(labels)}")
    focus_value = None if focus is None else list(labels).index(focus) + 1
    extents_mm = np.array(groups[0].images[0].shape) * np.asarray(spacing_mm)
    right, front, head = (float(extent) for extent in extents_mm)
    scale = (_SLICES_WIDTH_IN - 2 * _GAP_IN) / (front + 2 * right)
    if per_row > 2:
        scale *= 0.8
    card_width = scale * (front + 2 * right) + 2 * _GAP_IN
    card_height = scale * max(head, front) + _CAPTION_IN
    width = 2 * _MARGIN_IN + per_row * card_width + (per_row - 1) * _CARD_GAP_IN
    width = max(width, 6.2)
    header = 0.95 if subtitle else 0.75
    lines = [math.ceil(len(group.images) / per_row) for group in groups]
    headings = sum(_HEADING_IN for group in groups if group.heading)
    height = header + 0.45 + headings + sum(lines) * (card_height + 0.12)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=BACKGROUND)
    canvas = FigureCanvasAgg(figure)

    def write(x: float, y: float, text: str, **style: Any) -> Any:
        """Text at inches from the left and the top."""
        return figure.text(x / width, 1 - y / height, text, **({"color": TEXT, "va": "baseline"} | style))

    headline = write(_MARGIN_IN, 0.46, title, fontsize=15, fontweight="bold")
    if badge:
        box = headline.get_window_extent(canvas.get_renderer())
        write(
            box.x1 / DPI + 0.2,
            0.45,
            badge,
            fontsize=9,
            fontweight="bold",
            color=BACKGROUND,
            bbox={"boxstyle": "round,pad=0.35", "facecolor": LABEL_COLOURS[0], "edgecolor": "none"},
        )
    if subtitle:
        write(_MARGIN_IN, 0.72, subtitle, fontsize=9, color=FAINT)
    top = header
    for group in groups:
        if group.heading:
            write(_MARGIN_IN, top + 0.26, group.heading, fontsize=11.5, fontweight="bold")
            top += _HEADING_IN
        for position, (image, mask) in enumerate(zip(group.images, group.masks, strict=True)):
            column, line = position % per_row, position // per_row
            x = _MARGIN_IN + column * (card_width + _CARD_GAP_IN)
            y = top + line * (card_height + 0.12)
            _draw_card(figure, image, mask, spacing_mm, x=x, y=y, scale=scale, focus=focus_value)
            _draw_caption(
                write,
                group.captions[position],
                mask,
                labels,
                spacing_mm,
                x=x,
                y=y + scale * max(head, front) + 0.17,
                right=x + card_width,
            )
        top += math.ceil(len(group.images) / per_row) * (card_height + 0.12)
    figure.legend(
        handles=[
            Line2D([], [], color=LABEL_COLOURS[value % len(LABEL_COLOURS)], linewidth=2.2, label=name)
            for value, name in enumerate(labels)
        ],
        loc="lower left",
        bbox_to_anchor=((_MARGIN_IN - 0.08) / width, 0.10 / height),
        ncols=min(len(labels), 6),
        frameon=False,
        fontsize=9,
        labelcolor=TEXT,
        borderaxespad=0,
        handlelength=1.4,
    )
    write(
        width - _MARGIN_IN,
        height - 0.17,
        f"sagittal · coronal · axial through the centre of the {focus or 'mask'}",
        fontsize=8,
        color=FAINT,
        ha="right",
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial.png")
    try:
        canvas.print_png(partial, metadata={"Software": "Lacuna", "Title": f"{badge} {title}".strip()})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw_card(
    figure: Figure,
    image: ImageVolume,
    mask: MaskVolume,
    spacing_mm: Spacing3,
    *,
    x: float,
    y: float,
    scale: float,
    focus: int | None,
) -> None:
    """Three slices side by side on one middle line; x, y (left, top) in inches."""
    figure_width, figure_height = figure.get_size_inches()
    d, h, w = mask_centre(mask, focus)
    step_d, step_h, step_w = spacing_mm
    card_height = scale * max(image.shape[1] * step_h, image.shape[2] * step_w)
    for image_HW, mask_HW, step_x, step_y in (
        (image[d], mask[d], step_h, step_w),
        (image[:, h], mask[:, h], step_d, step_w),
        (image[:, :, w], mask[:, :, w], step_d, step_h),
    ):
        panel_width = scale * image_HW.shape[0] * step_x
        panel_height = scale * image_HW.shape[1] * step_y
        axes = figure.add_axes(
            (
                x / figure_width,
                1 - (y + (card_height + panel_height) / 2) / figure_height,
                panel_width / figure_width,
                panel_height / figure_height,
            ),
            facecolor=PANEL,
        )
        axes.set_axis_off()
        extent = (0.0, image_HW.shape[0] * step_x, 0.0, image_HW.shape[1] * step_y)
        axes.imshow(
            image_HW.T,
            cmap="gray",
            vmin=0.0,
            vmax=1.0,
            origin="lower",
            extent=extent,
            aspect="auto",
            interpolation="bicubic",
        )
        _draw_outlines(axes, mask_HW, step_x, step_y)
        axes.set_xlim(extent[0], extent[1])
        axes.set_ylim(extent[2], extent[3])
        x += panel_width + _GAP_IN


def _draw_outlines(axes: Any, mask_HW: NDArray[np.uint8], step_x: float, step_y: float) -> None:
    padded = np.pad(mask_HW, 1)
    xs = (np.arange(padded.shape[0]) - 0.5) * step_x
    ys = (np.arange(padded.shape[1]) - 0.5) * step_y
    for value in sorted(set(np.unique(mask_HW).tolist()) - {0}):
        outline = axes.contour(
            xs,
            ys,
            (padded == value).T.astype(np.float32),
            levels=[0.5],
            colors=[LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS)]],
            linewidths=1.3,
        )
        outline.set_path_effects(
            [patheffects.Stroke(linewidth=2.4, foreground="black", alpha=0.55), patheffects.Normal()]
        )


def _draw_caption(
    write: Any,
    caption: str,
    mask: MaskVolume,
    labels: Sequence[str],
    spacing_mm: Spacing3,
    *,
    x: float,
    y: float,
    right: float,
) -> None:
    """The caption at the left, volumes of the labels in their colours at the right."""
    write(x, y, caption, fontsize=8.5, color=TEXT)
    if not (mask > 0).any():
        write(right, y, "empty mask", fontsize=8.5, color=WARNING, ha="right", fontweight="bold")
        return
    voxel_cm3 = math.prod(spacing_mm) / 1000.0
    for value in range(len(labels), 0, -1):
        volume = float((mask == value).sum()) * voxel_cm3
        text = f"{volume:.3g} cm³" if volume else "absent"
        colour = LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS)]
        write(right, y, text, fontsize=8, color=colour, ha="right")
        right -= 0.085 * len(text) * 0.8 + 0.12


def _check(groups: Sequence[_Group]) -> None:
    images = [image for group in groups for image in group.images]
    masks = [mask for group in groups for mask in group.masks]
    if not 1 <= len(images) <= _MAX_CARDS or len(images) != len(masks):
        raise UsageError(f"a picture shows 1 to {_MAX_CARDS} scans with a mask each, not {len(images)}")
    shapes = {array.shape for array in images} | {array.shape for array in masks}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise UsageError(f"a picture's scans have one 3D shape, not {sorted(shapes)}")
    if any(len(group.captions) != len(group.images) for group in groups):
        raise UsageError("a picture has one caption for each scan")
