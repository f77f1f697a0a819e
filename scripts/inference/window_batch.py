"""How many windows a GPU computes at once: by what the first one was seen to need, and by what is free."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

Window = TypeVar("Window")

MOST = 8  # windows at once
SHARE = 0.8  # of the free memory; the rest is for pieces that fit nowhere, and for others on the GPU


class GpuMemory:
    """Memory of a GPU in bytes; tests have one of their own."""

    def free(self, device: torch.device) -> int:
        """Return what tensors can still have: what nobody has, and what PyTorch keeps for them."""
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)

    def watch(self, device: torch.device) -> int:
        """Forget the peak; return what tensors have."""
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)

    def peak(self, device: torch.device) -> int:
        """Return the most that tensors had since then."""
        return torch.cuda.max_memory_allocated(device)


class WindowBatches:
    """Computes windows one by one on a CPU, and on a GPU as many at once as fit into its free memory.

    The first window of all is computed alone and shows what one needs. A batch that runs out of memory is halved, and
    no larger one tried again. Scores differ by rounding with the number at once.

    Args:
        device: where the network computes.
        most: windows at once.
        memory: of the GPU.
    """

    def __init__(self, device: torch.device, most: int = MOST, memory: GpuMemory | None = None) -> None:
        self.device, self.most, self.memory = device, most if device.type == "cuda" else 1, memory or GpuMemory()
        self.need = 0  # bytes of a window, 0 before the first one

    def compute(
        self, windows: Sequence[Window], scores: Callable[[Sequence[Window]], torch.Tensor]
    ) -> Iterator[tuple[Window, torch.Tensor]]:
        """Give every window with its scores (classes, *roi), of what `scores` makes of some (N, classes, *roi).

        Raises:
            OutOfMemoryError: one window is too much.
        """
        done = 0
        while done < len(windows):
            some = windows[done : done + self._at_once()]
            try:
                made = self._watched(some, scores)
            except torch.OutOfMemoryError:
                if len(some) == 1:
                    raise
                self.most = len(some) // 2
                continue
            yield from zip(some, made, strict=True)
            done += len(some)

    def _at_once(self) -> int:
        if self.most == 1 or not self.need:
            return 1
        return max(1, min(self.most, int(SHARE * self.memory.free(self.device) / self.need)))

    def _watched(self, some: Sequence[Window], scores: Callable[[Sequence[Window]], torch.Tensor]) -> torch.Tensor:
        if self.most == 1:
            return scores(some)
        before = self.memory.watch(self.device)
        made = scores(some)
        self.need = max(self.need, (self.memory.peak(self.device) - before) // len(some), 1)
        return made
