"""The courier: envelopes in Flower's records, and what it says when the agent cannot be reached."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import server.server_app
from client import courier
from client.agent_link import TlsAddress, UnixAddress
from client.agent_service import AgentPeer, AgentServer
from shared.errors import MalformedMessageError, SiteError
from shared.wire import Envelope

PING = Envelope("ping", {"n": 1}, (b"abc", b"", b"\x00" * 9, b""))


@pytest.fixture
def folder() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="lcn-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(autouse=True)
def flower_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Flower's process tells its messages about themselves."""
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def relay(envelope: Envelope, node_config: dict[str, str], *, ttl_s: float = 60.0) -> Envelope:
    request = Message(courier.to_records(envelope), 1, "query.lacuna", ttl=ttl_s)
    context = Context(1, 1, node_config, RecordDict(), {})
    reply = courier.app(request, context)
    assert not reply.has_error()
    return courier.from_records(reply.content)


def test_both_ends_of_flower_write_and_read_the_same_records() -> None:
    for write, read in (
        (courier.to_records, server.server_app.from_records),
        (server.server_app.to_records, courier.from_records),
    ):
        assert read(write(PING)) == PING
        assert read(write(Envelope("empty", {}))) == Envelope("empty", {})


@pytest.mark.parametrize("read", [courier.from_records, server.server_app.from_records])
def test_records_of_another_shape_are_refused(read: object) -> None:
    good = courier.to_records(PING)
    config, arrays = good["frame"], good["blobs"]
    header = config["header"]
    for bad in (
        RecordDict(),
        RecordDict({"frame": config}),
        RecordDict({"frame": config, "blobs": arrays, "more": ConfigRecord()}),
        RecordDict({"frame": ConfigRecord({"header": "text", "blobs": 4}), "blobs": arrays}),
        RecordDict({"frame": ConfigRecord({"header": header, "blobs": 3}), "blobs": arrays}),
        RecordDict({"frame": ConfigRecord({"header": header, "blobs": 10**9}), "blobs": arrays}),
        RecordDict({"frame": ConfigRecord({"header": header, "blobs": -1}), "blobs": arrays}),
        RecordDict({"frame": ConfigRecord({"header": b"{}", "blobs": 4}), "blobs": arrays}),
        RecordDict({"frame": config, "blobs": ArrayRecord({"9": arrays["0"]})}),
        RecordDict({"frame": config, "blobs": ArrayRecord({"0": arrays["0"]})}),
    ):
        with pytest.raises(MalformedMessageError):
            read(bad)  # type: ignore[operator]


def test_a_message_goes_to_the_agent_and_its_answer_comes_back(folder: Path) -> None:
    def agent(envelope: Envelope, peer: AgentPeer) -> Envelope:
        return Envelope("pong", envelope.body, envelope.blobs[::-1])

    served = AgentServer(agent)
    served.listen_unix(folder / "a.sock")
    with served:
        reply = relay(PING, {"agent-socket": str(folder / "a.sock")})
    assert reply == Envelope("pong", {"n": 1}, PING.blobs[::-1])


def test_every_failure_is_an_answer_with_a_reason(folder: Path) -> None:
    (folder / "file").touch()
    for config, reason in (
        ({"agent-socket": str(folder / "none.sock")}, "agent_unreachable"),
        ({"agent-socket": str(folder / "file")}, "courier_misconfigured"),
        ({"agent-socket": "relative"}, "courier_misconfigured"),
        ({}, "courier_misconfigured"),
        ({"agent-address": "127.0.0.1:1"}, "courier_misconfigured"),
    ):
        reply = relay(PING, config)
        assert (reply.kind, reply.body["reason"]) == ("refused", reason)


def test_the_answer_to_a_malformed_message_is_a_refusal() -> None:
    request = Message(RecordDict({"x": ConfigRecord()}), 1, "query.lacuna")
    reply = courier.app(request, Context(1, 1, {"agent-socket": "/none"}, RecordDict(), {}))
    assert courier.from_records(reply.content).body["reason"] == "malformed"


def test_node_config_names_the_agent() -> None:
    assert courier.agent_address({"agent-socket": "/run/a", "agent-uids": "7, 8"}) == UnixAddress(
        path=Path("/run/a"), owner_uids=frozenset({7, 8})
    )
    assert courier.agent_address(
        {
            "agent-address": "agent:1",
            "agent-authority": "/ca",
            "agent-certificate": "/crt",
            "agent-key": "/key",
        }
    ) == TlsAddress(address="agent:1", authority=Path("/ca"), certificate=Path("/crt"), key=Path("/key"))
    with pytest.raises(SiteError, match="agent-uids"):
        courier.agent_address({"agent-socket": "/run/a", "agent-uids": "seven"})
