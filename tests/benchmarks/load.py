"""Load: many sites with a large vector through one real SuperLink and nginx.

    python -m tests.benchmarks.load --sites 5,10,20,50 --parameters 10000000

The coordinator's side is real and as its service units start it: nginx with certificates, SuperLink with its
database, SuperExec, and a ServerApp that runs the product's round driver. One process speaks for all
hospitals (:mod:`tests.benchmarks.load_nodes`), with real agents, ledgers and protocol; only patients are
missing. Everything shares this machine's cores, so times are upper bounds; sizes are not affected. The peer
that figures are divided by is the smallest number of sites in the same run.

Each round's sum is compared with what the sites put in. A row is kept in ``results/load.jsonl`` as soon as it
is measured, and what is kept is not measured again unless ``--anew`` says so. What the figures mean is in
``load.md``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import serialization
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import init_http_client_from_connection
from flwr.proto.control_pb2 import RegisterNodeRequest
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

TESTS = Path(__file__).resolve().parents[1]
for folder in (str(TESTS), str(TESTS / "server")):  # as the conftest files do for tests
    if folder not in sys.path:
        sys.path.insert(0, folder)

from in_memory_consortium import Consortium  # noqa: E402
from known_workbench import KnownWorkbench  # noqa: E402

from client.site_agent import Workbench  # noqa: E402
from client.site_network import SiteNetwork  # noqa: E402
from deploy.flower_run import run_flower  # noqa: E402
from server.coordinator_home import CoordinatorHome  # noqa: E402
from server.study_store import StudyStore  # noqa: E402
from shared.enrolment import open_request  # noqa: E402
from shared.plan_package import PlanPackage  # noqa: E402
from tests.benchmarks.load_nodes import NodeFiles, speak_for  # noqa: E402
from tests.deploy.loopback_services import LoopbackServices  # noqa: E402
from tests.loopback_ports import free_port  # noqa: E402

SITES, PARAMETERS, ROUNDS = (5, 10, 20, 50), 10_000_000, 3
SAMPLE_S = 0.25
LIMIT_S = 3600.0
SAY_S = 20.0
LOSSES = ("run_failed", "attempt_aborted", "sites_dropped", "set_up_failed")
APP = Path(__file__).parent / "load_app"
KEPT = Path(__file__).parent / "results" / "load.jsonl"
MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Load:
    """One row. ``*_mib`` are peaks over its ``rounds``; seconds, traffic and requests are a round's
    mean, traffic that of all sites at nginx, ``written_mib`` what the SuperLink gave the disk to write."""

    sites: int
    parameters: int
    rounds: int
    round_s: float
    hospitals_cpu_s: float
    serverapp_mib: float
    serverapp_cpu_s: float
    superlink_mib: float
    superlink_cpu_s: float
    storage_mib: float
    written_mib: float
    nginx_mib: float
    nginx_cpu_s: float
    down_mib: float
    up_mib: float
    requests: float


class Peaks:
    """Highest resident memory and used processor time of the coordinator's processes, and its storage."""

    def __init__(self, services: LoopbackServices) -> None:
        self._services, self._done = services, threading.Event()
        self.rss: dict[str, float] = {}
        self.cpu: dict[str, float] = {}
        self.storage = self.written = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def begin(self) -> None:
        self._before, self._written_before = self._processor(), self._written()
        self._thread.start()

    def end(self) -> None:
        self._done.set()
        self._thread.join()
        after = self._processor()
        self.cpu = {name: after[name] - self._before.get(name, 0.0) for name in after}
        self.written = self._written() - self._written_before

    def _written(self) -> float:
        """MiB that the SuperLink gave to be written to a disk so far."""
        return sum(process.io_counters().write_bytes for process in self._processes()["superlink"]) / MIB

    def _processes(self) -> dict[str, list[psutil.Process]]:
        found: dict[str, list[psutil.Process]] = {"serverapp": [], "superlink": [], "perimeter": []}
        for unit, name in (
            ("superexec", "serverapp"),
            ("superlink", "superlink"),
            ("perimeter", "perimeter"),
        ):
            for pid in self._services.pids(unit):
                try:
                    process = psutil.Process(pid)
                    if name != "serverapp" or any("flwr-serverapp" in part for part in process.cmdline()):
                        found[name].append(process)
                except psutil.Error:
                    continue
        return found

    def _processor(self) -> dict[str, float]:
        return {
            name: sum(sum(process.cpu_times()[:2]) for process in processes)
            for name, processes in self._processes().items()
        }

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_S):
            for name, processes in self._processes().items():
                total = 0.0
                for process in processes:
                    try:
                        total += process.memory_info().rss / MIB
                    except psutil.Error:
                        continue
                self.rss[name] = max(self.rss.get(name, 0.0), total)
            folders = (self._services.database.parent, self._services.out / "run" / "superlink")
            size = sum(_size(path) for folder in folders for path in folder.rglob("*"))
            self.storage = max(self.storage, size / MIB)


