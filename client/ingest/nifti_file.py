"""One NIfTI file as the image or the mask of a scan."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from client.ingest.scan import LoadedVolume, ProblemKind, SingleFile, UnusableScanError
from shared.checkpoint import file_sha256
from shared.volumes.nifti import Volume, VolumeFileError, read_volume

REORDERED = "the mask's axes were brought into the image's order"
_WHOLE = 1e-3
"""How far from whole voxels an axis permutation may be, in voxels."""


@dataclass(frozen=True, kw_only=True)
class NiftiFile(SingleFile):
    """A volume in a NIfTI file.

    Attributes:
        sha256: Checksum of the file (hexadecimal), where the source lists one.
    """

    sha256: str | None = None

    def read(self, like: Volume | None = None) -> LoadedVolume:
        """Read the file; a mask whose axes only run in another order or direction is turned to ``like``.

        Raises:
            UnusableScanError: the file is missing, is not the one that was listed, or cannot be read.
        """
        if self.missing is not None:
            raise UnusableScanError(ProblemKind.MISSING_FILE, self.path.name)
        if self.sha256 is not None and file_sha256(self.path) != self.sha256:
            raise UnusableScanError(ProblemKind.CHANGED_FILE, self.path.name)
        try:
            volume = read_volume(self.path)
        except VolumeFileError as error:
            raise UnusableScanError(ProblemKind.UNREADABLE_FILE, error.message) from error
        turned = None if like is None else turned_to(volume, like)
        if turned is None:
            return LoadedVolume(volume=volume)
        return LoadedVolume(volume=turned, repairs=(REORDERED,))


def turned_to(mask: Volume, image: Volume) -> Volume | None:
    """A mask on the image's grid whose axes run in another order or direction, turned; None if it is not.

    Tools write the voxels of one grid in different orders: dcm2niix and 3D Slicer do not agree with a DICOM
    series. Turning moves voxels and changes none.
    """
    between = np.linalg.inv(image.affine) @ mask.affine
    axes = between[:3, :3]
    if np.abs(axes - np.eye(3)).max() < _WHOLE or np.abs(axes - np.rint(axes)).max() > _WHOLE:
        return None
    if sorted(np.abs(np.rint(axes)).sum(axis=0).tolist()) != [1, 1, 1]:
        return None
    orientation = nib.orientations.io_orientation(between)
    voxels = np.ascontiguousarray(nib.orientations.apply_orientation(mask.voxels_DHW, orientation))
    affine = mask.affine @ nib.orientations.inv_ornt_aff(orientation, mask.shape)
    return Volume(voxels_DHW=voxels, affine=affine)
