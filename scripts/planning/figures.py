"""Pictures of a data set for a person to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..utils.files import write_whole
from .fingerprint import QUANTILES

MANY = 20  # labels; more have a column of their own
LONGEST = 30  # characters of a name


def draw_fingerprint(
    records: Sequence[dict], labels: Sequence[str], channels: Sequence[str], spacing: Sequence[float], path: Path
) -> None:
    """Draw four panels: shapes on the target grid, spacings, foreground intensities, volumes of each label.

    Args:
        records: fingerprints of the usable cases.
        labels: names by value, background first.
        channels: their names.
        spacing: of the target grid in mm.
        path: PNG to write.
    """
    with matplotlib.rc_context({"text.parse_math": False}):  # a label may be named $1$
        figure = _draw(records, labels, channels, spacing)
        write_whole(path, lambda partial: figure.savefig(partial, format="png", dpi=110))


def _draw(records: Sequence[dict], labels: Sequence[str], channels: Sequence[str], spacing: Sequence[float]) -> Figure:
    many = len(labels) > MANY
    figure = Figure(figsize=(11, max(8, 1 + 0.14 * len(labels))), layout="constrained")
    axes = list(figure.subplot_mosaic("AD;BD;CD" if many else "AB;CD").values())
    axes = [axes[0], axes[2], axes[3], axes[1]] if many else axes
    shapes = np.array([np.multiply(r["cropped"], r["spacing"]) / spacing for r in records])
    stored = np.array([r["spacing"] for r in records])
    step = max(1, round(np.ptp(shapes) / 40))  # whole voxels, or some bars hold more values than others
    bins = np.arange(np.floor(shapes.min()) - 0.5, shapes.max() + step + 0.5, step)
    for axis, name in enumerate("xyz"):
        axes[0].hist(shapes[:, axis], bins=bins.tolist(), histtype="step", label=f"axis {name}")
        axes[1].hist(stored[:, axis], bins=40, histtype="step", label=f"axis {name}")
    axes[0].set(title=f"Shapes at {' x '.join(f'{s:g}' for s in spacing)} mm, cropped", xlabel="voxels", ylabel="cases")
    axes[1].set(title="Spacings as stored", xlabel="mm", ylabel="cases")
    for channel in range(len(records[0]["foreground"])):
        found = [r["foreground"][channel]["quantiles"] for r in records if r["foreground"][channel]]
        for number, quantiles in enumerate(found):
            label = _short(channels[channel]) if number == 0 else None
            axes[2].plot(quantiles, 100 * QUANTILES, color=f"C{channel}", alpha=max(0.05, 1 / len(found)), label=label)
    axes[2].set(
        title="Intensities of labelled voxels, a line a case", xlabel="intensity as stored", ylabel="% of voxels below"
    )
    millilitres = [
        [n * np.prod(r["spacing"]) / 1000 for r in records if (n := r["labels"][value])]
        for value in range(1, len(labels))
    ]
    axes[3].boxplot(millilitres, orientation="horizontal", tick_labels=[_short(name) for name in labels[1:]])
    axes[3].tick_params("y", labelsize=7 if many else 10)
    axes[3].invert_yaxis()  # from the first label down
    sizes = [n for values in millilitres for n in values] or [1.0]
    wide = max(sizes) > 20 * min(sizes)
    for panel in axes[:2]:
        panel.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[3].set(title="Volume of each label, where it is present", xlabel="ml", xscale="log" if wide else "linear")
    axes[3].xaxis.set_major_formatter("{x:g}")  # not 10^1, which would be mathematics
    axes[3].xaxis.set_minor_formatter("")
    for panel in axes[:3]:
        legend = panel.legend(frameon=False)
        for line in legend.get_lines():
            line.set_alpha(1)
    figure.suptitle(f"{len(records)} cases")
    return figure


def _short(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 2]}.."
