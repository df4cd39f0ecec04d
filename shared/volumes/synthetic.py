"""Synthetic scans on disk: image, mask and a sidecar that says what they are and where they come from.

A pair is complete when its sidecar is there, and the sidecar is written last. Nothing is ever overwritten: a
file that exists must have the very bytes that would be written, so that an interrupted run can go on and a
different run cannot destroy the first one's results.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shared.canonical import digest, parse_json
from shared.checkpoint import file_sha256
from shared.errors import MalformedMessageError, UsageError
from shared.volumes.nifti import Spacing3, centred_affine, read_volume, write_volume

DESCRIPTION = "SYNTHETIC (Lacuna generator), not a patient"
MAX_SIDECAR_BYTES = 64 * 1024


class OutputConflictError(UsageError):
    """The output folder holds a file of the same name with other content."""


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """Samples on the way from one seed's first sample to another's.

    Attributes:
        to_seed: Where the way ends; it begins at the run's seed.
        steps: Number of samples, both ends included, at least 2.
    """

    to_seed: int
    steps: int

    def position(self, index: int) -> float:
        """0 for the first sample, 1 for the last."""
        return index / (self.steps - 1)


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Everything that decides what a run's samples look like.

    Attributes:
        bundle_sha256: SHA-256 of the signed release statement: what the release log calls the bundle.
        bundle_files_sha256: :func:`files_sha256` of the bundle as it was used: tells a changed file.
        study_id: Study that the release comes from.
        condition: Name of the condition.
        covariates: (name, value) of the covariates that were given, ordered by name.
        seed: Public seed; sample i depends on (seed, i).
        sampler: Name of the sampling method.
        steps: Sampling steps.
        guidance_scale: Classifier-free guidance; 1 is none.
        labels: Names of mask values 1, 2, ...
        plausibility_sha256: SHA-256 of the ranges that samples were checked against; None: not checked.
        interpolation: Where samples are steps between two seeds' first samples.
    """

    bundle_sha256: str
    bundle_files_sha256: str
    study_id: str
    condition: str
    seed: int
    sampler: str
    steps: int
    guidance_scale: float
    labels: tuple[str, ...]
    covariates: tuple[tuple[str, str], ...] = ()
    plausibility_sha256: str | None = None
    interpolation: Interpolation | None = None

    @property
    def run_stem(self) -> str:
        """Beginning of the names of all files of the run."""
        to = "" if self.interpolation is None else f"to{self.interpolation.to_seed}"
        return f"{self.condition}_seed{self.seed}{to}"

    def stem(self, index: int) -> str:
        """Beginning of the names of sample ``index``'s files."""
        return f"{self.run_stem}_{index:05d}"

    def step_to(self, index: int) -> dict[str, Any]:
        """Where sample ``index`` lies between the two seeds, for its sidecar."""
        assert self.interpolation is not None
        return {"to_seed": self.interpolation.to_seed, "position": self.interpolation.position(index)}


@dataclass(frozen=True, kw_only=True)
class SyntheticPair:
    """Files of one synthetic scan; ``image`` and ``mask`` are what the format makes of them."""

    image: Path
    mask: Path
    sidecar: Path


