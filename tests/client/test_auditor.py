"""The whole audit of one hospital, with the real micro denoiser and the real autoencoder."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from small_plan import changed, small_plan
from torch import Tensor

from client.audit_page import site_audit_page
from client.audit_view import audit_lines
from client.auditor import LocalAudit, _true_positive_rates, audit_candidate, audit_seed, sampled_classes
from privacy.audit.attacks import usual_attacks
from privacy.audit.counts import CountsLayout
from privacy.audit.proposal import propose_edges
from privacy.audit.verdict import compute_verdict
from shared.canonical import canonical_json, parse_json
from shared.errors import MalformedMessageError
from shared.model.autoencoder import build_autoencoder
from shared.model.conditioning import ConditionTable
from shared.model.denoiser import Denoiser, build_denoiser
from shared.model.diffusion import per_sample_loss
from shared.model.presets import preset_named
from shared.study_plan import StudyPlan, parse_plan

SHAPE = (4, 6, 6, 6)
PRESET = preset_named("micro")


@dataclass(frozen=True, kw_only=True, eq=False)
class Scans:
    patient_key: str
    latents_SCDHW: Tensor
    conditions_S: Tensor


def _patients(n: int, *, seed: int, name: str) -> list[Scans]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Scans(
            patient_key=f"{name}-{i}",
            latents_SCDHW=torch.randn((1 + i % 2, *SHAPE), generator=generator),
            conditions_S=torch.full((1 + i % 2,), i % 2),
        )
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    return small_plan(
        data__grid_shape=[24, 24, 24],
        model__sampling_steps=3,
        privacy={
            "unit": "patient",
            "neighbouring": "add_or_remove_one_patient",
            "mode": "unprotected",
            "delta": 1e-5,
            "clip_norm": 1.0,
            "declared_patients": 24,
            "rounds": 1,
            "max_attempts": 4,
            "noise_multiplier": 0.0,
            "audit_noise_multiplier": 0.0,
        },
        audit={
            "timesteps": [0.3, 0.5, 0.7, 0.9],
            "draws_per_timestep": 1,
            "score_edges": list(propose_edges([1.9, 2.0, 2.1], noised=False)[0]),
            "control_edges": [1.9, 2.1],
            "copy_samples": 16,
            "copy_distance": 0.05,
        },
    )


@pytest.fixture(scope="module")
def networks() -> tuple[Denoiser, Denoiser]:
    """(public, candidate overfitted without protection on members of seed 1), all parameters frozen."""
    public = build_denoiser(PRESET, n_conditions=2, seed=1)
    candidate = copy.deepcopy(public)
    members = _patients(14, seed=1, name="m")
    z = torch.cat([p.latents_SCDHW for p in members])
    c = torch.cat([p.conditions_S for p in members])
    generator = torch.Generator().manual_seed(2)
    optimizer = torch.optim.Adam(candidate.parameters(), 4e-3)
    for _ in range(110):
        i = torch.randint(len(z), (12,), generator=generator)
        t = torch.rand(12, generator=generator)
        noise = torch.randn((12, *SHAPE), generator=generator)
        optimizer.zero_grad()
        per_sample_loss(candidate, z[i], c[i], t, noise).mean().backward()
        optimizer.step()
    return public.requires_grad_(False).eval(), candidate.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def leaky(plan: StudyPlan, networks: tuple[Denoiser, Denoiser]) -> LocalAudit:
    return audit_candidate(
        plan=plan,
        public_denoiser=networks[0],
        candidate_denoiser=networks[1],
        autoencoder=build_autoencoder(PRESET, n_labels=2).eval(),
        members=_patients(14, seed=1, name="m"),
        held_out=_patients(12, seed=3, name="h"),
    )


def test_an_unprotected_overfit_is_seen(plan: StudyPlan, leaky: LocalAudit) -> None:
    assert leaky.attack is not None and leaky.attack.low > 0.6
    assert leaky.public_control is not None
    assert leaky.public_control.low < 0.5 < leaky.public_control.high
    assert leaky.planted_leak.p_value() < 0.003
    verdict = compute_verdict(
        plan,
        [int(count) for count in leaky.counts],
        [f"site-{i}" for i in range(3)],
        planted_leak=leaky.planted_leak,
    )
    assert verdict.condition("membership_attack").status == "fail"
    assert [c.name for c in verdict.conditions if c.status == "fail"] == ["membership_attack"]


def test_patients_that_nobody_trained_on_are_not_called_members(
    plan: StudyPlan, networks: tuple[Denoiser, Denoiser]
) -> None:
    audit = audit_candidate(
        plan=plan,
        public_denoiser=networks[0],
        candidate_denoiser=networks[1],
        autoencoder=None,
        members=_patients(24, seed=5, name="m"),
        held_out=_patients(12, seed=6, name="h"),
    )
    assert audit.attack is not None and audit.attack.low <= 0.6


def test_the_counts_are_those_of_the_raw_figures(plan: StudyPlan, leaky: LocalAudit) -> None:
    pooled = CountsLayout.from_plan(plan).read(leaky.counts, noise_std=0.0)
    edges = plan.audit.score_edges
    for scores, cells in (
        (leaky.member_scores, pooled.attack.members_B),
        (leaky.held_out_scores, pooled.attack.held_out_B),
    ):
        expected = np.bincount(np.digitize(scores, edges), minlength=len(edges) + 1)
        assert cells.tolist() == expected.tolist()
    assert pooled.copied == len(leaky.copied) == (leaky.member_distances < leaky.copy_distance).sum()


def test_one_patient_more_moves_the_counts_by_at_most_the_sensitivity(
    plan: StudyPlan, networks: tuple[Denoiser, Denoiser]
) -> None:
    """Through the whole pipeline, controls and coins included."""
    members, held_out = _patients(5, seed=1, name="m"), _patients(4, seed=3, name="h")

    def counts(inside: list[Scans], outside: list[Scans]) -> np.ndarray:
        return audit_candidate(
            plan=plan,
            public_denoiser=networks[0],
            candidate_denoiser=networks[1],
            autoencoder=None,
            members=inside,
            held_out=outside,
        ).counts

    whole = counts(members, held_out)
    sensitivity = CountsLayout.from_plan(plan).sensitivity
    for change in (whole - counts(members[1:], held_out), whole - counts(members, held_out[:-1])):
        assert 0 < np.linalg.norm(change) <= sensitivity + 1e-9
        assert (change >= 0).all()


def test_secondary_attacks_are_kept_at_the_site_and_pooled_where_the_plan_says(
    plan: StudyPlan, networks: tuple[Denoiser, Denoiser]
) -> None:
    attacks = [attack.model_dump(mode="json") for attack in usual_attacks(guidance_scale=2.0)]
    attacks[0] |= {"edges": [-1.0, -0.1], "pooled_weight": 5}
    attacks = attacks[:6]
    asking = parse_plan(changed(plan.model_dump(mode="json"), "audit.secondary_attacks", attacks), what="")
    stages: list[str] = []
    members, held_out = _patients(5, seed=1, name="m"), _patients(4, seed=3, name="h")
    audit = audit_candidate(
        plan=asking,
        public_denoiser=networks[0],
        candidate_denoiser=networks[1],
        autoencoder=None,
        members=members,
        held_out=held_out,
        progress=lambda *facts: stages.append(facts[0]),
    )
    assert [figures.attack for figures in audit.secondary] == [
        "sima", "pia", "secmi", "gradient_norm", "loss, calibrated, guidance 2", "sima, guidance 2",
    ]  # fmt: skip
    assert [figures.pooled for figures in audit.secondary] == [True] + 5 * [False]
    assert {f"{figures.attack}, members" for figures in audit.secondary} <= set(stages)
    for figures in audit.secondary:
        assert figures.member_scores.shape == (5,) and figures.held_out_scores.shape == (4,)
        assert np.isfinite(figures.member_scores).all() and figures.auc is not None
    (sima,) = CountsLayout.from_plan(asking).read(audit.counts, noise_std=0.0).secondary
    binned = np.bincount(np.digitize(audit.secondary[0].member_scores, [-1.0, -0.1]), minlength=3)
    assert sima.members_B.tolist() == binned.tolist() and sima.n_held_out == 4
    again = LocalAudit.from_dict(parse_json(canonical_json(audit.to_dict()), what="audit"))
    assert again.to_dict() == audit.to_dict()
    record = {"figures": audit.to_dict(), "candidate_sha256": "0" * 64, "attempt": 1}
    lines = audit_lines(record)
    assert sum("secondary attack" in line for line in lines) == 6
    assert sum("shown here alone" in line for line in lines) == 5


def test_groups_that_carry_no_figure_get_none(plan: StudyPlan, networks: tuple[Denoiser, Denoiser]) -> None:
    """Three held-out patients: no AUC, no bound, no power, and no curve on the page; counts all the same."""
    audit = audit_candidate(
        plan=plan,
        public_denoiser=networks[0],
        candidate_denoiser=networks[1],
        autoencoder=None,
        members=_patients(5, seed=1, name="m"),
        held_out=_patients(3, seed=3, name="h"),
    )
    assert audit.attack is audit.public_control is audit.epsilon_lower_bound is audit.mu_lower_bound is None
    assert audit.power == 0.0 and audit.counts.sum() > 0
    record = {"figures": audit.to_dict(), "candidate_sha256": "0" * 64, "attempt": 1}
    html = site_audit_page(record, plan, site_id="site-0", at="today")
    assert "ROC curve" not in html and "Too few patients for a figure" in html


def test_samples_cover_conditions_and_covariates_evenly() -> None:
    """A patient kept for one covariate's value alone is looked for there; without covariates as ever."""
    covariates = [{"name": "sex", "values": ["female", "male"]}, {"name": "age", "edges": [40.0, 60.0]}]
    plan = small_plan(data__covariates=covariates)
    table = ConditionTable.from_clause(plan.data)
    found = sampled_classes(plan, 600, seed=5)
    assert torch.equal(found, sampled_classes(plan, 600, seed=5))
    conditions = found % (len(table) + 1)
    assert torch.equal(conditions, torch.arange(600) % len(table))
    rows = [table.covariate_rows(int(index)) for index in found]
    combinations = {(int(c), *row) for c, row in zip(conditions, rows, strict=True)}
    every = len(table) * math.prod(size + 1 for size in table.covariate_sizes)
    assert len(combinations) == every, "600 draws miss one of 24 with probability below 1e-9"
    plain = small_plan()
    assert torch.equal(sampled_classes(plain, 20, seed=5), torch.arange(20) % len(plain.data.conditions))


