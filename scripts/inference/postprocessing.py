"""Post-processing by nnU-Net's rule: of some labels the largest component alone is kept, as was decided for them.

The decision lies beside the weights; `evaluation.postprocessing_search` makes it from held-out predictions.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Sequence
from pathlib import Path

from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type

from ..utils.errors import UserError
from .components import keep_largest


class KeepLargestd(MapTransform):
    """Applies the steps of a decision to label maps.

    Args:
        keys: labels (1, *space), integers; a MetaTensor stays one, with its affine.
        steps: labels whose largest component alone is kept in each step, see `read_steps`.
    """

    def __init__(self, keys: KeysCollection, steps: Sequence[Sequence[int]]) -> None:
        super().__init__(keys)
        self.steps = steps

    def __call__(self, data: dict) -> dict:
        out = dict(data)
        for key in self.key_iterator(out) if self.steps else ():
            kept = keep_largest(out[key][0].cpu().numpy(), self.steps)
            out[key] = convert_to_dst_type(kept[None], out[key])[0]
        return out


def postprocessing_file(weights: str | Path, wanted: bool = True) -> str | None:
    """Find the decision beside a file of weights: `models/postprocessing.json` for `models/model.pt`, else None."""
    if not wanted:
        return None
    path = Path(weights).with_name("postprocessing.json")
    return str(path) if os.path.lexists(path) else None


def read_steps(path: str | None, labels: Sequence[str] | None) -> list[list[int]]:
    """Read the steps of a decision, for `KeepLargestd`.

    Args:
        path: a `postprocessing.json`; None or, from the command line, "none" for no steps.
        labels: names of the network's labels, or None where nobody wrote them down.

    Raises:
        UserError: it is missing or damaged, or was decided for other labels.
    """
    if path is None or path == "none":
        return []
    if not Path(path).is_file():
        raise UserError(f"{path} not found; give another --postprocessing_file, or none for no post-processing.")
    try:
        content = json.loads(Path(path).read_text())
        decided, steps = content["labels"], [[operator.index(label) for label in s] for s in content["steps"].values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path} is not a post-processing decision ({e!r}); decide again, or delete it.") from e
    if labels is None or decided != list(labels):
        names = "no labels" if labels is None else f"the labels {list(labels)}"
        raise UserError(
            f"{path} was decided for the labels {decided}, the weights have {names}; decide again, or delete it."
        )
    return steps
