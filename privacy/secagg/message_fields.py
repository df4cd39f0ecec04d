"""Strict reading of message bodies: exact fields, exact types, bounded sizes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from privacy.secagg.session import SITE_ID, AttemptId
from privacy.secagg.thresholds import MAX_SITES
from shared.canonical import canonical_json
from shared.errors import MalformedMessageError
from shared.identity import SIGNATURE_BYTES
from shared.wire import Blob, Envelope

MAX_LEDGER_HEAD_BYTES = 64 * 1024
_HEX = re.compile(r"(?:[0-9a-f]{2})*")
_ATTEMPT_FIELDS = {"study_digest", "run_id", "round", "attempt", "purpose", "vector_length"}


def open_body(envelope: Envelope, kind: str, names: set[str], *, blobs: int) -> dict[str, Any]:
    """The body of an envelope of this kind with exactly these fields and this number of blobs."""
    if envelope.kind != kind:
        raise MalformedMessageError(f"expected a message {kind}, got {envelope.kind[:64]!r}")
    if len(envelope.blobs) != blobs:
        raise MalformedMessageError(f"{kind}: {blobs} blobs expected, not {len(envelope.blobs)}")
    return exact_fields(envelope.body, names, what=kind)


def exact_fields(value: Any, names: set[str], *, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or set(value) != names:
        raise MalformedMessageError(
            f"{what}: the fields are {', '.join(sorted(names))}, no more and no fewer"
        )
    return value


def read_attempt(value: Any) -> AttemptId:
    return AttemptId(**exact_fields(value, _ATTEMPT_FIELDS, what="attempt"))


def write_attempt(attempt: AttemptId) -> dict[str, Any]:
    return {
        "study_digest": attempt.study_digest,
        "run_id": attempt.run_id,
        "round": attempt.round,
        "attempt": attempt.attempt,
        "purpose": attempt.purpose,
        "vector_length": attempt.vector_length,
    }


def read_hex(value: Any, size: int, *, what: str) -> bytes:
    """``size`` bytes from lower-case hex digits."""
    if not isinstance(value, str) or len(value) != 2 * size or not _HEX.fullmatch(value):
        raise MalformedMessageError(f"{what}: {2 * size} lower-case hex digits expected")
    return bytes.fromhex(value)


def read_signature(value: Any, *, what: str) -> bytes:
    return read_hex(value, SIGNATURE_BYTES, what=what)


def read_site(value: Any, *, what: str) -> str:
    if not isinstance(value, str) or not SITE_ID.fullmatch(value):
        raise MalformedMessageError(f"{what}: not a site id")
    return value


def read_list(value: Any, *, what: str) -> list[Any]:
    """A list of at most 100 entries."""
    if not isinstance(value, list) or len(value) > MAX_SITES:
        raise MalformedMessageError(f"{what}: a list of at most {MAX_SITES} entries expected")
    return value


def read_sites(value: Any, *, what: str) -> tuple[str, ...]:
    sites = tuple(read_site(item, what=what) for item in read_list(value, what=what))
    if len(set(sites)) != len(sites):
        raise MalformedMessageError(f"{what}: a site stands twice")
    return sites


def read_ledger_head(value: Any) -> dict[str, Any]:
    """A JSON object of at most 64 KiB in canonical form; its meaning is the ledger's."""
    if not isinstance(value, dict):
        raise MalformedMessageError("ledger_head: an object expected")
    if len(canonical_json(value)) > MAX_LEDGER_HEAD_BYTES:
        raise MalformedMessageError(f"ledger_head: more than {MAX_LEDGER_HEAD_BYTES} bytes")
    return value


def split_blob(blob: Blob, count: int, size: int, *, what: str) -> tuple[bytes, ...]:
    """``count`` pieces of ``size`` bytes, nothing left over."""
    if len(blob) != count * size:
        raise MalformedMessageError(f"{what}: {count * size} bytes expected, not {len(blob)}")
    return tuple(bytes(blob[start : start + size]) for start in range(0, count * size, size))


def same_length(items: Sequence[object], others: Sequence[object], *, what: str) -> None:
    if len(items) != len(others):
        raise MalformedMessageError(f"{what}: {len(items)} and {len(others)} entries do not match")
