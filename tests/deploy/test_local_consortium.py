"""Messages over real Flower processes: SuperLink, SuperNodes, couriers, agents, and what happens to a
run when one of them is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.local_consortium import LocalConsortium, SiteProcess

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
ECHO_APP = HERE / "echo_app"

pytestmark = [pytest.mark.flower, pytest.mark.timeout(280)]


def consortium(home: Path, sites: int, **env: str) -> LocalConsortium:
    command = [sys.executable, str(HERE / "echo_agent.py"), "{socket}"]
    return LocalConsortium(
        home,
        [SiteProcess(site_id=f"site-{index}", command=command, env=env) for index in range(sites)],
        app=ECHO_APP,
    )


def replies(home: Path) -> list[dict[str, Any]]:
    out = home / "out.jsonl"
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)


def test_three_exchanges_of_a_megabyte_between_real_processes(tmp_path: Path) -> None:
    with consortium(tmp_path, 2) as local:
        pids = local.pids()
        assert (
            len(pids) >= 1 + 2 + 2 * 2 + 2
        )  # supervisor, SuperLink, SuperNodes (each with SuperExec), agents
        run_id = local.submit({"out": str(tmp_path / "out.jsonl"), "sites": 2, "exchanges": 3})
        outcome = local.wait(run_id, timeout_s=200, on_poll=lambda: pids.extend(local.pids()))
        assert outcome.completed, (outcome, local.serverapp_log(run_id))
        seen = replies(tmp_path)
        assert {(line["exchange"], line["node"]) for line in seen} == {
            (exchange, node) for exchange in range(3) for node in local.node_ids
        }
        assert len(seen) == 6
        for line in seen:
            assert line["same"], line
            body = line["body"]
            assert body["courier_maps_ml"] == []
            assert body["courier_uid"] == os.geteuid()
            if local.agents_isolated:
                assert body["interfaces"] == ["lo"]
        # A courier lives for one message, an agent for the whole study.
        assert len({line["body"]["courier_pid"] for line in seen}) == 6
        assert {line["body"]["agent_pid"] for line in seen} == {
            local.pid_of("agent", 0),
            local.pid_of("agent", 1),
        }
        sockets = local.socket_directory
        assert sockets.exists()
    assert [pid for pid in set(pids) if runs(pid)] == []
    assert not sockets.exists()


@pytest.mark.slow
def test_killed_agents_and_supernodes_come_back(tmp_path: Path) -> None:
    with consortium(tmp_path, 2) as local:
        run_id = local.submit(
            {
                "out": str(tmp_path / "out.jsonl"),
                "sites": 2,
                "exchanges": 30,
                "blob-bytes": 4000,
                "reply-within-s": 20.0,
            }
        )
        wait_for(lambda: len(replies(tmp_path)) >= 2)
        dead_agent = local.node_ids[0]
        local.kill("agent", 0)
        wait_for(
            lambda: any(
                line["node"] == dead_agent
                and line.get("kind") == "refused"
                and line["body"]["reason"] == "agent_unreachable"
                for line in replies(tmp_path)
            )
        )
        local.restart_agent(0)
        done = len(replies(tmp_path))
        wait_for(
            lambda: any(line["node"] == dead_agent and line.get("same") for line in replies(tmp_path)[done:])
        )

        old = local.node_ids[1]
        local.kill("supernode", 1)
        started = time.monotonic()
        local.restart_supernode(1, new_identity=True)
        assert time.monotonic() - started < 30
        new = local.node_ids[1]
        assert new != old
        wait_for(lambda: any(line["node"] == new and line.get("same") for line in replies(tmp_path)))

        local.kill("supernode", 1)
        local.restart_supernode(1)
        assert local.node_ids[1] == new
        done = len(replies(tmp_path))
        wait_for(lambda: any(line["node"] == new and line.get("same") for line in replies(tmp_path)[done:]))
        local.stop_run(run_id)
        assert local.wait(run_id, timeout_s=60).status == "finished:stopped"


@pytest.mark.slow
def test_a_study_can_go_on_after_serverapp_and_superlink_were_killed(tmp_path: Path) -> None:
    config = {"out": str(tmp_path / "out.jsonl"), "sites": 2, "exchanges": 20, "blob-bytes": 4000}
    with consortium(tmp_path, 2) as local:
        nodes = local.node_ids
        first = local.submit(config)
        wait_for(lambda: len(replies(tmp_path)) >= 1)
        local.kill("serverapp")
        assert local.wait(first, timeout_s=60).status == "serverapp_lost"

        second = local.submit(config)
        wait_for(lambda: any(line["run"] == second for line in replies(tmp_path)))
        superlink, serverapp = local.pid_of("superlink"), local.pid_of("serverapp")
        local.kill("superlink")
        assert local.wait(second, timeout_s=60).status == "superlink_lost"
        wait_for(lambda: not runs(serverapp or 0))
        local.restart_superlink()
        assert local.pid_of("superlink") != superlink

        third = local.submit({**config, "exchanges": 1})
        outcome = local.wait(third, timeout_s=120)
        assert outcome.completed, local.serverapp_log(third)
        answered = [line for line in replies(tmp_path) if line["run"] == third]
        assert sorted(line["node"] for line in answered if line["same"]) == sorted(nodes)


@pytest.mark.slow
def test_two_consortia_run_side_by_side(tmp_path: Path) -> None:
    with consortium(tmp_path / "a", 1) as one, consortium(tmp_path / "b", 1) as other:
        ids = [
            (local, local.submit({"out": str(local.home / "out.jsonl"), "sites": 1, "exchanges": 2}))
            for local in (one, other)
        ]
        for local, run_id in ids:
            assert local.wait(run_id, timeout_s=120).completed
            assert [line["node"] for line in replies(local.home)] == local.node_ids * 2
    with consortium(tmp_path / "a", 1) as again:
        assert len(again.node_ids) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_when_its_process_is_ended_in_the_middle_of_a_run(
    tmp_path: Path, number: int
) -> None:
    code = (
        "import json, sys, time\nfrom pathlib import Path\n"
        "from tests.deploy.test_local_consortium import consortium\n"
        "home = Path(sys.argv[1])\n"
        "with consortium(home, 1) as local:\n"
        "    run = local.submit({'out': str(home / 'out.jsonl'), 'sites': 1, 'exchanges': 100})\n"
        "    while local.pid_of('clientapp', 0) is None:\n"
        "        time.sleep(0.01)\n"
        "    (home / 'pids.new').write_text(json.dumps([local.pids(), str(local.socket_directory)]))\n"
        "    (home / 'pids.new').rename(home / 'pids')\n"
        "    local.wait(run, timeout_s=300)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=REPOSITORY, stderr=subprocess.DEVNULL
    )
    try:
        wait_for((tmp_path / "pids").exists, 120)
        pids, sockets = json.loads((tmp_path / "pids").read_text())
        parent.send_signal(number)
        parent.wait(30)
        wait_for(lambda: not any(map(runs, pids)), 30)
        wait_for(lambda: not Path(sockets).exists(), 10)
    finally:
        parent.kill()
