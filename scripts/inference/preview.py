"""A picture of each scan with its mask, for a quick look: three planes through the largest label, and a legend."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from ..data.geometry import StoredImage
from ..data.images import PICTURE, format_of
from ..data.statistics import label_sums
from ..data.visualization import PLANES, draw_slice, label_colour, turned
from ..utils.files import write_whole
from .export import MaskLayout

PIXELS, DPI = 512, 110  # of a panel's longer side; of an inch
INCHES, GAP = 11.0, 0.06  # width of the picture, and between panels
HIGHEST, TITLE = 6.0, 0.3  # height of the panels at most, and of what is over them
SIDES = (("P", "A", "S", "I"), ("R", "L", "S", "I"), ("R", "L", "A", "P"))  # left, right, top, bottom of PLANES
PLACES = ((0.01, 0.5, "left", "center"), (0.99, 0.5, "right", "center"),
          (0.5, 0.99, "center", "top"), (0.5, 0.01, "center", "bottom"))  # fmt: skip
ROWS, MOST_COLUMNS = 3, 8  # of the legend
LONGEST = 34  # characters of a name


class Preview:
    """Writes the picture of a case, for `MeasureOrgans`.

    Args:
        layout: names it.
    """

    def __init__(self, layout: MaskLayout) -> None:
        self.layout = layout

    def __call__(
        self, case: str, scan: StoredImage, mask: np.ndarray, names: Mapping[int, str], millilitres: Mapping[str, float]
    ) -> None:
        """Write what `draw_preview` draws as a PNG, whole or not at all."""
        figure = draw_preview(scan, mask, names, millilitres)
        write_whole(self.layout.picture(case), lambda partial: figure.savefig(partial, format="png", dpi=DPI))


@matplotlib.rc_context({"text.parse_math": False})  # a label may be named $1$
def draw_preview(
    scan: StoredImage, mask: np.ndarray, names: Mapping[int, str], millilitres: Mapping[str, float]
) -> Figure:
    """Draw the planes through the middle of the largest label, as a radiologist sees them, and name what is found.

    Args:
        scan: one channel.
        mask: (X, Y, Z) label values.
        names: of the label values.
        millilitres: of each name, what the legend says.
    """
    found = {value: count for value, count in label_sums(mask).items() if value and count}
    (voxels, edges), (labels, _) = turned(scan.voxels, scan.geometry), turned(mask, scan.geometry)
    middle = _middle(labels == max(found, key=lambda value: found[value]) if found else np.ones_like(labels, bool))
    planes = [axis for axis in (2, 1, 0) if min(np.delete(labels.shape, axis)) > 1] or [2]
    is_picture = format_of(scan.path) is PICTURE
    panels, extents = {}, []
    for axis in planes:
        grey, shown = (np.take(volume, middle[axis], axis=axis).T[::-1] for volume in (voxels, labels))
        sizes = np.delete(edges, axis)[::-1].tolist()
        if is_picture:  # which lies as it was stored
            grey, shown = scan.voxels[:, :, 0].T, mask[:, :, 0].T
        panels[axis] = draw_slice(grey * scan.slope + scan.intercept, [shown], sizes, PIXELS)[1]
        extents.append([n * edge for n, edge in zip(shown.shape, sizes, strict=True)])  # height and width in mm
    entries = [(value, names.get(value, f"label {value}")) for value in found]
    drawn = set(np.concatenate([np.unique(np.take(labels, middle[axis], axis=axis)) for axis in planes]).tolist())
    figure = Figure(figsize=(INCHES, INCHES), dpi=DPI, facecolor="black")
    legend = _fitting_legend(
        figure,
        [
            Patch(
                facecolor=tuple((label_colour(value) / 255).tolist()),
                label=f"{_short(name)}  {millilitres.get(name, math.nan):.3g} ml",
            )
            for value, name in entries
        ],
        ["white" if value in drawn else "0.6" for value, _ in entries],
    )
    heights, widths = zip(*extents, strict=True)
    free = INCHES - GAP * (len(extents) - 1)
    scale = min(free / sum(widths), HIGHEST / max(heights))  # of all planes: one of a few thick slices is a strip
    under = legend.get_window_extent().height / DPI + GAP
    top = under + scale * max(heights)
    total = top + TITLE
    figure.set_size_inches(INCHES, total)
    legend.set_bbox_to_anchor((0, under / total))
    left = (free - scale * sum(widths)) / 2
    for (axis, panel), (height, width) in zip(panels.items(), extents, strict=True):
        high, wide = scale * height, scale * width
        axes = figure.add_axes((left / INCHES, (top - high) / total, wide / INCHES, high / total))
        left += wide + GAP
        axes.imshow(panel, aspect="auto")
        axes.axis("off")
        if not is_picture:
            _say_where(axes, axis, f"{PLANES[axis]}, {middle[axis] + 1} of {labels.shape[axis]}")
    return figure


def _middle(inside: np.ndarray) -> list[int]:
    """Find the voxel of a label (X, Y, Z), booleans, that is near its middle: in its middle slice along z, of those."""
    z = int(np.searchsorted(np.cumsum(counts := inside.sum(axis=(0, 1))), counts.sum() / 2))
    at = np.argwhere(inside[:, :, z])
    x, y = at[((at - at.mean(axis=0)) ** 2).sum(axis=1).argmin()]
    return [int(x), int(y), z]


def _fitting_legend(figure: Figure, patches: list[Patch], colours: list[str]) -> Legend:
    """Make a legend of as few rows as the figure's width allows, at least ROWS."""
    handles = patches or [Patch(alpha=0, label="no label found")]
    for columns in range(max(1, min(MOST_COLUMNS, math.ceil(len(handles) / ROWS))), 0, -1):
        legend = figure.legend(
            handles=handles, labelcolor=colours or "white", loc="upper left", bbox_to_anchor=(0, 1), ncols=columns,
            frameon=False, fontsize=7, handlelength=1, handleheight=1, columnspacing=1, borderaxespad=0.2,
        )  # fmt: skip
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    return legend


def _say_where(axes: Axes, axis: int, title: str) -> None:
    """Write on a panel which plane it is and where the patient's sides are."""
    edge = [withStroke(linewidth=2, foreground="black")]
    axes.set_title(title, color="white", fontsize=8, pad=4)
    for side, (x, y, horizontal, vertical) in zip(SIDES[axis], PLACES, strict=True):
        axes.text(
            x, y, side, ha=horizontal, va=vertical, color="white", fontsize=9, transform=axes.transAxes,
            path_effects=edge,
        )  # fmt: skip


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 3]}..."
