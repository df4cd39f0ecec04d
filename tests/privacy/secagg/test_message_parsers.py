"""Parsers of bytes from a peer: only MalformedMessageError comes out, whatever goes in."""

from __future__ import annotations

import copy
import functools
import json
import random

import pytest

from privacy.secagg.messages import REPLIES, REQUESTS
from privacy.secagg.reasons import Component
from shared.errors import MalformedMessageError
from shared.wire import Envelope, decode, encode

WEIGHTS, WORK = b"\x01" * 32, b"\x02" * 32
PARSERS = {**REQUESTS, **REPLIES}
STRANGE = [None, True, -1, 0, 1.5, 2**60, "", "x" * 300, "ab" * 32, [], [[]], {}, {"a": 1}, [None] * 101, "é"]


@functools.cache
def all_messages(consortium):
    """One real message of each of the ten kinds."""
    group = consortium(4, 1, 3)
    found = {}

    def exchange(server, requests, without=()):
        for name, request in requests.items():
            if name not in without:
                envelope = group.ask(name, request)
                found.setdefault(request.KIND, request.to_envelope())
                found.setdefault(envelope.kind, envelope)
                server.accept(name, envelope)

    server = group.server()
    exchange(server, server.build_advertise_requests())
    exchange(server, server.build_share_requests())
    exchange(server, server.build_upload_requests(WEIGHTS, WORK), without=["site-3"])
    server.close_uploads()
    exchange(server, server.build_confirm_requests())
    exchange(server, server.build_unmask_requests())
    return found


def test_every_message_survives_its_bytes(consortium):
    messages = all_messages(consortium)
    assert set(messages) == set(PARSERS)
    assert len(PARSERS) == 2 * len(Component)
    for kind, envelope in messages.items():
        parsed = PARSERS[kind].from_envelope(decode(encode(envelope)))
        assert parsed.to_envelope() == envelope


MAX_DEPTH = 12
"""Changes go no deeper: a list of lists without end would outrun the recursion here, not in the parsers."""


def places(value, path=()):
    yield path
    if len(path) == MAX_DEPTH:
        return
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutate(envelope, chance):
    """A public, seeded generator chooses what to break: nothing secret is drawn here."""
    body, blobs = copy.deepcopy(envelope.body), list(envelope.blobs)
    for _ in range(chance.randint(1, 3)):
        kind = chance.randrange(4)
        if kind == 0 and blobs:
            blobs[0] = blobs[0][: chance.randrange(len(blobs[0]) + 1)] + bytes(chance.randrange(3))
        elif kind == 1:
            blobs = [*blobs, b""] if chance.random() < 0.5 else blobs[1:]
        else:
            paths = [item for item in places(body) if item]
            if not paths:
                break
            path = chance.choice(paths)
            target = body
            for key in path[:-1]:
                target = target[key]
            if kind == 2:
                target[path[-1]] = copy.deepcopy(chance.choice(STRANGE))
            else:
                del target[path[-1]]
    return Envelope(kind=envelope.kind, body=body, blobs=tuple(blobs))


def fuzz(consortium, count, seed):
    chance = random.Random(seed)
    messages = all_messages(consortium)
    kinds = sorted(messages)
    refused = 0
    for _ in range(count):
        kind = chance.choice(kinds)
        try:
            if chance.random() < 0.3:
                data = bytearray(encode(messages[kind]))
                for _ in range(chance.randint(1, 4)):
                    data[chance.randrange(len(data))] = chance.randrange(256)
                envelope = decode(bytes(data[: chance.choice([len(data), chance.randrange(len(data))])]))
            else:
                envelope = mutate(messages[kind], chance)
            parser = PARSERS.get(envelope.kind, PARSERS[kind])
            parser.from_envelope(envelope).to_envelope()
        except MalformedMessageError:
            refused += 1
    return refused


def test_3000_broken_messages(consortium):
    assert fuzz(consortium, 3_000, seed=1) > 2_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_200000_broken_messages(consortium):
    assert fuzz(consortium, 200_000, seed=2) > 130_000


@pytest.mark.parametrize("kind", sorted(PARSERS))
def test_each_field_missing_or_unknown_is_refused(consortium, kind):
    envelope = all_messages(consortium)[kind]
    parser = PARSERS[kind]
    for name in envelope.body:
        body = {key: value for key, value in envelope.body.items() if key != name}
        with pytest.raises(MalformedMessageError):
            parser.from_envelope(Envelope(kind=kind, body=body, blobs=envelope.blobs))
    with pytest.raises(MalformedMessageError):
        parser.from_envelope(Envelope(kind=kind, body={**envelope.body, "extra": 1}, blobs=envelope.blobs))
    with pytest.raises(MalformedMessageError):
        parser.from_envelope(Envelope(kind="other", body=envelope.body, blobs=envelope.blobs))
    for change in (
        {"round": 0},
        {"attempt": 2**31 + 1},
        {"attempt": True},
        {"purpose": "other"},
        {"run_id": ""},
    ):
        body = {**envelope.body, "attempt": {**envelope.body["attempt"], **change}}
        with pytest.raises(MalformedMessageError):
            parser.from_envelope(Envelope(kind=kind, body=body, blobs=envelope.blobs))


def test_a_vector_in_pieces_of_other_sizes_is_refused(consortium, monkeypatch):
    monkeypatch.setattr("privacy.secagg.messages.PIECE_BYTES", 8)
    envelope = all_messages(consortium)["secagg_upload_reply"]
    parse = PARSERS[envelope.kind].from_envelope
    vector = envelope.blobs[0]
    pieces = tuple(vector[start : start + 8] for start in range(0, len(vector), 8))
    assert parse(Envelope(envelope.kind, envelope.body, pieces)).masked_bytes == len(vector)
    for wrong in ((), (vector,), (*pieces, b""), (pieces[-1], *pieces[:-1]), (vector[:7], vector[7:])):
        with pytest.raises(MalformedMessageError, match="masked vector"):
            parse(Envelope(envelope.kind, envelope.body, wrong))


def test_ledger_head_is_bounded(consortium):
    envelope = all_messages(consortium)["secagg_advertise_reply"]
    body = json.loads(json.dumps(envelope.body))
    body["keys"]["ledger_head"] = {"a": "x" * 70_000}
    with pytest.raises(MalformedMessageError):
        PARSERS[envelope.kind].from_envelope(Envelope(kind=envelope.kind, body=body))
