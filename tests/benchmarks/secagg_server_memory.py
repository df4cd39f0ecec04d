"""What the ServerApp's process holds in a round beyond the model, measured as resident memory.

Run as ``python -m tests.benchmarks.secagg_server_memory PARAMETERS SITES [plain]``; prints one JSON object.
This process is the ServerApp: the real attempt, exchanger, transport and global model, with Flower's own code
taking messages apart and putting them together. A child process plays SuperLink and all sites over a pipe;
each site's protocol state is real. With ``plain`` the sites leave their masks out, which saves the child's
time where there are many and changes nothing here but the total, which is then not checked.

The model is float32 weights, their moving average and Adam's two moments: 4 vectors. After a first round,
which allocates them, the process's resident memory is the baseline; the figure is the highest resident memory
of the second round above it, in vectors of 4 bytes a parameter.
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import psutil
from flwr.app import Message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.task_identity import TaskIdentity

from privacy.secagg import site_masking
from privacy.secagg.messages import REQUESTS, AdvertiseRequest, ShareRequest, UploadRequest
from privacy.secagg.site_rounds import SiteSecureAggregation
from privacy.secagg.thresholds import ProtocolParameters
from privacy.secret_random import SecretRandom
from server.attempt import Attempt, AttemptTask
from server.exchange import Exchanger, Pace
from server.global_model import GlobalModel
from server.server_app import FlowerTransport, from_records, return_large_blocks, to_records
from server.site_directory import SiteDirectory
from shared.agent_messages import EXCHANGE_REPLY, WORK, Work
from shared.study_plan import StudyPlan
from shared.wire import Envelope, pack, unpack
from tests.small_plan import Keys, small_plan

VALUE = 3
"""What every coordinate of every site's vector is."""


class Hospitals:
    """The child: SuperLink's store and all sites, answering over a pipe."""

    def __init__(self, plan: StudyPlan, keys: Keys, *, masked: bool) -> None:
        self._dimension = plan.model.dimension
        self._vector = np.full(self._dimension, VALUE, dtype=np.int64)
        self._masked = masked
        self._sites = [
            SiteSecureAggregation(
                site_id=entry.site_id,
                key=key,
                roster=tuple((s.site_id, s.verify_key) for s in plan.roster.sites),
                parameters=ProtocolParameters.from_plan(plan),
                study_digest=plan.digest().hex(),
                register_attempt=lambda _: None,
                entropy=SecretRandom(),
            )
            for entry, key in zip(plan.roster.sites, keys.sites, strict=True)
        ]
        self._requests: dict[str, Envelope] = {}

    def serve(self, pipe: Connection) -> None:
        """Until the other end says stop."""
        contents: dict[str, bytes] = {}
        waiting: dict[str, tuple[int, Message]] = {}
        objects: dict[str, Any] = {}
        while (asked := pipe.recv())[0] != "stop":
            match asked:
                case ("object", object_id):
                    contents[object_id] = pipe.recv_bytes()
                case ("sent", message_id):
                    message = cast(Message, inflate_object_from_contents(message_id, contents))
                    waiting[message_id] = (message.metadata.dst_node_id, message)
                    contents.clear()
                case ("answer", message_id):
                    node, message = waiting.pop(message_id)
                    reply = Message(
                        to_records(self._answer(node, from_records(message.content))), reply_to=message
                    )
                    del message
                    with no_object_id_recompute():
                        reply.metadata.__dict__["_message_id"] = reply.object_id
                        objects = get_all_nested_objects(reply)
                        tree = get_object_tree(reply)
                    pipe.send((reply.object_id, tree.SerializeToString()))
                case ("pull", object_id):
                    pipe.send_bytes(objects.pop(object_id).deflate())

    def _answer(self, node: int, envelope: Envelope) -> Envelope:
        site, replies, hashes = self._sites[node], [], dict[str, bytes]()
        for part in unpack(envelope):
            if part.kind == WORK:
                work = Work.from_envelope(part, dimension=self._dimension)
                hashes = {"weights_hash": work.weights_hash(), "request_hash": work.request_hash()}
                continue
            request = REQUESTS[part.kind].from_envelope(part)
            if isinstance(request, AdvertiseRequest):
                reply: Any = site.advertise(request, dict)
            elif isinstance(request, ShareRequest):
                reply = site.share(request)
            elif isinstance(request, UploadRequest):
                with patch.object(site_masking, "masked_residues", self._residues):
                    reply = site.upload(request, self._vector, **hashes)
            else:
                reply = site.unmask(cast(Any, request))
            replies.append(reply.to_envelope())
        return pack(EXCHANGE_REPLY, replies)

    def _residues(self, vector: Any, bits: int, plus: list[bytes], minus: list[bytes]) -> Any:
        from privacy.secagg.prg import masked_residues

        return masked_residues(vector, bits, plus if self._masked else [], minus if self._masked else [])


