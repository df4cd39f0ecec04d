"""``lacuna site serve``, with a record of what it masks: ``python recording_agent.py FOLDER site serve ...``.

Everything is the product's. Before a vector is masked it is written to ``FOLDER/ATTEMPT-PURPOSE.npy``: who
has the records of all sites can sum them again. A training step takes the seconds in ``FOLDER/pace``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from client.workbench import SiteWorkbench
from deploy.cli.main import main
from privacy.secagg.messages import UploadReply, UploadRequest
from privacy.secagg.site_rounds import SiteSecureAggregation

FOLDER = Path(sys.argv[1])
upload, training_vector = SiteSecureAggregation.upload, SiteWorkbench.training_vector


def recorded_upload(
    self: SiteSecureAggregation, request: UploadRequest, vector: Any, **hashes: bytes
) -> UploadReply:
    path = FOLDER / f"{request.attempt.attempt}-{request.attempt.purpose}.npy"
    with path.with_suffix(".part").open("wb") as file:
        np.save(file, vector)
    path.with_suffix(".part").replace(path)
    return upload(self, request, vector, **hashes)


def paced_training_vector(self: SiteWorkbench, weights: Any) -> Any:
    started = time.monotonic()
    vector = training_vector(self, weights)
    pace = FOLDER / "pace"
    wanted_s = float(pace.read_text() or 0) if pace.exists() else 0.0
    time.sleep(max(0.0, wanted_s - (time.monotonic() - started)))
    return vector


SiteSecureAggregation.upload = recorded_upload  # type: ignore[method-assign]
SiteWorkbench.training_vector = paced_training_vector  # type: ignore[method-assign]
sys.argv[:] = ["lacuna", *sys.argv[2:]]
main()
