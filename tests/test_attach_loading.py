"""What `attach` loads: LoRA that was trained with a head, sub-folders, variants, precision, and
whether the denoiser is the one."""

import accelerate
import pipelines
import pytest
import recorded
import torch
from conftest import generator
from diffusers import DDIMScheduler, DiTPipeline, UNet2DConditionModel
from diffusion_models import make, stable_diffusion, with_head
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch.nn.utils.parametrizations import weight_norm

from hf_intervene import (
    InterventionModel,
    InterventionPipeline,
    attach,
    detach,
    intervene,
    load_base,
)
from hf_intervene.acting import Heads, denoisers
from hf_intervene.attached import Attached
from hf_intervene.bases.lora import add_lora, merged
from hf_intervene.bases.lora_layers import LoraLayers


NOISE = torch.randn(1, 3, 4, generator=generator(5))


def generate(pipe, **options):
    call = {"num_inference_steps": 3, "output_type": "latent", "generator": generator()}
    text = {"class_labels": [0]} if isinstance(pipe, DiTPipeline) else {"prompt": "a"}
    output = "pt" if isinstance(pipe, DiTPipeline) else "latent"
    return torch.as_tensor(pipe(**text, **call | {"output_type": output} | options)[0])


def under(pipe, interventions, **options):
    with intervene(pipe, interventions, noise=NOISE, **options):
        return generate(pipe)


def with_lora(kind):
    """A model whose base carries LoRA that was trained: it does something."""
    model = with_head(kind)
    add_lora(model.base.model, 2)
    model.base.injection.install()
    torch.manual_seed(3)
    for name, parameter in model.base.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2)
    return model


def plain_pipeline(kind, tmp_path, base=None):
    """A pipeline of the base as it was before LoRA, in weights of its own."""
    fresh = with_head(kind)
    if base is not None:
        fresh.base.model.load_state_dict(base.state_dict())
    if kind == "dit":
        pipe = DiTPipeline(fresh.base.model, fresh.base.vae, fresh.base.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe
    return stable_diffusion(fresh, tmp_path)


@pytest.mark.parametrize("kind", ["conditional", "dit"])
@pytest.mark.parametrize("source", ["model", "folder"])
def test_lora_acts_inside_and_leaves_with_the_head(kind, source, tmp_path):
    """As with LoRA merged into the weights of a pipeline of its own (what PEFT itself computes),
    and nothing outside."""
    model = with_lora(kind)
    pipe, expected = (
        plain_pipeline(kind, tmp_path),
        plain_pipeline(kind, tmp_path, merged(model.base.model)),
    )
    before, names = generate(pipe), [name for name, _ in pipe.components.items()]
    modules = dict(
        pipe.unet.named_modules() if kind == "conditional" else pipe.transformer.named_modules()
    )
    attach(expected, model.head, model.base.adapter)
    wanted = {name: under(expected, name) for name in ("obs", "a")}
    if source == "folder":
        model.save_pretrained(tmp_path / "saved", save_base=False)
        assert not (tmp_path / "saved" / "base").exists() and (tmp_path / "saved" / "lora").exists()
        attach(pipe, tmp_path / "saved")
    else:
        attach(pipe, model)
    assert torch.equal(generate(pipe), before)
    for name, image in wanted.items():
        found = under(pipe, name)
        torch.testing.assert_close(found, image, rtol=1e-4, atol=1e-4)
        assert (found - before).abs().max() > 1e-3
    without = plain_pipeline(kind, tmp_path)
    attach(without, model.head, model.base.adapter)
    assert (under(without, "a") - wanted["a"]).abs().max() > 1e-3  # the LoRA matters
    torch.testing.assert_close(
        under(pipe, "a", guidance_scale=2.0),
        under(expected, "a", guidance_scale=2.0),
        rtol=1e-3,
        atol=1e-3,
    )
    assert torch.equal(generate(pipe), before)
    detach(pipe)
    assert (
        torch.equal(generate(pipe), before)
        and [name for name, _ in pipe.components.items()] == names
    )
    after = dict(
        pipe.unet.named_modules() if kind == "conditional" else pipe.transformer.named_modules()
    )
    assert after.keys() == modules.keys() and all(after[name] is modules[name] for name in modules)


@pytest.mark.parametrize("kind", ["sd", "flux", "z-image", "sana", "wan", "qwen"])
def test_lora_on_any_denoiser_is_what_peft_computes(kind):
    pipe, expected = pipelines.make(kind), pipelines.make(kind)
    denoiser = next(iter(denoisers(expected).values()))
    add_lora(denoiser, 2)
    torch.manual_seed(3)
    for name, parameter in denoiser.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.2)
    lora = LoraLayers.from_model(denoiser)
    head, adapter = pipelines.head_for(pipe)
    noise = torch.randn(2, 3, 4, generator=generator(5))
    attach(expected, head, adapter)
    heads = Heads(pipe)
    heads.add("default", Attached(head, adapter, 1.0, lora))
    pipe._attached_heads = heads
    found = []
    for each in (pipe, expected):
        with intervene(each, "a", noise=noise):
            found.append(pipelines.result(each(**pipelines.call(kind))))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    without = pipelines.make(kind)
    attach(without, head, adapter)
    with intervene(without, "a", noise=noise):
        alone = pipelines.result(without(**pipelines.call(kind)))
    assert (alone - found[0]).abs().max().item() > 1e-3


