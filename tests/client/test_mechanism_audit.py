"""``lacuna site audit-mechanism`` on a plan with a real (untrained) network, and what the site signs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_plan import Keys, plan_document

from client.mechanism_audit import audit_installation, installation_statement
from client.site_home import SiteHome, init_site
from deploy.cli.main import main
from privacy.audit.mechanism import AuditSize, MechanismAudit
from privacy.audit.mechanism_statement import (
    CLAIMS,
    MechanismMismatchError,
    MechanismStatement,
)
from privacy.audit.site_evidence import open_mechanism, sign_mechanism
from privacy.dp import trainer as trainer_module
from privacy.dp.calibration import propose_privacy
from privacy.dp.noise import noise_share
from shared.errors import MalformedMessageError
from shared.exit_codes import ExitCode
from shared.identity import BadSignatureError, SigningKey
from shared.model.autoencoder import build_autoencoder
from shared.model.denoiser import build_denoiser, flatten, parameter_subset
from shared.model.presets import preset_named
from shared.model.weights import save_weights
from shared.plan_package import PlanPackage, write_plan_package
from shared.study_plan import parse_plan

SMALL = AuditSize(canaries=60, empty_steps=1, canary_steps=2, signal_steps=1, grid_pairs=1)


def write_package(root: Path, first: SigningKey) -> PlanPackage:
    """Three sites, preset ``micro``, attention trained privately."""
    preset = preset_named("micro")
    denoiser = build_denoiser(preset, n_conditions=2)
    prior, autoencoder = root / "prior.safetensors", root / "autoencoder.safetensors"
    prior_sha256 = save_weights(denoiser, prior, {})
    autoencoder_sha256 = save_weights(build_autoencoder(preset, n_labels=2), autoencoder, {})
    dimension = len(flatten(parameter_subset(denoiser, "attention")))
    proposed = propose_privacy(
        mode="distributed", epsilon=8.0, delta=1e-5, clip_norm=0.5, rounds=10, n_sites=3, threshold=3,
        max_colluding=1, dimension=dimension, declared_patients=60,
    )  # fmt: skip
    keys = Keys([first, SigningKey.generate(), SigningKey.generate()])
    document = plan_document(keys)
    document["data"]["grid_shape"] = list(preset.grid_shape)
    document["model"] = {
        "preset": "micro", "autoencoder_sha256": autoencoder_sha256, "prior_sha256": prior_sha256,
        "trainable": "attention", "dimension": dimension,
    }  # fmt: skip
    document["privacy"] = proposed.privacy.model_dump()
    document["secure_aggregation"] = proposed.secure_aggregation.model_dump()
    plan = parse_plan(document, what="test plan")
    return write_plan_package(root / "plan", plan, key=keys.coordinator, autoencoder=autoencoder, prior=prior)


@pytest.fixture(scope="module")
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, key: SigningKey) -> PlanPackage:
    return write_package(tmp_path_factory.mktemp("package"), key)


@pytest.fixture(scope="module")
def audit(package: PlanPackage) -> MechanismAudit:
    """Fails by chance with probability at most 1e-6."""
    return audit_installation(package, size=SMALL)


def test_the_installation_passes_with_every_claim(audit: MechanismAudit) -> None:
    assert audit.passed, audit.failed
    assert {check.name for check in audit.checks} == set(CLAIMS)


def test_a_statement_survives_its_bytes_and_fits_its_plan(
    audit: MechanismAudit, package: PlanPackage, key: SigningKey
) -> None:
    statement = installation_statement(package, audit, site_id="site-0")
    opened = open_mechanism(sign_mechanism(statement, key), key=key.verify_key)
    assert opened == statement and opened.passed
    opened.check(package.plan)
    assert opened.software["torch"] != "not installed"


def changed(statement: MechanismStatement, **fields: Any) -> MechanismStatement:
    return replace(statement, **fields)


def test_statements_that_do_not_hold_together_are_refused(
    audit: MechanismAudit, package: PlanPackage, key: SigningKey
) -> None:
    good = installation_statement(package, audit, site_id="site-0")
    first, *rest = good.checks
    wrong = {
        "other plan": changed(good, plan_sha256="0" * 64),
        "not in the roster": changed(good, site_id="site-9"),
        "a claim left out": changed(good, checks=tuple(rest)),
        "a claim twice": changed(good, checks=(*good.checks, first)),
        "a broken claim called whole": changed(
            good, checks=(replace(first, smallest_p=0.0, passed=True), *rest)
        ),
        "levels too large": changed(good, checks=(replace(first, level=1e-5), *rest)),
        "levels at which everything passes": changed(
            good, checks=tuple(replace(check, level=0.0) for check in good.checks)
        ),
    }
    for name, statement in wrong.items():
        with pytest.raises(MechanismMismatchError):
            open_mechanism(sign_mechanism(statement, key), key=key.verify_key).check(package.plan)
            pytest.fail(name)
    document = good.to_dict()
    for change in (
        {"passed": False}, {"extra": 1}, {"canaries": True}, {"checks": [{}]}, {"software": []},
        {"site_id": ""}, {"false_failure_probability": 2.0},
    ):  # fmt: skip
        with pytest.raises(MalformedMessageError):
            MechanismStatement.from_dict({**document, **change})
    with pytest.raises(BadSignatureError):
        open_mechanism(sign_mechanism(good, SigningKey.generate()), key=key.verify_key)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    monkeypatch.setattr("privacy.audit.mechanism.AuditSize", lambda: SMALL)

    def call(*words: str) -> tuple[Any, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["site", "audit-mechanism", *words])
        shown = capsys.readouterr()
        return stop.value.code, shown.out, shown.err

    return call


def test_the_command_signs_what_it_found(run: Any, tmp_path: Path) -> None:
    home = SiteHome(tmp_path / "home" / "site")
    init_site(home, name="site-0")
    own = write_package(tmp_path, home.identity())
    code, out, err = run(str(own.root), "--out", str(tmp_path / "m.dsse.json"))
    assert code == 0, out + err
    assert "no violation found, at this power" in out and "BROKEN" not in out
    opened = open_mechanism((tmp_path / "m.dsse.json").read_bytes(), key=home.identity().verify_key)
    opened.check(own.plan)
    code, out, _ = run(str(own.root), "--out", str(tmp_path / "again.json"), "--json")
    assert code == 0 and json.loads(out)["passed"]
    assert (tmp_path / "again.json").exists()


def test_a_broken_installation_is_refused_and_says_why(
    run: Any, package: PlanPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a home and without a key: anybody who has the plan can look."""
    monkeypatch.setattr(
        trainer_module, "noise_share", lambda *a: np.rint(0.5 * noise_share(*a)).astype(np.int64)
    )
    code, out, err = run(str(package.root), "--json")
    assert code == ExitCode.REFUSED
    assert "share-variance" in err and "do not serve" in err
    found = json.loads(out)
    assert not found["passed"] and found["false_failure_probability"] <= 1.1e-6
    broken = {check["name"] for check in found["checks"] if not check["passed"]}
    assert {"share-variance", "total-variance", "network-variance"} <= broken
