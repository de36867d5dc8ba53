"""What a user asks of an `InterventionModel`: samples, edits, and the noise of images.

The file is longer than most: a third of it describes arguments, and its methods belong together.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .bases import Base
from .configuration_intervention import InterventionConfig
from .contexts import Interventions, Quantile, Value, parse_choices, parse_interventions
from .modeling_intervention import InterventionHead
from .sampling_arguments import (
    ImageInput,
    check_batch_size,
    check_composition,
    check_generator,
    check_images,
    check_noise,
    check_options,
    check_pixels,
    renamed,
)
from .values import Values, head_values


Images = torch.Tensor | np.ndarray | list[Image.Image]  # as `output_type` says


class GenerationMixin:
    """The methods of `InterventionModel` that a user calls. They do not depend on the kind of base.

    Attributes:
        config, base, head: of the model.
        noise_shape, draw_shape: of one sample's z, and of what the head's posterior is of.
        image_processor: for images that come in and go out.
    """

    config: InterventionConfig
    base: Base
    head: InterventionHead | None
    noise_shape: tuple[int, ...]
    draw_shape: tuple[int, ...]
    image_processor: VideoProcessor

    if TYPE_CHECKING:  # what `InterventionModel` has of its own

        @property
        def device(self) -> torch.device: ...
        @property
        def concepts(self) -> tuple[str, ...]: ...
        @property
        def num_blocks(self) -> int: ...
        def embed(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...
        def decode(self, *args: Any, **options: Any) -> torch.Tensor: ...
        def _posterior_of(
            self, features: torch.Tensor, targets: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]: ...
        def _noise_of(self, y: torch.Tensor, targets: torch.Tensor) -> torch.Tensor: ...

    @property
    def images_at_once(self) -> int:
        """How many images are processed at once unless said otherwise: 256 of up to 64x64 pixels,
        and fewer of larger ones. Each frame of a clip counts.
        """
        return max(1, min(256, 256 * 64**2 // math.prod(self.base.image_shape[1:])))

    @renamed(num_samples="num_images")
    @torch.no_grad()
    def sample(
        self,
        interventions: Interventions = None,
        num_images: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pt",
        batch_size: int | None = None,
        residual_scale: float = 1.0,
        residual_noise: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        reference_context: Interventions = None,
        compose: str = "head",
    ) -> Images:
        """Sample images from p(x | s), z from the prior.

        Args:
            interventions: what to intervene on, in any form of `hf_intervene.contexts`; several
                concepts at once compose. With chosen values (see `values.py`) from p(x | do(c_j =
                v)).
            num_images: number of images; `None`: one for each context given.
            generator: makes the draw reproducible.
            noise: exogenous noise to use, (num_images, *noise_shape), to compare interventions
                under the same noise.
            output_type: `"pt"` (float tensor (N, C, H, W) in [0, 1]), `"np"` (N, H, W, C) or
                `"pil"`; of clips (N, C, T, H, W), (N, T, H, W, C), or a list of frames each.
            batch_size: images decoded at once; `None`: `images_at_once`.
            residual_scale: standard deviation of the residual noise, for a base with residual
                latents: 1 is the model's own, 0 leaves the residual out (what the concepts decide,
                alone).
            residual_noise: residual noise to use, of those latents or of denoising, of the
                shape in `base.noise_shapes`.
            num_inference_steps: of a denoiser's scheduler.
            guidance_scale: for a denoiser: above 1, further away from what it makes of the same
                noise without interventions, at the price of a second call in each step; `None`: the
                model's own, `base.guidance`.
            reference_context: the context that reference images in `interventions` came from, or
                one for each sample: observational unless said otherwise.
            compose: how several concepts are put together. `"head"`: the head is given all of them
                at once. `"scores"`, of a denoiser: its prediction is o + w sum_k (p_k - o), where
                p_k is that under concept k alone, o that under nothing and w the `guidance_scale`
                (Liu et al., arXiv:2206.01714); it is right for concepts that are independent of
                each other.

        Raises:
            ValueError: one sentence: noise of another shape, guidance with no interventions or no
                denoiser.
        """
        if noise is not None:
            noise = check_noise("noise", noise, self.noise_shape)
            num_images = noise.shape[0] if num_images is None else num_images
        check_batch_size(batch_size)  # references are encoded with it
        targets, values = self._chosen(interventions, num_images, reference_context, batch_size)
        if guidance_scale is None:  # nothing leads away from itself
            guidance_scale = self.base.guidance if bool((targets != 0).any()) else 1.0
        numbers = {"guidance_scale": guidance_scale, "residual_scale": residual_scale}
        check_options(generator, len(targets), batch_size, output_type, **numbers)
        if noise is None:
            noise = randn_tensor(
                (len(targets), *self.noise_shape),
                generator=generator,
                device=self.device,
                dtype=torch.float32,
            )
        elif len(noise) != len(targets):
            raise ValueError(
                f"noise has {len(noise)} rows for {len(targets)} samples: give one row per sample."
            )
        draws = self._draws_given(residual_noise, len(targets))
        if draws is None:
            draws = self.base.draws(len(targets), generator, self.device)
        draws = {name: float(residual_scale) * x.to(self.device) for name, x in draws.items()}
        self._check_guidance(guidance_scale, targets, compose)
        options: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": float(guidance_scale),
            "generator": generator,
            "compose": compose,
        }
        return self._images(noise, targets, values, output_type, batch_size, draws, **options)

    @renamed(images="image")
    @torch.no_grad()
    def reconstruct(
        self,
        image: ImageInput,
        context: Interventions = None,
        output_type: str = "pt",
        batch_size: int | None = None,
    ) -> Images:
        """Encode images under the context they came from and decode the posterior mean. See `edit`."""  # noqa: E501
        return self.edit(
            image, context, context=context, output_type=output_type, batch_size=batch_size
        )

    @renamed(images="image")
    @torch.no_grad()
    def edit(
        self,
        image: ImageInput,
        interventions: Interventions,
        context: Interventions = None,
        output_type: str = "pt",
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        reference_context: Interventions = None,
        compose: str = "head",
    ) -> Images:
        """Counterfactual: abduct, act, predict. The exogenous noise of an image is kept (that of
        its residual latents too, where the base has them; of a denoiser the noise that leads to
        the image), the targets are replaced.

        Args:
            image: PIL image(s) or name(s) of image files, uint8 array (N, H, W, C) or float tensor
                (N, C, H, W) in [0, 1], of the base's own size; clips as lists of PIL images, files,
                arrays (N, T, H, W, C) or tensors (N, C, T, H, W).
            interventions: the interventions to apply, in any form of `hf_intervene.contexts`,
                chosen values among them.
            context: the context that the images came from: observational unless said otherwise.
            output_type: see `sample`.
            batch_size: images processed at once; `None`: `images_at_once`.
            num_inference_steps: of a denoiser, each way.
            guidance_scale: see `sample`; the model's own is of samples only.
            reference_context, compose: see `sample`.
        """
        check_options(None, 1, batch_size, output_type, guidance_scale=guidance_scale)
        pixel_values = self.preprocess(image)
        before = self.targets(context, len(pixel_values))
        after = self._chosen(interventions, len(pixel_values), reference_context, batch_size)
        self._check_guidance(guidance_scale, after[0], compose)  # before the long part
        noise, draws = self._abducted(pixel_values, before, None, batch_size, num_inference_steps)
        options: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": float(guidance_scale),
            "along_path": True,
            "compose": compose,
        }
        return self._images(noise, *after, output_type, batch_size, draws, **options)

    @torch.no_grad()
    def predict(
        self,
        noise: torch.Tensor,
        residual: torch.Tensor | None,
        interventions: Interventions,
        output_type: str = "pt",
        batch_size: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        reference_context: Interventions = None,
        compose: str = "head",
    ) -> Images:
        """The last step of `edit`: images of what `abduct` returned, under other interventions.
        Arguments as there.
        """
        check_options(None, 1, batch_size, output_type, guidance_scale=guidance_scale)
        noise = check_noise("noise", noise, self.noise_shape)
        draws = self._draws_given(residual, len(noise), "residual")
        after = self._chosen(interventions, len(noise), reference_context, batch_size)
        self._check_guidance(guidance_scale, after[0], compose)
        options: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": float(guidance_scale),
            "along_path": True,
            "compose": compose,
        }
        return self._images(noise, *after, output_type, batch_size, draws or {}, **options)

    def _check_guidance(self, guidance_scale: float, targets: torch.Tensor, compose: str) -> None:
        check_composition(compose)
        self.base.check_guidance(guidance_scale, compose)
        if guidance_scale != 1.0 and not bool((targets != 0).any()):
            raise ValueError(
                "guidance_scale leads away from the observational context, but nothing is"
                " intervened on: leave it at 1."
            )

    def _draws_given(
        self, noise: Any, num_images: int, name: str = "residual_noise"
    ) -> dict[str, torch.Tensor] | None:
        """What the user gave as the base's noise beside z, checked; `None`: nothing, or the base
        has none. `name`: what the argument is called."""
        shape = self.base.noise_shapes.get("residual_noise")
        if shape is None or (noise is None and name == "residual_noise"):
            return None
        return {"residual_noise": check_noise(name, noise, shape, num_images)}

    @torch.no_grad()
    def abduct(
        self,
        pixel_values: ImageInput,
        targets: Interventions,
        generator: torch.Generator | None = None,
        batch_size: int | None = None,
        num_inference_steps: int = 50,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The noise of images, float32: z, (B, *noise_shape), and the base's noise beside it (that
        of residual latents or of denoising), or `None` for a base without.

        Args:
            pixel_values: images, (B, C, H, W), or in any form that `edit` takes.
            targets: of the context they came from, (B, D), or in any form of
                `hf_intervene.contexts`.
            generator: draws from the posteriors; `None`: their means. Only draws are N(0, I) under
                the model.
            batch_size: images processed at once; `None`: `images_at_once`.
            num_inference_steps: of a denoiser.

        Raises:
            TypeError, ValueError: one sentence: an argument of another type, shape or value.
        """
        x = self.preprocess(pixel_values)
        check_batch_size(batch_size)
        check_generator(generator, len(x))
        s = self.targets(targets, len(x))
        noise, draws = self._abducted(x, s, generator, batch_size, num_inference_steps)
        return noise, draws.get("residual_noise")

    def _abducted(
        self,
        pixel_values: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator | None,
        batch_size: int | None,
        num_inference_steps: int,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`abduct`, with the base's noise by name."""
        size = batch_size or self.images_at_once
        noise, inverted = [], []
        for x, s in zip(pixel_values.split(size), targets.split(size)):
            draws = None
            if generator is not None:  # drawn before those of z
                draws = self.base.draws(len(x), generator, x.device)
            encoded = self.base.encode(x)
            mean, logvar = self._posterior_of(encoded.features, s)  # (b, *draw_shape)
            y = mean.float()
            if generator is not None:
                shape = (len(x), *self.draw_shape)
                drawn = randn_tensor(shape, generator, x.device, torch.float32)
                y = y + (0.5 * logvar.float()).exp() * drawn
            z = self._noise_of(y, s)  # (b, *noise_shape)
            steps = {"num_inference_steps": num_inference_steps}
            noise.append(z)
            inverted.append(self.base.invert(encoded, self.embed(z, s), draws, **steps))
        together = {name: torch.cat([part[name] for part in inverted]) for name in inverted[0]}
        return torch.cat(noise), together

    def targets(self, interventions: Interventions, num_images: int | None = None) -> torch.Tensor:
        """Targets (num_images, D) on the model's device of any form of `hf_intervene.contexts`."""
        return parse_interventions(
            interventions, self.concepts, num_images, self.config.free_blocks
        ).to(self.device)

    def _chosen(
        self,
        interventions: Interventions,
        num_images: int | None,
        reference_context: Interventions,
        batch_size: int | None,
    ) -> tuple[torch.Tensor, Values | None]:
        """Targets (num_images, D) and the chosen values of interventions."""
        targets, choices = parse_choices(
            interventions, self.concepts, num_images, self.config.free_blocks
        )
        return targets.to(self.device), self._values(
            choices, len(targets), reference_context, batch_size
        )

    def _values(
        self,
        choices: Sequence[dict[str, Value]],
        num_images: int,
        reference_context: Interventions,
        batch_size: int | None,
    ) -> Values | None:
        """The chosen values of samples; reference images are abducted under `reference_context`,
        one for all or for each sample.

        Raises:
            ValueError: one sentence: no head or a pooled one, a reference context without a
                reference, an image of another size.
        """
        if choices and self.config.ablation is not None:
            raise ValueError(
                f"a model with ablation={self.config.ablation!r} has no values of concepts to"
                " choose."
            )
        if reference_context is not None and all(
            isinstance(v, Quantile) for choice in choices for v in choice.values()
        ):
            raise ValueError(
                "reference_context is the context of reference images, but none is given: leave it"
                " out."
            )
        if not choices or self.head is None:
            return None
        head = self.head
        contexts = self.targets(reference_context)  # (1 or B, D)
        if len(contexts) == 1:
            contexts = contexts.expand(len(choices), -1)
        else:
            contexts = self.targets(contexts, num_images)
            choices = [*choices] * num_images if len(choices) == 1 else choices

        def encode(rows: list[int], names: list[str], images: list[Any]) -> torch.Tensor:
            x = torch.cat([self._reference(name, image) for name, image in zip(names, images)])
            targets, size = contexts[rows], batch_size or self.images_at_once
            concepts = []  # each (b, D, concept_width)
            for batch, s in zip(x.split(size), targets.split(size)):
                mean, _ = self._posterior_of(self.base.encode(batch).features, s)
                concepts.append(head(self._noise_of(mean, s), s).concepts.float())
            return torch.cat(concepts)

        return head_values(head, choices, num_images, encode)

    def _reference(self, name: str, image: Any) -> torch.Tensor:
        """A reference image as (1, C, H, W)."""
        if getattr(image, "ndim", 0) == 2:  # grey, without a channel
            image = image[None] if isinstance(image, torch.Tensor) else image[..., None]
        try:
            return self.preprocess(image[None] if hasattr(image, "ndim") else image)
        except ValueError as error:
            raise ValueError(f"the reference image of {name!r}: {error}") from error

    def preprocess(self, images: ImageInput) -> torch.Tensor:
        """Check images and bring them to a float tensor (N, C, H, W) in [0, 1] on the model's
        device.

        Raises:
            TypeError, ValueError: one sentence.
        """
        return check_pixels(images, self.base.image_shape, self.image_processor, self.device)

    def _images(
        self,
        noise: torch.Tensor,
        targets: torch.Tensor,
        values: Values | None,
        output_type: str,
        batch_size: int | None,
        draws: dict[str, torch.Tensor],
        **options: Any,
    ) -> Images:
        size = batch_size or self.images_at_once
        made = []
        for rows in torch.arange(len(noise)).split(size):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            own = {name: x[part].to(self.device) for name, x in draws.items()}
            chosen = None if values is None else Values(*(x[part] for x in values))
            z = noise[part].to(self.device)
            made.append(check_images(self.decode(z, targets[part], own, chosen, **options)))
        images = torch.cat(made)  # (N, C, H, W), or (N, C, T, H, W)
        if output_type == "pt":
            return images
        if images.ndim == 5:
            return self.image_processor.postprocess_video(images, output_type)
        return self.image_processor.postprocess(images, output_type)

    @torch.no_grad()
    def reestimate_batch_norm(
        self, contexts: Sequence[Interventions], num_batches: int = 50, batch_size: int = 256
    ) -> None:
        """Gather the running statistics of batch-norm layers anew on samples from the prior, the
        given contexts mixed.

        Training gathers them on posterior samples, which fit no prior sample: the same weights
        scored 0.343 with the former and 0.107 with batch statistics (METHOD section 7). Layers of
        the encoder are left alone. No effect without batch norm."""
        encoder = set(self.base.encoder_modules())
        layers = [
            m
            for m in cast(nn.Module, self).modules()
            if isinstance(m, _BatchNorm) and m not in encoder
        ]
        if not layers:
            return
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None  # cumulative average
            layer.train()
        generator = torch.Generator().manual_seed(0)
        targets = torch.cat([self.targets(context) for context in contexts])
        for _ in range(num_batches):
            noise = torch.randn(batch_size, *self.noise_shape, generator=generator)
            rows = torch.randint(len(targets), (batch_size,), generator=generator)
            self.decode(noise.to(self.device), targets[rows.to(self.device)])
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
            layer.eval()


__all__ = ["GenerationMixin", "ImageInput", "Images"]
