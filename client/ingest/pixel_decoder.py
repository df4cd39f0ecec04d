"""Stored values of DICOM files; compressed ones are decoded in a process of their own.

pydicom decodes with GDCM (JPEG), pyjpegls (JPEG-LS), OpenJPEG (JPEG 2000, HTJ2K) and its own RLE decoder.
Lossy JPEG of 12 bits, for which pydicom does not use GDCM, is read by GDCM itself, and like by DCMTK.
Decoders of JPEG, JPEG-LS and JPEG 2000 are native code of many authors, and some abort the process on broken
streams (GDCM does, on a Huffman table that is not one). So they run in a child that gets a path on its
standard input and answers with shape, type and bytes. If it dies or hangs, that one file is refused and the
next file gets a new child. Nothing that it says is unpickled.
"""

from __future__ import annotations

import atexit
import json
import math
import subprocess
import sys
import threading
import warnings
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.encaps import generate_frames
from pydicom.uid import JPEGExtended12Bit, RLELossless

from client.ingest.scan import ProblemKind, UnusableScanError
from shared.volumes.nifti import MAX_VOXELS

TIMEOUT_S = 120
_END_OF_IMAGE = b"\xff\xd9"


def stored_values(path: Path) -> NDArray[Any]:
    """Stored values [row, column] of a file, or [frame, row, column].

    Raises:
        UnusableScanError: the file has no pixels that can be decoded.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(path, force=True)
            syntax = dataset.file_meta.get("TransferSyntaxUID")
            if syntax is None or not syntax.is_compressed or syntax == RLELossless:
                stored: NDArray[Any] = dataset.pixel_array
                return stored
        return _CHILD.decode(path)
    except Exception as error:  # decoders of many authors: whatever they raise, there are no pixels
        reason = f"{path.name}: {type(error).__name__}: {error}".splitlines()[0][:200]
        raise UnusableScanError(ProblemKind.UNDECODABLE_PIXELS, reason) from error


class _Child:
    """The decoding process; started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, path: Path) -> NDArray[Any]:
        """Raises ValueError with what the decoder said, or that it died."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "client.ingest.pixel_decoder"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        limit = threading.Timer(TIMEOUT_S, process.kill)
        limit.start()
        try:
            process.stdin.write(json.dumps(str(path.resolve())).encode() + b"\n")
            process.stdin.flush()
            return _read_answer(process.stdout)
        except (EOFError, OSError) as error:
            self.close()
            raise ValueError("the decoder broke down on it") from error
        finally:
            limit.cancel()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # what could not be sent any more
                        pipe.close()
            self._process = None


def _read_answer(stream: IO[bytes]) -> NDArray[Any]:
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    answer = json.loads(line)
    if "error" in answer:
        raise ValueError(answer["error"])
    shape, dtype = tuple(answer["shape"]), np.dtype(answer["dtype"])
    if math.prod(shape) > MAX_VOXELS or dtype.kind not in "iuf":
        raise ValueError(f"{shape} values of type {dtype}")
    size = math.prod(shape) * dtype.itemsize
    data = stream.read(size)
    if len(data) != size:
        raise EOFError
    return np.frombuffer(data, dtype).reshape(shape)


def _decoded(path: Path) -> NDArray[Any]:
    dataset = pydicom.dcmread(path, force=True)
    if dataset.file_meta.TransferSyntaxUID == JPEGExtended12Bit and dataset.BitsStored != 8:
        return _twelve_bit_jpeg(path, dataset)
    values: NDArray[Any] = dataset.pixel_array
    return values


def _twelve_bit_jpeg(path: Path, dataset: pydicom.Dataset) -> NDArray[Any]:
    """Lossy JPEG of 12 bits by GDCM. Raises ValueError."""
    import gdcm

    frames = int(dataset.get("NumberOfFrames") or 1)
    encoded = generate_frames(dataset.PixelData, number_of_frames=frames)
    if not all(frame.rstrip(b"\0\xff").endswith(_END_OF_IMAGE) for frame in encoded):  # padded to even
        raise ValueError("a JPEG stream is cut short")
    reader = gdcm.ImageReader()
    reader.SetFileName(str(path))
    if dataset.SamplesPerPixel != 1 or not reader.Read():
        raise ValueError("not a 12-bit JPEG of one channel that GDCM can read")
    image = reader.GetImage()
    buffer = image.GetBuffer()  # bytes, as text with surrogates
    data = buffer.encode("utf-8", "surrogateescape") if isinstance(buffer, str) else bytes(buffer)
    shape = (frames, int(dataset.Rows), int(dataset.Columns))
    signed = dataset.PixelRepresentation == 1
    if image.GetPixelFormat().GetBitsAllocated() != 16 or len(data) != 2 * math.prod(shape):
        raise ValueError(f"the pixels are not {shape} values of 16 bits")
    values = np.frombuffer(data, "<i2" if signed else "<u2").reshape(shape)
    return values[0] if frames == 1 else values


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Answer paths with values until the parent goes."""
    for line in requests:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values = np.ascontiguousarray(_decoded(Path(json.loads(line))))
            head = {"shape": values.shape, "dtype": values.dtype.str}
        except Exception as error:  # as in stored_values
            head, values = {"error": f"{type(error).__name__}: {error}"[:500]}, np.empty(0)
        answers.write(json.dumps(head).encode() + b"\n" + values.tobytes())
        answers.flush()


_CHILD = _Child()
atexit.register(_CHILD.close)

if __name__ == "__main__":
    _serve(sys.stdin.buffer, sys.stdout.buffer)
