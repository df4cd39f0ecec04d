"""Synthetic scans from a released bundle: read it, sample, decode, write, show."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.canonical import parse_json
from shared.checkpoint import file_sha256
from shared.errors import CoordinatorError, MalformedMessageError, UsageError
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.candidate import load_denoiser
from shared.model.conditioning import ConditionTable
from shared.model.denoiser import Denoiser
from shared.model.diffusion import diffusion_of
from shared.model.presets import preset_named
from shared.model.sampling import interpolated_noise, sample_latents
from shared.model.segmenter import Segmenter, load_segmenter
from shared.model.weights import load_weights
from shared.study_plan import CovariateClause
from shared.volumes.contact_sheet import contact_sheet
from shared.volumes.dicom_series import DicomSeries, Modality
from shared.volumes.nifti import Spacing3
from shared.volumes.plausibility import Fault, PlausibilityRanges, faults, read_ranges
from shared.volumes.surface import surface_sheet
from shared.volumes.synthetic import (
    Interpolation,
    NiftiPairs,
    Provenance,
    SampleFormat,
    SyntheticPair,
    files_sha256,
    is_complete,
    write_sample,
)

MAX_COUNT = 1_000_000
MAX_SHEET_SAMPLES = 12
MIN_TRIED = 16
"""Samples before the share of rejected ones is looked at."""
METADATA_FILE = "configs/metadata.json"
INFERENCE_FILE = "configs/inference.json"
AUTOENCODER_FILE = "models/autoencoder.safetensors"
DENOISER_FILE = "models/denoiser.safetensors"
PLAUSIBILITY_FILE = "configs/plausibility.json"
SEGMENTER_FILE = "models/segmenter.safetensors"
RELEASE_FILE = "attestations/release.dsse.json"
"""The signed release statement; its SHA-256 is what the release log calls the bundle."""

FileFormat = Literal["nifti", "dicom"]

Side = Annotated[int, Field(ge=1, le=1024)]
Step = Annotated[float, Field(gt=0, le=100)]


class BundleError(CoordinatorError):
    """The folder is not a released bundle, or files of it are missing or damaged."""


class ImplausibleError(CoordinatorError):
    """The generator makes too few plausible scans."""


class BundleMetadata(BaseModel):
    """What generation needs of section ``lacuna`` of ``configs/metadata.json``; other keys are not read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    study_id: str
    preset: str
    conditions: tuple[str, ...] = Field(min_length=1, max_length=1024)
    labels: tuple[str, ...] = Field(min_length=1, max_length=63)
    """Names of mask values 1, 2, ...; 0 is background."""
    covariates: tuple[CovariateClause, ...] = Field(default=(), max_length=8)
    modality: Literal["MR", "CT"] | None = None
    grid_shape: tuple[Side, Side, Side]
    spacing_mm: tuple[Step, Step, Step]
    sampling_steps: int = Field(ge=1, le=1000)
    guidance_scale: float = Field(ge=0, le=100)
    trained_parameters: str
    """Which parameters trained privately; ``low_rank`` adds adapters to the denoiser's file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Generator:
    """A released generator, ready to sample."""

    metadata: BundleMetadata
    autoencoder: LatentAutoencoder
    denoiser: Denoiser
    device: str

    def sample(
        self,
        *,
        class_index: int,
        first_index: int,
        count: int,
        seed: int,
        steps: int,
        guidance_scale: float,
        interpolation: Interpolation | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Samples first_index to first_index + count - 1 of a seed: image_BDHW in [0, 1], mask_BDHW."""
        shape, noise = self.denoiser.preset.latent_shape(self.metadata.grid_shape), None
        if interpolation is not None:
            positions = [interpolation.position(first_index + i) for i in range(count)]
            noise = interpolated_noise(
                seed=seed, to_seed=interpolation.to_seed, positions=positions, shape=shape
            )
        z_BCDHW = sample_latents(
            self.denoiser,
            torch.full((count,), class_index, dtype=torch.int64, device=self.device),
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            latent_shape=shape,
            first_index=first_index,
            noise_BCDHW=noise,
        )
        with torch.no_grad():
            image_B1DHW, mask_BDHW = self.autoencoder.decode(z_BCDHW)
        image_BDHW = image_B1DHW[:, 0].float().cpu().numpy()
        if not np.isfinite(image_BDHW).all():
            raise BundleError("the generator gives voxels that are not finite", remedy="check the bundle")
        return image_BDHW, mask_BDHW.cpu().numpy().astype(np.uint8)


