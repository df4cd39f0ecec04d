"""The agent's end of the link: who may speak to it, and how frames come in and go out.

One gRPC method, ``/lacuna.Agent/Exchange``, takes one frame (``shared/wire.py``) as a stream of chunks
and answers with one frame in the same way. No protocol buffers: the bytes are ours.

On a unix socket the peer's uid is checked with ``SO_PEERCRED``. gRPC for Python shows no file
descriptor, so a small front owns the public socket: it accepts, asks the kernel who is there, and only
then passes the bytes on to gRPC's own socket, which lies in a directory that nobody else can enter. The
front names its end of each inner connection after the peer, so that the handler knows whom it serves; a
connection that does not come from the front has no such name and is refused.

On TCP, mutual TLS takes the place of the uid: a client needs a certificate of the given authority, and
where fingerprints are pinned, one of those.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from client.unix_listener import MAX_SOCKET_PATH_BYTES, PeerCredentials, UnixListener, peer_credentials
from shared.errors import MalformedMessageError, SiteError
from shared.wire import MAX_FRAME_BYTES, Envelope, decode, encode

METHOD = "/lacuna.Agent/Exchange"
CHUNK_BYTES = 1024 * 1024
MAX_CHUNK_BYTES = 4 * CHUNK_BYTES
HEALTH = "health"
"""A request that is answered at once, by an envelope of the same kind without content."""

MAX_CONNECTIONS = 16
"""Connections that the front serves at once; a courier needs one, for one exchange."""

log = logging.getLogger("lacuna.agent")

__all__ = [
    "AgentPeer",
    "AgentServer",
    "MutualTls",
    "refused",
    "MAX_SOCKET_PATH_BYTES",
]


@dataclass(frozen=True, kw_only=True)
class AgentPeer:
    """Who sent a request: a local process, or the holder of a certificate."""

    uid: int | None = None
    pid: int | None = None
    certificate_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class MutualTls:
    """PEM files of the TCP alternative. ``pinned`` holds hex SHA-256 digests of client certificates."""

    certificate: Path
    key: Path
    client_authority: Path
    pinned: frozenset[str] = frozenset()


def refused(reason: str, message: str) -> Envelope:
    """The envelope that says no. ``reason`` is for programs, ``message`` for people."""
    return Envelope(kind="refused", body={"reason": reason, "message": message})


class AgentServer:
    """Serves one handler. A context manager; :meth:`start` and :meth:`stop` by hand do the same.

    The handler is called with one request at a time; a second one waits up to ``busy_wait_s`` and is
    then refused with reason ``busy``.

    Args:
        handle: ``handle(envelope, peer) -> envelope``. Should it raise all the same, the client is told
            ``internal_error`` and nothing else.
        max_frame_bytes: Bound on a request's size, in bytes.
        busy_wait_s: How long a second request waits for the first.

    Raises:
        SiteError: the address cannot be served; the message says why.
    """

    def __init__(
        self,
        handle: Callable[[Envelope, AgentPeer], Envelope],
        *,
        max_frame_bytes: int = MAX_FRAME_BYTES,
        busy_wait_s: float = 10.0,
    ) -> None:
        self._handle = handle
        self._max_frame_bytes = max_frame_bytes
        self._busy_wait_s = busy_wait_s
        self._turn = threading.Lock()
        self._pinned: frozenset[str] | None = None
        self._front: _Front | None = None
        self.port: int | None = None
        self._grpc = grpc.server(
            ThreadPoolExecutor(4, thread_name_prefix="agent-grpc"),
            maximum_concurrent_rpcs=4,
            options=[
                ("grpc.max_receive_message_length", MAX_CHUNK_BYTES),
                ("grpc.so_reuseport", 0),
            ],
        )
        self._grpc.add_generic_rpc_handlers((_Route(self._exchange),))

    def listen_unix(
        self, path: Path, *, allowed_uids: frozenset[int] | None = None, group: str | int | None = None
    ) -> None:
        """Serve on a unix socket, mode 0660 with ``group`` where one is given, else 0600.

        Args:
            path: Absolute, at most 100 bytes. See :class:`client.unix_listener.UnixListener`.
            allowed_uids: Who may speak to the agent; the agent's own uid by default.
            group: Group of the socket: the courier's.
        """
        uids = frozenset({os.geteuid()}) if allowed_uids is None else allowed_uids
        listener = UnixListener(path, group=group)
        try:
            inner_socket = listener.private_directory() / "g"
            if self._grpc.add_insecure_port(f"unix:{inner_socket}") == 0:
                raise RuntimeError("gRPC took no port")
        except (SiteError, RuntimeError) as error:
            listener.release()
            raise SiteError(f"the agent's inner socket cannot be made: {error}") from error
        self._front = _Front(listener, inner_socket, uids)

    def listen_tls(self, host: str, port: int, tls: MutualTls) -> int:
        """Serve on TCP with mutual TLS; port 0 takes a free one. Returns the port."""
        try:
            credentials = grpc.ssl_server_credentials(
                [(tls.key.read_bytes(), tls.certificate.read_bytes())],
                root_certificates=tls.client_authority.read_bytes(),
                require_client_auth=True,
            )
            bound = self._grpc.add_secure_port(f"{host}:{port}", credentials)
        except (OSError, RuntimeError, ValueError) as error:
            raise SiteError(f"the agent cannot listen on {host}:{port}: {error}") from error
        if bound == 0:
            raise SiteError(f"the agent cannot listen on {host}:{port}")
        self._pinned = tls.pinned
        self.port = int(bound)
        return self.port

    def start(self) -> None:
        self._grpc.start()
        if self._front is not None:
            self._front.start()

    def stop(self, *, grace_s: float = 1.0) -> None:
        """Refuse new requests, let the running one finish for ``grace_s``, remove the sockets."""
        if self._front is not None:
            self._front.close()
        self._grpc.stop(grace_s).wait()
        if self._front is not None:
            self._front.disconnect()
            self._front.release()

    def wait(self, timeout_s: float | None = None) -> None:
        """Block until the server is stopped."""
        self._grpc.wait_for_termination(timeout_s)

    def __enter__(self) -> AgentServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _exchange(self, chunks: Iterator[bytes], context: Any) -> Iterator[bytes]:
        reply = self._answer(chunks, context)
        frame = memoryview(encode(reply))
        for start in range(0, len(frame), CHUNK_BYTES):
            yield bytes(frame[start : start + CHUNK_BYTES])

    def _answer(self, chunks: Iterator[bytes], context: Any) -> Envelope:
        peer = self._peer(context)
        if peer is None:
            log.warning("refused a connection from %s: not an allowed peer", context.peer())
            return refused("peer_not_allowed", "this peer may not speak to the agent")
        received = bytearray()
        for chunk in chunks:
            if len(received) + len(chunk) > self._max_frame_bytes:
                return refused("too_large", f"a request has at most {self._max_frame_bytes} bytes")
            received += chunk
        try:
            request = decode(bytes(received), max_bytes=self._max_frame_bytes)
        except MalformedMessageError as error:
            return refused("malformed", str(error))
        del received
        if request.kind == HEALTH:
            # Says that the agent lives, and not whether it computes: how long it does depends on its data.
            return Envelope(HEALTH, {})
        if not self._turn.acquire(timeout=self._busy_wait_s):
            return refused("busy", "the agent is working on another request")
        try:
            return self._handle(request, peer)
        except Exception:
            log.exception("the handler raised on a request of kind %s", request.kind)
            return refused("internal_error", "the agent failed on this request; its own log says why")
        finally:
            self._turn.release()

    def _peer(self, context: Any) -> AgentPeer | None:
        if self._front is not None:
            credentials = self._front.peer(context.peer())
            return None if credentials is None else AgentPeer(uid=credentials.uid, pid=credentials.pid)
        pem = context.auth_context().get("x509_pem_cert")
        if not pem:
            return None
        der = x509.load_pem_x509_certificate(pem[0]).public_bytes(Encoding.DER)
        fingerprint = hashlib.sha256(der).hexdigest()
        if self._pinned and fingerprint not in self._pinned:
            return None
        return AgentPeer(certificate_sha256=fingerprint)


class _Route(grpc.GenericRpcHandler):  # type: ignore[misc]
    """gRPC's name for a table of methods: ours has one."""

    def __init__(self, exchange: Callable[[Iterator[bytes], Any], Iterator[bytes]]) -> None:
        self._method = grpc.stream_stream_rpc_method_handler(exchange)

    def service(self, handler_call_details: Any) -> Any:
        return self._method if handler_call_details.method == METHOD else None


