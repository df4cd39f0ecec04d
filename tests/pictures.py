"""README's pictures: ``python -m tests.pictures DEMO --data DATA``, DEMO being what a demo on DATA left.

Real scans shown are the demo's PUBLIC ones, of patients that pretraining held out where there are enough; no
member's scan is opened. The curve of the utility benchmark is made by that benchmark.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from client.ingest.decathlon import public_mask_paths, volume_condition_cut
from deploy.public_networks import PublicSource, read_public
from server.pretrain import PublicVolume, held_out_patients
from shared.generation import BundleMetadata, generate_volumes, read_metadata
from shared.volumes.canonical_grid import CanonicalGrid
from shared.volumes.contact_sheet import comparison_sheet
from shared.volumes.nifti import read_volume
from shared.volumes.surface import surface_sheet

OUT = Path(__file__).parents[1] / "deploy" / "pictures"
COLUMNS, SEED = 3, 1
SOURCE = "Real: Medical Segmentation Decathlon, Task04 Hippocampus (Vanderbilt University), CC BY-SA 4.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("demo", type=Path, help="what `lacuna demo --out DEMO --data DATA` left")
    parser.add_argument("--data", type=Path, required=True, help="the Decathlon task's folder")
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    bundle = chosen.demo / "bundle"
    metadata = read_metadata(bundle)
    common, rare = (name for name in metadata.conditions)
    real = _public_scans(chosen.demo, chosen.data, metadata)
    synthetic = {name: _synthetic(bundle, name) for name in (common, rare)}
    facts = {"labels": metadata.labels, "spacing_mm": metadata.spacing_mm}

    for file, title, shown in (
        ("real_and_synthetic", "Real and synthetic hippocampi", common),
        ("rare_class", f"The rare class: '{rare}'", rare),
    ):
        scans = [volume for volume in real if volume.condition == shown][:COLUMNS]
        comparison_sheet(
            [
                ("Real, public", [v.image for v in scans], [v.mask for v in scans]),
                ("SYNTHETIC, not a patient", *synthetic[shown]),
            ],
            chosen.out / f"{file}.png",
            title=title,
            subtitle=SOURCE,
            per_row=COLUMNS,
            **facts,
        )
    surface_sheet(
        [*synthetic[common][1], *synthetic[rare][1]],
        chosen.out / "surfaces.png",
        title="Surfaces of synthetic masks",
        captions=[*[common] * COLUMNS, *[rare] * COLUMNS],
        **facts,
    )
    for path in sorted(chosen.out.glob("*.png")):
        _make_small(path)
        print(f"{path.name}: {path.stat().st_size} bytes")


def _public_scans(demo: Path, data: Path, metadata: BundleMetadata) -> list[PublicVolume]:
    table, only = data / "patients.csv", demo / "data" / "public.txt"
    patients = frozenset(only.read_text().split())
    source = PublicSource(
        nifti=None,
        decathlon=data,
        patients=table,
        only=only,
        volume_cut_mm3=volume_condition_cut(public_mask_paths(data, table, patients)),
    )
    grid = CanonicalGrid(shape=metadata.grid_shape, spacing_mm=metadata.spacing_mm)
    volumes = read_public(source, grid, conditions=metadata.conditions, labels=metadata.labels)
    unseen = set(held_out_patients(patients, 0.2))
    return sorted(volumes, key=lambda volume: volume.patient_id not in unseen)


def _synthetic(bundle: Path, condition: str) -> tuple[list[NDArray[np.float32]], list[NDArray[np.uint8]]]:
    """The first plausible samples of a fixed seed, not chosen."""
    with tempfile.TemporaryDirectory() as folder:
        report = generate_volumes(
            bundle_dir=bundle, condition=condition, count=COLUMNS, seed=SEED, out_dir=Path(folder),
            sheet_samples=1,
        )  # fmt: skip
        images = [read_volume(pair.image).voxels_DHW.astype(np.float32) for pair in report.pairs]
        masks = [read_volume(pair.mask).voxels_DHW.astype(np.uint8) for pair in report.pairs]
    return images, masks


def _make_small(path: Path) -> None:
    """A palette of 128 colours, at most 1,100 pixels wide; what the picture says of itself stays."""
    with Image.open(path) as image:
        text = dict(image.info)
        small = image.convert("RGB")
    small.thumbnail((1100, 1100), Image.Resampling.LANCZOS)
    info = PngInfo()
    for key, value in text.items():
        if isinstance(value, str):
            info.add_text(key, value)
    small.quantize(128).save(path, optimize=True, pnginfo=info)


if __name__ == "__main__":
    main()
