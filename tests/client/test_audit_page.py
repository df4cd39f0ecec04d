"""The site's own page: true curves, the right pairs, marked as private everywhere, nothing alive in it."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from agent_trio import PLANTED
from headless_chromium import find_chromium
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from small_plan import Keys, small_plan
from torch import Tensor

from client.audit_page import PRIVATE, roc_points, site_audit_page
from client.auditor import LocalAudit, SecondaryFigures
from client.nearest_neighbours import MAX_SIDE, Neighbour, nearest_neighbours
from client.site_home import SiteHome, init_site
from deploy.cli.main import main
from privacy.audit.bounds import Interval, auc
from privacy.audit.copies import CopySpace, nearest_distances
from shared.canonical import canonical_json, parse_json
from shared.errors import MalformedMessageError
from shared.home import write_private
from shared.model.autoencoder import build_autoencoder
from shared.model.copy_embedding import build_copy_embedding
from shared.model.presets import preset_named
from shared.plan_package import write_plan_package

RNG = np.random.default_rng(11)
SHAPE = (4, 6, 6, 6)


def neighbour(key: str, distance: float) -> Neighbour:
    pictures = RNG.integers(0, 256, (2, 9, 31), dtype=np.uint8)
    return Neighbour(
        patient_key=key, distance=distance, sample=5, patient_picture=pictures[0], sample_picture=pictures[1]
    )


def local_audit(n: int = 12) -> LocalAudit:
    keys = tuple(f"{i:02x}" * 32 for i in range(n))
    distances = np.linspace(0.9, 0.1, n)
    return LocalAudit(
        n_members=n,
        n_held_out=n,
        attack=Interval(estimate=0.613, low=0.5, high=0.7, error=0.0125),
        power=0.3,
        epsilon_lower_bound=0.42,
        true_positive_rates=((0.1, 0.25),),
        public_control=None,
        member_control=Interval(estimate=0.5, low=0.2, high=0.8, error=0.01),
        planted_leak=PLANTED,
        member_keys=keys,
        held_out_keys=keys,
        member_scores=RNG.normal(1, 1, n),
        held_out_scores=np.append(RNG.normal(0, 1, n - 1), np.nan),
        member_distances=distances,
        held_out_distances=np.append(distances[1:], np.inf),
        copy_distance=0.2,
        copied=(keys[-1],),
        counts=np.zeros(9, dtype=np.int64),
        neighbours=(neighbour(keys[-1], 0.1), neighbour(keys[-2], 0.17)),
    )


def with_secondary(audit: LocalAudit) -> LocalAudit:
    """An attack with figures, one with a patient lost, one without a figure."""
    n = audit.n_members

    def figures(name: str, *, interval: Interval | None, pooled: bool = False) -> SecondaryFigures:
        return SecondaryFigures(
            attack=name,
            auc=interval,
            pooled=pooled,
            member_scores=np.append(RNG.normal(2, 1, n - 1), np.nan),
            held_out_scores=RNG.normal(0, 1, n),
        )

    seen = Interval(estimate=0.877, low=0.701, high=0.949, error=0.00625)
    return replace(
        audit,
        secondary=(
            figures("pia, guidance 2", interval=seen, pooled=True),
            figures("sima", interval=seen),
            figures("secmi", interval=None),
        ),
    )


def test_each_secondary_attack_has_its_curve_its_scores_and_its_interval() -> None:
    """Curves drawn from the scores that were kept: the area under each is the attack's AUC."""
    audit = with_secondary(local_audit())
    html = page_of(audit)
    assert "Secondary attacks" in html and html.count("leave, with noise") == 1
    assert html.count("stay here") == 2 and html.count("0.701 to 0.949") == 6
    assert html.count("too few patients") == 1 and "1 patients without a finite figure" in html
    for figures in audit.secondary[:2]:
        found = re.search(rf'aria-label="ROC curve at this site: {figures.attack}".*?</svg>', html, re.DOTALL)
        assert found, figures.attack
        (points,) = re.findall(r'<polyline class="measured" points="([^"]+)"', found[0])
        x, y = np.array([pair.split(",") for pair in points.split()], dtype=float).T
        area = np.trapezoid(y.max() - y, x) / ((x.max() - x.min()) * (y.max() - y.min()))
        expected = auc(figures.member_scores[:-1], figures.held_out_scores)
        assert area == pytest.approx(expected, abs=0.005)
    assert "ROC curve at this site: secmi" not in html
    assert html.count('class="member"') == 24 + 2 * 11
    assert "The plan makes none" in page_of(local_audit())


def test_the_page_says_what_was_signed_and_what_is_missing_in_it() -> None:
    record = {"attempt": 7, "candidate_sha256": "c" * 64, "figures": local_audit().to_dict()}
    html = site_audit_page(record, small_plan(), site_id="site-0", at="today", signed=["WARNING: <counts>"])
    assert '<p class="note">WARNING: &lt;counts&gt;</p>' in html
    assert "What this site signed" not in page_of(local_audit())


def page_of(audit: LocalAudit, **plan: object) -> str:
    record = {"attempt": 7, "candidate_sha256": "c" * 64, "figures": audit.to_dict()}
    return site_audit_page(
        parse_json(canonical_json(record), what="audit"), small_plan(**plan), site_id="site-0", at="today"
    )


