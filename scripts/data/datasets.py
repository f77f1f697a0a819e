"""Training folders, parsed once: Medical Segmentation Decathlon's and nnU-Net's layouts.

A case is a dictionary `{"case": id, "image": file or list of files (one a channel), "label": file}`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from ..utils.errors import UserError
from ..utils.files import read_json
from .case_lists import case_files, check_names, read_cases
from .folds import SPLITS, Fold, read_folds
from .images import ENDINGS, PICTURE, parts
from .labels import Labels, LabelSettings
from .scans import CHANNEL, case_id, image_files, list_scans, stem


class ChannelSettings(LabelSettings, Protocol):
    """Name what is written of labels and channels beside a set of weights, see weights/model_settings.py."""

    @property
    def in_channels(self) -> int: ...
    @property
    def channels(self) -> Sequence[str] | None: ...


class Dataset:
    """Knows the cases, channels, labels and folds of a training folder; `dataset.json` is parsed when it is made.

    Args:
        folder: a Decathlon or nnU-Net v2 folder.

    Raises:
        UserError: no such folder or file, not JSON, or no usable labels and channels in it.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.file = self.folder / "dataset.json"
        self.description = _description(self.folder, self.file)
        self.is_nnunet = "channel_names" in self.description
        self.channels = _channels(self.description, self.file)
        self.labels = Labels.from_dataset_json(self.description, self.file)

    @cached_property
    def listed_cases(self) -> list[dict]:
        """Cases that the folder should have, sorted by id; their files may be missing."""
        found = self._nnunet_cases() if self.is_nnunet else self._decathlon_cases()
        check_names([case["case"] for case in found], self.file)
        return sorted(found, key=lambda case: case["case"])

    @cached_property
    def cases(self) -> list[dict]:
        """All labelled cases, sorted by id.

        Raises:
            UserError: files are missing, or there are fewer than two cases.
        """
        found = self.listed_cases
        if missing := [(case["case"], path) for case in found for path in missing_files(case)]:
            shown = "\n  ".join(f"{path} not found, which case {name} needs" for name, path in missing)
            raise UserError(f"{self.folder} lacks {len(missing)} files; add them or remove their cases:\n  {shown}")
        if len(found) < 2:
            raise UserError(
                f"{self.folder} has {len(found)} labelled cases; expected at least 2, to train and to validate."
            )
        return found

    @cached_property
    def folds(self) -> list[Fold]:
        """Ids of the cases that each fold trains on ("train") and holds out ("val"), see folds.py."""
        return read_folds(self.folder, [case["case"] for case in self.cases])

    def split(self, fold: int | str) -> tuple[list[dict], list[dict]]:
        """Return (training cases, held-out cases) of a fold; `"all"` trains and validates on everything.

        Raises:
            UserError: `fold` is out of range.
        """
        if fold == "all":
            return self.cases, self.cases
        if not isinstance(fold, int) or not 0 <= fold < len(self.folds):
            raise UserError(
                f"fold is {fold!r}; expected 0 to {len(self.folds) - 1} or 'all' for the {len(self.cases)} cases of"
                f" {self.folder}: give --fold 0, for example."
            )
        by_id = {case["case"]: case for case in self.cases}
        training, held_out = ([by_id[name] for name in self.folds[fold][part]] for part in ("train", "val"))
        return training, held_out

    def training_cases(self, fold: int | str) -> list[dict]:
        """Return the cases that `fold` trains on.

        Raises:
            UserError: there are none.
        """
        if not (found := self.split(fold)[0]):
            raise UserError(
                f"{self.folder / SPLITS} trains fold {fold} on no case; correct the split, or give --fold all."
            )
        return found

    def validation_cases(self, fold: int | str) -> list[dict]:
        """Return the cases that `fold` holds out; there may be none."""
        return self.split(fold)[1]

    def scored_cases(self, fold: int | str) -> list[dict]:
        """Return the cases that `fold` holds out, which are to be scored.

        Raises:
            UserError: there are none.
        """
        if not (found := self.validation_cases(fold)):
            raise UserError(
                f"{self.folder / SPLITS} holds out no case in fold {fold}; give another --fold, or --fold all."
            )
        return found

    def _decathlon_cases(self) -> list[dict]:
        listed = self.description.get("training")
        if isinstance(listed, str):
            found = read_cases(self.folder / listed, label=True)
            return [self._case(name, files) for name, files in found]
        if not isinstance(listed, list):
            raise UserError(f'{self.file} has no "training" list; expected Decathlon or nnU-Net v2 layout.')
        return [self._decathlon_case(number, entry) for number, entry in enumerate(listed)]

    def _decathlon_case(self, number: int, entry: object) -> dict:
        """Read an entry of the list; several images are the channels of one case, known by the first of them."""
        if not (paths := case_files(entry)):
            raise UserError(
                f'{self.file} has {repr(entry)[:80]} as "training" case {number}; expected {{"image": FILE or a list of'
                ' them, one a channel, "label": FILE}: correct it.'
            )
        *files, label = (str(self.folder / path) for path in paths)
        return self._case(None, [*self._channel_files(files), label])

    def _case(self, name: str | None, files: list[str]) -> dict:
        *images, label = files
        name = case_id(Path(images[0]), len(self.channels)) if name is None else name
        return {"case": name, "image": images[0] if len(images) == 1 else images, "label": label}

    def _channel_files(self, files: list[str]) -> list[str]:
        """List the files of the channels, case_0000 and so on, of a case that nnU-Net v1 lists as one file, case."""
        listed, name = Path(files[0]), stem(Path(files[0]))
        found = [f"{name}_{channel:04d}{listed.name[len(name) :]}" for channel in range(len(self.channels))]
        is_v1 = len(files) == 1 and not os.path.exists(listed) and os.path.exists(listed.parent / found[0])
        return [str(listed.parent / file) for file in found] if is_v1 else files

    def _listed_nnunet_case(self, name: str, entry: object) -> dict:
        """Read an entry of nnU-Net's "dataset", whose files may lie anywhere."""
        if not (paths := case_files(entry, "images")):
            raise UserError(
                f'{self.file} has {repr(entry)[:80]} as "dataset" case {name}; expected {{"images": [FILE, ..], one a'
                ' channel, "label": FILE}: correct it.'
            )
        return self._case(name, [str(self.folder / path) for path in paths])

    def _nnunet_cases(self) -> list[dict]:
        if isinstance(listed := self.description.get("dataset"), dict):
            return [self._listed_nnunet_case(name, entry) for name, entry in listed.items()]
        ending, known = self.description.get("file_ending", ".nii.gz"), (*ENDINGS, *PICTURE.endings)
        if ending not in known:
            raise UserError(
                f'{self.file} gives "file_ending" {ending!r}; expected one of {", ".join(known)}: convert the files.'
            )
        endings = ENDINGS if ending in ENDINGS else (ending,)
        images, labels = self.folder / "imagesTr", self.folder / "labelsTr"
        for folder in (images, labels):
            if not folder.is_dir():
                raise UserError(f"{folder} not found; expected the nnU-Net v2 layout (imagesTr, labelsTr).")
        names = {CHANNEL.sub("", stem(p)) for p in list_scans(images, endings)}
        names |= {stem(path) for path in list_scans(labels, endings)}
        found = []
        for name in names:
            files = [str(images / f"{name}_{channel:04d}{ending}") for channel in range(len(self.channels))]
            found.append(self._case(name, [*files, str(labels / f"{name}{ending}")]))
        return found


