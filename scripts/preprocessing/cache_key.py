"""What decides a result: transforms described and files digested, so that equal ones are found equal anywhere."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import sys
import threading
import types
from collections.abc import Mapping
from enum import Enum
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from monai.data import ImageReader

LIBRARIES = ("monai", "nibabel", "numpy", "scipy", "torch")  # known by their versions, all other code by its source


def versions() -> dict[str, str]:
    """Of the libraries that results depend on, without the suffix of a build."""
    return {name: version(name).split("+")[0] for name in LIBRARIES}


def description(value: object) -> object:
    """What decides the outcome of a transform, as JSON that is the same in every process.

    Objects by class and attributes, arrays by value, functions by name; what does not come from `LIBRARIES` also by its
    source, so that an edited transform is another one.

    Raises:
        TypeError: a value of which nothing can be said that holds in another process.
    """
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        array = np.asarray(value)
        return [str(array.dtype), array.tolist() if array.size <= 64 else [array.shape, _sha256(array.tobytes())]]
    if isinstance(value, Mapping):
        return {str(description(key)): description(entry) for key, entry in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((description(entry) for entry in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [description(entry) for entry in value]
    if isinstance(value, torch.dtype | torch.device | np.dtype | Path | bytes | complex | range | slice):
        return repr(value)
    if isinstance(value, types.CodeType):
        return [value.co_code.hex(), value.co_names, description(value.co_consts)]
    if isinstance(value, types.MethodType):
        return [description(value.__self__), value.__name__]
    if isinstance(value, functools.partial):
        return [description(part) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        return _origin(value)
    if hasattr(value, "__dict__"):
        return {"class": _origin(type(value)), **{name: description(v) for name, v in _attributes(value).items()}}
    raise TypeError(f"{value!r} cannot be described, so that results that depend on it cannot be kept.")


def _attributes(value: object) -> dict:
    """An object's attributes, without what MONAI's readers and transforms note down in themselves while they run."""
    noted = "filenames" if isinstance(value, ImageReader) else None
    return {k: v for k, v in sorted(vars(value).items()) if k != noted and not isinstance(v, threading.local)}


def _origin(thing: type | types.FunctionType | types.BuiltinFunctionType) -> object:
    """Name of a class or function; beyond `LIBRARIES` also its source file's digest, a function's code and closure."""
    name = f"{thing.__module__}.{thing.__qualname__}"
    if name.split(".")[0] in {*LIBRARIES, *sys.stdlib_module_names}:
        return name
    source = Path(inspect.getfile(thing))
    found = [name, _sha256(source.read_bytes()) if source.is_file() else None]
    if isinstance(thing, types.FunctionType):
        closure = [cell.cell_contents for cell in thing.__closure__ or ()]
        found += [description(part) for part in (thing.__code__, thing.__defaults__, closure)]
    return found


def digest(content: object) -> str:
    """sha256 of anything that JSON can hold."""
    return _sha256(json.dumps(content, sort_keys=True).encode())


def file_digest(path: str, known: dict) -> str:
    """sha256 of a file; `known` remembers it for as long as size and time stay."""
    state = Path(path).stat()
    signature, name = [state.st_size, state.st_mtime_ns], str(Path(path).resolve())
    if known.get(name, [])[:2] != signature:
        found = hashlib.sha256()
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(2**20), b""):
                found.update(block)
        known[name] = [*signature, found.hexdigest()]
    return known[name][2]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
