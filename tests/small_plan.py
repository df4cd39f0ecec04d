"""A small, valid study plan with real keys, for tests that need a plan and no networks."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from privacy.dp.calibration import propose_privacy
from shared.identity import SigningKey
from shared.study_plan import StudyPlan, default_threshold, parse_plan

DIMENSION = 48
ROUNDS = 2


@cache
def _proposed(n_sites: int) -> tuple[dict[str, Any], dict[str, Any]]:
    proposed = propose_privacy(
        mode="distributed",
        epsilon=8.0,
        delta=1e-5,
        clip_norm=1.0,
        rounds=ROUNDS,
        n_sites=n_sites,
        threshold=default_threshold(n_sites, 1),
        max_colluding=1,
        dimension=DIMENSION,
        declared_patients=100,
    )
    return proposed.privacy.model_dump(), proposed.secure_aggregation.model_dump()


@dataclass
class Keys:
    """Identities of everybody in the plan's roster."""

    sites: list[SigningKey]
    coordinator: SigningKey = field(default_factory=SigningKey.generate)
    officer: SigningKey = field(default_factory=SigningKey.generate)

    @classmethod
    def of(cls, n_sites: int) -> Keys:
        return cls([SigningKey.generate() for _ in range(n_sites)])


def plan_document(keys: Keys | None = None) -> dict[str, Any]:
    """The plan as nested dictionaries, to be changed by a test and parsed."""
    keys = keys or Keys.of(3)
    privacy, secure_aggregation = _proposed(len(keys.sites))
    return {
        "format": "lacuna/study-plan/v1",
        "study_id": "small",
        "title": "a small plan",
        "expires": "2099-12-31",
        "roster": {
            "coordinator_key": keys.coordinator.verify_key.hex(),
            "officer_key": keys.officer.verify_key.hex(),
            "sites": [
                {"site_id": f"site-{i}", "identity_key": key.verify_key.hex()}
                for i, key in enumerate(keys.sites)
            ],
        },
        "data": {
            "conditions": ["common", "rare"],
            "rare_condition": "rare",
            "labels": ["organ", "lesion"],
            "grid_shape": [16, 16, 16],
            "spacing_mm": [4.0, 4.0, 4.0],
            "simulated": True,
        },
        "model": {
            "preset": "micro",
            "autoencoder_sha256": "a" * 64,
            "prior_sha256": "b" * 64,
            "trainable": "all",
            "dimension": DIMENSION,
        },
        "privacy": copy.deepcopy(privacy),
        "secure_aggregation": copy.deepcopy(secure_aggregation),
        "audit": {"score_edges": [0.0], "control_edges": [0.0], "copy_distance": 1.0},
        "release": {"site_approvals": 2},
    }


def changed(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy with one clause changed; ``path`` is dotted, value ``...`` removes the clause."""
    document = copy.deepcopy(document)
    *parents, last = path.split(".")
    place: Any = document
    for name in parents:
        place = place[int(name) if isinstance(place, list) else name]
    if value is ...:
        del place[last]
    else:
        place[int(last) if isinstance(place, list) else last] = value
    return document


def small_plan(keys: Keys | None = None, **changes: Any) -> StudyPlan:
    """A valid plan; keyword ``privacy__rounds=3`` changes clause ``privacy.rounds``."""
    document = plan_document(keys)
    for name, value in changes.items():
        document = changed(document, name.replace("__", "."), value)
    return parse_plan(document, what="small plan")
