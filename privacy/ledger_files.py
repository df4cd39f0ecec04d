"""Files of the ledger: connection, exclusive lock, and writes that survive a power failure."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

from shared.errors import LedgerError

_BUSY_TIMEOUT_S = 2.0


def connect(path: Path, *, writable: bool) -> sqlite3.Connection:
    uri = f"file:{_uri_path(path)}?mode={'rwc' if writable else 'ro'}"
    # The agent answers each request from another thread, one request at a time under its lock.
    connection = sqlite3.connect(
        uri, uri=True, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    # EXTRA is FULL plus a sync of the directory after the rollback journal is unlinked: in journal mode
    # DELETE, FULL alone may lose the last commit on power failure (SQLite, "PRAGMA synchronous").
    if writable:
        connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA synchronous = EXTRA")
    connection.execute("PRAGMA recursive_triggers = ON")
    connection.execute("PRAGMA trusted_schema = OFF")
    return connection


def _uri_path(path: Path) -> str:
    return path.as_uri().removeprefix("file://")


def lock(path: Path) -> int:
    lock_path = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise LedgerError(f"ledger lock {lock_path} cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise LedgerError(
            f"ledger {path} is in use by another process", remedy="one site agent at a time has a ledger"
        ) from error
    return descriptor


def write_durably(path: Path, data: bytes) -> None:
    """Replace a file atomically: synced before it takes the name, and the directory after."""
    draft = path.with_name(path.name + ".new")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
