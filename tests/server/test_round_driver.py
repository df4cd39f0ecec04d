"""The round driver over the in-memory transport: real agents, ledgers, protocol and store.

The sites' arithmetic is replaced by known integer vectors (powers of two a site, so that a site counted
twice or left out shows in every coordinate); everything around it is what a study runs on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from client.serving import open_ledger
from client.site_agent import AuditedCandidate, SiteAgent
from client.site_home import SiteHome, init_site
from privacy.audit.counts import CountsLayout
from privacy.audit.verdict import PlantedLeak
from privacy.audit.verdict_statement import open_verdict
from privacy.dp.calibration import propose_privacy
from privacy.ledger import Ledger
from privacy.ledger_chain import CHARGE
from privacy.secret_random import SecretRandom
from server.exchange import Pace
from server.round_driver import RoundDriver
from server.study_store import StudyStore
from server.transport import Fate, InMemoryTransport
from shared.checkpoint import load_tensors
from shared.errors import CoordinatorError
from shared.identity import SigningKey
from shared.model.autoencoder import build_autoencoder
from shared.model.candidate import write_candidate
from shared.model.denoiser import build_denoiser, flatten, parameter_subset
from shared.model.presets import preset_named
from shared.model.weights import save_weights
from shared.plan_package import PlanPackage, write_plan_package
from shared.study_plan import StudyPlan, default_threshold, parse_plan
from shared.wire import Envelope

PACE = Pace(exchange_s=30, quorum_s=1.0, hello_s=5, poll_s=0.0, node_check_s=0.0)


class KnownWorkbench:
    """Uploads ``1 << position`` in every coordinate, and counts calls."""

    def __init__(self, package: PlanPackage, directory: Path, position: int) -> None:
        self._package = package
        self._directory = directory
        self._value = 1 << position
        self._last: AuditedCandidate | None = None
        self.trained = 0
        self.before_upload: Callable[[], None] = lambda: None

    def training_vector(self, weights: NDArray[np.float32]) -> NDArray[np.int64]:
        self.trained += 1
        self.before_upload()
        return np.full(len(weights), self._value, dtype=np.int64)

    def audit_vector(self, weights: NDArray[np.float32], *, attempt: int) -> NDArray[np.int64]:
        plan = self._package.plan
        sha256 = write_candidate(plan, self._package.prior, weights, self._directory / "c.safetensors")
        leak = PlantedLeak(auc=0.9, n_planted=16, n_fresh=16)
        self._last = AuditedCandidate(attempt=attempt, candidate_sha256=sha256, planted_leak=leak)
        return np.full(CountsLayout.from_plan(plan).length, self._value, dtype=np.int64)

    def last_audit(self) -> AuditedCandidate | None:
        return self._last


class Consortium:
    """n sites in one process, on disk as in real life; any of them can be restarted."""

    def __init__(self, root: Path, *, n: int, rounds: int, threshold: int | None = None) -> None:
        self.root = root
        self.homes = [SiteHome(root / f"site-{i}" / "site") for i in range(n)]
        for i, home in enumerate(self.homes):
            init_site(home, name=f"site-{i}")
        self.coordinator, self.officer = SigningKey.generate(), SigningKey.generate()
        self.package = self._sign_plan(rounds, threshold or default_threshold(n, 1))
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
        self.benches[i] = KnownWorkbench(self.package, directory, i)
        return SiteAgent(
            home=home,
            package=self.package,
            key=home.identity(),
            ledger=self.ledgers[i],
            workbench=self.benches[i],
            entropy=SecretRandom(),
        ).handle

    def driver(self, run_id: str = "1") -> RoundDriver:
        return RoundDriver(self.transport, self.store, run_id=run_id, pace=PACE)

    def charges(self, i: int, purpose: str = "train") -> int:
        return sum(
            entry.kind == CHARGE and entry.body["purpose"] == purpose for entry in self.ledgers[i].entries()
        )

    def _sign_plan(self, rounds: int, threshold: int) -> PlanPackage:
        preset = preset_named("micro")
        folder = self.root / "public"
        denoiser = build_denoiser(preset, n_conditions=2)
        hashes = {
            "autoencoder": save_weights(
                build_autoencoder(preset, n_labels=2), folder / "autoencoder.safetensors", {}
            ),
            "prior": save_weights(denoiser, folder / "prior.safetensors", {}),
        }
        dimension = len(flatten(parameter_subset(denoiser, "conditioning")))
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
        )
        plan = parse_plan(
            {
                "format": "lacuna/study-plan/v1",
                "study_id": "driver-test",
                "title": "a test",
                "roster": {
                    "coordinator_key": self.coordinator.verify_key.hex(),
                    "officer_key": self.officer.verify_key.hex(),
                    "sites": [
                        {"site_id": home.site_id, "identity_key": home.identity().verify_key.hex()}
                        for home in self.homes
                    ],
                },
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
            },
            what="test plan",
        )
        root = self.root / "coordinator" / plan.study_id
        root.mkdir(parents=True, mode=0o700)
        root.chmod(0o700)
        return write_plan_package(
            root / "plan",
            plan,
            key=self.coordinator,
            autoencoder=folder / "autoencoder.safetensors",
            prior=folder / "prior.safetensors",
        )


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Consortium]:
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    return lambda **options: Consortium(tmp_path, **options)


def survivors_of(consortium: Consortium, purpose: str = "train") -> list[tuple[str, ...]]:
    return [r.survivors for r in consortium.store.attempts(purpose) if r.status == "completed"]  # type: ignore[arg-type]


def adam_direction(consortium: Consortium, round_number: int) -> float:
    tensors, _ = load_tensors(consortium.store.checkpoint_path(round_number))
    return float(tensors["adam.exp_avg"][0])


def test_a_whole_study_in_two_exchanges_a_round(make: Callable[..., Consortium]) -> None:
    consortium = make(n=3, rounds=4)
    sent: list[str] = []

    def count(node: int, leg: str, envelope: Envelope) -> Fate:
        if leg == "request" and node == 0:
            sent.append(envelope.kind)
        return Fate.DELIVER

    consortium.faults = count
    outcome = consortium.driver().run()
    assert outcome.rounds == 4
    assert outcome.verdicts == ("site-0", "site-1", "site-2")
    # hello, two set-up exchanges, two for each of 4 rounds and the audit, one for the verdict
    assert sent == ["hello", *["exchange"] * (2 + 2 * 5), "verdict_request"]
    assert survivors_of(consortium) == [("site-0", "site-1", "site-2")] * 4
    # The first moment after round 1 is 0.1 of the average gradient: every site exactly once (1 + 2 + 4).
    gradient = 7 * consortium.plan.secure_aggregation.grid_step / 100
    assert adam_direction(consortium, 1) == pytest.approx(0.1 * gradient, rel=1e-5)
    for i in range(3):
        assert consortium.charges(i) == 4
        assert consortium.charges(i, "audit") == 1
        verdict = (consortium.store.evidence / "verdicts" / f"site-{i}.dsse.json").read_bytes()
        statement = open_verdict(verdict, key=consortium.homes[i].identity().verify_key)
        assert statement.pooled_counts == (7,) * len(statement.pooled_counts)
        statement.check(consortium.plan)


def test_nothing_is_run_again_when_the_study_is_done(make: Callable[..., Consortium]) -> None:
    consortium = make(n=3, rounds=2)
    consortium.driver("1").run()
    consortium.driver("2").run()
    assert [bench.trained for bench in consortium.benches.values()] == [2, 2, 2]
    assert [consortium.charges(i) for i in range(3)] == [2, 2, 2]


def test_a_lost_upload_below_the_threshold_is_charged_and_tried_again(
    make: Callable[..., Consortium],
) -> None:
    """n = 3, t = 3: one lost reply aborts the attempt; nothing is unmasked; the retry is charged."""
    consortium = make(n=3, rounds=2)
    lost = []

    def lose_one_upload(node: int, leg: str, envelope: Envelope) -> Fate:
        if leg == "reply" and node == 1 and consortium.benches[1].trained == 1 and not lost:
            lost.append(node)
            return Fate.DROP
        return Fate.DELIVER

    consortium.faults = lose_one_upload
    outcome = consortium.driver().run()
    assert outcome.rounds == 2
    assert lost
    assert [record.status for record in consortium.store.attempts("train")].count("aborted") == 1
    assert [consortium.charges(i) for i in range(3)] == [3, 3, 3]


@pytest.mark.parametrize("leg", ["request", "reply"])
@pytest.mark.parametrize("exchange", range(3, 9))
def test_a_site_that_drops_anywhere_does_not_stop_five(
    make: Callable[..., Consortium], exchange: int, leg: str
) -> None:
    """n = 5, t = 4: one site dies for good in a given exchange; the others finish, with the right sums."""
    consortium = make(n=5, rounds=3)
    assert consortium.plan.secure_aggregation.threshold == 4
    seen = []

    def die(node: int, at: str, envelope: Envelope) -> Fate:
        if node == 2 and at == leg:
            seen.append(envelope.kind)
            if len(seen) == exchange:
                return Fate.KILL
        return Fate.DELIVER

    consortium.faults = die
    outcome = consortium.driver().run()
    assert outcome.rounds == 3
    everybody, others = tuple(f"site-{i}" for i in range(5)), ("site-0", "site-1", "site-3", "site-4")
    assert set(survivors_of(consortium)) <= {everybody, others}
    assert survivors_of(consortium)[-1] == others
    for record in consortium.store.attempts("train"):
        if record.status == "completed" and record.round == 1:
            total = sum(1 << int(site[-1]) for site in record.survivors)
            gradient = total * consortium.plan.secure_aggregation.grid_step / 100
            assert adam_direction(consortium, 1) == pytest.approx(0.1 * gradient, rel=1e-5)
    # Whoever is in a sum was charged for it: never undercounted.
    for i in range(5):
        in_sums = sum(f"site-{i}" in survivors for survivors in survivors_of(consortium))
        assert consortium.charges(i) >= in_sums


def test_a_restarted_agent_rejoins(make: Callable[..., Consortium]) -> None:
    """An agent that lost its memory refuses its old attempts and takes part in the next."""
    consortium = make(n=5, rounds=5)

    def restart() -> None:
        consortium.benches[3].before_upload = lambda: None
        consortium.transport.revive(3, consortium.start_agent(3))

    def restart_once(node: int, leg: str, envelope: Envelope) -> Fate:
        if node == 3 and leg == "reply" and consortium.benches[3].trained == 2:
            restart()
            return Fate.DROP
        return Fate.DELIVER

    consortium.faults = restart_once
    outcome = consortium.driver().run()
    assert outcome.rounds == 5
    rounds = survivors_of(consortium)
    assert any("site-3" not in survivors for survivors in rounds)
    assert "site-3" in rounds[-1]


@pytest.mark.parametrize("first", range(4, 22, 3))
def test_the_run_can_die_anywhere_and_a_new_one_continues(
    make: Callable[..., Consortium], first: int
) -> None:
    """The driver dies at three messages; each time a new run goes on from the store."""
    consortium = make(n=3, rounds=3)
    for run, message in enumerate((first, first + 1, first + 2), start=1):
        left = message

        def stop(node: int, leg: str, envelope: Envelope) -> Fate:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt
            return Fate.DELIVER

        consortium.faults = stop
        before = consortium.store.completed_rounds()
        with pytest.raises(KeyboardInterrupt):
            consortium.driver(str(run)).run()
        assert consortium.store.completed_rounds() >= before
    consortium.faults = lambda *_: Fate.DELIVER
    assert consortium.driver("last").run().rounds == 3
    rounds = [r.round for r in consortium.store.attempts("train") if r.status == "completed"]
    assert rounds == sorted(set(rounds)), "no completed round is run again"
    for i in range(3):
        assert len(rounds) <= consortium.charges(i) <= consortium.plan.privacy.max_attempts


def test_attempts_used_up_end_training_with_the_last_good_model(make: Callable[..., Consortium]) -> None:
    consortium = make(n=3, rounds=2)

    def never_upload(node: int, leg: str, envelope: Envelope) -> Fate:
        uploads = any(len(blob) >= 4 * consortium.plan.model.dimension for blob in envelope.blobs)
        lost = leg == "reply" and node == 0 and consortium.benches[0].trained > 1 and uploads
        return Fate.DROP if lost else Fate.DELIVER

    consortium.faults = never_upload
    outcome = consortium.driver().run()
    assert outcome.rounds == 1
    assert consortium.charges(0) == consortium.plan.privacy.max_attempts
    assert outcome.verdicts


def test_too_few_sites_end_the_run_with_a_clear_error(make: Callable[..., Consortium]) -> None:
    consortium = make(n=3, rounds=1)
    consortium.transport.kill(2)
    with pytest.raises(CoordinatorError, match="site-2"):
        consortium.driver().run()
    assert [consortium.charges(i) for i in range(3)] == [0, 0, 0]


def test_plan_of_the_test_is_a_whole_plan(make: Callable[..., Consortium]) -> None:
    assert isinstance(make(n=3, rounds=1).plan, StudyPlan)
