"""The record of what made each mask of a folder, so that a run may go on where another one stopped.

`masks.json` beside the masks has of each case the weights and settings that made its mask, versions and device they ran
with, digests of its scan, seconds and memory that it took, and what the mask says of each organ. An entry is taken out
before a mask is made and put in when it and its row of the report are there: what is recorded is so.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.transforms import SaveImage, SaveImaged

from ..data.checks import check_same_grid
from ..data.images import MASK_ENDINGS, read_header
from ..data.scans import MASK, case_of, image_files
from ..preprocessing.cache_key import description, digest, file_digest, image_digest
from ..preprocessing.part import segmented
from ..utils.errors import UserError
from ..utils.files import remembered, write_text
from ..utils.ownership import alone
from ..weights.model_settings import ModelSettings
from .environment import device_name, peaks_gb, reset_peak, versions
from .export import MaskLayout, read_mask
from .organs import ORGANS
from .probabilities import SaveProbabilitiesd

PARTS = {
    "made_by": dict,
    "made_with": dict,
    "masks": dict,
    "files": list,
}  # of the file, and their kinds
NOT_OF_VOXELS = ("eval_classes", "fold", "patch_size", "mirror_axes")  # of the model; the last two as they are used
SHORT = 12  # digits that tell one digest from another
LONGEST = 100  # characters of a value in a message

logger = logging.getLogger("mednext")


class MaskRecord:
    """Knows what made the masks of a folder; attached to an evaluator, it notes those that are made.

    Args:
        layout: of the masks.
        weights: files of all networks.
        model: the settings beside the weights.
        settings: those of the run that decide voxels, by names for messages, as JSON has them.
        steps: the transforms and the inferer, whose definitions decide voxels as well.
        device: that computes.
    """

    def __init__(
        self,
        layout: MaskLayout,
        weights: Sequence[str],
        model: ModelSettings,
        settings: Mapping[str, object],
        steps: Sequence[object],
        device: str | torch.device = "cpu",
    ) -> None:
        self.layout, self.folder, self.file = layout, layout.output_dir, layout.output_dir / "masks.json"
        self.weights = weights
        of_model = {name: value for name, value in model.as_dict().items() if name not in NOT_OF_VOXELS}
        content = {**of_model, **settings, "steps": digest([*_described(steps)])[:SHORT]}
        self.settings: dict[str, object] = json.loads(json.dumps(content))
        self.made_by: dict[str, dict] = {}  # makers by their digests
        self.made_with: dict[str, dict] = {}  # versions and devices, by their digests
        self.device, self.begun = device, time.perf_counter()
        self.masks: dict[str, dict] = {}  # of each case the digests of its maker and of the files of its scan
        self.files: dict[str, list] = {}  # what `file_digest` remembers
        self.pending: dict[str, list[str]] = {}  # files of the cases that are still to be made

    @cached_property
    def maker(self) -> tuple[str, dict[str, object]]:
        """Return the digest of weights and settings, and both; the weights are read for that."""
        names = dict(sorted((file_digest(file, {}), file) for file in self.weights))
        said = {file: found for found, file in names.items()}
        return digest([list(names), self.settings])[:SHORT], {"weights": said, **self.settings}

    @cached_property
    def tools(self) -> tuple[str, dict[str, str]]:
        """Return the digest of versions and device, and both."""
        found = {**versions(), "device": device_name(self.device)}
        return digest(found)[:SHORT], found

    def remaining(self, cases: Sequence[dict], skip_existing: bool) -> list[dict]:
        """List the cases that are to be segmented: all, or those that have no whole mask of this maker and their scan.

        Args:
            cases: with "case" and "image".
            skip_existing: leave out what is done, and say how much that is.

        Raises:
            UserError: a mask cannot be written in its format here; with `skip_existing`, masks in the folder that other
                weights or settings made.
        """
        self.layout.require(cases)
        self._read()
        left = list(cases)
        if skip_existing:
            self._require_same()
            left = [case for case in cases if not self._is_done(case)]
            again = sum(self.layout.mask(case).exists() for case in left)
            said = (
                f"; {again} masks are damaged, of another scan or not on record, or incomplete, and made again"
                if again
                else ""
            )
            done = len(cases) - len(left)
            logger.info("%d of %d scans have masks in %s and are left out%s", done, len(cases), self.folder, said)
        self.pending = {case["case"]: image_files(case) for case in left}
        return left

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.STARTED, self.forget)
        engine.add_event_handler(Events.GET_BATCH_STARTED, self.begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.note)

    def begin(self, engine: Engine) -> None:
        """Measure time and memory from here on, where the next scan is asked for."""
        self.begun = time.perf_counter()
        reset_peak()

    def forget(self, engine: Engine) -> None:
        """Take the masks out of the record that are about to be made, by the weights that are there now."""
        with self._changed():
            self.masks = {case: entry for case, entry in self.masks.items() if case not in self.pending}

    def note(self, engine: Engine) -> None:
        """Record the mask that was made last."""
        if isinstance(engine.state.output, list):  # else this scan could not be segmented
            meta = engine.state.output[0]["pred"].meta
            case = case_of(meta)
            scans = self.pending.get(case, [str(meta["filename_or_obj"])])
            digests = [image_digest(file, self.files) for file in scans]
            with self._changed():
                self.masks[case] = {
                    "made_by": self.maker[0],
                    "made_with": self.tools[0],
                    "scans": digests,
                    "seconds": round(time.perf_counter() - self.begun, 1),
                    **peaks_gb(),
                    **segmented(meta),
                    ORGANS: meta.get(ORGANS, {}),
                }

    def _read(self) -> None:
        """Read the record of earlier runs; what is damaged of it is unknown."""
        found = remembered(self.file)
        for name, kind in PARTS.items():
            part = found.get(name)
            entries = part.items() if isinstance(part, dict) else ()
            setattr(self, name, {key: entry for key, entry in entries if isinstance(entry, kind)})

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """Change the record as it is now: other processes may segment into the same folder."""
        maker, content = self.maker  # reads the weights now, which others may replace later
        with alone(self.file):
            files = self.files
            self._read()
            self.files |= files
            self.made_by[maker] = content
            self.made_with[self.tools[0]] = self.tools[1]
            yield
            self._write()

    def _write(self) -> None:
        for name, own in (("made_by", self.maker[0]), ("made_with", self.tools[0])):
            used = {own} | {str(entry.get(name)) for entry in self.masks.values()}
            setattr(self, name, {key: content for key, content in getattr(self, name).items() if key in used})
        text = json.dumps({name: getattr(self, name) for name in PARTS}, indent=1) + "\n"
        write_text(self.file, text)

    def _require_same(self) -> None:
        """Raise UserError where the folder has masks of another maker."""
        others = {
            found: str(entry.get("made_by"))
            for case, entry in sorted(self.masks.items())
            for ending in MASK_ENDINGS.values()
            if entry.get("made_by") != self.maker[0] and (found := self.folder / f"{case}{MASK}{ending}").exists()
        }
        if others:
            mask, made_by = next(iter(others.items()))
            theirs, ours = _told(self.made_by.get(made_by, {}), self.maker[1])
            more = f" and {len(others) - 1} more there" if len(others) > 1 else ""
            raise UserError(
                f"{mask}{more}: made by {theirs}; this run has {ours}. Give another"
                " --output_dir, or the same weights and settings, or delete these masks."
            )

    def _is_done(self, case: dict) -> bool:
        """Say whether a case has a whole mask on its scan's grid, what belongs to it, and the scan it was made from."""
        entry, mask = self.masks.get(case["case"], {}), self.layout.mask(case)
        if not self.layout.is_whole(case["case"]):
            return False
        files = image_files(case)
        try:
            scans = [image_digest(file, self.files) for file in files]
            if (entry.get("made_by"), entry.get("scans")) != (self.maker[0], scans):
                return False
            check_same_grid(str(mask), read_mask(mask, files[0]).geometry, files[0], read_header(files[0]).geometry)
        except (UserError, OSError):
            return False
        return True


