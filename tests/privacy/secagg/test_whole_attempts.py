"""Whole attempts: nobody drops, or sites fall silent at every stage."""

from __future__ import annotations

import numpy as np
import pytest

from privacy.secagg.reasons import AbortReason, AttemptAbortedError, Component


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("n", [3, 4, 7])
def test_nobody_drops(consortium, n, bits):
    group = consortium(n, bits=bits)
    server = group.server()
    total = group.complete(server)
    assert server.survivors == tuple(group.names)
    np.testing.assert_array_equal(total, group.expected(group.names))
    assert total.dtype == {32: np.int32, 64: np.int64}[bits]


@pytest.mark.parametrize("stage", ["no_keys", "no_shares", "no_upload", "no_confirm", "no_unmask"])
@pytest.mark.parametrize("gone", [0, 3, 6])
def test_a_site_drops_at_each_stage(consortium, stage, gone):
    group = consortium(7, 1, 5)
    server = group.server()
    total = group.complete(server, **{stage: [group.names[gone]]})
    expected = [
        name for name in group.names if stage in ("no_confirm", "no_unmask") or name != group.names[gone]
    ]
    assert server.survivors == tuple(expected)
    np.testing.assert_array_equal(total, group.expected(expected))


def test_two_drop_before_the_upload_and_two_more_answer_nothing_later(consortium):
    group = consortium(9, 1, 6)
    server = group.server()
    total = group.complete(server, no_keys=["site-0"], no_upload=["site-4"], no_confirm=["site-8"])
    expected = [name for name in group.names if name not in ("site-0", "site-4")]
    np.testing.assert_array_equal(total, group.expected(expected))


@pytest.mark.parametrize(
    ("stage", "reason"),
    [
        ("no_keys", AbortReason.TOO_FEW_KEYS),
        ("no_shares", AbortReason.TOO_FEW_SHARES),
        ("no_upload", AbortReason.TOO_FEW_UPLOADS),
        ("no_unmask", AbortReason.TOO_FEW_REVEALED_SHARES),
    ],
)
def test_below_the_threshold_the_attempt_is_aborted(consortium, stage, reason):
    group = consortium(3)
    with pytest.raises(AttemptAbortedError) as refusal:
        group.complete(group.server(), **{stage: ["site-1"]})
    assert refusal.value.reason == reason
    assert "site-1" in str(refusal.value)
    np.testing.assert_array_equal(group.complete(group.server(2)), group.expected(group.names))


def test_two_exchanges_a_round_with_riding_keys(consortium):
    group = consortium(4, 1, 3)
    current = group.until(Component.UPLOAD)
    for number in range(2, 6):
        following = group.server(number)
        uploads = current.build_upload_requests(b"\x01" * 32, b"\x02" * 32)
        keys = following.build_advertise_requests()
        gone = "site-2" if number == 4 else None
        for name in group.names:  # exchange A
            if name in uploads and name != gone:
                current.accept(name, group.ask(name, uploads[name]))
            if name != gone:
                following.accept(name, group.ask(name, keys[name]))
        survivors = current.close_uploads()
        if current.needs_confirmation:
            group.exchange(current, current.build_confirm_requests())
        reveals = current.build_unmask_requests()
        shares = following.build_share_requests()
        for name in group.names:  # exchange B
            if name in reveals:
                current.accept(name, group.ask(name, reveals[name]))
            if name in shares:
                following.accept(name, group.ask(name, shares[name]))
        np.testing.assert_array_equal(current.total(), group.expected(survivors))
        assert len(survivors) == (3 if number in (4, 5) else 4)
        current = following


def test_a_vector_of_many_chunks_and_extreme_values(consortium, monkeypatch):
    monkeypatch.setattr("privacy.secagg.prg.CHUNK_WORDS", 1000)
    for module in ("masking", "messages"):
        monkeypatch.setattr(f"privacy.secagg.{module}.PIECE_BYTES", 4096)
    group = consortium(3, length=4321)
    values = {
        name: np.full(4321, (-1) ** index * 700_000_000, dtype=np.int64)
        for index, name in enumerate(group.names)
    }
    group.vector = values.__getitem__
    np.testing.assert_array_equal(group.complete(group.server()), sum(values.values()))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_forty_sites_five_of_which_drop(consortium):
    group = consortium(40, 1, 21, bits=64)
    server = group.server()
    total = group.complete(
        server, no_keys=["site-39"], no_upload=[f"site-{index}" for index in range(0, 40, 10)]
    )
    assert len(server.survivors) == 35
    np.testing.assert_array_equal(total, group.expected(server.survivors))
