"""Which scans there are: Medical Segmentation Decathlon and nnU-Net v2 folders, folds, and loose scans to segment.

A case is a dictionary `{"case": name, "image": file or list of files (one a channel), "label": file}`.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from .errors import UserError

ENDINGS = (".nii.gz", ".nii")
FOLDS = 5
_CHANNEL = re.compile(r"_(\d{4})$")  # nnU-Net's case_0000.nii.gz


def _stem(path: Path) -> str:
    for ending in ENDINGS:
        if path.name.endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def image_files(case: dict) -> list[str]:
    """The image files of a case: one, or one a channel."""
    return [case["image"]] if isinstance(case["image"], str) else list(case["image"])


def scan_files(folder: Path) -> list[Path]:
    """The NIfTI files of a folder, sorted; none where there is no such folder."""
    return sorted(path for path in folder.iterdir() if _is_scan(path)) if folder.is_dir() else []


def _is_scan(path: Path) -> bool:
    return path.is_file() and path.name.endswith(ENDINGS) and not path.name.startswith((".", "_"))


# ---- the dataset.json of a training folder


def dataset_json(dataset_dir: str) -> dict:
    """The folder's dataset.json, with its labels and channels.

    Raises:
        UserError: no such folder or file, not JSON, or no dictionaries of labels and channels in it.
    """
    folder = Path(dataset_dir)
    if not folder.is_dir():
        raise UserError(f"dataset_dir {dataset_dir} does not exist; give the folder that holds dataset.json.")
    path = folder / "dataset.json"
    if not path.is_file():
        raise UserError(
            f"{path} not found; dataset_dir must be a Medical Segmentation Decathlon or nnU-Net v2 folder"
            " (dataset.json, imagesTr, labelsTr)."
        )
    try:
        description = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); correct it.") from e
    for key in ("labels", "channel_names" if "channel_names" in description else "modality"):
        if not isinstance(description.get(key), dict):
            wanted = '"labels" and "channel_names" (nnU-Net v2) or "modality" (Decathlon)'
            raise UserError(f'{path} has no "{key}" dictionary; expected {wanted}.')
    return description


def channel_names(dataset_dir: str) -> list[str]:
    """Names of the image channels in order, e.g. `["FLAIR", "T1"]`."""
    description = dataset_json(dataset_dir)
    names = description.get("channel_names", description.get("modality"))
    return [names[key] for key in sorted(names, key=int)]


def labels(dataset_dir: str) -> dict[int, str]:
    """Names of the labels by the value they have in the label files, e.g. `{0: "background", 1: "edema", 4: "tumour"}`.

    Raises:
        UserError: a label has no integer value, two have one, or 0 or any other is missing.
    """
    path = Path(dataset_dir) / "dataset.json"
    found = dataset_json(dataset_dir)["labels"]
    decathlon = all(key.isdigit() for key in found)  # it maps value to name, nnU-Net v2 name to value
    try:
        pairs = [(int(key), name) if decathlon else (int(name), key) for key, name in found.items()]
    except (TypeError, ValueError) as e:
        raise UserError(
            f'{path} gives "labels" {found}; expected one integer a name (regions are not supported).'
        ) from e
    if "ignore" in dict(pairs).values():
        raise UserError(
            f'{path} has an "ignore" label, which is not supported; remove it from "labels" and the label files.'
        )
    values = sorted(value for value, _ in pairs)
    if len(set(values)) < len(values) or values[0] != 0 or len(values) < 2 or values[-1] > 32767:
        raise UserError(
            f'{path} gives "labels" the values {values}; expected 0 (background) and at least one foreground label,'
            " up to 32767, each once; correct dataset.json."
        )
    return dict(sorted(pairs))


def label_names(dataset_dir: str) -> list[str]:
    """Names of the labels by channel of the network, background first, e.g. `["background", "edema", "tumour"]`."""
    return list(labels(dataset_dir).values())


def label_values(dataset_dir: str) -> list[int]:
    """Values of the labels in the files, in the order of `label_names`, e.g. `[0, 1, 4]`: gaps are closed inside."""
    return list(labels(dataset_dir))


def cases(dataset_dir: str) -> list[dict]:
    """All labelled cases of the folder, sorted by name.

    Raises:
        UserError: a folder or file is missing, two cases have one name, or there are fewer than two cases.
    """
    description = dataset_json(dataset_dir)
    folder = Path(dataset_dir)
    found = (
        _decathlon_cases(folder, description)
        if "channel_names" not in description
        else _nnunet_cases(folder, description)
    )
    for case in found:
        for path in (*image_files(case), case["label"]):
            if not Path(path).is_file():
                raise UserError(
                    f"{path} not found, which case {case['case']} of {folder} needs; add it or remove the case."
                )
    if twice := [name for name, n in Counter(case["case"] for case in found).items() if n > 1]:
        raise UserError(f"{folder / 'dataset.json'} lists {twice[0]} more than once; give each case its own name.")
    if len(found) < 2:
        raise UserError(f"{folder} has {len(found)} labelled cases; expected at least 2, to train and to validate.")
    return sorted(found, key=lambda case: case["case"])


def _decathlon_cases(folder: Path, description: dict) -> list[dict]:
    listed = description.get("training")
    if not isinstance(listed, list):
        raise UserError(f'{folder / "dataset.json"} has no "training" list; expected Decathlon or nnU-Net v2 layout.')
    return [
        {"case": _stem(Path(c["image"])), "image": str(folder / c["image"]), "label": str(folder / c["label"])}
        for c in listed
    ]


def _nnunet_cases(folder: Path, description: dict) -> list[dict]:
    ending = description.get("file_ending", ".nii.gz")
    if ending not in ENDINGS:
        raise UserError(
            f'{folder / "dataset.json"} gives "file_ending" {ending!r}; expected .nii.gz or .nii: convert the files.'
        )
    for name in ("imagesTr", "labelsTr"):
        if not (folder / name).is_dir():
            raise UserError(f"{folder / name} not found; expected the nnU-Net v2 layout (imagesTr, labelsTr).")
    channels = range(len(description["channel_names"]))
    names = {_CHANNEL.sub("", _stem(p)) for p in scan_files(folder / "imagesTr")}
    names |= {_stem(p) for p in scan_files(folder / "labelsTr")}
    found = []
    for name in names:
        images = [str(folder / "imagesTr" / f"{name}_{channel:04d}{ending}") for channel in channels]
        label = str(folder / "labelsTr" / f"{name}{ending}")
        found.append({"case": name, "image": images[0] if len(images) == 1 else images, "label": label})
    return found


# ---- folds


def split(dataset_dir: str, fold: int | str) -> tuple[list[dict], list[dict]]:
    """(training cases, validation cases) of a fold.

    The rule is nnU-Net's: `splits_final.json` where the folder has one, else scikit-learn's
    `KFold(5, shuffle=True, random_state=12345)` over the sorted names; `fold="all"` trains and validates on everything.
    With fewer than five cases there are as many folds as cases.

    Raises:
        UserError: `fold` is out of range.
    """
    everything = cases(dataset_dir)
    if fold == "all":
        return everything, everything
    by_name = {case["case"]: case for case in everything}
    path = Path(dataset_dir) / "splits_final.json"
    folds = json.loads(path.read_text()) if path.is_file() else five_folds(list(by_name))
    if not isinstance(fold, int) or not 0 <= fold < len(folds):
        raise UserError(
            f"fold is {fold!r}; expected 0 to {len(folds) - 1} or 'all' for the {len(everything)} cases of"
            f" {dataset_dir}: give --fold 0, for example."
        )
    unknown = sorted({name for part in ("train", "val") for name in folds[fold][part]} - set(by_name))
    if unknown:
        raise UserError(f"{path} names case {unknown[0]}, which {dataset_dir} does not have; correct the split.")
    return [by_name[n] for n in folds[fold]["train"]], [by_name[n] for n in folds[fold]["val"]]


def five_folds(names: list[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's split: `[{"train": [..], "val": [..]}, ..]`, equal to scikit-learn's shuffled KFold with seed 12345."""
    names = sorted(names)
    order = np.arange(len(names))
    np.random.RandomState(12345).shuffle(order)
    held_out = [set(part.tolist()) for part in np.array_split(order, min(FOLDS, len(names)))]
    return [
        {part: [n for i, n in enumerate(names) if (i in held) == (part == "val")] for part in ("train", "val")}
        for held in held_out
    ]


def training_cases(dataset_dir: str, fold: int | str) -> list[dict]:
    """The cases that `fold` trains on."""
    return split(dataset_dir, fold)[0]


def validation_cases(dataset_dir: str, fold: int | str) -> list[dict]:
    """The cases that `fold` holds out."""
    return split(dataset_dir, fold)[1]


# ---- scans to segment


def scans(dataset_dir: str, channels: int = 1) -> list[dict]:
    """Unlabelled cases: a file, a folder of files, or a training folder (its imagesTs, else its imagesTr).

    With several channels, `case_0000.nii.gz, case_0001.nii.gz, ..` are one case; a 4D file brings its channels itself.

    Raises:
        UserError: nothing to segment is found.
    """
    path = Path(dataset_dir)
    if path.is_file():
        if not path.name.endswith(ENDINGS):
            raise UserError(f"{path} is not a NIfTI file by its name; expected {' or '.join(ENDINGS)}.")
        files = [path]
        if channels > 1:  # one channel stands for its case
            files = [
                p for p in path.parent.iterdir() if _is_scan(p) and _case_of(p, channels) == _case_of(path, channels)
            ]
    elif path.is_dir():
        folders = [path] + [path / name for name in ("imagesTs", "imagesTr") if (path / name).is_dir()]
        files = next((found for f in folders if (found := scan_files(f))), [])
    else:
        raise UserError(f"dataset_dir {dataset_dir} does not exist; give a NIfTI file or a folder of them.")
    if not files:
        raise UserError(f"{path} holds no {' or '.join(ENDINGS)} file; give a NIfTI file or a folder of them.")
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        groups.setdefault(_case_of(file, channels), []).append(str(file))
    return [{"case": name, "image": group[0] if len(group) == 1 else group} for name, group in sorted(groups.items())]