@dataclass(frozen=True, kw_only=True)
class GenerationReport:
    """What a run wrote.

    Attributes:
        pairs: All pairs of the run, in the order of their index.
        written: How many of them were written now.
        present: How many were there already.
        rejected: (index, faults) of every sample that was implausible and is not there.
        checked: Whether the bundle has ranges to check against.
        segmented: Whether masks were also held against the bundle's own segmenter.
        contact_sheet: The picture of the first of them.
        surfaces: The picture of their masks' surfaces.
    """

    pairs: tuple[SyntheticPair, ...]
    written: int
    present: int
    rejected: tuple[tuple[int, tuple[Fault, ...]], ...]
    checked: bool
    segmented: bool
    contact_sheet: Path
    surfaces: Path

    def common_faults(self, most: int = 5) -> list[tuple[str, int]]:
        """The figures that rejected most, with counts."""
        return _common(self.rejected, most)


def read_metadata(bundle_dir: Path) -> BundleMetadata:
    """Parse and check a bundle's metadata, and that its files are there.

    Raises:
        BundleError: names every missing file or wrong key.
    """
    names = (METADATA_FILE, INFERENCE_FILE, AUTOENCODER_FILE, DENOISER_FILE, RELEASE_FILE)
    missing = [name for name in names if not (bundle_dir / name).is_file()]
    if missing:
        raise BundleError(
            f"{bundle_dir}: not a whole release bundle, missing: {', '.join(missing)}",
            remedy="pass the folder that `lacuna coordinator release` wrote",
        )
    path = bundle_dir / METADATA_FILE
    try:
        document = parse_json(path.read_bytes(), what=str(path))
        section = document.get("lacuna") if isinstance(document, dict) else None
        if section is None:
            raise BundleError(f"{path}: there is no section lacuna", remedy="this is not a Lacuna bundle")
        return BundleMetadata.model_validate(section)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(str(part) for part in problem['loc']) or 'document'}: {problem['msg']}"
            for problem in error.errors()
        )
        raise BundleError(f"{path}: {wrong}") from error
    except MalformedMessageError as error:
        raise BundleError(str(error)) from error


def load_generator(bundle_dir: Path, *, device: str = "cpu") -> Generator:
    """Load the networks of a bundle. It is not verified here: that is ``lacuna compliance verify``.

    Raises:
        BundleError: files are missing or damaged.
        CoordinatorError: weights that do not fit the metadata.
        UsageError: an unknown preset.
    """
    metadata = read_metadata(bundle_dir)
    autoencoder = build_autoencoder(preset_named(metadata.preset), n_labels=len(metadata.labels))
    try:
        load_weights(autoencoder, bundle_dir / AUTOENCODER_FILE)
        denoiser = load_denoiser(
            bundle_dir / DENOISER_FILE,
            preset=metadata.preset,
            n_conditions=len(metadata.conditions),
            covariate_sizes=[covariate.size for covariate in metadata.covariates],
            trainable=metadata.trained_parameters,
        )
    except MalformedMessageError as error:
        raise BundleError(str(error), remedy="run `lacuna compliance verify` on the bundle") from error
    return Generator(
        metadata=metadata,
        autoencoder=autoencoder.requires_grad_(False).eval().to(device),
        denoiser=denoiser.to(device),
        device=device,
    )


