"""Real scans of the hippocampus on the grid of preset ``tiny``. (No tests of its own.)"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from client.ingest.decathlon import DecathlonFolder
from shared.model.presets import preset_named
from shared.volumes.canonical_grid import CanonicalGrid, to_canonical

Scan = tuple[NDArray[np.float32], NDArray[np.uint8]]
DATA = Path(os.environ.get("LACUNA_DATA", "../shared/data")) / "Task04_Hippocampus"
LABELS = ("anterior", "posterior")


def hippocampus_scans(*parts: slice) -> list[list[Scan]]:
    """Scans of each slice of the patients, in the order of their names. Skips where there are none."""
    if not DATA.exists():
        pytest.skip(f"no hippocampus data in {DATA} (set LACUNA_DATA)")
    preset = preset_named("tiny")
    grid = CanonicalGrid(shape=preset.grid_shape, spacing_mm=preset.spacing_mm)
    folder = DecathlonFolder(
        path=DATA, patients_csv=DATA / "patients.csv", patient_ids=None, volume_cut_mm3=2500.0
    )
    entries = folder.listing(("small", "normal")).entries
    patients = sorted({entry.patient_id for entry in entries})
    groups: list[list[Scan]] = []
    for part in parts:
        chosen, scans = set(patients[part]), []
        for entry in entries:
            if entry.patient_id in chosen:
                image = entry.image.read().volume
                scan = to_canonical(image, entry.mask.read(image).volume, grid)
                scans.append((scan.image_DHW, scan.mask_DHW))
        groups.append(scans)
    return groups
