"""Each check of the protocol, taken out of the code: the test that names its cheat then fails.

CAUGHT_BY names a test for every refusal of a site and every fault that the server finds; that none is left
out is itself a test. ``removed_checks.py`` takes the statement out of the function that is there.
"""

from __future__ import annotations

import inspect

import pytest
import test_cheating_server
import test_cheating_site
import test_site_secrets
import test_whole_attempts
from removed_checks import raises, removed

P = "privacy.secagg."
SITE = f"{P}site_rounds:SiteSecureAggregation."
KEYS, SHARED = f"{P}site_keys:AdvertisedState.", f"{P}site_masking:SharedState."
UNMASK, RULES = f"{P}site_unmasking:", f"{P}survivor_rules:"
COLLECT, SERVER = f"{P}server_collections:", f"{P}server_rounds:ServerAttempt."
LIMITS = f"{P}thresholds:ProtocolParameters.__post_init__: raise InvalidThresholdError("
LOWER = "test_lower_threshold_than_the_plan_can_carry"

CAUGHT_BY: dict[str, tuple[str, dict[str, object]]] = {
    f"{SITE}__init__: raise InvalidThresholdError("
    "f\"the roster does not name {site_id} with this site's identi)": (
        "test_a_roster_with_another_key_for_this_site",
        {},
    ),
    f"{SITE}advertise: raise RefusalReason.ATTEMPT_NOT_NEW": ("test_an_attempt_number_after_a_restart", {}),
    f"{SITE}_session: raise RefusalReason.WRONG_STUDY": ("test_key_of_another_study", {}),
    f"{SITE}_at: raise RefusalReason.ATTEMPT_CHANGED": ("test_request_of_another_attempt", {}),
    f"{SITE}_at: raise RefusalReason.OUT_OF_ORDER": ("test_replayed_requests", {}),
    f"{SITE}_at: raise RefusalReason.ATTEMPT_CLOSED": ("test_second_set_after_the_full_one", {}),
    f"{SITE}_at: raise RefusalReason.UNKNOWN_ATTEMPT": ("test_request_of_another_attempt", {}),
    f"{KEYS}verify_keys: raise RefusalReason.BAD_KEY_SIGNATURE": ("test_swapped_key", {}),
    f"{KEYS}verify_keys: raise RefusalReason.KEY_USED_TWICE": ("test_one_key_for_two_sites", {}),
    f"{KEYS}verify_keys: raise RefusalReason.WEAK_KEY": ("test_weak_key_is_refused_by_the_peers_too", {}),
    f"{KEYS}_check_sites: raise RefusalReason.UNKNOWN_SITE": ("test_own_extra_site", {}),
    f"{KEYS}_check_sites: raise RefusalReason.TOO_FEW_PEERS": ("test_roster_shrunk_below_the_minimum", {}),
    f"{KEYS}_check_sites: raise RefusalReason.SELF_NOT_AMONG_PEERS": ("test_own_keys_left_out", {}),
    f"{KEYS}_check_sites: raise RefusalReason.OWN_KEYS_CHANGED": (
        "test_own_keys_replaced_by_older_ones",
        {},
    ),
    f"{SHARED}check: raise RefusalReason.OTHER_SITE": ("test_request_for_another_site", {}),
    f"{SHARED}check: raise RefusalReason.WRONG_WEIGHTS": (
        "test_a_site_is_told_other_weights_than_it_was_given",
        {},
    ),
    f"{SHARED}check: raise RefusalReason.WRONG_REQUEST": (
        "test_a_site_is_told_other_weights_than_it_was_given",
        {},
    ),
    f"{SHARED}check: raise RefusalReason.SELF_NOT_AMONG_PEERS": ("test_peers_shrunk_below_the_minimum", {}),
    f"{SHARED}check: raise RefusalReason.PEER_WITHOUT_KEYS": ("test_peer_without_keys", {}),
    f"{SHARED}check: raise RefusalReason.TOO_FEW_PEERS": ("test_peers_shrunk_below_the_minimum", {}),
    f"{SHARED}_open: raise RefusalReason.BAD_SHARE_SIGNATURE": (
        "test_shares_swapped_between_recipients_or_changed",
        {},
    ),
    f"{SHARED}_open: raise RefusalReason.SHARES_DO_NOT_FIT": (
        "test_shares_that_do_not_open_name_the_dealer",
        {},
    ),
    f"{SHARED}_open: raise RefusalReason.SHARES_DO_NOT_FIT #2": (
        "test_shares_other_than_committed_name_the_dealer",
        {},
    ),
    f"{UNMASK}MaskedState.checked_survivors: raise RefusalReason.BAD_UPLOAD_SIGNATURE": (
        "test_different_weights_to_different_sites",
        {},
    ),
    f"{UNMASK}UploadedState.confirm: raise RefusalReason.NOBODY_DROPPED": (
        "test_confirmation_where_nobody_dropped",
        {},
    ),
    f"{UNMASK}UploadedState.check_released: raise RefusalReason.SURVIVORS_NOT_CONFIRMED": (
        "test_shares_for_a_set_that_the_site_never_confirmed",
        {},
    ),
    f"{UNMASK}ConfirmedState.check_released: raise RefusalReason.SECOND_SURVIVOR_SET": (
        "test_second_set_after_a_confirmed_one",
        {},
    ),
    f"{UNMASK}ConfirmedState.check_released: raise RefusalReason.TOO_FEW_CONFIRMATIONS": (
        "test_survivors_without_enough_signatures",
        {},
    ),
    f"{UNMASK}ConfirmedState.check_released: raise BadSignatureError("
    "f'{site_id[:64]} is not a survivor')": ("test_confirmation_by_a_site_that_is_no_survivor", {}),
    f"{UNMASK}ConfirmedState.check_released: raise RefusalReason.BAD_CONFIRMATION": (
        "test_confirmation_of_another_set_does_not_count",
        {},
    ),
    f"{RULES}require_self: raise RefusalReason.SELF_NOT_AMONG_SURVIVORS": (
        "test_self_left_out_of_the_survivors",
        {},
    ),
    f"{RULES}require_within_peers: raise RefusalReason.SURVIVOR_NOT_A_PEER": (
        "test_survivor_that_is_no_peer",
        {},
    ),
    f"{RULES}require_enough: raise RefusalReason.TOO_FEW_SURVIVORS": ("test_too_few_survivors", {}),
    f"{LIMITS}f'secure aggregation is for {{MIN_SITES}} to {{MAX_SITES}} sites)": (
        LOWER,
        {"n": 101, "c": 1, "t": 60},
    ),
    f"{LIMITS}f'max_colluding is 1 to {{n - 1}}, not {{c}}')": (LOWER, {"n": 3, "c": 0, "t": 3}),
    f"{LIMITS}f'threshold {{t}} is larger than the number of sites {{n}}')": (
        LOWER,
        {"n": 4, "c": 1, "t": 5},
    ),
    f"{LIMITS}f'threshold {{t}} is not above (n + c)/2 = {{(n + c) / 2:g}}')": (
        LOWER,
        {"n": 5, "c": 2, "t": 3},
    ),
    f"{COLLECT}Collection._admit: raise FaultReason.NOT_ASKED": ("test_unsigned_and_foreign_replies", {}),
    f"{COLLECT}Collection._admit: raise FaultReason.LATE": (
        "test_uploads_of_wrong_length_twice_or_late",
        {},
    ),
    f"{COLLECT}Collection._admit: raise FaultReason.REPEATED": (
        "test_uploads_of_wrong_length_twice_or_late",
        {},
    ),
    f"{COLLECT}Collection._admit: raise FaultReason.OTHER_ATTEMPT": ("test_unsigned_and_foreign_replies", {}),
    f"{COLLECT}Collection._admit: raise FaultReason.OTHER_SITE": ("test_unsigned_and_foreign_replies", {}),
    f"{COLLECT}Collection._verify: raise FaultReason.BAD_SIGNATURE": (
        "test_unsigned_and_foreign_replies",
        {},
    ),
    f"{COLLECT}KeyCollection._take: raise FaultReason.KEY_USED_TWICE": (
        "test_keys_used_twice_or_of_small_order",
        {},
    ),
    f"{COLLECT}KeyCollection._take: raise FaultReason.WEAK_KEY": (
        "test_keys_used_twice_or_of_small_order",
        {},
    ),
    f"{COLLECT}ShareCollection._take: raise FaultReason.WRONG_RECIPIENTS": (
        "test_unsigned_and_foreign_replies",
        {},
    ),
    f"{COLLECT}UploadCollection._take: raise FaultReason.WRONG_LENGTH": (
        "test_uploads_of_wrong_length_twice_or_late",
        {},
    ),
    f"{COLLECT}RevealCollection._take: raise FaultReason.WRONG_SHARES": (
        "test_a_true_share_of_the_other_kind_is_not_taken",
        {},
    ),
    f"{COLLECT}RevealCollection._take: raise FaultReason.WRONG_SHARES #2": (
        "test_a_wrong_revealed_share_is_named_and_the_round_completes",
        {},
    ),
    f"{SERVER}accept: raise self._malformed(site_id)": ("test_malformed_replies_are_named", {}),
    f"{SERVER}accept: raise self._malformed(site_id) #2": ("test_malformed_replies_are_named", {}),
    f"{SERVER}total: raise self._bad_dealer(owner)": (
        "test_a_mask_seed_that_is_not_the_signed_one_names_the_dealer",
        {},
    ),
    f"{SERVER}total: raise self._bad_dealer(owner) #2": (
        "test_a_reconstructed_key_that_does_not_match_names_the_dealer",
        {},
    ),
    f"{SERVER}_finish: raise AttemptAbortedError(_TOO_FEW[component])": (
        "test_below_the_threshold_the_attempt_is_aborted",
        {"stage": "no_upload", "reason": "too_few_uploads"},
    ),
    f"{SERVER}_accept: raise FaultReason.NOT_ASKED": ("test_a_reply_that_was_never_asked_for", {}),
}
"""A check, the test that fails without it, and the case of that test where it has several."""

