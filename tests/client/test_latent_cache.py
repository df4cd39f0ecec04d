"""The latent cache: right latents for the right patients, computed once, never from another autoencoder."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from client.ingest.nifti import NiftiFolder
from client.ingest.phantoms import write_phantom_folder
from client.latent_cache import LatentCache, LatentError
from client.patient_dataset import SiteStore
from client.scan_import import import_scans
from shared.model.autoencoder import LatentAutoencoder, build_autoencoder
from shared.model.conditioning import ConditionTable
from shared.model.presets import PRESETS
from shared.study_plan import DataClause
from shared.volumes.canonical_grid import CanonicalGrid
from shared.volumes.phantom import simulate_cohort

CLAUSE = DataClause(
    conditions=("common", "rare"),
    rare_condition="rare",
    labels=("organ", "lesion"),
    grid_shape=(16, 16, 16),
    spacing_mm=(6.0, 6.0, 6.0),
)
GRID = CanonicalGrid.from_clause(CLAUSE)
TABLE = ConditionTable.from_clause(CLAUSE)
SHA_A, SHA_B = "a" * 64, "b" * 64


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SiteStore:
    root = tmp_path_factory.mktemp("site")
    cohort = simulate_cohort(
        n_patients=12,
        conditions_fractions={"common": 0.5, "rare": 0.5},
        seed=3,
        grid_shape=(16, 16, 16),
        spacing_mm=(6.0, 6.0, 6.0),
    )
    write_phantom_folder(cohort, root / "scans", spacing_mm=(6.0, 6.0, 6.0))
    store = SiteStore.create(root / "store")
    import_scans(NiftiFolder(path=root / "scans"), store, CLAUSE)
    return store


class CountingAutoencoder(LatentAutoencoder):
    """The real autoencoder, counting what it encodes."""

    encoded = 0

    def encode(self, image_B1DHW: torch.Tensor, mask_BDHW: torch.Tensor) -> torch.Tensor:
        self.encoded += len(image_B1DHW)
        return super().encode(image_B1DHW, mask_BDHW)


def autoencoder(seed: int = 0) -> CountingAutoencoder:
    built = CountingAutoencoder(PRESETS["micro"], n_labels=2)
    built.load_state_dict(build_autoencoder(PRESETS["micro"], n_labels=2, seed=seed).state_dict())
    return built.eval()


def cache(
    root: Path, module: LatentAutoencoder, sha256: str = SHA_A, grid: CanonicalGrid = GRID
) -> LatentCache:
    return LatentCache(root, autoencoder=module, autoencoder_sha256=sha256, grid=grid)


def test_latents_are_those_of_the_scans_grouped_by_patient(store: SiteStore, tmp_path: Path) -> None:
    module = autoencoder()
    scans = store.scans()
    patients = cache(tmp_path / "cache", module).patients(store, scans, table=TABLE)
    assert sum(len(patient.conditions_S) for patient in patients) == len(scans) == module.encoded
    assert [patient.patient_key for patient in patients] == sorted({scan.patient_key for scan in scans})
    assert any(len(patient.conditions_S) > 1 for patient in patients)
    for patient in patients:
        own = sorted((s for s in scans if s.patient_key == patient.patient_key), key=lambda s: s.scan_key)
        assert patient.latents_SCDHW.shape == (len(own), *PRESETS["micro"].latent_shape((16, 16, 16)))
        assert patient.latents_SCDHW.dtype == torch.float32 and patient.conditions_S.dtype == torch.int64
        for z_CDHW, condition, scan in zip(patient.latents_SCDHW, patient.conditions_S, own, strict=True):
            image, mask = store.read(scan)
            with torch.no_grad():
                expected = module.encode(
                    torch.from_numpy(image)[None, None], torch.from_numpy(mask.astype(np.int64))[None]
                )[0]
            torch.testing.assert_close(z_CDHW, expected, atol=1e-5, rtol=1e-4)
            assert CLAUSE.conditions[int(condition)] == scan.condition


def test_latents_are_computed_once(store: SiteStore, tmp_path: Path) -> None:
    first = autoencoder()
    scans = store.scans()
    calls: list[tuple[str, int, int]] = []
    before = cache(tmp_path / "cache", first).patients(
        store, scans, table=TABLE, progress=lambda *call: calls.append(call)
    )
    assert calls[-1] == ("encoding", len(scans), len(scans))
    second = autoencoder()
    after = cache(tmp_path / "cache", second).patients(store, scans, table=TABLE)
    assert second.encoded == 0
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one.latents_SCDHW, other.latents_SCDHW)
        assert one.patient_key == other.patient_key and torch.equal(one.conditions_S, other.conditions_S)


def test_an_interrupted_or_torn_cache_is_completed(store: SiteStore, tmp_path: Path) -> None:
    scans = store.scans()
    first = cache(tmp_path / "cache", autoencoder())
    first.patients(store, scans[:4], table=TABLE)
    torn = first.folder / f"{scans[0].scan_key}.safetensors"
    torn.write_bytes(torn.read_bytes()[:-8])
    module = autoencoder()
    patients = cache(tmp_path / "cache", module).patients(store, scans, table=TABLE)
    assert module.encoded == len(scans) - 3
    assert sum(len(patient.conditions_S) for patient in patients) == len(scans)


def test_another_autoencoder_or_grid_starts_anew(store: SiteStore, tmp_path: Path) -> None:
    scans = store.scans()[:3]
    first = cache(tmp_path / "cache", autoencoder())
    old = first.patients(store, scans, table=TABLE)
    module = autoencoder(seed=1)
    second = cache(tmp_path / "cache", module, SHA_B)
    new = second.patients(store, scans, table=TABLE)
    assert module.encoded == 3 and not first.folder.exists()
    assert not torch.allclose(old[0].latents_SCDHW, new[0].latents_SCDHW)
    other_grid = CanonicalGrid(shape=GRID.shape, spacing_mm=GRID.spacing_mm, percentiles=(1.0, 99.0))
    again = autoencoder(seed=1)
    cache(tmp_path / "cache", again, SHA_B, other_grid).patients(store, scans, table=TABLE)
    assert again.encoded == 3


def test_other_weights_under_the_same_hash_are_refused(store: SiteStore, tmp_path: Path) -> None:
    scans = store.scans()[:2]
    cache(tmp_path / "cache", autoencoder()).patients(store, scans, table=TABLE)
    with pytest.raises(LatentError, match="another autoencoder"):
        cache(tmp_path / "cache", autoencoder(seed=1)).patients(store, scans, table=TABLE)


def test_latents_that_are_not_finite_are_refused(store: SiteStore, tmp_path: Path) -> None:
    module = autoencoder()
    module.latent_std_C.zero_()
    with pytest.raises(LatentError, match="not finite"):
        cache(tmp_path / "cache", module).patients(store, store.scans()[:2], table=TABLE)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_only_the_owner_can_look_and_no_patient_is_named(store: SiteStore, tmp_path: Path) -> None:
    cache(tmp_path / "cache", autoencoder()).patients(store, store.scans(), table=TABLE)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700
    for path in (tmp_path / "cache").rglob("*.safetensors"):
        assert b"P0000" not in path.read_bytes() and "P0000" not in path.name


def test_a_latent_depends_on_its_own_scan_alone(store: SiteStore, tmp_path: Path) -> None:
    """To the last bit: what one patient contributes must not change with who else is in the store."""
    module = autoencoder()
    scans = store.scans()
    together = cache(tmp_path / "all", module).patients(store, scans, table=TABLE)
    for patient in together:
        own = [scan for scan in scans if scan.patient_key == patient.patient_key]
        (alone,) = cache(tmp_path / patient.patient_key, module).patients(store, own, table=TABLE)
        assert torch.equal(alone.latents_SCDHW, patient.latents_SCDHW)
