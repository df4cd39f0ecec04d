"""The coordinator's backup: never torn, only what changed, and enough to go on from."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from in_memory_consortium import Consortium

from server.coordinator_backup import back_up
from server.study_store import StudyStore
from shared.errors import CoordinatorError, UsageError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder like the coordinator's, with a study of one checkpoint."""
    root = tmp_path / "coordinator"
    rounds = root / "study" / "rounds"
    rounds.mkdir(parents=True)
    (root / ".network").mkdir()
    (root / ".network" / "ca.key").write_bytes(b"secret")
    (rounds / "round-000001.safetensors").write_bytes(b"one")
    with sqlite3.connect(root / "study" / "state.sqlite") as database:
        database.execute("CREATE TABLE attempts (attempt INTEGER)")
        database.execute("INSERT INTO attempts VALUES (1)")
    database.close()
    return root


def attempts(folder: Path) -> list[int]:
    with sqlite3.connect(folder / "study" / "state.sqlite") as database:
        found = [row[0] for row in database.execute("SELECT attempt FROM attempts ORDER BY attempt")]
    database.close()
    return found


def test_a_copy_holds_everything_privately_and_is_brought_up_to_date(root: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere" / "copy"
    assert back_up(root, target) == 3
    assert (target / ".network" / "ca.key").read_bytes() == b"secret"
    assert all(path.stat().st_mode & 0o077 == 0 for path in (target, *target.rglob("*")))
    (root / "study" / "rounds" / "round-000001.safetensors").unlink()
    (root / "study" / "rounds" / "round-000002.safetensors").write_bytes(b"two")
    (root / "study" / "rounds" / ".round-000003.safetensors.7.partial").write_bytes(b"half")
    (root / "study" / ".driver.lock").touch()
    assert back_up(root, target) == 2, "the new checkpoint and the database; the key is as it was"
    assert [path.name for path in (target / "study" / "rounds").iterdir()] == ["round-000002.safetensors"]
    assert not (target / "study" / ".driver.lock").exists()


def test_a_folder_with_other_things_in_it_is_left_alone(root: Path, tmp_path: Path) -> None:
    """A copy takes out what the coordinator no longer has: in somebody's home, that would be everything."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="no earlier backup"):
        back_up(root, home)
    assert [path.name for path in home.iterdir()] == ["thesis.txt"]


def test_what_is_not_committed_is_not_in_the_copy(root: Path, tmp_path: Path) -> None:
    writer = sqlite3.connect(root / "study" / "state.sqlite", isolation_level=None)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("INSERT INTO attempts VALUES (2)")
    back_up(root, tmp_path / "copy")
    assert attempts(tmp_path / "copy") == [1]
    writer.execute("COMMIT")
    writer.close()
    back_up(root, tmp_path / "copy")
    assert attempts(tmp_path / "copy") == [1, 2]


def test_a_checkpoint_of_the_meantime_is_known_to_no_older_database(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Databases are copied first: none of them speaks of a round whose checkpoint the copy lacks."""
    order: list[str] = []
    monkeypatch.setattr(
        "server.coordinator_backup._copied", lambda source, _: bool(order.append(source.suffix)) or True
    )
    back_up(root, tmp_path / "copy")
    assert order[0] == ".sqlite"
    assert ".sqlite" not in order[1:]


def test_what_cannot_be_a_backup_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="would lie in the folder itself"):
        back_up(root, root / "copy")
    with pytest.raises(CoordinatorError, match="nothing to back up"):
        back_up(tmp_path / "nowhere", tmp_path / "copy")
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(UsageError, match="open to other users"):
        back_up(root, tmp_path / "open")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        back_up(root, tmp_path / "file" / "copy")


def test_a_study_goes_on_from_an_older_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounds since are made again, under attempt numbers that no site has seen, and charged again."""
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    consortium = Consortium(tmp_path, n=3, rounds=4)
    home, copy = tmp_path / "coordinator", tmp_path / "copy"
    driver = consortium.driver("1")
    opened = driver._opened

    def lost_after_three_rounds(attempt: object) -> None:
        done = consortium.store.completed_rounds()
        if done == 1 and not copy.exists():
            back_up(home, copy)
        if done == 3:
            raise KeyboardInterrupt
        opened(attempt)  # type: ignore[arg-type]

    monkeypatch.setattr(driver, "_opened", lost_after_three_rounds)
    with pytest.raises(KeyboardInterrupt):
        driver.run()
    consortium.store.close()
    shutil.rmtree(home)
    shutil.copytree(copy, home)
    consortium.store = StudyStore(consortium.store.root)
    assert consortium.store.completed_rounds() == 1
    outcome = consortium.driver("2").run()
    assert outcome.rounds == 4
    charged = [entry.body["attempt"] for entry in consortium.ledgers[0].entries() if entry.kind == "charge"]
    assert len(charged) == len(set(charged)) == 4 + 2 + 1, "two rounds again, and the audit"
    consortium.store.close()
