"""Signed statements: nobody else's, nothing else's, and readable by an independent DSSE implementation."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from securesystemslib.dsse import Envelope as DsseEnvelope
from securesystemslib.exceptions import VerificationError
from securesystemslib.signer import SSlibKey

from shared.attestation import (
    PAYLOAD_TYPE,
    STATEMENT_TYPE,
    Statement,
    Subject,
    open_statement,
    pre_authentication_encoding,
    sign_statement,
)
from shared.canonical import canonical_json
from shared.errors import LacunaError, MalformedMessageError
from shared.identity import BadSignatureError, SigningKey

KEY = SigningKey.generate()
STATEMENT = Statement(
    predicate_type="plan/v1",
    subjects=(Subject(name="plan.json", sha256="c" * 64),),
    predicate={"study_id": "s", "n": 3},
)
SIGNED = sign_statement(STATEMENT, KEY)


def opened(data: bytes, key: SigningKey = KEY, predicate_type: str = "plan/v1") -> Statement:
    return open_statement(data, key=key.verify_key, predicate_type=predicate_type, what="the plan")


def resigned(payload: Any, payload_type: str = PAYLOAD_TYPE) -> bytes:
    """An envelope that KEY really signed, over any payload."""
    body = canonical_json(payload)
    signature = KEY.sign_raw(pre_authentication_encoding(payload_type, body))
    return canonical_json(
        {
            "payload": base64.b64encode(body).decode(),
            "payloadType": payload_type,
            "signatures": [
                {"keyid": KEY.verify_key.hex(), "sig": base64.b64encode(signature).decode()},
            ],
        }
    )


def test_round_trip() -> None:
    assert opened(SIGNED) == STATEMENT
    assert sign_statement(STATEMENT, KEY) == SIGNED


def test_every_flipped_byte_is_noticed() -> None:
    for index in range(len(SIGNED)):
        changed = bytearray(SIGNED)
        changed[index] ^= 1
        with pytest.raises((MalformedMessageError, BadSignatureError), match="the plan"):
            opened(bytes(changed))


def test_another_key_or_another_predicate_is_refused() -> None:
    with pytest.raises(BadSignatureError, match="the plan"):
        opened(SIGNED, key=SigningKey.generate())
    with pytest.raises(MalformedMessageError, match="verdict/v1"):
        opened(SIGNED, predicate_type="verdict/v1")


def test_a_signature_that_only_claims_the_key_is_refused() -> None:
    other = SigningKey.generate()
    envelope = json.loads(sign_statement(STATEMENT, other))
    envelope["signatures"][0]["keyid"] = KEY.verify_key.hex()
    with pytest.raises(BadSignatureError):
        opened(json.dumps(envelope).encode())


def test_a_signature_over_the_payload_alone_is_no_dsse_signature() -> None:
    envelope = json.loads(SIGNED)
    payload = base64.b64decode(envelope["payload"])
    envelope["signatures"][0]["sig"] = base64.b64encode(KEY.sign_raw(payload)).decode()
    with pytest.raises(BadSignatureError):
        opened(json.dumps(envelope).encode())


GOOD: dict[str, Any] = {
    "_type": STATEMENT_TYPE,
    "subject": [],
    "predicateType": "https://lacuna.dev/predicates/plan/v1",
    "predicate": {},
}


@pytest.mark.parametrize(
    "payload",
    [
        [],
        {},
        {**GOOD, "_type": "https://in-toto.io/Statement/v0.1"},
        {**GOOD, "subject": [{"name": "x"}]},
        {**GOOD, "subject": 3},
        {**GOOD, "predicate": []},
        {key: value for key, value in GOOD.items() if key != "predicate"},
    ],
)
def test_statements_that_are_signed_and_malformed_are_refused(payload: Any) -> None:
    assert opened(resigned(GOOD)).predicate == {}
    with pytest.raises(MalformedMessageError, match="the plan"):
        opened(resigned(payload))


def test_another_payload_type_is_refused() -> None:
    with pytest.raises(MalformedMessageError):
        opened(resigned(GOOD, "text/plain"))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"payload":"","payloadType":"","signatures":[]}', b"\xff"]
)
def test_what_is_no_envelope_is_refused(data: bytes) -> None:
    with pytest.raises(LacunaError, match="the plan"):
        opened(data)


def test_an_independent_implementation_verifies_the_envelope() -> None:
    """securesystemslib's DSSE: our envelope verifies there under our key, and under no other."""

    def their_key(key: SigningKey) -> SSlibKey:
        value = {"public": key.verify_key.hex()}
        return SSlibKey(key.verify_key.hex(), "ed25519", "ed25519", value)

    envelope = DsseEnvelope.from_dict(
        {**json.loads(SIGNED), "signatures": [dict(s) for s in json.loads(SIGNED)["signatures"]]}
    )
    assert set(envelope.verify([their_key(KEY)], 1)) == {KEY.verify_key.hex()}
    statement = json.loads(envelope.payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["subject"] == [{"name": "plan.json", "digest": {"sha256": "c" * 64}}]
    with pytest.raises(VerificationError):
        envelope.verify([their_key(SigningKey.generate())], 1)
