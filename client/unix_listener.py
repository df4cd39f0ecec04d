"""A unix socket that only the right people can reach, and who is at its other end.

The socket's directory must not be writable by others: whoever can rename in it can put a socket of his
own in its place. A socket left over by a dead agent is replaced; one on which somebody listens is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import pwd
import shutil
import socket
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from shared.errors import SiteError

MAX_SOCKET_PATH_BYTES = 100
"""The kernel takes 107; a short rest is left for the names that are prepared beside the socket."""

MAX_BACKLOG = 16


@dataclass(frozen=True, kw_only=True)
class PeerCredentials:
    """``SO_PEERCRED``: the process at the other end when it connected."""

    pid: int
    uid: int
    gid: int


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Ask the kernel who connected. Ids are seen from this process's user namespace."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return PeerCredentials(pid=pid, uid=uid & 0xFFFFFFFF, gid=gid & 0xFFFFFFFF)


class UnixListener:
    """A listening socket at ``path``: mode 0660 with the given group, else 0600.

    A directory that is missing is made, with mode 0750 and the group, else 0700. The socket is prepared
    under another name and moved into place, so nobody can connect before its mode is right. A lock file
    beside it keeps a second agent out.

    Raises:
        SiteError: a path that is relative or too long, a directory that others can write to, a file of
            another kind or owner at the path, or an agent that listens there already.
    """

    def __init__(self, path: Path, *, group: str | int | None = None) -> None:
        self.path = path
        if not path.is_absolute():
            raise SiteError(f"the agent's socket path {path} is not absolute")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise SiteError(
                f"the agent's socket path has {len(os.fsencode(path))} bytes: {path}",
                remedy=f"choose at most {MAX_SOCKET_PATH_BYTES} bytes, such as /run/lacuna/NAME.sock",
            )
        gid = _group_id(group)
        try:
            _prepare_directory(path.parent, gid)
            self._lock = _lock(path.with_name(f".{path.name}.lock"))
        except OSError as error:
            raise SiteError(f"the agent's socket {path} cannot be made: {error.strerror}") from error
        try:
            _remove_stale(path)
            self._socket = _bind(path, gid)
        except OSError as error:
            os.close(self._lock)
            raise SiteError(f"the agent's socket {path} cannot be made: {error.strerror}") from error
        except SiteError:
            os.close(self._lock)
            raise
        self._private = path.with_name(f".{path.name}.d")
        self._closed = False

    def private_directory(self) -> Path:
        """A directory 0700 beside the socket, empty, for this agent alone; :meth:`release` removes it."""
        directory = self._private
        if directory.is_symlink() or (directory.exists() and directory.lstat().st_uid != os.geteuid()):
            raise SiteError(f"{directory} is not the agent's own; remove it")
        shutil.rmtree(directory, ignore_errors=True)
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise SiteError(f"{directory} cannot be made: {error.strerror}") from error
        return directory

    def accept(self) -> socket.socket | None:
        """The next connection, or None once the listener is closed."""
        while not self._closed:
            try:
                return self._socket.accept()[0]
            except OSError:
                if self._closed:
                    return None
        return None

    def close(self) -> None:
        """Stop listening and remove the socket."""
        if self._closed:
            return
        self._closed = True
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def release(self) -> None:
        """Close, and give up the place: another agent may listen here from now on."""
        self.close()
        if self._lock >= 0:
            shutil.rmtree(self._private, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def user_id(user: str) -> int:
    """The uid of a user. Raises SiteError: there is no such user."""
    try:
        return pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise SiteError(f"there is no user {user!r}", remedy=f"useradd --system {user}") from error


def _group_id(group: str | int | None) -> int | None:
    if group is None or isinstance(group, int):
        return group
    if group.isdigit():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise SiteError(
            f"there is no group {group!r}", remedy=f"groupadd --system {group}, or name another group"
        ) from error


def _prepare_directory(directory: Path, gid: int | None) -> None:
    try:
        directory.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        found = directory.stat()
        if found.st_uid not in (os.geteuid(), 0) or not stat.S_ISDIR(found.st_mode):
            raise SiteError(
                f"the socket's directory {directory} belongs to uid {found.st_uid}, not to the agent"
            ) from None
        if found.st_mode & 0o022:
            raise SiteError(
                f"others can write to the socket's directory {directory}",
                remedy=f"chmod go-w {directory}, or choose a directory of the agent's own",
            ) from None
        return
    if gid is not None:
        os.chown(directory, -1, gid)
        directory.chmod(0o750)


def _lock(path: Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise SiteError(
            f"another agent holds {path}", remedy="stop it first, or choose another socket path"
        ) from None
    return descriptor


def _remove_stale(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise SiteError(f"{path} exists and is not a socket; it is left alone")
    if found.st_uid != os.geteuid():
        raise SiteError(f"the socket {path} belongs to uid {found.st_uid}; it is left alone")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise SiteError(f"somebody listens on {path} already", remedy="stop that process first")


def _bind(path: Path, gid: int | None) -> socket.socket:
    prepared = path.with_name(f"{path.name}.new")
    prepared.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(prepared))
        # Not listening yet: whoever connects between bind and chmod is refused by the kernel.
        if gid is None:
            prepared.chmod(0o600)
        else:
            os.chown(prepared, -1, gid)
            prepared.chmod(0o660)
        listener.listen(MAX_BACKLOG)
        prepared.rename(path)
    except OSError:
        listener.close()
        prepared.unlink(missing_ok=True)
        raise
    return listener
