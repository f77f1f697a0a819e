"""The sliding window in bounded memory: MONAI's windows or nnU-Net's, mirrored or not, averaged as probabilities."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations, product

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.data.utils import compute_importance_map, dense_patch_slices
from monai.inferers import Inferer

from ..kernels.precision import CpuPrecision
from ..preprocessing.resampling import has_native_voxels, knows_scan_grid
from ..utils.device import give_memory_back, ran_out_of_memory
from ..utils.errors import UserError
from . import window_batch
from .window_results import Labels, LabelsOnScan, Result, Scores, Storage
from .window_sums import Block, WindowSums

LARGE = 2**24  # voxels of a scan, from which on memory is given back between layers of windows
PIECE = 2**21  # scores of some rows of a window, of all classes, that a CPU computes at once: its cache holds them

Network = Callable[..., torch.Tensor]

logger = logging.getLogger("mednext")

ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda logits: logits,
    "softmax": partial(torch.softmax, dim=1),
    "sigmoid": torch.sigmoid,
}


class SlidingWindowInferer(Inferer):
    """A Gaussian-weighted sliding window, with sums kept only for the planes that windows still reach.

    Windows advance along the first spatial axis; planes that no further window touches are divided by their weights and
    stored. Where the result would be large it is stored in half precision, as nnU-Net does; the sums themselves always
    have the input's precision. With `window_scheme="monai"` and no activation, windows, weights and, below the limit,
    results are those of `monai.inferers.SlidingWindowInferer(mode="gaussian")`. A GPU computes several windows at once
    (`window_batch`); a scan for which its memory is not enough even so is kept in RAM, with its sums.

    Args:
        roi_size: voxels of a window; one voxel along the last axis gives a 2D network slices.
        overlap: share of a window that the next one covers again.
        activation: kind of scores that windows and mirrored copies average: "softmax" or, for regions, "sigmoid"
            probabilities, as nnU-Net v1 does; None averages what the network gives, as MONAI does.
        mirror_axes: spatial axes 0, 1, .. along whose every combination a window is mirrored too (nnU-Net's test-time
            augmentation, 2^n passes); those that training mirrored.
        window_scheme: whose windows and weights, "monai" or "nnunet".
        full_precision_gb: up to this size of the result it is stored in the input's precision, on its device;
            above it in float16 in RAM.
        cpu_precision: precision of a network on a CPU: "float32", "bfloat16", or "auto", bfloat16 where that
            is measured to be faster. (On a GPU autocast decides, which MONAI's engines switch on for these alone.)
        labels_early: keep labels instead of scores for a MetaTensor whose voxels are those of the file, turned or
            cropped: `LabelsOnScanGridd` interpolates nothing there, and finds the same labels.
        region_order: the labels of overlapping regions, as for `LabelsOnScanGridd`.

    Raises:
        UserError: unknown `window_scheme` or `cpu_precision`, or `mirror_axes` that a window does not have.
    """

    def __init__(
        self,
        roi_size: Sequence[int],
        overlap: float = 0.5,
        activation: str | None = None,
        mirror_axes: Sequence[int] = (),
        window_scheme: str = "monai",
        full_precision_gb: float = 1.0,
        cpu_precision: str = "float32",
        labels_early: bool = False,
        region_order: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if window_scheme not in WINDOW_SCHEMES:
            raise UserError(f"window_scheme is {window_scheme!r}; expected one of {', '.join(WINDOW_SCHEMES)}.")
        if sorted(mirror_axes) != sorted(set(mirror_axes) & set(range(len(roi_size)))):
            axes = ", ".join(map(str, range(len(roi_size))))
            raise UserError(f"mirror_axes is {list(mirror_axes)}; expected some of {axes}, each once, or [] for none.")
        self.cpu_precision = CpuPrecision(cpu_precision)
        self.roi_size, self.overlap, self.full_precision_gb = list(roi_size), overlap, full_precision_gb
        self.activate = ACTIVATIONS[activation]
        counts = range(1, len(mirror_axes) + 1)
        self.mirrored = [[a + 2 for a in axes] for n in counts for axes in combinations(mirror_axes, n)]
        self.starts, self.weights = WINDOW_SCHEMES[window_scheme]
        self.labels_early, self.region_order = labels_early, region_order
        self.scratch: str | None = None  # folder for large scores that are kept, see `keeping_scores`
        self.watch: Callable[[int, int], None] | None = None  # told how many of how many windows of a scan are done
        self.batches = window_batch.WindowBatches()

    def __call__(self, inputs: torch.Tensor, network: Network, *args, **kwargs) -> torch.Tensor:
        """Segment scans (N, C, *space).

        Args:
            inputs: scans.
            network: maps windows (N, C, *roi) to logits (N, classes, *roi).
            args: further arguments of the network.
            kwargs: those by name.

        Returns:
            Scores (N, classes, *space), or labels (N, 1, *space) where `labels_early` allows them.
        """
        plain = inputs.as_tensor() if hasattr(inputs, "as_tensor") else inputs
        make = partial(self._result, inputs)
        segment = partial(self._one, network=partial(network, *args, **kwargs), make=make, device=plain.device)
        try:
            return _joined(map(segment, plain.split(1)))
        except RuntimeError as error:
            if plain.device.type != window_batch.GPU or not ran_out_of_memory(error):
                raise
        logger.warning("%s: no memory for a scan and the sums of its windows; they are kept in RAM", plain.device)
        return _joined(map(segment, plain.cpu().split(1)))

    def keeping_scores(self, scratch: str | None = None) -> SlidingWindowInferer:
        """Return one like this that keeps scores and not labels; large ones in a file in the folder `scratch`."""
        made = copy.copy(self)
        made.labels_early, made.scratch = False, scratch
        return made

    def _result(self, inputs: torch.Tensor, image: torch.Tensor, classes: int, inside: Sequence[slice]) -> Result:
        """Choose what is kept of the scores of a scan, which lie where the image (1, C, *padded) does."""
        shape = (classes, *image.shape[2:])
        storage = Storage(image, shape, self.full_precision_gb, self.scratch)
        if not self.labels_early or not isinstance(inputs, MetaTensor) or not knows_scan_grid(inputs):
            return Scores(shape, inside, storage)
        if has_native_voxels(inputs):
            return Labels(shape, inside, self.region_order)
        return LabelsOnScan(shape, inside, inputs, self.region_order, storage)

    def _one(
        self, image: torch.Tensor, network: Network, make: Callable[..., Result], device: torch.device
    ) -> torch.Tensor:
        """Segment one scan (1, C, *space) into what `make` says is kept of it.

        The network computes on `device`, sums and scores are kept where the scan is.
        """
        size = image.shape[2:]
        missing = [max(r - n, 0) for r, n in zip(self.roi_size, size, strict=True)]
        if any(missing):
            image = F.pad(image, [n for m in reversed(missing) for n in (m // 2, m - m // 2)])
        inside = [slice(m // 2, m // 2 + n) for m, n in zip(missing, size, strict=True)]
        result: Result | None = None
        for block in self._means(image, network, device):
            result = result or make(image, len(block.means), inside)
            result.put(block)
            del block  # before the next window is computed
        assert result is not None, "there is a window in every scan"
        return result.get()

    def _means(self, image: torch.Tensor, network: Network, device: torch.device) -> Iterator[Block]:
        """Yield the mean scores of a scan (1, C, *space) of at least a window, block by block."""
        size = image.shape[2:]
        starts = [self.starts(n, r, self.overlap) for n, r in zip(size, self.roi_size, strict=True)]
        weight = self.weights(self.roi_size).to(image)
        spans = [[slice(a, a + r) for a in along] for along, r in zip(starts, self.roi_size, strict=True)]
        layer = weight.new_zeros((len(weight), *size[1:]))  # what all windows with the same first planes weigh
        for window in product(*spans[1:]):
            layer[(slice(None), *window)] += weight
        sums, windows, done = WindowSums(starts, size, weight), list(product(*spans)), 0
        large = device.type == "cpu" and len(starts[0]) > 1 and image.numel() > LARGE
        if large:
            give_memory_back()  # what preparing the scan has left
        self._tell(done, len(windows))
        predict = partial(self._predict, image=image, network=network, device=device)
        for at, pieces in self.batches.compute(windows, predict, device):
            for rows, scores in pieces:
                sums.add(at, rows, scores)
            del pieces, scores  # and the logits that they hold, before the next ones
            done += 1
            self._tell(done, len(windows))
            if all(span is along[-1] for span, along in zip(at[2:], spans[2:], strict=True)):
                yield from sums.finished(layer, at[0].start, at[1].start)
                if large and at[1] is spans[1][-1]:
                    give_memory_back()  # holes between what this layer of windows has left

    def _tell(self, done: int, count: int) -> None:
        if self.watch is not None:
            self.watch(done, count)

    def _pieces(self, device: torch.device, classes: int) -> list[slice]:
        """Cut a window into rows whose scores are computed at once: on a CPU few."""
        rows = self.roi_size[1]
        few = max(1, PIECE * rows // (classes * math.prod(self.roi_size)))
        step = min(few, rows) if device.type == "cpu" else rows
        return [slice(a, min(a + step, rows)) for a in range(0, rows, step)]

    def _predict(
        self, windows: Sequence[Sequence[slice]], image: torch.Tensor, network: Network, device: torch.device
    ) -> list[Iterator[tuple[slice, torch.Tensor]]]:
        """Return for each of some windows of a scan what gives rows and their scores (classes, planes, rows, ..).

        A CPU computes them as they are asked for, so that those of a whole window never exist beside its logits; a GPU,
        and whoever averages over mirrored copies, at once.
        """
        cut = [image[(slice(None), slice(None), *window)] for window in windows]
        inputs = (cut[0] if len(cut) == 1 else torch.cat(cut)).to(device)
        logits = self._logits(inputs, network)

        def scores(rows: slice) -> torch.Tensor:
            return self.activate(logits[:, :, :, rows].to(inputs.dtype))

        if len(windows) == 1 and device.type == "cpu" and not self.mirrored:
            return [((rows, scores(rows)[0]) for rows in self._pieces(device, logits.shape[1]))]
        total = logits.new_empty(logits.shape, dtype=inputs.dtype)
        for rows in self._pieces(device, logits.shape[1]):
            total[:, :, :, rows] = scores(rows)
        for axes in self.mirrored:
            logits = self._logits(inputs.flip(axes), network)
            for rows in self._pieces(device, logits.shape[1]):
                n = self.roi_size[1]
                theirs = slice(n - rows.stop, n - rows.start) if 3 in axes else rows
                total[:, :, :, rows] += scores(theirs).flip(axes)
        if self.mirrored:
            total /= len(self.mirrored) + 1
        kept = self._pieces(image.device, logits.shape[1])
        return [_cut(one, kept) for one in total.to(image.device)]

    def _logits(self, windows: torch.Tensor, network: Network) -> torch.Tensor:
        """Compute the logits (N, classes, *roi) of windows, in the network's precision."""
        with self.cpu_precision.autocast(windows.device):
            return network(windows[..., 0])[..., None] if self.roi_size[-1] == 1 else network(windows)


def _joined(scans: Iterable[torch.Tensor]) -> torch.Tensor:
    """Make a batch of scans (1, ..), a single one without a copy."""
    found = list(scans)
    return found[0] if len(found) == 1 else torch.cat(found)


def _cut(scores: torch.Tensor, pieces: Iterable[slice]) -> Iterator[tuple[slice, torch.Tensor]]:
    for rows in pieces:
        yield rows, scores[:, :, rows]


def monai_starts(n: int, r: int, overlap: float) -> list[int]:
    """List where windows of r voxels begin along an axis of n: a fixed stride, the last one shifted back inside."""
    step = r if r == n else max(int(r * (1 - overlap)), 1)
    return sorted({window[0].start for window in dense_patch_slices([n], [r], [step])})


def monai_weights(roi_size: Sequence[int]) -> torch.Tensor:
    """Weigh a window's voxels by a Gaussian about its middle, of a standard deviation of 1/8 of it, at least 0.001."""
    return compute_importance_map(tuple(roi_size), mode="gaussian", dtype=torch.float64)


def nnunet_starts(n: int, r: int, overlap: float) -> list[int]:
    """List where windows of r voxels begin along an axis of n: as few as the stride allows, evenly spaced and rounded.

    Source: MIC-DKFZ/MedNeXt, network_architecture/neural_network.py, `_compute_steps_for_sliding_window`.
    """
    count = math.ceil((n - r) / max(r * (1 - overlap), 1)) + 1
    return [round((n - r) / max(count - 1, 1) * i) for i in range(count)]


def nnunet_weights(roi_size: Sequence[int]) -> torch.Tensor:
    """Weigh a window's voxels by a Gaussian about voxel n // 2, of a standard deviation of n / 8.

    The largest weight is 1, that in the corner of 128^3 voxels 4e-11.
    Source: MIC-DKFZ/MedNeXt, network_architecture/neural_network.py, `_get_gaussian`.
    """
    axes = torch.meshgrid([(torch.arange(n).double() - n // 2) / (n / 8) for n in roi_size], indexing="ij")
    return functools.reduce(torch.add, (-axis.square() / 2 for axis in axes)).exp()


WINDOW_SCHEMES: dict[str, tuple[Callable[[int, int, float], list[int]], Callable[[Sequence[int]], torch.Tensor]]] = {
    "monai": (monai_starts, monai_weights),
    "nnunet": (nnunet_starts, nnunet_weights),
}
