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
from .checks import check_same_grid
from .datasets import cases, channel_names, dataset_json, image_files, scans
from .images import read
from .labels import Labels
from .labels import read as read_labels

COPIED = ("name", "description", "reference", "licence", "release")  # of dataset.json, whatever they say


def convert_layout(source: str, target: str) -> None:
    """Writes the other layout of a data set: nnU-Net v2's for a Decathlon folder, Decathlon's for an nnU-Net v2 folder.

    Args:
        source: folder with dataset.json, imagesTr, labelsTr and perhaps imagesTs.
        target: folder to make; it must not exist.

    Raises:
        UserError: `source` is neither, a file is missing or unreadable, or `target` exists.
    """
    if Path(target).exists():
        raise UserError(f"{target} exists and is not overwritten; move it, or give another --target.")
    names, labels, training = channel_names(source), read_labels(source), cases(source)
    test = scans(str(Path(source) / "imagesTs"), len(names)) if (Path(source) / "imagesTs").is_dir() else []
    given = dataset_json(source)
    if labels.regions and "channel_names" in given:
        raise UserError(
            f"{source} has overlapping regions, which a Decathlon dataset.json cannot say; keep its layout."
        )
    place, describe = (
        (_decathlon_images, _decathlon_json) if "channel_names" in given else (_nnunet_images, _nnunet_json)
    )
    partial = Path(f"{target}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted conversion
    for folder, group in (("imagesTr", training), ("imagesTs", test)):
        for case in group:
            place(case, partial / folder, len(names))
    for case in training:
        _place(case["label"], partial / "labelsTr" / f"{case['case']}.nii.gz")
    if (split := Path(source) / "splits_final.json").is_file():
        shutil.copy2(split, partial / split.name)
    texts = {key: given[key] for key in COPIED if key in given}
    made = texts | describe([c["case"] for c in training], [c["case"] for c in test], names, labels)
    (partial / "dataset.json").write_text(json.dumps(made, indent=4) + "\n")
    partial.rename(target)
    print(f"wrote {target}: {len(training)} training and {len(test)} test cases, {len(names)} channel(s)")


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


def _nnunet_json(training: list[str], test: list[str], names: list[str], labels: Labels) -> dict:
    return {
        "channel_names": {str(channel): name for channel, name in enumerate(names)},
        "labels": _values(labels),
        "numTraining": len(training),
        "file_ending": ".nii.gz",
    }


def _decathlon_json(training: list[str], test: list[str], names: list[str], labels: Labels) -> dict:
    return {
        "tensorImageSize": "3D" if len(names) == 1 else "4D",
        "modality": {str(channel): name for channel, name in enumerate(names)},
        "labels": {str(value): name for name, value in _values(labels).items()},
        "numTraining": len(training),
        "numTest": len(test),
        "training": [{part: f"./{part}sTr/{name}.nii.gz" for part in ("image", "label")} for name in training],
        "test": [f"./imagesTs/{name}.nii.gz" for name in test],
    }


def _values(labels: Labels) -> dict[str, int]:
    exclusive = dict(zip(labels.names, labels.values, strict=True))
    return exclusive if labels.ignore is None else {**exclusive, "ignore": labels.ignore}


def _place(file: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not file.endswith(".gz"):
        nib.save(nib.load(file), path)
        return
    try:
        os.link(os.path.realpath(file), path)
    except OSError:  # another disk, or a file system without links
        shutil.copy2(file, path)


def _split(file: str, paths: list[Path]) -> None:
    image, voxels = read(file)
    if voxels.ndim != 4 or voxels.shape[3] != len(paths):
        raise UserError(
            f"{file} has the shape {voxels.shape}; dataset.json names {len(paths)} channels: correct either."
        )
    for channel, path in enumerate(paths):
        _write(image, voxels[..., channel], path)


def _stack(files: list[str], path: Path) -> None:
    images, voxels = zip(*map(read, files), strict=True)
    for file, image in zip(files, images, strict=True):
        check_same_grid(file, image, files[0], images[0])
    scales = {(i.dataobj.slope, i.dataobj.inter, v.dtype.str) for i, v in zip(images, voxels, strict=True)}
    if len(scales) > 1:  # one header cannot say it: store the values themselves
        values = [v * i.dataobj.slope + i.dataobj.inter for i, v in zip(images, voxels, strict=True)]
        stacked = nib.Nifti1Image(np.stack(values, axis=-1).astype(np.float32), images[0].affine, images[0].header)
        stacked.header.set_data_dtype(np.float32)
        stacked.header.set_slope_inter(1, 0)
        path.parent.mkdir(parents=True, exist_ok=True)
        nib.save(stacked, path)
    else:
        _write(images[0], np.stack(voxels, axis=-1), path)


def _write(like: nib.Nifti1Image, stored: np.ndarray, path: Path) -> None:
    """Stored voxels with the affine, type, slope and intercept of `like`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(stored, like.affine, like.header)
    image.header.set_data_dtype(stored.dtype)
    image.header.set_slope_inter(like.dataobj.slope, like.dataobj.inter)  # set, nibabel stores the voxels as they are
    nib.save(image, path)
