"""A plan from the shipped networks keeps its promise, or is refused by clause; comparisons are honest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_plan import Keys, plan_document

from privacy.audit.proposal import pooling_outlook
from privacy.dp.execution_plan import check_plan
from server.comparison import Comparison, _paired_interval, compare_with_prior
from server.planning import PlanChoices, draft_plan
from shared.checkpoint import file_sha256
from shared.errors import CoordinatorError, LacunaError, UsageError
from shared.model.candidate import candidate_network, load_candidate, load_prior, write_candidate
from shared.model.denoiser import flatten
from shared.model.shipped import shipped_pair
from shared.plan_package import PlanPackage
from shared.study_plan import RosterClause, StudyPlan

ROSTER = RosterClause.model_validate(plan_document(Keys.of(3))["roster"])
CALIBRATION: dict[str, Any] = {
    "format": "lacuna/public-calibration/v1",
    "public_patients": 12,
    "unseen_patients": 12,
    "public_losses": [round(0.8 + 0.05 * i, 3) for i in range(12)],
    "copy_distance": 0.5,
    "false_copy_rate": 0.01,
    "copy_samples": 500,
    "subset": "all",
    "gradient_norms": [0.4, 0.6, 0.9],
}


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pair that ships, with a calibration of fixed figures (the real one takes a minute)."""
    folder = tmp_path_factory.mktemp("public")
    pair = shipped_pair("micro")
    shutil.copytree(pair.autoencoder_path.parent, folder, dirs_exist_ok=True)
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    return folder


def draft(public: Path, **choices: Any) -> StudyPlan:
    values: dict[str, Any] = {"study_id": "s", "rare_condition": "rare", "simulated": True, "rounds": 3}
    return draft_plan(PlanChoices(**{**values, **choices}), roster=ROSTER, public=public)


def test_the_default_plan_keeps_its_promise(public: Path) -> None:
    plan = draft(public, rounds=30, epsilon=8.0)
    checked = check_plan(plan)
    assert checked.planned_epsilon().reported <= 8.0
    assert plan.privacy.max_attempts == 36
    assert plan.secure_aggregation.threshold == 3
    assert plan.data.conditions == ("common", "rare")
    assert plan.release.officer_approval
    assert plan.audit.max_auc < 1
    assert plan.audit.copy_samples == 500
    assert plan.audit.copy_embedding_sha256 == file_sha256(public / "copy_embedding.safetensors")


def test_more_samples_than_the_copy_distance_is_calibrated_for_are_refused(public: Path) -> None:
    with pytest.raises(UsageError, match="calibrated for 500 samples"):
        draft(public, copy_samples=501)


def test_secondary_attacks_are_all_unguided_or_none(public: Path) -> None:
    attacks = {
        which: draft(public, secondary_attacks=which).audit.secondary_attacks
        for which in ("all", "unguided", "none")
    }
    assert {attack.guidance_scale for attack in attacks["all"]} == {1.0, 2.0}
    assert attacks["unguided"] == tuple(a for a in attacks["all"] if a.guidance_scale == 1.0)
    assert len(attacks["unguided"]) == 4 and attacks["none"] == ()


def test_pooled_attacks_get_thresholds_from_the_public_calibration(public: Path, tmp_path: Path) -> None:
    """A calibration without them says what is missing."""
    kept = {name: [0.1 + 0.02 * i for i in range(11)] for name in ("pia", "loss, calibrated, guidance 2")}
    folder = tmp_path / "public"
    shutil.copytree(public, folder)
    (folder / "calibration.json").write_text(json.dumps({**CALIBRATION, "secondary_figures": kept}))
    plan = draft(folder, pool_attacks=("pia", "loss, calibrated, guidance 2"), pooled_weight=4)
    pooled = {attack.attack_id: attack for attack in plan.audit.pooled_attacks}
    assert set(pooled) == {"pia", "loss, calibrated, guidance 2"}
    assert {attack.pooled_weight for attack in pooled.values()} == {4}
    middle = -kept["pia"][5]
    assert pooled["pia"].edges[0] < middle < pooled["pia"].edges[-1] < 0
    assert "pia (8 thresholds)" in pooling_outlook(plan) and "4% more noise" in pooling_outlook(plan)
    exact = draft(folder, mode="unprotected", pool_attacks=("pia",)).audit.pooled_attacks[0]
    assert len(exact.edges) > len(pooled["pia"].edges)
    with pytest.raises(UsageError, match="no public figures of 'pia'"):
        draft(public, pool_attacks=("pia",))
    with pytest.raises(UsageError, match="no attack 'pia, guidance 2'"):
        draft(folder, secondary_attacks="unguided", pool_attacks=("pia, guidance 2",))
    with pytest.raises(UsageError, match="pooled_weight"):
        draft(folder, pool_attacks=("pia",), pooled_weight=17)


def test_a_smaller_epsilon_means_more_noise(public: Path) -> None:
    assert draft(public, epsilon=2.0).privacy.noise_multiplier > draft(public).privacy.noise_multiplier


def test_a_leaky_plan_has_no_noise_and_no_epsilon(public: Path) -> None:
    plan = draft(public, mode="unprotected", local_steps=20)
    assert (plan.privacy.epsilon, plan.privacy.noise_multiplier, plan.privacy.audit_noise_multiplier) == (
        None,
        0,
        0,
    )
    check_plan(plan)
    with pytest.raises(LacunaError, match="simulated data only"):
        draft(public, mode="unprotected", simulated=False)


