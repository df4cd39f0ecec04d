"""``compliance verify`` on a real bundle: passes it, and names every tampering."""

from __future__ import annotations

import hashlib
import json
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from release_study import AT, SITES, Study, attempt_records, make_ledger, make_study, make_verdict, reseal

from privacy.compliance.approvals import approve_decision
from privacy.compliance.ledger_check import SeenHead
from privacy.compliance.recheck import REQUIRED_CONDITIONS, required_conditions
from privacy.compliance.release_log import log_head, read_log_file
from privacy.compliance.verify import VerificationReport, verify_bundle
from privacy.dp.accounting import PrivacyEvent
from privacy.ledger_chain import read_export
from server.release.gate_conditions import CHECKS, TITLES, conditions_of
from server.release.log import append_withdrawal
from shared.attestation import Statement, Subject, sign_statement
from shared.identity import SigningKey
from shared.study_plan import SecondaryAttackClause

RELEASE = "attestations/release.dsse.json"
DECISION = "attestations/gate-decision.dsse.json"
ATTESTATIONS = [
    "attestations/plan.json",
    "attestations/plan.dsse.json",
    DECISION,
    RELEASE,
    "attestations/approvals/officer.dsse.json",
    "attestations/approvals/site-alpha.dsse.json",
    "attestations/approvals/site-beta.dsse.json",
    *(
        f"attestations/{kind}/{s}.dsse.json"
        for kind in ("ledgers", "verdicts", "plan-approvals")
        for s in SITES
    ),
]
FILES = [
    *ATTESTATIONS,
    "LICENSE",
    "configs/metadata.json",
    "configs/inference.json",
    "docs/README.md",
    "models/autoencoder.safetensors",
    "models/denoiser.safetensors",
]


@pytest.fixture
def copy(bundle: Path, tmp_path: Path) -> Path:
    shutil.copytree(bundle, tmp_path / "bundle")
    return tmp_path / "bundle"


def failing(report: VerificationReport) -> str:
    return "\n".join(f"{check.name}: {check.detail}" for check in report.failed)


def assert_named(path: Path, name: str, **options: Any) -> None:
    """The bundle fails, and a failed check names the file, by path or by its last part."""
    report = verify_bundle(path, **options)
    assert not report.passed
    assert name in failing(report)


def redecide(path: Path, study: Study, change: Callable[[dict[str, Any]], None], **inputs: Any) -> None:
    """The coordinator signs a decision of its liking over the evidence given, everybody approves it."""
    decision = replace(study.decide(), inputs=replace(study.inputs, **inputs))
    predicate = {**decision.to_dict(), "evaluated_at": AT}
    change(predicate)
    for site, data in {**decision.inputs.verdicts}.items():
        (path / f"attestations/verdicts/{site}.dsse.json").write_bytes(data)
    for site, data in {**decision.inputs.ledgers}.items():
        (path / f"attestations/ledgers/{site}.dsse.json").write_bytes(data)
    files = [n for n in ATTESTATIONS if "approvals/" not in n or "plan-approvals" in n]
    subjects = [n for n in files if n not in (RELEASE, DECISION)]
    subjects += ["models/autoencoder.safetensors", "models/denoiser.safetensors"]
    statement = Statement(
        predicate_type="gate-decision/v1",
        subjects=tuple(
            Subject(name=n, sha256=hashlib.sha256((path / n).read_bytes()).hexdigest())
            for n in sorted(subjects)
        ),
        predicate=predicate,
    )
    data = sign_statement(statement, study.coordinator)
    (path / DECISION).write_bytes(data)
    for name, role, site in (
        ("site-alpha", "site", "alpha"),
        ("site-beta", "site", "beta"),
        ("officer", "officer", None),
    ):
        signed = approve_decision(
            data,
            plan=study.plan,
            key=study.keys[site or "officer"],
            role=role,
            site_id=site,  # type: ignore[arg-type]
        )
        (path / f"attestations/approvals/{name}.dsse.json").write_bytes(signed)
    metadata = json.loads((path / "configs/metadata.json").read_text())
    metadata["lacuna"]["decision_sha256"] = hashlib.sha256(data).hexdigest()
    (path / "configs/metadata.json").write_text(json.dumps(metadata))
    reseal(path, study)


def nothing(predicate: dict[str, Any]) -> None:
    """No change."""


EVERYTHING: dict[str, Any] = {
    "secondary_attacks": (
        SecondaryAttackClause(attack="sima", timesteps=(0.2,), edges=(0.0,), pooled_weight=4),
    ),
    "mechanism_canaries": 100,
    "canaries_per_site": 8,
}
"""Every clause that asks for further conditions of the gate."""


