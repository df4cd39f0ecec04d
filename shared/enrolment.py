"""Enrolment requests: how a public key gets from a site or an officer to the coordinator.

The key is made where it is used; the request carries only the public half, signed by the private one
(proof of possession). It proves nothing about who sent it: the coordinator compares the fingerprint with
one read out of band, and so do the other hospitals when they pin it.

A site that will speak to a coordinator over a network adds two public keys of its machines, so that the one
fingerprint vouches for all of them: a certificate request for its perimeter, and its SuperNode's key.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from shared.attestation import Statement, claimed_signer, open_statement, sign_statement
from shared.certificates import read_request
from shared.errors import MalformedMessageError, UsageError
from shared.identity import SigningKey, VerifyKey
from shared.node_keys import node_key_header

REQUEST_PREDICATE = "enrolment-request/v1"
MAX_REQUEST_BYTES = 64 * 1024
Role = Literal["site", "officer"]
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class MachineKeys:
    """Public keys of a site's machines.

    Args:
        tls_request: Certificate signing request (PEM) of the perimeter, for the site's name.
        node_key: The SuperNode's public key, OpenSSH form.
    """

    tls_request: str
    node_key: str

    def check(self, name: str) -> None:
        """Raises MalformedMessageError: the request is not for ``name``, or a key is of another kind."""
        read_request(self.tls_request.encode(), name=name)
        node_key_header(self.node_key)


@dataclass(frozen=True, kw_only=True)
class EnrolmentRequest:
    """Who asks to be enrolled, in which role, under which key; ``machines`` where a network is between."""

    role: Role
    name: str
    key: VerifyKey
    machines: MachineKeys | None = None


def make_request(*, role: Role, name: str, key: SigningKey, machines: MachineKeys | None = None) -> bytes:
    """A signed request as JSON bytes. Raises UsageError for a name that is no identifier."""
    check_name(name)
    predicate: dict[str, Any] = {"role": role, "name": name, "key": key.verify_key.hex()}
    if machines is not None:
        predicate["machines"] = {"tls_request": machines.tls_request, "node_key": machines.node_key}
    return sign_statement(Statement(predicate_type=REQUEST_PREDICATE, subjects=(), predicate=predicate), key)


def open_request(data: bytes) -> EnrolmentRequest:
    """Parse a request and check that its signature is by the key it carries.

    Raises:
        MalformedMessageError, BadSignatureError
    """
    key = claimed_signer(data, what="enrolment request", max_bytes=MAX_REQUEST_BYTES)
    statement = open_statement(data, key=key, predicate_type=REQUEST_PREDICATE, what="enrolment request")
    role, name = statement.predicate.get("role"), statement.predicate.get("name")
    if role not in ("site", "officer") or not isinstance(name, str):
        raise MalformedMessageError("enrolment request: role is 'site' or 'officer', name is text")
    if not NAME.fullmatch(name):
        raise MalformedMessageError(f"enrolment request: {name[:80]!r} is not a name")
    if statement.predicate.get("key") != key.hex():
        raise MalformedMessageError("enrolment request: is signed by another key than it names")
    machines = _machines(statement.predicate.get("machines"), name)
    return EnrolmentRequest(role=role, name=name, key=key, machines=machines)


def _machines(value: Any, name: str) -> MachineKeys | None:
    if value is None:
        return None
    if (
        not isinstance(value, dict)
        or set(value) != {"tls_request", "node_key"}
        or not all(isinstance(text, str) for text in value.values())
    ):
        raise MalformedMessageError("enrolment request: machines holds tls_request and node_key, both text")
    machines = MachineKeys(**value)
    machines.check(name)
    return machines


def check_name(name: str) -> None:
    """Raises UsageError for a name that a person gave and that is no identifier."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"{name[:80]!r} is not a name: 1 to 63 of a-z, 0-9 and '-', starting with a letter or digit"
        )
