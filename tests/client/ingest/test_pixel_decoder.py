"""Broken files never stop an import: whatever their bytes, they are refused by name; decoders may die."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from pydicom.encaps import encapsulate, generate_frames

from client.ingest import pixel_decoder
from client.ingest.dicom_index import index_files
from client.ingest.dicom_volume import DicomSeries
from client.ingest.pixel_decoder import stored_values
from client.ingest.scan import ProblemKind, UnusableScanError

PYDICOM = Path(pydicom.data.__file__).parent / "test_files"


def mangled(data: bytes, seed: int) -> bytes:
    """A few bytes changed; every fourth time also cut short."""
    rng = random.Random(seed)
    broken = bytearray(data)
    start = 132 if seed % 2 else len(data) // 3
    for _ in range(rng.choice([1, 3, 20])):
        broken[rng.randrange(start, len(broken))] = rng.randrange(256)
    return bytes(broken[: rng.randrange(140, len(broken))] if seed % 4 == 3 else broken)


@pytest.mark.parametrize("name", ["MR_small", "MR_small_jp2klossless", "SC_rgb_jpeg_dcmtk", "liver_1frame"])
def test_mangled_files_are_read_or_refused_and_nothing_else(tmp_path: Path, name: str) -> None:
    data = (PYDICOM / f"{name}.dcm").read_bytes()
    refused = 0
    for seed in range(28):
        path = tmp_path / f"{name}.{seed}.dcm"
        path.write_bytes(mangled(data, seed))
        index = index_files([path], root=tmp_path)
        found = (*index.images, *index.segmentations, *index.problems)
        assert len(found) == 1 or index.skipped
        with pytest.raises(UnusableScanError):
            DicomSeries(series_uid="1", paths=(path, path)).read()
        try:
            stored_values(path)
        except UnusableScanError as error:
            assert path.name in error.detail
            refused += 1
    assert refused > 3
    stored_values(PYDICOM / "MR_small_jp2klossless.dcm")


@pytest.mark.parametrize("name", ["JPEG-lossy", "JPGExtended"])
def test_lossy_jpeg_of_12_bits_is_decoded_as_dcmtk_does(name: str, tmp_path: Path) -> None:
    """The hash is of what DCMTK's dcmdjpeg (3.6.7) makes of both files; a cut stream is refused."""
    path = PYDICOM / f"{name}.dcm"
    values = stored_values(path)
    assert values.shape == (1024, 256) and (int(values.min()), int(values.max())) == (0, 264)
    assert hashlib.sha256(values.astype("<u2").tobytes()).hexdigest() == (
        "d30242775a414c01d616447854ebe3f2b20259822894bcd6891f879bcdcbf313"
    )
    dataset = pydicom.dcmread(path)
    [stream] = generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = encapsulate([stream[: len(stream) // 2]])
    dataset.save_as(tmp_path / "cut.dcm")
    with pytest.raises(UnusableScanError, match=r"cut\.dcm.*cut short"):
        stored_values(tmp_path / "cut.dcm")


def test_a_decoder_that_dies_costs_one_file() -> None:
    path = PYDICOM / "MR_small_jpeg_ls_lossless.dcm"
    expected = pydicom.dcmread(PYDICOM / "MR_small.dcm").pixel_array
    np.testing.assert_array_equal(stored_values(path), expected)
    child = pixel_decoder._CHILD
    assert child._process is not None
    child._process.kill()
    child._process.wait()
    with pytest.raises(UnusableScanError, match="broke down") as refusal:
        stored_values(path)
    assert refusal.value.kind is ProblemKind.UNDECODABLE_PIXELS
    np.testing.assert_array_equal(stored_values(path), expected)


def test_a_decoder_that_hangs_costs_one_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child is stopped at its limit (here: at once, while it still starts)."""
    pixel_decoder._CHILD.close()
    monkeypatch.setattr(pixel_decoder, "TIMEOUT_S", 0.01)
    path = PYDICOM / "MR_small_jpeg_ls_lossless.dcm"
    with pytest.raises(UnusableScanError, match="broke down"):
        stored_values(path)
    monkeypatch.undo()
    assert stored_values(path).shape == (64, 64)
