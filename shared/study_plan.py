"""The study plan: everything that the hospitals agree on before a scan is touched.

A plan is a TOML file that a person writes and reads; parsed, it is frozen and rejects unknown keys. What
is hashed and signed is its canonical JSON (RFC 8785). Only what affects privacy or the result is in it:
performance settings are each site's own.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
import tomllib
from datetime import date
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from shared.canonical import canonical_json, digest
from shared.errors import CoordinatorError, UsageError
from shared.identity import VerifyKey

_LATER_KEYS: dict[tuple[str, str], Any] = {
    ("audit", "secondary_attacks"): [],
    ("audit", "mechanism_canaries"): 0,
    ("audit", "canaries_per_site"): 0,
    ("audit", "copy_embedding_sha256"): None,
    ("data", "covariates"): [],
    ("data", "modality"): None,
    ("data", "plausibility_sha256"): None,
    ("data", "segmenter_sha256"): None,
}

UNKNOWN_COVARIATE = "unknown"
MAX_COVARIATE_CELLS = 2**24
MAX_PLAN_BYTES = 1024 * 1024
MAX_SITES = 100

SITE_EVIDENCE = ("mechanism-audits", "canary-openings")
"""What a site signs beside its verdict where the plan asks for it; folder names in stores and bundles."""

Identifier = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
PublicKeyHex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sha256Hex = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
TrainableSubset = Literal["all", "attention", "class_embedding", "conditioning", "low_rank"]
Mode = Literal["distributed", "local", "unprotected"]


class InvalidPlanError(CoordinatorError):
    """The plan does not parse, or its clauses contradict one another."""


class Clause(BaseModel):
    """Base of all clauses: frozen, unknown keys rejected, finite numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SiteEntry(Clause):
    """One hospital of the roster."""

    site_id: Identifier
    identity_key: PublicKeyHex

    @property
    def verify_key(self) -> VerifyKey:
        return VerifyKey.from_hex(self.identity_key)


class RosterClause(Clause):
    """Who takes part. The order of ``sites`` is the order of secret shares."""

    coordinator_key: PublicKeyHex
    officer_key: PublicKeyHex
    sites: tuple[SiteEntry, ...] = Field(min_length=2, max_length=MAX_SITES)

    @model_validator(mode="after")
    def _unique(self) -> RosterClause:
        ids = [site.site_id for site in self.sites]
        keys = [site.identity_key for site in self.sites] + [self.coordinator_key, self.officer_key]
        if len(set(ids)) != len(ids):
            raise ValueError("a site id stands twice in the roster")
        if len(set(keys)) != len(keys):
            raise ValueError("the same key stands for two participants of the roster")
        return self


class CovariateClause(Clause):
    """A public property of a scan that the generator is told beside the condition: named values, or bins.

    One of ``values`` and ``edges`` is given. Edges e1 < e2 < ... make the bins below e1, from e1 to below
    e2, ..., from the last on. A scan without the property counts as unknown, which is a value of its own.
    """

    name: Identifier
    values: tuple[Identifier, ...] = Field(default=(), max_length=64)
    edges: tuple[float, ...] = Field(default=(), max_length=63)

    @model_validator(mode="after")
    def _consistent(self) -> CovariateClause:
        if bool(self.values) == bool(self.edges):
            raise ValueError("a covariate has either values or edges")
        if len(set(self.values)) != len(self.values) or UNKNOWN_COVARIATE in self.values:
            raise ValueError(f"values of a covariate are distinct, and none is {UNKNOWN_COVARIATE!r}")
        if any(a >= b for a, b in itertools.pairwise(self.edges)):
            raise ValueError("edges of a covariate ascend")
        return self

    @property
    def size(self) -> int:
        """Number of values or bins, unknown not counted."""
        return len(self.values) or len(self.edges) + 1

    def row(self, text: str) -> int:
        """0 for unknown, otherwise 1 plus the position of the value or bin.

        Raises:
            UsageError: not one of the values, or not a number.
        """
        if text == UNKNOWN_COVARIATE:
            return 0
        if self.values:
            if text not in self.values:
                raise UsageError(
                    f"{self.name}: {text!r} is none of {', '.join(self.values)}",
                    remedy=f"leave it empty or write {UNKNOWN_COVARIATE} where it is not known",
                )
            return 1 + self.values.index(text)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UsageError(f"{self.name}: {text!r} is not a number")
        return 1 + bisect.bisect_right(self.edges, number)

    def describe(self, row: int) -> str:
        """Name of a row for people."""
        if row == 0:
            return UNKNOWN_COVARIATE
        if self.values:
            return self.values[row - 1]
        low = [f"from {self.edges[row - 2]:g}"] if row > 1 else []
        high = [f"below {self.edges[row - 1]:g}"] if row <= len(self.edges) else []
        return " ".join(low + high)


