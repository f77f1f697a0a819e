"""A picture to judge a segmentation by: one slice as scanned, with its label, and with the prediction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

COLOURS = np.array(  # Okabe and Ito's palette, distinguishable with any colour vision; label 1 comes first
    [[230, 159, 0], [86, 180, 233], [0, 158, 115], [240, 228, 66], [0, 114, 178], [213, 94, 0], [204, 121, 167]]
)


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
    edges = np.delete(np.array(spacing[:3], dtype=float), axis)[::-1]
    rows, columns = (
        _stretch(n, edge, min(edges), height / max(slices[0].shape))
        for n, edge in zip(slices[0].shape, edges, strict=True)
    )
    grey, wanted, found = (s[rows][:, columns] for s in slices)
    low, high = _window(grey, (wanted > 0) | (found > 0))
    grey = np.clip((grey - low) / max(high - low, 1e-6), 0, 1)[..., None] * np.full(3, 255.0)
    panels = [grey, *(_paint(grey, values) for values in (wanted, found))]
    return np.concatenate(panels, axis=1).astype(np.uint8)


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
    colour = COLOURS[(labels - 1) % len(COLOURS)]
    strength = np.where(labels == 0, 0.0, np.where(inner, 0.35, 1.0))[..., None]
    return grey * (1 - strength) + colour * strength
