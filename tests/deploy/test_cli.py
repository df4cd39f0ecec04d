"""The command line: help under snapshot, errors without traceback and with documented codes, quick start.

After an intended change of a help text:

    LACUNA_WRITE_SNAPSHOTS=1 python -m pytest tests/deploy/test_cli.py -k help
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from click.testing import CliRunner
from small_package import write_small_package
from small_plan import small_plan

from client.site_home import SiteHome, init_site
from deploy.cli.main import cli, main
from deploy.cli.output import print_table
from server.coordinator_home import CoordinatorHome
from shared.errors import LacunaError
from shared.exit_codes import ExitCode
from shared.identity import SigningKey, VerifyKey

SNAPSHOTS = Path(__file__).parent / "snapshots"
FINGERPRINT = SigningKey.generate().verify_key.fingerprint


def commands(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command and group, as words after ``lacuna``."""
    found = [path]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            found += commands(inner, (*path, name))
    return found


@pytest.mark.parametrize("path", commands(cli), ids=lambda path: "-".join(path) or "lacuna")
def test_help_of_every_command_is_the_snapshot(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(cli, [*path, "--help"], prog_name="lacuna", terminal_width=80)
    assert result.exit_code == 0
    snapshot = SNAPSHOTS / f"{'-'.join(('lacuna', *path))}.txt"
    if os.environ.get("LACUNA_WRITE_SNAPSHOTS"):
        snapshot.write_text(result.output, encoding="utf-8")
    assert result.output == snapshot.read_text(encoding="utf-8"), "see the first lines of this file"


def test_no_snapshot_is_of_a_command_that_is_gone() -> None:
    expected = {f"{'-'.join(('lacuna', *path))}.txt" for path in commands(cli)}
    assert {path.name for path in SNAPSHOTS.iterdir()} == expected


class Told:
    """What a person saw: exit code, standard output, standard error."""

    def __init__(self, code: Any, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Call ``lacuna`` as the console script does, with its state in an empty folder."""
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters"))
    monkeypatch.delenv("LACUNA_TRACEBACK", raising=False)
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Told:
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err + shown.out
        return Told(stop.value.code, shown.out, shown.err)

    return call


WRONG: list[tuple[str, int | None, str]] = [
    ("", 2, "Usage: lacuna"),
    ("nonsense", 2, "No such command"),
    ("site", 2, "Usage: lacuna site"),
    ("site init", 2, "--name"),
    ("site init --name Bad_Name", 2, "is not a name"),
    ("site request --out r.json", 10, "no site is set up"),
    ("site policy", 10, "cannot be read"),
    ("site install-certificate missing", 2, "cannot be read"),
    ("site export-sheet --out s.json", 10, "no site is set up|cannot be read"),
    ("site import-sheet missing --fingerprint f", 2, "cannot be read"),
    ("coordinator init-network --address nonsense", 2, "HOST:PORT"),
    ("coordinator certify missing --out x", 2, "cannot be read"),
    ("coordinator revoke north --reason x", 20, "no authority"),
    ("coordinator perimeter --out p", 20, "no network set up"),
    ("coordinator register-nodes --flwr-home missing", 2, "config.toml"),
    ("site perimeter --out p", 10, "has no certificate"),
    ("site doctor --socket /none.sock --perimeter 127.0.0.1:1 --node-port 1", 10, "how to mend it"),
    ("site health --socket /none.sock", 10, "does not answer"),
    ("site metrics --listen 0.0.0.0:9100", 2, "cannot be read|loopback"),
    ("coordinator doctor --perimeter p --superlink-port 1", 20, "how to mend it"),
    ("coordinator health --perimeter p", 20, "is missing"),
    ("coordinator metrics --study s", 20, "no study 's'"),
    ("coordinator renew-server", 20, "no network set up"),
    ("site budget", 10, "cannot be read"),
    ("site serve", 2, "none is approved"),
    ("site status study", 10, "has not approved"),
    ("site audit study --veto", 10, "has not approved"),
    ("site approve missing", 20, "not a plan package"),
    ("site approve-release missing --out x", 2, "none is approved"),
    ("site import --plan missing", 2, "give one source"),
    ("site import --plan missing --nifti x", 20, "not a plan package"),
    ("site import --plan missing --nifti x --dicom y", 2, "give one source"),
    ("coordinator init Bad_Name", 2, "is not a name"),
    ("coordinator enrol missing --study s --fingerprint f", 2, "cannot be read"),
    ("coordinator status --study s", 20, "no study 's'"),
    ("coordinator plan sign --study s", 20, "cannot be read|no study"),
    ("coordinator plan new --study s --rare rare --declared-patients 10", 20, "no study 's'"),
    ("coordinator gate --study s", 20, "no study 's'"),
    ("coordinator release --study s", 20, "no study 's'"),
    ("coordinator launch --study s --flwr-home missing", 2, "config.toml"),
    ("coordinator compare --study s --condition c --label l", 20, "no study 's'"),
    ("compliance budget missing.json", None, "missing.json"),
    ("compliance verify missing", 40, "missing"),
    ("compliance approve d --plan missing --out x", 20, "not a plan package"),
    ("compliance init --name Bad_Name --out r.json", 2, "is not a name"),
    ("demo --data x", 2, "belong together"),
    ("demo --sites 2", 2, "--sites"),
]


@pytest.mark.parametrize(("words", "code", "told"), WRONG, ids=[words or "nothing" for words, _, _ in WRONG])
def test_errors_say_what_is_wrong_with_a_documented_code(
    run: Any, words: str, code: int | None, told: str
) -> None:
    result = run(*words.split())
    assert result.code in {*ExitCode} - {ExitCode.DONE, ExitCode.BUG}
    assert code is None or result.code == code
    assert re.search(told, result.err + result.out)


def test_what_is_no_error_of_ours_is_called_a_bug(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("1/0")

    monkeypatch.setattr(SiteHome, "default", fail)
    result = run("site", "policy")
    assert result.code == ExitCode.BUG
    assert "LACUNA_TRACEBACK=1" in result.err
    monkeypatch.setenv("LACUNA_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        main(["site", "policy"])


def test_the_way_of_a_hospitals_keys(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """init, request, pin and policy, then the coordinator's enrolment with the fingerprint read aloud."""
    made = run("site", "init", "--name", "north")
    assert made.code == 0
    fingerprint = next(
        line.split(": ")[1] for line in made.out.splitlines() if line.startswith("fingerprint")
    )
    assert run("site", "init", "--name", "north").code == ExitCode.SITE_MUST_ACT
    assert run("site", "request", "--out", "north.json").code == 0
    assert run("site", "pin", "south", "SHA256:nonsense").code == ExitCode.SITE_MUST_ACT
    assert run("site", "pin", "south", FINGERPRINT).code == 0
    assert run("site", "policy", "--set", "max_epsilon=3").out == "max_epsilon = 3.0\n"
    assert "max_epsilon = 3" in run("site", "policy").out
    assert run("site", "policy", "--set", "max_epsilonn=3").code == ExitCode.SITE_MUST_ACT
    assert FINGERPRINT in run("site", "policy").out
    budget = json.loads(run("site", "budget", "--json").out)
    assert budget["total"]["epsilon"] == 0
    assert run("coordinator", "init", "trial").code == 0
    wrong = run("coordinator", "enrol", "north.json", "--study", "trial", "--fingerprint", FINGERPRINT)
    assert wrong.code == ExitCode.REFUSED
    right = run("coordinator", "enrol", "north.json", "--study", "trial", "--fingerprint", fingerprint)
    assert right.code == 0
    words = ["enrol", "north.json", "--study", "trial", "--fingerprint", fingerprint, "--out", "north.pem"]
    assert run("coordinator", *words).code == ExitCode.COORDINATOR_MUST_ACT
    assert run("coordinator", "init-network", "--address", "127.0.0.1:8443").code == 0
    assert run("coordinator", *words).code == 0
    coordinators = run("coordinator", "init", "second").out.split("to pin: ")[1].strip()
    assert "no coordinator is pinned" in run("site", "install-certificate", "north.pem").err
    assert run("site", "pin", "coordinator", coordinators).code == 0
    assert "127.0.0.1:8443" in run("site", "install-certificate", "north.pem").out
    assert run("site", "request", "--out", "again.json").code == ExitCode.SITE_MUST_ACT
    assert run("site", "request", "--renew", "--out", "again.json").code == 0
    assert run("coordinator", "certify", "again.json", "--out", "north.2.pem").code == 0
    assert run("site", "install-certificate", "north.2.pem").code == 0
    assert run("site", "perimeter", "--out", "site-perimeter").code == 0
    assert "lets in north" in run("coordinator", "perimeter", "--out", "perimeter").out
    private = [*(tmp_path / "perimeter").glob("*/*"), *(tmp_path / "site-perimeter").glob("*/*")]
    assert {path.stat().st_mode & 0o077 for path in private if path.suffix != ".pem"} == {0}
    assert run("site", "export-sheet", "--out", "sheet.json").code == 0
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path / "east"))
    monkeypatch.setenv("LACUNA_COUNTER_DIR", str(tmp_path / "counters-east"))
    assert run("site", "init", "--name", "east").code == 0
    read = run("site", "import-sheet", "sheet.json", "--fingerprint", fingerprint, "--all")
    assert read.code == 0
    assert "south" in read.out
    assert coordinators in run("site", "policy").out
    assert run("site", "import-sheet", "sheet.json", "--fingerprint", FINGERPRINT).code == ExitCode.REFUSED
    monkeypatch.setenv("LACUNA_HOME", str(tmp_path / "home"))
    assert len(json.loads(run("coordinator", "certificates", "--json").out)) == 2
    assert run("coordinator", "revoke", "north", "--reason", "test").code == 0
    assert "revoked: test" in run("coordinator", "certificates").out
    assert run("coordinator", "plan", "sign", "--study", "trial").code == ExitCode.COORDINATOR_MUST_ACT
    (tmp_path / "junk.json").write_bytes(b"junk")
    junk = run("coordinator", "enrol", "junk.json", "--study", "trial", "--fingerprint", fingerprint)
    assert junk.code == ExitCode.PEER_MISBEHAVED