class DataClause(Clause):
    """What a scan looks like for the generator. All of it is public."""

    conditions: tuple[Identifier, ...] = Field(min_length=1, max_length=64)
    rare_condition: Identifier
    labels: tuple[Identifier, ...] = Field(min_length=1, max_length=16)
    """Names of mask labels 1, 2, ...; 0 is background."""
    grid_shape: tuple[int, int, int]
    """Canonical grid in voxels (depth, height, width)."""
    spacing_mm: tuple[float, float, float]
    intensity_percentiles: tuple[float, float] = (0.5, 99.5)
    """Each volume is scaled so that these percentiles of its own voxels become 0 and 1."""
    covariates: tuple[CovariateClause, ...] = Field(default=(), max_length=8)
    """Further public properties that scans are generated by; see :mod:`shared.model.conditioning`."""
    modality: Literal["MR", "CT"] | None = None
    """Of the scans; decides the DICOM object that synthetic scans are written as."""
    plausibility_sha256: Sha256Hex | None = None
    """Of the public ranges that synthetic scans are checked against (:mod:`shared.volumes.plausibility`)."""
    segmenter_sha256: Sha256Hex | None = None
    """Of the public network that synthetic masks are held against (:mod:`shared.model.segmenter`)."""
    simulated: bool = False
    """True where every scan is simulated; the only data that mode ``unprotected`` may see."""

    @model_validator(mode="after")
    def _consistent(self) -> DataClause:
        if self.rare_condition not in self.conditions:
            raise ValueError("rare_condition is not one of conditions")
        if len(set(self.conditions)) != len(self.conditions):
            raise ValueError("a condition stands twice")
        names = [covariate.name for covariate in self.covariates]
        if len(set(names)) != len(names):
            raise ValueError("a covariate stands twice")
        if math.prod(covariate.size + 1 for covariate in self.covariates) > MAX_COVARIATE_CELLS:
            raise ValueError(f"covariates have more than {MAX_COVARIATE_CELLS} combinations")
        if not all(8 <= side <= 512 for side in self.grid_shape):
            raise ValueError("grid_shape: each side has 8 to 512 voxels")
        if not all(0.05 <= step <= 20 for step in self.spacing_mm):
            raise ValueError("spacing_mm: each spacing is 0.05 to 20 mm")
        low, high = self.intensity_percentiles
        if not 0 <= low < high <= 100:
            raise ValueError("intensity_percentiles must ascend within 0..100")
        return self


class ModelClause(Clause):
    """Networks, their public starting point, and how the server moves them."""

    preset: Identifier
    autoencoder_sha256: Sha256Hex
    prior_sha256: Sha256Hex
    trainable: TrainableSubset
    dimension: int = Field(ge=1, le=2**31)
    """d: number of privately trained parameters, the length of the aggregated vector."""
    server_learning_rate: float = Field(default=1e-3, gt=0, le=10)
    ema_decay: float = Field(default=0.9, ge=0, lt=1)
    local_learning_rate: float = Field(default=1e-3, gt=0, le=10)
    """Step of the local optimizer; modes ``local`` and ``unprotected`` only."""
    sampling_steps: int = Field(default=30, ge=1, le=1000)
    guidance_scale: float = Field(default=1.0, ge=0, le=20)