class SampleFormat(Protocol):
    """How image and mask become files. Axes of the arrays run along R, A, S."""

    @property
    def name(self) -> str:
        """Name in sidecars."""
        ...

    def pair(self, folder: Path, stem: str) -> SyntheticPair:
        """Where a sample's files lie."""
        ...

    def write(
        self,
        folder: Path,
        provenance: Provenance,
        index: int,
        *,
        image_DHW: NDArray[np.float32],
        mask_DHW: NDArray[np.uint8],
    ) -> list[Path]:
        """Write image and mask by :func:`place`; returns all files. Raises OutputConflictError."""
        ...

    def read(self, pair: SyntheticPair) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Image_DHW and mask_DHW of a written sample. Raises VolumeFileError."""
        ...


@dataclass(frozen=True, kw_only=True)
class NiftiPairs:
    """Image (float32) and mask (uint8) as NIfTI; the grid's centre is the world's origin."""

    spacing_mm: Spacing3
    name: str = "nifti"

    def pair(self, folder: Path, stem: str) -> SyntheticPair:
        return SyntheticPair(
            image=folder / f"{stem}_image.nii.gz",
            mask=folder / f"{stem}_mask.nii.gz",
            sidecar=folder / f"{stem}.json",
        )

    def write(
        self,
        folder: Path,
        provenance: Provenance,
        index: int,
        *,
        image_DHW: NDArray[np.float32],
        mask_DHW: NDArray[np.uint8],
    ) -> list[Path]:
        pair = self.pair(folder, provenance.stem(index))
        d, h, w = image_DHW.shape
        affine = centred_affine((d, h, w), self.spacing_mm)
        for path, voxels in ((pair.image, image_DHW), (pair.mask, mask_DHW)):

            def write(partial: Path, voxels: NDArray[Any] = voxels) -> None:
                write_volume(partial, voxels, affine=affine, description=DESCRIPTION)

            place(path, write)
        return [pair.image, pair.mask]

    def read(self, pair: SyntheticPair) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        image, mask = read_volume(pair.image), read_volume(pair.mask)
        return image.voxels_DHW.astype(np.float32), mask.voxels_DHW.astype(np.uint8)


def is_complete(how: SampleFormat, folder: Path, provenance: Provenance, index: int) -> bool:
    """Whether a sample is there already, whole, and from the same run.

    Raises:
        OutputConflictError: the sidecar is from another bundle or other settings, or one of the files is
            not the one that the sidecar describes.
    """
    stem = provenance.stem(index)
    path = how.pair(folder, stem).sidecar
    if not path.exists():
        return False
    try:
        sidecar = parse_json(path.read_bytes(), what=str(path), max_bytes=MAX_SIDECAR_BYTES)
        names = sidecar.get("files_sha256") if isinstance(sidecar, dict) else None
        listed = [name for name in names or () if name.startswith(stem) and ".." not in name]
        found = {name: file_sha256(folder / name) for name in listed}
    except MalformedMessageError as error:
        raise OutputConflictError(str(error), remedy="choose an empty output folder") from error
    expected = _sidecar(how, provenance, index, files=found)
    if sidecar != expected:
        differ = (
            sorted(key for key in expected if sidecar.get(key) != expected[key])
            if isinstance(sidecar, dict)
            else ["everything"]
        )
        raise OutputConflictError(
            f"{path}: of another run (other {', '.join(differ) or 'keys'})",
            remedy="choose an empty output folder, or another seed",
        )
    return True


def write_sample(
    how: SampleFormat,
    folder: Path,
    provenance: Provenance,
    index: int,
    *,
    image_DHW: NDArray[np.float32],
    mask_DHW: NDArray[np.uint8],
) -> SyntheticPair:
    """Write image, mask and, last, the sidecar of one sample. All of them say synthetic.

    Raises:
        OutputConflictError: a file of that name exists with other content. It is left as it is.
    """
    paths = how.write(folder, provenance, index, image_DHW=image_DHW, mask_DHW=mask_DHW)
    files = {path.relative_to(folder).as_posix(): file_sha256(path) for path in paths}
    text = json.dumps(_sidecar(how, provenance, index, files=files), indent=2, sort_keys=True) + "\n"
    pair = how.pair(folder, provenance.stem(index))
    place(pair.sidecar, lambda partial: _write_text(partial, text))
    return pair


def files_sha256(bundle_dir: Path) -> str:
    """Hexadecimal digest over the relative names and SHA-256 hashes of all files of a folder."""
    files = sorted(
        (path.relative_to(bundle_dir).as_posix(), path) for path in bundle_dir.rglob("*") if path.is_file()
    )
    parts = [part for name, path in files for part in (name.encode(), bytes.fromhex(file_sha256(path)))]
    return digest("lacuna/bundle-files/v1", *parts).hex()


def lacuna_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("lacuna")
    except PackageNotFoundError:
        return "unknown"


def _sidecar(
    how: SampleFormat, provenance: Provenance, index: int, *, files: dict[str, str]
) -> dict[str, Any]:
    return {
        "format": "lacuna/synthetic-scan/v1",
        "synthetic": True,
        "files": how.name,
        "lacuna_version": lacuna_version(),
        "bundle_sha256": provenance.bundle_sha256,
        "bundle_files_sha256": provenance.bundle_files_sha256,
        "study_id": provenance.study_id,
        "condition": provenance.condition,
        "covariates": dict(provenance.covariates),
        "seed": provenance.seed,
        "sample_index": index,
        "sampler": provenance.sampler,
        "steps": provenance.steps,
        "guidance_scale": provenance.guidance_scale,
        "labels": {"0": "background"}
        | {str(value): name for value, name in enumerate(provenance.labels, start=1)},
        **({} if provenance.interpolation is None else {"interpolation": provenance.step_to(index)}),
        "plausibility_sha256": provenance.plausibility_sha256,
        "files_sha256": files,
    }


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def place(path: Path, write: Callable[[Path], None]) -> None:
    """Write to the side and rename; keep an existing file if it has the same bytes, else refuse."""
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(partial)
        if not path.exists():
            partial.replace(path)
        elif file_sha256(path) != file_sha256(partial):
            raise OutputConflictError(
                f"{path}: exists with other content", remedy="choose an empty output folder, or another seed"
            )
    finally:
        partial.unlink(missing_ok=True)
