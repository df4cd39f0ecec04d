"""The link between courier and agent: who may speak, what fits, what happens when it breaks."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from client.agent_link import (
    AgentTimeoutError,
    AgentUnreachableError,
    TlsAddress,
    UnixAddress,
    exchange,
)
from client.agent_service import METHOD, AgentPeer, AgentServer, MutualTls
from client.unix_listener import UnixListener
from shared.errors import MalformedMessageError, SiteError
from shared.wire import Envelope

REPOSITORY = Path(__file__).parents[2]
NOBODY = 65534
PING = Envelope("ping", {"n": 1}, (b"abc", b"", bytes(3_000_000)))


def echo(envelope: Envelope, peer: AgentPeer) -> Envelope:
    return Envelope("echo", {"uid": peer.uid, "pid": peer.pid, **envelope.body}, envelope.blobs)


def recorder(calls: list[Envelope]) -> Callable[[Envelope, AgentPeer], Envelope]:
    def handle(envelope: Envelope, peer: AgentPeer) -> Envelope:
        calls.append(envelope)
        return envelope

    return handle


@pytest.fixture
def folder() -> Iterator[Path]:
    # Short: a socket path has at most 100 bytes, which pytest's own tmp_path may exceed.
    path = Path(tempfile.mkdtemp(prefix="lcn-"))
    yield path
    shutil.rmtree(path)


def ask_as(uid: int, path: Path) -> subprocess.CompletedProcess[str]:
    """One exchange from a process of another uid."""
    code = (
        "import os\n"
        "from pathlib import Path\n"
        "from client.agent_link import UnixAddress, exchange\n"
        "from client.agent_service import AgentServer\n"
        "from shared.wire import Envelope\n"
        # One exchange with itself loads all modules; the interpreter's files may be out of that uid's reach.
        f"warm = Path({str(path.parent.parent / 'warm' / 'w.sock')!r})\n"
        "server = AgentServer(lambda envelope, peer: envelope)\n"
        "server.listen_unix(warm)\n"
        "with server:\n"
        "    exchange(Envelope('ping', {}), UnixAddress(path=warm), timeout_s=5)\n"
        f"os.setgroups([]); os.setgid({uid}); os.setuid({uid})\n"
        f"address = UnixAddress(path=Path({str(path)!r}), owner_uids=frozenset({{0}}))\n"
        "try:\n"
        "    print(exchange(Envelope('ping', {}), address, timeout_s=5).body)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_frames_pass_both_ways_and_the_handler_knows_its_peer(folder: Path) -> None:
    server = AgentServer(echo)
    server.listen_unix(folder / "a.sock")
    with server:
        reply = exchange(PING, UnixAddress(path=folder / "a.sock"), timeout_s=20)
    assert reply.kind == "echo"
    assert reply.blobs == PING.blobs
    assert reply.body == {"uid": os.geteuid(), "pid": os.getpid(), "n": 1}


def test_nothing_is_left_beside_the_lock_file(folder: Path) -> None:
    server = AgentServer(echo)
    server.listen_unix(folder / "a.sock")
    with server:
        assert (folder / "a.sock").stat().st_mode & 0o777 == 0o600
        assert (folder / ".a.sock.d").stat().st_mode & 0o777 == 0o700
    assert [path.name for path in folder.iterdir()] == [".a.sock.lock"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another uid")
def test_only_uids_of_the_allow_list_are_served(folder: Path) -> None:
    """The socket's mode lets the group in here; the uid check must still keep a stranger out."""
    folder.chmod(0o755)
    server = AgentServer(echo)
    server.listen_unix(folder / "run" / "a.sock", group=NOBODY, allowed_uids=frozenset({0}))
    with server:
        refused = ask_as(NOBODY, folder / "run" / "a.sock")
    assert refused.stdout.startswith("AgentUnreachableError")

    server = AgentServer(echo)
    server.listen_unix(folder / "run" / "a.sock", group=NOBODY, allowed_uids=frozenset({NOBODY}))
    with server:
        assert (folder / "run").stat().st_mode & 0o777 == 0o750
        assert (folder / "run" / "a.sock").stat().st_mode & 0o777 == 0o660
        served = ask_as(NOBODY, folder / "run" / "a.sock")
        with pytest.raises(AgentUnreachableError):
            exchange(PING, UnixAddress(path=folder / "run" / "a.sock"), timeout_s=5)
    assert f"'uid': {NOBODY}" in served.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another uid")
def test_a_stranger_outside_the_group_is_stopped_by_the_file_system(folder: Path) -> None:
    folder.chmod(0o755)
    server = AgentServer(echo)
    server.listen_unix(folder / "run" / "a.sock", allowed_uids=frozenset({NOBODY}))
    with server:
        assert "cannot be reached" in ask_as(NOBODY, folder / "run" / "a.sock").stdout


def test_the_inner_socket_serves_nobody_who_did_not_come_through_the_front(folder: Path) -> None:
    calls: list[Envelope] = []
    server = AgentServer(recorder(calls))
    server.listen_unix(folder / "a.sock")
    with server:
        reply = exchange(PING, UnixAddress(path=folder / ".a.sock.d" / "g"), timeout_s=5)
    assert reply.body["reason"] == "peer_not_allowed"
    assert calls == []


