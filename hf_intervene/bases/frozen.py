"""Frozen convolutions that keep no input for the backward pass.

Autograd saves a convolution's input for the gradient of its weight, and does so even if the weight
is frozen. Under a head the decoder of a frozen base must pass gradients on to the adapter, but has
no use for its own: without these inputs it keeps about half as much."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.grad import conv2d_input
from torch.overrides import TorchFunctionMode


class FrozenConvolution(torch.autograd.Function):
    """`torch.conv2d` with the gradient of its input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *geometry: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.geometry = geometry  # stride, padding, dilation, groups
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return torch.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        # Under autocast the forward pass cast weight and input; the gradient has that type.
        found = conv2d_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.geometry)
        return found.to(ctx.dtype), None, None, None, None, None, None


class LeanConvolutions(TorchFunctionMode):
    """Inside, convolutions of a frozen weight with an input that requires a gradient are
    `FrozenConvolution`s.
    """

    def __torch_function__(
        self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if function is torch.conv2d and not kwargs and len(args) == 7:  # as nn.Conv2d calls it
            x, weight, bias, _, padding, *_ = args
            frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
            if (
                frozen
                and x.requires_grad
                and torch.is_grad_enabled()
                and not isinstance(padding, str)
            ):
                return FrozenConvolution.apply(*args)
        return function(*args, **(kwargs or {}))
