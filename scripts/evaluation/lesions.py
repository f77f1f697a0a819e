"""Detection of small structures: which connected components of a reference are found, and which are made up."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import generate_binary_structure, label

COUNTS = ("reference_lesions", "found_lesions", "predicted_lesions", "false_lesions")


def lesion_scores(predicted: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Count the lesions of two masks (*space), and score their detection by F1; nan where there are none in either.

    A lesion is a component of voxels that share a face, an edge or a corner. One of the reference is found where at
    least one voxel of it is predicted, one of the prediction is false where none of it is in the reference.
    Source: the challenge ISLES 2022, ezequieldlrosa/isles22, utils/eval_utils.py, `compute_lesion_f1_score`.

    Returns:
        lesion_f1: 2 found / (2 found + missed + false).
        reference_lesions, found_lesions: components of the reference.
        predicted_lesions, false_lesions: components of the prediction.
    """
    neighbours = generate_binary_structure(predicted.ndim, predicted.ndim)
    (true, wanted), (made, guessed) = (label(mask, neighbours) for mask in (reference, predicted))
    found = len(np.unique(true[(true > 0) & predicted]))
    false = guessed - len(np.unique(made[(made > 0) & reference]))
    judged = found + wanted + false  # 2 found + missed + false
    f1 = 2 * found / judged if judged else math.nan
    return {"lesion_f1": f1, **dict(zip(COUNTS, (wanted, found, guessed, false), strict=True))}
