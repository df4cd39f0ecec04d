"""Denoisers fine-tuned without any protection, attacked after increasing numbers of steps.

    python -m tests.benchmarks.leaks.training --scans PACKED.npz --out DIR --device cuda

For each set of scans: an autoencoder and a prior on the public units (preset ``tiny``, the code of the
project), then for each repetition a copy of the prior trained on the latents of n members by plain Adam, no
clipping, no noise, no aggregation. After each number of :data:`STEPS` the audit's attacks are run on the
members and on units that no network has seen: the primary attack each time, the secondary ones as the
project's ``usual_attacks`` defines them at the steps of :data:`SECONDARY_STEPS`. (The audit takes each
patient as a batch of its own; here many go into one batch, which changes the last digits and saves hours.)

``--gradients`` makes the per-patient gradient norm beside the primary attack, which the large runs leave
out: one draw, public networks that train for less, about half an hour on one core of a CPU.

Written to DIR, one file for each study and repetition: ``STUDY-REPETITION.npz`` with ``steps_K``,
``member_U`` (bool) and one array [K, U] for each attack, higher speaking for membership, NaN where it was not
run; ``public_loss_U`` on the prior; ``planted_auc``, the planted-leak control on the last network;
``chosen_by_loss``, the prior's loss on public units that it was not trained on.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from privacy.audit.attacks import usual_attacks
from privacy.audit.controls import PLANTED, planted_leak
from privacy.audit.gradient_norm import gradient_norm
from privacy.audit.membership import AttackNoise
from privacy.audit.trajectory_attacks import TRAJECTORY_ATTACKS
from shared.canonical import digest
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.denoiser import Denoiser, build_denoiser
from shared.model.diffusion import diffusion_of, drop_condition, timesteps_from_normal
from shared.model.presets import preset_named
from shared.model.sampling import sample_latents
from shared.model.training import Augmentation, AutoencoderLossWeights, augment, reconstruction_loss
from shared.study_plan import SecondaryAttackClause
from tests.benchmarks.leaks.volumes import PackedScans, read_packed

PRESET = "tiny"
per_sample_loss = diffusion_of(preset_named(PRESET)).per_sample_loss
STEPS = (0, 5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 150, 200, 300)
SECONDARY_STEPS = (0, 10, 20, 40, 80, 150, 300)
GRADIENT_UNITS = 100
"""Of each group: the gradient norm takes a backward pass for each unit, so it is run last and on a part."""

TIMESTEPS = (0.2, 0.4, 0.6, 0.8)
DRAWS_PER_TIMESTEP = 2
LEARNING_RATE = 3e-4
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class LeakStudy:
    """One row of the benchmark.

    Attributes:
        scans: Name of the packed set.
        members: Units trained on.
        pool: Units of part 0 that members are drawn from; the others of part 0 are public. Where every unit
            is of part 0 (hippocampus), the pool's other half are the non-members.
        repetitions: Draws of members from the pool.
    """

    scans: str
    members: int
    pool: int
    repetitions: int


STUDIES = {
    "hippocampus-40": LeakStudy(scans="hippocampus", members=40, pool=80, repetitions=8),
    "adrenal-100": LeakStudy(scans="adrenal", members=100, pool=400, repetitions=12),
    "adrenal-200": LeakStudy(scans="adrenal", members=200, pool=400, repetitions=6),
}
POOL = {"hippocampus": 80, "adrenal": 400}
PRIOR_HELD_OUT = {"hippocampus": 10, "adrenal": 120}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long the public networks train; ``steps`` of the attacked ones.

    Attributes:
        gradient_steps: Where the gradient norm is taken as well, in the first ``most_repetitions``.
        studies: Names of :data:`STUDIES`.
    """

    autoencoder_steps: int = 900
    prior_steps: int = 1000
    prior_copies: int = 8
    steps: tuple[int, ...] = STEPS
    gradient_steps: tuple[int, ...] = ()
    studies: tuple[str, ...] = tuple(STUDIES)
    most_repetitions: int = 100
    most_non_members: int = 10_000
    units: int = 10_000


FINE = Effort(steps=(0, 2, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20))
"""Around the step at which an AUC of 0.7 is passed."""

