"""Shares, keys, masks, residues, by their properties; the known answers are in test_vectors.py."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from Crypto.Protocol.SecretSharing import Shamir

from privacy.keystream import Keystream
from privacy.secagg import prg
from privacy.secagg.keys import UnsealingError, WeakKeyError, agree, pair_mask_key, seal_share, unseal_share
from privacy.secagg.masking import (
    add_pieces,
    apply_streams,
    centre,
    from_bytes,
    masked_residues,
    to_pieces,
    zeros,
)
from privacy.secagg.shamir import combine_shares, split_secret

SECRET = bytes(range(32))


def test_any_threshold_of_shares_gives_the_secret_and_fewer_do_not():
    shares = dict(enumerate(split_secret(SECRET, threshold=3, n_shares=5), start=1))
    for chosen in itertools.combinations(shares, 3):
        assert combine_shares({index: shares[index] for index in chosen}, threshold=3) == SECRET
    assert combine_shares(shares, threshold=3) == SECRET
    assert combine_shares({1: shares[1], 2: shares[2]}, threshold=2) != SECRET
    with pytest.raises(ValueError, match="fewer than the threshold"):
        combine_shares({1: shares[1], 2: shares[2]}, threshold=3)


def test_known_answer_of_shamir():
    """p(x) = s + x over GF(2^128), so shares 1 and 2 are s xor 1 and s xor 2 in each block."""
    blocks = [int.from_bytes(SECRET[start : start + 16], "big") for start in (0, 16)]
    shares = {index: b"".join((block ^ index).to_bytes(16, "big") for block in blocks) for index in (1, 2)}
    assert combine_shares(shares, threshold=2) == SECRET


@pytest.mark.parametrize(("threshold", "n_shares"), [(1, 1), (2, 3), (3, 3), (7, 12), (12, 20)])
def test_shares_are_those_of_the_library(threshold, n_shares):
    """What pycryptodome splits, ours combines, and the other way round."""
    chosen = random.Random(threshold).sample(range(1, n_shares + 1), threshold)
    ours = dict(enumerate(split_secret(SECRET, threshold=threshold, n_shares=n_shares), start=1))
    for block in (slice(0, 16), slice(16, 32)):
        assert Shamir.combine([(index, ours[index][block]) for index in chosen]) == SECRET[block]
    theirs = [dict(Shamir.split(threshold, n_shares, SECRET[block])) for block in (slice(16), slice(16, 32))]
    joined = {index: theirs[0][index] + theirs[1][index] for index in chosen}
    assert combine_shares(joined, threshold=threshold) == SECRET


def test_coefficients_are_fresh_for_each_secret_and_block():
    """One coefficient used twice shows in the sum of two shares, which is then that of the secrets."""
    shares = [split_secret(SECRET, threshold=2, n_shares=2)[0] for _ in range(200)]
    coefficients = {
        int.from_bytes(share[start : start + 16]) ^ int.from_bytes(SECRET[start : start + 16])
        for share in shares
        for start in (0, 16)
    }
    assert len(coefficients) == 400


@pytest.mark.parametrize(("threshold", "n_shares"), [(0, 3), (4, 3), (1, 0)])
def test_a_threshold_that_no_shares_can_have_is_refused(threshold, n_shares):
    with pytest.raises(ValueError, match="cannot have a threshold"):
        split_secret(SECRET, threshold=threshold, n_shares=n_shares)


def test_a_hundred_sites():
    shares = dict(enumerate(split_secret(SECRET, threshold=51, n_shares=100), start=1))
    chosen = {index: shares[index] for index in range(50, 101)}
    assert combine_shares(chosen, threshold=51) == SECRET


def test_sealed_shares_open_only_in_their_place():
    sealed = seal_share(SECRET, bytes(64), key_set=b"k" * 32, dealer="a", recipient="b")
    assert len(sealed) == 80
    place = {"key_set": b"k" * 32, "dealer": "a", "recipient": "b"}
    assert unseal_share(SECRET, sealed, **place) == bytes(64)
    for change in ({"key_set": b"x" * 32}, {"dealer": "b"}, {"recipient": "a"}):
        with pytest.raises(UnsealingError):
            unseal_share(SECRET, sealed, **{**place, **change})
    with pytest.raises(UnsealingError):
        unseal_share(SECRET, sealed[:-1] + b"\x00", **place)


def test_agreement_is_x25519_of_rfc_7748():
    """The first vector of section 5.2 of the RFC, and a point of small order."""
    scalar = bytes.fromhex("a546e36bf0527c9d3b16154b82465edd62144c0ac1fc5a18506a2244ba449ac4")
    point = bytes.fromhex("e6db6867583030db3594c1a424b15f7c726624ec26b3353b10a903a6d0ab1c4c")
    agreed = "c3da55379de9c6908e94ea4df28d084f32eccf03491c71f754b4075577a28552"
    assert agree(scalar, point).hex() == agreed
    with pytest.raises(WeakKeyError):
        agree(scalar, bytes(32))


def test_pair_mask_keys_differ_in_every_input():
    base = {"terms": b"t" * 32, "first": "a", "second": "b"}
    keys = {pair_mask_key(SECRET, **base)}
    for change in ({"terms": b"u" * 32}, {"first": "c"}, {"second": "c"}, {"first": "b", "second": "a"}):
        keys.add(pair_mask_key(SECRET, **{**base, **change}))
    keys.add(pair_mask_key(bytes(32), **base))
    assert len(keys) == 6


@pytest.mark.parametrize("bits", [32, 64])
def test_residues_are_centred_and_bytes_are_little_endian(bits):
    edge = 2 ** (bits - 1)
    values = np.array([0, 1, -1, edge - 1, -edge], dtype=np.int64)
    residues = masked_residues(values, bits, [], [])
    np.testing.assert_array_equal(centre(residues), values)
    assert b"".join(to_pieces(residues))[bits // 8 : bits // 4] == b"\x01" + bytes(bits // 8 - 1)
    np.testing.assert_array_equal(from_bytes(b"".join(to_pieces(residues)), bits), residues)


@pytest.mark.parametrize("bits", [32, 64])
def test_masks_are_the_keystream_and_cancel(bits, monkeypatch):
    monkeypatch.setattr("privacy.secagg.prg.CHUNK_WORDS", 37)
    values = np.arange(-500, 500, dtype=np.int64)
    masked = masked_residues(values, bits, [], [])
    apply_streams(masked, [b"a" * 32], [b"b" * 32])
    stream = [
        np.frombuffer(Keystream(key * 32).read(1000 * bits // 8), f"<u{bits // 8}") for key in (b"a", b"b")
    ]
    np.testing.assert_array_equal(masked, masked_residues(values, bits, [], []) + stream[0] - stream[1])
    np.testing.assert_array_equal(masked, masked_residues(values, bits, [b"a" * 32], [b"b" * 32]))
    apply_streams(masked, [b"b" * 32], [b"a" * 32])
    np.testing.assert_array_equal(centre(masked), values)


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("length", [64, 1000, 1024, 1025])
def test_threads_expand_the_same_streams(bits, length, monkeypatch):
    monkeypatch.setattr(prg, "CHUNK_WORDS", 64)
    keys = [bytes([index]) * 32 for index in range(5)]
    values = np.arange(length, dtype=np.int64) - 500
    expected = masked_residues(values, bits, keys[:3], keys[3:], cores=1)
    monkeypatch.setattr(prg, "MIN_WORDS_PER_CORE", 1)
    for cores in (2, 3, 16):
        np.testing.assert_array_equal(
            masked_residues(values, bits, keys[:3], keys[3:], cores=cores), expected
        )
        masked = expected.copy()
        apply_streams(masked, keys[3:], keys[:3], cores=cores)
        np.testing.assert_array_equal(centre(masked), values)


@pytest.mark.parametrize("bits", [32, 64])
def test_vectors_are_added_piece_by_piece(bits, monkeypatch):
    monkeypatch.setattr("privacy.secagg.masking.PIECE_BYTES", 64)
    values = np.arange(-50, 51, dtype=np.int64)
    pieces = to_pieces(masked_residues(values, bits, [], []))
    assert [len(piece) for piece in pieces[:-1]] == [64] * (len(pieces) - 1)
    assert sum(len(piece) for piece in pieces) == 101 * bits // 8
    total = zeros(101, bits)
    for _ in range(3):
        add_pieces(total, [bytes(piece) for piece in pieces])
    np.testing.assert_array_equal(centre(total), 3 * values)
