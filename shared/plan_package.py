"""The plan package: what a coordinator hands to the sites, as one directory of files.

``plan.json`` (canonical bytes), ``plan.toml`` (for people), ``plan.dsse.json`` (the coordinator's
signature), and the public networks that the plan names by hash: autoencoder, prior, and the copy check's
embedding and the segmenter where the plan has them. Whoever opens a package checks the
signature and every hash before anything is used.
"""

from __future__ import annotations

import hashlib
import shutil
from dataclasses import dataclass
from pathlib import Path

from shared.attestation import Statement, Subject, open_statement, sign_statement
from shared.canonical import parse_json
from shared.errors import CoordinatorError
from shared.identity import SigningKey, VerifyKey
from shared.study_plan import InvalidPlanError, StudyPlan, load_plan_toml, parse_plan

PLAN_PREDICATE = "plan/v1"
PACKAGE_FILES = ("plan.json", "plan.toml", "plan.dsse.json", "autoencoder.safetensors", "prior.safetensors")
"""Files of every package."""

PLAUSIBILITY_FILE = "plausibility.json"
"""There where the plan names it."""

COPY_EMBEDDING_FILE = "copy_embedding.safetensors"
"""There where the plan names it."""

SEGMENTER_FILE = "segmenter.safetensors"
"""There where the plan names it."""
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class PlanPackage:
    """A verified package: the plan, its signed envelope, and where the public networks are."""

    root: Path
    plan: StudyPlan
    envelope: bytes

    @property
    def autoencoder(self) -> Path:
        return self.root / "autoencoder.safetensors"

    @property
    def prior(self) -> Path:
        return self.root / "prior.safetensors"

    @property
    def plausibility(self) -> Path | None:
        """Ranges that synthetic scans are checked against; None where the plan names none."""
        return None if self.plan.data.plausibility_sha256 is None else self.root / PLAUSIBILITY_FILE

    @property
    def copy_embedding(self) -> Path | None:
        """The copy check's network; None where the plan names none."""
        return None if self.plan.audit.copy_embedding_sha256 is None else self.root / COPY_EMBEDDING_FILE

    @property
    def segmenter(self) -> Path | None:
        """The network that synthetic masks are held against; None where the plan names none."""
        return None if self.plan.data.segmenter_sha256 is None else self.root / SEGMENTER_FILE

    def named_files(self) -> dict[Path, str]:
        """Every file that the plan names, with the SHA-256 that it names."""
        plan = self.plan
        files = (
            (self.autoencoder, plan.model.autoencoder_sha256),
            (self.prior, plan.model.prior_sha256),
            (self.plausibility, plan.data.plausibility_sha256),
            (self.copy_embedding, plan.audit.copy_embedding_sha256),
            (self.segmenter, plan.data.segmenter_sha256),
        )
        return {path: sha256 for path, sha256 in files if path is not None and sha256 is not None}

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the package's files."""
        return tuple(dict.fromkeys([*PACKAGE_FILES, *(path.name for path in self.named_files())]))


def hash_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in chunks. Raises CoordinatorError if it cannot be read."""
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                state.update(chunk)
    except OSError as error:
        raise CoordinatorError(f"{path} cannot be read: {error.strerror}") from error
    return state.hexdigest()


def sign_plan(plan: StudyPlan, key: SigningKey) -> bytes:
    """The coordinator's DSSE envelope over the plan."""
    subject = Subject(name="plan.json", sha256=hashlib.sha256(plan.canonical()).hexdigest())
    predicate = {"study_id": plan.study_id, "plan_sha256": plan.digest().hex()}
    return sign_statement(
        Statement(predicate_type=PLAN_PREDICATE, subjects=(subject,), predicate=predicate), key
    )


def write_plan_package(
    root: Path,
    plan: StudyPlan,
    *,
    key: SigningKey,
    autoencoder: Path,
    prior: Path,
    plausibility: Path | None = None,
    copy_embedding: Path | None = None,
    segmenter: Path | None = None,
) -> PlanPackage:
    """Sign a plan and write its package.

    Args:
        plausibility, copy_embedding, segmenter: Where the plan names one, and nowhere else.

    Raises:
        CoordinatorError: the directory exists, the key is not the plan's, or a file is missing or not the
            one that the plan names.
    """
    if key.verify_key.hex() != plan.roster.coordinator_key:
        raise CoordinatorError("the plan names another coordinator key than the one that would sign it")
    if root.exists():
        raise CoordinatorError(
            f"{root} exists already; a signed plan is never overwritten",
            remedy="give the changed plan a new study id, or another directory",
        )
    package = PlanPackage(root=root, plan=plan, envelope=sign_plan(plan, key))
    named = package.named_files()
    given = {
        package.autoencoder: autoencoder,
        package.prior: prior,
        root / PLAUSIBILITY_FILE: plausibility,
        root / COPY_EMBEDDING_FILE: copy_embedding,
        root / SEGMENTER_FILE: segmenter,
    }
    for target, path in given.items():
        if (None if path is None else hash_file(path)) != named.get(target):
            raise CoordinatorError(f"{path or target.name} has another SHA-256 than the plan names")
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "plan.json").write_bytes(plan.canonical())
    (part / "plan.toml").write_text(plan.to_toml(), encoding="utf-8")
    (part / "plan.dsse.json").write_bytes(package.envelope)
    for target, path in given.items():
        if path is not None:
            shutil.copyfile(path, part / target.name)
    part.rename(root)
    return package


def open_plan_package(root: Path) -> PlanPackage:
    """Read and verify a package: schema, signature by the key the plan itself names, all hashes, and that
    the form for people says the same.

    The caller still has to check that the coordinator's key is the one it has pinned.

    Raises:
        CoordinatorError, InvalidPlanError, PeerError: names the file that is wrong.
    """
    try:
        data = (root / "plan.json").read_bytes()
        envelope = (root / "plan.dsse.json").read_bytes()
    except OSError as error:
        raise CoordinatorError(
            f"{root} is not a plan package: {Path(str(error.filename)).name} cannot be read"
        ) from error
    value = parse_json(data, what="plan.json")
    if not isinstance(value, dict):
        raise InvalidPlanError("plan.json is not a study plan")
    plan = parse_plan(value, what="plan.json")
    if plan.canonical() != data:
        raise InvalidPlanError("plan.json is not in canonical form")
    key = VerifyKey.from_hex(plan.roster.coordinator_key)
    statement = open_statement(envelope, key=key, predicate_type=PLAN_PREDICATE, what="plan.dsse.json")
    if statement.predicate.get("plan_sha256") != plan.digest().hex():
        raise InvalidPlanError("plan.dsse.json signs another plan than plan.json")
    if load_plan_toml(root / "plan.toml") != plan:
        raise InvalidPlanError("plan.toml, the form that people read, says other things than plan.json")
    package = PlanPackage(root=root, plan=plan, envelope=envelope)
    for path, expected in package.named_files().items():
        if hash_file(path) != expected:
            raise InvalidPlanError(f"{path.name} has another SHA-256 than the plan names")
    return package
