"""Our code against the known-answer vectors of ``vectors/``, and the vectors against their own script."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from privacy.dp.quantization import quantize
from privacy.keystream import Keystream
from privacy.secagg import shamir
from privacy.secagg.keys import (
    UnsealingError,
    WeakKeyError,
    agree,
    pair_mask_key,
    public_key,
    seal_share,
    seed_commitment,
    self_mask_key,
    share_commitment,
    unseal_share,
)
from privacy.secagg.masking import apply_streams, centre, from_bytes, masked_residues, to_pieces
from privacy.secagg.messages import UploadReply
from privacy.secagg.reasons import AggregationRefusedError, BadReplyError
from privacy.secagg.session import AttemptId, Roster, Session
from privacy.secagg.shamir import combine_shares, split_secret
from privacy.secagg.thresholds import ProtocolParameters
from shared.errors import MalformedMessageError
from shared.wire import decode

FOLDER = Path(__file__).parent / "vectors"
ROOT = Path(__file__).parents[3]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

script = importlib.import_module("tests.privacy.secagg.vectors.__main__")
played = importlib.import_module("tests.privacy.secagg.vectors.whole_round")
reference = importlib.import_module("tests.privacy.secagg.vectors.reference")
hexed = bytes.fromhex


def load(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}_v1.json").read_text())


@pytest.mark.parametrize("name", list(script.DOCUMENTS))
def test_the_script_writes_the_published_files_again(name: str) -> None:
    assert script.text(script.DOCUMENTS[name]()) == (FOLDER / name).read_text()


def test_no_file_is_without_its_script() -> None:
    assert {path.name for path in FOLDER.glob("*.json")} == set(script.DOCUMENTS)


# -- key derivation --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys() -> dict[str, Any]:
    return load("key_derivation")


@pytest.fixture(scope="module")
def session(keys: dict[str, Any]) -> Session:
    parameters = ProtocolParameters(**keys["parameters"])
    roster = [(site, played.identity(site).verify_key) for site in keys["identity_seeds"]]
    attempt = AttemptId(**keys["attempt"])
    return Session(attempt=attempt, roster=Roster(roster, parameters), parameters=parameters)


def test_session_parts_and_derived_keys(keys: dict[str, Any], session: Session) -> None:
    assert [part.hex() for part in session.parts()] == keys["session_parts"]
    seed, agreement = hexed(keys["seed"]), keys["agreement"]
    assert public_key(hexed(agreement["private"])).hex() == agreement["public"]
    assert agree(hexed(agreement["private"]), hexed(agreement["peer_public"])).hex() == agreement["agreed"]
    assert agree(hexed(agreement["peer_private"]), hexed(agreement["public"])).hex() == agreement["agreed"]
    assert seed_commitment(session, "alpha", seed).hex() == keys["seed_commitment"]
    assert self_mask_key(session, "alpha", seed).hex() == keys["self_mask_key"]
    agreed = hexed(agreement["agreed"])
    pairs = [{**keys["pair_mask_key"], "terms": keys["terms"]}, *keys["negatives"]["other_pair_mask_keys"]]
    for pair in pairs:
        derived = pair_mask_key(
            agreed, terms=hexed(pair["terms"]), first=pair["first"], second=pair["second"]
        )
        assert derived.hex() == pair["key"]
    assert len({pair["key"] for pair in pairs}) == len(pairs)
    for case in keys["share_commitments"]:
        found = share_commitment(
            session, case["kind"], case["owner"], case["recipient"], hexed(keys["share"])
        )
        assert found.hex() == case["commitment"]


def test_sealed_shares_open_and_changed_ones_do_not(keys: dict[str, Any]) -> None:
    case, agreed = keys["sealed_share"], hexed(keys["agreement"]["agreed"])
    place = {
        "key_set": hexed(case["key_set"]), "dealer": case["dealer"], "recipient": case["recipient"],
    }  # fmt: skip
    assert seal_share(agreed, hexed(case["plaintext"]), **place).hex() == case["sealed"]
    assert unseal_share(agreed, hexed(case["sealed"]), **place).hex() == case["plaintext"]
    for negative in keys["negatives"]["not_sealed_shares"]:
        with pytest.raises(UnsealingError):
            unseal_share(agreed, hexed(negative["sealed"]), **place)


def test_points_of_small_order_are_refused(keys: dict[str, Any]) -> None:
    for point in keys["negatives"]["weak_public_keys"]:
        assert reference.x25519(hexed(keys["agreement"]["private"]), hexed(point)) == bytes(32)
        with pytest.raises(WeakKeyError):
            agree(hexed(keys["agreement"]["private"]), hexed(point))


# -- masks -----------------------------------------------------------------------------------------------


def test_streams_and_masked_vectors() -> None:
    vectors = load("mask_expansion")
    for case in vectors["streams"]:
        assert Keystream(hexed(case["key"])).read(case["bytes"]).hex() == case["stream"]
    long = vectors["long_stream"]
    expanded = np.zeros(long["uint32_words"], dtype=np.uint32)
    apply_streams(expanded, [hexed(long["key"])], [])
    assert hashlib.sha256(b"".join(to_pieces(expanded))).hexdigest() == long["sha256"]
    for case in vectors["cases"]:
        residues = masked_residues(np.array(case["vector"], dtype=np.int64), case["modulus_bits"], [], [])
        plus, minus = ([hexed(key) for key in case[side]] for side in ("plus", "minus"))
        apply_streams(residues, plus, minus)
        assert b"".join(to_pieces(residues)).hex() == case["masked"]
        apply_streams(residues, minus, plus)
        assert centre(residues).tolist() == case["vector"]
    for key in vectors["negatives"]["keys_of_other_lengths"]:
        with pytest.raises(ValueError, match="32 bytes"):
            Keystream(hexed(key))


# -- shares ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", load("shares")["cases"], ids=lambda c: f"{c['threshold']}of{c['n_shares']}")
def test_shares(case: dict[str, Any]) -> None:
    t, n, secret = case["threshold"], case["n_shares"], hexed(case["secret"])
    drawn = (hexed(first + second) for first, second in zip(*case["coefficients"], strict=True))
    with patch.object(shamir, "random_coefficients", lambda: next(drawn)):
        assert [share.hex() for share in split_secret(secret, threshold=t, n_shares=n)] == case["shares"]
    shares = {index: hexed(share) for index, share in enumerate(case["shares"], start=1)}
    some = {index: shares[index] for index in case["combined_from"]}
    assert combine_shares(some, threshold=t) == secret
    negatives = case["negatives"]
    few = {index: shares[index] for index in negatives["too_few"]}
    with pytest.raises(ValueError, match="fewer than the threshold"):
        combine_shares(few, threshold=t)
    assert (
        combine_shares(few, threshold=len(few)).hex() == negatives["too_few_interpolate_to"] != secret.hex()
    )
    first = case["combined_from"][0]
    moved = {negatives["first_index_moved_to"] if i == first else i: share for i, share in some.items()}
    assert combine_shares(moved, threshold=t).hex() == negatives["then_combines_to"] != secret.hex()


# -- quantization ----------------------------------------------------------------------------------------


def test_quantization() -> None:
    vectors = load("quantization")
    for case in vectors["cases"]:
        step, clamp = float.fromhex(case["grid_step"]), case["clamp_steps"]
        values = np.array([float.fromhex(value) for value in case["values"]])
        assert quantize(values, grid_step=step, clamp_steps=clamp).tolist() == case["steps"]
    odd = np.array([float(text) for text in vectors["negatives"]["not_finite_counts_as_zero"]])
    assert quantize(odd, grid_step=1.0, clamp_steps=5).tolist() == [0, 0, 0]
    for case in vectors["sums"]:
        bits = case["modulus_bits"]
        residues = [
            masked_residues(np.array(vector, dtype=np.int64), bits, [], []) for vector in case["vectors"]
        ]
        assert [b"".join(to_pieces(item)).hex() for item in residues] == case["wire"]
        total = sum((from_bytes(hexed(wire), bits) for wire in case["wire"][1:]), residues[0])
        assert centre(total).tolist() == case["total"]
    wrapped = vectors["negatives"]["sum_beyond_the_range_wraps"]
    parts = [masked_residues(np.array(vector, dtype=np.int64), 32, [], []) for vector in wrapped["vectors"]]
    assert centre(parts[0] + parts[1]).tolist() == wrapped["total"]
    broken = vectors["negatives"]["wire_of_broken_length"]
    with pytest.raises(ValueError, match="buffer size"):
        from_bytes(hexed(broken["bytes"]), broken["modulus_bits"])


# -- one full round --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    return load("round")


def test_recorded_requests_give_the_recorded_replies(whole: dict[str, Any]) -> None:
    sites = {site: played.RecordedSite(site) for site in whole["vectors"]}
    for message in whole["messages"]:
        assert sites[message["site"]].answer(hexed(message["request"])).hex() == message["reply"]


def test_masked_vectors_are_those_of_the_second_implementation(whole: dict[str, Any]) -> None:
    uploads = [m for m in whole["messages"] if m["kind"] == "secagg_upload"]
    assert [m["site"] for m in uploads] == whole["survivors"]
    for message in uploads:
        reply = UploadReply.from_envelope(decode(hexed(message["reply"])))
        assert b"".join(reply.masked).hex() == whole["masked"][message["site"]]
        signed = reference.framed(
            "lacuna/secagg/upload/v1",
            *(hexed(part) for part in load("key_derivation")["session_parts"]),
            message["site"].encode(),
            hexed(whole["terms"]),
        )
        public = reference.ed25519_public(hexed(whole["identity_seeds"][message["site"]]))
        assert reference.verify_ed25519(public, reply.signature, signed)
        assert not reference.verify_ed25519(public, reply.signature, signed + b"x")


def play_server(whole: dict[str, Any], upto: int) -> Any:
    """The server after the first ``upto`` recorded replies; it builds the recorded requests."""
    server = played.server()
    builders = {
        "secagg_advertise": server.build_advertise_requests,
        "secagg_share": server.build_share_requests,
        "secagg_upload": lambda: server.build_upload_requests(played.WEIGHTS_HASH, played.REQUEST_HASH),
        "secagg_confirm": lambda: server.close_uploads() and server.build_confirm_requests(),
        "secagg_unmask": server.build_unmask_requests,
    }
    requests: dict[str, Any] = {}
    for position, message in enumerate(whole["messages"]):
        if message["kind"] not in requests:
            requests[message["kind"]] = builders[message["kind"]]()
        if position == upto:
            break
        asked = requests[message["kind"]][message["site"]].to_envelope()
        assert asked == decode(hexed(message["request"]))
        server.accept(message["site"], decode(hexed(message["reply"])))
    return server


def test_the_recorded_replies_give_the_recorded_total(whole: dict[str, Any]) -> None:
    server = play_server(whole, len(whole["messages"]))
    assert list(server.survivors) == whole["survivors"]
    assert server.total().tolist() == whole["total"] == whole["unmasked"]


@pytest.mark.parametrize("case", load("round")["negatives"]["refused_by_alpha"], ids=lambda c: c["why"])
def test_what_a_site_refuses(whole: dict[str, Any], case: dict[str, Any]) -> None:
    """Refused with the published reason; after it the site still gives the recorded replies."""
    site = played.RecordedSite("alpha")
    own = [message for message in whole["messages"] if message["site"] == "alpha"]
    for message in own[: case["after"]]:
        site.answer(hexed(message["request"]))
    with pytest.raises((AggregationRefusedError, MalformedMessageError)) as refusal:
        site.answer(hexed(case["request"]))
    assert getattr(refusal.value, "reason", "malformed") == case["refused"]
    for message in own[case["after"] :]:
        assert site.answer(hexed(message["request"])).hex() == message["reply"]


@pytest.mark.parametrize("case", load("round")["negatives"]["unused_by_the_server"], ids=lambda c: c["why"])
def test_what_the_server_does_not_use(whole: dict[str, Any], case: dict[str, Any]) -> None:
    server = play_server(whole, case["after"])
    with pytest.raises(BadReplyError) as fault:
        server.accept(case["site"], decode(hexed(case["reply"])))
    assert fault.value.reason == case["fault"]
