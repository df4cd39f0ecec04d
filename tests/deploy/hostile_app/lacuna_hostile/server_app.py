"""Sends the list of actions to every hospital and writes down what came of them."""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    actions = str(context.run_config["actions"])
    asked = Path(actions).read_text()
    messages = [
        Message(RecordDict({"actions": ConfigRecord({"json": asked})}), node, "query.intrude")
        for node in grid.get_node_ids()
    ]
    waiting = set(grid.push_messages(messages))
    found, deadline = [], time.monotonic() + 240
    while waiting and time.monotonic() < deadline:
        for reply in grid.pull_messages(list(waiting)):
            waiting.discard(reply.metadata.reply_to_message_id)
            if reply.has_content():
                found.append(dict(reply.content.config_records["answers"]))
        time.sleep(0.5)
    part = Path(str(context.run_config["out"]) + ".part")
    part.write_text(json.dumps(found))
    part.rename(str(context.run_config["out"]))
