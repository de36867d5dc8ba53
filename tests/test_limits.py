"""What a configuration of somebody's may fetch, may ask for, and may compute with; and what a
caller may ask of sampling.
"""

import json
import math
import shutil
from inspect import signature
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import HUB
from diffusers import AutoencoderTiny, ModelMixin
from diffusion_models import save_pipeline, save_vision, stable_diffusion, with_head
from fuzzing import bounds
from hostile import save_originals
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from shared_models import ALICE, build, frozen_on, outcome, put_folder, put_vae

from hf_intervene import InterventionConfig, InterventionModel, InterventionPipeline, load_base
from hf_intervene.bases.limits import check_types
from hf_intervene.bases.loading import load_processor, load_scheduler, load_vision
from hf_intervene.pipeline import load_model


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


# What is fetched


@pytest.fixture
def private_base(tmp_path, waits):
    """A stranger's model whose configuration names a private repository of alice's; returns the
    model.
    """
    put_vae("alice/vae", tmp_path=tmp_path)
    model = frozen_on(AutoencoderTiny.from_pretrained("alice/vae"))
    model.push_to_hub("bob/model", token="hf_bob")
    HUB.repos["alice/vae"].private = True
    constants.HF_HUB_CACHE += "-empty"
    HUB.requests.clear()
    return model


def authorised(path):
    return [
        headers
        for method, found, headers in HUB.requests
        if path in found and "authorization" in {k.lower() for k in headers}
    ]


def test_no_token_is_sent_for_a_repository_that_the_user_did_not_name(private_base):
    for load in (InterventionModel.from_pretrained, load_model):
        with pytest.raises(OSError, match="alice/vae, cannot be loaded .*base_token=True"):
            load("bob/model", **ALICE)
    assert authorised("bob/model") and HUB.asked("GET", "alice/vae") and not authorised("alice/vae")
    allowed = InterventionModel.from_pretrained("bob/model", base_token="hf_alice", **ALICE)
    assert torch.equal(outcome(allowed), outcome(private_base)) and authorised("alice/vae")


def test_what_is_fetched_from_where_is_said_once(private_base, capsys):
    HUB.repos["alice/vae"].private = False
    for said in (True, False):  # the second time it is in the cache
        InterventionModel.from_pretrained("bob/model")
        assert ("fetching alice/vae at " in capsys.readouterr().err) == said


