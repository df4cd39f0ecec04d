"""The comparison of modes: how figures become rows, and a training of each mode as small as can be."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.modes_compared.comparison import (
    COLUMNS,
    claimed_noise,
    compare,
    print_table,
    write_plot,
    write_table,
)

DATA = Path(os.environ.get("LACUNA_DATA", Path(__file__).parents[3] / "shared" / "data"))


def training(mode: str, n_sites: int, rate: float, repeat: int, losses: list[float], **more: Any) -> Any:
    return {
        "mode": mode, "n_sites": n_sites, "rounds": len(losses) - 1, "local_steps": 1, "learning_rate": rate,
        "repeat": repeat, "threshold": 3, "dimension": 100, "members": 9,
        "planned_epsilon": 8.0, "steps_accounted": 3, "attempts_charged": 2, "noise_multiplier": 2.0,
        "signal_and_noise": [[1.0, 20.0], [2.0, 20.0]], "held_out_loss": losses, **more,
    }  # fmt: skip


TRAININGS = [
    training("distributed", 3, 1e-3, 0, [1.0, 0.9, 0.8]),
    training("distributed", 3, 3e-3, 0, [1.0, 0.8, 0.7]),
    training("distributed", 3, 3e-3, 1, [1.0, 0.8, 0.9]),
    training("distributed", 3, 1e-3, 1, [1.0, 0.1, 0.1]),
    training("local", 10, 1e-3, 0, [1.0, 1.1, 1.2]),
]


def test_rates_are_chosen_by_the_first_repeat_and_figures_are_medians() -> None:
    """A rate that was lucky in a later repeat is not chosen for it."""
    first, second = compare(TRAININGS)
    assert (first["learning_rate"], first["repeats"]) == (3e-3, 2)
    assert first["held_out_loss"] == pytest.approx(0.8) and first["held_out_loss_highest"] == 0.9
    assert first["signal_to_noise_median"] == pytest.approx(0.075)
    assert first["signal_to_noise_first_round"] == pytest.approx(0.05)
    assert first["other_rates"] == "0.001:0.8000"
    assert (second["mode"], second["n_sites"]) == ("local", 10)


def test_noise_that_a_sum_must_have() -> None:
    """Three sites, t - c = 2: 3/2 of the variance; ten sites that each add all of it: ten times."""
    assert claimed_noise(TRAININGS[0]) == pytest.approx(2.0 * (3 / 2) ** 0.5 * 10)
    assert claimed_noise(TRAININGS[-1]) == pytest.approx(2.0 * 10**0.5 * 10)


def test_table_and_plot_are_written(tmp_path: Path) -> None:
    rows = compare(TRAININGS)
    write_table(rows, tmp_path / "t.csv")
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[0].split(",") == list(COLUMNS) and len(lines) == 3
    write_plot(TRAININGS, rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert "distributed, 2 x 1" in print_table(rows)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["distributed", "local"])
def test_a_training_of_real_sites_has_the_noise_of_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    """Hippocampus scans, three sites, two rounds; networks hardly trained. Noise is met to 1%."""
    from tests.benchmarks.modes_compared import consortium

    if not (DATA / consortium.TASK).exists():
        pytest.skip(f"no {consortium.TASK} in {DATA} (LACUNA_DATA)")
    monkeypatch.setattr(consortium, "AUTOENCODER_STEPS", 2)
    monkeypatch.setattr(consortium, "PRIOR_STEPS", 2)
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    public = consortium.PublicPart(DATA, tmp_path / "public", progress=lambda _: None)
    assert not set(public.members) & set(public.patients)
    setting = consortium.Setting(mode=mode, n_sites=3, local_steps=1, rounds=2, learning_rate=1e-3, repeat=0)
    row = consortium.train(tmp_path / "run", setting, public)
    assert row["members"] == len(public.members) and row["attempts_charged"] == 2
    assert 7.9 < row["planned_epsilon"] <= 8.0
    for signal, noise in row["signal_and_noise"]:
        assert noise == pytest.approx(claimed_noise(row), rel=0.01)
        assert 0 < signal <= row["members"] + 1
    assert len(row["held_out_loss"]) == 3
