"""One job: train (or take) a generator, make scans, teach segmenter or classifier, test on real scans.

Figures are kept in ``KEY.json``; networks are made once for all jobs of the same public part.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from privacy.audit.copies import CopySpace, calibrate_copy_distance
from privacy.dp.patients import PatientScans
from server.pretrain import PretrainingRecipe, PublicVolume, default_recipe, held_out_patients, pretrain
from server.public_calibration import public_patients
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.conditioning import ConditionTable
from shared.model.copy_embedding import load_copy_embedding
from shared.model.denoiser import Denoiser, assign_trained, build_denoiser, parameter_subset
from shared.model.presets import PRESETS, preset_named
from shared.model.sampling import initial_noise, sample_latents
from shared.model.shipped import PretrainedPair, read_pair
from shared.model.training import encode_batches, held_out_loss
from shared.model.weights import load_weights
from tests.benchmarks.utility.cohorts import Cohort, cohort_named
from tests.benchmarks.utility.downstream import Scans, train_and_test
from tests.benchmarks.utility.settings import Job, Public, Study

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
        return cohort_named(self.public.cohort, self.data, coarse=self.public.coarse)

    @cached_property
    def preset(self) -> str:
        """Name of the preset; a variant enters the table for this process."""
        base = preset_named(self.public.preset or self.cohort.preset)
        channels = self.public.latent_channels
        if channels is None:
            return base.name
        name = f"{base.name}-{channels}"
        PRESETS[name] = replace(base, name=name, latent_channels=channels)
        return name

    @property
    def folder(self) -> Path:
        return self.cache / self.public.key

    def recipe(self) -> PretrainingRecipe:
        own = default_recipe(preset_named(self.cohort.preset), seed=self.public.seed)
        if self.cohort.name == "adrenal":
            own = replace(own, held_out_share=0.15)
        public = self.public
        return replace(
            own,
            autoencoder=replace(
                own.autoencoder, steps=public.autoencoder_steps, bfloat16=public.bfloat16,
                batch_size=public.batch_size or own.autoencoder.batch_size,
            ),
            prior=replace(own.prior, steps=public.prior_steps),
            copy_embedding=replace(
                own.copy_embedding, steps=public.embedding_steps or own.copy_embedding.steps
            ),
            segmenter=None,
        )  # fmt: skip

    def pretrain(self) -> None:
        """The public networks, on public scans alone."""
        used = time.process_time()
        pretrain(
            preset=preset_named(self.preset), volumes=self.cohort.public, conditions=self.cohort.conditions,
            labels=self.cohort.labels, out_dir=self.folder, recipe=self.recipe(),
            data_description=f"public scans of {self.cohort.name}", device=self.device,
            spacing_mm=self.cohort.spacing_mm,
        )  # fmt: skip
        (self.folder / "cpu_seconds").write_text(f"{time.process_time() - used:.0f}\n")

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
            assign_trained(network, parameter_subset(network, trainable), weights)
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

    def samples(
        self, denoiser: Denoiser, conditions: Tensor, *, seed: int, guidance: float, same_noise: bool = False
    ) -> Tensor:
        """Latents of the given conditions."""
        preset = preset_named(self.preset)
        shape = preset.latent_shape(self.cohort.grid_shape)
        index = torch.arange(len(conditions))
        if same_noise:
            index = torch.cat(
                [torch.arange(int(n)) for n in torch.unique_consecutive(conditions, return_counts=True)[1]]
            )
        noise = initial_noise(seed=seed, first_index=0, count=int(index.max()) + 1, shape=shape)[index]
        parts = zip(conditions.split(32), noise.split(32), strict=True)
        return torch.cat(
            [
                sample_latents(
                    denoiser, some, steps=preset.sampling_steps, guidance_scale=guidance, seed=seed,
                    latent_shape=shape, noise_BCDHW=from_noise,
                ).cpu()
                for some, from_noise in parts
            ]
        )  # fmt: skip

    def real(self, volumes: list[PublicVolume]) -> Scans:
        image, mask = stack(volumes)
        return Scans(image_N1DHW=image, mask_NDHW=mask, target_N=self.targets(volumes))

    def unreal(self, image: Tensor, mask: Tensor, target: Tensor) -> Scans:
        texture = self.texture if self.cohort.task == "segmentation" else None
        return Scans(image_N1DHW=image, mask_NDHW=mask, target_N=target, texture_M1DHW=texture)

    def score(self, sources: list[Scans], job: Job) -> list[dict[str, float]]:
        test = self.real(self.cohort.test)
        return [
            train_and_test(
                self.cohort.task, sources, test, self.cohort.labels, how=job.task, seed=seed,
                device=self.device,
            )
            for seed in range(100 * job.repeat, 100 * job.repeat + job.repeats)
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


def run_job(job: Job, bench: Bench) -> dict[str, Any]:
    """Figures of a job, kept in the cache."""
    started, used, cache, device = time.monotonic(), time.process_time(), bench.cache, bench.device
    values: dict[str, Any] = {}
    if job.kind == "real":
        _real(bench, job, values)
    elif job.kind == "ceiling":
        image, mask = bench.reconstructed(bench.cohort.members)
        scans = bench.unreal(image, mask, bench.targets(bench.cohort.members))
        values["synthetic"] = bench.score([scans], job)
        plain = replace(scans, texture_M1DHW=None)
        if scans.texture_M1DHW is not None:
            values["without_texture"] = bench.score([plain], job)
        values["pretraining"] = {
            name: bench.pair.recipe[name] for name in ("autoencoder_held_out", "prior_held_out_loss")
        }
    else:
        denoiser = bench.denoiser()
        if job.study is not None:
            kept = cache / f"{job.weights_key}.npz"
            if not kept.exists():
                _train(bench, job.study, kept)
            with np.load(kept) as file:
                values["study"] = json.loads(str(file["planned"]))
                denoiser = bench.denoiser(job.study.trainable, file["weights"])
            values["study_seconds"] = round(time.monotonic() - started, 1)
        _generator(bench, job, denoiser, values)
    values["seconds"] = round(time.monotonic() - started, 1)
    values["cpu_seconds"] = round(time.process_time() - used, 1)
    document = {"job": asdict(job), "key": job.key, "device": device, "values": values}
    part = cache / f"{job.key}.part"
    part.write_text(json.dumps(document, indent=1))
    part.replace(cache / f"{job.key}.json")
    return document


def _train(bench: Bench, study: Study, path: Path) -> None:
    """A study's averaged weights, and what it was planned with."""
    from tests.benchmarks.utility.consortium import train_together

    weights, planned = train_together(bench.cohort, study, bench.pair, bench.preset, device=bench.device)
    part = path.with_name(f"{os.getpid()}-{path.name}")
    np.savez(part, weights=weights, planned=np.array(json.dumps(planned)))
    part.replace(path)


