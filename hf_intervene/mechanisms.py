"""The paper's mechanisms: the noise of each concept goes through an exogenous layer and an MLP.

See METHOD section 2, steps 1 and 2.

    z (D, B, n) --exogenous--> u (D, B, n) --expressive--> eps (D, B, w)

`flow.py` has invertible mechanisms.
"""

import torch
from torch import nn

from .blocks import NORM_LAYERS, BlockLinear
from .posterior import is_readable


class ExogenousLayer(nn.Module):
    """Exogenous intervention layer (METHOD section 2, step 1), block-diagonal, two slices:

    u_j = GELU((1 - s_j) (A_obs[j] z_j + b_obs[j]) + s_j (A_int[j] z_j + b_int[j])).

    Both slices are in one weight, (A_obs | A_int). There is one product, whose halves are mixed by
    the targets. The slices start equal, so that an intervention at first only cuts edges. With
    different initial slices, the decoder learns from the first step on to read a concept with and
    without an intervention differently, and likelihood and unseen compositions become worse
    (README). If few of many concepts are intervened on, the second slice is computed only for them.

    Shapes: z (D, B, n), s (D, B, 1) -> u (D, B, n).
    """

    def __init__(self, blocks: int, width: int):
        super().__init__()
        self.slices = BlockLinear(blocks, width, 2 * width, slices=2)

    def forward(self, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        few = places(s[..., 0])
        if few is None:
            obs, intervened = self.slices(z).chunk(2, dim=-1)  # (D, B, n) each
            return nn.functional.gelu(torch.lerp(obs, intervened, s.to(obs.dtype)))
        # A_obs z + b_obs, and s (A_int - A_obs) z + s (b_int - b_obs) where s is not 0.
        (A_obs, A_int), (b_obs, b_int) = (
            parameter.chunk(2, dim=-1) for parameter in self.slices.parameters()
        )
        u = torch.baddbmm(b_obs.squeeze(1).unsqueeze(2), A_obs.mT, z.mT).mT  # (D, B, n)
        block, sample = few
        A, b = (
            (after - before).index_select(0, block)
            for before, after in ((A_obs, A_int), (b_obs, b_int))
        )
        change = z.mT[block, :, sample][:, None] @ A + b  # (few, 1, n)
        return nn.functional.gelu(
            u.index_put(few, s[few].to(u.dtype) * change[:, 0].to(u.dtype), accumulate=True)
        )


def places(s: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Return the places where s is not 0, if they are few and s can be read, else `None`.

    Computing only these places gives the same result up to rounding.
    """
    if not is_readable(s):
        return None
    found = s.nonzero(as_tuple=True)
    return found if 32 * len(found[0]) <= s.numel() else None


class ExpressiveLayers(nn.Sequential):
    """Expressive layers (METHOD section 2, step 2): eps_j = MLP_j(u_j) in every block.

    An MLP has `depth` times (linear, norm, GELU), with linearly interpolated widths.

    Shapes: (D, B, in_width) -> (D, B, out_width).
    """

    def __init__(self, blocks: int, in_width: int, out_width: int, depth: int, norm: str):
        widths = [
            round(in_width + (out_width - in_width) * layer / depth) for layer in range(depth + 1)
        ]
        layers = []
        for before, after in zip(widths[:-1], widths[1:]):
            layers += [
                BlockLinear(blocks, before, after),
                NORM_LAYERS[norm](blocks, after),
                nn.GELU(),
            ]
        super().__init__(*layers)


__all__ = ["ExogenousLayer", "ExpressiveLayers", "places"]