def test_a_part_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, waits, monkeypatch):
    """A folder that is named as a repository may be, and lacks a part."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.chdir(tmp_path)
    save_originals(tmp_path)
    lora = tmp_path / "lora" / "lora"
    shard = "adapter_model-00001-of-00001.safetensors"
    (lora / "adapter_model.safetensors").rename(lora / shard)
    index = {"weight_map": {"x": shard}}
    (lora / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    stable_diffusion(with_head("conditional"), tmp_path).save_pretrained(tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd" / "tokenizer")
    processor = Path("sd", "image_processor")
    HUB.requests.clear()
    for load, message in (
        (lambda: InterventionModel.from_pretrained("lora"), "is in shards"),
        (lambda: load_base("sd", 16), "the tokenizer of .* is not there"),
        (lambda: load_base("sd", 16, prompt="a"), "the tokenizer of .* is not there"),
        (lambda: load_processor(processor), "the image processor is not there"),
    ):
        with pytest.raises(OSError, match=message) as error:
            load()
        assert "\n" not in str(error.value)
    assert not [path for _, path, _ in HUB.requests if "/lora" in path or "/sd" in path]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        # with the package `kernels`, compiled code of this repository would be fetched and run
        ({"attn_implementation": "evil/attention"}, "asks for the attention 'evil/attention'"),
        ({"_attn_implementation": {"": "evil/attention"}}, "asks for the attention"),
        ({"text_config": {"attn_implementation": "paged|evil/attention"}}, "asks for the att"),
        ({"attn_implementation": ["evil/attention"]}, "asks for the attention"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "is quantised"),
    ],
)
def test_a_vision_model_fetches_no_code(copy, entries, message):
    folder = copy("vit")
    change(folder / "config.json", **entries)
    refused(load_vision, folder, message)


def test_a_lora_beside_a_vision_model_is_not_loaded(copy):
    folder = copy("vit")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "alice/vit", "r": 1})
    )
    refused(load_vision, folder, "has a LoRA beside it")


def test_the_vision_model_beside_a_denoiser_is_the_one_of_training_time(tmp_path, waits):
    commit = put_folder("org/vit", save_vision(tmp_path / "vit"))
    source = save_pipeline("unet", tmp_path / "ddpm")
    model = InterventionModel.build(
        load_base(source, 16, image_encoder="org/vit"), ["a"], noise_width=4
    ).eval()
    assert model.config.companion_references["image_encoder"]["revision"] == commit
    model.save_pretrained(tmp_path / "model")
    files = load_file(tmp_path / "vit" / "model.safetensors")
    save_file(
        {k: v + 1 for k, v in files.items()},
        tmp_path / "vit" / "model.safetensors",
        metadata={"format": "pt"},
    )
    put_folder("org/vit", tmp_path / "vit")  # the repository moves on
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    expected = model.base.image_encoder(x)
    for options in ({"cache_dir": str(tmp_path / "other")}, {"local_files_only": True}):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            loaded = InterventionModel.from_pretrained(tmp_path / "model", dtype=dtype, **options)
            torch.testing.assert_close(loaded.base.image_encoder(x), expected, rtol=0.1, atol=0.05)
    reference = json.loads((tmp_path / "model" / "config.json").read_text())["companion_references"]
    reference["image_encoder"]["revision"] = None
    change(tmp_path / "model" / "config.json", companion_references=reference)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="is not the base that the head was trained on"):
            InterventionModel.from_pretrained(tmp_path / "model", dtype=dtype)


# What is asked for, and computed with


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    with_head().save_pretrained(folder / "unet", save_base=True)
    with_head("dit").save_pretrained(folder / "dit", save_base=True)
    InterventionPipeline.from_model(with_head("conditional")).save_pretrained(folder / "text")
    InterventionPipeline.from_model(with_head("dit")).save_pretrained(folder / "pipeline")
    save_vision(folder / "vit")
    return folder


@pytest.fixture
def copy(originals, tmp_path):
    return lambda kind: shutil.copytree(originals / kind, tmp_path / kind)


def refused(load, folder, message):
    with bounds(memory=1 << 30), pytest.raises((OSError, ValueError), match=message) as error:
        load(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "file", "entries", "message"),
    [
        (
            "unet",
            "adapter/config.json",
            {"sample_size": 1048576},
            "sample_size 1048576, which must be at most",
        ),
        ("unet", "adapter/config.json", {"map_size": 2**19}, "map_size"),
        ("unet", "base/config.json", {"sample_size": [2**20, 2**20]}, "sample_size"),
        (
            "unet",
            "base/config.json",
            {"downsample_padding": 2**20},
            "downsample_padding 1048576, which must be at most 64",
        ),
        (
            "unet",
            "base/config.json",
            {"norm_eps": math.nan},
            "norm_eps nan, which must be a finite number",
        ),
        ("dit", "vae/config.json", {"scaling_factor": math.nan}, "scaling_factor nan"),
        ("dit", "vae/config.json", {"scaling_factor": math.inf}, "scaling_factor inf"),
        (
            "dit",
            "vae/config.json",
            {"scaling_factor": 0},
            "scaling_factor 0, which must be a positive number",
        ),
        ("dit", "vae/config.json", {"scaling_factor": "x"}, "scaling_factor 'x'"),
        ("dit", "vae/config.json", {"scaling_factor": [1, "x"]}, r"scaling_factor \[1, 'x'\]"),
        ("dit", "vae/config.json", {"scaling_factor": {}}, "scaling_factor {}"),
        ("unet", "adapter/config.json", {"sample_size": ""}, "sample_size '', which must be a num"),
        ("unet", "adapter/config.json", {"sample_size": [None]}, "sample_size"),
        ("unet", "adapter/config.json", {"sample_size": True}, "sample_size"),
        ("unet", "adapter/config.json", {"sample_size": [16, 16]}, "sample_size must be a whole"),
        ("unet", "base/config.json", {"downsample_padding": []}, "downsample_padding"),
        ("unet", "base/config.json", {"freq_shift": "x"}, "freq_shift 'x', which must be a number"),
        ("unet", "base/config.json", {"mid_block_scale_factor": None}, "mid_block_scale_factor"),
        (
            "unet",
            "base/config.json",
            {"norm_eps": {"a": 1}},
            "norm_eps {'a': 1}, which must be a p",
        ),
        ("pipeline", "model_index.json", {"base": [5, "DiTTransformer2DModel"]}, "cannot be"),
        ("pipeline", "model_index.json", {"image_encoder": None}, "cannot be None"),
        ("pipeline", "base/config.json", {"norm_elementwise_affine": True}, "is missing"),
        ("unet", "base/config.json", {"norm_num_groups": -1}, "norm_num_groups -1"),
        ("unet", "base/config.json", {"attention_head_dim": -1}, "attention_head_dim -1"),
        ("unet", "base/config.json", {"norm_num_groups": 0.5}, "must be a whole number, not 0.5"),
        ("unet", "base/config.json", {"attn_norm_num_groups": 0.5}, "attn_norm_num_groups must be"),
        ("unet", "base/config.json", {"downsample_padding": None}, "downsample_padding must be a"),
        ("unet", "base/config.json", {"upsample_type": 5}, "upsample_type must be a text, not 5"),
        ("unet", "base/config.json", {"add_attention": "no"}, "must be true or false, not 'no'"),
        ("dit", "base/config.json", {"norm_eps": None}, "norm_eps must be a number, not None"),
        ("dit", "vae/config.json", {"norm_num_groups": 0.5}, "norm_num_groups must be a whole"),
        ("unet", "adapter/config.json", {"feature_width": True}, "feature_width must be a whole"),
        ("unet", "adapter/config.json", {"sample_size": 0}, "sample_size must be a whole number"),
        ("text", "adapter/config.json", {"text_shape": None}, "the adapter has no text"),
        (
            "dit",
            "vae/config.json",
            {"shift_factor": "x"},
            "shift_factor 'x', which must be a number",
        ),
        ("dit", "vae/config.json", {"sample_size": 10**6}, "sample_size"),
        ("pipeline", "vae/config.json", {"scaling_factor": math.nan}, "scaling_factor nan"),
        ("pipeline", "scheduler/scheduler_config.json", {"beta_start": math.nan}, "beta_start nan"),
        ("dit", "scheduler/scheduler_config.json", {"beta_end": "x"}, "beta_end 'x'"),
        ("dit", "scheduler/scheduler_config.json", {"clip_sample_range": 0}, "clip_sample_range 0"),
        (
            "dit",
            "scheduler/scheduler_config.json",
            {"clip_sample_range": math.inf},
            "clip_sample_range inf",
        ),
        (
            "dit",
            "scheduler/scheduler_config.json",
            {"sample_max_value": "1"},
            "sample_max_value '1'",
        ),
        (
            "dit",
            "scheduler/scheduler_config.json",
            {"dynamic_thresholding_ratio": 2},
            "dynamic_thresholding_ratio 2",
        ),
        (
            "dit",
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 0},
            "num_train_timesteps 0",
        ),
        (
            "dit",
            "scheduler/scheduler_config.json",
            {"trained_betas": [0.1, -1.0], "num_train_timesteps": 2},
            "trained_betas -1.0",
        ),
        (
            "dit",
            "scheduler/scheduler_config.json",
            {"trained_betas": [0.1]},
            "has 1 entries of trained_betas, which must be 1000",
        ),
        (
            "pipeline",
            "scheduler/scheduler_config.json",
            {"trained_betas": []},
            "has 0 entries of trained_betas, which must be 1000",
        ),
        (
            "dit",
            "scheduler/scheduler_config.json",
            {"steps_offset": -5},
            "steps_offset -5, which must be a number, 0 at least",
        ),
        (
            "dit",
            "vae/config.json",
            {"latents_mean": [0.0], "latents_std": [1.0]},
            "has 1 entries of latents_mean, which must be 4",
        ),
    ],
)
def test_values_that_no_weights_tie_down(copy, kind, file, entries, message):
    folder = copy(kind)
    change(folder / file, **entries)
    refused(load_model, folder, message)


@pytest.mark.parametrize(
    "entries",
    [
        {"size": {"height": 200_000, "width": 200_000}},
        {"size": {"shortest_edge": 200_000}},
        {"size": 200_000},
        {"crop_size": {"height": 10**5, "width": 10**5}},
        {"image_std": [0.0, 1.0, 1.0]},
        {"image_mean": [math.nan, 0.0, 0.0]},
        {"rescale_factor": "x"},
    ],
)
def test_an_image_processor_that_makes_no_images(copy, entries):
    folder = copy("vit")
    change(folder / "preprocessor_config.json", **entries)
    refused(load_vision, folder, f"{next(iter(entries))}|height|width|shortest_edge")
    refused(load_processor, folder, "it is corrupt, or made to do harm")


def test_the_stride_of_an_adapter_is_a_number(copy):
    folder = copy("unet")
    sites = json.loads((folder / "adapter" / "config.json").read_text())["sites"]
    change(folder / "adapter" / "config.json", sites=sites | {"input_stride": True})
    refused(load_model, folder, "input_stride must be a whole number, not True")


def test_defaults_of_diffusers_are_of_the_types_it_says():
    for name in dir(diffusers):
        found = getattr(diffusers, name, None)
        if isinstance(found, type) and issubclass(found, ModelMixin):
            arguments = signature(found.__init__).parameters.values()
            check_types(found, {p.name: p.default for p in arguments if p.default is not p.empty})


def test_what_diffusers_itself_saves_is_right(tmp_path):
    """Its own infinities included."""
    diffusers = pytest.importorskip("diffusers")
    for name in (
        "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler",
        "FlowMatchEulerDiscreteScheduler",
        "LCMScheduler",
        "UniPCMultistepScheduler",
        "PNDMScheduler",
        "EDMEulerScheduler",
        "DDIMScheduler",
        "HeunDiscreteScheduler",
    ):
        getattr(diffusers, name)().save_pretrained(tmp_path / name)
        assert type(load_scheduler(tmp_path / name, "it")).__name__ == name


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("kind", "part"),
    [
        ("unet", "."),
        ("unet", "adapter"),
        ("unet", "base"),
        ("dit", "vae"),
        ("pipeline", "head"),
        ("pipeline", "vae"),
    ],
)
def test_weights_that_are_not_finite(copy, kind, part, value):
    folder = copy(kind)
    file = next((folder / part).glob("*.safetensors"))
    weights = load_file(file)
    name = max(weights, key=lambda name: weights[name].numel())
    weights[name].view(-1)[3] = value
    save_file(weights, file, metadata={"format": "pt"})
    refused(load_model, folder, f"the weights of the .* are not finite .{name}")


def test_lora_that_is_not_finite(tmp_path, waits):
    put_vae(tmp_path=tmp_path)
    frozen_on(AutoencoderTiny.from_pretrained("org/vae"), lora_rank=2).save_pretrained(
        tmp_path / "lora"
    )
    file = tmp_path / "lora" / "lora" / "adapter_model.safetensors"
    save_file(
        {name: value * math.nan for name, value in load_file(file).items()},
        file,
        metadata={"format": "pt"},
    )
    refused(InterventionModel.from_pretrained, tmp_path / "lora", "with its LoRA are not finite")


# Arguments of sampling

NOT_RIGHT = [
    ({"generator": []}, "0 generators were given for 2 samples"),
    ({"generator": [None, None]}, "generator must be a torch.Generator"),
    ({"generator": 5}, "generator must be a torch.Generator"),
    ({"generator": "x"}, "generator must be a torch.Generator"),
    ({"generator": np.random.default_rng(0)}, "generator must be a torch.Generator"),
    ({"generator": (torch.Generator(),) * 2}, "generator must be a torch.Generator"),
    ({"generator": [torch.Generator()] * 3}, "3 generators were given for 2 samples"),
    ({"noise": np.zeros((2, 3, 4))}, "noise must be a tensor, not a ndarray"),
    ({"noise": [0.0]}, "noise must be a tensor, not a list"),
    ({"noise": torch.full((2, 3, 4), math.nan)}, "noise must be finite numbers"),
    ({"noise": torch.tensor(0.0)}, "noise must have shape"),
    ({"residual_noise": np.zeros((2, 3, 16, 16))}, "residual_noise must be a tensor"),
    (
        {"residual_noise": torch.full((2, 3, 16, 16), math.inf)},
        "residual_noise must be finite numbers",
    ),
    ({"residual_noise": torch.zeros(3, 3, 16, 16)}, "residual_noise has 3 rows for 2 samples"),
    ({"residual_scale": math.nan}, "residual_scale must be a finite number"),
    ({"guidance_scale": math.nan}, "guidance_scale must be a finite number"),
    ({"guidance_scale": "x"}, "guidance_scale must be a finite number"),
    ({"num_inference_steps": torch.zeros(2, 4, 4)}, "num_inference_steps must be a whole number"),
    ({"guidance_scale": 10**400}, "guidance_scale must be a finite number"),
    ({"noise": torch.zeros(2, 3, 4, device="meta")}, "noise must hold real numbers, not be"),
    ({"noise": torch.zeros(2, 3, 4) + 0j}, "noise must hold real numbers, not be torch.complex64"),
    ({"num_images": 10**30}, "the number of samples must be at most 1000000000"),
    ({"batch_size": -1}, "batch_size must be a whole number, 1 at least"),
    ({"batch_size": "x"}, "batch_size must be a whole number"),
    ({"batch_size": True}, "batch_size must be a whole number"),
    ({"batch_size": 10**30}, "batch_size must be a whole number"),
    ({"residual_scale": 10**60}, "images that are not finite numbers"),
    ({"guidance_scale": 10**60}, "images that are not finite numbers"),
    ({"num_images": "x"}, "the number of samples must be a whole number, not 'x'"),
    ({"num_images": 1.5}, "the number of samples must be a whole number"),
    ({"output_type": "x"}, "output_type must be one of pt, np, pil"),
]


@pytest.fixture(scope="module")
def pipe():
    return InterventionPipeline.from_model(with_head())


@pytest.mark.parametrize(("entries", "message"), NOT_RIGHT)
def test_arguments_that_nothing_can_be_sampled_with(pipe, entries, message):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        pipe("a", **{"num_images": 2, "num_inference_steps": 2} | entries)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"pixel_values": None}, "images must be PIL images"),
        ({"pixel_values": torch.rand(2, 3, 8, 8)}, "images of 3x16x16"),
        ({"targets": torch.zeros(3, 2)}, "2"),
        ({"targets": 5}, "cannot read 5 as a context"),
        ({"generator": 5}, "generator must be a torch.Generator"),
        ({"generator": []}, "0 generators were given for 2 samples"),
        ({"batch_size": -1}, "batch_size must be a whole number"),
    ],
)
def test_noise_that_cannot_be_abducted(pipe, entries, message):
    given = {"pixel_values": torch.rand(2, 3, 16, 16), "targets": "a", "num_inference_steps": 2}
    with pytest.raises((TypeError, ValueError), match=message) as error:
        pipe.model.abduct(**given | entries)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("concepts", ["hat", b"hat", None, 5])
def test_concepts_that_are_no_list(concepts):
    """The letters of a word are no concepts."""
    with pytest.raises(TypeError, match="concepts must be a list of names, not"):
        InterventionModel.build(build().base, concepts)


def test_what_is_no_model_and_no_range_of_numbers():
    with pytest.raises(TypeError, match="from_model takes an InterventionModel, not a str"):
        InterventionPipeline.from_model("folder")
    for value in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="initializer_range must be finite"):
            InterventionConfig(initializer_range=value)


@pytest.mark.parametrize(
    "images",
    [
        [],
        None,
        5,
        [None],
        np.zeros((1, 1, 16, 16, 3), np.uint8),
        torch.zeros(0, 3, 16, 16),
        Image.new("I;16", (16, 16)),
        torch.rand(1, 3, 16, 16) + 0j,
        np.zeros((1, 16, 16, 3), complex),
        np.array("x"),
        torch.tensor(1.0),
    ],
)
def test_images_that_cannot_be_edited(pipe, images):
    with pytest.raises((TypeError, ValueError), match="image") as error:
        pipe.edit(images, "a", num_inference_steps=2)
    assert "\n" not in str(error.value)


def test_a_message_shows_a_name_in_one_line(pipe):
    with pytest.raises(FileNotFoundError, match=r"there is no file a\\nb\."):
        pipe.edit("a\nb", "a", num_inference_steps=2)


def test_images_that_are_not_finite_are_no_result():
    model = build()
    for parameter in model.base.parameters():
        parameter.data.fill_(math.nan)
    with pytest.raises(ValueError, match="images that are not finite numbers"):
        model.sample("a", 1)
