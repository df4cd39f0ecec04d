"""``lacuna demo``: the whole life of a study on one machine, from empty folders to synthetic scans.

Every step is a ``lacuna`` command that a person could type; it is printed before it runs. Each person has a
``LACUNA_HOME`` of their own below the output folder, and what they hand to one another are files in
``exchange/``. Hospitals' agents, SuperNodes and the SuperLink are separate processes on loopback.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from deploy.local_consortium import LocalConsortium, RunOutcome, SiteProcess
from server.study_store import StudyStore
from shared.errors import CoordinatorError, LacunaError, SiteError, UsageError

STUDY = "demo"
RUN_TIMEOUT_S = 3600.0
MAX_RESUMES = 3
MECHANISM_CANARIES = 256
"""A quarter of the default: three agents share this machine."""
MARKER = ".lacuna-demo"


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """What ``lacuna demo`` was asked for."""

    out: Path
    data: Path | None = None
    patients: Path | None = None
    sites: int = 3
    rounds: int | None = None
    epsilon: float = 8.0
    leaky: bool = False
    samples: int | None = None
    """Samples of each generator that are compared; by default as many as are quick for the networks."""


@dataclass(kw_only=True)
class Demo:
    """Runs the steps in order; ``console`` shows them."""

    options: DemoOptions
    console: Console
    started: float = field(default_factory=time.monotonic)
    disturb: Callable[[LocalConsortium], None] = lambda _: None
    """Called while a run is under way; tests kill processes here."""
    keep_alive: bool = True
    """Start SuperNodes and agents that died again, as a service manager would."""

    @property
    def out(self) -> Path:
        return self.options.out

    @property
    def names(self) -> list[str]:
        return [f"hospital-{chr(ord('a') + index)}" for index in range(self.options.sites)]

    @property
    def store(self) -> StudyStore:
        return StudyStore(self.out / "coordinator" / "coordinator" / STUDY)

    def run(self) -> int:
        """The whole study; returns the exit code: 0, or the gate's refusal."""
        self._prepare_output()
        study = self._scans()
        self._step("Keys: every person makes their own, fingerprints are compared, peers are pinned")
        self._enrol()
        self._step("Public networks and the study plan")
        study.pretrain()
        coordinate = partial(self._lacuna, "coordinator", "coordinator")
        coordinate("plan", "new", "--study", STUDY, *self._plan_choices(study.plan_choices))
        coordinate("plan", "sign", "--study", STUDY, "--out", str(self._exchange("plan")))
        self._step("Hospitals: import scans, approve the plan against their own policy")
        plan_approvals: list[str] = []
        for name in self.names:
            if self.options.leaky:
                self._lacuna(name, "site", "policy", "--set", "allow_unprotected=true")
            for clause in study.policy_changes:
                self._lacuna(name, "site", "policy", "--set", clause)
            self._lacuna(
                name, "site", "import", "--plan", str(self._exchange("plan")), *study.import_choices(name)
            )
            approval = str(self._exchange(f"{name}.plan-approval.json"))
            self._lacuna(name, "site", "approve", str(self._exchange("plan")), "--out", approval)
            plan_approvals.append(approval)
        coordinate("plan", "collect", "--study", STUDY, *plan_approvals)
        self._step("Rounds: SuperLink, SuperNodes and agents start; the study runs as a Flower run")
        self._train(study)
        self._step("Gate")
        decision = self._exchange("gate-decision.dsse.json")
        code = coordinate("gate", "--study", STUDY, "--out", str(decision), may_refuse=True)
        if code == 0:
            self._release(decision, study)
        self._summary(study, released=code == 0)
        return code

    def _scans(self) -> Scans:
        if self.options.data is None:
            return SimulatedScans(self)
        return DecathlonScans(self)

    # steps

    def _enrol(self) -> None:
        self._lacuna("coordinator", "coordinator", "init", STUDY)
        officer = self._exchange("officer.request.json")
        self._lacuna("officer", "compliance", "init", "--name", "officer", "--out", str(officer))
        fingerprints = {
            "coordinator": self._fingerprint("coordinator"),
            "officer": self._fingerprint("officer"),
        }
        for name in self.names:
            self._lacuna(name, "site", "init", "--name", name, quiet=True)
            self._lacuna(
                name, "site", "request", "--out", str(self._exchange(f"{name}.request.json")), quiet=True
            )
            fingerprints[name] = self._fingerprint(name)
        for name in ["officer", *self.names]:
            request = str(self._exchange(f"{name}.request.json"))
            self._lacuna(
                "coordinator", "coordinator", "enrol", request, "--study", STUDY,
                "--fingerprint", fingerprints[name], quiet=True,
            )  # fmt: skip
        for name in self.names:
            for peer, fingerprint in fingerprints.items():
                if peer != name:
                    self._lacuna(name, "site", "pin", peer, fingerprint, quiet=True)

    def _train(self, study: Scans) -> None:
        sites = [
            SiteProcess(
                site_id=name,
                command=[
                    *_lacuna_command(),
                    "site",
                    "serve",
                    STUDY,
                    "--socket",
                    "{socket}",
                    "--threads",
                    "1",
                    *study.serve_choices,
                ],
                env=self._environment(name),
            )
            for name in self.names
        ]
        with LocalConsortium(
            self.out / "flower",
            sites,
            keep_alive=self.keep_alive,
            progress=lambda words: self.console.print(f"  {words}"),
        ) as consortium:
            outcome = self._launch(consortium, "launch")
            for _ in range(MAX_RESUMES):
                if outcome.completed:
                    return
                self.console.print(f"  the run ended ({outcome.status}); the study goes on in a new one")
                if consortium.pid_of("superlink") is None:
                    consortium.restart_superlink()
                outcome = self._launch(consortium, "resume")
            if not outcome.completed:
                raise CoordinatorError(
                    f"the Flower run ended with {outcome.status}: {outcome.details}",
                    remedy=f"read the logs in {consortium.log_directory}",
                )

    def _launch(self, consortium: LocalConsortium, verb: str) -> RunOutcome:
        answer = io.StringIO()
        self._lacuna(
            "coordinator", "coordinator", verb, "--study", STUDY, "--flwr-home", str(consortium.flwr_home),
            "--json", sink=answer,
        )  # fmt: skip
        run_id = str(json.loads(answer.getvalue())["run_id"])
        with _round_progress(self.console, self.store) as show:

            def on_poll() -> None:
                show()
                self.disturb(consortium)

            return consortium.wait(run_id, timeout_s=RUN_TIMEOUT_S, on_poll=on_poll)

    def _release(self, decision: Path, study: Scans) -> None:
        self._step("Approvals, release, verification")
        approvals = []
        for name in self.names:
            path = self._exchange(f"{name}.approval.json")
            self._lacuna(name, "site", "approve-release", str(decision), "--out", str(path))
            approvals += ["--approval", str(path)]
        path = self._exchange("officer.approval.json")
        plan = str(self._exchange("plan"))
        self._lacuna("officer", "compliance", "approve", str(decision), "--plan", plan, "--out", str(path))
        self._lacuna(
            "coordinator", "coordinator", "release", "--study", STUDY, *approvals, "--approval", str(path)
        )
        bundle = self.out / "bundle"
        shutil.copytree(self.store.bundle_path, bundle)
        evidence = [
            "--coordinator", self._fingerprint("coordinator"),
            "--log", str(self.store.log_path), "--heads", str(self.store.receipts_path),
        ]  # fmt: skip
        self._lacuna("officer", "compliance", "verify", str(bundle), *evidence)
        page = str(self.out / "release-report.html")
        self._lacuna("officer", "compliance", "report", str(bundle), "--out", page, *evidence)
        self._step("A researcher makes synthetic scans; the coordinator looks at what the hospitals added")
        self._lacuna(
            "researcher", "generate", str(bundle), "--condition", study.rare, "--count", "8",
            "--out", str(self.out / "synthetic"),
        )  # fmt: skip
        self._lacuna(
            "coordinator", "coordinator", "compare", "--study", STUDY, "--condition", study.rare,
            *[part for label in study.measured for part in ("--label", label)],
            "--count", str(self.options.samples or study.samples),
            "--sheet", str(self.out / "prior-and-release.png"),
        )  # fmt: skip

    def _summary(self, study: Scans, *, released: bool) -> None:
        self._step("What each hospital sees at home")
        for name in self.names:
            self._lacuna(name, "site", "budget")
            try:
                self._lacuna(name, "site", "audit")
            except SiteError as error:
                self.console.print(f"  {error.message}", soft_wrap=True)
        ledgers = self.out / "ledgers"
        shutil.copytree(self.store.evidence / "ledgers", ledgers)
        self._step("Where everything is")
        places = {
            "release bundle": self.out / "bundle" if released else None,
            "report about it, for people": self.out / "release-report.html" if released else None,
            "synthetic scans": self.out / "synthetic" if released else None,
            "prior beside release": self.out / "prior-and-release.png" if released else None,
            "signed ledgers": ledgers,
            "gate decision": self._exchange("gate-decision.dsse.json"),
            "logs": self.out / "flower" / "logs",
        }
        for what, path in places.items():
            if path is not None:
                self.console.print(f"  {what}: {path}", soft_wrap=True)
        took = time.monotonic() - self.started
        self.console.print(
            f"{'Released and verified' if released else 'REFUSED by the gate'} "
            f"after {took / 60:.1f} minutes; data: {study.description}"
        )

    # what steps are made of

    def _plan_choices(self, choices: Sequence[str]) -> list[str]:
        options = self.options
        own = [
            "--epsilon", str(options.epsilon), "--mechanism-canaries", str(MECHANISM_CANARIES),
            "--secondary-attacks", "unguided",
        ]  # fmt: skip
        if options.rounds is not None:
            own += ["--rounds", str(options.rounds)]
        return [*choices, *own]

    def _lacuna(
        self, who: str, *arguments: str, sink: io.StringIO | None = None, quiet: bool = False,
        may_refuse: bool = False,
    ) -> int:  # fmt: skip
        """Run a command as one of the persons; what it prints goes to ``sink``, nowhere, or the screen."""
        from deploy.cli.main import cli

        shown = " ".join(shlex.quote(self._shorten(part)) for part in arguments)
        self.console.print(f"[bold]{who}[/bold]$ lacuna {shown}", soft_wrap=True, highlight=False)
        output = io.StringIO() if quiet and sink is None else sink
        with _environment(self._environment(who)), redirect_stdout(output or sys.stdout):
            try:
                code = cli.main(args=list(arguments), standalone_mode=False)
            except SystemExit as stop:
                code = stop.code
            except click.ClickException as error:
                raise UsageError(f"lacuna {shown}: {error.format_message()}") from error
        status = int(code) if isinstance(code, int) else 0
        if status and not may_refuse:
            raise CoordinatorError(f"`lacuna {shown}` ended with exit code {status}")
        return status

    def _environment(self, who: str) -> dict[str, str]:
        return {
            "LACUNA_HOME": str(self.out / who),
            "LACUNA_COUNTER_DIR": str(self.out / "counters" / who),
        }

    def _fingerprint(self, who: str) -> str:
        from shared.identity import SigningKey

        path = {
            "coordinator": self.out / who / "coordinator" / "coordinator.key",
            "officer": self.out / who / "compliance" / "officer.key",
        }.get(who, self.out / who / "site" / "identity.key")
        return SigningKey.load(path).verify_key.fingerprint

    def _exchange(self, name: str) -> Path:
        folder = self.out / "exchange"
        folder.mkdir(exist_ok=True)
        return folder / name

    def _step(self, title: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        self.console.rule(f"[bold]{title}[/bold] ({minutes}:{seconds:02d})", align="left")

    def _shorten(self, part: str) -> str:
        return part.replace(f"{self.out}/", "")

    def _prepare_output(self) -> None:
        if self.out.exists():
            if any(self.out.iterdir()) and not (self.out / MARKER).exists():
                raise UsageError(f"{self.out} is not empty and was not made by lacuna demo")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True, mode=0o700)
        (self.out / MARKER).touch()


