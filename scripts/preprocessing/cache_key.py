"""The key of a cached result: transforms described and files digested, so that equal ones are found equal anywhere.

A transform is known by its class and attributes. A class or function is known by name where it comes from one of
`LIBRARIES`, whose versions belong to the key, and by its definition where it does not, see `preprocessing.definition`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import types
from collections.abc import Callable, Mapping
from enum import Enum
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from monai.data import ImageReader

from ..data.images import parts
from ..utils.files import sha256
from .definition import LIBRARIES, definitions, is_library

SHA256 = re.compile(r"\['[0-9a-f]{64}'\]")  # alone in a list
CACHE_VERSION = 1  # raised by hand where results must be made anew although no definition has changed


def versions() -> dict[str, str | int]:
    """Name the versions that results depend on: the cache's own, and the libraries' without the suffix of a build."""
    return {"cache": CACHE_VERSION, **{name: version(name).split("+")[0] for name in LIBRARIES}}


def description(value: object) -> object:
    """Describe what decides the outcome of a transform, as JSON that is the same in every process.

    Objects are described by class and attributes, arrays by value, functions and classes as the module says.

    Raises:
        TypeError: a value of which nothing can be said that holds in another process.
    """
    for kinds, describe in DESCRIPTIONS:
        if isinstance(value, kinds):
            return describe(value)
    if hasattr(value, "__dict__"):
        return {"class": _origin(type(value)), **{name: description(v) for name, v in _attributes(value).items()}}
    raise TypeError(f"{value!r} cannot be described, so that results that depend on it cannot be kept.")


def _array(value: torch.Tensor | np.ndarray | np.generic) -> list:
    array = np.asarray(value)
    return [str(array.dtype), array.tolist() if array.size <= 64 else [array.shape, _sha256(array.tobytes())]]


def _attributes(value: object) -> dict:
    """List an object's attributes, without what MONAI's readers and transforms note down in themselves as they run."""
    noted = "filenames" if isinstance(value, ImageReader) else None
    return {k: v for k, v in sorted(vars(value).items()) if k != noted and not isinstance(v, threading.local)}


def _origin(thing: type | types.FunctionType | types.BuiltinFunctionType) -> object:
    """Describe a class or function: its name, beyond `LIBRARIES` also its definition, and what a function remembers."""
    name = f"{thing.__module__}.{thing.__qualname__}"
    if is_library(thing.__module__):
        return name
    found: list[object] = [name, digest({key: description(part) for key, part in definitions(thing).items()})]
    if isinstance(thing, types.FunctionType):
        closure = [cell.cell_contents for cell in thing.__closure__ or ()]
        found += [description(thing.__defaults__), description(closure)]
    return found


DESCRIPTIONS: list[tuple[type | types.UnionType, Callable]] = [  # the first that fits
    (Enum, lambda value: f"{type(value).__qualname__}.{value.name}"),
    (types.NoneType | bool | int | float | str, lambda value: value),
    (torch.Tensor | np.ndarray | np.generic, _array),
    (Mapping, lambda value: {str(description(key)): description(entry) for key, entry in value.items()}),
    (set | frozenset, lambda value: sorted((description(entry) for entry in value), key=json.dumps)),
    (list | tuple, lambda value: [description(entry) for entry in value]),
    (torch.dtype | torch.device | np.dtype | Path | bytes | complex | range | slice | types.EllipsisType, repr),
    (types.CodeType, lambda code: [code.co_code.hex(), code.co_names, description(code.co_consts)]),
    (types.MethodType, lambda value: [description(value.__self__), value.__name__]),
    (functools.partial, lambda value: [description(part) for part in (value.func, value.args, value.keywords)]),
    (type | types.FunctionType | types.BuiltinFunctionType, _origin),
]


def digest(content: object) -> str:
    """Compute the sha256 of anything that JSON can hold."""
    return _sha256(json.dumps(content, sort_keys=True).encode())


def file_digest(path: str, known: dict) -> str:
    """Compute the sha256 of a file; `known` remembers it for as long as size and time stay."""
    name, signature = _state(path)
    if not _is_known(known.get(name), signature):
        known[name] = [*signature, sha256(path)]
    return known[name][2]


def is_digested(path: str, known: dict) -> bool:
    """Say whether `known` remembers the digest of an image, so that nothing of it has to be read."""
    states = map(_state, parts(path))
    return all(_is_known(known.get(name), signature) for name, signature in states)


def _state(path: str) -> tuple[str, list[int]]:
    state = Path(path).stat()
    return str(Path(path).resolve()), [state.st_size, state.st_mtime_ns]


def _is_known(before: object, signature: list[int]) -> bool:
    return isinstance(before, list) and before[:2] == signature and bool(SHA256.fullmatch(str(before[2:])))


def image_digest(path: str, known: dict) -> str:
    """Compute the sha256 of an image: of its file, or of those of all its parts."""
    found = [file_digest(part, known) for part in parts(path)]
    return found[0] if len(found) == 1 else digest(found)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