class PipeGrid:
    """Flower's Grid over a pipe: what ``flwr.superlink.grid.HttpGrid`` does, its requests aside."""

    def __init__(self, pipe: Connection, n_sites: int) -> None:
        self._pipe, self._n_sites = pipe, n_sites
        self._lock = threading.Lock()

    def get_node_ids(self) -> Iterable[int]:
        return range(self._n_sites)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            with no_object_id_recompute():
                message.metadata.__dict__["_message_id"] = message.object_id
                objects = get_all_nested_objects(message)
                get_object_tree(message)
                push_objects(objects, self._push)
            self._pipe.send(("sent", message.object_id))
            ids.append(message.object_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = []
        for message_id in message_ids:
            self._pipe.send(("answer", message_id))
            reply_id, serialized = self._pipe.recv()
            tree = ObjectTree.FromString(serialized)
            contents = pull_objects([item.object_id for item in iterate_object_tree(tree)], self._pull)
            reply = cast(Message, inflate_object_from_contents(reply_id, contents))
            reply.metadata.__dict__["_message_id"] = reply_id
            found.append(reply)
        return found

    def _push(self, object_id: str, content: bytes) -> None:
        with self._lock:
            self._pipe.send(("object", object_id))
            self._pipe.send_bytes(content)

    def _pull(self, object_id: str) -> bytes:
        with self._lock:
            self._pipe.send(("pull", object_id))
            return self._pipe.recv_bytes()


class ServerApp:
    """Rounds as ``server.round_driver`` runs them."""

    def __init__(self, plan: StudyPlan, pipe: Connection, folder: Path) -> None:
        self._plan, self._folder = plan, folder
        transport = FlowerTransport(cast(Any, PipeGrid(pipe, plan.n_sites)))
        self._directory = SiteDirectory(plan, transport, run_id="1")
        for node, entry in enumerate(plan.roster.sites):
            self._directory._node_of[entry.site_id] = node
        self._exchanger = Exchanger(transport, self._directory, Pace(exchange_s=7200.0, node_check_s=7200.0))
        self.model = GlobalModel(plan, np.zeros(plan.model.dimension, dtype=np.float32))
        self._number = 0

    def round(self, prepared: Attempt | None, following: int) -> tuple[Attempt | None, np.ndarray]:
        """One round; the next one is prepared along the way. Returns it, and some of the total."""
        attempt = prepared or self._attempt(self._task(following - 1))
        if prepared is None:
            attempt.set_up(self._directory.reachable)
        attempt.task.weights = self.model.weights
        successor = attempt.perform(self._task(following))
        ends = attempt._total[[0, -1]] if attempt._total is not None else np.zeros(2)
        self.model.apply(attempt.take_total(), n_survivors=len(attempt.survivors))
        self.model.save(self._folder / "checkpoint.safetensors", {})
        return successor, ends

    def _task(self, number: int) -> AttemptTask:
        return AttemptTask(round=number, purpose="train", vector_length=self._plan.model.dimension)

    def _attempt(self, task: AttemptTask) -> Attempt:
        self._number += 1
        return Attempt(
            plan=self._plan,
            run_id="1",
            number=self._number,
            task=task,
            exchanger=self._exchanger,
            directory=self._directory,
            new_attempt=self._attempt,
            on_open=lambda _: None,
            on_void=lambda _: None,
            on_event=lambda *_, **__: None,
        )


@contextmanager
def highest_resident() -> Iterator[SimpleNamespace]:
    """``baseline`` and ``highest`` resident bytes of this process, sampled each millisecond."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    process, done = psutil.Process(), threading.Event()
    seen = SimpleNamespace(baseline=process.memory_info().rss, highest=0)

    def sample() -> None:
        while not done.is_set():
            seen.highest = max(seen.highest, process.memory_info().rss)
            time.sleep(0.001)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield seen
    finally:
        done.set()
        sampler.join()


def main(parameters: int, n_sites: int, masked: bool) -> None:
    return_large_blocks()
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, SUPERLINK_NODE_ID
    keys = Keys.of(n_sites)
    plan = small_plan(keys, model__dimension=parameters, secure_aggregation__modulus_bits=32)
    here, there = multiprocessing.get_context("fork").Pipe()
    hospitals = multiprocessing.get_context("fork").Process(
        target=lambda: Hospitals(plan, keys, masked=masked).serve(there), daemon=True
    )
    hospitals.start()
    with tempfile.TemporaryDirectory() as folder:
        app = ServerApp(plan, here, Path(folder))
        prepared, _ = app.round(None, 2)
        with highest_resident() as memory:
            started = time.process_time()
            _, ends = app.round(prepared, 3)
            seconds = time.process_time() - started
    here.send(("stop",))
    hospitals.join(60)
    if masked:
        assert ends.tolist() == [VALUE * n_sites] * 2, ends
    extra = memory.highest - memory.baseline
    print(
        json.dumps(
            {
                "parameters": parameters,
                "sites": n_sites,
                "masked": masked,
                "vectors": extra / (4 * parameters),
                "mib": extra / 2**20,
                "server_seconds": seconds,
            }
        )
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), "plain" not in sys.argv[3:])
