"""Tiny pipelines of diffusers with random weights, each with what its call needs: `PIPELINES[name]()` is (pipe, call).

Their text encoders are left out where the pipeline takes embeddings of a prompt; `call` has those.
"""

import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusion_models import conditional, sd3, text_parts
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModelWithProjection


SIZE = 16  # pixels of a side
TEXT = 12  # width of a prompt's embedding
PIPELINES = {}


def pipeline(name):
    """Put a function into `PIPELINES`; its weights are the same each time."""

    def register(make):
        def seeded():
            torch.manual_seed(0)
            pipe, call = make()
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    part.eval()
                    _wake(part)
            pipe.set_progress_bar_config(disable=True)
            return pipe, call

        PIPELINES[name] = seeded
        return seeded

    return register


def _wake(model):
    """Some denoisers are made with zeros that would hide what goes in."""
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)


def get(name):
    """A class of diffusers, or the test that wants it is skipped: older versions do not have them all."""
    import pytest

    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    return getattr(diffusers, name)


def make(name, folder_parts, call, **parts):
    names = (f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3"))
    missing = {part: None for part in names if part in folder_parts and part not in parts}
    return get(name)(**missing, **parts), call


def kl(channels=4, blocks=2, **options):
    options = {"scaling_factor": 0.5, "shift_factor": 0.1} | options
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * blocks, "up_block_types": ("UpDecoderBlock2D",) * blocks}
    return AutoencoderKL(
        **kinds, block_out_channels=(8,) * blocks, norm_num_groups=4, sample_size=SIZE, latent_channels=channels, **options
    )


def flow(**options):
    return FlowMatchEulerDiscreteScheduler(**options)


def dynamic():
    return flow(use_dynamic_shifting=True)


def embeds(length=5, width=TEXT):
    return torch.randn(1, length, width, generator=torch.Generator().manual_seed(1))


def mask(length=5):
    return torch.ones(1, length, dtype=torch.int64)


def clip():
    with tempfile.TemporaryDirectory() as folder:
        return text_parts(Path(folder) / "text")


def image():
    return Image.new("RGB", (SIZE, SIZE), (200, 100, 50))


ONE, TWO = ("text_encoder", "tokenizer"), ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
THREE = (*TWO, "text_encoder_3", "tokenizer_3")


@pipeline("Stable Diffusion")
def stable_diffusion():
    return make("StableDiffusionPipeline", (), {}, unet=conditional(), vae=kl(), scheduler=DDIMScheduler(), **clip(), **UNSAFE)


UNSAFE = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pipeline("Stable Diffusion inpainting")
def inpainting():
    call = {"image": image(), "mask_image": Image.new("L", (SIZE, SIZE), 255)}
    unet = conditional(in_channels=9)
    return make("StableDiffusionInpaintPipeline", (), call, unet=unet, vae=kl(), scheduler=DDIMScheduler(), **clip(), **UNSAFE)


@pipeline("InstructPix2Pix")
def instruct_pix2pix():
    parts = {"unet": conditional(in_channels=8), "vae": kl(), "scheduler": DDIMScheduler()}
    return make("StableDiffusionInstructPix2PixPipeline", (), {"image": image()}, **parts, **clip(), **UNSAFE)


@pipeline("Stable Diffusion XL")
def stable_diffusion_xl():
    first, second = clip(), clip()
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=8, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, projection_dim=10, **sizes)
    unet = conditional(
        cross_attention_dim=24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 10,
    )
    return make(
        "StableDiffusionXLPipeline",
        (),
        {},
        unet=unet,
        vae=kl(),
        scheduler=diffusers.EulerDiscreteScheduler(),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=second["tokenizer"],
        **first,
    )


@pipeline("Stable Diffusion 3")
def stable_diffusion_3():
    call = {"prompt_embeds": embeds(), "pooled_prompt_embeds": torch.randn(1, 10)}
    return make("StableDiffusion3Pipeline", THREE, call, transformer=sd3(), vae=kl(), scheduler=flow(shift=3.0))


def _flux(**options):
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    widths = {"in_channels": 16, "joint_attention_dim": TEXT, "axes_dims_rope": (2, 2, 4)}
    return get("FluxTransformer2DModel")(**sizes, **widths, pooled_projection_dim=10, **options)


@pipeline("Flux")
def flux():
    call = {"prompt_embeds": embeds(), "pooled_prompt_embeds": torch.randn(1, 10)}
    return make("FluxPipeline", TWO, call, transformer=_flux(guidance_embeds=True), vae=kl(), scheduler=dynamic())


@pipeline("Flux Kontext")
def flux_kontext():
    call = {"prompt_embeds": embeds(), "pooled_prompt_embeds": torch.randn(1, 10), "image": image()}
    call |= {"max_area": SIZE**2, "_auto_resize": False}
    return make("FluxKontextPipeline", TWO, call, transformer=_flux(), vae=kl(), scheduler=dynamic())


