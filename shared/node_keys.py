"""Key pairs of Flower's SuperNodes: NIST P-384 in OpenSSH form, as its node authentication asks."""

from __future__ import annotations

import base64
import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from shared.errors import MalformedMessageError

MAX_NODE_KEY_BYTES = 1024


@dataclass(frozen=True, kw_only=True)
class NodeKey:
    """OpenSSH files of a SuperNode's key pair."""

    private: Path
    public: Path


def make_node_key(folder: Path, name: str) -> NodeKey:
    """A fresh key pair ``name`` (mode 0600) and ``name.pub``; an older one of that name is replaced."""
    key = ec.generate_private_key(ec.SECP384R1())
    pair = NodeKey(private=folder / name, public=folder / f"{name}.pub")
    pair.private.unlink(missing_ok=True)
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    with os.fdopen(os.open(pair.private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
    pair.public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    )
    return pair


def node_key_header(public: str) -> str:
    """The value of Flower's header ``flwr-public-key`` for an OpenSSH public key: base64 of its PEM.

    Raises:
        MalformedMessageError: not a P-384 key in OpenSSH form, on one line.
    """
    try:
        if len(public) > MAX_NODE_KEY_BYTES or "\n" in public.strip():
            raise ValueError
        key = serialization.load_ssh_public_key(public.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise MalformedMessageError("not a public key in OpenSSH form") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise MalformedMessageError("a SuperNode's key is a NIST P-384 key")
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return base64.b64encode(pem).decode()
