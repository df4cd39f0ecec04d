"""Weights of a module, to a file and back; a file of another network changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.checkpoint import save_tensors
from shared.errors import MalformedMessageError
from shared.model.denoiser import build_denoiser
from shared.model.presets import preset_named
from shared.model.weights import WeightsMismatchError, load_weights, save_weights, state_arrays

MICRO = preset_named("micro")


def test_full_and_half_precision_round_trips(tmp_path: Path) -> None:
    a, b = build_denoiser(MICRO, n_conditions=2, seed=1), build_denoiser(MICRO, n_conditions=2, seed=2)
    save_weights(a, tmp_path / "full", {"network": "prior"})
    assert load_weights(b, tmp_path / "full") == {"network": "prior"}
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    save_weights(a, tmp_path / "half", {}, half=True)
    load_weights(b, tmp_path / "half")
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert y.dtype == torch.float32 and torch.equal(y, x.half().float())
    assert (tmp_path / "half").stat().st_size < 0.55 * (tmp_path / "full").stat().st_size


def test_a_file_of_another_network_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    module = build_denoiser(MICRO, n_conditions=2, seed=1)
    before = state_arrays(module)
    save_weights(build_denoiser(MICRO, n_conditions=3, seed=1), tmp_path / "three", {})
    with pytest.raises(WeightsMismatchError, match="shape"):
        load_weights(module, tmp_path / "three")
    name = sorted(before)[0]
    save_tensors(tmp_path / "missing", {k: v for k, v in before.items() if k != name}, {})
    save_tensors(tmp_path / "surplus", {**before, "extra": np.zeros(1, np.float32)}, {})
    save_tensors(tmp_path / "nan", {**before, name: np.full_like(before[name], np.nan)}, {})
    for file, word in [("missing", "missing"), ("surplus", "unexpected"), ("nan", "finite")]:
        with pytest.raises(WeightsMismatchError, match=word):
            load_weights(module, tmp_path / file)
    with pytest.raises(MalformedMessageError):
        load_weights(module, tmp_path / "absent")
    after = state_arrays(module)
    assert all(np.array_equal(after[k], before[k]) for k in before)
