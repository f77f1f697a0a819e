"""Files appear whole or not at all."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put that in the place of `path`; missing folders are made.

    Several processes may write the same file at once: each fills one of its own, and the last one stays. Where `write`
    fails nothing is left behind and what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remembered(path: Path) -> dict:
    """Return what an earlier run left in a JSON file, or {} where there is no such file or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