def test_a_plan_that_breaks_the_policy_is_refused_and_not_kept(run: Any, tmp_path: Path) -> None:
    package = write_small_package(tmp_path / "package")
    assert run("site", "init", "--name", "site-0").code == 0
    result = run("site", "approve", str(package.root))
    assert result.code == ExitCode.REFUSED
    for clause in ("coordinator_fingerprint", "peers: 'site-1'", "roster: the key given for this site"):
        assert clause in result.err
    assert run("site", "serve", package.plan.study_id).code == ExitCode.SITE_MUST_ACT
    assert not (tmp_path / "home" / "site" / package.plan.study_id / "plan").exists()


def test_simulated_scans_are_written_to_a_new_folder_and_can_be_imported(run: Any, tmp_path: Path) -> None:
    init_site(SiteHome(tmp_path / "home" / "site"), name="site-0")
    folder, plan = str(tmp_path / "scans"), str(write_small_package(tmp_path / "package").root)
    made = run("site", "simulate", "--out", folder, "--patients", "4", "--seed", "3")
    assert made.code == 0, made.err
    assert "of 4 simulated patients" in made.out
    assert run("site", "simulate", "--out", folder, "--seed", "4").code == ExitCode.USAGE
    imported = run("site", "import", "--plan", plan, "--nifti", folder, "--json")
    assert imported.code == 0, imported.err
    assert len(json.loads(imported.out)["imported"]) >= 4


