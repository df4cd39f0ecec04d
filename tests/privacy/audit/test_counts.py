"""The vector that leaves: sensitivity by brute force, and what is read back from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.audit.counts import CountsLayout, PatientFigures, pooled_noise_std
from privacy.dp.execution_plan import ExecutionPlan
from shared.errors import UsageError
from shared.study_plan import SecondaryAttackClause, StudyPlan

LAYOUT = CountsLayout(score_edges=(-0.5, 0.0, 0.5, 1.0), control_edges=(0.9, 1.1))

POOLED = (
    SecondaryAttackClause(attack="sima", timesteps=(0.2,), edges=(-0.1, 0.1), pooled_weight=4),
    SecondaryAttackClause(attack="pia", timesteps=(0.1, 0.2), edges=(0.0,), pooled_weight=7),
)
WIDER = CountsLayout(score_edges=(0.0,), control_edges=(1.0,), secondary=POOLED)

_ANY = st.floats(allow_nan=True, allow_infinity=True, width=32)
_PATIENT = st.builds(
    PatientFigures,
    member=st.booleans(),
    coin=st.booleans(),
    score=_ANY,
    public_loss=_ANY,
    copied=st.booleans(),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(_PATIENT, max_size=6), _PATIENT)
def test_adding_one_patient_moves_the_vector_by_at_most_the_sensitivity(
    others: list[PatientFigures], added: PatientFigures
) -> None:
    change = LAYOUT.count([*others, added]) - LAYOUT.count(others)
    assert np.linalg.norm(change) <= LAYOUT.sensitivity + 1e-9
    assert (change >= 0).all()
    assert np.count_nonzero(change) <= 3


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(_PATIENT, _ANY, _ANY), max_size=5), st.tuples(_PATIENT, _ANY, _ANY))
def test_pooled_secondary_attacks_are_in_the_sensitivity(
    others: list[tuple[PatientFigures, float, float]], added: tuple[PatientFigures, float, float]
) -> None:
    before, one = (
        [replace(patient, secondary=scores) for patient, *scores in group] for group in (others, [added])
    )
    change = WIDER.count(before + one) - WIDER.count(before)
    assert np.linalg.norm(change) <= WIDER.sensitivity + 1e-9
    assert (change >= 0).all() and np.count_nonzero(change) <= 5


def test_pooled_secondary_attacks_reach_the_sensitivity_and_are_read_back() -> None:
    assert WIDER.sensitivity == pytest.approx(math.sqrt(16**2 + 2 * 8**2 + 4**2 + 7**2))
    member = PatientFigures(
        member=True, coin=True, score=1.0, public_loss=2.0, copied=True, secondary=(0.0, -1.0)
    )
    assert np.linalg.norm(WIDER.count([member])) == pytest.approx(WIDER.sensitivity)
    outside = replace(member, member=False, secondary=(5.0, math.nan))
    counts = WIDER.count([member, member, outside])
    assert counts.shape == (len(WIDER.names),) == (WIDER.length,)
    pooled = WIDER.read(counts, noise_std=8.0)
    sima, pia = pooled.secondary
    assert sima.members_B.tolist() == [0, 2, 0] and sima.held_out_B.tolist() == [0, 0, 1]
    assert pia.members_B.tolist() == [2, 0] and pia.held_out_B.tolist() == [0, 0]
    assert (sima.members_std, pia.held_out_std) == (2.0, pytest.approx(8 / 7))
    assert pooled.copied == 2
    with pytest.raises(UsageError, match="0 secondary scores, the plan pools 2"):
        WIDER.count([replace(member, secondary=())])


def test_the_sensitivity_is_reached_and_so_not_larger_than_needed() -> None:
    largest = 0.0
    for member, coin, copied in itertools.product((False, True), repeat=3):
        for score, loss in itertools.product((-9.0, -0.5, 0.2, 9.0, math.nan), (0.0, 1.0, 2.0, math.inf)):
            patient = PatientFigures(member=member, coin=coin, score=score, public_loss=loss, copied=copied)
            largest = max(largest, float(np.linalg.norm(LAYOUT.count([patient]))))
    assert largest == pytest.approx(LAYOUT.sensitivity)


def test_reading_gives_back_patients() -> None:
    patients = [
        PatientFigures(member=True, coin=bool(i % 2), score=0.7, public_loss=1.0, copied=i < 3)
        for i in range(10)
    ]
    patients += [
        PatientFigures(member=False, coin=False, score=-1.0, public_loss=2.0, copied=True) for _ in range(4)
    ]
    counts = LAYOUT.count(patients)
    assert counts.dtype == np.int64 and counts.shape == (LAYOUT.length,) == (len(LAYOUT.names),)
    pooled = LAYOUT.read(counts, noise_std=0.0)
    assert pooled.attack.members_B.tolist() == [0, 0, 0, 10, 0]
    assert pooled.attack.held_out_B.tolist() == [4, 0, 0, 0, 0]
    assert pooled.member_halves.members_B.sum() == pooled.member_halves.held_out_B.sum() == 5
    assert pooled.public_loss.members_B.tolist() == [0, 10, 0]
    assert pooled.public_loss.held_out_B.tolist() == [4, 0, 0]  # the largest loss stands first
    assert pooled.copied == 3


def test_vectors_of_another_layout_are_refused() -> None:
    with pytest.raises(UsageError, match="cells"):
        LAYOUT.read([0] * (LAYOUT.length + 1), noise_std=1.0)


def test_noise_of_the_pooled_vector(make_plan: Callable[..., StudyPlan]) -> None:
    plan = make_plan(audit_noise=2.0)
    share = ExecutionPlan.from_study_plan(plan).audit_share_steps(CountsLayout.from_plan(plan).sensitivity)
    assert share**2 == pytest.approx((2.0 * CountsLayout.from_plan(plan).sensitivity) ** 2 / 2 + 4)
    expected = share * math.sqrt(3)
    assert pooled_noise_std(plan, 3) == pytest.approx(expected)
    assert pooled_noise_std(make_plan(mode="unprotected"), 3) == 0.0


def test_figures_of_a_patient_are_not_printed() -> None:
    patient = PatientFigures(member=True, coin=True, score=0.123456, public_loss=0.9, copied=True)
    assert "0.12" not in repr(patient) and "0.12" not in str(patient)
