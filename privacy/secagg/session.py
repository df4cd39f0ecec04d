"""What every signature and every derived key of one attempt is bound to."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from privacy.secagg.thresholds import MAX_SITES, InvalidThresholdError, ProtocolParameters
from shared.canonical import digest
from shared.errors import MalformedMessageError
from shared.identity import VerifyKey

Purpose = Literal["train", "audit"]
PURPOSES: tuple[Purpose, ...] = ("train", "audit")
MAX_COUNTER = 2**31
"""Upper bound of round, attempt and vector length."""
SITE_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
RUN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
HEX_DIGEST = re.compile(r"[0-9a-f]{64}")


def word(value: int) -> bytes:
    """8 bytes, big-endian: how numbers enter signatures."""
    return value.to_bytes(8, "big")


@dataclass(frozen=True, kw_only=True)
class AttemptId:
    """Names one attempt: at most one key set and one upload of each site belong to it.

    ``study_digest`` is the plan's digest in hex; ``attempt`` grows over the whole study.

    Raises:
        MalformedMessageError: a field is of the wrong type or out of its bounds.
    """

    study_digest: str
    run_id: str
    round: int
    attempt: int
    purpose: Purpose
    vector_length: int

    def __post_init__(self) -> None:
        if not isinstance(self.study_digest, str) or not HEX_DIGEST.fullmatch(self.study_digest):
            raise MalformedMessageError("attempt: study_digest is 64 lower-case hex digits")
        if not isinstance(self.run_id, str) or not RUN_ID.fullmatch(self.run_id):
            raise MalformedMessageError("attempt: run_id is 1 to 64 of A-Z, a-z, 0-9, dot, _ and -")
        if self.purpose not in PURPOSES:
            raise MalformedMessageError("attempt: purpose is train or audit")
        for name in ("round", "attempt", "vector_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_COUNTER:
                raise MalformedMessageError(f"attempt: {name} is a whole number from 1 to {MAX_COUNTER}")

    def parts(self) -> tuple[bytes, ...]:
        return (
            bytes.fromhex(self.study_digest),
            self.run_id.encode(),
            word(self.round),
            word(self.attempt),
            self.purpose.encode(),
            word(self.vector_length),
        )


class Roster:
    """The sites of the signed plan, in its order; the order gives each its Shamir index.

    Raises:
        InvalidThresholdError: sites or keys stand twice, or their number is not that of the parameters.
    """

    def __init__(self, entries: Sequence[tuple[str, VerifyKey]], parameters: ProtocolParameters) -> None:
        self.site_ids = tuple(site_id for site_id, _ in entries)
        self._keys = dict(entries)
        self._positions = {site_id: position for position, site_id in enumerate(self.site_ids)}
        if len(self._keys) != len(entries) or len({key.raw for _, key in entries}) != len(entries):
            raise InvalidThresholdError("a site or an identity key stands twice in the roster")
        if len(entries) != parameters.n_sites or len(entries) > MAX_SITES:
            raise InvalidThresholdError(
                f"the roster has {len(entries)} sites, the parameters say {parameters.n_sites}"
            )
        parts = [part for site_id, key in entries for part in (site_id.encode(), key.raw)]
        self._digest = digest("lacuna/secagg/roster/v1", *parts)

    def __contains__(self, site_id: object) -> bool:
        return site_id in self._positions

    def key(self, site_id: str) -> VerifyKey:
        return self._keys[site_id]

    def position(self, site_id: str) -> int:
        """0-based place in the plan."""
        return self._positions[site_id]

    def shamir_index(self, site_id: str) -> int:
        """1-based x-coordinate of the site's shares; 0 would be the secret itself."""
        return self._positions[site_id] + 1

    def ordered(self, site_ids: Iterable[str]) -> tuple[str, ...]:
        """The given sites, each once, in the plan's order."""
        wanted = set(site_ids)
        return tuple(site_id for site_id in self.site_ids if site_id in wanted)

    def digest(self) -> bytes:
        """32 bytes over ids and keys, in order."""
        return self._digest


@dataclass(frozen=True, kw_only=True)
class Session:
    """One attempt under one roster and one set of parameters: the prefix of everything signed."""

    attempt: AttemptId
    roster: Roster
    parameters: ProtocolParameters

    @cached_property
    def _parts(self) -> tuple[bytes, ...]:
        return (*self.attempt.parts(), self.roster.digest(), self.parameters.digest())

    def parts(self) -> tuple[bytes, ...]:
        return self._parts


def set_digest(site_ids: Sequence[str]) -> bytes:
    """32 bytes for an ordered list of sites."""
    return digest("lacuna/secagg/site-set/v1", *(site_id.encode() for site_id in site_ids))
