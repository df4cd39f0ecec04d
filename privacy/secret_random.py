"""Randomness that must stay secret, with a type of its own.

Noise, Poisson coins, timesteps' draws, keys and masks of a hospital are secret: whoever knows them can
subtract them. They are drawn from the operating system's generator, stretched by AES-256-CTR
(:mod:`privacy.keystream`). Functions that need them take a :class:`SecretRandom`, so that a seeded
generator of numpy or torch cannot be passed by mistake. There is no seed argument on purpose.
"""

from __future__ import annotations

import os

import numpy as np

from privacy.keystream import KEY_BYTES, Keystream

_REKEY_BYTES = 1 << 34


class SecretRandom:
    """A stream of secret random numbers, keyed from ``os.urandom``. Not thread safe, not picklable.

    The stream does not survive a fork: a child that inherited it would draw the parent's noise again, so
    a read in another process than the one that made it starts a new key.
    """

    def __init__(self) -> None:
        self._rekey()

    def __repr__(self) -> str:
        return "SecretRandom(<redacted>)"

    def __reduce__(self) -> str:
        raise TypeError("secret randomness is never serialised")

    def _fresh_key(self) -> bytes:
        return os.urandom(KEY_BYTES)

    def _rekey(self) -> None:
        self._stream = Keystream(self._fresh_key())
        self._left = _REKEY_BYTES
        self._process = os.getpid()

    def _reserve(self, size: int) -> None:
        if self._process != os.getpid() or size > self._left:
            self._rekey()
        self._left -= size

    def bytes(self, size: int) -> bytes:
        """``size`` uniform bytes."""
        self._reserve(size)
        return self._stream.read(size)

    def uint64(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
        """``count`` uniform 64-bit words."""
        self._reserve(8 * count)
        return self._stream.read_uint64(count)

    def uint32(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """``count`` uniform 32-bit words."""
        self._reserve(4 * count)
        return self._stream.read_uint32(count)

    def uniform(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """``count`` floats in [0, 1): multiples of 2^-53, each equally likely."""
        return (self.uint64(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def below(self, bound: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """``count`` uniform integers in [0, bound), bound at most 2^63, without modulo bias."""
        if not 1 <= bound <= 1 << 63:
            raise ValueError("bound must be 1 to 2^63")
        limit = (1 << 64) - (1 << 64) % bound
        result = np.empty(0, dtype=np.int64)
        while len(result) < count:
            words = self.uint64(count - len(result))
            if limit < 1 << 64:
                words = words[words < np.uint64(limit)]
            result = np.concatenate([result, (words % np.uint64(bound)).astype(np.int64)])
        return result

    def normal(self, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """``count`` standard normals (Box-Muller), for draws of diffusion noise.

        Not for noise that protects privacy: floating-point normals leak through their low bits
        (Mironov 2012). That noise is integer, see :mod:`privacy.dp.noise`.
        """
        half = (count + 1) // 2
        radius = np.sqrt(-2.0 * np.log(1.0 - self.uniform(half)))
        angle = 2.0 * np.pi * self.uniform(half)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
