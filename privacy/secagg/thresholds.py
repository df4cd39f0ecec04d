"""Public parameters of the protocol, derived from a threat model: n sites, c of them colluding.

With t > (n + c)/2 no server can collect t shares of *both* secrets of one site: honest sites answer once
per peer, so at most n - c honest shares exist over both kinds, and the c colluders give theirs twice:
(n - c) + 2c = n + c < 2t (Bonawitz et al., CCS 2017, section 6.2, with an active server).
"""

from __future__ import annotations

from dataclasses import dataclass

from shared.canonical import digest_json
from shared.errors import CoordinatorError
from shared.study_plan import StudyPlan

MIN_SITES = 3
MAX_SITES = 100
MODULUS_BITS = (32, 64)


class InvalidThresholdError(CoordinatorError):
    """The numbers of sites, colluders and the threshold do not fit together."""


@dataclass(frozen=True, kw_only=True)
class ProtocolParameters:
    """What every signature of the protocol covers, by hash.

    Raises:
        InvalidThresholdError: n is not 3 to 100, c not 1 to n - 1, t not in ((n + c)/2, n], or the
            modulus is neither 2^32 nor 2^64.
    """

    n_sites: int
    threshold: int
    max_colluding: int
    modulus_bits: int

    def __post_init__(self) -> None:
        n, t, c = self.n_sites, self.threshold, self.max_colluding
        if not MIN_SITES <= n <= MAX_SITES:
            raise InvalidThresholdError(
                f"secure aggregation is for {MIN_SITES} to {MAX_SITES} sites, not {n}"
            )
        if not 1 <= c < n:
            raise InvalidThresholdError(f"max_colluding is 1 to {n - 1}, not {c}")
        if not t <= n:
            raise InvalidThresholdError(f"threshold {t} is larger than the number of sites {n}")
        if not 2 * t > n + c:
            raise InvalidThresholdError(f"threshold {t} is not above (n + c)/2 = {(n + c) / 2:g}")
        if self.modulus_bits not in MODULUS_BITS:
            raise InvalidThresholdError(f"modulus_bits is 32 or 64, not {self.modulus_bits}")

    @classmethod
    def from_plan(cls, plan: StudyPlan) -> ProtocolParameters:
        """The plan's clause. Raises InvalidThresholdError (a plan may have 2 sites, the protocol not)."""
        clause = plan.secure_aggregation
        return cls(
            n_sites=plan.n_sites,
            threshold=clause.threshold,
            max_colluding=clause.max_colluding,
            modulus_bits=clause.modulus_bits,
        )

    @property
    def word_bytes(self) -> int:
        """Bytes of one coordinate of a masked vector: 4 or 8."""
        return self.modulus_bits // 8

    def digest(self) -> bytes:
        """32 bytes that stand for these parameters."""
        return digest_json(
            "lacuna/secagg/parameters/v1",
            {
                "n_sites": self.n_sites,
                "threshold": self.threshold,
                "max_colluding": self.max_colluding,
                "modulus_bits": self.modulus_bits,
            },
        )
