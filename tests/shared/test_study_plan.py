"""The plan: each validator says which clause is wrong, TOML round trips, the digest covers everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_plan import Keys, changed, plan_document, small_plan

from shared.study_plan import (
    InvalidPlanError,
    default_max_attempts,
    default_threshold,
    load_plan_toml,
    parse_plan,
)

DOCUMENT = plan_document(Keys.of(4))
OFFICER = DOCUMENT["roster"]["officer_key"]
SITES = DOCUMENT["roster"]["sites"]

WRONG: list[tuple[str, Any, str]] = [
    ("format", "lacuna/study-plan/v2", "format"),
    ("study_id", "Has Capitals", "study_id"),
    ("study_id", "ends-in-newline\n", "study_id"),
    ("study_id", ..., "study_id"),
    ("title", "x" * 201, "title"),
    ("roster.sites", SITES[:1], "roster.sites"),
    ("roster.sites", [*SITES, SITES[0]], "a site id stands twice"),
    ("roster.sites.1.identity_key", OFFICER, "the same key stands for two"),
    ("roster.coordinator_key", OFFICER, "the same key stands for two"),
    ("roster.coordinator_key", OFFICER.upper(), "roster.coordinator_key"),
    ("data.rare_condition", "none", "rare_condition is not one of conditions"),
    ("data.conditions", ["rare", "rare"], "a condition stands twice"),
    ("data.grid_shape", [4, 16, 16], "8 to 512 voxels"),
    ("data.grid_shape", [16, 16], "data.grid_shape"),
    ("data.spacing_mm", [0.01, 1, 1], "0.05 to 20 mm"),
    ("data.intensity_percentiles", [99, 1], "ascend"),
    ("model.autoencoder_sha256", "xyz", "model.autoencoder_sha256"),
    ("model.trainable", "everything", "model.trainable"),
    ("model.dimension", 0, "model.dimension"),
    ("model.server_learning_rate", float("nan"), "model.server_learning_rate"),
    ("model.ema_decay", 1.0, "model.ema_decay"),
    ("privacy.unit", "scan", "privacy.unit"),
    ("privacy.neighbouring", "replace_one", "privacy.neighbouring"),
    ("privacy.epsilon", ..., "epsilon is left out"),
    ("privacy.epsilon", -1.0, "privacy.epsilon"),
    ("privacy.epsilon", float("inf"), "privacy.epsilon"),
    ("privacy.delta", 0.5, "privacy.delta"),
    ("privacy.sampling_rate", 1.5, "privacy.sampling_rate"),
    ("privacy.draws_per_patient", 0, "privacy.draws_per_patient"),
    ("privacy.max_attempts", 1, "max_attempts is smaller than rounds"),
    ("privacy.noise_multiplier", 0.0, "needs noise multipliers above 0"),
    ("privacy.audit_noise_multiplier", 0.0, "needs noise multipliers above 0"),
    ("privacy.local_steps", 2, "local_steps is 1"),
    ("secure_aggregation.threshold", 5, "larger than the number of sites"),
    ("secure_aggregation.threshold", 2, "is too small"),
    ("secure_aggregation.max_colluding", 2, "threshold 3 is too small"),
    ("secure_aggregation.modulus_bits", 48, "secure_aggregation.modulus_bits"),
    ("secure_aggregation.grid_step", 0.0, "secure_aggregation.grid_step"),
    ("audit.holdout_share", 0.0, "audit.holdout_share"),
    ("audit.score_edges", [1.0, 1.0], "ascending"),
    ("audit.score_edges", [], "ascending"),
    ("audit.control_edges", [2.0, 1.0], "ascending"),
    ("audit.low_power", "ignore", "audit.low_power"),
    ("release.site_approvals", 5, "site_approvals is larger"),
    ("release.site_approvals", 0, "release.site_approvals"),
    *(
        (f"{place}unknown_clause", 1, f"{place}unknown_clause")
        for place in ("", "roster.", "data.", "model.", "privacy.", "secure_aggregation.", "audit.")
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "value", "named"), WRONG, ids=[f"{n}-{p}" for n, (p, _, _) in enumerate(WRONG)]
)
def test_each_wrong_clause_is_named(path: str, value: Any, named: str) -> None:
    parse_plan(DOCUMENT, what="it")
    with pytest.raises(InvalidPlanError, match=r"draft\.toml is not a valid study plan") as caught:
        parse_plan(changed(DOCUMENT, path, value), what="draft.toml")
    assert named in caught.value.message


def test_all_wrong_clauses_are_named_at_once() -> None:
    document = changed(changed(DOCUMENT, "privacy.delta", 1.0), "model.preset", "No!")
    with pytest.raises(InvalidPlanError) as caught:
        parse_plan(document, what="draft")
    assert "privacy.delta" in caught.value.message
    assert "model.preset" in caught.value.message


def unprotected() -> dict[str, Any]:
    document = changed(DOCUMENT, "privacy.mode", "unprotected")
    for name, value in (("epsilon", ...), ("noise_multiplier", 0.0), ("audit_noise_multiplier", 0.0)):
        document = changed(document, f"privacy.{name}", value)
    return document


def test_unprotected_is_for_simulated_data_has_no_noise_and_no_epsilon() -> None:
    assert parse_plan(unprotected(), what="it").privacy.epsilon is None
    for path, value, words in (
        ("data.simulated", False, "simulated data only"),
        ("privacy.epsilon", 8.0, "epsilon is left out"),
        ("privacy.noise_multiplier", 1.0, "has no noise"),
        ("privacy.audit_noise_multiplier", 1.0, "has no noise"),
    ):
        with pytest.raises(InvalidPlanError, match=words):
            parse_plan(changed(unprotected(), path, value), what="it")


def test_distributed_needs_two_honest_shares() -> None:
    document = changed(plan_document(Keys.of(2)), "secure_aggregation.threshold", 2)
    with pytest.raises(InvalidPlanError, match="threshold - max_colluding >= 2"):
        parse_plan(document, what="it")


@pytest.mark.parametrize("document", [DOCUMENT, unprotected()], ids=["protected", "unprotected"])
def test_toml_round_trips(tmp_path: Path, document: dict[str, Any]) -> None:
    plan = parse_plan(document, what="it")
    (tmp_path / "plan.toml").write_text(plan.to_toml(), encoding="utf-8")
    again = load_plan_toml(tmp_path / "plan.toml")
    assert again == plan
    assert again.digest() == plan.digest()


def test_files_that_are_no_plan_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    with pytest.raises(InvalidPlanError, match="cannot be read"):
        load_plan_toml(path)
    for data, words in (
        (b"x =", "not TOML"),
        (b"\xff", "not TOML"),
        (b"#" * (1 << 20) + b"#", "larger"),
        (b"", "format"),
    ):
        path.write_bytes(data)
        with pytest.raises(InvalidPlanError, match=words) as caught:
            load_plan_toml(path)
        assert str(path) in caught.value.message


def test_the_digest_covers_every_clause() -> None:
    """Whatever can be changed in a valid plan changes its digest."""
    seen = {parse_plan(DOCUMENT, what="it").digest()}
    changes = [
        ("title", "another"),
        ("roster.sites", [SITES[1], SITES[0], *SITES[2:]]),
        ("data.simulated", False),
        ("model.ema_decay", 0.5),
        ("privacy.clip_norm", 2.0),
        ("privacy.declared_patients", 101),
        ("secure_aggregation.modulus_bits", 64),
        ("audit.max_auc", 0.7),
        ("release.officer_approval", False),
    ]
    for path, value in changes:
        seen.add(parse_plan(changed(DOCUMENT, path, value), what="it").digest())
    assert len(seen) == len(changes) + 1


def test_a_plan_is_frozen_and_knows_its_sites() -> None:
    plan = small_plan()
    with pytest.raises(ValueError, match="frozen"):
        plan.privacy.rounds = 9  # type: ignore[misc]
    assert plan.site("site-1").site_id == "site-1"
    with pytest.raises(InvalidPlanError, match="nobody"):
        plan.site("nobody")


def test_defaults_follow_the_design() -> None:
    assert [default_threshold(n, 1) for n in (3, 4, 5, 7)] == [3, 3, 4, 5]
    for n in range(3, 30):
        for c in range(1, n - 1):
            t = default_threshold(n, c)
            assert 2 * t > n + c >= 2 * (t - 1)
    assert [default_max_attempts(rounds) for rounds in (1, 15, 16, 30, 100)] == [4, 18, 20, 36, 120]
