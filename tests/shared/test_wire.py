"""Frames: exact round trips, and nothing but the project's error for bytes that are not one."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.agent_messages import Hello, HelloReply, VerdictRequest, Work
from shared.canonical import canonical_json
from shared.errors import MalformedMessageError
from shared.wire import MAGIC, MAX_BLOBS, Envelope, decode, decode_parts, encode, encode_header, pack, unpack

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ENVELOPES = st.builds(
    Envelope,
    st.from_regex(r"[a-z][a-z0-9_]{0,10}", fullmatch=True),
    st.dictionaries(TEXT, JSON, max_size=3),
    st.lists(st.binary(max_size=20), max_size=4).map(tuple),
)
READERS = (
    Hello.from_envelope,
    HelloReply.from_envelope,
    lambda envelope: Work.from_envelope(envelope, dimension=2),
    VerdictRequest.from_envelope,
)


@given(ENVELOPES)
@settings(max_examples=60)
def test_a_frame_round_trips(envelope: Envelope) -> None:
    assert decode(encode(envelope)) == envelope
    assert decode_parts(encode_header(envelope), envelope.blobs) == envelope


@given(st.lists(ENVELOPES, max_size=4))
@settings(max_examples=40)
def test_packed_parts_round_trip(parts: list[Envelope]) -> None:
    assert unpack(decode(encode(pack("exchange", parts)))) == parts


def test_every_truncation_and_every_tail_is_refused() -> None:
    frame = encode(Envelope("upload", {"round": 3}, (b"abc", b"", b"defg")))
    for length in range(len(frame)):
        with pytest.raises(MalformedMessageError):
            decode(frame[:length])
    with pytest.raises(MalformedMessageError, match="length"):
        decode(frame + b"x")


@given(st.binary(max_size=120), st.booleans())
def test_any_bytes_give_a_frame_or_the_projects_error(data: bytes, magic: bool) -> None:
    with contextlib.suppress(MalformedMessageError):
        decode(MAGIC + data if magic else data)


@given(st.data())
@settings(max_examples=80)
def test_a_changed_byte_gives_a_frame_or_the_projects_error(data: st.DataObject) -> None:
    frame = bytearray(encode(pack("exchange", [Envelope("work", {"attempt": 1}, (bytes(8),))])))
    for _ in range(data.draw(st.integers(1, 3))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MalformedMessageError):
        unpack(decode(bytes(frame)))


def _frame(header: Any, tail: bytes = b"") -> bytes:
    text = canonical_json(header)
    return MAGIC + len(text).to_bytes(4, "big") + text + tail


@pytest.mark.parametrize(
    "header",
    [
        [],
        {"kind": "a", "body": {}},
        {"kind": "a", "body": {}, "sizes": [], "more": 1},
        {"kind": "A", "body": {}, "sizes": []},
        {"kind": "", "body": {}, "sizes": []},
        {"kind": 1, "body": {}, "sizes": []},
        {"kind": "a", "body": [], "sizes": []},
        {"kind": "a", "body": {}, "sizes": {}},
        {"kind": "a", "body": {}, "sizes": [-1]},
        {"kind": "a", "body": {}, "sizes": [True]},
        {"kind": "a", "body": {}, "sizes": [1.5]},
        {"kind": "a", "body": {}, "sizes": [2**52]},
        {"kind": "a", "body": {}, "sizes": [0] * (MAX_BLOBS + 1)},
    ],
)
def test_headers_with_wrong_fields_are_refused(header: Any) -> None:
    with pytest.raises(MalformedMessageError):
        decode(_frame(header, b"x"))


@pytest.mark.parametrize(
    "parts",
    [
        None,
        {},
        [1],
        [{"kind": "a", "body": {}}],
        [{"kind": "a", "body": {}, "blobs": 2}],
        [{"kind": "a", "body": {}, "blobs": 0}],
        [{"kind": "a", "body": {}, "blobs": True}],
        [{"kind": "a", "body": [], "blobs": 1}],
        [{"kind": "-", "body": {}, "blobs": 1}],
    ],
)
def test_malformed_lists_of_parts_are_refused(parts: Any) -> None:
    with pytest.raises(MalformedMessageError):
        unpack(Envelope("exchange", {"parts": parts}, (b"x",)))


@given(ENVELOPES, st.sampled_from(["hello", "hello_reply", "work", "verdict_request"]))
@settings(max_examples=60)
def test_message_readers_raise_only_the_projects_error(envelope: Envelope, kind: str) -> None:
    for read in READERS:
        with contextlib.suppress(MalformedMessageError):
            read(Envelope(kind, envelope.body, envelope.blobs))


FIELDS = {
    "hello": {"nonce": "0" * 64, "plan_sha256": "1" * 64, "run_id": "7", "version": "0.1"},
    "hello_reply": {"site_id": "a", "last_attempt": 3, "version": "0.1", "signature": "0" * 128},
    "verdict_request": {
        "attempt": 1,
        "run_id": "7",
        "candidate_sha256": "2" * 64,
        "survivors": ["a"],
        "pooled_counts": [1],
    },
}
READ = {
    "hello": Hello.from_envelope,
    "hello_reply": HelloReply.from_envelope,
    "verdict_request": VerdictRequest.from_envelope,
}


@pytest.mark.parametrize("kind", FIELDS)
@pytest.mark.parametrize("value", [None, -1, True, 1.5, [], [True], {}, "", "z z", 2**31 + 1])
def test_each_field_of_each_message_is_checked(kind: str, value: Any) -> None:
    """A valid message is read; with any one field replaced it is refused, or the value was a valid one."""
    assert READ[kind](Envelope(kind, FIELDS[kind])).to_envelope() == Envelope(kind, FIELDS[kind])
    for name in FIELDS[kind]:
        if name in ("survivors", "pooled_counts") and value == []:
            continue
        with pytest.raises(MalformedMessageError):
            READ[kind](Envelope(kind, {**FIELDS[kind], name: value}))
    with pytest.raises(MalformedMessageError):
        READ[kind](Envelope(kind, FIELDS[kind], (b"a blob that nobody asked for",)))


@pytest.mark.parametrize("survivors", [["a"] * 101, ["a" * 64], [""], ["A site"], [7], "a"])
def test_survivors_of_a_verdict_request_are_at_most_100_site_ids(survivors: object) -> None:
    body = {
        "attempt": 1,
        "run_id": "1",
        "candidate_sha256": "0" * 64,
        "survivors": survivors,
        "pooled_counts": [1],
    }
    with pytest.raises(MalformedMessageError, match="malformed survivors"):
        VerdictRequest.from_envelope(Envelope("verdict_request", body))