def test_the_honest_bundle_passes_with_everything_listed(study: Study, bundle: Path, log: Path) -> None:
    key = study.coordinator.verify_key
    export = read_export(study.inputs.ledgers["alpha"], study.keys["alpha"].verify_key)
    seen = {"alpha": [SeenHead.parse(export.head.to_dict())]}
    for trusted in (key.hex(), key.fingerprint):
        report = verify_bundle(bundle, trusted_coordinator=trusted, log=log, seen_heads=seen)
        assert report.passed, failing(report)
        assert not report.unchecked
    names = [check.name for check in report.checks]
    assert {f"file {name}" for name in FILES if name != RELEASE} <= set(names)
    assert {f"gate {name}" for name in REQUIRED_CONDITIONS} <= set(names)
    assert report.to_dict()["passed"] is True


def test_what_was_not_given_is_listed_as_unchecked(bundle: Path) -> None:
    unchecked = {check.name for check in verify_bundle(bundle).unchecked}
    assert unchecked == {"coordinator key", "release log", "ledger receipts"}


def test_the_officer_demands_every_condition_of_the_gate(study: Study) -> None:
    assert (
        list(REQUIRED_CONDITIONS) == list(conditions_of(study.plan)) == list(required_conditions(study.plan))
    )


def test_the_officer_demands_what_a_plan_asks_for_besides(study: Study) -> None:
    asking = study.plan.model_copy(update={"audit": study.plan.audit.model_copy(update=EVERYTHING)})
    assert list(TITLES) == list(conditions_of(asking)) and len(TITLES) == 31
    assert set(CHECKS) == set(TITLES) == set(required_conditions(asking))


