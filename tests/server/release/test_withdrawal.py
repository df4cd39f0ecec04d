"""``lacuna coordinator withdraw``: the bundle then fails where the log is at hand, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from release_study import Study

from deploy.cli.main import main
from shared.exit_codes import ExitCode
from shared.plan_package import write_plan_package


@pytest.fixture
def run(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Any:
    """Commands of a coordinator whose study was just released; gives (exit code, all that was printed)."""
    home = tmp_path / "home"
    root = home / "coordinator" / study.plan.study_id
    root.mkdir(parents=True, mode=0o700)
    study.coordinator.save(home / "coordinator" / "coordinator.key")
    write_plan_package(
        root / "plan", study.plan, key=study.coordinator, autoencoder=study.autoencoder, prior=study.prior
    )
    monkeypatch.setenv("LACUNA_HOME", str(home))

    def call(*words: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as stop:
            main([*words])
        shown = capsys.readouterr()
        return stop.value.code, " ".join((shown.out + shown.err).split())

    return call


def test_a_withdrawn_bundle_fails_verification_with_the_reason(
    run: Any, study: Study, tmp_path: Path
) -> None:
    root = tmp_path / "home" / "coordinator"
    withdraw = ("coordinator", "withdraw", "--study", study.plan.study_id)
    code, told = run(*withdraw, "--reason", "a site's scans were mislabelled")
    assert code == ExitCode.COORDINATOR_MUST_ACT and "nothing to withdraw" in told
    log, bundle = root / "release-log.jsonl", root / study.plan.study_id / "bundle"
    study.release(bundle, log_path=log)
    kept, handed_out = tmp_path / "kept.jsonl", tmp_path / "handed-out.jsonl"
    kept.write_bytes(log.read_bytes())
    assert run("compliance", "verify", str(bundle), "--log", str(log))[0] == 0
    assert run(*withdraw, "--reason", "  ")[0] == ExitCode.COORDINATOR_MUST_ACT
    code, told = run(*withdraw, "--reason", "a site's scans were mislabelled", "--log-out", str(handed_out))
    assert code == 0 and "withdrawn" in told
    assert handed_out.read_bytes() == log.read_bytes() != kept.read_bytes()
    code, told = run("compliance", "verify", str(bundle), "--log", str(handed_out))
    assert code == ExitCode.REFUSED and "a site's scans were mislabelled" in told
    code, told = run(*withdraw, "--reason", "again")
    assert code == ExitCode.COORDINATOR_MUST_ACT and "withdrawn already" in told


def test_an_old_copy_of_the_log_is_noticed_by_who_kept_a_newer_one(
    run: Any, study: Study, tmp_path: Path
) -> None:
    root = tmp_path / "home" / "coordinator"
    log, bundle = root / "release-log.jsonl", root / study.plan.study_id / "bundle"
    study.release(bundle, log_path=log)
    old, kept = tmp_path / "old.jsonl", tmp_path / "kept.jsonl"
    old.write_bytes(log.read_bytes())
    run("coordinator", "withdraw", "--study", study.plan.study_id, "--reason", "r", "--log-out", str(kept))
    verify = ("compliance", "verify", str(bundle))
    assert run(*verify, "--log", str(old))[0] == 0, "alone, an old copy looks whole"
    code, told = run(*verify, "--log", str(old), "--log-before", str(kept))
    assert code == ExitCode.REFUSED and "its end is cut off" in told
    assert run(*verify, "--log-before", str(kept))[0] == ExitCode.USAGE


def test_receipts_find_an_old_ledger_in_a_bundle(run: Any, study: Study, tmp_path: Path) -> None:
    from privacy.ledger_chain import LedgerHead, read_export
    from shared.canonical import canonical_json

    bundle = tmp_path / "bundle"
    study.release(bundle)
    key = study.keys["beta"]
    export = read_export(study.inputs.ledgers["beta"], key.verify_key)
    receipts = tmp_path / "receipts.json"
    verify = ("compliance", "verify", str(bundle), "--heads", str(receipts))
    receipts.write_bytes(canonical_json({"heads": {"beta": export.head.to_dict()}}))
    assert run(*verify)[0] == 0
    later = LedgerHead.sign(
        key, ledger_id=export.ledger_id, length=export.head.length + 1, entry_hash=b"\1" * 32
    )
    receipts.write_bytes(canonical_json({"heads": {"beta": later.to_dict()}}))
    code, told = run(*verify)
    assert code == ExitCode.REFUSED and "an old copy" in told
