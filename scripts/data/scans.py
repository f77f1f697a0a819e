"""Which scans there are to segment: a file, a folder of files, or the test scans of a training folder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..utils.errors import UserError
from .images import ENDINGS

OTHER_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd", ".img", ".hdr", ".mgz", ".mgh", ".mnc", ".dcm")  # images, not read
MASK = "_seg"  # what stands behind a case's id in the name of its mask
CHANNEL = re.compile(r"_(\d{4})$")  # nnU-Net's case_0000.nii.gz

logger = logging.getLogger("mednext")


def image_files(case: dict) -> list[str]:
    """List the image files of a case: one, or one a channel."""
    return [case["image"]] if isinstance(case["image"], str) else list(case["image"])


def list_scans(folder: Path) -> list[Path]:
    """List the NIfTI files of a folder, sorted; none where there is no such folder.

    A mask that an earlier run has laid beside its scan is none. What looks like an image and is left out is logged.
    """
    if not folder.is_dir():
        return []
    images = sorted(path for path in folder.iterdir() if path.name.lower().endswith((*ENDINGS, *OTHER_ENDINGS)))
    candidates = [path for path in images if is_nifti(path)]
    cases = {name for path in candidates for name in (stem(path), CHANNEL.sub("", stem(path)))}
    masks = {f"{case}{MASK}" for case in cases}
    scans = [path for path in candidates if stem(path) not in masks]
    if left_out := [path.name for path in images if path not in scans]:
        logger.warning("left out of %s as masks, hidden, broken or no NIfTI files: %s", folder, ", ".join(left_out))
    return scans


def is_nifti(path: Path) -> bool:
    """Tell whether a path is a file, not hidden, that ends as NIfTI files do."""
    return path.is_file() and path.name.lower().endswith(ENDINGS) and not path.name.startswith(".")


def stem(path: Path) -> str:
    """Strip the ending from a file's name."""
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def find_scans(dataset_dir: str, channels: int = 1) -> list[dict]:
    """Find unlabelled cases: a file, a folder of files, or a training folder (its imagesTs, else its imagesTr).

    With several channels, `case_0000.nii.gz, case_0001.nii.gz, ..` are one case; a 4D file brings its channels itself.

    Returns:
        Of each case `{"case": id, "image": file or list of files}`, sorted by id.

    Raises:
        UserError: nothing to segment is found.
    """
    path = Path(dataset_dir)
    files = _files_of_one(path, channels) if path.is_file() else _files_in(path)
    if not files:
        raise UserError(f"{path} holds no {' or '.join(ENDINGS)} file; give a NIfTI file or a folder of them.")
    groups: dict[str, list[str]] = {}
    for file in sorted(files):
        groups.setdefault(case_id(file, channels), []).append(str(file))
    for name, group in groups.items():
        numbers = [found[1] for file in group if (found := CHANNEL.search(stem(Path(file))))]
        if len(group) > 1 and len(set(numbers)) < len(group):
            raise UserError(
                f"{', '.join(group)} are of one case, {name}, and not a channel each of {channels}; move those that are"
                " not meant, or name them case_0000, case_0001 and so on."
            )
    return [{"case": name, "image": group[0] if len(group) == 1 else group} for name, group in sorted(groups.items())]


def _files_of_one(path: Path, channels: int) -> list[Path]:
    if not path.name.lower().endswith(ENDINGS):
        raise UserError(f"{path} is not a NIfTI file by its name; expected {' or '.join(ENDINGS)}.")
    if channels == 1:
        return [path]
    own = case_id(path, channels)  # one channel stands for its case
    return [p for p in path.parent.iterdir() if is_nifti(p) and case_id(p, channels) == own]


def _files_in(path: Path) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"dataset_dir {path} does not exist; give a NIfTI file or a folder of them.")
    folders = [path] + [path / name for name in ("imagesTs", "imagesTr") if (path / name).is_dir()]
    return next((found for folder in folders if (found := list_scans(folder))), [])


def case_id(path: Path, channels: int) -> str:
    """Name the case of a file; a suffix is a channel only where there can be such a one (not in scan_2024.nii.gz)."""
    match = CHANNEL.search(stem(path))
    return stem(path)[: match.start()] if match and int(match[1]) < channels else stem(path)


def named_cases(cases: Sequence[Mapping]) -> list[dict]:
    """Give an id, "case", to cases that have none, as those of a host: by their images, and no two files the same one.

    Where files of several folders have one name, as many of these as tell them apart stand before it. Paths become
    texts.
    """
    spelled = [{key: _as_text(value) for key, value in case.items()} for case in cases]
    files = [Path(image_files(case)[0]) for case in spelled]
    namesakes: dict[str, set[Path]] = {}
    for file in files:
        namesakes.setdefault(case_id(file, 1), set()).add(file)
    return [
        {"case": _told_apart(file, namesakes[case_id(file, 1)]), **case}
        for file, case in zip(files, spelled, strict=True)
    ]


def _told_apart(file: Path, namesakes: Collection[Path]) -> str:
    """Name a file by its id, with as many of its folders before it as tell its namesakes apart."""
    folders = (n for n in range(len(file.parts)) if len({_joined(other, n) for other in namesakes}) == len(namesakes))
    return _joined(file, next(folders, 0))


def _as_text(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_as_text(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _joined(file: Path, folders: int) -> str:
    """Name a file by its id, with so many of its folders before it."""
    above = file.parent.relative_to(file.anchor).parts
    return "_".join([*above[len(above) - folders :], case_id(file, 1)]) if folders else case_id(file, 1)


def mask_file(case: str) -> str:
    """Name the file of a case's mask, which scoring, pooling and pictures look for."""
    return f"{case}{MASK}.nii.gz"


def case_of(meta: Mapping) -> str:
    """Look up the id of a case in the metadata of its image or mask; a host may have left the name of a file alone."""
    return meta.get("case") or case_id(Path(str(meta["filename_or_obj"])), 1)


def mask_name(meta: Mapping, _saver: object = None) -> dict:
    """Give MONAI's `SaveImaged(output_name_formatter=)` the id of a mask's case, no patch index."""
    return {"subject": case_of(meta), "idx": None}
