"""A bad week: a study of real processes under a seeded schedule of faults. (No tests of its own.)

    python -m tests.deploy.bad_week --rounds 60 --seed 1 --minutes 40 --out DIR

Four hospitals with a dozen simulated patients each and ``micro`` networks; whatever a hospital and a
coordinator run, runs (:mod:`tests.deploy.loopback_services`). People do what ``deploy/OPERATING.md`` says:
the operator looks whether the run is alive and resumes the study, backs it up, and restores what was lost;
hospitals have their service managers alone. In the end: every round was made, by at
least the threshold's number of sites; the model is the one that the survivors' own records imply, bit by bit;
every ledger verifies and charges whatever was uploaded; no log names a patient, a scan or a folder of scans.
``DIR/timeline.json`` has the schedule, what happened when, and the verdict.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console

from deploy.demo import STUDY, DemoOptions, SimulatedScans
from deploy.flower_run import run_flower
from privacy.ledger_chain import CHARGE, read_export
from server.coordinator_backup import back_up
from server.global_model import GlobalModel
from server.study_store import AttemptRecord, StudyStore
from shared.checkpoint import load_tensors
from shared.errors import CoordinatorError, LacunaError
from shared.model.candidate import load_prior
from shared.model.denoiser import flatten
from tests.deploy.fault_schedule import KINDS, Fault, schedule
from tests.deploy.loopback_services import (
    HOSPITAL,
    LoopbackServices,
    OperationFailedError,
    libfaketime,
)
from tests.deploy.networked_demo import NetworkedDemo
from tests.loopback_ports import free_port

SITES, PATIENTS = 4, 12
AGENT = Path(__file__).parent / "recording_agent.py"
WARD = "ward-4711"
"""In the name of every folder of scans: a log that has it names a folder."""
COPY_SAMPLES = 40
CLAUSES = (
    "allow_low_power=true", "min_power=0.0", f"min_copy_samples={COPY_SAMPLES}", "max_copied_share=0.2",
)  # fmt: skip
RESERVE = 30
"""Attempts beyond the rounds: the coordinator's faults cost one or more each."""
APPEAR_S, GONE_S, RETRY_S = 120.0, 12.0, 10.0
BACKUP_EVERY = 2
"""Rounds: what is restored may be as old."""
POLL_S = 1.0
ROUND_S = 22.0
"""What a round takes without a pause, about."""