GRADIENTS = Effort(
    autoencoder_steps=200, prior_steps=300, prior_copies=2, steps=(0, 60, 160, 320),
    gradient_steps=(60, 160, 320), studies=("adrenal-100",), most_repetitions=1,
    most_non_members=GRADIENT_UNITS,
)  # fmt: skip

TOY = Effort(
    autoencoder_steps=1, prior_steps=1, prior_copies=1, steps=(0, 20), gradient_steps=(20,),
    most_repetitions=1, units=2,
)  # fmt: skip


def split_units(scans: PackedScans, name: str, effort: Effort) -> dict[str, np.ndarray]:
    """Units of a set: ``pool``, ``unseen`` (part 1), ``chosen_by`` (choose the prior) and ``public``."""
    most = effort.units
    order = np.random.default_rng(2024).permutation(np.unique(scans.unit_N[scans.part_N == 0]))
    pool, rest = np.split(order, [POOL[name]])
    chosen_by, public = np.split(rest, [PRIOR_HELD_OUT[name]])
    return {
        "pool": pool[: 2 * most],
        "chosen_by": chosen_by[:most],
        "public": public[:most],
        "unseen": np.unique(scans.unit_N[scans.part_N == 1])[:most],
    }


def train_public(
    name: str, scans_path: Path, out: Path, state: Path, device: str, effort: Effort
) -> dict[str, Any]:
    """Autoencoder and prior of one set; all latents and the prior's weights go to ``state``."""
    torch.set_num_threads(1 if device == "cpu" else 4)
    _fast(device)
    started = time.monotonic()
    scans = read_packed(scans_path, name)
    units = split_units(scans, name, effort)
    image = torch.from_numpy(scans.image_NDHW).float()[:, None] / 255
    mask = torch.from_numpy(scans.mask_NDHW)
    public = torch.from_numpy(np.isin(scans.unit_N, units["public"]))
    preset = preset_named(PRESET)
    autoencoder = build_autoencoder(preset, n_labels=scans.n_labels, seed=1).to(device)
    _train_autoencoder(autoencoder, image[public], mask[public], device, effort)
    trained = time.monotonic()
    z = _encode(autoencoder, image, mask, device)
    generator = torch.Generator().manual_seed(2)
    mild = Augmentation(flip_axes=(), zoom=(0.93, 1.07), stretch=0.03, shift=0.06)
    pieces = [
        _encode(autoencoder, *augment(image[public], mask[public], mild, generator), device)
        for _ in range(effort.prior_copies)
    ]
    chosen_by = torch.from_numpy(np.isin(scans.unit_N, units["chosen_by"]))
    prior = build_denoiser(preset, n_conditions=1, seed=3).to(device)
    history = _train_prior(prior, torch.cat(pieces), z[chosen_by.to(device)], device, effort)
    state.mkdir(parents=True, exist_ok=True)
    torch.save({"z_NCDHW": z.cpu(), "prior": prior.state_dict()}, state / f"{name}.pt")
    note = {
        "set": name,
        "public_units": len(units["public"]),
        "autoencoder_seconds": round(trained - started, 1),
        "prior_seconds": round(time.monotonic() - trained, 1),
        "prior_held_out_loss": history,
        "held_out_reconstruction_l1": _reconstruction(autoencoder, image[chosen_by], mask[chosen_by], device),
    }
    (out / f"public-{name}.json").write_text(json.dumps(note, indent=1))
    return note