class Vectors(Consortium):
    """Sites without patients: site i has i + 1 in every coordinate."""

    def make_workbench(self, i: int, directory: Path) -> Workbench:
        return OneNumber(self.package, directory, i)


class OneNumber(KnownWorkbench):
    """Powers of two, as the base class has them, are more than 50 sites' range holds."""

    def __init__(self, package: PlanPackage, directory: Path, position: int) -> None:
        super().__init__(package, directory, position)
        self._value = position + 1


class ManyNodes(LoopbackServices):
    """Registers its nodes over one connection: `flwr` starts a process for each."""

    keys: Sequence[bytes] = ()

    def register(self) -> None:
        os.environ["FLWR_HOME"] = str(self.operator_home)
        client = init_http_client_from_connection(read_superlink_connection("lacuna"))
        for key in self.keys:
            client.RegisterNode(RegisterNodeRequest(public_key=key))
        client.close()


def measure(sites: int, parameters: int, rounds: int, root: Path) -> Iterator[Load]:
    """A row of the first round, and, where there are more, one of all but the first."""
    os.environ["LACUNA_COUNTER_DIR"] = str(root / "counters")
    home = CoordinatorHome(root / "coordinator" / "coordinator")
    home.root.mkdir(mode=0o700, parents=True)
    vectors = type("Vectors", (Vectors,), {"DIMENSION": parameters})
    consortium: Consortium = vectors(root / "coordinator", n=sites, rounds=rounds)
    study = consortium.store.root
    consortium.store.close()
    port = free_port()
    home.authority.create(address=f"127.0.0.1:{port}")
    files = [_link(home, SiteNetwork(site), root / "links" / site.site_id) for site in consortium.homes]
    services = ManyNodes(
        root, (), agent=lambda *_: [], environment=lambda _: {}, sockets=root, port=port, seed=1
    )
    services.keys = [public_key_to_bytes(file.node_key.public_key()) for file in files]
    ended = threading.Event()
    with services:
        agents = [consortium.transport._agents[i] for i in range(sites)]
        handlers = [lambda envelope, agent=agent: agent(envelope, None) for agent in agents]
        threads = speak_for(f"127.0.0.1:{port}", list(zip(files, handlers, strict=True)), ended)
        config = f"study-home={json.dumps(str(study))}"
        run_flower(services.operator_home, "lacuna", "run", str(APP), "lacuna", "--run-config", config)
        try:
            _until(study, 0, services)
            yield _row(sites, parameters, study, services, (0, 1))
            if rounds > 1:
                yield _row(sites, parameters, study, services, (1, rounds))
        finally:
            ended.set()
        for thread in threads:
            thread.join(60)
    for ledger in consortium.ledgers.values():
        ledger.close()


