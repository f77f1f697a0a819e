"""The cache: results of deterministic transforms on disk, known by content and parameters, read crop by crop.

    folder/digests.json                     sha256 of the data set's files, with the size and time they had
    folder/<transforms>/parameters.json     one folder for each list of transforms, which this file spells out
    folder/<transforms>/<content>.pt        what they made of one case: tensors, mapped into memory, not read whole

The CRC-32s that torch.save writes into an entry are compared once a run, in `prepare`: 0.2 ms for a hippocampus, 32 ms
for 300 x 300 x 300 float32 voxels on one core (SHA-256 alone is 60 ms, blake2b 115 ms). Later only crops are read.

Whoever asks for the same content and transforms shares an entry: training and validation, folds, several runs at once.
Nothing is ever removed; any of it may be, while no run uses it.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
import torch.distributed as dist
from monai.data import Dataset, MetaTensor
from monai.transforms import Compose, MapTransform
from monai.transforms.traits import RandomizableTrait
from torch.utils.data import get_worker_info
from tqdm import tqdm

from ..data.grid import CHANNEL_BYTES, PEAK_BYTES
from ..data.images import is_image, read_header
from ..data.scans import case_id, image_files, named_cases
from ..utils.device import cpu_cores, free_memory
from ..utils.errors import UserError, first_cause
from ..utils.files import is_intact, remembered, write_text, write_whole
from .cache_key import description, digest, image_digest, is_digested, versions
from .loading import CASE

logger = logging.getLogger("mednext")


class CachedDataset(Dataset):
    """MONAI's Dataset whose deterministic transforms run once; only what `transform` reads of their results is in RAM.

    `dataset[i]` is case `i`, cached and then transformed; `dataset[i, foreground]` is the same with the bool
    `foreground` in the dictionary, for a sampler that decides which patches lie on a foreground voxel.

    Args:
        data: cases, see `data.datasets`. What counts of a file is its content, not its name.
        stages: lists of deterministic transforms, one after the other. Each stage's result is stored by itself and
            depends on nothing but the keys of its transforms and of those before, so that one for the image alone
            outlives a new label. A transform without keys reads all of them.
        folder: where the results lie; shared by everything that trains on the same scans.
        spacing: voxel edges in mm of the grid that the stages resample to; how many cases fit into RAM at once depends
            on it.
        transform: random and other transforms that follow and are not stored.
    """

    def __init__(
        self,
        data: Sequence[dict],
        stages: Sequence[Sequence],
        folder: str,
        spacing: Sequence[float],
        transform: Sequence | Compose = (),
    ) -> None:
        super().__init__(named_cases(data), transform)
        self.stages, self.folder, self.spacing = _stages(stages, Path(folder)), Path(folder), spacing
        self.entries: list[list[_Entry]] = []  # of each case, one a stage; none before `prepare`

    def prepare(self) -> None:
        """Make what is missing, in as many threads as cores and RAM allow; what is there already is read once.

        A loader with workers needs it done before; without workers the first read does it. Several processes may do it
        at once: none waits for another, and each takes the cases in an order of its own, so that they share them.

        Raises:
            UserError: a case that cannot be prepared, or a folder that cannot be written to.
        """
        for stage in self.stages:
            if not (path := stage.folder / "parameters.json").is_file():
                write_text(path, json.dumps(stage.parameters, indent=1))
        digests = self.folder / "digests.json"
        before = remembered(digests)
        known = dict(before)
        order = list(range(len(self.data)))
        random.Random(os.getpid()).shuffle(order)
        missing = [case for case in self.data if not self._is_there(case, known)]
        threads, torch_threads = thread_count(missing, self.spacing), torch.get_num_threads()
        torch.set_num_threads(1)  # the cases are what runs in parallel; and sums come out the same on every machine
        pool = ThreadPoolExecutor(threads)
        try:
            made = tqdm(
                pool.map(lambda index: self._prepare_case(self.data[index], known), order),
                total=len(order),
                desc="preparing",
                delay=1,  # silent where there is nothing to do
                disable=dist.is_initialized() and dist.get_rank() > 0,
            )
            by_case = dict(zip(order, made, strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(torch_threads)
            if known != before:
                write_text(digests, json.dumps(remembered(digests) | known))
        self.entries = [by_case[index] for index in range(len(self.data))]

    def _prepare_case(self, case: dict, known: dict) -> list[_Entry]:
        """Find the entries of a case, one a stage, and make those that are missing or damaged."""
        entries: list[_Entry] = []
        results: dict[str, object] = {}
        for stage in self.stages:
            inputs = stage.inputs(case)
            entry = stage.entry(inputs, known)
            if (found := entry.read_intact()) is None:
                entry.write(_outcome(stage, inputs | results, entry.files))
                found = entry.read_existing()
            results |= found
            entries.append(entry)
        return entries

    def _is_there(self, case: dict, known: dict) -> bool:
        """Say whether there are results of a case, without reading its files."""
        inputs = [stage.inputs(case) for stage in self.stages]
        if not all(
            os.path.exists(file) and is_digested(file, known) for of_stage in inputs for file in _files(of_stage)
        ):
            return False
        entries = [stage.entry(i, known) for stage, i in zip(self.stages, inputs, strict=True)]
        return all(entry.path.is_file() for entry in entries)

    def cached(self, index: int) -> dict:
        """Return case `index` after all stages; its tensors are mapped from disk and become real where they are read.

        Raises:
            UserError: an entry that was there has gone or is damaged.
        """
        if not self.entries and get_worker_info() is not None:
            raise RuntimeError("a loader's worker found nothing cached: call prepare() before the loader starts.")
        if not self.entries:
            self.prepare()
        result = dict(self.data[index])
        for entry in self.entries[index]:
            result |= entry.read_existing()
        for value in result.values():
            if isinstance(value, MetaTensor) and CASE in value.meta:  # the id of the case that the entry was made from
                value.meta[CASE] = result.get(CASE) or case_id(Path(str(value.meta["filename_or_obj"])), 1)
        return result

    def _transform(self, index: int) -> dict:
        return self.transform(self.cached(index))

    def __getitem__(self, index: int | slice | Sequence[int] | tuple[int, bool]) -> dict | torch.utils.data.Subset:
        if isinstance(index, tuple):
            case, foreground = index
            return self.transform(self.cached(case) | {"foreground": foreground})
        return super().__getitem__(index)


@dataclass
class _Stage:
    """A list of transforms whose results are kept apart, and what they depend on."""

    transform: Compose
    keys: set[Hashable] | None  # of the cases that this stage and those before it read; None: all
    parameters: dict  # all that its results depend on besides the case
    folder: Path  # of its results

    def inputs(self, case: dict) -> dict:
        return {k: v for k, v in case.items() if self.keys is None or k in self.keys}

    def entry(self, inputs: dict, known: dict) -> _Entry:
        return _Entry(self.folder / f"{digest(_content(inputs, known))[:16]}.pt", _files(inputs))


def _stages(lists: Sequence[Sequence], folder: Path) -> list[_Stage]:
    stages: list[_Stage] = []
    keys: set[Hashable] | None = set()
    steps: list[object] = []
    for compose in (Compose(transforms).flatten() for transforms in lists):
        for transform in compose.transforms:
            if isinstance(transform, RandomizableTrait):
                raise ValueError(
                    f"{type(transform).__name__} is random; it belongs into `transform`, after the stages."
                )
            keys = keys | set(transform.keys) if isinstance(transform, MapTransform) and keys is not None else None
        steps = steps + [description(transform) for transform in compose.transforms]
        parameters = {"versions": versions(), "transforms": steps}
        stages.append(_Stage(compose, keys, parameters, folder / digest(parameters)[:12]))
    return stages


def _outcome(stage: _Stage, before: dict, files: list[str]) -> dict:
    """Compute what a stage adds to a case or changes of it."""
    try:
        after = deepcopy(stage.transform)(before)  # MONAI's readers and transforms note things down in themselves
    except Exception as e:
        cause = first_cause(e)
        named = f"{', '.join(files)} cannot be prepared ({cause!r}); mend or remove the case."
        raise UserError(str(cause) if isinstance(cause, UserError) else named) from e
    return {key: value for key, value in after.items() if key not in before or value is not before[key]}


def _paths(value: object) -> list[str]:
    """List the files that an entry of a case names, as MONAI's readers spell them; none unless all of it are files."""
    parts = list(value) if isinstance(value, list | tuple) else [value]
    paths = [Path(part) for part in parts if isinstance(part, str | Path)]
    return [str(path) for path in paths] if len(paths) == len(parts) and all(map(is_image, paths)) else []


