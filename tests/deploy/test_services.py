"""Service units and compose files: Debian's own tools read them, and what they promise is in them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from perimeter_pair import find_program

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
WITHOUT_NETWORK = {"lacuna-agent@.service"}
LOOPBACK_ONLY = {
    "lacuna-supernode.service", "lacuna-courier.service",
    "lacuna-superlink.service", "lacuna-superexec.service",
}  # fmt: skip
MAX_EXPOSURE = 2.0
"""Of `systemd-analyze security`, from 0 to 10; an unhardened service has 9.6."""


def settings(unit: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in unit.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The units as installed, with this environment's programs in the place of /opt/lacuna's."""
    folder = tmp_path_factory.mktemp("units")
    for unit in UNITS:
        text = unit.read_text().replace("/opt/lacuna/bin/", f"{Path(sys.executable).parent}/")
        (folder / unit.name.replace("@.", "@study.")).write_text(text)
        if "@." in unit.name:
            (folder / unit.name).write_text(text)
    return folder


def test_systemd_finds_nothing_wrong(installed: Path) -> None:
    analyze = find_program("systemd-analyze", "systemd")
    for program in ("nginx", "nft"):
        find_program(program, program)
    units = [str(path) for path in installed.iterdir() if "@." not in path.name]
    done = subprocess.run(
        [analyze, "verify", *units], capture_output=True, text=True, check=False, cwd=installed, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_would_find_a_misspelt_setting(installed: Path, tmp_path: Path) -> None:
    analyze = find_program("systemd-analyze", "systemd")
    text = (installed / "lacuna-perimeter.service").read_text()
    (tmp_path / "bad.service").write_text(text.replace("PrivateDevices=", "PrivateDevice="))
    done = subprocess.run(
        [analyze, "verify", "./bad.service"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert "PrivateDevice" in done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_every_unit_is_confined(unit: Path, installed: Path) -> None:
    found = settings(unit)
    (user,) = found["User"]
    assert user.startswith("lacuna-")
    for key, value in {
        "NoNewPrivileges": "yes", "ProtectSystem": "strict", "ProtectHome": "yes", "PrivateTmp": "yes",
        "RestrictNamespaces": "yes", "UMask": "0077", "StateDirectoryMode": "0700",
    }.items():  # fmt: skip
        assert found[key] == [value], key
    assert "MemoryMax" in found
    assert "TasksMax" in found
    assert ("yes" in found.get("PrivateNetwork", [])) == (unit.name in WITHOUT_NETWORK)
    if unit.name in LOOPBACK_ONLY:
        assert (found["IPAddressDeny"], found["IPAddressAllow"]) == (["any"], ["localhost"])
    analyze = find_program("systemd-analyze", "systemd")
    done = subprocess.run(
        [analyze, "security", "--offline=true", f"./{unit.name.replace('@.', '@study.')}"],
        capture_output=True, text=True, check=False, cwd=installed,
    )  # fmt: skip
    level = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert level is not None, done.stderr
    assert float(level[1]) <= MAX_EXPOSURE


def test_who_is_foreign_sees_neither_data_nor_keys_and_comes_back_when_flower_takes_it() -> None:
    by_name = {unit.name: settings(unit) for unit in UNITS}
    users = {name: found["User"][0] for name, found in by_name.items() if "perimeter" not in name}
    assert len(set(users.values())) == len(users), "a user for each part"
    hidden = by_name["lacuna-courier.service"]["InaccessiblePaths"][0]
    for path in (
        "/var/lib/lacuna",
        "/var/lib/lacuna-counter",
        "/etc/lacuna/perimeter",
        "/etc/lacuna/supernode",
    ):
        assert f"-{path}" in hidden.split()
    node = by_name["lacuna-supernode.service"]
    # Refused for up to 60 s after a crash: never given up, and not tried in a burst.
    assert node["StartLimitIntervalSec"] == ["0"]
    assert 10 <= int(node["RestartSec"][0]) <= 60
    agent = by_name["lacuna-agent@.service"]
    # It ends when its disk is full, and comes back when there is room again, however long that takes.
    assert agent["StartLimitIntervalSec"] == ["0"]
    assert agent["Restart"] == ["on-failure"]
    assert {"2", "40"} <= set(agent["RestartPreventExitStatus"][0].split())


@pytest.mark.parametrize("side", ["site", "coordinator"])
def test_systemd_makes_every_user_that_the_units_name(side: str, tmp_path: Path) -> None:
    program = find_program("systemd-sysusers", "systemd")
    source = DEPLOY / "systemd" / f"lacuna-{side}.sysusers"
    (tmp_path / "etc").mkdir()
    done = subprocess.run(
        [program, f"--root={tmp_path}", "--replace=/usr/lib/sysusers.d/lacuna.conf", str(source)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "not a valid" not in done.stderr, done.stderr
    made = {line.split(":")[0] for line in (tmp_path / "etc" / "passwd").read_text().splitlines()}
    wanted = set(re.findall(r"^u (\S+)", source.read_text(), flags=re.M))
    coordinators = {"lacuna-superlink", "lacuna-superexec", "lacuna-coordinator-perimeter"}
    units = [unit for unit in UNITS if (unit.stem in coordinators) == (side == "coordinator")]
    assert {settings(unit)["User"][0] for unit in units} <= wanted <= made


def compose(name: str, tmp_path: Path) -> dict[str, Any]:
    program = find_program("docker-compose", "docker-compose")
    for part in ("supernode", "courier", "superlink", "superexec"):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{part}.env").write_text(
            'LACUNA_NODE_CONFIG=agent-socket="/run/lacuna/agent.sock" agent-uids="61001"\n'
        )
    done = subprocess.run(
        [program, "-f", str(DEPLOY / "compose" / name), "config"],
        capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "LACUNA_ETC": str(tmp_path), "STUDY": "study"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    services: dict[str, Any] = yaml.safe_load(done.stdout)["services"]
    for service in services.values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert int(service["user"].split(":")[0]) > 60_000
        assert not service.get("privileged", False)
    return services


def test_a_site_in_containers(tmp_path: Path) -> None:
    services = compose("site.yaml", tmp_path)
    agent, node, courier = services["agent"], services["supernode"], services["courier"]
    assert agent["network_mode"] == "none"
    assert "networks" not in agent
    assert any(str(volume).endswith("/srv/scans:ro") for volume in agent["volumes"])
    assert agent["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    for foreign in (node, courier):
        mounted = json.dumps(foreign["volumes"])
        assert "scans" not in mounted
        assert "/var/lib/lacuna" not in mounted
    assert list(node["networks"]) == ["inner"]
    assert courier["network_mode"] == "service:supernode"
    assert len({service["user"] for service in services.values()}) == len(services)
    config = courier["environment"]["LACUNA_NODE_CONFIG"]
    assert config == 'agent-socket="/run/lacuna/agent.sock" agent-uids="61001"', "read as systemd reads it"
    assert all("mem_limit" in service and "pids_limit" in service for service in services.values())


def test_a_coordinator_in_containers(tmp_path: Path) -> None:
    services = compose("coordinator.yaml", tmp_path)
    published = {name for name, service in services.items() if service.get("ports")}
    assert published == {"perimeter"}
    for name in ("superlink", "driver"):
        assert services[name]["network_mode"] == "service:perimeter"
    assert "127.0.0.1" in services["superlink"]["command"][0]


def test_images_run_as_nobody_from_the_pinned_versions() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    final = {stage.split()[2]: stage for stage in stages if "ENTRYPOINT" in stage}
    assert set(final) == {"agent", "courier", "coordinator", "perimeter"}
    for name, stage in final.items():
        assert re.search(r"^USER 610\d\d:610\d\d$", stage, flags=re.M), name
    outside = [stage.split()[0] for stage in stages if stage.split()[0] not in _stage_names(stages)]
    assert set(outside) == {"${PYTHON}", "${DEBIAN}"}, "a base image that a digest cannot be given for"
    installs = re.findall(r"pip install.*", text)
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in line for line in installs)


def _stage_names(stages: list[str]) -> set[str]:
    return {stage.split()[2] for stage in stages if stage.split()[1] == "AS"}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bill_of_materials_names_every_pinned_package(tmp_path: Path) -> None:
    """CycloneDX, of the environment that runs the tests; versions equal constraints.txt."""
    out = tmp_path / "sbom.json"
    subprocess.run(
        [sys.executable, "-m", "cyclonedx_py", "environment", "--output-reproducible", "--of", "JSON", "-o",
         str(out), sys.executable],
        check=True, capture_output=True, timeout=600,
    )  # fmt: skip
    bill = json.loads(out.read_text())
    assert bill["bomFormat"] == "CycloneDX"
    found = {normal(part["name"]): part["version"] for part in bill["components"]}
    lines = (DEPLOY.parent / "constraints.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if "==" in line)
    for name in ("flwr", "torch", "cryptography", "grpcio", "opacus", "monai"):
        assert name in found
    different = {
        name: (found[normal(name)], version)
        for name, version in pinned.items()
        if found.get(normal(name), version).partition("+")[0] != version.partition("+")[0]
    }
    assert not different


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_known_vulnerability_is_in_the_pinned_packages() -> None:
    """Where pip-audit's service answers. It is asked about names and versions alone."""
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "-r", str(DEPLOY.parent / "constraints.txt"), "--no-deps",
         "--disable-pip", "--format", "json", "--progress-spinner", "off", "--timeout", "20"],
        capture_output=True, text=True, check=False, timeout=800,
    )  # fmt: skip
    if not done.stdout.strip():
        pytest.skip("pip-audit's service cannot be reached: " + done.stderr.strip().splitlines()[-1][:200])
    report = json.loads(done.stdout)["dependencies"]
    known = {f"{part['name']} {part['version']}": [fault["id"] for fault in part["vulns"]]
             for part in report if part.get("vulns")}  # fmt: skip
    audited = sum("skip_reason" not in part for part in report)
    if audited == 0:
        pytest.skip("pip-audit's service knows none of the packages")
    assert not known


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