def test_rates_that_the_held_out_patients_cannot_carry_are_not_shown() -> None:
    """A rate of 10% takes 29 held-out patients, one of 5% takes 59; 8 carry none."""
    members = np.linspace(0.5, 2.0, 40)
    assert _true_positive_rates(members, np.linspace(0, 1, 8)) == ()
    assert [rate for rate, _ in _true_positive_rates(members, np.linspace(0, 1, 30))] == [0.1]
    assert [rate for rate, _ in _true_positive_rates(members, np.linspace(0, 1, 60))] == [0.05, 0.1]


def test_what_the_site_keeps_reads_back_and_prints_nothing(leaky: LocalAudit) -> None:
    data = canonical_json(leaky.to_dict())
    again = LocalAudit.from_dict(parse_json(data, what="audit"))
    assert json.loads(data) == again.to_dict()
    assert repr(again) == "LocalAudit(<private>)"
    absent = replace(leaky, member_scores=np.array([math.nan, 1.0]), attack=None)
    assert LocalAudit.from_dict(absent.to_dict()).to_dict() == absent.to_dict()
    secret = "0.123456789"
    with pytest.raises(MalformedMessageError) as caught:
        LocalAudit.from_dict({**leaky.to_dict(), "power": [secret]})
    assert secret not in str(caught.value) and caught.value.__cause__ is None


def test_nothing_is_logged_and_progress_is_reported(
    plan: StudyPlan, networks: tuple[Denoiser, Denoiser], caplog: pytest.LogCaptureFixture
) -> None:
    stages: list[tuple[str, int, int]] = []
    started = time.monotonic()
    with caplog.at_level(logging.DEBUG):
        audit_candidate(
            plan=plan,
            public_denoiser=networks[0],
            candidate_denoiser=networks[1],
            autoencoder=None,
            members=_patients(3, seed=1, name="m"),
            held_out=[],
            progress=lambda *stage: stages.append(stage),
        )
    assert not [
        record for record in caplog.records if record.name.startswith(("client", "privacy", "lacuna"))
    ]
    assert {stage for stage, _, _ in stages} >= {"samples", "planted leak", "members", "copies"}
    assert time.monotonic() - started < 120


def test_the_seed_is_the_plans_and_the_candidates(networks: tuple[Denoiser, Denoiser]) -> None:
    public, candidate = networks
    assert audit_seed(b"p" * 32, candidate) == audit_seed(b"p" * 32, copy.deepcopy(candidate))
    others = (audit_seed(b"q" * 32, candidate), audit_seed(b"p" * 32, public))
    assert audit_seed(b"p" * 32, candidate) not in others
