"""One owner of a folder at a time: the lock of the process that writes there, which ends with that process.

The system's record locks decide. Unlike a file that only exists, they end with their owner, however it dies, so that a
job which is queued again finds its folder free, on whatever computer; unlike flock, NFS passes them on to other
computers, and a loader's workers do not inherit them. The file says who the owner is.
"""

from __future__ import annotations

import atexit
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from .errors import UserError
from .files import check_writable, explained

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger("mednext")
_held: dict[Path, TextIO] = {}  # by this process


def own(folder: str | Path, work: str) -> None:
    """Lock a folder for the rest of this process; of several that torchrun started, the first one does.

    Args:
        folder: which is made if it is missing.
        work: what the owner does there, which names the file of the lock: "training".

    Raises:
        UserError: another process does that work there, or nothing can be written there.
    """
    if os.environ.get("RANK", "0") != "0" or fcntl is None:
        return
    check_writable(folder)
    path = (Path(folder) / f"{work}.lock").absolute()
    release(path)
    try:
        file = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in (errno.EACCES, errno.EAGAIN):
            logger.warning("%s cannot be locked (%s): start nothing else there.", path, e.strerror)
            return
        owner = path.read_text(errors="replace").strip() if path.is_file() else ""
        raise UserError(
            f"{path.parent} belongs to another {work} ({owner or 'of another process'}); wait for its end, or give"
            " another folder."
        ) from None
    file.seek(0)
    if before := file.read().strip():
        logger.warning("%s: the %s of %s has ended without a word; this one takes its place.", folder, work, before)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    file.flush()
    _held[path] = file
    atexit.register(release, path, os.getpid())


@contextmanager
def owned(folder: str | Path, work: str) -> Iterator[None]:
    """Lock a folder for a while, see `own`."""
    own(folder, work)
    try:
        yield
    finally:
        release((Path(folder) / f"{work}.lock").absolute())


def release(path: Path, process: int | None = None) -> None:
    """Give up the lock in a file, if it is held; a fork of its owner does not."""
    file = _held.pop(path, None) if process in (None, os.getpid()) else None
    if file is not None:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()


@contextmanager
def alone(file: Path) -> Iterator[None]:
    """Let one process at a time change a file that several read, change and write again; the others wait."""
    path, lock = file.with_name(f"{file.name}.lock"), None
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            lock = _locked(path, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock is not None:
            path.unlink(missing_ok=True)
            lock.close()


def _not_followed(path: str, flags: int) -> int:
    """Open a file that is no symbolic link: what such a link leads to is not ours to write."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def _locked(path: Path, how: int) -> TextIO:
    """Open and lock a file.

    Raises:
        UserError: it cannot be written.
        OSError: it cannot be locked.
    """
    while True:
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8", errors="replace", opener=_not_followed)  # noqa: SIM115
        try:
            fcntl.lockf(file, how)
            if os.fstat(file.fileno()).st_nlink:  # else the owner before removed it at its end
                return file
        except BaseException:
            file.close()
            raise
        file.close()
