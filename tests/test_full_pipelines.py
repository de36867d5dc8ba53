"""Pipelines of full size: the benchmark of them runs on small ones, and what saves memory where one
does not fit leaves training as it is.
"""

import pytest
import recorded
import torch

from hf_intervene import InterventionModel, bases
from hf_intervene.bases import PipelineBase
from hf_intervene.training.benchmarks import full_pipelines, tools


_SMALL_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 16,
}
_SMALL_CLIP = {
    "hidden_size": 12,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 8,
    "max_position_embeddings": 8,
}
_SMALL_TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "axes_dims_rope": (2, 2, 4),
}
SMALL_PIPELINES = {
    "Stable Diffusion XL": {
        "unet": {
            "sample_size": 8,
            "block_out_channels": (8, 16, 16),
            "norm_num_groups": 4,
            "transformer_layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 24,
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 6 * 4 + 10,
        },
        "vae": _SMALL_VAE,
        "clip_l": _SMALL_CLIP,
        "clip_big_g": _SMALL_CLIP | {"projection_dim": 10},
    },
    "Flux.1": {
        "transformer": _SMALL_TRANSFORMER | {"num_single_layers": 1, "pooled_projection_dim": 10},
        "vae": _SMALL_VAE | {"latent_channels": 4},
        "size": 16,
    },
    "Qwen-Image": {
        "transformer": _SMALL_TRANSFORMER | {"out_channels": 4},
        "vae": {
            "base_dim": 8,
            "z_dim": 4,
            "dim_mult": [1, 2],
            "num_res_blocks": 1,
            "temperal_downsample": [False],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        "size": 16,
    },
}


@pytest.mark.parametrize("kind", SMALL_PIPELINES)
def test_the_benchmark_of_whole_pipelines(kind, monkeypatch):
    monkeypatch.setattr(tools.Conditions, "device", torch.device("cpu"))
    monkeypatch.setattr(tools.Conditions, "cpu_time", False)
    rounds = 1 if full_pipelines.PIPELINES[kind].steps else 0
    found = full_pipelines.measured(
        kind, rounds, torch.get_num_threads(), torch.device("cpu"), False, SMALL_PIPELINES[kind]
    )
    recording = found["recording"]
    # Once in the run, and once to check the recording; all other calls are stubs.
    assert recording["calls of the denoiser"]["number"] == 2
    assert recording["image_size"] == 16 and recording["kept_mib"] > 0
    if rounds:
        step = found["step"]
        assert step["hooks"] > 2 and step["host_waits_in_hooks"] == 0
        first, later = (
            step[f"{name} step"]["ratio"]
            for name in ("head and hooks over the first", "hooks over the")
        )
        assert 0 < later < first  # the head is run in the first step alone


def test_waits_in_hooks_are_seen():
    layer = torch.nn.Linear(2, 2)
    watched = full_pipelines.Watched(layer)
    watched.counting = True

    def reads(module, args, output):
        assert output.sum() != 100

    reads.__module__ = "hf_intervene.somewhere"
    layer.register_forward_hook(reads)
    layer.register_forward_hook(lambda module, args, output: output.sum().item())  # not ours
    watched.watch_hooks()
    layer(torch.ones(1, 2))
    (step,) = watched.steps
    assert (step.hooks, step.waits) == (1, 1) and 0 < step.hook_seconds <= step.seconds


def test_the_configurations_are_the_published_ones():
    counts = {
        kind: full_pipelines.weights_of(pipeline.denoiser)
        for kind, pipeline in full_pipelines.PIPELINES.items()
    }
    published = {
        "Stable Diffusion XL": 2_567_463_684,
        "Flux.1": 11_901_408_320,
        "Qwen-Image": 20_430_401_088,
    }
    assert {kind: count["parameters"] for kind, count in counts.items()} == published
    for kind, count in counts.items():
        assert 0 < count["largest_block_parameters"] < published[kind] / 2, kind


def test_the_peak_is_counted_anew():
    held = tools.held_gib()
    block = torch.ones(2**26)  # 0.25 GiB
    del block
    assert tools.peak_gib() - held > 0.2
    held = tools.held_gib()
    assert tools.peak_gib() - held < 0.1


def test_tokens_of_an_embedding_are_no_wider_than_need_be(monkeypatch, tmp_path):
    """Those of the text are 24 wide here, and 2,048 in Stable Diffusion XL."""
    monkeypatch.setattr(bases.pipelines, "_TOKEN_WIDTH", 8)
    base = recorded.base("sdxl-text")
    assert base.embedding_shape == (4, 8) and base.injection.sites.cross_width == 24
    model = InterventionModel.build(base, ["a", "b"], noise_width=4)
    for parameter in base.adapter.projections.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    monkeypatch.undo()  # a saved head keeps its width
    loaded = InterventionModel.from_pretrained(tmp_path)
    images = [
        found.sample(context, 1, torch.Generator().manual_seed(0), num_inference_steps=2)
        for found, context in ((model, ["a"]), (loaded, ["a"]), (loaded, []))
    ]
    assert torch.allclose(images[0], images[1], atol=1e-5)
    assert not torch.allclose(images[0], images[2], atol=1e-5)


# Where the weights do not fit

CPU = torch.device("cpu")


def _float8(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def _group_offload(pipe):
    pipe.transformer.enable_group_offload(CPU, CPU, "block_level", num_blocks_per_group=1)


def _checkpointed(change):
    def both(pipe):
        change(pipe)
        pipe.transformer.enable_gradient_checkpointing()

    return both


def gradient(change):
    """Of the head on Flux's tiny pipeline after a change of it, all in one vector."""
    pipe, call = recorded.pipeline("flux")
    change(pipe)
    base = PipelineBase.from_pipeline(pipe, "a b", call=call)
    torch.manual_seed(1)
    model = InterventionModel.build(base, ["a", "b"], noise_width=4).train()
    base.trainable(False)
    for parameter in base.adapter.projections.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(2, *base.image_shape, generator=generator)
    draws = model.posterior_draws(2, generator)
    model(images, model.targets([["a"], []]), **draws).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.head.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("change", "tolerance"),
    [
        (_group_offload, 1e-6),
        (_checkpointed(_group_offload), 1e-6),
        (_float8, 0.05),  # of weights in 8 bits
        (_checkpointed(_float8), 0.05),
    ],
)
def test_a_head_is_trained_where_weights_are_stored_elsewhere_or_in_8_bits(change, tolerance):
    expected = gradient(lambda pipe: None)
    found = gradient(change)
    assert expected.norm() > 0 and (found - expected).norm() <= tolerance * expected.norm()
