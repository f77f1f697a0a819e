"""Lists of cases, in CSV or JSON, whose files may lie anywhere."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..utils.errors import UserError
from ..utils.files import read_json, read_table
from ..utils.settings_table import SETTINGS
from . import dicom_series

ENDINGS = (".csv", ".json")
SERIES = re.compile(r"series(_\d{4})?")  # columns
EXPECTED = (
    'expected a CSV file with a column "image" (with several channels "image_0000", "image_0001", ..), or a JSON list'
    ' of FILE, [FILE, ..] with one a channel, or {"image": FILE or [FILE, ..]}; in both, "case" may give a name,'
    ' "series" the UID of the DICOM series that is meant, of several channels one each'
)


def read_cases(path: Path, label: bool = False) -> list[tuple[str | None, list[str]]]:
    """Read the cases of a list: names, and files, one a channel, by their place or relative to the list's folder.

    Args:
        path: of the list; of a dictionary, such as dataset.json, its "testing" or "test" list.
        label: whether the last file of each case is its "label".

    Raises:
        UserError: it cannot be read, is no such list, or empty; a DICOM series that an entry names is not there.
    """
    listed = _rows(path) if path.suffix.lower() == ".csv" else read_json(path)
    if isinstance(listed, dict):
        listed = listed.get("testing", listed.get("test"))
    if not isinstance(listed, list) or not listed:
        raise UserError(f"{path} lists no cases; {EXPECTED}.")
    found = []
    for number, entry in enumerate(listed):
        name = entry.get("case") or None if isinstance(entry, dict) else None
        files = case_files(entry, label="label" if label else None)
        if not files or not isinstance(name, str | None):
            also = ', and its "label"' if label else ""
            raise UserError(f"{path} has {repr(entry)[:80]} as case {number}; {EXPECTED}{also}: correct it.")
        uids = [*_series(entry, f"series of case {number} of {path}", len(files) - label), *[None] * label]
        places = [str(path.parent / file) for file in files]
        found.append((name, [dicom_series.file_of(p, uid) if uid else p for p, uid in zip(places, uids, strict=True)]))
    return found


def _series(entry: object, called: str, images: int) -> list[str | None]:
    """List the DICOM series that an entry names, one an image, each None where it names none."""
    found = (entry.get("series") if isinstance(entry, dict) else None) or [None] * images
    uids = [SETTINGS["series"].of(uid or None, called) for uid in (found if isinstance(found, list) else [found])]
    if len(uids) != images:
        raise UserError(f"{called} is {found}; expected a UID for each of the {images} images, in a list.")
    return uids


def _rows(path: Path) -> list[dict]:
    """Read a table, whose columns that begin with "image" are the channels; "series", "series_0000" are theirs."""
    return [
        {
            **row,
            "image": [file for column, file in sorted(row.items()) if column.startswith("image")],
            "series": [uid.strip() for column, uid in sorted(row.items()) if SERIES.fullmatch(column)],
        }
        for row in read_table(path)
    ]


def case_files(entry: object, image: str = "image", label: str | None = "label") -> list[str]:
    """List the files that an entry names: of its image, one a channel, then its label; none where it is no entry."""
    found = entry if isinstance(entry, dict) else {image: entry}
    images = found.get(image)
    files = [images] if isinstance(images, str) else images if isinstance(images, list) else []
    files = [*files, *([found.get(label)] if label else [])] if files else []
    return files if all(isinstance(file, str) and file.strip() for file in files) else []


def check_names(names: Sequence[str], path: Path) -> None:
    """Raise UserError unless each case has a name of its own that a file in a folder can have."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path} lists {twice[0]} more than once; give each case its own name.")
    if bad := [name for name in names if not name or Path(name).name != name or "\0" in name]:
        raise UserError(f"{path} has a case {bad[0]!r}; expected a name that a file can have: rename it.")
