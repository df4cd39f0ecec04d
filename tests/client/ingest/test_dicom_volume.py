"""A DICOM series becomes the volume that SimpleITK makes of it; what is broken is refused by name."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from dicom_series import Series, blob, write_multiframe
from itk_volume import assert_same_scan, itk_volume
from pydicom import Dataset
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from client.ingest.dicom_index import SeriesSelection, index_folder
from client.ingest.dicom_volume import DicomSeries
from client.ingest.scan import LoadedVolume, ProblemKind, UnusableScanError

ROOT = Path(os.environ.get("LACUNA_DATA", Path(__file__).parents[4] / "shared" / "data"))
T1 = ROOT / "t1_dicom_series"
PYDICOM = Path(pydicom.data.__file__).parent / "test_files"
SHAPE = (10, 24, 20)
OBLIQUE_ROW = (0.96, 0.28, 0.0)
OBLIQUE_COLUMN = (0.0, 0.0, -1.0)
OBLIQUE_STEP = (-0.56, 1.92, 0.0)  # 2 mm along the normal


def read(paths: list[Path]) -> LoadedVolume:
    random.Random(1).shuffle(paths)  # the order of files means nothing
    return DicomSeries(series_uid="1.2.3", paths=tuple(paths)).read()


@pytest.fixture
def series() -> Series:
    return Series(voxels=blob(SHAPE)[0])


@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"step": (0.0, 0.0, -3.5)},
        {"row": OBLIQUE_ROW, "column": OBLIQUE_COLUMN, "step": OBLIQUE_STEP},
        {"row": (0.0, 1.0, 0.0), "column": (0.0, 0.0, -1.0), "step": (0.9, 0.0, 0.0)},
    ],
    ids=["axial", "downwards", "oblique", "sagittal"],
)
def test_a_series_is_what_simpleitk_reads(tmp_path: Path, geometry: dict[str, object]) -> None:
    series = Series(voxels=blob(SHAPE)[0], **geometry)  # type: ignore[arg-type]
    paths = series.write(tmp_path)
    loaded = read(list(paths))
    assert loaded.repairs == ()
    assert_same_scan(loaded.volume, itk_volume(paths))


def test_values_are_rescaled_slice_by_slice(series: Series, tmp_path: Path) -> None:
    def rescale(dataset: Dataset, index: int) -> None:
        dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", str(-1024 + index)

    loaded = read(series.write(tmp_path, rescale))
    expected = series.voxels * 0.5 - 1024 + np.arange(SHAPE[0])[:, None, None]
    np.testing.assert_array_equal(loaded.volume.voxels_DHW, expected.astype(np.float32))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless], ids=lambda uid: uid.name)
def test_compressed_slices_have_the_same_voxels(series: Series, tmp_path: Path, syntax: str) -> None:
    series.voxels = np.abs(series.voxels).repeat(4, axis=1).repeat(4, axis=2)

    def compress(dataset: Dataset, index: int) -> None:
        dataset.PixelRepresentation = 0
        dataset.compress(syntax, generate_instance_uid=False)

    paths = series.write(tmp_path, compress)
    assert pydicom.dcmread(paths[0]).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(read(list(paths)).volume.voxels_DHW, series.voxels)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("MR_small_RLE", (64, 64)),
        ("MR_small_jp2klossless", (64, 64)),
        ("MR_small_jpeg_ls_lossless", (64, 64)),
        ("MR_small_bigendian", (64, 64)),
        ("MR_small_implicit", (64, 64)),
        ("JPEG2000", (1024, 256)),
        ("SC_rgb_jpeg_gdcm", (100, 100, 3)),
    ],
)
def test_decoders_are_installed_for_every_transfer_syntax(name: str, shape: tuple[int, ...]) -> None:
    """A fresh installation of the site extra decodes what pydicom ships, JPEG lossless through GDCM too."""
    pixels = pydicom.dcmread(PYDICOM / f"{name}.dcm").pixel_array
    assert pixels.shape == shape
    if name.startswith("MR_small"):
        reference = pydicom.dcmread(PYDICOM / "MR_small.dcm").pixel_array
        np.testing.assert_array_equal(pixels, reference)


def test_inverted_grey_values_are_turned_back(series: Series, tmp_path: Path) -> None:
    plain = read(series.write(tmp_path / "plain")).volume.voxels_DHW

    def invert(dataset: Dataset, index: int) -> None:
        dataset.PhotometricInterpretation = "MONOCHROME1"
        pixels = -1 - np.frombuffer(dataset.PixelData, "<i2").astype(np.int32)
        dataset.PixelData = pixels.astype("<i2").tobytes()

    loaded = read(series.write(tmp_path / "inverted", invert))
    np.testing.assert_array_equal(loaded.volume.voxels_DHW, plain)
    assert "MONOCHROME1" in loaded.repairs[0]


def test_hounsfield_units_stay_whatever_a_screen_would_show(series: Series, tmp_path: Path) -> None:
    def display_inverted(dataset: Dataset, index: int) -> None:
        dataset.Modality, dataset.PhotometricInterpretation = "CT", "MONOCHROME1"
        dataset.RescaleSlope, dataset.RescaleIntercept = "1", "-1024"

    loaded = read(series.write(tmp_path, display_inverted))
    np.testing.assert_array_equal(loaded.volume.voxels_DHW, series.voxels.astype(np.float32) - 1024)
    assert loaded.repairs == ()


def test_slices_out_of_order_are_sorted_by_position(series: Series, tmp_path: Path) -> None:
    order = [3, 0, 7, 1, 9, 2, 8, 4, 6, 5]

    def renumber(dataset: Dataset, index: int) -> None:
        dataset.InstanceNumber = order[index] + 1

    loaded = read(series.write(tmp_path, renumber))
    np.testing.assert_array_equal(loaded.volume.voxels_DHW, series.voxels)
    assert "out of order" in loaded.repairs[0]


def test_a_slice_that_stands_twice_counts_once(series: Series, tmp_path: Path) -> None:
    paths = series.write(tmp_path)
    copy = tmp_path / "again.dcm"
    copy.write_bytes(paths[4].read_bytes())
    loaded = read([*paths, copy])
    np.testing.assert_array_equal(loaded.volume.voxels_DHW, series.voxels)
    assert loaded.repairs == ("1 of 11 slices stood twice; each was taken once",)


def test_slices_of_several_frames_of_reference_are_told(series: Series, tmp_path: Path) -> None:
    def other_frame(dataset: Dataset, index: int) -> None:
        dataset.FrameOfReferenceUID = f"1.2.{index}"

    assert "frames of reference" in read(series.write(tmp_path, other_frame)).repairs[0]


def test_a_tilted_gantry_stays_in_the_geometry(series: Series, tmp_path: Path) -> None:
    """Every voxel lies where its own slice's header puts it; nothing is interpolated."""
    series.step = (0.0, 0.5, 2.0)
    paths = series.write(tmp_path)
    loaded = read(list(paths))
    assert "tilted by 14.0 degrees" in loaded.repairs[0]
    for index in (0, 4, 9):
        header = pydicom.dcmread(paths[index])
        x, y, z = header.ImagePositionPatient
        corner = loaded.volume.affine @ [index, 0, 0, 1]
        np.testing.assert_allclose(corner[:3], [-x, -y, z], atol=1e-6)
    np.testing.assert_array_equal(loaded.volume.voxels_DHW, series.voxels)


