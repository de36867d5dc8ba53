"""`InterventionPipeline`: sample and edit with a trained head and its base, in the form diffusers
users know.

The file is longer than most: a third of it describes arguments, and its methods belong together.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image, ImageOps
from torch import nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from . import hub
from .bases import DiffusionAdapter, LatentAdapter, LightVAE, PipelineBase
from .bases.limits import check_finite
from .bases.loading import check_part, check_processor, check_transformers, load_scheduler
from .bases.lora import merged
from .bases.registry import base_family, check_compiled, model_class_named
from .contexts import Interventions
from .image_files import flat_image, upright
from .logging import get_logger
from .model import InterventionModel
from .modeling_intervention import InterventionHead
from .origins import forget_paths
from .pretrained import not_bundled
from .push import CardPushMixin
from .sampling_arguments import ImageInput, renamed


logger = get_logger(__name__)

_KINDS = {
    "head": InterventionHead,
    "adapter": ModelMixin,
    "scheduler": SchedulerMixin,
    "image_encoder": PreTrainedModel,
    "image_processor": BaseImageProcessor,
}


class InterventionPipeline(CardPushMixin, DiffusionPipeline):
    r"""
    Sample images under interventions, and edit images by them.

    Args:
        base: the pretrained model under the head.
        head: the intervention head.
        adapter: the network between them, for base families that have one.
        scheduler, vae, image_encoder, image_processor, base_2: of a denoiser, see `DiffusionBase`
            and `PipelineBase`; as in any pipeline, another scheduler may take the place of the first: `pipe.scheduler =
            DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)`.

    Raises:
        TypeError, ValueError: one sentence: the base is of a class that is not registered, or the
            three do not fit together.

    Example:

    ```python
    pipe = InterventionPipeline.from_pretrained("my-pipeline")
    images = pipe(interventions=["quad1", "size"], num_images=8, generator=torch.Generator().manual_seed(0)).images
    edited = pipe.edit(images[0], {"quad1": 0.5}).images
    ```
    """  # noqa: E501

    base: ModelMixin
    head: InterventionHead
    adapter: ModelMixin | None

    _optional_components = ["adapter", *PipelineBase.companion_names]
    # Head and adapter stay on the device: they are small, and not only their `forward` is called.
    _exclude_from_cpu_offload = ["head", "adapter"]
    model_cpu_offload_seq = "image_encoder->base->base_2->vae"

    def __init__(
        self,
        base: ModelMixin,
        head: InterventionHead,
        adapter: ModelMixin | None = None,
        scheduler: SchedulerMixin | None = None,
        vae: ModelMixin | None = None,
        image_encoder: PreTrainedModel | None = None,
        image_processor: BaseImageProcessor | None = None,
        base_2: ModelMixin | None = None,
    ):
        super().__init__()
        companions = {
            "scheduler": scheduler,
            "vae": vae,
            "image_encoder": image_encoder,
            "image_processor": image_processor,
            "base_2": base_2,
        }
        made = _model(base, head, adapter, companions)  # raises unless they fit
        self.register_modules(base=base, head=head, adapter=adapter, **companions)
        self._made = made, self._parts()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        subfolder: str | None = None,
        **kwargs: Any,
    ) -> "InterventionPipeline":
        """As in diffusers, from a folder or the Hub; from one commit, and from safetensors only.

        Args:
            pretrained_model_name_or_path: folder or repository.
            subfolder: of it, where the pipeline is.
            **kwargs: as in diffusers.

        Raises:
            OSError, ValueError: one sentence: not an intervention pipeline, no such repository or
                no access to it, missing weights.
        """
        name = pretrained_model_name_or_path
        path = hub.subfolder(
            hub.folder(not_bundled(name), **hub.pop_options(kwargs)), subfolder, name
        )
        index = path / "model_index.json"
        saved = hub.read_json(index) if index.exists() else {}
        if saved.get("_class_name") not in (cls.__name__, "InterventionPipeline"):
            raise ValueError(
                f"{name} is not an intervention pipeline: it has no model_index.json of an"
                f" {cls.__name__} (a model is loaded with InterventionModel.from_pretrained)."
            )
        for part in ("head", "base", *cls._optional_components):
            if part not in kwargs and (
                part in ("head", "base") or saved.get(part, [None, None]) != [None, None]
            ):
                _check_part(
                    part,
                    saved.get(part),
                    path / part,
                    f"the {part} of {name}",
                    kwargs.get("variant"),
                )
        logger.info("loading the pipeline %s from %s", name, path)
        pipe = super().from_pretrained(
            path, **kwargs | {"use_safetensors": True, "trust_remote_code": False}
        )
        for part, value in pipe.components.items():
            if isinstance(value, nn.Module) and part not in kwargs:
                check_finite(value, f"the {part} of {name}")
        pipe._loaded_from = path  # its card may have been edited
        return pipe

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in diffusers, with the head's code: beside its weights, and at the top, where
        transformers looks for it in a repository.

        Raises:
            ValueError: one sentence: pickle files are wanted, which would not be loaded again.
        """
        if kwargs.get("safe_serialization", True) is False:
            raise ValueError(hub.NO_PICKLES)
        os.makedirs(save_directory, exist_ok=True)
        custom_object_save(self.head, save_directory)
        super().save_pretrained(save_directory, **kwargs)
        forget_paths(save_directory, ("", *self.components))

    @classmethod
    def from_model(cls, model: InterventionModel) -> "InterventionPipeline":
        """The pipeline of a model; the weights are shared, not copied, but for a base with LoRA
        layers: they are merged into a copy.

        Raises:
            TypeError: it is not a model.
            ValueError: the model is an ablation without a head.
        """
        if not isinstance(model, InterventionModel):
            raise TypeError(
                f"from_model takes an InterventionModel, not a {type(model).__name__}: a saved one"
                " is read by from_pretrained."
            )
        if model.head is None:
            raise ValueError(
                f"a model with ablation={model.config.ablation!r} has no head to intervene with."
            )
        return cls(
            base=merged(model.base.model),
            head=model.head,
            adapter=model.base.adapter,
            **model.base.companions(),
        )

    @property
    def model(self) -> InterventionModel:
        """The pipeline's base and head as an `InterventionModel`; the weights are shared."""
        made, parts = self._made
        if any(part is not before for part, before in zip(self._parts(), parts)):  # replaced
            made.base.release()
            companions = {name: getattr(self, name) for name in PipelineBase.companion_names}
            made = _model(self.base, self.head, self.adapter, companions)
            self._made = made, self._parts()
        offloaded = any(hasattr(part, "_hf_hook") for part in self.components.values())
        offloaded = offloaded or self._maybe_raise_error_if_group_offload_active(raise_error=False)
        made.execution_device = self._execution_device if offloaded else None
        return made.eval()

    def _parts(self) -> tuple[Any, ...]:
        """What `model` is made of."""
        return tuple(getattr(self, name) for name in ("base", "head", *self._optional_components))

    @classmethod
    def from_pipe(
        cls, pipeline: "InterventionPipeline", torch_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> "InterventionPipeline":
        """A new pipeline of the parts of another one; they are shared, not copied.

        Args:
            pipeline: the other pipeline.
            torch_dtype: precision to cast the shared parts to; `None`: as they are.
            **kwargs: parts to use instead, such as `scheduler`.

        Raises:
            TypeError: one sentence: it is a pipeline of another kind.
        """
        if not isinstance(pipeline, InterventionPipeline):
            raise TypeError(
                f"from_pipe needs an InterventionPipeline, not a {type(pipeline).__name__}:"
                " attach() puts a head on one."
            )
        made = cls(**pipeline.components | kwargs)
        return made if torch_dtype is None else made.to(torch_dtype)

    def enable_model_cpu_offload(
        self, gpu_id: int | None = None, device: torch.device | str | None = None
    ) -> None:
        """As in diffusers; head and adapter stay on the device, and so does a base that is no
        denoiser. Not only their `forward` is called, which is what brings an offloaded model
        back."""
        resident = self._made[0].base.resident
        parts = type(self).model_cpu_offload_seq.split("->")
        self._exclude_from_cpu_offload = [*type(self)._exclude_from_cpu_offload, *resident]
        self.model_cpu_offload_seq = "->".join(part for part in parts if part not in resident)
        super().enable_model_cpu_offload(gpu_id, device)

    def enable_group_offload(
        self, *args: Any, exclude_modules: str | list[str] | None = None, **kwargs: Any
    ) -> None:
        """As in diffusers; head and adapter stay on the device."""
        others = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        kept = [*type(self)._exclude_from_cpu_offload, *self._made[0].base.resident]
        super().enable_group_offload(*args, exclude_modules=[*others, *kept], **kwargs)

    @property
    def concepts(self) -> tuple[str, ...]:
        """Names of the d concepts, in block order."""
        return tuple(self.head.config.concepts)

    @torch.no_grad()
    def __call__(
        self,
        interventions: Interventions = None,
        num_images: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        output_type: str = "pil",
        residual_scale: float = 1.0,
        residual_noise: torch.Tensor | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        batch_size: int | None = None,
        return_dict: bool = True,
        reference_context: Interventions = None,
        compose: str = "head",
    ) -> ImagePipelineOutput:
        """Sample images; see `InterventionModel.sample`.

        Args:
            interventions: what to intervene on: `"quad1"`, `["quad1", "size"]`, `{"size": 0.5}`,
                `"obs"`, or a list of those, one per image; at chosen values `"size@0.9"` or
                `{"size": Quantile(0.9), "quad2": reference_image}`.
            num_images: number of images; `None`: one for each context given.
            generator: makes the draw reproducible.
            noise: exogenous noise to use, (num_images, D, noise_width).
            output_type: `"pil"`, `"np"` or `"pt"`.
            residual_scale: standard deviation of the residual noise, for a base with residual
                latents.
            residual_noise: residual noise, or the noise of denoising, to use, (num_images,
                *shape).
            num_inference_steps: of a denoiser's scheduler.
            guidance_scale: of a denoiser: above 1, further away from what it makes without
                interventions; `None`: the model's own.
            batch_size: images at once; `None`: 256 of up to 64x64 pixels, and fewer of larger ones.
            return_dict: `False` returns a tuple instead of an `ImagePipelineOutput`, whatever the
                annotation says.
            reference_context: the context that reference images came from: observational unless
                said otherwise.
            compose: of a denoiser: `"head"`, or `"scores"`, which adds up what each concept
                changes.
        """
        if num_images is None and batch_size is not None:
            logger.warning(
                "batch_size says how many images are computed at once; num_images says how many"
                " are made."
            )
        images = self.model.sample(
            interventions,
            num_images,
            generator,
            noise,
            output_type,
            batch_size,
            residual_scale,
            residual_noise,
            num_inference_steps,
            guidance_scale,
            reference_context,
            compose,
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @renamed(images="image")
    @torch.no_grad()
    def edit(
        self,
        image: ImageInput | Sequence,
        interventions: Interventions,
        context: Interventions = None,
        output_type: str = "pil",
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        batch_size: int | None = None,
        return_dict: bool = True,
        reference_context: Interventions = None,
        compose: str = "head",
    ) -> ImagePipelineOutput:
        """Edit images: keep their exogenous noise, replace the interventions, chosen values among
        them; see `InterventionModel.edit`.
        """
        edited = self.model.edit(
            image,
            interventions,
            context,
            output_type,
            batch_size,
            num_inference_steps,
            guidance_scale,
            reference_context,
            compose,
        )
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=edited) if return_dict else (edited,)


def load_model(name: str | os.PathLike, **options: Any) -> InterventionModel:
    """The model of a saved pipeline, or a saved model, as training writes it.

    Args:
        name: folder, or repository on the Hub.
        **options: see `hub.folder`.

    Raises:
        OSError, ValueError: one sentence; see the two `from_pretrained`.
    """
    path = hub.folder(name, **options)
    if (path / "model_index.json").exists() or not (path / "config.json").exists():
        return InterventionPipeline.from_pretrained(path).model
    return InterventionModel.from_pretrained(path)


def load_for_use(name: str | os.PathLike) -> InterventionModel:
    """`load_model`, onto a GPU if there is one: for programs, whose users cannot say `.to("cuda")`."""  # noqa: E501
    # transformers' hints of `cuda` are of a function, not of a method
    model: Any = load_model(name)
    return model.cuda() if torch.cuda.is_available() else model


def fit_image(image: Image.Image, model: InterventionModel) -> Image.Image:
    """An image as a model takes it: upright, of 8 bits a channel, on white, cropped around its
    centre and resized.

    Raises:
        ValueError: one sentence: it is damaged, or has more than 8 bits a channel.
    """
    channels, *_, height, width = model.base.image_shape
    return ImageOps.fit(
        flat_image(upright(image), channels), (width, height), Image.Resampling.LANCZOS
    )


def _check_part(part: str, entry: Any, folder: Path, what: str, variant: str | None) -> None:
    """Refuse a saved part of a pipeline that is not what it must be, before diffusers looks for its
    class and loads it.

    Args:
        part: its name.
        entry: its library and its class by model_index.json.
        folder: where it is.
        what: in a message.
        variant: of its weights.

    Raises:
        OSError, ValueError: one sentence.
    """
    named = isinstance(entry, list) and list(map(type, entry)) == [str, str]
    library, name = entry if named else ("", "")
    if named and part in ("base", "vae", "base_2"):
        check_part(model_class_named(name), folder, what, variant)
        return
    # nothing is imported for it
    found: Any = getattr(sys.modules.get(library), name, None)
    if not isinstance(found, type) or not issubclass(found, _KINDS[part]):
        raise ValueError(
            f"{what} cannot be {entry!r}, as model_index.json says: it is corrupt, or made to do"
            " harm."
        )
    if part == "adapter":
        check_part(found, folder, what, variant)
    elif part == "scheduler":
        load_scheduler(folder, what)
    elif part == "image_encoder":
        check_transformers(found, folder, what)
    elif part == "image_processor":
        check_processor(folder)


def _model(
    base: ModelMixin, head: InterventionHead, adapter: ModelMixin | None, companions: dict
) -> InterventionModel:
    family, name = base_family(base, getattr(adapter, "config", None)), type(base).__name__
    if not isinstance(head, InterventionHead):
        check_compiled(head)
        raise TypeError(f"head must be an InterventionHead, not a {type(head).__name__}.")
    if family.adapter_class is None and adapter is not None:
        raise ValueError(f"a head on {name} needs no adapter: leave it out.")
    if family.adapter_class is not None and adapter is None:
        raise ValueError(
            f"a head on {name} needs the adapter that was trained with it: pass adapter=."
        )
    options = {"adapter": adapter} if adapter is not None else {}
    for part, value in companions.items():
        if value is not None and part not in family.companion_names:
            raise ValueError(f"a head on {name} needs no {part}: leave it out.")
        options |= {part: value} if value is not None else {}
    return InterventionModel(head.config, family(base, **options), head)


# diffusers has no registry: DiffusionPipeline.from_pretrained looks a saved pipeline's class up in
# its own module, and those of the parts by these tables; a part of another library it refuses to
# load from the Hub.
diffusers.InterventionPipeline = InterventionPipeline
_PARTS = {
    part.__name__: ["save_pretrained", "from_pretrained"]
    for part in (InterventionHead, DiffusionAdapter, LatentAdapter, LightVAE)
}
LOADABLE_CLASSES["hf_intervene"] = _PARTS
ALL_IMPORTABLE_CLASSES.update(_PARTS)