def generate_volumes(
    *,
    bundle_dir: Path,
    condition: str,
    covariates: Mapping[str, str] | None = None,
    count: int,
    seed: int,
    to_seed: int | None = None,
    out_dir: Path,
    file_format: FileFormat = "nifti",
    modality: Modality | None = None,
    uid_root: str | None = None,
    batch_size: int = 8,
    steps: int | None = None,
    guidance: float | None = None,
    max_rejected_share: float = 0.5,
    sheet_samples: int = 8,
    focus: str | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> GenerationReport:
    """Write ``count`` synthetic scans of a condition, each with its mask and sidecar, and two pictures.

    The same bundle, seed, batch size and number of threads give the same bytes; another batch size the same
    volumes to 1e-4. Memory is that of one batch and of the sheet's samples. A run that was interrupted goes
    on where it stopped.

    Where the bundle carries ranges of plausibility (:mod:`shared.volumes.plausibility`), a sample outside
    them, or whose mask is not what the bundle's segmenter finds in the image, is not written; sampling goes
    on with the next index until ``count`` are there.

    Args:
        bundle_dir: A released bundle.
        condition: One of the study's conditions.
        covariates: Values of the study's covariates; those that are not named are unknown.
        count: Number of scans, 1 to 1,000,000.
        seed: Public seed, not negative; sample i depends on (seed, i).
        to_seed: Give instead the ``count`` steps from ``seed``'s first sample to this seed's.
        out_dir: Made if it does not exist.
        file_format: ``nifti`` or ``dicom``.
        modality: For DICOM; None is what the study says.
        uid_root: For DICOM; see :class:`shared.volumes.dicom_series.DicomSeries`.
        batch_size: Scans sampled at once.
        steps: Sampling steps; None is what the bundle says.
        guidance: Classifier-free guidance; None is what the bundle says.
        max_rejected_share: Give up when more than this share of the samples is implausible.
        sheet_samples: How many of the first scans the pictures show, 1 to 12.
        focus: Label whose middle the contact sheet's slices go through; None is the smallest one.
        device: Where to sample.
        progress: Called as ("sampling", done, total) after each batch.

    Raises:
        UsageError: an unknown condition (the known ones are listed), a number out of range.
        BundleError: the bundle is not whole.
        OutputConflictError: another run's files are in the way; nothing of them is changed.
        ImplausibleError: too many samples were rejected. Those that were written stay.
    """
    least = 1 if to_seed is None else 2
    if not least <= count <= MAX_COUNT:
        raise UsageError(f"{count} scans: choose {least} to {MAX_COUNT}")
    if any(not 0 <= number < 2**63 for number in (seed, to_seed or 0)):
        raise UsageError(f"seed {seed}: choose a number from 0 to 2^63 - 1")
    if batch_size < 1 or not 1 <= sheet_samples <= MAX_SHEET_SAMPLES:
        raise UsageError(f"batch size {batch_size} (at least 1), sheet of {sheet_samples} (1 to 12)")
    if not 0.0 <= max_rejected_share < 1.0:
        raise UsageError(f"rejected share {max_rejected_share}: 0 to below 1")
    metadata = read_metadata(bundle_dir)
    if focus is not None and focus not in metadata.labels:
        raise UsageError(f"no such label: {focus!r}", remedy=f"choose one of {', '.join(metadata.labels)}")
    covariates = dict(covariates or {})
    table = ConditionTable(metadata.conditions, metadata.covariates)
    class_index = table.class_index(condition, covariates)
    steps = metadata.sampling_steps if steps is None else steps
    guidance = metadata.guidance_scale if guidance is None else guidance
    if not 1 <= steps <= 1000 or not 0 <= guidance <= 100:
        raise UsageError(f"{steps} steps (1 to 1000), guidance {guidance} (0 to 100)")
    ranges = read_bundle_ranges(bundle_dir, metadata)
    segmenter = load_bundle_segmenter(bundle_dir, metadata, ranges, device=device)
    provenance = Provenance(
        bundle_sha256=file_sha256(bundle_dir / RELEASE_FILE),
        bundle_files_sha256=files_sha256(bundle_dir),
        study_id=metadata.study_id,
        condition=condition,
        covariates=tuple(sorted(covariates.items())),
        seed=seed,
        sampler=diffusion_of(preset_named(metadata.preset)).sampler,
        steps=steps,
        guidance_scale=float(guidance),
        labels=metadata.labels,
        plausibility_sha256=None if ranges is None else file_sha256(bundle_dir / PLAUSIBILITY_FILE),
        interpolation=None if to_seed is None else Interpolation(to_seed=to_seed, steps=count),
    )
    how = sample_format(file_format, bundle_dir, metadata, modality=modality, uid_root=uid_root)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out_dir}: cannot be made ({error.strerror})") from error
    run = _Run(how, out_dir, provenance, ranges, segmenter, metadata.spacing_mm, max_rejected_share)
    generator = None
    while not run.done(count):
        size = min(batch_size, count - len(run.accepted), run.left(count))
        indices = range(run.tried, run.tried + size)
        present = [is_complete(how, out_dir, provenance, index) for index in indices]
        if all(present):
            run.take_present(indices)
        else:
            generator = generator or load_generator(bundle_dir, device=device)
            image_BDHW, mask_BDHW = generator.sample(
                class_index=class_index,
                first_index=indices[0],
                count=size,
                seed=seed,
                interpolation=provenance.interpolation,
                steps=steps,
                guidance_scale=float(guidance),
            )
            run.take(indices, present, image_BDHW, mask_BDHW)
        if progress is not None:
            progress("sampling", len(run.accepted), count)
    return run.finish(metadata, sheet_samples=sheet_samples, focus=focus)


