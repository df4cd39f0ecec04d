"""The coordinator's durable state of one study: attempts, rounds, events, files.

A round is complete when its checkpoint file is there (written to a temporary name, synced, renamed);
the database only mirrors that. A new Flower run continues from the last checkpoint, and the attempt
number never goes back, whatever died.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shared.canonical import parse_json
from shared.errors import CoordinatorError, MalformedMessageError
from shared.home import lacuna_home, private_directory
from shared.plan_package import PlanPackage, open_plan_package

Purpose = Literal["train", "audit"]
AttemptStatus = Literal["prepared", "open", "completed", "aborted", "void"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS attempts (
    attempt INTEGER PRIMARY KEY,
    run_id TEXT NOT NULL,
    round INTEGER NOT NULL,
    purpose TEXT NOT NULL,
    status TEXT NOT NULL,
    participants TEXT NOT NULL DEFAULT '[]',
    survivors TEXT NOT NULL DEFAULT '[]',
    reason TEXT NOT NULL DEFAULT ''
);
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    body TEXT NOT NULL
);
"""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """One attempt as the coordinator saw it. ``participants`` were asked to upload."""

    attempt: int
    run_id: str
    round: int
    purpose: Purpose
    status: AttemptStatus
    participants: tuple[str, ...]
    survivors: tuple[str, ...]
    reason: str


