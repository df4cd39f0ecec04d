"""The SuperLink waits for its database, where Flower's own would end a study."""

from __future__ import annotations

import sqlite3
import threading
import time
from pathlib import Path

import pytest
from flwr.supercore import sql_mixin
from flwr.supercore.object_store.sql_object_store import SqlObjectStore
from perimeter_pair import EchoSuperLink
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from deploy import flower_run, superlink
from deploy.consortium_keys import make_server_certificate
from deploy.flower_run import await_superlink
from shared.errors import CoordinatorError, UsageError

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    return tmp_path / "superlink.db"


def opened(database: Path) -> SqlObjectStore:
    store = SqlObjectStore(str(database))
    store.initialize()
    return store


def write(store: SqlObjectStore) -> None:
    with store.session() as session:
        session.execute(text("DELETE FROM objects"))


def test_every_connection_waits_longer_than_flowers(database: Path) -> None:
    def waits_ms() -> int:
        with opened(database).session() as session:
            return int(session.execute(text("PRAGMA busy_timeout")).scalar_one())

    assert waits_ms() == 5000, "Flower's own time has changed: is deploy/superlink.py still needed?"
    superlink.patient_database()
    assert waits_ms() == superlink.BUSY_TIMEOUT_MS


def test_that_time_is_what_ends_a_write(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another write goes on: given up after a short time, made after a long one."""
    monkeypatch.setattr(superlink, "BUSY_TIMEOUT_MS", 50)
    superlink.patient_database()
    hasty = opened(database)
    monkeypatch.setattr(superlink, "BUSY_TIMEOUT_MS", 60_000)
    superlink.patient_database()
    patient = opened(database)
    other = sqlite3.connect(database, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OperationalError, match="database is locked"):
        write(hasty)
    threading.Timer(0.5, lambda: other.execute("COMMIT")).start()
    began = time.monotonic()
    write(patient)
    assert time.monotonic() - began > 0.3
    other.close()


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", (("journal_mode", "WAL"),))
    with pytest.raises(CoordinatorError, match="another way"):
        superlink.patient_database()


@pytest.mark.parametrize("file", ["systemd/lacuna-superlink.service", "compose/coordinator.yaml"])
def test_services_start_this_one(file: str) -> None:
    text_of = (DEPLOY / file).read_text()
    assert "python -m deploy.superlink --host 127.0.0.1" in text_of
    assert "flower-superlink" not in text_of


def connection(folder: Path, address: str) -> Path:
    (folder / "config.toml").write_text(
        f'[superlink.lacuna]\naddress = "{address}"\nroot-certificates = "{folder}/ca.pem"\n'
    )
    return folder


def test_a_superlink_that_starts_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_run, "POLL_S", 0.05)
    make_server_certificate(tmp_path)
    echo, said = EchoSuperLink(tmp_path), list[str]()
    home = connection(tmp_path, f"127.0.0.1:{echo.port}")
    with pytest.raises(CoordinatorError, match=f"does not answer at 127.0.0.1:{echo.port}"):
        await_superlink(home, "lacuna", wait_s=0)
    starts = threading.Timer(0.3, echo.start)
    starts.start()
    try:
        await_superlink(home, "lacuna", wait_s=30, say=said.append)
    finally:
        starts.join()
        echo.stop()
    assert said == [f"waiting for the SuperLink at 127.0.0.1:{echo.port}, up to 30 s"]


def test_a_connection_that_is_not_written_is_named_and_another_machine_not_waited_for(tmp_path: Path) -> None:
    await_superlink(connection(tmp_path, "superlink.example.org:443"), "lacuna", wait_s=0)
    with pytest.raises(UsageError, match="connection 'other'"):
        await_superlink(tmp_path, "other", wait_s=0)
    (tmp_path / "config.toml").write_text("[superlink.lacuna]\naddress = 5\n")
    with pytest.raises(UsageError, match="neither where nor whose"):
        await_superlink(tmp_path, "lacuna", wait_s=0)
