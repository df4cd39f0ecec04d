"""Enrolment requests: how a public key gets from a site or an officer to the coordinator.

The key is made where it is used; the request carries only the public half, signed by the private one
(proof of possession). It proves nothing about who sent it: the coordinator compares the fingerprint with
one read out of band, and so do the other hospitals when they pin it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from shared.attestation import Statement, open_statement, sign_statement
from shared.canonical import parse_json
from shared.errors import MalformedMessageError, UsageError
from shared.identity import SigningKey, VerifyKey

REQUEST_PREDICATE = "enrolment-request/v1"
MAX_REQUEST_BYTES = 64 * 1024
Role = Literal["site", "officer"]
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class EnrolmentRequest:
    """Who asks to be enrolled, in which role, under which key."""

    role: Role
    name: str
    key: VerifyKey


def make_request(*, role: Role, name: str, key: SigningKey) -> bytes:
    """A signed request as JSON bytes. Raises UsageError for a name that is no identifier."""
    check_name(name)
    predicate: dict[str, Any] = {"role": role, "name": name, "key": key.verify_key.hex()}
    return sign_statement(Statement(predicate_type=REQUEST_PREDICATE, subjects=(), predicate=predicate), key)


def open_request(data: bytes) -> EnrolmentRequest:
    """Parse a request and check that its signature is by the key it carries.

    Raises:
        MalformedMessageError, BadSignatureError
    """
    envelope = parse_json(data, what="enrolment request", max_bytes=MAX_REQUEST_BYTES)
    try:
        key = VerifyKey.from_hex(envelope["signatures"][0]["keyid"])
    except (KeyError, IndexError, TypeError) as error:
        raise MalformedMessageError("enrolment request: not a DSSE envelope") from error
    statement = open_statement(data, key=key, predicate_type=REQUEST_PREDICATE, what="enrolment request")
    role, name = statement.predicate.get("role"), statement.predicate.get("name")
    if role not in ("site", "officer") or not isinstance(name, str):
        raise MalformedMessageError("enrolment request: role is 'site' or 'officer', name is text")
    if not NAME.fullmatch(name):
        raise MalformedMessageError(f"enrolment request: {name[:80]!r} is not a name")
    if statement.predicate.get("key") != key.hex():
        raise MalformedMessageError("enrolment request: is signed by another key than it names")
    return EnrolmentRequest(role=role, name=name, key=key)


def check_name(name: str) -> None:
    """Raises UsageError for a name that a person gave and that is no identifier."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not a name: 1 to 63 of a-z, 0-9 and '-', starting with a letter or digit"
        )