def test_a_plan_within_the_policy_is_approved_once_and_copied_whole(run: Any, tmp_path: Path) -> None:
    """Strangers' files in the package are not taken along, and another plan of that name is refused."""
    home = SiteHome(tmp_path / "home" / "site")
    init_site(home, name="site-0")
    package = write_small_package(tmp_path / "package", first=home.identity())
    (package.root / "extra.sh").write_text("rm -rf /")
    roster = package.plan.roster
    for name, key in (
        ("coordinator", roster.coordinator_key),
        ("officer", roster.officer_key),
        *((site.site_id, site.identity_key) for site in roster.sites[1:]),
    ):
        assert run("site", "pin", name, VerifyKey.from_hex(key).fingerprint).code == 0
    approved = run("site", "approve", str(package.root))
    assert approved.code == 0, approved.err
    assert "epsilon 8" in approved.out
    kept = sorted(path.name for path in (home.study(package.plan.study_id) / "plan").iterdir())
    assert kept == [
        "autoencoder.safetensors",
        "plan.dsse.json",
        "plan.json",
        "plan.toml",
        "prior.safetensors",
    ]
    assert "already" in run("site", "approve", str(package.root)).out
    (package.root / "prior.safetensors").write_bytes(b"x")
    damaged = run("site", "approve", str(package.root))
    assert damaged.code == ExitCode.COORDINATOR_MUST_ACT
    assert "prior.safetensors" in damaged.err
    assert run("site", "status").code == ExitCode.SITE_MUST_ACT
    assert run("site", "audit").code == ExitCode.SITE_MUST_ACT
    assert run("site", "audit", "--veto").code == 0
    (study,) = json.loads(run("site", "budget", "--json").out)["studies"]
    assert study["reserved"] == pytest.approx(8.0, rel=1e-3)


