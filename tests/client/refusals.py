"""What every refusal test of a site agent holds against the agent. (No tests of its own.)"""

from __future__ import annotations

import pytest
from agent_trio import Trio

from shared.agent_messages import REFUSED
from shared.wire import Envelope


def reason(reply: Envelope) -> str:
    assert reply.kind == REFUSED, reply
    assert set(reply.body) == {"reason", "message"}
    return str(reply.body["reason"])


def refused_and_sound(
    trio: Trio, caplog: pytest.LogCaptureFixture, expected: str, reply: Envelope, *, charges: int = 0
) -> None:
    """The refusal is named, logged, shown as status and free; and an honest attempt then completes."""
    assert reason(reply) == expected
    assert any(expected in record.getMessage() for record in caplog.records if record.name == "lacuna.site")
    assert trio.status()["reason"] == expected
    assert len(trio.charges()) == charges
    before = len(trio.benches[0].calls)
    _, total = trio.complete()
    assert total.tolist() == [7] * trio.plan.model.dimension
    assert len(trio.charges()) == charges + 1
    assert len(trio.benches[0].calls) == before + 1
