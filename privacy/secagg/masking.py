"""Signed integers as residues, residues as bytes, and the way back.

Rounding to the grid, clamping and noise belong to :mod:`privacy.dp`; here int64 vectors become residues
modulo 2^32 or 2^64. The sum over all sites is right if its every coordinate lies in
[-2^(bits-1), 2^(bits-1)); the plan's ranges see to that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np

from privacy.secagg.prg import IntVector, Words, apply_streams, masked_residues
from shared.wire import Blob

PIECE_BYTES = 2 * 1024 * 1024
"""A vector travels in pieces of this size (the last one shorter), so that nobody along the way has to hold
it twice in order to put it together."""

__all__ = [
    "PIECE_BYTES",
    "IntVector",
    "SignedVector",
    "Words",
    "add_pieces",
    "apply_streams",
    "centre",
    "from_bytes",
    "masked_residues",
    "to_pieces",
    "zeros",
]

SignedVector: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int32 | np.int64]]
"""A total of an attempt: int32 where the modulus is 2^32, int64 where it is 2^64."""

_NATIVE: dict[int, np.dtype[np.unsignedinteger]] = {32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
_WIRE: dict[int, np.dtype[np.unsignedinteger]] = {32: np.dtype("<u4"), 64: np.dtype("<u8")}


def zeros(length: int, modulus_bits: int) -> Words:
    """A residue vector of zeros."""
    return np.zeros(length, dtype=_NATIVE[modulus_bits])


def centre(residues: Words) -> SignedVector:
    """The representatives nearest to zero, in [-2^(bits-1), 2^(bits-1)): int32 or int64, the same memory."""
    return residues.view(np.int32 if residues.dtype == np.dtype(np.uint32) else np.int64)


def from_bytes(data: bytes, modulus_bits: int) -> Words:
    """A read-only view of little-endian bytes. Raises ValueError where the length does not fit."""
    return np.frombuffer(data, dtype=_WIRE[modulus_bits]).astype(_NATIVE[modulus_bits], copy=False)


def to_pieces(residues: Words) -> tuple[Blob, ...]:
    """Little-endian bytes in pieces of PIECE_BYTES: views of the vector on a little-endian machine."""
    data = residues.astype(_WIRE[residues.dtype.itemsize * 8], copy=False).view(np.uint8).data
    return tuple(data[start : start + PIECE_BYTES] for start in range(0, len(data), PIECE_BYTES))


def add_pieces(total: Words, pieces: Iterable[Blob]) -> None:
    """Add a vector in pieces to ``total``, in place. The sizes of the pieces add up to the vector's."""
    place = 0
    for piece in pieces:
        words = np.frombuffer(piece, dtype=_WIRE[total.dtype.itemsize * 8])
        target = total[place : place + len(words)]
        np.add(target, words, out=target)
        place += len(words)
