"""Tiny pipelines of many kinds, with random weights and without text encoders: they are called with
embeddings.

`make(kind)` gives a pipeline, and `call(kind, n)` the arguments of a call of it that makes n
images, with the guidance of its own switched on where it has any.
"""

import diffusers
import torch

from hf_intervene import InterventionConfig, InterventionHead
from hf_intervene.bases import DiffusionAdapter
from hf_intervene.bases.schedulers import prediction_type
from hf_intervene.bases.sites import find_sites


def _vae(latent_channels=4, **options):
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        sample_size=16,
        latent_channels=latent_channels,
        **options,
    )


def _shifted_vae(latent_channels=4):
    return _vae(latent_channels, shift_factor=0.1, scaling_factor=0.5)


def _unet(in_channels=4, **options):
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=12,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )


def _stable_diffusion(in_channels=4):
    return {
        "unet": _unet(in_channels),
        "vae": _vae(),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
        "safety_checker": None,
        "feature_extractor": None,
    }


def _sdxl():
    sizes = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "transformer_layers_per_block": (1, 1),
    }
    unet = _unet(
        projection_class_embeddings_input_dim=6 * 4 + 10, use_linear_projection=True, **sizes
    )
    return {"unet": unet, "vae": _vae(), "scheduler": diffusers.DDIMScheduler(clip_sample=False)}


def _sd3():
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        pos_embed_max_size=8,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
    )
    return {"transformer": transformer, "vae": _shifted_vae(), "scheduler": _flow()}


def _flow(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def _flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(2, 2, 4),
    )
    return {
        "transformer": transformer,
        "vae": _shifted_vae(),
        "scheduler": _flow(use_dynamic_shifting=True),
    }


def _flux2():
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        timestep_guidance_channels=16,
        axes_dims_rope=(2, 2, 2, 2),
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=16,
    )
    return {"transformer": transformer, "vae": vae, "scheduler": _flow(use_dynamic_shifting=True)}


def _chroma():
    transformer = diffusers.ChromaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
        approximator_num_channels=16,
        approximator_hidden_dim=16,
        approximator_layers=1,
    )
    return {
        "transformer": transformer,
        "vae": _shifted_vae(),
        "scheduler": _flow(use_dynamic_shifting=True),
    }


def _video_vae(kind):
    sizes = {
        "z_dim": 4,
        "dim_mult": [1, 1, 1],
        "num_res_blocks": 1,
        "temperal_downsample": [False, True],
    }
    statistics = {"latents_mean": [0.1, 0.0, -0.1, 0.2], "latents_std": [1.0, 2.0, 0.5, 1.5]}
    return getattr(diffusers, kind)(base_dim=8, **sizes, **statistics)


def _qwen():
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(4, 2, 2),
    )
    vae = _video_vae("AutoencoderKLQwenImage")
    return {"transformer": transformer, "vae": vae, "scheduler": _flow(use_dynamic_shifting=True)}


def _z_image():
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    with torch.no_grad():  # they are made of whatever is in memory
        transformer.x_pad_token.fill_(0.1)
        transformer.cap_pad_token.fill_(0.2)
    return {"transformer": transformer, "vae": _shifted_vae(), "scheduler": _flow(shift=3.0)}


def _pixart():
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        cross_attention_dim=16,
        caption_channels=12,
        use_additional_conditions=False,
    )
    return {
        "transformer": transformer,
        "vae": _vae(),
        "scheduler": diffusers.DDIMScheduler(clip_sample=False),
    }


def _sana():
    transformer = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=12,
        sample_size=8,
    )
    blocks = ("ResBlock", "EfficientViTBlock")
    vae = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=[1, 1],
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.4,
    )
    return {"transformer": transformer, "vae": vae, "scheduler": _flow(shift=3.0)}


def _hunyuan_dit():
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        cross_attention_dim=12,
        cross_attention_dim_t5=16,
        pooled_projection_dim=8,
        hidden_size=16,
        text_len=5,
        text_len_t5=6,
    )
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction")
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return {"transformer": transformer, "vae": _vae(), "scheduler": scheduler, **parts}


