"""Which scans there are: Medical Segmentation Decathlon and nnU-Net v2 folders, folds, and loose scans to segment.

A case is a dictionary `{"case": name, "image": file or list of files (one a channel), "label": file}`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np

from ..utils.errors import UserError

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


def cases(dataset_dir: str) -> list[dict]:
    """All labelled cases of the folder, sorted by name.

    Raises:
        UserError: a folder or files are missing, two cases have one name, or there are fewer than two cases.
    """
    found = listed_cases(dataset_dir)
    if missing := [(case["case"], path) for case in found for path in missing_files(case)]:
        shown = "\n  ".join(f"{path} not found, which case {name} needs" for name, path in missing)
        raise UserError(f"{dataset_dir} lacks {len(missing)} files; add them or remove their cases:\n  {shown}")
    if len(found) < 2:
        raise UserError(
            f"{dataset_dir} has {len(found)} labelled cases; expected at least 2, to train and to validate."
        )
    return found


def listed_cases(dataset_dir: str) -> list[dict]:
    """The cases that the folder should have, sorted by name; their files may be missing."""
    folder, description = Path(dataset_dir), dataset_json(dataset_dir)
    found = (_nnunet_cases if "channel_names" in description else _decathlon_cases)(folder, description)
    if twice := [name for name, n in Counter(case["case"] for case in found).items() if n > 1]:
        raise UserError(f"{folder / 'dataset.json'} lists {twice[0]} more than once; give each case its own name.")
    return sorted(found, key=lambda case: case["case"])


def missing_files(case: dict) -> list[str]:
    """Those of a case's files that are not there."""
    return [path for path in (*image_files(case), case["label"]) if not Path(path).is_file()]


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


def folds(dataset_dir: str) -> list[dict[str, list[str]]]:
    """Names of the cases that each fold trains on ("train") and holds out ("val").

    The rule is nnU-Net's: `splits_final.json` where the folder has one, else scikit-learn's
    `KFold(5, shuffle=True, random_state=12345)` over the sorted names. With fewer than five cases there are as many
    folds as cases.

    Raises:
        UserError: `splits_final.json` names a case that is not there, or holds out one that it trains on.
    """
    names = [case["case"] for case in cases(dataset_dir)]
    path = Path(dataset_dir) / "splits_final.json"
    if not path.is_file():
        return five_folds(names)
    found = json.loads(path.read_text())
    for number, fold in enumerate(found):
        if unknown := sorted({*fold["train"], *fold["val"]} - set(names)):
            raise UserError(f"{path} names case {unknown[0]}, which {dataset_dir} does not have; correct the split.")
        if both := sorted(set(fold["train"]) & set(fold["val"])):
            raise UserError(
                f"{path} trains fold {number} on case {both[0]} and holds it out as well; correct the split."
            )
    return found


def split(dataset_dir: str, fold: int | str) -> tuple[list[dict], list[dict]]:
    """(training cases, validation cases) of a fold, see `folds`; `fold="all"` trains and validates on everything.

    Raises:
        UserError: `fold` is out of range.
    """
    everything = cases(dataset_dir)
    if fold == "all":
        return everything, everything
    by_name, existing = {case["case"]: case for case in everything}, folds(dataset_dir)
    if not isinstance(fold, int) or not 0 <= fold < len(existing):
        raise UserError(
            f"fold is {fold!r}; expected 0 to {len(existing) - 1} or 'all' for the {len(everything)} cases of"
            f" {dataset_dir}: give --fold 0, for example."
        )
    return [by_name[n] for n in existing[fold]["train"]], [by_name[n] for n in existing[fold]["val"]]


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
