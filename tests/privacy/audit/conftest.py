"""A plan of three sites for the audit's tests; every clause can be overridden."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from shared.identity import SigningKey
from shared.study_plan import StudyPlan, parse_plan

SITES = ("aachen", "bern", "cadiz")


@pytest.fixture(scope="session")
def site_keys() -> dict[str, SigningKey]:
    return {site: SigningKey.generate() for site in SITES}


@pytest.fixture(scope="session")
def make_plan(site_keys: dict[str, SigningKey]) -> Callable[..., StudyPlan]:
    others = [SigningKey.generate().verify_key.hex() for _ in range(2)]

    def make(*, mode: str = "distributed", audit_noise: float = 2.0, **audit: Any) -> StudyPlan:
        unprotected = mode == "unprotected"
        return parse_plan(
            {
                "format": "lacuna/study-plan/v1",
                "study_id": "rare-lesion",
                "title": "A study for the audit's tests",
                "roster": {
                    "coordinator_key": others[0],
                    "officer_key": others[1],
                    "sites": [
                        {"site_id": site, "identity_key": key.verify_key.hex()}
                        for site, key in site_keys.items()
                    ],
                },
                "data": {
                    "conditions": ["common", "rare"],
                    "rare_condition": "rare",
                    "labels": ["organ", "lesion"],
                    "grid_shape": [24, 24, 24],
                    "spacing_mm": [4.0, 4.0, 4.0],
                    "simulated": True,
                },
                "model": {
                    "preset": "micro",
                    "autoencoder_sha256": "a" * 64,
                    "prior_sha256": "b" * 64,
                    "trainable": "all",
                    "dimension": 1000,
                    "sampling_steps": 4,
                },
                "privacy": {
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
                "secure_aggregation": {
                    "threshold": 3,
                    "max_colluding": 1,
                    "grid_step": 0.001,
                    "clamp_steps": 100000,
                },
                "audit": {
                    "score_edges": [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0],
                    "control_edges": [0.9, 1.1],
                    "copy_distance": 0.2,
                    **audit,
                },
                "release": {"site_approvals": 2},
            },
            what="test plan",
        )

    return make
