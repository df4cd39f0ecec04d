"""Plain training on PUBLIC volumes: autoencoder, prior, the copy check's embedding, and the segmenter.

Nothing here is private, and nothing here may see a member's scan. All loops are functions of a public seed
and of their step: a run that was killed and resumed gives the weights of one that was not. They train on the
network's device; what is random is drawn on the CPU, the same for every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shared.checkpoint import load_tensors, save_tensors
from shared.errors import CoordinatorError, UsageError
from shared.model.autoencoder import LatentAutoencoder
from shared.model.copy_embedding import CopyEmbedding, Disguise, contrast_loss, disguise
from shared.model.denoiser import Denoiser
from shared.model.diffusion import drop_condition, drop_covariates, timesteps_from_normal
from shared.model.segmenter import Segmenter
from shared.model.weights import load_state_arrays, state_arrays

BFLOAT16_TOLERANCE = 0.5
"""Relative error of a parameter's gradient that rounding may explain; a wrong one is off by about 1."""

Progress = Callable[[str, int, int, float], None]
"""Called as (stage, step, steps, loss), now and then."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random changes of public volumes, image and mask alike.

    Attributes:
        flip_axes: Spatial axes (0, 1, 2) that may be mirrored, each with probability one half.
        zoom: Range of one isotropic magnification about a random point of the middle of the volume.
        stretch: Standard deviation of the logarithm of a magnification per axis.
        shift: Largest translation, as a share of half the field of view.
        gain: Largest relative change of the image's gain.
    """

    flip_axes: tuple[int, ...] = (0, 1, 2)
    zoom: tuple[float, float] = (0.95, 1.05)
    stretch: float = 0.0
    shift: float = 0.03
    gain: float = 0.05


