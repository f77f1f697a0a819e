"""The sentence for the user is found under whatever raised around it."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts.utils.errors import UserError, first_cause, run_command


def raised(*errors: BaseException) -> BaseException:
    """The last of `errors`, each raised from the one before."""
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


def test_a_user_error_is_found_under_what_was_raised_from_it():
    mine = UserError("image.nii is empty")
    assert first_cause(raised(KeyError("a"), mine, RuntimeError("transform"), RuntimeError("config"))) is mine


def test_without_a_user_error_it_is_what_everything_began_with():
    first = KeyError("a")
    assert first_cause(raised(first, RuntimeError("transform"))) is first
    assert first_cause(first) is first


def test_an_error_that_came_up_while_another_was_handled_has_that_as_its_cause():
    error, mine = RuntimeError("while cleaning up"), UserError("image.nii is empty")
    error.__context__ = mine
    assert first_cause(error) is mine


def test_a_circle_of_causes_ends():
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert first_cause(one) is other
    one.__cause__ = one
    assert first_cause(one) is one


def test_a_command_line_without_fire_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # run_command puts its own there
    monkeypatch.setitem(sys.modules, "fire", None)
    with pytest.raises(UserError, match="pip install fire"):
        run_command(print)


def test_a_command_gets_its_arguments_and_is_called_once(monkeypatch):
    calls = []
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["python -m scripts example", "--size", "3"])
    run_command(lambda size: calls.append(size))
    assert calls == [3]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("UserError('image.nii is empty')", "error: image.nii is empty\n"),
        ("RuntimeError('a fault of ours')", "Traceback (most recent call last):"),
    ],
    ids=["the user's", "ours"],
)
def test_only_the_users_faults_are_told_without_a_traceback(error, expected):
    program = f"""
from scripts.utils.errors import UserError, run_command
def fail():
    raise {error}
run_command(fail)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.startswith(expected)
