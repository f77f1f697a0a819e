"""What a configuration begins with: its settings by their present names, none unknown, each of its kind.

The kinds are one table, `utils/settings_table.py`; names are checked by `utils/settings_names.py`. What depends on the
data or the weights at hand is checked where these are known.
"""

from __future__ import annotations

import ast
import logging
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .settings_names import ABSENT, find, refuse_unknown, shipped
from .settings_table import SETTINGS, kind_of

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

SPECIAL = re.compile(r"[\\$@%#]|^_|:(?=:)")  # what MONAI evaluates, looks up or takes for its own in a config
ESCAPED = re.compile(r"\\x([0-9a-f]{2})")

RENAMED = {  # names of 0.6 -> where the value stands now; gone with 0.8
    "upkern_from": "init_weights",
    "keep": "checkpoint_selection",
    "scored": "model#eval_classes",
    "memory": "fingerprint_file",
    "tiles": "window_scheme",
    "skip_heads": "fine_tuning#skip_heads",
    "freeze": "fine_tuning#freeze",
    "layer_decay": "fine_tuning#layer_decay",
    "warmup_epochs": "fine_tuning#warmup_epochs",
    "dim": "model#dim",
    "deep_supervision": "model#deep_supervision",
    "batch_dice": "train#batch_dice",
    "rotate_range": "train#rotate_range",
    "planned_for": "checks#planned_for",
    "recipe": "checks#recipe",
}

OF_THE_WEIGHTS = (  # read from model.json by inference and scoring
    "size",
    "kernel_size",
    "in_channels",
    "out_channels",
    "label_values",
    "regions_class_order",
    "spacing",
    "intensity",
    "crop_to_nonzero",
)

logger = logging.getLogger("mednext")


def plain_text(text: str) -> str:
    r"""Spell text of a data set so that MONAI leaves it alone in a config: `$` becomes `\x24`, and so on.

    `read_text` reads it again. Ordinary text stays as it is.
    """
    return SPECIAL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def read_text(text: str) -> str:
    """Read what `plain_text` spelled."""
    return ESCAPED.sub(lambda found: chr(int(found[1], 16)), text)


def give(config: ConfigParser, values: Mapping[str, object]) -> None:
    """Set values by their names, as MONAI does with those of a command line.

    Raises:
        UserError: a name leads into a group that is not there.
    """
    for name, value in values.items():
        try:
            config[name] = value
        except (KeyError, IndexError, ValueError, TypeError):
            raise UserError(f"--{name} leads nowhere; docs/reference/settings.md lists the settings.") from None


def prepare(config: ConfigParser | None = None, change: Callable[[ConfigParser], bool] | None = None) -> None:
    """Bring the settings of a configuration to what they are meant to be, or refuse them.

    It stands first among the steps that a configuration begins with, before anything that it could change is made.
    Settings by their names of the release before move to where they stand now, with a sentence. Unknown names are
    refused. Values become what their kind makes of them; those that are worked out by an expression of the user's own
    are worked out for that.

    Args:
        config: the configuration; by default the one whose expression calls this function, which MONAI does not hand
            to expressions.
        change: sets what follows from other values, before these are read, and says whether it did.

    Raises:
        UserError: an unknown name, or a value that its setting cannot have.
    """
    from monai.bundle import ConfigWorkflow

    config = config or calling_config()
    content = config.get() if config is not None else None
    if config is None or not isinstance(content, dict):
        return
    done = {  # the steps before this one are not to be taken twice
        step: made for step, made in config.ref_resolver.resolved_content.items() if step.startswith("initialize::")
    }
    changed = _accept_old_names(config) or _imports_came_too_early(config)
    started = [name for w in _callers(ConfigWorkflow) for name in (w.init_id, w.run_id, w.final_id) if name]
    refuse_unknown(config, RENAMED, started)
    if change is not None and change(config):
        _parse_again(config, done)
        changed = True
    if _read(config, worked_out=False) or changed:  # what was resolved before may depend on them
        _parse_again(config, done)
    if _read(config, worked_out=True):
        _parse_again(config, done)
    _check_dimension(config)


