"""What a site keeps of its own part in an audit attempt, and what it holds a verdict request against.

What is refused outwardly depends on public things alone: run, contributors, what was signed before. Whether
the pooled counts can contain this site's own vector is told to the hospital's own people and to nobody else.
As a refusal it would be an oracle: a coordinator that asks with chosen counts would read this site's vector
under its one share of noise, where what is charged is the noise of all shares together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from privacy.audit.counts import CountsLayout, pooled_noise_std
from shared.canonical import canonical_json, parse_json
from shared.errors import MalformedMessageError
from shared.home import write_private
from shared.study_plan import StudyPlan

PART_FILE = "audit-part.json"
"""In the study's folder, private: the noised vector of one site alone is in it."""

FALSE_ALARM = 1e-9
"""Probability that :meth:`AuditPart.missing_cells` names a cell of honest counts."""


@dataclass(frozen=True, kw_only=True, repr=False)
class AuditPart:
    """One audit attempt at one site. The repr hides the vector.

    Attributes:
        attempt, run_id: Of the attempt.
        peers: P, the sites that masked with one another.
        survivors: U, the one set that this site revealed shares for; None if it was never asked.
        vector: What this site put in: its counts with its share of noise.
        signed: (survivors, pooled counts) that it signed a verdict on; None before that.
    """

    attempt: int
    run_id: str
    peers: tuple[str, ...]
    survivors: tuple[str, ...] | None = None
    vector: tuple[int, ...]
    signed: tuple[tuple[str, ...], tuple[int, ...]] | None = None

    def __repr__(self) -> str:
        return f"AuditPart(attempt={self.attempt}, <private>)"

    def refusal(
        self, *, run_id: str, survivors: Sequence[str], pooled_counts: Sequence[int]
    ) -> tuple[str, str] | None:
        """Reason and words why no verdict is signed on these counts; None where one may be.

        Depends on public things alone.
        """
        if run_id != self.run_id:
            return "candidate_not_audited", "this site audited in another run"
        if self.survivors is None:
            known = len(set(survivors)) == len(survivors) and set(survivors) <= set(self.peers)
        else:
            known = sorted(survivors) == sorted(self.survivors)
        if not known:
            return "other_survivors", "the sum was opened over other sites than the request names"
        if self.signed is not None and self.signed != (tuple(survivors), tuple(pooled_counts)):
            return "other_counts_signed", "this site signed other counts of this attempt"
        return None

    def missing_cells(self, plan: StudyPlan, *, site_id: str) -> tuple[str, ...]:
        """Cells in which the signed counts cannot contain this site's own part, by name. Private.

        What the others put in is at least zero, up to their noise: a cell that lies further below this site's
        own is not of the sum, but with probability :data:`FALSE_ALARM` for all cells together (discrete
        Gaussian noise is sub-Gaussian with its own variance: Canonne, Kamath and Steinke, NeurIPS 2020).
        """
        if self.signed is None or site_id not in self.signed[0]:
            return ()
        survivors, counts = self.signed
        names = CountsLayout.from_plan(plan).names
        others = pooled_noise_std(plan, len(survivors) - 1)
        slack = others * math.sqrt(2.0 * math.log(len(names) / FALSE_ALARM))
        return tuple(
            name
            for name, pooled, own in zip(names, counts, self.vector, strict=True)
            if pooled - own < -slack
        )

    def with_survivors(self, survivors: Sequence[str]) -> AuditPart:
        return replace(self, survivors=tuple(survivors))

    def with_signed(self, survivors: Sequence[str], counts: Sequence[int]) -> AuditPart:
        return replace(self, signed=(tuple(survivors), tuple(counts)))

    def save(self, directory: Path) -> None:
        """Durable before what depends on it leaves the site."""
        signed = None if self.signed is None else [list(self.signed[0]), list(self.signed[1])]
        value = {
            "format": "lacuna/audit-part/v1",
            "attempt": self.attempt,
            "run_id": self.run_id,
            "peers": list(self.peers),
            "survivors": None if self.survivors is None else list(self.survivors),
            "vector": list(self.vector),
            "signed": signed,
        }
        write_private(directory / PART_FILE, canonical_json(value))

    @classmethod
    def of_upload(
        cls, *, attempt: int, run_id: str, peers: Sequence[str], vector: NDArray[np.int64]
    ) -> AuditPart:
        """When the masked vector is about to leave."""
        return cls(
            attempt=attempt, run_id=run_id, peers=tuple(peers), vector=tuple(int(cell) for cell in vector)
        )

    @classmethod
    def load(cls, directory: Path) -> AuditPart | None:
        """The last audit's; None where there is none. Raises MalformedMessageError."""
        path = directory / PART_FILE
        if not path.exists():
            return None
        value: Any = parse_json(path.read_bytes(), what=PART_FILE)
        try:
            survivors, signed = value["survivors"], value["signed"]
            return cls(
                attempt=int(value["attempt"]),
                run_id=str(value["run_id"]),
                peers=tuple(map(str, value["peers"])),
                survivors=None if survivors is None else tuple(map(str, survivors)),
                vector=tuple(map(int, value["vector"])),
                signed=None if signed is None else (tuple(map(str, signed[0])), tuple(map(int, signed[1]))),
            )
        except (KeyError, TypeError, ValueError, IndexError):
            raise MalformedMessageError(
                f"{PART_FILE} is not of the form that Lacuna writes", remedy="run the audit again"
            ) from None
