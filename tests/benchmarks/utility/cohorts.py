"""The two sets of real scans of the benchmark, split by role: public, members of three hospitals, test.

Hippocampus MR (Medical Segmentation Decathlon, task 4): the unit is the patient; nobody has two roles.
Adrenal gland shapes (AdrenalMNIST3D, MedMNIST v2): the files carry no patient ids, so the unit is the gland.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from client.ingest.decathlon import (
    VOLUME_CONDITIONS,
    DecathlonFolder,
    patient_ids,
    public_mask_paths,
    split_patients,
    volume_condition_cut,
)
from client.ingest.nifti import NiftiFolder
from client.ingest.phantoms import write_phantom_folder
from client.ingest.scan import ScanSource
from deploy.public_networks import PublicSource, read_public
from server.pretrain import PublicVolume
from shared.model.presets import Shape3, preset_named
from shared.volumes.canonical_grid import CanonicalGrid
from shared.volumes.phantom import PhantomScan

HOSPITAL_SHARES = (0.56, 0.31, 0.13)
"""One large, one middling, one small hospital."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """Scans by role, on the canonical grid, and what a plan says of them.

    Attributes:
        task: ``segmentation`` (mean Dice over labels) or ``classification`` (AUC of the rare condition).
        public: For autoencoder and prior; never members.
        hospitals: Members of each hospital.
        test: Never seen by any network but in evaluation.
        source: What hospital i imports.
    """

    name: str
    task: str
    preset: str
    conditions: tuple[str, ...]
    rare: str
    labels: tuple[str, ...]
    grid_shape: Shape3
    spacing_mm: tuple[float, float, float]
    public: list[PublicVolume]
    hospitals: list[list[PublicVolume]]
    test: list[PublicVolume]
    source: Callable[[int, Path], ScanSource]

    @property
    def members(self) -> list[PublicVolume]:
        return [volume for hospital in self.hospitals for volume in hospital]

    @property
    def n_members(self) -> int:
        """Patients (glands) of all hospitals."""
        return len({volume.patient_id for volume in self.members})


def cohort_named(name: str, data: Path, *, coarse: bool = False) -> Cohort:
    """``hippocampus`` or ``adrenal``; ``coarse``: half as many voxels along each axis."""
    return {"hippocampus": _hippocampus, "adrenal": _adrenal}[name](data, 2 if coarse else 1)


def deal(patients: list[str], shares: tuple[float, ...] = HOSPITAL_SHARES) -> list[list[str]]:
    """Consecutive pieces of a list by share, the last one takes the rest."""
    bounds = [round(sum(shares[:i]) * len(patients)) for i in range(len(shares))] + [len(patients)]
    return [patients[a:b] for a, b in itertools.pairwise(bounds)]


def _hippocampus(data: Path, edge: int) -> Cohort:
    task = data / "Task04_Hippocampus"
    table = task / "patients.csv"
    public, (rest,) = split_patients(patient_ids(table), public=30, sites=1, seed=1)
    test, (members,) = split_patients(rest, public=20, sites=1, seed=2)
    dealt = deal(split_patients(members, public=0, sites=1, seed=3)[1][0])
    cut = volume_condition_cut(public_mask_paths(task, table, public))
    preset = preset_named("tiny")
    d, h, w = preset.grid_shape
    z, y, x = preset.spacing_mm
    grid = CanonicalGrid(shape=(d // edge, h // edge, w // edge), spacing_mm=(z * edge, y * edge, x * edge))
    labels = ("anterior", "posterior")

    def volumes(patients: list[str]) -> list[PublicVolume]:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as listing:
            listing.write("\n".join(patients))
            listing.flush()
            source = PublicSource(
                nifti=None, decathlon=task, patients=table, only=Path(listing.name), volume_cut_mm3=cut
            )
            return read_public(source, grid, conditions=VOLUME_CONDITIONS, labels=labels)

    return Cohort(
        name="hippocampus", task="segmentation", preset="tiny", conditions=VOLUME_CONDITIONS,
        rare=VOLUME_CONDITIONS[0], labels=labels, grid_shape=grid.shape,
        spacing_mm=grid.spacing_mm, public=volumes(public),
        hospitals=[volumes(patients) for patients in dealt], test=volumes(test),
        source=lambda site, _: DecathlonFolder(
            path=task, patients_csv=table, patient_ids=frozenset(dealt[site]), volume_cut_mm3=cut
        ),
    )  # fmt: skip


def _adrenal(data: Path, edge: int, *, public: int = 240, members: int = 300) -> Cohort:
    with np.load(data / "AdrenalMNIST3D" / "adrenalmnist3d.npz") as file:
        parts = {name: file[name] for name in file.files}
    train = _glands(parts, "train", edge)
    order = np.random.Generator(np.random.Philox(11)).permutation(len(train))
    normal = [train[i] for i in order if train[i].condition == "normal"][:public]
    taken = {volume.patient_id for volume in normal}
    chosen = [train[i] for i in order if train[i].patient_id not in taken][:members]
    by_id = {volume.patient_id: volume for volume in chosen}
    dealt = deal(list(by_id))
    hospitals = [[by_id[gland] for gland in glands] for glands in dealt]
    side, spacing = 32 // edge, (float(edge), float(edge), float(edge))

    def source(site: int, folder: Path) -> ScanSource:
        scans = [
            PhantomScan(
                patient_id=volume.patient_id, scan_id=volume.patient_id, condition=volume.condition,
                image=volume.image, mask=volume.mask,
            )
            for volume in hospitals[site]
        ]  # fmt: skip
        write_phantom_folder(scans, folder, spacing_mm=spacing)
        return NiftiFolder(path=folder)

    return Cohort(
        name="adrenal", task="classification", preset="micro", conditions=("normal", "hyperplasia"),
        rare="hyperplasia", labels=("gland",), grid_shape=(side, side, side), spacing_mm=spacing,
        public=normal,
        hospitals=hospitals, test=_glands(parts, "test", edge),
        source=source,
    )  # fmt: skip


def _glands(parts: dict[str, np.ndarray], split: str, edge: int) -> list[PublicVolume]:
    """28^3 shapes in the middle of 32^3; image and mask are the same shape.

    On a coarser grid the image is the share of each voxel that is gland, and the mask at least half of it.
    """
    volumes = []
    rows = zip(parts[f"{split}_images"], parts[f"{split}_labels"].ravel(), strict=True)
    for row, (image, label) in enumerate(rows):
        shape = np.pad((image > 127).astype(np.float32), 2)
        n = shape.shape[0] // edge
        share = shape.reshape(n, edge, n, edge, n, edge).mean(axis=(1, 3, 5))
        volumes.append(
            PublicVolume(
                patient_id=f"{split}-{row:04d}", condition="hyperplasia" if label else "normal",
                image=share, mask=(share >= 0.5).astype(np.uint8),
            )
        )  # fmt: skip
    return volumes
