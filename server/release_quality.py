"""How good is a released generator: its samples against PUBLIC scans that no network of the study saw.

Nothing private is touched: the bundle is public, and so are the scans, of patients that pretraining held out
or never had. Members' scans must not be among them: what is computed here is covered by no budget.
Distances are :mod:`server.distribution_distance`'s, by condition; copies are what the released verdict says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from privacy.compliance.report_figures import AuditFigure, audit_figures
from privacy.compliance.verify import examine_bundle
from server.distribution_distance import (
    Diversity,
    FloatArray,
    SetDistance,
    diversity,
    frechet_distance,
    histogram_distance,
    intensity_histogram,
    kernel_distance,
    set_distance,
    volume_distance,
)
from server.pretrain import PublicVolume, mask_sha256
from server.public_segmenter import default_segmenter_schedule
from server.segmenter_utility import ImagesAndMasks, Progress, SegmenterScore, segmenter_scores, stacked
from shared.errors import CoordinatorError, UsageError
from shared.generation import (
    BundleMetadata,
    Generator,
    batch_faults,
    load_bundle_segmenter,
    load_generator,
    read_bundle_ranges,
)
from shared.model.conditioning import ConditionTable
from shared.model.copy_embedding import CopyEmbedding, load_copy_embedding, mirrored
from shared.model.training import decode_batches, encode_batches
from shared.plan_package import hash_file
from shared.volumes.plausibility import Fault

MIN_REAL = 3
"""Fewer held-out scans of a condition carry no figure."""
PLANES = ("sagittal", "coronal", "axial")
"""Across D, H and W of the canonical grid."""
MAX_TRIED = 4
"""Times the number of scans asked for, before a condition is left with what is there."""
BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class PublicScans:
    """Real scans to hold a release against, all of them public.

    Attributes:
        held_out: Of patients that no network was trained on: what synthetic scans are held against.
        further: Of other patients, those that pretraining saw for example: for floors, and for the nearest
            public scan.
        description: Where they come from, in one line.
    """

    held_out: Sequence[PublicVolume]
    further: Sequence[PublicVolume]
    description: str


def split_by_training(volumes: Sequence[PublicVolume], recipe: Mapping[str, Any]) -> PublicScans:
    """Hold against a release the patients of whom pretraining saw no scan, known by the scans' masks.

    Args:
        recipe: Of the study's public networks.

    Raises:
        CoordinatorError: the recipe does not say what its networks were trained on.
    """
    trained = set(recipe["data"].get("trained_masks_sha256", ()))
    if not trained:
        raise CoordinatorError(
            "the recipe does not say which scans the public networks were trained on",
            remedy="pretrain again, or evaluate with --simulated where the networks are the shipped ones",
        )
    seen = {volume.patient_id for volume in volumes if mask_sha256(volume.mask) in trained}
    return PublicScans(
        held_out=[volume for volume in volumes if volume.patient_id not in seen],
        further=[volume for volume in volumes if volume.patient_id in seen],
        description="Pretraining was given no scan of these patients"
        if not seen
        else "Pretraining did not train on any scan of these patients",
    )


@dataclass(frozen=True, kw_only=True)
class NearestPair:
    """A synthetic scan and the public one that is nearest to it in the copy check's embedding."""

    sample: int
    distance: float
    synthetic: ImagesAndMasks
    public: ImagesAndMasks


@dataclass(frozen=True, kw_only=True)
class ConditionQuality:
    """Figures of one condition.

    Attributes:
        tried, rejected: Samples made, and those that were implausible.
        faults: The figures that rejected most, with counts.
        n_real: Held-out real scans of the condition.
        distances: Empty where there are fewer than :data:`MIN_REAL` of them.
        volumes: By label: (real, synthetic) volumes in mm3.
        nearest: The synthetic scans that come nearest to a public one.
        nearer_than_copy: How many come nearer than the plan's copy distance; None without an embedding.
    """

    condition: str
    tried: int
    rejected: int
    faults: tuple[tuple[str, int], ...]
    n_real: int
    n_synthetic: int
    distances: tuple[SetDistance, ...]
    diversity: Diversity
    volumes: dict[str, tuple[list[float], list[float]]]
    nearest: tuple[NearestPair, ...]
    nearer_than_copy: int | None
    shown: ImagesAndMasks
    real_shown: ImagesAndMasks | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "condition": self.condition,
            "tried": self.tried,
            "rejected": self.rejected,
            "common_faults": [list(row) for row in self.faults],
            "n_real": self.n_real,
            "n_synthetic": self.n_synthetic,
            "distances": [distance.to_dict() for distance in self.distances],
            "diversity": self.diversity.to_dict(),
            "nearest_public_distance": [round(pair.distance, 5) for pair in self.nearest],
            "nearer_to_a_public_scan_than_copy_distance": self.nearer_than_copy,
        }


