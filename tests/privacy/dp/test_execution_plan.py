"""Plans that keep their promise pass; each way of not keeping it is refused by name."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from privacy.audit.counts import CONTROL_WEIGHT, PRIMARY_WEIGHT
from privacy.dp.accounting import epsilon, gaussian_epsilon
from privacy.dp.calibration import ProposedPrivacy, propose_privacy
from privacy.dp.closeness import MIN_SHARE_STEPS
from privacy.dp.execution_plan import MAX_COUNT_WEIGHT, MAX_WRAP_PROBABILITY, ExecutionPlan, check_plan
from shared.errors import UsageError
from shared.identity import SigningKey
from shared.study_plan import InvalidPlanError, StudyPlan, parse_plan


def propose(**changes: Any) -> ProposedPrivacy:
    arguments: dict[str, Any] = {
        "mode": "distributed", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 0.5, "rounds": 10, "n_sites": 3,
        "threshold": 3, "max_colluding": 1, "dimension": 50_000, "declared_patients": 60,
    }  # fmt: skip
    return propose_privacy(**{**arguments, **changes})


def study_plan(proposed: ProposedPrivacy, **changes: Any) -> StudyPlan:
    execution = proposed.execution
    keys = [SigningKey.generate().verify_key.hex() for _ in range(execution.n_sites + 2)]
    value: dict[str, Any] = {
        "format": "lacuna/study-plan/v1",
        "study_id": "study-a",
        "title": "A study",
        "roster": {
            "coordinator_key": keys[0],
            "officer_key": keys[1],
            "sites": [{"site_id": f"site-{i}", "identity_key": key} for i, key in enumerate(keys[2:])],
        },
        "data": {
            "conditions": ["common", "rare"], "rare_condition": "rare", "labels": ["lesion"],
            "grid_shape": [24, 24, 24], "spacing_mm": [4.0, 4.0, 4.0], "simulated": True,
        },
        "model": {
            "preset": "micro", "autoencoder_sha256": "00" * 32, "prior_sha256": "11" * 32,
            "trainable": "all", "dimension": execution.dimension,
        },
        "privacy": proposed.privacy.model_dump(mode="json"),
        "secure_aggregation": proposed.secure_aggregation.model_dump(mode="json"),
        "audit": {"score_edges": [0.0], "control_edges": [0.0], "copy_distance": 1.0},
        "release": {"site_approvals": 1},
    }  # fmt: skip
    for path, change in changes.items():
        clause, name = path.split("__")
        value[clause][name] = change
    return parse_plan(value, what="test plan")


CASES = [
    {},
    {"epsilon": 1.0, "sampling_rate": 0.25, "rounds": 40},
    {"mode": "local", "local_steps": 5},
    {"mode": "unprotected", "epsilon": None},
    {"n_sites": 10, "threshold": 8, "max_colluding": 2, "declared_patients": 2000},
    {"clip_norm": 37.0, "dimension": 17},
]


@pytest.mark.parametrize("case", CASES, ids=[str(case) for case in CASES])
def test_what_is_proposed_passes(case: dict[str, Any]) -> None:
    proposed = propose(**case)
    execution = check_plan(study_plan(proposed))
    assert execution == proposed.execution
    assert execution.wrap_probability <= MAX_WRAP_PROBABILITY
    assert execution.audit_wrap_probability <= MAX_WRAP_PROBABILITY
    if execution.epsilon is not None:
        planned = execution.planned_epsilon()
        assert 0.99 * execution.epsilon <= planned.reported <= execution.epsilon
        assert execution.noise_share_steps >= MIN_SHARE_STEPS
        assert execution.audit_share_steps(1.0) >= MIN_SHARE_STEPS
    else:
        assert execution.planned_epsilon().reported == math.inf
        assert execution.noise_share_steps == 0 == execution.audit_share_steps(3.0)


def test_epsilon_is_the_closed_form_of_the_noise_really_added() -> None:
    """From the integers that sites draw: variance of t - c shares over sensitivity, audit included, to 1%."""
    execution = propose().execution
    total = execution.noise_share_steps * math.sqrt(execution.threshold - execution.max_colluding)
    per_step = execution.sensitivity.l2 / execution.grid_step / total
    audit_total = math.sqrt(2) * execution.audit_share_steps(5.0)
    mu = math.sqrt(
        execution.max_attempts * per_step**2 + execution.max_audit_attempts * (5.0 / audit_total) ** 2
    )
    assert execution.planned_epsilon().reported == pytest.approx(
        gaussian_epsilon(mu, execution.delta), rel=1e-2
    )


def test_views_and_modes() -> None:
    shared, alone = propose().execution, propose(mode="local").execution
    event, own = shared.training_event(), alone.training_event()
    assert event.noise_multiplier_world == pytest.approx(math.sqrt(2) * event.noise_multiplier_colluding)
    assert own.noise_multiplier_world == own.noise_multiplier_colluding
    assert propose(mode="local", local_steps=5).execution.training_event().steps == 5
    colluding = shared.planned_epsilon(view="all_others_collude").reported
    assert colluding > shared.planned_epsilon().reported


def test_audit_noise_is_worth_its_multiplier_whatever_the_sensitivity() -> None:
    execution = propose().execution
    event = execution.audit_event()
    for sensitivity in (0.5, 1.0, 7.0, 1000.0):
        share = execution.audit_share_steps(sensitivity)
        world = math.sqrt(2 * share**2 - 4) / sensitivity
        assert world >= event.noise_multiplier_world * (1 - 1e-12)
        assert math.sqrt(share**2 - 4) / sensitivity >= event.noise_multiplier_colluding * (1 - 1e-12)
    with pytest.raises(InvalidPlanError):
        execution.audit_share_steps(0.0)


def test_audit_spends_its_share() -> None:
    execution = propose(audit_share=0.2).execution
    audit = epsilon([execution.audit_event()] * 2, execution.delta)
    whole = execution.planned_epsilon()
    assert audit.mu is not None and whole.mu is not None
    assert (audit.mu / whole.mu) ** 2 == pytest.approx(0.2, rel=1e-2)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"privacy__noise_multiplier": 1.0}, "privacy: the noise multipliers give epsilon"),
        ({"privacy__max_attempts": 40}, "over 40 training"),
        ({"privacy__audit_noise_multiplier": 0.5}, "the plan says 8"),
        ({"privacy__epsilon": 7.5}, "the plan says 7.5"),
        ({"secure_aggregation__clamp_steps": 2**30}, "can leave the range of 32 bits"),
        ({"secure_aggregation__grid_step": 2.0**-60}, "can leave the range of 32 bits"),
        ({"secure_aggregation__grid_step": 1.0}, "grid steps, at least 4 are needed"),
        ({"secure_aggregation__grid_step": 2.0**-8}, "privacy: the noise multipliers give epsilon"),
        ({"privacy__clip_norm": 1.0}, None),
    ],
)
def test_a_plan_that_does_not_keep_its_promise_is_refused(change: dict[str, Any], named: str | None) -> None:
    """Grid step 2^-8 with noise calibrated for a fine grid is the mutant "sensitivity of a coarse grid left
    out": only gamma sqrt(d) refuses it."""
    plan = study_plan(propose(), **change)
    if named is None:
        check_plan(plan)
        return
    with pytest.raises(InvalidPlanError, match=named):
        check_plan(plan)


