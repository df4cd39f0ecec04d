"""What an exchange holds in memory does not depend on the number of sites."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection, Iterator
from typing import Any, cast

import pytest
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from server.exchange import Exchanger, Pace
from server.server_app import from_records, to_records
from server.site_directory import SiteDirectory
from server.transport import Reply
from shared.agent_messages import EXCHANGE_REPLY
from shared.wire import Envelope, pack

SITES = [f"site-{index}" for index in range(5)]


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Objects die when nothing refers to them, or they leak."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Directory:
    """Every site at the node of its number."""

    def node(self, site: str) -> int:
        return SITES.index(site)

    def forget(self, site: str) -> None:
        raise AssertionError(f"{site} was given up")


class Watching:
    """A transport that looks, at each call, at which messages are still alive."""

    def __init__(self) -> None:
        self.requests: list[weakref.ref[Envelope]] = []
        self.replies: list[weakref.ref[Envelope]] = []
        self.nodes_asked: list[int] = []

    def nodes(self) -> list[int]:
        return list(range(len(SITES)))

    def push(self, node: int, envelope: Envelope, *, ttl_s: float) -> str:
        assert self._alive(self.requests) == 0, "an earlier request is still held"
        self.requests.append(weakref.ref(envelope))
        return str(node)

    def pull(self, ids: Collection[str]) -> list[Reply]:
        assert self._alive(self.requests) == 0, "requests are held while answers come"
        assert self._alive(self.replies) == 0, "an earlier answer is still held"
        assert len(ids) == 1, "answers are fetched one by one"
        (message_id,) = ids
        self.nodes_asked.append(int(message_id))
        reply = pack(EXCHANGE_REPLY, [Envelope("vector", {}, (bytes(100),))])
        self.replies.append(weakref.ref(reply))
        return [Reply(message_id=message_id, node=int(message_id), content=reply)]

    @staticmethod
    def _alive(references: list[weakref.ref[Envelope]]) -> int:
        return sum(reference() is not None for reference in references)


@pytest.mark.usefixtures("no_collector")
def test_one_message_at_a_time() -> None:
    transport = Watching()
    exchanger = Exchanger(cast(Any, transport), cast(SiteDirectory, Directory()), Pace())
    seen: dict[str, int] = {}

    def parts() -> Iterator[tuple[str, list[Envelope]]]:
        for site in SITES:
            assert len(transport.requests) == SITES.index(site), "made when their turn has come"
            yield site, [Envelope("weights", {}, (bytes(100),))]

    def on_parts(site: str, items: list[Envelope]) -> None:
        seen[site] = sum(len(blob) for item in items for blob in item.blobs)

    assert exchanger.run(parts(), on_parts=on_parts) == {}
    assert seen == dict.fromkeys(SITES, 100)
    assert transport.nodes_asked == list(range(len(SITES)))


@pytest.mark.usefixtures("no_collector")
def test_flowers_records_die_with_the_message() -> None:
    """Their views by type would keep arrays and record dictionary alive until the collector runs."""
    records = to_records(Envelope("vector", {}, (bytes(100), b"", bytes(7))))
    read = RecordDict({"frame": ConfigRecord(dict(cast(Any, records["frame"]))), "blobs": records["blobs"]})
    del records
    watched = weakref.ref(cast(ArrayRecord, read["blobs"])["0"])
    assert [len(blob) for blob in from_records(read).blobs] == [100, 0, 7]
    del read
    assert watched() is None
