"""What the user can mend is one sentence, not a traceback."""

from __future__ import annotations

import sys
from types import TracebackType


class UserError(ValueError):
    """A fault in data, weights or settings that the user can mend.

    The message names the file, what was found, what was expected and what to do. Under `python -m monai.bundle` it is
    printed alone and the exit code is 1; in Python it is an ordinary ValueError.
    """


def _print_user_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    cause: BaseException | None = error
    while cause is not None:  # MONAI's config parser wraps what an expression raises
        if isinstance(cause, UserError):
            print(f"error: {cause}", file=sys.stderr)
            return
        cause = cause.__cause__ or cause.__context__
    sys.__excepthook__(kind, error, trace)


if getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "") == "monai.bundle.__main__":
    sys.excepthook = _print_user_error