def test_a_multiframe_object_is_the_series_that_it_was_made_of(series: Series, tmp_path: Path) -> None:
    series.row, series.column, series.step = OBLIQUE_ROW, OBLIQUE_COLUMN, OBLIQUE_STEP
    paths = series.write(tmp_path / "series")
    single = read(list(paths))
    multi = read([write_multiframe(tmp_path / "multi.dcm", paths[::-1])])
    np.testing.assert_array_equal(multi.volume.voxels_DHW, single.volume.voxels_DHW)
    np.testing.assert_allclose(multi.volume.affine, single.volume.affine, atol=1e-9)
    assert_same_scan(multi.volume, itk_volume([tmp_path / "multi.dcm"]))


def test_frames_of_a_multiframe_object_are_rescaled_each_by_its_own(series: Series, tmp_path: Path) -> None:
    path = write_multiframe(tmp_path / "multi.dcm", series.write(tmp_path / "series"))
    dataset = pydicom.dcmread(path)
    for frame in dataset.PerFrameFunctionalGroupsSequence:  # in an order of its own
        height = float(frame.PlanePositionSequence[0].ImagePositionPatient[2])
        number = round((height - series.origin[2]) / series.step[2])
        item = Dataset()
        item.RescaleSlope, item.RescaleIntercept, item.RescaleType = "0.5", str(number), "US"
        frame.PixelValueTransformationSequence = [item]
    if "PixelValueTransformationSequence" in dataset.SharedFunctionalGroupsSequence[0]:
        del dataset.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    dataset.save_as(path)
    expected = series.voxels * 0.5 + np.arange(SHAPE[0])[:, None, None]
    np.testing.assert_array_equal(read([path]).volume.voxels_DHW, expected.astype(np.float32))