@pipeline("Flux 2")
def flux2():
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    transformer = get("Flux2Transformer2DModel")(
        in_channels=16, joint_attention_dim=TEXT, timestep_guidance_channels=8, axes_dims_rope=(2, 2, 2, 2), **sizes
    )
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = get("AutoencoderKLFlux2")(
        **blocks, block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=SIZE
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return make("Flux2Pipeline", ONE, {"prompt_embeds": embeds()}, transformer=transformer, vae=vae, scheduler=dynamic())


@pipeline("Chroma")
def chroma():
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    approximator = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    transformer = get("ChromaTransformer2DModel")(
        in_channels=16, joint_attention_dim=TEXT, axes_dims_rope=(2, 2, 4), **sizes, **approximator
    )
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": mask()}
    return make("ChromaPipeline", ONE, call, transformer=transformer, vae=kl(), scheduler=flow())


def _video_vae(name, **options):
    sizes = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.1, 2.0]}
    return get(name)(**sizes, **statistics, **options)


def _qwen():
    sizes = {"num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "axes_dims_rope": (2, 2, 4)}
    return get("QwenImageTransformer2DModel")(in_channels=16, out_channels=4, joint_attention_dim=TEXT, **sizes)


@pipeline("Qwen-Image")
def qwen_image():
    call = {"prompt_embeds": embeds(), "prompt_embeds_mask": mask()}
    vae = _video_vae("AutoencoderKLQwenImage")
    return make("QwenImagePipeline", ONE, call, transformer=_qwen(), vae=vae, scheduler=dynamic())


@pipeline("Z-Image")
def z_image():
    transformer = get("ZImageTransformer2DModel")(
        in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=TEXT, axes_dims=[2, 2, 4],
        axes_lens=[64, 64, 64],
    )  # fmt: skip
    call = {"prompt_embeds": [embeds()[0]]}
    return make("ZImagePipeline", ONE, call, transformer=transformer, vae=kl(), scheduler=dynamic())


@pipeline("PixArt")
def pixart():
    transformer = get("PixArtTransformer2DModel")(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16,
        sample_size=8, caption_channels=TEXT, use_additional_conditions=False,
    )  # fmt: skip
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": mask()}
    scheduler = DPMSolverMultistepScheduler()
    return make("PixArtAlphaPipeline", ONE, call, transformer=transformer, vae=kl(), scheduler=scheduler)


@pipeline("Sana")
def sana():
    transformer = get("SanaTransformer2DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
        cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=TEXT, sample_size=8,
    )  # fmt: skip
    sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    layers = {"encoder_layers_per_block": (1, 1), "decoder_layers_per_block": (1, 1)}
    scales = {"encoder_qkv_multiscales": ((), ()), "decoder_qkv_multiscales": ((), ())}
    vae = get("AutoencoderDC")(latent_channels=4, attention_head_dim=4, **sizes, **layers, **scales, scaling_factor=0.4)
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": mask()}
    return make("SanaPipeline", ONE, call, transformer=transformer, vae=vae, scheduler=scheduler)


@pipeline("HunyuanDiT")
def hunyuan_dit():
    transformer = get("HunyuanDiT2DModel")(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=8, hidden_size=16, num_layers=2,
        cross_attention_dim=TEXT, cross_attention_dim_t5=TEXT, pooled_projection_dim=8, text_len=5, text_len_t5=5,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": mask()}
    call |= {"prompt_embeds_2": embeds(), "prompt_attention_mask_2": mask()}
    call |= {"negative_" + name: value for name, value in call.items()}
    parts = {"transformer": transformer, "vae": kl(), "scheduler": diffusers.DDPMScheduler()}
    return make("HunyuanDiTPipeline", TWO, call, **parts, **UNSAFE)


@pipeline("HunyuanImage")
def hunyuan_image():
    transformer = get("HunyuanImageTransformer2DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=TEXT, text_embed_2_dim=TEXT, rope_axes_dim=(4, 4),
    )  # fmt: skip
    vae = get("AutoencoderKLHunyuanImage")(
        3, 3, latent_channels=4, block_out_channels=(32, 32), layers_per_block=1, spatial_compression_ratio=2, sample_size=SIZE,
        scaling_factor=0.5,
    )  # fmt: skip
    call = {"prompt_embeds": embeds(), "prompt_embeds_mask": mask(), "prompt_embeds_2": embeds(), "prompt_embeds_mask_2": mask()}
    return make("HunyuanImagePipeline", TWO, call, transformer=transformer, vae=vae, scheduler=flow(shift=4.0))


@pipeline("AuraFlow")
def auraflow():
    transformer = get("AuraFlowTransformer2DModel")(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=TEXT, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": mask()}
    call |= {"negative_" + name: value for name, value in call.items()}
    return make("AuraFlowPipeline", ONE, call, transformer=transformer, vae=kl(), scheduler=flow(shift=1.7))


@pipeline("Lumina 2")
def lumina2():
    transformer = get("Lumina2Transformer2DModel")(
        sample_size=8, in_channels=4, hidden_size=16, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64), cap_feat_dim=TEXT,
    )  # fmt: skip
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": mask()}
    return make("Lumina2Pipeline", ONE, call, transformer=transformer, vae=kl(), scheduler=dynamic())


@pipeline("CogView 4")
def cogview4():
    transformer = get("CogView4Transformer2DModel")(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=TEXT,
        time_embed_dim=8, condition_dim=4, sample_size=8, rope_axes_dim=(16, 16),
    )  # fmt: skip
    scheduler = flow(use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75)
    return make("CogView4Pipeline", ONE, {"prompt_embeds": embeds()}, transformer=transformer, vae=kl(), scheduler=scheduler)


@pipeline("CogView 3 Plus")
def cogview3():
    transformer = get("CogView3PlusTransformer2DModel")(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=TEXT,
        time_embed_dim=8, condition_dim=2, sample_size=8, pos_embed_max_size=8,
    )  # fmt: skip
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=True)
    call = {"prompt_embeds": embeds(), "negative_prompt_embeds": embeds()}
    return make("CogView3PlusPipeline", ONE, call, transformer=transformer, vae=kl(), scheduler=scheduler)


@pipeline("Kandinsky 5")
def kandinsky5():
    transformer = get("Kandinsky5Transformer3DModel")(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=TEXT, in_text_dim2=10, time_dim=16, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=1, axes_dims=(2, 2, 4), attention_type="regular",
    )  # fmt: skip
    call = {"prompt_embeds_qwen": embeds(), "prompt_embeds_clip": torch.randn(1, 10)}
    call |= {"prompt_cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}
    return make("Kandinsky5T2IPipeline", TWO, call, transformer=transformer, vae=kl(blocks=4), scheduler=flow(shift=5.0))


@pipeline("Bria")
def bria():
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    transformer = get("BriaTransformer2DModel")(in_channels=16, joint_attention_dim=TEXT, axes_dims_rope=[2, 2, 4], **sizes)
    return make("BriaPipeline", ONE, {"prompt_embeds": embeds()}, transformer=transformer, vae=kl(), scheduler=dynamic(), **VISION)


VISION = {"image_encoder": None, "feature_extractor": None}


@pipeline("Ovis-Image")
def ovis():
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2}
    transformer = get("OvisImageTransformer2DModel")(
        in_channels=16, out_channels=16, joint_attention_dim=TEXT, axes_dims_rope=(2, 2, 4), **sizes
    )
    return make("OvisImagePipeline", ONE, {"prompt_embeds": embeds()}, transformer=transformer, vae=kl(), scheduler=dynamic())


@pipeline("PRX")
def prx():
    transformer = get("PRXTransformer2DModel")(
        in_channels=4, context_in_dim=TEXT, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[4, 4]
    )
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": mask()}
    return make("PRXPipeline", ONE, call, transformer=transformer, vae=kl(), scheduler=flow(shift=3.0))


@pipeline("LTX-Video")
def ltx():
    transformer = get("LTXVideoTransformer3DModel")(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=1,
        caption_channels=TEXT,
    )  # fmt: skip
    down = {"down_block_types": ("LTXVideoDownBlock3D",) * 2, "spatio_temporal_scaling": (True, True)}
    blocks = {"block_out_channels": (8, 8), "layers_per_block": (1, 1, 1), "downsample_type": ("conv", "conv")}
    decoder = {"decoder_block_out_channels": (8, 8), "decoder_layers_per_block": (1, 1, 1)}
    decoder |= {"decoder_spatio_temporal_scaling": (True, True), "decoder_inject_noise": (False, False, False)}
    decoder |= {"upsample_residual": (False, False), "upsample_factor": (1, 1)}
    vae = get("AutoencoderKLLTXVideo")(latent_channels=4, patch_size=1, **down, **blocks, **decoder)
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    call = {"prompt_embeds": embeds(), "prompt_attention_mask": mask()}
    return make("LTXPipeline", ONE, call, transformer=transformer, vae=vae, scheduler=dynamic())


@pipeline("Wan")
def wan():
    transformer = get("WanTransformer3DModel")(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=TEXT, freq_dim=8, ffn_dim=16,
        num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    vae = _video_vae("AutoencoderKLWan", scale_factor_spatial=2)
    return make("WanPipeline", ONE, {"prompt_embeds": embeds()}, transformer=transformer, vae=vae, scheduler=scheduler)
