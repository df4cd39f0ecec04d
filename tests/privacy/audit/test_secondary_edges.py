"""Thresholds of pooled secondary attacks come from public figures, and serve both sides and calibration."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.audit.proposal import (
    SCORE_EDGE_MULTIPLES,
    SECONDARY_QUANTILES,
    TOWARDS_MEMBERS,
    pool_attacks,
    propose_audit,
    propose_secondary_edges,
)
from shared.errors import UsageError
from shared.study_plan import AuditClause, SecondaryAttackClause

FIGURES = np.random.default_rng(4).lognormal(0.0, 0.2, 400)


def attack(**changes: object) -> SecondaryAttackClause:
    return SecondaryAttackClause.model_validate({"attack": "sima", "timesteps": [0.2], **changes})


@pytest.mark.parametrize("side", ["low", "high"])
def test_edges_split_public_patients_evenly_and_go_on_towards_members(side: str) -> None:
    edges = propose_secondary_edges(attack(member_side=side), FIGURES)
    sign = 1.0 if side == "high" else -1.0
    assert list(edges) == sorted(edges) and len(edges) == len(SECONDARY_QUANTILES) + len(TOWARDS_MEMBERS)
    places = np.digitize(sign * FIGURES, edges)
    shares = np.bincount(places, minlength=len(edges) + 1) / FIGURES.size
    assert shares[: len(SECONDARY_QUANTILES)] == pytest.approx([0.1, 0.2, 0.2, 0.2, 0.2], abs=0.01)
    assert shares[len(SECONDARY_QUANTILES) :].sum() == pytest.approx(0.1, abs=0.01)
    memorised = np.quantile(FIGURES, 0.1) * 0.3 if side == "low" else np.quantile(FIGURES, 0.9) / 0.3
    assert np.digitize(sign * memorised, edges) == len(edges), "what memorising gives is beyond the last edge"


def test_edges_of_a_calibrated_attack_lie_about_zero() -> None:
    calibrated = attack(attack="loss", calibrated=True)
    middle = float(np.median(FIGURES))
    expected = [multiple * middle for multiple in SCORE_EDGE_MULTIPLES]
    assert propose_secondary_edges(calibrated, FIGURES) == pytest.approx(expected, rel=1e-5)
    assert len(propose_secondary_edges(calibrated, FIGURES, noised=False)) > len(expected)


def test_counts_without_noise_get_many_edges_and_the_plan_takes_them() -> None:
    for side in ("low", "high"):
        edges = propose_secondary_edges(attack(member_side=side), FIGURES, noised=False)
        assert 50 < len(edges) <= 64
        attack(member_side=side, edges=list(edges), pooled_weight=8)


@pytest.mark.parametrize("figures", [[1.0, 2.0], [1.0, 2.0, float("nan")], [1.0, 2.0, -1.0], [1.0, 1.0, 1.0]])
def test_figures_that_place_no_edges_are_refused_by_the_attacks_name(figures: list[float]) -> None:
    with pytest.raises(UsageError, match="sima"):
        propose_secondary_edges(attack(), figures)


def proposed() -> AuditClause:
    return propose_audit(
        [0.8, 0.9, 1.0, 1.1],
        copy_distance=0.3,
        false_copy_rate=0.01,
        declared_patients=100,
        guidance_scale=2.0,
    )


def test_attacks_are_pooled_by_name_and_the_others_stay_as_they_are() -> None:
    clause, figures = proposed(), {"pia": FIGURES, "loss, calibrated, guidance 2": FIGURES}
    pooled = pool_attacks(clause, tuple(figures), public_figures=figures, weight=6)
    assert {a.attack_id for a in pooled.pooled_attacks} == set(figures)
    assert {a.pooled_weight for a in pooled.pooled_attacks} == {6}
    assert AuditClause.model_validate(pooled.model_dump()) == pooled
    before = {a.attack_id: a for a in clause.secondary_attacks}
    assert [a for a in pooled.secondary_attacks if not a.edges] == [
        before[a.attack_id] for a in pooled.secondary_attacks if a.attack_id not in figures
    ]
    assert pool_attacks(clause, (), public_figures={}) == clause


def test_an_attack_that_cannot_be_pooled_is_named() -> None:
    with pytest.raises(UsageError, match=r"no attack 'pia, guidance 3'.*pia, guidance 2"):
        pool_attacks(proposed(), ("pia, guidance 3",), public_figures={"pia, guidance 3": FIGURES})
    with pytest.raises(UsageError, match="no public figures of 'pia'") as caught:
        pool_attacks(proposed(), ("pia",), public_figures={})
    assert "--calibrate-attacks" in str(caught.value.remedy)
