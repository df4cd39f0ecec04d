"""Clipped sums equal a loop of batch-of-one autograd per patient; what a backend would skip is an error."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from privacy.dp.layer_gradients import UnsupportedLayerError
from privacy.dp.patient_gradients import Backend, PatientGradients, Performance
from privacy.dp.patient_sampling import draw_for_patient
from privacy.dp.patients import PatientScans
from privacy.secret_random import SecretRandom
from shared.errors import InternalError, UsageError

_spec = importlib.util.spec_from_file_location("dp_networks", Path(__file__).with_name("networks.py"))
assert _spec is not None and _spec.loader is not None
networks = importlib.util.module_from_spec(_spec)
sys.modules.setdefault("dp_networks", networks)
_spec.loader.exec_module(networks)

CLIP = 0.3
BACKENDS: tuple[Backend, ...] = ("engine", "opacus", "functorch")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


def reference(
    network: nn.Module,
    params: list[tuple[str, nn.Parameter]],
    patients: list[PatientScans],
    secret: SecretRandom,
    *,
    draws: int,
    loss: object = networks.loss,
    clip: float = CLIP,
) -> np.ndarray:
    """The definition: one draw, one backward pass at a time; mean over draws; clip; add."""
    dtype = params[0][1].dtype
    total = np.zeros(sum(p.numel() for _, p in params))
    for patient in patients:
        drawn = draw_for_patient(
            secret, n_scans=patient.n_scans, latent_shape=tuple(patient.latents_SCDHW.shape[1:]), draws=draws
        )
        mean = np.zeros_like(total)
        for k in range(draws):
            scan = int(drawn.scan_K[k])
            loss_B = loss(  # type: ignore[operator]
                network,
                patient.latents_SCDHW[scan : scan + 1].to(dtype),
                patient.conditions_S[scan : scan + 1],
                torch.from_numpy(drawn.t_K[k : k + 1]).to(dtype),
                torch.from_numpy(drawn.noise_KCDHW[k : k + 1]).to(dtype),
            )
            grads = torch.autograd.grad(loss_B[0], [p for _, p in params])
            mean += networks.flat(list(grads)) / draws
        norm = np.linalg.norm(mean)
        total += mean * min(1.0, clip / norm)
    return total


@pytest.mark.parametrize("backend", ["opacus", "functorch"])
@pytest.mark.parametrize(("draws", "microbatch"), [(1, 3), (4, 2)])
def test_backends_agree(backend: Backend, draws: int, microbatch: int) -> None:
    network = networks.small_denoiser(torch.float64)
    patients = networks.cohort((1, 2, 5, 1, 2))
    sums = [
        PatientGradients(
            network, networks.parameters(network), networks.loss, clip=CLIP, draws_per_patient=draws,
            performance=Performance(backend=chosen, microbatch=microbatch),
        ).clipped_sum(patients, networks.FixedSecret())
        for chosen in (backend, "engine")
    ]  # fmt: skip
    assert relative(*sums) < 1e-10


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draws", [1, 4, 8])
@pytest.mark.parametrize("microbatch", [1, 2, 3, 5, 7])
def test_clipped_sum_is_exact(dtype: torch.dtype, draws: int, microbatch: int) -> None:
    network = networks.small_denoiser(dtype)
    params = networks.parameters(network)
    patients = networks.cohort((1, 2, 5, 1, 2))
    gradients = PatientGradients(
        network,
        params,
        networks.loss,
        clip=CLIP,
        draws_per_patient=draws,
        performance=Performance(microbatch=microbatch),
    )
    found = gradients.clipped_sum(patients, networks.FixedSecret())
    expected = reference(network, params, patients, networks.FixedSecret(), draws=draws)
    assert relative(found, expected) < TOLERANCE[dtype]
    start = 0
    for _, p in params:
        piece = slice(start, start + p.numel())
        start += p.numel()
        assert np.linalg.norm(found[piece] - expected[piece]) <= TOLERANCE[dtype] * (
            np.linalg.norm(expected[piece]) + 1e-2 * np.linalg.norm(expected)
        )


@pytest.mark.parametrize("only", [("embed",), ("conv", "norm"), ("twice", "out.bias"), ("time.weight",)])
def test_frozen_subsets(only: tuple[str, ...]) -> None:
    network = networks.small_denoiser(torch.float64)
    params = networks.parameters(network, *only)
    patients = networks.cohort((1, 2, 5))
    gradients = PatientGradients(network, params, networks.loss, clip=CLIP, draws_per_patient=4)
    found = gradients.clipped_sum(patients, networks.FixedSecret())
    expected = reference(network, params, patients, networks.FixedSecret(), draws=4)
    assert len(found) == sum(p.numel() for _, p in params)
    assert relative(found, expected) < 1e-10


def test_norm_is_bounded_and_unclipped_patients_stay_whole() -> None:
    network = networks.small_denoiser()
    params = networks.parameters(network)
    for patient in networks.cohort((1, 2, 5), scale=30.0):
        gradients = PatientGradients(network, params, networks.loss, clip=CLIP, draws_per_patient=4)
        assert np.linalg.norm(gradients.clipped_sum([patient], SecretRandom())) <= CLIP * (1 + 1e-12)
    gentle = PatientGradients(network, params, networks.loss, clip=1e9, draws_per_patient=4)
    patients = networks.cohort((2,))
    expected = reference(network, params, patients, networks.FixedSecret(), draws=4, clip=1e9)
    assert relative(gentle.clipped_sum(patients, networks.FixedSecret()), expected) < 1e-4


@pytest.mark.parametrize("microbatch", [1, 2])
def test_mean_gradient_is_the_unclipped_mean(microbatch: int) -> None:
    """Mode ``unprotected``: over patients, and over each patient's draws."""
    network = networks.small_denoiser(torch.float64)
    params, patients = networks.parameters(network), networks.cohort((1, 2, 5))
    gradients = PatientGradients(
        network, params, networks.loss, clip=CLIP, draws_per_patient=4,
        performance=Performance(microbatch=microbatch),
    )  # fmt: skip
    found = gradients.mean_gradient(patients, networks.FixedSecret())
    expected = reference(network, params, patients, networks.FixedSecret(), draws=4, clip=1e9) / 3
    assert relative(found, expected) < 1e-10