@pytest.mark.skipif(not T1.is_dir(), reason="no T1 series (set LACUNA_DATA)")
def test_the_real_head_is_what_simpleitk_reads() -> None:
    (found,) = index_folder(T1).images
    loaded = DicomSeries(series_uid=found.series_uid, paths=found.paths).read()
    assert loaded.volume.shape == (64, 384, 274) and loaded.repairs == ()
    assert_same_scan(loaded.volume, itk_volume(list(found.paths)))


def test_a_real_ct_that_pydicom_ships_is_what_simpleitk_reads() -> None:
    folder = PYDICOM / "dicomdirtests" / "98892001" / "CT5N"
    (found,) = index_folder(folder).images
    loaded = DicomSeries(series_uid=found.series_uid, paths=found.paths).read()
    assert loaded.volume.spacing_mm[0] == pytest.approx(2.5)
    assert_same_scan(loaded.volume, itk_volume(list(found.paths)))


def _gap(paths: list[Path]) -> None:
    paths.pop(4).unlink()


def _uneven(paths: list[Path]) -> None:
    _change(paths[9], lambda dataset: setattr(dataset, "ImagePositionPatient", [-31.5, 20.25, 1.7]))


def _other_orientation(paths: list[Path]) -> None:
    _change(paths[9], lambda dataset: setattr(dataset, "ImageOrientationPatient", [0, 1, 0, 0, 0, -1]))


def _conflict(paths: list[Path]) -> None:
    _change(paths[5], lambda dataset: setattr(dataset, "ImagePositionPatient", [-31.5, 20.25, -9.0]))


def _two_echoes(paths: list[Path]) -> None:
    for number, path in enumerate(list(paths)):
        other = path.with_name(f"echo{number}.dcm")
        other.write_bytes(path.read_bytes())
        _change(other, lambda dataset: _second_echo(dataset))
        paths.append(other)


