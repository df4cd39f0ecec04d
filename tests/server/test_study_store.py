"""The coordinator's store: attempt numbers never go back, and what a dead run left is told apart."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from server.study_store import StudyStore
from shared.checkpoint import save_tensors
from shared.errors import CoordinatorError
from shared.home import write_private


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "coordinator" / "study"
    path.mkdir(parents=True, mode=0o700)
    return path


@pytest.fixture
def store(root: Path) -> Iterator[StudyStore]:
    store = StudyStore(root, clock=lambda: 12.5)
    yield store
    store.close()


def prepare(
    store: StudyStore, *, above: int = 0, run: str = "1", purpose: str = "train", number: int = 1
) -> int:
    return store.prepare_attempt(run_id=run, round_number=number, purpose=purpose, above=above)  # type: ignore[arg-type]


def test_half_a_checkpoint_does_not_stay(store: StudyStore, tmp_path: Path) -> None:
    """As a run leaves it that is killed while it writes: a model's size of disk each time."""
    save_tensors(store.checkpoint_path(1), {"weights": np.zeros(4, dtype=np.float32)}, {})
    killed = (
        "import os, sys; from pathlib import Path; import numpy as np\n"
        "from shared.checkpoint import save_tensors\n"
        "Path.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        "save_tensors(Path(sys.argv[1]), {'weights': np.zeros(4, dtype=np.float32)}, {})\n"
    )
    done = subprocess.run([sys.executable, "-c", killed, str(store.checkpoint_path(2))], check=False)
    assert done.returncode == -9
    assert len(list(store.checkpoints.iterdir())) == 2
    store.void_leftovers()
    assert list(store.checkpoints.iterdir()) == [store.checkpoint_path(1)]


def test_attempt_numbers_only_grow_whatever_becomes_of_them(store: StudyStore, root: Path) -> None:
    first, second = prepare(store), prepare(store)
    store.void_attempt(second)
    assert prepare(store) == second + 1 == first + 2
    assert prepare(store, above=40) == 41
    assert prepare(store, above=7) == 42
    store.abort_attempt(42, "x")
    store.close()
    assert prepare(StudyStore(root)) == 43


def test_two_writers_never_get_the_same_number(root: Path) -> None:
    stores = [StudyStore(root) for _ in range(3)]
    numbers: list[int] = []

    def work(store: StudyStore) -> None:
        numbers.extend([prepare(store) for _ in range(5)])

    threads = [threading.Thread(target=work, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 16))


def test_only_opened_attempts_may_have_been_charged(store: StudyStore) -> None:
    for number in range(1, 6):
        prepare(store, number=number)
    store.open_attempt(2, ["a", "b"])
    store.open_attempt(3, ["a"])
    store.complete_attempt(3, ["a"])
    store.open_attempt(4, ["a"])
    store.abort_attempt(4, "too few")
    store.void_attempt(5)
    assert store.charged_attempts("train") == 3
    assert store.charged_attempts("audit") == 0
    assert [record.status for record in store.attempts()] == [
        "prepared",
        "open",
        "completed",
        "aborted",
        "void",
    ]
    assert store.attempts()[2].participants == ("a",)
    assert store.attempts()[2].survivors == ("a",)


def test_leftovers_of_a_dead_run_are_void_or_aborted(store: StudyStore) -> None:
    prepare(store)
    prepare(store)
    store.open_attempt(2, ["a", "b"])
    store.void_leftovers()
    assert [record.status for record in store.attempts()] == ["void", "aborted"]
    assert store.attempts()[1].participants == ("a", "b")
    store.void_leftovers()
    assert [record.status for record in store.attempts()] == ["void", "aborted"]


def checkpoint(store: StudyStore, round_number: int, **metadata: str) -> None:
    save_tensors(store.checkpoint_path(round_number), {"x": np.zeros(1)}, metadata)


def test_a_run_that_died_after_its_checkpoint_completed_the_attempt(store: StudyStore) -> None:
    """The checkpoint is what counts: its survivors' charges are looked for at the gate."""
    prepare(store, number=1)
    store.open_attempt(1, ["a", "b", "c"])
    checkpoint(store, 1, attempt="1", survivors="a,c")
    store.void_leftovers()
    (record,) = store.attempts()
    assert (record.status, record.survivors) == ("completed", ("a", "c"))
    assert store.completed_rounds() == 1


def test_the_checkpoint_of_another_attempt_completes_nothing(store: StudyStore) -> None:
    for number in (1, 1, 2):
        prepare(store, number=number)
        store.open_attempt(store.attempts()[-1].attempt, ["a"])
    checkpoint(store, 1, attempt="1", survivors="a")
    write_private(store.checkpoint_path(2), b"damaged")
    store.void_leftovers()
    assert [record.status for record in store.attempts()] == ["completed", "aborted", "aborted"]


@pytest.mark.parametrize(
    ("run_id", "status"), [("1", "completed"), ("2", "aborted")], ids=["this run's", "another run's"]
)
def test_a_run_that_died_after_its_audit_completed_it(store: StudyStore, run_id: str, status: str) -> None:
    prepare(store, purpose="audit", number=9)
    store.open_attempt(1, ["a", "b"])
    store.evidence.mkdir()
    body = f'{{"attempt": 1, "run_id": "{run_id}", "survivors": ["a", "b"], "pooled_counts": [1]}}'
    write_private(store.evidence / "audit.json", body.encode())
    store.void_leftovers()
    assert store.attempts("audit")[0].status == status


def test_completed_rounds_are_those_with_a_whole_checkpoint(store: StudyStore) -> None:
    assert store.completed_rounds() == 0
    checkpoint(store, 1)
    checkpoint(store, 12)
    (store.checkpoints / ".round-000013.safetensors.99.partial").write_bytes(b"torn")
    assert store.completed_rounds() == 12


def test_events_are_kept_in_order_with_their_time(store: StudyStore) -> None:
    store.record_event("a", n=1)
    store.record_event("b", text="ü")
    assert store.events() == [(1, 12.5, "a", {"n": 1}), (2, 12.5, "b", {"text": "ü"})]
    assert [entry[2] for entry in store.events(after=1)] == ["b"]


def test_a_study_that_is_not_there_or_open_to_others_is_named(tmp_path: Path, root: Path) -> None:
    with pytest.raises(CoordinatorError, match="there is no study"):
        StudyStore(tmp_path / "none").attempts()
    with pytest.raises(CoordinatorError, match="no signed plan"):
        StudyStore(root).package()
    (root / "state.sqlite").write_bytes(b"this is no database, and long enough to be read as one" * 9)
    with pytest.raises(CoordinatorError, match=r"state\.sqlite"):
        StudyStore(root).attempts()