def _row(sites: int, parameters: int, study: Path, services: LoopbackServices, span: tuple[int, int]) -> Load:
    """Watch from the end of one round (0: the beginning of the first) to that of another."""
    peaks, requests = Peaks(services), services.out / "run" / "perimeter" / "prefix" / "access.jsonl"
    before, own = requests.stat().st_size, time.process_time()
    peaks.begin()
    _until(study, span[1], services)
    peaks.end()
    own = time.process_time() - own
    lines = [json.loads(line) for line in requests.read_bytes()[before:].splitlines() if line]
    refused = sorted({line["status"] for line in lines if line["status"] != 200})
    if refused:
        _say(f"nginx answered some requests with {', '.join(map(str, refused))}")
    n = span[1] - span[0]
    return Load(
        sites=sites,
        parameters=parameters,
        rounds=n,
        round_s=_round_seconds(study, span),
        hospitals_cpu_s=own / n,
        serverapp_mib=peaks.rss["serverapp"],
        serverapp_cpu_s=peaks.cpu["serverapp"] / n,
        superlink_mib=peaks.rss["superlink"],
        superlink_cpu_s=peaks.cpu["superlink"] / n,
        storage_mib=peaks.storage,
        written_mib=peaks.written / n,
        nginx_mib=peaks.rss["perimeter"],
        nginx_cpu_s=peaks.cpu["perimeter"] / n,
        down_mib=sum(line["sent"] for line in lines) / MIB / n,
        up_mib=sum(line["received"] for line in lines) / MIB / n,
        requests=len(lines) / n,
    )


def _link(home: CoordinatorHome, network: SiteNetwork, folder: Path) -> NodeFiles:
    """A hospital's certificate, as `coordinator enrol --out` makes it, and its keys."""
    certificate = home.authority.issue(open_request(network.request()))
    folder.mkdir(parents=True, mode=0o700)
    (folder / "tls.pem").write_text(certificate.certificate)
    (folder / "ca.pem").write_text(certificate.authority)
    node_key = serialization.load_ssh_private_key(network.node_key.read_bytes(), password=None)
    return NodeFiles(
        authority=folder / "ca.pem",
        certificate=folder / "tls.pem",
        key=network.next_tls_key,
        node_key=node_key,  # type: ignore[arg-type]
    )


def _until(study: Path, rounds: int, services: LoopbackServices) -> None:
    """Wait until so many rounds are made (0: until the first has begun).

    Raises:
        RuntimeError: the run failed, a site was lost, or it is too late.
    """
    deadline, store, said = time.monotonic() + LIMIT_S, StudyStore(study), 0.0
    try:
        while True:
            events = [(kind, body) for _, _, kind, body in store.events()]
            begun = any(kind == "attempt_opened" for kind, _ in events)
            if begun and store.completed_rounds() >= rounds:
                return
            if time.monotonic() - said > SAY_S:
                _say(f"{store.completed_rounds()} rounds; {events[-1][0] if events else 'starting'}")
                said = time.monotonic()
            bad = [event for event in events if event[0] in LOSSES]
            if bad or time.monotonic() > deadline:
                raise RuntimeError(
                    f"round {rounds} was not made: {bad or 'too late'}\n"
                    + services.log("superexec").read_text(errors="replace")[-3000:]
                )
            time.sleep(0.2)
    finally:
        store.close()


