"""Fingerprints that are remembered in a file, so that no case is read twice while its files stay as they are."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from ..data.images import parts
from ..data.labels import Labels
from ..data.scans import image_files, named_cases
from ..utils.device import loader_workers
from ..utils.errors import UserError
from ..utils.files import check_writable, remembered, write_text
from .fingerprint import fingerprint_case

SAVE_EVERY = 20  # seconds
VERSION = 2  # of what a record holds

logger = logging.getLogger("mednext")


def fingerprint_cases(cases: Sequence[dict], channels: int, labels: Labels, fingerprint_file: str) -> list[dict]:
    """Return the record of each case: `fingerprint_case`'s, with "case", "file" and, where it is unusable, "error".

    Cases that were read before and have not changed since, by size and time of their files, are not read again; what
    has been read is kept at least every 20 seconds, so that an interrupted reading goes on. Of several processes the
    first one reads, and the others take what it found.

    Args:
        cases: with "case", "image" and "label"; one that is named twice has one record.
        channels: image channels that dataset.json names.
        labels: that dataset.json names.
        fingerprint_file: JSON file to remember the records in.
    """
    cases = list({case["case"]: case for case in named_cases(cases)}.values())
    if dist.is_initialized() and dist.get_rank() > 0:
        dist.barrier()
        return _read_cases(cases, channels, labels, Path(fingerprint_file))
    records = _read_cases(cases, channels, labels, Path(fingerprint_file))
    if dist.is_initialized():
        dist.barrier()
    return records


def _read_cases(cases: Sequence[dict], channels: int, labels: Labels, path: Path) -> list[dict]:
    known = remembered(path)
    signatures = {case["label"]: _signature(case, channels, labels) for case in cases}
    pending = [case for case in cases if not _is_whole(known.get(case["label"]), signatures[case["label"]])]

    def attempt(case: dict) -> tuple[dict, dict]:
        try:
            return case, fingerprint_case(case, channels, labels)
        except UserError as e:
            return case, {"error": str(e)}

    if pending:
        check_writable(path.parent)
    saved = time.monotonic()
    pool = ThreadPoolExecutor(loader_workers() + 1)
    try:
        found = pool.map(attempt, pending)
        for case, record in tqdm(found, total=len(pending), desc="reading", disable=not pending):
            # a fault is not remembered: it may have been the disk's or the network's
            signature = None if "error" in record else signatures[case["label"]]
            names = {"case": case["case"], "file": image_files(case)[0], "signature": signature}
            known[case["label"]] = names | record | {"sum": _sum(names | record)}
            if time.monotonic() - saved > SAVE_EVERY:
                _remember(known, path)
                saved = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)  # a command that is stopped waits for what is being read, not for all
        if pending:
            _remember(known, path)
    return [known[case["label"]] for case in cases]


def _is_whole(record: object, signature: list) -> bool:
    """Say whether a record is of these files, and holds what was measured of them."""
    return isinstance(record, dict) and record.get("signature") == signature and record.get("sum") == _sum(record)


def _sum(record: dict) -> str:
    content = {name: value for name, value in record.items() if name != "sum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _remember(known: dict, path: Path) -> None:
    write_text(path, json.dumps(known))


def _signature(case: dict, channels: int, labels: Labels) -> list:
    files = [part for file in (*image_files(case), case["label"]) if Path(file).exists() for part in parts(file)]
    states = [(p, Path(p).stat()) for p in files if Path(p).exists()]
    return [VERSION, channels, labels.values, labels.ignore_value, *([p, s.st_size, s.st_mtime_ns] for p, s in states)]