def test_the_officers_request(run: Any, tmp_path: Path) -> None:
    assert run("compliance", "init", "--name", "dr-x", "--out", "o.json").code == 0
    key = tmp_path / "home" / "compliance" / "officer.key"
    assert key.stat().st_mode & 0o777 == 0o600
    assert run("compliance", "init", "--name", "dr-x", "--out", "o.json").code == ExitCode.SITE_MUST_ACT


def test_text_from_elsewhere_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("site [x]", ["reason"], [["[/bold] [red]lost[/red]"]])
    shown = capsys.readouterr().out
    assert "[/bold] [red]lost[/red]" in shown
    assert "site [x]" in shown


def test_every_error_family_has_a_documented_code() -> None:
    def families(cls: type[LacunaError]) -> set[type[LacunaError]]:
        return {cls}.union(*(families(child) for child in cls.__subclasses__()))

    assert {family.exit_code for family in families(LacunaError)} <= set(ExitCode)
    text = CliRunner().invoke(cli, ["--help"]).output
    for code in ExitCode:
        assert f"{int(code)} " in text


HEAVY = ("torch", "monai", "opacus", "flwr", "pandas", "scipy", "numpy", "matplotlib", "grpc")
BASE = ("torch", "monai", "opacus", "flwr", "nibabel", "matplotlib", "server", "einops", "safetensors")


def subprocess_modules(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after running the code."""
    tail = "\nimport sys\nprint(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_help_imports_nothing_heavy() -> None:
    modules = subprocess_modules(
        "from deploy.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    )
    assert "click" in modules
    assert not modules & set(HEAVY)


def test_the_officers_commands_run_where_no_torch_is_installed(tmp_path: Path) -> None:
    """torch, Flower and the server's code are blocked: verify, budget and approve still answer."""
    ledger = tmp_path / "ledger.json"
    ledger.write_bytes(b"{}")
    calls = "\n".join(
        f"try: main({words!r})\nexcept SystemExit as stop: print('exit', stop.code, file=sys.stderr)\n"
        for words in (
            ["compliance", "verify", str(tmp_path)],
            ["compliance", "budget", str(ledger)],
            ["compliance", "approve", str(ledger), "--plan", str(tmp_path), "--out", str(tmp_path / "a")],
        )
    )
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {BASE!r}:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "from deploy.cli.main import main\n"
        f"{calls}\nimport privacy.compliance.approvals, privacy.compliance.verify\n"
        "import privacy.compliance.budget\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "LACUNA_HOME": str(tmp_path / "home")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("exit")]
    assert len(codes) == 3
    assert not {ExitCode.BUG, ExitCode.DONE} & set(codes), done.stderr


def test_a_plan_whose_sums_could_wrap_is_not_signed(run: Any, tmp_path: Path) -> None:
    (tmp_path / "home" / "coordinator" / "small").mkdir(parents=True)
    draft = CoordinatorHome(tmp_path / "home" / "coordinator").draft_path("small")
    plan = small_plan()
    wide = plan.model_copy(
        update={"secure_aggregation": plan.secure_aggregation.model_copy(update={"clamp_steps": 2**30})}
    )
    draft.write_text(wide.to_toml())
    told = run("coordinator", "plan", "sign", "--study", "small")
    assert told.code == 20
    assert "the training sum of 3 sites can leave the range of 32 bits" in told.err
    assert not (draft.parent / "plan").exists()


def test_a_plan_may_train_any_subset() -> None:
    """The command line lists them itself, so that its help needs no plan's schema."""
    from deploy.cli.coordinator import command
    from shared.model.denoiser import PRIVATE_SUBSETS
    from shared.study_plan import TrainableSubset

    offered = [p.type for p in command.commands["plan"].commands["new"].params if p.name == "trainable"]
    assert set(offered[0].choices) == set(PRIVATE_SUBSETS) == set(get_args(TrainableSubset))
