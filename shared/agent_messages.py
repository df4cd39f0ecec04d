"""Messages between ServerApp and site agent, beside those of the secure aggregation.

``hello`` finds out which site is behind a node; ``exchange`` carries parts (a piece of work and protocol
messages, see ``shared/WIRE_FORMAT.md``); ``verdict_request`` asks for the signed verdict and ledger.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from shared.canonical import canonical_json, digest
from shared.enrolment import NAME
from shared.errors import MalformedMessageError
from shared.identity import SigningKey, VerifyKey
from shared.study_plan import MAX_SITES
from shared.wire import Envelope

HELLO, HELLO_REPLY = "hello", "hello_reply"
EXCHANGE, EXCHANGE_REPLY = "exchange", "exchange_reply"
WORK, REFUSED = "work", "refused"
VERDICT_REQUEST, VERDICT_REPLY = "verdict_request", "verdict_reply"

MAX_ATTEMPT = 2**31
MAX_COUNTS = 4096
_HEX32 = re.compile(r"[0-9a-f]{64}")
_VERSION = re.compile(r"[0-9A-Za-z.+-]{1,64}")
_RUN_ID = re.compile(r"[A-Za-z0-9-]{1,64}")


def text_field(body: dict[str, Any], name: str, pattern: re.Pattern[str], *, what: str) -> str:
    """A string field that matches a pattern. Raises MalformedMessageError."""
    value = body.get(name)
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise MalformedMessageError(f"{what}: field {name!r} is malformed")
    return value


def integer_field(body: dict[str, Any], name: str, low: int, high: int, *, what: str) -> int:
    """An integer field within bounds. Raises MalformedMessageError."""
    value = body.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise MalformedMessageError(f"{what}: field {name!r} is no integer from {low} to {high}")
    return value


def _fields(envelope: Envelope, kind: str, names: set[str]) -> dict[str, Any]:
    if envelope.kind != kind or set(envelope.body) != names or (envelope.blobs and kind != WORK):
        raise MalformedMessageError(f"{kind}: message of kind {envelope.kind!r} has other fields")
    return envelope.body


def own_version() -> str:
    """Version of the installed Lacuna."""
    return version("lacuna")


def compatible(one: str, other: str) -> bool:
    """Whether two ends of these versions may run a study together: the same major and minor number."""
    return one.split(".")[:2] == other.split(".")[:2]


@dataclass(frozen=True, kw_only=True)
class Hello:
    """Who is there? ``nonce`` is 32 bytes in hex; ``version`` is the coordinator's."""

    nonce: str
    plan_sha256: str
    run_id: str
    version: str = field(default_factory=own_version)

    def to_envelope(self) -> Envelope:
        return Envelope(
            HELLO,
            {
                "nonce": self.nonce,
                "plan_sha256": self.plan_sha256,
                "run_id": self.run_id,
                "version": self.version,
            },
        )

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> Hello:
        body = _fields(envelope, HELLO, {"nonce", "plan_sha256", "run_id", "version"})
        return cls(
            nonce=text_field(body, "nonce", _HEX32, what=HELLO),
            plan_sha256=text_field(body, "plan_sha256", _HEX32, what=HELLO),
            run_id=text_field(body, "run_id", _RUN_ID, what=HELLO),
            version=text_field(body, "version", _VERSION, what=HELLO),
        )


@dataclass(frozen=True, kw_only=True)
class HelloReply:
    """The site's signed answer. ``last_attempt`` is the highest attempt number it has recorded."""

    site_id: str
    last_attempt: int
    version: str
    signature: str

    @classmethod
    def sign(
        cls, hello: Hello, *, site_id: str, last_attempt: int, version: str, key: SigningKey
    ) -> HelloReply:
        signature = key.sign("lacuna/hello/v1", *_hello_parts(hello, site_id, last_attempt, version))
        return cls(site_id=site_id, last_attempt=last_attempt, version=version, signature=signature.hex())

    def verify(self, hello: Hello, key: VerifyKey) -> None:
        """Raises BadSignatureError if this is not that site's answer to this hello."""
        parts = _hello_parts(hello, self.site_id, self.last_attempt, self.version)
        key.verify(bytes.fromhex(self.signature), "lacuna/hello/v1", *parts)

    def to_envelope(self) -> Envelope:
        return Envelope(
            HELLO_REPLY,
            {
                "site_id": self.site_id,
                "last_attempt": self.last_attempt,
                "version": self.version,
                "signature": self.signature,
            },
        )

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> HelloReply:
        body = _fields(envelope, HELLO_REPLY, {"site_id", "last_attempt", "version", "signature"})
        return cls(
            site_id=text_field(body, "site_id", NAME, what=HELLO_REPLY),
            last_attempt=integer_field(body, "last_attempt", 0, MAX_ATTEMPT, what=HELLO_REPLY),
            version=text_field(body, "version", _VERSION, what=HELLO_REPLY),
            signature=text_field(body, "signature", re.compile(r"[0-9a-f]{128}"), what=HELLO_REPLY),
        )


