"""Files appear whole or not at all, and are known by their bytes."""

from __future__ import annotations

import hashlib
import json
import uuid
import zipfile
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


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
