"""Keys: private files, never overwritten, never printed; signatures bound to their purpose."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from shared.errors import MalformedMessageError, SiteError
from shared.home import private_directory, write_private
from shared.identity import BadSignatureError, SigningKey, VerifyKey


def test_a_saved_key_is_private_and_comes_back(tmp_path: Path) -> None:
    key, path = SigningKey.generate(), tmp_path / "identity.key"
    key.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path).verify_key == key.verify_key


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    SigningKey.generate().save(path)
    before = path.read_bytes()
    with pytest.raises(SiteError, match="never overwritten"):
        SigningKey.generate().save(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o666])
def test_a_key_that_others_can_read_is_not_used(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "identity.key"
    SigningKey.generate().save(path)
    path.chmod(mode)
    with pytest.raises(SiteError, match="other users") as caught:
        SigningKey.load(path)
    assert f"chmod 600 {path}" in caught.value.diagnostics()


def test_files_that_are_no_ed25519_key_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with pytest.raises(SiteError, match="cannot be read"):
        SigningKey.load(path)
    write_private(path, b"not a key")
    with pytest.raises(SiteError, match="not a PEM"):
        SigningKey.load(path)
    other = X25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_private(path, other)
    with pytest.raises(SiteError, match="another kind"):
        SigningKey.load(path)


def test_no_repr_shows_the_private_key(tmp_path: Path) -> None:
    key, path = SigningKey.generate(), tmp_path / "identity.key"
    key.save(path)
    private = serialization.load_pem_private_key(path.read_bytes(), password=None)
    raw = private.private_bytes(
        serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
    )
    assert "redacted" in repr(key)
    for shown in (repr(key), str(key), f"{key}", repr([key])):
        assert raw.hex() not in shown
        assert raw.hex()[:12] not in shown


def test_a_signature_counts_for_its_purpose_and_parts_alone() -> None:
    key = SigningKey.generate()
    signature = key.sign("lacuna/a/v1", b"x", b"yz")
    key.verify_key.verify(signature, "lacuna/a/v1", b"x", b"yz")
    for domain, parts in (
        ("lacuna/b/v1", (b"x", b"yz")),
        ("lacuna/a/v1", (b"xy", b"z")),
        ("lacuna/a/v1", (b"x",)),
    ):
        with pytest.raises(BadSignatureError):
            key.verify_key.verify(signature, domain, *parts)
    with pytest.raises(BadSignatureError):
        SigningKey.generate().verify_key.verify(signature, "lacuna/a/v1", b"x", b"yz")
    for broken in (b"", signature[:-1], bytes(64), signature + b"x"):
        with pytest.raises(BadSignatureError):
            key.verify_key.verify(broken, "lacuna/a/v1", b"x", b"yz")


@pytest.mark.parametrize("text", ["", "zz", "AB" * 32, "ab" * 31, "ab" * 33, "ab " * 32, "ab" * 32 + "\n"])
def test_public_keys_have_one_spelling(text: str) -> None:
    with pytest.raises(MalformedMessageError):
        VerifyKey.from_hex(text)


def test_fingerprints_are_read_in_groups_and_differ() -> None:
    first, second = (SigningKey.generate().verify_key.fingerprint for _ in range(2))
    assert first != second
    assert first.startswith("SHA256:")
    assert [len(group) for group in first.removeprefix("SHA256:").split("-")] == [4] * 16


def test_state_directories_are_closed_to_others(tmp_path: Path) -> None:
    made = private_directory(tmp_path / "a" / "b")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o750)
    with pytest.raises(SiteError, match="open to other users"):
        private_directory(made)
    (tmp_path / "file").touch()
    with pytest.raises(SiteError, match="cannot be made"):
        private_directory(tmp_path / "file" / "below")


def test_private_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_private(path, b"first, and longer")
    write_private(path, b"second")
    assert path.read_bytes() == b"second"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