def test_empty_batch_is_zero() -> None:
    network = networks.small_denoiser()
    gradients = PatientGradients(
        network, networks.parameters(network), networks.loss, clip=CLIP, draws_per_patient=4
    )
    total = gradients.clipped_sum([], SecretRandom())
    assert total.shape == (gradients.dimension,) and not total.any()


def test_zero_gradient_contributes_zero() -> None:
    network = networks.small_denoiser()

    def indifferent(denoiser: nn.Module, z: Tensor, c: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return 0.0 * networks.loss(denoiser, z, c, t, noise)

    gradients = PatientGradients(
        network, networks.parameters(network), indifferent, clip=CLIP, draws_per_patient=2
    )
    assert not gradients.clipped_sum(networks.cohort((1, 2)), SecretRandom()).any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_non_finite_patient_contributes_exactly_zero(
    value: float, backend: Backend, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    network = networks.small_denoiser()
    params = networks.parameters(network)
    patients = networks.cohort((1, 2, 1))
    sick = PatientScans(
        patient_key="sick",
        latents_SCDHW=torch.full((1, *networks.SHAPE), value),
        conditions_S=torch.zeros(1, dtype=torch.int64),
    )
    gradients = PatientGradients(
        network,
        params,
        networks.loss,
        clip=CLIP,
        draws_per_patient=2,
        performance=Performance(backend=backend, microbatch=4),
    )
    with_sick = gradients.clipped_sum([*patients, sick], networks.FixedSecret())
    without = gradients.clipped_sum(patients, networks.FixedSecret())
    assert np.array_equal(with_sick, without) and np.isfinite(with_sick).all() and without.any()
    assert not caplog.records and not recwarn.list


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_patient_does_not_touch_anothers_gradient(backend: Backend) -> None:
    """Bitwise: the microbatch has one shape, so a neighbour's presence changes nothing (sensitivity.py)."""
    network = networks.small_denoiser()
    params = networks.parameters(network)
    patients = networks.cohort((1, 1, 1, 1, 1))
    gradients = PatientGradients(
        network,
        params,
        networks.loss,
        clip=1e9,
        draws_per_patient=2,
        performance=Performance(backend=backend, microbatch=8),
    )
    secret = SecretRandom()
    draws = gradients._draw(patients, secret, lambda u: u)
    with gradients._hooked() as (source, called):
        together = gradients._microbatch_gradients(source, called, *gradients._batch(patients, draws))
        rows = [together.row(patient) for patient in range(5)]
        for patient in range(5):
            batch = gradients._batch(patients[patient : patient + 1], draws[patient : patient + 1])
            alone = gradients._microbatch_gradients(source, called, *batch)
            assert torch.equal(rows[patient], alone.row(0))
            assert together.squared_norms()[patient] == alone.squared_norms()[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_behind(backend: Backend) -> None:
    network = networks.small_denoiser()
    network.eval()
    network.conv.weight.requires_grad_(False)
    before = {id(m): set(vars(m)) for m in network.modules()}
    params = networks.parameters(network, "embed", "out")
    gradients = PatientGradients(
        network,
        params,
        networks.loss,
        clip=CLIP,
        draws_per_patient=2,
        performance=Performance(backend=backend),
    )
    for _ in range(2):
        gradients.clipped_sum(networks.cohort((1, 2)), SecretRandom())

    def failing(*arguments: object) -> Tensor:
        networks.loss(*arguments)
        raise ValueError("in the middle of a forward pass")

    with pytest.raises(ValueError, match="middle"):
        PatientGradients(
            network, params, failing, clip=CLIP, draws_per_patient=2, performance=Performance(backend=backend)
        ).clipped_sum(networks.cohort((1,)), SecretRandom())
    assert {id(m): set(vars(m)) for m in network.modules()} == before
    assert not network.training and not network.conv.training
    assert not network.conv.weight.requires_grad and network.down.weight.requires_grad
    for module in network.modules():
        assert not module._forward_hooks and not module._backward_hooks
    for p in network.parameters():
        assert p.grad is None and not hasattr(p, "grad_sample") and not hasattr(p, "_forward_counter")
    found = PatientGradients(network, params, networks.loss, clip=CLIP, draws_per_patient=2)
    expected = reference(network, params, networks.cohort((1, 2)), networks.FixedSecret(), draws=2)
    assert relative(found.clipped_sum(networks.cohort((1, 2)), networks.FixedSecret()), expected) < 1e-4


class Bypassing(networks.SmallDenoiser):  # type: ignore[misc, name-defined]
    """Uses a layer's weight outside the layer's forward: Opacus never sees that use."""

    def forward(self, z_BCDHW: Tensor, t_B: Tensor, condition_B: Tensor) -> Tensor:
        return super().forward(z_BCDHW, t_B, condition_B) * (1 + self.out.bias.sum() ** 2)


class Unused(networks.SmallDenoiser):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(3, 3)


class Mixing(networks.SmallDenoiser):  # type: ignore[misc, name-defined]
    """Samples of a batch see one another."""

    def forward(self, z_BCDHW: Tensor, t_B: Tensor, condition_B: Tensor) -> Tensor:
        return super().forward(z_BCDHW - z_BCDHW.mean(dim=0, keepdim=True), t_B, condition_B)


class Normed(networks.SmallDenoiser):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("kind", "named"), [(Bypassing, "out.bias"), (Unused, "idle"), (Mixing, "mixes"), (Normed, "Opacus|norm")]
)
def test_layers_without_proper_gradients_are_named(
    kind: type[nn.Module], named: str, backend: Backend
) -> None:
    network = kind()
    with torch.no_grad():
        network.get_parameter("out.bias").fill_(0.5)
    gradients = PatientGradients(
        network,
        networks.parameters(network),
        networks.loss,
        clip=CLIP,
        draws_per_patient=2,
        performance=Performance(backend=backend, microbatch=3),
    )
    with pytest.raises(UnsupportedLayerError, match=named):
        gradients.clipped_sum(networks.cohort((1, 1)), SecretRandom())
    for p in network.parameters():
        assert not hasattr(p, "grad_sample")


def test_loss_must_be_one_number_per_sample() -> None:
    """The trap: a loss of shape [B, 1] silently breaks clipping."""
    network = networks.small_denoiser()
    for wrong in (
        lambda *a: networks.loss(*a)[:, None],
        lambda *a: networks.loss(*a).mean(),
        lambda *a: networks.loss(*a)[:1],
    ):
        gradients = PatientGradients(
            network, networks.parameters(network), wrong, clip=CLIP, draws_per_patient=2
        )
        with pytest.raises(InternalError, match="ndim 1"):
            gradients.clipped_sum(networks.cohort((1,)), SecretRandom())


def test_wrong_parameter_lists_are_refused() -> None:
    network, other = networks.small_denoiser(), networks.small_denoiser()
    params = networks.parameters(network)
    for wrong in ([], [*params, params[0]], networks.parameters(other)):
        with pytest.raises(UsageError):
            PatientGradients(network, wrong, networks.loss, clip=CLIP, draws_per_patient=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_draws_may_take_several_passes(backend: Backend) -> None:
    network = networks.small_denoiser(torch.float64)
    params, patients = networks.parameters(network), networks.cohort((1, 2, 5))
    expected = reference(network, params, patients, networks.FixedSecret(), draws=4)
    for draws_per_pass in (1, 2):
        chosen = Performance(backend=backend, microbatch=2, draws_per_pass=draws_per_pass)
        gradients = PatientGradients(
            network, params, networks.loss, clip=CLIP, draws_per_patient=4, performance=chosen
        )
        found = gradients.clipped_sum(patients, networks.FixedSecret())
        assert relative(found, expected) < 1e-10
    with pytest.raises(UsageError, match="divide"):
        PatientGradients(
            network, params, networks.loss, clip=CLIP, draws_per_patient=4,
            performance=Performance(draws_per_pass=3),
        )  # fmt: skip


def test_settings_that_mean_nothing_are_refused() -> None:
    for wrong in ({"backend": "jax"}, {"microbatch": 0}, {"autocast": torch.float16}):
        with pytest.raises(UsageError):
            Performance(**wrong)  # type: ignore[arg-type]


def test_bfloat16_autocast_clips_as_exactly() -> None:
    """Coarser gradients (here within 5% of float32's), yet each measured as it is added: norm at most C."""
    network = networks.small_denoiser()
    params, patients = networks.parameters(network), networks.cohort((1, 2, 5), scale=3.0)
    low, full = (
        PatientGradients(
            network, params, networks.loss, clip=CLIP, draws_per_patient=4,
            performance=Performance(autocast=autocast),
        )
        for autocast in (torch.bfloat16, None)
    )  # fmt: skip
    sums = [gradients.clipped_sum(patients, networks.FixedSecret()) for gradients in (low, full)]
    assert 0 < relative(*sums) < 0.05
    for patient in patients:
        norm = np.linalg.norm(low.clipped_sum([patient], networks.FixedSecret()))
        assert abs(norm - CLIP) <= 1e-12 * CLIP


def test_monai_unet_is_exact() -> None:
    """Whole small DiffusionModelUNet with self-attention and class embedding, patient by patient."""
    from monai.networks.nets import DiffusionModelUNet

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = DiffusionModelUNet(
            spatial_dims=3, in_channels=2, out_channels=2, num_res_blocks=1, channels=(8, 8),
            attention_levels=(False, True), norm_num_groups=4, num_head_channels=4, num_class_embeds=3,
        ).double()  # fmt: skip
        for p in unet.parameters():
            if not p.any():
                nn.init.normal_(p, std=0.05)

    def unet_loss(denoiser: nn.Module, z: Tensor, c: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        w = t.view(-1, 1, 1, 1, 1)
        out = denoiser((1 - w) * z + w * noise, timesteps=1000 * t, class_labels=c)
        return (out - noise + z).square().flatten(1).mean(dim=1)

    params = networks.parameters(unet)
    patients = networks.cohort((1, 3, 2))
    gradients = PatientGradients(
        unet, params, unet_loss, clip=CLIP, draws_per_patient=4, performance=Performance(microbatch=2)
    )
    found = gradients.clipped_sum(patients, networks.FixedSecret())
    expected = reference(unet, params, patients, networks.FixedSecret(), draws=4, loss=unet_loss)
    assert relative(found, expected) < 1e-9
