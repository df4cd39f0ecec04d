"""A coordinator and four hospitals, each its own network namespace; a whole study, and a list of intrusions.

python -m pytest tests/deploy/test_real_topology.py      (as root; nginx, nftables, iproute2, util-linux)
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hospital_network import (
    BIN,
    COORDINATOR_IP,
    DRIVER,
    INNER_PORT,
    NODE_PORT,
    PORT,
    STRANGER,
    SUPERLINK_PORT,
    HospitalNetwork,
    unmet,
)
from networked_demo import NetworkedDemo
from rich.console import Console

from client.site_home import SiteHome
from client.site_network import SiteNetwork
from deploy.demo import STUDY, DemoOptions, SimulatedScans
from deploy.perimeter import Limits
from privacy.ledger_chain import CHARGE, read_export
from server.study_store import StudyStore
from shared.certificates import (
    Authority,
    issue_server_certificate,
    issue_site_certificate,
    load_key,
    make_authority,
    new_key,
    read_certificate,
    to_pem,
)
from shared.node_keys import node_key_header
from shared.private_keys import save_private_key

pytestmark = [pytest.mark.slow, pytest.mark.flower, pytest.mark.timeout(3600)]

HERE = Path(__file__).parent
ROUNDS = 3
LIMITS = Limits(header_s=3, body_s=3, requests_per_s=10, burst=60)
"""Narrower than the product's, so that the machine that runs the tests reaches them."""
NAMES = ["hospital-a", "hospital-b", "hospital-c", "hospital-d"]


@pytest.fixture(scope="module")
def network() -> Iterator[HospitalNetwork]:
    if reason := unmet():
        pytest.skip(reason)
    # Not below pytest's own folder, which other users may not pass.
    out = Path(tempfile.mkdtemp(prefix="lacuna-network-"))
    out.chmod(0o711)
    try:
        yield from _network(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _network(out: Path) -> Iterator[HospitalNetwork]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SimulatedScans, "PATIENTS", 30)
        console = Console(file=io.StringIO())
        NetworkedDemo(
            options=DemoOptions(out=out / "d", sites=4),
            console=console,
            address=f"{COORDINATOR_IP}:{PORT}",
            plan_choices=["--rounds", str(ROUNDS)],
        ).prepare()
    with HospitalNetwork(out / "d", NAMES, study=STUDY, limits=LIMITS) as network:
        yield network


def link(network: HospitalNetwork, i: int, **changes: Any) -> dict[str, Any]:
    """An HTTPS request to the coordinator with hospital i's own certificate and key header."""
    folder = network.site_folder(i) / "perimeter"
    return {
        "do": "https",
        "host": COORDINATOR_IP,
        "port": PORT,
        "path": "/v1/fleet/pull-messages",
        "ca": str(folder / "coordinator-ca.pem"),
        "certificate": str(folder / "tls.pem"),
        "key": str(folder / "tls.key"),
        "headers": own_headers(network, i),
        **changes,
    }


def own_headers(network: HospitalNetwork, i: int) -> dict[str, str]:
    public = SiteNetwork(network.site_home(i)).node_key.with_suffix(".pub").read_text()
    protobuf = {"content-type": "application/protobuf", "accept": "application/protobuf"}
    return {"flwr-public-key": node_key_header(public), **protobuf}


def made_certificates(network: HospitalNetwork, folder: Path) -> dict[str, dict[str, str]]:
    """Certificates that should open nothing, with their keys, for whoever stands outside."""
    root = network.coordinator_home.authority.root
    pem = (root / "ca.pem").read_bytes()
    real = Authority(certificate=read_certificate(pem, what="ca"), key=load_key(root / "ca.key"))
    now = datetime.now(UTC)
    other = make_authority("Lacuna coordinator", now=now, valid_for=timedelta(days=9))
    found = {}
    day = timedelta(days=1)
    for name, authority, begins, server in (
        ("strangers", other, now, False), ("expired", real, now - 9 * day, False),
        ("unknown", real, now, False), ("servers", real, now, True),
    ):  # fmt: skip
        key = new_key()
        if server:
            made = issue_server_certificate(
                authority, key.public_key(), hosts=(COORDINATOR_IP,), now=begins, valid_for=3 * day
            )
        else:
            made = issue_site_certificate(
                authority, key.public_key(), name=NAMES[0], now=begins, valid_for=3 * day
            )
        paths = {"certificate": folder / f"{name}.pem", "key": folder / f"{name}.key"}
        paths["certificate"].write_bytes(to_pem(made))
        save_private_key(key, paths["key"])
        os.chown(paths["key"], STRANGER, STRANGER)
        found[name] = {kind: str(path) for kind, path in paths.items()}
    return found


