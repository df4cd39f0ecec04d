"""Weights on disk: the safetensors format, read strictly and never unpickled.

The format (https://github.com/huggingface/safetensors, "Format"): 8 bytes little-endian length N, N bytes of
JSON header ``{name: {dtype, shape, data_offsets}, "__metadata__": {str: str}}``, then the tensors' bytes
without holes. It is simple enough to read here, with bounds and our own errors, and without torch or any
other package that a compliance officer would have to install. Tests hold both directions against the
safetensors library.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shared.canonical import parse_json
from shared.errors import MalformedMessageError, UsageError

MAX_HEADER_BYTES = 8 * 1024 * 1024
"""Upper bound in bytes for a file's JSON header."""

MAX_FILE_BYTES = 8 * 1024**3
"""Upper bound in bytes for a file of weights, unless the caller gives a tighter one."""

_DTYPES: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "U8": "|u1",
}
_NAMES = {np.dtype(code): name for name, code in _DTYPES.items()}

Tensors = dict[str, NDArray[Any]]


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> str:
    """Write tensors in sorted order, atomically and durably; the same input gives the same bytes.

    Returns:
        SHA-256 of the file, hexadecimal.

    Raises:
        UsageError: a dtype that the format (as read here) does not have.
    """
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    arrays: list[NDArray[Any]] = []
    offset = 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        dtype = _NAMES.get(array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype)
        if dtype is None or name == "__metadata__":
            raise UsageError(f"tensor {name!r} of dtype {array.dtype} cannot be saved")
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        arrays.append(array)
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    text += b" " * (-len(text) % 8)
    hashed = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for piece in _file_pieces(text, arrays):
                file.write(piece)
                hashed.update(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return hashed.hexdigest()


def _file_pieces(header: bytes, arrays: list[NDArray[Any]]) -> Iterator[bytes | memoryview]:
    """A file's bytes, without a second copy of an array that lies in memory as it does in the file."""
    yield len(header).to_bytes(8, "little")
    yield header
    for array in arrays:
        little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        yield little_endian.reshape(-1).view(np.uint8).data


def load_tensors(path: Path, *, max_bytes: int = MAX_FILE_BYTES) -> tuple[Tensors, dict[str, str]]:
    """Read a file of weights whole.

    Returns:
        The tensors by name (own memory, writable) and the metadata.

    Raises:
        MalformedMessageError: the file is missing, larger than ``max_bytes``, or not of this format in any
            byte: every tensor's shape, dtype and offsets are checked, and the data have neither holes,
            overlaps nor a tail.
    """
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise MalformedMessageError(f"{path}: {size} bytes exceed the bound of {max_bytes} bytes")
        data = path.read_bytes()
    except OSError as error:
        raise MalformedMessageError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_tensors(data, what=str(path))


def parse_tensors(data: bytes, *, what: str) -> tuple[Tensors, dict[str, str]]:
    """:func:`load_tensors` for bytes that are already in memory; ``what`` names them in errors."""
    if len(data) < 8:
        raise MalformedMessageError(f"{what}: {len(data)} bytes are too short for a weights file")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER_BYTES or 8 + length > len(data):
        raise MalformedMessageError(f"{what}: header of {length} bytes is out of bounds")
    header = parse_json(data[8 : 8 + length], what=f"{what} header", max_bytes=MAX_HEADER_BYTES)
    if not isinstance(header, dict):
        raise MalformedMessageError(f"{what}: the header is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise MalformedMessageError(f"{what}: the metadata is not a map of strings")
    body = memoryview(data)[8 + length :]
    spans = [(_span(entry, name, what), name) for name, entry in header.items()]
    position = 0
    tensors: Tensors = {}
    for (begin, end, dtype, shape), name in sorted(spans, key=lambda span: (span[0][0], span[0][1])):
        if begin != position or end > len(body):
            raise MalformedMessageError(f"{what}: tensor {name!r} leaves a hole, overlaps or passes the end")
        tensors[name] = np.frombuffer(body[begin:end], dtype=dtype).reshape(shape).copy()
        position = end
    if position != len(body):
        raise MalformedMessageError(f"{what}: {len(body) - position} bytes after the last tensor")
    return tensors, metadata


def _span(entry: Any, name: str, what: str) -> tuple[int, int, str, tuple[int, ...]]:
    """Check one header entry; returns (begin, end, numpy dtype, shape)."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise MalformedMessageError(f"{what}: tensor {name!r} has a malformed entry")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise MalformedMessageError(f"{what}: tensor {name!r} has unknown dtype {dtype!r}")
    for value, length in ((shape, None), (offsets, 2)):
        if not isinstance(value, list) or (length is not None and len(value) != length) or len(value) > 16:
            raise MalformedMessageError(f"{what}: tensor {name!r} has a malformed shape or offsets")
        if any(type(n) is not int or n < 0 for n in value):
            raise MalformedMessageError(f"{what}: tensor {name!r} has a malformed shape or offsets")
    begin, end = offsets
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise MalformedMessageError(f"{what}: tensor {name!r} has {end - begin} bytes for shape {shape}")
    return begin, end, _DTYPES[dtype], tuple(shape)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal, read in pieces of 1 MiB.

    Raises:
        MalformedMessageError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise MalformedMessageError(f"{path}: cannot be read ({error.strerror})") from error
    return digest.hexdigest()
