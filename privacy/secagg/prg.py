"""Mask expansion: a 32-byte key becomes a stream of words that is added to a vector, chunk by chunk.

The stream is :class:`privacy.keystream.Keystream` (AES-256-CTR), little-endian words. A key expands once.

Each chunk of the vector takes all streams before the next one is touched, so that it stays in the processor's
cache, and the stream is written into one buffer that is used again. A long vector is cut into one range a
core; the ranges are expanded side by side, each from its own block of the same streams. Memory is one buffer
a core, whatever the length of the vector and the number of streams.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

from privacy.keystream import BLOCK_BYTES, SLACK_BYTES, Keystream

Words: TypeAlias = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]
IntVector: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

CHUNK_WORDS = 1 << 15
"""Words expanded at a time: 128 or 256 KiB, so that chunk and stream stay in the second-level cache."""

MIN_WORDS_PER_CORE = 1 << 22
"""Words times streams below which a further thread is not worth its start."""


def apply_streams(
    vector: Words, plus: Sequence[bytes], minus: Sequence[bytes], *, cores: int | None = None
) -> None:
    """Add the streams of ``plus`` and subtract those of ``minus``, modulo 2^32 or 2^64, in place.

    Args:
        vector: 1-D uint32 or uint64, changed in place.
        plus: 32-byte keys.
        minus: 32-byte keys.
        cores: Threads to use at most; all cores that this process may use if left out.
    """
    _expand(vector, plus, minus, source=None, cores=cores)


def masked_residues(
    vector: IntVector,
    modulus_bits: int,
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    *,
    cores: int | None = None,
) -> Words:
    """Residues of a 1-D int64 vector modulo 2^modulus_bits with all streams applied, in a fresh array.

    The same as encoding and :func:`apply_streams`, in one pass over memory.
    """
    if vector.dtype != np.dtype(np.int64) or vector.ndim != 1:
        raise ValueError("a vector to mask is one-dimensional and int64")
    masked: Words = np.empty(len(vector), dtype=np.uint32 if modulus_bits == 32 else np.uint64)
    _expand(masked, plus, minus, source=vector, cores=cores)
    return masked


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _expand(
    vector: Words,
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    *,
    source: IntVector | None,
    cores: int | None,
) -> None:
    if vector.dtype not in (np.dtype(np.uint32), np.dtype(np.uint64)):
        raise ValueError("masks apply to uint32 or uint64 words")
    length, streams = len(vector), len(plus) + len(minus)
    worth = length * max(streams, 1) // MIN_WORDS_PER_CORE
    parts = max(1, min(usable_cores() if cores is None else cores, worth, length // CHUNK_WORDS))
    step = -(-length // (parts * CHUNK_WORDS)) * CHUNK_WORDS
    if parts == 1:
        _expand_range(vector, plus, minus, source, 0, length)
        return
    ranges = [(start, min(start + step, length)) for start in range(0, length, step)]
    with ThreadPoolExecutor(len(ranges), thread_name_prefix="masks") as pool:
        futures = [
            pool.submit(_expand_range, vector, plus, minus, source, start, stop) for start, stop in ranges
        ]
        for future in futures:
            future.result()


def _expand_range(
    vector: Words,
    plus: Sequence[bytes],
    minus: Sequence[bytes],
    source: IntVector | None,
    start: int,
    stop: int,
) -> None:
    """One thread's part. ``start`` is a multiple of CHUNK_WORDS, hence of a block."""
    width = vector.dtype.itemsize
    first_block = start * width // BLOCK_BYTES
    signed: list[tuple[bytes, np.ufunc]] = [(key, np.add) for key in plus]
    signed += [(key, np.subtract) for key in minus]
    streams = [(Keystream(key, first_block=first_block), operation) for key, operation in signed]
    chunk_words = min(CHUNK_WORDS, stop - start)
    buffer = bytearray(chunk_words * width + SLACK_BYTES)
    words = np.frombuffer(buffer, dtype=f"<u{width}", count=chunk_words)
    for begin in range(start, stop, CHUNK_WORDS):
        chunk = vector[begin : min(begin + CHUNK_WORDS, stop)]
        if source is not None:
            np.copyto(chunk, source[begin : begin + len(chunk)], casting="unsafe")
        stream_words = words[: len(chunk)]
        for stream, operation in streams:
            stream.fill(buffer, len(chunk) * width)
            operation(chunk, stream_words, out=chunk)
