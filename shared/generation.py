"""Synthetic scans from a released bundle: read it, sample, decode, write, show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

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
from shared.model.sampling import sample_latents
from shared.model.weights import load_weights
from shared.study_plan import CovariateClause
from shared.volumes.contact_sheet import contact_sheet
from shared.volumes.synthetic import (
    Provenance,
    SyntheticPair,
    files_sha256,
    is_complete,
    pair_paths,
    read_pair,
    write_pair,
)

MAX_COUNT = 1_000_000
MAX_SHEET_SAMPLES = 12
METADATA_FILE = "configs/metadata.json"
INFERENCE_FILE = "configs/inference.json"
AUTOENCODER_FILE = "models/autoencoder.safetensors"
DENOISER_FILE = "models/denoiser.safetensors"
RELEASE_FILE = "attestations/release.dsse.json"
"""The signed release statement; its SHA-256 is what the release log calls the bundle."""

Side = Annotated[int, Field(ge=1, le=1024)]
Step = Annotated[float, Field(gt=0, le=100)]


class BundleError(CoordinatorError):
    """The folder is not a released bundle, or files of it are missing or damaged."""


class BundleMetadata(BaseModel):
    """What generation needs of section ``lacuna`` of ``configs/metadata.json``; other keys are not read."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    study_id: str
    preset: str
    conditions: tuple[str, ...] = Field(min_length=1, max_length=1024)
    labels: tuple[str, ...] = Field(min_length=1, max_length=63)
    """Names of mask values 1, 2, ...; 0 is background."""
    covariates: tuple[CovariateClause, ...] = Field(default=(), max_length=8)
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
        self, *, class_index: int, first_index: int, count: int, seed: int, steps: int, guidance_scale: float
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Samples first_index to first_index + count - 1 of a seed: image_BDHW in [0, 1], mask_BDHW."""
        z_BCDHW = sample_latents(
            self.denoiser,
            torch.full((count,), class_index, dtype=torch.int64, device=self.device),
            steps=steps,
            guidance_scale=guidance_scale,
            seed=seed,
            latent_shape=self.denoiser.preset.latent_shape(self.metadata.grid_shape),
            first_index=first_index,
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
        contact_sheet: The picture of the first of them.
    """

    pairs: tuple[SyntheticPair, ...]
    written: int
    present: int
    contact_sheet: Path


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
    out_dir: Path,
    batch_size: int = 8,
    steps: int | None = None,
    guidance: float | None = None,
    sheet_samples: int = 8,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
) -> GenerationReport:
    """Write ``count`` synthetic scans of a condition, each with its mask and sidecar, and a contact sheet.

    The same bundle, seed, batch size and number of threads give the same bytes; another batch size the same
    volumes to 1e-4. Memory is that of one batch and of the sheet's samples. A run that was interrupted goes
    on where it stopped.

    Args:
        bundle_dir: A released bundle.
        condition: One of the study's conditions.
        covariates: Values of the study's covariates; those that are not named are unknown.
        count: Number of scans, 1 to 1,000,000.
        seed: Public seed, not negative; sample i depends on (seed, i).
        out_dir: Made if it does not exist.
        batch_size: Scans sampled at once.
        steps: Sampling steps; None is what the bundle says.
        guidance: Classifier-free guidance; None is what the bundle says.
        sheet_samples: How many of the first scans the contact sheet shows, 1 to 12.
        device: Where to sample.
        progress: Called as ("sampling", done, total) after each batch.

    Raises:
        UsageError: an unknown condition (the known ones are listed), a number out of range.
        BundleError: the bundle is not whole.
        OutputConflictError: another run's files are in the way; nothing of them is changed.
    """
    if not 1 <= count <= MAX_COUNT:
        raise UsageError(f"{count} scans: choose 1 to {MAX_COUNT}")
    if seed < 0 or seed >= 2**63:
        raise UsageError(f"seed {seed}: choose a number from 0 to 2^63 - 1")
    if batch_size < 1 or not 1 <= sheet_samples <= MAX_SHEET_SAMPLES:
        raise UsageError(f"batch size {batch_size} (at least 1), sheet of {sheet_samples} (1 to 12)")
    metadata = read_metadata(bundle_dir)
    covariates = dict(covariates or {})
    table = ConditionTable(metadata.conditions, metadata.covariates)
    class_index = table.class_index(condition, covariates)
    steps = metadata.sampling_steps if steps is None else steps
    guidance = metadata.guidance_scale if guidance is None else guidance
    if not 1 <= steps <= 1000 or not 0 <= guidance <= 100:
        raise UsageError(f"{steps} steps (1 to 1000), guidance {guidance} (0 to 100)")
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
    )
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out_dir}: cannot be made ({error.strerror})") from error
    present = [is_complete(out_dir, provenance, index) for index in range(count)]
    generator = None
    for first in range(0, count, batch_size):
        size = min(batch_size, count - first)
        if not all(present[first : first + size]):
            generator = generator or load_generator(bundle_dir, device=device)
            image_BDHW, mask_BDHW = generator.sample(
                class_index=class_index,
                first_index=first,
                count=size,
                seed=seed,
                steps=steps,
                guidance_scale=float(guidance),
            )
            for offset in range(size):
                if not present[first + offset]:
                    write_pair(
                        out_dir,
                        provenance,
                        first + offset,
                        image_DHW=image_BDHW[offset],
                        mask_DHW=mask_BDHW[offset],
                        spacing_mm=metadata.spacing_mm,
                    )
        if progress is not None:
            progress("sampling", first + size, count)
    pairs = tuple(pair_paths(out_dir, provenance, index) for index in range(count))
    shown = [read_pair(pair) for pair in pairs[:sheet_samples]]
    sheet = out_dir / f"{condition}_seed{seed}_contact_sheet.png"
    contact_sheet(
        [image for image, _ in shown],
        [mask for _, mask in shown],
        sheet,
        title=f"{metadata.study_id}: {condition}",
        subtitle=f"{len(shown)} of {count} scans, seed {seed}, {steps} steps, "
        f"bundle {provenance.bundle_sha256[:12]}",
        labels=metadata.labels,
        spacing_mm=metadata.spacing_mm,
        captions=[f"#{index}" for index in range(len(shown))],
    )
    return GenerationReport(
        pairs=pairs, written=count - sum(present), present=sum(present), contact_sheet=sheet
    )
