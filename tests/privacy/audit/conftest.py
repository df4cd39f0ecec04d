"""A plan of three sites for the audit's tests; every clause can be overridden."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = str(Path(__file__).resolve().parents[2])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

from small_plan import Keys, plan_document, small_plan  # noqa: E402

from shared.identity import SigningKey  # noqa: E402
from shared.study_plan import StudyPlan  # noqa: E402

SITES = ("aachen", "bern", "cadiz")


@pytest.fixture(scope="session")
def site_keys() -> dict[str, SigningKey]:
    return {site: SigningKey.generate() for site in SITES}


@pytest.fixture(scope="session")
def make_plan(site_keys: dict[str, SigningKey]) -> Callable[..., StudyPlan]:
    keys = Keys([site_keys[site] for site in SITES])
    roster = {
        **plan_document(keys)["roster"],
        "sites": [{"site_id": site, "identity_key": key.verify_key.hex()} for site, key in site_keys.items()],
    }

    def make(*, mode: str = "distributed", audit_noise: float = 2.0, **audit: Any) -> StudyPlan:
        unprotected = mode == "unprotected"
        return small_plan(
            roster=roster,
            privacy={
                "unit": "patient",
                "neighbouring": "add_or_remove_one_patient",
                "mode": mode,
                "epsilon": None if unprotected else 8.0,
                "delta": 1e-5,
                "clip_norm": 1.0,
                "declared_patients": 120,
                "rounds": 10,
                "max_attempts": 13,
                "noise_multiplier": 0.0 if unprotected else 3.5,
                "audit_noise_multiplier": 0.0 if unprotected else audit_noise,
            },
            audit={
                "score_edges": [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0],
                "control_edges": [0.9, 1.1],
                "copy_distance": 0.2,
                **audit,
            },
        )

    return make