@pytest.mark.parametrize(
    ("case", "bits"),
    [
        ({}, 32),
        ({"n_sites": 100, "threshold": 51, "declared_patients": 20_000}, 32),
        ({"dimension": 10**8}, 32),
        ({"dimension": 10**8, "n_sites": 100, "threshold": 51, "declared_patients": 2 * 10**7}, 64),
        ({"mode": "local", "local_steps": 5, "n_sites": 100, "threshold": 51}, 32),
    ],
)
def test_the_modulus_is_as_small_as_the_ranges_allow(case: dict[str, Any], bits: int) -> None:
    """The bound from its parts: what is certain, and noise of 15 standard deviations, have room."""
    execution = propose(**case).execution
    assert execution.modulus_bits == bits
    share = execution.noise_share_steps if execution.mode == "distributed" else 0.0
    largest = execution.n_sites * execution.clamp_steps + 9 * share * math.sqrt(execution.n_sites)
    assert largest < 2 ** (bits - 1)
    assert execution.wrap_probability <= MAX_WRAP_PROBABILITY
    narrower = replace(execution, modulus_bits=bits - 12 if bits == 32 else 32)
    assert narrower.wrap_probability > MAX_WRAP_PROBABILITY


def test_the_wrap_bound_is_what_it_says() -> None:
    """By hand for one plan, and never below the exact Gaussian tail."""
    execution = propose().execution
    n, d, bits = execution.n_sites, execution.dimension, execution.modulus_bits
    std = execution.noise_share_steps * math.sqrt(n)
    for sigmas in (3.0, 6.0, 7.5):
        clamp = math.floor((2 ** (bits - 1) - 1 - sigmas * std) / n)
        bound = replace(execution, clamp_steps=clamp).wrap_probability
        assert bound == pytest.approx(min(1.0, d * 2 * math.exp(-0.5 * sigmas**2)), rel=1e-3)
        assert bound >= min(1.0, d * math.erfc(sigmas / math.sqrt(2)))
    assert replace(execution, clamp_steps=2 ** (bits - 1)).wrap_probability == 1.0


def test_a_patient_moves_no_audit_cell_by_more_than_the_bound_counts() -> None:
    assert max(PRIMARY_WEIGHT, CONTROL_WEIGHT) == MAX_COUNT_WEIGHT
    execution = replace(propose().execution, n_sites=100, threshold=51)
    assert execution.audit_wrap_probability == 0.0
    assert replace(execution, modulus_bits=28).audit_wrap_probability == 1.0


def test_public_constants() -> None:
    execution = propose(sampling_rate=0.5, declared_patients=60).execution
    assert execution.sum_divisor == 30 and execution.local_divisor == 10


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(UsageError):
        propose(epsilon=None)
    with pytest.raises(UsageError):
        propose(audit_share=1.0)


def test_reading_a_plan_checks_nothing() -> None:
    plan = study_plan(propose(), privacy__noise_multiplier=0.001)
    assert ExecutionPlan.from_study_plan(plan).noise_multiplier == 0.001
