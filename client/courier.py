"""The Flower ClientApp: a courier between the SuperNode and the hospital's own agent.

Flower starts a fresh process for every message and puts the coordinator's app bundle first on its path,
so this is foreign ground: the courier holds no keys and no data and decides nothing. It takes the frame
out of Flower's message, hands it to the agent, and puts the agent's frame into the reply. Whatever goes
wrong on the way comes back as an envelope of kind ``refused``, so that the server can tell a broken site
from a broken app.

Where the agent is, the hospital says in ``--node-config``, never the message:

``agent-socket``
    Absolute path of the agent's unix socket, at most 100 bytes.
``agent-uids``
    Uids that may own that socket, separated by commas; by default the courier's own uid and root.
``agent-address``, ``agent-authority``, ``agent-certificate``, ``agent-key``, ``agent-name``
    TCP with mutual TLS in place of the socket: ``host:port``, three PEM files, the name in the agent's
    certificate where it is not the host.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.agent_link import (
    AgentAddress,
    AgentTimeoutError,
    AgentUnreachableError,
    TlsAddress,
    UnixAddress,
    exchange,
)
from shared.errors import LacunaError, MalformedMessageError, SiteError
from shared.wire import Envelope, from_carried, to_carried

ACTION = "lacuna"
"""Messages are of type ``query.lacuna``."""

RAW = "lacuna.raw"
"""``stype`` of an Array whose data are the blob's bytes as they are."""

log = logging.getLogger("lacuna.courier")

app = ClientApp()


@app.query(ACTION)  # type: ignore[untyped-decorator]
def relay(message: Message, context: Context) -> Message:
    """Pass one message to the agent and its answer back."""
    metadata = message.metadata
    left_s = metadata.created_at + metadata.ttl - time.time()
    try:
        reply = exchange(from_records(message.content), agent_address(context.node_config), timeout_s=left_s)
    except AgentUnreachableError as error:
        reply = _refused("agent_unreachable", error)
    except AgentTimeoutError as error:
        reply = _refused("agent_timeout", error)
    except MalformedMessageError as error:
        reply = _refused("malformed", error)
    except SiteError as error:
        reply = _refused("courier_misconfigured", error)
    return Message(to_records(reply), reply_to=message)


def agent_address(node_config: Mapping[str, object]) -> AgentAddress:
    """Where the agent is, by the SuperNode's configuration. Raises SiteError naming the wrong key."""

    def text(key: str) -> str:
        value = node_config.get(key)
        if not isinstance(value, str) or not value:
            raise SiteError(f'the SuperNode\'s --node-config lacks {key}="..."')
        return value

    if "agent-address" in node_config:
        return TlsAddress(
            address=text("agent-address"),
            authority=Path(text("agent-authority")),
            certificate=Path(text("agent-certificate")),
            key=Path(text("agent-key")),
            server_name=text("agent-name") if "agent-name" in node_config else None,
        )
    uids = str(node_config.get("agent-uids", ""))
    try:
        owners = frozenset(int(uid) for uid in uids.split(",") if uid.strip())
    except ValueError as error:
        raise SiteError(f"agent-uids in --node-config is not a list of numbers: {uids!r}") from error
    return UnixAddress(path=Path(text("agent-socket")), owner_uids=owners)


def to_records(envelope: Envelope) -> RecordDict:
    """An envelope as Flower carries it: header and number of blobs in a ConfigRecord, each blob that is
    not empty as an array of raw bytes (Flower splits arrays into chunks, and nothing else)."""
    values, blobs = to_carried(envelope)
    arrays = {
        name: Array(dtype="uint8", shape=(len(blob),), stype=RAW, data=blob) for name, blob in blobs.items()
    }
    return RecordDict({"frame": ConfigRecord(values), "blobs": ArrayRecord(arrays)})


def from_records(records: RecordDict) -> Envelope:
    """The inverse of :func:`to_records`. Raises MalformedMessageError."""
    # RecordDict's views by type (array_records) would tie arrays and records into a cycle of references.
    values, arrays = records.get("frame"), records.get("blobs")
    if len(records) != 2 or not isinstance(values, ConfigRecord) or not isinstance(arrays, ArrayRecord):
        raise MalformedMessageError("a message has exactly the records frame and blobs")
    return from_carried(values, {name: array.data for name, array in arrays.items()})


def _refused(reason: str, error: LacunaError) -> Envelope:
    """The reason alone goes back: the words name this hospital's paths, and stay in the courier's output."""
    log.warning("%s: %s", reason, error.diagnostics())
    return Envelope(kind="refused", body={"reason": reason, "message": ""})
