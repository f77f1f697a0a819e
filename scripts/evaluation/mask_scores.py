"""Scores of masks that anything made: a folder of them beside a folder of references, without a model."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..data.checks import check_same_grid, label_indices
from ..data.geometry import StoredImage, on_one_grid
from ..data.images import ENDINGS, MASK_ENDINGS, PICTURE, read_image
from ..data.labels import Labels
from ..data.scans import MASK, is_file_of, stem
from ..inference import dicom_seg
from ..utils.errors import UserError
from ..utils.files import check_writable, read_json
from .metrics import score_case
from .tables import write_tables

SEG = MASK_ENDINGS["dicom_seg"]
KINDS = ((*ENDINGS, SEG), PICTURE.endings)  # beside volumes, pictures are only pictures

logger = logging.getLogger("mednext")


def score_masks(
    masks: str,
    references: str,
    output_dir: str = "scores",
    dataset: str | None = None,
    nsd_tolerance_mm: float = 1.0,
    lesion_scores: bool = False,
) -> None:
    """Score each reference's mask, and write the tables of an evaluation: `cases.csv`, `summary.csv`, `summary.json`.

    Args:
        masks: folder of masks, `CASE.nii.gz` or `CASE_seg.nii.gz` (or NRRD, MetaImage, DICOM SEG, pictures), on the
            grids of their references.
        references: folder of labels in any of these formats, such as `labelsTs` of an nnU-Net folder.
        output_dir: folder for the tables.
        dataset: dataset.json with the names of labels or regions; by default that beside the references or above
            them. Without one, every value above 0 that occurs is a class.
        nsd_tolerance_mm: distance within which the surface Dice counts surfaces as equal.
        lesion_scores: whether the detection of connected components is scored, too, see `lesions.py`.

    Raises:
        UserError: a reference without a mask, two files of one case, grids that differ, or values that dataset.json
            does not name.
    """
    check_writable(output_dir)
    wanted, found = _by_case(references), _by_case(masks)
    if missing := sorted(set(wanted) - set(found)):
        raise UserError(
            f"{masks} has no mask of {', '.join(missing[:5])} ({len(missing)} of the {len(wanted)} references in"
            f" {references}); expected {missing[0]}.nii.gz or {missing[0]}{MASK}.nii.gz, for example: add them, or move"
            " their references away."
        )
    if left_out := sorted(set(found) - set(wanted)):
        logger.warning("left out of %s, without a reference: %s", masks, ", ".join(left_out))
    labels = _labels(dataset, Path(references)) or _values_of([*wanted.values(), *(found[case] for case in wanted)])
    classes = labels.indices_of(labels.eval_classes)
    rows = []
    for case, reference_file in tqdm(sorted(wanted.items()), desc="scoring", unit="case", disable=None):
        reference, mask = _read(reference_file), _read(found[case])
        if SEG in (reference_file.suffix.lower(), found[case].suffix.lower()):  # which has no slices without a label
            reference, mask = on_one_grid(reference, mask)
        check_same_grid(mask.path, mask.geometry, reference.path, reference.geometry)
        predicted, truth = (_indices(one, labels) for one in (mask, reference))
        scores = score_case(
            predicted, truth, reference.geometry.spacing, classes, nsd_tolerance_mm, labels.ignore_index, lesion_scores
        )
        rows += [{"case": case, **row} for row in scores]
    write_tables(output_dir, rows, list(classes), nsd_tolerance_mm)


def _by_case(folder: str) -> dict[str, Path]:
    """List the files of a folder by the id of their case."""
    path = Path(folder)
    if not path.is_dir():
        raise UserError(f"{folder} does not exist or is no folder; give a folder of label files.")
    found: dict[str, Path] = {}
    files = next((files for kind in KINDS if (files := [f for f in path.iterdir() if is_file_of(f, kind)])), [])
    for file in sorted(files):
        case = stem(file).removesuffix(MASK)
        if case in found:
            raise UserError(f"{found[case]} and {file} are both of case {case}; move one of them away.")
        found[case] = file
    if not found:
        raise UserError(f"{folder} holds no {', '.join(sum(KINDS, ()))} file; give a folder of them.")
    return found


def _labels(dataset: str | None, references: Path) -> Labels | None:
    """Read the labels of a dataset.json, that which is named or one beside or above the references."""
    places = [Path(dataset)] if dataset else [references / "dataset.json", references.parent / "dataset.json"]
    for place in places:
        file = place / "dataset.json" if place.is_dir() else place
        if file.is_file():
            description = read_json(file)
            if not isinstance(description, dict) or not isinstance(description.get("labels"), dict):
                raise UserError(f'{file} has no "labels" dictionary; expected name: value, as nnU-Net has it.')
            return Labels.from_dataset_json(description, file)
    if dataset:
        raise UserError(f"{dataset} not found; give a dataset.json, or the folder that holds it.")
    return None


def _values_of(files: Iterable[Path]) -> Labels:
    """Make a label of every value that occurs."""
    values = {0}
    for file in files:
        image = _read(file)
        values |= {int(value) for value in np.unique(image.values) if value == int(value) and value >= 0}
    names = ["background", *(f"label {value}" for value in sorted(values)[1:])]
    if len(names) < 2:
        raise UserError("all files hold 0 alone; expected labels above 0: there is nothing to score.")
    return Labels(names, sorted(values))


def _indices(image: StoredImage, labels: Labels) -> torch.Tensor:
    """Return the index of each voxel's label, (1, X, Y, Z)."""
    return torch.from_numpy(np.array(label_indices(image, labels.file_values), dtype=np.int16))[None]


def _read(file: Path) -> StoredImage:
    image = dicom_seg.read_alone(file) if file.suffix.lower() == SEG else read_image(file)
    if image.voxels.ndim != 3:
        raise UserError(f"{file} has the shape {image.voxels.shape}; expected one label a voxel, (X, Y, Z).")
    return image
