"""Public training: resumes exactly, learns, and augments image and mask alike."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shared.errors import CoordinatorError, UsageError
from shared.model.autoencoder import build_autoencoder
from shared.model.denoiser import Denoiser, build_denoiser
from shared.model.presets import preset_named
from shared.model.training import (
    Augmentation,
    AutoencoderLossWeights,
    TrainingSchedule,
    augment,
    encode_batches,
    held_out_loss,
    local_std,
    reconstruction_loss,
    train_autoencoder,
    train_denoiser,
)

MICRO = replace(preset_named("micro"), autoencoder_channels=(8, 8), denoiser_channels=(8, 8), head_channels=8)
SHAPE = MICRO.latent_shape(MICRO.grid_shape)
SCHEDULE = TrainingSchedule(steps=12, batch_size=4, learning_rate=2e-3, seed=3, save_every=5)


class _KilledError(Exception):
    pass


def _latents(n: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return 0.3 * torch.randn((n, *SHAPE), generator=g) + 1.0, torch.randint(0, 2, (n,), generator=g)


def _train_prior(
    state: Path | None, schedule: TrainingSchedule = SCHEDULE, kill_at: int = 0
) -> tuple[Denoiser, list[tuple[int, float]]]:
    denoiser = build_denoiser(MICRO, n_conditions=2, seed=1)
    steps_seen = 0

    def count(module: torch.nn.Module, _: object) -> None:
        nonlocal steps_seen
        if module.training and torch.is_grad_enabled():
            steps_seen += 1
            if steps_seen == kill_at:
                raise _KilledError

    handle = denoiser.register_forward_pre_hook(count)
    try:
        history = train_denoiser(
            denoiser, *_latents(12, 0), *_latents(5, 1), schedule=schedule, evaluations=3, state_path=state
        )
    finally:
        handle.remove()
    return denoiser, history


def test_a_killed_and_resumed_prior_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, history = _train_prior(None)
    state = tmp_path / "state"
    with pytest.raises(_KilledError):
        _train_prior(state, kill_at=9)
    resumed, resumed_history = _train_prior(state, kill_at=8)
    assert [step for step, _ in history] == [4, 8, 12] and resumed_history == history
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_state_of_another_schedule_is_not_continued(tmp_path: Path) -> None:
    state = tmp_path / "state"
    _train_prior(state)
    fresh, _ = _train_prior(None, replace(SCHEDULE, seed=4))
    again, _ = _train_prior(state, replace(SCHEDULE, seed=4))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))


def test_the_prior_learns_and_the_best_held_out_weights_are_kept() -> None:
    schedule = TrainingSchedule(steps=80, batch_size=16, learning_rate=5e-3, seed=3, ema_decay=0.9)
    held = _latents(5, 1)
    start = held_out_loss(build_denoiser(MICRO, n_conditions=2, seed=1), *held)
    denoiser, history = _train_prior(None, schedule)
    assert held_out_loss(denoiser, *held) == pytest.approx(min(loss for _, loss in history), rel=1e-5)
    assert min(loss for _, loss in history) < 0.8 * start


def test_bfloat16_is_for_the_passes_alone_and_learns_as_well() -> None:
    schedule = TrainingSchedule(
        steps=80, batch_size=16, learning_rate=5e-3, seed=3, ema_decay=0.9, bfloat16=True
    )
    types = {"training": Counter[torch.dtype](), "held out": Counter[torch.dtype]()}

    def note(module: torch.nn.Module, _: object, output: Tensor) -> None:
        if isinstance(module, torch.nn.Conv3d):
            types["training" if torch.is_grad_enabled() else "held out"][output.dtype] += 1

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        denoiser, history = _train_prior(None, schedule)
    finally:
        handle.remove()
    layers = sum(isinstance(module, torch.nn.Conv3d) for module in denoiser.modules())
    in_one_check = 1
    assert types["training"] == {
        torch.bfloat16: (schedule.steps + in_one_check) * layers, torch.float32: in_one_check * layers
    }  # fmt: skip
    assert set(types["held out"]) == {torch.float32}
    assert {p.dtype for p in denoiser.parameters()} == {torch.float32}
    _, in_float32 = _train_prior(None, replace(schedule, bfloat16=False))
    assert min(loss for _, loss in history) < 1.02 * min(loss for _, loss in in_float32)


class _WrongInBfloat16(torch.autograd.Function):
    """The identity, whose gradient is wrong under autocast."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.low = torch.is_autocast_enabled("cpu")
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * (-1.0 if ctx.low else 1.0)


