"""Generation from a bundle in the release's layout: real networks with fresh weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from known_bundle import GRID, make_bundle
from PIL import Image

from shared.errors import UsageError
from shared.generation import BundleError, generate_volumes, read_metadata
from shared.volumes.synthetic import OutputConflictError, files_sha256


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("release") / "bundle")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pairs_say_what_they_are_and_where_they_come_from(bundle: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    report = generate_volumes(
        bundle_dir=bundle,
        condition="rare",
        count=3,
        seed=11,
        out_dir=tmp_path / "out",
        batch_size=2,
        progress=lambda *call: calls.append(call),
    )
    assert report.written == 3 and report.present == 0 and len(report.pairs) == 3
    assert calls == [("sampling", 2, 3), ("sampling", 3, 3)]
    for index, pair in enumerate(report.pairs):
        image, mask = nib.load(pair.image), nib.load(pair.mask)
        for volume, dtype in ((image, np.float32), (mask, np.uint8)):
            assert volume.shape == GRID and volume.get_data_dtype() == dtype
            assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
            assert volume.header.get_zooms() == (4.0, 3.0, 2.0)
            assert volume.header["descrip"].tobytes().startswith(b"SYNTHETIC")
        np.testing.assert_array_equal(image.affine, mask.affine)
        values = np.asarray(image.dataobj)
        assert np.isfinite(values).all() and 0 <= values.min() < values.max() <= 1
        assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2}
        sidecar = json.loads(pair.sidecar.read_text())
        expected = {
            "synthetic": True,
            "bundle_sha256": hashlib.sha256(
                (bundle / "attestations/release.dsse.json").read_bytes()
            ).hexdigest(),
            "bundle_files_sha256": files_sha256(bundle),
            "study_id": "rare-lesion",
            "condition": "rare",
            "seed": 11,
            "sample_index": index,
            "sampler": "rectified-flow-euler",
            "steps": 2,
            "guidance_scale": 1.0,
            "labels": {"0": "background", "1": "organ", "2": "lesion"},
            "files_sha256": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (pair.image, pair.mask)
            },
        }
        assert expected.items() <= sidecar.items() and sidecar["lacuna_version"]
    assert Image.open(report.contact_sheet).text["Title"].startswith("SYNTHETIC")
    assert len(list((tmp_path / "out").iterdir())) == 11


def test_the_same_request_gives_the_same_bytes_and_another_seed_other_scans(
    bundle: Path, tmp_path: Path
) -> None:
    def run(name: str, seed: int, condition: str) -> dict[str, bytes]:
        out = tmp_path / name
        generate_volumes(
            bundle_dir=bundle,
            condition=condition,
            count=2,
            seed=seed,
            out_dir=out,
            batch_size=2,
            sheet_samples=1,
        )
        return files_of(out)

    first = run("a", 5, "rare")
    assert run("b", 5, "rare") == first
    for name, seed, condition in (("c", 6, "rare"), ("d", 5, "common")):
        other = run(name, seed, condition)
        images = {hashlib.sha256(data).digest() for file, data in first.items() if "_image" in file}
        assert not images & {hashlib.sha256(data).digest() for data in other.values()}
    assert len({data for file, data in first.items() if "_image" in file}) == 2


def test_another_batch_size_gives_the_same_volumes(bundle: Path, tmp_path: Path) -> None:
    for size in (1, 4):
        generate_volumes(
            bundle_dir=bundle,
            condition="common",
            count=4,
            seed=1,
            out_dir=tmp_path / str(size),
            batch_size=size,
            sheet_samples=1,
        )
    for path in (tmp_path / "1").glob("*_image.nii.gz"):
        one = np.asarray(nib.load(path).dataobj)
        four = np.asarray(nib.load(tmp_path / "4" / path.name).dataobj)
        np.testing.assert_allclose(one, four, atol=1e-4)


def test_a_run_grows_and_goes_on(bundle: Path, tmp_path: Path) -> None:
    """An interrupted run is completed; what is there is kept, byte for byte."""
    common = {"bundle_dir": bundle, "condition": "rare", "seed": 2, "batch_size": 2, "sheet_samples": 1}
    generate_volumes(**common, count=5, out_dir=tmp_path / "whole")
    generate_volumes(**common, count=2, out_dir=tmp_path / "grown")
    (tmp_path / "grown" / "rare_seed2_00001.json").unlink()
    (tmp_path / "grown" / "rare_seed2_00000_mask.nii.gz").touch()
    report = generate_volumes(**common, count=5, out_dir=tmp_path / "grown")
    assert (report.written, report.present) == (4, 1)
    assert files_of(tmp_path / "grown") == files_of(tmp_path / "whole")
    assert generate_volumes(**common, count=5, out_dir=tmp_path / "grown").written == 0


@pytest.mark.slow
def test_a_killed_run_goes_on(bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom shared.generation import generate_volumes\n"
        "generate_volumes(bundle_dir=Path(sys.argv[1]), condition='rare', count=40, seed=2,\n"
        " out_dir=Path(sys.argv[2]), batch_size=2, progress=lambda *call: print(call[1], flush=True))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(bundle), str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "2"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL
    report = generate_volumes(
        bundle_dir=bundle,
        condition="rare",
        count=8,
        seed=2,
        out_dir=tmp_path / "out",
        batch_size=2,
        sheet_samples=1,
    )
    assert report.present >= 2 and report.written + report.present == 8
    assert all(path.is_file() for pair in report.pairs for path in (pair.image, pair.mask, pair.sidecar))


@pytest.fixture(scope="module")
def finished(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    generate_volumes(bundle_dir=bundle, condition="rare", count=2, seed=3, out_dir=out, sheet_samples=1)
    return out


@pytest.mark.parametrize("change", ["steps", "guidance", "bundle", "image", "stray"])
def test_nothing_is_overwritten(bundle: Path, finished: Path, tmp_path: Path, change: str) -> None:
    out, source = tmp_path / "out", tmp_path / "bundle"
    shutil.copytree(bundle, source)
    shutil.copytree(finished, out)
    request = {
        "bundle_dir": source,
        "condition": "rare",
        "count": 2,
        "seed": 3,
        "out_dir": out,
        "sheet_samples": 1,
    }
    generate_volumes(**request)
    if change == "steps":
        request["steps"] = 3
    elif change == "guidance":
        request["guidance"] = 2.0
    elif change == "bundle":
        (source / "attestations" / "plan.json").write_text("{ }")
    elif change == "image":
        (out / "rare_seed3_00001_image.nii.gz").write_bytes(b"mine")
    else:
        (out / "rare_seed3_00001.json").unlink()
        (out / "rare_seed3_00001_image.nii.gz").write_bytes(b"mine")
    before = files_of(out)
    with pytest.raises(OutputConflictError, match="rare_seed3_0000"):
        generate_volumes(**request)
    assert files_of(out) == before


def test_wrong_requests_are_refused_before_anything_is_written(bundle: Path, tmp_path: Path) -> None:
    request = {"bundle_dir": bundle, "condition": "rare", "count": 1, "seed": 0, "out_dir": tmp_path / "out"}
    for change, reason in (
        ({"condition": "rarest"}, "rarest"),
        ({"count": 0}, "0 scans"),
        ({"count": -3}, "-3 scans"),
        ({"seed": -1}, "seed -1"),
        ({"batch_size": 0}, "batch size 0"),
        ({"steps": 0}, "0 steps"),
        ({"guidance": float("nan")}, "guidance nan"),
    ):
        with pytest.raises(UsageError, match=reason) as refusal:
            generate_volumes(**(request | change))
        if "condition" in change:
            assert "common, rare" in refusal.value.diagnostics()
    assert not (tmp_path / "out").exists()


def test_a_broken_bundle_is_refused_by_what_is_wrong(bundle: Path, tmp_path: Path) -> None:
    for name in ("configs/metadata.json", "configs/inference.json", "models/denoiser.safetensors"):
        source = tmp_path / name.replace("/", "_")
        shutil.copytree(bundle, source)
        (source / name).unlink()
        with pytest.raises(BundleError, match=name):
            read_metadata(source)
    source = tmp_path / "torn"
    shutil.copytree(bundle, source)
    weights = source / "models" / "autoencoder.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"autoencoder\.safetensors"):
        generate_volumes(bundle_dir=source, condition="rare", count=1, seed=0, out_dir=tmp_path / "out")
    document = json.loads((source / "configs" / "metadata.json").read_text())
    for key in ("preset", "spacing_mm"):
        section = {name: value for name, value in document["lacuna"].items() if name != key}
        (source / "configs" / "metadata.json").write_text(json.dumps({"lacuna": section}))
        with pytest.raises(BundleError, match=key):
            read_metadata(source)
    (source / "configs" / "metadata.json").write_text("{}")
    with pytest.raises(BundleError, match="no section lacuna"):
        read_metadata(source)
    (source / "configs" / "metadata.json").write_text("{")
    with pytest.raises(BundleError, match=r"metadata\.json"):
        read_metadata(source)
    with pytest.raises(BundleError, match="missing"):
        read_metadata(tmp_path / "nowhere")


def test_low_rank_releases_generate(tmp_path: Path) -> None:
    source = make_bundle(tmp_path / "bundle", trainable="low_rank")
    report = generate_volumes(bundle_dir=source, condition="rare", count=1, seed=0, out_dir=tmp_path / "out")
    assert report.written == 1


def test_the_bundles_hash_covers_every_name_and_byte(bundle: Path, tmp_path: Path) -> None:
    hashes = {files_sha256(bundle)}
    for number, edit in enumerate(
        (
            lambda root: (root / "attestations" / "plan.json").write_text("[]"),
            lambda root: (root / "attestations" / "plan.json").rename(root / "attestations" / "plan2.json"),
            lambda root: (root / "extra").write_bytes(b""),
            lambda root: (root / "attestations" / "plan.json").unlink(),
        )
    ):
        copy = tmp_path / str(number)
        shutil.copytree(bundle, copy)
        assert files_sha256(copy) == files_sha256(bundle)
        edit(copy)
        hashes.add(files_sha256(copy))
    assert len(hashes) == 5
