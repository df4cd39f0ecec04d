"""Flower's SuperLink with more patience for its database: ``python -m deploy.superlink``.

SQLite lets one write at a time, in no order: who finds it locked sleeps up to 0.1 s and tries again. Flower
1.41 gives up after 5 s and answers with HTTP 500, which its own ServerApp and SuperExec do not survive. While
sites upload large models the lock is hardly ever free: five sites with 10 million parameters ended a run this
way (``tests/benchmarks/load.md``). The time is fixed in Flower's source, so it is set here, before it starts.
"""

from __future__ import annotations

import sys

from shared.errors import CoordinatorError

BUSY_TIMEOUT_MS = 25_000
"""Below the 30 s after which Flower's clients give a request up."""


def patient_database() -> None:
    """Let every database connection that this process opens from now on wait for its turn.

    Raises:
        CoordinatorError: this version of Flower sets its databases up in another way.
    """
    from flwr.supercore import sql_mixin

    pragmas = dict(getattr(sql_mixin, "SQLITE_PRAGMAS", ()))
    if "busy_timeout" not in pragmas:
        raise CoordinatorError(
            "this version of Flower sets its database up in another way than 1.41",
            remedy="install flwr 1.41, with the versions of constraints.txt",
        )
    pragmas["busy_timeout"] = str(BUSY_TIMEOUT_MS)
    sql_mixin.SQLITE_PRAGMAS = tuple(pragmas.items())


def main() -> None:
    """``flower-superlink``, with its arguments."""
    from flwr.superlink.cli import flower_superlink

    try:
        patient_database()
    except CoordinatorError as error:
        sys.exit(f"{error.message}; {error.remedy}")
    flower_superlink()


if __name__ == "__main__":
    main()
