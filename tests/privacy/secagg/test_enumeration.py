"""Cheating servers, enumerated: with all checks nothing opens; which checks, taken out, let something open.

A public, seeded generator picks where strategies are sampled. Taken out means that the statement in the real
code is not executed (``removed_checks.py``).
"""

from __future__ import annotations

import itertools
import random

import pytest
from removed_checks import removed
from simulated_world import each_input_once
from survivor_game import WEIGHTS, CheatingServer

from privacy.secagg import site_masking
from privacy.secagg.statements import UploadStatement

UNMASKING, RULES = "privacy.secagg.site_unmasking", "privacy.secagg.survivor_rules"
SELF = f"{RULES}:require_self: raise RefusalReason.SELF_NOT_AMONG_SURVIVORS"
WITHIN = f"{RULES}:require_within_peers: raise RefusalReason.SURVIVOR_NOT_A_PEER"
ENOUGH = f"{RULES}:require_enough: raise RefusalReason.TOO_FEW_SURVIVORS"
MEMBERS = (
    f"{UNMASKING}:ConfirmedState.check_released: "
    "raise BadSignatureError(f'{site_id[:64]} is not a survivor')"
)
COUNT = f"{UNMASKING}:ConfirmedState.check_released: raise RefusalReason.TOO_FEW_CONFIRMATIONS"
GENUINE = f"{UNMASKING}:ConfirmedState.check_released: raise RefusalReason.BAD_CONFIRMATION"
NOT_CONFIRMED = f"{UNMASKING}:UploadedState.check_released: raise RefusalReason.SURVIVORS_NOT_CONFIRMED"
SECOND_SET = f"{UNMASKING}:ConfirmedState.check_released: raise RefusalReason.SECOND_SURVIVOR_SET"
CONDITIONS = {"self in U": SELF, "U within P": WITHIN, "|U| >= t": ENOUGH}
OTHER = b"\x07" * 32


@pytest.fixture(autouse=True)
def _quick():
    with each_input_once():
        yield


@pytest.fixture
def no_upload_signatures(monkeypatch):
    monkeypatch.setattr(UploadStatement, "verify", lambda *_: None)


@pytest.mark.parametrize(("n", "t", "c"), [(3, 3, 1), (4, 3, 1), (4, 4, 2), (5, 4, 1), (5, 4, 2)])
def test_no_strategy_at_all_opens_a_small_sum(consortium, n, t, c):
    server = CheatingServer(consortium, n, t, c)
    tricks = server.tricks("site-0")
    full = tuple(server.group.names)
    assert (None, full) in tricks, "the honest strategy does reveal something"
    assert len(tricks) > 2 or n == t
    assert server.search(server.everything()) is None


@pytest.mark.parametrize(("n", "t", "c", "count"), [(6, 4, 1, 4000), (6, 5, 2, 4000)])
def test_sampled_strategies_for_six_sites(consortium, n, t, c, count):
    server, chance = CheatingServer(consortium, n, t, c), random.Random(n + t)
    tricks = [server.tricks(name) for name in server.honest]

    def strategies():
        for _ in range(count):
            common = chance.choice(server.sets)
            yield tuple(
                chance.choice([trick for trick in options if common in trick] or options)
                if chance.random() < 0.5
                else chance.choice(options)
                for options in tricks
            )

    assert server.search(strategies()) is None


def other_terms(n, t):
    """All ways to give the honest of n sites (one colluding) peers and weights of their own."""
    names = [f"site-{index}" for index in range(n)]
    honest = names[:-1]
    options = [
        [
            (chosen, weights)
            for size in range(t, n + 1)
            for chosen in itertools.combinations(names, size)
            if name in chosen
            for weights in (WEIGHTS, OTHER)
        ]
        for name in honest
    ]
    for choice in itertools.product(*options):
        peers = {name: chosen for name, (chosen, _) in zip(honest, choice, strict=True)}
        weights = {name: given for name, (_, given) in zip(honest, choice, strict=True)}
        yield peers, weights


def test_all_ways_to_give_three_sites_other_weights(consortium):
    for peers, weights in other_terms(3, 3):
        server = CheatingServer(consortium, 3, 3, peers=peers, weights=weights)
        assert server.search(server.everything()) is None


def play_other_terms(consortium, ways):
    for peers, weights in ways:
        server = CheatingServer(consortium, 4, 3, peers=peers, weights=weights)
        assert server.search(server.everything()) is None


def test_some_ways_to_give_four_sites_other_peers_and_weights(consortium):
    play_other_terms(consortium, random.Random(4).sample(list(other_terms(4, 3)), 12))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_ways_to_give_four_sites_other_peers_and_weights(consortium):
    play_other_terms(consortium, other_terms(4, 3))


@pytest.mark.parametrize("condition", list(CONDITIONS))
@pytest.mark.parametrize(("n", "t", "c"), [(3, 3, 1), (4, 3, 1), (5, 4, 2)])
def test_one_condition_taken_out_is_implied_by_the_confirmations(consortium, condition, n, t, c):
    """With t genuine signatures of members of U in place, each condition alone is redundant: no strategy
    opens anything. This is why the tests below take out more than one check."""
    with removed(CONDITIONS[condition]):
        server = CheatingServer(consortium, n, t, c)
        assert server.search(sampled(server, 3000)) is None


