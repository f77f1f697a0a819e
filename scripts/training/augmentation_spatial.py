"""nnU-Net's augmentation that moves voxels: rotation and zoom in one resampling, and mirroring.

`training.augmentation` says what a transform is and calls them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .augmentation import Pair, about_one

PLANES = {1: [(0, 1)], 3: [(1, 2), (2, 0), (0, 1)]}  # by the number of angles: the axes that each of them turns


class RotateZoom:
    """Cuts the middle out of a larger crop, rotated, zoomed, both or neither; one interpolation at most.

    Rotation (about all axes together) and zoom (the same for all axes) are drawn independently. The image is
    interpolated linearly, as in nnU-Net v2 (v1: cubic splines, which torch has no batched operation for), and is 0
    outside the crop; the label is interpolated linearly too, label by label.

    Args:
        size: voxels to cut; rotations are about the middle, in units of voxels.
        rotate_range: largest angle about each axis (in 2D: the only one) in radians, to either side.
        rotate_prob: probability that a sample is rotated.
        zoom: least and greatest factor on coordinates, on either side of 1; above it structures become smaller.
        zoom_prob: probability that a sample is zoomed.
    """

    def __init__(
        self,
        size: Sequence[int],
        rotate_range: Sequence[float],
        rotate_prob: float,
        zoom: Sequence[float],
        zoom_prob: float,
    ) -> None:
        self.size, self.rotate_range, self.rotate_prob = list(size), list(rotate_range), rotate_prob
        self.zoom, self.zoom_prob = zoom, zoom_prob

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> Pair:
        angles = (2 * torch.rand(len(image), len(self.rotate_range)) - 1) * torch.tensor(self.rotate_range)
        rotated = torch.rand(len(image), 1) < self.rotate_prob
        zoomed = torch.rand(len(image), 1) < self.zoom_prob
        zoom = torch.where(zoomed, about_one(self.zoom, angles), 1.0)
        at = (rotated | zoomed).squeeze(1).nonzero(as_tuple=True)
        matrix = zoom[..., None] * rotations(angles * rotated)
        new_image, new_label = (middle(tensor, self.size).clone() for tensor in (image, label))
        if len(at[0]):
            grid = sampling_grid(matrix[at].to(image), self.size, image.shape[2:])
            new_image[at] = F.grid_sample(image[at], grid, align_corners=False)
            new_label[at] = sample_labels(label[at], grid)
        return new_image, new_label


class Mirror:
    """Mirrors each of `axes` (0 is the first spatial one) with a probability of its own."""

    def __init__(self, prob: float, axes: Sequence[int]) -> None:
        self.prob, self.axes = prob, list(axes)

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> Pair:
        drawn = torch.rand(len(image), len(self.axes)) < self.prob
        image, label = image.clone(), label.clone()
        for axis, flipped in zip(self.axes, drawn.T, strict=True):
            at = flipped.nonzero(as_tuple=True)
            image[at], label[at] = image[at].flip(axis + 2), label[at].flip(axis + 2)
        return image, label


def rotations(angles: torch.Tensor) -> torch.Tensor:
    """Build matrices (K, D, D) of one angle (K, 1) in 2D, or of angles about three axes (K, 3), the last axis first."""
    planes = PLANES[angles.shape[1]]
    dimensions = max(max(plane) for plane in planes) + 1
    matrix = torch.eye(dimensions).repeat(len(angles), 1, 1)
    for angle, (i, j) in zip(angles.T, planes, strict=True):
        turn = torch.eye(dimensions).repeat(len(angles), 1, 1)
        turn[:, i, i] = turn[:, j, j] = angle.cos()
        turn[:, i, j], turn[:, j, i] = angle.sin(), -angle.sin()
        matrix = turn @ matrix
    return matrix


def sampling_grid(matrix: torch.Tensor, size: Sequence[int], source: Sequence[int]) -> torch.Tensor:
    """Build grid_sample's coordinates (K, *size, D) for matrices (K, D, D).

    A matrix maps offsets to the middle of the output to offsets to the middle of the input, in voxels.

    Args:
        matrix: offsets of the output -> offsets of the input; decides device and precision of the result.
        size: voxels of the output.
        source: voxels of the input.
    """
    # the coordinates run from -1 to 1 over an axis, and count the axes from the last
    relative = matrix * matrix.new_tensor(size) / matrix.new_tensor(list(source))[:, None]
    return F.affine_grid(F.pad(relative.flip(1, 2), (0, 1)), [len(matrix), 1, *size], align_corners=False)


def sample_labels(label: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Interpolate the mask of every label linearly and take the greatest at each voxel; label 0 outside the grid.

    The masks are made one at a time: memory does not grow with their number.

    Args:
        label: (K, L, *space) 0, 1, 2, .. of any type.
        grid: grid_sample's (K, *size, D).
    """
    found = label.new_zeros(*label.shape[:2], *grid.shape[1:-1])
    best, total = torch.zeros_like(found, dtype=grid.dtype), torch.zeros_like(found, dtype=grid.dtype)
    for value in range(1, int(label.max()) + 1):
        weight = F.grid_sample((label == value).to(grid.dtype), grid, align_corners=False)
        found.masked_fill_(weight > best, value)
        best, total = best.maximum(weight), total + weight
    return found * (best > 1 - total)  # the rest is label 0, inside and outside


def middle(tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Cut the middle `size` voxels out of (N, C, *space), without a copy."""
    for axis, (have, want) in enumerate(zip(tensor.shape[2:], size, strict=True), start=2):
        tensor = tensor.narrow(axis, (have - want) // 2, want)
    return tensor
