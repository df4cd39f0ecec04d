"""The denoiser under Opacus: per-sample gradients equal batches of one; subsets are canonical."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator

from shared.errors import UsageError
from shared.model.denoiser import (
    PRIVATE_SUBSETS,
    Denoiser,
    assign,
    assign_trained,
    build_denoiser,
    flatten,
    parameter_subset,
)
from shared.model.diffusion import per_sample_loss
from shared.model.low_rank import insert_low_rank, merge_low_rank
from shared.model.presets import preset_named

MICRO = preset_named("micro")
SHAPE = MICRO.latent_shape(MICRO.grid_shape)


def _denoiser() -> Denoiser:
    """Every parameter away from zero, so that no gradient vanishes by MONAI's zero initialisation."""
    built = build_denoiser(MICRO, n_conditions=2, seed=1)
    _shake(built)
    return built


def _shake(denoiser: Denoiser) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, p in sorted(denoiser.named_parameters()):
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def _batch(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn((n, *SHAPE), generator=g),
        torch.arange(n) % 3,
        torch.linspace(0.05, 0.95, n),
        torch.randn((n, *SHAPE), generator=g),
    )


def test_opacus_finds_nothing_to_object_to() -> None:
    denoiser = _denoiser()
    assert ModuleValidator.validate(denoiser, strict=False) == []
    insert_low_rank(denoiser, 2)
    assert ModuleValidator.validate(denoiser, strict=False) == []


@pytest.mark.parametrize("subset", PRIVATE_SUBSETS)
def test_per_sample_gradients_equal_batches_of_one(subset: str) -> None:
    """Attention, embedding, convolutions, adapters: Opacus' hooks against plain autograd."""
    denoiser = _denoiser()
    params = parameter_subset(denoiser, subset)
    if subset == "low_rank":
        _shake(denoiser)
    z, condition, t, noise = _batch(3)
    expected = []
    for i in range(3):
        denoiser.zero_grad()
        row = slice(i, i + 1)
        per_sample_loss(denoiser, z[row], condition[row], t[row], noise[row]).sum().backward()
        expected.append({name: p.grad.clone() for name, p in params if p.grad is not None})
        assert set(expected[-1]) == {name for name, _ in params}
    hooked = GradSampleModule(denoiser, loss_reduction="sum")
    hooked.zero_grad()
    per_sample_loss(hooked, z, condition, t, noise).sum().backward()
    for name, p in params:
        assert p.grad_sample.shape == (3, *p.shape)
        for i in range(3):
            assert torch.allclose(p.grad_sample[i], expected[i][name], rtol=1e-3, atol=2e-5), name
        assert expected[0][name].abs().max() > 0 or "table" in name, f"{name} has no gradient: tests nothing"


def test_embedding_gradient_touches_the_samples_own_row_alone() -> None:
    denoiser = _denoiser()
    params = dict(parameter_subset(denoiser, "conditioning"))
    z, condition, t, noise = _batch(3)
    hooked = GradSampleModule(denoiser, loss_reduction="sum")
    per_sample_loss(hooked, z, condition, t, noise).sum().backward()
    rows = params["unet.class_embedding.table.weight"].grad_sample.abs().sum(dim=2)
    assert torch.equal(rows > 0, torch.eye(3, dtype=torch.bool))


def test_subsets_are_sorted_nested_and_freeze_the_rest() -> None:
    denoiser = _denoiser()
    everything = [name for name, _ in parameter_subset(denoiser, "all")]
    assert everything == sorted(everything) and len(everything) == len(list(denoiser.parameters()))
    sizes = {"all": len(everything)}
    for subset in ("attention", "conditioning"):
        names = [name for name, _ in parameter_subset(denoiser, subset)]
        sizes[subset] = len(names)
        assert names == sorted(names) and 0 < len(names) < len(everything)
        assert {n for n, p in denoiser.named_parameters() if p.requires_grad} == set(names)
    conditioning = {name for name, _ in parameter_subset(denoiser, "conditioning")}
    assert "unet.class_embedding.table.weight" in conditioning
    assert any("time_emb_proj" in name for name in conditioning)
    assert not any("conv" in name or "attn" in name for name in conditioning)
    embedding = {name for name, _ in parameter_subset(denoiser, "class_embedding")}
    assert embedding == {name for name in conditioning if "class_embedding" in name}
    with pytest.raises(UsageError, match="no such"):
        parameter_subset(denoiser, "everything")


@pytest.mark.parametrize("subset", PRIVATE_SUBSETS)
def test_noise_on_the_null_class_is_not_released(subset: str) -> None:
    """The vector's null row is noise alone: what trained is assigned, the null class stays public."""
    public, trained = _denoiser(), _denoiser()
    params = parameter_subset(trained, subset)
    vector = flatten(params) + 1
    assign_trained(trained, params, vector)
    before, after = (network.unet.class_embedding.table.weight for network in (public, trained))
    null = public.null_index
    assert torch.equal(before[null], after[null])
    if subset in ("all", "class_embedding", "conditioning"):
        assert torch.allclose(after[:null], before[:null] + 1)
        assign(params, vector)
        assert not torch.equal(before[null], after[null])


def test_flatten_and_assign_are_inverse_and_check_before_they_write() -> None:
    denoiser = _denoiser()
    params = parameter_subset(denoiser, "conditioning")
    vector = flatten(params)
    assert vector.dtype == np.float32 and vector.ndim == 1
    assert vector.size == sum(p.numel() for _, p in params)
    changed = vector + np.arange(vector.size, dtype=np.float32) * 1e-4
    assign(params, changed)
    assert np.array_equal(flatten(params), changed)
    changed[0] = np.nan
    for wrong in (changed, vector[:-1], vector[None]):
        before = flatten(params)
        with pytest.raises(UsageError):
            assign(params, wrong)
        assert np.array_equal(flatten(params), before)


def test_adapters_are_inert_when_inserted_equal_everywhere_and_merge_away() -> None:
    a, b = _denoiser(), _denoiser()
    z, condition, t, _ = _batch(2)
    with torch.no_grad():
        before = a(z, t, condition)
        plain_names = set(a.state_dict())
        params_a, params_b = parameter_subset(a, "low_rank"), parameter_subset(b, "low_rank")
        assert np.array_equal(flatten(params_a), flatten(params_b))
        assert torch.allclose(a(z, t, condition), before, atol=1e-6)
        count = len(params_a)
        assert len(parameter_subset(a, "low_rank")) == count > 0
        assign(params_a, flatten(params_a) + 0.02)
        moved = a(z, t, condition)
        assert (moved - before).abs().max() > 1e-3
        merge_low_rank(a)
        assert set(a.state_dict()) == plain_names
        assert torch.allclose(a(z, t, condition), moved, atol=1e-4)


def test_an_unseen_condition_starts_as_a_copy() -> None:
    denoiser = _denoiser()
    denoiser.copy_condition(source=0, target=1)
    z, _, t, _ = _batch(2)
    with torch.no_grad():
        common, rare = (denoiser(z, t, torch.full((2,), row)) for row in (0, 1))
        null = denoiser(z, t, torch.full((2,), denoiser.null_index))
    assert torch.equal(common, rare) and not torch.equal(common, null)


@pytest.mark.parametrize("n", [0, 1025])
def test_number_of_conditions_is_bounded(n: int) -> None:
    with pytest.raises(UsageError):
        build_denoiser(MICRO, n_conditions=n)
