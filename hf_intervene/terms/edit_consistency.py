r"""Edits can be read back (an addition to the paper's objective).

Contexts with several interventions have no images. But what an image of one must contain is known:
the concepts that it was made of. The noise of some concepts T of an image is drawn anew, with an
intervention or without,

    z'_k ~ N(0, I) for k in T,    z'_j = z_j otherwise,    c'_j = F_j(z'_j; s'_j, h'_j) for all j (see `flow.py`).

c' is decoded to an image x' (of a denoiser: by its adapter's decoder, to the mean of what is
denoised), pixel noise is added to it, and the encoder has to read c' in it:

    loss = E sum_i huber((c'_i - m_i(x' + u n)) / sigma_i(x' + u n)),    n ~ N(0, I),    u ~ U(0, `NOISE`),

m and sigma being the mean and the standard deviation of q(c | x'). c' and sigma have no gradient:
decoder and encoder learn to agree on what an edit shows. If a value is read from a free block, an
edit of its concept does not change it, and the loss is high. So the value moves to the concept's
own block. The noise keeps the two from agreeing on marks that nobody sees. Beyond `KNEE` the loss
is linear and has no bound: at first edits change nothing and are far off, and they need a gradient
too. (On models that have to be read back under unseen combinations see Wiedemer et al.,
arXiv:2310.05327.)"""  # noqa: E501

import torch
from torch.nn.functional import huber_loss

from ..logging import get_logger
from .base import Term


logger = get_logger(__name__)
KNEE = 3.0  # standard deviations
NOISE = 0.2  # of pixels in [0, 1], or of latents, whose standard deviation is 1
FIRST, RISING = 0.05, 0.2  # shares of the training: when it starts, and over which it rises
# Shares of the concepts that are drawn anew with an intervention, and without.
INTERVENED, OBSERVED = 0.4, 0.3


class EditConsistency(Term):
    """
    Args:
        strength: its weight, once it has risen.
        noise_shape: of z, (D, w + 1).
        shape: of what is read of an image, see `Base.estimates`.
        every: one image in so many is edited.
    """

    name = "edit_consistency"
    sharded = False  # a second pass through sharded blocks is not tested

    def __init__(
        self,
        strength: float,
        noise_shape: tuple[int, int],
        shape: tuple[int, ...],
        every: int = 2,
    ):
        super().__init__(strength)
        self.noise_shape, self.shape, self.every = noise_shape, shape, every

    @classmethod
    def build(cls, strength, model, contexts):
        base = model.base
        if not model.head.is_flow or len(contexts) < 2:
            return None
        if base.estimates is None:
            logger.warning(
                "edit consistency is left out: of a denoiser it needs no image_encoder, and an"
                " adapter with a decoder, which older ones lack; combinations of concepts will be"
                " worse."
            )
            return None
        return cls(strength, model.noise_shape, base.estimates)

    def weight(self, progress):
        return self.strength * min(1.0, max(0.0, progress - FIRST) / RISING)

    def draw(self, rows, generator):
        blocks = self.noise_shape[0]
        return {
            "noise": torch.randn(rows, *self.noise_shape, generator=generator),
            "kind": torch.rand(rows, blocks, generator=generator),
            "spread": NOISE * torch.rand(rows, *[1] * len(self.shape), generator=generator),
            "blur": torch.randn(rows, *self.shape, generator=generator),
        }

    def loss(self, model, output, targets, draws):
        head, base = model.head, model.base
        draws = {name: x[:: self.every] for name, x in draws.items()}
        with torch.no_grad():
            z = head.whiten(output.draw, targets, output.states)
            before = (x[:: self.every] for x in (output.draw, z, targets))
            made, new = edited(head, *before, draws["noise"], draws["kind"])
        seen = base.estimate(head.represent(made)) + draws["spread"] * draws["blur"]
        mean, logvar = head.posterior(base.encode_estimate(seen).features, new)
        off = (made.float() - mean) * (-0.5 * logvar.detach()).exp()
        losses = huber_loss(off, torch.zeros_like(off), reduction="none", delta=KNEE)
        return losses.flatten(1).sum(1).mean()


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


__all__ = ["EditConsistency", "edited"]
