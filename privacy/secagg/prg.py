"""Mask expansion: a 32-byte key becomes a stream of words that is added to a vector, chunk by chunk.

The stream is :class:`privacy.keystream.Keystream` (AES-256-CTR), little-endian words. A key expands once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from privacy.keystream import Keystream

Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]

CHUNK_WORDS = 1 << 18
"""Words expanded at a time: 1 or 2 MiB, so that a chunk stays in the processor's cache."""


def apply_streams(vector: Words, plus: Sequence[bytes], minus: Sequence[bytes]) -> None:
    """Add the streams of ``plus`` and subtract those of ``minus``, modulo 2^32 or 2^64, in place.

    Args:
        vector: 1-D uint32 or uint64, changed in place.
        plus: 32-byte keys.
        minus: 32-byte keys.
    """
    if vector.dtype not in (np.dtype(np.uint32), np.dtype(np.uint64)):
        raise ValueError("masks apply to uint32 or uint64 words")
    wide = vector.dtype == np.dtype(np.uint64)
    streams = [(Keystream(key), np.add) for key in plus] + [(Keystream(key), np.subtract) for key in minus]
    for start in range(0, len(vector), CHUNK_WORDS):
        chunk = vector[start : start + CHUNK_WORDS]
        for stream, operation in streams:
            words = stream.read_uint64(len(chunk)) if wide else stream.read_uint32(len(chunk))
            operation(chunk, words, out=chunk)