class Scans(Protocol):
    """Where a study's scans come from, and what follows from that."""

    rare: str
    measured: tuple[str, ...]
    samples: int
    description: str
    policy_changes: tuple[str, ...]
    """Clauses in which the hospitals of this demo agree to less than a policy asks for by itself."""

    serve_choices: tuple[str, ...]
    """Options of every hospital's agent."""

    def pretrain(self) -> None: ...
    @property
    def plan_choices(self) -> list[str]: ...
    def import_choices(self, name: str) -> list[str]: ...


class SimulatedScans:
    """Three hospitals with simulated patients, and the pair of networks that ships."""

    rare = "rare"
    measured: tuple[str, ...] = ("lesion",)
    samples = 200
    policy_changes: tuple[str, ...] = ()
    serve_choices: tuple[str, ...] = ()
    PATIENTS = 84
    FRACTIONS = {"common": 0.5, "rare": 0.5}  # noqa: RUF012

    def __init__(self, demo: Demo) -> None:
        from client.ingest.phantoms import write_phantom_folder
        from shared.volumes.phantom import simulate_cohort

        self._demo = demo
        options = demo.options
        self._patients = 45 if options.leaky else self.PATIENTS
        self.description = f"simulated, {self._patients} patients at each of {options.sites} hospitals"
        demo._step(f"Data: {self.description}")
        for index, name in enumerate(demo.names):
            scans = simulate_cohort(
                n_patients=self._patients, conditions_fractions=self.FRACTIONS, seed=31_000 + index
            )
            write_phantom_folder(scans, demo.out / "data" / name)
            demo.console.print(f"  {name}: {len(scans)} scans of {self._patients} patients")

    def pretrain(self) -> None:
        self._demo._lacuna("coordinator", "coordinator", "pretrain", "--study", STUDY, "--shipped")

    @property
    def plan_choices(self) -> list[str]:
        declared = 10 * round(self._patients * self._demo.options.sites * 2 / 3 / 10)
        choices = ["--rare", self.rare, "--declared-patients", str(declared), "--simulated"]
        if self._demo.options.leaky:
            return [
                *choices,
                "--mode",
                "unprotected",
                "--trainable",
                "all",
                "--rounds",
                "5",
                "--local-steps",
                "110",
            ]
        return [*choices, "--rounds", "16"]

    def import_choices(self, name: str) -> list[str]:
        return ["--nifti", str(self._demo.out / "data" / name)]


