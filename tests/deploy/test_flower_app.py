"""The app bundle: what is in it, and that it finds the installed packages rather than hiding them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

from deploy.flower_commands import FlowerCommands, flower_executable
from deploy.local_consortium import FLOWER_APP

REPOSITORY = Path(__file__).parents[2]


def test_the_bundle_is_two_shims(tmp_path: Path) -> None:
    # `flwr build` takes no folder with an underscore in its name; `flwr run` does.
    app = tmp_path / "lacuna-app"
    shutil.copytree(FLOWER_APP, app, ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [flower_executable("flwr"), "build", "--app", str(app)],
        env=FlowerCommands(tmp_path).environment("flwr"),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (bundle,) = tmp_path.glob("*.fab")
    assert bundle.stat().st_size < 10_000
    with zipfile.ZipFile(bundle) as archive:
        assert sorted(archive.namelist()) == [
            ".info/CONTENT",
            "lacuna_app/__init__.py",
            "lacuna_app/client_app.py",
            "lacuna_app/server_app.py",
            "pyproject.toml",
        ]
    assert hashlib.sha256(bundle.read_bytes()).hexdigest()[:8] in bundle.name


def test_its_version_is_the_projects() -> None:
    app = tomllib.loads((FLOWER_APP / "pyproject.toml").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert app["project"]["version"] == project["project"]["version"]
    assert app["project"]["dependencies"] == [f"lacuna=={project['project']['version']}"]


def test_the_courier_and_flowers_own_process_load_no_machine_learning() -> None:
    """In the process that Flower starts for each message, loaded as Flower loads it."""
    code = (
        "import sys\n"
        "import flwr.supernode.runtime.run_clientapp\n"
        "from flwr.supercore.object_ref import load_app\n"
        f"app = load_app('lacuna_app.client_app:app', ValueError, {str(FLOWER_APP)!r})\n"
        "import client\n"
        f"assert client.__file__ == {str(REPOSITORY / 'client' / '__init__.py')!r}\n"
        "heavy = {'torch', 'opacus', 'monai', 'safetensors', 'pandas', 'scipy', 'privacy'}\n"
        "print(sorted(heavy & {name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
