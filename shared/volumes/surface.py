"""The masks of scans as surfaces in space: marching cubes (Lewiner et al. 2003), drawn by matplotlib.

The inner labels are opaque, everything around them is glass. View from the patient's front, left and above.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from mpl_toolkits.mplot3d.art3d import Poly3DCollection
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import marching_cubes

from shared.errors import UsageError
from shared.volumes.contact_sheet import BACKGROUND, DPI, FAINT, LABEL_COLOURS, TEXT, WARNING
from shared.volumes.nifti import Spacing3

MaskVolume = NDArray[np.uint8]

GLASS = 0.16
_PANEL_IN = 2.6
_ELEVATION, _AZIMUTH = 22.0, 125.0
_MAX_FACES = 20_000


def _towards(elevation: float, azimuth: float) -> NDArray[np.float64]:
    up, around = math.radians(elevation), math.radians(azimuth)
    return np.array([math.cos(up) * math.cos(around), math.cos(up) * math.sin(around), math.sin(up)])


_LIGHT = _towards(_ELEVATION + 25.0, _AZIMUTH + 30.0)
"""From beside the viewer."""


def label_surface(
    mask_DHW: MaskVolume, value: int, spacing_mm: Spacing3
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Vertices [V, 3] in mm along R, A, S, and triangles [F, 3], of one label's surface; empty if absent.

    The indicator is smoothed by half a voxel, so that the surface is not made of steps. Labels of a single
    voxel keep a surface.
    """
    inside = np.pad((mask_DHW == value).astype(np.float32), 2)
    if not inside.any():
        return np.zeros((0, 3)), np.zeros((0, 3), dtype=np.int64)
    smooth = ndimage.gaussian_filter(inside, 0.5)
    stride = 1
    while (smooth.max() > 0.5 or stride == 1) and inside.sum() ** (2 / 3) * 12 / stride**2 > _MAX_FACES:
        stride += 1
    vertices, triangles, _, _ = marching_cubes(  # type: ignore[no-untyped-call]
        smooth, level=min(0.5, 0.5 * float(smooth.max())), spacing=spacing_mm, step_size=stride
    )
    return vertices - 2 * np.asarray(spacing_mm), triangles.astype(np.int64)


def surface_sheet(
    masks: Sequence[MaskVolume],
    path: Path,
    *,
    title: str,
    labels: Sequence[str],
    spacing_mm: Spacing3,
    subtitle: str = "",
    captions: Sequence[str] | None = None,
    badge: str = "SYNTHETIC",
) -> None:
    """Write a PNG with one 3D view for each mask.

    Args:
        masks: uint8 [D, H, W] each, of one shape; axes along R, A, S.
        path: PNG file, replaced if it exists.

    Raises:
        UsageError: no mask, or shapes that differ.
    """
    shapes = {mask.shape for mask in masks}
    if len(shapes) != 1 or len(next(iter(shapes))) != 3:
        raise UsageError(f"a picture's masks have one 3D shape, not {sorted(shapes)}")
    captions = [f"#{index}" for index in range(len(masks))] if captions is None else captions
    per_row = min(4, len(masks))
    lines = math.ceil(len(masks) / per_row)
    width, height = max(6.2, 0.7 + per_row * _PANEL_IN), 1.35 + lines * (_PANEL_IN + 0.25)
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor=BACKGROUND)
    canvas = FigureCanvasAgg(figure)
    headline = f"{title}   {badge}".rstrip()
    figure.text(0.35 / width, 1 - 0.46 / height, headline, color=TEXT, fontsize=15, fontweight="bold")
    figure.text(0.35 / width, 1 - 0.72 / height, subtitle, color=FAINT, fontsize=9)
    extent = np.asarray(masks[0].shape) * np.asarray(spacing_mm)
    for position, (mask, caption) in enumerate(zip(masks, captions, strict=True)):
        column, line = position % per_row, position // per_row
        left, top = 0.35 + column * _PANEL_IN, 0.95 + line * (_PANEL_IN + 0.25)
        place = (
            left / width,
            1 - (top + _PANEL_IN) / height,
            _PANEL_IN / width,
            _PANEL_IN / height,
        )
        axes: Any = figure.add_axes(place, projection="3d", facecolor=BACKGROUND)
        _draw_mask(axes, mask, len(labels), spacing_mm)
        axes.set(xlim=(0, extent[0]), ylim=(0, extent[1]), zlim=(0, extent[2]))
        axes.set_box_aspect(tuple(extent), zoom=1.45)  # it would scale an array in place
        axes.view_init(elev=_ELEVATION, azim=_AZIMUTH)
        axes.set_axis_off()
        empty = not mask.any()
        figure.text(
            (left + 0.1) / width,
            1 - (top + _PANEL_IN + 0.1) / height,
            f"{caption} empty mask" if empty else caption,
            color=WARNING if empty else TEXT,
            fontsize=8.5,
        )
    for value, name in enumerate(labels):
        figure.text(
            (0.35 + 1.2 * value) / width,
            0.12 / height,
            name,
            color=LABEL_COLOURS[value % len(LABEL_COLOURS)],
            fontsize=9,
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial.png")
    try:
        canvas.print_png(partial, metadata={"Software": "Lacuna", "Title": headline})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _draw_mask(axes: Any, mask_DHW: MaskVolume, n_labels: int, spacing_mm: Spacing3) -> None:
    """All surfaces in one collection: matplotlib sorts triangles by depth within a collection alone."""
    values = [value for value in range(1, n_labels + 1) if (mask_DHW == value).any()]
    smallest = min(values, key=lambda value: int((mask_DHW == value).sum()), default=0)
    corners: list[NDArray[np.float64]] = []
    colours: list[NDArray[np.float64]] = []
    for value in values:
        vertices, triangles = label_surface(mask_DHW, value, spacing_mm)
        faces = vertices[triangles]
        normal = np.cross(faces[:, 2] - faces[:, 0], faces[:, 1] - faces[:, 0])
        normal /= np.linalg.norm(normal, axis=1, keepdims=True) + 1e-12
        shade = 0.62 + 0.38 * (normal @ _LIGHT)
        base = np.asarray(to_rgb(LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS)]))
        enclosing = value != smallest and _encloses(mask_DHW, value, smallest)
        alpha = np.full((len(faces), 1), GLASS if enclosing else 1.0)
        corners.append(faces)
        colours.append(np.hstack([np.clip(shade[:, None] * base, 0, 1), alpha]))
    if corners:
        axes.add_collection3d(
            Poly3DCollection(
                np.concatenate(corners), facecolors=np.concatenate(colours), linewidths=0, antialiaseds=False
            )
        )


def _encloses(mask_DHW: MaskVolume, outer: int, inner: int) -> bool:
    """Whether most of a label lies in the hull box of another."""
    where = np.argwhere(mask_DHW == outer)
    low, high = where.min(axis=0), where.max(axis=0)
    points = np.argwhere(mask_DHW == inner)
    return bool(((points >= low) & (points <= high)).all(axis=1).mean() > 0.5)
