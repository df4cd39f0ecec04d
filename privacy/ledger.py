"""The privacy ledger of one site: reserve before you spend, and never forget.

Append-only SQLite, each entry chained to the one before by SHA-256, the head signed by the site. A charge is
durable (file and directory synced) before :meth:`Ledger.reserve` returns, so before any byte derived from
scans may leave; it stays if nothing was sent. A crash may overcount, never undercount. Entries hold events,
not epsilons.

Two files. The database, and a **witness** outside the reach of the database's backups: the signed head,
written after every append. A database shorter than its witness is an old copy, and the ledger does not
open; nor does it open without a witness. A crash between the two writes leaves the database one entry
ahead; that is accepted. What one machine cannot notice (both files restored from the same old copy) its
peers can: they keep the heads that they saw and check that later ones continue them, and they show a site
which of its own heads they saw, see :mod:`privacy.ledger_continuity`.

One process at a time may open a ledger for writing; reading is always possible, see :func:`read_ledger`.

Any failure to write (disk full, locked, corrupt, replaced under our feet) raises LedgerError and closes the
ledger for good: nothing may be sent after it.
"""

from __future__ import annotations

import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from privacy.dp.accounting import EpsilonReport, PrivacyEvent, View
from privacy.ledger_chain import (
    ATTEMPT,
    CHARGE,
    ENDED,
    GENESIS_HASH,
    OPENED,
    SALT_BYTES,
    LedgerEntry,
    LedgerHead,
    check_chain,
    check_seen_head,
    ended_studies,
    export_statement,
    spent,
)
from privacy.ledger_files import connect, lock, sync_directory, write_durably
from shared.canonical import canonical_json, parse_json
from shared.errors import BudgetExceededError, LedgerError, PeerError, RefusedError, UsageError
from shared.identity import SigningKey, VerifyKey

_SCHEMA = """
CREATE TABLE entries (
    sequence INTEGER PRIMARY KEY CHECK (sequence >= 1),
    body BLOB NOT NULL,
    previous_hash BLOB NOT NULL CHECK (length(previous_hash) = 32),
    entry_hash BLOB NOT NULL UNIQUE CHECK (length(entry_hash) = 32)
) STRICT;
CREATE TABLE peer_heads (
    seen INTEGER PRIMARY KEY,
    peer TEXT NOT NULL,
    head BLOB NOT NULL
) STRICT;
CREATE TRIGGER entries_keep_changed BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER entries_keep_removed BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER peer_heads_keep_changed BEFORE UPDATE ON peer_heads
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER peer_heads_keep_removed BEFORE DELETE ON peer_heads
    BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""

_MAX_BODY_BYTES = 64 * 1024
_MAX_WITNESS_BYTES = 4096
_NOTE_KIND = re.compile(r"^[a-z][a-z0-9_-]{0,39}$")
_RESERVED_KINDS = frozenset({OPENED, CHARGE, ATTEMPT, ENDED})

Purpose = Literal["train", "audit"]
Clock = Callable[[], datetime]


class RepeatedAttemptError(RefusedError):
    """An attempt number was charged or registered before, or is not larger than every earlier one."""


@dataclass(frozen=True, kw_only=True)
class Charge:
    """One attempt to be charged. ``attempt`` is unique and grows over the whole study."""

    study_id: str
    plan_sha256: str
    purpose: Purpose
    round: int
    attempt: int
    event: PrivacyEvent
    run_id: str = ""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A site's cap over all its studies: ``epsilon`` (None: no cap) at ``delta``, as ``view`` sees it."""

    epsilon: float | None
    delta: float
    view: View = "world"


def utc_now() -> datetime:
    """The clock that is used where none is injected."""
    return datetime.now(UTC)


