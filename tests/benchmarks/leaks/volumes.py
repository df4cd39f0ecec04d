"""Public scans on the networks' grid, packed into one file that a machine without the data set can take.

    python -m tests.benchmarks.leaks.volumes DATA OUT.npz

DATA holds ``Task04_Hippocampus`` (Medical Segmentation Decathlon) and ``AdrenalMNIST3D`` (MedMNIST v2).
Adrenal glands are binary shapes: the shape serves as image and as mask. MedMNIST names no patients, so there
the unit is the gland, and two glands of one person may stand on both sides of a split within the training
part (its own split into train, validation and test is by patient).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HIPPOCAMPUS_GRID = (32, 48, 32)
ADRENAL_GRID = (32, 32, 32)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedScans:
    """Scans of many units on one grid.

    Attributes:
        image_NDHW: uint8, 255 stands for 1.0.
        mask_NDHW: uint8 labels.
        unit_N: Number of the patient (hippocampus) or gland (adrenal).
        part_N: 0 where a unit may be public or a member, 1 where it may only be a non-member.
        n_labels: Labels without background.
    """

    image_NDHW: NDArray[np.uint8]
    mask_NDHW: NDArray[np.uint8]
    unit_N: NDArray[np.int64]
    part_N: NDArray[np.int64]
    n_labels: int


def read_hippocampus(folder: Path) -> PackedScans:
    """All scans of the task, resampled to 1 mm, two sides of a patient under one number."""
    import pandas as pd  # not on the machine that trains

    from shared.volumes.canonical_grid import CanonicalGrid, to_canonical
    from shared.volumes.nifti import read_volume

    grid = CanonicalGrid(shape=HIPPOCAMPUS_GRID, spacing_mm=(1.0, 1.0, 1.0))
    table = pd.read_csv(folder / "patients.csv")
    scans = [
        to_canonical(read_volume(folder / "imagesTr" / name), read_volume(folder / "labelsTr" / name), grid)
        for name in table["file"]
    ]
    return PackedScans(
        image_NDHW=np.stack([np.round(scan.image_DHW * 255).astype(np.uint8) for scan in scans]),
        mask_NDHW=np.stack([scan.mask_DHW for scan in scans]),
        unit_N=np.unique(table["patient_id"], return_inverse=True)[1].astype(np.int64),
        part_N=np.zeros(len(scans), dtype=np.int64),
        n_labels=2,
    )


def read_adrenal(folder: Path) -> PackedScans:
    """Training, validation and test glands in that order; the last two parts may not be members."""
    with np.load(folder / "adrenalmnist3d.npz") as archive:
        parts = [archive[f"{part}_images"] > 0 for part in ("train", "val", "test")]
    shape = np.concatenate(parts)
    padding = [((0, 0))] + [
        ((side - n) // 2, side - n - (side - n) // 2)
        for side, n in zip(ADRENAL_GRID, shape.shape[1:], strict=True)
    ]
    shape = np.pad(shape, padding)
    return PackedScans(
        image_NDHW=shape.astype(np.uint8) * 255,
        mask_NDHW=shape.astype(np.uint8),
        unit_N=np.arange(len(shape), dtype=np.int64),
        part_N=(np.arange(len(shape)) >= len(parts[0])).astype(np.int64),
        n_labels=1,
    )


def write_packed(path: Path, scans: dict[str, PackedScans]) -> None:
    """One compressed file."""
    arrays = {
        f"{name}/{key}": value
        for name, packed in scans.items()
        for key, value in {**packed.__dict__, "n_labels": np.int64(packed.n_labels)}.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)


def read_packed(path: Path, name: str) -> PackedScans:
    """The inverse for one set."""
    with np.load(path) as archive:
        fields = {key.split("/")[1]: archive[key] for key in archive.files if key.startswith(f"{name}/")}
    return PackedScans(**{**fields, "n_labels": int(fields["n_labels"])})


if __name__ == "__main__":
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    write_packed(
        out,
        {
            "hippocampus": read_hippocampus(data / "Task04_Hippocampus"),
            "adrenal": read_adrenal(data / "AdrenalMNIST3D"),
        },
    )
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")