def test_a_device_whose_bfloat16_gradients_are_wrong_is_refused() -> None:
    """As oneDNN's of convolutions over a grid of depth 2 are; here planted, for every processor."""
    denoiser = build_denoiser(MICRO, n_conditions=2, seed=1)
    true_forward = denoiser.forward
    denoiser.forward = lambda z, *rest: _WrongInBfloat16.apply(true_forward(z, *rest))  # type: ignore[method-assign]
    latents = _latents(4, 1)
    schedule = TrainingSchedule(steps=2, batch_size=2, learning_rate=1e-3, seed=3, bfloat16=True)
    with pytest.raises(CoordinatorError, match="wrong gradient"):
        train_denoiser(denoiser, *latents, *latents, schedule=schedule)
    train_denoiser(denoiser, *latents, *latents, schedule=replace(schedule, bfloat16=False))


def test_autoencoder_resumes_exactly_and_normalises_public_latents(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    image = torch.rand((6, 1, *MICRO.grid_shape), generator=g)
    mask = (image[:, 0] > 0.5).to(torch.uint8)

    def run(state: Path | None, kill_at: int | None = None) -> dict[str, Tensor]:
        autoencoder = build_autoencoder(MICRO, n_labels=1, seed=1)

        def progress(stage: str, step: int, steps: int, loss: float) -> None:
            raise _KilledError

        train_autoencoder(
            autoencoder,
            image,
            mask,
            schedule=replace(SCHEDULE, steps=26),
            weights=AutoencoderLossWeights(),
            augmentation=Augmentation(),
            progress=progress if kill_at else None,
            state_path=state,
        )
        z = encode_batches(autoencoder, image, mask, batch_size=4)
        assert torch.allclose(z.mean(dim=(0, 2, 3, 4)), torch.zeros(SHAPE[0]), atol=1e-4)
        assert torch.allclose(z.std(dim=(0, 2, 3, 4)), torch.ones(SHAPE[0]), atol=1e-3)
        return autoencoder.state_dict()

    whole = run(None)
    with pytest.raises(_KilledError):
        run(tmp_path / "state", kill_at=25)
    resumed = run(tmp_path / "state")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_augmentation_moves_image_and_mask_alike_and_differs_between_volumes() -> None:
    ramp = torch.zeros((8, 1, 24, 24, 24))
    ramp[:, :, :9, 4:20, 12:] = 1.0
    mask = ramp[:, 0].to(torch.uint8)
    how = Augmentation(zoom=(0.8, 1.3), stretch=0.1, shift=0.2, gain=0.0)
    image, moved = augment(ramp, mask, how, torch.Generator().manual_seed(1))
    assert ((image[:, 0] > 0.5) == (moved == 1)).float().mean() > 0.98
    assert (moved[0] != mask[0]).any() and (moved[0] != moved[1]).any()
    still = Augmentation(flip_axes=(), zoom=(1.0, 1.0), shift=0.0, gain=0.0)
    same, same_mask = augment(ramp, mask, still, torch.Generator().manual_seed(1))
    assert torch.allclose(same, ramp, atol=1e-4) and torch.equal(same_mask, mask)


def test_each_loss_term_answers_what_it_is_for() -> None:
    g = torch.Generator().manual_seed(0)
    texture = torch.rand((2, 1, 12, 12, 12), generator=g)
    assert local_std(texture).mean() > 5 * local_std(torch.full_like(texture, 0.5)).mean()
    autoencoder = build_autoencoder(MICRO, n_labels=1, seed=1)
    image = torch.rand((2, 1, *MICRO.grid_shape), generator=g)
    mask = (image[:, 0] > 0.5).to(torch.uint8)
    none = AutoencoderLossWeights(image=0.0, gradient=0.0, texture=0.0, mask=0.0, kl=0.0)
    assert float(reconstruction_loss(autoencoder, image, mask, none, None).detach()) == 0.0
    for term in ("image", "gradient", "texture", "mask", "kl"):
        loss = reconstruction_loss(autoencoder, image, mask, replace(none, **{term: 1.0}), None)
        assert float(loss.detach()) > 0.0, term


def test_a_loss_that_is_not_finite_stops_training_and_no_held_out_patient_is_refused() -> None:
    denoiser = build_denoiser(MICRO, n_conditions=2, seed=1)
    z, condition = _latents(4, 0)
    with pytest.raises(CoordinatorError, match="not finite"):
        train_denoiser(denoiser, z * torch.nan, condition, z, condition, schedule=SCHEDULE)
    with pytest.raises(UsageError, match="held-out"):
        train_denoiser(denoiser, z, condition, z[:0], condition[:0], schedule=SCHEDULE)
