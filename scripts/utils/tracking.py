"""What `--tracking mlflow` records beside MONAI's own numbers: the settings of the weights, and files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from monai.handlers import MLFlowHandler

# MONAI's name of the executed configuration, an expression also where the output_dir that it begins with is none
UNWRITTEN = re.compile(r"(.+) \+ '(/config_\w+\.json)'")


def add(handlers: Iterable[object], parameters: Mapping[str, object], *files: str | Path) -> None:
    """Have the trackers among `handlers` record parameters when they start, and files that are there when they end."""
    for handler in _trackers(handlers):
        handler.experiment_param = {**(handler.experiment_param or {}), **parameters}
        handler.artifacts = tuple(UNWRITTEN.sub(r"\1\2", str(file)) for file in (*handler.artifacts, *files) if file)


def finish(handlers: Iterable[object], folder: str | Path, *names: str) -> None:
    """Have the trackers among `handlers` record files of a folder, and end their runs, which MONAI leaves open."""
    for handler in _trackers(handlers):
        handler.artifacts = tuple(str(Path(folder, name)) for name in names)
        handler.complete()
        handler.close()


def _trackers(handlers: Iterable[object]) -> list[MLFlowHandler]:
    from monai.handlers import MLFlowHandler

    return [handler for handler in handlers if isinstance(handler, MLFlowHandler)]
