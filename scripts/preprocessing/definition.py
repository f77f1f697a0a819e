"""The definition of a class or function: its own source, and that of whatever it names outside the libraries.

Comments, docstrings, annotations and layout are no part of it, nor are neighbours in the same file that it does not
name. A helper, a base class, a table or a constant that it names is, and so on. What is imported inside a function is
not followed.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch

LIBRARIES = ("monai", "nibabel", "numpy", "scipy", "torch")  # known by their versions, all other code by its source
PLAIN = bool | int | float | complex | str | bytes | Enum | np.ndarray | torch.Tensor | torch.dtype

Definable = type | types.FunctionType


def is_library(module: str | None) -> bool:
    """Say whether a module, None for code that has none, belongs to `LIBRARIES` or to Python itself."""
    top = str(module).split(".")[0]
    return top in LIBRARIES or top in sys.stdlib_module_names


def definitions(thing: object) -> dict[str, object]:
    """Collect the definition of a class or function and of all that it names.

    Returns:
        By the name under which it was found, of each class and function the source in a normal form, or the code where
        there is no source of its own (a lambda, or what was typed in); of each constant the value.
    """
    found: dict[str, object] = {}
    seen: dict[int, object] = {}  # keeps them alive, so that no identity is given twice
    pending: list[tuple[str, object]] = [("", thing)]
    while pending:
        name, value = pending.pop()
        value = inspect.unwrap(value) if callable(value) else value
        if isinstance(value, PLAIN):
            found[name] = value
        elif id(value) not in seen:
            seen[id(value)] = value
            if isinstance(value, Definable):
                if not is_library(value.__module__):
                    found[name], names, attributes = _read(value)
                    pending += _named(value, names, attributes)
            else:
                pending += _parts(name, value)
    return found


def _parts(name: str, value: object) -> Iterator[tuple[str, object]]:
    """List what a table, a partial function, a pattern or an object of a class of ours consists of."""
    if isinstance(value, Mapping):
        parts = [*value, *value.values()]
    elif isinstance(value, list | tuple):
        parts = list(value)
    elif isinstance(value, set | frozenset):
        parts = sorted(value, key=repr)
    elif isinstance(value, functools.partial):
        parts = [value.func, value.args, value.keywords]
    elif isinstance(value, re.Pattern):
        parts = [value.pattern, value.flags]
    else:
        parts = [] if is_library(type(value).__module__) else [type(value), getattr(value, "__dict__", {})]
    yield from ((f"{name}[{place}]", part) for place, part in enumerate(parts))


def _read(thing: Definable) -> tuple[object, frozenset[str], frozenset[str]]:
    """Read a class or function: its normal form, the names in it, and the attributes that are taken of something."""
    try:
        return _read_source(thing)
    except (OSError, TypeError, SyntaxError):
        codes = [function.__code__ for function in _functions(thing)]
        names = frozenset(name for code in _nested(codes) for name in code.co_names)
        return codes, names, names


@functools.cache
def _read_source(thing: Definable) -> tuple[str, frozenset[str], frozenset[str]]:
    """Read what has a source of its own; many transforms name the same helpers."""
    if thing.__name__ == "<lambda>":  # its source is all of the line that it stands in
        raise OSError
    tree = _Bare().visit(ast.parse(textwrap.dedent(inspect.getsource(thing))))
    names = frozenset(node.id for node in ast.walk(tree) if isinstance(node, ast.Name))
    attributes = frozenset(node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return ast.unparse(tree), names, attributes


def _functions(thing: Definable) -> list[types.FunctionType]:
    functions = vars(thing).values() if isinstance(thing, type) else [thing]
    return [function for function in functions if isinstance(function, types.FunctionType)]


def _nested(codes: list[types.CodeType]) -> Iterator[types.CodeType]:
    for code in codes:
        yield code
        yield from _nested([constant for constant in code.co_consts if isinstance(constant, types.CodeType)])


def _named(thing: Definable, names: frozenset[str], attributes: frozenset[str]) -> Iterator[tuple[str, object]]:
    """Look names up where a class or function was defined; of a module of ours, the attributes that may be meant."""
    functions = _functions(thing)
    scope: Mapping[str, Any] = {}
    if functions:
        scope = functions[0].__globals__
    elif thing.__module__ in sys.modules:
        scope = vars(sys.modules[thing.__module__])
    for name in sorted(names & set(scope)):
        value = scope[name]
        if not isinstance(value, types.ModuleType):
            yield f"{thing.__module__}.{name}", value
        elif not is_library(value.__name__):
            yield from ((f"{value.__name__}.{a}", vars(value)[a]) for a in sorted(attributes & set(vars(value))))
    for function in functions:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            yield f"{function.__qualname__}.{name}", cell.cell_contents


class _Bare(ast.NodeTransformer):
    """Removes docstrings and annotations, which decide nothing."""

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        return self._without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        node.returns = None
        return self._without_docstring(node)

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def _without_docstring(self, node: Any) -> Any:
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
        self.generic_visit(node)
        return node