def intrude(
    network: HospitalNetwork, namespace: str, uid: int, actions: dict[str, tuple[dict[str, Any], str]],
    *, groups: tuple[int, ...] = (),
) -> dict[str, tuple[str, str]]:  # fmt: skip
    """Name of each attempt: what came of it, and what was expected."""
    folder = network.out / "intruder"
    folder.mkdir(exist_ok=True, mode=0o755)
    asked = folder / "actions.json"
    asked.write_text(json.dumps([action for action, _ in actions.values()]))
    asked.chmod(0o644)
    script = folder / "intruder.py"
    shutil.copyfile(HERE / "intruder.py", script)
    done = network.run(namespace, uid, [sys.executable, str(script), str(asked)], groups=groups)
    assert done.returncode == 0, done.stderr
    return {
        name: (came, expected)
        for (name, (_, expected)), came in zip(actions.items(), json.loads(done.stdout), strict=True)
    }


def from_outside(network: HospitalNetwork) -> dict[str, tuple[str, str]]:
    folder = network.out / "outside"
    folder.mkdir(mode=0o755)
    ca = folder / "ca.pem"
    shutil.copyfile(network.coordinator_home.authority.root / "ca.pem", ca)
    made = made_certificates(network, folder)
    bare = {"do": "https", "host": COORDINATOR_IP, "port": PORT, "path": "/v1/fleet/pull-messages",
            "ca": str(ca), "headers": own_headers(network, 0)}  # fmt: skip
    return intrude(network, network.outside, STRANGER, {
        "outside, no certificate": (bare, "certificate_missing"),
        "outside, no certificate, Control API": (
            bare | {"path": "/v1/control/start-run"}, "certificate_missing"),
        "outside, a certificate of another authority": (bare | made["strangers"], "certificate_invalid"),
        "outside, an expired certificate": (bare | made["expired"], "certificate_invalid"),
        "outside, a certificate that the index does not hold": (bare | made["unknown"], "not_enrolled"),
        "outside, a server's certificate": (bare | made["servers"], "certificate_invalid"),
        "outside, plain HTTP": (bare | {"do": "plain"}, "not_tls"),
        "outside, TLS 1.2": (bare | {"old_tls": True}, "tls: TLSV1_ALERT_PROTOCOL_VERSION"),
        "outside, the SuperLink's own port": (
            {"do": "connect", "host": COORDINATOR_IP, "port": SUPERLINK_PORT}, "timeout"),
        "outside, a hospital's perimeter": (
            {"do": "connect", "host": network.hospital_ip(0), "port": INNER_PORT}, "ECONNREFUSED"),
        "outside, a hospital's SuperNode": (
            {"do": "connect", "host": network.node_ip(0), "port": NODE_PORT}, "ENETUNREACH"),
        "outside, a header that does not end": (
            bare | made["unknown"] | {"do": "slow", "part": "header"}, "given_up"),
    })  # fmt: skip


