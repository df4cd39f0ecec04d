"""A copy of the coordinator's folder from which a lost machine is restored, made while a study runs.

Databases are copied by SQLite's own backup, so a copy is never torn. They come before the checkpoints: a
checkpoint that the copied database does not know yet is found on disk by the next run
(:meth:`server.study_store.StudyStore.void_leftovers`); the other way round a round would be missing.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

from shared.errors import CoordinatorError, UsageError

DATABASE, CHECKPOINT = ".sqlite", ".safetensors"
MARKER = ".lacuna-backup"
"""Empty file of a folder that is such a copy: nothing is ever taken out of another one."""

LEFT_OUT = ("-journal", "-wal", "-shm", ".lock", ".part", ".partial", ".new", MARKER)
"""Ends of names of files that mean nothing without a running process."""


def back_up(root: Path, target: Path) -> int:
    """Make ``target`` a copy of the coordinator's folder ``root``; files that are the same stay.

    A second call brings the copy up to date, and takes out what is no longer there. Keys are in it: the copy
    is as secret as the folder, and has mode 0700.

    Returns:
        How many files were written.

    Raises:
        CoordinatorError: there is no such folder.
        UsageError: the copy would lie in the folder, in one open to others or in one with other things in
            it, or cannot be written (an older one may be half new then).
    """
    if not root.is_dir():
        raise CoordinatorError(f"there is nothing to back up in {root}")
    if target.resolve().is_relative_to(root.resolve()):
        raise UsageError(
            f"the copy {target} would lie in the folder itself", remedy="name a folder on another disk"
        )
    written = 0
    try:
        target.mkdir(parents=True, exist_ok=True, mode=0o700)
        if target.stat().st_mode & 0o077:
            raise UsageError(f"{target} is open to other users", remedy=f"chmod 700 {target}")
        marker = target / MARKER
        if not marker.exists() and any(target.iterdir()):
            raise UsageError(
                f"{target} is not empty and is no earlier backup",
                remedy="name a new folder, or an earlier copy",
            )
        marker.touch(mode=0o600)
        names = sorted(_files(root), key=lambda name: (name.suffix != DATABASE, name))
        for name in names:
            _private_folders(target, name.parent)
            written += _copied(root / name, target / name)
        kept = set(names)
        for name in [name for name in _files(target) if name not in kept]:
            (target / name).unlink()
    except (OSError, sqlite3.Error) as error:
        raise UsageError(f"the backup {target} cannot be written: {error}") from error
    return written


def _private_folders(target: Path, below: Path) -> None:
    for folder in (*reversed(below.parents), below):
        (target / folder).mkdir(exist_ok=True, mode=0o700)


def _files(root: Path) -> Iterator[Path]:
    for path in root.rglob("*"):
        if path.is_file() and not path.is_symlink() and not path.name.endswith(LEFT_OUT):
            yield path.relative_to(root)


def _copied(source: Path, target: Path) -> bool:
    """Copy one file under a temporary name; whether it had to be. A file that is gone again is none."""
    draft = target.with_name(f"{target.name}.new")
    try:
        if source.suffix == DATABASE:
            draft.unlink(missing_ok=True)
            _copy_database(source, draft)
        else:
            found = source.stat()
            if target.exists():
                known = target.stat()
                if (known.st_size, known.st_mtime_ns) == (found.st_size, found.st_mtime_ns):
                    return False
            shutil.copy2(source, draft)
    except FileNotFoundError:
        return False
    draft.chmod(0o600)
    draft.replace(target)
    return True


def _copy_database(source: Path, target: Path) -> None:
    with (
        closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True, timeout=30)) as live,
        closing(sqlite3.connect(target)) as copy,
    ):
        live.backup(copy)
