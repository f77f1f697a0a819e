"""Files appear whole or not at all, and are known by their bytes."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from .errors import UserError

STARTS = r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"  # of a formula, also in full width, marked or not
FORMULA, MARKED = re.compile(STARTS), re.compile(f"'(?={STARTS})")


def read_json(path: Path) -> object:
    """Read a JSON file that a person may have written, in UTF-8 with or without its mark.

    Raises:
        UserError: it cannot be read, is not JSON, or holds text that no file and no screen can show.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(content, ensure_ascii=False).encode()  # halves of characters are JSON, but no text
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); mend its permissions or copy it again.") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON ({e}); correct it.") from e
    return content


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then put that in the place of `path`; missing folders are made.

    Several processes may write the same file at once: each fills one of its own, and the last one stays. Where `write`
    fails nothing is left behind and what was there before stays.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def remembered(path: Path) -> dict:
    """Return what an earlier run left in a JSON file, or {} where there is no such file or it is damaged."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def sha256(path: str | Path) -> str:
    """Compute the SHA-256 of a file, as `sha256sum` prints it."""
    found = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def is_intact(path: str | Path) -> bool:
    """Compare every record of a zip archive with its CRC-32, which torch.save writes and torch.load does not look at.

    Any flipped bit or burst of up to 32 is found, in 0.3 s a gigabyte; SHA-256 takes twice as long.
    """
    with open(path, "rb") as stream:
        try:
            with zipfile.ZipFile(stream) as archive:
                return archive.testzip() is None
        except Exception:  # damaged headers raise many kinds: another method, encryption, places before the first byte
            return False


def write_table(path: str | Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> None:
    """Write a CSV file in UTF-8, whole or not at all, in which no text is a formula to a spreadsheet.

    A text that begins like one gets a quotation mark in front, which `read_table` takes away; numbers stay numbers.
    """

    def fill(partial: Path) -> None:
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, columns)
            writer.writerow({name: _marked(name) for name in columns})
            writer.writerows({name: _marked(value) for name, value in row.items()} for row in rows)

    write_whole(path, fill)


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file as texts, as `write_table` was given them.

    Raises:
        UserError: it is no such table.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            header, *lines = [
                [MARKED.sub("", cell, count=1) for cell in line] for line in csv.reader(file) if line
            ] or [[]]
        return [dict(zip(header, line, strict=True)) for line in lines]
    except (OSError, ValueError, csv.Error) as e:
        raise UserError(f"{path} is not a table in CSV ({e}); restore it, or make it again.") from e


def _marked(value: object) -> object:
    if not isinstance(value, str) or not FORMULA.match(value):
        return value
    try:
        float(value)  # as a row that was read before has it
        return value
    except ValueError:
        return f"'{value}"
