"""What somebody can work out from masked vectors and shares: linear algebra over the masks still unknown.

A masked vector is y_i = x_i + s_i + sum over peers j of (+1 or -1) p_ij, with s_i the stream of i's mask seed
and p_ij the stream of the mask keys of i and j *under the terms that i uploaded on*. The streams are known
where t shares of the seed, or of one of the two mask keys, are known, and look random else (Shamir, PRG).
A combination of the y_i determines the same combination of the x_i exactly if its unknown streams cancel: it
is in the left null space of the matrix with a row for each vector and a column for each unknown stream.
Nothing else is assumed about survivor sets, conditions or signatures.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np

PRIME = 2_147_483_629
"""Entries of the matrix are -1, 0 and 1 and those of its null space 0 and 1: any large prime will do."""


@dataclass(frozen=True)
class Upload:
    """A masked vector that left a site: what it was masked with."""

    peers: tuple[str, ...]
    terms: bytes


@dataclass
class Knowledge:
    """Uploads seen and shares held in one attempt. ``holders`` counts each holder of a share once."""

    threshold: int
    uploads: dict[str, Upload] = field(default_factory=dict)
    holders: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """(owner, "seed" or "key") to the sites whose share of it is known."""

    def learn(self, holder: str, owner: str, kind: str) -> None:
        self.holders.setdefault((owner, kind), set()).add(holder)

    def reconstructed(self, kind: str) -> set[str]:
        """Owners of whom t shares of this secret are known."""
        return {
            owner
            for (owner, found), holders in self.holders.items()
            if found == kind and len(holders) >= self.threshold
        }

    def with_colluders(self, colluders: Collection[str], dealers: Mapping[str, Collection[str]]) -> Knowledge:
        """Add both shares that each dealer dealt to each colluder (``dealers``: dealer to recipients)."""
        holders = {key: set(value) for key, value in self.holders.items()}
        both = Knowledge(self.threshold, dict(self.uploads), holders)
        for dealer, recipients in dealers.items():
            for colluder in set(colluders) & set(recipients):
                both.learn(colluder, dealer, "seed")
                both.learn(colluder, dealer, "key")
        return both

    def sums(self, colluders: Collection[str] = ()) -> list[tuple[str, ...]]:
        """A basis of the sums of vectors that are determined, as tuples of the honest sites in each.

        Colluders know their own secrets and vectors, so their rows and streams fall away.
        """
        seeds, keys = self.reconstructed("seed"), self.reconstructed("key") | set(colluders)
        rows = [name for name in self.uploads if name not in colluders]
        unknown: list[dict[object, int]] = []
        for name in rows:
            upload = self.uploads[name]
            streams: dict[object, int] = {} if name in seeds else {("self", name): 1}
            for peer in upload.peers:
                if peer != name and not {peer, name} & keys:
                    sign = 1 if name < peer else -1
                    streams["pair", frozenset((peer, name)), upload.terms] = sign
            unknown.append(streams)
        columns = sorted({column for streams in unknown for column in streams}, key=repr)
        matrix = np.array([[row.get(column, 0) for column in columns] for row in unknown], dtype=np.int64)
        return [
            tuple(name for name, weight in zip(rows, combination, strict=True) if weight)
            for combination in left_null_space(matrix.reshape(len(rows), len(columns)))
        ]


def left_null_space(matrix: np.ndarray) -> list[list[int]]:
    """Reduced basis, modulo PRIME, of all row combinations of an integer matrix that give zero.

    Raises:
        AssertionError: basis vectors overlap, so that the smallest sum is not among them. Streams of pairs
            have two ends, so this cannot happen for uploads; it is checked all the same.
    """
    n_rows = matrix.shape[0]
    work = np.concatenate([matrix % PRIME, np.eye(n_rows, dtype=np.int64)], axis=1)
    rest = _eliminate(work, matrix.shape[1])
    basis = rest[:, matrix.shape[1] :]
    _eliminate(basis, n_rows)
    vectors = [row.tolist() for row in basis if row.any()]
    used = np.count_nonzero(np.array(vectors), axis=0) if vectors else np.zeros(n_rows)
    assert (used <= 1).all(), "overlapping sums"
    return vectors


def _eliminate(work: np.ndarray, n_columns: int) -> np.ndarray:
    """Gauss-Jordan in place on the first columns; the rows without a pivot are returned."""
    done = 0
    for column in range(n_columns):
        pivots = np.flatnonzero(work[done:, column])
        if not len(pivots):
            continue
        pivot = done + int(pivots[0])
        work[[done, pivot]] = work[[pivot, done]]
        work[done] = work[done] * pow(int(work[done, column]), -1, PRIME) % PRIME
        for row in np.flatnonzero(work[:, column]):
            if row != done:
                work[row] = (work[row] - work[row, column] * work[done]) % PRIME
        done += 1
        if done == len(work):
            break
    return work[done:]
