"""One job: train (or take) a generator, make scans, teach segmenter or classifier, test on real scans.

Figures are kept in ``KEY.json``; networks are made once for all jobs of the same public part.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy.audit.copies import CopySpace, calibrate_copy_distance, nearest_distances
from privacy.dp.patients import PatientScans
from server.pretrain import PretrainingRecipe, PublicVolume, default_recipe, held_out_patients, pretrain
from server.public_calibration import public_patients
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.conditioning import ConditionTable
from shared.model.copy_embedding import load_copy_embedding
from shared.model.denoiser import Denoiser, assign, build_denoiser, parameter_subset
from shared.model.presets import PRESETS, preset_named
from shared.model.sampling import generate_volumes, sample_latents
from shared.model.shipped import PretrainedPair, read_pair
from shared.model.training import encode_batches, held_out_loss
from shared.model.weights import load_weights
from tests.benchmarks.utility.cohorts import Cohort, cohort_named
from tests.benchmarks.utility.downstream import Scans, train_and_test
from tests.benchmarks.utility.settings import Job, Public

SAMPLES_SEED = 5


@dataclass(kw_only=True)
class Bench:
    """Cohort, public networks and device of one job."""

    public: Public
    data: Path
    cache: Path
    device: str

    @cached_property
    def cohort(self) -> Cohort:
        return cohort_named(self.public.cohort, self.data)

    @cached_property
    def preset(self) -> str:
        """Name of the preset; a variant enters the table for this process."""
        base = self.cohort.preset
        channels = self.public.latent_channels
        if channels is None:
            return base
        name = f"{base}-{channels}"
        PRESETS[name] = replace(preset_named(base), name=name, latent_channels=channels)
        return name

    @property
    def folder(self) -> Path:
        return self.cache / self.public.key

    def recipe(self) -> PretrainingRecipe:
        own = default_recipe(preset_named(self.cohort.preset), seed=self.public.seed)
        if self.cohort.name == "adrenal":
            own = replace(own, held_out_share=0.15)
        return replace(
            own,
            autoencoder=replace(own.autoencoder, steps=self.public.autoencoder_steps, save_every=10**6),
            prior=replace(own.prior, steps=self.public.prior_steps, save_every=10**6),
        )

    def pretrain(self) -> None:
        """Both public networks, on public scans alone."""
        pretrain(
            preset=preset_named(self.preset), volumes=self.cohort.public, conditions=self.cohort.conditions,
            labels=self.cohort.labels, out_dir=self.folder, recipe=self.recipe(),
            data_description=f"public scans of {self.cohort.name}", device=self.device,
        )  # fmt: skip

    @cached_property
    def pair(self) -> PretrainedPair:
        return read_pair(self.folder)

    @cached_property
    def autoencoder(self) -> LatentAutoencoder:
        network = build_autoencoder(preset_named(self.preset), n_labels=len(self.cohort.labels))
        load_weights(network, self.pair.autoencoder_path)
        return network.requires_grad_(False).eval().to(self.device)

    @cached_property
    def copy_space(self) -> CopySpace:
        """Where nearness is measured, as in the audit."""
        embedding = load_copy_embedding(self.pair.copy_embedding_path, n_labels=len(self.cohort.labels))
        return CopySpace(
            autoencoder=self.autoencoder,
            embedding=None if embedding is None else embedding.to(self.device),
        )

    def denoiser(self, trainable: str = "all", weights: NDArray[np.float32] | None = None) -> Denoiser:
        """The prior; with ``weights``, as a study left it."""
        network = build_denoiser(preset_named(self.preset), n_conditions=len(self.cohort.conditions))
        load_weights(network, self.pair.prior_path)
        if weights is not None:
            assign(parameter_subset(network, trainable), weights)
        return network.requires_grad_(False).eval().to(self.device)

    @cached_property
    def texture(self) -> Tensor:
        """What the autoencoder loses of public scans, [M, 1, D, H, W]."""
        image, _ = stack(self.cohort.public)
        return image - self.reconstructed(self.cohort.public)[0]

    @torch.no_grad()
    def reconstructed(self, volumes: list[PublicVolume]) -> tuple[Tensor, Tensor]:
        """Images and masks as the autoencoder gives them back."""
        image, mask = stack(volumes)
        z = encode_batches(self.autoencoder, image, mask)
        decoded = [self.autoencoder.decode(part.to(self.device)) for part in z.split(32)]
        return torch.cat([i.cpu() for i, _ in decoded]), torch.cat([m.cpu() for _, m in decoded])

    def targets(self, volumes: list[PublicVolume]) -> Tensor:
        return torch.tensor([int(volume.condition == self.cohort.rare) for volume in volumes])

    def real(self, volumes: list[PublicVolume]) -> Scans:
        image, mask = stack(volumes)
        return Scans(image_N1DHW=image, mask_NDHW=mask, target_N=self.targets(volumes))

    def unreal(self, image: Tensor, mask: Tensor, target: Tensor) -> Scans:
        texture = self.texture if self.cohort.task == "segmentation" else None
        return Scans(image_N1DHW=image, mask_NDHW=mask, target_N=target, texture_M1DHW=texture)

    def score(self, sources: list[Scans], *, steps: int, repeats: int) -> list[dict[str, float]]:
        test = self.real(self.cohort.test)
        return [
            train_and_test(
                self.cohort.task, sources, test, self.cohort.labels, steps=steps, seed=seed,
                device=self.device,
            )
            for seed in range(repeats)
        ]  # fmt: skip

    def latents(self, volumes: list[PublicVolume]) -> tuple[Tensor, Tensor]:
        """Latents and conditions."""
        image, mask = stack(volumes)
        rows = [self.cohort.conditions.index(volume.condition) for volume in volumes]
        return encode_batches(self.autoencoder, image, mask), torch.tensor(rows)

    @cached_property
    def unseen(self) -> list[PublicVolume]:
        """Public scans that no public network was trained on."""
        patients = [volume.patient_id for volume in self.cohort.public]
        chosen = set(held_out_patients(patients, self.recipe().held_out_share))
        return [volume for volume in self.cohort.public if volume.patient_id in chosen]


def stack(volumes: list[PublicVolume]) -> tuple[Tensor, Tensor]:
    """image_N1DHW, mask_NDHW."""
    image = torch.from_numpy(np.stack([v.image for v in volumes]).astype(np.float32))[:, None]
    return image, torch.from_numpy(np.stack([v.mask for v in volumes]).astype(np.int64))


def run_job(job: Job, *, data: Path, cache: Path, device: str) -> dict[str, Any]:
    """Figures of a job, kept in the cache."""
    started = time.monotonic()
    bench = Bench(public=job.public, data=data, cache=cache, device=device)
    values: dict[str, Any] = {}
    if job.kind == "real":
        _real(bench, job, values)
    elif job.kind == "ceiling":
        image, mask = bench.reconstructed(bench.cohort.members)
        scans = bench.unreal(image, mask, bench.targets(bench.cohort.members))
        values["synthetic"] = bench.score([scans], steps=job.task_steps, repeats=job.repeats)
        plain = replace(scans, texture_M1DHW=None)
        values["without_texture"] = bench.score([plain], steps=job.task_steps, repeats=job.repeats)
        values["pretraining"] = {
            name: bench.pair.recipe[name] for name in ("autoencoder_held_out", "prior_held_out_loss")
        }
    else:
        denoiser = bench.denoiser()
        if job.study is not None:
            from tests.benchmarks.utility.consortium import train_together

            weights, values["study"] = train_together(
                bench.cohort, job.study, bench.pair, bench.preset, device=device
            )
            values["study_seconds"] = round(time.monotonic() - started, 1)
            denoiser = bench.denoiser(job.study.trainable, weights)
        _generator(bench, job, denoiser, values)
    values["seconds"] = round(time.monotonic() - started, 1)
    document = {"job": asdict(job), "key": job.key, "device": device, "values": values}
    part = cache / f"{job.key}.part"
    part.write_text(json.dumps(document, indent=1))
    part.replace(cache / f"{job.key}.json")
    return document


def _real(bench: Bench, job: Job, values: dict[str, Any]) -> None:
    cohort = bench.cohort
    everybody = bench.real(cohort.members)
    values["patients"] = [len({v.patient_id for v in hospital}) for hospital in cohort.hospitals]
    values["scans"] = [len(hospital) for hospital in cohort.hospitals]
    values["everybody"] = bench.score([everybody], steps=job.task_steps, repeats=job.repeats)
    values["public"] = bench.score([bench.real(cohort.public)], steps=job.task_steps, repeats=job.repeats)
    values["alone"] = [
        bench.score([bench.real(hospital)], steps=job.task_steps, repeats=job.repeats)
        for hospital in cohort.hospitals
    ]


def _generator(bench: Bench, job: Job, denoiser: Denoiser, values: dict[str, Any]) -> None:
    cohort = bench.cohort
    values["held_out_loss"] = held_out_loss(denoiser, *bench.latents(cohort.test))
    values["public_loss"] = held_out_loss(denoiser, *bench.latents(bench.unseen))
    per_condition = job.samples // len(cohort.conditions)
    images, masks, targets = [], [], []
    for row, condition in enumerate(cohort.conditions):
        for image, mask in generate_volumes(
            bench.autoencoder, denoiser, condition=row, count=per_condition, seed=SAMPLES_SEED + row,
            grid_shape=cohort.grid_shape, guidance_scale=1.0,
        ):  # fmt: skip
            images.append(image)
            masks.append(mask.long())
            targets.append(int(condition == cohort.rare))
    image, mask = torch.stack(images)[:, None], torch.stack(masks)
    scans = bench.unreal(image, mask, torch.tensor(targets))
    values["label_mm3"] = {
        condition: {
            label: [float((mask[r] == k).sum()) * float(np.prod(cohort.spacing_mm)) for r in rows]
            for k, label in enumerate(cohort.labels, start=1)
        }
        for condition, rows in (
            (c, [r for r, t in enumerate(targets) if t == int(c == cohort.rare)]) for c in cohort.conditions
        )
    }
    steps, repeats = job.task_steps, job.repeats
    values["synthetic"] = bench.score([scans], steps=steps, repeats=repeats)
    values["smallest_and_synthetic"] = bench.score(
        [bench.real(cohort.hospitals[-1]), scans], steps=steps, repeats=repeats
    )
    values["all_and_synthetic"] = bench.score(
        [bench.real(cohort.members), scans], steps=steps, repeats=repeats
    )
    values["copies"] = copy_figures(bench, denoiser, count=job.copy_samples)
    picture = bench.cache / f"{job.key}-samples.npz"
    keep = [r for t in (0, 1) for r in [row for row, x in enumerate(targets) if x == t][:4]]
    bright = (image[keep, 0].numpy() * 255).astype(np.uint8)
    np.savez_compressed(picture, image=bright, mask=mask[keep].byte().numpy())


def copy_figures(bench: Bench, denoiser: Denoiser, *, count: int) -> dict[str, Any]:
    """Members and test patients with a sample nearer than the public threshold, as the audit counts them."""
    cohort, preset = bench.cohort, preset_named(bench.preset)
    shape = preset.latent_shape(cohort.grid_shape)
    rows = torch.arange(count) % len(cohort.conditions)
    latents = [
        torch.cat(
            [
                sample_latents(
                    network, part, steps=preset.sampling_steps, guidance_scale=1.0, seed=SAMPLES_SEED + 100,
                    latent_shape=shape, first_index=64 * place,
                )
                for place, part in enumerate(rows.split(64))
            ]
        )
        for network in (bench.denoiser(), denoiser)
    ]  # fmt: skip

    def patients(volumes: list[PublicVolume]) -> list[PatientScans]:
        return public_patients(bench.autoencoder, volumes, ConditionTable(cohort.conditions))

    calibrated = calibrate_copy_distance(
        bench.copy_space, patients(bench.unseen), unrelated_NCDHW=latents[0], device=bench.device
    )
    embedded = bench.copy_space.of_samples(latents[1])
    counts = {}
    for name, group in (("members", cohort.members), ("test", cohort.test)):
        distance = nearest_distances(bench.copy_space, patients(group), embedded, device=bench.device)
        counts[name] = [int((distance < calibrated.distance).sum()), len(distance)]
    return {"threshold": calibrated.distance, **counts}
