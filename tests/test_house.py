"""The house's rules that a linter does not know: small modules, honest names, nothing unpickled.

Which package may import which is checked by ``lint-imports`` in ``make check``.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("client", "server", "shared", "privacy", "deploy")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
VAGUE = {"util", "utils", "helper", "helpers", "common", "misc", "manager", "managers", "tools", "stuff"}
MAX_LINES = 600

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FORBIDDEN_CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load")}
NOISE = [ROOT / "privacy" / name for name in ("dp", "secagg")]
GLOBAL_GENERATORS = {
    ("torch", name) for name in ("randn", "rand", "randint", "normal", "randperm", "bernoulli")
}
GLOBAL_GENERATORS |= {("torch", "randn_like"), ("torch", "rand_like"), ("np", "random"), ("numpy", "random")}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def uses(tree: ast.AST) -> tuple[set[str], set[tuple[str, str]]]:
    """Top-level names of imported modules, and (name, attribute) pairs."""
    imported: set[str] = set()
    attributes: set[tuple[str, str]] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
            attributes |= {(node.module.split(".")[0], alias.name) for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            attributes.add((node.value.id, node.attr))
    return imported, attributes


def test_there_are_modules_to_look_at() -> None:
    assert len(MODULES) > 100


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_is_over_600_lines(package: str) -> None:
    lengths = {name_of(p): len(p.read_text().splitlines()) for p in MODULES if name_of(p).startswith(package)}
    assert not {name: lines for name, lines in lengths.items() if lines > MAX_LINES}


def test_no_module_or_folder_has_a_vague_name() -> None:
    named = {name_of(path): set(path.with_suffix("").relative_to(ROOT).parts) for path in MODULES}
    words = {name: {word for part in parts for word in part.split("_")} for name, parts in named.items()}
    assert not {name for name, found in words.items() if found & VAGUE}


def test_nothing_is_unpickled_and_weights_never_pass_through_torch_load() -> None:
    faults = []
    for path in MODULES:
        imported, attributes = uses(ast.parse(path.read_text()))
        faults += [f"{name_of(path)}: {name}" for name in imported & FORBIDDEN_MODULES]
        faults += [f"{name_of(path)}: {'.'.join(pair)}" for pair in attributes & FORBIDDEN_CALLS]
    assert not faults


def seedable_calls(tree: ast.AST) -> set[tuple[str, str]]:
    """Uses of generators that anybody in the process may have seeded: calls without one of their own."""
    with_own = {
        id(node.func)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and any(keyword.arg == "generator" for keyword in node.keywords)
    }
    return {
        (node.value.id, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and id(node) not in with_own
    } & GLOBAL_GENERATORS


def test_no_generator_that_can_be_seeded_is_near_noise_masks_or_coins() -> None:
    """Public self-checks may pass a generator of their own; what is secret is drawn from SecretRandom."""
    faults = []
    for path in MODULES:
        if any(path.is_relative_to(folder) for folder in NOISE):
            tree = ast.parse(path.read_text())
            imported, _ = uses(tree)
            faults += [f"{name_of(path)}: random"] if "random" in imported else []
            faults += [f"{name_of(path)}: {'.'.join(pair)}" for pair in seedable_calls(tree)]
    assert not faults


def test_these_rules_can_fail() -> None:
    """The reader of code sees each thing that the rules forbid."""
    code = "import pickle\nfrom torch import load\nimport numpy as np\nnp.random.normal()\ntorch.randn(3)\n"
    imported, attributes = uses(ast.parse(code))
    assert imported & FORBIDDEN_MODULES == {"pickle"}
    assert attributes & FORBIDDEN_CALLS == {("torch", "load")}
    assert seedable_calls(ast.parse(code)) == {("np", "random"), ("torch", "randn")}
    assert not seedable_calls(ast.parse("torch.randn(3, generator=own)"))
