"""``compliance report``: true figures with sources, nothing hostile alive, rendered in a real browser."""

from __future__ import annotations

import hashlib
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from headless_chromium import Chromium, find_chromium
from PIL import Image
from release_study import AT, SITES, Study, attempt_records, make_ledger, make_study

from privacy.audit.blind_spots import BLIND_SPOTS
from privacy.audit.verdict import level_of_test
from privacy.compliance.officer_report import OfficerReport, officer_report
from privacy.compliance.page import visible
from privacy.compliance.recheck import REQUIRED_CONDITIONS
from privacy.compliance.report_figures import attack_curve, attack_is_drawn, confidence, left_out_of_audit
from privacy.compliance.verify import examine_bundle
from server.release.log import append_withdrawal
from shared.identity import SigningKey

HOSTILE = (
    "</style><script>document.title='pwned'</script><img src=x onerror=\"document.title='pwned'\">\u202e"
)


class Page(HTMLParser):
    """What a browser would act on: elements, attributes, texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.elements if attribute in attributes]


def assert_inert(html: str) -> None:
    """No scripts, no handlers, nothing loaded, no way out of the page."""
    page = Page(html)
    assert {tag for tag, _ in page.elements} & {
        "script",
        "iframe",
        "object",
        "embed",
        "link",
        "base",
        "form",
    } == set()
    assert not [n for _, attributes in page.elements for n in attributes if n.startswith("on")]
    assert all(target.startswith("#") for target in page.values("href"))
    assert all(source.startswith("data:image/png;base64,") for source in page.values("src"))
    assert not re.search(r"@import|url\(|expression\(", html.split("</style>")[0])
    assert any("default-src 'none'" in policy for policy in page.values("content"))


def report_on(bundle: Path, **options: object) -> OfficerReport:
    return officer_report(bundle, at="2026-02-01 09:00 UTC", **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def honest(study: Study, bundle: Path, log: Path) -> OfficerReport:
    return report_on(bundle, trusted_coordinator=study.coordinator.verify_key.fingerprint, log=log)


def test_the_page_says_what_an_officer_asks_for(study: Study, honest: OfficerReport) -> None:
    text = Page(honest.html).text
    spent = study.decide().spending[0]
    assert honest.passed and "passes every check that was made" in text
    for words in (
        "about 120", "at 3 hospitals", "declared", "one patient at one hospital", "trust model",
        "one patient added or removed", "up to 1 of the hospitals", f"{spent.epsilon_world:.2f}",
        f"{spent.epsilon_colluding:.2f}", "1 in 100,000", "composition", "no violation found",
        "at this power: a strong leak would have",
        "never \u201cprivate\u201d", "Power", "planted leak",
        "What is not covered", "NIST SP 800-226", "Copies", study.coordinator.verify_key.fingerprint,
        "release on " + AT.replace("T", " ").replace("Z", " UTC"),
    ):  # fmt: skip
        assert words in text, words
    for site in SITES:
        assert f"\u03b5 {spent.epsilon_world:.2f} from 5 training and 1 audit attempts" in text
        assert study.keys[site].verify_key.fingerprint in text
    assert "The audit was tried" not in text
    titles = {condition.title for condition in study.decide().conditions}
    assert len(titles) == len(REQUIRED_CONDITIONS) and all(title in text for title in titles)
    assert_inert(honest.html)


def test_every_source_mark_leads_to_a_statement_with_its_hash(bundle: Path, honest: OfficerReport) -> None:
    page = Page(honest.html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    marks = [a["href"] for _, a in page.elements if a.get("class") in ("src", "src bad")]
    assert len(marks) > 60 and set(marks) <= {f"#{name}" for name in ids}
    assert {target.removeprefix("#") for target in page.values("href")} <= set(ids)
    for path in (bundle / "attestations").rglob("*.dsse.json"):
        name = path.relative_to(bundle).as_posix()
        assert f"<code>{name}</code>" in honest.html
        assert hashlib.sha256(path.read_bytes()).hexdigest() in honest.html
    sections = re.findall(r'<section id="(\w+)">(.*?)</section>', honest.html, re.DOTALL)
    assert [name for name, _ in sections][:7] == [
        "training", "guarantee", "budgets", "audit", "gate", "approvals", "limits",
    ]  # fmt: skip
    rows = [row for name, body in sections if name in ("training", "gate") for row in body.split("<tr>")[1:]]
    rows = [row for row in rows if row.lstrip().startswith("<td")]
    figures = re.findall(r"<figure>(.*?)</figure>", honest.html, re.DOTALL)
    captioned = [figure for figure in figures if "<figcaption>" in figure]
    assert len(captioned) == 3 + 6 and all('class="src' in figure for figure in captioned)
    assert len(rows) >= 30 and all('class="src' in row for row in rows), "a figure without its source"


def test_a_bars_confidence_is_what_its_ends_leave(study: Study) -> None:
    """Controls split their level between the ends, all others have it at each."""
    for name, ends in (("membership_attack", 2), ("copies", 2), ("control_members", 1)):
        miss = ends * level_of_test(study.plan, name)
        assert float(confidence(study.plan, name)) == pytest.approx(100 * (1 - miss), abs=0.06)


def test_hospitals_that_were_left_out_of_the_audit_are_named(
    bundle: Path, honest: OfficerReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Not every hospital took part" not in Page(honest.html).text
    opened = examine_bundle(bundle).evidence
    assert opened is not None and left_out_of_audit(opened) == ()
    for statement in opened.verdicts.values():
        statement.predicate["survivors"].remove("gamma")  # type: ignore[attr-defined]
    assert left_out_of_audit(opened) == ("gamma",)
    monkeypatch.setattr("privacy.compliance.officer_report.left_out_of_audit", lambda _: ("gamma",))
    assert "Not every hospital took part in the audit: gamma did not." in Page(report_on(bundle).html).text


def test_a_curve_that_is_noise_is_not_drawn(study: Study, bundle: Path, honest: OfficerReport) -> None:
    """Where the plan accepts a blind audit, the page shows no line of the attack, and says so."""
    assert '<polyline class="measured"' in honest.html
    opened = examine_bundle(bundle).evidence
    assert opened is not None and attack_is_drawn(opened)
    (site, verdict), *_ = opened.recomputed.items()
    blind = tuple(replace(c, figure=0.3) if c.name == "power" else c for c in verdict.conditions)
    opened.recomputed[site] = replace(verdict, conditions=blind)
    assert not attack_is_drawn(opened)
    assert "measured" not in attack_curve(opened, spent=1.0)


def test_the_page_says_what_no_audit_sees(honest: OfficerReport) -> None:
    text = unescape(honest.html)
    assert len(BLIND_SPOTS) >= 8
    assert all(spot.defect in text and spot.instead in text for spot in BLIND_SPOTS)


def test_a_changed_bundle_says_do_not_use_and_why(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    ledger = copy / "attestations/ledgers/beta.dsse.json"
    ledger.write_bytes(ledger.read_bytes().replace(b'"sig":"', b'"sig":"A', 1))
    report = report_on(copy)
    text = Page(report.html).text
    assert not report.passed and "Do not use this bundle." in text
    assert "ledger of beta" in text and "does not verify" in text and "passes every check" not in text
    assert_inert(report.html)


@pytest.mark.parametrize(
    "missing", ["attestations/plan.json", "attestations/gate-decision.dsse.json", "docs/README.md"]
)
def test_the_page_is_written_whatever_is_missing(bundle: Path, tmp_path: Path, missing: str) -> None:
    copy = tmp_path / "bundle"
    shutil.copytree(bundle, copy)
    (copy / missing).unlink()
    report = report_on(copy)
    assert not report.passed and missing in Page(report.html).text
    assert not report_on(tmp_path / "nothing-here").passed


def test_withdrawals_and_what_was_not_at_hand_stand_at_the_top(
    study: Study, bundle: Path, log: Path, tmp_path: Path
) -> None:
    own = tmp_path / "log.jsonl"
    shutil.copyfile(log, own)
    digest = hashlib.sha256((bundle / "attestations/release.dsse.json").read_bytes()).hexdigest()
    append_withdrawal(
        own, bundle_sha256=digest, study_id="rare-lesion", key=study.coordinator, at=AT, reason=HOSTILE
    )
    report = report_on(bundle, log=own)
    top = Page(report.html.split('class="tiles"')[0]).text
    assert not report.passed and "withdrawn on" in top and "\u202e" not in report.html
    assert_inert(report.html)
    top = Page(report_on(bundle).html.split('class="tiles"')[0]).text
    assert "whose it is was not checked" in top
    assert "a withdrawal would not be noticed" in top and "an old copy" in top


def test_without_a_key_from_outside_the_page_is_not_green(study: Study, bundle: Path, tmp_path: Path) -> None:
    """Anybody can make a whole bundle: what only says that it is consistent must not look like approval."""
    forged = make_study(tmp_path).release(tmp_path / "bundle").path
    report = report_on(forged)
    text = Page(report.html).text
    assert report.passed and not report.anchored
    assert "whose it is was not checked" in text and 'class="verdict pass"' not in report.html
    assert "passes every check" not in text and "verdict partly" in report.html
    caught = report_on(forged, trusted_coordinator=study.coordinator.verify_key.hex())
    assert not caught.passed and "wrong coordinator" in Page(caught.html).text


def test_an_audit_that_was_tried_again_is_told(tmp_path: Path) -> None:
    """An attempt that the coordinator records as aborted may have been put aside for its result."""
    study = make_study(tmp_path)
    audit = attempt_records()[-1]
    tried = replace(audit, attempt=audit.attempt - 1, status="aborted", survivors=())
    records = (*attempt_records()[:-1], tried, audit)
    ledgers = {s: make_ledger(tmp_path / "again" / s, study.keys[s], study.plan, records) for s in SITES}
    inputs = replace(study.inputs, ledgers=ledgers, attempts=records)
    study = replace(study, inputs=inputs)
    report = report_on(study.release(tmp_path / "bundle").path)
    assert report.passed and "The audit was tried 2 times." in Page(report.html).text
    assert "The plan allows 2" in Page(report.html).text


def test_ledgers_given_besides_must_continue_those_of_the_bundle(
    study: Study, bundle: Path, tmp_path: Path
) -> None:
    from privacy.ledger import Budget, Charge, Ledger
    from privacy.ledger_chain import read_export

    key, plan = study.keys["alpha"], study.plan
    folder = tmp_path / "alpha"
    shutil.copytree(study.root / "sites" / "alpha", folder)
    event = read_export(study.inputs.ledgers["alpha"], key.verify_key).entries[2].event
    with Ledger.open(folder / "ledger.sqlite", key=key, counter_path=folder / "counter") as ledger:
        charge = Charge(
            study_id="another",
            plan_sha256="0" * 64,
            purpose="train",
            round=1,
            attempt=1,
            event=event,
            run_id="r",
        )
        ledger.reserve(charge, Budget(epsilon=None, delta=plan.privacy.delta))
        ledger.export(folder / "later.json")
    report = report_on(bundle, ledgers=[folder / "later.json"])
    text = Page(report.html).text
    assert report.passed and "rare-lesion, another" in text and "by 1 entries" in text
    other = tmp_path / "other"
    make_ledger(other, key, plan, attempt_records())
    make_ledger(tmp_path / "strange", SigningKey.generate(), plan, attempt_records())
    (tmp_path / "torn.json").write_bytes((folder / "later.json").read_bytes()[:-3])
    for path, why in (
        (other / "export.json", "another ledger of alpha"),
        (tmp_path / "strange" / "export.json", "no site of this study"),
        (tmp_path / "torn.json", "torn.json"),
        (tmp_path / "none.json", "cannot be read"),
    ):
        report = report_on(bundle, ledgers=[path])
        assert not report.passed and why in Page(report.html).text, why


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page about a bundle whose coordinator and sites wrote markup wherever they can write text."""
    root = tmp_path_factory.mktemp("hostile")
    study = make_study(root, title=HOSTILE)
    bundle = study.release(root / "a<script>document.title=1<script>b").path
    (bundle / "attestations/approvals/<img src=x onerror=alert(1)>.dsse.json").write_bytes(HOSTILE.encode())
    ledger = root / "<script>document.title='pwned'.json"
    ledger.write_bytes(HOSTILE.encode())
    report = report_on(bundle, ledgers=[ledger])
    assert not report.passed
    return report.html


