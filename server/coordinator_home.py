"""The coordinator's own files: its key, and who is enrolled in each study."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.authority import CERTIFICATE_DAYS, CertificateAuthority
from server.study_store import coordinator_root
from shared.canonical import canonical_json, parse_json
from shared.enrolment import EnrolmentRequest, check_name, open_request
from shared.errors import CoordinatorError, RefusedError
from shared.home import private_directory, write_private
from shared.identity import SigningKey
from shared.site_certificate import SiteCertificate
from shared.study_plan import MAX_SITES, RosterClause, SiteEntry


@dataclass(frozen=True)
class CoordinatorHome:
    """Paths under ``LACUNA_HOME/coordinator``."""

    root: Path

    @classmethod
    def default(cls) -> CoordinatorHome:
        return cls(coordinator_root())

    @property
    def key_path(self) -> Path:
        return self.root / "coordinator.key"

    def study(self, study_id: str) -> Path:
        """The study's folder. Raises CoordinatorError if it was not set up."""
        path = self.root / study_id
        if not path.is_dir():
            known = ", ".join(self.studies()) or "none"
            raise CoordinatorError(
                f"there is no study {study_id!r} here (studies: {known})",
                remedy="lacuna coordinator init STUDY",
            )
        return path

    def studies(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(
            path.name for path in self.root.iterdir() if path.is_dir() and not path.name.startswith(".")
        )

    @property
    def authority(self) -> CertificateAuthority:
        """Certificates of the sites' perimeters; may not be set up."""
        return CertificateAuthority(self.root)

    def key(self) -> SigningKey:
        if not self.key_path.exists():
            raise CoordinatorError("no coordinator's key is here", remedy="lacuna coordinator init STUDY")
        return SigningKey.load(self.key_path)

    def public(self, study_id: str) -> Path:
        """Folder of the study's public networks, their recipe and calibration."""
        return self.study(study_id) / "public"

    def draft_path(self, study_id: str) -> Path:
        return self.study(study_id) / "plan.toml"

    def init(self, study_id: str) -> Path:
        """Make the coordinator's key where there is none, and the study's folder.

        Raises:
            CoordinatorError: the study exists.
            UsageError: its name is no identifier.
        """
        check_name(study_id)
        private_directory(self.root)
        if not self.key_path.exists():
            SigningKey.generate().save(self.key_path)
        path = self.root / study_id
        if path.exists():
            raise CoordinatorError(f"study {study_id!r} exists already in {path}")
        return private_directory(path)

    # enrolment

    def enrol(self, study_id: str, request_bytes: bytes, *, fingerprint: str) -> EnrolmentRequest:
        """Enrol a site or the officer, after comparing the fingerprint that was read out of band.

        Raises:
            RefusedError: the fingerprint is another; nothing was enrolled.
            CoordinatorError: the name stands for another key already, the key for another name, the roster
                is full, or the plan is signed.
        """
        request = open_request(request_bytes)
        if request.key.fingerprint != fingerprint:
            raise RefusedError(
                f"the request of {request.name!r} carries the key {request.key.fingerprint}, "
                f"not {fingerprint}",
                remedy="ask them to read the fingerprint again, over another channel than the file's",
            )
        enrolled = self.enrolled(study_id)
        if (self.study(study_id) / "plan").exists():
            raise CoordinatorError("the plan is signed: its roster does not change any more")
        key, sites = request.key.hex(), enrolled["sites"]
        known = enrolled["officer"] if request.role == "officer" else sites.get(request.name)
        if known not in (None, key):
            who = "an officer" if request.role == "officer" else f"site {request.name!r}"
            raise CoordinatorError(f"{who} is enrolled already, with another key")
        if known is None and key in {*sites.values(), enrolled["officer"], self.key().verify_key.hex()}:
            raise CoordinatorError(f"the key of {request.name!r} stands for somebody else in this study")
        if known is None and request.role == "site" and len(sites) >= MAX_SITES:
            raise CoordinatorError(f"a study has at most {MAX_SITES} sites")
        if request.role == "officer":
            enrolled["officer"] = key
        else:
            sites[request.name] = key
        write_private(self.study(study_id) / "enrolled.json", canonical_json(enrolled))
        return request

    def certify(self, request_bytes: bytes, *, days: int = CERTIFICATE_DAYS) -> SiteCertificate:
        """A certificate for a site that is enrolled in a study here: its first one, or the next.

        The request is signed by the identity that was enrolled, so there is nothing to compare again.

        Raises:
            RefusedError: nobody of that name is enrolled with that key, or the site was revoked.
        """
        request = open_request(request_bytes)
        if not any(
            self.enrolled(study)["sites"].get(request.name) == request.key.hex() for study in self.studies()
        ):
            raise RefusedError(
                f"no site {request.name!r} with key {request.key.fingerprint} is enrolled here",
                remedy="lacuna coordinator enrol REQUEST --study STUDY --fingerprint SHA256:...",
            )
        return self.authority.issue(request, days=days)

    def enrolled(self, study_id: str) -> dict[str, Any]:
        """``{"sites": {site_id: key}, "officer": key or None}``."""
        path = self.study(study_id) / "enrolled.json"
        if not path.exists():
            return {"sites": {}, "officer": None}
        value = parse_json(path.read_bytes(), what=str(path))
        if not isinstance(value, dict) or set(value) != {"sites", "officer"}:
            raise CoordinatorError(f"{path} is damaged")
        return value

    def roster(self, study_id: str) -> RosterClause:
        """The plan's roster, sites by name. Raises CoordinatorError: too few sites, or no officer."""
        enrolled = self.enrolled(study_id)
        if len(enrolled["sites"]) < 3 or enrolled["officer"] is None:
            raise CoordinatorError(
                f"study {study_id!r} has {len(enrolled['sites'])} sites and "
                f"{'an' if enrolled['officer'] else 'no'} officer; it needs 3 sites and the officer",
                remedy="lacuna coordinator enrol REQUEST --study STUDY --fingerprint ...",
            )
        return RosterClause(
            coordinator_key=self.key().verify_key.hex(),
            officer_key=enrolled["officer"],
            sites=tuple(
                SiteEntry(site_id=name, identity_key=key) for name, key in sorted(enrolled["sites"].items())
            ),
        )