def test_a_second_request_is_refused_while_the_first_runs(folder: Path) -> None:
    entered, leave = threading.Event(), threading.Event()
    running: list[int] = []

    def slow(envelope: Envelope, peer: AgentPeer) -> Envelope:
        running.append(1)
        assert len(running) == 1
        entered.set()
        leave.wait(10)
        running.pop()
        return envelope

    server = AgentServer(slow, busy_wait_s=0.2)
    server.listen_unix(folder / "a.sock")
    address = UnixAddress(path=folder / "a.sock")
    with server:
        first = threading.Thread(target=exchange, args=(PING, address), kwargs={"timeout_s": 20})
        first.start()
        assert entered.wait(10)
        assert exchange(PING, address, timeout_s=20).body["reason"] == "busy"
        leave.set()
        first.join()
        assert exchange(PING, address, timeout_s=20).kind == "ping"


def test_what_the_handler_says_in_an_exception_stays_inside(folder: Path) -> None:
    def broken(envelope: Envelope, peer: AgentPeer) -> Envelope:
        raise ValueError("patient 17 has no mask")

    server = AgentServer(broken)
    server.listen_unix(folder / "a.sock")
    with server:
        reply = exchange(PING, UnixAddress(path=folder / "a.sock"), timeout_s=20)
    assert reply.body["reason"] == "internal_error"
    assert "17" not in str(reply.body)


def raw_exchange(path: Path, chunks: list[bytes]) -> bytes:
    with grpc.insecure_channel(f"unix:{path}") as channel:
        return b"".join(channel.stream_stream(METHOD)(iter(chunks), timeout=10))


def test_large_and_malformed_requests_are_refused_by_name(folder: Path) -> None:
    calls: list[Envelope] = []
    server = AgentServer(recorder(calls), max_frame_bytes=2_000_000)
    server.listen_unix(folder / "a.sock")
    with server:
        assert exchange(PING, UnixAddress(path=folder / "a.sock"), timeout_s=9).body["reason"] == "too_large"
        for junk in ([], [b""], [b"LCN1"], [b"x" * 100], [b"LCN1\xff\xff\xff\xff"]):
            assert b'"reason":"malformed"' in raw_exchange(folder / "a.sock", junk)
        with (
            pytest.raises(grpc.RpcError) as caught,
            grpc.insecure_channel(f"unix:{folder}/a.sock") as channel,
        ):
            channel.unary_unary("/lacuna.Agent/Other")(b"", timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert calls == []


def test_an_oversized_reply_is_cut_off(folder: Path) -> None:
    server = AgentServer(echo)
    server.listen_unix(folder / "a.sock")
    with server, pytest.raises(MalformedMessageError, match="exceeds"):
        exchange(PING, UnixAddress(path=folder / "a.sock"), timeout_s=9, max_frame_bytes=1_000_000)


def test_the_courier_learns_within_its_time_that_the_agent_is_slow(folder: Path) -> None:
    leave = threading.Event()

    def patient(envelope: Envelope, peer: AgentPeer) -> Envelope:
        leave.wait(10)
        return envelope

    server = AgentServer(patient)
    server.listen_unix(folder / "a.sock")
    started = time.monotonic()
    with server:
        with pytest.raises(AgentTimeoutError):
            exchange(PING, UnixAddress(path=folder / "a.sock"), timeout_s=0.5)
        leave.set()
    assert time.monotonic() - started < 5


def test_an_agent_that_is_down_or_dies_is_unreachable(folder: Path) -> None:
    address = UnixAddress(path=folder / "a.sock")
    with pytest.raises(AgentUnreachableError, match="no agent socket"):
        exchange(PING, address, timeout_s=5)

    ready = folder / "ready"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom client.agent_service import AgentServer\n"
        "def hang(envelope, peer):\n"
        f"    Path({str(ready)!r}).touch(); time.sleep(60)\n"
        f"server = AgentServer(hang); server.listen_unix(Path({str(folder / 'a.sock')!r}))\n"
        "server.start(); server.wait()\n"
    )
    agent = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY)
    failure: list[BaseException] = []

    def ask() -> None:
        try:
            exchange(PING, address, timeout_s=30)
        except SiteError as error:
            failure.append(error)

    try:
        wait_for(lambda: (folder / "a.sock").exists())
        courier = threading.Thread(target=ask)
        courier.start()
        wait_for(ready.exists)
        agent.kill()
        courier.join(10)
    finally:
        agent.kill()
        agent.wait()
    assert isinstance(failure[0], AgentUnreachableError)
    # The dead agent's socket is still there, and the next agent takes its place.
    with pytest.raises(AgentUnreachableError):
        exchange(PING, address, timeout_s=5)
    server = AgentServer(echo)
    server.listen_unix(folder / "a.sock")
    with server:
        assert exchange(PING, address, timeout_s=5).kind == "echo"


