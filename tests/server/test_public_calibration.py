"""Public figures of the secondary attacks: what a pooled attack's thresholds come from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deploy import public_networks
from privacy.audit.attacks import secondary_scores
from privacy.audit.proposal import propose_secondary_edges, usual_attacks
from privacy.dp.patients import PatientScans
from server.public_calibration import FIGURE_QUANTILES, load_calibration, secondary_figures
from shared.model.denoiser import build_denoiser
from shared.model.presets import preset_named
from shared.model.shipped import shipped_pair
from shared.study_plan import SecondaryAttackClause

SHAPE = (4, 6, 6, 6)


def test_figures_are_quantiles_of_the_attack_on_the_prior_without_side_or_calibration() -> None:
    """A calibrated attack on the prior itself would be zero everywhere."""
    generator = torch.Generator().manual_seed(2)
    patients = [
        PatientScans(
            patient_key=f"p{i}",
            latents_SCDHW=torch.randn((1, *SHAPE), generator=generator),
            conditions_S=torch.tensor([i % 2]),
        )
        for i in range(5)
    ]
    prior = build_denoiser(preset_named("micro"), n_conditions=2, seed=4).eval()
    attack = SecondaryAttackClause(attack="sima", timesteps=(0.2,), calibrated=True, guidance_scale=2.0)
    stages: list[str] = []
    found = secondary_figures(prior, patients, [attack], progress=lambda *facts: stages.append(facts[0]))
    plain = attack.model_copy(update={"calibrated": False, "member_side": "high"})
    figures = secondary_scores(plain, prior, patients, public_denoiser=prior, plan_digest=bytes(32))
    assert list(found) == ["sima, calibrated, guidance 2"] and len(stages) == len(patients)
    assert (figures > 0).all()
    assert found["sima, calibrated, guidance 2"] == pytest.approx(
        np.quantile(figures, FIGURE_QUANTILES).tolist(), rel=1e-4
    )


def test_the_pair_that_ships_has_figures_of_every_attack_that_its_plans_make() -> None:
    figures = shipped_pair("micro").recipe["secondary_figures"]
    attacks = {attack.attack_id: attack for attack in usual_attacks(guidance_scale=2.0)}
    assert set(figures) == set(attacks)
    for name, values in figures.items():
        assert len(values) == len(FIGURE_QUANTILES) and values == sorted(values) and values[0] > 0
        assert len(propose_secondary_edges(attacks[name], values)) >= 8


@pytest.mark.parametrize("shipped", [True, False])
def test_kept_figures_are_taken_over_and_missing_ones_measured_where_asked(
    shipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def calibrate(**options: Any) -> dict[str, Any]:
        asked.append(options)
        return {
            "format": "lacuna/public-calibration/v1", "public_losses": [], "copy_distance": 1.0,
            "false_copy_rate": 0.01, "copy_samples": 500, "gradient_norms": [],
            "secondary_figures": {attack.attack_id: [1.0] for attack in options["attacks"]},
        }  # fmt: skip

    monkeypatch.setattr(public_networks, "calibrate_public", calibrate)
    pair = shipped_pair("micro")
    shutil.copytree(pair.autoencoder_path.parent, tmp_path, dirs_exist_ok=True)
    if not shipped:
        del pair.recipe["secondary_figures"]
    public_networks._calibrate(tmp_path, pair, [], unseen=None, calibrate_attacks=not shipped)
    figures = load_calibration(tmp_path)["secondary_figures"]
    assert bool(asked[0]["attacks"]) is not shipped
    assert len(figures) == len(usual_attacks(guidance_scale=2.0))
    assert (figures["pia"] == [1.0]) is not shipped