def test_files_of_the_bundle_are_those_that_are_tampered_with_below(bundle: Path) -> None:
    found = {p.relative_to(bundle).as_posix() for p in bundle.rglob("*") if p.is_file()}
    assert found == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_one_byte_flipped_is_named(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    positions = {0, len(data) - 1, *random.Random(name).sample(range(len(data)), 2)}
    for position in positions:
        changed = bytearray(data)
        changed[position] ^= 1 << random.Random(position).randrange(8)
        (copy / name).write_bytes(bytes(changed))
        assert_named(copy, name)


@pytest.mark.parametrize("name", FILES)
def test_each_file_dropped_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert_named(copy, name)


@pytest.mark.parametrize("name", [n for n in ATTESTATIONS if n != RELEASE])
def test_each_attestation_dropped_is_noticed_even_when_sealed_again(
    copy: Path, study: Study, name: str
) -> None:
    (copy / name).unlink()
    reseal(copy, study)
    report = verify_bundle(copy)
    assert not report.passed
    words = failing(report)
    if "approvals/" in name and "plan-approvals" not in name:
        assert "approvals" in words
    else:
        assert name in words


def test_ledger_of_another_site_swapped_in_is_named(copy: Path, study: Study) -> None:
    shutil.copyfile(
        copy / "attestations/ledgers/alpha.dsse.json", copy / "attestations/ledgers/beta.dsse.json"
    )
    assert_named(copy, "ledgers/beta")
    reseal(copy, study)
    assert_named(copy, "ledger of beta: signed by key")


def test_approvals_of_another_decision_are_named(copy: Path, study: Study) -> None:
    other = study.signed_decision(study.decide(plan_approvals=None))
    for name, data in zip(("site-alpha", "site-beta", "officer"), study.approvals(other), strict=True):
        (copy / f"attestations/approvals/{name}.dsse.json").write_bytes(data)
    reseal(copy, study)
    assert_named(copy, "it approves another gate decision")


def test_plan_altered_is_named_even_when_signed_again(copy: Path, study: Study) -> None:
    from shared.plan_package import sign_plan
    from shared.study_plan import parse_plan

    value = study.plan.model_dump(mode="json")
    value["privacy"]["epsilon"] = 50.0
    plan = parse_plan(value, what="altered")
    (copy / "attestations/plan.json").write_bytes(plan.canonical())
    reseal(copy, study)
    assert_named(copy, "plan altered")
    (copy / "attestations/plan.dsse.json").write_bytes(sign_plan(plan, study.coordinator))
    reseal(copy, study, plan_sha256=plan.digest().hex())
    report = verify_bundle(copy)
    words = failing(report)
    for text in ("about another plan", "charged under another plan", "approves another plan"):
        assert text in words


def test_extra_files_links_and_empty_folders_are_named(copy: Path) -> None:
    (copy / "models/model.pt").write_bytes(b"pickle")
    assert_named(copy, "models/model.pt: not part of the release")
    (copy / "models/model.pt").unlink()
    (copy / "extra").symlink_to("/etc/hostname")
    assert_named(copy, "extra is not a plain file")
    (copy / "extra").unlink()
    (copy / "empty").mkdir()
    assert_named(copy, "empty/ is an empty folder")


def test_another_candidate_with_its_own_seal_is_named(copy: Path, study: Study) -> None:
    (copy / "models/denoiser.safetensors").write_bytes(b"\0" * 100)
    reseal(copy, study)
    assert_named(copy, "another candidate")


def test_a_whole_bundle_of_a_wrong_coordinator_is_named_where_the_key_is_known(
    study: Study, tmp_path: Path
) -> None:
    forged = make_study(tmp_path)
    path = forged.release(tmp_path / "bundle").path
    assert verify_bundle(path).passed, "internally consistent: only the anchor can tell"
    assert_named(path, "wrong coordinator", trusted_coordinator=study.coordinator.verify_key.hex())


def test_release_signed_by_somebody_else_is_named(copy: Path, study: Study) -> None:
    stranger = replace(study, keys={**study.keys, "coordinator": SigningKey.generate()})
    reseal(copy, stranger)
    assert_named(copy, "release.dsse.json: signed by key")


def test_withdrawn_unlogged_and_cut_logs_are_named(
    copy: Path, study: Study, log: Path, tmp_path: Path
) -> None:
    own = tmp_path / "log.jsonl"
    own.write_bytes(b"")
    assert_named(copy, "not in the log", log=own)
    shutil.copyfile(log, own)
    assert verify_bundle(copy, log=own).passed
    digest = hashlib.sha256((copy / RELEASE).read_bytes()).hexdigest()
    append_withdrawal(
        own, bundle_sha256=digest, study_id="rare-lesion", key=study.coordinator, at=AT, reason="defect 7"
    )
    assert_named(copy, "withdrawn on 2026-01-31T12:00:00Z: defect 7", log=own)
    head = log_head(read_log_file(own))
    assert_named(copy, "cut off", log=log, log_at_least=head)
    assert_named(copy, "cannot be read", log=tmp_path / "none.jsonl")


LIES: list[tuple[str, Callable[[dict[str, Any]], None], Callable[[Study], dict[str, Any]], str]] = [
    (
        "veto ignored",
        nothing,
        lambda s: {"verdicts": {**s.inputs.verdicts, "beta": verdict(s, "beta", veto=True)}},
        "gate no-veto",
    ),
    (
        "verdict of another candidate",
        nothing,
        lambda s: {"verdicts": {**s.inputs.verdicts, "beta": verdict(s, "beta", candidate_sha256="9" * 64)}},
        "verdict of beta: about another candidate",
    ),
    (
        "verdict of another attempt",
        nothing,
        lambda s: {"verdicts": {**s.inputs.verdicts, "beta": verdict(s, "beta", attempt=3)}},
        "verdict of beta: about attempt 3",
    ),
    (
        "condition left out",
        lambda p: p["conditions"].pop(),
        lambda _: {},
        "conditions left out: no-veto",
    ),
    ("attempts hidden", lambda p: p["attempts"].pop(1), lambda _: {}, "charged attempt 2, which"),
    (
        "attempt moved to another site's account",
        lambda p: p["attempts"][0]["survivors"].append("delta"),
        lambda _: {},
        "delta did not charge completed attempt 1",
    ),
    (
        "round never completed",
        lambda p: p["attempts"][4].update(status="aborted"),
        lambda _: {},
        "3 of 4 rounds",
    ),
    (
        "second audit",
        lambda p: p["attempts"].append({**p["attempts"][-1], "attempt": 101}),
        lambda _: {},
        "2 completed audits",
    ),
    (
        "epsilon beautified",
        lambda p: p["spending"][1].update(epsilon_world=1.0),
        lambda _: {},
        "beta: epsilon_world is stated as 1,",
    ),
]


def other_ledger(study: Study, name: str, **options: Any) -> dict[str, Any]:
    """Alpha's ledger with other charges, honestly signed by alpha."""
    root = study.root / f"lie-{name}"
    if not root.exists():
        make_ledger(root, study.keys["alpha"], study.plan, attempt_records(), **options)
    return {"ledgers": {**study.inputs.ledgers, "alpha": (root / "export.json").read_bytes()}}


def doubled(_: str, event: PrivacyEvent) -> PrivacyEvent:
    """An event that claims twice the noise that the plan has."""
    return replace(event, noise_multiplier_world=2 * event.noise_multiplier_world)


def unprotected(_: str, __: PrivacyEvent) -> PrivacyEvent:
    return PrivacyEvent.unprotected()


def nominal(purpose: str, event: PrivacyEvent) -> PrivacyEvent:
    """Only a little more noise than there is: the plan's own figure, sensitivity's surcharge forgotten."""
    return replace(event, noise_multiplier_world=event.noise_multiplier_world * (1 + 1e-7))


LIES += [
    (
        "charges claim a little more noise",
        nothing,
        lambda s: other_ledger(s, "nominal", event=nominal),
        "ledger of alpha: entry 3 charges another event",
    ),
    (
        "charges claim more noise",
        nothing,
        lambda s: other_ledger(s, "noise", event=doubled),
        "ledger of alpha: entry 3 charges another event",
    ),
    (
        "no protection at one site",
        nothing,
        lambda s: other_ledger(s, "none", event=unprotected),
        "alpha spent epsilon inf",
    ),
]


def test_an_attestation_that_the_gate_never_saw_is_named(copy: Path, study: Study) -> None:
    shutil.copyfile(
        copy / "attestations/ledgers/alpha.dsse.json", copy / "attestations/ledgers/delta.dsse.json"
    )
    reseal(copy, study)
    assert_named(copy, "attestations/ledgers/delta.dsse.json was not before the gate")
    (copy / "attestations/notes.json").write_text("{}")
    reseal(copy, study)
    assert_named(copy, "unknown attestations: attestations/notes.json")


def verdict(study: Study, site: str, **changes: Any) -> bytes:
    return make_verdict(study.keys, study.plan, site, study.inputs.candidate_sha256, **changes)


@pytest.mark.parametrize(
    ("change", "inputs", "named"), [lie[1:] for lie in LIES], ids=[lie[0] for lie in LIES]
)
def test_a_coordinator_who_lies_with_a_valid_signature_is_named(
    copy: Path,
    study: Study,
    change: Callable[[dict[str, Any]], None],
    inputs: Callable[[Study], dict[str, Any]],
    named: str,
) -> None:
    redecide(copy, study, change, **inputs(study))
    assert_named(copy, named)


def test_redeciding_without_a_lie_passes(copy: Path, study: Study) -> None:
    """So the failures above come from the lies, not from the way they are signed."""
    redecide(copy, study, nothing)
    report = verify_bundle(copy)
    assert report.passed, failing(report)


def test_metadata_and_model_card_that_flatter_are_named(copy: Path, study: Study) -> None:
    card = copy / "docs/README.md"
    honest = card.read_text()
    spent = study.decide().spending[0]
    card.write_text(honest.replace(f"| {spent.epsilon_world:.2f} |", "| 0.50 |"))
    reseal(copy, study)
    assert_named(copy, "does not show the budget")
    card.write_text(honest)
    metadata = json.loads((copy / "configs/metadata.json").read_text())
    metadata["lacuna"]["privacy"]["epsilon"] = 1.0
    (copy / "configs/metadata.json").write_text(json.dumps(metadata))
    reseal(copy, study)
    assert_named(copy, "metadata.json differs from plan or weights in: privacy")


def test_no_bundle_at_all_is_a_failure_not_an_exception(tmp_path: Path) -> None:
    assert not verify_bundle(tmp_path / "none").passed
    assert not verify_bundle(tmp_path).passed
    (tmp_path / "attestations").mkdir()
    for name in ("plan.json", "release.dsse.json"):
        (tmp_path / "attestations" / name).write_bytes(b"[[[[[")
    assert not verify_bundle(tmp_path).passed


FORBIDDEN = """
import importlib.abc, sys
class Forbid(importlib.abc.MetaPathFinder):
    names = {"torch", "monai", "opacus", "flwr", "grpc", "server", "client", "deploy", "safetensors"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names or name == "shared.attestation":
            raise ImportError("forbidden here: " + name)
        return None
sys.meta_path.insert(0, Forbid())
from pathlib import Path
from privacy.compliance.verify import verify_bundle
from privacy.compliance.budget import budget
from privacy.compliance.report import print_verification
report = verify_bundle(Path(sys.argv[1]))
print(len(report.checks), report.passed)
assert report.passed, report.failed
rows = budget(sorted((Path(sys.argv[1]) / "attestations/ledgers").iterdir()))
assert len(rows) == 3 and not any(row.fault for row in rows)
"""


def test_verifies_without_torch_server_or_the_signers_code_in_ten_seconds(bundle: Path) -> None:
    """Processor time, not wall time: the test machine may be busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, str(bundle)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
