"""What OPERATING.md and README tell people to type exists: commands, options, files, users."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from deploy.cli.main import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "deploy" / "OPERATING.md", ROOT / "README.md"]
SHORT = {"site": ("site",), "coordinator": ("coordinator",), "lacuna": ()}


def typed(page: Path) -> list[list[str]]:
    """Words after ``lacuna`` of every command in the page's shell blocks."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:
                continue  # a line of a program in quotes
            while words and re.match(r"[A-Z_]+=", words[0]):
                words = words[1:]
            if words[:1] == ["unshare"] and "lacuna" in words:
                words = words[words.index("lacuna") :]
            if words and words[0] in SHORT:
                found.append([*SHORT[words[0]], *words[1:]])
    return found


def resolve(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = cli
    context = click.Context(command)
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        inner = command.get_command(context, rest[0])
        assert inner is not None, f"lacuna {' '.join(words)}: there is no command {rest[0]!r}"
        command, rest = inner, rest[1:]
    return command, rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page: Path) -> None:
    commands = typed(page)
    assert len(commands) > 15
    for words in commands:
        command, rest = resolve(words)
        known = {name for parameter in command.params for name in parameter.opts}
        used = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert used <= known | {"--help"}, f"lacuna {' '.join(words)}"


def test_a_command_that_is_gone_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\nsite perimeters --out x   # wrong\nlacuna site status --nonsense\n```\n")
    first, second = typed(page)
    with pytest.raises(AssertionError, match="no command 'perimeters'"):
        resolve(first)
    assert second == ["site", "status", "--nonsense"]


def test_files_that_the_page_installs_are_there() -> None:
    text = PAGES[0].read_text()
    for path in re.findall(r"deploy/(?:systemd|compose|docker|nginx)/[\w.@{},-]+", text):
        stem, braces, rest = path.partition("{")
        names = [f"{stem}{name}{rest.partition('}')[2]}" for name in rest.partition("}")[0].split(",")]
        for name in names if braces else [path.rstrip(".,")]:
            assert (ROOT / name).exists() or list((ROOT / "deploy").glob(f"{name[7:]}*")), name
    for user in set(
        re.findall(r"lacuna-(?:agent|supernode|courier|perimeter|superlink|coordinator)\b", text)
    ):
        users = "".join(path.read_text() for path in (ROOT / "deploy" / "systemd").glob("*.sysusers"))
        assert f" {user} " in users, user
