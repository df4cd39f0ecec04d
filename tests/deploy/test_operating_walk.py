"""A newcomer's path: the commands of OPERATING.md, sections 10 and 11, typed in order on fresh machines.

    python -m pytest tests/deploy/test_operating_walk.py      (as root; nginx, nftables, iproute2, systemd)

A coordinator, three hospitals and an officer, each a machine of its own (:mod:`fresh_machine`), go from
nothing to a released bundle with real nginx, SuperLink, SuperNodes and agents. Only what a person knows and
the page cannot is put in: names, an address, and fingerprints in the place of ``SHA256:...``. Left out:
making the virtual environment, and blocks that begin with ``# the real study``.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fresh_machine import REPOSITORY, FreshMachine, MachineNetwork
from hospital_network import unmet
from perimeter_pair import find_program

PAGE = REPOSITORY / "deploy" / "OPERATING.md"
HOSPITALS = ("hospital-a", "hospital-b", "hospital-c")
WALK = (
    ("coordinator", 11, 1), ("coordinator", 11, 2), ("hospitals", 10, 1), ("hospitals", 10, 2),
    ("officer", 11, 3), ("coordinator", 11, 4), ("hospitals", 10, 3), ("hospitals", 10, 4),
    ("coordinator", 11, 5), ("hospitals", 10, 5), ("coordinator", 11, 6), ("hospitals", 10, 6),
    ("hospitals", 10, 7), ("coordinator", 11, 7), ("coordinator", 11, 8), ("hospitals", 10, 8),
    ("officer", 11, 9), ("coordinator", 11, 10), ("officer", 11, 11), ("coordinator", 11, 12),
    ("hospitals", 10, 9),
)  # fmt: skip
"""Whose turn it is, as the page's table says who waits for whom: who, section, step."""
NOT_TYPED = re.compile(r"python3 -m venv |/opt/lacuna/bin/pip ")
THE_REAL_STUDY = "# the real study"
OUTBOX = (
    "*.request.json", "*.sheet.json", "*.certificate.json", "*-approval.json", "*.approval.json",
    "gate-decision.dsse.json", "trial-plan", "coordinator/trial/bundle", "coordinator/release-log.jsonl",
)  # fmt: skip
AGENT_S, RUN_S = 900.0, 5400.0


def steps(section: int) -> dict[int, list[str]]:
    """The shell blocks of each numbered step of a section that a trial types."""
    text = PAGE.read_text()
    found = re.search(rf"^## {section}\. .*?(?=^## {section + 1}\. )", text, flags=re.M | re.S)
    assert found is not None
    parts = re.split(r"^\*\*(\d+)\. ", found[0], flags=re.M)
    return {
        int(number): [
            block
            for block in re.findall(r"```bash\n(.*?)```", part, flags=re.S)
            if not block.startswith(THE_REAL_STUDY)
        ]
        for number, part in zip(parts[1::2], parts[2::2], strict=True)
    }


def variants(block: str, me: str) -> list[str]:
    """A block with its example names as they are for this person, once for each whom it speaks of."""
    lines = [line for line in block.splitlines() if not NOT_TYPED.match(line)]
    block = "\n".join(lines)
    if me in HOSPITALS:
        own = block.replace("hospital-a", me)
        if "hospital-b" not in block:
            return [own]
        return [block.replace("hospital-b", other) for other in HOSPITALS if other != me]
    if "hospital-a" in block and "hospital-b" not in block:
        return [block.replace("hospital-a", name) for name in HOSPITALS]
    return [block]


def with_fingerprints(block: str, known: dict[str, str]) -> str:
    """What was read out over the telephone, in the place of ``SHA256:...``."""

    def heard(line: str) -> str:
        if "SHA256:..." not in line.partition(" #")[0]:
            return line
        named = re.search(r"([\w-]+)\.(?:request|sheet)\.json|pin (\w+)|--(coordinator) ", line)
        assert named is not None, f"whose fingerprint? {line}"
        return line.replace("SHA256:...", known[next(name for name in named.groups() if name)])

    return "\n".join(heard(line) for line in block.splitlines())


