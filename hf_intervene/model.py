"""`InterventionModel`: a pretrained base with an intervention head (METHOD sections 1 to 3; arXiv:2507.04754).

    images --base.encode--> features --head.posterior--> z --head(z, s)--> embedding --base.decode--> images

Sampling enters at z; editing enters at the image and leaves at the image.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from . import hub
from .bases import Base, wrap_base
from .bases.base import base_family, base_folder, load_model_config, load_part, model_class_named, weight_hash
from .bases.lora import has_lora, load_lora, merged, save_lora
from .configuration_intervention import InterventionConfig
from .contexts import Interventions, parse_interventions
from .modeling_intervention import InterventionHead, gaussian_kl
from .push import push_to_hub


BASE_FOLDER, ADAPTER_FOLDER, LORA_FOLDER = "base", "adapter", "lora"

ImageInput = Image.Image | np.ndarray | torch.Tensor | Sequence[Image.Image]


@dataclass
class InterventionModelOutput(ModelOutput):
    """
    Args:
        loss: scalar, the objective: mean over the batch of reconstruction_loss + beta * kl.
        reconstruction_loss: -log p(x | z, s) of each image, nats, shape (B,).
        kl: KL(q(z | x, s) || N(0, I)) of each image, nats, shape (B,). reconstruction_loss + kl is the negative ELBO.
        posterior_mean: mean of q(z | x, s), shape (B, *noise_shape).
        posterior_logvar: log-variance of q(z | x, s), shape (B, *noise_shape).
        reconstruction: mean image of p(x | z, s), shape (B, C, H, W), in [0, 1]; only with `return_reconstruction=True`.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    posterior_mean: torch.Tensor | None = None
    posterior_logvar: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None