class StudyStore:
    """State under ``coordinator/STUDY``. One writer at a time (SQLite's lock), any number of readers."""

    def __init__(self, root: Path, *, clock: Callable[[], float] = time.time) -> None:
        self.root = root
        self._clock = clock
        self._database: sqlite3.Connection | None = None

    @classmethod
    def default(cls, study_id: str) -> StudyStore:
        return cls(coordinator_root() / study_id)

    # paths

    @property
    def plan_root(self) -> Path:
        return self.root / "plan"

    @property
    def checkpoints(self) -> Path:
        return self.root / "rounds"

    @property
    def candidate_path(self) -> Path:
        return self.root / "candidate.safetensors"

    @property
    def evidence(self) -> Path:
        return self.root / "evidence"

    @property
    def receipts_path(self) -> Path:
        return self.evidence / "receipts.json"

    @property
    def decision_path(self) -> Path:
        return self.root / "gate-decision.dsse.json"

    @property
    def plan_approvals(self) -> Path:
        return self.root / "plan-approvals"

    @property
    def approvals(self) -> Path:
        return self.root / "approvals"

    @property
    def bundle_path(self) -> Path:
        return self.root / "bundle"

    @property
    def log_path(self) -> Path:
        return coordinator_root(self.root) / "release-log.jsonl"

    def package(self) -> PlanPackage:
        """The signed plan. Raises CoordinatorError if nothing is signed yet."""
        if not self.plan_root.is_dir():
            raise CoordinatorError(
                f"study {self.root.name!r} has no signed plan",
                remedy=f"lacuna coordinator plan new, then plan sign --study {self.root.name}",
            )
        return open_plan_package(self.plan_root)

    # attempts

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        if self._database is None:
            if not self.root.is_dir():
                raise CoordinatorError(
                    f"there is no study in {self.root}", remedy="lacuna coordinator init STUDY"
                )
            private_directory(self.root)
            try:
                database = sqlite3.connect(
                    self.root / "state.sqlite", timeout=30, isolation_level=None, check_same_thread=False
                )
                database.execute("PRAGMA synchronous = FULL")
                database.executescript(_SCHEMA)
            except sqlite3.Error as error:
                raise CoordinatorError(f"{self.root}/state.sqlite cannot be opened: {error}") from error
            self._database = database
        try:
            yield self._database
        except sqlite3.Error as error:
            raise CoordinatorError(f"{self.root}/state.sqlite: {error}") from error

    def close(self) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def prepare_attempt(self, *, run_id: str, round_number: int, purpose: Purpose, above: int = 0) -> int:
        """A new attempt number, durable before it is used; larger than ``above`` and every earlier one."""
        with self._connection() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                (last,) = database.execute("SELECT COALESCE(MAX(attempt), 0) FROM attempts").fetchone()
                attempt = max(int(last), above) + 1
                database.execute(
                    "INSERT INTO attempts (attempt, run_id, round, purpose, status) VALUES (?,?,?,?,?)",
                    (attempt, run_id, round_number, purpose, "prepared"),
                )
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")
        return attempt

    def open_attempt(self, attempt: int, participants: Sequence[str]) -> None:
        """Recorded before the first upload request leaves: from here on sites may have charged it."""
        self._update(attempt, "open", participants=participants)

    def complete_attempt(self, attempt: int, survivors: Sequence[str]) -> None:
        self._update(attempt, "completed", survivors=survivors)

    def abort_attempt(self, attempt: int, reason: str) -> None:
        self._update(attempt, "aborted", reason=reason)

    def void_attempt(self, attempt: int) -> None:
        """The attempt was prepared and never opened: no site can have charged it."""
        self._update(attempt, "void")

    def _update(
        self,
        attempt: int,
        status: AttemptStatus,
        *,
        participants: Sequence[str] | None = None,
        survivors: Sequence[str] = (),
        reason: str = "",
    ) -> None:
        with self._connection() as database:
            database.execute(
                "UPDATE attempts SET status = ?, survivors = ?, reason = ?,"
                " participants = COALESCE(?, participants) WHERE attempt = ?",
                (
                    status,
                    json.dumps(list(survivors)),
                    reason,
                    None if participants is None else json.dumps(list(participants)),
                    attempt,
                ),
            )

    def attempts(self, purpose: Purpose | None = None) -> list[AttemptRecord]:
        with self._connection() as database:
            rows = database.execute(
                "SELECT attempt, run_id, round, purpose, status, participants, survivors, reason"
                " FROM attempts ORDER BY attempt"
            ).fetchall()
        records = [
            AttemptRecord(
                attempt=row[0],
                run_id=row[1],
                round=row[2],
                purpose=row[3],
                status=row[4],
                participants=tuple(json.loads(row[5])),
                survivors=tuple(json.loads(row[6])),
                reason=row[7],
            )
            for row in rows
        ]
        return [record for record in records if purpose is None or record.purpose == purpose]

    def charged_attempts(self, purpose: Purpose) -> int:
        """Attempts that sites may have charged: opened ever, whatever became of them."""
        return sum(record.status not in ("prepared", "void") for record in self.attempts(purpose))

    def void_leftovers(self) -> None:
        """On resume: what an earlier run prepared is void; what it had open is completed where its result is
        on disk (the run died between the file and the database), and aborted otherwise. Half a checkpoint,
        which a killed run leaves under a name of its own, is removed.
        """
        for half in self.checkpoints.glob(".round-*.partial"):
            half.unlink(missing_ok=True)
        for record in self.attempts():
            if record.status == "prepared":
                self.void_attempt(record.attempt)
            elif record.status == "open":
                survivors = self._survivors_on_disk(record)
                if survivors is None:
                    self.abort_attempt(record.attempt, "the run that opened it ended")
                else:
                    self.complete_attempt(record.attempt, survivors)

    def _survivors_on_disk(self, record: AttemptRecord) -> tuple[str, ...] | None:
        """Whose vectors are in the checkpoint or the audit that this attempt left; None if it left none."""
        try:
            if record.purpose == "train":
                from shared.checkpoint import load_tensors

                _, metadata = load_tensors(self.checkpoint_path(record.round))
                if metadata.get("attempt") != str(record.attempt):
                    return None
                return tuple(metadata["survivors"].split(","))
            path = self.evidence / "audit.json"
            audit = parse_json(path.read_bytes(), what=str(path))
            if (audit["attempt"], audit["run_id"]) != (record.attempt, record.run_id):
                return None
            return tuple(str(site) for site in audit["survivors"])
        except (OSError, MalformedMessageError, KeyError, TypeError):
            return None

    @contextmanager
    def exclusively(self, *, wait_s: float = 60.0) -> Iterator[None]:
        """Hold the study for one run: two drivers would open attempts against one another.

        Raises:
            CoordinatorError: another process still drives the study after ``wait_s``.
        """
        deadline = time.monotonic() + wait_s
        descriptor = os.open(self.root / ".driver.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError as error:
                    if time.monotonic() >= deadline:
                        raise CoordinatorError(
                            f"another run still drives study {self.root.name!r}",
                            remedy="wait until it ends, or stop it with `flwr stop`",
                        ) from error
                    time.sleep(0.2)
            yield
        finally:
            os.close(descriptor)

    def driven(self) -> bool:
        """Whether a driver holds the study at this moment."""
        try:
            with self.exclusively(wait_s=0):
                return False
        except CoordinatorError:
            return True

    # events

    def record_event(self, kind: str, **body: Any) -> None:
        """Append to the study's log of events. Bodies hold nothing about patients: the server has none."""
        with self._connection() as database:
            database.execute(
                "INSERT INTO events (at, kind, body) VALUES (?,?,?)", (self._clock(), kind, json.dumps(body))
            )

    def events(self, after: int = 0) -> list[tuple[int, float, str, dict[str, Any]]]:
        """(id, unix time, kind, body) of every event after the given id."""
        with self._connection() as database:
            rows = database.execute(
                "SELECT id, at, kind, body FROM events WHERE id > ? ORDER BY id", (after,)
            ).fetchall()
        return [(row[0], row[1], row[2], json.loads(row[3])) for row in rows]

    # checkpoints

    def checkpoint_path(self, round_number: int) -> Path:
        return self.checkpoints / f"round-{round_number:06d}.safetensors"

    def completed_rounds(self) -> int:
        """Number of the last round with a checkpoint; 0 before the first."""
        rounds = [
            int(path.stem.removeprefix("round-")) for path in self.checkpoints.glob("round-*.safetensors")
        ]
        return max(rounds, default=0)


def coordinator_root(study_root: Path | None = None) -> Path:
    """Where coordinator studies live: beside ``study_root``, or under ``LACUNA_HOME``."""
    return study_root.parent if study_root is not None else lacuna_home() / "coordinator"
