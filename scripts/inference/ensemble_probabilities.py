"""Masks of the mean of saved probabilities: `python -m scripts ensemble_probabilities`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.geometry import Geometry
from ..data.scans import mask_file
from ..utils.errors import UserError
from ..utils.files import check_writable
from ..utils.settings_table import SETTINGS
from .components import keep_largest
from .export import Scan, write_mask
from .postprocessing import read_steps
from .probabilities import ProbabilityFile

SAME_PLACE = 1e-3  # mm by which affines of one scan may differ


def ensemble_probabilities(
    folders: Sequence[str],
    output_dir: str = "ensemble",
    output_format: str | None = None,
    postprocessing_file: str | None = None,
) -> None:
    """Write the mask of every case: the labels of the mean of its probabilities in several folders.

    Args:
        folders: folders into which inferences with `--save_probabilities True` wrote, of the same scans and labels.
        output_dir: folder for the masks.
        output_format: of the masks, as in inference; by default that of each scan.
        postprocessing_file: decision to apply, such as `find_best_configuration` writes.

    Raises:
        UserError: fewer than two folders, a case that one of them lacks, probabilities of other labels or grids, or a
            decision for other labels.
    """
    named = SETTINGS["ensemble"].of(folders, "folders")
    paths = [Path(folder) for folder in ([named] if isinstance(named, str) else named)]
    output_format = SETTINGS["output_format"].of(output_format, "output_format")
    check_writable(output_dir)
    for case, files in tqdm(_by_case(paths).items(), desc="averaging", unit="case", disable=None):
        mean = MeanProbabilities(files)
        mean.write_mask(Path(output_dir), case, output_format, read_steps(postprocessing_file, mean.labels.names))


def _by_case(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """List the files of each case, one a folder."""
    if len(folders) < 2:
        raise UserError(f"folders is {list(map(str, folders))}; expected two or more, for example \"['a','b']\".")
    found = [{file.stem: file for file in sorted(folder.glob("*.npz"))} for folder in folders]
    for folder, files in zip(folders, found, strict=True):
        if missing := sorted({case for other in found for case in other} - set(files)):
            raise UserError(
                f"{folder} has no {missing[0]}.npz ({len(missing)} of the cases in the other folders); segment it there"
                " with --save_probabilities True, or take it out of them."
            )
    if not found[0]:
        raise UserError(f"{folders[0]} holds no .npz file; segment with --save_probabilities True first.")
    return {case: [files[case] for files in found] for case in found[0]}


class MeanProbabilities:
    """The mean of the probabilities that several networks give a scan; their classes are read in turn.

    Args:
        files: of probabilities, one a network.

    Raises:
        UserError: they are of other labels or grids.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.members = [ProbabilityFile(file) for file in files]
        first = self.members[0]
        for other in self.members[1:]:
            _require_alike(first, other)
        self.labels, self.geometry = first.labels, Geometry(first.shape[:0:-1], first.affine)
        self.scan = Scan(first.scan, first.affine, first.labels.value_names)

    def indices(self) -> np.ndarray:
        """Decide the labels (X, Y, Z), as indices."""
        order, space = self.labels.region_order, self.members[0].shape[1:]
        found = np.zeros(space, np.uint8 if len(self.labels.values) <= 256 else np.int16)
        best = np.full(space, 0.5 if order else -1.0, np.float32)
        classes = order or range(len(self.labels.values))
        for index, *volumes in zip(classes, *(member.volumes() for member in self.members), strict=True):
            mean = np.zeros(space, np.float32)
            with np.errstate(all="ignore"):  # of damaged files, whose checksum is compared behind the last class
                for volume in volumes:
                    mean += volume
            mean /= len(self.members)
            better = mean > best
            found[better] = index
            if not order:
                best[better] = mean[better]
        return found.T

    def write_mask(self, folder: Path, case: str, output_format: str | None, steps: Sequence[Sequence[int]]) -> None:
        """Write the mask of a case, of which `steps` keep the largest components alone."""
        indices = np.ascontiguousarray(self.indices())
        values = np.array(self.labels.values, np.uint8 if max(self.labels.values) < 256 else np.int16)
        mask = values[keep_largest(indices, steps) if steps else indices]
        write_mask(folder / mask_file(case, self.scan.path, output_format), mask, self.scan)


def _require_alike(one: ProbabilityFile, other: ProbabilityFile) -> None:
    apart = float(np.abs(other.affine - one.affine).max())
    for name, same in (
        ("labels", other.labels == one.labels),
        ("shape", other.shape == one.shape),
        ("affine", apart < SAME_PLACE),
    ):
        if not same:
            theirs, ours = getattr(other, name), getattr(one, name)
            raise UserError(
                f"{other.path} has the {name} {theirs}, {one.path} {ours}; expected probabilities of one scan by"
                " networks of one data set."
            )
