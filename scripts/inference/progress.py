"""The progress of an inference: it counts the windows of the scan at hand, and estimates what is left of all scans."""

from __future__ import annotations

import io
import logging
import sys

import torch.distributed as dist
from ignite.engine import Events
from monai.engines import SupervisedEvaluator
from tqdm import tqdm

LINE_EVERY, BAR_EVERY = 30.0, 0.2  # seconds

logger = logging.getLogger("mednext")


class WindowProgress:
    """Says how far an evaluator with the bundle's sliding window is: a bar in a terminal, else a line now and then.

    Args:
        desc: what is done.
    """

    def __init__(self, desc: str) -> None:
        self.desc = desc
        self.bar: tqdm | None = None

    def attach(self, engine: SupervisedEvaluator) -> None:
        if not dist.is_initialized() or dist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self.count_scan)
            engine.add_event_handler(Events.COMPLETED, self.stop)

    def start(self, engine: SupervisedEvaluator) -> None:
        """Open the bar, and have the sliding window tell of its windows."""
        scans = engine.state.epoch_length or 1
        self.bar = _bar(self.desc, scans)
        if hasattr(engine.inferer, "watch"):
            engine.inferer.watch = lambda done, count: self._count_window(engine.state.iteration, scans, done, count)

    def _count_window(self, scan: int, scans: int, done: int, count: int) -> None:
        assert self.bar is not None, "there is a bar from the start on"
        if scan == 1 and not done:
            self.bar.unpause()  # the rest is estimated from windows, not from how long the first scan took to prepare
        which = f" scan {scan} of {scans}," if scans > 1 else ""
        self.bar.set_description_str(f"{self.desc}{which} window {done} of {count}", refresh=False)
        self.bar.update(scan - 1 + done / count - self.bar.n)

    def count_scan(self, engine: SupervisedEvaluator) -> None:
        """Count a scan as done, whether it could be segmented or not."""
        if self.bar is not None:
            self.bar.update(engine.state.iteration - self.bar.n)

    def stop(self, engine: SupervisedEvaluator) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if hasattr(engine.inferer, "watch"):
            engine.inferer.watch = None


class _Lines(tqdm):
    """A bar that is written as lines of the log."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.n and msg is None:
            logger.info("%s", str(self))  # as it is now
        return True


def _bar(desc: str, scans: int) -> tqdm:
    """Open a bar over scans, which a window moves by its share of one; its speed is the mean of all windows so far."""
    options = {"desc": desc, "total": scans, "miniters": 0, "smoothing": 0, "leave": False}
    if sys.stderr.isatty():
        shape = "{desc} {percentage:3.0f}% {bar} [{elapsed}<{remaining}]"
        return tqdm(bar_format=shape, mininterval=BAR_EVERY, dynamic_ncols=True, **options)
    shape = "{desc}: {percentage:.0f} %, {elapsed} gone, about {remaining} left"
    return _Lines(bar_format=shape, mininterval=LINE_EVERY, file=io.StringIO(), **options)
