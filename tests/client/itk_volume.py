"""What SimpleITK makes of DICOM files, as a volume of ours. (No tests of its own.)"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from client.ingest.nifti_file import turned_to
from shared.volumes.nifti import Volume


def itk_volume(paths: Sequence[Path]) -> Volume:
    """A series in the order that GDCM finds, or one multi-frame file; in RAS+, as ``Volume`` wants it."""
    if len(paths) == 1:
        image = SimpleITK.ReadImage(str(paths[0]))
    else:
        reader = SimpleITK.ImageSeriesReader()
        uid = SimpleITK.ImageSeriesReader.GetGDCMSeriesIDs(str(paths[0].parent))
        assert len(uid) == 1, "the folder has one series"
        reader.SetFileNames(SimpleITK.ImageSeriesReader.GetGDCMSeriesFileNames(str(paths[0].parent), uid[0]))
        image = reader.Execute()
    affine = np.eye(4)
    directions = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, :3] = directions[:, ::-1]  # voxels come as [slice, row, column]
    affine[:3, 3] = image.GetOrigin()
    return Volume(voxels_DHW=SimpleITK.GetArrayFromImage(image), affine=np.diag([-1.0, -1, 1, 1]) @ affine)


def assert_same_scan(ours: Volume, theirs: Volume) -> None:
    """Equal voxel for voxel and in geometry, whichever way the axes of the other run."""
    turned = turned_to(theirs, ours) or theirs
    assert turned.shape == ours.shape
    np.testing.assert_array_equal(turned.voxels_DHW.astype(np.float32), ours.voxels_DHW)
    np.testing.assert_allclose(turned.affine, ours.affine, atol=1e-4)
