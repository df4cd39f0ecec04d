"""A scan before it is imported: who, which condition, where its voxels are, and why it may be refused.

Sources (:class:`ScanSource`) list scans; the voxels stay where they are until :meth:`VolumeSource.read`.
Nothing of this leaves the import: an entry has the hospital's own patient id and the names of its files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from shared.errors import SiteError
from shared.volumes.nifti import Volume


class ProblemKind(StrEnum):
    """Why a scan is refused. A closed list; names do not change."""

    NO_PATIENT = "scan without a patient"
    OTHER_PATIENT = "file and manifest name different patients"
    NO_SCAN = "row without a scan file"
    NO_MASK = "scan without a mask"
    AMBIGUOUS_MASK = "several masks for one scan"
    UNKNOWN_CONDITION = "unknown condition"
    UNKNOWN_COVARIATE = "covariate has no such value"
    MISSING_FILE = "missing file"
    UNREADABLE_FILE = "unreadable file"
    CHANGED_FILE = "content is not the one that was listed"
    NOT_RETRIEVED = "the archive did not send it whole"
    UNDECODABLE_PIXELS = "pixel data cannot be decoded"
    COLOUR_IMAGE = "colour image"
    BURNED_IN_TEXT = "text burned into the pixels"
    SYNTHETIC_SCAN = "marked as synthetic"
    NO_GEOMETRY = "no position and orientation in the patient"
    SINGLE_SLICE = "a single slice is not a volume"
    MIXED_SERIES = "several volumes in one series"
    MISSING_SLICES = "missing slices"
    UNEVEN_SPACING = "unevenly spaced slices"
    CONFLICTING_SLICES = "different slices at one position"
    SHAPE_MISMATCH = "image and mask differ in shape"
    AFFINE_MISMATCH = "image and mask differ in geometry"
    NOT_FINITE = "NaN or infinite voxels"
    CONSTANT_IMAGE = "constant image"
    EMPTY_MASK = "empty mask"
    UNKNOWN_LABEL = "unknown label values"
    CUT_MASK = "mask does not fit the canonical grid"
    DUPLICATE_NAME = "file listed more than once"
    DUPLICATE_CONTENT = "same voxels as another scan"
    CONFLICT = "already imported with other facts"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One scan that is refused, and why. Shown at the site only: it names the hospital's files."""

    file: str
    kind: ProblemKind
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.file}: {self.kind}" + (f" ({self.detail})" if self.detail else "")


class UnusableScanError(SiteError):
    """One image or mask cannot be used. The import refuses the scan and goes on with the next."""

    def __init__(self, kind: ProblemKind, detail: str = "") -> None:
        super().__init__(f"{kind}" + (f" ({detail})" if detail else ""))
        self.kind = kind
        self.detail = detail


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedVolume:
    """Voxels as they were read.

    Attributes:
        volume: The voxels with their geometry.
        repairs: What was not as it should be and was set right without inventing anything, in words.
    """

    volume: Volume
    repairs: tuple[str, ...] = ()


class VolumeSource(Protocol):
    """Where the voxels of an image or of a mask are."""

    @property
    def identity(self) -> str:
        """The same for two sources exactly when they are the same file or series."""
        ...

    @property
    def missing(self) -> str | None:
        """Name of a file that is not there; None if all are."""
        ...

    def read(self, like: Volume | None = None) -> LoadedVolume:
        """Read all voxels.

        Args:
            like: For a mask, the image that it belongs to.

        Raises:
            UnusableScanError: with what is wrong.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class SingleFile:
    """What every :class:`VolumeSource` of one file knows without reading it.

    Attributes:
        path: The file.
    """

    path: Path

    @property
    def identity(self) -> str:
        """The same for two sources exactly when they are the same file."""
        return str(self.path.resolve())

    @property
    def missing(self) -> str | None:
        """The file's name if it is not there."""
        return None if self.path.is_file() else self.path.name


@dataclass(frozen=True, kw_only=True)
class ScanEntry:
    """One scan as its source describes it. Never leaves the import: it has the clear patient id.

    Attributes:
        patient_id: The hospital's own id of the patient.
        name: How problems name this scan: the file or the series as the source lists it; unique in a listing.
        image: Where the image is.
        mask: Where the mask is.
        condition: Condition of this scan.
        covariates: Further properties as the source states them; the import keeps those that the plan names.
    """

    patient_id: str
    name: str
    image: VolumeSource
    mask: VolumeSource
    condition: str
    covariates: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a source has.

    Attributes:
        entries: Scans that are worth opening.
        problems: What is wrong with the others.
        skipped: What was left alone because nobody asked for it, in words, with counts.
    """

    entries: tuple[ScanEntry, ...]
    problems: tuple[Problem, ...]
    skipped: tuple[str, ...] = field(default=())


class ScanSource(Protocol):
    """Where scans come from."""

    def listing(self, conditions: Sequence[str]) -> Listing:
        """List the scans without opening them. ``conditions`` are the plan's."""
        ...
