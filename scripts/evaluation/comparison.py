"""The comparison of two evaluations of the same cases: paired differences, and whether they are more than chance."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import bootstrap, wilcoxon

from ..utils.errors import UserError
from ..utils.files import check_writable, read_table, write_table, write_whole
from .tables import DETECTION, METRICS, metrics_of

TITLES = METRICS | DETECTION
SEED, RESAMPLES, CONFIDENCE = 0, 9999, 0.95
Table = dict[tuple[str, str], dict[str, float]]  # (case, class) -> score -> value


def compare_scores(one: str, other: str, output_dir: str = "comparison") -> None:
    """Compare the scores of two evaluations case by case, and write `differences.csv` and `differences.png`.

    Of each class and score: both means, the mean of the differences (other minus one) with a bootstrap interval (BCa,
    95 %, 9,999 resamples of the cases), and the p-value of Wilcoxon's signed-rank test, two-sided. The class "mean" is
    that of each case's classes. Cases without a finite score in both do not count; their number is in the table.

    Args:
        one: folder of an evaluation, with its `cases.csv`.
        other: that of another one.
        output_dir: folder for the table and the picture.

    Raises:
        UserError: a folder without scores, or no case and class that both have scored.
    """
    check_writable(output_dir)
    first, second = _scores(one), _scores(other)
    common = {key for key in first if key in second}
    if not common:
        raise UserError(f"{one} and {other} have scored no case and class in common; expected the same cases.")
    cases = sorted({case for case, _ in common})
    classes = list(dict.fromkeys(label for case, label in first if (case, label) in common))
    rows = []
    drawn: dict[str, np.ndarray] = {}
    metrics = [m for m in TITLES if all(m in scores for table in (first, second) for scores in table.values())]
    for metric in metrics:
        values = np.array(
            [[[_score(table, c, k, metric) for k in classes] for c in cases] for table in (first, second)]
        )
        values = np.concatenate([values, mean_of_both(values)[..., None]], axis=-1) if len(classes) > 1 else values
        names = [*classes, "mean"][: values.shape[-1]]
        rows += [{"label": name, "score": metric, **compared(*values[..., place])} for place, name in enumerate(names)]
        drawn[metric] = values[1, :, -1] - values[0, :, -1]
    folder = Path(output_dir)
    write_table(folder / "differences.csv", list(rows[0]), rows)
    figure = _figure(drawn, one, other)
    write_whole(folder / "differences.png", lambda partial: figure.savefig(partial, format="png", dpi=120))
    _say(rows, one, other, folder, sum(key not in common for key in (*first, *second)))


def _scores(folder: str) -> Table:
    """Read the scores of an evaluation by case and class."""
    file = Path(folder) / "cases.csv"
    if not file.is_file():
        raise UserError(f"{file} not found; give the folder of an evaluation: run evaluating, or score_masks, first.")
    rows = read_table(file)
    try:
        metrics = metrics_of(rows)
        return {(row["case"], row["label"]): {metric: float(row[metric]) for metric in metrics} for row in rows}
    except (KeyError, ValueError) as e:
        raise UserError(f"{file} is not a table of scores ({e}); expected case, label, {', '.join(METRICS)}.") from e


def _score(table: Table, case: str, label: str, metric: str) -> float:
    return table.get((case, label), {}).get(metric, math.nan)


def mean_of_both(values: np.ndarray) -> np.ndarray:
    """Average over the classes that both have scored in a case; nan where there are none."""
    both = np.isfinite(values).all(axis=0)
    sums, counts = np.where(both, values, 0).sum(-1), both.sum(-1)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def compared(one: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """Compare two rows of scores of the same cases."""
    finite = np.isfinite(one) & np.isfinite(other)
    difference = (other - one)[finite]
    low, high, p = math.nan, math.nan, math.nan
    if len(difference) > 1:
        p = 1.0 if not difference.any() else float(wilcoxon(difference).pvalue)
        low = high = float(difference.mean())
        if np.ptp(difference) > 0:
            low, high = bootstrap(
                (difference,),
                np.mean,
                n_resamples=RESAMPLES,
                confidence_level=CONFIDENCE,
                rng=np.random.default_rng(SEED),
            ).confidence_interval
    return {
        "cases": int(finite.sum()),
        "left_out": int((~finite).sum()),
        "one": float(one[finite].mean()) if finite.any() else math.nan,
        "other": float(other[finite].mean()) if finite.any() else math.nan,
        "difference": float(difference.mean()) if finite.any() else math.nan,
        "interval_low": float(low),
        "interval_high": float(high),
        "wilcoxon_p": p,
        "higher": int((difference > 0).sum()),
        "lower": int((difference < 0).sum()),
    }


def _figure(drawn: dict[str, np.ndarray], one: str, other: str) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots(1, len(drawn))
    for (metric, difference), axis in zip(drawn.items(), axes, strict=True):
        _draw(axis, np.sort(difference[np.isfinite(difference)]), TITLES[metric])
    figure.suptitle(f"{_short(other)} minus {_short(one)}, a bar a case, sorted", fontsize=10)
    return figure


def _draw(axis: Axes, difference: np.ndarray, title: str) -> None:
    better = difference < 0 if "HD95" in title else difference > 0
    axis.bar(range(len(difference)), difference, width=1.0, color=np.where(better, "tab:blue", "tab:orange"))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(title=f"{title}: {better.sum()} better, {(difference != 0).sum() - better.sum()} worse", xlabel="cases")
    axis.title.set_fontsize(9)
    axis.set_xticks([])


def _short(folder: str) -> str:
    name = Path(folder).resolve()
    return "/".join(name.parts[-2:]).replace("$", r"\$")


def _say(rows: list[dict[str, Any]], one: str, other: str, folder: Path, unpaired: int) -> None:
    print(f"one is {one}, other {other}")
    for row in rows:
        print(
            f"{row['label']:20} {TITLES[row['score']]:10} {row['one']:9.4f} -> {row['other']:9.4f}"
            f"  {row['difference']:+.4f} [{row['interval_low']:+.4f}, {row['interval_high']:+.4f}]"
            f"  p {row['wilcoxon_p']:.2g}  {row['cases']} cases, {row['left_out']} left out"
        )
    if unpaired:
        print(f"{unpaired} scores are in one of the two alone, and left out")
    print(f"the table and a picture are in {folder}")
