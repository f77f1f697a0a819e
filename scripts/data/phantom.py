"""A small data set made on the spot, so that everything runs from a bare clone without a network connection.

Spheres of three classes in noise (`monai.data.create_test_image_3d`), saved as a Medical Segmentation Decathlon folder
on the grids that real scans have: anisotropic voxels, oblique and flipped axes, integer and float files.
"""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
from monai.data import create_test_image_3d

from ..utils.errors import UserError
from ..utils.files import write_folder_whole

CLASSES = ("background", "low", "middle", "high")
SHAPE = (44, 40, 22)  # voxels; spacing 1.0 x 1.1 x 2.0 mm
SPACING = (1.0, 1.1, 2.0)
LEAST_SHARE = 0.04  # of the voxels for each class, so that every scan has all of them at the same intensities


def phantom(folder: str, training: int = 10, test: int = 2) -> str:
    """Make the phantom data set in `folder` unless it is there, and return `folder`.

    The folder appears at once and complete, also when several processes ask for it together.
    """
    target = Path(folder)
    if (target / "dataset.json").is_file():
        return folder
    try:
        write_folder_whole(target, lambda partial: _fill(partial, training, test))
    except UserError:  # another process was first, or the folder holds something else
        if not (target / "dataset.json").is_file():
            raise
    return folder


def _fill(partial: Path, training: int, test: int) -> None:
    listed = []
    for index in range(training + test):
        where = "Tr" if index < training else "Ts"
        name = f"phantom_{index:02d}.nii.gz"
        image, label = _case(index)
        _save(image, partial / f"images{where}" / name)
        _save(label, partial / f"labels{where}" / name)
        listed.append(name)
    description = {
        "name": "Phantom",
        "description": "Spheres in noise, made by the bundle itself",
        "licence": "Apache-2.0",
        "tensorImageSize": "3D",
        "modality": {"0": "phantom"},
        "labels": {str(value): name for value, name in enumerate(CLASSES)},
        "numTraining": training,
        "numTest": test,
        "training": [{"image": f"./imagesTr/{n}", "label": f"./labelsTr/{n}"} for n in listed[:training]],
        "test": [f"./imagesTs/{n}" for n in listed[training:]],
    }
    (partial / "dataset.json").write_text(json.dumps(description, indent=1))


def _case(index: int) -> tuple[nib.Nifti1Image, nib.Nifti1Image]:
    random = np.random.RandomState(index)
    share: np.ndarray = np.zeros(len(CLASSES))
    while share.min() < LEAST_SHARE:  # the generator places and covers spheres as it likes
        image, label = create_test_image_3d(
            *SHAPE,
            num_objs=8,
            rad_min=5,
            rad_max=9,
            noise_max=0.2,
            num_seg_classes=len(CLASSES) - 1,
            random_state=random,
        )
        share = np.bincount(label.ravel(), minlength=len(CLASSES)) / label.size
    affine = np.eye(4)
    affine[:3, :3] = _rotation(random.uniform(-0.4, 0.4, size=3)) * np.array(SPACING)
    if index % 2:  # every other scan is stored flipped and with its axes in another order
        image, label = (np.ascontiguousarray(a.transpose(2, 0, 1)[:, ::-1]) for a in (image, label))
        affine[:3, :3] = affine[:3, [2, 0, 1]] * (1, -1, 1)
    affine[:3, 3] = random.uniform(-100, 100, size=3)
    label_type = np.float32 if index % 3 == 0 else np.uint8
    return nib.Nifti1Image((image * 1000).astype(np.int16), affine), nib.Nifti1Image(label.astype(label_type), affine)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """3 x 3 rotation by `angles` (radians) about x, then y, then z."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        i, j = [a for a in range(3) if a != axis]
        turn[[i, i, j, j], [i, j, i, j]] = [np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)]
        matrix = turn @ matrix
    return matrix


def _save(image: nib.Nifti1Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    nib.save(image, path)
