"""Post-processing by nnU-Net's rule: keep the largest component where held-out predictions say that it helps."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_dst_type
from tqdm import tqdm

from ..data.checks import check_label, check_same_grid
from ..data.images import read as read_nifti
from ..data.labels import ignore_index, stored
from ..evaluation.metrics import ClassDice, without_nan
from ..utils.errors import UserError
from ..utils.files import write_whole
from .components import keep_largest

ALL = "all foreground"
Cases = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]


class KeepLargestd(MapTransform):
    """Applies the steps of a decision to label maps.

    Args:
        keys: labels (1, *space), integers; a MetaTensor stays one, with its affine.
        steps: of each, the labels whose largest component alone is kept, see `read`.
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


def decide(cases: Cases, classes: Mapping[str, Sequence[int]], ignore: int | None = None) -> dict:
    """Which steps help, by nnU-Net's rule: the largest component of all foreground, then that of each class alone.

    A step is taken if the mean Dice over the cases improves for a class and becomes worse for none. A single class
    needs no second round. Classes that exclude each other are tried apart, each on the result of the first step;
    those that share labels one after the other, since what one loses another may need.
    Source: nnU-Net v1, `postprocessing/connected_components.py`.

    Args:
        cases: called once a round, yields prediction and reference (X, Y, Z) of every case as label indices.
        classes: of each, the labels that belong to it.
        ignore: label of the reference whose voxels count nowhere, or None.

    Returns:
        "steps": those taken, name -> labels; "gain": class -> mean Dice "without" and "with" them and the "gain";
        "tried": step -> class that it can change -> mean Dice "before" and "after". nan: no case has the class.
    """
    foreground = sorted(set().union(*classes.values()))
    exclusive = len(foreground) == sum(map(len, classes.values()))
    each = [classes] if exclusive else [{name: members} for name, members in classes.items()]
    steps, tried, without, now = {}, {}, None, {}
    for trials in [{ALL: foreground}, *(each if len(classes) > 1 else [])]:
        before, after = _mean_dice(cases, classes, list(steps.values()), trials, ignore)
        without, now = without or before, dict(before)
        for name, dice in after.items():
            tried[name] = {c: {"before": before[c], "after": dice[c]} for c in dice}
            if _helps(before, dice):
                steps[name] = list(trials[name])
                now |= dice
    gain = {name: {"without": without[name], "with": now[name], "gain": now[name] - without[name]} for name in classes}
    return {"steps": steps, "gain": gain, "tried": tried}


def _mean_dice(
    cases: Cases,
    classes: Mapping[str, Sequence[int]],
    steps: Sequence[Sequence[int]],
    trials: Mapping[str, Sequence[int]],
    ignore: int | None,
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Mean Dice of every class after `steps`, and after each trial on top of them of the classes that it can change."""
    changed = {name: {c: m for c, m in classes.items() if set(m) & set(trials[name])} for name in trials}
    start, metrics = ClassDice(classes, ignore), {name: ClassDice(changed[name], ignore) for name in trials}
    for prediction, reference in cases():
        base, wanted = keep_largest(prediction, steps), torch.as_tensor(reference)[None, None]
        start(torch.as_tensor(base)[None, None], wanted)
        for name, metric in metrics.items():
            metric(torch.as_tensor(keep_largest(base, [trials[name]]))[None, None], wanted)
    return _by_class(start), {name: _by_class(metric) for name, metric in metrics.items()}


def _by_class(metric: ClassDice) -> dict[str, float]:
    return dict(zip(metric.classes, metric.get_buffer().double().nanmean(0).tolist(), strict=True))


def _helps(before: Mapping[str, float], after: Mapping[str, float]) -> bool:
    """Whether a class improves and none becomes worse; nan is neither."""
    return any(after[c] > before[c] for c in after) and not any(after[c] < before[c] for c in after)


def deciding(
    predictions: str,
    items: Sequence[dict],
    classes: Mapping[str, Sequence[int]],
    labels: Sequence[str],
    label_values: Sequence[int],
    output: str,
    ignore: int | None = None,
) -> None:
    """Decides from held-out predictions, prints what each class gains and writes the decision.

    Args:
        predictions: folder with `{case}_seg.nii.gz`, of networks that were not trained on the case, as scoring writes.
        items: the cases, with "case" and "label".
        classes: of each, the label indices that belong to it.
        labels: names of the network's labels, which the decision is then good for.
        label_values: values of the labels in the files.
        output: JSON file to write.
        ignore: value in the label files of voxels to ignore, or None.

    Raises:
        UserError: a mask is missing or damaged, has other values, or lies on another grid than its label file.
    """

    def load(case: dict) -> tuple[np.ndarray, np.ndarray]:
        path = str(Path(predictions) / f"{case['case']}_seg.nii.gz")
        (image, prediction), (label_image, reference) = read_nifti(path), read_nifti(case["label"])
        check_same_grid(path, image, case["label"], label_image)
        prediction = check_label(path, image, prediction, label_values)
        reference = check_label(case["label"], label_image, reference, stored(label_values, ignore))
        return np.ascontiguousarray(prediction, np.int16), np.ascontiguousarray(reference, np.int16)

    decision = decide(lambda: map(load, tqdm(items, desc="deciding")), classes, ignore_index(label_values, ignore))
    content = {"labels": list(labels), "cases": len(items), **without_nan(decision)}
    write_whole(output, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n"))
    print(f"{'class':20} {'Dice':>8} {'with':>8} {'gain':>8}")
    for name, dice in decision["gain"].items():
        print(f"{name:20} {dice['without']:8.4f} {dice['with']:8.4f} {dice['gain']:+8.4f}")
    kept = ", ".join(decision["steps"]) or "nothing (no step helps)"
    print(f"wrote {output}: of {len(items)} cases, the largest component alone is kept of {kept}")


def beside(weights: str | Path) -> str | None:
    """`models/model.pt` -> `models/postprocessing.json` if it is there, else None."""
    path = Path(weights).with_name("postprocessing.json")
    return str(path) if path.is_file() else None


def gains(path: str) -> dict:
    """What a decision keeps the largest component of, and the mean Dice without and with it of every class."""
    content = json.loads(Path(path).read_text())
    return {"largest component of": list(content["steps"]), **content["gain"]}


def read(path: str | None, labels: Sequence[str] | None) -> list[list[int]]:
    """The steps of a decision, for `KeepLargestd`.

    Args:
        path: a `postprocessing.json`; None or, from the command line, "none" for no steps.
        labels: names of the network's labels, or None where nobody wrote them down.

    Raises:
        UserError: it is missing or damaged, or was decided for other labels.
    """
    if path in (None, "none"):
        return []
    if not Path(path).is_file():
        raise UserError(f"{path} not found; give another --postprocessing_file, or none for no post-processing.")
    try:
        content = json.loads(Path(path).read_text())
        decided, steps = content["labels"], list(content["steps"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is not a post-processing decision ({e!r}); decide again, or delete it.") from e
    if labels is None or decided != list(labels):
        names = "no labels" if labels is None else f"the labels {list(labels)}"
        raise UserError(
            f"{path} was decided for the labels {decided}, the weights have {names}; decide again, or delete it."
        )
    return steps
