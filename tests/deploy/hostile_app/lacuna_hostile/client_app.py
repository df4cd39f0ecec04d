"""Runs at the hospital, as the courier's user. ``intruder.py`` is put beside it when the bundle is built."""

import json
import os

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lacuna_hostile import intruder

app = ClientApp()


@app.query("intrude")
def intrude(message: Message, context: Context) -> Message:
    record = message.content.config_records["actions"]
    asked = json.loads(str(record["json"]))
    site = str(context.node_config.get("agent-socket"))
    answers = [intruder.perform(action) for action in asked.get(site, [])]
    answer = ConfigRecord({"site": site, "uid": os.getuid(), "json": json.dumps(answers)})
    return Message(RecordDict({"answers": answer}), reply_to=message)
