"""Which kernels `kernels="auto"` takes on a GPU: measured when a block is first used there, and remembered.

Every kind of block, by widths, kernel size, precision and size, is tried once with every candidate: checked against the
bound of `exactness`, then timed beside stock operators (`trial`). What is faster is taken from then on; what fails or
is inaccurate is left out, and its reason kept (`autotune_file`). All measurements of a process take at most SECONDS;
what is left then runs in stock operators, and is measured by the next process. Each process of several measures its own
GPU and waits for nobody. Nothing is measured while a graph is traced, compiled, exported or captured.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from . import autotune_file
from .autotune_file import Results
from .backend import Backend, BlockKind
from .trial import VOXELS, Clock, Result, Use, attempt, use_name

Function = TypeVar("Function", bound=Callable)

FASTER = 0.95  # of the time of stock operators, at most
SECONDS = 60.0  # that a process measures, at most
SAID = 3  # reasons in the line, at most; the file has all

logger = logging.getLogger("mednext")


def constant(function: Function) -> Function:
    """Let torch.compile call the function once and keep what it returns.

    Does as `torch.compiler.assume_constant_result`, which imports the whole compiler, and Triton, at once.
    """
    vars(function)["_dynamo_marked_constant"] = True
    return function


class Tuner:
    """Chooses among candidates and stock operators, and knows what was measured.

    Args:
        candidates: backends that may be faster.
        clock: measures time.
        limit: seconds that all measurements may take.
    """

    def __init__(self, candidates: Sequence[Backend], clock: Clock | None = None, limit: float = SECONDS) -> None:
        self.candidates, self.clock, self.limit = list(candidates), clock or Clock(), limit
        self.lock = threading.Lock()  # several threads may compute, each on a GPU of its own
        self.forget()

    def forget(self) -> None:
        """Read the files again when a block is next used, and let measurements take their time once more."""
        self.spent = 0.0
        self.decided: dict[Use, str | None] = {}
        self.machines: dict[torch.device, dict[str, str]] = {}
        self.results: dict[torch.device, Results] = {}
        self.news: dict[str, dict[str, Result]] = {}
        self.where: Path | None = None  # the file that was written last

    def choose(self, x: Tensor, block: BlockKind) -> Backend | None:
        """Choose the fastest candidate for a block on x (N, C, D, H, W), or None: stock operators."""
        suitable = [c for c in self.candidates if c.unsuitable(x, block.kernel_size) is None]
        if not suitable:
            return None
        kind, trains = x.device.type, torch.is_grad_enabled()
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        names = [c.name for c in suitable]
        if torch.compiler.is_compiling():
            chosen = self.remembered(x.device, use_name(block, x.shape[1], x.dtype, autocast, trains), " ".join(names))
        else:
            use = Use(block, x.shape, x.dtype, x.device, autocast, trains)
            chosen = self.decided[use] if use in self.decided else self._decide(use, suitable)
        for candidate in suitable:
            if candidate.name == chosen:
                return candidate
        return None

    @constant
    def remembered(self, device: torch.device, start: str, names: str) -> str | None:
        """Return the choice for the largest use whose name begins like that, without measuring."""
        sizes = {name: re.fullmatch(re.escape(start) + VOXELS, name) for name in self._known(device)}
        edges = {name: int(match[1]) for name, match in sizes.items() if match}
        return _best(self._known(device)[max(edges, key=edges.__getitem__)], names.split()) if edges else None

    def _known(self, device: torch.device) -> Results:
        if device not in self.results:
            self.machines[device] = autotune_file.machine(device)
            self.results[device] = autotune_file.read(self.machines[device])
        return self.results[device]

    def _decide(self, use: Use, suitable: Sequence[Backend]) -> str | None:
        with self.lock:
            found = self._known(use.device).setdefault(use.name, {})
            missing = [c for c in suitable if c.name not in found]
            if missing and _recording():
                return None  # measured when it is next used
            if missing:
                self._measure(use, missing, found)
            self.decided[use] = _best(found, [c.name for c in suitable])
            return self.decided[use]

    def _measure(self, use: Use, missing: Sequence[Backend], found: dict[str, Result]) -> None:
        """Fill `found` for what is missing, as far as there is time left.

        A thread of its own has none of the caller's hooks, modes and contexts: a checkpoint does not count the tensors
        that are saved here, and a compiler that does not come back in time is left alone.

        Raises:
            RuntimeError: a kernel broke the GPU for this process.
        """
        self.news.setdefault(use.name, found)
        left = self.limit - self.spent
        if left <= 0:
            return
        given_up, made, broken = threading.Event(), dict[str, Result](), list[Exception]()

        def work() -> None:
            try:
                for ours in missing:
                    result = attempt(use, ours, self.clock, given_up)
                    if given_up.is_set():
                        return
                    made[ours.name] = result
                    self.clock.settle(use.device)
            except Exception as e:
                broken.append(e)

        thread, start = threading.Thread(target=work, name="mednext measures kernels"), self.clock.now()
        thread.start()
        try:
            thread.join(min(left, threading.TIMEOUT_MAX))
        finally:
            given_up.set()
        self.spent += self.clock.now() - start
        found.update(made)
        self.where = autotune_file.add(self.machines[use.device], use.name, found)
        if broken:
            gpu, names = self.machines[use.device]["gpu"], ", ".join(made) or missing[0].name
            raise RuntimeError(
                f"{gpu} does not answer any more ({broken[0]}), after {names} was tried on {use.name}; that is left out"
                ' from now on: start again, or use kernels="reference".'
            ) from broken[0]

    def say(self) -> None:
        """Say in one line what was measured since this was last called, if anything was."""
        if not self.news:
            return
        with self.lock:
            news, self.news = self.news, {}
        gpu = ", ".join({facts["gpu"]: None for facts in self.machines.values()})
        names = [c.name for c in self.candidates]
        taken = Counter(_best(found, names) for found in news.values())
        parts = [f"{who} for {taken[who]}" for who in names if taken[who]] + [f"stock operators for {taken[None]}"]
        line = f"kernels on {gpu}: {', '.join(parts)} of {len(news)} kinds of block"
        ratios = [r.ratio for found in news.values() for r in found.values() if r.ratio is not None]
        if ratios:
            line += f" ({min(ratios):.2f} to {max(ratios):.2f} of the time of stock operators)"
        reasons = Counter(f"{who}: {r.left_out}" for found in news.values() for who, r in found.items() if r.left_out)
        if reasons:
            said = "; ".join(f"{count} times {reason}" for reason, count in reasons.most_common(SAID))
            line += f"; left out: {said}"
        if late := sum(not found for found in news.values()):
            line += f"; {late} not measured within {self.limit:.0f} s, which the next process will do"
        where = f"remembered in {self.where}" if self.where else "not remembered, since the cache cannot be written to"
        logger.info(f"{line}; measured in {self.spent:.0f} s, {where}")


def _best(found: dict[str, Result], names: Sequence[str]) -> str | None:
    times = {who: r.ratio for who, r in found.items() if who in names and r.ratio is not None and r.ratio < FASTER}
    return min(times, key=times.__getitem__, default=None)


def _recording() -> bool:
    """Tell whether a CUDA graph is captured, or a backward pass computes a block again, whose thread must not wait."""
    capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    return capturing or torch._C._current_graph_task_id() != -1
