"""The site's own policy: what this hospital agrees to, whatever a coordinator proposes.

The policy is a TOML file that the hospital writes. A plan is approved only if every clause holds; a
refusal names each clause that fails, with both figures. Peers are pinned by the fingerprints of their
keys, verified between hospitals: a plan whose roster has a key that is not pinned is refused.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Annotated, Literal, get_args

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.errors import RefusedError, SiteError
from shared.home import write_private
from shared.identity import VerifyKey
from shared.study_plan import AuditClause, Identifier, Mode, Sha256Hex, StudyPlan, TrainableSubset

Fingerprint = Annotated[str, Field(pattern=r"^SHA256:([0-9a-f]{4}-){15}[0-9a-f]{4}$")]


class InvalidPolicyError(SiteError):
    """The policy file does not parse."""


class PlanRefusedError(RefusedError):
    """The plan breaks the site's policy; ``clauses`` lists every clause that fails."""

    def __init__(self, study_id: str, clauses: tuple[str, ...]) -> None:
        super().__init__(
            f"plan of study {study_id!r} is refused by this site's policy:\n  - " + "\n  - ".join(clauses),
            remedy="talk to the coordinator, or change policy.toml if this hospital agrees after all",
        )
        self.clauses = clauses


class SitePolicy(BaseModel):
    """Frozen; unknown keys are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format: Literal["lacuna/site-policy/v1"] = "lacuna/site-policy/v1"
    max_epsilon: float = Field(default=8.0, gt=0)
    """Largest epsilon of one study."""
    max_total_epsilon: float = Field(default=16.0, gt=0)
    """Cap over all studies on this site's ledger, at ``max_delta``."""
    max_delta: float = Field(default=1e-5, gt=0, lt=1e-2)
    min_sites: int = Field(default=3, ge=2)
    min_threshold: int = Field(default=3, ge=2)
    min_colluding: int = Field(default=1, ge=1)
    """Smallest max_colluding that a plan must tolerate."""
    min_holdout_share: float = Field(default=0.1, ge=0, lt=1)
    allowed_modes: tuple[Mode, ...] = ("distributed", "local")
    allowed_presets: tuple[Identifier, ...] = ("micro", "tiny", "base", "h200")
    allowed_trainable: tuple[TrainableSubset, ...] = get_args(TrainableSubset)
    allow_unprotected: bool = False
    """True admits mode ``unprotected``, which plans may use with simulated data only."""
    max_auc: float = Field(default=0.55, ge=0.5, lt=1)
    """Largest AUC up to which a plan's gate may let the membership attack pass."""
    max_power_at_auc: float = Field(default=0.9, gt=0.5, lt=1)
    min_power: float = Field(default=0.5, ge=0, le=1)
    """Least power of the audit, against an attack of AUC ``max_power_at_auc``."""
    allow_low_power: bool = False
    """True admits plans that release also where the audit is too blind to see much."""
    min_significance: float = Field(default=0.05, gt=0, lt=0.5)
    """A plan with a smaller level blocks less easily."""
    min_copy_samples: int = Field(default=500, ge=0)
    min_copy_distance: float = Field(default=0.1, ge=0)
    """Least distance under which a plan counts a member as copied: far below it nothing ever counts."""
    require_copy_embedding: bool = False
    """True refuses plans that name no embedding for the copy check: they would compare latents, in which a
    mirrored or shifted copy is far from its original."""
    copy_embedding_sha256: Sha256Hex | None = None
    """The one embedding's file that a plan may name; None: any."""
    min_mechanism_canaries: int = Field(default=0, ge=0)
    """Least canaries of the mechanism audit that a plan asks every site's installation to pass; 0: a plan
    may ask for none. Mode ``distributed`` only, the one that this audit covers."""
    max_copied_share: float = Field(default=0.1, ge=0, le=1)
    """Largest share of the declared patients that the gate may let be copied."""
    max_audit_attempts: int = Field(default=2, ge=1)
    min_site_approvals: int = Field(default=2, ge=1)
    require_officer_approval: bool = True
    require_expiry: bool = True
    """False admits plans without a last day."""
    coordinator_fingerprint: Fingerprint | None = None
    officer_fingerprint: Fingerprint | None = None
    peers: dict[Identifier, Fingerprint] = Field(default_factory=dict)

    def refusals(
        self, plan: StudyPlan, *, own_site: str, own_key: VerifyKey, today: date | None = None
    ) -> tuple[str, ...]:
        """Every clause of this policy that the plan breaks, in words; empty if it may be approved.

        Args:
            today: Day to hold the plan's last day against; by default the present, UTC.
        """
        privacy, secagg = plan.privacy, plan.secure_aggregation
        failed: list[str] = []

        def check(holds: bool, clause: str) -> None:
            if not holds:
                failed.append(clause)

        if privacy.mode == "unprotected":
            check(self.allow_unprotected, "allow_unprotected: the plan has mode unprotected (no noise)")
        else:
            check(
                privacy.mode in self.allowed_modes,
                f"allowed_modes: plan has {privacy.mode!r}, policy allows {', '.join(self.allowed_modes)}",
            )
            check(
                privacy.epsilon is not None and privacy.epsilon <= self.max_epsilon,
                f"max_epsilon: plan has {privacy.epsilon}, policy allows at most {self.max_epsilon:g}",
            )
        check(
            privacy.delta <= self.max_delta,
            f"max_delta: plan has {privacy.delta:g}, policy allows at most {self.max_delta:g}",
        )
        check(plan.n_sites >= self.min_sites, f"min_sites: plan has {plan.n_sites}, policy {self.min_sites}")
        check(
            secagg.threshold >= self.min_threshold,
            f"min_threshold: plan has {secagg.threshold}, policy wants at least {self.min_threshold}",
        )
        check(
            secagg.max_colluding >= self.min_colluding,
            f"min_colluding: plan has {secagg.max_colluding}, policy wants at least {self.min_colluding}",
        )
        check(
            plan.audit.holdout_share >= self.min_holdout_share,
            f"min_holdout_share: plan has {plan.audit.holdout_share:g}, policy {self.min_holdout_share:g}",
        )
        check(
            plan.model.preset in self.allowed_presets,
            f"allowed_presets: plan has {plan.model.preset!r}, "
            f"policy allows {', '.join(self.allowed_presets)}",
        )
        check(
            plan.model.trainable in self.allowed_trainable,
            f"allowed_trainable: plan has {plan.model.trainable!r}",
        )
        check(
            plan.release.officer_approval or not self.require_officer_approval,
            "require_officer_approval: the plan lets a release pass without the compliance officer",
        )
        failed.extend(self._audit_refusals(plan))
        if plan.expires is None and self.require_expiry:
            failed.append("require_expiry: the plan has no last day")
        if plan.expired(today or datetime.now(UTC).date()):
            failed.append(f"expired: the plan's last day was {plan.expires}")
        failed.extend(self._identity_refusals(plan, own_site=own_site, own_key=own_key))
        return tuple(failed)

    def _audit_refusals(self, plan: StudyPlan) -> list[str]:
        """Where the plan's audit or gate is weaker than this policy asks for."""
        audit = plan.audit
        share = audit.max_copied_patients / plan.privacy.declared_patients
        at_most: dict[str, tuple[float, float]] = {
            "max_auc": (audit.max_auc, self.max_auc),
            "max_power_at_auc": (audit.power_at_auc, self.max_power_at_auc),
            "max_copied_share": (share, self.max_copied_share),
            "max_audit_attempts": (plan.privacy.max_audit_attempts, self.max_audit_attempts),
        }
        at_least: dict[str, tuple[float, float]] = {
            "min_power": (audit.min_power, self.min_power),
            "min_significance": (audit.significance, self.min_significance),
            "min_copy_samples": (audit.copy_samples, self.min_copy_samples),
            "min_copy_distance": (audit.copy_distance, self.min_copy_distance),
            "min_mechanism_canaries": (
                audit.mechanism_canaries,
                self.min_mechanism_canaries if plan.privacy.mode == "distributed" else 0,
            ),
            "min_site_approvals": (plan.release.site_approvals, self.min_site_approvals),
        }
        failed = [
            f"{clause}: plan has {found:g}, policy allows at most {bound:g}"
            for clause, (found, bound) in at_most.items()
            if found > bound
        ]
        failed += [
            f"{clause}: plan has {found:g}, policy wants at least {bound:g}"
            for clause, (found, bound) in at_least.items()
            if found < bound
        ]
        if audit.low_power == "accept" and not self.allow_low_power:
            failed.append("allow_low_power: the plan releases also where the audit is too blind to see much")
        return failed + self._copy_refusals(audit)

    def _copy_refusals(self, audit: AuditClause) -> list[str]:
        """Where the plan looks for copies in another space than this policy asks for."""
        named, wanted = audit.copy_embedding_sha256, self.copy_embedding_sha256
        failed = []
        if self.require_copy_embedding and named is None:
            failed.append("require_copy_embedding: the plan names no embedding for the copy check")
        if wanted is not None and named != wanted:
            failed.append(
                f"copy_embedding_sha256: plan has {'none' if named is None else named}, policy wants {wanted}"
            )
        return failed

    def _identity_refusals(self, plan: StudyPlan, *, own_site: str, own_key: VerifyKey) -> list[str]:
        failed: list[str] = []
        roster = plan.roster
        for role, key_hex, pinned in (
            ("coordinator", roster.coordinator_key, self.coordinator_fingerprint),
            ("officer", roster.officer_key, self.officer_fingerprint),
        ):
            shown = VerifyKey.from_hex(key_hex).fingerprint
            if pinned is None:
                failed.append(f"{role}_fingerprint: not pinned; the plan's {role} key is {shown}")
            elif pinned != shown:
                failed.append(f"{role}_fingerprint: the plan's {role} key is {shown}, pinned is {pinned}")
        if own_site not in {entry.site_id for entry in roster.sites}:
            failed.append(f"roster: this site, {own_site!r}, is not in it")
        for entry in roster.sites:
            shown = entry.verify_key.fingerprint
            if entry.site_id == own_site:
                if entry.verify_key != own_key:
                    failed.append(f"roster: the key given for this site ({shown}) is not this site's key")
            elif entry.site_id not in self.peers:
                failed.append(f"peers: {entry.site_id!r} is not pinned; the plan's key for it is {shown}")
            elif self.peers[entry.site_id] != shown:
                failed.append(
                    f"peers: the plan's key for {entry.site_id!r} is {shown}, "
                    f"pinned is {self.peers[entry.site_id]}"
                )
        return failed

    def check(self, plan: StudyPlan, *, own_site: str, own_key: VerifyKey) -> None:
        """Raise PlanRefusedError, naming every clause that fails."""
        failed = self.refusals(plan, own_site=own_site, own_key=own_key)
        if failed:
            raise PlanRefusedError(plan.study_id, failed)

    def pinned(self, name: str, fingerprint: str) -> SitePolicy:
        """A copy with one more pin: ``coordinator``, ``officer``, or a peer's site id."""
        value = self.model_dump()
        if name in ("coordinator", "officer"):
            value[f"{name}_fingerprint"] = fingerprint
        else:
            value["peers"] = {**self.peers, name: fingerprint}
        return _validated(value, what=f"pin of {name!r}")

    def pins(self) -> dict[str, str]:
        """Every pinned fingerprint by name, ``coordinator`` and ``officer`` among them."""
        known = {"coordinator": self.coordinator_fingerprint, "officer": self.officer_fingerprint}
        return {**{name: value for name, value in known.items() if value is not None}, **self.peers}

    def pinned_together(
        self, wanted: Mapping[str, str], *, own: tuple[str, str | None], writer: str
    ) -> tuple[SitePolicy, frozenset[str]]:
        """A copy with the pins of a sheet, and the names that are new; nothing is ever replaced.

        Args:
            own: This site's fingerprint, and what the sheet says it is (None: nothing).
            writer: Of the sheet, for the error.

        Raises:
            RefusedError: the sheet contradicts a pin, or gives this site another key.
        """
        pins = self.pins()
        wrong = [name for name, value in wanted.items() if pins.get(name, value) != value]
        if own[1] not in (None, own[0]):
            wrong.append("this site itself")
        if wrong:
            raise RefusedError(
                f"the sheet of {writer} contradicts what is pinned here for: {', '.join(sorted(wrong))}",
                remedy="find out by telephone who is right; lacuna site pin NAME SHA256:... changes a pin",
            )
        policy = self
        for name, value in wanted.items():
            policy = policy.pinned(name, value)
        return policy, frozenset(wanted) - frozenset(pins)

    def changed(self, change: str) -> SitePolicy:
        """A copy with one clause changed, ``key=value`` with the value as TOML. Raises InvalidPolicyError."""
        try:
            value = tomllib.loads(change)
        except tomllib.TOMLDecodeError as error:
            raise InvalidPolicyError(f"{change!r} is not KEY=VALUE in TOML: {error}") from error
        return _validated({**self.model_dump(), **value}, what=f"change {change!r}")

    def clauses(self, names: Iterable[str]) -> list[str]:
        """Top-level clauses as lines of TOML, in the order of the names."""
        value = self.model_dump(mode="json", exclude_none=True)
        return [tomli_w.dumps({name: value[name]}).rstrip() for name in names if name in value]


def load_policy(path: Path) -> SitePolicy:
    """Read policy.toml. Raises InvalidPolicyError naming the key that is wrong."""
    try:
        value = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidPolicyError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidPolicyError(f"{path} is not TOML: {error}") from error
    return _validated(value, what=str(path))


def save_policy(policy: SitePolicy, path: Path) -> None:
    """Write policy.toml atomically, mode 0600."""
    value = {key: item for key, item in policy.model_dump(mode="json").items() if item is not None}
    write_private(path, tomli_w.dumps(value).encode())


def _validated(value: object, *, what: str) -> SitePolicy:
    try:
        return SitePolicy.model_validate(value)
    except ValidationError as error:
        lines = [
            f"{'.'.join(str(p) for p in problem['loc']) or 'policy'}: "
            + re.sub("^Value error, ", "", problem["msg"])
            for problem in error.errors()
        ]
        raise InvalidPolicyError(f"{what} is not a valid site policy:\n  " + "\n  ".join(lines)) from error
