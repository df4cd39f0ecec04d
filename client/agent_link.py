"""The courier's end of the link to the agent: one frame out, one frame back.

Before it connects, the link checks that it was pointed at what it should be: a socket, by an absolute
and short path, owned by a uid that may be the agent's. That keeps a wrong or planted ``agent-socket``
from receiving a hospital's messages.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from shared.errors import MalformedMessageError, SiteError
from shared.wire import MAX_FRAME_BYTES, Envelope, decode, encode

METHOD = "/lacuna.Agent/Exchange"
CHUNK_BYTES = 1024 * 1024
MAX_CHUNK_BYTES = 4 * CHUNK_BYTES
MAX_SOCKET_PATH_BYTES = 100


class AgentUnreachableError(SiteError):
    """The agent is down, refuses the connection, or went away in the middle of an exchange."""


class AgentTimeoutError(SiteError):
    """The agent did not answer within the time that the message is worth."""


@dataclass(frozen=True, kw_only=True)
class UnixAddress:
    """The agent's socket. ``owner_uids``: who may own it; empty means the caller's own uid or root."""

    path: Path
    owner_uids: frozenset[int] = frozenset()

    def check(self) -> None:
        """Raises SiteError if the path is not one that may be used, AgentUnreachableError if missing."""
        if not self.path.is_absolute():
            raise SiteError(f"agent-socket {str(self.path)!r} is not an absolute path")
        length = len(os.fsencode(self.path))
        if length > MAX_SOCKET_PATH_BYTES:
            raise SiteError(f"agent-socket has {length} bytes; at most {MAX_SOCKET_PATH_BYTES} are allowed")
        try:
            found = self.path.lstat()
        except FileNotFoundError as error:
            raise AgentUnreachableError(
                f"there is no agent socket at {self.path}", remedy="start the agent: lacuna site serve"
            ) from error
        except OSError as error:
            raise SiteError(f"agent-socket {self.path} cannot be reached: {error.strerror}") from error
        if not stat.S_ISSOCK(found.st_mode):
            raise SiteError(f"agent-socket {self.path} is not a socket")
        allowed = self.owner_uids or frozenset({os.geteuid(), 0})
        if found.st_uid not in allowed:
            raise SiteError(
                f"agent-socket {self.path} belongs to uid {found.st_uid}, which is not an agent's",
                remedy="name the agent's uid: --node-config 'agent-uids=\"1234\"'",
            )


@dataclass(frozen=True, kw_only=True)
class TlsAddress:
    """``host:port`` with mutual TLS; all three files are PEM."""

    address: str
    authority: Path
    certificate: Path
    key: Path
    server_name: str | None = None

    def check(self) -> None:
        """Raises SiteError if a file is missing."""
        for path in (self.authority, self.certificate, self.key):
            if not path.is_file():
                raise SiteError(f"{path}, needed to reach the agent at {self.address}, is missing")


AgentAddress = UnixAddress | TlsAddress


def exchange(
    envelope: Envelope,
    address: AgentAddress,
    *,
    timeout_s: float,
    max_frame_bytes: int = MAX_FRAME_BYTES,
) -> Envelope:
    """Send one envelope to the agent and return its reply.

    Raises:
        SiteError: the address is not one that may be used.
        AgentUnreachableError, AgentTimeoutError: no reply.
        MalformedMessageError: the reply is not a frame, or too large.
    """
    address.check()
    frame = encode(envelope)
    with _channel(address) as channel:
        call = channel.stream_stream(METHOD)(_chunks(frame), timeout=timeout_s)
        received = bytearray()
        try:
            for chunk in call:
                if len(received) + len(chunk) > max_frame_bytes:
                    call.cancel()
                    raise MalformedMessageError(f"the agent's reply exceeds {max_frame_bytes} bytes")
                received += chunk
        except grpc.RpcError as error:
            raise _no_reply(error, address, timeout_s) from error
    return decode(bytes(received), max_bytes=max_frame_bytes)


def _chunks(frame: bytes) -> Iterator[bytes]:
    view = memoryview(frame)
    for start in range(0, len(view), CHUNK_BYTES):
        yield bytes(view[start : start + CHUNK_BYTES])


def _channel(address: AgentAddress) -> Any:
    options: list[tuple[str, int | str]] = [
        ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
        ("grpc.enable_retries", 0),
    ]
    if isinstance(address, UnixAddress):
        return grpc.insecure_channel(f"unix:{address.path}", options=options)
    credentials = grpc.ssl_channel_credentials(
        root_certificates=address.authority.read_bytes(),
        private_key=address.key.read_bytes(),
        certificate_chain=address.certificate.read_bytes(),
    )
    if address.server_name is not None:
        options.append(("grpc.ssl_target_name_override", address.server_name))
    return grpc.secure_channel(address.address, credentials, options=options)


def _no_reply(error: Any, address: AgentAddress, timeout_s: float) -> SiteError:
    where = address.path if isinstance(address, UnixAddress) else address.address
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return AgentTimeoutError(f"the agent at {where} did not answer within {timeout_s:.0f} s")
    return AgentUnreachableError(
        f"no reply from the agent at {where} ({error.code().name}: {str(error.details())[:200]})",
        remedy="is the agent running, and is this process's uid in its allow-list?",
    )
