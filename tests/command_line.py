"""The real command line, `python -m MODULE ARGUMENTS`: in this process, or in one of its own where that is the point.

A process of its own imports PyTorch and MONAI again, which costs seconds of CPU. In this process the same module runs
as `__main__` on the same arguments, and whatever it changes that later tests could see is put back.
"""

from __future__ import annotations

import gc
import io
import logging
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import matplotlib
import numpy as np
import torch

from scripts.kernels.precision import bfloat16_pays
from scripts.utils import errors, ownership
from scripts.utils.signals import SIGNALS

ROOT = Path(__file__).resolve().parents[1]
STATE: tuple[tuple[Callable[[], object], Callable[..., object]], ...] = (  # how to look at it, how to set it
    (os.getcwd, os.chdir),
    (lambda: [signal.getsignal(n) for n in SIGNALS], lambda handlers: list(map(signal.signal, SIGNALS, handlers))),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.multiprocessing.get_sharing_strategy, torch.multiprocessing.set_sharing_strategy),
)


def run_module(module: str, *arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run `python -m module arguments` in this process; return its exit code and what it printed."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    path = [str(cwd), str(ROOT), *(entry for entry in sys.path if entry not in (str(cwd), str(ROOT)))]
    with ExitStack() as stack:
        for context in (
            state_put_back(),
            mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)),
            mock.patch.object(sys, "path", path),
            mock.patch.object(sys, "argv", [module, *command[3:]]),
            mock.patch.object(sys, "excepthook", sys.__excepthook__),
            # What glibc's allocator is told cannot be taken back, so the bundle is not to find it (utils.device).
            mock.patch("platform.libc_ver", return_value=("", "")),
            matplotlib.rc_context(),
            default_warnings(),
        ):
            stack.enter_context(context)
        stack.callback(give_up_locks)
        printed = stack.enter_context(captured())
        stack.enter_context(fresh_logging())
        if module == "monai.bundle":  # importing the bundle does this where MONAI's command line is the main module
            sys.excepthook = errors._print_user_error
        os.chdir(cwd)
        bfloat16_pays.cache_clear()  # says once a process what it decides
        for seed in (torch.seed, random.seed, np.random.seed):  # a new process begins with numbers of its own
            seed()
        code = exit_code(module)
    gc.collect()  # networks, engines and writers refer to each other in circles
    return subprocess.CompletedProcess(command, code, *map(text, printed))


def run_process(
    module: str, *arguments: object, cwd: Path = ROOT, launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    """Run `python -m module arguments`, started by `launcher`, in a process of its own."""
    command = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


def exit_code(module: str) -> int:
    """Run `module` as the main one and end it as the interpreter would: errors go to `sys.excepthook`."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except Exception as e:
        sys.excepthook(type(e), e, e.__traceback__)
        return 1
    return 0


@contextmanager
def state_put_back() -> Iterator[None]:
    """Put back what torch, NumPy, Python and the operating system keep for the whole process."""
    before = [(put, look()) for look, put in STATE]
    flags = {name: getattr(torch.backends.cudnn, name) for name in ("deterministic", "benchmark", "allow_tf32")}
    try:
        yield
    finally:
        for put, value in before:
            put(value)
        for name, value in flags.items():
            setattr(torch.backends.cudnn, name, value)


def give_up_locks() -> None:
    """Give up the folders that the command owns to the end of its process."""
    for path in [*ownership._held]:
        ownership.release(path)


@contextmanager
def default_warnings() -> Iterator[None]:
    """Print warnings to stderr by Python's own filters, as a process without pytest does."""

    def show(message, category, filename, lineno, file=None, line=None) -> None:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))

    with warnings.catch_warnings():
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        # runpy's, where a test has imported the module before
        warnings.filterwarnings("ignore", message=".* found in sys.modules", category=RuntimeWarning)
        # of scripts.preprocessing.resampling, set when it is imported and forgotten by pytest
        warnings.filterwarnings("ignore", message="align_corners=False is not compatible with scale_extent=True")
        warnings.showwarning = show
        yield


@contextmanager
def captured() -> Iterator[list]:
    """Yield two files that receive stdout and stderr of this process and of those that it starts."""
    streams = ((1, "stdout"), (2, "stderr"))
    files = [tempfile.TemporaryFile() for _ in streams]  # noqa: SIM115
    before = [(os.dup(number), getattr(sys, name)) for number, name in streams]
    try:
        for (number, name), file in zip(streams, files, strict=True):
            getattr(sys, name).flush()
            os.dup2(file.fileno(), number)
            setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
        yield files
    finally:
        for (number, name), (descriptor, stream) in zip(streams, before, strict=True):
            getattr(sys, name).flush()
            os.dup2(descriptor, number)
            os.close(descriptor)
            setattr(sys, name, stream)


def text(file) -> str:
    """Read a captured file as `subprocess` does with `text=True`, which makes a carriage return a line's end."""
    file.seek(0)
    with io.TextIOWrapper(file) as stream:
        return stream.read()


@contextmanager
def fresh_logging() -> Iterator[None]:
    """Log as a process without pytest does, and put every logger back: MONAI configures all of them by a file."""
    before = {logger: vars(logger).copy() for logger in loggers()}
    lists = {logger: (logger.handlers[:], logger.filters[:]) for logger in before}
    handlers = {handler for made, _ in lists.values() for handler in made}
    streams = {  # MONAI's, which write to what was stdout when it was imported
        handler: handler.setStream(sys.stdout) for handler in handlers if type(handler) is logging.StreamHandler
    }
    logging.root.handlers[:] = []
    try:
        yield
    finally:
        for handler, stream in streams.items():
            handler.setStream(stream)
        for logger in loggers():
            logger.handlers[:], logger.filters[:] = lists.get(logger, ([], []))
            logger.setLevel(before[logger]["level"] if logger in before else logging.NOTSET)
            logger.propagate = before[logger]["propagate"] if logger in before else True
            logger.disabled = before[logger]["disabled"] if logger in before else False


def loggers() -> list[logging.Logger]:
    """List the root logger and all others that were ever asked for."""
    made = logging.root.manager.loggerDict.values()
    return [logging.root, *(logger for logger in made if isinstance(logger, logging.Logger))]
