"""What was measured of the kernels, in a file of the user's cache for each GPU, its versions and these sources."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..utils.errors import UserError
from ..utils.files import remembered, write_text
from .native import cache
from .trial import Result

SOURCES = ("triton*.py", "mlp.py", "backend.py", "reference.py", "trial.py", "exactness.py")

Results = dict[str, dict[str, Result]]  # by the name of a use, then of a backend


def machine(device: torch.device) -> dict[str, str]:
    """Describe what a measurement depends on."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else device.type,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "none",
        "torch": str(torch.__version__),
        "triton": triton,
        "cuda": str(torch.version.cuda),
        "sources": _sources(),
    }


@functools.cache
def _sources() -> str:
    found = hashlib.sha256()
    for file in sorted({f for pattern in SOURCES for f in Path(__file__).parent.glob(pattern)}):
        found.update(file.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def file_for(facts: Mapping[str, str]) -> Path:
    """Name the file for a machine.

    Raises:
        OSError: the cache cannot be used, see `native.cache`.
    """
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return cache() / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', facts['gpu'])}-{key}.json"


def read(facts: Mapping[str, str]) -> Results:
    """Return what is known of a machine; whatever else is in its file is as if it were not there."""
    try:
        blocks = remembered(file_for(facts)).get("blocks")
    except (OSError, UserError):
        return {}
    if not isinstance(blocks, dict):
        return {}
    uses = {name: of_use for name, of_use in blocks.items() if isinstance(of_use, dict)}
    parsed = {name: {who: _result(found) for who, found in of_use.items()} for name, of_use in uses.items()}
    return {name: {who: r for who, r in of_use.items() if r is not None} for name, of_use in parsed.items()}


def _result(found: object) -> Result | None:
    if not isinstance(found, dict):
        return None
    reason, numbers = found.get("left_out"), [found.get(name) for name in Result._fields[:4]]
    if isinstance(reason, str):
        return Result(left_out=" ".join(reason.split())[:200])
    floats = [float(n) for n in numbers if isinstance(n, float | int) and 0 <= n <= 1e6]  # false for what is no number
    if len(floats) < len(numbers) or floats[0] == 0:
        return None
    ratio, spread, milliseconds, stock_milliseconds = floats
    return Result(ratio, spread, milliseconds, stock_milliseconds)


def add(facts: Mapping[str, str], name: str, results: Mapping[str, Result]) -> Path | None:
    """Keep the lasting ones among the results of a use with what is there; return the file if that was possible.

    Processes that write at the same time may lose each other's results, which are then measured again.
    """
    lasting = {who: result for who, result in results.items() if result.lasting}
    known = read(facts)
    blocks = {**known, name: {**known.get(name, {}), **lasting}}
    content = {"machine": dict(facts), "blocks": {n: {w: _plain(r) for w, r in of.items()} for n, of in blocks.items()}}
    try:
        path = file_for(facts)
        write_text(path, json.dumps(content, indent=1) + "\n")
    except (OSError, UserError):
        return None
    return path


def _plain(result: Result) -> dict[str, float | str]:
    fields = {name: value for name, value in result._asdict().items() if name != "lasting" and value is not None}
    return {name: value if isinstance(value, str) else float(f"{value:.4g}") for name, value in fields.items()}