def _real(bench: Bench, job: Job, values: dict[str, Any]) -> None:
    cohort = bench.cohort
    everybody = bench.real(cohort.members)
    values["patients"] = [len({v.patient_id for v in hospital}) for hospital in cohort.hospitals]
    values["scans"] = [len(hospital) for hospital in cohort.hospitals]
    values["everybody"] = bench.score([everybody], job)
    if len({volume.condition for volume in cohort.public}) > 1 or cohort.task == "segmentation":
        values["public"] = bench.score([bench.real(cohort.public)], job)
    values["alone"] = [bench.score([bench.real(hospital)], job) for hospital in cohort.hospitals]


def _generator(bench: Bench, job: Job, denoiser: Denoiser, values: dict[str, Any]) -> None:
    cohort = bench.cohort
    values["held_out_loss"] = held_out_loss(denoiser, *bench.latents(cohort.test))
    values["public_loss"] = held_out_loss(denoiser, *bench.latents(bench.unseen))
    count = job.samples // len(cohort.conditions)
    conditions = torch.arange(len(cohort.conditions)).repeat_interleave(count)
    seed = SAMPLES_SEED + 1000 * job.repeat
    z = bench.samples(denoiser, conditions, seed=seed, guidance=job.guidance, same_noise=job.same_noise)
    targets = [int(cohort.conditions[row] == cohort.rare) for row in conditions]
    with torch.no_grad():
        decoded = [bench.autoencoder.decode(part.to(bench.device)) for part in z.split(32)]
    image, mask = (torch.cat([pair[k].cpu() for pair in decoded]) for k in (0, 1))
    mask = mask.long()
    scans = bench.unreal(image, mask, torch.tensor(targets))
    members = bench.real(cohort.members)
    values["label_mm3"] = label_volumes(cohort, mask, torch.tensor(targets))
    values["members_label_mm3"] = label_volumes(cohort, members.mask_NDHW, members.target_N)
    values["synthetic"] = bench.score([scans], job)
    for name, volumes in (("smallest", cohort.hospitals[-1]), ("all", cohort.members)):
        if name in job.with_real:
            values[f"{name}_and_synthetic"] = bench.score([bench.real(volumes), scans], job)
    if job.copy_samples:
        conditions = torch.arange(job.copy_samples) % len(cohort.conditions)
        z = bench.samples(denoiser, conditions, seed=seed + 100, guidance=job.guidance)
    values["copies"] = copy_figures(bench, conditions, z)
    picture = bench.cache / f"{job.key}-samples.npz"
    keep = [r for t in (0, 1) for r in [row for row, x in enumerate(targets) if x == t][:4]]
    bright = (image[keep, 0].numpy() * 255).astype(np.uint8)
    np.savez_compressed(picture, image=bright, mask=mask[keep].byte().numpy())