def _hunyuan_image():
    transformer = diffusers.HunyuanImageTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=12,
        text_embed_2_dim=10,
        rope_axes_dim=(4, 4),
    )
    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        scaling_factor=0.5,
        spatial_compression_ratio=2,
        sample_size=16,
    )
    guiders = {name: diffusers.AdaptiveProjectedMixGuidance() for name in ("guider", "ocr_guider")}
    return {"transformer": transformer, "vae": vae, "scheduler": _flow(shift=3.0), **guiders}


def _aura_flow():
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pos_embed_max_size=64,
    )
    return {"transformer": transformer, "vae": _vae(), "scheduler": _flow(shift=1.7)}


def _lumina():
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=16,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 2, 2),
        cap_feat_dim=12,
    )
    return {
        "transformer": transformer,
        "vae": _shifted_vae(),
        "scheduler": _flow(use_dynamic_shifting=True),
    }


def _cogview():
    transformer = diffusers.CogView4Transformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=4,
        num_attention_heads=4,
        text_embed_dim=12,
        time_embed_dim=8,
        condition_dim=4,
        sample_size=8,
        rope_axes_dim=(16, 16),
    )
    return {
        "transformer": transformer,
        "vae": _shifted_vae(),
        "scheduler": _flow(use_dynamic_shifting=True),
    }


def _kandinsky():
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=12,
        in_text_dim2=10,
        time_dim=8,
        model_dim=16,
        ff_dim=16,
        num_text_blocks=1,
        num_visual_blocks=1,
        axes_dims=(2, 2, 4),
    )
    return {"transformer": transformer, "vae": _vae(), "scheduler": _flow(shift=5.0)}


def _bria():
    transformer = diffusers.BriaTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=[2, 2, 4],
    )
    return {
        "transformer": transformer,
        "vae": _vae(shift_factor=0.0),
        "scheduler": _flow(use_dynamic_shifting=True),
    }


def _ovis():
    transformer = diffusers.OvisImageTransformer2DModel(
        in_channels=16,
        out_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        axes_dims_rope=(2, 2, 4),
    )
    return {
        "transformer": transformer,
        "vae": _shifted_vae(),
        "scheduler": _flow(use_dynamic_shifting=True),
    }


def _prx():
    transformer = diffusers.PRXTransformer2DModel(
        patch_size=2,
        in_channels=4,
        context_in_dim=12,
        hidden_size=16,
        mlp_ratio=2.0,
        num_heads=2,
        depth=1,
        axes_dim=[4, 4],
    )
    return {"transformer": transformer, "vae": _shifted_vae(), "scheduler": _flow(shift=3.0)}


def _ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=12,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    return {"transformer": transformer, "vae": vae, "scheduler": _flow(use_dynamic_shifting=True)}


def _wan_transformer():
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=12,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )


def _wan(two=False):
    parts = {"transformer": _wan_transformer(), "vae": _video_vae("AutoencoderKLWan")}
    parts["scheduler"] = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return parts | ({"transformer_2": _wan_transformer(), "boundary_ratio": 0.7} if two else {})


def _cogvideox():
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=12,
        num_layers=1,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        temporal_compression_ratio=4,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=True,
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", timestep_spacing="trailing"
    )
    return {"transformer": transformer.eval(), "vae": vae.eval(), "scheduler": scheduler}


