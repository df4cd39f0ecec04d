"""An agent that sends back what it gets, with what it can see of itself and of the courier."""

import os
import socket
import sys
import time
from pathlib import Path

from client.agent_service import AgentPeer, AgentServer
from shared.wire import Envelope

ML = ("libtorch", "torch/", "opacus", "monai")


def echo(envelope: Envelope, peer: AgentPeer) -> Envelope:
    arrived = time.time()
    time.sleep(float(os.environ.get("ECHO_DELAY_S", "0")))
    mapped = Path(f"/proc/{peer.pid}/maps").read_text()
    body = {
        **envelope.body,
        "arrived_at": arrived,
        "agent_pid": os.getpid(),
        "courier_pid": peer.pid,
        "courier_uid": peer.uid,
        "courier_maps_ml": [name for name in ML if name in mapped],
        "interfaces": [name for _, name in socket.if_nameindex()],
    }
    return Envelope("echo", body, envelope.blobs)


server = AgentServer(echo)
server.listen_unix(Path(sys.argv[1]))
server.start()
server.wait()