class BadWeek:
    """One week. ``timeline`` says what happened when, ``problems`` (after :meth:`verify`) what must not be.

    Args:
        out: A folder that does not exist, or is empty.
        minutes: The least time that the rounds shall take: every site's training step is drawn out.
        say: Told each line of the timeline.
    """

    def __init__(
        self,
        out: Path,
        faults: Sequence[Fault],
        *,
        rounds: int,
        seed: int,
        minutes: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.out, self.faults, self.rounds, self._seed = out.absolute(), tuple(faults), rounds, seed
        self._minutes, self._told = minutes, say
        self.timeline: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.aborted: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._left = list(self.faults)
        self._ends: list[tuple[float, Callable[[], None]]] = []
        self._opened_at: dict[int, float] = {}
        self._shown = 0
        self._backed_up = 0
        self._run_id = ""
        self._seen_at: float | None = None
        self._asked_at = 0.0
        self._away_until = 0.0

    # the study

    def run(self, *, timeout_s: float) -> None:
        """Prepare the study and live through the week. Raises AssertionError: it does not end in time."""
        self.out.mkdir(parents=True, exist_ok=True, mode=0o700)
        port = free_port()
        output = io.StringIO()
        with mock.patch.object(SimulatedScans, "PATIENTS", PATIENTS), WardScans.in_place():
            self._demo = NetworkedDemo(
                options=DemoOptions(out=self.study_out, sites=SITES),
                console=Console(file=output, width=120),
                address=f"127.0.0.1:{port}",
                plan_choices=[
                    "--rounds", str(self.rounds), "--max-attempts", str(self.rounds + RESERVE),
                    "--copy-samples", str(COPY_SAMPLES), "--secondary-attacks", "none",
                    "--mechanism-canaries", "0",
                ],
                policy_clauses=CLAUSES,
            )  # fmt: skip
            with redirect_stdout(output):
                self._demo.prepare()
        (self.out / "preparation.txt").write_text(output.getvalue())
        self.names = self._demo.names
        for name in self.names:
            self.records(name).mkdir(parents=True)
        sockets = Path(tempfile.mkdtemp(prefix="lacuna-week-", dir="/tmp"))
        try:
            services = LoopbackServices(
                self.study_out, self.names, agent=self._agent, environment=self._demo._environment,
                sockets=sockets, port=port, seed=self._seed,
            )  # fmt: skip
            with services as self._services:
                self._live(timeout_s)
        finally:
            shutil.rmtree(sockets, ignore_errors=True)

    def _agent(self, i: int, socket: Path) -> list[str]:
        serve = ["site", "serve", STUDY, "--socket", str(socket), "--threads", "1"]
        return [sys.executable, str(AGENT), str(self.records(self.names[i])), *serve]

    def _live(self, timeout_s: float) -> None:
        self._say("the study begins", rounds=self.rounds, faults=len(self.faults))
        self._begun = time.monotonic()
        self._launch("launch")
        while not self._over():
            if time.monotonic() - self._begun > timeout_s:
                raise AssertionError(f"the study did not end within {timeout_s:.0f} s; see {self.out}")
            for name in self._services.tick():
                self._say(f"started again: {name}")
            self._follow()
            self._end_what_is_over()
            self._strike_what_is_due()
            self._look_after_the_run()
            self._take_backup()
            self._set_pace()
            time.sleep(POLL_S)
        self._say("the study is over")

    def _over(self) -> bool:
        """Every round and the audit are made, the run says so, and no fault is left or lasts."""
        store = self._store()
        try:
            finished = any(kind == "run_finished" for _, _, kind, _ in store.events(after=self._since_launch))
            return finished and store.completed_rounds() >= self.rounds and not self._ends
        except CoordinatorError:
            return False
        finally:
            store.close()

    # what people do

    def _launch(self, verb: str) -> None:
        store = self._store()
        try:
            self._since_launch = max((number for number, *_ in store.events()), default=0)
            self._shown = min(self._shown, self._since_launch)
        finally:
            store.close()
        self._asked_at, self._seen_at = time.monotonic(), None
        try:
            answer = self._services.operate(
                verb, "--study", STUDY, "--flwr-home", str(self._services.operator_home), "--json"
            )
        except OperationFailedError as error:
            self._say(f"operator: {verb} failed, later again", words=str(error)[-200:])
            self._asked_at += RETRY_S - APPEAR_S
            return
        self._run_id = str(json.loads(answer)["run_id"])
        self._say(f"operator: {verb}", run=self._run_id)

    def _look_after_the_run(self) -> None:
        """As the operator: a run without a ServerApp is stopped, and the study resumed."""
        now = time.monotonic()
        if now < self._away_until:
            return
        if self._services.descendant("superexec", "flwr-serverapp") is not None:
            self._seen_at = now
            return
        asked, seen = self._asked_at, self._seen_at
        if now - (seen or asked) < (GONE_S if seen else APPEAR_S) or self._finished():
            return
        if self._run_id and seen:
            with suppress(CoordinatorError):
                run_flower(self._services.operator_home, "lacuna", "stop", self._run_id, "lacuna")
        self._launch("resume")

    def _finished(self) -> bool:
        store = self._store()
        try:
            events = store.events(after=self._since_launch)
            return store.completed_rounds() >= self.rounds and any(
                k == "run_finished" for _, _, k, _ in events
            )
        finally:
            store.close()

    def _take_backup(self) -> None:
        done = self._store().completed_rounds()
        if done < self._backed_up + BACKUP_EVERY or time.monotonic() < self._away_until:
            return
        try:
            back_up(self.study_out / "coordinator" / "coordinator", self.out / "backup")
            self._backed_up = done
        except LacunaError as error:
            self._say("backup failed, later again", words=error.message[:200])

    def _lose_coordinator(self) -> None:
        """Its machine is gone with everything on it; another one is set up from the backup."""
        done = self._store().completed_rounds()
        for name in ("superexec", "superlink", "perimeter"):
            self._services.stop(name)
        for folder in (self.study_out / "coordinator" / "coordinator", *self._services.coordinator_folders):
            shutil.rmtree(folder)
        self._away_until = time.monotonic() + APPEAR_S
        self._say(
            "the coordinator's machine is gone: studies, keys, perimeter, SuperLink's database", rounds=done
        )
        self._ends.append((time.monotonic() + 10, self._restore_coordinator))

    def _restore_coordinator(self) -> None:
        home = self.study_out / "coordinator" / "coordinator"
        if not home.exists():
            shutil.copytree(self.out / "backup", home)
            self._services.write_coordinator_perimeter()
            for name in ("superlink", "superexec", "perimeter"):
                self._services.start(name)
        try:
            self._services.register()
        except OperationFailedError as error:
            self._say("operator: register-nodes failed, later again", words=str(error)[-200:])
            self._ends.append((time.monotonic() + 3, self._restore_coordinator))
            return
        store = self._store()
        done = store.completed_rounds()
        self._shown = max((number for number, *_ in store.events()), default=0)
        store.close()
        self._backed_up = done
        self._away_until, self._run_id = 0.0, ""
        self._say("the coordinator is restored from its backup", rounds=done)
        self._launch("resume")

    # blows

    def _strike_what_is_due(self) -> None:
        now = time.monotonic()
        while self._left:
            fault = self._left[0]
            opened = min(
                (at for number, at in self._opened_at.items() if number >= fault.round), default=None
            )
            if opened is None or now < opened + fault.after_s or now < self._away_until:
                return
            if fault.kind == "coordinator lost" and not self._backed_up:
                return
            self._left.pop(0)
            self._say(f"BLOW: {fault.words()}", planned_round=fault.round)
            try:
                self._strike(fault)
            except (CoordinatorError, ProcessLookupError) as error:
                self._say(f"that blow hit nothing: {error}")

    def _strike(self, fault: Fault) -> None:
        services, i = self._services, fault.site or 0
        kind = fault.kind
        match kind.split(" ", 1):
            case ["kill", "courier process"]:
                self._kill_when_there(f"courier {i}", "flwr-clientapp")
            case ["kill", "serverapp"]:
                self._kill_when_there("superexec", "flwr-serverapp")
            case ["kill", ("superexec" | "superlink" | "perimeter") as unit]:
                services.kill(unit)
            case ["kill", unit]:
                services.kill(f"{unit} {i}")
            case ["restart", unit]:
                services.stop(unit)
                services.start(unit)
            case ["link", how]:
                link = services.links[i]
                {"cut": link.cut, "slow": lambda: link.slow(0.4),
                 "lossy": lambda: link.lose(lost=0.15, reset=0.03)}[how]()  # fmt: skip
                self._later(fault, link.mend)
            case [("agent" | "supernode") as unit, "stalls"]:
                services.signal(f"{unit} {i}", signal.SIGSTOP)
                self._later(fault, lambda: services.signal(f"{unit} {i}", signal.SIGCONT))
        if kind == "hospital loses power":
            for part in HOSPITAL:
                services.stop_at_once(f"{part} {i}")
            self._later(fault, lambda: self._start_hospital(i))
        elif kind.startswith("clock"):
            self._boot_hospital(i, clock_s=60 * fault.minutes_off)
            self._later(fault, lambda: self._boot_hospital(i, clock_s=0))
        elif kind.startswith("disk full"):
            here = kind == "disk full at the coordinator"
            units = ("superlink", "superexec") if here else (f"agent {i}", f"courier {i}", f"supernode {i}")
            self._fill(units, full=True)
            self._later(fault, lambda: self._fill(units, full=False))
        elif kind == "coordinator lost":
            self._lose_coordinator()

    def _kill_when_there(self, unit: str, program: str) -> None:
        """A process that lives for seconds: wait for the next one, not for ever."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            pid = self._services.descendant(unit, program)
            if pid is not None:
                self._services.kill_process(pid)
                return
            time.sleep(0.1)
        raise ProcessLookupError(f"no {program} within 20 s")

    def _fill(self, units: Iterable[str], *, full: bool) -> None:
        for unit in units:
            self._services.fill_disk(unit, full=full)

    def _start_hospital(self, i: int) -> None:
        for part in HOSPITAL:
            if not self._services.runs(f"{part} {i}"):
                self._services.start(f"{part} {i}")

    def _boot_hospital(self, i: int, *, clock_s: int) -> None:
        for part in HOSPITAL:
            self._services.stop_at_once(f"{part} {i}")
            self._services.services[f"{part} {i}"].clock_s = 0 if part == "site perimeter" else clock_s
        self._start_hospital(i)

    def _later(self, fault: Fault, end: Callable[[], None]) -> None:
        def ended() -> None:
            end()
            self._say(f"over: {fault.words()}")

        self._ends.append((time.monotonic() + fault.lasts_s, ended))

    def _end_what_is_over(self) -> None:
        now = time.monotonic()
        for item in [item for item in self._ends if item[0] <= now]:
            self._ends.remove(item)
            item[1]()

    # what is seen

    def _follow(self) -> None:
        """The study's events go into the timeline; when the first attempt of each round opened is noted."""
        if not self._store().root.exists():
            return
        store = self._store()
        try:
            for number, _, kind, body in store.events(after=self._shown):
                self._shown = number
                if kind == "attempt_opened" and body["purpose"] == "train":
                    self._opened_at.setdefault(body["round"], time.monotonic())
                if kind == "attempt_aborted":
                    record = next(r for r in store.attempts() if r.attempt == body["attempt"])
                    self.aborted.append({**body, "participants": list(record.participants)})
                self._say(f"study: {kind}", **body)
        except CoordinatorError as error:
            self._say(f"the study's folder cannot be read: {error.message[:120]}")
        finally:
            store.close()

    def _set_pace(self) -> None:
        """Draw the training steps out so that the rounds left take the time that is left."""
        left = self.rounds - self._store().completed_rounds()
        seconds = 60 * self._minutes - (time.monotonic() - self._begun)
        pace = f"{min(45.0, max(0.0, seconds / max(1, left) - ROUND_S)):.0f}"
        for name in self.names:
            path = self.records(name) / "pace"
            if not path.exists() or path.read_text() != pace:
                path.with_suffix(".new").write_text(pace)
                path.with_suffix(".new").replace(path)

    def _say(self, what: str, /, **facts: Any) -> None:
        at = round(time.monotonic() - self._started, 1)
        self.timeline.append({"at_s": at, "what": what, **({"facts": facts} if facts else {})})
        self._told(f"{at:7.1f} s  {what}" + (f"  {json.dumps(facts)}" if facts else ""))
        self.write()

    # places

    @property
    def study_out(self) -> Path:
        return self.out / "study"

    def records(self, name: str) -> Path:
        return self.out / "records" / name

    def _store(self) -> StudyStore:
        return StudyStore(self.study_out / "coordinator" / "coordinator" / STUDY)

    def write(self) -> None:
        """``timeline.json``: schedule, timeline and problems."""
        value = {
            "seed": self._seed,
            "rounds": self.rounds,
            "schedule": [fault.to_dict() for fault in self.faults],
            "timeline": self.timeline,
            "problems": self.problems,
        }
        draft = self.out / "timeline.json.new"
        draft.write_text(json.dumps(value, indent=1))
        draft.replace(self.out / "timeline.json")

    # what must hold in the end

    def verify(self) -> list[str]:
        """Everything that the module promises; what does not hold is named."""
        store = self._store()
        try:
            records = {r.round: r for r in store.attempts("train") if r.status == "completed"}
            threshold = store.package().plan.secure_aggregation.threshold
            self._expect(
                sorted(records) == list(range(1, self.rounds + 1)), f"rounds made: {sorted(records)}"
            )
            for number, record in records.items():
                enough = len(record.survivors) >= threshold
                self._expect(enough, f"round {number} has {len(record.survivors)} survivors")
            audits = [r for r in store.attempts("audit") if r.status == "completed"]
            self._expect(len(audits) == 1, f"{len(audits)} audits are complete")
            for entry in self.aborted:
                answered = set(entry["participants"]) - set(entry["lost"])
                words = f"attempt {entry['attempt']} was aborted though {len(answered)} sites answered"
                self._expect(len(answered) < threshold, f"{words}: {entry['reason']}")
            self._verify_model(store, records)
            self._verify_ledgers(store)
        finally:
            store.close()
        self._verify_logs()
        self._expect(not self._left, f"{len(self._left)} blows were not struck: {self._left}")
        self._say("verdict", problems=len(self.problems), **self.summary())
        return self.problems

    def _verify_model(self, store: StudyStore, records: dict[int, AttemptRecord]) -> None:
        """Each round's sum again from the survivors' records; every checkpoint must come out, bit by bit."""
        package = store.package()
        _, parameters = load_prior(package.plan, package.prior)
        model = GlobalModel(package.plan, flatten(parameters))
        for number, record in sorted(records.items()):
            vectors = [np.load(self.records(s) / f"{record.attempt}-train.npy") for s in record.survivors]
            model.apply(np.sum(vectors, axis=0), n_survivors=len(vectors))
            again = self.out / "again.safetensors"
            model.save(again, {"attempt": str(record.attempt), "survivors": ",".join(record.survivors)})
            (mine, about), (theirs, told) = (load_tensors(p) for p in (again, store.checkpoint_path(number)))
            same = mine.keys() == theirs.keys() and all(np.array_equal(mine[k], theirs[k]) for k in mine)
            self._expect(same and about == told, f"round {number} is not the sum of its survivors")

    def _verify_ledgers(self, store: StudyStore) -> None:
        """`compliance budget` passes; charges cover uploads, one each; no attempt is charged twice."""
        exported = []
        for name in self.names:
            path = self.out / f"{name}.ledger.dsse.json"
            self._demo._lacuna(name, "site", "export-ledger", "--out", str(path), quiet=True)
            exported.append(str(path))
            key = store.package().plan.site(name).verify_key
            entries = read_export(path.read_bytes(), key).entries
            charged = Counter(f"{e.body['attempt']}-{e.body['purpose']}" for e in entries if e.kind == CHARGE)
            uploaded = {file.stem for file in self.records(name).glob("*.npy")}
            self._expect(
                uploaded <= set(charged), f"{name} uploaded uncharged: {sorted(uploaded - set(charged))}"
            )
            self._expect(max(charged.values(), default=0) == 1, f"{name} charged an attempt twice")
            self._say(f"ledger of {name}", charges=len(charged), uploads=len(uploaded))
        plan = str(self.study_out / "exchange" / "plan")
        heads = ["--heads", str(store.receipts_path)]
        output = io.StringIO()
        code = self._demo._lacuna(
            "officer", "compliance", "budget", *exported, "--plan", plan, *heads, sink=output, may_refuse=True
        )
        (self.out / "budget.txt").write_text(output.getvalue())
        self._expect(code == 0, f"compliance budget ends with exit code {code}")

    def _verify_logs(self) -> None:
        """No patient, scan or folder of scans in anything that a process wrote for people or machines."""
        found = self.study_out / "data"
        names = {path.name.removesuffix(".nii.gz").encode() for path in found.rglob("*.nii.gz")}
        names |= {name.rpartition(b"-")[0] for name in names} | {WARD.encode()}
        logs = [
            *self._log_files(),
            *(self.study_out / name / "site" / STUDY / "agent.jsonl" for name in self.names),
            *(self.study_out / name / "site" / STUDY / "agent.log" for name in self.names),
            *(self.study_out / name / "site" / STUDY / "status.json" for name in self.names),
            self._store().root / "state.sqlite",
            self.out / "timeline.json",
        ]
        self._expect(len(names) > 2 * PATIENTS and len(logs) > 20, "there are names and logs to compare")
        for path in logs:
            data = path.read_bytes()
            for name in names:
                self._expect(name not in data, f"{path.relative_to(self.out)} names {name.decode()}")

    def _log_files(self) -> list[Path]:
        kept = [*(self.study_out / "logs").glob("*.log"), *(self.study_out / "run").rglob("*.log")]
        return [*kept, *(self.study_out / "run").rglob("access.jsonl")]

    def _expect(self, holds: bool, otherwise: str) -> None:
        if not holds:
            self.problems.append(otherwise)

    def summary(self) -> dict[str, Any]:
        store = self._store()
        try:
            status = Counter(f"{r.purpose} {r.status}" for r in store.attempts())
        finally:
            store.close()
        return {
            "minutes": round((time.monotonic() - self._started) / 60, 1),
            "attempts": dict(status),
            "blows": len(self.faults) - len(self._left),
            "starts": {name: service.starts for name, service in self._services.services.items()},
        }


class WardScans(SimulatedScans):
    """Simulated scans in folders with a name that must not turn up anywhere."""

    def import_choices(self, name: str) -> list[str]:
        folder = self._demo.out / "data" / name
        ward = folder.with_name(f"{name}-{WARD}")
        folder.rename(ward)
        return ["--nifti", str(ward)]

    @classmethod
    def in_place(cls) -> Any:
        """The demo's scans are these."""
        return mock.patch.object(NetworkedDemo, "_scans", lambda demo: cls(demo))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=40.0, help="the least that the rounds shall take")
    parser.add_argument("--every", type=int, default=2, help="a fault in every so many rounds")
    parser.add_argument("--only", action="append", help="kind of fault; again for more")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plan", action="store_true", help="print the schedule, and do nothing")
    chosen = parser.parse_args(arguments)
    kinds = tuple(chosen.only or KINDS)
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))} (there are: {', '.join(KINDS)})")
    if libfaketime() is None and any(kind.startswith("clock") for kind in kinds):
        parser.error("faketime is not installed (Debian: apt-get install faketime)")
    faults = schedule(chosen.seed, rounds=chosen.rounds, sites=SITES, kinds=kinds, every=chosen.every)
    for fault in faults:
        print(f"planned: round {fault.round:3}, after {fault.after_s:4.1f} s: {fault.words()}")
    if chosen.plan:
        return 0
    week = BadWeek(
        chosen.out, faults, rounds=chosen.rounds, seed=chosen.seed, minutes=chosen.minutes,
        say=lambda words: print(words, flush=True),
    )  # fmt: skip
    week.run(timeout_s=60 * (3 * chosen.minutes + 60))
    problems = week.verify()
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print("the week was survived" if not problems else f"{len(problems)} problems", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
