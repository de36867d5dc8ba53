r"""Edits can be read back (an addition to the paper's objective).

Contexts with several interventions have no images. But what an image of one must contain is known:
the concepts that it was made of. The noise of some concepts T of an image is drawn anew, with an
intervention or without,

    z'_k ~ N(0, I) for k in T,    z'_j = z_j otherwise,    c'_j = F_j(z'_j; s'_j, h'_j) for all j (see `flow.py`).

c' is decoded to an image x', and the encoder has to read c' in it:

    loss = E 1/2 sum (c' - m(x'))^2 / var(x'),

m and var being the mean and the variance of q(c | x'). The gradient goes to the decoder only, by
way of x': the encoder, c' and the variances are held, so that nothing but a better image makes it
smaller. (On decoders that have to be read back under unseen combinations see Wiedemer et al.,
arXiv:2310.05327.)"""  # noqa: E501

import torch
from torch.func import functional_call

from .base import Term


LARGEST = 50.0  # nats of an entry: early, an encoder is far too sure of what it reads
FIRST, RISING = 0.05, 0.2  # shares of the training: when it starts, and over which it rises
# Shares of the concepts that are drawn anew with an intervention, and without.
INTERVENED, OBSERVED = 0.4, 0.3


class EditConsistency(Term):
    """
    Args:
        strength: its weight, once it has risen.
        every: one of so many images of a batch is edited.
    """

    name = "edit_consistency"
    sharded = False  # blocks that FSDP gathers one at a time take no second pass with held weights

    def __init__(self, strength: float, noise_shape: tuple[int, int], every: int = 2):
        super().__init__(strength)
        self.noise_shape, self.every = noise_shape, every

    @classmethod
    def build(cls, strength, model, contexts):
        several = model.head.is_flow and len(contexts) > 1
        return cls(strength, model.noise_shape) if several and model.base.passes == 1 else None

    def weight(self, progress):
        return self.strength * min(1.0, max(0.0, progress - FIRST) / RISING)

    def draw(self, rows, generator):
        blocks = self.noise_shape[0]
        return {
            "noise": torch.randn(rows, *self.noise_shape, generator=generator),
            "kind": torch.rand(rows, blocks, generator=generator),
        }

    def loss(self, model, output, targets, draws):
        head, rows = model.head, slice(None, None, self.every)
        with torch.no_grad():
            z = head.whiten(output.draw, targets, output.states)[rows]
            edit = targets[rows], draws["noise"][rows], draws["kind"][rows]
            made, new = edited(head, output.draw[rows], z, *edit)
        images = model.base.generate(head.represent(made), {})
        mean, logvar = functional_call(_Reader(model), held(model), (images, new))
        squares = 0.5 * (made.float() - mean).square() * (-logvar.detach()).exp()
        return squares.clamp(max=LARGEST).flatten(1).sum(1).mean()


def edited(head, concepts, z, targets, noise, kind) -> tuple[torch.Tensor, torch.Tensor]:
    """Concepts c' (B, D, w) of edited images, and their targets (B, D).

    Args:
        head: an `InterventionHead` with flows.
        concepts, z, targets: before, (B, D, w), (B, D, w + 1) and (B, D).
        noise: for concepts that are drawn anew, (B, D, w + 1).
        kind: in [0, 1), (B, D): below `INTERVENED` a concept is drawn anew with an intervention, at
            the other end without. Free blocks stay.
    """
    concept = torch.arange(targets.shape[1], device=targets.device) < len(head.config.concepts)
    intervened, observed = (kind < INTERVENED) & concept, (kind >= 1 - OBSERVED) & concept
    after = torch.where(intervened, 1.0, torch.where(observed, 0.0, targets)).to(head.dtype)
    z = torch.where((intervened | observed)[..., None], noise.to(z.dtype), z)
    return head.remade(concepts, z, after), after


class _Reader(torch.nn.Module):
    """The way from images to the posterior, as a module whose weights `functional_call` can
    replace.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        return self.model.head.posterior(self.model.base.encode(images).features, targets)


def held(model) -> dict[str, torch.Tensor]:
    """The weights of the model, out of reach of gradients."""
    return {f"model.{name}": value.detach() for name, value in model.named_parameters()}


__all__ = ["EditConsistency", "edited"]