def test_lora_beside_lora_of_the_pipeline(tmp_path):
    """PEFT puts its layers in the place of those that ours has its hooks on."""
    model, pipe = with_lora("conditional"), plain_pipeline("conditional", tmp_path)
    attach(pipe, model)
    alone = under(pipe, "a")
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    )
    styled, both = generate(pipe), under(pipe, "a")
    assert (both - alone).abs().max() > 1e-4 and (both - styled).abs().max() > 1e-3
    pipe.unet.delete_adapters("default")
    pipe.unet.unload_lora()
    torch.testing.assert_close(under(pipe, "a"), alone, rtol=1e-4, atol=1e-4)


def test_a_model_on_the_pipelines_own_denoiser_has_its_lora_in_place(tmp_path):
    model = with_lora("conditional")
    pipe = stable_diffusion(model, tmp_path)
    attach(pipe, model)
    assert pipe._attached_heads.attached["default"].lora is None


def test_lora_for_another_denoiser(tmp_path):
    model, pipe = with_lora("dit"), plain_pipeline("dit", tmp_path)
    model.save_pretrained(tmp_path / "saved", save_base=False)
    config = dict(pipe.transformer.config) | {"num_layers": 2, "out_channels": 4}
    pipe.transformer = type(pipe.transformer).from_config(config)
    with pytest.raises(
        ValueError,
        match="the LoRA of this head does not fit this DiTTransformer2DModel: its proj_out_2",
    ):
        attach(pipe, tmp_path / "saved")
    assert type(pipe) is DiTPipeline
    (tmp_path / "saved" / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(OSError, match="the LoRA of .* has no whole weights"):
        attach(pipe, tmp_path / "saved")


@pytest.mark.parametrize("part", ["", "adapter", "lora"])
def test_weights_that_are_not_finite(part, tmp_path):
    model, pipe = with_lora("dit"), plain_pipeline("dit", tmp_path)
    model.save_pretrained(tmp_path / "saved", save_base=False)
    file = next((tmp_path / "saved" / part).glob("*.safetensors"))
    weights = {name: value * float("nan") for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the weights of the .* are not finite"):
        attach(pipe, tmp_path / "saved")
    assert type(pipe) is DiTPipeline and not hasattr(pipe, "_attached_heads")


def test_subfolder_variant_and_precision(tmp_path):
    pipe = stable_diffusion(with_head("conditional"), tmp_path)
    model = with_head("conditional", seed=1)
    model.half().save_pretrained(tmp_path / "half" / "inside", variant="fp16", save_base=False)
    for options in (
        {},
        {"subfolder": "inside"},
        {"subfolder": "elsewhere", "variant": "fp16"},
        {"subfolder": ".."},
    ):
        with pytest.raises(OSError):
            attach(pipe, tmp_path / "half", **options)
    attach(pipe, tmp_path / "half", subfolder="inside", variant="fp16")
    attached = pipe._attached_heads.attached["default"]
    assert attached.head.dtype == attached.adapter.dtype == torch.float32
    full = under(pipe, "a")
    detach(pipe)
    attach(pipe, tmp_path / "half", subfolder="inside", variant="fp16", torch_dtype=torch.float16)
    attached = pipe._attached_heads.attached["default"]
    assert attached.head.dtype == attached.adapter.dtype == torch.float16
    torch.testing.assert_close(under(pipe, "a"), full, rtol=0.05, atol=0.05)
    for options in ({"subfolder": "x"}, {"variant": "fp16"}, {"torch_dtype": torch.float16}):
        with pytest.raises(
            ValueError, match="says how to load a head, and this one is loaded already"
        ):
            attach(pipe, model, name="other", **options)
    for option, value in (("subfolder", 5), ("variant", ""), ("variant", 5), ("name", ["a"])):
        with pytest.raises(TypeError, match=f"{option} must be a text"):
            attach(pipe, tmp_path / "half", **{option: value})
    with pytest.raises(ValueError, match="adapter goes with a head that is loaded already"):
        attach(pipe, tmp_path / "half", adapter=model.base.adapter)
    with pytest.raises(TypeError, match="torch_dtype must be a type"):
        attach(pipe, tmp_path / "half", torch_dtype="half")
    with pytest.raises(TypeError, match=r"attach\(\) takes no nonsense"):
        attach(pipe, tmp_path / "half", nonsense=1)


def test_from_pretrained_takes_a_subfolder_and_refuses_what_it_cannot_do(tmp_path):
    outer, inside = with_head("unet"), with_head("unet", seed=1)
    outer.save_pretrained(tmp_path)
    inside.save_pretrained(tmp_path / "x")
    loaded = InterventionModel.from_pretrained(tmp_path, subfolder="x")
    for part in ("head", "base.adapter", "base.model"):
        wanted = inside.get_submodule(part).state_dict()
        assert all(
            torch.equal(value, wanted[name])
            for name, value in loaded.get_submodule(part).state_dict().items()
        )
    with pytest.raises(TypeError, match="takes no output_loading_info"):
        InterventionModel.from_pretrained(tmp_path, output_loading_info=True)
    with pytest.raises(OSError, match="has no sub-folder 'y'"):
        InterventionModel.from_pretrained(tmp_path, subfolder="y")
    for name in ("device_map", "quantization_config", "ignore_mismatched_sizes", "config", "nope"):
        with pytest.raises(TypeError, match=f"takes no {name}, which would reach the head alone"):
            InterventionModel.from_pretrained(tmp_path, **{name: "auto"})
    with pytest.raises(TypeError, match="reads safetensors only"):
        InterventionModel.from_pretrained(tmp_path, use_safetensors=False)
    usual = {"use_safetensors": True, "trust_remote_code": True, "low_cpu_mem_usage": True}
    InterventionModel.from_pretrained(tmp_path, **usual)


def test_a_pipeline_is_read_from_a_subfolder_or_not_at_all(tmp_path):
    outer, inside = with_head("dit"), with_head("dit", seed=1)
    for model, folder in ((outer, tmp_path), (inside, tmp_path / "x")):
        InterventionPipeline.from_model(model).save_pretrained(folder)
    loaded = InterventionPipeline.from_pretrained(tmp_path, subfolder="x")
    wanted = inside.head.state_dict()
    assert all(torch.equal(v, wanted[name]) for name, v in loaded.head.state_dict().items())
    with pytest.raises(OSError, match="has no sub-folder 'y'"):
        InterventionPipeline.from_pretrained(tmp_path, subfolder="y")


@pytest.mark.parametrize("name", ["revision", "variant", "torch_dtype"])
def test_a_base_is_loaded_with_what_it_can_be_told(name):
    with pytest.raises(TypeError, match=rf"load_base\(\) takes no {name}: leave it out"):
        load_base("nowhere", 16, **{name: "x"})


# Whether the denoiser is the one that the head was trained on


@pytest.fixture
def trained(tmp_path):
    """A pipeline in a folder, and in another the head that was trained on its denoiser."""
    unet, parts = make("conditional")
    unet.save_pretrained(tmp_path / "unet")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    model = with_head("conditional")
    model = InterventionModel.build(
        type(model.base)(unet, **parts), ["a", "b"], noise_width=4, initializer_range=0.5
    ).eval()
    for parameter in model.base.adapter.projections.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "head")
    assert not (tmp_path / "head" / "base").exists()

    def pipeline():
        pipe = stable_diffusion(model, tmp_path)
        pipe.unet = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
        return pipe

    return pipeline, tmp_path / "head"


ADDED = {
    "as it is": lambda pipe: None,
    "fused projections": lambda pipe: pipe.fuse_qkv_projections(),
    "a LoRA": lambda pipe: pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
    ),
    "bfloat16": lambda pipe: pipe.unet.to(torch.bfloat16),
    "FreeU": lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "another layout in memory": lambda pipe: pipe.unet.to(memory_format=torch.channels_last),
    "a layer of somebody's": lambda pipe: setattr(pipe.unet, "mine", torch.nn.Linear(2, 2)),
    "a processor with weights": lambda pipe: pipe.unet.set_attn_processor(
        {name: _WithWeights(processor) for name, processor in pipe.unet.attn_processors.items()}
    ),
}


