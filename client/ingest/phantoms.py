"""Simulated scans as a hospital would hand them over: NIfTI files and a manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from client.ingest.manifest import COLUMNS
from client.ingest.nifti import MANIFEST_NAME
from shared.errors import UsageError
from shared.volumes.nifti import Spacing3, centred_affine, write_volume
from shared.volumes.phantom import MICRO_SPACING_MM, PhantomScan

DESCRIPTION = "Lacuna simulated phantom, not a patient"


def write_phantom_folder(
    scans: Sequence[PhantomScan], folder: Path, *, spacing_mm: Spacing3 = MICRO_SPACING_MM
) -> Path:
    """Write ``images/``, ``masks/`` and ``manifest.csv``; the manifest last, so that it lists what exists.

    Args:
        scans: Simulated scans with distinct scan ids.
        folder: Made if it does not exist; files of the same names are replaced.
        spacing_mm: Voxel size of the simulation.

    Returns:
        Path of the manifest.

    Raises:
        UsageError: no scan, or a scan id twice.
    """
    if not scans or len({scan.scan_id for scan in scans}) != len(scans):
        raise UsageError("a phantom folder is written from one or more scans with distinct ids")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    rows: list[tuple[str, str, str, str]] = []
    for scan in scans:
        d, h, w = scan.image.shape
        affine = centred_affine((d, h, w), spacing_mm)
        image, mask = f"images/{scan.scan_id}.nii.gz", f"masks/{scan.scan_id}.nii.gz"
        write_volume(folder / image, scan.image, affine=affine, description=DESCRIPTION)
        write_volume(folder / mask, scan.mask, affine=affine, description=DESCRIPTION)
        rows.append((scan.patient_id, image, scan.condition, mask))
    manifest = folder / MANIFEST_NAME
    partial = folder / f".{MANIFEST_NAME}.partial"
    pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(partial, index=False)
    partial.replace(manifest)
    return manifest
