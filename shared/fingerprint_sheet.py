"""The sheet of fingerprints that hospitals exchange among themselves.

A sheet lists names and key fingerprints, signed by the hospital (or registrar) that wrote it. Whoever reads
one compares the *writer's* fingerprint over another channel; what the writer vouches for is then pinned
together. The coordinator has no part in it: its word about who a hospital is counts for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from shared.attestation import Statement, open_signed_by, sign_statement
from shared.enrolment import NAME
from shared.errors import MalformedMessageError, RefusedError
from shared.identity import SigningKey

SHEET_PREDICATE = "fingerprint-sheet/v1"
MAX_SHEET_BYTES = 64 * 1024
MAX_ENTRIES = 128
FINGERPRINT = re.compile(r"SHA256:([0-9a-f]{4}-){15}[0-9a-f]{4}")


@dataclass(frozen=True, kw_only=True)
class FingerprintSheet:
    """Who wrote the sheet, and the fingerprints it vouches for, by name (``coordinator``, ``officer``, site).

    ``entries`` includes the writer.
    """

    writer: str
    entries: Mapping[str, str]


def sign_sheet(sheet: FingerprintSheet, key: SigningKey) -> bytes:
    """JSON bytes. The writer's own entry is set from the key, whatever the sheet says."""
    entries = {**sheet.entries, sheet.writer: key.verify_key.fingerprint}
    predicate = {"writer": sheet.writer, "entries": entries}
    return sign_statement(Statement(predicate_type=SHEET_PREDICATE, subjects=(), predicate=predicate), key)


def open_sheet(data: bytes, *, fingerprint: str) -> FingerprintSheet:
    """Verify a sheet.

    Args:
        fingerprint: Of the writer, read over another channel than the file's.

    Raises:
        RefusedError: it is signed by another key.
        MalformedMessageError, BadSignatureError: it does not parse or verify.
    """
    statement, key = open_signed_by(
        data,
        fingerprint=fingerprint,
        predicate_type=SHEET_PREDICATE,
        what="fingerprint sheet",
        max_bytes=MAX_SHEET_BYTES,
        refusal=lambda key: RefusedError(
            f"the sheet is signed by {key.fingerprint}, not by {fingerprint}",
            remedy="call whoever wrote it, and let them read their fingerprint again",
        ),
    )
    writer, entries = statement.predicate.get("writer"), statement.predicate.get("entries")
    if not isinstance(writer, str) or not isinstance(entries, dict) or len(entries) > MAX_ENTRIES:
        raise MalformedMessageError(f"fingerprint sheet: a writer and at most {MAX_ENTRIES} entries")
    for name, value in entries.items():
        if not NAME.fullmatch(name) or not isinstance(value, str) or not FINGERPRINT.fullmatch(value):
            raise MalformedMessageError(f"fingerprint sheet: {name[:80]!r} has no fingerprint")
    if entries.get(writer) != key.fingerprint:
        raise MalformedMessageError("fingerprint sheet: its writer's entry is not the key that signed it")
    return FingerprintSheet(writer=writer, entries=entries)