def _say(words: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {words}", file=sys.stderr, flush=True)


def _round_seconds(study: Path, span: tuple[int, int]) -> float:
    store = StudyStore(study)
    try:
        events = list(store.events())
    finally:
        store.close()
    ends = [at for _, at, kind, _ in events if kind == "round_completed"]
    begin = next(at for _, at, kind, _ in events if kind == "attempt_opened")
    return ([begin, *ends][span[1]] - [begin, *ends][span[0]]) / (span[1] - span[0])


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


COLUMNS = (
    ("sites", "sites", "{:.0f}"),
    ("round, s", "round_s", "{:.1f}"),
    ("ServerApp, MiB", "serverapp_mib", "{:.0f}"),
    ("SuperLink, MiB", "superlink_mib", "{:.0f}"),
    ("its storage, MiB", "storage_mib", "{:.0f}"),
    ("written, MiB", "written_mib", "{:.0f}"),
    ("nginx, MiB", "nginx_mib", "{:.0f}"),
    ("down, MiB", "down_mib", "{:.0f}"),
    ("up, MiB", "up_mib", "{:.0f}"),
    ("requests", "requests", "{:.0f}"),
    ("ServerApp, CPU s", "serverapp_cpu_s", "{:.1f}"),
    ("SuperLink, CPU s", "superlink_cpu_s", "{:.1f}"),
    ("nginx, CPU s", "nginx_cpu_s", "{:.1f}"),
    ("hospitals, CPU s", "hospitals_cpu_s", "{:.1f}"),
)


def table(rows: Sequence[Load]) -> str:
    """Markdown: figures a round, and below them the largest number of sites over the smallest."""
    lines = [f"{rows[0].parameters:,} parameters, {4 * rows[0].parameters / MIB:.1f} MiB a vector", ""]
    lines += ["| " + " | ".join(name for name, _, _ in COLUMNS) + " |", "|" + " ---: |" * len(COLUMNS)]
    lines += [
        "| " + " | ".join(form.format(getattr(row, key)) for _, key, form in COLUMNS) + " |" for row in rows
    ]
    if len(rows) > 1:
        first, last = asdict(rows[0]), asdict(rows[-1])
        ratios = [f"{last[key] / first[key]:.2f}x" if first[key] else "" for _, key, _ in COLUMNS]
        lines.append("| " + " | ".join(ratios) + " |")
    return "\n".join(lines)


def run(
    sites: Sequence[int] = SITES,
    parameters: int = PARAMETERS,
    rounds: int = ROUNDS,
    *,
    kept: Path = KEPT,
    anew: bool = False,
) -> str:
    """Each number of sites in a process of its own, so that memory of one is not the next one's."""
    rows = []
    for count in sites:
        row = None if anew else _kept(kept, count, parameters)
        if row is None:
            row = _measured_apart(count, parameters, rounds, kept)
        rows.append(row)
        print(table(rows), file=sys.stderr, flush=True)
    return table(rows)


def _measured_apart(count: int, parameters: int, rounds: int, kept: Path) -> Load:
    """The last row that the child prints; each is kept as it comes."""
    words = [sys.executable, "-m", "tests.benchmarks.load", "--one", str(count)]
    words += ["--parameters", str(parameters), "--rounds", str(rounds)]
    kept.parent.mkdir(exist_ok=True)
    row: Load | None = None
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if not line.startswith("{"):
                continue  # words of Flower's
            row = Load(**json.loads(line))
            with kept.open("a") as lines:
                lines.write(line)
    if child.returncode != 0 or row is None:
        raise RuntimeError(f"{count} sites were not measured to the end")
    return row


def _kept(kept: Path, sites: int, parameters: int) -> Load | None:
    """The latest row of an earlier run."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    rows = [Load(**json.loads(line)) for line in lines]
    return next((row for row in reversed(rows) if (row.sites, row.parameters) == (sites, parameters)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sites", default=",".join(map(str, SITES)))
    parser.add_argument("--parameters", type=int, default=PARAMETERS)
    parser.add_argument(
        "--rounds", type=int, default=ROUNDS, help="figures are those of all but the first, if there are more"
    )
    parser.add_argument("--anew", action="store_true", help="measure again what is kept")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.one is not None:
        with tempfile.TemporaryDirectory(prefix="lacuna-load-") as folder:
            try:
                for row in measure(chosen.one, chosen.parameters, chosen.rounds, Path(folder)):
                    print(json.dumps(asdict(row)), flush=True)
            except BaseException:
                shutil.copytree(Path(folder) / "logs", KEPT.parent / "load-failed", dirs_exist_ok=True)
                _say(f"what the services said: {KEPT.parent / 'load-failed'}")
                raise
        return
    found = run(
        [int(word) for word in chosen.sites.split(",")],
        chosen.parameters,
        chosen.rounds,
        anew=chosen.anew,
    )
    print(found)
    if chosen.out is not None:
        chosen.out.write_text(found + "\n")


if __name__ == "__main__":
    main()