@dataclass(frozen=True, kw_only=True)
class TrainingSchedule:
    """How long and how fast a loop trains.

    Attributes:
        steps: Optimizer steps.
        batch_size: Volumes (or latents) per step.
        learning_rate: Peak of a cosine schedule with a short linear warm-up (AdamW).
        ema_decay: Decay of the weights' moving average, which is what is kept.
        condition_dropout: Share of samples trained under the null class (denoiser only).
        seed: Public seed.
        save_every: Steps between resumable states.
        bfloat16: Compute forward and backward passes in bfloat16 where torch's autocast would; weights,
            optimizer and average stay float32.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    ema_decay: float = 0.995
    condition_dropout: float = 0.15
    save_every: int = 200
    bfloat16: bool = False


@dataclass(frozen=True, kw_only=True)
class AutoencoderLossWeights:
    """Weights of the autoencoder's loss terms, each a mean over voxels or latent elements.

    Attributes:
        image: L1 distance of the image. Well above the mask's, or the latents describe the mask alone.
        gradient: L1 distance of finite differences (edges).
        texture: L1 distance of the local standard deviation in 3^3 neighbourhoods of what a 3^3 mean leaves
            over. A pointwise loss answers unpredictable texture with its mean, which is smooth; this term
            asks for texture of the right strength wherever it may lie.
        mask: Cross-entropy plus soft Dice of the mask.
        kl: Kullback-Leibler divergence of the posterior from N(0, 1), per latent element.
    """

    image: float = 4.0
    gradient: float = 1.0
    texture: float = 1.0
    mask: float = 1.0
    kl: float = 1e-4


def augment(
    image_B1DHW: Tensor, mask_BDHW: Tensor, how: Augmentation, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one random change per volume: trilinear for the image, nearest for the mask."""
    b = image_B1DHW.shape[0]

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    sign_B3 = torch.ones(b, 3)
    for axis in how.flip_axes:
        sign_B3[:, axis] = torch.where(torch.rand(b, generator=generator) < 0.5, -1.0, 1.0)
    zoom_B3 = uniform(*how.zoom, b, 1) * torch.exp(how.stretch * torch.randn(b, 3, generator=generator))
    centre_B3 = uniform(-0.3, 0.3, b, 3) * (how.zoom[1] > 1.1)
    shift_B3 = uniform(-how.shift, how.shift, b, 3)
    gain_B = uniform(1.0 - how.gain, 1.0 + how.gain, b)
    # affine_grid works on (x, y, z) = (W, H, D): axes are reversed.
    scale_B3 = (sign_B3 / zoom_B3).flip(1)
    offset_B3 = (centre_B3 * (1.0 - 1.0 / zoom_B3) + shift_B3).flip(1)
    theta_B34 = torch.cat([torch.diag_embed(scale_B3), offset_B3[:, :, None]], dim=2)
    theta_B34, gain_B = theta_B34.to(image_B1DHW.device), gain_B.to(image_B1DHW.device)
    grid = F.affine_grid(theta_B34, list(image_B1DHW.shape), align_corners=False)
    image = F.grid_sample(image_B1DHW, grid, mode="bilinear", padding_mode="border", align_corners=False)
    mask = F.grid_sample(
        mask_BDHW[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False
    )
    image = (image * gain_B.view(-1, 1, 1, 1, 1)).clamp(0.0, 1.0)
    return image, mask[:, 0].round().to(mask_BDHW.dtype)


def reconstruction_loss(
    autoencoder: LatentAutoencoder,
    image_B1DHW: Tensor,
    mask_BDHW: Tensor,
    weights: AutoencoderLossWeights,
    posterior_noise_BCDHW: Tensor | None,
) -> Tensor:
    """The autoencoder's loss, a scalar. Without noise the posterior's mean is decoded."""
    mean_BCDHW, std_BCDHW = autoencoder.posterior(image_B1DHW, mask_BDHW)
    raw_BCDHW = mean_BCDHW
    if posterior_noise_BCDHW is not None:
        raw_BCDHW = mean_BCDHW + std_BCDHW * posterior_noise_BCDHW
    output_B1DHW, logits_BKDHW = autoencoder.decode_logits(raw_BCDHW)
    loss = weights.image * (output_B1DHW - image_B1DHW).abs().mean()
    if weights.gradient:
        for axis in (2, 3, 4):
            loss = (
                loss
                + weights.gradient * (output_B1DHW.diff(dim=axis) - image_B1DHW.diff(dim=axis)).abs().mean()
            )
    if weights.texture:
        loss = loss + weights.texture * (local_std(output_B1DHW) - local_std(image_B1DHW)).abs().mean()
    loss = loss + weights.mask * mask_loss(logits_BKDHW, mask_BDHW)
    variance_BCDHW = std_BCDHW.square()
    kl = 0.5 * (mean_BCDHW.square() + variance_BCDHW - 1.0 - variance_BCDHW.log()).mean()
    return loss + weights.kl * kl


def mask_loss(logits_BKDHW: Tensor, mask_BDHW: Tensor) -> Tensor:
    """Cross-entropy plus soft Dice (Milletari et al., 3DV 2016) of a mask, a scalar."""
    target_BDHW = mask_BDHW.long()
    onehot_BKDHW = F.one_hot(target_BDHW, logits_BKDHW.shape[1]).movedim(-1, 1).to(logits_BKDHW.dtype)
    probability_BKDHW = logits_BKDHW.softmax(dim=1)
    overlap_BK = (probability_BKDHW * onehot_BKDHW).sum(dim=(2, 3, 4))
    size_BK = (probability_BKDHW + onehot_BKDHW).sum(dim=(2, 3, 4))
    dice = ((2.0 * overlap_BK + 1.0) / (size_BK + 1.0))[:, 1:].mean()
    return F.cross_entropy(logits_BKDHW, target_BDHW) + 1.0 - dice


def local_std(image_B1DHW: Tensor) -> Tensor:
    """Strength of fine texture: standard deviation, over 3^3 voxels, of the image minus its 3^3 mean."""
    detail = image_B1DHW - F.avg_pool3d(image_B1DHW, 3, stride=1, padding=1, count_include_pad=False)
    power = F.avg_pool3d(detail.square(), 3, stride=1, padding=1, count_include_pad=False)
    return (power + 1e-6).sqrt()


def train_autoencoder(
    autoencoder: LatentAutoencoder,
    image_N1DHW: Tensor,
    mask_NDHW: Tensor,
    *,
    schedule: TrainingSchedule,
    weights: AutoencoderLossWeights,
    augmentation: Augmentation,
    image_is_public: bool = False,
    progress: Progress | None = None,
    state_path: Path | None = None,
) -> None:
    """Train on public volumes and leave the averaged weights and the latent statistics in ``autoencoder``.

    Args:
        image_N1DHW: Public volumes in [0, 1].
        mask_NDHW: Their labels.
        image_is_public: The image's network has public weights and stays; the mask's own network trains.
        state_path: Where a resumable state is kept; a state of the same schedule is continued.
    """
    latent_shape = autoencoder.preset.latent_shape(_grid(image_N1DHW))
    network = autoencoder.trained_network(image_is_public=image_is_public)
    device = _device(autoencoder)

    def step_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(image_N1DHW.shape[0], (schedule.batch_size,), generator=generator)
        image, mask = image_N1DHW[rows].to(device), mask_NDHW[rows].to(device)
        image, mask = augment(image, mask, augmentation, generator)
        noise = torch.randn((schedule.batch_size, *latent_shape), generator=generator)
        return reconstruction_loss(autoencoder, image, mask, weights, noise.to(device))

    _train("autoencoder", network, step_loss, schedule, progress, state_path)
    set_latent_statistics(autoencoder, image_N1DHW, mask_NDHW)


@torch.no_grad()
def set_latent_statistics(autoencoder: LatentAutoencoder, image_N1DHW: Tensor, mask_NDHW: Tensor) -> None:
    """Set the normalising buffers from public volumes."""
    autoencoder.latent_mean_C.zero_()
    autoencoder.latent_std_C.fill_(1.0)
    z_NCDHW = encode_batches(autoencoder, image_N1DHW, mask_NDHW)
    autoencoder.latent_mean_C.copy_(z_NCDHW.mean(dim=(0, 2, 3, 4)))
    autoencoder.latent_std_C.copy_(z_NCDHW.std(dim=(0, 2, 3, 4)).clamp_min(1e-3))


@torch.no_grad()
def encode_batches(
    autoencoder: LatentAutoencoder, image_N1DHW: Tensor, mask_NDHW: Tensor, *, batch_size: int = 32
) -> Tensor:
    """Normalised latents z_NCDHW of many volumes, on the CPU, whatever the autoencoder's device."""
    device = _device(autoencoder)
    pieces = [
        autoencoder.encode(
            image_N1DHW[i : i + batch_size].to(device), mask_NDHW[i : i + batch_size].to(device)
        ).cpu()
        for i in range(0, image_N1DHW.shape[0], batch_size)
    ]
    return torch.cat(pieces)


@torch.no_grad()
def decode_batches(
    autoencoder: LatentAutoencoder, z_NCDHW: Tensor, *, batch_size: int = 32
) -> tuple[Tensor, Tensor]:
    """Image_N1DHW and mask_NDHW of many latents, on the CPU, whatever the autoencoder's device."""
    device = _device(autoencoder)
    decoded = [autoencoder.decode(z.to(device)) for z in torch.split(z_NCDHW, batch_size)]
    return torch.cat([image.cpu() for image, _ in decoded]), torch.cat([mask.cpu() for _, mask in decoded])


def train_denoiser(
    denoiser: Denoiser,
    z_NCDHW: Tensor,
    condition_N: Tensor,
    held_out_z_MCDHW: Tensor,
    held_out_condition_M: Tensor,
    *,
    schedule: TrainingSchedule,
    evaluations: int = 8,
    progress: Progress | None = None,
    state_path: Path | None = None,
) -> list[tuple[int, float]]:
    """Train the public prior; leave the averaged weights of the best held-out public loss in ``denoiser``.

    Args:
        z_NCDHW: Normalised latents of public patients (already augmented).
        condition_N: Class indices, int64.
        held_out_z_MCDHW: Latents of other public patients, never trained on.
        held_out_condition_M: Their conditions.
        evaluations: How often the held-out loss is looked at, evenly over the steps.

    Returns:
        (step, held-out public loss) of each evaluation.
    """
    if held_out_z_MCDHW.shape[0] == 0:
        raise UsageError("the prior is chosen by held-out public loss: hold at least one patient out")
    device = _device(denoiser)
    shape, diffusion = tuple(z_NCDHW.shape[1:]), denoiser.diffusion
    every = max(1, schedule.steps // max(1, evaluations))
    history: list[tuple[int, float]] = []
    best: dict[str, Tensor] = {}

    def step_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(z_NCDHW.shape[0], (schedule.batch_size,), generator=generator)
        t_B = timesteps_from_normal(torch.randn(schedule.batch_size, generator=generator))
        noise = torch.randn((schedule.batch_size, *shape), generator=generator)
        dropped_B = torch.rand(schedule.batch_size, generator=generator) < schedule.condition_dropout
        condition_B = drop_condition(condition_N[rows], dropped_B, null_index=denoiser.null_index)
        if denoiser.covariate_sizes:
            dropped_BK = torch.rand((schedule.batch_size, len(denoiser.covariate_sizes)), generator=generator)
            condition_B = drop_covariates(
                condition_B,
                dropped_BK < schedule.condition_dropout,
                n_rows=denoiser.n_conditions + 1,
                covariate_sizes=denoiser.covariate_sizes,
            )
        batch = (tensor.to(device) for tensor in (z_NCDHW[rows], condition_B, t_B, noise))
        return diffusion.per_sample_loss(denoiser, *batch).mean()

    def evaluate(step: int) -> None:
        if step % every and step != schedule.steps:
            return
        loss = held_out_loss(denoiser, held_out_z_MCDHW, held_out_condition_M)
        if not history or loss < min(value for _, value in history):
            best.clear()
            best.update({name: tensor.clone() for name, tensor in denoiser.state_dict().items()})
        history.append((step, loss))

    embedding = denoiser.unet.class_embedding
    gain = embedding.gain
    embedding.set_gain(1.0)
    _train(
        "prior", denoiser, step_loss, schedule, progress, state_path, evaluate=evaluate, kept=(history, best)
    )
    denoiser.load_state_dict(best)
    embedding.set_gain(gain)
    return history


@torch.no_grad()
def held_out_loss(
    denoiser: Denoiser, z_MCDHW: Tensor, condition_M: Tensor, *, draws: int = 8, seed: int = 0
) -> float:
    """Mean loss over public latents at fixed (seeded) timesteps and noise, ``draws`` per latent."""
    generator = torch.Generator().manual_seed(seed)
    device = _device(denoiser)
    per_sample_loss = denoiser.diffusion.per_sample_loss
    total = 0.0
    for draw in range(draws):
        # Stratified logit-normal timesteps: the same for each call, spread evenly over the distribution.
        u_M = (torch.rand(z_MCDHW.shape[0], generator=generator) + draw) / draws
        t_M = timesteps_from_normal(torch.special.ndtri(u_M.clamp(1e-4, 1 - 1e-4)))
        noise = torch.randn(z_MCDHW.shape, generator=generator)
        for i in range(0, z_MCDHW.shape[0], 64):
            rows = slice(i, i + 64)
            batch = (tensor[rows].to(device) for tensor in (z_MCDHW, condition_M, t_M, noise))
            total += float(per_sample_loss(denoiser, *batch).sum())
    return total / (draws * z_MCDHW.shape[0])


def train_copy_embedding(
    embedding: CopyEmbedding,
    image_N1DHW: Tensor,
    mask_NDHW: Tensor,
    patient_N: Tensor,
    *,
    schedule: TrainingSchedule,
    augmentation: Augmentation,
    disguises: Disguise,
    progress: Progress | None = None,
    state_path: Path | None = None,
) -> None:
    """Train on public volumes as the autoencoder gives them back; leave the averaged weights.

    Args:
        image_N1DHW, mask_NDHW: Decoded public volumes: what a generator's output looks like.
        patient_N: Whose they are, int64.
        augmentation: Makes another "patient" of each volume, before it is disguised twice.
    """

    def step_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randperm(image_N1DHW.shape[0], generator=generator)[: schedule.batch_size]
        image, mask = augment(image_N1DHW[rows], mask_NDHW[rows], augmentation, generator)
        shares = embedding.label_shares(mask).float()
        device = _device(embedding)
        pair = [disguise(image, shares, disguises, generator) for _ in range(2)]
        first, second = (embedding(shown.to(device), labels.to(device)) for shown, labels in pair)
        return contrast_loss(first, second, patient_B=patient_N[rows].to(device))

    _train("copy embedding", embedding, step_loss, schedule, progress, state_path)


def train_segmenter(
    segmenter: Segmenter,
    image_N1DHW: Tensor,
    shown_N1DHW: Tensor,
    mask_NDHW: Tensor,
    *,
    schedule: TrainingSchedule,
    augmentation: Augmentation,
    disguises: Disguise,
    progress: Progress | None = None,
    state_path: Path | None = None,
) -> None:
    """Train on public volumes, as they are and as the autoencoder shows them; leave the averaged weights.

    Args:
        image_N1DHW: Public volumes in [0, 1].
        shown_N1DHW: The same, encoded and decoded: as smooth as a generator's output.
        mask_NDHW: Their labels, drawn by people; those of both.
        disguises: Gain, noise and blur of the image; the mask must not be moved or blended.
    """
    pair_2N1DHW = torch.stack([image_N1DHW, shown_N1DHW])

    def step_loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(image_N1DHW.shape[0], (schedule.batch_size,), generator=generator)
        which = torch.randint(2, (schedule.batch_size,), generator=generator)
        image, mask = augment(pair_2N1DHW[which, rows], mask_NDHW[rows], augmentation, generator)
        image, _ = disguise(image, image[:, :0], disguises, generator)
        device = _device(segmenter)
        return mask_loss(segmenter(image.to(device)), mask.to(device))

    _train("segmenter", segmenter, step_loss, schedule, progress, state_path)


@dataclass
class _Average:
    """Exponential moving average of a module's parameters, warmed up (decay min(d, (1+n)/(10+n)))."""

    decay: float
    values: list[Tensor]

    @torch.no_grad()
    def update(self, parameters: list[nn.Parameter], step: int) -> None:
        decay = min(self.decay, (1.0 + step) / (10.0 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in parameters], 1.0 - decay)

    @contextmanager
    def in_place_of(self, parameters: list[nn.Parameter]) -> Iterator[None]:
        with torch.no_grad():
            own = [p.detach().clone() for p in parameters]
            _copy(parameters, self.values)
            yield
            _copy(parameters, own)


@torch.no_grad()
def _copy(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _train(
    stage: str,
    module: nn.Module,
    step_loss: Callable[[torch.Generator], Tensor],
    schedule: TrainingSchedule,
    progress: Progress | None,
    state_path: Path | None,
    *,
    evaluate: Callable[[int], None] | None = None,
    kept: tuple[list[tuple[int, float]], dict[str, Tensor]] | None = None,
) -> None:
    """AdamW with warm-up, cosine decay, gradient clipping and EMA; ends with the averaged weights."""
    parameters, device = list(module.parameters()), _device(module)
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    average = _Average(schedule.ema_decay, [p.detach().clone() for p in parameters])
    state = _ResumableState(state_path, stage, schedule, module, optimizer, average, kept)
    first = state.load()
    if schedule.bfloat16 and first < schedule.steps:
        _check_bfloat16(stage, module, step_loss, _step_seed(schedule.seed, stage, first))
    for step in range(first, schedule.steps):
        rate = min(1.0, (step + 1) / 50) * (
            0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / schedule.steps))
        )
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate * rate
        generator = torch.Generator().manual_seed(_step_seed(schedule.seed, stage, step))
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=schedule.bfloat16):
            loss = step_loss(generator)
        if not torch.isfinite(loss):
            raise CoordinatorError(
                f"{stage}: the loss is not finite at step {step}", remedy="lower the learning rate"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(parameters, step)
        if evaluate is not None:
            with average.in_place_of(parameters):
                evaluate(step + 1)
        if progress is not None and ((step + 1) % 25 == 0 or step + 1 == schedule.steps):
            progress(stage, step + 1, schedule.steps, float(loss.detach()))
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            state.save(step + 1)
    _copy(parameters, average.values)


def _check_bfloat16(
    stage: str, module: nn.Module, step_loss: Callable[[torch.Generator], Tensor], seed: int
) -> None:
    """Hold one step's gradients in bfloat16 against those in float32. Raises CoordinatorError.

    oneDNN's weight gradient of a 3^3 convolution over a grid of depth 2 is wrong in bfloat16 (torch 2.13 on a
    processor with AVX-512 BF16): not finite, or finite and as far from the true one as that is long.
    """
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = []
    for low in (False, True):
        with torch.autocast(_device(module).type, torch.bfloat16, enabled=low):
            loss = step_loss(torch.Generator().manual_seed(seed))
        gradients.append(torch.autograd.grad(loss, parameters, allow_unused=True))
    exact = {name: grad for name, grad in zip(names, gradients[0], strict=True) if grad is not None}
    whole = math.sqrt(sum(float(grad.square().sum()) for grad in exact.values()))
    for name, found in zip(names, gradients[1], strict=True):
        if name not in exact or found is None:
            continue
        error, norm = float((found - exact[name]).norm()), float(exact[name].norm())
        if not error <= BFLOAT16_TOLERANCE * (norm + 0.02 * whole):
            raise CoordinatorError(
                f"{stage}: in bfloat16, this device computes a wrong gradient of {name} ({error:.2g} off, "
                f"where the true one is {norm:.2g} long)",
                remedy="train without --bfloat16, or on another grid",
            )


def _step_seed(seed: int, stage: str, step: int) -> int:
    words = np.random.SeedSequence([seed, *stage.encode(), step]).generate_state(2, np.uint32)
    return int(words[0]) << 31 | int(words[1]) >> 1


class _ResumableState:
    """Weights, average, optimizer moments, history and best weights of an unfinished run, in one file."""

    def __init__(
        self,
        path: Path | None,
        stage: str,
        schedule: TrainingSchedule,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: _Average,
        kept: tuple[list[tuple[int, float]], dict[str, Tensor]] | None,
    ) -> None:
        self.path = path
        self.identity = f"{stage} {schedule}"
        self.module = module
        self.optimizer = optimizer
        self.average = average
        self.kept = kept

    def save(self, step: int) -> None:
        if self.path is None:
            return
        tensors = {f"model.{name}": array for name, array in state_arrays(self.module).items()}
        for i, value in enumerate(self.average.values):
            tensors[f"average.{i}"] = value.cpu().numpy()
        for i, moments in self.optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                tensors[f"optimizer.{i}.{key}"] = value.cpu().numpy()
        if self.kept is not None:
            history, best = self.kept
            tensors["history"] = np.array(history, dtype=np.float64).reshape(-1, 2)
            tensors |= {f"best.{name}": value.cpu().numpy() for name, value in best.items()}
        save_tensors(self.path, tensors, {"identity": self.identity, "step": str(step)})

    def load(self) -> int:
        """Continue where a saved state stopped; 0 where there is none, or it is of another schedule."""
        if self.path is None or not self.path.exists():
            return 0
        tensors, metadata = load_tensors(self.path)
        if metadata.get("identity") != self.identity:
            return 0
        parts: dict[str, dict[str, np.ndarray]] = {}
        for name, array in tensors.items():
            head, _, rest = name.partition(".")
            parts.setdefault(head, {})[rest] = array
        load_state_arrays(self.module, parts["model"], what=str(self.path))
        self.average.values[:] = [
            torch.from_numpy(parts["average"][str(i)]).to(value.device)
            for i, value in enumerate(self.average.values)
        ]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, array in parts["optimizer"].items():
            index, _, key = name.partition(".")
            moments.setdefault(int(index), {})[key] = torch.from_numpy(array)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        if self.kept is not None:
            history, best = self.kept
            history[:] = [(int(step), float(loss)) for step, loss in tensors["history"]]
            best.update({name: torch.from_numpy(array) for name, array in parts.get("best", {}).items()})
        return int(metadata["step"])


def cpu_has_bfloat16() -> bool:
    """Whether this processor computes in bfloat16, and not only by way of float32."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _grid(image_N1DHW: Tensor) -> tuple[int, int, int]:
    d, h, w = image_N1DHW.shape[2:]
    return (d, h, w)