STATEMENTS: dict[str, str] = {
    f"{SITE}advertise: self._register_attempt(number)": "test_the_number_is_durable_before_keys_exist",
    f"{SITE}advertise: self._last_attempt = number": "test_replayed_requests",
    f"{SITE}unmask: self._close_open()": "test_second_set_after_the_full_one",
    f"{SITE}upload: self._close_open()": "test_opening_a_later_attempt_closes_the_earlier_one",
    f"{SITE}upload: state.wipe()": "test_the_key_pair_dies_also_where_masking_fails",
    f"{SITE}_close_prepared: self._prepared.wipe()": "test_reordered_requests",
    f"{SHARED}wipe: self.secrets.wipe()": "test_secrets_are_wiped_when_an_attempt_closes",
}
"""The same for statements that are no refusals: what makes a number durable, closes and forgets."""

OWN_BUGS = ("InternalError", "NotImplementedError", "modulus_bits is")
"""Not against anybody: they cannot be reached by a message."""


def names_of_checks() -> set[str]:
    modules = ("site_rounds", "site_keys", "site_masking", "site_unmasking", "survivor_rules", "thresholds")
    found = [name for module in modules for name in raises(P + module)]
    found += raises(f"{P}server_collections") + raises(f"{P}server_rounds")
    return {name for name in found if not any(word in name for word in OWN_BUGS)}