@settings(max_examples=100, deadline=None)
@given(*[st.lists(st.integers(-4, 4), min_size=1, max_size=12)] * 2)
def test_the_area_under_the_drawn_curve_is_the_auc(members: list[int], held_out: list[int]) -> None:
    m, h = np.array(members, dtype=float), np.array(held_out, dtype=float)
    x, y = zip(*roc_points(m, h), strict=True)
    assert (x[0], y[0], x[-1], y[-1]) == (0.0, 0.0, 1.0, 1.0)
    assert np.trapezoid(y, x) == pytest.approx(auc(m, h), abs=1e-12)


def test_the_page_shows_the_sites_figures_and_says_where_they_stay() -> None:
    audit = local_audit()
    html = page_of(audit)
    title = re.search(r"<title>(.*?)</title>", html)
    assert title and "STAYS IN THE HOSPITAL" in title[1]
    assert html.count(PRIVATE) >= 3 and "@top-center" in html
    for words in (
        "0.613",
        "12 patients of this hospital",
        "1 of 12 members",
        "25%",
        "0.42",
        "Too few patients",
    ):
        assert words in html, words
    assert html.index(audit.member_keys[-1][:24]) < html.index(audit.member_keys[-2][:24])
    assert html.count('class="member"') == 24 and html.count('class="held-out"') == 22
    assert len(re.findall("<script|<link|<iframe|https?://", html)) == 0
    assert "No pictures" in page_of(replace(audit, neighbours=()))


def test_pictures_in_the_page_are_those_that_were_kept() -> None:
    audit = local_audit()
    shown = re.findall(r'<img src="data:image/png;base64,([^"]+)"', page_of(audit))
    kept = [p for n in audit.neighbours for p in (n.patient_picture, n.sample_picture)]
    assert len(shown) == len(kept) == 4
    for text, picture in zip(shown, kept, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(text))) as image:
            assert np.array_equal(np.asarray(image)[::4, ::4], picture)


def test_hostile_words_and_damaged_records_do_no_harm() -> None:
    html = page_of(local_audit(), title="<script>alert(1)</script>")
    assert "<script" not in html and "&lt;script&gt;" in html
    value = local_audit().to_dict()
    value["neighbours"][0]["shape"] = [9, 32]
    with pytest.raises(MalformedMessageError):
        LocalAudit.from_dict(value)
    old = local_audit().to_dict()
    del old["neighbours"]
    assert LocalAudit.from_dict(old).neighbours == ()
    assert "private" in repr(local_audit().neighbours[0])


@dataclass(frozen=True, kw_only=True, eq=False)
class Scans:
    patient_key: str
    latents_SCDHW: Tensor
    conditions_S: Tensor


@pytest.mark.parametrize("embedded", [False, True])
def test_the_pairs_are_the_nearest_ones(embedded: bool) -> None:
    """Patient 3's second scan is sample 4 itself: first in the list, at distance 0, with the same picture."""
    generator = torch.Generator().manual_seed(3)
    autoencoder = build_autoencoder(preset_named("micro"), n_labels=2).eval()
    patients = [
        Scans(
            patient_key=f"p{i}",
            latents_SCDHW=torch.randn((2, *SHAPE), generator=generator),
            conditions_S=torch.zeros(2, dtype=torch.int64),
        )
        for i in range(6)
    ]
    samples = torch.randn((7, *SHAPE), generator=generator)
    samples[4] = patients[3].latents_SCDHW[1]
    volumes = build_copy_embedding(n_labels=2).eval() if embedded else None
    space = CopySpace(autoencoder=autoencoder, embedding=volumes)
    embedding = space.of_samples(samples)
    distances = nearest_distances(space, patients, embedding)
    pairs = nearest_neighbours(space, autoencoder, patients, distances, samples, embedding, shown=3)
    assert [pair.distance for pair in pairs] == sorted(distances)[:3]
    first = pairs[0]
    assert (first.patient_key, first.sample, first.distance) == ("p3", 4, pytest.approx(0, abs=1e-4))
    assert np.abs(first.patient_picture.astype(int) - first.sample_picture.astype(int)).max() <= 1
    assert not np.array_equal(pairs[1].patient_picture, pairs[1].sample_picture)
    assert first.patient_picture.shape[0] <= MAX_SIDE and first.patient_picture.std() > 0


def test_the_command_writes_it_for_the_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    home, keys = SiteHome.default(), Keys.of(3)
    init_site(home, name="site-0")
    weights = tmp_path / "weights"
    weights.write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    plan = small_plan(keys, model__autoencoder_sha256=digest, model__prior_sha256=digest)
    home.study(plan.study_id).mkdir(mode=0o700)
    write_plan_package(
        home.study(plan.study_id) / "plan", plan, key=keys.coordinator, autoencoder=weights, prior=weights
    )
    record = {"attempt": 7, "candidate_sha256": "c" * 64, "figures": local_audit().to_dict()}
    write_private(home.study(plan.study_id) / "audit.json", canonical_json(record))
    page = tmp_path / "own.html"
    with pytest.raises(SystemExit) as stop:
        main(["site", "audit", "--report", str(page)])
    assert stop.value.code == 0 and PRIVATE in capsys.readouterr().out
    assert page.stat().st_mode & 0o777 == 0o600
    assert "site-0" in page.read_text(encoding="utf-8")


def test_in_a_browser_the_page_and_its_prints_are_marked(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(page_of(local_audit()), encoding="utf-8")
    chromium = find_chromium(tmp_path / "profile")
    with Image.open(chromium.picture(page, tmp_path / "page.png")) as picture:
        top = picture.convert("RGB").crop((300, 0, 800, 6))
        assert {colour for _, colour in top.getcolors(4096) or []} == {(169, 37, 25)}, "the red band"
    assert chromium.print(page, tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
