"""How a head meets a pretrained model: five verbs that every base family implements.

    encode(images) -> Encoded: features (B, feature_width), and what the family keeps beside them
    draws(n, generator) -> noise beside z, of residual latents or of denoising
    loss(embedding, encoded, draws) -> terms of the objective, each (B,)
    generate(embedding, draws, **options) -> images (B, C, H, W) in [0, 1]
    invert(encoded, embedding) -> draws

An embedding is (B, *embedding_shape). A third party adds a family without touching this package:

    @register_base(MyAutoencoder)
    class MyBase(Base):
        ...
"""

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn


class Encoded(NamedTuple):
    """What a base makes of images.

    Args:
        features: what the head's posterior reads, (B, feature_width).
        kept: what the family needs beside them for `loss` and `invert`, by name, each (B, ...).
    """

    features: torch.Tensor
    kept: dict[str, torch.Tensor]


class Base(nn.Module):
    """A pretrained model as a head sees it. Sub-classes set `feature_width`, `embedding_shape` and
    `image_shape` and implement `encode`, `loss` and `generate`; with noise of their own, `invert`
    too.

    Head and model may be in different precisions: the verbs cast what they are given to the
    model's.

    Args:
        model: the pretrained diffusers model; it is used and trained in place.
    """

    feature_width: int  # width of the encoder features the head's posterior reads
    embedding_shape: tuple[int, ...]  # of one sample's embedding
    image_shape: tuple[int, ...]  # (C, H, W)
    # Of one sample's standard normal noise beside z, by name; the model calls it `residual_noise`.
    noise_shapes: Mapping[str, tuple[int, ...]] = MappingProxyType({})
    loss_terms: tuple[str, ...] = ("reconstruction_loss",)  # names of what `loss` returns
    loss_name = "bits_per_pixel"  # what `per_unit` counts in, as a name
    loss_unit = "bits per pixel"  # in words
    # Name of the likelihood that `loss` is of, if that is not normalised.
    unnormalised: str | None = None
    passes = 1  # of the model, for one image, unless the user asks for another number
    resident: tuple[str, ...] = ("base",)  # parts that offloading must leave on the device
    # A network of the family's own between head and model, trained and saved with the head.
    adapter: ModelMixin | None
    # Its class; the constructor then takes it as `adapter=`.
    adapter_class: type[ModelMixin] | None = None
    companion_names: tuple[str, ...] = ()  # of the family's `companions`

    def __init__(self, model: ModelMixin):
        super().__init__()
        self.model, self.adapter = model, None
        self.under_head = True  # the ablations without a head use the base's own posterior

    # The verbs

    def encode(self, pixel_values: torch.Tensor) -> Encoded:
        """What the head reads of images (B, C, H, W) in [0, 1], and what the other verbs need of
        them."""
        raise NotImplementedError

    def draws(
        self,
        num_images: int,
        generator: torch.Generator | list[torch.Generator] | None = None,
        device: torch.device | None = None,
    ) -> dict[str, torch.Tensor]:
        """Standard normal noise beside z of so many images, by name, each (num_images, *shape) as
        `noise_shapes` has it, float32.

        Args:
            num_images: n.
            generator: or a list of one for each image.
            device: `None`: the CPU.
        """
        return {
            name: randn_tensor((num_images, *shape), generator, device, torch.float32)
            for name, shape in self.noise_shapes.items()
        }

    def loss(
        self, embedding: torch.Tensor, encoded: Encoded, draws: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The terms of the objective that take the place of -log p(x | e), each (B,), in nats;
        their names are fields of `InterventionModelOutput`.

        Args:
            embedding: (B, *embedding_shape).
            encoded: of the images.
            draws: of `training_draws`.
        """
        raise NotImplementedError

    def code_length(
        self, embedding: torch.Tensor, encoded: Encoded, draws: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """As `loss`, with the probabilities of images of bytes, b / 255, in place of what training
        minimises (see `likelihoods.py`), without a gradient. A family without a likelihood returns
        `loss`.
        """
        return self.loss(embedding, encoded, draws)

    def generate(
        self, embedding: torch.Tensor, draws: Mapping[str, torch.Tensor], **options: Any
    ) -> torch.Tensor:
        """Images (B, C, H, W) in [0, 1], float32: the mean of p(x | e, draws).

        Args:
            embedding: (B, *embedding_shape).
            draws: the noise beside z; without it, an autoencoder makes what the embedding alone
                asks for.
            **options: of a family that makes images in steps, see `DiffusionBase.generate`; the
                others have no use for them.
        """
        raise NotImplementedError

    def invert(
        self,
        encoded: Encoded,
        embedding: torch.Tensor,
        draws: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> dict[str, torch.Tensor]:
        """The noise beside z of encoded images under an embedding (B, *embedding_shape), as
        `generate` takes it.

        Args:
            encoded, embedding: see above.
            draws: noise for a draw from the family's own posterior; `None`: its mean.
            **options: as those of `generate`.
        """
        return {}

    # One pass, as training wants it (see `terms/edit_consistency.py`)

    @property
    def estimates(self) -> tuple[int, ...] | None:
        """Shape of what `estimate` returns of one image; `None`: this family has no estimate."""
        return self.image_shape

    def estimate(self, embedding: torch.Tensor) -> torch.Tensor:
        """What embeddings (B, *embedding_shape) look like, in one pass and with a gradient: images
        in [0, 1], or of a denoiser what it denoises, (B, *estimates)."""
        return self.generate(embedding, {})

    def encode_estimate(self, estimate: torch.Tensor) -> Encoded:
        """`encode` of what `estimate` returned."""
        return self.encode(estimate)

    # What the verbs are made of in some families

    def prepare(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the frozen parts make of images (B, C, H, W) in [0, 1], by name, each (B, ...). It
        is the same at every step, so training keeps it on disk."""
        return {"pixel_values": pixel_values}

    def encode_prepared(self, prepared: Mapping[str, torch.Tensor]) -> Encoded:
        """`encode` of what `prepare` returned."""
        return self.encode(prepared["pixel_values"])

    def training_draws(
        self,
        num_images: int,
        generator: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> dict[str, torch.Tensor]:
        """All random numbers that `loss` takes, by name, each (num_images, ...): those of `draws`,
        and more in some families. Arguments as there."""
        return self.draws(num_images, generator, device)

    def posterior(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base's own q(z | x), for the ablations without a head: mean and log-variance, each
        (B, *embedding_shape).
        """
        raise NotImplementedError

    def train_for_samples(self) -> None:
        """From now on train for this model's own samples alone, and no longer for pipelines that
        the head is attached to."""

    def check_alone(self, ablation: str) -> None:
        """Raise a ValueError where an ablation without a head makes no sense."""

    @property
    def guidance(self) -> float:
        """The `guidance_scale` of samples for which none is given."""
        return 1.0

    def check_guidance(self, guidance_scale: float, compose: str) -> None:
        """Refuse what no image of this family can be made with.

        Args:
            guidance_scale, compose: of `InterventionModel.sample`.

        Raises:
            ValueError: one sentence.
        """
        name = type(self.model).__name__
        if compose != "head":
            raise ValueError(
                f"compose={compose!r} is for denoisers; a {name} has no scores: leave it out."
            )
        if guidance_scale != 1.0:
            raise ValueError(f"guidance_scale is for denoisers; a {name} has none: leave it at 1.")

    def per_unit(self, loss: Any) -> Any:
        """A sum of terms of the loss of an image, a number, tensor or array in nats, in the unit
        that `loss_unit` names."""
        *_, height, width = self.image_shape
        return loss / (height * width * math.log(2))

    def release(self) -> None:
        """Take off the model what the family put on it, such as hooks."""

    # Of any base

    def companions(self) -> dict[str, Any]:
        """Frozen models, schedulers and processors that it needs beside the model, by the
        constructor's names for them.
        """
        return {}

    def companion_models(self) -> dict[str, nn.Module]:
        """Those of the `companions` that are models."""
        return {
            name: part for name, part in self.companions().items() if isinstance(part, nn.Module)
        }

    def encoder_modules(self) -> Iterable[nn.Module]:
        """The modules that no sample from the prior passes, such as those of the encoder."""
        return ()

    def freeze_unused(self) -> None:
        """Take the weights that a head replaces (the base's own posterior) out of training."""

    def trainable(self, flag: bool) -> None:
        """Make the weights of the pretrained model trainable that are in use, or freeze them all.
        An adapter stays trainable.
        """
        self.model.requires_grad_(flag)
        if self.under_head:
            self.freeze_unused()


def plain(value: Any) -> Any:
    """A value as configurations keep it: tuples as lists."""
    return list(value) if isinstance(value, (list, tuple)) else value
