"""Files appear whole or not at all, and are known by their bytes."""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STARTS = r"'*[=+\-@\t\r\n\uff1d\uff0b\uff0d\uff20]"  # of a formula, also in full width, marked or not
PARTIAL = re.compile(r"\.[0-9a-f]{32}\.part$")  # of a file or folder that is being written
TORCH_WRITER = re.compile("inline_container|PytorchStreamWriter")  # in what it raises instead of OSError
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

    It is on the disk by then. A symbolic link is replaced, not followed. Several processes may write the same file at
    once: each fills one of its own, and the last one stays. Where `write` fails nothing is left behind and what was
    there before stays; what a killed process left behind is removed by the next one that writes into the folder.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    with explained(path), _beside(path, Path.touch) as partial:
        write(partial)
        _sync(partial)
        partial.replace(path)
        with suppress(OSError):  # not every system has this for folders
            _sync(path.parent)


def write_folder_whole(path: str | Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` make files in a folder beside `path`, which then gets that name; see `write_whole`.

    Raises:
        UserError: it cannot be written, or `path` is there.
    """
    path = Path(path)
    with explained(path), _beside(path, Path.mkdir) as partial:
        fill(partial)
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        partial.rename(path)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def copy_file(source: str | Path, path: str | Path) -> None:
    """Copy a file with its times, whole or not at all."""
    write_whole(path, lambda partial: shutil.copy2(source, partial))


@contextmanager
def scratch_file(folder: str | Path, size: int) -> Iterator[IO[bytes]]:
    """Open a file of `size` zeros in a folder, which no name shows and which ends with who has it open or mapped.

    Raises:
        UserError: there is no room for it.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with explained(Path(folder)), tempfile.TemporaryFile(dir=folder, suffix=_suffix()) as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a mapped file that grows as it is written kills the process
        else:
            file.truncate(size)
        yield file


def check_writable(*folders: str | Path, need: int = 0) -> None:
    """Check that files can be written into folders, or into what is there of the path to them; nothing is left.

    Args:
        folders: where a command is going to write.
        need: so many bytes have to be free in each.

    Raises:
        UserError: one takes none, or not so many.
    """
    for folder in map(Path, folders):
        with explained(folder):
            there = next(part for part in (folder.absolute(), *folder.absolute().parents) if part.exists())
            with tempfile.TemporaryFile(dir=there, suffix=_suffix()) as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
            free = shutil.disk_usage(there).free
        if free < need:
            raise UserError(
                f"{folder} has {free / 1e6:.0f} MB of free space, {need / 1e6:.0f} MB are needed; make room there, or"
                " give another folder."
            )


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say what could not be written, why, and what to do."""
    try:
        yield
    except (OSError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and not TORCH_WRITER.search(str(e)):
            raise
        raise UserError(
            f"{path} could not be written ({_reason(e, path)}); make room there or mend its permissions, or give"
            " another folder."
        ) from e


def _reason(error: OSError | RuntimeError, path: Path) -> str:
    if isinstance(error, RuntimeError):
        return "the disk takes no more"
    other = Path(str(error.filename or path))  # the source, where that cannot be read
    known = other == path or error.filename2 or PARTIAL.search(other.name)
    return f"{error.strerror or error}{'' if known else f': {other}'}"


@contextmanager
def _beside(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """Make a file or folder beside `path` and lock it; nothing is left under its name in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path.parent.absolute())
    partial, lock = _made(path, make)
    try:
        yield partial
    finally:
        with suppress(OSError):
            _remove(partial)
        if lock is not None:
            os.close(lock)


def _suffix() -> str:
    return f".{uuid.uuid4().hex}.part"


def _made(path: Path, make: Callable[[Path], object]) -> tuple[Path, int | None]:
    """Make and lock a file or folder beside `path`, under another name where one was swept before it was locked."""
    while True:
        partial = path.with_name(f"{path.name}{_suffix()}")
        make(partial)
        try:
            lock = _locked(partial)
        except (FileNotFoundError, BlockingIOError):
            continue
        except OSError:  # a file system without locks, where nothing is swept
            return partial, None
        if partial.exists():
            return partial, lock
        if lock is not None:
            os.close(lock)


def _locked(partial: Path) -> int | None:
    """Open and lock a file or folder; None where the system has no locks.

    Others may open and close the file meanwhile, which would end a lock of lockf.

    Raises:
        OSError: it has gone, another process has locked it (BlockingIOError), or the file system has no locks.
    """
    if fcntl is None:
        return None
    descriptor = os.open(partial, os.O_RDONLY if partial.is_dir() else os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


@functools.cache
def _sweep(folder: Path) -> None:
    """Remove what processes that have ended left half written; those that still write hold a lock."""
    for partial in folder.glob("*.part"):
        with suppress(OSError):
            if PARTIAL.search(partial.name) and (lock := _locked(partial)) is not None:
                _remove(partial)
                os.close(lock)


def _remove(partial: Path) -> None:
    if partial.is_dir():
        shutil.rmtree(partial)
    else:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Have a file or folder written to the disk, also one that is for reading alone."""
    if fcntl is None:  # where that is not possible
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remembered(path: Path) -> dict:
    """Return what an earlier run left in a JSON file, or {} where there is no such file or it is damaged.

    Raises:
        UserError: it cannot be read, as a folder of that name cannot: nor could it be written.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}); move it away, or mend its permissions.") from e
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
