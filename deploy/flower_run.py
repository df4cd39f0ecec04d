"""Submitting a study to a SuperLink, for ``lacuna coordinator launch`` and ``resume``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.flower_commands import flower_answer, flower_executable
from deploy.superlink_health import superlink_answers
from server.coordinator_home import CoordinatorHome
from server.study_store import StudyStore
from shared.errors import CoordinatorError, UsageError

FLOWER_APP = Path(__file__).parent / "flower_app"
POLL_S = 1.0


def submit_study(
    study_id: str, *, flwr_home: Path, connection: str, longest_exchange_s: float | None = None
) -> str:
    """``flwr run`` with the study's folder; returns Flower's run id.

    Args:
        longest_exchange_s: How long a slow site is waited for; by default :class:`server.exchange.Pace`.

    Raises:
        UsageError: there is no ``config.toml`` in ``flwr_home``.
        CoordinatorError: no such study, no signed plan, or Flower's words if it refuses.
    """
    check_connection(flwr_home, connection)
    study_home = CoordinatorHome.default().study(study_id)
    StudyStore(study_home).package()
    config = f"study-home={json.dumps(str(study_home))}"
    if longest_exchange_s is not None:
        config += f" longest-exchange-s={float(longest_exchange_s)}"
    answer = run_flower(flwr_home, connection, "run", str(FLOWER_APP), connection, "--run-config", config)
    return str(answer["run-id"])


def stop_dead_runs(study_id: str, *, flwr_home: Path, connection: str) -> tuple[str, ...]:
    """Stop runs of a study that Flower still lists although no round driver is at work; their ids.

    A ServerApp that was killed leaves its run behind as running for a while; what hospitals still send to it
    would be kept.

    Raises:
        UsageError: there is no ``config.toml`` in ``flwr_home``.
        CoordinatorError: a round driver is at work on the study, no such study, or Flower's words.
    """
    store = StudyStore(CoordinatorHome.default().study(study_id))
    try:
        known = {str(body["run_id"]) for _, _, kind, body in store.events() if kind == "run_started"}
        answer = run_flower(flwr_home, connection, "list", connection)
        left = tuple(
            str(run["run-id"])
            for run in answer.get("runs", [])
            if str(run["run-id"]) in known and not str(run["status"]).startswith("finished")
        )
        if left and store.driven():
            raise CoordinatorError(
                f"run {left[0]} of study {study_id!r} is at work; there is nothing to resume",
                remedy=f"lacuna coordinator status --study {study_id}; to end it all the same: "
                f"flwr stop {left[0]} {connection}",
            )
    finally:
        store.close()
    for run_id in left:
        run_flower(flwr_home, connection, "stop", run_id, connection)
    return left


def check_connection(flwr_home: Path, connection: str) -> None:
    """Raises UsageError: there is no ``config.toml`` in ``flwr_home``."""
    if not (flwr_home / "config.toml").is_file():
        raise UsageError(
            f"{flwr_home} holds no config.toml",
            remedy=f'write one with [superlink.{connection}] address = "..." and root-certificates = "..."',
        )


def await_superlink(
    flwr_home: Path, connection: str, *, wait_s: float, say: Callable[[str], None] = lambda _: None
) -> None:
    """Return when the SuperLink on this machine answers: it takes its time to start.

    A connection to another machine is not waited for.

    Args:
        say: Called once, when there is something to wait for.

    Raises:
        UsageError: there is no readable ``config.toml`` in ``flwr_home``, or no such connection in it.
        CoordinatorError: it does not answer within ``wait_s`` seconds.
    """
    check_connection(flwr_home, connection)
    path = flwr_home / "config.toml"
    try:
        entry = tomllib.loads(path.read_text())["superlink"][connection]
        address, authority = str(entry["address"]), Path(str(entry["root-certificates"]))
        host, port = address.rpartition(":")[0], int(address.rpartition(":")[2])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path} says for connection {connection!r} neither where nor whose the SuperLink is: {error}",
            remedy="lacuna coordinator perimeter --out DIR writes one, in DIR/operator",
        ) from error
    if host not in ("127.0.0.1", "localhost"):
        return
    deadline, said = time.monotonic() + wait_s, False
    while not superlink_answers(port, authority):
        if time.monotonic() >= deadline:
            raise CoordinatorError(
                f"the SuperLink does not answer at {address}",
                remedy="systemctl status lacuna-superlink, and its journal",
            )
        if not said:
            say(f"waiting for the SuperLink at {address}, up to {wait_s:.0f} s")
            said = True
        time.sleep(POLL_S)


def run_flower(flwr_home: Path, connection: str, *arguments: str) -> dict[str, Any]:
    """``flwr ARGUMENTS --format json`` as the operator of a SuperLink, and its answer.

    Raises:
        UsageError: there is no ``config.toml`` in ``flwr_home``.
        CoordinatorError: Flower's words if it refuses.
    """
    check_connection(flwr_home, connection)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "FLWR_HOME": str(flwr_home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
    }
    process = subprocess.Popen(
        [flower_executable("flwr"), *arguments, "--format", "json"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    return flower_answer(process)
