"""The Flower ServerApp: the round driver, over Flower's Grid.

This is the server's only module that knows Flower. It reads from the run's configuration where the study
is kept and gives :func:`server.round_driver.run_study` a :class:`FlowerTransport`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from server.transport import Reply
from shared.errors import CoordinatorError, MalformedMessageError
from shared.wire import Envelope, from_carried, to_carried

MESSAGE_TYPE = "query.lacuna"
"""Flower's category ``query`` and the action that ``client.courier`` registers."""

RAW = "lacuna.raw"
"""``stype`` of an Array whose data are the blob's bytes as they are."""

_M_MMAP_THRESHOLD = -3
"""Of ``mallopt(3)``."""

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Continue the study kept at ``study-home`` until it is done or cannot go on."""
    from server.exchange import Pace
    from server.round_driver import run_study

    return_large_blocks()
    home = context.run_config.get("study-home")
    if not isinstance(home, str) or not Path(home).is_absolute():
        raise CoordinatorError(
            "the run's configuration lacks study-home, an absolute path",
            remedy="start the run with `lacuna coordinator launch`",
        )
    longest_s = context.run_config.get("longest-exchange-s")
    pace = Pace(exchange_s=longest_s) if isinstance(longest_s, float) and longest_s > 0 else None
    run_study(FlowerTransport(grid), study_home=home, run_id=str(context.run_id), pace=pace)


def return_large_blocks() -> None:
    """Let freed blocks from 1 MiB on go back to the system at once (glibc; nothing happens elsewhere).

    glibc keeps freed blocks of up to 32 MiB for later, and its heap then grows with the number of sites whose
    vectors passed through, although each is forgotten when it was added.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 1 << 20)


class FlowerTransport:
    """:class:`server.transport.Transport` over a Flower Grid. Never waits for a node.

    A node that stops sending heartbeats is reported by Flower after at most 60 s, a message whose time
    to live is over at the next :meth:`pull`.
    """

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        self._node_of: dict[str, int] = {}
        self._undelivered: list[Reply] = []

    def nodes(self) -> list[int]:
        return sorted(self._grid.get_node_ids())

    def push(self, node: int, envelope: Envelope, *, ttl_s: float) -> str:
        message = Message(to_records(envelope), node, MESSAGE_TYPE, ttl=ttl_s, group_id=envelope.kind)
        ids = list(self._grid.push_messages([message]))
        if not ids:
            raise CoordinatorError(f"the SuperLink does not take a message of kind {envelope.kind}")
        if not ids[0]:
            # The SuperLink does not know the node (any more): that is the node's failure, not the run's.
            message_id = f"undelivered-{len(self._node_of)}-{node}"
            self._undelivered.append(Reply(message_id=message_id, node=node, content="node is not known"))
        else:
            message_id = ids[0]
        self._node_of[message_id] = node
        return message_id

    def pull(self, ids: Collection[str]) -> list[Reply]:
        wanted = {message_id for message_id in ids if message_id in self._node_of}
        replies = [reply for reply in self._undelivered if reply.message_id in wanted]
        self._undelivered = [reply for reply in self._undelivered if reply not in replies]
        wanted -= {reply.message_id for reply in replies}
        if wanted:
            replies += [self._reply(message) for message in self._grid.pull_messages(list(wanted))]
        for reply in replies:
            self._node_of.pop(reply.message_id, None)
        return replies

    def _reply(self, message: Message) -> Reply:
        message_id = message.metadata.reply_to_message_id
        node = self._node_of.get(message_id, 0)
        if message.has_error():
            error = f"{message.error.reason} (Flower error {message.error.code})"
            return Reply(message_id=message_id, node=node, content=error)
        try:
            return Reply(message_id=message_id, node=node, content=from_records(message.content))
        except MalformedMessageError as error:
            return Reply(message_id=message_id, node=node, content=str(error))


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
