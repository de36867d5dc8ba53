"""The intervention head: the method of METHOD section 2 (Markham et al., arXiv:2507.04754).

    z (B, D, n) --exogenous--> u (B, D, n) --expressive--> eps (B, D, w) --intervention--> c (B, D, w) --unpool--> e (B, *embedding_shape)

Shapes: B batch, d concepts, D = d + free blocks, n noise_width, w concept_width. Inside, block layers hold their activations as
(D, B, width), so that every block-diagonal product is one batched matrix product, whatever contexts the batch mixes. In memory the batch
lies innermost, (D, width, B): blocks are narrow, and products with B columns and sums over rows of B are several times faster.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .checks import check_fit, check_loaded
from .configuration_intervention import CENTERED, InterventionConfig
from .contexts import Interventions, parse_interventions
from .hub import check_weights, folder, pop_options
from .posterior import PosteriorLinear, Whitening, at_hand, gaussian_kl, has_row, mixture, row_of


@dataclass
class InterventionHeadOutput(ModelOutput):
    """
    Args:
        embedding: representation `e`, shape (B, *embedding_shape): the decoder's input.
        concepts: `c`, shape (B, D, concept_width).
    """

    embedding: torch.Tensor | None = None
    concepts: torch.Tensor | None = None


class BlockLinear(nn.Module):
    """One linear map per block: a block-diagonal product, cost linear in the number of blocks.

    Shapes: (D, B, in_width) -> (D, B, out_width). The outputs may be `slices` alternatives side by side, which start out equal.
    """

    def __init__(self, blocks: int, in_width: int, out_width: int, slices: int = 1):
        super().__init__()
        self.slices = slices
        self.weight = nn.Parameter(torch.empty(blocks, in_width, out_width))
        self.bias = nn.Parameter(torch.empty(blocks, 1, out_width))

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])  # as nn.Linear
        for parameter in (self.weight, self.bias):
            nn.init.uniform_(parameter, -bound, bound)
            with torch.no_grad():
                first, *others = parameter.chunk(self.slices, dim=-1)
                for other in others:
                    other.copy_(first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias.squeeze(1).unsqueeze(2)  # not .mT: its gradient's strides would be others than DDP expects, and copied
        return torch.baddbmm(bias, self.weight.mT, x.mT).mT  # (D, B, out)


class BlockLayerNorm(nn.Module):
    """Layer norm of each block by itself, with a scale and a shift per unit. Shapes: (D, B, width) -> (D, B, width)."""

    def __init__(self, blocks: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, 1, width))
        self.bias = nn.Parameter(torch.empty(blocks, 1, width))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Standardize.apply(x)[0].to(x.dtype) * self.weight + self.bias


class _Standardize(torch.autograd.Function):
    """(x - mean) / sqrt(variance + 1e-5) over the last dimension, and the inverse of the root, both in float32 at least.

    By hand: with rows as short as a block's, and the batch innermost in memory, forward and backward take half the time of `layer_norm`.
    """

    @staticmethod
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x if x.dtype == torch.float64 else x.float()
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return centred * scale, scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: tuple[torch.Tensor, torch.Tensor]) -> None:
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
    """Batch norm over every unit of every block, the paper's. Shapes: (D, B, width) -> (D, B, width)."""

    def __init__(self, blocks: int, width: int):
        super().__init__(blocks * width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        blocks, batch, width = x.shape
        flat = x.transpose(0, 1).reshape(batch, blocks * width)
        return super().forward(flat).view(batch, blocks, width).transpose(0, 1)


_NORMS: dict[str, Callable[[int, int], nn.Module]] = {
    "layer": BlockLayerNorm,
    "batch": BlockBatchNorm,
    "none": lambda blocks, width: nn.Identity(),
}


class ExogenousLayer(nn.Module):
    """Exogenous intervention layer (METHOD section 2, step 1), block-diagonal, two slices:

    u_j = GELU((1 - s_j) (A_obs[j] z_j + b_obs[j]) + s_j (A_int[j] z_j + b_int[j])).

    Both slices stand side by side in one weight, (A_obs | A_int): one product, then mixed by the targets. They start out equal, so that
    an intervention does nothing at first but cut edges, and learns to do what the data ask for. Drawn apart, the decoder learns from the
    first step on to read a concept that is intervened on, and all that others hear of it, in another place: likelihood and unseen
    compositions suffer (README). Where few of many concepts are intervened on, the second slice is computed there only.
    Shapes: z (D, B, n), s (D, B, 1) -> u (D, B, n).
    """

    def __init__(self, blocks: int, width: int):
        super().__init__()
        self.slices = BlockLinear(blocks, width, 2 * width, slices=2)

    def forward(self, z: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        few = _few(s[..., 0])
        if few is None:
            obs, intervened = self.slices(z).chunk(2, dim=-1)  # (D, B, n) each
            return nn.functional.gelu(torch.lerp(obs, intervened, s.to(obs.dtype)))
        # A_obs z + b_obs, and s (A_int - A_obs) z + s (b_int - b_obs) where s is not 0.
        (A_obs, A_int), (b_obs, b_int) = (parameter.chunk(2, dim=-1) for parameter in self.slices.parameters())
        u = torch.baddbmm(b_obs.squeeze(1).unsqueeze(2), A_obs.mT, z.mT).mT  # (D, B, n)
        block, sample = few
        A, b = ((after - before).index_select(0, block) for before, after in ((A_obs, A_int), (b_obs, b_int)))
        change = z.mT[block, :, sample][:, None] @ A + b  # (few, 1, n)
        return nn.functional.gelu(u.index_put(few, s[few].to(u.dtype) * change[:, 0].to(u.dtype), accumulate=True))


def _few(s: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    """Where s is not 0, if that is in few places and can be looked up. What is computed in those places only is the same up to rounding."""
    if not at_hand(s):
        return None
    places = s.nonzero(as_tuple=True)
    return places if 32 * len(places[0]) <= s.numel() else None


class ExpressiveLayers(nn.Sequential):
    """Expressive layers (METHOD section 2, step 2): eps_j = MLP_j(u_j), `depth` times (linear, norm, GELU) in every block.

    Shapes: (D, B, in_width) -> (D, B, out_width), widths interpolated linearly.
    """

    def __init__(self, blocks: int, in_width: int, out_width: int, depth: int, norm: str):
        widths = [round(in_width + (out_width - in_width) * layer / depth) for layer in range(depth + 1)]
        layers = []
        for before, after in zip(widths[:-1], widths[1:]):
            layers += [BlockLinear(blocks, before, after), _NORMS[norm](blocks, after), nn.GELU()]
        super().__init__(*layers)


class InterventionLayer(nn.Module):
    """Intervention layer (METHOD section 2, step 3): a linear SEM whose structure the context selects.

    With `steps=1` its reduced form, the paper's, with effects of their own for intervened causes:

        c_i = eps_i + (1 - s_i) sum_{j != i} ((1 - s_j) W_obs[i, j] + s_j W_int[i, j]) eps_j + bias_i

    The two sums are one product of (W_obs | W_int) with ((1 - s) eps, s eps) stacked. With `steps=k > 1` the structural form, one W for all
    contexts (an intervention changes how a concept comes about, not what it does), followed along directed paths of up to k edges:

        c_i = eps_i + (1 - s_i) sum_{j != i} W[i, j] c_j,  then  + bias_i

    There, cutting the edges into a concept also cuts the paths through it, which the reduced form cannot know of concepts that were never
    intervened on together. With `perfect=False` (soft interventions) there is no factor (1 - s_i).

    do(c_j = v): where `chosen` says so, c_j = values_j exactly, whatever it would hear, and the others hear eps_j = v - bias_j in place of
    its noise (reduced form), or c_j = v - bias_j along every path (structural form). So a chosen value is a perfect intervention on its
    concept, with soft interventions too. In the reduced form what W_obs has summed up over paths through j stays, as it does under s_j = 1.
    Shapes: eps (B, D, w), s (B, D, 1), values (B, D, w), chosen (B, D, 1) -> c (B, D, w).
    """

    def __init__(self, blocks: int, width: int, perfect: bool, steps: int):
        super().__init__()
        self.perfect, self.steps = perfect, steps
        self.slices = 2 if steps == 1 else 1
        self.add_weights(blocks, width)
        self.bias = nn.Parameter(torch.empty(blocks, width))

    def add_weights(self, blocks: int, width: int) -> None:
        # weight[i, :, 0, j, :] is the block W_obs[i, j] (or W), weight[i, :, 1, j, :] is W_int[i, j]; blocks with i = j are not used.
        self.weight = nn.Parameter(torch.empty(blocks, width, self.slices, blocks, width))

    def reset_parameters(self, std: float) -> None:
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.weight, std=std)
        with torch.no_grad():
            self.weight.copy_(self.weight[:, :, :1].expand_as(self.weight))  # W_int starts as W_obs

    def off_diagonal(self) -> torch.Tensor:
        """The weight with its blocks i = j set to zero, (D, w, 2 or 1, D, w)."""
        blocks = len(self.bias)
        mask = 1 - torch.eye(blocks, dtype=self.weight.dtype, device=self.weight.device)
        return self.weight * mask[:, None, None, :, None]

    def penalty(self, group_lasso: float, l2: float) -> torch.Tensor:
        """`InterventionHead.penalty`."""
        squares = self.off_diagonal().float().square().sum((1, 4))  # (D, 2 or 1, D)
        return group_lasso * _norm(squares).sum() + l2 * squares.sum()

    def hearing(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """The map of what the blocks send, (2 or 1, D, w, B), to what each hears of the others, sum_{j != i} W[i, j] sent_j, (D, w, B)."""
        weight = self.off_diagonal().flatten(2).flatten(0, 1)  # (D w, 2 D w) or (D w, D w)
        return lambda sent: (weight @ sent.flatten(0, 2)).unflatten(0, self.bias.shape)

    def forward(
        self, eps: torch.Tensor, s: torch.Tensor, values: torch.Tensor | None = None, chosen: torch.Tensor | None = None
    ) -> torch.Tensor:
        eps, s = (x.permute(1, 2, 0) for x in (eps, s.to(eps.dtype)))  # (D, w, B), (D, 1, B): samples are columns
        bias, kept = self.bias[..., None], 1 - s
        if values is not None and chosen is not None:
            values, chosen = (x.permute(1, 2, 0) for x in (values, chosen))
            held = (values - bias).to(eps.dtype)
            eps = torch.where(chosen, held, eps)
        hear = self.hearing()
        c = eps
        for _ in range(self.steps):
            heard = hear(torch.stack([kept * c, s * c]) if self.steps == 1 else c[None])
            c = torch.addcmul(eps, kept, heard) if self.perfect else eps + heard
            if values is not None and chosen is not None:
                c = torch.where(chosen, held, c)
        c = c + bias
        if values is not None and chosen is not None:
            c = torch.where(chosen, values.to(c.dtype), c)  # (v - bias) + bias is v up to rounding
        return c.permute(2, 0, 1)  # (B, D, w)


class LowRankInterventionLayer(InterventionLayer):
    """Intervention layer whose weights have a low rank r, for many concepts: W[i, j] = U_i V_j^T for i != j, U_i and V_j of shape (w, r).

    What a block hears, sum_{j != i} W[i, j] x_j = U_i (sum_j V_j^T x_j) - U_i V_i^T x_i, costs as much as D maps to r numbers and back;
    no (D w, D w) matrix is made. In the reduced form W_obs[i, j] = U_i V_obs[j]^T and W_int[i, j] = U_i V_int[j]^T: r is the rank of
    (W_obs | W_int). Shapes as those of `InterventionLayer`.
    """

    def __init__(self, blocks: int, width: int, perfect: bool, steps: int, rank: int):
        self.rank = rank
        super().__init__(blocks, width, perfect, steps)

    def add_weights(self, blocks: int, width: int) -> None:
        self.effects = nn.Parameter(torch.empty(blocks, width, self.rank))  # U
        self.causes = nn.Parameter(torch.empty(self.slices, blocks, width, self.rank))  # V_obs and V_int, or V

    def reset_parameters(self, std: float) -> None:
        nn.init.zeros_(self.bias)
        for factor in (self.effects, self.causes):  # the entries of U V^T have the standard deviation std
            nn.init.normal_(factor, std=(std / math.sqrt(self.rank)) ** 0.5)
        with torch.no_grad():
            self.causes.copy_(self.causes[:1].expand_as(self.causes))  # W_int starts as W_obs

    def off_diagonal(self) -> torch.Tensor:
        """W with its blocks i = j set to zero, (D, w, 2 or 1, D, w): to look at, quadratic in D."""
        mask = 1 - torch.eye(len(self.bias), dtype=self.bias.dtype, device=self.bias.device)
        return torch.einsum("iar,kjbr,ij->iakjb", self.effects, self.causes, mask)

    def penalty(self, group_lasso: float, l2: float) -> torch.Tensor:
        """`InterventionHead.penalty`, by |U_i V_j^T|^2 = <U_i^T U_i, V_j^T V_j>: the L2 term is linear in D, the group lasso has D^2 norms."""
        u, v = (x.float().mT @ x.float() for x in (self.effects, self.causes))  # (D, r, r), (2 or 1, D, r, r)
        total = l2 * ((u.sum(0) * v.sum(1)).sum() - (u * v).sum())
        if group_lasso:
            squares = torch.einsum("irq,kjrq->ikj", u, v).clamp(min=0)  # (D, 2 or 1, D), rounded
            mask = 1 - torch.eye(len(u), device=u.device)
            total = total + group_lasso * _norm(squares * mask[:, None]).sum()
        return total

    def hearing(self) -> Callable[[torch.Tensor], torch.Tensor]:
        effects, causes = self.effects.flatten(0, 1), self.causes.flatten(0, 2)  # (D w, r), (2 D w, r) or (D w, r)
        itself = -self.effects @ self.causes.permute(1, 3, 0, 2).flatten(2)  # -U_i V_i^T, (D, w, 2 w) or (D, w, w)

        def hear(sent: torch.Tensor) -> torch.Tensor:
            heard = (effects @ (causes.T @ sent.flatten(0, 2))).unflatten(0, self.bias.shape)
            return torch.baddbmm(heard, itself, sent.transpose(0, 1).flatten(1, 2))

        return hear


def _norm(squares: torch.Tensor) -> torch.Tensor:
    return (squares + 1e-12).sqrt()  # the gradient of a norm at 0 is not finite


def _columns(targets: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Targets (B, D) as (B, D, 1), the batch innermost in memory."""
    return targets.to(dtype).T.contiguous().T[..., None]


class InterventionHead(PreTrainedModel):
    r"""
    Intervention head (METHOD section 2): exogenous noise and targets in, the decoder's embedding out; and, on the encoder's side, the
    posterior over the noise.

    Example:

    ```python
    head = InterventionHead(InterventionConfig(concepts=["quad1", "size"], embedding_shape=[128]))
    z = torch.randn(2, head.config.num_blocks, head.config.noise_width)
    embedding = head(z, head.targets([["quad1", "size"], "obs"])).embedding  # (2, 128)
    ```
    """

    config: InterventionConfig
    config_class = InterventionConfig
    posterior_offset: torch.Tensor  # of a centred posterior
    base_model_prefix = "head"
    main_input_name = "z"

    def __init__(self, config: InterventionConfig):
        super().__init__(config)
        blocks, noise_width, width = config.num_blocks, config.noise_width, config.concept_width
        self.exogenous = ExogenousLayer(blocks, noise_width)
        self.expressive = ExpressiveLayers(blocks, noise_width, width, config.depth, config.norm)
        layer = (blocks, width, config.intervention == "perfect", config.propagation_steps)
        rank = config.intervention_rank
        self.intervention = InterventionLayer(*layer) if rank is None else LowRankInterventionLayer(*layer, rank)
        self.unpool = nn.Linear(blocks * width, math.prod(config.embedding_shape))

        posterior_width = 2 * blocks * noise_width  # mean and log-variance
        if config.posterior == "unconditional":
            self.encoder_readout: nn.Module = PosteriorLinear(config.feature_width, posterior_width, config.initial_posterior_std)
        else:
            hidden = config.feature_width
            self.encoder_readout = nn.Sequential(
                nn.Linear(config.feature_width + len(config.concepts), hidden),
                nn.GELU(),
                PosteriorLinear(hidden, posterior_width, config.initial_posterior_std),
            )
        contexts = 1 + len(config.concepts)
        if config.posterior in CENTERED:
            # Row 0: the mean of the posterior means over the observational context; row 1 + j: over the context of concept j.
            self.register_buffer("posterior_offset", torch.zeros(contexts, blocks, noise_width))
        self.whitening = Whitening(contexts, blocks * noise_width) if config.posterior == "whitened" else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, InterventionLayer):
            module.reset_parameters(self.config.initializer_range)
        elif callable(reset := getattr(module, "reset_parameters", None)):
            reset()

    def forward(
        self,
        z: torch.Tensor,
        targets: torch.Tensor,
        values: torch.Tensor | None = None,
        chosen: torch.Tensor | None = None,
        return_dict: bool | None = None,
        edge_targets: torch.Tensor | None = None,
    ) -> InterventionHeadOutput | tuple:
        """Embedding of exogenous noise under interventions, of some concepts at chosen values.

        Args:
            z: exogenous noise, (B, D, noise_width); standard normal under the prior.
            targets: (B, D), entries in [0, 1]; each row its own context.
            values: chosen values of c, (B, D, concept_width), for do(c_j = v) (see `InterventionLayer`); read where `chosen` is true.
            chosen: which, bool (B, D): there s_j counts as 1.
            return_dict: whether to return an `InterventionHeadOutput` (default) or a tuple.
            edge_targets: (B, D), the targets that the intervention layer (step 3) sees, while `targets` go
                to the exogenous layer (step 1); `None`: the same. It tells the two ways of an intervention
                apart; see `hf_intervene.metrics.routes`.
        """
        blocks = self.config.num_blocks
        if z.ndim != 3 or z.shape[1] != blocks or z.shape[2] != self.config.noise_width:
            raise ValueError(f"z must have shape (batch, {blocks}, {self.config.noise_width}), not {tuple(z.shape)}.")
        if targets.ndim != 2 or targets.shape[1] != blocks:
            raise ValueError(f"targets must have shape (batch, {blocks}), not {tuple(targets.shape)}.")
        if edge_targets is not None and edge_targets.shape != targets.shape:
            shapes = f"{tuple(targets.shape)}, not {tuple(edge_targets.shape)}"
            raise ValueError(f"edge_targets must have the shape of targets, {shapes}.")
        if (values is None) != (chosen is None):
            raise ValueError("values and chosen go together: give both or neither.")
        s = _columns(targets, self.dtype)  # (B, D, 1)
        edges = s if edge_targets is None else _columns(edge_targets, self.dtype)
        if values is not None and chosen is not None:
            shape = (*targets.shape, self.config.concept_width)
            if tuple(values.shape) != shape or tuple(chosen.shape) != shape[:2] or chosen.dtype != torch.bool:
                raise ValueError(
                    f"values must have shape {shape} and chosen, bool, {shape[:2]}, not {tuple(values.shape)} and {tuple(chosen.shape)}."
                )
            chosen = chosen[..., None]  # (B, D, 1)
            s, edges = torch.where(chosen, 1.0, s), torch.where(chosen, 1.0, edges)
        z = z.to(self.dtype)
        u = self.exogenous(z.transpose(0, 1), s.transpose(0, 1))  # (D, B, n)
        eps = self.expressive(u).transpose(0, 1)  # (B, D, w)
        c = self.intervention(eps, edges, values, chosen)  # (B, D, w)
        e = self.unpool(c.flatten(1)).unflatten(1, self.config.embedding_shape)  # (B, *embedding_shape)
        output = InterventionHeadOutput(embedding=e, concepts=c)
        return output if return_dict is not False else output.to_tuple()

    def posterior(self, features: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(z | x, s) (or q(z | x), see `InterventionConfig.posterior`), float32, each (B, D, noise_width); of a
        whitened posterior those of y (see `posterior.py`): `whiten` makes a draw z, and `kl` is that of z.

        Args:
            features: encoder features, (B, feature_width).
            targets: (B, D).
        """
        s = targets[:, : len(self.config.concepts)]  # (B, d)
        features = features.to(self.dtype)  # the base may be in another precision
        if self.config.posterior != "unconditional":
            features = torch.cat([features, s.to(features.dtype)], dim=1)
        moments = self.encoder_readout(features).float()  # (B, 2 D n): the KL wants float32
        mean, logvar = moments.unflatten(1, (2, self.config.num_blocks, self.config.noise_width)).unbind(1)
        if self.config.posterior in CENTERED:
            # Linear in the targets: offset_obs + sum_j s_j (offset_j - offset_obs).
            weights = torch.cat([1 - s.sum(1, keepdim=True), s], dim=1).float()  # (B, 1 + d)
            few, offset = _few(weights), self.posterior_offset.float()
            if few is None:
                with torch.autocast(mean.device.type, enabled=False):  # as exact as it is added up
                    mean = mean - torch.einsum("bk,kdn->bdn", weights, offset)
            else:
                mean = mean.index_add(0, few[0], weights[few][:, None, None] * offset[few[1]], alpha=-1)
        return mean, logvar.clamp(-30.0, 20.0)  # diffusers' bounds for a diagonal Gaussian

    def whiten(self, y: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Exogenous noise z of a draw y from what `posterior` returned, both (B, D, noise_width); y itself unless it is whitened."""
        return y if self.whitening is None else self.whitening(y, self._mixture(targets))

    def kl(self, mean: torch.Tensor, logvar: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """KL(q(z | x, s) || N(0, I)) of each sample in nats, (B,), of what `posterior` returned. An upper bound of it where a whitened
        posterior is asked for a context that is not of the training data."""
        return gaussian_kl(mean, logvar) if self.whitening is None else self.whitening.kl(mean, logvar, self._mixture(targets))

    def marginals(self, mean: torch.Tensor, logvar: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of each entry of z, of what `posterior` returned; all (B, D, noise_width)."""
        if self.whitening is None:
            return mean, logvar
        weights = self._mixture(targets)
        return self.whitening(mean, weights), self.whitening.variance(logvar.exp(), weights).log()

    def _mixture(self, targets: torch.Tensor) -> torch.Tensor:
        return mixture(targets[:, : len(self.config.concepts)])

    def whiten_posterior(self, targets: torch.Tensor, covariance: torch.Tensor) -> None:
        """Let z be white in contexts over which y has these covariances; no effect unless the posterior is whitened.

        Args:
            targets: of the contexts, (n, D), each with nothing or one concept intervened on.
            covariance: of y, (n, D noise_width, D noise_width), blocks in order.
        """
        if self.whitening is not None:
            self.whitening.update(row_of(targets[:, : len(self.config.concepts)]), covariance)

    @torch.no_grad()
    def center_posterior(self, mean: torch.Tensor, targets: torch.Tensor, momentum: float = 0.05) -> None:
        """Move the offsets of a centred posterior towards the mean of each context in a batch; no effect on other posteriors.

        The prior of z is N(0, I) in every context. An encoder is quick to tell contexts apart by shifting z instead, and then samples
        from the prior miss what A_int and W_int should carry. Taking the context's mean out leaves that work to the head.

        Args:
            mean: posterior means of the batch, (B, D, noise_width), as `posterior` returned them (already centred so far).
            targets: (B, D); only rows with nothing or one whole concept intervened on count.
            momentum: weight of this batch in the running mean.
        """
        if self.config.posterior not in CENTERED:
            return
        s = targets[:, : len(self.config.concepts)].float()
        single = has_row(s)
        context = row_of(s)  # (B,)
        counts = torch.zeros(1 + s.shape[1], device=s.device).index_add(0, context, single.float())  # (1 + d,)
        weight = momentum * single / counts[context].clamp(min=1)  # (B,)
        # Only these rows: the offsets of all contexts are many.
        self.posterior_offset.index_add_(0, context, (weight[:, None, None] * mean.float()).to(self.posterior_offset.dtype))

    def penalty(self, group_lasso: float = 0.0, l2: float = 0.0) -> torch.Tensor:
        """Group-lasso and L2 penalty on the off-diagonal blocks of W_obs and W_int (METHOD section 2), a scalar in nats."""
        return self.intervention.penalty(group_lasso, l2)

    def targets(self, interventions: Interventions, num_samples: int | None = None) -> torch.Tensor:
        """Targets (num_samples, D) of any form of `contexts.py`, on the head's device."""
        config = self.config
        return parse_interventions(interventions, config.concepts, num_samples, config.free_blocks).to(self.device)

    @classmethod
    def from_pretrained(  # type: ignore[override]  # no `None` for the name, as in no model that is loaded
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, subfolder: str = "", **kwargs: Any
    ) -> "InterventionHead":
        """As in transformers, and strict: missing, unexpected or ill-shaped weights, truncated files, pickle files and what the Hub or
        the connection refuses are one-sentence errors. Keyword arguments as in transformers: `revision`, `token`, `local_files_only`...
        """
        name, patterns = pretrained_model_name_or_path, ("config.json", "model*.safetensors", "model.safetensors.index*.json")
        path = folder(name, [os.path.join(subfolder, pattern) for pattern in patterns], **pop_options(kwargs))
        what = f"the head of {os.path.join(name, subfolder) if subfolder else name}"
        files = check_weights(path / subfolder, what, "model", kwargs.get("variant"))
        config = kwargs.get("config")
        if not isinstance(config, InterventionConfig):
            config = InterventionConfig.from_pretrained(path / subfolder)
        check_fit(lambda: cls(config), files, what)
        kwargs |= {"subfolder": subfolder, "use_safetensors": True}
        load: Callable[..., Any] = super().from_pretrained  # by its hints a model, with output_loading_info too
        if kwargs.pop("output_loading_info", False):
            return load(path, *args, output_loading_info=True, **kwargs)
        return check_loaded(lambda: load(path, *args, output_loading_info=True, **kwargs), what)


InterventionHead.register_for_auto_class("AutoModel")  # see configuration_intervention.py

__all__ = ["InterventionHead", "InterventionHeadOutput"]
