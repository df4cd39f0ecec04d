"""Submitting a study to a SuperLink, for ``lacuna coordinator launch`` and ``resume``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from deploy.flower_commands import flower_answer, flower_executable
from server.coordinator_home import CoordinatorHome
from server.study_store import StudyStore
from shared.errors import UsageError

FLOWER_APP = Path(__file__).parent / "flower_app"


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


def check_connection(flwr_home: Path, connection: str) -> None:
    """Raises UsageError: there is no ``config.toml`` in ``flwr_home``."""
    if not (flwr_home / "config.toml").is_file():
        raise UsageError(
            f"{flwr_home} holds no config.toml",
            remedy=f'write one with [superlink.{connection}] address = "..." and root-certificates = "..."',
        )


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
