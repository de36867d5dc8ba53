"""Tiny denoisers, their pipelines and heads, for the tests."""

import json

import torch
from conftest import generator
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from hf_intervene import InterventionModel, wrap_base


BLOCKS = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
KINDS = ("unet", "conditional", "dit", "sd3")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed))


def unet(**options):
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return UNet2DModel(**{"sample_size": 16} | BLOCKS | blocks | options)


def conditional(**options):
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 12}
    return UNet2DConditionModel(
        down_block_types=down, up_block_types=up, **BLOCKS | sizes | options
    )


def dit():
    sizes = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_layers": 2,
        "norm_num_groups": 4,
    }
    return DiTTransformer2DModel(
        in_channels=4, out_channels=8, sample_size=8, patch_size=2, **sizes
    )


def sd3():
    widths = {"joint_attention_dim": 12, "caption_projection_dim": 16, "pooled_projection_dim": 10}
    sizes = {
        "num_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "pos_embed_max_size": 8,
    }
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, **widths, **sizes
    )


def vae():
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    return AutoencoderKL(
        **blocks, block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, latent_channels=4
    )


def make(kind, seed=0):
    """A denoiser of a kind and the options of its wrapper."""
    torch.manual_seed(seed)
    model = {"unet": unet, "conditional": conditional, "dit": dit, "sd3": sd3}[kind]().eval()
    _wake(model)
    if kind == "unet":
        return model, {"scheduler": DDPMScheduler(prediction_type="v_prediction")}
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0)
        if kind == "sd3"
        else DDIMScheduler(clip_sample=False)
    )
    return model, {"scheduler": scheduler, "vae": vae().eval()}


def _wake(model):
    """Some of these models are made with zeros that would hide what goes in."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)


def with_head(kind="unet", seed=0, awake=True, **options):
    """A model with a head; `awake`: as if trained, what enters is not zero."""
    model, parts = make(kind, seed)
    built = InterventionModel.build(
        wrap_base(model, **parts, **options), ["a", "b"], noise_width=4, initializer_range=0.5
    ).eval()
    if awake:
        for parameter in built.base.adapter.projections.parameters():
            parameter.data.normal_(std=0.3)
    return built


def text_parts(folder):
    """A tokenizer and a text encoder of width 12."""
    folder.mkdir(exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", "a</w>", "b</w>", "!", "a", "b"]
    (folder / "vocab.json").write_text(
        json.dumps({word: number for number, word in enumerate(words)})
    )
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8
    )
    sizes = {
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = CLIPTextConfig(
        vocab_size=8, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, **sizes
    )
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def stable_diffusion(model, folder, pipeline_class=StableDiffusionPipeline):
    """A text-to-image pipeline (or one like it) of a model with a head, or of a denoiser's."""
    torch.manual_seed(0)
    parts = {"safety_checker": None, "feature_extractor": None, "scheduler": model.base.scheduler}
    pipe = pipeline_class(
        vae=model.base.vae, unet=model.base.model, **text_parts(folder / "text"), **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion_3(model):
    """A pipeline of a model with a head on an `SD3Transformer2DModel`; it has no text encoders:
    give it embeddings.
    """
    model.base.vae.register_to_config(shift_factor=0.1)  # which this pipeline does not do without
    text = dict.fromkeys(
        f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
    )
    return StableDiffusion3Pipeline(
        transformer=model.base.model, scheduler=model.base.scheduler, vae=model.base.vae, **text
    )


def save_pipeline(kind, folder, seed=0):
    """A pretrained pipeline, saved by diffusers, without a head."""
    model, parts = make(kind, seed)
    pipe = (
        DDPMPipeline(model, parts["scheduler"])
        if kind == "unet"
        else DiTPipeline(model, parts["vae"], parts["scheduler"])
    )
    pipe.save_pretrained(folder)
    return folder


def save_vision(folder):
    """A pretrained vision model with its image processor."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    ViTModel(
        ViTConfig(**sizes, image_size=24, patch_size=8, hidden_dropout_prob=0.5)
    ).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder
