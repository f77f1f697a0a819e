"""Which scans there are to segment: a file, a folder of files or of DICOM folders, a training folder's test scans."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ..utils.errors import UserError
from . import case_lists, dicom_series
from .images import DICOM, ENDINGS, MASK_ENDINGS, PICTURE, format_of

OTHER_ENDINGS = (".img", ".hdr", ".mgz", ".mgh", ".mnc")  # images, not read
STEM_ENDINGS = (MASK_ENDINGS["nrrd"], *ENDINGS, *PICTURE.endings)  # the longest of a kind first
MASK = "_seg"  # what stands behind a case's id in the name of its mask
CHANNEL = re.compile(r"_(\d{4})$")  # nnU-Net's case_0000.nii.gz

logger = logging.getLogger("mednext")


def image_files(case: dict) -> list[str]:
    """List the image files of a case: one, or one a channel."""
    return [case["image"]] if isinstance(case["image"], str) else list(case["image"])


def list_scans(folder: Path, endings: tuple[str, ...] = ENDINGS) -> list[Path]:
    """List the scans of a folder by their endings, sorted; none where there is no such folder.

    A mask that an earlier run has laid beside its scan is none, nor is what Slicer calls a segmentation. What looks
    like an image and is left out is logged.
    """
    if not folder.is_dir():
        return []
    known = (*endings, *OTHER_ENDINGS, *dicom_series.ENDINGS)
    images = sorted(path for path in folder.iterdir() if path.name.lower().endswith(known))
    candidates = [path for path in images if _is_scan(path, endings)]
    cases = {name for path in candidates for name in (stem(path), CHANNEL.sub("", stem(path)))}
    masks = {f"{case}{MASK}" for case in cases}
    scans = [path for path in candidates if stem(path) not in masks]
    alone = () if scans else dicom_series.ENDINGS  # where there is nothing else, DICOM files may be the scan
    if left_out := [p.name for p in images if p not in scans and not p.name.lower().endswith(alone)]:
        logger.warning("left out of %s as masks, hidden, broken or of another format: %s", folder, ", ".join(left_out))
    return scans


def is_file_of(path: Path, endings: tuple[str, ...]) -> bool:
    """Tell whether a path is a file, not hidden, that ends so."""
    return path.is_file() and path.name.lower().endswith(endings) and not path.name.startswith(".")


def _is_scan(path: Path, endings: tuple[str, ...]) -> bool:
    return is_file_of(path, endings) and not path.name.lower().endswith(MASK_ENDINGS["nrrd"])


def stem(path: Path) -> str:
    """Strip the ending from a file's name; a folder's has none."""
    for ending in STEM_ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.name if os.path.isdir(path) else path.stem  # which has an answer for any text


def find_scans(dataset_dir: str, channels: int = 1, series: str | None = None, dim: str = "3d") -> list[dict]:
    """Find unlabelled cases: a file, a folder of files, or a training folder (its imagesTs, else its imagesTr).

    With several channels, `case_0000.nii.gz, case_0001.nii.gz, ..` are one case; a 4D file brings its channels itself.
    A folder with DICOM files is one scan; where it has none itself, each of its folders is one that has some, or that
    has folders with some.

    Args:
        dataset_dir: file or folder, or a list of cases in CSV or JSON, see case_lists.py.
        channels: of the network.
        series: UID of the one DICOM series that is meant.
        dim: of the network; pictures are scans of one that is "2d".

    Returns:
        Of each case `{"case": id, "image": file or list of files}`, sorted by id.

    Raises:
        UserError: nothing to segment is found.
    """
    path = Path(dataset_dir)
    if path.suffix.lower() in case_lists.ENDINGS and path.is_file():
        if series:
            raise UserError(f'series is {series}, and {path} lists cases; give each case its own "series" there.')
        return _listed(path, channels)
    endings = (*ENDINGS, *PICTURE.endings) if dim == "2d" else ENDINGS
    if series:
        stands_for_it = dicom_series.file_of(path, series)
        return [{"case": case_id(Path(stands_for_it), 1), "image": stands_for_it}]
    files = _files_of_one(path, channels, endings) if path.is_file() else _files_in(path, endings)
    if not files:
        raise UserError(
            f"{path} holds no {', '.join(endings)} file and no DICOM series; give a scan or a folder of them"
            f"{'' if dim == '2d' else ' (pictures are for 2D networks)'}."
        )
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


def _listed(path: Path, channels: int) -> list[dict]:
    found = [(name or case_id(Path(files[0]), channels), files) for name, files in case_lists.read_cases(path)]
    case_lists.check_names([name for name, _ in found], path)
    return [{"case": name, "image": files[0] if len(files) == 1 else files} for name, files in sorted(found)]


def _files_of_one(path: Path, channels: int, endings: tuple[str, ...]) -> list[Path]:
    if not path.name.lower().endswith(endings):
        if dicom_series.is_dicom(path):
            return [path]  # one slice stands for its series
        raise UserError(f"{path} is no scan by its name; expected {', '.join(endings)}, or a DICOM file.")
    if channels == 1:
        return [path]
    own = case_id(path, channels)  # one channel stands for its case
    return [p for p in path.parent.iterdir() if _is_scan(p, endings) and case_id(p, channels) == own]


def _files_in(path: Path, endings: tuple[str, ...]) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"dataset_dir {path} does not exist; give a scan or a folder of them.")
    folders = [path] + [path / name for name in ("imagesTs", "imagesTr") if (path / name).is_dir()]
    kinds = (ENDINGS, endings) if endings != ENDINGS else (ENDINGS,)  # beside volumes, pictures are only pictures
    files = next((found for kind in kinds for folder in folders if (found := list_scans(folder, kind))), [])
    return files or next((found for folder in folders if (found := _dicom_folders(folder))), [])


def _dicom_folders(path: Path) -> list[Path]:
    """List the folders that are a scan each: this one, or those in it."""
    if any(dicom_series.is_dicom(file) for file in path.iterdir() if file.is_file()):
        folders = [path]
    else:
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and dicom_series.dicom_files(folder))
    found: dict[Path, list] = {}
    for folder in folders:
        try:
            series = found[folder] = dicom_series.find_series(folder)
        except UserError:  # is said when the scan is read
            found[folder] = [folder]
            continue
        if len(series) > 1:
            others = ", ".join(map(str, series[1:4])) + (" and more" if len(series) > 4 else "")
            logger.warning("%s: series %s is taken; --series UID takes another: %s", folder, series[0], others)
    if left_out := [str(folder) for folder, series in found.items() if not series]:
        logger.warning("left out as without a series of slices: %s", ", ".join(left_out))
    return [folder for folder, series in found.items() if series]


def case_id(path: Path, channels: int) -> str:
    """Name the case of a file; a suffix is a channel only where there can be such a one (not in scan_2024.nii.gz).

    A slice of a DICOM series has the name of its folder.
    """
    if path.name in ("", "..") or (os.path.isfile(path) and format_of(path) is DICOM):
        path = path.resolve() if path.is_dir() else path.resolve().parent
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


def mask_file(case: str, scan: object = None, output_format: str | None = None) -> str:
    """Name the file of a case's mask.

    Args:
        case: its id.
        scan: its image, whose format the mask has; None for NIfTI, which scoring, pooling and pictures look for.
        output_format: of `MASK_ENDINGS`, instead of the scan's.
    """
    return f"{case}{MASK}{MASK_ENDINGS[output_format or mask_format(scan)]}"


def mask_format(scan: object) -> str:
    """Name the format, of `MASK_ENDINGS`, in which masks of such a scan are written; NIfTI for None."""
    return "nii.gz" if scan is None else format_of(str(scan)).mask


def case_of(meta: Mapping) -> str:
    """Look up the id of a case in the metadata of its image or mask; a host may have left the name of a file alone."""
    return meta.get("case") or case_id(Path(str(meta["filename_or_obj"])), 1)


def mask_name(meta: Mapping, _saver: object = None) -> dict:
    """Give MONAI's `SaveImaged(output_name_formatter=)` the id of a mask's case, no patch index, and its scan."""
    return {"subject": case_of(meta), "idx": None, "scan": meta.get("filename_or_obj")}
