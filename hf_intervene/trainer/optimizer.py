"""AdamW, and Muon for the matrices of networks that are trained from scratch.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) makes a step of a matrix
orthogonal: with the momentum buffer B <- mu B + G of gradients G,

    W <- W - 0.2 sqrt(max(m, n)) lr O,    O ~ U V^T for G + mu B = U S V^T,

O by Newton-Schulz iterations; the factor makes its entries as large as Adam's (Liu et al.,
arXiv:2502.16982), so that both have one learning rate. `torch.optim.Muon` takes matrices alone;
here a convolution is the matrix (out, in x kernel)."""

from collections.abc import Collection
from functools import reduce
from typing import Any

import torch

from .distributed import Weights
from .settings import TrainArguments


MOMENTUM = 0.95
STEPS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)  # of the iteration
SIZE = 0.2  # root mean square of a step of Adam, in learning rates


def build_optimizer(
    arguments: TrainArguments,
    weights: Weights,
    parameters: list[torch.nn.Parameter],
    of_base: Collection[torch.nn.Parameter],
    of_adapter: Collection[torch.nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimiser of a run, with a learning rate `peak` for each group.

    Args:
        arguments: the settings.
        weights: of the model, maybe sharded.
        parameters: what is trained.
        of_base: those of them that are the base's.
        of_adapter: those of them that are the adapter's, which is new where the base is pretrained.

    Raises:
        ValueError: muon for weights that processes share.
    """
    a = arguments
    if a.optimization.optimizer == "muon" and weights.partitioned:
        raise ValueError(
            "optimizer muon needs whole matrices, which FSDP and ZeRO cut: choose adamw, or DDP."
        )
    of_networks: set[torch.nn.Parameter] = set()  # whose matrices are Muon's
    if a.optimization.optimizer != "adamw" and not weights.partitioned:
        of_networks.update(of_adapter)
        if a.base.is_new or a.optimization.optimizer == "muon":
            of_networks.update(of_base)
    matrices = {p for p in parameters if p in of_networks and p.ndim > 1}
    rate, base_rate = (
        a.optimization.learning_rate,
        a.optimization.base_learning_rate or a.optimization.learning_rate,
    )
    groups: list[dict[str, Any]] = []
    for in_base, peak in ((False, rate), (True, base_rate)):
        own = [p for p in parameters if (p in of_base) == in_base]  # in order, which a set has not
        rest = weights.groups([p for p in own if p not in matrices])
        groups += [group | {"peak": peak} for group in rest]
        if by_muon := [p for p in own if p in matrices]:
            groups.append({"params": by_muon, "peak": peak, "muon": True})
    # Fused updates skip steps that fp16 had to throw away by themselves; Muon leaves that to the
    # gradient scaler.
    options: dict[str, Any] = {
        "weight_decay": a.optimization.weight_decay,
        "fused": not matrices or weights.accelerator.scaler is None,
    }
    if not matrices:
        return torch.optim.AdamW(groups, **options)
    return MuonAdamW(groups, **options)


class MuonAdamW(torch.optim.AdamW):
    """AdamW for groups of parameters, and Muon for those with `"muon": True`.

    Args:
        groups: of parameters; those of Muon have two dimensions or more.
        **options: of AdamW. Weight decay acts on both.
    """

    def __init__(self, groups: list[dict[str, Any]], **options: Any):
        super().__init__([{"muon": False} | group for group in groups], **options)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        every = self.param_groups
        self.param_groups = [group for group in every if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._turn(parameter, group)
        return loss

    def _turn(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects one when it is loaded
            state["momentum"] = torch.zeros_like(parameter)
        state["step"] += 1
        state["momentum"].mul_(MOMENTUM).add_(parameter.grad)
        update = state["momentum"].mul(MOMENTUM).add_(parameter.grad).flatten(1)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        size = group["lr"] * SIZE * max(update.shape) ** 0.5
        parameter.sub_(orthogonal(update).view(parameter.shape), alpha=size)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U V^T of a matrix U S V^T, (m, n), singular values in about [0.7, 1.2].

    An iteration is X <- P X, P = a I + b G + c G^2, G = X X^T. All P and G commute, so that next
    G = P^2 G: only the first G and the last product are of the size of the matrix.
    """
    a, b, c = COEFFICIENTS
    x = matrix.float()
    x = x.T if len(x) > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    gram = x @ x.T
    polynomials: list[torch.Tensor] = []
    for _ in range(STEPS):
        if polynomials:
            gram = polynomials[-1] @ gram @ polynomials[-1]
        polynomials.append(torch.addmm(gram, gram, gram, beta=b, alpha=c))
        polynomials[-1].diagonal().add_(a)
    x = reduce(torch.mm, polynomials) @ x
    return (x.T if len(matrix) > matrix.shape[1] else x).to(matrix.dtype)


__all__ = ["MuonAdamW", "build_optimizer", "orthogonal"]