class PrivacyClause(Clause):
    """Differential privacy. The unit is the patient; there is no other."""

    unit: Literal["patient"]
    neighbouring: Literal["add_or_remove_one_patient"]
    mode: Mode
    epsilon: float | None = Field(gt=0, le=100)
    """Total over training and audit, per patient, against the server, c sites and the world.
    None (infinite) in mode ``unprotected`` and nowhere else."""
    delta: float = Field(gt=0, lt=1e-2)
    clip_norm: float = Field(gt=0, le=1e6)
    sampling_rate: float = Field(default=1.0, gt=0, le=1)
    draws_per_patient: int = Field(default=4, ge=1, le=1024)
    declared_patients: int = Field(ge=1)
    """Public, rounded number of members over all sites: the constant that sums are divided by."""
    rounds: int = Field(ge=1, le=100_000)
    max_attempts: int = Field(ge=1, le=200_000)
    """Training attempts that may ever be charged: rounds plus the retry reserve."""
    local_steps: int = Field(default=1, ge=1, le=100_000)
    noise_multiplier: float = Field(ge=0, le=1e6)
    """sigma: standard deviation, in units of the clip norm, of the noise that t - c honest shares add
    up to (``distributed``), or of each site's own noise in each local step (``local``)."""
    audit_noise_multiplier: float = Field(ge=0, le=1e6)
    """The same for the audit's counts, in units of their sensitivity."""
    max_audit_attempts: int = Field(default=2, ge=1, le=100)

    @model_validator(mode="after")
    def _consistent(self) -> PrivacyClause:
        if self.max_attempts < self.rounds:
            raise ValueError("max_attempts is smaller than rounds")
        if (self.mode == "unprotected") != (self.epsilon is None):
            raise ValueError("epsilon is left out (infinite) in mode unprotected and nowhere else")
        if self.mode == "unprotected":
            if self.noise_multiplier or self.audit_noise_multiplier:
                raise ValueError("mode unprotected has no noise: both noise multipliers are 0")
        elif self.noise_multiplier <= 0 or self.audit_noise_multiplier <= 0:
            raise ValueError(f"mode {self.mode} needs noise multipliers above 0")
        if self.mode == "distributed" and self.local_steps != 1:
            raise ValueError("mode distributed takes one step a round: local_steps is 1")
        return self


class SecureAggregationClause(Clause):
    """Thresholds and ranges of the masked sum."""

    threshold: int = Field(ge=2, le=MAX_SITES)
    """t: the smallest number of sites whose sum may be unmasked."""
    max_colluding: int = Field(ge=1, le=MAX_SITES)
    """c: how many sites may pool what they see with the server."""
    modulus_bits: Literal[32, 64] = 32
    grid_step: float = Field(gt=0)
    """gamma: size of one integer step, in the units of the vector."""
    clamp_steps: int = Field(ge=1)
    """Bound on each coordinate of a site's noiseless vector, in grid steps."""


class SecondaryAttackClause(Clause):
    """One more membership attack, every choice of it fixed before training (:mod:`privacy.audit.attacks`)."""

    attack: Literal["loss", "sima", "pia", "secmi", "gradient_norm"]
    timesteps: tuple[float, ...] = Field(min_length=1, max_length=64)
    """Ascending, in [0, 1]. ``pia``: the first is the proximal query. ``secmi``: nodes of the path from the
    latent; the last step is taken back."""
    draws_per_timestep: int = Field(default=1, ge=1, le=256)
    """Noises at each timestep: ``loss`` and ``gradient_norm`` only, the others draw none."""
    norm: Literal[1, 2, 4] = 2
    """Exponent of the figure's norm; 2 for ``loss``."""
    member_side: Literal["low", "high"] = "low"
    """On which side of a threshold a figure speaks for membership."""
    calibrated: bool = False
    """Whether the same figure of the public prior is taken off."""
    guidance_scale: float = Field(default=1.0, ge=0, le=20)
    """Of the attacked network; 1: without guidance."""
    edges: tuple[float, ...] = ()
    """Thresholds of the pooled count, on the score (higher speaks for membership); none where not pooled."""
    pooled_weight: int = Field(default=0, ge=0, le=16)
    """Weight in the pooled counts; 0: the figures stay at the site alone."""

    @property
    def attack_id(self) -> str:
        """Name in reports, such as ``sima`` or ``pia, calibrated, guidance 3``."""
        guided = "" if self.guidance_scale == 1.0 else f", guidance {self.guidance_scale:g}"
        return self.attack + (", calibrated" if self.calibrated else "") + guided

    @model_validator(mode="after")
    def _consistent(self) -> SecondaryAttackClause:
        steps, edges = self.timesteps, self.edges
        if not all(0.0 <= t <= 1.0 for t in steps) or any(a >= b for a, b in itertools.pairwise(steps)):
            raise ValueError("timesteps ascend within [0, 1]")
        if self.attack in ("pia", "secmi") and len(steps) < 2:
            raise ValueError(f"{self.attack} compares two timesteps: at least 2 are needed")
        if self.attack in ("sima", "pia", "secmi") and self.draws_per_timestep != 1:
            raise ValueError(f"{self.attack} draws no noise: draws_per_timestep is 1")
        if self.attack == "loss" and self.norm != 2:
            raise ValueError("the loss is a squared error: norm is 2")
        if len(edges) > 64 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError("edges: at most 64 ascending numbers")
        if (self.pooled_weight > 0) != bool(edges):
            raise ValueError("edges are given where pooled_weight is above 0, and nowhere else")
        return self