def wait_for(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def test_the_courier_checks_where_it_was_pointed(folder: Path) -> None:
    file = folder / "file"
    file.touch()
    link = folder / "link"
    link.symlink_to(file)
    for path, words in (
        (Path("relative.sock"), "not an absolute path"),
        (Path("/tmp") / ("x" * 100), "at most 100"),  # noqa: S108
        (file, "not a socket"),
        (link, "not a socket"),
    ):
        with pytest.raises(SiteError, match=words):
            exchange(PING, UnixAddress(path=path), timeout_s=5)
    with socket.socket(socket.AF_UNIX) as planted:
        planted.bind(str(folder / "planted"))
        with pytest.raises(SiteError, match="belongs to uid"):
            exchange(
                PING,
                UnixAddress(path=folder / "planted", owner_uids=frozenset({os.geteuid() + 1})),
                timeout_s=5,
            )


def test_a_listener_takes_no_place_that_is_not_its_own(folder: Path) -> None:
    with pytest.raises(SiteError, match="not absolute"):
        UnixListener(Path("a.sock"))
    with pytest.raises(SiteError, match="bytes"):
        UnixListener(folder / ("x" * 100))
    (folder / "file").write_text("keep me")
    with pytest.raises(SiteError, match="not a socket"):
        UnixListener(folder / "file")
    assert (folder / "file").read_text() == "keep me"
    first = UnixListener(folder / "a.sock")
    with pytest.raises(SiteError, match="another agent"):
        UnixListener(folder / "a.sock")
    first.release()
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(folder / "a.sock"))
        foreign.listen()
        with pytest.raises(SiteError, match="somebody listens"):
            UnixListener(folder / "a.sock")
    UnixListener(folder / "a.sock").release()
    folder.chmod(0o777)
    with pytest.raises(SiteError, match="others can write"):
        UnixListener(folder / "a.sock")
    with pytest.raises(SiteError, match="no group"):
        UnixListener(folder / "sub" / "a.sock", group="no-such-group-here")


class Authority:
    """A certificate authority made on the spot."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.subject, self.key.public_key(), authority=True)
        self.pem = folder / f"{name}.pem"
        self.pem.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, expired: bool = False) -> tuple[Path, Path, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(
            x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]),
            key.public_key(),
            authority=False,
            valid=timedelta(minutes=-10) if expired else timedelta(days=1),
        )
        paths = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        paths[1].write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return *paths, certificate.fingerprint(hashes.SHA256()).hex()

    def _sign(
        self,
        subject: x509.Name,
        key: ec.EllipticCurvePublicKey,
        *,
        authority: bool,
        valid: timedelta = timedelta(days=1),
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + valid)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("agent.test")]), critical=False)
        )
        return builder.sign(self.key, hashes.SHA256())


def test_tcp_takes_only_clients_with_a_certificate_of_the_authority(folder: Path) -> None:
    hospital, stranger = Authority(folder, "hospital"), Authority(folder, "stranger")
    agent_certificate, agent_key, _ = hospital.issue("agent")
    courier_certificate, courier_key, fingerprint = hospital.issue("courier")
    other_certificate, other_key, _ = hospital.issue("other")
    false_certificate, false_key, _ = stranger.issue("false")
    old_certificate, old_key, old_fingerprint = hospital.issue("old", expired=True)

    def told(envelope: Envelope, peer: AgentPeer) -> Envelope:
        return Envelope("echo", {"certificate": peer.certificate_sha256}, envelope.blobs)

    server = AgentServer(told)
    port = server.listen_tls(
        "127.0.0.1",
        0,
        MutualTls(
            certificate=agent_certificate,
            key=agent_key,
            client_authority=hospital.pem,
            pinned=frozenset({fingerprint, old_fingerprint}),
        ),
    )

    def address(certificate: Path, key: Path, authority: Path) -> TlsAddress:
        return TlsAddress(
            address=f"127.0.0.1:{port}",
            authority=authority,
            certificate=certificate,
            key=key,
            server_name="agent.test",
        )

    with server:
        reply = exchange(PING, address(courier_certificate, courier_key, hospital.pem), timeout_s=10)
        assert reply.body == {"certificate": fingerprint}
        assert reply.blobs == PING.blobs
        unpinned = exchange(PING, address(other_certificate, other_key, hospital.pem), timeout_s=10)
        assert unpinned.body["reason"] == "peer_not_allowed"
        with pytest.raises(AgentUnreachableError):
            exchange(PING, address(old_certificate, old_key, hospital.pem), timeout_s=10)
        with pytest.raises(AgentUnreachableError):
            exchange(PING, address(false_certificate, false_key, hospital.pem), timeout_s=10)
        with pytest.raises(AgentUnreachableError):
            exchange(PING, address(courier_certificate, courier_key, stranger.pem), timeout_s=10)
        with pytest.raises(grpc.RpcError), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            list(channel.stream_stream(METHOD)(iter([b"x"]), timeout=3))
    with pytest.raises(SiteError, match="is missing"):
        exchange(PING, address(folder / "none", courier_key, hospital.pem), timeout_s=5)
