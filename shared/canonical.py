"""Canonical bytes, and digests that cannot be confused with one another.

Everything that is hashed or signed goes through this module: JSON in the form of RFC 8785 (JCS), parts
prefixed with their length, and a domain (purpose and version) in front. Two different tuples of parts
can then never give the same input to the hash (no concatenation ambiguity), and a signature made for
one purpose can never be presented for another.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import rfc8785

from shared.errors import MalformedMessageError

MAX_JSON_BYTES = 16 * 1024 * 1024
"""Upper bound in bytes for a JSON document that we parse."""

DIGEST_BYTES = 32


def canonical_json(value: Any) -> bytes:
    """RFC 8785 bytes of a JSON value (dict, list, str, int, float, bool, None).

    Raises:
        MalformedMessageError: the value has no canonical form (NaN, integers beyond 2^53, other types).
    """
    try:
        return rfc8785.dumps(value)
    except (rfc8785.CanonicalizationError, ValueError, TypeError, RecursionError) as error:
        raise MalformedMessageError(f"value has no canonical JSON form: {error}") from error


def parse_json(data: bytes, *, what: str, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Parse JSON strictly: bounded size, UTF-8, no duplicate keys, no NaN or Infinity (1e999 neither).

    Args:
        data: The bytes.
        what: Name of the document, for the error.
        max_bytes: Size bound in bytes.

    Raises:
        MalformedMessageError: for any byte sequence that is not such a document.
    """
    if len(data) > max_bytes:
        raise MalformedMessageError(f"{what}: {len(data)} bytes exceed the bound of {max_bytes} bytes")

    def reject_constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    def finite(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError(f"{text[:40]} is too large for a number")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"duplicate key {key!r}")
            result[key] = value
        return result

    try:
        return json.loads(
            data.decode("utf-8"),
            parse_constant=reject_constant,
            parse_float=finite,
            object_pairs_hook=unique,
        )
    except (ValueError, RecursionError) as error:
        raise MalformedMessageError(f"{what}: not valid JSON ({error})") from error


def framed(domain: str, *parts: bytes) -> bytes:
    """Injective encoding of a domain and a tuple of byte strings: each with its 8-byte length."""
    return b"".join(_pieces(domain, parts))


def digest(domain: str, *parts: bytes | memoryview) -> bytes:
    """SHA-256 (32 bytes) of :func:`framed`. ``domain`` names purpose and version: ``lacuna/plan/v1``."""
    hashed = hashlib.sha256()
    for piece in _pieces(domain, parts):
        hashed.update(piece)
    return hashed.digest()


def _pieces(domain: str, parts: tuple[Any, ...]) -> list[bytes | memoryview]:
    encoded = domain.encode("ascii")
    pieces: list[bytes | memoryview] = [len(encoded).to_bytes(8, "big"), encoded]
    for part in parts:
        pieces += (len(part).to_bytes(8, "big"), part)
    return pieces


def digest_json(domain: str, value: Any) -> bytes:
    """:func:`digest` of one canonical JSON value."""
    return digest(domain, canonical_json(value))