class AuditClause(Clause):
    """Membership inference, copies, and what their figures must be. Fixed before training."""

    holdout_share: float = Field(default=1 / 3, gt=0, lt=1)
    significance: float = Field(default=0.05, gt=0, lt=0.5)
    """One level, split over all tests."""
    timesteps: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)
    draws_per_timestep: int = Field(default=2, ge=1, le=256)
    score_edges: tuple[float, ...]
    """Ascending edges of the histogram of the primary attack's score (reference-calibrated loss)."""
    control_edges: tuple[float, ...]
    """The same for the controls' scores."""
    copy_samples: int = Field(default=500, ge=0, le=100_000)
    """Generated samples that each site compares with its members."""
    copy_distance: float = Field(gt=0)
    """A member with a generated sample nearer than this, in the public embedding, counts as copied."""
    copy_embedding_sha256: Sha256Hex | None = None
    """File of the embedding's network; None: decoded and encoded latents are compared."""
    max_copied_patients: int = Field(default=0, ge=0)
    low_power: Literal["refuse", "accept"] = "refuse"
    min_power: float = Field(default=0.5, ge=0, le=1)
    """Power, against an attack of AUC ``power_at_auc``, below which the audit counts as blind."""
    max_auc: float = Field(default=0.55, ge=0.5, lt=1)
    """The gate refuses when the lower end of the pooled attack's AUC interval is above this."""
    power_at_auc: float = Field(default=0.9, gt=0.5, lt=1)
    secondary_attacks: tuple[SecondaryAttackClause, ...] = Field(default=(), max_length=16)
    mechanism_canaries: int = Field(default=0, ge=0, le=100_000)
    """Least number of canaries in the mechanism audit that every site's installation has to pass; 0: none
    is asked for."""
    canaries_per_site: int = Field(default=0, ge=0, le=1000)
    """In-run canaries: synthetic patients at each site, each trained on if a committed fair coin says so."""

    @property
    def pooled_attacks(self) -> tuple[SecondaryAttackClause, ...]:
        """Secondary attacks whose counts leave the site."""
        return tuple(attack for attack in self.secondary_attacks if attack.pooled_weight)

    @field_validator("secondary_attacks")
    @classmethod
    def _distinct(cls, attacks: tuple[SecondaryAttackClause, ...]) -> tuple[SecondaryAttackClause, ...]:
        names = [attack.attack_id for attack in attacks]
        if len(set(names)) != len(names):
            raise ValueError("an attack stands twice in secondary_attacks")
        return attacks

    @field_validator("score_edges", "control_edges")
    @classmethod
    def _ascending(cls, edges: tuple[float, ...]) -> tuple[float, ...]:
        if not 1 <= len(edges) <= 64 or any(a >= b for a, b in itertools.pairwise(edges)):
            raise ValueError("edges: 1 to 64 ascending numbers")
        return edges


class ReleaseClause(Clause):
    """Who must say yes before a bundle leaves the consortium."""

    site_approvals: int = Field(ge=1, le=MAX_SITES)
    officer_approval: bool = True


