"""Signed artefacts: DSSE envelopes over in-toto statements.

Everything that one person signs for another to check later (plan, approvals, ledger heads, verdicts,
gate decisions) has this one form: an in-toto Statement v1 (subjects with SHA-256 digests, a predicate
type, a predicate) inside a DSSE v1 envelope. Sources: in-toto attestation framework, spec v1, "Statement"
and "Envelope"; DSSE protocol v1, "PAE".

The offline checker in :mod:`privacy.compliance` parses and verifies these files with code of its own.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shared.canonical import canonical_json, parse_json
from shared.errors import MalformedMessageError, RefusedError
from shared.identity import BadSignatureError, SigningKey, VerifyKey

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_PREFIX = "https://lacuna.dev/predicates/"
MAX_ATTESTATION_BYTES = 32 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a statement is about: a name and the hex SHA-256 of its bytes."""

    name: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Statement:
    """``predicate_type`` is short (``plan/v1``); the prefix is added on the wire."""

    predicate_type: str
    subjects: tuple[Subject, ...]
    predicate: dict[str, Any]


def pre_authentication_encoding(payload_type: str, payload: bytes) -> bytes:
    """DSSE PAE: ``DSSEv1 SP len(type) SP type SP len(payload) SP payload``."""
    encoded = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(encoded), encoded, len(payload), payload)


def sign_statement(statement: Statement, key: SigningKey) -> bytes:
    """JSON bytes of a DSSE envelope with one Ed25519 signature."""
    payload = canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "subject": [{"name": s.name, "digest": {"sha256": s.sha256}} for s in statement.subjects],
            "predicateType": PREDICATE_PREFIX + statement.predicate_type,
            "predicate": statement.predicate,
        }
    )
    signature = key.sign_raw(pre_authentication_encoding(PAYLOAD_TYPE, payload))
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": PAYLOAD_TYPE,
            "signatures": [
                {"keyid": key.verify_key.hex(), "sig": base64.b64encode(signature).decode()},
            ],
        }
    )


def open_statement(data: bytes, *, key: VerifyKey, predicate_type: str, what: str) -> Statement:
    """Verify an envelope under ``key``, then parse it.

    Args:
        data: The envelope's bytes.
        key: The one key that must have signed it.
        predicate_type: The short type it must have.
        what: Name of the artefact for errors.

    Raises:
        MalformedMessageError: not such an envelope, or of another predicate type.
        BadSignatureError: no valid signature of that key.
    """
    envelope = parse_json(data, what=what, max_bytes=MAX_ATTESTATION_BYTES)
    if not isinstance(envelope, dict) or set(envelope) != {"payload", "payloadType", "signatures"}:
        raise MalformedMessageError(f"{what}: not a DSSE envelope")
    if envelope["payloadType"] != PAYLOAD_TYPE or not isinstance(envelope["signatures"], list):
        raise MalformedMessageError(f"{what}: not a DSSE envelope over an in-toto statement")
    payload = _base64(envelope["payload"], what)
    encoded = pre_authentication_encoding(PAYLOAD_TYPE, payload)
    if not any(_verifies(entry, key, encoded, what) for entry in envelope["signatures"]):
        raise BadSignatureError(f"{what}: no valid signature by key {key.hex()[:16]}...")
    statement = parse_json(payload, what=what, max_bytes=MAX_ATTESTATION_BYTES)
    try:
        if statement["_type"] != STATEMENT_TYPE:
            raise MalformedMessageError(f"{what}: not an in-toto Statement v1")
        if statement["predicateType"] != PREDICATE_PREFIX + predicate_type:
            raise MalformedMessageError(
                f"{what}: is a {str(statement['predicateType'])[:120]!r}, expected {predicate_type!r}"
            )
        predicate = statement["predicate"]
        subjects = tuple(
            Subject(name=str(s["name"]), sha256=str(s["digest"]["sha256"])) for s in statement["subject"]
        )
    except (KeyError, TypeError) as error:
        raise MalformedMessageError(f"{what}: malformed in-toto statement") from error
    if not isinstance(predicate, dict):
        raise MalformedMessageError(f"{what}: malformed predicate")
    return Statement(predicate_type=predicate_type, subjects=subjects, predicate=predicate)


def claimed_signer(data: bytes, *, what: str, max_bytes: int = MAX_ATTESTATION_BYTES) -> VerifyKey:
    """The key that an envelope says it is signed by; nothing is verified yet.

    Raises:
        MalformedMessageError: not an envelope with a signature.
    """
    envelope = parse_json(data, what=what, max_bytes=max_bytes)
    try:
        return VerifyKey.from_hex(envelope["signatures"][0]["keyid"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise MalformedMessageError(f"{what}: not a DSSE envelope") from error


def open_signed_by(
    data: bytes,
    *,
    fingerprint: str,
    predicate_type: str,
    what: str,
    max_bytes: int,
    refusal: Callable[[VerifyKey], RefusedError],
) -> tuple[Statement, VerifyKey]:
    """A statement signed by the key with this fingerprint, which people compared over another channel.

    Raises:
        RefusedError: it is signed by another key; ``refusal`` puts it in words.
        MalformedMessageError, BadSignatureError: it does not parse or verify.
    """
    key = claimed_signer(data, what=what, max_bytes=max_bytes)
    if key.fingerprint != fingerprint:
        raise refusal(key)
    return open_statement(data, key=key, predicate_type=predicate_type, what=what), key


def _verifies(entry: Any, key: VerifyKey, encoded: bytes, what: str) -> bool:
    if not isinstance(entry, dict) or entry.get("keyid") != key.hex():
        return False
    try:
        key.verify_raw(_base64(entry.get("sig"), what), encoded)
    except BadSignatureError:
        return False
    return True


def _base64(text: Any, what: str) -> bytes:
    if not isinstance(text, str):
        raise MalformedMessageError(f"{what}: base64 text expected")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedMessageError(f"{what}: malformed base64") from error
    if base64.b64encode(data).decode() != text:
        raise MalformedMessageError(f"{what}: base64 with stray bits at its end")
    return data
