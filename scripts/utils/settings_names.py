"""Names of settings: one that nothing reads is refused, with the nearest one that something does."""

from __future__ import annotations

import functools
import inspect
import json
import logging
from collections.abc import Collection, Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import UserError
from .settings_table import SETTINGS

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FILES = {  # what a configuration has that was read from these files, the most particular first
    "evaluating": ("train", "evaluate"),
    "pooling": ("train", "pool"),
    "training": ("train",),
    "inferring": ("inference",),
    "planning": ("plan",),
    "fetching": ("fetch",),
}

ABSENT = object()
logger = logging.getLogger("mednext")


class Stranger(NamedTuple):
    """A name that the shipped configuration does not have, where it stands, and the names that would be right there."""

    name: str
    place: str
    content: object
    right: Collection[str]

    @property
    def id(self) -> str:
        """What MONAI calls it."""
        return f"{self.place}#{self.name}" if self.place else self.name


def find(content: Any, name: str) -> Any:
    """Look up a value by its name, such as "fine_tuning#freeze"; `ABSENT` where it is not there."""
    for part in name.split("#"):
        if not isinstance(content, Mapping) or part not in content:
            return ABSENT
        content = content[part]
    return content


def shipped(content: Mapping) -> Mapping[str, Any]:
    """Read the shipped files that a configuration was made of; nothing where it is none of the bundle's."""
    return _read(next((files for name, files in FILES.items() if name in content), ()))


@functools.cache
def _read(names: tuple[str, ...]) -> Mapping[str, Any]:
    from monai.bundle import ConfigParser

    paths = [CONFIGS / f"{name}.json" for name in names]
    return ConfigParser.load_config_files(paths) if names and all(path.is_file() for path in paths) else {}


def refuse_unknown(config: ConfigParser, renamed: Mapping[str, str], started: Collection[str] = ()) -> None:
    """Refuse names that are neither in the shipped files, nor referred to, nor MONAI's.

    Settings of other commands are allowed, with a warning: one file of settings may serve several commands.

    Args:
        config: the configuration.
        renamed: names of the release before -> present ones.
        started: names that MONAI was told to run.

    Raises:
        UserError: an unknown name.
    """
    content = config.get()
    known = shipped(content)
    if not known:
        return
    strangers = [stranger for stranger in _strangers(content, known, config) if not stranger.name.startswith("_")]
    allowed = {*_of_monai(), *started, *(_references(content) if strangers else ())}
    for found in strangers:
        if found.id.replace("#", "::") in allowed or _copied(found, content):
            continue
        if found.id in SETTINGS or found.id in renamed:
            logger.warning("--%s has no effect here; it is a setting of another command.", found.id)
            continue
        near = _nearest(found, content, renamed)
        raise UserError(
            f"--{found.id} is no setting"
            + (f"; did you mean --{near}?" if near else ".")
            + " docs/reference/settings.md"
            f" lists them; a value of your own is one that the configuration refers to, by @{found.id}."
        )


def _strangers(found: Any, known: Any, config: ConfigParser, place: str = "") -> Iterator[Stranger]:
    """Find names in `found` that `known` has not, wherever both are the same component or plain groups of values."""
    inside = f"{place}#" if place else ""
    if isinstance(found, list) and isinstance(known, list):
        for number, (one, other) in enumerate(zip(found, known, strict=False)):
            yield from _strangers(one, other, config, f"{inside}{number}")
    if not (isinstance(found, dict) and isinstance(known, dict)) or found.get("_target_") != known.get("_target_"):
        return
    more = [name for name in found if name not in known]
    arguments = _arguments(found, config) if more and "_target_" in found else ()
    for name in more:
        if arguments is not None and name not in arguments:
            yield Stranger(name, place, found[name], [*known, *arguments])
    for name in known:
        if name in found:
            yield from _strangers(found[name], known[name], config, f"{inside}{name}")


def _arguments(component: dict, config: ConfigParser) -> Collection[str] | None:
    """List what a component's class or function takes; None where it takes any name, or cannot be asked."""
    from pydoc import locate

    from monai.bundle import ConfigComponent

    try:
        target: Any = locate(ConfigComponent(component, "", config.locator).resolve_module_name())
        parameters = inspect.signature(target).parameters
    except (ImportError, ValueError, TypeError, AttributeError):
        return None
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) else set(parameters)


def _of_monai() -> set[str]:
    """List the names that MONAI itself reads: steps of a workflow, its properties, experiment tracking."""
    from monai.bundle import properties
    from monai.bundle.utils import DEFAULT_EXP_MGMT_SETTINGS
    from monai.utils import BundlePropertyConfig

    tables = (properties.TrainProperties, properties.InferProperties, properties.MetaProperties)
    asked = {entry[BundlePropertyConfig.ID] for table in tables for entry in table.values()}
    trackings: Mapping[str, Any] = DEFAULT_EXP_MGMT_SETTINGS
    tracked = {name for tracking in trackings.values() for name in tracking["configs"]}
    return {"imports", "initialize", "run", "finalize", *asked, *tracked}


def _references(content: Any) -> set[str]:
    """List what the texts of a configuration refer to, with what each stands in: @a::b is a reference to a, too."""
    from monai.bundle import ConfigParser
    from monai.bundle.reference_resolver import ReferenceResolver

    found: set[str] = set()
    for text in _texts(content):
        names = [*ReferenceResolver.match_refs_pattern(text)]
        names += [ConfigParser.split_path_id(text[1:])[1]] if text.startswith("%") else []
        for name in names:
            parts = name.split("::")
            found |= {"::".join(parts[: end + 1]) for end in range(len(parts))}
    return found


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict | list):
        for entry in content.values() if isinstance(content, dict) else content:
            yield from _texts(entry)


def _copied(found: Stranger, content: Any) -> bool:
    """Say whether a group of values stands elsewhere as well, as MONAI's macros (%name) leave it."""
    if not isinstance(found.content, dict | list) or not found.content:
        return False
    text = json.dumps(found.content, default=repr)
    return json.dumps(content, default=repr).count(text) > 1


def _nearest(found: Stranger, content: Mapping, renamed: Mapping[str, str]) -> str | None:
    """Name what was probably meant, by its place."""
    inside = f"{found.place}#" if found.place else ""
    right = {name.lower(): inside + name for name in found.right if not name.startswith("_")}
    if not found.place:
        nested = {name.split("#")[-1]: name for name in SETTINGS if name.split("#")[0] in content}
        right = {**renamed, **nested, **right}
    near = get_close_matches(found.name.lower(), right, n=1)
    return right[near[0]] if near else None