def _imports_came_too_early(config: ConfigParser) -> bool:
    """Tell whether an import of the configuration failed, as the bundle's do before `bundle_root` is on the path.

    MONAI makes the imports before the first step, and keeps of one that fails an object that raises when it is used.
    """
    made = config.ref_resolver.resolved_content
    return any(type(made[name]).__name__ == "_LazyRaise" for name in made if name.startswith("imports::"))


def _parse_again(config: ConfigParser, done: Mapping[str, Any]) -> None:
    config.parse(reset=True)
    config.ref_resolver.resolved_content.update(done)


def _accept_old_names(config: ConfigParser) -> bool:
    """Move values to where they stand now; say whether there were any."""
    content = config.get()
    assert isinstance(content, dict)
    old = {name: now for name, now in RENAMED.items() if name in content and now.split("#")[0] in content}
    if find(content, "model#weights") is not ABSENT:
        old |= {name: f"model#{name}" for name in OF_THE_WEIGHTS if content.get(name) is not None}
    for name, now in old.items():
        logger.warning("--%s is called --%s now; the old name is understood until version 0.8.", name, now)
        config[now] = content.pop(name)
    return bool(old)


def _read(config: ConfigParser, worked_out: bool) -> bool:
    """Read every setting by its kind, and say whether any became another value.

    Args:
        config: the configuration.
        worked_out: read those that are an expression other than the shipped one, instead of those that are a value.
    """
    content: Any = config.get()
    defaults = shipped(content)
    changed = False
    for name in SETTINGS:
        value, default = find(content, name), find(defaults, name)
        if not _is_to_be_read(value, default, worked_out):
            continue
        if worked_out:
            value = config.get_parsed_content(name)
        found = kind_of(name, planning="planning" in content).of(value, name)
        if isinstance(found, str) and not isinstance(value, str) and found == str(value):
            found = _as_typed(name, value, found)
        if type(found) is not type(value) or found != value:
            config[name] = found
            changed = True
    return changed


def _is_to_be_read(value: Any, default: Any, worked_out: bool) -> bool:
    if isinstance(value, str) and value.startswith(("$", "@", "%")):
        return worked_out and value.replace("#", "::") != str(default).replace("#", "::")
    made = isinstance(value, dict) and "_target_" in value  # by a function of the user's own, or of the shipped file
    nothing = value is None and default in (None, ABSENT)
    return not (worked_out or value is ABSENT or made or nothing)


def _as_typed(name: str, value: object, text: str) -> str:
    """Return the text that the command line has for a number, such as 1.50 for 1.5; else `text`."""
    typed = [after for option, after in zip(sys.argv, sys.argv[1:], strict=False) if option == f"--{name}"]
    typed += [option.partition("=")[2] for option in sys.argv if option.startswith(f"--{name}=")]
    for found in typed:
        try:
            if ast.literal_eval(found) == value:
                return found
        except (ValueError, SyntaxError):
            continue
    return text


def _check_dimension(config: ConfigParser) -> None:
    """Refuse a patch or axes of another dimension than the network's, where they are given."""
    content = config.get()
    patch, axes, dim = (find(content, name) for name in ("patch_size", "mirror_axes", "model#dim"))
    if not isinstance(patch, list) or find(content, "model") is ABSENT:
        return
    dim = config.get_parsed_content("model").dim if dim is ABSENT else dim
    if (dim == "2d") != (patch[2] == 1):
        wanted = (
            'two multiples of 16 voxels and 1, for example "[512,512,1]"' if dim == "2d" else "three multiples of 16"
        )
        raise UserError(f"patch_size is {patch}; expected {wanted}, since the network is {dim}.")
    if dim == "2d" and isinstance(axes, list) and 2 in axes:
        raise UserError(f'mirror_axes is {axes}; expected some of 0, 1, for example "[0,1]", since the network is 2d.')


def calling_config() -> ConfigParser | None:
    """Find the configuration whose expression is being evaluated, which MONAI does not hand to expressions."""
    from monai.bundle import ConfigParser

    return next(_callers(ConfigParser), None)


def _callers(kind: type) -> Iterator[Any]:
    """Find the objects of a class whose methods are being run, the innermost first."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), kind):
            yield owner
        frame = frame.f_back