# Kind -> class of the pipeline, what makes its parts, names of the text's arguments with their
# shapes behind the batch, and what else a call needs. Text under "negative_" names is made too,
# where `negative` is true.
_KINDS = {
    "sd": ("StableDiffusionPipeline", _stable_diffusion, {"prompt_embeds": (5, 12)}, True, {}),
    "inpaint": (
        "StableDiffusionInpaintPipeline",
        lambda: _stable_diffusion(9),
        {"prompt_embeds": (5, 12)},
        True,
        {},
    ),
    "pix2pix": (
        "StableDiffusionInstructPix2PixPipeline",
        lambda: _stable_diffusion(8),
        {"prompt_embeds": (5, 12)},
        True,
        {},
    ),
    "sdxl": (
        "StableDiffusionXLPipeline",
        _sdxl,
        {"prompt_embeds": (5, 12), "pooled_prompt_embeds": (10,)},
        True,
        {},
    ),
    "sd3": (
        "StableDiffusion3Pipeline",
        _sd3,
        {"prompt_embeds": (5, 12), "pooled_prompt_embeds": (10,)},
        True,
        {},
    ),
    "flux": (
        "FluxPipeline",
        _flux,
        {"prompt_embeds": (5, 12), "pooled_prompt_embeds": (10,)},
        True,
        {"true_cfg_scale": 2.0},
    ),
    "flux2": ("Flux2Pipeline", _flux2, {"prompt_embeds": (5, 12)}, False, {}),
    "chroma": (
        "ChromaPipeline",
        _chroma,
        {"prompt_embeds": (5, 12), "prompt_attention_mask": ()},
        True,
        {},
    ),
    "qwen": (
        "QwenImagePipeline",
        _qwen,
        {"prompt_embeds": (5, 12), "prompt_embeds_mask": ()},
        True,
        {"true_cfg_scale": 2.0},
    ),
    "z-image": ("ZImagePipeline", _z_image, {}, False, {}),
    "pixart": (
        "PixArtSigmaPipeline",
        _pixart,
        {"prompt_embeds": (5, 12), "prompt_attention_mask": ()},
        True,
        {"negative_prompt": None, "use_resolution_binning": False},
    ),
    "sana": (
        "SanaPipeline",
        _sana,
        {"prompt_embeds": (5, 12), "prompt_attention_mask": ()},
        True,
        {"negative_prompt": None, "use_resolution_binning": False, "height": 32, "width": 32},
    ),
    "hunyuan-dit": (
        "HunyuanDiTPipeline",
        _hunyuan_dit,
        {
            "prompt_embeds": (5, 12),
            "prompt_attention_mask": (),
            "prompt_embeds_2": (6, 16),
            "prompt_attention_mask_2": (6,),
        },
        True,
        {"use_resolution_binning": False},
    ),
    "hunyuan-image": (
        "HunyuanImagePipeline",
        _hunyuan_image,
        {
            "prompt_embeds": (5, 12),
            "prompt_embeds_mask": (),
            "prompt_embeds_2": (6, 10),
            "prompt_embeds_mask_2": (6,),
        },
        True,
        {},
    ),
    "aura-flow": (
        "AuraFlowPipeline",
        _aura_flow,
        {"prompt_embeds": (5, 12), "prompt_attention_mask": ()},
        True,
        {},
    ),
    "lumina": (
        "Lumina2Pipeline",
        _lumina,
        {"prompt_embeds": (5, 12), "prompt_attention_mask": ()},
        True,
        {"height": 32, "width": 32},
    ),
    "cogview": ("CogView4Pipeline", _cogview, {"prompt_embeds": (16, 12)}, True, {}),
    "kandinsky": ("Kandinsky5T2IPipeline", _kandinsky, {}, False, {}),
    "bria": ("BriaPipeline", _bria, {"prompt_embeds": (5, 12)}, True, {}),
    "ovis": (
        "OvisImagePipeline",
        _ovis,
        {"prompt_embeds": (5, 12)},
        True,
        {"negative_prompt": None},
    ),
    "prx": (
        "PRXPipeline",
        _prx,
        {"prompt_embeds": (5, 12), "prompt_attention_mask": ()},
        True,
        {"use_resolution_binning": False},
    ),
    "ltx": (
        "LTXPipeline",
        _ltx,
        {"prompt_embeds": (5, 12), "prompt_attention_mask": ()},
        True,
        {"num_frames": 1, "height": 32, "width": 32},
    ),
    "wan": (
        "WanPipeline",
        _wan,
        {"prompt_embeds": (5, 12)},
        True,
        {"num_frames": 1, "height": 32, "width": 32},
    ),
    "wan-clip": (
        "WanPipeline",
        _wan,
        {"prompt_embeds": (5, 12)},
        True,
        {"num_frames": 5, "height": 32, "width": 32},
    ),
    "wan-two": (
        "WanPipeline",
        lambda: _wan(True),
        {"prompt_embeds": (5, 12)},
        True,
        {"num_frames": 1, "height": 32, "width": 32},
    ),
    "cogvideox": (
        "CogVideoXPipeline",
        _cogvideox,
        {"prompt_embeds": (5, 12)},
        True,
        {"num_frames": 9},
    ),
}
KINDS = tuple(_KINDS)
SIZE = 16  # of the images, in pixels


