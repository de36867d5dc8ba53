"""Block-diagonal layers: one map per block, computed for all blocks at once.

Activations are (D, B, width). In memory the batch is the innermost dimension, (D, width, B): blocks
are narrow, and products with B columns and sums over rows of B are several times faster.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable


class BlockLinear(nn.Module):
    """One linear map per block: a block-diagonal product, cost linear in the number of blocks.

    Shapes: (D, B, in_width) -> (D, B, out_width). With `slices` > 1 the outputs are that many
    alternatives side by side, which start with equal weights.
    """

    def __init__(self, blocks: int, in_width: int, out_width: int, slices: int = 1):
        super().__init__()
        self.slices = slices
        self.weight = nn.Parameter(torch.empty(blocks, in_width, out_width))
        self.bias = nn.Parameter(torch.empty(blocks, 1, out_width))

    def reset_parameters(self) -> None:
        """Set the weights to those of a new layer."""
        bound = 1 / math.sqrt(self.weight.shape[1])  # as nn.Linear
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)
            with torch.no_grad():
                first, *others = parameter.chunk(self.slices, dim=-1)
                for other in others:
                    other.copy_(first)

    def forward(self, x: torch.Tensor, blocks: slice | list[int] = slice(None)) -> torch.Tensor:
        """Apply the maps of `blocks` to x, which has that many blocks."""
        # Not .mT: DDP expects other strides of the gradient, and would copy it.
        bias = self.bias[blocks].squeeze(1).unsqueeze(2)
        return torch.baddbmm(bias, self.weight[blocks].mT, x.mT).mT  # (D, B, out)


class SmallBlockLinear(BlockLinear):
    """A `BlockLinear` whose outputs start small."""

    def reset_parameters(self) -> None:
        """Set the weights to those of a new layer."""
        nn.init.uniform_(self.weight, -0.02, 0.02)
        nn.init.zeros_(self.bias)


class BlockLayerNorm(nn.Module):
    """Layer norm within each block, with a scale and a shift per unit.

    Shapes: (D, B, width) -> (D, B, width).
    """

    def __init__(self, blocks: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, 1, width))
        self.bias = nn.Parameter(torch.empty(blocks, 1, width))

    def reset_parameters(self) -> None:
        """Set the weights to those of a new layer."""
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Standardize.apply(x)[0].to(x.dtype) * self.weight + self.bias


class _Standardize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + 1e-5) over the last dimension, and 1 over that root.

    Both are in float32 at least. It does not use `layer_norm`: rows are short and the batch is
    innermost in memory, so that this forward and backward take half the time.
    """

    @staticmethod
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x if x.dtype == torch.float64 else x.float()
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return centred * scale, scale

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]
    ) -> None:
        ctx.dtype = inputs[0].dtype
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        y, scale = ctx.saved_tensors
        along = (gradient * y).mean(-1, keepdim=True)
        return ((gradient - gradient.mean(-1, keepdim=True) - y * along) * scale).to(ctx.dtype)


class BlockBatchNorm(nn.BatchNorm1d):
    """Batch norm over every unit of every block, as in the paper.

    Shapes: (D, B, width) -> (D, B, width).
    """

    def __init__(self, blocks: int, width: int):
        super().__init__(blocks * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks, batch, width = x.shape
        flat = x.transpose(0, 1).reshape(batch, blocks * width)
        return super().forward(flat).view(batch, blocks, width).transpose(0, 1)


NORM_LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    "layer": BlockLayerNorm,
    "batch": BlockBatchNorm,
    "none": lambda blocks, width: nn.Identity(),
}


__all__ = ["NORM_LAYERS", "BlockBatchNorm", "BlockLayerNorm", "BlockLinear", "SmallBlockLinear"]