class _Run:
    """The samples of one run: tried in order, written or rejected."""

    def __init__(
        self,
        how: SampleFormat,
        folder: Path,
        provenance: Provenance,
        ranges: PlausibilityRanges | None,
        segmenter: Segmenter | None,
        spacing_mm: Spacing3,
        max_rejected_share: float,
    ) -> None:
        self._how, self._folder, self._provenance = how, folder, provenance
        self._ranges, self._spacing_mm, self._max_share = ranges, spacing_mm, max_rejected_share
        self._segmenter = segmenter
        self.tried = self._written = 0
        self.accepted: list[int] = []
        self._rejected: list[tuple[int, tuple[Fault, ...]]] = []

    def left(self, count: int) -> int:
        """How many samples there are still to try: an interpolation has no others."""
        return count - self.tried if self._provenance.interpolation is not None else count

    def done(self, count: int) -> bool:
        return len(self.accepted) >= count or self.left(count) <= 0

    def take_present(self, indices: range) -> None:
        """Samples that an earlier run wrote: they were plausible then."""
        self.accepted.extend(indices)
        self.tried += len(indices)

    def take(
        self,
        indices: range,
        present: list[bool],
        image_BDHW: NDArray[np.float32],
        mask_BDHW: NDArray[np.uint8],
    ) -> None:
        """Check and write a batch. Raises ImplausibleError, OutputConflictError."""
        faults_B = batch_faults(
            image_BDHW, mask_BDHW, self._ranges, self._segmenter, spacing_mm=self._spacing_mm
        )
        for row, (index, there) in enumerate(zip(indices, present, strict=True)):
            self.tried += 1
            found = [] if there else faults_B[row]
            if found:
                self._rejected.append((index, tuple(found)))
                self._check_limit()
                continue
            self.accepted.append(index)
            if not there:
                write_sample(
                    self._how,
                    self._folder,
                    self._provenance,
                    index,
                    image_DHW=image_BDHW[row],
                    mask_DHW=mask_BDHW[row],
                )
                self._written += 1

    def _check_limit(self) -> None:
        if self.tried < MIN_TRIED or len(self._rejected) <= self._max_share * self.tried:
            return
        why = ", ".join(f"{figure} ({times})" for figure, times in _common(self._rejected, 3))
        raise ImplausibleError(
            f"{len(self._rejected)} of {self.tried} samples are implausible; most often: {why}",
            remedy="other steps or guidance may help; otherwise this generator is not usable for this "
            "condition. --max-rejected-share lets it go on",
        )

    def finish(self, metadata: BundleMetadata, *, sheet_samples: int, focus: str | None) -> GenerationReport:
        """Draw the pictures."""
        provenance, folder = self._provenance, self._folder
        if not self.accepted:
            raise ImplausibleError("every sample is implausible", remedy="another seed")
        pairs = tuple(self._how.pair(folder, provenance.stem(index)) for index in self.accepted)
        shown = [self._how.read(pair) for pair in pairs[:sheet_samples]]
        images, masks = [image for image, _ in shown], [mask for _, mask in shown]
        facts = {
            "title": f"{metadata.study_id}: {provenance.condition}",
            "subtitle": f"{len(shown)} of {len(pairs)} scans, seed {provenance.seed}, "
            f"{provenance.steps} steps, bundle {provenance.bundle_sha256[:12]}",
            "captions": [f"#{index}" for index in self.accepted[: len(shown)]],
        }
        sheet = folder / f"{provenance.run_stem}_contact_sheet.png"
        contact_sheet(
            images,
            masks,
            sheet,
            labels=metadata.labels,
            spacing_mm=metadata.spacing_mm,
            focus=smallest_label(masks, metadata.labels) if focus is None else focus,
            **facts,  # type: ignore[arg-type]
        )
        surfaces = folder / f"{provenance.run_stem}_surfaces.png"
        surface_sheet(
            masks,
            surfaces,
            labels=metadata.labels,
            spacing_mm=metadata.spacing_mm,
            **facts,  # type: ignore[arg-type]
        )
        return GenerationReport(
            pairs=pairs,
            written=self._written,
            present=len(pairs) - self._written,
            rejected=tuple(self._rejected),
            checked=self._ranges is not None,
            segmented=self._segmenter is not None,
            contact_sheet=sheet,
            surfaces=surfaces,
        )


