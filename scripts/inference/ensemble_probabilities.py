"""Masks of the mean of saved probabilities: `python -m scripts ensemble_probabilities`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..data.labels import Labels
from ..data.scans import mask_file
from ..utils.errors import UserError
from ..utils.files import check_writable
from ..utils.settings_table import SETTINGS
from .export import Scan, write_mask
from .probabilities import ProbabilityFile

SAME_PLACE = 1e-3  # mm by which affines of one scan may differ


def ensemble_probabilities(
    folders: Sequence[str], output_dir: str = "ensemble", output_format: str | None = None
) -> None:
    """Write the mask of every case: the labels of the mean of its probabilities in several folders.

    Args:
        folders: folders into which inferences with `--save_probabilities True` wrote, of the same scans and labels.
        output_dir: folder for the masks.
        output_format: of the masks, as in inference; by default that of each scan.

    Raises:
        UserError: fewer than two folders, a case that one of them lacks, or probabilities of other labels or grids.
    """
    named = SETTINGS["ensemble"].of(folders, "folders")
    paths = [Path(folder) for folder in ([named] if isinstance(named, str) else named)]
    output_format = SETTINGS["output_format"].of(output_format, "output_format")
    check_writable(output_dir)
    for case, files in tqdm(_by_case(paths).items(), desc="averaging", unit="case", disable=None):
        members = [ProbabilityFile(file) for file in files]
        first = members[0]
        for other in members[1:]:
            _require_alike(first, other)
        mask = _decide(members, first.labels).T
        scan = Scan(first.scan, first.affine, first.labels.value_names)
        write_mask(Path(output_dir) / mask_file(case, first.scan, output_format), mask, scan)


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


def _decide(members: Sequence[ProbabilityFile], labels: Labels) -> np.ndarray:
    """Return the label values (Z, Y, X) of the mean probabilities, whose classes are read in turn."""
    space, order = members[0].shape[1:], labels.regions_class_order
    mask = np.zeros(space, np.uint8 if max(labels.values) < 256 else np.int16)
    best = np.full(space, 0.5 if order else -1.0, np.float32)
    for values, *volumes in zip(order or labels.values, *(member.volumes() for member in members), strict=True):
        mean = np.zeros(space, np.float32)
        with np.errstate(all="ignore"):  # of damaged files, whose checksum is compared behind the last class
            for volume in volumes:
                mean += volume
        mean /= len(members)
        better = mean > best
        mask[better] = values
        if not order:
            best[better] = mean[better]
    return mask