class StudyPlan(Clause):
    """A whole plan. ``digest`` identifies it everywhere."""

    format: Literal["lacuna/study-plan/v1"]
    study_id: Identifier
    title: str = Field(max_length=200)
    expires: date | None = None
    """Last day on which sites train, the gate decides and anybody approves; None: no such day."""
    roster: RosterClause
    data: DataClause
    model: ModelClause
    privacy: PrivacyClause
    secure_aggregation: SecureAggregationClause
    audit: AuditClause
    release: ReleaseClause

    @model_validator(mode="after")
    def _consistent(self) -> StudyPlan:
        n, t, c = self.n_sites, self.secure_aggregation.threshold, self.secure_aggregation.max_colluding
        if t > n:
            raise ValueError(f"threshold {t} is larger than the number of sites {n}")
        if 2 * t <= n + c:
            raise ValueError(
                f"threshold {t} is too small: t > (n + c)/2 = {(n + c) / 2:g} is needed, or a cheating "
                "server could collect both secrets of one site"
            )
        if self.privacy.mode == "distributed" and t - c < 2:
            raise ValueError(f"mode distributed needs threshold - max_colluding >= 2, not {t - c}")
        if self.privacy.mode == "unprotected" and not self.data.simulated:
            raise ValueError("mode unprotected is for simulated data only")
        if self.audit.mechanism_canaries and self.privacy.mode != "distributed":
            raise ValueError("audit.mechanism_canaries: the mechanism audit covers mode distributed alone")
        if self.release.site_approvals > n:
            raise ValueError("release.site_approvals is larger than the number of sites")
        return self

    @property
    def n_sites(self) -> int:
        return len(self.roster.sites)

    def canonical(self) -> bytes:
        """RFC 8785 bytes: what is hashed and signed. Keys that came after the first plans are left out
        where they have the value that plans without them mean."""
        value = self.model_dump(mode="json")
        if self.expires is None:
            del value["expires"]
        for (clause, name), absent in _LATER_KEYS.items():
            if value[clause][name] == absent:
                del value[clause][name]
        return canonical_json(value)

    def digest(self) -> bytes:
        """32 bytes that stand for exactly this plan."""
        return digest("lacuna/study-plan/v1", self.canonical())

    def expired(self, day: date) -> bool:
        """Whether ``day`` is after the plan's last."""
        return self.expires is not None and day > self.expires

    def site(self, site_id: str) -> SiteEntry:
        """The roster's entry. Raises InvalidPlanError if there is none."""
        for entry in self.roster.sites:
            if entry.site_id == site_id:
                return entry
        raise InvalidPlanError(f"site {site_id!r} is not in the roster of study {self.study_id!r}")

    def to_toml(self) -> str:
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def parse_plan(value: dict[str, Any], *, what: str) -> StudyPlan:
    """Validate a parsed document.

    Raises:
        InvalidPlanError: names every clause that is wrong.
    """
    if isinstance(value.get("privacy"), dict):
        value = {**value, "privacy": {"epsilon": None, **value["privacy"]}}
    try:
        return StudyPlan.model_validate(value)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            place = ".".join(str(part) for part in problem["loc"]) or "plan"
            lines.append(f"{place}: {re.sub('^Value error, ', '', problem['msg'])}")
        raise InvalidPlanError(f"{what} is not a valid study plan:\n  " + "\n  ".join(lines)) from error


def parse_covariate(text: str) -> CovariateClause:
    """A covariate from ``NAME=VALUE,VALUE,...``, where numbers are the edges of bins.

    Raises:
        UsageError: not of that form.
    """
    name, _, values = text.partition("=")
    parts = [part.strip() for part in values.split(",")]
    try:
        edges = [float(part) for part in parts]
    except ValueError:
        edges = []
    given = {"edges": edges} if edges else {"values": parts}
    try:
        return CovariateClause.model_validate({"name": name.strip(), **given})
    except ValidationError as error:
        raise UsageError(
            f"covariate {text!r}: {re.sub('^Value error, ', '', error.errors()[0]['msg'])}",
            remedy="write for example sex=female,male or age=40,60",
        ) from error


def load_plan_toml(path: Path) -> StudyPlan:
    """Read a plan from TOML. Raises InvalidPlanError."""
    try:
        data = path.read_bytes()
        if len(data) > MAX_PLAN_BYTES:
            raise InvalidPlanError(f"{path} is larger than {MAX_PLAN_BYTES} bytes: not a study plan")
        value = tomllib.loads(data.decode("utf-8"))
    except OSError as error:
        raise InvalidPlanError(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidPlanError(f"{path} is not TOML: {error}") from error
    return parse_plan(value, what=str(path))


def default_threshold(n_sites: int, max_colluding: int) -> int:
    """floor((n + c)/2) + 1, the smallest threshold with t > (n + c)/2 (DESIGN section 6, rule 3)."""
    return math.floor((n_sites + max_colluding) / 2) + 1


def default_max_attempts(rounds: int) -> int:
    """Rounds plus a retry reserve of max(3, 20%)."""
    return rounds + max(3, math.ceil(rounds / 5))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return value
