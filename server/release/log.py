"""The coordinator's release log: append-only, hash-chained, signed. Releases and withdrawals.

The file's form and its verification are in :mod:`privacy.compliance.release_log`, which the officer runs
too. Every append verifies the whole log first, under a file lock, and is on disk before it returns.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Literal

from privacy.compliance.dsse import EvidenceError
from privacy.compliance.release_log import (
    ENTRY_PREDICATE,
    NO_ENTRY,
    RELEASE_STATEMENT_NAME,
    LogEntry,
    read_log,
)
from privacy.compliance.validity import now_utc
from shared.attestation import Statement, Subject, sign_statement
from shared.errors import CoordinatorError
from shared.identity import SigningKey

__all__ = ["append_release", "append_withdrawal", "now_utc"]

EntryKind = Literal["release", "withdrawal"]
MAX_REASON_CHARACTERS = 2000


def append_release(path: Path, *, bundle_sha256: str, study_id: str, key: SigningKey, at: str) -> LogEntry:
    """Log a release. Raises CoordinatorError if this bundle stands in the log already."""
    return _append(path, "release", bundle_sha256, study_id=study_id, key=key, at=at, reason="")


def append_withdrawal(
    path: Path, *, bundle_sha256: str, study_id: str, key: SigningKey, at: str, reason: str
) -> LogEntry:
    """Log that a released bundle is withdrawn; from then on it fails verification where the log is at hand.

    Raises:
        CoordinatorError: the bundle was never released by this key, is withdrawn already, or the reason is
            empty.
    """
    if not reason.strip() or len(reason) > MAX_REASON_CHARACTERS:
        raise CoordinatorError(f"a withdrawal needs a reason of at most {MAX_REASON_CHARACTERS} characters")
    return _append(path, "withdrawal", bundle_sha256, study_id=study_id, key=key, at=at, reason=reason)


def _append(
    path: Path, kind: EntryKind, bundle_sha256: str, *, study_id: str, key: SigningKey, at: str, reason: str
) -> LogEntry:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        data = file.read()
        try:
            entries = read_log(data)
        except EvidenceError as error:
            raise CoordinatorError(
                f"{path} does not verify, so nothing is appended: {error.message}",
                remedy="restore the log from a copy; it is never repaired in place",
            ) from error
        _check_follows(entries, kind, bundle_sha256, signer=key.verify_key.hex())
        statement = Statement(
            predicate_type=ENTRY_PREDICATE,
            subjects=(Subject(name=RELEASE_STATEMENT_NAME, sha256=bundle_sha256),),
            predicate={
                "index": len(entries) + 1,
                "previous": entries[-1].line_sha256 if entries else NO_ENTRY,
                "kind": kind,
                "study_id": study_id,
                "reason": reason,
                "at": at,
            },
        )
        line = sign_statement(statement, key) + b"\n"
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return read_log(data + line)[-1]


def _check_follows(
    entries: tuple[LogEntry, ...], kind: EntryKind, bundle_sha256: str, *, signer: str
) -> None:
    about = [entry for entry in entries if entry.bundle_sha256 == bundle_sha256]
    if kind == "release":
        if about:
            raise CoordinatorError(f"bundle {bundle_sha256[:16]}... stands in the release log already")
        return
    if not any(entry.kind == "release" and entry.signer == signer for entry in about):
        raise CoordinatorError(f"bundle {bundle_sha256[:16]}... was never released in this log by this key")
    if any(entry.kind == "withdrawal" for entry in about):
        raise CoordinatorError(f"bundle {bundle_sha256[:16]}... is withdrawn already")
