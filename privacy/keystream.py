"""AES-256-CTR keystream: the one stream cipher behind masks and secret randomness.

Source: NIST SP 800-38A, section 6.5 (CTR mode). The counter block is 128 bits, so a stream repeats after
2^132 bits; a stream of n blocks is distinguishable from random with advantage about n^2 / 2^129 (the
PRP/PRF switching bound), below 2^-60 for the largest streams used here (2^34 bytes).
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_BYTES = 32
BLOCK_BYTES = 16
SLACK_BYTES = BLOCK_BYTES - 1
"""What ``cryptography`` wants behind the bytes that it writes."""

_ZERO_CHUNK_BYTES = 1 << 20
_ZEROS = memoryview(bytes(_ZERO_CHUNK_BYTES))


class Keystream:
    """A cursor over the keystream of one 32-byte key. Its repr never shows the key.

    A key must serve one purpose only and one stream only: the stream starts at block 0. Several cursors may
    stand at different blocks of the same stream, so that threads expand parts of it side by side.

    Args:
        key: 32 bytes.
        first_block: 16-byte block of the stream that the cursor starts at.
    """

    def __init__(self, key: bytes, *, first_block: int = 0) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError("an AES-256 key has 32 bytes")
        counter = first_block.to_bytes(BLOCK_BYTES, "big")
        self._encryptor = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

    def __repr__(self) -> str:
        return "Keystream(<redacted>)"

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        output = bytearray(size + SLACK_BYTES)
        self.fill(output, size)
        return bytes(memoryview(output)[:size])

    def read_uint32(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """The next ``count`` little-endian 32-bit words."""
        return self._read_words(count, np.dtype("<u4")).astype(np.uint32, copy=False)

    def read_uint64(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """The next ``count`` little-endian 64-bit words."""
        return self._read_words(count, np.dtype("<u8")).astype(np.uint64, copy=False)

    def fill(self, output: bytearray, size: int) -> None:
        """Write the next ``size`` bytes to the front of ``output``, which has SLACK_BYTES more at least.

        The interpreter's lock is released meanwhile. The slack may be overwritten.
        """
        if size <= _ZERO_CHUNK_BYTES:
            self._encryptor.update_into(_ZEROS[:size], output)
            return
        view = memoryview(output)
        for start in range(0, size, _ZERO_CHUNK_BYTES):
            stop = min(start + _ZERO_CHUNK_BYTES, size)
            self._encryptor.update_into(_ZEROS[: stop - start], view[start : stop + SLACK_BYTES])

    def _read_words(self, count: int, dtype: np.dtype[np.unsignedinteger]) -> np.ndarray:
        size = count * dtype.itemsize
        output = bytearray(size + SLACK_BYTES)
        self.fill(output, size)
        return np.frombuffer(output, dtype=dtype, count=count)
