"""Named points of a site's round at which its process can be made to die.

Nothing of this is in the product: functions are wrapped from outside, here and in the test's own child
process (``crash_agent.py``). The SQLite connection is a subclass, so that a crash can come between two
statements of one transaction.
"""

from __future__ import annotations

import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from agent_trio import WatchedWorkbench

from privacy import ledger_files
from privacy.ledger import Ledger
from privacy.secagg.site_rounds import SiteSecureAggregation

STATEMENTS = {"BEGIN IMMEDIATE": "begin", "INSERT INTO entries": "insert", "COMMIT": "commit"}

CALLS: dict[str, tuple[Any, str]] = {
    "register": (Ledger, "register_attempt"),
    "keys": (SiteSecureAggregation, "advertise"),
    "peer-heads": (Ledger, "record_peer_heads"),
    "shares": (SiteSecureAggregation, "share"),
    "check": (SiteSecureAggregation, "check_upload"),
    "reserve": (Ledger, "reserve"),
    "train": (WatchedWorkbench, "training_vector"),
    "count": (WatchedWorkbench, "audit_vector"),
    "mask": (SiteSecureAggregation, "upload"),
    "release": (SiteSecureAggregation, "unmask"),
    "witness": (Ledger, "_write_witness"),
    "witness-sync": (os, "fsync"),
    "witness-rename": (Path, "replace"),
    "directory-sync": (ledger_files, "sync_directory"),
}

POINTS: tuple[str, ...] = (
    *(f"{side}-{name}" for name in (*STATEMENTS.values(), *CALLS) for side in ("before", "after")),
    "before-answer",
    "mid-answer",
    "after-answer",
)
"""Answers hold the keys, the shares, the masked upload or the released shares, or two of them at once."""


class CrashPoints:
    """Counts passages while :meth:`watching`; calls ``die`` at the armed passage of the armed point."""

    def __init__(self) -> None:
        self.die: Callable[[], None] = _nobody_dies
        self._armed: tuple[str, int] | None = None
        self._watching = False
        self.passed: Counter[str] = Counter()

    def arm(self, point: str, passage: int) -> None:
        assert point in POINTS
        self._armed, self.passed = (point, passage), Counter()

    def disarm(self) -> None:
        self._armed = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._watching = True
        try:
            yield
        finally:
            self._watching = False

    def reach(self, point: str) -> None:
        if not self._watching:
            return
        self.passed[point] += 1
        if self._armed == (point, self.passed[point]):
            self._armed = None
            self.die()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Wrap everything that has a name."""
        patches = [
            mock.patch.object(owner, attribute, self._wrapped(name, getattr(owner, attribute)))
            for name, (owner, attribute) in CALLS.items()
        ]
        patches.append(mock.patch("privacy.ledger.connect", self._connect(ledger_files.connect)))
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in reversed(patches):
                patch.stop()

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.reach(f"before-{name}")
            result = real(*arguments, **options)
            self.reach(f"after-{name}")
            return result

        return call

    def _connect(self, real: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        points = self

        class Connection(sqlite3.Connection):
            def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
                name = next((n for start, n in STATEMENTS.items() if sql.startswith(start)), None)
                if name is None:
                    return super().execute(sql, *parameters)
                points.reach(f"before-{name}")
                cursor = super().execute(sql, *parameters)
                points.reach(f"after-{name}")
                return cursor

        def connect(*arguments: Any, **options: Any) -> sqlite3.Connection:
            with mock.patch.object(sqlite3, "connect", partial(sqlite3.connect, factory=Connection)):
                return real(*arguments, **options)

        return connect


def _nobody_dies() -> None:
    raise AssertionError("a point was armed, and nothing was said about how to die")


@contextmanager
def charging_after_the_answer(points: CrashPoints) -> Iterator[None]:
    """Broken on purpose: a site that charges when its answer has left."""
    late: list[Callable[[], object]] = []
    reserve, reach = Ledger.reserve, points.reach

    def later(self: Ledger, *arguments: Any, **options: Any) -> Any:
        late.append(lambda: reserve(self, *arguments, **options))
        return self.head()

    def reached(point: str) -> None:
        reach(point)
        if point == "after-answer":
            while late:
                late.pop()()

    with mock.patch.object(Ledger, "reserve", later), mock.patch.object(points, "reach", reached):
        yield