class GivenCases:
    """Stands for a data set where a host gives the cases as lists: weights say what their labels and channels are.

    Args:
        settings: what is written beside the weights.
    """

    def __init__(self, settings: ChannelSettings) -> None:
        self.labels = Labels.from_settings(settings)
        self.channels = list(settings.channels or (f"channel {number}" for number in range(settings.in_channels)))


def _description(folder: Path, file: Path) -> dict:
    """Parse dataset.json, whose labels and channels must be dictionaries."""
    if not folder.is_dir():
        raise UserError(f"dataset_dir {folder} does not exist; give the folder that holds dataset.json.")
    if not file.is_file():
        raise UserError(
            f"{file} not found; dataset_dir must be a Medical Segmentation Decathlon or nnU-Net v2 folder"
            " (dataset.json, imagesTr, labelsTr)."
        )
    description = read_json(file)
    if not isinstance(description, dict):
        raise UserError(
            f'{file} holds a {type(description).__name__}; expected a dictionary with "labels": correct it.'
        )
    for key in ("labels", "channel_names" if "channel_names" in description else "modality"):
        if not isinstance(description.get(key), dict):
            wanted = '"labels" and "channel_names" (nnU-Net v2) or "modality" (Decathlon)'
            raise UserError(f'{file} has no "{key}" dictionary; expected {wanted}.')
    return description


def _channels(description: dict, file: Path) -> list[str]:
    """List the names of the channels by their numbers."""
    key = "channel_names" if "channel_names" in description else "modality"
    names = description[key]
    numbers = [int(number) for number in names if number.isdecimal() and len(number) < 9]
    if not names or len(set(numbers)) < len(names) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(
            f'{file} gives "{key}" {repr(names)[:200]}; expected a name a channel, such as'
            ' {"0": "T1", "1": "T2"}: correct it.'
        )
    return [names[number] for number in sorted(names, key=int)]


def missing_files(case: dict) -> list[str]:
    """List those of a case's files that are not there."""
    files = [path for path in (*image_files(case), case["label"]) if not os.path.isdir(path)]  # of any text
    return [
        part for path in files for part in (parts(path) if os.path.isfile(path) else [path]) if not os.path.isfile(part)
    ]
