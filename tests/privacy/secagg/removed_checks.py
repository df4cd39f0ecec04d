"""Takes single checks out of the real code: a raise, or any other statement, is no longer executed.

A check is named ``module:function: statement`` and found in the module's source as it is on disk. The
function's code object is replaced in place, so that every reference to the function sees it; leaving the
context puts the original back.
"""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType
from typing import Any


@functools.cache
def _functions(module_name: str) -> dict[str, ast.FunctionDef]:
    """Every function of a module by qualified name; nested functions belong to the outer one."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module_name)))
    found: dict[str, ast.FunctionDef] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{item.name}": item for item in node.body if isinstance(item, ast.FunctionDef)
            }
    return found


def summary(statement: ast.stmt) -> str:
    """A raise by its error and reason, anything else by its source."""
    if not isinstance(statement, ast.Raise) or not isinstance(statement.exc, ast.Call):
        return ast.unparse(statement)
    call = statement.exc
    reasons = [
        ast.unparse(item)
        for item in call.args
        if isinstance(item, ast.Attribute) and "Reason" in ast.unparse(item)
    ]
    if reasons:
        return "raise " + reasons[0]
    words = [ast.unparse(item)[:60] for item in call.args[:1]]
    return f"raise {ast.unparse(call.func)}({', '.join(words)})"


def raises(module_name: str) -> list[str]:
    """Names of all checks of a module: every raise statement that makes an error of its own."""
    names = []
    for function, node in _functions(module_name).items():
        statements = [item for item in ast.walk(node) if isinstance(item, ast.Raise) and item.exc is not None]
        statements.sort(key=lambda item: item.lineno)
        seen: dict[str, int] = {}
        for statement in statements:
            text = summary(statement)
            seen[text] = seen.get(text, 0) + 1
            suffix = f" #{seen[text]}" if seen[text] > 1 else ""
            names.append(f"{module_name}:{function}: {text}{suffix}")
    return names


class _Remover(ast.NodeTransformer):
    """Replaces the given statements (text, and which of those with the same text) by ``pass``."""

    def __init__(self, wanted: set[tuple[str, int]]) -> None:
        self.wanted = wanted
        self.hits: dict[str, int] = {}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef):
            text = summary(node)
            self.hits[text] = self.hits.get(text, 0) + 1
            if (text, self.hits[text]) in self.wanted:
                self.wanted.discard((text, self.hits[text]))
                return ast.copy_location(ast.Pass(), node)
        return super().generic_visit(node)


def _without(module: Any, function: str, wanted: set[tuple[str, int]]) -> CodeType:
    source = copy.deepcopy(_functions(module.__name__)[function])
    source.decorator_list, source.returns = [], None
    source.args.defaults, source.args.kw_defaults = [], [None] * len(source.args.kwonlyargs)
    for argument in ast.walk(source.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    tree = _Remover(wanted).visit(ast.Module(body=[source], type_ignores=[]))
    if wanted:
        raise LookupError(f"{module.__name__}:{function} has no statement {wanted}")
    namespace: dict[str, Any] = {}
    code = compile(ast.fix_missing_locations(tree), f"<{function}, changed>", "exec", dont_inherit=True)
    exec(code, {"__name__": module.__name__}, namespace)  # noqa: S102
    changed: CodeType = namespace[source.name].__code__
    return changed


def _function(module: Any, qualified: str) -> FunctionType:
    owner, _, name = qualified.rpartition(".")
    target = inspect.getattr_static(getattr(module, owner) if owner else module, name)
    if isinstance(target, property):
        target = target.fget
    elif isinstance(target, classmethod | staticmethod):
        target = target.__func__
    target = inspect.unwrap(target)
    assert isinstance(target, FunctionType), qualified
    return target


@contextmanager
def removed(*checks: str) -> Iterator[None]:
    """Run without these checks.

    Raises:
        LookupError: the code has no such statement any more: the name is out of date.
    """
    by_function: dict[tuple[str, str], set[tuple[str, int]]] = {}
    for check in checks:
        module_name, function, text = (part.strip() for part in check.split(":", 2))
        text, _, number = text.partition(" #")
        by_function.setdefault((module_name, function), set()).add((text, int(number or 1)))
    with ExitStack() as stack:
        for (module_name, function), wanted in by_function.items():
            module = importlib.import_module(module_name)
            target = _function(module, function)
            changed = _without(module, function, wanted)
            stack.callback(setattr, target, "__code__", target.__code__)
            target.__code__ = changed
        yield