def test_no_check_is_left_out():
    assert set(CAUGHT_BY) == names_of_checks()


def play(name, consortium, monkeypatch, case):
    """Run one named test as pytest would."""
    for module, size in (
        (test_cheating_server, (4, 1, 3)),
        (test_cheating_site, (5, 1, 4)),
        (test_site_secrets, (4, 1, 3)),
        (test_whole_attempts, (3, 1, 3)),
    ):
        if (test := getattr(module, name, None)) is not None:
            offered = {"group": lambda size=size: consortium(*size), "consortium": lambda: consortium}
            offered |= {"monkeypatch": lambda: monkeypatch}
            wanted = inspect.signature(test).parameters
            return test(**{key: case[key] if key in case else offered[key]() for key in wanted})
    raise LookupError(name)


@pytest.mark.parametrize("check", list(CAUGHT_BY))
def test_the_test_of_a_check_fails_without_it(check, consortium, monkeypatch):
    name, case = CAUGHT_BY[check]
    with monkeypatch.context() as patch:
        play(name, consortium, patch, case)
    failing = pytest.raises((Exception, pytest.fail.Exception))
    with removed(check), failing, monkeypatch.context() as patch:
        play(name, consortium, patch, case)


@pytest.mark.parametrize("statement", list(STATEMENTS))
def test_the_test_of_a_statement_fails_without_it(statement, consortium, monkeypatch):
    with monkeypatch.context() as patch:
        play(STATEMENTS[statement], consortium, patch, {})
    failing = pytest.raises((Exception, pytest.fail.Exception))
    with removed(statement), failing, monkeypatch.context() as patch:
        play(STATEMENTS[statement], consortium, patch, {})