def _hello_parts(hello: Hello, site_id: str, last_attempt: int, version: str) -> tuple[bytes, ...]:
    return (
        bytes.fromhex(hello.nonce),
        bytes.fromhex(hello.plan_sha256),
        hello.run_id.encode(),
        hello.version.encode(),
        site_id.encode(),
        last_attempt.to_bytes(8, "big"),
        version.encode(),
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a site is asked to compute for one attempt: a step on ``weights``, or the audit of them.

    ``weights`` is float32 [d], little-endian on the wire.
    """

    attempt: int
    round: int
    purpose: Literal["train", "audit"]
    weights: NDArray[np.float32]

    def to_envelope(self) -> Envelope:
        return Envelope(WORK, self._body(), (self._little_endian().tobytes(),))

    @classmethod
    def from_envelope(cls, envelope: Envelope, *, dimension: int) -> Work:
        """Raises MalformedMessageError: wrong fields, or not exactly ``dimension`` finite weights."""
        body = _fields(envelope, WORK, {"attempt", "round", "purpose"})
        if body["purpose"] not in ("train", "audit"):
            raise MalformedMessageError("work: purpose is 'train' or 'audit'")
        if len(envelope.blobs) != 1 or len(envelope.blobs[0]) != 4 * dimension:
            raise MalformedMessageError(f"work: expected one blob of {dimension} float32 weights")
        weights = np.frombuffer(envelope.blobs[0], dtype="<f4").astype(np.float32)
        if not np.isfinite(weights).all():
            raise MalformedMessageError("work: a weight is not finite")
        return cls(
            attempt=integer_field(body, "attempt", 1, MAX_ATTEMPT, what=WORK),
            round=integer_field(body, "round", 1, MAX_ATTEMPT, what=WORK),
            purpose=body["purpose"],
            weights=weights,
        )

    def weights_hash(self) -> bytes:
        """32 bytes that stand for exactly these weights."""
        return digest("lacuna/weights/v1", self._little_endian().view(np.uint8).data)

    def request_hash(self) -> bytes:
        """32 bytes that stand for everything else of the request."""
        return digest("lacuna/work/v1", canonical_json(self._body()))

    def _body(self) -> dict[str, Any]:
        return {"attempt": self.attempt, "round": self.round, "purpose": self.purpose}

    def _little_endian(self) -> NDArray[np.float32]:
        return np.ascontiguousarray(self.weights, dtype="<f4")


@dataclass(frozen=True, kw_only=True)
class VerdictRequest:
    """The audit's pooled counts, for every site to judge and sign."""

    attempt: int
    run_id: str
    candidate_sha256: str
    survivors: tuple[str, ...]
    pooled_counts: tuple[int, ...]

    def to_envelope(self) -> Envelope:
        return Envelope(
            VERDICT_REQUEST,
            {
                "attempt": self.attempt,
                "run_id": self.run_id,
                "candidate_sha256": self.candidate_sha256,
                "survivors": list(self.survivors),
                "pooled_counts": list(self.pooled_counts),
            },
        )

    @classmethod
    def from_envelope(cls, envelope: Envelope) -> VerdictRequest:
        names = {"attempt", "run_id", "candidate_sha256", "survivors", "pooled_counts"}
        body = _fields(envelope, VERDICT_REQUEST, names)
        survivors, counts = body["survivors"], body["pooled_counts"]
        if (
            not isinstance(survivors, list)
            or len(survivors) > MAX_SITES
            or not all(isinstance(s, str) and NAME.fullmatch(s) for s in survivors)
        ):
            raise MalformedMessageError("verdict_request: malformed survivors")
        if (
            not isinstance(counts, list)
            or len(counts) > MAX_COUNTS
            or not all(isinstance(c, int) and not isinstance(c, bool) and abs(c) < 2**53 for c in counts)
        ):
            raise MalformedMessageError("verdict_request: malformed counts")
        return cls(
            attempt=integer_field(body, "attempt", 1, MAX_ATTEMPT, what=VERDICT_REQUEST),
            run_id=text_field(body, "run_id", _RUN_ID, what=VERDICT_REQUEST),
            candidate_sha256=text_field(body, "candidate_sha256", _HEX32, what=VERDICT_REQUEST),
            survivors=tuple(survivors),
            pooled_counts=tuple(counts),
        )


def refusal(reason: str, message: str = "") -> Envelope:
    """A refusal: a reason of a closed list, and words that depend on no patient."""
    return Envelope(REFUSED, {"reason": reason[:64], "message": message[:500]})
