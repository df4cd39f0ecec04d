"""Flower's SecAgg+ as its package has it: unmodified clients, and a server that relays as its workflow does.

Clients are ``flwr.client.mod.secaggplus_mod``, each with its own context. The server is a few lines because
Flower's own (``SecAggPlusWorkflow``) runs only inside a legacy ServerApp; it sends the same records.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flwr.app import ConfigRecord, Context, Message, Metadata, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.common import Code, FitRes, Status, bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from flwr.compat.common import recorddict_compat
from numpy.typing import NDArray

CLIPPING_RANGE = 8.0
TARGET_RANGE = 1 << 22
MODULUS = 1 << 32
MAX_WEIGHT = 1000.0
"""The defaults of Flower's workflow."""

Records = dict[str, Any]


class FlowerClient:
    """One hospital with Flower's mod in front of a model update that is known here."""

    def __init__(self, node_id: int, update: Sequence[NDArray[np.float32]], *, num_examples: int) -> None:
        self.node_id = node_id
        self._context = Context(1, node_id, {}, RecordDict(), {})
        self._result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters(list(update)), num_examples, {})

    def answer(self, stage: str, configs: Mapping[str, Any]) -> Records:
        """One stage of the protocol, through the public mod."""
        content = RecordDict({RECORD_KEY_CONFIGS: ConfigRecord({Key.STAGE: stage, **configs})})
        metadata = Metadata(
            run_id=1,
            message_id="",
            src_node_id=0,
            dst_node_id=self.node_id,
            reply_to_message_id="",
            group_id="1",
            created_at=time.time(),
            ttl=3600.0,
            message_type="train",
        )
        reply = secaggplus_mod(Message(content, metadata=metadata), self._context, self._train)
        return dict(reply.content.config_records[RECORD_KEY_CONFIGS])

    def _train(self, message: Message, context: Context) -> Message:
        return Message(recorddict_compat.fitres_to_recorddict(self._result, True), reply_to=message)


class FlowerServer:
    """Runs the stages and keeps what a server sees: public keys, ciphertexts, masked vectors, shares."""

    def __init__(
        self, clients: Sequence[FlowerClient], *, threshold: int, n_clients: int | None = None
    ) -> None:
        """``n_clients``: how many there are, where only some of them are played here."""
        self.n_clients = len(clients) if n_clients is None else n_clients
        self.clients = {client.node_id: client for client in clients}
        self.threshold = threshold
        self.public_keys: dict[int, tuple[bytes, bytes]] = {}
        self.shares_for: dict[int, dict[int, bytes]] = {node: {} for node in self.clients}

    def set_up(self) -> None:
        configs = {
            Key.SAMPLE_NUMBER: self.n_clients,
            Key.SHARE_NUMBER: self.n_clients,
            Key.THRESHOLD: self.threshold,
            Key.CLIPPING_RANGE: CLIPPING_RANGE,
            Key.TARGET_RANGE: TARGET_RANGE,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: MAX_WEIGHT,
        }
        for node, client in self.clients.items():
            reply = client.answer(Stage.SETUP, configs)
            self.public_keys[node] = (reply[Key.PUBLIC_KEY_1], reply[Key.PUBLIC_KEY_2])

    def share_keys(self, node: int, public_keys: Mapping[int, tuple[bytes, bytes]]) -> dict[int, bytes]:
        """Tell one client these keys; its ciphertexts by recipient."""
        configs = {str(peer): list(keys) for peer, keys in public_keys.items()}
        reply = self.clients[node].answer(Stage.SHARE_KEYS, configs)
        dealt = dict(zip(reply[Key.DESTINATION_LIST], reply[Key.CIPHERTEXT_LIST], strict=True))
        for recipient, ciphertext in dealt.items():
            self.shares_for[recipient][node] = ciphertext
        return dealt

    def collect(self, node: int) -> list[NDArray[np.int64]]:
        """The masked vector that one client uploads: first its weight, then its parameters."""
        return [bytes_to_ndarray(data) for data in self.collect_bytes(node)]

    def collect_bytes(self, node: int) -> list[bytes]:
        """The same as it travels."""
        shares = self.shares_for[node]
        configs = {Key.CIPHERTEXT_LIST: list(shares.values()), Key.SOURCE_LIST: list(shares)}
        found: list[bytes] = self.clients[node].answer(Stage.COLLECT_MASKED_VECTORS, configs)[
            Key.MASKED_PARAMETERS
        ]
        return found

    def unmask(self, active: Sequence[int], dead: Sequence[int]) -> dict[int, list[bytes]]:
        """Shares by owner: of the mask seed of the active, of the first secret key of the dead."""
        shares: dict[int, list[bytes]] = {node: [] for node in (*active, *dead)}
        configs = {Key.ACTIVE_NODE_ID_LIST: list(active), Key.DEAD_NODE_ID_LIST: list(dead)}
        for node in active:
            reply = self.clients[node].answer(Stage.UNMASK, configs)
            for owner, share in zip(reply[Key.NODE_ID_LIST], reply[Key.SHARE_LIST], strict=True):
                shares[owner].append(share)
        return shares
