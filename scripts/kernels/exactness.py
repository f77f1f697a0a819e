"""The bound on a kernel's errors, outputs and gradients: stock PyTorch's own errors against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import Backend
from .reference import Reference

Operation = Callable[..., Tensor]  # takes a backend and the tensors
CPU: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the defaults are


def outputs_and_gradients(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Compute both in the precision of the inputs; the gradient that comes in is the same for all."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    y = operation(*inputs)
    incoming = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), **CPU).to(y)
    return [y.detach(), *torch.autograd.grad(y, inputs, incoming)]


def inexact(operation: Operation, inputs: Sequence[Tensor], ours: Backend) -> str | None:
    """Say which tensor has a root mean square error over twice that of stock operators, if one has.

    The floor, for what stock computes exactly by luck, is one rounding of float32, or a hundredth of one of bfloat16.
    """
    stock = Reference()
    exact = outputs_and_gradients(lambda *a: operation(stock, *a), [x.double() for x in inputs])
    theirs = outputs_and_gradients(lambda *a: operation(stock, *a), inputs)
    made = outputs_and_gradients(lambda *a: operation(ours, *a), inputs)
    for number, (truth, their, result) in enumerate(zip(exact, theirs, made, strict=True)):
        what = f"gradient {number}" if number else "the output"
        if (result.dtype, result.shape) != (their.dtype, their.shape):
            return f"{what} is {result.dtype} of {[*result.shape]}, expected {their.dtype} of {[*their.shape]}"
        floor = max(0.01 * torch.finfo(result.dtype).eps, torch.finfo(torch.float32).eps)
        error, bound = (result - truth).norm(), 2 * (their - truth).norm() + floor * truth.norm()
        if not error <= bound:  # nor where it is no number
            return f"{what} has an error of {error:.3g}, expected at most {bound:.3g}"
    return None
