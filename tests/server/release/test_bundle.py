"""The bundle: layout, MONAI configs, model card, and every reason not to write one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from release_study import AT, Study, make_study, make_verdict, reseal

from privacy.compliance.approvals import approve_decision, check_approvals
from privacy.compliance.dsse import EvidenceError
from privacy.compliance.release_log import read_log_file
from privacy.compliance.verify import verify_bundle
from server.release.bundle import ReleaseRefusedError, bundle_sha256, write_bundle
from server.release.gate import GateDecision, sign_decision
from shared.checkpoint import file_sha256
from shared.errors import CoordinatorError, RefusedError, UsageError
from shared.identity import SigningKey

MONAI_FIELDS = {
    "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "required_packages_version",
    "task", "description", "authors", "copyright", "network_data_format", "schema",
}  # fmt: skip


def vetoed(study: Study) -> GateDecision:
    verdict = make_verdict(study.keys, study.plan, "beta", study.inputs.candidate_sha256, veto=True)
    return study.decide(verdicts={**study.inputs.verdicts, "beta": verdict})


def test_released_bundle_has_the_monai_layout_and_is_logged(study: Study, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    released = study.release(tmp_path / "bundle", log_path=log)
    names = {p.relative_to(released.path).as_posix() for p in released.path.rglob("*") if p.is_file()}
    assert {"configs/metadata.json", "configs/inference.json", "docs/README.md", "LICENSE"} <= names
    assert {"models/autoencoder.safetensors", "models/denoiser.safetensors"} <= names
    assert {f"attestations/ledgers/{s}.dsse.json" for s in ("alpha", "beta", "gamma")} <= names
    assert {"attestations/approvals/officer.dsse.json", "attestations/release.dsse.json"} <= names
    metadata = json.loads((released.path / "configs/metadata.json").read_text())
    assert set(metadata) >= MONAI_FIELDS
    assert metadata["lacuna"]["synthetic"] is True
    assert metadata["lacuna"]["conditions"] == ["common", "rare"]
    assert (released.path / "models/denoiser.safetensors").read_bytes() == study.candidate.read_bytes()
    assert released.bundle_sha256 == bundle_sha256(released.path)
    assert [e.bundle_sha256 for e in read_log_file(log)] == [released.bundle_sha256]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "log.jsonl"]


def test_model_card_says_what_an_officer_asks_for(study: Study, tmp_path: Path) -> None:
    card = (study.release(tmp_path / "bundle").path / "docs/README.md").read_text()
    spent = study.decide().spending[0]
    for text in (
        "synthetic", "one **patient**", "added or removed", f"**{spent.epsilon_world:.2f}**",
        f"**{spent.epsilon_colluding:.2f}**", "1e-05", "no violation found, at the power stated",
        "What is not covered", "The gate: RELEASE", study.coordinator.verify_key.fingerprint,
        "| alpha | 5 | 1 |", "Randomness", "Composition", "trust model",
    ):  # fmt: skip
        assert text.lower() in card.lower(), text


def test_refused_decision_gives_no_bundle_whatever_is_approved(study: Study, tmp_path: Path) -> None:
    refused = study.signed_decision(vetoed(study))
    with pytest.raises(ReleaseRefusedError, match="no-veto"):
        study.release(
            tmp_path / "bundle", decision=refused, approvals=study.approvals(study.signed_decision())
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kept", "missing"), [([0, 1], "no officer"), ([0, 2], "1 sites"), ([2, 2], "0 sites"), ([], "0 sites")]
)
def test_approvals_must_suffice(study: Study, tmp_path: Path, kept: list[int], missing: str) -> None:
    decision = study.signed_decision()
    given = study.approvals(decision)
    with pytest.raises(ReleaseRefusedError, match=missing):
        study.release(tmp_path / "bundle", decision=decision, approvals=[given[i] for i in kept])


def test_one_site_approving_twice_counts_once(study: Study) -> None:
    decision = study.signed_decision()
    first, _, officer = study.approvals(decision)
    count = check_approvals(decision, [first, first, officer], plan=study.plan)
    assert count.sites == ("alpha",) and not count.sufficient


def test_approvals_of_another_decision_or_by_strangers_do_not_count(study: Study, tmp_path: Path) -> None:
    decision = study.signed_decision()
    later = "2026-02-01T00:00:00Z"
    other = sign_decision(study.decide(at=later), study.coordinator, at=later)
    assert other != decision
    with pytest.raises(ReleaseRefusedError, match="another gate decision"):
        study.release(tmp_path / "bundle", decision=decision, approvals=study.approvals(other))
    count = check_approvals(decision, [b"", b"{}", study.inputs.plan_envelope], plan=study.plan)
    assert len(count.rejected) == 3 and not count.sites


def test_evidence_must_be_what_the_gate_saw(study: Study, tmp_path: Path) -> None:
    swapped = {**study.inputs.ledgers, "beta": study.inputs.ledgers["alpha"]}
    with pytest.raises(ReleaseRefusedError, match=r"ledgers/beta.*not the one that the gate decided on"):
        study.release(tmp_path / "bundle", ledgers=swapped)
    fewer = {k: v for k, v in study.inputs.verdicts.items() if k != "beta"}
    with pytest.raises(ReleaseRefusedError, match=r"verdicts/beta.*not here"):
        study.release(tmp_path / "bundle", verdicts=fewer)


def test_weights_must_be_what_the_gate_saw(study: Study, tmp_path: Path) -> None:
    changed = tmp_path / "changed.safetensors"
    changed.write_bytes(study.candidate.read_bytes()[:-1] + b"\0")
    arguments: dict[str, Any] = {"key": study.coordinator, "at": AT}
    with pytest.raises(ReleaseRefusedError, match="denoiser"):
        write_bundle(
            tmp_path / "b", study.evidence(), autoencoder=study.autoencoder, candidate=changed, **arguments
        )
    with pytest.raises(ReleaseRefusedError, match="autoencoder"):
        write_bundle(
            tmp_path / "b", study.evidence(), autoencoder=changed, candidate=study.candidate, **arguments
        )
    assert [p.name for p in tmp_path.iterdir()] == ["changed.safetensors"]


@pytest.mark.parametrize(
    ("kind", "file"),
    [("plausibility", "configs/plausibility.json"), ("segmenter", "models/segmenter.safetensors")],
)
def test_ranges_and_segmenter_go_in_as_the_plan_names_them(tmp_path: Path, kind: str, file: str) -> None:
    right, other = tmp_path / "right", tmp_path / "other"
    right.write_text('{"the": "ranges"}')
    other.write_text('{"the": "others"}')
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    named = make_study(tmp_path / "with", **{f"{kind}_sha256": file_sha256(right)})
    plain = make_study(tmp_path / "without")
    assert kind.encode() in named.plan.canonical() and kind.encode() not in plain.plan.canonical()

    def write(study: Study, brought: Path | None, out: str) -> Path:
        return write_bundle(
            tmp_path / out, study.evidence(), autoencoder=study.autoencoder, candidate=study.candidate,
            key=study.coordinator, at=AT, **{kind: brought},
        ).path  # fmt: skip

    for study, wrong in ((named, None), (named, other), (plain, right)):
        with pytest.raises(ReleaseRefusedError, match=file):
            write(study, wrong, "refused")
    bundle = write(named, right, "bundle")
    assert (bundle / file).read_bytes() == right.read_bytes()
    key = named.plan.roster.coordinator_key
    assert verify_bundle(bundle, trusted_coordinator=key).passed
    # A coordinator who swaps the file and signs the bundle again is found out by the plan's hash.
    (bundle / file).write_bytes(other.read_bytes())
    reseal(bundle, named)
    failed = verify_bundle(bundle, trusted_coordinator=key).failed
    assert [check.name for check in failed] == ["metadata"] and kind in failed[0].detail


def test_a_lying_coordinator_is_stopped_by_the_officers_checker(study: Study, tmp_path: Path) -> None:
    """A decision that says release over a vetoing verdict: signed and approved, still no bundle."""
    honest = study.decide()
    lying = GateDecision(inputs=vetoed(study).inputs, conditions=honest.conditions, spending=honest.spending)
    with pytest.raises(ReleaseRefusedError, match="gate no-veto"):
        study.release(
            tmp_path / "bundle", decision=study.signed_decision(lying), verdicts=lying.inputs.verdicts
        )
    assert list(tmp_path.iterdir()) == []


def test_never_overwrites_and_only_the_coordinator_releases(study: Study, tmp_path: Path) -> None:
    study.release(tmp_path / "bundle")
    with pytest.raises(CoordinatorError, match="exists already"):
        study.release(tmp_path / "bundle")
    with pytest.raises(CoordinatorError, match="coordinator's key"):
        write_bundle(
            tmp_path / "other", study.evidence(), autoencoder=study.autoencoder, candidate=study.candidate,
            key=study.keys["alpha"], at=AT,
        )  # fmt: skip


def test_who_approves_checks_the_decision_first(study: Study) -> None:
    officer = study.keys["officer"]
    with pytest.raises(RefusedError, match="no-veto"):
        approve_decision(study.signed_decision(vetoed(study)), plan=study.plan, key=officer, role="officer")
    good = study.signed_decision()
    with pytest.raises(UsageError, match="not the one"):
        approve_decision(good, plan=study.plan, key=SigningKey.generate(), role="officer")
    with pytest.raises(UsageError, match="not the one"):
        approve_decision(good, plan=study.plan, key=officer, role="site", site_id="alpha")
    with pytest.raises(UsageError, match="names the site"):
        approve_decision(good, plan=study.plan, key=officer, role="site")
    with pytest.raises(EvidenceError, match="wrong signer"):
        approve_decision(study.inputs.ledgers["alpha"], plan=study.plan, key=officer, role="officer")
    for position in (0, len(good) // 2, len(good) - 1):
        changed = bytearray(good)
        changed[position] ^= 1
        with pytest.raises(EvidenceError):
            approve_decision(bytes(changed), plan=study.plan, key=officer, role="officer")


@pytest.mark.slow
def test_monai_builds_networks_and_samples_from_the_bundle(study: Study, tmp_path: Path) -> None:
    """The inference config with real micro networks in place of the fixture's small files."""
    import torch
    from monai.bundle import ConfigParser

    from server.release.monai_config import inference_config
    from shared.model.autoencoder import build_autoencoder
    from shared.model.denoiser import build_denoiser
    from shared.model.presets import preset_named
    from shared.model.weights import save_weights

    preset = preset_named("micro")
    (tmp_path / "models").mkdir()
    save_weights(build_autoencoder(preset, n_labels=2), tmp_path / "models/autoencoder.safetensors", {})
    save_weights(build_denoiser(preset, n_conditions=2), tmp_path / "models/denoiser.safetensors", {})
    config = json.loads(json.dumps(inference_config(study.plan)))
    config["bundle_root"] = str(tmp_path)
    config["sampler"]["steps"] = 2
    parser = ConfigParser(config)
    ((image, mask),) = parser.get_parsed_content("run")[0]
    assert tuple(image.shape) == tuple(mask.shape) == (24, 24, 24)
    assert mask.dtype == torch.uint8 and int(mask.max()) <= 2