class Walk:
    """Five people at their machines, and a post that brings what one writes to the others' inboxes."""

    def __init__(self, network: MachineNetwork) -> None:
        self.machines = {name: network.add(name) for name in ("coordinator", *HOSPITALS, "officer")}
        self.fingerprints: dict[str, str] = {}
        self.inboxes = network.folder / "post"
        for name, machine in self.machines.items():
            machine.type("mkdir -m 700 ~/inbox")
            machine.type("cd ~" if name == "officer" else f"cd {REPOSITORY}")

    def go(self) -> Iterator[tuple[str, int, int]]:
        """Step by step; after each block, everybody's post is brought."""
        pages = {section: steps(section) for section in (10, 11)}
        for who, section, number in WALK:
            for block in pages[section][number]:
                for name in HOSPITALS if who == "hospitals" else (who,):
                    for words in variants(block, name):
                        self._type(name, words)
                self._bring()
            yield who, section, number

    def said(self, name: str, block: str) -> str:
        return self.machines[name].type(block).output

    def _type(self, name: str, block: str) -> None:
        machine = self.machines[name]
        address = f"{self.machines['coordinator'].address}:443"
        block = with_fingerprints(block, self.fingerprints).replace("lacuna.example.org:443", address)
        if "site doctor" in block:
            self._await_agent(machine)
        said = machine.type(block).output
        own = re.search(r"SHA256:[0-9a-f-]{20,}", said)
        if re.search(r"^\S+ (compliance )?init ", block, flags=re.M) and own is not None:
            self.fingerprints[name] = own[0]
        if "coordinator launch" in block:
            self._await_run(machine)

    def _await_agent(self, machine: FreshMachine) -> None:
        deadline = time.monotonic() + AGENT_S
        while machine.type("site health --socket /run/lacuna/agent.sock", check=False).failed:
            assert time.monotonic() < deadline, machine.type("journalctl -u lacuna-agent@trial").output
            time.sleep(3)

    def _await_run(self, machine: FreshMachine) -> None:
        deadline = time.monotonic() + RUN_S
        while True:
            events = json.loads(machine.type("coordinator status --study $STUDY --json").output)["events"]
            kinds = {event["kind"] for event in events}
            assert "run_failed" not in kinds, events
            assert time.monotonic() < deadline, events
            if "run_finished" in kinds:
                return
            time.sleep(10)

    def _bring(self) -> None:
        for name, machine in self.machines.items():
            outbox = machine.path("/root" if name == "officer" else "/var/lib/lacuna")
            for path in (path for pattern in OUTBOX for path in outbox.glob(pattern)):
                for other, receiver in self.machines.items():
                    if other != name:
                        target = receiver.path("/root/inbox") / path.name
                        shutil.rmtree(target, ignore_errors=True)
                        subprocess.run(["cp", "-r", str(path), str(target)], check=True)


def test_every_step_of_the_page_is_walked_in_its_order() -> None:
    for section in (10, 11):
        walked = [number for _, found, number in WALK if found == section]
        assert sorted(walked) == list(steps(section)) == list(range(1, len(walked) + 1))
    for who in ("coordinator", "hospitals", "officer"):
        own = [(section, number) for name, section, number in WALK if name == who]
        assert own == sorted(own), "nobody goes back in the page"


@pytest.mark.slow
@pytest.mark.flower
@pytest.mark.timeout(7200)
def test_from_nothing_to_a_released_bundle(tmp_path: Path) -> None:
    if reason := unmet():
        pytest.skip(reason)
    find_program("systemd-sysusers", "systemd")
    with MachineNetwork() as network:
        walk = Walk(network)
        try:
            walked = list(walk.go())
        finally:
            transcript = "\n\n".join(
                line for machine in network.machines for line in [f"== {machine.name}", *machine.transcript]
            )
            (tmp_path / "transcript.txt").write_text(transcript)
        assert walked == list(WALK)
        coordinator, hospital = walk.machines["coordinator"], walk.machines["hospital-a"]
        assert coordinator.path("/var/lib/lacuna/coordinator/trial/bundle/models").is_dir()
        assert coordinator.path("/mnt/backup/coordinator/coordinator.key").is_file()
        budget = json.loads(hospital.type("site budget --json").output)
        assert budget["total"]["reserved"] == 0, "the trial has ended"
        assert 0 < budget["total"]["epsilon"] <= 0.1
        assert "allow_low_power = false" in hospital.type("site policy").output
        owners = hospital.type("find /var/lib/lacuna /var/lib/lacuna-counter ! -user lacuna-agent").output
        assert owners.strip() == "", "nothing of root's is left where the agent writes"
