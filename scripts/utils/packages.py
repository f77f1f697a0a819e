"""Packages that only some formats need: asked for when they are needed, and named where they are missing."""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType

from .errors import UserError

EXTRAS = {
    "itk": ["SimpleITK"],
    "dicom": ["pydicom", "highdicom", "SimpleITK"],
    "onnx": ["onnx", "onnxscript"],
}  # of pyproject.toml
PROJECT = "mednext-bundle"


def require_package(name: str, path: object) -> ModuleType:
    """Import a package, or a module of one.

    Args:
        name: of the module.
        path: the file or folder that needs it, for the message.

    Raises:
        UserError: it is not installed.
    """
    package = name.partition(".")[0]
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(f"{path} needs the package {package}: pip install {_wanted(package)}") from e


def _wanted(package: str) -> str:
    """Name what to install: the project's extra, where the project itself is installed."""
    extra = next(extra for extra, packages in EXTRAS.items() if package in packages)
    try:
        distribution(PROJECT)
    except PackageNotFoundError:
        return " ".join(EXTRAS[extra])
    return f'"{PROJECT}[{extra}]"'
