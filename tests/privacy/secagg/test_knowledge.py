"""The checker of the simulation and the enumeration, against vectors that are really unmasked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from knowledge import Knowledge, Upload, left_null_space

from privacy.secagg.keys import agree, pair_mask_key, self_mask_key
from privacy.secagg.masking import apply_streams
from privacy.secagg.messages import UploadReply
from privacy.secagg.reasons import Component

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32
SITES = ("a", "b", "c", "d")


def knowledge(seeds="", keys="", terms="1111", threshold=3):
    uploads = {name: Upload(SITES, terms[index].encode()) for index, name in enumerate(SITES)}
    held = Knowledge(threshold, uploads)
    for kind, owners in (("seed", seeds), ("key", keys)):
        for owner, holder in itertools.product(owners, SITES[:threshold]):
            held.learn(holder, owner, kind)
    return held


@pytest.mark.parametrize(
    ("seeds", "keys", "terms", "sums"),
    [
        ("", "", "1111", []),
        ("", "abcd", "1111", []),
        ("abc", "", "1111", []),
        ("abcd", "", "1111", ["abcd"]),
        ("abc", "d", "1111", ["abc"]),
        ("a", "bcd", "1111", ["a"]),
        ("ab", "cd", "1111", ["ab"]),
        ("ab", "a", "1111", ["a"]),
        ("abcd", "a", "1111", ["a", "bcd"]),
        ("abcd", "ac", "1111", ["a", "c", "bd"]),
        ("abcd", "", "1112", []),
        ("abcd", "d", "1112", ["abc", "d"]),
        ("abcd", "", "1122", []),
        ("abcd", "abc", "1234", ["a", "b", "c", "d"]),
    ],
)
def test_sums_that_are_determined(seeds, keys, terms, sums):
    found = knowledge(seeds, keys, terms).sums()
    assert sorted(found) == sorted(tuple(names) for names in sums)


def test_shares_below_the_threshold_and_the_same_share_twice_count_for_nothing():
    held = knowledge(threshold=3)
    for owner in SITES:
        for _ in range(3):
            held.learn("a", owner, "seed")
        held.learn("b", owner, "seed")
    assert held.sums() == []
    everything = dict.fromkeys(SITES, SITES)
    assert held.with_colluders(["d"], everything).sums(["d"]) == [("a", "b", "c")]
    assert held.sums() == []


def test_overlapping_sums_do_not_go_unnoticed():
    with pytest.raises(AssertionError, match="overlapping"):
        left_null_space(np.array([[1], [1], [-2]]))


@pytest.mark.parametrize("open_keys", [(), ("site-1",), ("site-0", "site-2")])
def test_what_is_determined_is_what_comes_out_of_the_masked_vectors(consortium, open_keys):
    """All seeds and some mask keys known: real vectors, with the known streams taken off, add up to the
    sums that the checker names, and to no other subset's (2^-32 a subset and coordinate, five of each)."""
    group = consortium(4, 1, 3)
    server = group.until(Component.UPLOAD)
    secrets = {name: group.sites[name]._prepared.secrets for name in group.names}
    seeds = {name: item.seed for name, item in secrets.items()}
    private = {name: item.mask_private for name, item in secrets.items()}
    public = {name: item.mask_public for name, item in secrets.items()}
    vectors, held = {}, Knowledge(3)
    for name, request in server.build_upload_requests(WEIGHTS, WORK).items():
        reply = UploadReply.from_envelope(group.ask(name, request))
        vectors[name] = np.frombuffer(b"".join(reply.masked), dtype=np.uint32).copy()
        state = group.sites[name]._open
        held.uploads[name] = Upload(state.peers, state.terms)
        for holder in group.names[:3]:
            held.learn(holder, name, "seed")
            if name in open_keys:
                held.learn(holder, name, "key")
        plus, minus = [], [self_mask_key(state.session, name, seeds[name])]
        for peer in state.peers:
            if peer != name and {peer, name} & set(open_keys):
                first, second = sorted((peer, name))
                opened = peer if peer in open_keys else name
                agreed = agree(private[opened], public[name if opened == peer else peer])
                key = pair_mask_key(agreed, terms=state.terms, first=first, second=second)
                (minus if first == name else plus).append(key)
        apply_streams(vectors[name], plus, minus)
    determined = held.sums()
    assert sorted(name for names in determined for name in names) == group.names
    unions = {
        tuple(sorted(itertools.chain(*chosen)))
        for size in range(1, len(determined) + 1)
        for chosen in itertools.combinations(determined, size)
    }
    for size in range(1, 5):
        for names in itertools.combinations(group.names, size):
            total = sum((vectors[name] for name in names), np.zeros(group.length, dtype=np.uint32))
            right = np.array_equal(total.view(np.int32), group.expected(names))
            assert right == (names in unions)