def batch_faults(
    image_BDHW: NDArray[np.float32],
    mask_BDHW: NDArray[np.uint8],
    ranges: PlausibilityRanges | None,
    segmenter: Segmenter | None,
    *,
    spacing_mm: Spacing3,
) -> list[list[Fault]]:
    """Everything that is implausible about each sample of a batch; nothing where there are no ranges."""
    if ranges is None:
        return [[] for _ in image_BDHW]
    segmented_BDHW = [None] * len(image_BDHW) if segmenter is None else segmenter.segment(image_BDHW)
    return [
        faults(image_DHW, mask_DHW, ranges, spacing_mm=spacing_mm, segmented_DHW=segmented_DHW)
        for image_DHW, mask_DHW, segmented_DHW in zip(image_BDHW, mask_BDHW, segmented_BDHW, strict=True)
    ]


def sample_format(
    name: FileFormat,
    bundle_dir: Path,
    metadata: BundleMetadata,
    *,
    modality: Modality | None = None,
    uid_root: str | None = None,
) -> SampleFormat:
    """How samples become files.

    Raises:
        UsageError: DICOM without a modality, or a root that is none.
        BundleError: the release statement, whose time DICOM objects carry, cannot be read.
    """
    if name == "nifti":
        return NiftiPairs(spacing_mm=metadata.spacing_mm)
    chosen = modality or metadata.modality
    if chosen is None:
        raise UsageError(
            "the study does not say which modality its scans have", remedy="give --modality MR or CT"
        )
    return DicomSeries(
        spacing_mm=metadata.spacing_mm, modality=chosen, released=release_time(bundle_dir), uid_root=uid_root
    )


def release_time(bundle_dir: Path) -> datetime:
    """When the bundle was released, as its release statement says. Raises BundleError."""
    path = bundle_dir / RELEASE_FILE
    try:
        envelope = parse_json(path.read_bytes(), what=str(path))
        statement = parse_json(base64.b64decode(envelope["payload"]), what=str(path))
        return datetime.strptime(statement["predicate"]["at"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    except (MalformedMessageError, KeyError, TypeError, ValueError) as error:
        raise BundleError(
            f"{path}: does not say when the bundle was released",
            remedy="run `lacuna compliance verify` on it",
        ) from error


def read_bundle_ranges(bundle_dir: Path, metadata: BundleMetadata) -> PlausibilityRanges | None:
    """The bundle's ranges of plausibility; None where it has none. Raises BundleError."""
    path = bundle_dir / PLAUSIBILITY_FILE
    if not path.exists():
        return None
    try:
        ranges = read_ranges(path)
    except MalformedMessageError as error:
        raise BundleError(str(error), remedy="run `lacuna compliance verify` on the bundle") from error
    if ranges.labels != metadata.labels:
        raise BundleError(f"{path}: is about other labels than the bundle's")
    return ranges


def load_bundle_segmenter(
    bundle_dir: Path, metadata: BundleMetadata, ranges: PlausibilityRanges | None, *, device: str = "cpu"
) -> Segmenter | None:
    """The segmenter that the bundle's ranges name; None where they name none. Raises BundleError."""
    if ranges is None or ranges.agreement is None:
        return None
    path = bundle_dir / SEGMENTER_FILE
    try:
        if not path.is_file() or file_sha256(path) != ranges.agreement.segmenter_sha256:
            raise BundleError(
                f"{path}: not the segmenter that {PLAUSIBILITY_FILE} names",
                remedy="run `lacuna compliance verify` on the bundle",
            )
        segmenter = load_segmenter(path, n_labels=len(metadata.labels))
    except MalformedMessageError as error:
        raise BundleError(str(error), remedy="run `lacuna compliance verify` on the bundle") from error
    return None if segmenter is None else segmenter.to(device)


def smallest_label(masks: Sequence[NDArray[np.uint8]], labels: Sequence[str]) -> str:
    """The label that takes the least room in these masks but is there: a lesion rather than its organ."""
    sizes = {name: sum(int((mask == i).sum()) for mask in masks) for i, name in enumerate(labels, start=1)}
    return min((name for name in labels if sizes[name]), key=lambda name: sizes[name], default=labels[-1])


def _common(rejected: Sequence[tuple[int, tuple[Fault, ...]]], most: int) -> list[tuple[str, int]]:
    return Counter(fault.figure for _, found in rejected for fault in found).most_common(most)