class _Front:
    """Accepts on the public socket, checks the peer's uid, and joins it to gRPC's own socket."""

    def __init__(self, listener: UnixListener, inner: Path, allowed_uids: frozenset[int]) -> None:
        self._listener = listener
        self._inner = inner
        self._allowed_uids = allowed_uids
        self._peers: dict[str, PeerCredentials] = {}
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._slots = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._thread = threading.Thread(target=self._accept, name="agent-front", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._listener.close()

    def release(self) -> None:
        self._listener.release()

    def disconnect(self) -> None:
        with self._lock:
            sockets = list(self._sockets)
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def peer(self, grpc_name: str) -> PeerCredentials | None:
        """Whom the connection with this gRPC peer string serves; None if it did not come through here."""
        with self._lock:
            return self._peers.get(grpc_name.removeprefix("unix-abstract:"))

    def _accept(self) -> None:
        while (connection := self._listener.accept()) is not None:
            credentials = peer_credentials(connection)
            if credentials.uid not in self._allowed_uids:
                log.warning(
                    "refused uid %d (pid %d): not in the allow-list", credentials.uid, credentials.pid
                )
                connection.close()
            elif not self._slots.acquire(blocking=False):
                log.warning("refused pid %d: %d connections are open", credentials.pid, MAX_CONNECTIONS)
                connection.close()
            else:
                threading.Thread(target=self._serve, args=(connection, credentials), daemon=True).start()

    def _serve(self, outer: socket.socket, credentials: PeerCredentials) -> None:
        # An abstract name of 128 random bits; only this process can reach gRPC's socket with it.
        name = f"lacuna-{secrets.token_hex(16)}"
        inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with self._lock:
            self._peers[name] = credentials
            self._sockets |= {outer, inner}
        try:
            inner.bind(f"\0{name}")
            inner.connect(str(self._inner))
            back = threading.Thread(target=_copy, args=(inner, outer), daemon=True)
            back.start()
            _copy(outer, inner)
            back.join()
        except OSError as error:
            log.warning("a connection broke: %s", error)
        finally:
            with self._lock:
                del self._peers[name]
                self._sockets -= {outer, inner}
            outer.close()
            inner.close()
            self._slots.release()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(256 * 1024):
            target.sendall(data)
    except OSError:
        pass
    for end, how in ((target, socket.SHUT_WR), (source, socket.SHUT_RD)):
        with contextlib.suppress(OSError):
            end.shutdown(how)
