"""Small pictures of scans for the import's report: three planes, with the outline of the mask."""

from __future__ import annotations

import base64
import io

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from shared.volumes.contact_sheet import LABEL_COLOURS, mask_centre
from shared.volumes.intensity import normalise_intensity
from shared.volumes.nifti import Volume

PANEL_PX = 152
"""Longest side of a plane."""

MAX_PICTURES = 600
"""More would make a page that no browser likes; the report says how many are left out."""

Plane = NDArray[np.uint8]


class Gallery:
    """Pictures by the name of the scan. :meth:`show` is what an import calls."""

    def __init__(self) -> None:
        self.pictures: dict[str, str] = {}
        self.left_out = 0

    def show(self, name: str, image: Volume, mask: Volume | None) -> None:
        """Draw a scan; the last picture of a name stays."""
        if name not in self.pictures and len(self.pictures) >= MAX_PICTURES:
            self.left_out += 1
            return
        self.pictures[name] = data_address(three_planes(image, mask))


def three_planes(image: Volume, mask: Volume | None) -> Plane:
    """[height, width, 3]: sagittal, coronal and axial plane through the mask's centre (or the middle).

    The patient's right is on the right, front and head are up, and a millimetre is as long in every plane.
    Voxels that are not finite are black.
    """
    orientation = nib.orientations.io_orientation(image.affine)
    voxels_RAS = np.nan_to_num(_turned(image.voxels_DHW, orientation).astype(np.float32), posinf=0, neginf=0)
    grey_RAS = normalise_intensity(voxels_RAS)
    labels_RAS = np.zeros(grey_RAS.shape, dtype=np.uint8)
    if mask is not None:
        labels_RAS = _turned(mask.voxels_DHW, orientation).astype(np.uint8)
    axes = np.argsort(orientation[:, 0])
    steps = [image.spacing_mm[axis] for axis in axes]
    extent_mm = max(side * step for side, step in zip(grey_RAS.shape, steps, strict=True))
    centre = mask_centre(labels_RAS)
    panels = []
    for axis in range(3):
        across, up = (other for other in range(3) if other != axis)
        size = tuple(
            max(1, round(PANEL_PX * grey_RAS.shape[one] * steps[one] / extent_mm)) for one in (across, up)
        )
        grey = np.take(grey_RAS, centre[axis], axis=axis)
        labels = np.take(labels_RAS, centre[axis], axis=axis)
        panels.append(_panel(grey, labels, (size[0], size[1])))
    height = max(panel.shape[0] for panel in panels)
    return np.concatenate([_centred(panel, height) for panel in panels], axis=1)


def data_address(picture: Plane) -> str:
    """A picture as an address that holds it (PNG)."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=3)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _turned(voxels: NDArray[np.generic], orientation: NDArray[np.float64]) -> NDArray[np.generic]:
    turned: NDArray[np.generic] = nib.orientations.apply_orientation(voxels, orientation)
    return turned


def _panel(grey_XY: NDArray[np.float32], labels_XY: NDArray[np.uint8], size: tuple[int, int]) -> Plane:
    """One plane at its size in pixels (width, height), outlines two pixels wide."""
    pixels = np.rint(grey_XY.T[::-1] * 255).astype(np.uint8)
    grey = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    labels = np.asarray(
        Image.fromarray(np.ascontiguousarray(labels_XY.T[::-1])).resize(size, Image.Resampling.NEAREST)
    )
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    for value in np.unique(labels[labels > 0]).tolist():
        inside = labels == value
        outline = inside & ~ndimage.binary_erosion(inside, iterations=2)
        colour = LABEL_COLOURS[(value - 1) % len(LABEL_COLOURS)]
        picture[outline] = [int(colour[start : start + 2], 16) for start in (1, 3, 5)]
    return picture


def _centred(panel: Plane, height: int) -> Plane:
    above = (height - panel.shape[0]) // 2
    return np.pad(panel, ((above, height - panel.shape[0] - above), (1, 1), (0, 0)))
