"""Errors that a user can mend are told in one sentence, without a traceback."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from types import TracebackType

from .signals import listen


class UserError(ValueError):
    """A fault in data, weights or settings that the user can mend.

    The message names the file, what was found, what was expected and what to do. On the command line it is printed
    alone and the exit code is 1; in Python it is an ordinary ValueError.
    """


LOST = re.compile(r"gloo|nccl|ProcessGroup|Connection (closed|reset) by peer|Broken pipe|Socket Timeout", re.IGNORECASE)


def told(faults: Sequence[str], cases: int) -> str:
    """Join the faults of some of so many cases, one a line; one alone speaks for itself."""
    if len(faults) == 1:
        return faults[0]
    return f"{len(faults)} of {cases} cases cannot be used:\n  " + "\n  ".join(faults)


def first_cause(error: BaseException) -> BaseException:
    """Return the UserError that `error` was raised from, or else the exception that it all began with.

    MONAI wraps what an expression of a config or a transform raises. Causes that refer to one another in a circle, as
    code that raises an earlier exception again can make them, are each visited once.
    """
    seen = {id(error)}
    while not isinstance(error, UserError):
        cause = error.__cause__ or error.__context__
        if cause is None or id(cause) in seen:
            break
        error = cause
        seen.add(id(error))
    return error


def run_command(function: Callable[..., object]) -> None:
    """Call `function` with the arguments of the command line, parsed by fire.

    A UserError is printed alone and the exit code is 1. Fire checks all arguments before `function` runs; on its own it
    would call the function first and complain about a mistyped option afterwards.

    Raises:
        UserError: the package fire is not installed.
    """
    sys.excepthook = _print_user_error
    listen()
    try:
        import fire
    except ImportError as e:
        raise UserError("the command line needs the package fire: pip install fire") from e
    calls = []

    @functools.wraps(function)
    def collect(*args: object, **kwargs: object) -> None:
        calls.append((args, kwargs))

    fire.Fire(collect)
    for args, kwargs in calls:
        function(*args, **kwargs)


def _print_user_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause = first_cause(error)
    rank = os.environ.get("RANK")
    if isinstance(cause, UserError):
        print(f"error: {cause}", file=sys.stderr)
    elif rank is not None and isinstance(cause, RuntimeError) and LOST.search(str(cause)):
        said = str(cause).splitlines()[0]
        print(
            f"error: process {rank} of {os.environ.get('WORLD_SIZE')} waits for another one that has ended or does not"
            f" answer ({said}); what that one says is the cause: mend it, and go on with --resume auto.",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


if getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "") == "monai.bundle.__main__":
    sys.excepthook = _print_user_error  # `python -m monai.bundle` has no hook of its own for this
    listen()
