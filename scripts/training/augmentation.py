"""nnU-Net's augmentation as batched torch operations: the list that the trainer calls, and changes of intensity.

A transform maps (image (N, C, *space), label (N, L, *space)) to new ones, in 3D or 2D, on the device where they are.
What it does is drawn from torch's CPU generator alone, so that a seed decides it, whatever the device. The published
probabilities and ranges stand in configs/train.json; the rules are those of batchgenerators, with which nnU-Net and
MedNeXt are trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from monai.engines.utils import PrepareBatch, default_prepare_batch

Pair = tuple[torch.Tensor, torch.Tensor]


class Augmentation(PrepareBatch):
    """Moves a batch to the device and transforms it there; MONAI's SupervisedTrainer takes it as `prepare_batch`.

    Args:
        transforms: called one after the other, in float32.
        masked: image channels that are 0 outside the region in which they were normalised ("zscore_nonzero"). Where
            all of them are 0 at first, they are 0 at the end again, whatever noise or gamma made of it: nnU-Net's last
            step.
    """

    def __init__(self, transforms: Sequence[Callable], masked: Sequence[int] = ()) -> None:
        self.transforms, self.masked = list(transforms), list(masked)

    @torch.no_grad()
    def __call__(
        self, batchdata: dict, device: str | torch.device | None = None, non_blocking: bool = False, **kwargs
    ) -> Pair:
        """Transform the batch's "image" (N, C, *space) and "label" (N, 1, *space), as plain float32 tensors."""
        pair = cast(Pair, default_prepare_batch(batchdata, device, non_blocking, **kwargs))
        image, label = (tensor.as_subclass(torch.Tensor) for tensor in pair)
        image = image.float()
        if self.masked:  # one more label channel, so that it moves as labels do
            inside = (image[:, self.masked] != 0).any(dim=1, keepdim=True)
            label = torch.cat([label, inside.to(label.dtype)], dim=1)
        for transform in self.transforms:
            image, label = transform(image, label)
        if self.masked:
            label, inside = label[:, :-1], label[:, -1:]
            at = torch.tensor(self.masked, device=image.device)
            image = image.index_copy(1, at, image[:, self.masked] * inside)
        return image, label.float()


class Intensity:
    """Changes the image alone, in the way that a subclass defines by `change`.

    Args:
        prob: probability that a sample is drawn.
        channel_prob: probability that a channel of a drawn sample is changed, by its own draw; None for all alike.
    """

    def __init__(self, prob: float, channel_prob: float | None) -> None:
        self.prob, self.channel_prob = prob, channel_prob

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> Pair:
        drawn = torch.rand(len(image)) < self.prob
        if self.channel_prob is not None:
            drawn = drawn[:, None] & (torch.rand(image.shape[:2]) < self.channel_prob)
        at = drawn.nonzero(as_tuple=True)
        if len(at[0]):
            image = image.clone()
            image[at] = self.change(image[at])
        return image, label

    def change(self, x: torch.Tensor) -> torch.Tensor:
        """Change the K drawn channels x (K, *space), or samples (K, C, *space), each by a draw of its own."""
        raise NotImplementedError


class GaussianNoise(Intensity):
    """Adds normal noise to all channels of a sample; its standard deviation is uniform in `std`."""

    def __init__(self, prob: float, std: Sequence[float]) -> None:
        super().__init__(prob, None)
        self.std = std

    def change(self, x: torch.Tensor) -> torch.Tensor:
        std = uniform(self.std, x)
        # made where the image is, with a generator of its own: the CPU's goes on alike on every device
        generator = torch.Generator(x.device).manual_seed(int(torch.randint(2**62, ())))
        return x + std * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


class GaussianBlur(Intensity):
    """Smooths channels by a Gaussian whose standard deviation in voxels, uniform in `sigma`, is that of all axes."""

    def __init__(self, prob: float, channel_prob: float, sigma: Sequence[float]) -> None:
        super().__init__(prob, channel_prob)
        self.sigma = sigma

    def change(self, x: torch.Tensor) -> torch.Tensor:
        sigma = uniform(self.sigma, x).flatten()
        return along_axes(x, [blur(sigma, n) for n in x.shape[1:]])


class Brightness(Intensity):
    """Multiplies each channel of a sample by a factor uniform in `factor`."""

    def __init__(self, prob: float, factor: Sequence[float]) -> None:
        super().__init__(prob, 1.0)
        self.factor = factor

    def change(self, x: torch.Tensor) -> torch.Tensor:
        return x * uniform(self.factor, x)


