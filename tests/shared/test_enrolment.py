"""Requests prove possession of the key they name; packages name the file that is wrong."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from small_plan import Keys, small_plan

from shared.attestation import Statement, sign_statement
from shared.enrolment import REQUEST_PREDICATE, make_request, open_request
from shared.errors import CoordinatorError, LacunaError, MalformedMessageError, PeerError, UsageError
from shared.identity import BadSignatureError, SigningKey
from shared.plan_package import (
    COPY_EMBEDDING_FILE,
    PACKAGE_FILES,
    PlanPackage,
    open_plan_package,
    sign_plan,
    write_plan_package,
)
from shared.study_plan import InvalidPlanError

KEY = SigningKey.generate()


def request_with(signer: SigningKey = KEY, **predicate: Any) -> bytes:
    value = {"role": "site", "name": "a", "key": KEY.verify_key.hex(), **predicate}
    return sign_statement(Statement(predicate_type=REQUEST_PREDICATE, subjects=(), predicate=value), signer)


def test_a_request_comes_back_and_holds_no_private_key(tmp_path: Path) -> None:
    data = make_request(role="officer", name="dr-x", key=KEY)
    request = open_request(data)
    assert (request.role, request.name, request.key) == ("officer", "dr-x", KEY.verify_key)
    KEY.save(tmp_path / "key")
    assert (tmp_path / "key").read_bytes().splitlines()[1] not in data


def test_a_request_for_a_key_that_the_sender_does_not_have_is_refused() -> None:
    thief = SigningKey.generate()
    with pytest.raises(MalformedMessageError, match="another key than it names"):
        open_request(request_with(thief))
    envelope = json.loads(request_with(thief))
    envelope["signatures"][0]["keyid"] = KEY.verify_key.hex()
    with pytest.raises(BadSignatureError):
        open_request(json.dumps(envelope).encode())


@pytest.mark.parametrize(
    "predicate",
    [{"role": "admin"}, {"role": None}, {"name": 3}, {"name": "../x"}, {"name": ""}, {"key": None}],
)
def test_malformed_requests_are_refused(predicate: dict[str, Any]) -> None:
    with pytest.raises(MalformedMessageError):
        open_request(request_with(**predicate))


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"{}", b'{"signatures":[]}', b'{"signatures":[{"keyid":3}]}', b"\0" * 70_000]
)
def test_what_is_no_request_is_refused(data: bytes) -> None:
    with pytest.raises(PeerError):
        open_request(data)


@pytest.mark.parametrize("name", ["", "Upper", "a b", "-a", "a" * 64, "ü", "a\n"])
def test_a_bad_name_is_the_users_error_not_a_peers(name: str) -> None:
    with pytest.raises(UsageError, match="is not a name"):
        make_request(role="site", name=name, key=KEY)


ALL_FILES = (*PACKAGE_FILES, COPY_EMBEDDING_FILE)


@pytest.fixture
def package(tmp_path: Path) -> PlanPackage:
    keys = Keys.of(3)
    clauses = {"autoencoder": "model", "prior": "model", "copy_embedding": "audit"}
    for name in clauses:
        (tmp_path / name).write_bytes(f"weights of the {name}".encode() * 50)
    hashes = {
        f"{clause}__{name}_sha256": hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name, clause in clauses.items()
    }
    return write_plan_package(
        tmp_path / "package",
        small_plan(keys, **hashes),
        key=keys.coordinator,
        autoencoder=tmp_path / "autoencoder",
        prior=tmp_path / "prior",
        copy_embedding=tmp_path / "copy_embedding",
    )


def test_a_package_comes_back(package: PlanPackage) -> None:
    again = open_plan_package(package.root)
    assert again.plan == package.plan
    assert sorted(path.name for path in package.root.iterdir()) == sorted(ALL_FILES) == sorted(again.files)


@pytest.mark.parametrize(
    ("kind", "file"), [("plausibility", "plausibility.json"), ("segmenter", "segmenter.safetensors")]
)
def test_ranges_and_segmenter_travel_with_the_plan_that_names_them(
    tmp_path: Path, kind: str, file: str
) -> None:
    keys = Keys.of(3)
    for name in ("autoencoder", "prior", "named"):
        (tmp_path / name).write_bytes(name.encode() * 50)
    hashes = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("autoencoder", "prior", "named")
    }
    networks = {
        "model__autoencoder_sha256": hashes["autoencoder"],
        "model__prior_sha256": hashes["prior"],
    }
    plan = small_plan(keys, **networks, **{f"data__{kind}_sha256": hashes["named"]})
    assert kind.encode() not in small_plan(keys, **networks).canonical()
    files = {name: tmp_path / name for name in ("autoencoder", "prior")}
    for wrong in (None, tmp_path / "prior"):
        with pytest.raises(CoordinatorError, match="another SHA-256"):
            write_plan_package(tmp_path / "p", plan, key=keys.coordinator, **files, **{kind: wrong})
    package = write_plan_package(
        tmp_path / "p", plan, key=keys.coordinator, **files, **{kind: tmp_path / "named"}
    )
    again = open_plan_package(package.root)
    assert getattr(again, kind) == package.root / file
    (package.root / file).write_bytes(b"others")
    with pytest.raises(InvalidPlanError, match=file):
        open_plan_package(package.root)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_flipped_byte_is_noticed_and_its_file_named(package: PlanPackage, name: str) -> None:
    """At 24 places of each file, each place's lowest bit: what it changes is refused, naming the file."""
    path = package.root / name
    good = path.read_bytes()
    for place in range(0, len(good), max(1, len(good) // 24)):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bytes(bad))
        with pytest.raises(LacunaError) as caught:
            open_plan_package(package.root)
        # A flip in plan.json that leaves a valid plan is seen by its signature: either name is right.
        assert name in caught.value.message or (
            name == "plan.json" and "plan.dsse.json" in caught.value.message
        )
    path.write_bytes(good)
    open_plan_package(package.root)


@pytest.mark.parametrize("name", ALL_FILES)
def test_a_missing_file_is_named(package: PlanPackage, name: str) -> None:
    (package.root / name).unlink()
    with pytest.raises(CoordinatorError, match=name):
        open_plan_package(package.root)


def test_the_form_for_people_cannot_say_something_else(package: PlanPackage) -> None:
    """A coordinator shows epsilon 1 in plan.toml and signs epsilon 8: refused."""
    other = package.plan.to_toml().replace("epsilon = 8.0", "epsilon = 1.0")
    assert other != package.plan.to_toml()
    (package.root / "plan.toml").write_text(other, encoding="utf-8")
    with pytest.raises(InvalidPlanError, match=r"plan\.toml"):
        open_plan_package(package.root)


def test_a_plan_signed_by_another_key_than_its_own_coordinators_is_refused(package: PlanPackage) -> None:
    (package.root / "plan.dsse.json").write_bytes(sign_plan(package.plan, SigningKey.generate()))
    with pytest.raises(BadSignatureError, match=r"plan\.dsse\.json"):
        open_plan_package(package.root)


def test_a_signed_plan_is_never_overwritten_nor_signed_with_the_wrong_key_or_networks(
    package: PlanPackage, tmp_path: Path
) -> None:
    keys = Keys.of(3)
    networks = {"autoencoder": package.autoencoder, "prior": package.prior}
    plan = small_plan(keys)
    with pytest.raises(CoordinatorError, match="never overwritten"):
        write_plan_package(package.root, plan, key=keys.coordinator, **networks)
    with pytest.raises(CoordinatorError, match="another coordinator key"):
        write_plan_package(tmp_path / "new", plan, key=keys.officer, **networks)
    with pytest.raises(CoordinatorError, match="another SHA-256"):
        write_plan_package(tmp_path / "new", plan, key=keys.coordinator, **networks)
    assert not (tmp_path / "new").exists()


def test_a_plan_with_an_embedding_is_not_signed_without_it(tmp_path: Path) -> None:
    keys = Keys.of(3)
    file = tmp_path / "weights"
    file.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    plan = small_plan(
        keys,
        model__autoencoder_sha256=sha256,
        model__prior_sha256=sha256,
        audit__copy_embedding_sha256=sha256,
    )
    networks = {"autoencoder": file, "prior": file}
    with pytest.raises(CoordinatorError, match=r"copy_embedding\.safetensors has another SHA-256"):
        write_plan_package(tmp_path / "new", plan, key=keys.coordinator, **networks)
    write_plan_package(tmp_path / "new", plan, key=keys.coordinator, copy_embedding=file, **networks)