def _second_echo(dataset: Dataset) -> None:
    dataset.EchoTime = 80.0
    dataset.PixelData = (np.frombuffer(dataset.PixelData, "<i2") // 2).astype("<i2").tobytes()


def _no_position(paths: list[Path]) -> None:
    _change(paths[2], lambda dataset: delattr(dataset, "ImagePositionPatient"))


def _no_spacing(paths: list[Path]) -> None:
    for path in paths:
        _change(path, lambda dataset: delattr(dataset, "PixelSpacing"))


def _skewed_cosines(paths: list[Path]) -> None:
    for path in paths:
        _change(path, lambda dataset: setattr(dataset, "ImageOrientationPatient", [1, 0, 0, 0.7, 0.7, 0]))


def _colour(paths: list[Path]) -> None:
    _change(paths[0], _make_colour)


def _make_colour(dataset: Dataset) -> None:
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0


def _burned_in_name(paths: list[Path]) -> None:
    _change(paths[6], lambda dataset: setattr(dataset, "BurnedInAnnotation", "YES"))


def _truncated_pixels(paths: list[Path]) -> None:
    paths[3].write_bytes(paths[3].read_bytes()[:-400])


def _garbage(paths: list[Path]) -> None:
    paths[3].write_bytes(paths[3].read_bytes()[:300] + b"\xff" * 400)


def _one_slice(paths: list[Path]) -> None:
    while len(paths) > 1:
        paths.pop().unlink()


def _other_size(paths: list[Path]) -> None:
    def halve(dataset: Dataset) -> None:
        dataset.PixelData = dataset.PixelData[: len(dataset.PixelData) // 2]
        dataset.Rows = dataset.Rows // 2

    _change(paths[7], halve)


def _mosaic(paths: list[Path]) -> None:
    for path in paths:
        _change(path, lambda dataset: setattr(dataset, "ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]))


def _change(path: Path, edit: Callable[[Dataset], object]) -> None:
    dataset = pydicom.dcmread(path)
    edit(dataset)
    dataset.save_as(path)


@pytest.mark.parametrize(
    ("plant", "kind", "names"),
    [
        (_gap, ProblemKind.MISSING_SLICES, "1 between slice003.dcm and slice005.dcm"),
        (_uneven, ProblemKind.UNEVEN_SPACING, "mm from slice to slice"),
        (_other_orientation, ProblemKind.MIXED_SERIES, "slice009.dcm"),
        (_conflict, ProblemKind.CONFLICTING_SLICES, "slice005.dcm"),
        (_two_echoes, ProblemKind.MIXED_SERIES, "2 volumes by EchoTime"),
        (_no_position, ProblemKind.NO_GEOMETRY, "slice002.dcm has no Image Position"),
        (_no_spacing, ProblemKind.NO_GEOMETRY, "no Pixel Spacing"),
        (_skewed_cosines, ProblemKind.NO_GEOMETRY, "right angles"),
        (_colour, ProblemKind.COLOUR_IMAGE, "slice000.dcm: RGB"),
        (_burned_in_name, ProblemKind.BURNED_IN_TEXT, "slice006.dcm"),
        (_truncated_pixels, ProblemKind.UNDECODABLE_PIXELS, "slice003.dcm"),
        (_garbage, ProblemKind.UNDECODABLE_PIXELS, "slice003.dcm has no Rows"),
        (_one_slice, ProblemKind.SINGLE_SLICE, "slice000.dcm"),
        (_other_size, ProblemKind.MIXED_SERIES, "several sizes"),
        (_mosaic, ProblemKind.MIXED_SERIES, "mosaic"),
    ],
    ids=lambda value: value.__name__[1:] if callable(value) else None,
)
def test_what_would_have_to_be_invented_is_refused(
    series: Series, tmp_path: Path, plant: Callable[[list[Path]], None], kind: ProblemKind, names: str
) -> None:
    paths = series.write(tmp_path)
    plant(paths)
    with pytest.raises(UnusableScanError) as refusal:
        DicomSeries(series_uid=series.uid, paths=tuple(sorted(paths))).read()
    assert refusal.value.kind is kind, refusal.value
    assert names in refusal.value.detail


def test_pydicoms_odd_files_are_sorted_and_none_is_a_surprise() -> None:
    """Each is a series, or named as broken, or counted as no image; one of the series is a volume."""
    index = index_folder(PYDICOM)
    broken = {problem.file for problem in index.problems}
    assert {"UN_sequence.dcm", "no_meta.dcm", "meta_missing_tsyntax.dcm", "priv_SQ.dcm"} <= broken
    assert all(problem.kind is ProblemKind.UNREADABLE_FILE for problem in index.problems)
    assert any("not images" in note for note in index.skipped)
    read_well = []
    for series in index.images:
        try:
            DicomSeries(series_uid=series.series_uid, paths=series.paths).read()
            read_well.append(series)
        except UnusableScanError as error:
            assert error.detail
    assert [series.paths[0].parent.name for series in read_well] == ["CT5N"]


def test_a_selection_is_by_modality_body_part_and_description() -> None:
    selection = SeriesSelection(
        modalities=frozenset({"mr"}), body_parts=frozenset({"Brain"}), description="t1*"
    )
    facts = {"modality": "MR", "body_part": "BRAIN", "description": "T1 MPRAGE sag"}
    assert selection.rejects(**facts) is None
    assert selection.rejects(**{**facts, "modality": "CT"}) == "modality"
    assert selection.rejects(**{**facts, "body_part": "KNEE"}) == "body part"
    assert selection.rejects(**{**facts, "description": "T2 tse"}) == "description"
    assert selection.rejects(modality="MR", body_part=None, description=None) is None
    assert SeriesSelection().rejects(modality="", body_part="", description="") is None
