"""The traps of DP-SGD libraries that were seen before this project began: one regression test each.

Every one of them is a way to train without the stated privacy and without any error.
"""

from __future__ import annotations

import importlib.util
import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from privacy.dp import trainer as trainer_module
from privacy.dp.calibration import propose_privacy
from privacy.dp.execution_plan import ExecutionPlan
from privacy.dp.noise import noise_share
from privacy.dp.patient_gradients import Backend, PatientGradients, Performance
from privacy.dp.patients import PatientScans
from privacy.dp.trainer import PatientTrainer
from privacy.secret_random import SecretRandom
from shared.checkpoint import load_tensors
from shared.errors import InternalError, LacunaError
from shared.model.denoiser import build_denoiser, parameter_subset
from shared.model.presets import preset_named

_spec = importlib.util.spec_from_file_location("dp_networks", Path(__file__).with_name("networks.py"))
assert _spec is not None and _spec.loader is not None
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

BACKENDS: tuple[Backend, ...] = ("engine", "opacus", "functorch")


def plan_for(dimension: int, **changes: Any) -> ExecutionPlan:
    plan = propose_privacy(
        mode="distributed", epsilon=8.0, delta=1e-5, clip_norm=0.5, rounds=5, n_sites=3, threshold=3,
        max_colluding=1, dimension=dimension, declared_patients=60, draws_per_patient=2,
    ).execution  # fmt: skip
    return replace(plan, **changes)


def small_trainer(**changes: Any) -> PatientTrainer:
    network = networks.small_denoiser()
    params = networks.parameters(network)
    plan = plan_for(sum(p.numel() for _, p in params), **changes)
    return PatientTrainer(network, params, networks.loss, plan, SecretRandom())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_loss_of_shape_b_1_is_refused(backend: Backend) -> None:
    """Under ghost clipping [B, 1] times [B] makes [B, B] (summed norm 9,380 seen, the bound was 8)."""
    network = networks.small_denoiser()

    def column(*arguments: Any) -> Tensor:
        return networks.loss(*arguments)[:, None]

    gradients = PatientGradients(
        network, networks.parameters(network), column, clip=0.5, draws_per_patient=2,
        performance=Performance(backend=backend),
    )  # fmt: skip
    with pytest.raises(InternalError, match="ndim 1"):
        gradients.clipped_sum(networks.cohort((1, 2)), SecretRandom())


def test_an_empty_batch_of_the_denoiser_is_a_noise_only_step() -> None:
    """An empty Poisson batch crashes MONAI's attention and skips the step under DDP; here it is noise alone.

    All of the micro denoiser's coordinates (over 500,000) have one share of noise: their variance is within
    1%, which a chi-square of that many degrees of freedom leaves with probability below 1e-6.
    """
    network = build_denoiser(preset_named("micro"), n_conditions=2)
    params = parameter_subset(network, "all")
    plan = plan_for(sum(p.numel() for _, p in params), sampling_rate=1e-9)

    def loss(*arguments: Any) -> Tensor:
        raise AssertionError("nobody takes part, so nothing is computed")

    trainer = PatientTrainer(network, params, loss, plan, SecretRandom())
    for patients in ([], networks.cohort((1, 1, 2), shape=(4, 6, 6, 6))):
        update = trainer.distributed_update(patients).astype(np.float64)
        assert abs(update.var() / plan.noise_share_steps**2 - 1) < 0.01