def _case_of(path: Path, channels: int) -> str:
    """Case name of a file; the suffix is a channel only if there can be such a channel (scan_2024.nii.gz has none)."""
    match = _CHANNEL.search(_stem(path))
    return _stem(path)[: match.start()] if match and int(match[1]) < channels else _stem(path)


def case_name(meta: dict, _saver: object = None) -> dict:
    """File name parts of a mask for MONAI's `SaveImaged(output_name_formatter=)`: the case, no patch index."""
    return {"subject": _case_of(Path(str(meta["filename_or_obj"])), 1), "idx": None}


# ---- how much of it is held and loaded at once


def workers(device: object = None) -> int:
    """Loader processes: half of the cores up to 8; none where the network itself computes on the CPU and needs them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if "cpu" in str(device) else min(8, cores // 2)


def cache_num(items: Sequence[dict], spacing: Sequence[float], gigabytes: float) -> int:
    """How many prepared cases fit into `gigabytes` of RAM, judged by the largest header: float32 image, uint8 label."""
    largest = max((_prepared_bytes(case, spacing) for case in items), default=0)
    return min(len(items), int(gigabytes * 1e9 // max(largest, 1)))


def _prepared_bytes(case: dict, spacing: Sequence[float]) -> float:
    files = image_files(case)
    header = nib.load(files[0]).header
    channels = len(files) if len(header.get_data_shape()) < 4 else header.get_data_shape()[3]
    extent = np.prod([n * s for n, s in zip(header.get_data_shape()[:3], header.get_zooms()[:3], strict=True)])
    return float(extent / np.prod(spacing) * (4 * channels + 1))