def _files(inputs: dict) -> list[str]:
    return [path for _, value in sorted(inputs.items()) for path in _paths(value)]


def _content(inputs: dict, known: dict) -> dict:
    """Describe what a case holds: files by their content, everything else by value."""
    return {key: [image_digest(p, known) for p in _paths(v)] or description(v) for key, v in inputs.items()}


@dataclass
class _Entry:
    """The result of a stage for a case: tensors and plain values in a file that torch maps into memory."""

    path: Path
    files: list[str]  # of the case that asks, which may be a copy of the one that the entry was made from

    def read(self) -> dict | None:
        """Read its values, tensors mapped from disk; None where there is no such file or not all of it."""
        try:
            found = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except (OSError, RuntimeError, EOFError, UnpicklingError):  # torch's reader, of what is no whole archive
            return None
        try:
            own, values = dict(zip(found["files"], self.files, strict=True)), dict(found["values"])
            for key, meta in found["meta"].items():
                name = meta.get("filename_or_obj")
                values[key] = MetaTensor(values[key], meta=meta | {"filename_or_obj": own.get(name, name)})
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):  # another file than `write` made
            return None
        return values

    def read_intact(self) -> dict | None:
        """Read its values if they are what was written; None, with a line in the log, where they are not."""
        if not self.path.is_file():
            return None
        found = self.read() if is_intact(self.path) else None
        if found is None:
            logger.warning("%s is damaged and made again.", self.path)
        return found

    def read_existing(self) -> dict:
        """Read its values, which have been there before."""
        found = self.read()
        if found is None:
            raise UserError(f"{self.path} was there and is missing or damaged now; start again: it is made anew.")
        return found

    def write(self, values: dict) -> None:
        content = {
            "files": self.files,
            "values": {key: _plain(value) for key, value in values.items()},
            "meta": {key: _plain(value.meta) for key, value in values.items() if isinstance(value, MetaTensor)},
        }
        write_whole(self.path, lambda partial: torch.save(content, partial))


