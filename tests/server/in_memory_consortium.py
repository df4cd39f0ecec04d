"""n sites in one process: real agents, ledgers, protocol and store; only the arithmetic is known integers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from known_workbench import KnownWorkbench
from small_plan import changed

from client.serving import open_ledger
from client.site_agent import SiteAgent, Workbench
from client.site_home import SiteHome, init_site
from privacy.dp.calibration import propose_privacy
from privacy.ledger import Ledger
from privacy.ledger_chain import CHARGE
from privacy.secret_random import SecretRandom
from server.exchange import Pace
from server.round_driver import RoundDriver
from server.study_store import StudyStore
from server.transport import Fate, InMemoryTransport
from shared.identity import SigningKey
from shared.model.autoencoder import build_autoencoder
from shared.model.denoiser import build_denoiser, flatten, parameter_subset
from shared.model.presets import preset_named
from shared.model.weights import save_weights
from shared.plan_package import PlanPackage, write_plan_package
from shared.study_plan import StudyPlan, default_threshold, parse_plan
from shared.wire import Envelope

PACE = Pace(exchange_s=30, quorum_s=1.0, hello_s=5, poll_s=0.0, node_check_s=0.0)


class Consortium:
    """n sites in one process, on disk as in real life; any of them can be restarted."""

    SAMPLING_RATE = 1.0
    DIMENSION: int | None = None
    """Of the vectors, where they are not the network's parameters."""
    CLAUSES: ClassVar[dict[str, Any]] = {}
    """Dotted clauses of the plan that a subclass wants otherwise."""

    def __init__(self, root: Path, *, n: int, rounds: int, threshold: int | None = None) -> None:
        self.root = root
        self.homes = [SiteHome(root / f"site-{i}" / "site") for i in range(n)]
        for i, home in enumerate(self.homes):
            init_site(home, name=f"site-{i}")
        self.coordinator, self.officer = SigningKey.generate(), SigningKey.generate()
        self.package = self.sign_plan(rounds, threshold or default_threshold(n, 1))
        self.plan = self.package.plan
        self.store = StudyStore(root / "coordinator" / self.plan.study_id)
        self.benches: dict[int, KnownWorkbench] = {}
        self.ledgers: dict[int, Ledger] = {}
        self.faults: Callable[[int, str, Envelope], Fate] = lambda *_: Fate.DELIVER
        self.transport = InMemoryTransport(
            {i: self.start_agent(i) for i in range(n)},
            fault=lambda *leg: self.faults(*leg),
            lost_at_once=True,
        )

    def start_agent(self, i: int) -> Any:
        if i in self.ledgers:
            self.ledgers[i].close()
        home = self.homes[i]
        directory = home.study(self.plan.study_id)
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ledgers[i] = open_ledger(home)
        return SiteAgent(
            home=home,
            package=self.package,
            key=home.identity(),
            ledger=self.ledgers[i],
            workbench=self.make_workbench(i, directory),
            entropy=SecretRandom(),
        ).handle

    def make_workbench(self, i: int, directory: Path) -> Workbench:
        """What computes at site ``i``: known integers here, patients where a subclass says so."""
        self.benches[i] = KnownWorkbench(self.package, directory, i)
        return self.benches[i]

    def driver(self, run_id: str = "1") -> RoundDriver:
        return RoundDriver(self.transport, self.store, run_id=run_id, pace=PACE)

    def charges(self, i: int, purpose: str = "train") -> int:
        return sum(
            entry.kind == CHARGE and entry.body["purpose"] == purpose for entry in self.ledgers[i].entries()
        )

    def sign_plan(self, rounds: int, threshold: int) -> PlanPackage:
        """The plan package of this consortium, in the coordinator's folder."""
        preset = preset_named("micro")
        folder = self.root / "public"
        denoiser = build_denoiser(preset, n_conditions=2)
        hashes = {
            "autoencoder": save_weights(
                build_autoencoder(preset, n_labels=2), folder / "autoencoder.safetensors", {}
            ),
            "prior": save_weights(denoiser, folder / "prior.safetensors", {}),
        }
        dimension = self.DIMENSION or len(flatten(parameter_subset(denoiser, "conditioning")))
        proposed = propose_privacy(
            mode="distributed",
            epsilon=8.0,
            delta=1e-5,
            clip_norm=1.0,
            rounds=rounds,
            n_sites=len(self.homes),
            threshold=threshold,
            max_colluding=1,
            dimension=dimension,
            declared_patients=100,
            sampling_rate=self.SAMPLING_RATE,
        )
        document: dict[str, Any] = {
            "format": "lacuna/study-plan/v1",
            "study_id": "driver-test",
            "title": "a test",
            "roster": self.roster(),
            "data": {
                "conditions": ["common", "rare"],
                "rare_condition": "rare",
                "labels": ["organ", "lesion"],
                "grid_shape": list(preset.grid_shape),
                "spacing_mm": [4.0, 4.0, 4.0],
                "simulated": True,
            },
            "model": {
                "preset": "micro",
                "autoencoder_sha256": hashes["autoencoder"],
                "prior_sha256": hashes["prior"],
                "trainable": "conditioning",
                "dimension": dimension,
            },
            "privacy": proposed.privacy.model_dump(),
            "secure_aggregation": proposed.secure_aggregation.model_dump(),
            "audit": {"score_edges": [0.0], "control_edges": [0.0], "copy_distance": 1.0},
            "release": {"site_approvals": 2},
        }
        for path, value in self.CLAUSES.items():
            document = changed(document, path, value)
        plan = parse_plan(document, what="test plan")
        return self.write_package(
            plan, autoencoder=folder / "autoencoder.safetensors", prior=folder / "prior.safetensors"
        )

    def roster(self) -> dict[str, Any]:
        """The roster clause of this consortium's plan."""
        return {
            "coordinator_key": self.coordinator.verify_key.hex(),
            "officer_key": self.officer.verify_key.hex(),
            "sites": [
                {"site_id": home.site_id, "identity_key": home.identity().verify_key.hex()}
                for home in self.homes
            ],
        }

    def write_package(self, plan: StudyPlan, *, autoencoder: Path, prior: Path) -> PlanPackage:
        """Sign a plan into the coordinator's folder of its study."""
        root = self.root / "coordinator" / plan.study_id
        root.mkdir(parents=True, mode=0o700)
        root.chmod(0o700)
        return write_plan_package(
            root / "plan", plan, key=self.coordinator, autoencoder=autoencoder, prior=prior
        )
