"""Secret randomness: fresh keys, no bias, nothing to print, nothing inherited by a fork."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from privacy.keystream import Keystream
from privacy.secret_random import SecretRandom


def test_keystream_is_aes_ctr_whatever_the_reads() -> None:
    key = bytes(range(32))
    expected = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(3_000_000))
    stream = Keystream(key)
    pieces = [stream.read(size) for size in (1, 15, 17, 1 << 20, 5)]
    assert b"".join(pieces) == expected[: sum(map(len, pieces))]
    words = Keystream(key).read_uint32(700_001)
    assert words.tobytes() == expected[: 4 * 700_001]
    assert Keystream(key).read_uint64(3).tobytes() == expected[:24]


def test_two_sources_differ() -> None:
    """False-failure probability 2^-2048."""
    assert SecretRandom().bytes(256) != SecretRandom().bytes(256)


def test_below_is_uniform() -> None:
    """Chi-square with 6 degrees of freedom at 70,000 draws; false-failure probability below 1e-6."""
    counts = np.bincount(SecretRandom().below(7, 70_000), minlength=7)
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 38.3


def test_normal_moments() -> None:
    """Mean and variance of 200,000 draws within 5 standard errors each (probability below 1.2e-6)."""
    draws = SecretRandom().normal(200_001)
    assert abs(draws.mean()) < 5 / 200_001**0.5
    assert abs(draws.var() - 1) < 5 * (2 / 200_001) ** 0.5


def test_nothing_is_shown_or_serialised() -> None:
    secret = SecretRandom()
    assert "redacted" in repr(secret)
    assert "redacted" in repr(Keystream(bytes(32)))
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_a_fork_does_not_inherit_the_stream() -> None:
    secret = SecretRandom()
    secret.bytes(1)
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write_end, secret.bytes(32))
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read_end, 32) != secret.bytes(32)
