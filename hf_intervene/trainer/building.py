"""What a run trains, made from its settings: the images, the model, the objective."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..bases import LightVAE, load_base
from ..bases.lora import add_lora
from ..data import ContextImages, load_contexts
from ..logging import get_logger
from ..model import InterventionModel
from ..objective import Objective
from ..terms import term_names
from .settings import TrainArguments, check_reading
from .simulated import SIMULATED, draw_together


logger = get_logger(__name__)


def load_data(
    arguments: TrainArguments, accelerator: Accelerator | None = None
) -> tuple[ContextImages, ContextImages]:
    """Training and validation images; several processes share the work of drawing or of decoding
    into a cache.
    """
    a = arguments
    several = accelerator is not None and accelerator.num_processes > 1
    if a.data.dataset in SIMULATED:
        simulated = SIMULATED[a.data.dataset](
            a.data.resolution or 0, a.data.channels, a.data.variant, a.data.mnist_digits
        )
        check_reading(a.data.dataset, a.data.reading)
        if a.data.frames is not None:
            raise ValueError(f"{a.data.dataset} has images and no clips: leave frames out.")
        if a.data.concepts is not None and a.data.concepts != list(simulated.concepts):
            raise ValueError(
                f"{a.data.dataset} has the concepts {', '.join(simulated.concepts)}, all of them:"
                " leave concepts out."
            )
        sizes = (
            a.data.images_per_context,
            a.data.validation_images,
            a.data.validation_fraction,
            a.data.data_seed,
        )
        if several:
            train, validation = draw_together(
                simulated, sizes, Path(a.run.output_dir, "drawn"), accelerator
            )
        else:
            train, validation = (
                ContextImages.from_arrays(images, simulated.concepts)
                for images in simulated.training(*sizes)
            )
    else:
        with ExitStack() as turns:
            # One process fills the cache, or one on each machine where they share no disk; the
            # others find it.
            if accelerator is not None and several and a.data.image_cache:
                turns.enter_context(accelerator.main_process_first())
                turns.enter_context(accelerator.local_main_process_first())
            data = load_contexts(a.data.dataset, **a.data.reading, frames=a.data.frames)
            data = ContextImages.from_dataset(
                data,
                a.data.concepts,
                a.data.resolution,
                a.data.channels,
                cache_dir=a.data.image_cache,
                frames=a.data.frames,
            )
        train, validation = data.split(
            a.data.validation_fraction, a.data.data_seed, a.data.split_by
        )
    if a.head.ablation == "base":
        return train.select(["obs"]), validation.select(["obs"])
    return train, validation


def reason_against(arguments: TrainArguments, data: ContextImages) -> str:
    """Why a run with these settings would refuse these images of all parts; empty if it would not.

    Of data that are drawn, a run draws as many images as it needs."""
    try:
        if arguments.data.dataset not in SIMULATED:
            a = arguments.data
            data.checked().split(a.validation_fraction, a.data_seed, a.split_by)
        build_model(arguments, data)
    except ValueError as error:
        return str(error)
    return ""


def build_model(arguments: TrainArguments, data: ContextImages) -> InterventionModel:
    """A new head on a new or a saved base."""
    a = arguments
    if a.base.is_new:
        if a.data.frames is not None:
            raise ValueError("a light VAE takes images: give a pipeline that makes clips as base.")
        base = LightVAE(
            in_channels=data.image_shape[0],
            sample_size=data.image_shape[-1],
            block_out_channels=tuple(a.base.block_out_channels),
            hidden_width=a.base.hidden_width,
            latent_width=a.base.latent_width,
            norm=a.base.base_norm,
            likelihood=a.base.likelihood,
        )
    else:
        options: dict[str, Any] = {
            "embedding_width": a.base.latent_width,
            "num_tokens": a.base.num_tokens,
            "min_snr_gamma": a.base.min_snr_gamma,
        }
        options |= {} if a.base.class_label is None else {"class_label": a.base.class_label}
        options |= {
            "prompt": a.base.prompt,
            "prompts": data.prompts,
            "prompt_folder": Path(a.run.output_dir, "prepared", "prompts"),
            "num_frames": a.data.frames,
        }
        base = load_base(
            a.base.base,
            data.image_shape[-1],
            a.base.base_subfolder,
            a.base.residual_layers,
            a.base.image_encoder,
            **options,
        )
    if a.base.is_new and a.base.prompt:
        raise ValueError("prompt is for a pipeline with a text (--base): leave it out.")
    prompts = getattr(base, "prompts", None)
    if data.prompts is not None and prompts is None:
        logger.warning("the prompts of the images are not used: this base takes no text.")
    if a.base.gradient_checkpointing and prompts is not None and len(prompts.shapes) > 1:
        raise ValueError(
            "gradient_checkpointing does not go with prompts whose embeddings are of different"
            " lengths: leave one of them out."
        )
    if a.base.min_snr_gamma is not None and not hasattr(base, "min_snr_gamma"):
        raise ValueError(
            "min_snr_gamma weighs the noise levels of a denoiser, and this base is none: leave it"
            " out."
        )
    lora = a.base.regime == "lora"
    model = InterventionModel.build(
        base,
        data.concepts,
        lora_rank=a.base.lora_rank if lora else 0,
        **a.head.configuration(),
    )
    if lora:
        add_lora(model.base.model, a.base.lora_rank)
    if a.base.gradient_checkpointing:
        try:
            model.base.model.enable_gradient_checkpointing()
        except ValueError as error:
            raise ValueError(
                f"a {type(model.base.model).__name__} has no gradient_checkpointing: leave it out."
            ) from error
    return model


def lay_out(model: Any, device: torch.device, precision: str) -> None:
    """Put the weights of a light VAE into memory so that its convolutions are fastest: on a CPU in
    float32 with channels innermost, otherwise as they are.
    """
    if device.type == "cpu" and precision == "no":
        model.to(memory_format=torch.channels_last)


def build_objective(
    arguments: TrainArguments, model: InterventionModel, data: ContextImages, sharded: bool = False
) -> Objective:
    """The ELBO of the model, and the terms that the settings ask for; `sharded`: whether FSDP has
    cut its weights.
    """
    objective = arguments.objective
    strengths = {name: getattr(objective, name, 0.0) for name in term_names()}
    return Objective.build(model, data.targets(model.config.free_blocks), strengths, sharded)