@dataclass(frozen=True, kw_only=True)
class ReleaseQuality:
    """All figures of a release.

    Attributes:
        verified: Whether the bundle passed the officer's checks (without an outside key).
        copies: The audit's figure as it was released, recomputed from the pooled counts; None where the
            bundle's evidence does not verify.
        segmenters: What segmenters learn from the samples; empty where that was not asked for.
    """

    study_id: str
    bundle_sha256: str
    verified: bool
    metadata: BundleMetadata
    epsilon: float | None
    delta: float
    seed: int
    public: PublicScans
    copies: AuditFigure | None
    copy_distance: float
    conditions: tuple[ConditionQuality, ...]
    segmenters: tuple[SegmenterScore, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": "lacuna/release-quality/v1",
            "study_id": self.study_id,
            "bundle_sha256": self.bundle_sha256,
            "verified": self.verified,
            "epsilon": self.epsilon,
            "delta": self.delta,
            "seed": self.seed,
            "public_scans": {
                "description": self.public.description,
                "held_out": len(self.public.held_out),
                "held_out_patients": len({v.patient_id for v in self.public.held_out}),
                "further": len(self.public.further),
            },
            "copies_as_released": None
            if self.copies is None
            else {"status": self.copies.status, "text": self.copies.text},
            "copy_distance": self.copy_distance,
            "conditions": [quality.to_dict() for quality in self.conditions],
            "segmenters": [score.to_dict() for score in self.segmenters],
        }