class _WithWeights(torch.nn.Module):
    """A processor as an IP-Adapter puts it there."""

    def __init__(self, processor):
        super().__init__()
        self.processor, self.to_k_ip = processor, torch.nn.Linear(2, 2)

    def forward(self, *args, **options):
        return self.processor(*args, **options)

    __call__ = forward


@pytest.mark.parametrize("what", ADDED)
@pytest.mark.filterwarnings(
    "error:this UNet2DConditionModel is not:UserWarning", "error:whether this:UserWarning"
)
def test_what_is_added_to_a_denoiser_does_not_make_it_another_one(what, trained):
    pipeline, folder = trained
    pipe = pipeline()
    ADDED[what](pipe)
    attach(pipe, folder)


UNREADABLE = {
    "offloaded": lambda pipe, tmp_path: accelerate.cpu_offload(pipe.unet, "cpu"),
    "in 8 bits": lambda pipe, tmp_path: pipe.unet.enable_layerwise_casting(
        torch.float8_e4m3fn, torch.float32
    ),
    "quantised by torch": lambda pipe, tmp_path: torch.ao.quantization.quantize_dynamic(
        pipe.unet, {torch.nn.Linear}, inplace=True
    ),
    "computed from parts": lambda pipe, tmp_path: weight_norm(pipe.unet.conv_in),
    "on disk": lambda pipe, tmp_path: pipe.unet.enable_group_offload(
        torch.device("cpu"),
        torch.device("cpu"),
        "leaf_level",
        offload_to_disk_path=str(tmp_path / "disk"),
    ),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_weights_that_cannot_be_read(what, trained, tmp_path):
    pipeline, folder = trained
    pipe = pipeline()
    UNREADABLE[what](pipe, tmp_path)
    with pytest.warns(UserWarning, match="cannot be told: its weights are offloaded"):
        attach(pipe, folder)
    change = (under(pipe, "a").float() - generate(pipe).float()).abs().max().item()
    assert change > 1e-3


@pytest.mark.parametrize("what", [*ADDED, *UNREADABLE])
@pytest.mark.filterwarnings("ignore:whether this:UserWarning")
def test_a_base_of_ones_own(what, trained, tmp_path):
    """Saved with the head, as after fine-tuning: the same weights pass, whatever was added, and
    other weights are refused."""
    pipeline, folder = trained
    model = InterventionModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "own", save_base=True)
    pipe = pipeline()
    if what in ADDED:
        ADDED[what](pipe)
    else:
        UNREADABLE[what](pipe, tmp_path)
    attach(pipe, tmp_path / "own")
    if what in ADDED:
        other = pipeline()
        other.unet.conv_in.bias.data += 1.0
        ADDED[what](other)
        with pytest.raises(
            ValueError, match="has a base of its own, which is not the denoiser of this pipeline"
        ):
            attach(other, tmp_path / "own")


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_a_base_of_ones_own_in_half_precision(precision, tmp_path):
    """Saved in half precision, attached to the pipeline that it was made of in float32."""
    model = with_head("conditional").to(precision)
    model.save_pretrained(tmp_path / "own", variant="half", save_base=True)
    pipe, other = (stable_diffusion(with_head("conditional"), tmp_path) for _ in range(2))
    attach(pipe, tmp_path / "own", variant="half")
    other.unet.conv_in.bias.data += 0.1
    with pytest.raises(ValueError, match="has a base of its own"):
        attach(other, tmp_path / "own", variant="half")


