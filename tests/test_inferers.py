"""The slab-wise sliding window gives what MONAI's gives."""

from __future__ import annotations

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from scripts.inferers import SlabSlidingWindowInferer


def network(x: torch.Tensor) -> torch.Tensor:
    """Three classes that depend on the window's content and on the place in it."""
    ramp = torch.linspace(0, 1, x.shape[-1])
    return torch.cat([x * 2, x.square() + ramp, x.cumsum(dim=2)], dim=1)


@pytest.mark.parametrize(
    ("size", "roi", "overlap"),
    [
        ((40, 33, 21), (16, 16, 16), 0.5),  # last windows are shifted back
        ((48, 48, 48), (16, 16, 16), 0.25),
        ((32, 16, 24), (32, 16, 16), 0.5),  # one window along two axes
        ((10, 40, 7), (16, 16, 16), 0.5),  # smaller than the window
        ((37, 20, 20), (16, 16, 16), 0.0),
        ((20, 20, 20), (16, 16, 16), 0.9),
    ],
)
def test_logits_are_those_of_monai(size, roi, overlap):
    torch.manual_seed(0)
    image = torch.randn(2, 1, *size, dtype=torch.float64)
    expected = SlidingWindowInferer(roi, overlap=overlap, mode="gaussian")(image, network)
    torch.testing.assert_close(SlabSlidingWindowInferer(roi, overlap)(image, network), expected, rtol=1e-12, atol=1e-12)


def test_large_results_are_half_precision_roundings_of_the_small_ones():
    torch.manual_seed(0)
    image = torch.randn(1, 1, 40, 30, 20)
    full = SlabSlidingWindowInferer((16, 16, 16), 0.5)(image, network)
    half = SlabSlidingWindowInferer((16, 16, 16), 0.5, full_precision_gb=0)(image, network)
    assert (full.dtype, half.dtype) == (torch.float32, torch.float16)
    assert torch.equal(half, full.half())
