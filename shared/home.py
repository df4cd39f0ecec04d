"""Where state lives: ``LACUNA_HOME`` (default ``~/.lacuna``), private to its user."""

from __future__ import annotations

import os
from pathlib import Path

from shared.errors import SiteError


def lacuna_home() -> Path:
    """The directory that ``LACUNA_HOME`` names, or ``~/.lacuna``."""
    return Path(os.environ.get("LACUNA_HOME") or Path.home() / ".lacuna").expanduser().resolve()


def private_directory(path: Path) -> Path:
    """Make a directory with mode 0700; missing parents are made too, as the umask says.

    Raises:
        SiteError: it cannot be made, or others may enter it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.stat().st_mode & 0o077:
            raise SiteError(f"directory {path} is open to other users", remedy=f"chmod 700 {path}")
    except OSError as error:
        raise SiteError(f"directory {path} cannot be made: {error.strerror}") from error
    return path


def write_private(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file atomically with mode 0600; unless told otherwise, it survives a power failure."""
    temporary = path.with_name(path.name + ".part")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    temporary.replace(path)
    if not durable:
        return
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
