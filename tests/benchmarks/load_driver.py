"""The ServerApp of the benchmark of load: the product's, but for a model that begins at zero.

A plan's dimension is that of a network's parameters; here it was asked for. No audit is made.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.exchange import Pace
from server.global_model import GlobalModel
from server.round_driver import RoundDriver
from server.server_app import FlowerTransport, return_large_blocks
from server.study_store import StudyStore

app = ServerApp()
PACE = Pace(exchange_s=3600.0, shortest_s=3600.0, quorum_s=1800.0, hello_s=300.0)
"""Nobody is given up: on a busy machine the table shows it as time."""


class VectorDriver(RoundDriver):
    """Rounds alone, over a vector of zeros."""

    def _load_model(self) -> GlobalModel:
        return GlobalModel(self._plan, np.zeros(self._plan.model.dimension, dtype=np.float32))

    def _audit_completed(self) -> bool:
        return True


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study kept at ``study-home``."""
    return_large_blocks()
    store = StudyStore(Path(str(context.run_config["study-home"])))
    try:
        with store.exclusively():
            VectorDriver(FlowerTransport(grid), store, run_id=str(context.run_id), pace=PACE).run()
    finally:
        store.close()