def from_a_hospital(network: HospitalNetwork) -> dict[str, tuple[str, str]]:
    """Whoever took over hospital a's perimeter: certificate, key and place."""
    user, here = network.users[0], network.hospital[0]
    routes = {
        "submits a run": "/v1/control/start-run",
        "stops a run": "/v1/control/stop-run",
        "lists runs": "/v1/control/list-runs",
        "registers a node by the Control API": "/v1/control/register-node",
        "lists nodes": "/v1/control/list-nodes",
        "registers a node by the Fleet API": "/v1/fleet/register-node",
        "takes a node off": "/v1/fleet/unregister-node",
        "asks the Runtime API for a task": "/v1/runtime/acquire-task",
        "pushes a task's output": "/v1/runtime/push-task-output",
        "pushes messages as the ServerApp": "/v1/runtime/push-messages",
        "reads the API's description": "/openapi.json",
        "reads the documentation": "/docs",
        "asks for health": "/health",
        "climbs out of the path": "/v1/fleet/%2e%2e/control/start-run",
    }
    flwr = network.out / "intruder-flwr"
    flwr.mkdir(exist_ok=True, mode=0o755)
    (flwr / "config.toml").write_text(
        f'[superlink]\ndefault = "x"\n\n[superlink.x]\naddress = "{network.inner_ip(0)}:{INNER_PORT}"\n'
        f'root-certificates = "{network.site_folder(0) / "perimeter" / "ca.pem"}"\n'
    )
    os.chown(flwr, user.perimeter, user.perimeter)
    actions: dict[str, tuple[dict[str, Any], str]] = {
        f"hospital, {name}": (link(network, 0, path=path), "not_served") for name, path in routes.items()
    }
    actions |= {
        "hospital, own certificate with another site's SuperNode": (
            link(network, 0, headers=own_headers(network, 1)), "not_enrolled"),
        "hospital, own certificate and no SuperNode's key": (link(network, 0, headers={}), "not_enrolled"),
        "hospital, own SuperNode's key without its signature": (link(network, 0), "http 401"),
        "hospital, GET": (link(network, 0, method="GET"), "not_served"),
        "hospital, an oversized request": (link(network, 0, body_bytes=70_000), "too_large"),
        "hospital, an oversized object": (
            link(network, 0, path="/v1/fleet/push-object", body_bytes=9 * 2**20), "too_large"),
        "hospital, a body that does not end": (
            link(network, 0, do="slow", part="body", length=99), "given_up"),
        "hospital, a flood": (link(network, 0, do="flood"), "too_many"),
        "hospital, flwr run through its own perimeter": (
            {"do": "run", "argv": [str(BIN / "flwr"), "list", "x", "--format", "json"],
             "env": {"FLWR_HOME": str(flwr), "HOME": str(flwr)}}, "404"),
        "hospital, the SuperLink's own port": (
            {"do": "connect", "host": COORDINATOR_IP, "port": SUPERLINK_PORT}, "timeout"),
        "hospital, another hospital's perimeter": (
            {"do": "connect", "host": network.hospital_ip(1), "port": INNER_PORT}, "ECONNREFUSED"),
        "hospital, its own agent's socket": ({"do": "knock", "path": str(network.socket(0))}, "EACCES"),
        "hospital, its own agent's data": ({"do": "read", "path": str(network.site_home(0).root)}, "EACCES"),
    }  # fmt: skip
    return intrude(network, here, user.perimeter, actions)


