"""Bases recorded from the tiny pipelines of `pipelines.py`, and a few more pipelines."""

import tempfile
from pathlib import Path

import diffusers
import pipelines
import torch
from diffusion_models import conditional, text_parts
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, UMT5Config, UMT5EncoderModel

from hf_intervene.bases import PipelineBase


# Clips and two denoisers are in `test_clips.py`.
KINDS = (
    *(kind for kind in pipelines.KINDS if kind not in ("wan-two", "wan-clip")),
    "sdxl-text",
    "kontext",
    "cogview3",
)
# Heads are trained on these too.
TRAINED = (*KINDS, "wan-clip", "wan-two", "cogvideox")


def pipeline(kind):
    """A pipeline, and the arguments that a recording needs: the embeddings of one prompt, and the
    size of its images.
    """
    if kind in _MORE:
        torch.manual_seed(0)
        pipe, call = _MORE[kind]()
        pipe.set_progress_bar_config(disable=True)
        return pipe, call | {"height": pipelines.SIZE, "width": pipelines.SIZE}
    call = pipelines.call(kind, 1)
    needed = ("image", "mask_image", "height", "width")
    return pipelines.make(kind), {
        name: value for name, value in call.items() if "prompt" in name or name in needed
    }


def base(kind, **options):
    """A base of a kind."""
    pipe, call = pipeline(kind)
    return PipelineBase.from_pipeline(pipe, "a b", call=call, **options)


def _clip(width):
    with tempfile.TemporaryDirectory() as folder:
        found = text_parts(Path(folder) / "text")
    if width:
        sizes = {
            "hidden_size": 12,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        }
        config = CLIPTextConfig(
            vocab_size=8,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            projection_dim=width,
            **sizes,
        )
        found["text_encoder"] = CLIPTextModelWithProjection(config)
    return found


def sdxl_with_text():
    """With its text encoders, so that it is called with a prompt, and a scheduler that scales its
    samples.
    """
    first, second = _clip(0), _clip(10)
    text = {
        "cross_attention_dim": 24,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
    }
    unet = conditional(projection_class_embeddings_input_dim=6 * 4 + 10, **text)
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=unet,
        vae=pipelines._vae(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder_2=second["text_encoder"],
        tokenizer_2=second["tokenizer"],
        **first,
    )
    return pipe, {}


def wan_with_text(folder):
    """With an autoencoder that says by how much it really downsamples, and a text encoder, so that
    it is called with a prompt."""
    sizes = {"vocab_size": 8, "d_model": 12, "d_kv": 6, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    pipe, _ = _wan_video()
    pipe.register_modules(
        tokenizer=text_parts(folder)["tokenizer"],
        text_encoder=UMT5EncoderModel(UMT5Config(**sizes)),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _kontext():
    text = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxKontextPipeline(**pipelines._flux(), **text)
    call = {"image": Image.new("RGB", (pipelines.SIZE, pipelines.SIZE), (200, 100, 50))}
    call |= {"max_area": pipelines.SIZE**2, "_auto_resize": False}
    return pipe, call | {
        "prompt_embeds": torch.randn(1, 5, 12),
        "pooled_prompt_embeds": torch.randn(1, 10),
    }


def _cogview3():
    sizes = {
        "num_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "text_embed_dim": 12,
        "time_embed_dim": 8,
    }
    transformer = diffusers.CogView3PlusTransformer2DModel(
        in_channels=4, out_channels=4, condition_dim=2, sample_size=8, pos_embed_max_size=8, **sizes
    )
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing")
    parts = {"transformer": transformer, "vae": pipelines._vae(), "scheduler": scheduler}
    pipe = diffusers.CogView3PlusPipeline(text_encoder=None, tokenizer=None, **parts)
    return pipe, dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), torch.randn(1, 5, 12))


def _cogvideox():
    parts = pipelines._cogvideox()
    pipe = diffusers.CogVideoXPipeline(text_encoder=None, tokenizer=None, **parts)
    return pipe, dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), torch.randn(1, 5, 12))


def _wan_video():
    """With an autoencoder that says by how much it really downsamples."""
    parts = pipelines._wan()
    parts["vae"].register_to_config(scale_factor_temporal=2, scale_factor_spatial=4)
    for part in (parts["transformer"], parts["vae"]):
        part.eval()
    pipe = diffusers.WanPipeline(tokenizer=None, text_encoder=None, **parts)
    return pipe, dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), torch.randn(1, 5, 12))


_MORE = {
    "sdxl-text": sdxl_with_text,
    "kontext": _kontext,
    "cogview3": _cogview3,
    "cogvideox": _cogvideox,
    "wan-video": _wan_video,
}
