"""A BIDS data set (Gorgolewski et al., Scientific Data 2016; specification 1.9) as a source of scans.

Of the specification this needs the names of files, ``participants.tsv`` and the look-up tables of
segmentations; libraries for the whole of it bring a data base along. A participant is a patient, whatever
the number of sessions and runs.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from client.ingest.manifest import ManifestError, drop_repeated_files, named_cells, read_table
from client.ingest.nifti_file import NiftiFile
from client.ingest.scan import (
    Listing,
    LoadedVolume,
    Problem,
    ProblemKind,
    ScanEntry,
    SingleFile,
    UnusableScanError,
    VolumeSource,
)
from client.ingest.segment_names import values_by_name
from shared.volumes.nifti import NIFTI_SUFFIXES, Volume

MASK_SUFFIXES = ("dseg", "mask")
_OF_THE_MASK_ALONE = frozenset({"desc", "label", "space", "res", "den", "hemi", "atlas", "seg", "from", "to"})
_ENTITY = re.compile(r"([a-zA-Z]+)-([a-zA-Z0-9+]+)")


@dataclass(frozen=True, kw_only=True)
class BidsFolder:
    """Images of one suffix in a BIDS data set, with their segmentations.

    Attributes:
        path: The data set's root.
        labels: The plan's labels, in the plan's order.
        suffix: Suffix of the images (``T1w``, ``FLAIR``, ``bold``).
        condition_column: Column of ``participants.tsv`` that has the condition.
        segment_names: Names in a segmentation's look-up table and the plan's label for each, where they
            differ; an empty label leaves the segment out.
        covariates: Names of covariates that ``participants.tsv`` may have as columns; ``n/a`` is unknown.
    """

    path: Path
    labels: tuple[str, ...]
    suffix: str = "T1w"
    condition_column: str = "condition"
    segment_names: Mapping[str, str] = field(default_factory=dict)
    covariates: tuple[str, ...] = ()

    def listing(self, conditions: Sequence[str]) -> Listing:
        """Scans and problems; names are read, voxels are not.

        Raises:
            ManifestError: the folder is no BIDS data set, or ``participants.tsv`` is unusable.
        """
        if not (self.path / "dataset_description.json").is_file():
            raise ManifestError(f"{self.path}: not a BIDS data set (no dataset_description.json)")
        people = self._participants()
        masks = self._masks()
        entries: list[ScanEntry] = []
        problems: list[Problem] = []
        images = sorted(path for path in self.path.glob("sub-*/**/*.nii*") if _suffix(path) == self.suffix)
        for image in images:
            name = str(image.relative_to(self.path))
            patient = f"sub-{_entities(image)['sub']}"
            row = people.get(patient)
            condition = "" if row is None else row[self.condition_column]
            fitting = [mask for mask in masks if _fits(mask, image)]
            found: list[tuple[ProblemKind, str]] = []
            if row is None:
                found.append((ProblemKind.NO_PATIENT, "not in participants.tsv"))
            elif condition not in conditions:
                known = ", ".join(conditions)
                found.append((ProblemKind.UNKNOWN_CONDITION, f"{condition!r}; the plan knows {known}"))
            if not fitting:
                found.append((ProblemKind.NO_MASK, "no dseg or mask of its entities"))
            elif len(fitting) > 1:
                shown = ", ".join(str(mask.relative_to(self.path)) for mask in fitting[:4])
                found.append((ProblemKind.AMBIGUOUS_MASK, shown))
            if found or row is None:
                problems.extend(Problem(file=name, kind=kind, detail=detail) for kind, detail in found)
                continue
            entries.append(
                ScanEntry(
                    patient_id=patient,
                    name=name,
                    image=NiftiFile(path=image),
                    mask=self._mask(fitting[0]),
                    condition=condition,
                    covariates=named_cells(row, self.covariates),
                )
            )
        unique, repeated = drop_repeated_files(entries)
        return Listing(entries=unique, problems=(*problems, *repeated))

    def _participants(self) -> dict[str, dict[Hashable, str]]:
        """Cells by column for each participant; empty where they say n/a."""
        path = self.path / "participants.tsv"
        table = read_table(path, separator="\t")
        missing = [name for name in ("participant_id", self.condition_column) if name not in table.columns]
        if missing:
            raise ManifestError(
                f"{path}: there is no column {' and no column '.join(missing)}",
                remedy="name the column that has the condition: --condition-column",
            )
        ids = [str(value).strip() for value in table["participant_id"]]
        repeated = sorted({one for one in ids if ids.count(one) > 1})
        if repeated:
            raise ManifestError(f"{path}: listed more than once: {', '.join(repeated[:10])}")
        cleaned = table.replace({"n/a": "", "N/A": ""}).to_dict("records")
        return dict(
            zip(ids, ({key: str(cell).strip() for key, cell in row.items()} for row in cleaned), strict=True)
        )

    def _masks(self) -> list[Path]:
        """Segmentations beside the images and in derivatives."""
        places = (self.path.glob("sub-*/**/*.nii*"), self.path.glob("derivatives/**/*.nii*"))
        return sorted(path for place in places for path in place if _suffix(path) in MASK_SUFFIXES)

    def _mask(self, path: Path) -> VolumeSource:
        stem = next(
            path.name.removesuffix(end) for end in reversed(NIFTI_SUFFIXES) if path.name.endswith(end)
        )
        table = path.with_name(f"{stem}.tsv")
        if not table.is_file():
            return NiftiFile(path=path)
        return TabledMask(path=path, table=table, labels=self.labels, names=self.segment_names)


@dataclass(frozen=True, kw_only=True)
class TabledMask(SingleFile):
    """A segmentation whose values are explained by a table with the columns ``index`` and ``name``.

    Attributes:
        table: Look-up table of the NIfTI file.
        labels: The plan's labels; label k becomes value k + 1.
        names: Names in the table and the label that each stands for, where they differ.
    """

    table: Path
    labels: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)

    def read(self, like: Volume | None = None) -> LoadedVolume:
        """Read the file and bring its values into the plan's order. Raises UnusableScanError."""
        loaded = NiftiFile(path=self.path).read(like)
        values = self._values()
        stored = loaded.volume.voxels_DHW
        mask = np.zeros(stored.shape, dtype=np.uint8)
        for index in np.unique(stored).tolist():
            if index not in values:
                raise UnusableScanError(
                    ProblemKind.UNKNOWN_LABEL, f"{self.path.name}: {index:g} is not in {self.table.name}"
                )
            mask[stored == index] = values[index]
        return LoadedVolume(
            volume=Volume(voxels_DHW=mask, affine=loaded.volume.affine), repairs=loaded.repairs
        )

    def _values(self) -> dict[int, int]:
        try:
            table = read_table(self.table, separator="\t")
            rows = {int(index): str(name) for index, name in zip(table["index"], table["name"], strict=True)}
        except (ManifestError, KeyError, ValueError) as error:
            raise UnusableScanError(ProblemKind.UNREADABLE_FILE, f"{self.table.name}: {error}") from error
        values = values_by_name(rows, self.labels, self.names, what=self.table.name)
        return {0: 0, **values}


def _suffix(path: Path) -> str:
    """``T1w`` of ``sub-01_T1w.nii.gz``."""
    return path.name.split(".")[0].rpartition("_")[2]


def _entities(path: Path) -> dict[str, str]:
    return dict(_ENTITY.findall(path.name.split(".")[0]))


def _fits(mask: Path, image: Path) -> bool:
    """Whether the mask's name has the image's entities and none but those that only masks have."""
    of_mask, of_image = _entities(mask), _entities(image)
    common = {key: value for key, value in of_mask.items() if key not in _OF_THE_MASK_ALONE}
    return all(of_image.get(key) == value for key, value in common.items()) and all(
        key in common for key in of_image if key in ("sub", "ses", "run")
    )
