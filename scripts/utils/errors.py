"""What the user can mend is one sentence, not a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import TracebackType


class UserError(ValueError):
    """A fault in data, weights or settings that the user can mend.

    The message names the file, what was found, what was expected and what to do. Under `python -m monai.bundle` it is
    printed alone and the exit code is 1; in Python it is an ordinary ValueError.
    """


def first_cause(error: BaseException) -> BaseException:
    """The UserError that `error` was raised from, else the exception it all began with.

    MONAI wraps what an expression of a config or a transform raises.
    """
    while not isinstance(error, UserError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return error


def command(function: Callable) -> None:
    """Runs `function` with the command line's arguments (fire); a UserError is printed alone and the exit code is 1.

    Fire looks at all arguments before anything runs: on its own it would call the function first and then complain.
    """
    sys.excepthook = _print_user_error
    try:
        import fire
    except ImportError as e:
        raise UserError("the command line needs the package fire: pip install fire") from e
    given = []

    @functools.wraps(function)
    def collect(*args, **kwargs) -> None:
        given.append((args, kwargs))

    fire.Fire(collect)
    for args, kwargs in given:
        function(*args, **kwargs)


def _print_user_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause = first_cause(error)
    if isinstance(cause, UserError):
        print(f"error: {cause}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


if getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "") == "monai.bundle.__main__":
    sys.excepthook = _print_user_error
