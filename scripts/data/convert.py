"""A Decathlon folder as an nnU-Net v2 folder and back.

Files that stay as they are become hard links where the file system has them, else copies; only channels that lie in one
4D file here and in one file each there are written anew.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from ..utils.errors import UserError
from ..utils.files import write_folder_whole
from .checks import check_same_grid
from .datasets import Dataset
from .geometry import StoredImage
from .images import NIFTI, format_of, read_image
from .labels import Labels
from .nifti import new_image, open_image
from .scans import find_scans, image_files

COPIED = ("name", "description", "reference", "licence", "release")  # of dataset.json, whatever they say


def convert_layout(source: str, target: str) -> None:
    """Write the other layout of a data set: nnU-Net v2's for a Decathlon folder, Decathlon's for an nnU-Net v2 folder.

    Args:
        source: folder with dataset.json, imagesTr, labelsTr and perhaps imagesTs.
        target: folder to make; it must not exist.

    Raises:
        UserError: `source` is neither, a file is missing or unreadable, or `target` exists.
    """
    if Path(target).exists():
        raise UserError(f"{target} exists and is not overwritten; move it, or give another --target.")
    data = Dataset(source)
    tests = data.folder / "imagesTs"
    test = find_scans(str(tests), len(data.channels), dim="2d") if tests.is_dir() else []  # of either dimension
    if data.labels.regions:
        raise UserError(
            f"{source} has overlapping regions, which a Decathlon dataset.json cannot say; keep its layout."
        )
    write_folder_whole(target, lambda partial: _convert(data, test, partial))
    print(f"wrote {target}: {len(data.cases)} training and {len(test)} test cases, {len(data.channels)} channel(s)")


def _convert(data: Dataset, test: list[dict], partial: Path) -> None:
    place, describe = (_decathlon_images, _decathlon_json) if data.is_nnunet else (_nnunet_images, _nnunet_json)
    for folder, group in (("imagesTr", data.cases), ("imagesTs", test)):
        for case in group:
            place(case, partial / folder, len(data.channels))
    for case in data.cases:
        _place(case["label"], partial / "labelsTr" / f"{case['case']}.nii.gz")
    if (split := data.folder / "splits_final.json").is_file():
        shutil.copy2(split, partial / split.name)
    texts = {key: data.description[key] for key in COPIED if key in data.description}
    made = texts | describe(data, [case["case"] for case in test])
    (partial / "dataset.json").write_text(json.dumps(made, indent=4) + "\n")


def _nnunet_images(case: dict, folder: Path, channels: int) -> None:
    files, paths = image_files(case), [folder / f"{case['case']}_{channel:04d}.nii.gz" for channel in range(channels)]
    if len(files) == 1 and channels > 1:
        _split(files[0], paths)
    else:
        for file, path in zip(files, paths, strict=True):
            _place(file, path)


def _decathlon_images(case: dict, folder: Path, channels: int) -> None:
    files, path = image_files(case), folder / f"{case['case']}.nii.gz"
    _place(files[0], path) if len(files) == 1 else _stack(files, path)


def _nnunet_json(data: Dataset, test: list[str]) -> dict:
    return {
        "channel_names": {str(channel): name for channel, name in enumerate(data.channels)},
        "labels": _values(data.labels),
        "numTraining": len(data.cases),
        "file_ending": ".nii.gz",
    }


def _decathlon_json(data: Dataset, test: list[str]) -> dict:
    training = [case["case"] for case in data.cases]
    return {
        "tensorImageSize": "3D" if len(data.channels) == 1 else "4D",
        "modality": {str(channel): name for channel, name in enumerate(data.channels)},
        "labels": {str(value): name for name, value in _values(data.labels).items()},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [{part: f"./{part}sTr/{name}.nii.gz" for part in ("image", "label")} for name in training],
        "test": [f"./imagesTs/{name}.nii.gz" for name in test],
    }


def _values(labels: Labels) -> dict[str, int]:
    exclusive = dict(zip(labels.names, labels.values, strict=True))
    return exclusive if labels.ignore_value is None else {**exclusive, "ignore": labels.ignore_value}


def _place(file: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not file.lower().endswith(".nii.gz"):
        _save(read_image(file), path)
        return
    try:
        os.link(os.path.realpath(file), path)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(file, path)


def _split(file: str, paths: list[Path]) -> None:
    image = read_image(file)
    if image.voxels.ndim != 4 or image.voxels.shape[3] != len(paths):
        raise UserError(
            f"{file} has the shape {image.voxels.shape}; dataset.json names {len(paths)} channels: correct either."
        )
    for channel, path in zip(image.channels(), paths, strict=True):
        _save(channel, path)


def _stack(files: list[str], path: Path) -> None:
    images = [read_image(file) for file in files]
    for image in images:
        check_same_grid(image.path, image.geometry, images[0].path, images[0].geometry)
    if len({(image.slope, image.intercept, image.voxels.dtype.str) for image in images}) > 1:
        # one header cannot say it: store the values themselves
        voxels = np.stack([image.voxels * image.slope + image.intercept for image in images], axis=-1)
        _save(images[0]._replace(voxels=voxels.astype(np.float32), slope=1.0, intercept=0.0), path)
    else:
        _save(images[0]._replace(voxels=np.stack([image.voxels for image in images], axis=-1)), path)


def _save(image: StoredImage, path: Path) -> None:
    """Write stored voxels as they are, with the header of the file that they are from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if format_of(image.path) is NIFTI:
        made = nib.Nifti1Image(image.voxels, image.geometry.affine, open_image(image.path).header)
    else:
        made = new_image(image.voxels, image.geometry.affine)
    made.header.set_data_dtype(image.voxels.dtype)
    made.header.set_slope_inter(image.slope, image.intercept)  # set, nibabel stores the voxels as they are
    nib.save(made, path)