def hostile_bundle(network: HospitalNetwork, folder: Path) -> dict[str, tuple[str, str]]:
    """A real Flower app that the coordinator's operator submits; what it tries at hospital a."""
    app = folder / "app"
    shutil.copytree(HERE / "hostile_app", app)
    shutil.copyfile(HERE / "intruder.py", app / "lacuna_hostile" / "intruder.py")
    home, users = network.site_home(0), network.users[0]
    etc = network.site_folder(0)
    agent = network.pid("agent-process0")
    inner_link = {
        "do": "https", "host": network.inner_ip(0), "port": INNER_PORT,
        "path": "/v1/control/start-run", "ca": str(folder / "inner-ca.pem"),
        "headers": own_headers(network, 0),
    }  # fmt: skip
    shutil.copyfile(etc / "supernode" / "perimeter-ca.pem", folder / "inner-ca.pem")
    (folder / "inner-ca.pem").chmod(0o644)
    acquire = {
        "do": "plain", "host": "127.0.0.1", "port": NODE_PORT, "path": "/v1/runtime/acquire-task",
        "headers": {"content-type": "application/protobuf", "accept": "application/protobuf"},
    }  # fmt: skip
    paths = {
        "the ledger": home.ledger_path, "the identity": home.identity_path, "the policy": home.policy_path,
        "scans": home.store_path(STUDY), "the agent's log": home.study(STUDY) / "agent.log",
        "the SuperNode's key": etc / "supernode" / "node.key",
        "the certificate's key": etc / "perimeter" / "tls.key",
        "the agent's environment": Path(f"/proc/{agent}/environ"),
        "the agent's memory": Path(f"/proc/{agent}/mem"),
        "the authority's key": network.coordinator_home.authority.root / "ca.key",
    }  # fmt: skip
    actions: dict[str, tuple[dict[str, Any], str]] = {
        f"app bundle, reads {name}": ({"do": "read", "path": str(path)}, "EACCES")
        for name, path in paths.items()
    }
    actions |= {
        "app bundle, writes into the agent's folder": (
            {"do": "write", "path": str(home.root / "x")}, "EACCES"),
        "app bundle, the coordinator without the perimeter": (
            {"do": "connect", "host": COORDINATOR_IP, "port": PORT}, "timeout"),
        "app bundle, the internet": ({"do": "connect", "host": "10.77.0.99", "port": 443}, "timeout"),
        "app bundle, another hospital": (
            {"do": "connect", "host": network.node_ip(1), "port": NODE_PORT}, "timeout"),
        "app bundle, the Control API through the perimeter": (inner_link, "not_served"),
        "app bundle, the Fleet API without the SuperNode's key": (
            inner_link | {"path": "/v1/fleet/pull-messages", "headers": {}}, "not_own_node"),
        "app bundle, the Fleet API without the SuperNode's signature": (
            inner_link | {"path": "/v1/fleet/pull-messages"}, "http 401"),
        "app bundle, a task without the SuperExec's secret": (acquire, "http 401"),
        "app bundle, another hospital's agent": ({"do": "knock", "path": str(network.socket(1))}, "EACCES"),
        "app bundle, a signal to the agent": ({"do": "signal", "pid": agent}, "EPERM"),
        "app bundle, a signal to the SuperNode": (
            {"do": "signal", "pid": network.pid("supernode0")}, "EPERM"),
    }  # fmt: skip
    asked = folder / "actions.json"
    asked.write_text(json.dumps({str(network.socket(0)): [action for action, _ in actions.values()]}))
    out = folder / "answers.json"
    os.chown(folder, DRIVER, DRIVER)
    submitted = network.run(
        network.coordinator, DRIVER,
        [str(BIN / "flwr"), "run", str(app), "lacuna", "--format", "json", "--run-config",
         f'out="{out}" actions="{asked}"'],
        env={"FLWR_HOME": str(network.operator_home), "HOME": str(network.operator_home)},
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    network.until(out.exists, "the hostile app did not come back", timeout_s=300)
    (answer,) = [a for a in json.loads(out.read_text()) if a["site"] == str(network.socket(0))]
    assert answer["uid"] == users.courier, "the bundle runs as the courier's user"
    came = json.loads(answer["json"])
    return {name: (c, e) for (name, (_, e)), c in zip(actions.items(), came, strict=True)}


def from_other_users(network: HospitalNetwork) -> dict[str, tuple[str, str]]:
    """Users of the same machines that have no business with a part."""
    users, found = network.users[0], {}
    local = {"do": "connect", "host": "127.0.0.1", "port": SUPERLINK_PORT}
    found |= intrude(network, network.coordinator, STRANGER, {
        "coordinator's machine, another user, the SuperLink's port": (local, "ECONNREFUSED"),
        "coordinator's machine, another user, the studies": (
            {"do": "read", "path": str(network.coordinator_home.root)}, "EACCES"),
        "coordinator's machine, another user, the SuperExec's secret": (
            {"do": "read", "path": str(network.folder / "superexec" / "superexec.secret")}, "EACCES"),
    })  # fmt: skip
    found |= intrude(network, network.inner[0], users.node, {
        "SuperNode's user, the agent's socket": ({"do": "knock", "path": str(network.socket(0))}, "EACCES"),
        "SuperNode's user, the ledger": (
            {"do": "read", "path": str(network.site_home(0).ledger_path)}, "EACCES"),
        "SuperNode's user, the coordinator without the perimeter": (
            {"do": "connect", "host": COORDINATOR_IP, "port": PORT}, "timeout"),
    })  # fmt: skip
    # In the agent's group, as somebody added by mistake would be: the file opens, the door does not.
    found |= intrude(network, network.inner[0], STRANGER, {
        "a user in the agent's group, the agent's socket": (
            {"do": "knock", "path": str(network.socket(0))}, "closed"),
    }, groups=(users.group,))  # fmt: skip
    found |= intrude(network, network.agent[0], users.agent, {
        "agent, the coordinator": ({"do": "connect", "host": COORDINATOR_IP, "port": PORT}, "ENETUNREACH"),
        "agent, its own SuperNode": (
            {"do": "connect", "host": network.node_ip(0), "port": NODE_PORT}, "ENETUNREACH"),
        "agent, loopback": ({"do": "connect", "host": "127.0.0.1", "port": NODE_PORT}, "ENETUNREACH"),
    })  # fmt: skip
    return found


def test_every_intrusion_is_refused_by_name(network: HospitalNetwork, tmp_path: Path) -> None:
    bundle = network.out / "hostile"
    bundle.mkdir(mode=0o755)
    found = from_outside(network) | from_a_hospital(network) | hostile_bundle(network, bundle)
    found |= from_other_users(network)
    assert len(found) >= 60
    wrong = {name: pair for name, pair in found.items() if pair[0] != pair[1]}
    assert not wrong
    seen = (network.run_folder / "perimeter" / "access.jsonl").read_text()
    assert '"site":"hospital-a"' in seen


def test_a_whole_study_runs(network: HospitalNetwork) -> None:
    """Four hospitals, real agents on simulated patients; then hospital d is revoked and is out."""
    network.launch()
    assert network.wait(timeout_s=2400) == "run_finished", (network.log("superexec")).read_text()[-3000:]
    store = StudyStore(network.coordinator_home.study(STUDY))
    rounds = [record for record in store.attempts("train") if record.status == "completed"]
    assert [record.round for record in rounds] == list(range(1, ROUNDS + 1))
    assert [record.survivors for record in rounds] == [tuple(NAMES)] * ROUNDS
    (audit,) = [record for record in store.attempts("audit") if record.status == "completed"]
    assert audit.survivors == tuple(NAMES)
    for name in NAMES:
        home = SiteHome(network.out / name / "site")
        ledger = (store.evidence / "ledgers" / f"{name}.dsse.json").read_bytes()
        charges = [
            e for e in read_export(ledger, home.identity().verify_key, what=name).entries if e.kind == CHARGE
        ]
        assert len(charges) == ROUNDS + 1
    store.close()
    text = "".join(path.read_text(errors="replace") for path in network.out.glob("logs/*.log"))
    assert "patient-" not in text


def test_a_revoked_hospital_is_out(network: HospitalNetwork) -> None:
    last = len(NAMES) - 1
    ask = {"still enrolled": (link(network, last), "http 401")}
    uid = network.users[last].perimeter
    assert set(intrude(network, network.hospital[last], uid, ask).values()) == {("http 401", "http 401")}
    network.operate("revoke", NAMES[last], "--reason", "test")
    network.write_perimeter()
    network.reload()
    said = network.operate("register-nodes", "--flwr-home", str(network.operator_home))["said"]
    assert f"taken off: {NAMES[last]}" in str(said)

    def refused() -> bool:
        (pair,) = intrude(network, network.hospital[last], uid, ask).values()
        return pair[0] == "certificate_invalid"

    network.until(refused, "the revoked certificate is still let in", timeout_s=30)
    others = {"another hospital": (link(network, 0), "http 401")}
    uid = network.users[0].perimeter
    assert set(intrude(network, network.hospital[0], uid, others).values()) == {("http 401", "http 401")}
