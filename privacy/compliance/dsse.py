"""The officer's own reader of signed evidence: canonical JSON, DSSE envelopes, in-toto statements, Ed25519.

Written apart from :mod:`shared.attestation`, which signs: a fault in the one is not hidden by the same fault
in the other (tests hold them against each other). Reading is stricter than the formats ask for: an
envelope must be the one canonical byte sequence for its content, with exactly one signature, so that no
byte of it can change unnoticed, not even in white space or in the unused bits of base64.

Sources: DSSE protocol v1 (PAE); in-toto Statement v1; RFC 8785 (JCS), sections 3.2.2 and 3.2.3; RFC 8032.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from shared.errors import PeerError

IN_TOTO_PAYLOAD = "application/vnd.in-toto+json"
IN_TOTO_STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATES = "https://lacuna.dev/predicates/"
MAX_EVIDENCE_BYTES = 32 * 1024 * 1024
_LARGEST_INTEGER = 2**53 - 1


class EvidenceError(PeerError):
    """A piece of evidence is missing, malformed, or does not verify. The message names it."""


@dataclass(frozen=True, kw_only=True)
class SignedStatement:
    """A statement whose signature was verified.

    Attributes:
        predicate_type: Short form, ``verdict/v1``.
        subjects: Name to hex SHA-256, in the statement's order.
        signer: The signing key, 64 hex digits.
        sha256: Hex SHA-256 of the whole envelope.
    """

    predicate_type: str
    subjects: dict[str, str]
    predicate: dict[str, Any]
    signer: str
    sha256: str


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def strict_json(data: bytes, *, what: str) -> Any:
    """Parse JSON that must already be in canonical form.

    Raises:
        EvidenceError: not JSON, or JSON in any other byte sequence than the canonical one.
    """
    if len(data) > MAX_EVIDENCE_BYTES:
        raise EvidenceError(f"{what}: {len(data)} bytes exceed the bound of {MAX_EVIDENCE_BYTES} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
        again = canonical(value).encode("utf-8")
    except (ValueError, RecursionError, TypeError) as error:
        raise EvidenceError(f"{what}: not canonical JSON ({str(error)[:200]})") from error
    if again != data:
        raise EvidenceError(f"{what}: JSON is not in canonical form (RFC 8785); bytes were changed")
    return value


def canonical(value: Any) -> str:
    """RFC 8785 text of a JSON value. Raises ValueError or TypeError where there is none."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        value.encode("utf-8")  # a lone surrogate has no canonical form
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int):
        if abs(value) > _LARGEST_INTEGER:
            raise ValueError(f"integer {value} is beyond 2^53")
        return str(value)
    if isinstance(value, float):
        return _ecmascript_number(value)
    if isinstance(value, list | tuple):
        return "[" + ",".join(canonical(item) for item in value) + "]"
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(f"{canonical(key)}:{canonical(value[key])}" for key in keys) + "}"
    raise TypeError(f"{type(value).__name__} is not a JSON value")


def _ecmascript_number(value: float) -> str:
    """``Number.prototype.toString`` (ECMA-262, Number::toString, radix 10) on Python's shortest digits."""
    if not math.isfinite(value):
        raise ValueError("a number that is not finite has no canonical form")
    if value == 0:
        return "0"
    sign = "-" if value < 0 else ""
    mantissa, _, exponent = f"{abs(value)!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    point = len(whole) + int(exponent or 0) - (len(whole + fraction) - len(digits))
    digits = digits.rstrip("0")
    count = len(digits)
    if count <= point <= 21:
        return sign + digits + "0" * (point - count)
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    power = f"e{'+' if point > 0 else '-'}{abs(point - 1)}"
    return sign + digits[0] + (f".{digits[1:]}" if count > 1 else "") + power