def test_a_plan_in_mode_local_keeps_its_promise(public: Path) -> None:
    plan = draft(public, mode="local", local_steps=2)
    assert check_plan(plan).planned_epsilon().reported <= 8.0
    assert plan.privacy.local_steps == 2


def test_a_plan_of_sampled_steps_keeps_its_promise_by_both_accountants(public: Path) -> None:
    plan = draft(public, sampling_rate=0.25, trainable="conditioning")
    planned = check_plan(plan).planned_epsilon()
    assert planned.saddle_point is not None
    assert 7.9 < max(planned.pld, planned.saddle_point) == planned.reported <= 8.0
    assert plan.privacy.sampling_rate == 0.25
    assert plan.privacy.noise_multiplier < draft(public, trainable="conditioning").privacy.noise_multiplier


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"rare_condition": "none"}, "no condition 'none'"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"epsilon": None}, "epsilon"),
        ({"delta": 2.0}, "delta"),
        ({"delta": 0.0}, "delta"),
        ({"rounds": 0}, "rounds"),
        ({"declared_patients": 0}, "declared_patients"),
        ({"sampling_rate": 0.0}, "sampling_rate"),
        ({"sampling_rate": 1.5}, "sampling_rate"),
        ({"threshold": 2}, "threshold"),
        ({"threshold": 4}, "threshold"),
        ({"max_colluding": 2}, "max_colluding|threshold"),
        ({"clip_norm": -1.0}, "clip_norm"),
        ({"local_steps": 3}, "local_steps"),
        ({"max_attempts": 1}, "max_attempts"),
        ({"min_power": 7.0}, "min_power"),
        ({"server_learning_rate": -1.0}, "server_learning_rate"),
    ],
)
def test_choices_that_make_no_plan_are_refused_by_name(
    public: Path, choices: dict[str, Any], words: str
) -> None:
    with pytest.raises(LacunaError, match=words):
        draft(public, **choices)


def test_networks_without_calibration_are_refused(public: Path, tmp_path: Path) -> None:
    with pytest.raises(LacunaError):
        draft(tmp_path)
    folder = tmp_path / "public"
    shutil.copytree(public, folder)
    for text in ("{}", "x", json.dumps({"format": CALIBRATION["format"]})):
        (folder / "calibration.json").write_text(text)
        with pytest.raises(CoordinatorError, match="calibration"):
            draft(folder)


@pytest.fixture(scope="module")
def package(public: Path) -> PlanPackage:
    plan = draft(public).model_copy(deep=True)
    quick = plan.model_dump(mode="json")
    quick["model"]["sampling_steps"] = 2
    return PlanPackage(root=public, plan=StudyPlan.model_validate(quick), envelope=b"")


def compared(package: PlanPackage, candidate: Path, **changes: Any) -> Comparison:
    options: dict[str, Any] = {"condition": "rare", "labels": ("lesion",), "count": 3, "seed": 5}
    return compare_with_prior(package, candidate, **{**options, **changes})


def test_the_prior_differs_from_itself_by_nothing_and_from_another_by_something(
    package: PlanPackage, tmp_path: Path
) -> None:
    _, parameters = load_prior(package.plan, package.prior)
    vector = flatten(parameters)
    write_candidate(package.plan, package.prior, vector, tmp_path / "same.safetensors")
    labels = package.plan.data.labels
    same = compared(package, tmp_path / "same.safetensors", labels=labels)
    assert (same.difference_mm3, same.low, same.high, same.excludes_zero) == (0, 0, 0, False)
    assert same.prior_mm3 == same.candidate_mm3
    assert json.loads(json.dumps(same.to_dict()))["excludes_zero"] is False
    rng = np.random.default_rng(0)
    other = (vector + 0.3 * rng.standard_normal(vector.shape)).astype(np.float32)
    write_candidate(package.plan, package.prior, other, tmp_path / "other.safetensors")
    figures = compared(package, tmp_path / "other.safetensors", labels=labels, sheet=tmp_path / "sheet.png")
    assert figures.difference_mm3 != 0
    assert figures.difference_mm3 == pytest.approx(figures.candidate_mm3 - figures.prior_mm3)
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_audited_is_what_is_written_and_its_null_class_is_public(
    package: PlanPackage, tmp_path: Path
) -> None:
    plan = package.plan
    prior, parameters = load_prior(plan, package.prior)
    vector = flatten(parameters) + 1
    write_candidate(plan, package.prior, vector, tmp_path / "candidate.safetensors")
    written = load_candidate(plan, tmp_path / "candidate.safetensors")
    audited = candidate_network(plan, package.prior, vector)
    for (name, one), other in zip(written.state_dict().items(), audited.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    before, after = (network.unet.class_embedding.table.weight for network in (prior, written))
    null = prior.null_index
    assert torch.equal(after[null], before[null]) and torch.allclose(after[:null], before[:null] + 1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"condition": "none"}, "no condition"),
        ({"labels": ("lesion", "tail")}, "no label 'tail'"),
        ({"labels": ()}, "no label"),
        ({"count": 1}, "at least 2"),
    ],
)
def test_comparisons_of_nothing_are_refused(
    package: PlanPackage, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        compared(package, package.prior, **changes)


def test_the_interval_is_paired_and_repeatable() -> None:
    """Large differences between samples, the same shift in each: the interval is the shift alone."""
    before = np.random.default_rng(1).normal(1000, 500, 200)
    low, high = _paired_interval(before + 10 - before)
    assert low == pytest.approx(10)
    assert high == pytest.approx(10)
    differences = np.random.default_rng(2).normal(1, 1, 400)
    assert _paired_interval(differences) == _paired_interval(differences)
    low, high = _paired_interval(differences)
    assert low < differences.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