class Ledger:
    """A site's open ledger. Use :meth:`open`, and as a context manager. Not thread safe.

    Guarantees: when :meth:`reserve` or :meth:`register_attempt` has returned, the entry survives a crash of
    process or machine; when either has raised, the caller must send nothing.
    """

    def __init__(
        self,
        *,
        path: Path,
        counter_path: Path,
        key: SigningKey,
        connection: sqlite3.Connection,
        lock: int,
        entries: list[LedgerEntry],
        clock: Clock,
    ) -> None:
        self._path, self._counter_path, self._key, self._clock = path, counter_path, key, clock
        self._connection, self._lock, self._entries = connection, lock, entries
        self._inode = path.stat().st_ino
        self._unusable: str | None = None
        """Why nothing may be written or sent any more: the first failure, or that it was closed."""
        self.storage_failed = False
        """Whether that was the disk's failure: opened again, the ledger may be sound."""
        self.ledger_id = str(entries[0].body["ledger_id"])

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        key: SigningKey,
        counter_path: Path,
        create: bool = False,
        clock: Clock = utc_now,
    ) -> Ledger:
        """Open for writing, after checking chain, signatures and witness.

        Args:
            path: The database.
            counter_path: The witness, outside the reach of the database's backups.
            key: The site's identity; it signed the ledger when it was created.
            create: Make a new, empty ledger. Neither file may exist.
            clock: Time of entries.

        Raises:
            LedgerError: naming what is wrong: missing, in use by another process, not this key's, changed,
                shorter than its witness (an old copy), without witness, or unreadable.
        """
        path, counter_path = path.resolve(), counter_path.resolve()
        if create and (path.exists() or counter_path.exists()):
            raise LedgerError(f"{path} or its witness {counter_path} exists already; it is never overwritten")
        if not create and not path.exists():
            raise LedgerError(f"there is no ledger at {path}", remedy="lacuna site init")
        lock_descriptor = lock(path)
        connection = None
        try:
            connection = connect(path, writable=True)
            if create:
                _create(connection, path, key, clock)
            entries = _load(connection, path, key.verify_key)
            ledger = cls(
                path=path, counter_path=counter_path, key=key, connection=connection, lock=lock_descriptor,
                entries=entries, clock=clock,
            )  # fmt: skip
            if not create:
                ledger._check_witness()
            ledger._write_witness()
        except BaseException as error:
            if connection is not None:
                connection.close()
            os.close(lock_descriptor)
            if isinstance(error, sqlite3.Error | OSError):
                raise LedgerError(f"ledger {path} cannot be opened: {error}") from error
            raise
        return ledger

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the files. Every entry is durable already."""
        if self._lock >= 0:
            self._fail("it was closed")
            self._connection.close()
            os.close(self._lock)
            self._lock = -1

    def reserve(self, charge: Charge, cap: Budget, *, max_attempts: int | None = None) -> LedgerHead:
        """Charge an attempt, durably, before anything is computed for it.

        Args:
            charge: The attempt and its event.
            cap: The site's cap over all studies in this ledger, this charge included.
            max_attempts: Where given, refuse if the study has this many charges of that purpose already.

        Returns:
            The signed head after the charge.

        Raises:
            BudgetExceededError: the charge would pass the cap or ``max_attempts``, or the study was ended;
                nothing was written.
            RepeatedAttemptError: this attempt was charged before; nothing was written.
            LedgerError: it could not be written; nothing may be sent.
        """
        _check_charge(charge)
        self._require_usable()
        if charge.attempt in self.charged_attempts(charge.study_id):
            raise RepeatedAttemptError(
                f"attempt {charge.attempt} of study {charge.study_id!r} was charged before"
            )
        self.check_affordable(charge, cap, max_attempts=max_attempts)
        return self._append(
            {
                "kind": CHARGE,
                "study_id": charge.study_id,
                "plan_sha256": charge.plan_sha256,
                "run_id": charge.run_id,
                "purpose": charge.purpose,
                "round": charge.round,
                "attempt": charge.attempt,
                "event": charge.event.to_dict(),
            }
        )

    def check_affordable(self, charge: Charge, cap: Budget, *, max_attempts: int | None = None) -> None:
        """Whether :meth:`reserve` would find room for a charge; writes nothing and promises nothing.

        Raises:
            BudgetExceededError: the charge would pass the cap or ``max_attempts``, or the study was ended.
        """
        if charge.study_id in ended_studies(self._entries):
            raise BudgetExceededError(f"study {charge.study_id!r} was ended at this site: it has no budget")
        used = len(self.charged_attempts(charge.study_id, purpose=charge.purpose))
        if max_attempts is not None and used >= max_attempts:
            raise BudgetExceededError(
                f"study {charge.study_id!r} has used all {max_attempts} of its {charge.purpose} attempts"
            )
        if cap.epsilon is not None:
            total = self.spent(delta=cap.delta, view=cap.view, also=[charge.event])
            if not total.reported <= cap.epsilon:
                raise BudgetExceededError(
                    f"attempt {charge.attempt} of study {charge.study_id!r} would bring this site to epsilon "
                    f"{total.reported:.4g} at delta {cap.delta:g}; its cap is {cap.epsilon:g}"
                )

    def end_study(self, study_id: str) -> LedgerHead:
        """Note durably that a study charges nothing any more, so that what it had reserved is free.

        For good: :meth:`reserve` refuses the study from then on.

        Raises:
            UsageError: it was ended before.
            LedgerError: it could not be written.
        """
        if study_id in ended_studies(self._entries):
            raise UsageError(f"study {study_id!r} was ended at this site before")
        return self._append({"kind": ENDED, "study_id": study_id})

    def register_attempt(self, study_id: str, attempt: int) -> LedgerHead:
        """Note durably that keys for an attempt are about to leave; numbers only grow (DESIGN section 6, 5).

        Raises:
            RepeatedAttemptError: not larger than every number registered before for this study.
            LedgerError: it could not be written.
        """
        self._require_usable()
        last = self.last_registered_attempt(study_id)
        if isinstance(attempt, bool) or not 0 <= attempt < 2**53:
            raise UsageError(f"attempt {attempt!r} is not a number of 0 to 2^53 - 1")
        if last is not None and attempt <= last:
            raise RepeatedAttemptError(
                f"attempt {attempt} of study {study_id!r} is not larger than the last registered, {last}"
            )
        return self._append({"kind": ATTEMPT, "study_id": study_id, "attempt": attempt})

    def last_registered_attempt(self, study_id: str) -> int | None:
        """The largest attempt number registered for a study, None if there is none."""
        numbers = [
            int(entry.body["attempt"])
            for entry in self._entries
            if entry.kind == ATTEMPT and entry.body["study_id"] == study_id
        ]
        return max(numbers, default=None)

    def record(self, kind: str, details: Mapping[str, Any]) -> LedgerHead:
        """Append an entry that charges nothing (a plan was approved, a study opened).

        Args:
            kind: A word in lower case, not one of the ledger's own kinds.
            details: JSON object, at most 64 KiB.
        """
        if not _NOTE_KIND.match(kind) or kind in _RESERVED_KINDS:
            raise UsageError(f"{kind!r} is not a kind of note")
        return self._append({"kind": kind, "details": dict(details)})

    def head(self) -> LedgerHead:
        """The signed head of the chain as it is on disk."""
        last = self._entries[-1]
        return LedgerHead.sign(
            self._key, ledger_id=self.ledger_id, length=last.sequence, entry_hash=last.entry_hash
        )

    def entries(self) -> tuple[LedgerEntry, ...]:
        """All entries, oldest first."""
        return tuple(self._entries)

    def charged_attempts(self, study_id: str, *, purpose: Purpose | None = None) -> tuple[int, ...]:
        """Numbers of the attempts charged to a study, in the order of charging."""
        return tuple(
            int(entry.body["attempt"])
            for entry in self._entries
            if entry.kind == CHARGE
            and entry.body["study_id"] == study_id
            and (purpose is None or entry.body["purpose"] == purpose)
        )

    def spent(
        self,
        *,
        delta: float,
        view: View = "world",
        study_id: str | None = None,
        also: Iterable[PrivacyEvent] = (),
    ) -> EpsilonReport:
        """Epsilon of all charges (of one study, or of all), and of the events ``also`` in question."""
        return spent(self._entries, delta=delta, view=view, study_id=study_id, also=also)

    def export(self, path: Path) -> LedgerHead:
        """Write the signed export (DSSE, predicate ``ledger/v1``) that coordinator and officer get."""
        head = self.head()
        data = export_statement(self._entries, head, self._key)
        try:
            write_durably(path, data)
        except OSError as error:
            raise LedgerError(f"ledger export {path} cannot be written: {error.strerror}") from error
        return head

    def record_peer_heads(self, heads: Mapping[str, tuple[LedgerHead, VerifyKey]]) -> None:
        """Keep the heads that peers showed in their signed key messages.

        Args:
            heads: By site id, the head and the peer's key from the roster.

        Raises:
            PeerError: a head is not signed by that peer, or its ledger is behind or beside the one it showed
                before; nothing was stored.
            LedgerError: it could not be written.
        """
        self._require_usable()
        known = self.peer_heads()
        fresh = []
        for peer, (head, key) in heads.items():
            head.verify(key)
            seen = known.get(peer)
            if seen is not None:
                if seen.ledger_id != head.ledger_id or head.length < seen.length:
                    raise PeerError(
                        f"site {peer!r} shows a ledger of {head.length} entries, after one of {seen.length}: "
                        "an old or a second copy"
                    )
                if head.length == seen.length and head.entry_hash != seen.entry_hash:
                    raise PeerError(f"site {peer!r} shows two ledgers of {head.length} entries that differ")
            if seen is None or head.length > seen.length:
                fresh.append((peer, canonical_json(head.to_dict())))
        if fresh:
            with self._writing():
                self._connection.executemany("INSERT INTO peer_heads (peer, head) VALUES (?, ?)", fresh)

    def peer_heads(self) -> dict[str, LedgerHead]:
        """The furthest head seen of each peer: receipts to check its exports against."""
        try:
            rows = self._connection.execute("SELECT peer, head FROM peer_heads ORDER BY seen").fetchall()
        except sqlite3.Error as error:
            self._fail(str(error))
            raise LedgerError(f"ledger {self._path} cannot be read: {error}") from error
        return {peer: LedgerHead.from_dict(parse_json(head, what="stored head")) for peer, head in rows}

    def check_own_head(self, seen: LedgerHead) -> None:
        """Compare with a head of ours that a peer has seen.

        Raises:
            LedgerError: the peer has seen this ledger further, or with other entries: this is an old copy.
        """
        seen.verify(self._key.verify_key)
        try:
            check_seen_head(self._entries, seen, ledger_id=self.ledger_id)
        except PeerError as error:
            self._fail(f"a peer has seen another state of it: {error.message}")
            raise LedgerError(
                f"a peer has seen another state of this ledger: {error.message}",
                remedy="restore the newest copy of the ledger; without it, retire this site's key and budget",
            ) from error

    def _fail(self, cause: str, *, storage: bool = False) -> None:
        """For good; the first cause is the one that is told."""
        if self._unusable is None:
            self._unusable, self.storage_failed = cause, storage

    def _require_usable(self) -> None:
        if self._unusable is not None:
            raise LedgerError(
                f"ledger {self._path} is closed: nothing may be sent ({self._unusable})",
                remedy="mend the cause and start the site agent again",
            )

    def _append(self, body: dict[str, Any]) -> LedgerHead:
        self._require_usable()
        last = self._entries[-1]
        entry = LedgerEntry.chain(
            last,
            ledger_id=self.ledger_id,
            body={**body, "time": self._clock().isoformat(), "salt": os.urandom(SALT_BYTES).hex()},
        )
        data = canonical_json(entry.body)
        if len(data) > _MAX_BODY_BYTES:
            raise UsageError(f"a ledger entry has at most {_MAX_BODY_BYTES} bytes")
        with self._writing():
            row = self._connection.execute(
                "SELECT sequence, entry_hash FROM entries ORDER BY sequence DESC LIMIT 1"
            ).fetchone()
            if row is None or tuple(row) != (last.sequence, last.entry_hash):
                raise LedgerError(f"ledger {self._path} was changed by somebody else while it was open")
            self._connection.execute(
                "INSERT INTO entries VALUES (?, ?, ?, ?)",
                (entry.sequence, data, entry.previous_hash, entry.entry_hash),
            )
        self._entries.append(entry)
        try:
            self._write_witness()
        except OSError as error:
            self._fail(f"its witness cannot be written: {error.strerror}", storage=True)
            raise LedgerError(
                f"ledger witness {self._counter_path} cannot be written: {error.strerror}",
                remedy="make room, or mend the rights of the folder, and start the site agent again",
            ) from error
        return self.head()

    def _writing(self) -> _Transaction:
        return _Transaction(self)

    def _write_witness(self) -> None:
        write_durably(self._counter_path, canonical_json(self.head().to_dict()))

    def _check_witness(self) -> None:
        path = self._counter_path
        remedy = (
            "restore the newest copy of ledger and witness; without it, retire this site's key and budget"
        )
        try:
            data = path.read_bytes()[: _MAX_WITNESS_BYTES + 1]
        except FileNotFoundError as error:
            raise LedgerError(
                f"the ledger's witness {path} is missing: an old copy of the ledger could not be noticed",
                remedy=remedy,
            ) from error
        try:
            seen = LedgerHead.from_dict(parse_json(data, what=str(path), max_bytes=_MAX_WITNESS_BYTES))
            seen.verify(self._key.verify_key)
            check_seen_head(self._entries, seen, ledger_id=self.ledger_id)
        except PeerError as error:
            raise LedgerError(
                f"ledger {self._path} against {path}: {error.message}", remedy=remedy
            ) from error
        ahead = len(self._entries) - seen.length
        if ahead > 1:
            raise LedgerError(
                f"the witness {path} is {ahead} entries behind the ledger; a crash leaves it one behind",
                remedy=remedy,
            )


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT; any failure closes the ledger for good and raises LedgerError."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __enter__(self) -> None:
        ledger = self._ledger
        try:
            if ledger._path.stat().st_ino != ledger._inode:
                raise LedgerError(f"ledger {ledger._path} was replaced by another file while it was open")
            ledger._connection.execute("BEGIN IMMEDIATE")
        except (sqlite3.Error, OSError) as error:
            ledger._fail(str(error), storage=True)
            raise LedgerError(f"ledger {ledger._path} cannot be written: {error}") from error
        except LedgerError as error:
            ledger._fail(error.message)
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ledger = self._ledger
        try:
            if error is None:
                ledger._connection.execute("COMMIT")
                return
        except sqlite3.Error as failure:
            error = failure
        ledger._fail(str(error), storage=isinstance(error, sqlite3.Error | OSError))
        if ledger._connection.in_transaction:
            try:
                ledger._connection.execute("ROLLBACK")
            except sqlite3.Error:
                ledger._connection.close()
        if isinstance(error, sqlite3.Error):
            raise LedgerError(f"ledger {ledger._path} cannot be written: {error}") from error


def read_ledger(path: Path, *, key: VerifyKey) -> tuple[LedgerEntry, ...]:
    """Read and verify a ledger's chain without the right to write; also while an agent has it open.

    The witness is not consulted. Raises LedgerError.
    """
    if not path.exists():
        raise LedgerError(f"there is no ledger at {path}", remedy="lacuna site init")
    try:
        connection = connect(path.resolve(), writable=False)
        try:
            return tuple(_load(connection, path, key))
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise LedgerError(f"ledger {path} cannot be read: {error}") from error


def _check_charge(charge: Charge) -> None:
    if charge.purpose not in ("train", "audit"):
        raise UsageError(f"purpose {charge.purpose!r} is neither 'train' nor 'audit'")
    for number in (charge.round, charge.attempt):
        if isinstance(number, bool) or not 0 <= number < 2**53:
            raise UsageError(f"{number!r} is not a number of 0 to 2^53 - 1")
    if not re.fullmatch(r"[0-9a-f]{64}", charge.plan_sha256):
        raise UsageError("plan_sha256 is 64 lower-case hex digits")


def _create(connection: sqlite3.Connection, path: Path, key: SigningKey, clock: Clock) -> None:
    path.chmod(0o600)
    first = LedgerEntry.genesis(
        ledger_id=os.urandom(16).hex(),
        key=key.verify_key,
        time=clock().isoformat(),
        salt=os.urandom(SALT_BYTES),
    )
    connection.executescript("BEGIN EXCLUSIVE;" + _SCHEMA)
    connection.execute(
        "INSERT INTO entries VALUES (1, ?, ?, ?)",
        (canonical_json(first.body), GENESIS_HASH, first.entry_hash),
    )
    connection.execute("COMMIT")
    sync_directory(path.parent)


def _load(connection: sqlite3.Connection, path: Path, key: VerifyKey) -> list[LedgerEntry]:
    damaged = connection.execute("PRAGMA quick_check(1)").fetchone()
    if damaged is None or damaged[0] != "ok":
        raise LedgerError(f"ledger {path} is corrupt: {damaged and damaged[0]}")
    rows = connection.execute("SELECT * FROM entries ORDER BY sequence").fetchall()
    try:
        entries = [
            LedgerEntry(
                sequence=sequence,
                body=parse_json(body, what=f"entry {sequence}", max_bytes=_MAX_BODY_BYTES),
                previous_hash=previous,
                entry_hash=entry_hash,
            )
            for sequence, body, previous, entry_hash in rows
        ]
        check_chain(entries, key=key)
    except PeerError as error:
        raise LedgerError(f"ledger {path} does not verify: {error.message}") from error
    return entries
