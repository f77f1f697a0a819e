"""Draw the picture of README.md: one sagittal slice of a scan, with the expert's label, and with the prediction.

Run it in the bundle's root: `python -m docs.draw_example SCAN LABEL MASK docs/hippocampus.png`.
"""

from __future__ import annotations

import sys

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from scripts.data.visualization import label_colour


def draw_example(scan: str, label: str, mask: str, output: str, width: int = 900) -> None:
    """Write three panels side by side, of the sagittal slice with most labelled voxels.

    The scan is interpolated for the eye; labels are shown voxel by voxel.

    Args:
        scan: NIfTI file of one channel with cubic voxels.
        label: NIfTI file of its expert label, on the same grid.
        mask: NIfTI file of the prediction, on the same grid.
        output: PNG file.
        width: of the picture in pixels.
    """
    volumes = [nib.as_closest_canonical(nib.load(file)).get_fdata().squeeze() for file in (scan, label, mask)]
    fullest = int((volumes[1] > 0).sum(axis=(1, 2)).argmax())
    slices = [volume[fullest].T[::-1] for volume in volumes]  # head up, front to the right
    rows, columns = slices[0].shape
    title, gap, panel = 26, 4, (width - 8) / 3  # pixels
    height = panel * rows / columns + title
    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="black")
    for number, (name, values) in enumerate(zip(("scan", "expert", "prediction"), slices, strict=True)):
        axes = figure.add_axes(((panel + gap) * number / width, 0, panel / width, 1 - title / height))
        axes.set_axis_off()
        axes.set_title(name, color="white", fontsize=13, pad=6)
        axes.imshow(slices[0], cmap="gray", interpolation="bicubic", vmax=np.percentile(slices[0], 99.5), aspect="auto")
        if number:
            paint = np.zeros((rows, columns, 4))
            for value in np.unique(values[values > 0]).astype(int):
                paint[values == value] = [*label_colour(value) / 255, 0.55]
            axes.imshow(paint, interpolation="nearest", aspect="auto")
    FigureCanvasAgg(figure).print_figure(output, facecolor="black", metadata={"Software": None})


if __name__ == "__main__":
    draw_example(*sys.argv[1:5])
