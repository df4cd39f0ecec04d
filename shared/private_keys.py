"""Private keys as files: PEM (PKCS #8), for their owner alone, never overwritten."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

from shared.errors import SiteError


def save_private_key(key: Ed25519PrivateKey | EllipticCurvePrivateKey, path: Path) -> None:
    """Write a key with mode 0600, durably. Raises SiteError if the file exists already."""
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise SiteError(f"{path} exists already; a key is never overwritten") from error
    with os.fdopen(descriptor, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())


def load_private_key(path: Path) -> PrivateKeyTypes:
    """Read an unencrypted key that only its owner can read.

    Raises:
        SiteError: missing, readable by others, or not such a key.
    """
    try:
        if path.stat().st_mode & 0o077:
            raise SiteError(f"private key {path} can be read by other users", remedy=f"chmod 600 {path}")
        return serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise SiteError(f"private key {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise SiteError(f"{path} is not a PEM private key") from error