def _plain(value: object) -> object:
    """Reduce to what `weights_only` reads back: tensors without metadata or a larger storage, and plain Python."""
    if isinstance(value, torch.Tensor):
        return value.detach().as_subclass(torch.Tensor).clone(memory_format=torch.contiguous_format)
    if isinstance(value, np.ndarray) and value.ndim:
        return torch.tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        return value.item()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"{type(value).__name__} cannot be stored; expected tensors, arrays, numbers, text or lists of them."
    )


def thread_count(cases: Sequence[dict], spacing: Sequence[float]) -> int:
    """Count the threads that fit: one a core, at most what half of the free RAM holds of the largest case, at least 1.

    Args:
        cases: to be resampled.
        spacing: voxel edges in mm of the grid that they are resampled to.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # torchrun's, on this machine
    largest = max((_peak_bytes(case, spacing) for case in cases), default=1)
    return int(max(1, min(cpu_cores(), free_memory() / 2 // largest) // processes))


def _peak_bytes(case: dict, spacing: Sequence[float]) -> float:
    """Estimate the RAM that resampling a case takes, by its header."""
    files = image_files(case)
    try:
        geometry, found = read_header(files[0])
    except UserError:  # preparing it will say what is wrong
        return 1.0
    channels = max(len(files), found)
    voxels = max(np.prod(geometry.shape), np.prod(np.multiply(geometry.shape, geometry.spacing) / spacing))
    return float(voxels) * (PEAK_BYTES + CHANNEL_BYTES * channels)
