"""Every clause of the site's policy refuses by its own name, and by nothing else."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest
from small_plan import Keys, small_plan

from client.site_policy import InvalidPolicyError, PlanRefusedError, SitePolicy, load_policy, save_policy
from shared.errors import RefusedError
from shared.exit_codes import ExitCode
from shared.study_plan import StudyPlan

KEYS = Keys.of(4)
PLAN = small_plan(KEYS)


def pinned(plan: StudyPlan = PLAN, **clauses: Any) -> SitePolicy:
    """A policy of site-0 that allows the plan, but for the clauses given."""
    return SitePolicy(
        **{
            "coordinator_fingerprint": KEYS.coordinator.verify_key.fingerprint,
            "officer_fingerprint": KEYS.officer.verify_key.fingerprint,
            "peers": {f"site-{i}": KEYS.sites[i].verify_key.fingerprint for i in (1, 2, 3)},
            **clauses,
        }
    )


def refusals(
    policy: SitePolicy, plan: StudyPlan = PLAN, *, own: str = "site-0", key: int = 0
) -> tuple[str, ...]:
    return policy.refusals(plan, own_site=own, own_key=KEYS.sites[key].verify_key)


def test_a_plan_within_the_policy_is_approved() -> None:
    assert refusals(pinned()) == ()
    pinned().check(PLAN, own_site="site-0", own_key=KEYS.sites[0].verify_key)


OTHER = Keys.of(1).sites[0].verify_key.fingerprint
ONE_CLAUSE: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("max_epsilon", {"max_epsilon": 7.9}, {}),
    ("max_delta", {"max_delta": 9e-6}, {}),
    ("min_sites", {"min_sites": 5}, {}),
    ("min_threshold", {"min_threshold": 4}, {}),
    ("min_colluding", {"min_colluding": 2}, {}),
    ("min_holdout_share", {"min_holdout_share": 0.5}, {}),
    ("allowed_modes", {"allowed_modes": ("local",)}, {}),
    ("allowed_presets", {"allowed_presets": ("tiny",)}, {}),
    ("allowed_trainable", {"allowed_trainable": ("attention", "low_rank")}, {}),
    ("require_officer_approval", {}, {"release__officer_approval": False}),
    ("max_auc", {}, {"audit__max_auc": 0.56}),
    ("max_power_at_auc", {}, {"audit__power_at_auc": 0.95}),
    ("min_power", {}, {"audit__min_power": 0.49}),
    ("allow_low_power", {}, {"audit__low_power": "accept"}),
    ("min_significance", {}, {"audit__significance": 0.01}),
    ("min_copy_samples", {}, {"audit__copy_samples": 499}),
    ("min_copy_distance", {}, {"audit__copy_distance": 0.09}),
    ("require_copy_embedding", {"require_copy_embedding": True}, {}),
    ("copy_embedding_sha256", {"copy_embedding_sha256": "ab" * 32}, {}),
    (
        "copy_embedding_sha256",
        {"copy_embedding_sha256": "ab" * 32},
        {"audit__copy_embedding_sha256": "cd" * 32},
    ),
    ("min_mechanism_canaries", {"min_mechanism_canaries": 1}, {}),
    ("max_copied_share", {}, {"audit__max_copied_patients": 11}),
    ("max_audit_attempts", {"max_audit_attempts": 1}, {}),
    ("min_site_approvals", {}, {"release__site_approvals": 1}),
    ("require_expiry", {}, {"expires": ...}),
    ("expired", {}, {"expires": "2026-01-31"}),
    ("coordinator_fingerprint", {"coordinator_fingerprint": None}, {}),
    ("coordinator_fingerprint", {"coordinator_fingerprint": OTHER}, {}),
    ("officer_fingerprint", {"officer_fingerprint": None}, {}),
    ("officer_fingerprint", {"officer_fingerprint": OTHER}, {}),
    (
        "allow_unprotected",
        {},
        {
            "privacy__mode": "unprotected",
            "privacy__epsilon": None,
            "privacy__noise_multiplier": 0.0,
            "privacy__audit_noise_multiplier": 0.0,
        },
    ),
]


@pytest.mark.parametrize(("clause", "policy", "plan"), ONE_CLAUSE, ids=[c for c, _, _ in ONE_CLAUSE])
def test_each_clause_refuses_by_its_name_alone(
    clause: str, policy: dict[str, Any], plan: dict[str, Any]
) -> None:
    failed = refusals(pinned(**policy), small_plan(KEYS, **plan))
    assert [line.split(":")[0] for line in failed] == [clause]


def test_a_plan_with_the_embedding_that_is_asked_for_is_approved(tmp_path: Path) -> None:
    plan = small_plan(KEYS, audit__copy_embedding_sha256="ab" * 32)
    policy = pinned(require_copy_embedding=True, copy_embedding_sha256="ab" * 32)
    save_policy(policy, tmp_path / "policy.toml")
    assert load_policy(tmp_path / "policy.toml") == policy
    assert refusals(policy, plan) == ()
    (line,) = refusals(policy, small_plan(KEYS, audit__copy_embedding_sha256="cd" * 32))
    assert "cd" * 32 in line and "ab" * 32 in line
    for wrong in ("AB" * 32, "ab" * 31, "any"):
        with pytest.raises(InvalidPolicyError, match="copy_embedding_sha256"):
            policy.changed(f'copy_embedding_sha256 = "{wrong}"')


def test_defaults_of_plan_and_policy_are_the_same_bound() -> None:
    assert SitePolicy().max_auc == PLAN.audit.max_auc == 0.55


def test_a_plan_expires_after_its_last_day_and_what_is_asked_can_be_waived() -> None:
    plan = small_plan(KEYS, expires="2026-01-31", audit__low_power="accept")
    policy = pinned(allow_low_power=True)

    def on(day: date) -> tuple[str, ...]:
        return policy.refusals(plan, own_site="site-0", own_key=KEYS.sites[0].verify_key, today=day)

    assert on(date(2026, 1, 31)) == ()
    assert [line.split(":")[0] for line in on(date(2026, 2, 1))] == ["expired"]
    endless = small_plan(KEYS, expires=...)
    assert refusals(pinned(require_expiry=False), endless) == ()
    assert b"expires" not in endless.canonical() and b'"expires":"2026-01-31"' in plan.canonical()


def test_unprotected_needs_its_own_clause_and_no_other_lets_it_in() -> None:
    plan = small_plan(
        KEYS,
        privacy__mode="unprotected",
        privacy__epsilon=None,
        privacy__noise_multiplier=0.0,
        privacy__audit_noise_multiplier=0.0,
    )
    assert refusals(pinned(allow_unprotected=True), plan) == ()
    assert refusals(pinned(allowed_modes=("unprotected",)), plan) != ()
    assert refusals(pinned(allow_unprotected=True), PLAN) == ()


def test_an_unknown_peer_and_a_peer_with_another_key_are_named() -> None:
    peers = {f"site-{i}": KEYS.sites[i].verify_key.fingerprint for i in (1, 2)}
    (line,) = refusals(pinned(peers=peers))
    assert line.startswith("peers: 'site-3' is not pinned")
    assert KEYS.sites[3].verify_key.fingerprint in line
    (line,) = refusals(pinned(peers={**peers, "site-3": OTHER}))
    assert line.startswith("peers: the plan's key for 'site-3'")
    assert OTHER in line
    swapped = {**peers, "site-3": peers["site-1"]}
    assert len(refusals(pinned(peers=swapped))) == 1


def test_the_plans_key_for_this_site_must_be_its_own() -> None:
    (line,) = refusals(pinned(), key=1)
    assert line.startswith("roster: the key given for this site")


def test_a_plan_without_this_site_is_refused() -> None:
    policy = pinned(peers={**pinned().peers, "site-0": KEYS.sites[0].verify_key.fingerprint})
    (line,) = refusals(policy, own="elsewhere")
    assert line.startswith("roster: this site, 'elsewhere'")


def test_all_failing_clauses_are_named_at_once_with_the_refusals_exit_code() -> None:
    policy = SitePolicy(max_epsilon=1, min_sites=9)
    with pytest.raises(PlanRefusedError) as caught:
        policy.check(PLAN, own_site="site-0", own_key=KEYS.sites[0].verify_key)
    names = [line.split(":")[0] for line in caught.value.clauses]
    pins = ["coordinator_fingerprint", "officer_fingerprint", "peers", "peers", "peers"]
    assert names == ["max_epsilon", "min_sites", *pins]
    assert isinstance(caught.value, RefusedError)
    assert caught.value.exit_code == ExitCode.REFUSED
    for line in caught.value.clauses:
        assert line in caught.value.diagnostics()


def test_the_default_policy_pins_nobody_and_admits_nobody() -> None:
    assert refusals(SitePolicy()) != ()
    assert not SitePolicy().allow_unprotected


def test_the_file_round_trips_privately(tmp_path: Path) -> None:
    path = tmp_path / "policy.toml"
    policy = pinned(max_epsilon=3.5)
    save_policy(policy, path)
    assert load_policy(path) == policy
    assert path.stat().st_mode & 0o777 == 0o600
    save_policy(SitePolicy(), path)
    assert load_policy(path).coordinator_fingerprint is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("max_epsilonn = 3", "max_epsilonn"),
        ("max_epsilon = -1", "max_epsilon"),
        ("max_epsilon = inf", "max_epsilon"),
        ("max_delta = 0.5", "max_delta"),
        ('allowed_modes = ["none"]', "allowed_modes"),
        ('coordinator_fingerprint = "SHA256:abc"', "coordinator_fingerprint"),
        ('format = "other"', "format"),
        ("x", "not TOML"),
    ],
)
def test_a_wrong_policy_file_names_the_key(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "policy.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidPolicyError, match=named):
        load_policy(path)
    with pytest.raises(InvalidPolicyError, match="cannot be read"):
        load_policy(tmp_path / "none.toml")


def test_pins_and_changes_are_checked_before_they_are_kept() -> None:
    policy = SitePolicy().pinned("site-1", OTHER).pinned("coordinator", OTHER).pinned("officer", OTHER)
    assert (policy.peers, policy.coordinator_fingerprint) == ({"site-1": OTHER}, OTHER)
    for name, fingerprint in (("site-1", "wrong"), ("Not A Site", OTHER), ("officer", "")):
        with pytest.raises(InvalidPolicyError):
            policy.pinned(name, fingerprint)
    assert policy.changed("max_epsilon=2").max_epsilon == 2
    assert policy.changed("max_epsilon=2").peers == {"site-1": OTHER}
    for change in ("max_epsilon", "max_epsilon=high", "nonsense=1", ""):
        if change == "":
            assert policy.changed(change) == policy
            continue
        with pytest.raises(InvalidPolicyError):
            policy.changed(change)
