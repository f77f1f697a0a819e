"""How many windows a GPU computes at once: by what one was seen to need, and by what is free."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from ..utils.device import ran_out_of_memory

Window = TypeVar("Window")
Prediction = TypeVar("Prediction")

GPU = "cuda"  # kind of device; elsewhere windows are computed one by one
MOST = 8  # windows at once
SHARE = 0.8  # of the free memory; the rest is for pieces that fit nowhere, and for others on the GPU

logger = logging.getLogger("mednext")


class WindowBatches:
    """Computes windows one by one or, on a GPU, as many at once as fit into its free memory.

    The first window of all is computed alone and shows what one needs. A batch that runs out of memory is halved, and
    no larger one tried again. Scores differ by rounding with the number at once.
    """

    def __init__(self) -> None:
        self.most = MOST
        self.need = 0  # bytes of a window in the last batch, 0 before the first one

    def compute(
        self,
        windows: Sequence[Window],
        predict: Callable[[Sequence[Window]], Iterable[Prediction]],
        device: torch.device,
    ) -> Iterator[tuple[Window, Prediction]]:
        """Give every window with what `predict` makes of it, of some at once on a device.

        Raises:
            RuntimeError: whatever `predict` raises, running out of memory with one window among it.
        """
        done = 0
        while done < len(windows):
            some = windows[done : done + self._at_once(device)]
            try:
                made = self._watched(some, predict, device)
            except RuntimeError as error:
                if len(some) == 1 or not ran_out_of_memory(error):
                    raise
                self.most = len(some) // 2
                logger.warning("%s: no memory for %d windows at once, now %d at most", device, len(some), self.most)
                continue
            yield from zip(some, made, strict=True)
            del made  # before the next ones are there
            done += len(some)

    def _at_once(self, device: torch.device) -> int:
        if device.type != GPU or not self.need:
            return 1
        unused, _ = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by PyTorch, for tensors
        return max(1, min(self.most, int(SHARE * (unused + kept) / self.need)))

    def _watched(
        self, some: Sequence[Window], predict: Callable[[Sequence[Window]], Iterable[Prediction]], device: torch.device
    ) -> Iterable[Prediction]:
        if device.type != GPU:
            return predict(some)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        made = predict(some)
        self.need = max((torch.cuda.max_memory_allocated(device) - before) // len(some), 1)
        return made