def attack_repetition(
    study_name: str,
    repetition: int,
    scans_path: Path,
    out: Path,
    state: Path,
    device: str,
    effort: Effort,
    deadline: float,
) -> str:
    """Fine-tune on members and attack; stops at ``deadline`` (time.time()) with the steps done so far."""
    torch.set_num_threads(1)
    _fast(device)
    if time.time() > deadline:
        return f"{study_name} {repetition}: no time left"
    study = STUDIES[study_name]
    scans = read_packed(scans_path, study.scans)
    units = split_units(scans, study.scans, effort)
    public = torch.load(state / f"{study.scans}.pt", map_location=device, weights_only=True)
    z_NCDHW = public["z_NCDHW"]
    draw = np.random.default_rng([7, repetition]).permutation(units["pool"])
    members, rest = np.split(draw, [min(study.members, effort.units)])
    non_members = (units["unseen"] if units["unseen"].size else rest)[: effort.most_non_members]
    attacked = np.concatenate([members, non_members])
    figures = Attacked.of(scans, attacked, z_NCDHW, study_name)
    prior = build_denoiser(preset_named(PRESET), n_conditions=1).to(device)
    prior.load_state_dict(public["prior"])
    prior.eval()
    candidate = copy.deepcopy(prior)
    own_z = z_NCDHW[torch.from_numpy(np.isin(scans.unit_N, members)).to(device)]
    optimizer = torch.optim.Adam(candidate.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator(device).manual_seed(1000 + repetition)
    public_loss_U = figures.loss(prior)
    rows: list[dict[str, np.ndarray]] = []
    done: list[int] = []
    kept: dict[int, Denoiser] = {}
    for step in range(effort.steps[-1] + 1):
        if step in effort.steps:
            if time.time() > deadline and done:
                break
            row = {"calibrated_loss": public_loss_U - figures.loss(candidate)}
            unknown = np.full(len(attacked), np.nan)
            for attack in usual_attacks():
                wanted = step in SECONDARY_STEPS and attack.attack in TRAJECTORY_ATTACKS
                row[attack.attack] = figures.trajectory(candidate, attack) if wanted else unknown
            if step in effort.gradient_steps:
                kept[len(done)] = copy.deepcopy(candidate)
            rows.append(row)
            done.append(step)
        _plain_step(candidate, own_z, optimizer, generator)
    groups = [np.arange(len(members)), len(members) + np.arange(len(non_members))]
    most = min(GRADIENT_UNITS, *(len(group) for group in groups))
    part = np.stack([group[:most] for group in groups], axis=1).ravel()
    for place, network in kept.items():
        rows[place]["gradient_norm"] = figures.gradient_norm(network, part, deadline)
    arrays = {name: np.stack([row[name] for row in rows]).astype(np.float32) for name in rows[0]}
    np.savez_compressed(
        out / f"{study_name}-{repetition}.npz",
        steps_K=np.array(done),
        member_U=np.isin(attacked, members),
        public_loss_U=public_loss_U.astype(np.float32),
        chosen_by_loss=Attacked.of(scans, units["chosen_by"], z_NCDHW, study_name).loss(prior),
        planted_auc=_planted(candidate, figures.noise, tuple(z_NCDHW.shape[1:]), repetition, device),
        **arrays,
    )
    return f"{study_name} {repetition}: {len(done)} checkpoints"


@dataclass(frozen=True, kw_only=True, eq=False)
class Attacked:
    """Scans of the units under attack, the audit's public noise, and which scan is whose."""

    z_SCDHW: Tensor
    unit_S: Tensor
    n_units: int
    noise: AttackNoise

    @classmethod
    def of(cls, scans: PackedScans, units: np.ndarray, z_NCDHW: Tensor, seed: str) -> Attacked:
        place = {int(unit): row for row, unit in enumerate(units)}
        own = [(n, place[int(unit)]) for n, unit in enumerate(scans.unit_N) if int(unit) in place]
        return cls(
            z_SCDHW=z_NCDHW[[n for n, _ in own]],
            unit_S=torch.tensor([row for _, row in own]),
            n_units=len(units),
            noise=AttackNoise.from_plan_digest(
                digest("tests/leaks/v1", seed.encode()),
                timesteps=TIMESTEPS,
                draws_per_timestep=DRAWS_PER_TIMESTEP,
                latent_shape=tuple(z_NCDHW.shape[1:]),
            ),
        )

    @torch.no_grad()
    def loss(self, network: Denoiser) -> np.ndarray:
        """Loss of each unit, mean over its scans, timesteps and noises: float64 [U]."""
        t_R, noise_RCDHW = self._noise_on(self.z_SCDHW.device)
        rows, figures = len(t_R), []
        for z in self.z_SCDHW.split(64):
            loss = per_sample_loss(
                network,
                z.repeat_interleave(rows, 0),
                torch.zeros(len(z) * rows, dtype=torch.int64, device=z.device),
                t_R.repeat(len(z)),
                noise_RCDHW.repeat(len(z), 1, 1, 1, 1),
            )
            figures.append(loss.double().view(-1, rows).mean(1))
        return self._per_unit(torch.cat(figures).cpu().numpy())

    @torch.no_grad()
    def trajectory(self, network: Denoiser, attack: SecondaryAttackClause) -> np.ndarray:
        """Score of one of SimA, PIA, SecMI for each unit; higher speaks for membership."""
        run = TRAJECTORY_ATTACKS[attack.attack]
        figures = [
            run(
                network,
                z,
                torch.zeros(len(z), dtype=torch.int64, device=z.device),
                attack.timesteps,
                attack.norm,
            ).double()
            for z in self.z_SCDHW.split(512)
        ]
        sign = 1.0 if attack.member_side == "high" else -1.0
        return sign * self._per_unit(torch.cat(figures).cpu().numpy())

    def gradient_norm(self, network: Denoiser, units: np.ndarray, deadline: float) -> np.ndarray:
        """Score of the gradient norm: float64 [U], NaN outside ``units`` (rows) and where time was up."""
        figures = np.full(self.n_units, np.nan)
        for unit in units:
            if time.time() > deadline:
                break
            z_SCDHW = self.z_SCDHW[(self.unit_S == int(unit)).to(self.z_SCDHW.device)]
            condition_S = torch.zeros(len(z_SCDHW), dtype=torch.int64, device=z_SCDHW.device)
            figures[unit] = -gradient_norm(
                network, z_SCDHW, condition_S, noise=self.noise, loss=per_sample_loss
            )
        return figures

    def _noise_on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        return self.noise.t_R.to(device), self.noise.noise_RCDHW.to(device)

    def _per_unit(self, value_S: np.ndarray) -> np.ndarray:
        unit_S = self.unit_S.numpy()
        return np.bincount(unit_S, value_S, self.n_units) / np.bincount(unit_S, minlength=self.n_units)


def _planted(
    candidate: Denoiser, noise: AttackNoise, latent_shape: tuple[int, ...], seed: int, device: str
) -> float:
    condition = torch.zeros(2 * PLANTED, dtype=torch.int64)
    c, d, h, w = latent_shape
    samples = sample_latents(
        candidate,
        condition,
        steps=candidate.preset.sampling_steps,
        guidance_scale=1.0,
        seed=seed,
        latent_shape=(c, d, h, w),
    )
    leak = planted_leak(
        candidate, samples, condition, loss=per_sample_loss, noise=noise, seed=seed, device=device
    )
    return leak.auc


def _plain_step(
    network: Denoiser, z_NCDHW: Tensor, optimizer: torch.optim.Optimizer, generator: torch.Generator
) -> None:
    device = z_NCDHW.device
    rows = torch.randint(len(z_NCDHW), (BATCH,), generator=generator, device=device)
    z = z_NCDHW[rows]
    t_B = timesteps_from_normal(torch.randn(BATCH, generator=generator, device=device))
    noise = torch.randn(z.shape, generator=generator, device=device)
    dropped_B = torch.rand(BATCH, generator=generator, device=device) < 0.15
    condition_B = drop_condition(
        torch.zeros(BATCH, dtype=torch.int64, device=device), dropped_B, null_index=network.null_index
    )
    optimizer.zero_grad(set_to_none=True)
    per_sample_loss(network, z, condition_B, t_B, noise).mean().backward()
    optimizer.step()


def _train_autoencoder(
    autoencoder: LatentAutoencoder, image: Tensor, mask: Tensor, device: str, effort: Effort
) -> None:
    generator = torch.Generator().manual_seed(4)
    optimizer = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=effort.autoencoder_steps + 1)
    how = Augmentation(flip_axes=(2,), zoom=(0.85, 1.2), stretch=0.05, shift=0.08)
    shape = autoencoder.preset.latent_shape(tuple(image.shape[2:]))
    for _ in range(effort.autoencoder_steps):
        rows = torch.randint(len(image), (16,), generator=generator)
        some_image, some_mask = augment(image[rows], mask[rows], how, generator)
        noise = torch.randn((16, *shape), generator=generator)
        loss = reconstruction_loss(
            autoencoder,
            some_image.to(device),
            some_mask.to(device),
            AutoencoderLossWeights(),
            noise.to(device),
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(autoencoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    autoencoder.eval()
    z = _encode(autoencoder, image, mask, device)
    autoencoder.latent_mean_C.copy_(z.mean(dim=(0, 2, 3, 4)))
    autoencoder.latent_std_C.copy_(z.std(dim=(0, 2, 3, 4)).clamp_min(1e-3))


def _train_prior(
    prior: Denoiser, z_NCDHW: Tensor, held_out_z: Tensor, device: str, effort: Effort
) -> list[tuple[int, float]]:
    """Adam with a warm-up and cosine decay; keeps the averaged weights of the best held-out loss."""
    generator = torch.Generator(device).manual_seed(5)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=effort.prior_steps + 1)
    average = torch.optim.swa_utils.AveragedModel(
        prior, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    watched = Attacked(
        z_SCDHW=held_out_z,
        unit_S=torch.arange(len(held_out_z)),
        n_units=len(held_out_z),
        noise=AttackNoise.from_plan_digest(
            bytes(32), timesteps=TIMESTEPS, draws_per_timestep=2, latent_shape=tuple(z_NCDHW.shape[1:])
        ),
    )
    history: list[tuple[int, float]] = []
    best: dict[str, Tensor] = {}
    for step in range(1, effort.prior_steps + 1):
        _plain_step(prior, z_NCDHW, optimizer, generator)
        schedule.step()
        average.update_parameters(prior)
        if step % max(1, effort.prior_steps // 10) == 0:
            loss = float(watched.loss(average.module).mean())
            if not history or loss < min(value for _, value in history):
                best = copy.deepcopy(average.module.state_dict())
            history.append((step, round(loss, 4)))
    prior.load_state_dict(best)
    return history


@torch.no_grad()
def _encode(autoencoder: LatentAutoencoder, image: Tensor, mask: Tensor, device: str) -> Tensor:
    return torch.cat(
        [
            autoencoder.encode(image[i : i + 64].to(device), mask[i : i + 64].to(device))
            for i in range(0, len(image), 64)
        ]
    )


@torch.no_grad()
def _reconstruction(autoencoder: LatentAutoencoder, image: Tensor, mask: Tensor, device: str) -> float:
    back, _ = autoencoder.decode(_encode(autoencoder, image[:32], mask[:32], device))
    return round(float((back.cpu() - image[:32]).abs().mean()), 4)


def _fast(device: str) -> None:
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scans", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, help="where networks and latents are kept; default: in OUT")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--gradients", action="store_true", help="one draw with the gradient norm")
    parser.add_argument("--fine", action="store_true", help="the first steps, one after the other")
    parser.add_argument("--budget-s", type=float, default=150.0, help="for the attacked networks")
    options = parser.parse_args()
    effort = TOY if options.toy else GRADIENTS if options.gradients else FINE if options.fine else Effort()
    options.out.mkdir(parents=True, exist_ok=True)
    state = options.state or options.out / "state"
    tasks = sorted(
        (repetition / study.repetitions, name, repetition)
        for name, study in ((name, STUDIES[name]) for name in effort.studies)
        for repetition in range(min(study.repetitions, effort.most_repetitions))
    )
    started = time.monotonic()
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        common = (options.scans, options.out, state, options.device, effort)
        scans = sorted({STUDIES[name].scans for name in effort.studies})
        for note in [pool.submit(train_public, name, *common) for name in scans]:
            print(note.result(), flush=True)
        print(f"public networks: {time.monotonic() - started:.0f} s", flush=True)
        deadline = time.time() + options.budget_s
        futures = [
            pool.submit(attack_repetition, name, repetition, *common, deadline)
            for _, name, repetition in tasks
        ]
        for future in as_completed(futures):
            print(f"{time.monotonic() - started:.0f} s: {future.result()}", flush=True)


if __name__ == "__main__":
    main()