def test_hostile_text_is_shown_and_never_alive(hostile: str) -> None:
    assert_inert(hostile)
    assert "\u202e" not in hostile and "<script" not in hostile
    assert "document.title=&#39;pwned&#39;" in hostile, "the hostile text is there to be read"


def test_invisible_characters_and_endless_texts_are_bounded() -> None:
    assert visible("a\u202eb\u200b\x00c\x1b[31m") == "a\ufffdb\ufffd\ufffdc\ufffd[31m"
    assert len(visible("x" * 10**6)) < 4100 and "more characters" in visible("x" * 10**6)


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Chromium:
    return find_chromium(tmp_path_factory.mktemp("chromium"))


def test_in_a_browser_no_hostile_script_runs(chromium: Chromium, hostile: str, tmp_path: Path) -> None:
    page, alive = tmp_path / "page.html", tmp_path / "alive.html"
    page.write_text(hostile, encoding="utf-8")
    title = re.search(r"<title>(.*?)</title>", chromium.dom(page), re.DOTALL)
    assert title and "Release report" in title[1] and title[1] != "pwned"
    alive.write_text(f"<title>before</title>{HOSTILE}", encoding="utf-8")
    assert "<title>pwned</title>" in chromium.dom(alive), "the same text does run where it is not escaped"


