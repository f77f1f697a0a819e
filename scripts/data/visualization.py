"""Pictures to judge a segmentation by: slices as scanned and with labels, and the colours of labels everywhere."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from .geometry import Geometry

VIEW = "LAS"  # the first voxel is the patient's right, rear, lowest: radiological once rows run from top to bottom
PLANES = ("sagittal", "coronal", "axial")  # across x, y, z
COLOURS = np.array(  # Okabe and Ito's palette, distinguishable with any colour vision; label 1 comes first
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]]
)
GOLDEN, LIGHT, STRONG = (5**0.5 - 1) / 2, (0.55, 0.7, 0.4), (0.9, 0.55)  # turn of hue, and shades that take turns
MORE = [  # colours of the labels behind the palette's
    colorsys.hls_to_rgb(GOLDEN * n % 1, LIGHT[n % len(LIGHT)], STRONG[n % len(STRONG)]) for n in range(248)
]
LABEL_COLOURS = np.vstack([COLOURS, 255 * np.array(MORE)]).astype(np.uint8)


def label_colour(value: np.ndarray | int) -> np.ndarray:
    """Return the colour (.., 3), uint8, of a label value above 0, or of each of several."""
    return LABEL_COLOURS[(np.asarray(value) - 1) % len(LABEL_COLOURS)]


def turned(voxels: np.ndarray, geometry: Geometry) -> tuple[np.ndarray, list[float]]:
    """Turn stored voxels (X, Y, Z) so that their axes are VIEW's, without a copy; return their edges in mm, too."""
    turn = ornt_transform(io_orientation(geometry.affine), axcodes2ornt(VIEW))
    return apply_orientation(voxels, turn), [geometry.spacing[axis] for axis in np.argsort(turn[:, 0])]


def draw_overlay(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, spacing: Sequence[float], height: int = 256
) -> np.ndarray:
    """Draw three panels side by side, scan, scan with label, scan with prediction, of the `fullest_slice`.

    Args:
        image: (X, Y, Z) intensities.
        label: (X, Y, Z) label values.
        prediction: (X, Y, Z) label values.
        spacing: voxel edges in mm, so that the picture has the scan's proportions.
        height: of the picture in pixels, about.

    Returns:
        (height, 3 * width, 3) uint8.
    """
    axis, index = fullest_slice(label, prediction, spacing)
    slices = [np.take(volume, index, axis=axis).T[::-1] for volume in (image, label, prediction)]
    edges = np.delete(np.array(spacing[:3], dtype=float), axis)[::-1].tolist()
    return np.concatenate(draw_slice(slices[0], slices[1:], edges, height), axis=1)


def draw_slice(grey: np.ndarray, labels: Sequence[np.ndarray], edges: Sequence[float], height: int) -> list[np.ndarray]:
    """Draw a slice (rows, columns) as scanned, and with each of some labels; `edges` are those of its pixels in mm."""
    rows, columns = (
        _stretch(n, edge, min(edges), height / max(grey.shape)) for n, edge in zip(grey.shape, edges, strict=True)
    )
    grey, *labels = (s[rows][:, columns] for s in (grey, *labels))
    low, high = _window(grey, np.any([values > 0 for values in labels], axis=0))
    grey = np.clip((grey - low) / max(high - low, 1e-6), 0, 1)[..., None] * np.full(3, 255.0)
    return [panel.astype(np.uint8) for panel in (grey, *(_paint(grey, values) for values in labels))]


def fullest_slice(label: np.ndarray, prediction: np.ndarray, spacing: Sequence[float]) -> tuple[int, int]:
    """Find the (axis, index) of the slice with most labelled voxels, or predicted ones where nothing is labelled.

    It lies across the axis of the largest spacing, the last one among equals.
    """
    axis = 2 - int(np.argmax(np.array(spacing[:3], dtype=float)[::-1].round(3)))
    shown = label if (label > 0).any() else prediction
    return axis, int(np.argmax((shown > 0).sum(axis=tuple(a for a in range(3) if a != axis))))


def _window(grey: np.ndarray, labelled: np.ndarray) -> tuple[float, float]:
    """Intensities for black and white: those of the slice, or, as in a CT, fewer about those of the labelled pixels."""
    low, high = np.percentile(grey, (0.5, 99.5))
    if not labelled.any():
        return low, high
    first, last = np.percentile(grey[labelled], (0.5, 99.5))
    reach = max(last - first, (high - low) / 8)  # an eighth: soft tissue where air, -1000, and bone are in the slice
    return max(low, first - reach), min(high, last + reach)


def _stretch(count: int, edge: float, finest: float, scale: float) -> np.ndarray:
    """Return indices that repeat `count` rows so that they appear `scale` pixels a finest voxel."""
    pixels = max(count, round(count * edge / finest * max(scale, 1)))
    return np.arange(pixels) * count // pixels


def _paint(grey: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Colour labelled pixels, and fully along their outline."""
    labels = labels.round().astype(int)
    inner = np.zeros(labels.shape, dtype=bool)
    centre = labels[1:-1, 1:-1]
    inner[1:-1, 1:-1] = (
        (centre == labels[:-2, 1:-1])
        & (centre == labels[2:, 1:-1])
        & (centre == labels[1:-1, :-2])
        & (centre == labels[1:-1, 2:])
    )
    colour = label_colour(labels)
    strength = np.where(labels == 0, 0.0, np.where(inner, 0.35, 1.0))[..., None]
    return grey * (1 - strength) + colour * strength
