"""The ServerApp of the benchmark of load: the product's, but for a model without a network.

A plan's dimension is that of a network's parameters; here it was asked for. No audit is made. Every round's
sum is compared with what the sites put in.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from privacy.secagg.masking import SignedVector
from server.exchange import Pace
from server.global_model import GlobalModel
from server.round_driver import RoundDriver
from server.server_app import FlowerTransport, return_large_blocks
from server.study_store import StudyStore

app = ServerApp()
PACE = Pace(exchange_s=3600.0, shortest_s=3600.0, quorum_s=1800.0, hello_s=300.0)
"""Nobody is given up: on a busy machine the table shows it as time."""


class CheckedModel(GlobalModel):
    """Site i of n puts i + 1 into every coordinate, and nobody drops."""

    def apply(self, total: SignedVector, *, n_survivors: int) -> None:
        n = len(self._plan.roster.sites)
        if n_survivors != n or int(total.min()) != n * (n + 1) // 2 or int(total.max()) != n * (n + 1) // 2:
            raise RuntimeError(f"a wrong sum of {n_survivors} sites: {total.min()} to {total.max()}")
        super().apply(total, n_survivors=n_survivors)


class VectorDriver(RoundDriver):
    """Rounds alone, over a vector that no compression makes smaller."""

    def _load_model(self) -> GlobalModel:
        drawn = np.random.default_rng(1).standard_normal(self._plan.model.dimension, dtype=np.float32)
        return CheckedModel(self._plan, drawn)

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
