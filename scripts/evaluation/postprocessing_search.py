"""The search for post-processing by nnU-Net's rule: which steps raise the Dice of predictions of held-out cases."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..data.checks import check_same_grid, label_indices
from ..data.images import read_image
from ..data.labels import Labels
from ..data.scans import mask_file
from ..inference.components import keep_largest
from ..utils.files import write_text
from .metrics import ClassDice
from .tables import without_nan

ALL = "all foreground"
Cases = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]
ClassLabels = Mapping[str, Sequence[int]]  # name of each class -> the labels that belong to it


def decide_steps(cases: Cases, classes: ClassLabels, ignore: int | None = None) -> dict:
    """Decide which steps help: the largest component of all foreground, then that of each class alone.

    A step is taken if the mean Dice over the cases improves for a class and becomes worse for none. A single class
    needs no second round. Classes that exclude each other are tried apart, each on the result of the first step;
    those that share labels one after the other, since what one loses another may need.
    Source: nnU-Net v1, `postprocessing/connected_components.py`.

    Args:
        cases: called once a round, yields prediction and reference (X, Y, Z) of every case as label indices.
        classes: name of each class and the labels that belong to it.
        ignore: label of the reference whose voxels count nowhere, or None.

    Returns:
        "steps": those taken, name -> labels; "gain": class -> mean Dice "without" and "with" them and the "gain";
        "tried": step -> class that it can change -> mean Dice "before" and "after". nan: no case has the class.
    """
    foreground = sorted(set().union(*classes.values()))
    exclusive = len(foreground) == sum(map(len, classes.values()))
    each: list[ClassLabels] = [classes] if exclusive else [{name: members} for name, members in classes.items()]
    steps: dict[str, list[int]] = {}
    tried: dict[str, dict] = {}
    without: dict[str, float] = {}
    now: dict[str, float] = {}
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
    cases: Cases, classes: ClassLabels, steps: Sequence[Sequence[int]], trials: ClassLabels, ignore: int | None
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Average the Dice of every class after `steps`, and after each trial too that of the classes it can change."""
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
    """Say whether a class improves and none becomes worse; nan is neither."""
    return any(after[c] > before[c] for c in after) and not any(after[c] < before[c] for c in after)


def search_postprocessing(
    predictions: str,
    items: Sequence[dict],
    classes: ClassLabels,
    labels: Labels,
    output: str,
) -> None:
    """Decide the steps from predictions of held-out cases, print what each class gains and write the decision.

    Args:
        predictions: folder with `{case}_seg.nii.gz`, of networks that were not trained on the case, as scoring writes.
        items: the cases, with "case" and "label".
        classes: name of each class and the label indices that belong to it.
        labels: of the data set; the decision is good for these.
        output: JSON file to write.

    Raises:
        UserError: a mask is missing or damaged, has other values, or lies on another grid than its label file.
    """

    def masks(case: dict) -> tuple[np.ndarray, np.ndarray]:
        path = str(Path(predictions) / mask_file(case["case"]))
        prediction, reference = read_image(path), read_image(case["label"])
        check_same_grid(path, prediction.geometry, reference.path, reference.geometry)
        indices = label_indices(prediction, labels.values), label_indices(reference, labels.file_values)
        first, second = (np.ascontiguousarray(index, np.int16) for index in indices)
        return first, second

    decision = decide_steps(lambda: map(masks, tqdm(items, desc="deciding")), classes, labels.ignore_index)
    content = {"labels": labels.names, "cases": len(items), **without_nan(decision)}
    write_text(output, json.dumps(content, indent=2) + "\n")
    _print_gain(decision["gain"])
    kept = ", ".join(decision["steps"]) or "nothing (no step helps)"
    print(f"wrote {output}: of {len(items)} cases, the largest component alone is kept of {kept}")


def _print_gain(gain: Mapping[str, Mapping[str, float]]) -> None:
    print(f"{'class':20} {'Dice':>8} {'with':>8} {'gain':>8}")
    for name, dice in gain.items():
        print(f"{name:20} {dice['without']:8.4f} {dice['with']:8.4f} {dice['gain']:+8.4f}")


def gains(path: str) -> dict:
    """Read from a decision what it keeps the largest component of, and what that brings the mean Dice of each class.

    Args:
        path: a `postprocessing.json`.
    """
    content = json.loads(Path(path).read_text())
    return {"largest component of": list(content["steps"]), **content["gain"]}
