"""Signed integers as residues, residues as bytes, and the way back.

Rounding to the grid, clamping and noise belong to :mod:`privacy.dp`; here int64 vectors become residues
modulo 2^32 or 2^64. The sum over all sites is right if its every coordinate lies in
[-2^(bits-1), 2^(bits-1)); the plan's ranges see to that.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

from privacy.secagg.prg import Words, apply_streams

IntVector: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

__all__ = ["IntVector", "Words", "apply_streams", "centre", "encode", "from_bytes", "to_bytes", "zeros"]

_NATIVE: dict[int, np.dtype[np.unsignedinteger]] = {32: np.dtype(np.uint32), 64: np.dtype(np.uint64)}
_WIRE: dict[int, np.dtype[np.unsignedinteger]] = {32: np.dtype("<u4"), 64: np.dtype("<u8")}


def zeros(length: int, modulus_bits: int) -> Words:
    """A residue vector of zeros."""
    return np.zeros(length, dtype=_NATIVE[modulus_bits])


def encode(vector: IntVector, modulus_bits: int) -> Words:
    """Residues (a fresh array) of a 1-D int64 vector modulo 2^modulus_bits."""
    if vector.dtype != np.dtype(np.int64) or vector.ndim != 1:
        raise ValueError("a vector to mask is one-dimensional and int64")
    return vector.astype(_NATIVE[modulus_bits])


def centre(residues: Words) -> IntVector:
    """The representatives nearest to zero, in [-2^(bits-1), 2^(bits-1)), as int64."""
    if residues.dtype == np.dtype(np.uint32):
        return residues.view(np.int32).astype(np.int64)
    return residues.view(np.int64).copy()


def to_bytes(residues: Words) -> bytes:
    """Little-endian bytes: 4 or 8 a coordinate."""
    return residues.astype(_WIRE[residues.dtype.itemsize * 8], copy=False).tobytes()


def from_bytes(data: bytes, modulus_bits: int) -> Words:
    """A read-only view of little-endian bytes. Raises ValueError where the length does not fit."""
    return np.frombuffer(data, dtype=_WIRE[modulus_bits]).astype(_NATIVE[modulus_bits], copy=False)
