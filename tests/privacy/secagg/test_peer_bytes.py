"""Every parser of bytes from somebody else: only the project's errors come out, and memory stays bounded.

Frames and the messages in them, as they travel by gRPC and by Flower; ledgers as key messages show them;
signed documents, whose signer may be the one that lies (statements are broken first and signed then);
weights; plans.
A public, seeded generator chooses what to break.
"""

from __future__ import annotations

import copy
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from small_plan import plan_document, small_plan
from test_message_parsers import PARSERS, STRANGE, all_messages, mutate, places

from privacy.audit.counts import CountsLayout
from privacy.audit.verdict import PlantedLeak
from privacy.audit.verdict_statement import PREDICATE_TYPE as VERDICT
from privacy.audit.verdict_statement import make_verdict_statement, open_verdict, sign_verdict
from privacy.dp.execution_plan import ExecutionPlan
from privacy.ledger import Budget, Charge, Ledger
from privacy.ledger_chain import PREDICATE_TYPE as LEDGER
from privacy.ledger_chain import export_statement, read_export
from privacy.ledger_continuity import LedgerContinuity, ShownLedger
from shared.agent_messages import Hello, HelloReply, VerdictRequest, Work
from shared.attestation import Statement, open_statement, sign_statement
from shared.checkpoint import parse_tensors, save_tensors
from shared.enrolment import REQUEST_PREDICATE, make_request, open_request
from shared.errors import LacunaError
from shared.identity import SigningKey
from shared.study_plan import parse_plan
from shared.wire import Envelope, decode, encode, from_carried, pack, to_carried, unpack

FIXED_BYTES = 4 << 20
FACTOR = 40
"""Memory of one parse: at most FACTOR times the input's size, and FIXED_BYTES."""

KEY = SigningKey.generate()
DIMENSION = 6
Break = Callable[[random.Random], tuple[int, Callable[[], object]]]
"""Makes one broken input: its size, and what reads it."""


