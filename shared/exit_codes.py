"""Exit codes of every ``lacuna`` command. They are public: scripts depend on them."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """What a finished command tells its caller, by who has to act next."""

    DONE = 0
    USAGE = 2
    SITE_MUST_ACT = 10
    COORDINATOR_MUST_ACT = 20
    PEER_MISBEHAVED = 30
    REFUSED = 40
    BUG = 70