def evaluate_release(
    bundle: Path,
    public: PublicScans,
    *,
    copy_embedding: Path | None,
    count: int,
    seed: int,
    segmenter_steps: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> ReleaseQuality:
    """Sample every condition of a released bundle and measure.

    Args:
        public: Never members' scans.
        copy_embedding: Weights of the embedding that the plan names; None measures nothing in it.
        count: Plausible samples by condition, at least 8.
        seed: Public seed; the samples are those that ``lacuna generate`` gives.
        segmenter_steps: Of each training of :func:`server.segmenter_utility.segmenter_scores`; 0 leaves it
            out.

    Raises:
        UsageError: too few samples, or no public scan that was held out.
        CoordinatorError: the bundle is not whole, or the embedding is not the plan's.
    """
    if count < 8:
        raise UsageError(f"{count} samples: at least 8")
    if not public.held_out:
        raise UsageError("no public scan was held out", remedy="give scans that pretraining did not see")
    examined = examine_bundle(bundle)
    plan = examined.plan
    if plan is None:
        raise CoordinatorError(
            f"{bundle}: its plan cannot be read", remedy="lacuna compliance verify BUNDLE says why"
        )
    if copy_embedding is not None and hash_file(copy_embedding) != plan.audit.copy_embedding_sha256:
        raise CoordinatorError(f"{copy_embedding} is not the embedding that the plan names")
    generator = load_generator(bundle, device=device)
    embedding = load_copy_embedding(copy_embedding, n_labels=len(generator.metadata.labels))
    evaluation = _Evaluation(bundle, generator, embedding, public, plan.audit.copy_distance, count, seed)
    copies = None
    if examined.evidence is not None and examined.report.passed:
        copies = next((f for f in audit_figures(examined.evidence) if f.name == "copies"), None)
    conditions = tuple(evaluation.condition(name, progress) for name in generator.metadata.conditions)
    segmenters: tuple[SegmenterScore, ...] = ()
    if segmenter_steps:
        segmenters = segmenter_scores(
            evaluation.all_samples(),
            further=public.further,
            held_out=public.held_out,
            labels=generator.metadata.labels,
            schedule=replace(default_segmenter_schedule(seed=seed), steps=segmenter_steps),
            device=device,
            progress=progress,
        )
    return ReleaseQuality(
        study_id=plan.study_id,
        bundle_sha256=examined.report.bundle_sha256,
        verified=examined.report.passed,
        metadata=generator.metadata,
        epsilon=plan.privacy.epsilon,
        delta=plan.privacy.delta,
        seed=seed,
        public=public,
        copies=copies,
        copy_distance=plan.audit.copy_distance,
        conditions=conditions,
        segmenters=segmenters,
    )


class _Evaluation:
    """What is the same for all conditions."""

    def __init__(
        self,
        bundle: Path,
        generator: Generator,
        embedding: CopyEmbedding | None,
        public: PublicScans,
        copy_distance: float,
        count: int,
        seed: int,
    ) -> None:
        self._generator, self._embedding, self._public = generator, embedding, public
        self._copy_distance, self._count, self._seed = copy_distance, count, seed
        self._metadata = generator.metadata
        self._ranges = read_bundle_ranges(bundle, generator.metadata)
        self._segmenter = load_bundle_segmenter(
            bundle, generator.metadata, self._ranges, device=generator.device
        )
        everybody = [*public.held_out, *public.further]
        self._everybody = stacked(everybody)
        self._seen_by_autoencoder = None if embedding is None else self._decoded(self._everybody)
        self._embedded_NE = (
            None if self._seen_by_autoencoder is None else self._embed(self._seen_by_autoencoder)
        )
        self._conditions = np.array([volume.condition for volume in everybody])
        self._held_out = np.arange(len(everybody)) < len(public.held_out)
        self._planes = None if self._seen_by_autoencoder is None else self._slices(self._seen_by_autoencoder)
        self._sampled: list[ImagesAndMasks] = []

    def all_samples(self) -> ImagesAndMasks:
        """The plausible samples of all conditions measured so far."""
        images, masks = zip(*self._sampled, strict=True)
        return np.concatenate(images), np.concatenate(masks)

    def condition(self, name: str, progress: Progress | None) -> ConditionQuality:
        images, masks, indices, tried, rejected = self._samples(name, progress)
        self._sampled.append((images, masks))
        real = self._held_out & (self._conditions == name)
        other = ~self._held_out & (self._conditions == name)
        enough = int(real.sum()) >= MIN_REAL
        real_scans, other_scans = self._rows(real), self._rows(other)
        distances: list[SetDistance] = []
        embedded_NE = self._embed((images, masks)) if self._embedding is not None else None
        if enough:
            distances = self._distances((images, masks), real_scans, other_scans)
            if self._planes is not None:
                distances += [
                    set_distance(
                        f"Frechet distance of {plane} slices", "", frechet_distance,
                        real=public_NSC[real], synthetic=slices_NSC, other_real=public_NSC[other],
                    )
                    for plane, public_NSC, slices_NSC in zip(
                        PLANES, self._planes, self._slices((images, masks)), strict=True
                    )
                ]  # fmt: skip
            if embedded_NE is not None and self._embedded_NE is not None:
                distances.append(
                    set_distance(
                        "kernel distance (KID, squared MMD)", "", kernel_distance,
                        real=self._embedded_NE[real], synthetic=embedded_NE,
                        other_real=self._embedded_NE[other],
                    )
                )  # fmt: skip
        apart_M, whom_M = self._nearest(embedded_NE)
        order = np.argsort(apart_M, kind="stable")[:3]
        return ConditionQuality(
            condition=name,
            tried=tried,
            rejected=len(rejected),
            faults=tuple(Counter(fault.figure for found in rejected for fault in found).most_common(5)),
            n_real=int(real.sum()),
            n_synthetic=len(indices),
            distances=tuple(distances),
            diversity=diversity(images, real_scans[0] if enough else None),
            volumes={
                label: (
                    self._volumes(real_scans[1], value).tolist(),
                    self._volumes(masks, value).tolist(),
                )
                for value, label in enumerate(self._metadata.labels, start=1)
            },
            nearest=tuple(
                NearestPair(
                    sample=indices[i],
                    distance=float(apart_M[i]),
                    synthetic=(images[i], masks[i]),
                    public=(self._everybody[0][whom_M[i]], self._everybody[1][whom_M[i]]),
                )
                for i in order
            ),
            nearer_than_copy=int((apart_M < self._copy_distance).sum()) if embedded_NE is not None else None,
            shown=(images[:4], masks[:4]),
            real_shown=(real_scans[0][:4], real_scans[1][:4]) if real.any() else None,
        )

    def _samples(
        self, name: str, progress: Progress | None
    ) -> tuple[NDArray[np.float32], NDArray[np.uint8], list[int], int, list[list[Fault]]]:
        """Plausible samples with their indices, how many were tried, and the faults of the others.

        Raises:
            CoordinatorError: hardly any sample is plausible.
        """
        table = ConditionTable(self._metadata.conditions, self._metadata.covariates)
        images: list[NDArray[np.float32]] = []
        masks: list[NDArray[np.uint8]] = []
        indices: list[int] = []
        rejected: list[list[Fault]] = []
        tried = 0
        while len(images) < self._count and tried < MAX_TRIED * self._count:
            size = min(BATCH_SIZE, self._count - len(images))
            image_BDHW, mask_BDHW = self._generator.sample(
                class_index=table.class_index(name, {}), first_index=tried, count=size, seed=self._seed,
                steps=self._metadata.sampling_steps, guidance_scale=self._metadata.guidance_scale,
            )  # fmt: skip
            faults_B = batch_faults(
                image_BDHW, mask_BDHW, self._ranges, self._segmenter, spacing_mm=self._metadata.spacing_mm
            )
            for row, found in enumerate(faults_B):
                if found:
                    rejected.append(found)
                    continue
                images.append(image_BDHW[row])
                masks.append(mask_BDHW[row])
                indices.append(tried + row)
            tried += size
            if progress is not None:
                progress(f"sampling {name}", len(images), self._count)
        if len(indices) < 2:
            raise CoordinatorError(
                f"{name}: {len(indices)} of {tried} samples are plausible, too few to measure",
                remedy="this generator is not usable for this condition",
            )
        return np.stack(images), np.stack(masks), indices, tried, rejected

    def _distances(
        self, synthetic: ImagesAndMasks, real: ImagesAndMasks, other: ImagesAndMasks
    ) -> list[SetDistance]:
        found = []
        for value, label in enumerate(self._metadata.labels, start=1):
            found.append(
                set_distance(
                    f"volume of {label}", "mm3", volume_distance,
                    real=self._volumes(real[1], value), synthetic=self._volumes(synthetic[1], value),
                    other_real=self._volumes(other[1], value),
                )
            )  # fmt: skip
        for value, label in enumerate(("the whole image", *self._metadata.labels)):
            found.append(
                set_distance(
                    f"intensities of {label}", "of the range", histogram_distance,
                    real=_histograms(real, value), synthetic=_histograms(synthetic, value),
                    other_real=_histograms(other, value),
                )
            )  # fmt: skip
        return found

    def _volumes(self, mask_NDHW: NDArray[np.uint8], value: int) -> FloatArray:
        voxel_mm3 = float(np.prod(self._metadata.spacing_mm))
        volumes: FloatArray = (mask_NDHW == value).sum(axis=(1, 2, 3)) * voxel_mm3
        return volumes

    def _rows(self, chosen: NDArray[np.bool_]) -> ImagesAndMasks:
        return self._everybody[0][chosen], self._everybody[1][chosen]

    def _nearest(self, embedded_NE: FloatArray | None) -> tuple[FloatArray, NDArray[np.int64]]:
        """Distance and row of the nearest public scan, over its eight mirrored views, of each sample."""
        if embedded_NE is None or self._seen_by_autoencoder is None:
            return np.zeros(0), np.zeros(0, dtype=np.int64)
        views = self._embed(self._seen_by_autoencoder, views=True)
        apart = np.linalg.norm(embedded_NE[:, None] - views[None], axis=2)
        apart = apart.reshape(len(embedded_NE), -1, 8).min(axis=2)
        return apart.min(axis=1), apart.argmin(axis=1)

    @torch.no_grad()
    def _embed(self, scans: ImagesAndMasks, *, views: bool = False) -> FloatArray:
        assert self._embedding is not None
        pieces = []
        for i in range(0, len(scans[0]), BATCH_SIZE):
            image, mask = (torch.from_numpy(array[i : i + BATCH_SIZE]) for array in scans)
            shown = (image[:, None], mask.long())
            pieces.append(self._embedding(*(mirrored(*shown) if views else shown)))
        return torch.cat(pieces).double().numpy()

    @torch.no_grad()
    def _slices(self, scans: ImagesAndMasks) -> list[FloatArray]:
        """The embedding's features of slices, for each of :data:`PLANES`: [N, slices, channels]."""
        assert self._embedding is not None
        pieces = []
        for i in range(0, len(scans[0]), BATCH_SIZE):
            image, mask = (torch.from_numpy(array[i : i + BATCH_SIZE]) for array in scans)
            pieces.append(self._embedding.plane_features(image[:, None], mask.long()))
        return [torch.cat(plane).double().numpy() for plane in zip(*pieces, strict=True)]

    def _decoded(self, scans: ImagesAndMasks) -> ImagesAndMasks:
        """Scans as the autoencoder gives them back: like samples, and like what the embedding trained on."""
        autoencoder = self._generator.autoencoder
        image, mask = (torch.from_numpy(array) for array in scans)
        shown, drawn = decode_batches(autoencoder, encode_batches(autoencoder, image[:, None], mask))
        return shown[:, 0].numpy(), drawn.numpy().astype(np.uint8)


def _histograms(scans: ImagesAndMasks, value: int) -> FloatArray:
    """Histograms of intensity inside a label; of the whole image for value 0. [N, bins]."""
    rows = [
        intensity_histogram(image if value == 0 else image[mask == value])
        for image, mask in zip(*scans, strict=True)
    ]
    return np.stack(rows) if rows else np.zeros((0, 1))
