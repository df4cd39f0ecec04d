"""A signed package of the small plan, for tests of commands. (No tests of its own.)"""

from __future__ import annotations

import hashlib
from pathlib import Path

from small_plan import Keys, small_plan

from shared.identity import SigningKey
from shared.plan_package import PlanPackage, write_plan_package


def write_small_package(root: Path, *, first: SigningKey | None = None) -> PlanPackage:
    """Networks are stand-ins; ``first`` is the key of site-0."""
    keys = Keys.of(3)
    if first is not None:
        keys.sites[0] = first
    network = root.with_name("network")
    network.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    plan = small_plan(keys, model__autoencoder_sha256=digest, model__prior_sha256=digest)
    return write_plan_package(root, plan, key=keys.coordinator, autoencoder=network, prior=network)
