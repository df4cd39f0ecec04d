"""The release log: append, chain, withdrawal, tampering."""

from __future__ import annotations

from pathlib import Path

import pytest

from privacy.compliance.dsse import EvidenceError
from privacy.compliance.release_log import log_head, read_log, read_log_file
from server.release.log import append_release, append_withdrawal
from shared.errors import CoordinatorError
from shared.identity import SigningKey

KEY = SigningKey.generate()
AT = "2026-01-31T12:00:00Z"


def filled(path: Path, n: int = 3) -> bytes:
    for i in range(n):
        append_release(path, bundle_sha256=f"{i:064x}", study_id=f"study-{i}", key=KEY, at=AT)
    return path.read_bytes()


def test_releases_and_withdrawals_are_read_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    filled(path)
    append_withdrawal(path, bundle_sha256=f"{1:064x}", study_id="study-1", key=KEY, at=AT, reason="a bug")
    entries = read_log_file(path)
    assert [(e.index, e.kind) for e in entries] == [
        (1, "release"),
        (2, "release"),
        (3, "release"),
        (4, "withdrawal"),
    ]
    assert entries[3].reason == "a bug" and entries[3].signer == KEY.verify_key.hex()


def test_any_changed_removed_moved_or_repeated_line_is_named(tmp_path: Path) -> None:
    data = filled(tmp_path / "log.jsonl")
    lines = data.splitlines(keepends=True)
    for bad in (lines[1:], [lines[0], lines[2]], [lines[1], lines[0], lines[2]], [*lines, lines[2]]):
        with pytest.raises(EvidenceError, match="line"):
            read_log(b"".join(bad))
    for position in range(0, len(data), 7):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(EvidenceError):
            read_log(bytes(changed))
    with pytest.raises(EvidenceError, match="torn"):
        read_log(data[:-1])


def test_cut_off_end_shows_against_a_remembered_head(tmp_path: Path) -> None:
    data = filled(tmp_path / "log.jsonl")
    head = log_head(read_log(data))
    shorter = b"".join(data.splitlines(keepends=True)[:2])
    assert len(read_log(shorter)) == 2
    with pytest.raises(EvidenceError, match="cut off"):
        read_log(shorter, at_least=head)
    filled(tmp_path / "other.jsonl")
    append_release(tmp_path / "other2.jsonl", bundle_sha256="f" * 64, study_id="x", key=KEY, at=AT)
    other = filled(tmp_path / "other2.jsonl")
    with pytest.raises(EvidenceError, match="not the one"):
        read_log(other, at_least=head)


def test_nothing_is_appended_to_a_damaged_log(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    data = bytearray(filled(path))
    data[100] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CoordinatorError, match="does not verify"):
        append_release(path, bundle_sha256="a" * 64, study_id="x", key=KEY, at=AT)
    assert path.read_bytes() == bytes(data)


def test_release_twice_and_withdrawal_of_the_unreleased_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    filled(path)
    with pytest.raises(CoordinatorError, match="already"):
        append_release(path, bundle_sha256=f"{0:064x}", study_id="study-0", key=KEY, at=AT)
    with pytest.raises(CoordinatorError, match="never released"):
        append_withdrawal(path, bundle_sha256="e" * 64, study_id="x", key=KEY, at=AT, reason="r")
    with pytest.raises(CoordinatorError, match="never released"):
        append_withdrawal(
            path, bundle_sha256=f"{0:064x}", study_id="x", key=SigningKey.generate(), at=AT, reason="r"
        )
    append_withdrawal(path, bundle_sha256=f"{0:064x}", study_id="study-0", key=KEY, at=AT, reason="r")
    with pytest.raises(CoordinatorError, match="withdrawn already"):
        append_withdrawal(path, bundle_sha256=f"{0:064x}", study_id="study-0", key=KEY, at=AT, reason="r")