def broken_bytes(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut off, put in or doubled."""
    value = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(value) + 1)
        match chance.randrange(5):
            case 0 if place < len(value):
                value[place] = chance.randrange(256)
            case 1:
                del value[place:]
            case 2:
                value[place:place] = chance.randbytes(chance.randrange(1, 9))
            case 3:
                value[place:place] = value[place : place + 16]
            case _:
                value[place : place + 4] = chance.choice(
                    [b"\xff" * 4, b"\x00" * 4, b"9999", b"1e99", b"[[[["]
                )
    return bytes(value)


def broken_json(value: Any, chance: random.Random) -> Any:
    """One to three places of a document changed or taken out."""
    value = copy.deepcopy(value)
    for _ in range(chance.randint(1, 3)):
        paths = [path for path in places(value) if path]
        if not paths:
            break
        *parents, last = chance.choice(paths)
        place = value
        for key in parents:
            place = place[key]
        if chance.random() < 0.7:
            place[last] = copy.deepcopy(chance.choice(STRANGE))
        else:
            del place[last]
    return value


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ledger")
    (folder / "witness").mkdir()
    opened = Ledger.open(
        folder / "ledger.sqlite", key=KEY, counter_path=folder / "witness" / "head.json", create=True
    )
    plan = small_plan()
    event = ExecutionPlan.from_study_plan(plan).training_event()
    for attempt in range(1, 5):
        opened.register_attempt("small", attempt)
        opened.reserve(
            Charge(
                study_id="small",
                plan_sha256=plan.digest().hex(),
                purpose="train",
                round=attempt,
                attempt=attempt,
                event=event,
            ),
            Budget(epsilon=None, delta=1e-5),
            max_attempts=10,
        )
    yield opened
    opened.close()


@pytest.fixture
def breaks(consortium, ledger, tmp_path) -> dict[str, Break]:
    """For each parser, a maker of broken inputs."""
    hello = Hello(nonce="ab" * 32, plan_sha256="cd" * 32, run_id="7")
    work = Work(attempt=1, round=1, purpose="train", weights=np.ones(DIMENSION, dtype=np.float32))
    messages = {
        **{
            kind: (envelope, PARSERS[kind].from_envelope)
            for kind, envelope in all_messages(consortium).items()
        },
        "hello": (hello.to_envelope(), Hello.from_envelope),
        "hello_reply": (
            HelloReply.sign(hello, site_id="site-0", last_attempt=3, version="1.0", key=KEY).to_envelope(),
            HelloReply.from_envelope,
        ),
        "work": (work.to_envelope(), lambda envelope: Work.from_envelope(envelope, dimension=DIMENSION)),
        "verdict_request": (
            VerdictRequest(
                attempt=3,
                run_id="7",
                candidate_sha256="ab" * 32,
                survivors=("a", "b"),
                pooled_counts=(1, -2, 3),
            ).to_envelope(),
            VerdictRequest.from_envelope,
        ),
    }
    exchange = pack(
        "exchange", [messages[kind][0] for kind in ("secagg_upload_reply", "work", "secagg_unmask")]
    )
    shown = LedgerContinuity(
        ledger, site_id="site-0", key=KEY, peers={"site-1": SigningKey.generate().verify_key}
    ).show()
    export = export_statement(ledger.entries(), ledger.head(), KEY)
    path = tmp_path / "w.safetensors"
    save_tensors(path, {"a": np.ones((2, 3), np.float32), "b": np.arange(4, dtype=np.int64)}, {"k": "v"})
    weights = path.read_bytes()

    def read_message(data: bytes, parse: Callable[[Envelope], object]) -> Callable[[], object]:
        return lambda: parse(decode(data))

    def message(chance: random.Random) -> tuple[int, Callable[[], object]]:
        envelope, parse = chance.choice(list(messages.values()))
        if chance.random() < 0.5:
            data = broken_bytes(encode(envelope), chance)
            return len(data), read_message(data, parse)
        changed = mutate(envelope, chance)
        size = len(repr(changed.body)) + sum(map(len, changed.blobs))
        return size, lambda: parse(changed)

    def packed(chance: random.Random) -> tuple[int, Callable[[], object]]:
        changed = mutate(exchange, chance)
        size = len(repr(changed.body)) + sum(map(len, changed.blobs))
        return size, lambda: unpack(changed)

    def carried(chance: random.Random) -> tuple[int, Callable[[], object]]:
        values, blobs = to_carried(exchange)
        header = broken_bytes(values["header"], chance) if chance.random() < 0.7 else values["header"]
        count = chance.choice([values["blobs"], 0, 10**9, -1, True])
        kept = {chance.choice([name, "x", "99999", "-1"]): blob for name, blob in blobs.items()}
        size = len(header) + sum(map(len, kept.values()))
        return size, lambda: from_carried({"header": header, "blobs": count}, chance.choice([kept, blobs]))

    def signed(data: bytes, kind: str, read: Callable[[bytes], object]) -> Break:
        inner = open_statement(data, key=KEY.verify_key, predicate_type=kind, what="sample")

        def make(chance: random.Random) -> tuple[int, Callable[[], object]]:
            if chance.random() < 0.3:
                changed = broken_bytes(data, chance)
            else:
                predicate = broken_json(inner.predicate, chance)
                statement = Statement(predicate_type=kind, subjects=inner.subjects, predicate=predicate)
                try:
                    changed = sign_statement(statement, KEY)
                except LacunaError:  # no canonical form: nobody can sign it
                    changed = broken_bytes(data, chance)
            return len(changed), lambda: read(changed)

        return make

    def shown_ledger(chance: random.Random) -> tuple[int, Callable[[], object]]:
        value = broken_json(shown, chance)
        return len(repr(value)), lambda: ShownLedger.from_dict(value)

    def tensors(chance: random.Random) -> tuple[int, Callable[[], object]]:
        data = broken_bytes(weights, chance)
        return len(data), lambda: parse_tensors(data, what="weights")

    document = plan_document()

    def plan(chance: random.Random) -> tuple[int, Callable[[], object]]:
        value = broken_json(document, chance)
        return len(repr(value)), lambda: parse_plan(value, what="plan")

    subject = small_plan()
    statement = make_verdict_statement(
        subject,
        candidate_sha256="ab" * 32,
        run_id="7",
        attempt=3,
        site_id="site-0",
        survivors=("site-0", "site-1", "site-2"),
        pooled_counts=(800,) * CountsLayout.from_plan(subject).length,
        planted_leak=PlantedLeak(auc=1.0, n_planted=8, n_fresh=8),
        veto=False,
    )
    verdict = sign_verdict(statement, KEY)
    return {
        "messages in frames": message,
        "parts of an exchange": packed,
        "frames in Flower's records": carried,
        "ledgers shown": shown_ledger,
        "ledger export": signed(export, LEDGER, lambda data: read_export(data, KEY.verify_key)),
        "verdict": signed(verdict, VERDICT, lambda data: open_verdict(data, key=KEY.verify_key)),
        "enrolment": signed(make_request(role="site", name="bern", key=KEY), REQUEST_PREDICATE, open_request),
        "weights": tensors,
        "plan": plan,
    }


def fuzz(breaks: dict[str, Break], count: int, seed: int) -> dict[str, int]:
    """Inputs refused by each parser. Any error that is not the project's fails, and so does memory."""
    chance, refused = random.Random(seed), dict.fromkeys(breaks, 0)
    names = [name for name in breaks for _ in range(1 if name == "plan" else 8)]
    for _ in range(count):
        name = chance.choice(names)
        size, read = breaks[name](chance)
        tracemalloc.start(1)
        try:
            read()
        except LacunaError:
            refused[name] += 1
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak <= FIXED_BYTES + FACTOR * size, f"{name}: {peak} bytes for an input of {size}"
    return refused


def test_2000_broken_inputs_of_every_kind(breaks):
    refused = fuzz(breaks, 2000, seed=1)
    assert all(count >= 10 for count in refused.values()), refused


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_200000_broken_inputs_of_every_kind(breaks):
    refused = fuzz(breaks, 200_000, seed=2)
    assert all(count >= 2_000 for count in refused.values()), refused


@pytest.mark.parametrize(
    "data",
    [
        b"LCN1" + b"\xff\xff\xff\xff" + b"{}",
        b"LCN1" + (20).to_bytes(4, "big") + b'{"sizes":[4294967296',
        encode(Envelope("a", {}))[:8].replace(b"LCN1", b"LCN1") + b"[" * 100_000,
    ],
)
def test_announced_sizes_reserve_nothing(data):
    tracemalloc.start()
    try:
        with pytest.raises(LacunaError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < FIXED_BYTES
    finally:
        tracemalloc.stop()


def test_deep_nesting_is_an_error_of_ours():
    for text in (b"[" * 100_000, b'{"a":' * 50_000, b"[" * 100_000 + b"]" * 100_000):
        header = b'{"kind":"a","sizes":[],"body":' + text + b"}"
        with pytest.raises(LacunaError):
            decode(b"LCN1" + len(header).to_bytes(4, "big") + header)
        with pytest.raises(LacunaError):
            open_request(text)
        with pytest.raises(LacunaError):
            parse_tensors(len(text).to_bytes(8, "little") + text, what="weights")


def test_memory_out_of_bounds_and_foreign_errors_fail_the_fuzzer(breaks):
    def greedy(chance):
        return 10, lambda: bytearray(2 * FIXED_BYTES)

    def clumsy(chance):
        return 10, lambda: {}["missing"]

    with pytest.raises(AssertionError, match="greedy: "):
        fuzz({"greedy": greedy}, 1, seed=1)
    with pytest.raises(KeyError):
        fuzz({"clumsy": clumsy}, 1, seed=1)