def make(kind, seed=0):
    """A pipeline of a kind, in evaluation mode, without a progress bar. Weights that start at zero
    are drawn too."""
    torch.manual_seed(seed)
    name, parts, *_ = _KINDS[kind]
    pipeline_class = getattr(diffusers, name)
    expected = set(pipeline_class._get_signature_keys(pipeline_class)[0])
    made = parts()
    pipe = pipeline_class(**dict.fromkeys(expected - set(made)), **made)
    for part in made.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
            for parameter in part.parameters():
                if not parameter.any():
                    parameter.data.normal_(std=0.1)
    if kind == "kandinsky":
        pipe.resolutions = [(SIZE, SIZE)]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(kind, num_images=2, seed=0, **options):
    """Arguments of a call that makes `num_images` images in three steps of the same noise, as
    latents."""
    *_, texts, negative, more = _KINDS[kind]
    generator = torch.Generator().manual_seed(seed + 1)

    def text(name, shape):
        if "mask" in name:
            return torch.ones(
                num_images, *(shape or (5,)), dtype=torch.float if kind == "chroma" else torch.long
            )
        return torch.randn(num_images, *shape, generator=generator)

    arguments = {name: text(name, shape) for name, shape in texts.items()}
    if negative:
        arguments |= {f"negative_{name}": text(name, shape) for name, shape in texts.items()}
    image = torch.rand(1, 3, SIZE, SIZE, generator=generator)
    if kind == "inpaint":
        arguments |= {"image": image, "mask_image": (image[:, :1] > 0.5).float(), "strength": 1.0}
    if kind == "pix2pix":
        arguments |= {
            "image": image.expand(num_images, -1, -1, -1),
            "guidance_scale": 3.0,
            "image_guidance_scale": 1.5,
        }
    if kind == "z-image":
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            arguments[name] = list(text(name, (5, 12)))
    if kind == "kandinsky":
        for start in ("", "negative_"):
            arguments[f"{start}prompt_embeds_qwen"] = text("", (5, 12))
            arguments[f"{start}prompt_embeds_clip"] = text("", (10,))
            arguments[f"{start}prompt_cu_seqlens"] = 5 * torch.arange(
                num_images + 1, dtype=torch.int32
            )
    if kind == "prx" and num_images > 1:  # with more, this pipeline's own guidance fails
        arguments["guidance_scale"] = 1.0
    if kind != "pix2pix":
        arguments |= {"height": SIZE, "width": SIZE}
    call = {
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    }
    return call | arguments | more | options


def result(output):
    """The images or latents of what a pipeline returns, whatever that calls them."""
    found = output[0]
    return found if isinstance(found, torch.Tensor) else torch.as_tensor(found)


def head_for(pipe, seed=0, std=0.3):
    """A head of two concepts, a and b, and its adapter for a pipeline's denoiser, as if trained:
    what enters is not zero."""
    denoiser = pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer
    sites = find_sites(denoiser)
    torch.manual_seed(seed)
    shape = (2, 8) if sites.tokens else (8,)
    config = InterventionConfig(
        concepts=["a", "b"],
        embedding_shape=list(shape),
        feature_width=4,
        noise_width=4,
        initializer_range=0.5,
    )
    adapter = DiffusionAdapter(
        SIZE,
        vars(sites),
        shape,
        map_size=4 if sites.map else 0,
        feature_width=4,
        encoder_shape=(4, 8, 8),
        prediction_type=prediction_type(pipe.scheduler),
    )
    for parameter in adapter.projections.parameters():
        parameter.data.normal_(std=std)
    return InterventionHead(config).eval(), adapter.eval()
