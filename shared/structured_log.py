"""Events as JSON lines: for machines that collect logs, so without anything that a person is known by.

An event is a word and a few facts, of which only the names below are written, and only numbers and short
words from closed lists. What an error says in full, with paths and names, goes to the private log beside it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path

FACTS = frozenset({"round", "attempt", "reason", "purpose"})
WORD = re.compile(r"[a-z][a-z_ ]{0,63}")
MAX_BYTES = 8 * 2**20
KEPT = 4
EVENTS = "lacuna.events"


class EventFormatter(logging.Formatter):
    """``{"time": ..., "level": ..., "event": ..., facts}`` on one line; facts of other names are left out."""

    def format(self, record: logging.LogRecord) -> str:
        facts = getattr(record, "facts", {})
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.msg if WORD.fullmatch(str(record.msg)) else "event",
        }
        for name in sorted(FACTS & set(facts)):
            value = facts[name]
            if isinstance(value, int) or (isinstance(value, str) and WORD.fullmatch(value)):
                line[name] = value
        return json.dumps(line)


def log_events_to(path: Path) -> Callable[[], None]:
    """Write the events of this process to a private file that is rotated; what is returned ends that."""
    path.touch(mode=0o600, exist_ok=True)
    handler = RotatingFileHandler(path, maxBytes=MAX_BYTES, backupCount=KEPT, encoding="utf-8")
    handler.setFormatter(EventFormatter())
    logger = logging.getLogger(EVENTS)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def end() -> None:
        logger.removeHandler(handler)
        handler.close()

    return end
