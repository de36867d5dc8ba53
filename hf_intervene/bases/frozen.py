"""Frozen convolutions that keep no input for the backward pass.

Autograd saves a convolution's input for the gradient of its weight, and does so even if the weight is frozen. Under a head the decoder
of a frozen base must pass gradients on to the adapter, but has no use for its own: without these inputs it keeps about half as much.
"""

import torch
from torch.overrides import TorchFunctionMode


class FrozenConvolution(torch.autograd.Function):
    """`torch.conv2d` with the gradient of its input alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(weight)
        ctx.geometry = (stride, padding, dilation, groups)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        # Under autocast the forward pass cast weight and input; the gradient has that type.
        found = torch.nn.grad.conv2d_input(ctx.shape, weight.to(gradient.dtype), gradient, *ctx.geometry)
        return found.to(ctx.dtype), None, None, None, None, None, None


class LeanConvolutions(TorchFunctionMode):
    """Inside, convolutions of a frozen weight with an input that requires a gradient are `FrozenConvolution`s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d and not kwargs and len(args) == 7:  # as nn.Conv2d calls it
            x, weight, bias, _, padding, *_ = args
            frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
            if frozen and x.requires_grad and torch.is_grad_enabled() and not isinstance(padding, str):
                return FrozenConvolution.apply(*args)
        return function(*args, **(kwargs or {}))
