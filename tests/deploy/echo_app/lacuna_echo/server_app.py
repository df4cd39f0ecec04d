"""Lock-step exchanges with every node over the real FlowerTransport; each line of ``out`` is one reply."""

import json
import time
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.server_app import FlowerTransport
from shared.wire import Envelope

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    transport = FlowerTransport(grid)
    out = Path(str(config["out"]))
    while len(transport.nodes()) < int(config["sites"]):
        time.sleep(0.2)
    for exchange in range(int(config["exchanges"])):
        blob = exchange.to_bytes(4, "big") * (int(config["blob-bytes"]) // 4)
        started, started_at = time.monotonic(), time.time()
        waiting = {}
        for node in transport.nodes():
            request = Envelope("ping", {"exchange": exchange}, (blob, b"", b"tail"))
            waiting[transport.push(node, request, ttl_s=600.0)] = node
        pushed_s = time.monotonic() - started
        while waiting and time.monotonic() - started < float(config["reply-within-s"]):
            for reply in transport.pull(waiting):
                del waiting[reply.message_id]
                line = {
                    "run": str(context.run_id),
                    "exchange": exchange,
                    "node": reply.node,
                    "after_s": time.monotonic() - started,
                    "pushed_s": pushed_s,
                }
                if isinstance(reply.content, str):
                    line["error"] = reply.content
                else:
                    line["kind"] = reply.content.kind
                    line["body"] = reply.content.body
                    if "arrived_at" in reply.content.body:  # a refusal has none
                        line["arrived_s"] = reply.content.body["arrived_at"] - started_at
                    line["same"] = reply.content.blobs == (blob, b"", b"tail")
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            time.sleep(0.05)
        time.sleep(float(config["pause-s"]))