class DecathlonScans:
    """Real scans of a Decathlon task; 30 patients are public, the others are dealt out to the hospitals."""

    rare = "small"
    measured: tuple[str, ...] = ("anterior", "posterior")
    samples = 24
    COPY_SAMPLES = 64
    """500, the default, would take ten minutes of two cores at this size."""
    policy_changes: tuple[str, ...] = (
        "allow_low_power=true",
        "max_copied_share=0.35",  # 6 public patients held out cannot claim fewer false copies than 1 in 7
        f"min_copy_samples={COPY_SAMPLES}",
    )
    PUBLIC_PATIENTS = 30
    SPLIT_SEED = 1

    def __init__(self, demo: Demo) -> None:
        from client.ingest.decathlon import (
            patient_ids,
            public_mask_paths,
            split_patients,
            volume_condition_cut,
        )
        from shared.model.training import cpu_has_bfloat16

        self._demo = demo
        self.serve_choices: tuple[str, ...] = ("--bfloat16",) if cpu_has_bfloat16() else ()
        options = demo.options
        if options.data is None or options.patients is None:
            raise UsageError("--data and --patients belong together")
        if options.leaky:
            raise UsageError("--leaky is for simulated data only")
        self._data, self._table = options.data.resolve(), options.patients.resolve()
        public, sites = split_patients(
            patient_ids(self._table), public=self.PUBLIC_PATIENTS, sites=options.sites, seed=self.SPLIT_SEED
        )
        self._members = sum(map(len, sites)) * 2 / 3
        self._cut = volume_condition_cut(public_mask_paths(self._data, self._table, frozenset(public)))
        self.description = (
            f"{self._data.name}, {len(public)} public patients, "
            + ", ".join(str(len(site)) for site in sites)
            + " at the hospitals; 'small' is a volume below the public lower tertile, not a diagnosis"
        )
        demo._step(f"Data: {self.description}")
        self._list("public", public)
        for name, patients in zip(demo.names, sites, strict=True):
            self._list(name, patients)

    def _list(self, name: str, patients: Sequence[str]) -> None:
        folder = self._demo.out / "data"
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.txt").write_text("\n".join(patients) + "\n")

    def _source(self, name: str) -> list[str]:
        only = str(self._demo.out / "data" / f"{name}.txt")
        return [
            "--decathlon", str(self._data), "--patients", str(self._table), "--only", only,
            "--volume-cut", str(self._cut),
        ]  # fmt: skip

    def pretrain(self) -> None:
        self._demo._lacuna(
            "coordinator", "coordinator", "pretrain", "--study", STUDY, "--preset", "tiny",
            *self._source("public"), "--conditions", "normal,small", "--labels", "anterior,posterior",
            "--autoencoder-steps", "800", "--prior-steps", "400", "--embedding-steps", "100",
            "--segmenter-steps", "0",
            "--copy-samples", str(self.COPY_SAMPLES), *self.serve_choices,
        )  # fmt: skip

    @property
    def plan_choices(self) -> list[str]:
        declared = 5 * round(self._members / 5)
        return [
            "--rare", self.rare, "--declared-patients", str(declared), "--rounds", "20",
            "--low-power", "accept", "--copy-samples", str(self.COPY_SAMPLES),
        ]  # fmt: skip

    def import_choices(self, name: str) -> list[str]:
        return self._source(name)


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _round_progress(console: Console, store: StudyStore) -> Iterator[Callable[[], None]]:
    """A bar over rounds (lines where there is no terminal), and all that did not go as planned."""
    rounds = store.package().plan.privacy.rounds
    ordinary = {"run_started", "attempt_opened", "round_completed", "verdict_received"}
    shown = max((number for number, *_ in store.events()), default=0)
    with Progress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        task = progress.add_task("rounds", total=rounds, completed=store.completed_rounds())

        def say(words: str) -> None:
            progress.console.print(f"  {words}", soft_wrap=True)

        def show() -> None:
            nonlocal shown
            for number, _, kind, body in store.events(after=shown):
                shown = number
                if kind == "attempt_opened" and body["purpose"] == "audit":
                    progress.update(task, description="audit at every hospital")
                    say("all rounds are done; every hospital audits the candidate")
                elif kind == "round_completed" and not console.is_terminal and body["round"] % 5 == 0:
                    say(f"round {body['round']} of {rounds}")
                elif kind not in ordinary:
                    say(f"{kind}: {json.dumps(body)}")
            progress.update(task, completed=store.completed_rounds())

        try:
            yield show
            show()
        finally:
            store.close()


def _lacuna_command() -> list[str]:
    return [sys.executable, "-m", "deploy.cli"]


def run_demo(options: DemoOptions, console: Console) -> int:
    """Run the demo; an error leaves everything in place for a look."""
    demo = Demo(options=options, console=console)
    try:
        return demo.run()
    except LacunaError:
        console.print(f"the demo stopped; what there is so far: {options.out}", soft_wrap=True)
        raise