class Contrast(Intensity):
    """Multiplies each channel's distance from its mean by a factor about one, within the range that was there."""

    def __init__(self, prob: float, factor: Sequence[float]) -> None:
        super().__init__(prob, 1.0)
        self.factor = factor

    def change(self, x: torch.Tensor) -> torch.Tensor:
        space = tuple(range(1, x.ndim))
        mean, low, high = (f(x, dim=space, keepdim=True) for f in (torch.mean, torch.amin, torch.amax))
        return ((x - mean) * about_one(self.factor, x) + mean).clamp(low, high)


class LowResolution(Intensity):
    """Samples channels on a grid coarser by `zoom`, nearest voxels, and interpolates them linearly from it.

    nnU-Net v2's rule; v1 interpolates back with cubic splines, which torch has no batched operation for.
    """

    def __init__(self, prob: float, channel_prob: float, zoom: Sequence[float]) -> None:
        super().__init__(prob, channel_prob)
        self.zoom = zoom

    def change(self, x: torch.Tensor) -> torch.Tensor:
        zoom = uniform(self.zoom, x).flatten()
        return along_axes(x, [there_and_back(zoom, n) for n in x.shape[1:]])


class Gamma(Intensity):
    """Raises each channel, scaled to 0..1, to a power about one; its mean and standard deviation stay.

    Args:
        prob: probability that a sample is drawn.
        gamma: the least and the greatest power.
        invert: whether the negative image is raised.
    """

    def __init__(self, prob: float, gamma: Sequence[float], invert: bool) -> None:
        super().__init__(prob, 1.0)
        self.gamma, self.invert = gamma, invert

    def change(self, x: torch.Tensor) -> torch.Tensor:
        space = tuple(range(1, x.ndim))
        x = -x if self.invert else x
        low = x.amin(space, keepdim=True)
        extent = x.amax(space, keepdim=True) - low + 1e-7  # both epsilons as in batchgenerators' augment_gamma
        y = ((x - low) / extent) ** about_one(self.gamma, x) * extent
        (std, mean), (new_std, new_mean) = (torch.std_mean(v, space, correction=0, keepdim=True) for v in (x, y))
        y = (y - new_mean) * (std / (new_std + 1e-8)) + mean
        return -y if self.invert else y


def uniform(bounds: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Draw between the bounds for each entry of `like`'s first axis, shaped to be multiplied with `like`."""
    low, high = bounds
    return (low + (high - low) * torch.rand(len(like))).to(like).view(-1, *[1] * (like.ndim - 1))


def about_one(bounds: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """Draw as `uniform` does, but half of the time below 1 and half above it, as in nnU-Net."""
    low, high = bounds
    below = (torch.rand(len(like)) < 0.5).to(like.device).view(-1, *[1] * (like.ndim - 1))
    return torch.where(below, uniform((low, 1), like), uniform((1, high), like))


def along_axes(x: torch.Tensor, operators: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiply every spatial axis of x (K, *space), of n voxels, by the axis' operator (K, n, n)."""
    for operator in operators:  # takes the first spatial axis and leaves it last
        rest = x.shape[2:]
        x = (x.flatten(2).mT @ operator.mT).unflatten(1, rest)
    return x


def blur(sigma: torch.Tensor, n: int) -> torch.Tensor:
    """Build operators (K, n, n) that do as scipy.ndimage.gaussian_filter1d: cut off at 4 sigma (K,), edges mirrored."""
    reach = (4 * sigma + 0.5).long()[:, None]
    offset = torch.arange(-int(reach.max()), int(reach.max()) + 1, device=sigma.device)
    weight = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2) * (offset.abs() <= reach)
    source = (torch.arange(n, device=sigma.device)[:, None] + offset) % (2 * n)
    source = source.minimum(2 * n - 1 - source).expand(len(sigma), -1, -1)
    weight = (weight / weight.sum(dim=1, keepdim=True))[:, None].expand(-1, n, -1)
    return sigma.new_zeros(len(sigma), n, n).scatter_add_(2, source, weight)


def there_and_back(zoom: torch.Tensor, n: int) -> torch.Tensor:
    """Build operators (K, n, n) that sample round(n * zoom) of n voxels, nearest, and interpolate n from them."""
    fewer = (n * zoom[:, None]).round().clamp(min=1)  # (K, 1)
    at = ((torch.arange(n, device=zoom.device) + 0.5) * fewer / n - 0.5).clamp(min=0).minimum(fewer - 1)  # (K, n)
    left = at.floor()
    operator = zoom.new_zeros(len(zoom), n, n)
    for low, weight in ((left, 1 - at + left), ((left + 1).minimum(fewer - 1), at - left)):
        source = (2 * low.long() + 1) * n // (2 * fewer.long())  # the voxel that holds the coarse voxel's centre
        operator.scatter_add_(2, source[..., None], weight[..., None])
    return operator
