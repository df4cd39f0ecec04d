"""In-run canaries at a site: coins of its key, committed before anything is charged, opened as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from small_plan import small_plan

from client.canaries import CanaryCoins, commit_to_canaries
from client.patient_dataset import SiteStore
from client.serving import open_ledger
from client.site_home import SiteHome, init_site
from privacy.audit.canary_opening import (
    COMMITMENT_KIND,
    CanaryMismatchError,
    CanaryOpening,
    canary_outlook,
    canary_verdict,
)
from privacy.audit.in_run_canaries import canary_patients
from privacy.ledger import Ledger
from shared.errors import MalformedMessageError, SiteError
from shared.study_plan import StudyPlan

SHAPE = (2, 4, 4, 4)


@pytest.fixture(scope="module")
def plan() -> StudyPlan:
    return small_plan(audit__canaries_per_site=40)


def coins_of(root: Path, plan: StudyPlan, site_id: str = "site-0") -> CanaryCoins:
    return CanaryCoins.of_store(SiteStore.create(root), plan, site_id=site_id)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    home = SiteHome(tmp_path / "home")
    init_site(home, name="site-0")
    return open_ledger(home)


def test_coins_are_fair_secret_and_the_same_after_a_restart(tmp_path: Path) -> None:
    plan = small_plan(audit__canaries_per_site=1000)
    store = SiteStore.create(tmp_path)
    coins = CanaryCoins.of_store(store, plan, site_id="site-0")
    again = CanaryCoins.of_store(SiteStore.open(tmp_path), plan, site_id="site-0")
    assert again == coins and repr(coins) == "CanaryCoins(<secret>)"
    # Two-sided at 1e-6: a fair coin leaves this interval with that probability.
    low, high = stats.binom.interval(1 - 1e-6, 1000, 0.5)
    assert low <= sum(coins.coins) <= high
    other = CanaryCoins.of_store(store, small_plan(audit__canaries_per_site=999), site_id="site-0")
    assert other.coins != coins.coins[:999] and other.nonce != coins.nonce


def test_canaries_are_public_distinct_patients_of_one_scan(plan: StudyPlan) -> None:
    def made(digest: bytes, site: str) -> torch.Tensor:
        canaries = canary_patients(digest, site, 5, latent_shape=SHAPE, n_conditions=2)
        assert [c.n_scans for c in canaries] == [1] * 5
        assert [int(c.conditions_S[0]) for c in canaries] == [0, 1, 0, 1, 0]
        return torch.cat([c.latents_SCDHW for c in canaries])

    digest = plan.digest()
    first = made(digest, "site-0")
    assert torch.equal(first, made(digest, "site-0"))
    assert len({float(x) for x in first.flatten(1)[:, 0]}) == 5
    assert not torch.equal(first, made(digest, "site-1"))
    assert not torch.equal(first, made(b"other", "site-0"))
    assert 0.8 < float(first.std()) < 1.2


def test_those_with_heads_train_and_nobody_else(tmp_path: Path, plan: StudyPlan) -> None:
    coins = coins_of(tmp_path, plan)
    canaries = coins.patients(SHAPE)
    trained = {canary.patient_key for canary in coins.trained_on(canaries)}
    assert trained == {f"canary-{i}" for i, coin in enumerate(coins.coins) if coin}
    assert 0 < len(trained) < len(canaries) == 40


def test_the_commitment_stands_once_in_the_ledger_and_binds(
    tmp_path: Path, plan: StudyPlan, ledger: Ledger
) -> None:
    coins = coins_of(tmp_path / "store", plan)
    for _ in range(2):
        commit_to_canaries(coins, ledger)
    (entry,) = [entry for entry in ledger.entries() if entry.kind == COMMITMENT_KIND]
    assert entry.body["details"]["commitment"] == coins.commitment
    with pytest.raises(SiteError, match="other canaries"):
        commit_to_canaries(coins_of(tmp_path / "other", plan), ledger)
    opening = coins.opening(np.zeros(40), candidate_sha256="c" * 64, attempt=3)
    opening.check(plan, committed=coins.commitment)
    lied = (not opening.coins[0], *opening.coins[1:])
    for changed, words in (
        (replace(opening, coins=lied), "not the coins"),
        (replace(opening, nonce="0" * 64), "not the coins"),
        (replace(opening, site_id="site-1"), "not the coins"),
        (replace(opening, coins=opening.coins[:3], scores=opening.scores[:3]), "the plan has 40"),
        (replace(opening, plan_sha256="0" * 64), "another plan"),
    ):
        with pytest.raises(CanaryMismatchError, match=words):
            changed.check(plan, committed=coins.commitment)
    with pytest.raises(CanaryMismatchError, match="before the first charge"):
        opening.check(plan, committed=None)


def test_a_study_that_began_cannot_commit_any_more(tmp_path: Path, plan: StudyPlan, ledger: Ledger) -> None:
    ledger.register_attempt(plan.study_id, 1)
    with pytest.raises(SiteError, match="began without a commitment"):
        commit_to_canaries(coins_of(tmp_path / "store", plan), ledger)


def test_a_plan_without_canaries_leaves_no_entry(tmp_path: Path, ledger: Ledger) -> None:
    plan = small_plan()
    coins = coins_of(tmp_path / "store", plan)
    commit_to_canaries(coins, ledger)
    assert not coins.coins and COMMITMENT_KIND not in {entry.kind for entry in ledger.entries()}


def opening_of(plan: StudyPlan, site: str, coins: list[bool], scores: list[float | None]) -> CanaryOpening:
    return CanaryOpening(
        study_id=plan.study_id, plan_sha256=plan.digest().hex(), candidate_sha256="c" * 64, attempt=1,
        site_id=site, nonce="0" * 64, coins=tuple(coins), scores=tuple(scores),
    )  # fmt: skip


def test_the_higher_group_over_all_sites_is_guessed(plan: StudyPlan) -> None:
    """A site whose canaries all score high does not get its own half: scores are pooled."""
    openings = {
        "site-0": opening_of(plan, "site-0", [True, True, False], [3.0, 2.0, 2.5]),
        "site-1": opening_of(plan, "site-1", [False, True], [None, 0.1]),
    }
    verdict = canary_verdict(plan, openings)
    # Guessed out: not finite (right), 0.1 (wrong); in: 2.0 (right), 2.5 (wrong), 3.0 (right).
    assert (verdict.n_canaries, verdict.n_guesses, verdict.n_correct) == (5, 5, 3)
    assert not verdict.refuted and verdict.epsilon_low == 0.0
    assert canary_verdict(plan, {}).n_guesses == 0
    one = canary_verdict(plan, {"site-0": opening_of(plan, "site-0", [True], [1.0])})
    assert (one.n_guesses, one.n_correct) == (1, 1)


def test_a_perfect_leak_is_guessed_whole_whatever_the_coins(plan: StudyPlan) -> None:
    for n_in in (8, 12, 15):
        coins = [i < n_in for i in range(24)]
        scores: list[float | None] = [5.0 + i / 100 if coin else i / 100 for i, coin in enumerate(coins)]
        verdict = canary_verdict(plan, {"site-0": opening_of(plan, "site-0", coins, scores)})
        assert (verdict.n_correct, verdict.n_guesses) == (24, 24)
        assert verdict.epsilon_low == pytest.approx(verdict.epsilon_most) == pytest.approx(2.57, abs=0.01)


@pytest.mark.parametrize("sampling_rate", [1.0, 0.5])
def test_a_broken_small_promise_is_refuted_and_a_kept_one_is_not(sampling_rate: float) -> None:
    plan = small_plan(privacy__epsilon=0.7, privacy__sampling_rate=sampling_rate)
    rng = np.random.default_rng(0)
    coins = [bool(coin) for coin in rng.random(60) < 0.5]
    seen = canary_verdict(plan, {"site-0": opening_of(plan, "site-0", coins, [float(c) for c in coins])})
    assert seen.n_correct == 60 and seen.refuted and "more than the promise allows" in seen.text
    blind = canary_verdict(plan, {"site-0": opening_of(plan, "site-0", coins, list(rng.random(60)))})
    assert not blind.refuted and "power" in blind.text


def test_the_outlook_says_what_canaries_can_prove_before_training(plan: StudyPlan) -> None:
    words = canary_outlook(plan)
    assert words.startswith("120 in-run canaries: all guessed right would prove epsilon")
    assert "the plan promises 8.0; power 0.00" in words


@pytest.mark.parametrize(
    "change",
    [
        {"nonce": "0" * 63}, {"coins": [1, 0]}, {"scores": [float("nan")] * 40}, {"scores": [0.0]},
        {"attempt": "1"}, {"site_id": ""}, {"more": 1},
    ],
)  # fmt: skip
def test_malformed_openings_are_refused(tmp_path: Path, plan: StudyPlan, change: dict[str, object]) -> None:
    value = coins_of(tmp_path, plan).opening(np.ones(40), candidate_sha256="c" * 64, attempt=1).to_dict()
    assert CanaryOpening.from_dict(value).to_dict() == value
    with pytest.raises(MalformedMessageError, match="canary opening"):
        CanaryOpening.from_dict({**value, **change})
