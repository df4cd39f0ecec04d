"""A seeded schedule of faults: what strikes which hospital in which round, and how hard. (No tests here.)

The same seed, rounds and sites give the same schedule, to the second; what the machine's pace makes of it
(which exchange is hit) differs from run to run.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

KILLED_AT_A_HOSPITAL = ("agent", "supernode", "courier process", "courier", "site perimeter")
KILLED_AT_THE_COORDINATOR = ("serverapp", "superexec", "superlink", "perimeter")
AT_A_HOSPITAL = (
    *(f"kill {name}" for name in KILLED_AT_A_HOSPITAL),
    "hospital loses power",
    "link cut",
    "link slow",
    "link lossy",
    "agent stalls",
    "supernode stalls",
    "disk full at a site",
    "clock ahead",
    "clock behind",
)
AT_THE_COORDINATOR = (
    *(f"kill {name}" for name in KILLED_AT_THE_COORDINATOR),
    "restart superlink",
    "restart perimeter",
    "disk full at the coordinator",
    "coordinator lost",
)
KINDS = (*AT_A_HOSPITAL, *AT_THE_COORDINATOR)

LASTS_S = {
    "hospital loses power": (5, 40),
    "link cut": (15, 45),
    "link slow": (20, 40),
    "link lossy": (20, 40),
    "agent stalls": (20, 60),
    "supernode stalls": (20, 80),
    "disk full at a site": (15, 30),
    "disk full at the coordinator": (10, 20),
    "clock ahead": (20, 60),
    "clock behind": (20, 60),
}
"""Seconds from the blow to its end; what is not named ends at once (and takes its time to be mended)."""

MINUTES_OFF = (2, 14)


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One blow.

    Args:
        round: Strikes while this round is being made.
        after_s: Seconds after the first attempt of that round was opened.
        kind: One of :data:`KINDS`.
        site: Position of the hospital; None for what is the coordinator's.
        lasts_s: Until it ends by itself; 0 where there is nothing to end.
        minutes_off: By how much a clock is wrong; negative: behind.
    """

    round: int
    after_s: float
    kind: str
    site: int | None = None
    lasts_s: float = 0.0
    minutes_off: int = 0

    def words(self) -> str:
        where = "" if self.site is None else f", hospital {self.site}"
        clock = f" by {abs(self.minutes_off)} min" if self.minutes_off else ""
        lasts = f" for {self.lasts_s:.0f} s" if self.lasts_s else ""
        return f"{self.kind}{clock}{where}{lasts}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def schedule(
    seed: int, *, rounds: int, sites: int, kinds: tuple[str, ...] = KINDS, every: int = 1
) -> tuple[Fault, ...]:
    """At least one fault of each kind, and at least one in every ``every``-th round but the first and last.

    Kinds are dealt from a shuffled pack; every kind comes before any comes again.
    """
    draw = random.Random(f"lacuna bad week {seed}")
    struck = list(range(2, rounds, every))
    count = max(len(kinds), len(struck))
    pack: list[str] = []
    dealt = []
    for _ in range(count):
        if not pack:
            pack = draw.sample(kinds, len(kinds))
        dealt.append(pack.pop())
    faults = []
    for i, kind in enumerate(dealt):
        low, high = LASTS_S.get(kind, (0, 0))
        off = draw.randint(*MINUTES_OFF) if kind.startswith("clock") else 0
        faults.append(
            Fault(
                round=struck[i * len(struck) // count],
                after_s=round(draw.uniform(0, 15), 1),
                kind=kind,
                site=draw.randrange(sites) if kind in AT_A_HOSPITAL else None,
                lasts_s=float(draw.randint(low, high)),
                minutes_off=-off if kind == "clock behind" else off,
            )
        )
    return tuple(sorted(faults, key=lambda fault: (fault.round, fault.after_s)))
