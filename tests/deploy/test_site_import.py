"""``lacuna site import`` as a person uses it: a folder of DICOM files, JSON, and the page in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from dicom_series import Series, write_segmentation
from headless_chromium import find_chromium
from orthanc_server import running_orthanc
from PIL import Image
from small_package import write_small_package

from client.ingest.thumbnails import PANEL_PX, three_planes
from client.site_home import SiteHome, init_site
from deploy.cli.main import cli
from shared.volumes.contact_sheet import LABEL_COLOURS
from shared.volumes.nifti import Volume

SHAPE = (20, 24, 28)
ORANGE = tuple(int(LABEL_COLOURS[0][start : start + 2], 16) for start in (1, 3, 5))


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three patients: a sound series, one with a slice twice, one with a slice missing."""
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    init_site(SiteHome.default(), name="site-0")
    write_small_package(tmp_path / "plan")
    folder = tmp_path / "dicom"
    rows = ["patient,scan,condition,mask"]
    mask = np.zeros(SHAPE, np.uint8)
    mask[5:15, 6:18, 8:20] = 1
    mask[8:12, 9:14, 11:16] = 2
    for seed, patient in enumerate(("P-SOUND", "P-TWICE", "P-GAP")):
        rng = np.random.default_rng(seed)
        voxels = (mask * 300.0 + rng.integers(0, 80, SHAPE)).astype(np.int16)
        series = Series(voxels=voxels, patient_id=patient, description="<b>T1</b>", spacing=(2.0, 2.0))
        paths = series.write(folder / patient)
        write_segmentation(folder / f"{patient}.dcm", paths, mask)
        rows.append(f"{patient},,{'rare' if seed else 'common'},")
    (folder / "P-TWICE" / "copy.dcm").write_bytes((folder / "P-TWICE" / "slice004.dcm").read_bytes())
    (folder / "P-GAP" / "slice009.dcm").unlink()
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return folder


def run(hospital: Path, *words: str) -> Result:
    arguments = ["--dicom", str(hospital), "--manifest", str(hospital / "manifest.csv"), *words]
    return CliRunner().invoke(cli, ["site", "import", "--plan", str(hospital.parent / "plan"), *arguments])


def test_a_folder_is_imported_and_every_scan_accounted_for(hospital: Path) -> None:
    told = run(hospital)
    assert told.exit_code == 0, told.output
    assert "imported 2, already here 0, refused 1; 1 of the accepted were repaired" in told.output
    assert "missing slices" in told.output and "stood twice" in told.output
    told = run(hospital, "--json")
    report: dict[str, Any] = json.loads(told.output[told.output.index("{") :])
    assert report["imported"] == [] and len(report["present"]) == 2
    assert [entry["kind"] for entry in report["refused"]] == ["missing_slices"]
    assert report["refused"][0]["detail"] == "1 between slice008.dcm and slice010.dcm"
    assert [entry["scan"][:7] for entry in report["repaired"]] == ["P-TWICE"]
    page = Path(report["page"])
    assert stat.S_IMODE(page.stat().st_mode) == 0o600 and page.parent == SiteHome.default().study("small")


def test_the_page_shows_every_scan_and_nothing_from_outside(hospital: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    assert run(hospital, "--report", str(page)).exit_code == 0
    text = page.read_text()
    assert "http:" not in text and "https:" not in text and "<script" not in text and "<b>T1</b>" not in text
    assert "Stays in the hospital" in text and "STAYS IN THE HOSPITAL" in text
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(pictures) == 2 and text.count('class="none"') == 1
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
        assert PANEL_PX in (pixels.shape[0], pixels.shape[1] // 3 - 2)
        assert (pixels == ORANGE).all(axis=2).sum() > 300  # the outline of label 1 in three planes
    dom = find_chromium(tmp_path / "profile").dom(page)
    assert dom.count("<img") == 2 and "missing slices (1 between" in dom


def test_both_routes_from_an_archive_end_in_the_same_report_and_an_empty_inbox(
    hospital: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    (tmp_path / "orthanc").mkdir()
    reports = []
    with running_orthanc(tmp_path / "orthanc") as server:
        assert server.store(sorted(hospital.rglob("*.dcm"))) == []
        for source in (("--dicomweb", server.dicomweb), ("--pacs", server.dimse)):
            told = CliRunner().invoke(
                cli,
                ["site", "import", "--plan", str(tmp_path / "plan"), *source, "--json",
                 "--manifest", str(hospital / "manifest.csv"), "--modality", "MR", "--body-part", "brain"],
            )  # fmt: skip
            assert told.exit_code == 0, told.output
            reports.append(json.loads(told.output[told.output.index("{") :]))
            assert not (SiteHome.default().study("small") / "inbox").exists()
    first, second = reports
    assert len(first["imported"]) == 2 and second["present"] == first["imported"]
    assert [entry["kind"] for entry in first["refused"]] == ["missing_slices"]
    assert second["refused"] == first["refused"] and second["imported"] == []


def test_nothing_usable_is_the_sites_to_mend(hospital: Path, tmp_path: Path) -> None:
    told = run(hospital, "--modality", "CT", "--json")
    assert told.exit_code != 0 and json.loads(
        told.output[told.output.index("{") : told.output.rindex("}") + 1]
    )["skipped"][0].startswith("3 series not selected (modality)")
    for words, said in (
        (("--nifti", str(tmp_path)), "give one source"),
        (("--condition", "rare"), "give a manifest or a condition"),
        (("--segment", "organ"), "is not NAME=LABEL"),
    ):
        told = run(hospital, *words)
        assert said in str(told.exception), words


def test_a_picture_is_upright_in_every_plane() -> None:
    """A bright corner to the right, front and top is there in all planes, however the file's axes run."""
    voxels = np.zeros((12, 16, 20), np.float32)
    voxels[8:, 11:, 14:] = 1.0
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    flipped = Volume(voxels_DHW=voxels[::-1, :, ::-1].transpose(2, 0, 1).copy(), affine=_axes_of_flip())
    upright = three_planes(
        Volume(voxels_DHW=voxels, affine=affine), Volume(voxels_DHW=voxels.astype(np.uint8), affine=affine)
    )
    turned = three_planes(
        flipped, Volume(voxels_DHW=flipped.voxels_DHW.astype(np.uint8), affine=flipped.affine)
    )
    np.testing.assert_array_equal(upright, turned)
    sagittal = upright[:, : upright.shape[1] // 3, 0]
    assert sagittal[: sagittal.shape[0] // 2].max() == 255 > sagittal[3 * sagittal.shape[0] // 4 :].max()


def _axes_of_flip() -> np.ndarray:
    """Affine of the picture above with its axes in the order (S, R, A), S and R running backwards."""
    affine = np.zeros((4, 4))
    affine[2, 0], affine[0, 1], affine[1, 2] = -1.0, -1.0, 1.0
    affine[:, 3] = [11.0, 0.0, 19.0, 1.0]
    return affine