def label_volumes(cohort: Cohort, mask_NDHW: Tensor, target_N: Tensor) -> dict[str, dict[str, float]]:
    """Mean volume of each label in mm3, of the rare condition and of the others."""
    voxel = float(np.prod(cohort.spacing_mm))
    return {
        name: {
            label: float((mask_NDHW[target_N == target] == k).float().sum(dim=(1, 2, 3)).mean()) * voxel
            for k, label in enumerate(cohort.labels, start=1)
        }
        for name, target in (("rare", 1), ("others", 0))
    }


def copy_figures(bench: Bench, conditions: Tensor, z: Tensor) -> dict[str, Any]:
    """Members and test patients with a sample nearer than the public threshold, as the audit counts them.

    The threshold comes from as many samples of the prior, of the same conditions.
    """
    cohort = bench.cohort

    def patients(volumes: list[PublicVolume]) -> list[PatientScans]:
        return public_patients(bench.autoencoder, volumes, ConditionTable(cohort.conditions))

    kept = bench.folder / f"copy-distance-{len(z)}.json"
    if not kept.exists():
        unrelated = bench.samples(bench.denoiser(), conditions, seed=SAMPLES_SEED + 200, guidance=1.0)
        calibrated = calibrate_copy_distance(
            bench.copy_space, patients(bench.unseen), unrelated_NCDHW=unrelated, device=bench.device
        )
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps({"distance": calibrated.distance}))
        part.replace(kept)
    threshold = json.loads(kept.read_text())["distance"]
    samples = bench.copy_space.of_samples(z.to(bench.device))
    counts = {}
    for name, group in (("members", cohort.members), ("test", cohort.test)):
        seen = bench.folder / f"embedded-{name}.npz"
        if not seen.exists():
            own = {
                str(patient.patient_key): bench.copy_space.of_patient(
                    patient.latents_SCDHW.to(bench.device)
                ).numpy()
                for patient in patients(group)
            }
            part = seen.with_name(f"{os.getpid()}-{seen.name}")
            np.savez(part, **own)
            part.replace(seen)
        with np.load(seen) as file:
            nearest = [
                float(bench.copy_space.distances(torch.from_numpy(file[key]), samples).min())
                for key in file.files
            ]
        counts[name] = [sum(distance < threshold for distance in nearest), len(nearest)]
    return {"threshold": threshold, **counts}
