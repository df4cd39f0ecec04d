"""The server's model: Adam, moving average and checkpoints that continue as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from small_plan import DIMENSION, Keys, small_plan

from server.global_model import GlobalModel
from shared.checkpoint import load_tensors, save_tensors
from shared.errors import CoordinatorError
from shared.study_plan import StudyPlan

KEYS = Keys.of(3)
PLAN = small_plan(KEYS, model__server_learning_rate=0.01, model__ema_decay=0.9)
LOCAL = small_plan(KEYS, privacy__mode="local", privacy__local_steps=3, model__ema_decay=0.5)
START = np.linspace(-1, 1, DIMENSION, dtype=np.float32)


def totals(n: int, seed: int = 0) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(-5000, 5000, DIMENSION) for _ in range(n)]


def run(plan: StudyPlan, sums: list[NDArray[np.int64]], model: GlobalModel | None = None) -> GlobalModel:
    model = model or GlobalModel(plan, START)
    for total in sums:
        model.apply(total, n_survivors=3)
    return model


@pytest.mark.parametrize("plan", [PLAN, LOCAL], ids=["distributed", "local"])
@pytest.mark.parametrize("died_after", [0, 1, 4])
def test_a_restored_model_continues_to_the_same_bytes(
    tmp_path: Path, plan: StudyPlan, died_after: int
) -> None:
    sums = totals(6)
    straight = run(plan, sums)
    run(plan, sums[:died_after]).save(tmp_path / "c.safetensors", {})
    resumed = run(plan, sums[died_after:], GlobalModel.restore(plan, tmp_path / "c.safetensors"))
    assert resumed.round == straight.round == 6
    assert resumed.weights.tobytes() == straight.weights.tobytes()
    assert resumed.ema.tobytes() == straight.ema.tobytes()


@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_distributed_is_adam_on_the_sum_over_a_public_constant(rate: float) -> None:
    """torch's own Adam on total * grid_step / (declared_patients * q); the survivors' number is not used."""
    plan = small_plan(KEYS, model__server_learning_rate=0.01, privacy__sampling_rate=rate)
    reference = torch.from_numpy(START.copy()).requires_grad_()
    optimizer = torch.optim.Adam([reference], lr=0.01)
    sums = totals(3)
    for total in sums:
        gradient = total * plan.secure_aggregation.grid_step / (plan.privacy.declared_patients * rate)
        reference.grad = torch.from_numpy(gradient.astype(np.float32))
        optimizer.step()
    np.testing.assert_array_equal(run(plan, sums).weights, reference.detach().numpy())
    model = GlobalModel(plan, START)
    for total in sums:
        model.apply(total, n_survivors=1)
    np.testing.assert_array_equal(model.weights, reference.detach().numpy())


def test_local_averages_the_survivors_deltas() -> None:
    (total,) = totals(1)
    step = LOCAL.secure_aggregation.grid_step
    expected = START + (total * step / 3).astype(np.float32)
    model = run(LOCAL, [total])
    np.testing.assert_array_equal(model.weights, expected)
    np.testing.assert_allclose(model.ema, (START + expected) / 2, rtol=1e-6, atol=1e-6)


def test_the_average_starts_at_the_prior() -> None:
    model = GlobalModel(PLAN, START)
    np.testing.assert_array_equal(model.ema, START)
    (total,) = totals(1)
    run(PLAN, [total], model)
    np.testing.assert_allclose(model.ema, 0.9 * START + 0.1 * model.weights, rtol=1e-5, atol=1e-6)


def test_callers_cannot_change_the_model_through_what_they_read() -> None:
    model = GlobalModel(PLAN, START)
    for vector in (model.weights, model.ema):
        with pytest.raises(ValueError, match="read-only"):
            vector[:] = 9
    np.testing.assert_array_equal(model.weights, START)
    np.testing.assert_array_equal(model.ema, START)


def test_a_step_to_weights_that_are_not_finite_is_not_taken() -> None:
    plan = small_plan(KEYS, privacy__mode="local", secure_aggregation__grid_step=1e30)
    model = GlobalModel(plan, START)
    with pytest.raises(CoordinatorError, match="not finite"):
        model.apply(np.full(DIMENSION, 2**60), n_survivors=1)
    np.testing.assert_array_equal(model.weights, START)
    assert model.round == 0


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(CoordinatorError, match=f"the plan says {DIMENSION}"):
        GlobalModel(PLAN, START[:-1])


def damage(tensors: dict[str, Any], metadata: dict[str, str], how: str) -> None:
    match how:
        case "nan":
            tensors["ema"][3] = np.nan
        case "short":
            tensors["weights"] = tensors["weights"][:-1]
        case "no step":
            del tensors["adam.step"]
        case "infinite step":
            tensors["adam.step"][0] = np.inf
        case "no moments":
            del tensors["adam.exp_avg_sq"]
        case "no round":
            del metadata["round"]
        case "round":
            metadata["round"] = "-1"


@pytest.mark.parametrize(
    "how", ["nan", "short", "no step", "infinite step", "no moments", "no round", "round"]
)
def test_damaged_checkpoints_are_the_coordinators_to_mend(tmp_path: Path, how: str) -> None:
    path = tmp_path / "c.safetensors"
    run(PLAN, totals(1)).save(path, {})
    tensors, metadata = load_tensors(path)
    damage(tensors, metadata, how)
    save_tensors(path, tensors, metadata)
    with pytest.raises(CoordinatorError, match="damaged"):
        GlobalModel.restore(PLAN, path)


def test_truncated_missing_and_foreign_checkpoints_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    with pytest.raises(CoordinatorError, match=r"c\.safetensors"):
        GlobalModel.restore(PLAN, path)
    run(PLAN, totals(1)).save(path, {})
    with pytest.raises(CoordinatorError, match="another plan"):
        GlobalModel.restore(LOCAL, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CoordinatorError, match="damaged"):
        GlobalModel.restore(PLAN, path)
