"""Small networks beside the model, which learn while it trains: classifiers whose logits its objective reads."""

from collections.abc import Callable

import torch
from torch import nn


Average = Callable[[torch.Tensor], torch.Tensor]


class Auxiliary:
    """A network with an optimiser of its own. It learns by `learn` alone: the gradient of the model's objective passes through it and
    leaves its weights alone. Every process has the same ones.

    Args:
        build: makes the network.
        seed: of its weights.
        device: of the state.
        learning_rate, betas: of Adam.
        average: a tensor's mean over the processes, each of which learns from as large a share of a global batch; `None`: there is one.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        seed: int,
        device: torch.device | str,
        learning_rate: float,
        betas: tuple[float, float],
        average: Average | None = None,
    ):
        self.average = average
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.network = build().to(device).requires_grad_(False)
        self.parameters = list(self.network.parameters())
        # With the usual eps of 1e-8 gradients of rounding alone make whole steps, and two processes part from one.
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, betas=betas, eps=1e-6, fused=True)

    def learn(self, loss: Callable[[], torch.Tensor]) -> None:
        """A step of its optimiser down the gradient of `loss`, a scalar, the mean over this process's share."""
        for parameter in self.parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(), self.parameters)
        if self.average is not None:
            averaged = self.average(torch.cat([gradient.flatten() for gradient in gradients]))  # all at once
            parts = averaged.split([parameter.numel() for parameter in self.parameters])
            gradients = tuple(part.view_as(parameter) for part, parameter in zip(parts, self.parameters))
        for parameter, gradient in zip(self.parameters, gradients):
            parameter.requires_grad_(False)
            parameter.grad = gradient.contiguous()  # as its parameter: fused Adam takes entries in the order of memory
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Its weights and its optimiser's state."""
        adam = {f"adam.{i}.{key}": value for i, p in enumerate(self.parameters) for key, value in self.optimizer.state[p].items()}
        return {f"critic.{name}": value for name, value in self.network.state_dict().items()} | adam

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state_dict` returned. Raises a KeyError or RuntimeError if it is of something else."""
        self.network.load_state_dict({name: state[f"critic.{name}"] for name in self.network.state_dict()})
        for name, value in state.items():
            if name.startswith("adam."):
                _, index, key = name.split(".")
                parameter = self.parameters[int(index)]
                self.optimizer.state[parameter][key] = value.to(parameter.device)


__all__ = ["Auxiliary", "Average"]
