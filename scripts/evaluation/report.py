"""The report of an evaluation, one page for a person: tables, box plots, pictures, and what made them."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure
from matplotlib.image import imsave

from ..data.images import first_channel
from ..data.scans import image_files, mask_file, named_cases
from ..data.visualization import PLANES, draw_overlay, fullest_slice, label_colour, turned
from ..inference.environment import device_name, versions
from ..utils.files import read_table, sha256, write_text
from ..weights import model_settings
from .tables import metrics_of

DECIMALS = {"dice": 3, "nsd": 3, "hd95_mm": 2, "lesion_f1": 3}
MANY = 20  # classes; the boxes of more lie closer together
DETECTED = (
    " Lesion F1: 1 is best; a component of the reference is found where at least one voxel of it is predicted,"
    " one of the prediction is false where none of it is in the reference."
)
READING = (
    "<p>From left to right: scan, reference, prediction, in the slice with most labelled voxels. The patient's right is"
    " on the left, in sagittal slices the front is on the right.</p>"
)


def write_report(
    output_dir: str,
    items: Sequence[dict],
    classes: Mapping[str, Sequence[int]],
    label_values: Sequence[int],
    tolerance: float,
    save_predictions: bool,
    dataset_dir: str,
    weights: str,
    device: str | torch.device,
    settings: Mapping[str, object],
) -> None:
    """Write `report.html` beside the tables of scores; the page needs no other file and no network.

    Only the first process writes.

    Args:
        output_dir: folder with `cases.csv` and `summary.csv`, and `predictions/` if `save_predictions`.
        items: the cases, with "case", "image" and "label".
        classes: name of each class and the labels that belong to it, see `data.labels`.
        label_values: values of the labels in the files, background first, without the one to ignore.
        tolerance: distance in mm within which the surface Dice counts surfaces as equal.
        save_predictions: whether there are masks to show.
        dataset_dir: where the cases are from.
        weights: the file that was scored; the settings beside it are shown, too.
        device: device it ran on.
        settings: settings it ran with, by name; they count more than those beside the weights.
    """
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    folder = Path(output_dir)
    rows, summary = read_table(folder / "cases.csv"), read_table(folder / "summary.csv")
    means = mean_dice(rows)
    pictures = "<p>The masks were not saved (<code>save_predictions</code> is off): there is nothing to show.</p>"
    if save_predictions:
        cases = {case["case"]: case for case in named_cases(items)}
        masks = {case: folder / "predictions" / mask_file(case) for case in cases}
        shown = [_picture(role, cases[c], masks[c], label_values, means[c]) for c, role in notable_cases(means).items()]
        pictures = "\n".join([READING, _legend(classes), *shown])
    page = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(f"{Path(dataset_dir).resolve().name}: segmentation scores"),
        headline=f"Mean Dice <b>{number(summary[-1], 'dice')}</b>, cases: {len(means)}, classes: {len(classes)}.",
        summary=_summary(summary),
        tolerance=f"{tolerance:g}",
        detection=DETECTED if "lesion_f1" in metrics_of(rows) else "",
        columns=len(metrics_of(rows)),
        boxes=_box_plots(rows, classes),
        pictures=pictures,
        cases=_cases(rows, means, classes),
        command=escape(shlex.join(sys.orig_argv)),
        facts=_facts(dataset_dir, Path(weights), device, settings),
    )
    write_text(folder / "report.html", page)


def mean_dice(rows: Iterable[dict]) -> dict[str, float]:
    """Average the Dice of each case over the classes that have one; lowest first, nan last."""
    found: dict[str, list[float]] = {}
    for row in rows:
        found.setdefault(row["case"], []).append(float(row["dice"]))
    finite = {case: [dice for dice in values if math.isfinite(dice)] for case, values in found.items()}
    means = {case: float(np.mean(values)) if values else math.nan for case, values in finite.items()}
    return dict(sorted(means.items(), key=lambda item: (math.isnan(item[1]), item[1])))


def number(row: Mapping[str, str], metric: str) -> str:
    """Spell a score of a row as a person reads it."""
    return _text(float(row[metric]), DECIMALS[metric])


def _text(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}" if math.isfinite(value) else "—" if math.isnan(value) else "∞"


def _row(name: object, cells: Iterable[object]) -> str:
    cells = "".join(f"<td>{escape(str(cell))}</td>" for cell in cells)
    return f'<tr><th scope="row">{escape(str(name))}</th>{cells}</tr>'


def _summary(summary: Sequence[dict]) -> str:
    metrics = metrics_of(summary)
    detected = ["Lesions found", "False lesions"] if "lesion_f1" in metrics else []
    heads = ["Class", "Cases", *metrics.values(), *detected, "In neither mask", "In one mask only"]
    lines = ["<thead><tr>", *(f'<th scope="col">{head}</th>' for head in heads), "</tr></thead><tbody>"]
    for row in summary:
        scores = [number(row, metric) + _spread(row, metric) for metric in metrics]
        if detected:
            scores += [f"{row['found_lesions']} of {row['reference_lesions']}", row["false_lesions"]]
        lines.append(_row(row["label"], [row["cases"], *scores, row["empty_in_both"], row["empty_in_one"]]))
    return "\n".join([*lines, "</tbody>"])


def _spread(row: Mapping[str, str], metric: str) -> str:
    deviation = float(row[f"{metric}_std"] or math.nan)  # the mean of all classes has none
    return f" ± {deviation:.{DECIMALS[metric]}f}" if math.isfinite(deviation) else ""


def _cases(rows: Sequence[dict], means: Mapping[str, float], classes: Iterable[str]) -> str:
    """Lay out the table of all cases; headings with `aria-sort` come in the order of their columns."""
    scores = {(row["case"], row["label"]): row for row in rows}
    metrics = metrics_of(rows)
    lines = [
        "<thead><tr>",
        '<th scope="col" rowspan="2" aria-sort="none">Case</th>',
        '<th scope="col" rowspan="2" aria-sort="ascending">Mean Dice</th>',
        *(f'<th scope="colgroup" colspan="{len(metrics)}">{escape(name)}</th>' for name in classes),
        "</tr><tr>",
        *(f'<th scope="col" aria-sort="none">{head}</th>' for _ in classes for head in metrics.values()),
        "</tr></thead><tbody>",
    ]
    for case, mean in means.items():
        cells = [number(scores[case, name], metric) for name in classes for metric in metrics]
        lines.append(_row(case, [_text(mean, DECIMALS["dice"]), *cells]))
    return "\n".join([*lines, "</tbody>"])


def _facts(dataset_dir: str, weights: Path, device: str | torch.device, settings: Mapping[str, object]) -> str:
    groups: dict[str, dict[str, object]] = {
        "Scored": {
            "on": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            "in": os.getcwd(),
            "cases of": dataset_dir,
            "weights": weights,
            "their SHA-256": sha256(weights),
            "device": device_name(device),
        },
        "Settings": {
            name: value if isinstance(value, str) else json.dumps(value, default=str)
            for name, value in {**model_settings.read_model_settings(weights), **settings}.items()
        },
        "Versions": {**versions()},
    }
    lines = []
    for group, facts in groups.items():
        lines.append(f'<tbody><tr><th scope="rowgroup" colspan="2">{group}</th></tr>')
        lines += [_row(name, [value]) for name, value in facts.items()]
        lines.append("</tbody>")
    return "\n".join(lines)


def _embedded(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _box_plots(rows: Sequence[dict], classes: Mapping[str, Sequence[int]]) -> str:
    """Draw one panel a metric, with one box and one dot a case for each class."""
    random = np.random.default_rng(0)
    metrics = metrics_of(rows)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):  # a class may be named $$1$$
        figure = Figure(
            figsize=(11, 1.1 + (0.45 if len(classes) <= MANY else 0.2) * len(classes)), layout="constrained"
        )
        panels = figure.subplots(1, len(metrics), sharey=True)
        for panel, (metric, title) in zip(panels, metrics.items(), strict=True):
            for at, (name, members) in enumerate(classes.items()):
                values = np.array([float(row[metric]) for row in rows if row["label"] == name])
                values = values[np.isfinite(values)]
                if not values.size:
                    continue
                colour = label_colour(members[0]) / 255
                panel.boxplot(
                    values, positions=[at], widths=0.6, orientation="horizontal", showfliers=False, patch_artist=True,
                    boxprops={"facecolor": (*colour, 0.3), "edgecolor": "0.3"}, medianprops={"color": "black"},
                    whiskerprops={"color": "0.3"}, capprops={"color": "0.3"},
                )  # fmt: skip
                beside = at + random.uniform(-0.2, 0.2, len(values))
                panel.plot(
                    values, beside, "o", color=colour * 0.75, markersize=3, alpha=0.6, markeredgewidth=0, clip_on=False
                )
            panel.set_title(title, loc="left")
            panel.grid(axis="x", color="0.92")
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_xlim(*((-0.02, 1.02) if metric != "hd95_mm" else (0, None)))
        panels[0].set_yticks(range(len(classes)), list(classes))
        panels[0].set_ylim(len(classes) - 0.5, -0.5)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=110)
    return _embedded(buffer.getvalue())


def _legend(classes: Mapping[str, Sequence[int]]) -> str:
    """List the classes with the colours of the labels that belong to them."""
    entries = []
    for name, members in classes.items():
        patches = "".join(f'<i style="background:rgb{tuple(map(int, label_colour(m)))}"></i>' for m in members)
        entries.append(f"<li>{patches}{escape(name)}</li>")
    return f'<ul class="legend">{"".join(entries)}</ul>'


def notable_cases(means: Mapping[str, float]) -> dict[str, str]:
    """Name the best, the median and the worst case: "Best", "Median, worst", .. by case."""
    ranked = [case for case, mean in means.items() if math.isfinite(mean)]
    roles: dict[str, list[str]] = {}
    if ranked:
        for role, at in (("best", -1), ("median", (len(ranked) - 1) // 2), ("worst", 0)):
            roles.setdefault(ranked[at], []).append(role)
    return {case: ", ".join(names).capitalize() for case, names in roles.items()}


def _picture(role: str, case: dict, mask: Path, label_values: Sequence[int], dice: float) -> str:
    """Show the slice with most labelled voxels as a radiologist sees it; files are read one case at a time."""
    picture, slice_name = draw_case(case, mask, label_values)
    return (
        f'<figure class="case"><img src="{_embedded(picture)}" alt="Scan, reference and prediction of'
        f' {escape(case["case"])}, {slice_name}"><figcaption><b>{role}: {escape(case["case"])}</b>,'
        f" Dice {dice:.3f}, {slice_name}</figcaption></figure>"
    )


def draw_case(case: dict, mask: Path, label_values: Sequence[int]) -> tuple[bytes, str]:
    """Draw scan, reference and prediction in the slice with most labelled voxels; return a PNG and the slice's name."""
    (scan, spacing), (label, _), (prediction, _) = map(_turned, (image_files(case)[0], case["label"], mask))
    axis, index = fullest_slice(label, prediction, spacing)
    count = scan.shape[axis]
    scan, label, prediction = (np.take(volume, [index], axis=axis) for volume in (scan, label, prediction))
    # a voxel to ignore, whose value is beyond the last, becomes background
    label, prediction = (np.searchsorted(label_values, v.round()) % len(label_values) for v in (label, prediction))
    buffer = io.BytesIO()
    imsave(buffer, draw_overlay(scan, label, prediction, spacing, height=320), format="png")
    return buffer.getvalue(), f"{PLANES[axis]} slice {index + 1} of {count}"


def _turned(path: str | Path) -> tuple[np.ndarray, list[float]]:
    """Load a file's voxels (X, Y, Z), of several channels the first, and their edges in mm, as they are looked at."""
    image = first_channel(path)
    return turned(image.values.astype(np.float32), image.geometry)
