"""Reading a release log: signed lines, each holding the hash of the line before it.

A log is a text file. Each line is one DSSE envelope in canonical JSON (so without a line break), over an
in-toto statement ``release-log-entry/v1`` about one bundle; ``previous`` is the SHA-256 of the line before,
without its line break. The log is written by :mod:`server.release.log`.

What a chain cannot show: entries cut off at its end. Whoever wants to notice that keeps the head of the
last log seen and passes it as ``at_least``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from privacy.compliance.dsse import EvidenceError, open_signed, sha256_hex, strict_json

ENTRY_PREDICATE = "release-log-entry/v1"
RELEASE_STATEMENT_NAME = "attestations/release.dsse.json"
NO_ENTRY = "0" * 64
MAX_LOG_BYTES = 64 * 1024 * 1024
KINDS = ("release", "withdrawal")


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """One verified line. ``bundle_sha256`` is the SHA-256 of a bundle's ``release.dsse.json``."""

    index: int
    kind: str
    study_id: str
    bundle_sha256: str
    reason: str
    at: str
    signer: str
    line_sha256: str


@dataclass(frozen=True, kw_only=True)
class LogHead:
    """Number of entries, and the hash of the last line; what to remember of a log."""

    length: int
    line_sha256: str


def log_head(entries: tuple[LogEntry, ...]) -> LogHead:
    return LogHead(length=len(entries), line_sha256=entries[-1].line_sha256 if entries else NO_ENTRY)


def read_log(data: bytes, *, at_least: LogHead | None = None) -> tuple[LogEntry, ...]:
    """Verify a whole log.

    Every line's signature is checked under the key it names; whether that key may speak for a bundle is
    for the caller to compare (``LogEntry.signer`` against the coordinator's key in the bundle's plan).

    Args:
        data: The file.
        at_least: A head seen earlier; the log must continue it.

    Raises:
        EvidenceError: names the line that is wrong.
    """
    if len(data) > MAX_LOG_BYTES:
        raise EvidenceError(f"release log: {len(data)} bytes exceed the bound of {MAX_LOG_BYTES} bytes")
    if data and not data.endswith(b"\n"):
        raise EvidenceError("release log: the last line is torn or cut off")
    entries: list[LogEntry] = []
    previous = NO_ENTRY
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        entry = _entry(line, index=number, previous=previous)
        entries.append(entry)
        previous = entry.line_sha256
    if at_least is not None and at_least.length:
        if len(entries) < at_least.length:
            raise EvidenceError(
                f"release log: {len(entries)} entries, but {at_least.length} were seen before: "
                "its end is cut off"
            )
        if entries[at_least.length - 1].line_sha256 != at_least.line_sha256:
            raise EvidenceError(f"release log: entry {at_least.length} is not the one that was seen before")
    return tuple(entries)


def read_log_file(path: Path, *, at_least: LogHead | None = None) -> tuple[LogEntry, ...]:
    """:func:`read_log` of a file. Raises EvidenceError also where it cannot be read."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise EvidenceError(f"release log {path} cannot be read: {error.strerror}") from error
    return read_log(data, at_least=at_least)


def _entry(line: bytes, *, index: int, previous: str) -> LogEntry:
    what = f"release log, line {index}"
    envelope = strict_json(line, what=what)
    try:
        key = envelope["signatures"][0]["keyid"]
    except (KeyError, IndexError, TypeError) as error:
        raise EvidenceError(f"{what}: not a signed entry") from error
    if not isinstance(key, str) or len(key) != 64:
        raise EvidenceError(f"{what}: it names no key")
    statement = open_signed(line, key=key, predicate_type=ENTRY_PREDICATE, what=what)
    predicate = statement.predicate
    if set(predicate) != {"at", "index", "kind", "previous", "reason", "study_id"}:
        raise EvidenceError(f"{what}: malformed entry")
    if predicate["index"] != index or predicate["previous"] != previous:
        raise EvidenceError(
            f"{what}: it does not follow the line before it; a line was changed, removed or moved"
        )
    if predicate["kind"] not in KINDS or list(statement.subjects) != [RELEASE_STATEMENT_NAME]:
        raise EvidenceError(f"{what}: malformed entry")
    return LogEntry(
        index=index,
        kind=str(predicate["kind"]),
        study_id=str(predicate["study_id"]),
        bundle_sha256=statement.subjects[RELEASE_STATEMENT_NAME],
        reason=str(predicate["reason"]),
        at=str(predicate["at"]),
        signer=key,
        line_sha256=sha256_hex(line),
    )