class InterventionModel(PreTrainedModel):
    r"""
    A base model under an intervention head.

    Args:
        config: configuration of the head; `config.ablation` may leave the head out (`"base"`, `"base-pooled"`) or make it ignore the
            context (`"head-pooled"`).
        base: a diffusers model of a registered class, or a `Base`.
        head: the head to use; `None` makes a new one.

    Example:

    ```python
    model = InterventionModel.build(LightVAE(sample_size=64), concepts=["quad1", "size"])
    loss = model(pixel_values, targets).loss
    images = model.sample(["quad1", "size"], num_samples=8, generator=torch.Generator().manual_seed(0))
    ```
    """

    config: InterventionConfig
    config_class = InterventionConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: InterventionConfig, base: ModelMixin | Base, head: InterventionHead | None = None):
        super().__init__(config)
        self.base = wrap_base(base)
        if config.ablation in ("base", "base-pooled"):
            self.head = None
            self.noise_shape = tuple(self.base.embedding_shape)
        else:
            for name in ("feature_width", "embedding_shape"):
                expected, found = _plain(getattr(self.base, name)), _plain(getattr(config, name))
                if expected != found:
                    raise ValueError(
                        f"the head was made for {name} {found}, but this {type(self.base.model).__name__} has {expected}: "
                        "use the base that the head was trained on, or make a new head."
                    )
            self.head = InterventionHead(config) if head is None else head
            self.noise_shape = (config.num_blocks, config.noise_width)
            self.base.freeze_unused()
        self.image_processor = VaeImageProcessor(do_resize=False, do_normalize=False, vae_scale_factor=1)

    def _init_weights(self, module):
        """Nothing: head and base arrive initialised."""

    @classmethod
    def build(
        cls,
        base: ModelMixin | Base,
        concepts: Sequence[str],
        ablation: str | None = None,
        base_subfolder: str | None = None,
        base_revision: str | None = None,
        **head_options,
    ) -> "InterventionModel":
        """Add a new head to a base.

        Args:
            base: a diffusers model of a registered class.
            concepts: names of the concepts.
            ablation: see `InterventionConfig`.
            base_subfolder, base_revision: where the base was loaded from within its repository; diffusers does not keep them.
            **head_options: other fields of `InterventionConfig`; `feature_width` and `embedding_shape` come from the base.
        """
        base = wrap_base(base)
        config = InterventionConfig(
            concepts=list(concepts),
            ablation=ablation,
            feature_width=base.feature_width,
            embedding_shape=list(base.embedding_shape),
            base_reference=_reference(base.model, base_subfolder, base_revision),
            **head_options,
        )
        return cls(config, base)

    @property
    def concepts(self) -> tuple[str, ...]:
        return tuple(self.config.concepts)

    @property
    def num_blocks(self) -> int:
        """D: concept blocks and free blocks."""
        return self.config.num_blocks

    # The objective

    def posterior(self, pixel_values: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of q(z | x, s), each (B, *noise_shape), of images (B, C, H, W) under targets (B, D)."""
        features = self.base.encode(pixel_values)
        if self.head is None:
            return self.base.posterior(features)
        return self.head.posterior(features, self._seen(targets))

    def decode(self, z: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Parameters of p(x | z, s), (B, C, H, W), of noise (B, *noise_shape) under targets (B, D)."""
        embedding = z if self.head is None else self.head(z, self._seen(targets)).embedding
        return self.base.decode(embedding)

    def _seen(self, targets: torch.Tensor) -> torch.Tensor:
        """The targets the head sees: none in the ablation that pools the contexts."""
        return torch.zeros_like(targets) if self.config.ablation == "head-pooled" else targets

    def forward(
        self,
        pixel_values: torch.Tensor,
        targets: torch.Tensor,
        beta: float = 1.0,
        noise: torch.Tensor | None = None,
        return_reconstruction: bool = False,
        return_dict: bool | None = None,
    ) -> InterventionModelOutput | tuple:
        """The negative ELBO, E_q[-log p(x | z, s)] + beta KL(q(z | x, s) || N(0, I)) (METHOD section 2), with one posterior sample.

        Args:
            pixel_values: images, (B, C, H, W), in [0, 1].
            targets: (B, D), entries in [0, 1].
            beta: weight of the KL.
            noise: standard normal draws for the posterior sample, (B, *noise_shape); `None` draws them.
            return_reconstruction: whether to return the reconstructed images.
        """
        if tuple(pixel_values.shape[1:]) != self.base.image_shape:
            raise ValueError(
                f"pixel_values must have shape (batch, {', '.join(map(str, self.base.image_shape))}), "
                f"not {tuple(pixel_values.shape)}."
            )
        mean, logvar = self.posterior(pixel_values, targets)  # (B, *noise_shape)
        if noise is None:
            noise = torch.randn_like(mean)
        z = mean + (0.5 * logvar).exp() * noise
        decoded = self.decode(z, targets)  # (B, C, H, W)
        reconstruction_loss = self.base.reconstruction_loss(decoded, pixel_values)  # (B,)
        kl = gaussian_kl(mean, logvar)  # (B,)
        output = InterventionModelOutput(
            loss=(reconstruction_loss + beta * kl).mean(),
            reconstruction_loss=reconstruction_loss,
            kl=kl,
            posterior_mean=mean,
            posterior_logvar=logvar,
            reconstruction=self.base.to_pixels(decoded) if return_reconstruction else None,
        )
        return output if return_dict is not False else output.to_tuple()

    # What a user asks for

    @torch.no_grad()
    def sample(
        self,
        interventions: Interventions = None,
        num_samples: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pt",
        batch_size: int = 256,
    ) -> torch.Tensor | np.ndarray | list[Image.Image]:
        """Sample images from p(x | s), z from the prior.

        Args:
            interventions: what to intervene on, in any form of `hf_intervene.contexts`; several concepts at once compose.
            num_samples: number of images; `None`: one for each context given.
            generator: makes the draw reproducible.
            noise: exogenous noise to use, (num_samples, *noise_shape), to compare interventions under the same noise.
            output_type: `"pt"` (float tensor (N, C, H, W) in [0, 1]), `"np"` (N, H, W, C) or `"pil"`.
            batch_size: images decoded at once.
        """
        if noise is not None:
            if tuple(noise.shape[1:]) != self.noise_shape:
                raise ValueError(
                    f"noise must have shape (num_samples, {', '.join(map(str, self.noise_shape))}), not {tuple(noise.shape)}."
                )
            num_samples = noise.shape[0] if num_samples is None else num_samples
        targets = self.targets(interventions, num_samples)
        if noise is None:
            noise = randn_tensor((len(targets), *self.noise_shape), generator=generator, device=self.device, dtype=torch.float32)
        elif len(noise) != len(targets):
            raise ValueError(f"noise has {len(noise)} rows for {len(targets)} samples: give one row per sample.")
        return self._decoded_images(noise, targets, output_type, batch_size)

    @torch.no_grad()
    def reconstruct(
        self, images: ImageInput, context: Interventions = None, output_type: str = "pt", batch_size: int = 256
    ) -> torch.Tensor | np.ndarray | list[Image.Image]:
        """Encode images under the context they came from and decode the posterior mean. See `edit`."""
        return self.edit(images, context, context=context, output_type=output_type, batch_size=batch_size)

    @torch.no_grad()
    def edit(
        self,
        images: ImageInput,
        interventions: Interventions,
        context: Interventions = None,
        output_type: str = "pt",
        batch_size: int = 256,
    ) -> torch.Tensor | np.ndarray | list[Image.Image]:
        """Counterfactual: abduct, act, predict. The exogenous noise of an image is kept, the targets are replaced.

        Args:
            images: PIL image(s), uint8 array (N, H, W, C) or float tensor (N, C, H, W) in [0, 1], of the base's own size.
            interventions: the interventions to apply.
            context: the context that the images came from: observational unless said otherwise.
            output_type: see `sample`.
            batch_size: images processed at once.
        """
        pixel_values = self.preprocess(images)
        before = self.targets(context, len(pixel_values))
        after = self.targets(interventions, len(pixel_values))
        noise = torch.cat([self.posterior(x, s)[0] for x, s in zip(pixel_values.split(batch_size), before.split(batch_size))])
        return self._decoded_images(noise.float(), after, output_type, batch_size)

    def targets(self, interventions: Interventions, num_samples: int | None = None) -> torch.Tensor:
        """Targets (num_samples, D) on the model's device of any form of `hf_intervene.contexts`."""
        return parse_interventions(interventions, self.concepts, num_samples, self.config.free_blocks).to(self.device)

    def preprocess(self, images: ImageInput) -> torch.Tensor:
        """Check images and bring them to a float tensor (N, C, H, W) in [0, 1] on the model's device."""
        if isinstance(images, np.ndarray) and images.dtype == np.uint8:
            images = images.astype(np.float32) / 255
        channels, height, width = self.base.image_shape
        if isinstance(images, Image.Image):
            images = [images]
        if isinstance(images, (list, tuple)) and all(isinstance(image, Image.Image) for image in images):
            images = [image.convert("L" if channels == 1 else "RGB") for image in images]
        pixel_values = self.image_processor.preprocess(images).to(self.device, torch.float32)
        if tuple(pixel_values.shape[1:]) != (channels, height, width):
            found = "x".join(map(str, pixel_values.shape[1:]))
            raise ValueError(
                f"images of {channels}x{height}x{width} (channels, height, width) were expected, not {found}: resize them first."
            )
        if not bool(((pixel_values >= 0) & (pixel_values <= 1)).all()):  # NaN fails the comparison
            raise ValueError("pixel values must lie in [0, 1]; some do not, or are NaN.")
        return pixel_values

    def _decoded_images(self, noise, targets, output_type, batch_size):
        noise = noise.to(self.device, self.dtype)
        images = torch.cat(
            [
                self.base.to_pixels(self.decode(z, s.to(self.dtype)))
                for z, s in zip(noise.split(batch_size), targets.split(batch_size))
            ]
        )
        return self.image_processor.postprocess(images, output_type=output_type, do_denormalize=[False] * len(images))

    @torch.no_grad()
    def reestimate_batch_norm(self, contexts: Sequence[Interventions], num_batches: int = 50, batch_size: int = 256):
        """Gather the running statistics of batch-norm layers anew on samples from the prior, the given contexts mixed.

        Training gathers them on posterior samples, which fit no prior sample: the same weights scored 0.343 with the former and 0.107
        with batch statistics (METHOD section 7). Layers of the encoder are left alone. No effect without batch norm.
        """
        encoded = set(self.base.encoder_modules())
        layers = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m not in encoded]
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
            noise = torch.randn(batch_size, *self.noise_shape, generator=generator).to(self.device)
            rows = torch.randint(len(targets), (batch_size,), generator=generator).to(self.device)
            self.decode(noise, targets[rows])
        for layer, momentum in zip(layers, momenta):
            layer.momentum = momentum
            layer.eval()

    # Saving and loading

    push_to_hub = push_to_hub

    def save_pretrained(self, save_directory: str | os.PathLike, save_base: bool | None = None, **kwargs) -> None:
        """Save what was trained: the head as a transformers model, adapter and base as diffusers models.

        save_directory/config.json, model.safetensors    the head; `InterventionHead.from_pretrained` reads it alone
        save_directory/adapter/                          the base family's adapter, where it has one
        save_directory/lora/                             LoRA layers on the base, if it has any; plain PEFT reads them alone
        save_directory/base/                             the base; plain diffusers reads it alone

        Args:
            save_directory: the folder.
            save_base: whether to save the base too; `None`: unless it still is the pretrained one it was loaded as. Then the
                configuration's `base_reference` says where to load it from, and by which hash to know it.
            **kwargs: of the head's `save_pretrained`.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained(push_to_hub=True) would push half of the model: use push_to_hub().")
        if os.path.isfile(save_directory):
            raise NotADirectoryError(f"cannot save to {save_directory}: it is a file; give a folder.")
        reference = self.config.base_reference
        if save_base is None:
            save_base = reference is None or weight_hash(self.base.model) != reference["sha256"]
        if not save_base and os.path.isdir(os.path.join(save_directory, BASE_FOLDER)):
            raise FileExistsError(
                f"{save_directory} holds the base of another model, which would be taken for this one's: empty it."
            )
        if self.head is None:
            self.config.save_pretrained(save_directory, **kwargs)
        else:
            self.head.save_pretrained(save_directory, **kwargs)
        if self.base.adapter is not None:
            self.base.adapter.save_pretrained(os.path.join(save_directory, ADAPTER_FOLDER))
        if save_base:  # on its own, without LoRA layers: merged into the weights
            merged(self.base.model).save_pretrained(os.path.join(save_directory, BASE_FOLDER))
        elif has_lora(self.base.model):
            save_lora(self.base.model, os.path.join(save_directory, LORA_FOLDER))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, base: ModelMixin | Base | None = None, **kwargs
    ) -> "InterventionModel":
        """Load a model saved by `save_pretrained`, from a folder or the Hub; a base that was not saved with it, from its own place.

        Args:
            pretrained_model_name_or_path: folder or repository.
            base: the base to use instead.
            **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as elsewhere.

        Raises:
            OSError, ValueError: one sentence: not a saved model, no such repository or no access to it, truncated or pickled weights,
                weights that do not fit the configuration, a base that is not the one the head was trained on.
        """
        name, options = pretrained_model_name_or_path, hub.pop_options(kwargs)
        path = hub.folder(name, **options)
        config = InterventionConfig.from_pretrained(path)
        saved_base = load_model_config(path / BASE_FOLDER)
        if base is None:
            model = _load_base(name, path, config, saved_base, options, **kwargs)
        else:
            model = base.model if isinstance(base, Base) else base
            if saved_base is None:
                _check_reference(model, config)
        if config.lora_rank and saved_base is None:
            load_lora(model, path / LORA_FOLDER, f"the LoRA of {name}")
        family = type(base) if isinstance(base, Base) else base_family(model)
        if family.adapter_class is not None:
            adapter = load_part(family.adapter_class, path / ADAPTER_FOLDER, f"the adapter of {name}", **kwargs)
            base = family(model, adapter=adapter)
        elif not isinstance(base, Base):
            base = family(model)
        head = None
        if config.ablation not in ("base", "base-pooled"):
            head = InterventionHead.from_pretrained(path, config=config, **kwargs)
        return cls(config, base, head).eval()


def _reference(model: ModelMixin, subfolder: str | None, revision: str | None) -> dict[str, str | None] | None:
    """Where a pretrained model came from, and the hash of its weights; `None` for one that was not loaded."""
    name = model.config.get("_name_or_path")
    if not name:
        return None
    found = {"class_name": type(model).__name__} | hub.origin(str(name), revision, subfolder)
    return found | {"sha256": weight_hash(model)}


def _check_reference(model: ModelMixin, config: InterventionConfig) -> None:
    reference = config.base_reference
    if reference is not None and weight_hash(model) != reference["sha256"]:
        raise ValueError(
            f"this {type(model).__name__} is not the base that the head was trained on: its weights differ from those of "
            f"{reference['class_name']} {reference['name_or_path']} at training time. Load that one, in the precision it had then."
        )


def _load_base(
    name: str | os.PathLike, path: Path, config: InterventionConfig, saved_base: dict | None, options: dict, **kwargs
) -> ModelMixin:
    """The base saved with a model, whose configuration is `saved_base`, or else the one that its head was trained on."""
    if saved_base is not None:
        return load_part(model_class_named(saved_base["_class_name"]), path / BASE_FOLDER, f"the base of {name}", **kwargs)
    reference = config.base_reference
    if reference is None:
        raise OSError(f"{name} holds no base model (no {BASE_FOLDER}/config.json): pass base= with the one it was trained on.")
    source, model_class = reference["name_or_path"], model_class_named(reference["class_name"])
    try:
        path = base_folder(source, reference["subfolder"], **options | {"revision": reference["revision"]})
        model = load_part(model_class, path, f"the base {source}", **kwargs)
    except OSError as error:
        raise OSError(
            f"the base that {name} was trained on, {source}, cannot be loaded ({' '.join(str(error).split())}): pass base= with a copy of it."
        ) from error
    _check_reference(model, config)
    return model


def _plain(value):
    return list(value) if isinstance(value, (list, tuple)) else value
