"""A hospital's own files: identity, policy, ledger, and one folder per study."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

from client.site_policy import SitePolicy, load_policy, save_policy
from shared.canonical import parse_json
from shared.enrolment import make_request
from shared.errors import SiteError
from shared.home import lacuna_home, private_directory, write_private
from shared.identity import SigningKey
from shared.plan_package import PlanPackage, open_plan_package


@dataclass(frozen=True)
class SiteHome:
    """Paths under one root; nothing is read before it is asked for."""

    root: Path

    @classmethod
    def default(cls) -> SiteHome:
        return cls(lacuna_home() / "site")

    @property
    def identity_path(self) -> Path:
        return self.root / "identity.key"

    @property
    def policy_path(self) -> Path:
        return self.root / "policy.toml"

    @property
    def ledger_path(self) -> Path:
        return self.root / "ledger.sqlite"

    @property
    def counter_path(self) -> Path:
        """The ledger's counter. Outside ``LACUNA_HOME``, so that a backup of it does not take it along."""
        base = os.environ.get("LACUNA_COUNTER_DIR") or Path.home() / ".local" / "state" / "lacuna"
        name = hashlib.sha256(str(self.root.absolute()).encode()).hexdigest()[:16]
        return Path(base).expanduser() / f"site-{name}.counter"

    def study(self, study_id: str) -> Path:
        """Everything of one study: the approved plan, the store of scans with its key, latents, audits."""
        return self.root / study_id

    def store_path(self, study_id: str) -> Path:
        return self.study(study_id) / "store"

    @property
    def site_id(self) -> str:
        path = self.root / "site.json"
        try:
            value = parse_json(path.read_bytes(), what=str(path))
        except OSError as error:
            raise SiteError(
                f"no site is set up in {self.root}", remedy="lacuna site init --name NAME"
            ) from error
        if not isinstance(value, dict) or not isinstance(value.get("site_id"), str):
            raise SiteError(f"{path} is damaged: it names no site_id")
        return str(value["site_id"])

    def identity(self) -> SigningKey:
        return SigningKey.load(self.identity_path)

    def policy(self) -> SitePolicy:
        return load_policy(self.policy_path)

    def approved_plan(self, study_id: str) -> PlanPackage:
        """The package that this site approved. Raises SiteError if it approved none of that study."""
        root = self.study(study_id) / "plan"
        if not root.is_dir():
            approved = ", ".join(self.studies()) or "none"
            raise SiteError(
                f"this site has not approved a plan of study {study_id!r} (approved: {approved})",
                remedy="lacuna site approve PLAN",
            )
        return open_plan_package(root)

    def studies(self) -> list[str]:
        """Ids of the studies with an approved plan."""
        if not self.root.is_dir():
            return []
        return sorted(path.parent.name for path in self.root.glob("*/plan") if path.is_dir())


def init_site(home: SiteHome, *, name: str) -> bytes:
    """Make keys, policy and an empty ledger with its witness; nothing that exists is overwritten.

    The ledger is made here and nowhere else: one that is lost later is missed, never begun again.

    Returns:
        The enrolment request for the coordinator.

    Raises:
        SiteError: a site is set up here already, or a ledger or witness of an earlier one is.
        UsageError: the name is no identifier.
    """
    from privacy.ledger import Ledger

    if home.identity_path.exists():
        raise SiteError(f"{home.root} holds site {home.site_id!r} already")
    key = SigningKey.generate()
    request = make_request(role="site", name=name, key=key)
    private_directory(home.root)
    write_private(home.root / "site.json", json.dumps({"site_id": name}).encode())
    if not home.policy_path.exists():
        save_policy(SitePolicy(), home.policy_path)
    home.counter_path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    Ledger.open(home.ledger_path, key=key, counter_path=home.counter_path, create=True).close()
    key.save(home.identity_path)
    return request