def _described(steps: Sequence[object]) -> Iterator[object]:
    """Describe steps by class, values and code, see preprocessing/cache_key.py; those that only write are no part."""
    for step in steps:
        for part in getattr(step, "transforms", [step]):
            if not isinstance(part, SaveImage | SaveImaged | SaveProbabilitiesd):
                try:
                    yield description(part)
                except TypeError:  # a host's, of which its name alone can be said
                    yield f"{type(part).__module__}.{type(part).__qualname__}"


def _told(*makers: Mapping[str, Any]) -> Iterator[str]:
    """Say of each maker its weights, and the settings in which they differ; its steps, where they alone do."""
    names = dict.fromkeys(name for maker in makers for name in maker if name != "weights")
    different = [name for name in names if len({json.dumps(maker.get(name)) for maker in makers}) > 1]
    different = [name for name in different if name != "steps"] or different
    for maker in makers:
        settings = ", ".join(f"{name} {_short(json.dumps(maker.get(name)))}" for name in different)
        files = maker.get("weights")
        known = files.items() if isinstance(files, Mapping) else ()
        weights = " and ".join(f"{file} (SHA-256 {str(found)[:SHORT]})" for file, found in known) or "unknown weights"
        yield f"{weights}{settings and f' with {settings}'}"


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