def verify_signature(*, key: str, signature: bytes, message: bytes, what: str) -> None:
    """Check one Ed25519 signature under a key of 64 hex digits. Raises EvidenceError."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise EvidenceError(f"{what}: the signature does not verify under key {key[:16]}...") from error


def decode_base64(text: Any, *, what: str) -> bytes:
    """Decode standard base64, in its one canonical spelling only. Raises EvidenceError."""
    if not isinstance(text, str):
        raise EvidenceError(f"{what}: base64 text expected")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EvidenceError(f"{what}: malformed base64") from error
    if base64.b64encode(data).decode() != text:
        raise EvidenceError(f"{what}: base64 with stray bits")
    return data


def open_signed(data: bytes, *, key: str, predicate_type: str, what: str) -> SignedStatement:
    """Verify an envelope under the one key that must have signed it, then read its statement.

    Args:
        data: The envelope's bytes.
        key: The expected signer, 64 hex digits.
        predicate_type: The expected short type, ``plan/v1``.
        what: Name of the artefact, for errors.

    Raises:
        EvidenceError: names the artefact and what is wrong with it.
    """
    envelope = strict_json(data, what=what)
    if not isinstance(envelope, dict) or set(envelope) != {"payload", "payloadType", "signatures"}:
        raise EvidenceError(f"{what}: not a DSSE envelope")
    if envelope["payloadType"] != IN_TOTO_PAYLOAD:
        raise EvidenceError(f"{what}: payload type is not {IN_TOTO_PAYLOAD}")
    signatures = envelope["signatures"]
    if not isinstance(signatures, list) or len(signatures) != 1 or not isinstance(signatures[0], dict):
        raise EvidenceError(f"{what}: exactly one signature expected")
    if set(signatures[0]) != {"keyid", "sig"}:
        raise EvidenceError(f"{what}: malformed signature entry")
    signer = signatures[0]["keyid"]
    if signer != key:
        raise EvidenceError(
            f"{what}: signed by key {str(signer)[:16]}..., expected {key[:16]}... (wrong signer)"
        )
    payload = decode_base64(envelope["payload"], what=what)
    signature = decode_base64(signatures[0]["sig"], what=what)
    kind = IN_TOTO_PAYLOAD.encode()
    message = b" ".join(
        [b"DSSEv1", str(len(kind)).encode(), kind, str(len(payload)).encode(), payload],
    )
    verify_signature(key=key, signature=signature, message=message, what=what)
    return _statement(payload, predicate_type=predicate_type, signer=key, envelope=data, what=what)


def _statement(
    payload: bytes, *, predicate_type: str, signer: str, envelope: bytes, what: str
) -> SignedStatement:
    value = strict_json(payload, what=what)
    if not isinstance(value, dict) or set(value) != {"_type", "subject", "predicateType", "predicate"}:
        raise EvidenceError(f"{what}: not an in-toto statement")
    if value["_type"] != IN_TOTO_STATEMENT:
        raise EvidenceError(f"{what}: not an in-toto Statement v1")
    if value["predicateType"] != PREDICATES + predicate_type:
        raise EvidenceError(
            f"{what}: states {str(value['predicateType'])[:120]!r}, expected {predicate_type!r}"
        )
    if not isinstance(value["predicate"], dict) or not isinstance(value["subject"], list):
        raise EvidenceError(f"{what}: malformed statement")
    subjects: dict[str, str] = {}
    for entry in value["subject"]:
        try:
            name, digest = entry["name"], entry["digest"]["sha256"]
        except (KeyError, TypeError) as error:
            raise EvidenceError(f"{what}: malformed subject") from error
        if not isinstance(name, str) or not _is_sha256(digest) or name in subjects:
            raise EvidenceError(f"{what}: malformed or repeated subject {str(name)[:80]!r}")
        subjects[name] = digest
    return SignedStatement(
        predicate_type=predicate_type,
        subjects=subjects,
        predicate=value["predicate"],
        signer=signer,
        sha256=sha256_hex(envelope),
    )


def _is_sha256(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")