def test_noise_does_not_come_from_the_global_generators(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed at two sites gave identical noise. Here seeds change nothing, no generator is asked."""

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a global generator was asked")

    for owner, name in ((torch, "normal"), (torch, "randn"), (torch, "rand"), (np.random, "normal"),
                        (np.random, "default_rng"), (np.random, "standard_normal")):  # fmt: skip
        monkeypatch.setattr(owner, name, asked)
    shares = []
    for _ in range(2):
        torch.manual_seed(1)
        np.random.seed(1)
        before = torch.get_rng_state().clone(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
        shares.append(small_trainer().distributed_update([]))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]
    assert not np.array_equal(*shares)


def test_reading_weights_unpickles_nothing(tmp_path: Path) -> None:
    """``PrivacyEngine.load_checkpoint`` runs whatever the file says; ours reads numbers or refuses."""
    ran = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return (Path.touch, (ran,))

    torch.save({"module_state_dict": Payload()}, tmp_path / "weights.pt")
    with pytest.raises(LacunaError):
        load_tensors(tmp_path / "weights.pt")
    assert not ran.exists()
    torch.load(tmp_path / "weights.pt", weights_only=False)
    assert ran.exists(), "the payload is real: it does run where files are unpickled"


def test_the_clip_norm_never_adapts_to_data() -> None:
    """Adaptive clipping leaks the batch size. Here C is the plan's, whoever came before."""
    network = networks.small_denoiser()
    gradients = PatientGradients(
        network, networks.parameters(network), networks.loss, clip=0.5, draws_per_patient=2
    )
    probe = networks.cohort((2,), scale=30.0)
    before = gradients.clipped_sum(probe, networks.FixedSecret())
    assert abs(np.linalg.norm(before) - 0.5) < 1e-12
    for count, scale in ((12, 100.0), (2, 1e-3)):
        gradients.clipped_sum(networks.cohort((1,) * count, scale=scale), SecretRandom())
        assert np.array_equal(gradients.clipped_sum(probe, networks.FixedSecret()), before)
    assert [p.annotation for p in inspect.signature(noise_share).parameters.values()] == [
        "ExecutionPlan", "SecretRandom",
    ]  # fmt: skip


def test_a_sum_is_not_divided_by_who_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """At q < 1 with the same patient twelvefold: k of them add up to k C, never to a mean."""
    trainer = small_trainer(sampling_rate=0.5, noise_multiplier=1e-3)
    came: list[int] = []
    original = trainer_module.sample_patients

    def watched(*arguments: Any, **options: Any) -> Any:
        chosen = original(*arguments, **options)
        came.append(len(chosen))
        return chosen

    monkeypatch.setattr(trainer_module, "sample_patients", watched)
    monkeypatch.setattr(trainer_module, "noise_share", lambda plan, _: np.zeros(plan.dimension, np.int64))
    one = networks.cohort((1,), scale=30.0)[0]
    twelve = [
        PatientScans(patient_key=str(i), latents_SCDHW=one.latents_SCDHW, conditions_S=one.conditions_S)
        for i in range(12)
    ]

    class SameDraws(networks.FixedSecret):  # type: ignore[misc, name-defined]
        """Every patient draws alike: the stream starts again with each."""

    gradients = trainer._gradients
    draw = gradients._draw
    monkeypatch.setattr(
        gradients, "_draw", lambda group, _, timesteps: [draw([p], SameDraws(), timesteps)[0] for p in group]
    )
    plan = trainer._plan
    for _ in range(4):
        update = trainer.distributed_update(twelve) * plan.gradient_grid_step
        assert abs(np.linalg.norm(update) - came[-1] * plan.clip) < 1e-2 * plan.clip
    assert plan.sum_divisor == 60 * 0.5


@pytest.mark.parametrize("n_patients", [3, 10, 64])
def test_the_sampling_rate_is_the_plans_whatever_the_number_of_patients(
    monkeypatch: pytest.MonkeyPatch, n_patients: int
) -> None:
    """q = 1/len(loader) is a rate of the batch size, not the one that is accounted."""
    rates: list[float] = []

    def nobody(_: SecretRandom, *, sampling_rate: float, n_patients: int) -> np.ndarray[Any, Any]:
        rates.append(sampling_rate)
        return np.zeros(0, dtype=np.int64)

    monkeypatch.setattr(trainer_module, "sample_patients", nobody)
    trainer = small_trainer(sampling_rate=0.37)
    trainer.distributed_update(networks.cohort((1,) * n_patients))
    assert rates == [0.37] == [trainer._plan.training_event().sampling_rate]


def test_eval_mode_does_not_switch_clipping_off() -> None:
    """Opacus' hooks skip layers in eval mode without a word."""
    network = networks.small_denoiser().eval()
    for backend in BACKENDS:
        gradients = PatientGradients(
            network, networks.parameters(network), networks.loss, clip=0.5, draws_per_patient=2,
            performance=Performance(backend=backend),
        )  # fmt: skip
        total = gradients.clipped_sum(networks.cohort((2,), scale=30.0), SecretRandom())
        assert abs(np.linalg.norm(total) - 0.5) < 1e-12
    assert not any(isinstance(module, nn.Module) and module.training for module in network.modules())