def test_in_a_browser_the_page_is_drawn_and_prints(
    chromium: Chromium, honest: OfficerReport, tmp_path: Path
) -> None:
    page = tmp_path / "page.html"
    page.write_text(honest.html, encoding="utf-8")
    dom = chromium.dom(page)
    assert dom.count("<svg") == honest.html.count("<svg") >= 9
    with Image.open(chromium.picture(page, tmp_path / "page.png", height=2400)) as picture:
        assert picture.size == (1100, 2400)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**24) or []}
    assert {(233, 244, 238), (29, 91, 143)} <= colours, "the verdict's green and the gauges' blue"
    printed = chromium.print(page, tmp_path / "page.pdf").read_bytes()
    pages = len(re.findall(rb"/Type\s*/Page[^s]", printed))
    assert printed.startswith(b"%PDF") and 6 <= pages <= 25


ALONE = """
import importlib.abc, sys
class Forbid(importlib.abc.MetaPathFinder):
    names = {"torch", "monai", "opacus", "flwr", "grpc", "server", "client", "safetensors", "matplotlib"}
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ImportError("forbidden here: " + name)
        return None
sys.meta_path.insert(0, Forbid())
import socket
def refuse(*_, **__): raise OSError("offline")
socket.socket.connect = refuse
from deploy.cli.main import cli
for words in (["verify", sys.argv[1]], ["report", sys.argv[1], "--out", sys.argv[2], *sys.argv[3:]]):
    cli.main(args=["compliance", *words], standalone_mode=False)
"""


def test_verify_and_report_alone_offline_without_torch_in_ten_seconds(
    study: Study, bundle: Path, tmp_path: Path
) -> None:
    """Processor time of both commands, not wall time: the test machine may be busy."""
    ledgers = []
    for site in SITES:
        ledgers.append(tmp_path / f"{site}.json")
        ledgers[-1].write_bytes(study.inputs.ledgers[site])
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(bundle), str(tmp_path / "report.html"), *map(str, ledgers)],
        capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 10
    assert "Ledgers given with this report" in (tmp_path / "report.html").read_text(encoding="utf-8")