def test_a_pipeline_in_a_subfolder(tmp_path):
    model = with_head("conditional")
    InterventionPipeline.from_model(model).save_pretrained(tmp_path / "saved" / "inside")
    pipe = stable_diffusion(with_head("conditional"), tmp_path)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    attach(pipe, tmp_path / "saved", subfolder="inside")
    under(pipe, "a")


@pytest.mark.parametrize("kind", ["sdxl", "flux", "qwen", "z-image", "sana", "wan", "pix2pix"])
def test_a_head_on_a_recorded_pipeline_is_attached_to_it(kind, tmp_path):
    """Trained on a base of any pipeline, saved, attached to that pipeline, taken off again."""
    torch.manual_seed(0)
    model = InterventionModel.build(
        recorded.base(kind), ["a", "b"], noise_width=4, initializer_range=0.5
    ).eval()
    for parameter in model.base.adapter.projections.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    pipe = recorded.pipeline(kind)[0]
    before = pipelines.result(pipe(**pipelines.call(kind)))
    attach(pipe, tmp_path)
    noise, found = torch.randn(2, 3, 4, generator=generator()), []
    for head in (None, "model"):
        if head:
            attach(pipe, model, name=head)
        with intervene(pipe, [["a"], ["b"]], head=head or "default", noise=noise):
            found.append(pipelines.result(pipe(**pipelines.call(kind))))
    assert torch.equal(*found) and (found[0] - before).abs().max().item() > 1e-3
    detach(pipe)
    assert torch.equal(pipelines.result(pipe(**pipelines.call(kind))), before)