def test_an_invented_survivor_that_colludes_does_not_help_against_confirmations(consortium):
    """The colluder is outside P and signs whatever it is asked to; U within P is out."""
    peers = dict.fromkeys(("site-0", "site-1", "site-2"), ("site-0", "site-1", "site-2"))
    with removed(WITHIN):
        server = CheatingServer(consortium, 4, 3, peers=peers)
        chosen = ("site-0", "site-1", "site-3")
        assert server.reveal("site-0", chosen, chosen, ("site-0", "site-1")), "it is taken for a survivor"
        assert server.search(sampled(server, 3000)) is None
    assert not CheatingServer(consortium, 4, 3, peers=peers).confirm("site-0", chosen)


def sampled(server, count):
    """All strategies, or that many of them where there are more."""
    tricks = [server.tricks(name) for name in server.honest]
    total = 1
    for options in tricks:
        total *= len(options)
    if total <= count:
        return itertools.product(*tricks)
    chance = random.Random(total)
    return (tuple(chance.choice(options) for options in tricks) for _ in range(count))


def telling(server, told):
    """Each honest site is asked to confirm and to unmask one set; the digits name its sites."""
    names = {
        name: tuple(f"site-{d}" if d != "x" else "phantom" for d in digits) for name, digits in told.items()
    }
    return server.exposed({name: (chosen, chosen) for name, chosen in names.items()})


def same_for_all(server):
    """One set for confirming and unmasking at each site, another for each site."""
    tricks = [(chosen, chosen) for chosen in server.sets]
    return itertools.product(tricks, repeat=len(server.honest))


@pytest.mark.parametrize(
    ("condition", "others", "n", "t"),
    [
        ("self in U", (ENOUGH, MEMBERS), 4, 3),
        ("self in U", (ENOUGH, MEMBERS, COUNT, GENUINE), 3, 3),
        ("|U| >= t", (MEMBERS, COUNT, GENUINE), 4, 3),
        ("|U| >= t", (MEMBERS, SELF), 4, 3),
    ],
)
def test_each_condition_is_the_last_line_where_others_are_out(consortium, condition, others, n, t):
    """Without the others nothing opens as long as the condition stands; without it a single site does."""
    with removed(*others):
        server = CheatingServer(consortium, n, t)
        assert server.search(same_for_all(server)) is None
    with removed(*others, CONDITIONS[condition]):
        server = CheatingServer(consortium, n, t)
        found = server.search(same_for_all(server))
        assert found is not None
        assert len(found) == 1


def test_u_within_p_is_the_last_line_against_invented_survivors(consortium, no_upload_signatures):
    """Upload signatures and confirmations are out; a survivor that is no site at all fills U up to t."""
    others = (MEMBERS, COUNT, GENUINE)
    with removed(*others):
        server = CheatingServer(consortium, 4, 3)
        assert server.search(same_for_all(server)) is None
    with removed(*others, WITHIN):
        server = CheatingServer(consortium, 4, 3)
        found = server.search(same_for_all(server))
        assert found is not None
        assert len(found) == 1


APART = {"site-0": "0135", "site-1": "0145", "site-2": "0125", "site-3": "0135", "site-4": "0145"}
"""n = 6, t = 4: sets that keep all three conditions, of which together a sum over two sites comes out."""


def test_the_three_conditions_are_not_enough_without_counted_confirmations(consortium):
    assert telling(CheatingServer(consortium, 6, 4), APART) is None
    for missing in (COUNT, GENUINE):
        with removed(missing):
            opened = telling(CheatingServer(consortium, 6, 4), APART)
            assert opened == ("site-0", "site-1")


def test_a_site_signs_one_survivor_set_and_no_second(consortium):
    """Sites that forget what they signed sign every set of APART that they are in."""
    assert telling(CheatingServer(consortium, 6, 4, forgetful=True), APART) == ("site-0", "site-1")


def test_a_site_reveals_once(consortium):
    """Sites that answer for U = P and, as if they had not, for a smaller set: the fourth lies bare."""
    server = CheatingServer(consortium, 4, 3)
    full, smaller = tuple(server.group.names), tuple(server.group.names[:3])
    honest = [(name, *item) for name in server.honest for item in server.reveal(name, None, full, ()).items()]
    assert server.judged(honest) is None
    smaller = ("site-0", "site-1", "site-3")
    again = [
        (name, *item)
        for name in ("site-0", "site-1")
        for item in server.reveal(name, smaller, smaller, ("site-0", "site-1")).items()
    ]
    assert server.judged(again) is None
    assert server.judged(honest + again) == ("site-2",)


@pytest.mark.parametrize("check", [NOT_CONFIRMED, SECOND_SET])
def test_own_confirmation_is_implied_by_the_count_too(consortium, check):
    """A set that the site did not sign, or not alone, still needs t signatures of others."""
    with removed(check):
        server = CheatingServer(consortium, 4, 3)
        assert server.search(sampled(server, 3000)) is None


def test_masks_bound_to_weights_protect_where_signatures_do_not(
    consortium, no_upload_signatures, monkeypatch
):
    """Crafted weights for one site and nobody checks who signed what: the masks do not cancel, so nothing
    comes out. Without the binding a sum over sites with different weights does."""
    full = tuple(f"site-{index}" for index in range(4))
    strategy = dict.fromkeys(full[:3], (None, full))
    crafted = {"site-0": OTHER}
    server = CheatingServer(consortium, 4, 3, weights=crafted)
    assert all(server.reveal(name, None, full, ()) for name in server.honest), "everybody reveals all seeds"
    assert server.exposed(strategy) is None
    real = site_masking.UploadTerms.digest
    monkeypatch.setattr(
        site_masking.UploadTerms,
        "digest",
        lambda terms: real(type(terms)(**{**vars(terms), "weights_hash": WEIGHTS})),
    )
    server = CheatingServer(consortium, 4, 3, weights=crafted)
    assert len({upload.terms for upload in server.known.uploads.values()}) == 1
