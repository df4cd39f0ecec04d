"""Weights files: the same format as the safetensors library, and nothing malformed gets through."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import numpy as reference
from safetensors import safe_open

from shared.checkpoint import file_sha256, load_tensors, parse_tensors, save_tensors
from shared.errors import MalformedMessageError, UsageError

TENSORS = {
    "b.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "a.half": np.linspace(-1, 1, 5).astype(np.float16),
    "count": np.array(7, dtype=np.int64),
    "empty": np.zeros((0, 3), dtype=np.float32),
    "bytes": np.arange(7, dtype=np.uint8),
}


def _file(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_round_trip_keeps_names_dtypes_shapes_values_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "w.safetensors"
    digest = save_tensors(path, TENSORS, {"preset": "micro"})
    tensors, metadata = load_tensors(path)
    assert metadata == {"preset": "micro"} and digest == file_sha256(path)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(tensors) == set(TENSORS)
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
        assert (tensors[name] == array).all() and tensors[name].flags.writeable
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"]


def test_the_safetensors_library_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_tensors(path, TENSORS, {"preset": "micro"})
    theirs = reference.load_file(path)
    assert all((theirs[name] == array).all() for name, array in TENSORS.items())
    with safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"preset": "micro"}


def test_we_read_what_the_safetensors_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    reference.save_file(TENSORS, path, metadata={"k": "v"})
    tensors, metadata = load_tensors(path)
    assert metadata == {"k": "v"}
    assert all((tensors[name] == array).all() for name, array in TENSORS.items())


def test_bytes_do_not_depend_on_the_order_of_insertion(tmp_path: Path) -> None:
    a = save_tensors(tmp_path / "a", TENSORS, {"x": "1", "y": "2"})
    b = save_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), {"y": "2", "x": "1"})
    assert a == b


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_tensors(path, {"w": np.ones(3, dtype=np.float32)}, {})
    data = path.read_bytes()
    for length in range(len(data)):
        with pytest.raises(MalformedMessageError):
            parse_tensors(data[:length], what="truncated")
    with pytest.raises(MalformedMessageError, match="after the last tensor"):
        parse_tensors(data + b"\0", what="longer")


@pytest.mark.parametrize(
    ("header", "body"),
    [
        ([], b""),
        ({"w": 3}, b""),
        ({"w": {"dtype": "F32", "shape": [1]}}, b""),
        ({"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
        ({"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, b"0000"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"0000"),
        ({"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"0000"),
        ({"w": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, b"0000"),
        ({"w": {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]}}, b"0000"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"00000000"),
        ({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"000"),
        (
            {
                "v": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            },
            b"0000",
        ),
        ({"__metadata__": {"k": 1}}, b""),
        ({"__metadata__": []}, b""),
    ],
)
def test_malformed_headers_are_refused(header: object, body: bytes) -> None:
    with pytest.raises(MalformedMessageError, match="evil"):
        parse_tensors(_file(header, body), what="evil")


def test_duplicate_names_and_absurd_lengths_are_refused() -> None:
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    text = f'{{"w":{entry},"w":{entry}}}'.encode()
    with pytest.raises(MalformedMessageError):
        parse_tensors(len(text).to_bytes(8, "little") + text + b"0", what="twice")
    with pytest.raises(MalformedMessageError, match="out of bounds"):
        parse_tensors((2**63).to_bytes(8, "little") + b"{}", what="huge")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_give_our_error_or_nothing_else(data: bytes) -> None:
    with contextlib.suppress(MalformedMessageError):
        parse_tensors(len(data).to_bytes(8, "little") + data, what="random")


def test_a_pickle_is_not_weights(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(b"\x80\x04\x95" + bytes(64))
    with pytest.raises(MalformedMessageError):
        load_tensors(path)


def test_size_bound_missing_file_and_unknown_dtype(tmp_path: Path) -> None:
    path = tmp_path / "w"
    save_tensors(path, TENSORS, {})
    with pytest.raises(MalformedMessageError, match="exceed"):
        load_tensors(path, max_bytes=10)
    with pytest.raises(MalformedMessageError, match="cannot be read"):
        load_tensors(tmp_path / "none")
    with pytest.raises(MalformedMessageError, match="cannot be read"):
        file_sha256(tmp_path / "none")
    with pytest.raises(UsageError, match="complex"):
        save_tensors(path, {"w": np.zeros(1, dtype=np.complex64)}, {})
