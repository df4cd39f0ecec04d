"""One process that speaks for many SuperNodes and hospitals: Flower's Fleet API outside, real agents inside.

Each node has its own key, certificate and connection to the coordinator's perimeter, polls and tries again as
a SuperNode behind its own perimeter does, and hands what comes to its site's agent
(:class:`client.site_agent.SiteAgent`), whose arithmetic is a known vector. Only ``AT_ONCE`` nodes move or
compute a message at the same time: they share two cores, and their vectors are never in memory together.
"""

from __future__ import annotations

import contextlib
import ssl
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    inflate_object_from_contents,
    pull_objects,
    push_objects,
)
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.courier import from_records, to_records
from shared.wire import Envelope

POLL_S = 3.0
"""As ``flwr.supernode.start_client_internal``."""
HEARTBEAT_S = 20.0
AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class NodeFiles:
    """PEM files of one hospital's link, and its SuperNode's key."""

    authority: Path
    certificate: Path
    key: Path
    node_key: ec.EllipticCurvePrivateKey


class PerimeterClient(FleetHttpClient):
    """Sees what a SuperNode sees behind its site's perimeter, where 429 and 500 become 503 (try again)."""

    def _send(self, context: ProtobufRequestContext) -> httpx.Response:
        answer = super()._send(context)
        if answer.status_code in (429, 500):
            answer.status_code = 503
        return answer


class SiteNode:
    """A SuperNode and the agent behind it."""

    def __init__(
        self,
        address: str,
        files: NodeFiles,
        handle: Callable[[Envelope], Envelope],
        turns: threading.Semaphore,
    ) -> None:
        tls = ssl.create_default_context(cafile=str(files.authority))
        tls.load_cert_chain(files.certificate, files.key)
        public = files.node_key.public_key()
        self._client, self._heart = (
            PerimeterClient(
                f"https://{address}",
                verify=tls,
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                    NodeAuthHttpInterceptor(files.node_key, public),
                ],
                retry_invoker=make_simple_http_retry_invoker(),
            )
            for _ in range(2)
        )
        self._public, self._handle, self._turns = public_key_to_bytes(public), handle, turns

    def serve(self, ended: threading.Event) -> None:
        """Until told, with its heart in a thread of its own."""
        answer = self._client.ActivateNode(
            ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        )
        node = Node(node_id=answer.node_id)
        threading.Thread(target=self._beat, args=(node, ended), daemon=True).start()
        while not ended.is_set():
            try:
                if not self._one_message(node):
                    ended.wait(POLL_S)
            except (httpx.HTTPError, ObjectPushError, ObjectPullError, RunNotRunningException) as error:
                if not ended.is_set():
                    print(f"node {node.node_id}: {error!r}", file=sys.stderr, flush=True)
                ended.wait(POLL_S)

    def _beat(self, node: Node, ended: threading.Event) -> None:
        request = SendNodeHeartbeatRequest(node=node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while not ended.wait(HEARTBEAT_S):
            with contextlib.suppress(httpx.HTTPError, RunNotRunningException):
                self._heart.SendNodeHeartbeat(request)

    def _one_message(self, node: Node) -> bool:
        pulled = self._client.PullMessages(PullMessagesRequest(node=node))
        if not pulled.messages_list:
            return False
        with self._turns:
            began = time.monotonic()
            message = self._fetch(node, pulled)
            reply = Message(to_records(self._handle(from_records(message.content))), reply_to=message)
            del message
            self._send(node, reply, time.monotonic() - began)
        return True

    def _fetch(self, node: Node, pulled: PullMessagesResponse) -> Message:
        metadata = message_from_proto(pulled.messages_list[0]).metadata
        contents = pull_objects(
            [item.object_id for item in iterate_object_tree(pulled.message_object_trees[0])],
            make_pull_object_fn_protobuf(self._client.PullObject, node, metadata.run_id),
        )
        confirm = make_confirm_message_received_fn_protobuf(
            self._client.ConfirmMessageReceived, node, metadata.run_id
        )
        confirm(metadata.message_id)
        message = cast(Message, inflate_object_from_contents(metadata.message_id, contents))
        message.metadata.__dict__["_message_id"] = metadata.message_id
        return message

    def _send(self, node: Node, reply: Message, seconds: float) -> None:
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            objects, tree = get_all_nested_objects(reply), get_object_tree(reply)
            answer = self._client.PushMessages(
                PushMessagesRequest(
                    node=node,
                    messages_list=[message_to_proto(remove_content_from_message(reply))],
                    message_object_trees=[tree],
                    clientapp_runtime_list=[seconds],
                )
            )
            push = make_push_object_fn_protobuf(
                self._client.PushObject, node, reply.metadata.run_id, answer.session_id
            )
            push_objects(objects, push, object_ids_to_push=set(answer.objects_to_push))


def speak_for(
    address: str, sites: list[tuple[NodeFiles, Callable[[Envelope], Envelope]]], ended: threading.Event
) -> list[threading.Thread]:
    """Start a thread for each node; join them after setting ``ended``."""
    turns = threading.Semaphore(AT_ONCE)
    threads = [
        threading.Thread(target=SiteNode(address, files, handle, turns).serve, args=(ended,), daemon=True)
        for files, handle in sites
    ]
    for thread in threads:
        thread.start()
    return threads
