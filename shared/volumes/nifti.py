"""NIfTI files, in and out: bounded, checked, and honest about geometry.

Reading goes through nibabel. Whatever is wrong with a file becomes a :class:`VolumeFileError` that names
the file, so that an import can refuse one scan and go on with the next.
"""

from __future__ import annotations

import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from shared.errors import SiteError

Affine = NDArray[np.float64]
Shape3 = tuple[int, int, int]
Spacing3 = tuple[float, float, float]

MAX_VOXELS = 1 << 30
"""Upper bound in voxels for one volume (1024^3); checked in the header, before the data are read."""

NIFTI_SUFFIXES = (".nii", ".nii.gz")


class VolumeFileError(SiteError):
    """A file is not a readable 3D volume with a known geometry. The message names the file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Volume:
    """A 3D array with its geometry.

    Attributes:
        voxels_DHW: The array as stored (scaled by the header's slope and intercept), axes as in the file.
        affine: [4, 4], voxel indices to RAS+ world coordinates in millimetres.
    """

    voxels_DHW: NDArray[Any]
    affine: Affine

    @property
    def shape(self) -> Shape3:
        d, h, w = self.voxels_DHW.shape
        return (d, h, w)

    @property
    def spacing_mm(self) -> Spacing3:
        """Distance between neighbouring voxel centres along each array axis."""
        d, h, w = np.linalg.norm(self.affine[:3, :3], axis=0)
        return (float(d), float(h), float(w))

    @property
    def voxel_volume_mm3(self) -> float:
        return math.prod(self.spacing_mm)


def read_volume(path: Path) -> Volume:
    """Read one 3D NIfTI volume whole. A fourth axis of length one is dropped.

    Raises:
        VolumeFileError: the file is missing, truncated or not NIfTI; it is not 3D; it has more than
            :data:`MAX_VOXELS` voxels; its affine is singular or not finite; or it has neither qform nor
            sform, so that left and right are unknown.
    """
    if not path.name.endswith(NIFTI_SUFFIXES):
        raise VolumeFileError(f"{path.name}: not a NIfTI file (.nii or .nii.gz)")
    if not path.is_file():
        raise VolumeFileError(f"{path.name}: the file does not exist")
    try:
        image = nib.load(path)
        shape = tuple(int(side) for side in image.shape)
        if len(shape) == 4 and shape[3] == 1:
            shape = shape[:3]
        if len(shape) != 3 or min(shape) < 1:
            raise VolumeFileError(f"{path.name}: shape {tuple(image.shape)} is not a 3D volume")
        if math.prod(shape) > MAX_VOXELS:
            raise VolumeFileError(f"{path.name}: shape {shape} exceeds the bound of {MAX_VOXELS} voxels")
        affine = np.asarray(image.affine, dtype=np.float64)
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise VolumeFileError(f"{path.name}: its affine is singular or not finite")
        if int(image.header["sform_code"]) == 0 and int(image.header["qform_code"]) == 0:
            raise VolumeFileError(
                f"{path.name}: neither qform nor sform is set, so left and right are unknown",
                remedy="write the file again with its orientation",
            )
        voxels = np.asarray(image.dataobj).reshape(shape)
    except VolumeFileError:
        raise
    except (
        OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, ImageFileError, HeaderDataError,
    ) as error:  # fmt: skip
        reason = str(error).replace(str(path), path.name).splitlines()
        raise VolumeFileError(
            f"{path.name}: cannot be read as NIfTI ({type(error).__name__}: {reason[0] if reason else ''})"
        ) from error
    return Volume(voxels_DHW=voxels, affine=affine)


def centred_affine(shape: Shape3, spacing_mm: Spacing3) -> Affine:
    """RAS+ affine of an axis-aligned grid whose centre is the origin of the world."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * step for n, step in zip(shape, spacing_mm, strict=True)]
    return affine


def write_volume(path: Path, voxels_DHW: NDArray[Any], *, affine: Affine, description: str = "") -> None:
    """Write float32 or uint8 voxels atomically; the same input gives the same bytes.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder exists.
        voxels_DHW: Floating point (written as float32), or uint8.
        affine: [4, 4], written as sform and qform ("scanner" codes), units millimetre.
        description: At most 79 ASCII characters, for the header's ``descrip``.

    Raises:
        VolumeFileError: another suffix, dtype or number of axes, or a description that does not fit.
    """
    if not path.name.endswith(NIFTI_SUFFIXES) or voxels_DHW.ndim != 3:
        raise VolumeFileError(f"{path.name}: a volume is written from 3 axes to .nii or .nii.gz")
    if not description.isascii() or len(description) > 79:
        raise VolumeFileError(f"{path.name}: the header's description has at most 79 ASCII characters")
    if np.issubdtype(voxels_DHW.dtype, np.floating):
        dtype: type[np.generic] = np.float32
    elif voxels_DHW.dtype == np.uint8:
        dtype = np.uint8
    else:
        raise VolumeFileError(f"{path.name}: voxels of dtype {voxels_DHW.dtype} are not written")
    image = nib.Nifti1Image(voxels_DHW.astype(dtype, copy=False), affine, dtype=dtype)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode("ascii")
    suffix = ".nii.gz" if path.name.endswith(".nii.gz") else ".nii"
    partial = path.with_name(f".{path.name.removesuffix(suffix)}.{os.getpid()}.partial{suffix}")
    try:
        nib.save(image, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
