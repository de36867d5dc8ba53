"""What full-size models need: variants and shards, half precision with the base still checked, the
base's own memory options.
"""

import importlib
import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from peft import PeftModel

from hf_intervene import (
    InterventionConfig,
    InterventionHead,
    InterventionModel,
    InterventionPipeline,
    LightVAE,
    trainer,
    wrap_base,
)
from hf_intervene.bases.autoencoder import AutoencoderBase
from hf_intervene.bases.frozen import LeanConvolutions
from hf_intervene.bases.hashes import weight_hash
from hf_intervene.bases.loading import is_referenced
from hf_intervene.bases.lora import add_lora, has_lora
from hf_intervene.trainer.sections import fast_bf16
from hf_intervene.training.benchmarks import bases as benchmark


CONFIG = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "sample_size": 16,
}
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture
def vae(tmp_path):
    """A pretrained autoencoder in `tmp_path / "vae"`, loaded as a user would."""
    torch.manual_seed(0)
    AutoencoderKL(**CONFIG).save_pretrained(tmp_path / "vae")
    return AutoencoderKL.from_pretrained(tmp_path / "vae")


def build(base, **options):
    torch.manual_seed(1)
    options = {"noise_width": 4, "concept_width": 3, "initializer_range": 0.5} | options
    return InterventionModel.build(base, ["a", "b"], **options).eval()


def sample(model):
    return model.sample(["a", "b"], num_images=2, generator=torch.Generator().manual_seed(0))


def files(folder):
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.suffix != ".md" and path.is_file()
    )


# Saving and loading


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_variants_and_shards(vae, tmp_path, dtype, max_shard_size):
    variant = {FP16: "fp16", BF16: "bf16"}[dtype]
    model = build(vae).to(dtype)
    folder = tmp_path / "model"
    model.save_pretrained(folder, save_base=True, variant=variant, max_shard_size=max_shard_size)
    weights = [name for name in files(folder) if name.endswith(".safetensors")]
    assert all(f".{variant}" in name for name in weights)
    sharded = {(folder / name).parent.name for name in weights if "-00002-of-" in name}
    assert sharded == ({"model", "adapter", "base"} if max_shard_size == "20KB" else set())
    # Plain diffusers and transformers read the parts, and so does the whole.
    options = {"variant": variant, "torch_dtype": dtype}
    assert weight_hash(AutoencoderKL.from_pretrained(folder / "base", **options)) == weight_hash(
        vae
    )
    assert weight_hash(
        InterventionHead.from_pretrained(folder, variant=variant, dtype=dtype)
    ) == weight_hash(model.head)
    assert torch.equal(sample(InterventionModel.from_pretrained(folder, **options)), sample(model))
    with pytest.raises(
        OSError,
        match=(
            "the base of .* no whole weights in safetensors format"
            " .diffusion_pytorch_model.safetensors missing"
        ),
    ):
        InterventionModel.from_pretrained(folder)
    pipe = InterventionPipeline.from_model(model)
    pipe.save_pretrained(tmp_path / "pipe", variant=variant, max_shard_size=max_shard_size)
    for pipeline_class in (InterventionPipeline, DiffusionPipeline):
        loaded = pipeline_class.from_pretrained(tmp_path / "pipe", **options)
        assert torch.equal(sample(loaded.model), sample(model))


def test_saving_again_in_another_number_of_files(vae, tmp_path):
    model = build(vae)
    for max_shard_size in ("20KB", "10GB", "20KB"):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
        model.save_pretrained(tmp_path / "model", max_shard_size=max_shard_size)
        loaded = InterventionModel.from_pretrained(tmp_path / "model")
        assert torch.equal(sample(loaded), sample(model))


def test_lora_is_one_file(vae, tmp_path):
    model = build(vae, lora_rank=2)
    add_lora(vae, 2)
    model.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size="1KB")
    assert [name for name in files(tmp_path / "model") if name.startswith("lora/")] == [
        "lora/adapter_config.json",
        "lora/adapter_model.safetensors",
    ]
    assert not (tmp_path / "model" / "base").exists()
    PeftModel.from_pretrained(
        AutoencoderKL.from_pretrained(tmp_path / "vae"), tmp_path / "model" / "lora"
    )
    loaded = InterventionModel.from_pretrained(tmp_path / "model", variant="fp16", torch_dtype=BF16)
    torch.testing.assert_close(sample(loaded), sample(model), rtol=0, atol=0.05)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_loading_in_half_precision_checks_the_base(vae, tmp_path, name):
    model = build(vae)
    model.save_pretrained(tmp_path / "model")
    loaded = InterventionModel.from_pretrained(tmp_path / "model", **{name: BF16})
    assert {p.dtype for p in loaded.parameters()} == {BF16}
    images = sample(loaded)
    torch.testing.assert_close(images, sample(model), rtol=0, atol=0.05)
    assert loaded.edit(images, "a").isfinite().all()
    with torch.no_grad():
        vae.decoder.conv_out.bias[0] += 1
    vae.save_pretrained(tmp_path / "vae")
    for dtype in (torch.float32, BF16, FP16):
        with pytest.raises(ValueError, match="is not the base that the head was trained on"):
            InterventionModel.from_pretrained(tmp_path / "model", torch_dtype=dtype)
    with pytest.raises(TypeError, match="a type such as torch.bfloat16"):
        InterventionModel.from_pretrained(tmp_path / "model", torch_dtype="half")


@pytest.mark.parametrize("dtype", [torch.float32, FP16, BF16])
def test_a_base_that_is_passed_is_known_in_any_precision(vae, tmp_path, dtype):
    build(vae).save_pretrained(tmp_path / "model")
    base = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=dtype)
    loaded = InterventionModel.from_pretrained(tmp_path / "model", base=base)
    assert loaded.base.model.dtype == dtype and {loaded.head.dtype, loaded.base.adapter.dtype} == {
        torch.float32
    }
    sample(loaded)
    with torch.no_grad():
        base.decoder.conv_out.bias[0] += 1
    with pytest.raises(ValueError, match="is not the base that the head was trained on"):
        InterventionModel.from_pretrained(tmp_path / "model", base=base)


def test_a_frozen_base_cast_is_not_saved_and_a_trained_one_is(vae, tmp_path):
    build(vae).to(FP16).save_pretrained(tmp_path / "model", variant="fp16")
    assert not (tmp_path / "model" / "base").exists()
    # A head on a base in half precision, and what is trained once that is cast up: less than half
    # precision shows.
    half = AutoencoderKL.from_pretrained(tmp_path / "vae", torch_dtype=BF16)
    model = build(half)
    reference = model.config.base_reference
    model.save_pretrained(tmp_path / "half")
    for dtype in (BF16, torch.float32, FP16):
        loaded = InterventionModel.from_pretrained(tmp_path / "half", torch_dtype=dtype)
        assert loaded.base.model.dtype == dtype and is_referenced(loaded.base.model, reference)
    half.float()
    assert is_referenced(half, reference)
    with torch.no_grad():
        half.decoder.conv_in.weight.mul_(1 + 1e-5)
    assert not is_referenced(half, reference)
    assert weight_hash(half, BF16) == reference["sha256"]


def test_the_hash_is_of_everything_and_of_nothing_else(vae):
    found = weight_hash(vae)
    assert found == weight_hash(AutoencoderKL.from_pretrained(vae.config._name_or_path))
    names = list(vae.state_dict())
    for name in (names[0], names[-1]):
        value = vae.get_parameter(name)
        with torch.no_grad():
            value.view(-1)[-1] += 1
        assert weight_hash(vae) != found
        with torch.no_grad():
            value.view(-1)[-1] -= 1
    with torch.no_grad():  # two tensors of a shape swapped
        a, b = vae.decoder.conv_in.bias, vae.decoder.mid_block.resnets[0].conv1.bias
        a.data, b.data = b.data, a.data
    assert weight_hash(vae) != found


@pytest.mark.parametrize("part", [".", "adapter", "base"])
def test_truncated_and_missing_shards(vae, tmp_path, part):
    model = build(vae)
    folder = tmp_path / "model"
    model.save_pretrained(folder, save_base=True, max_shard_size="20KB")
    shard = sorted((folder / part).glob("*-00002-of-*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    what = {".": "head", "adapter": "adapter", "base": "base"}[part]
    with pytest.raises(
        OSError,
        match=(
            f"^the {what} of [^ ]*model cannot be read: its weights are truncated or corrupt; fetch"
            " it again.$"
        ),
    ):
        InterventionModel.from_pretrained(folder)
    shard.unlink()
    with pytest.raises(
        OSError,
        match=f"^the {what} of [^ ]*model has no whole weights .*{shard.name} missing.*incomplete",
    ):
        InterventionModel.from_pretrained(folder)
    shard.write_bytes(whole)
    index = next((folder / part).glob("*.index.json"))
    index.write_text(index.read_text()[:-20])
    with pytest.raises(OSError, match=f"^the {what} of [^ ]*model cannot be read"):
        InterventionModel.from_pretrained(folder)


def test_a_base_that_is_passed_stays_whole_when_loading_fails(vae, tmp_path):
    model = build(vae, lora_rank=2)
    add_lora(vae, 2)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    copy = AutoencoderKL.from_pretrained(tmp_path / "vae")
    lora = folder / "lora" / "adapter_model.safetensors"
    whole = lora.read_bytes()
    lora.write_bytes(whole[:100])
    with pytest.raises(OSError, match="the LoRA of .* cannot be read: its weights are truncated"):
        InterventionModel.from_pretrained(folder, base=copy)
    lora.write_bytes(whole)
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="the head of .* has no whole weights .*incomplete"):
        InterventionModel.from_pretrained(folder, base=copy)
    assert not has_lora(copy)


# The base's own options


def test_slicing_and_tiling_go_on_under_the_head(vae):
    model = InterventionPipeline.from_model(build(wrap_base(vae, sample_size=32))).model
    x, calls = torch.rand(3, 3, 32, 32), []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape))
    plain = model.edit(x, "a")
    assert [shape[0] for shape in calls] == [3, 3]
    calls.clear()
    vae.enable_slicing()
    torch.testing.assert_close(model.edit(x, "a"), plain)
    assert [shape[0] for shape in calls] == [1] * 6
    vae.disable_slicing()
    calls.clear()
    vae.enable_tiling()  # tiles of the 16 pixels of its configuration
    images = model.edit(x, "a")
    assert (
        images.shape == plain.shape and len(calls) > 2 and all(shape[-1] <= 16 for shape in calls)
    )
    loss = model(x, model.targets("a", 3)).loss
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [FP16, BF16])
@pytest.mark.parametrize("family", ["kl", "light"])
def test_a_base_in_half_precision_under_a_head_in_float32(vae, dtype, family):
    torch.manual_seed(0)
    base = vae if family == "kl" else LightVAE(3, 16, (8, 8), hidden_width=16, latent_width=12)
    model = build(base)
    x, s, noise = (
        torch.rand(2, 3, 16, 16),
        model.targets(["a"], 2),
        torch.randn(2, *model.noise_shape),
    )
    expected = model(x, s, noise=noise).loss.detach()
    base.to(dtype)
    model.base.trainable(False)
    output = model(x, s, noise=noise)
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss.detach(), expected, rtol=0.05, atol=0)
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.head.parameters())
    torch.testing.assert_close(model.edit(sample(model), "a").shape, x.shape)
    model.to(dtype)  # and all of it
    assert model.head.dtype == dtype and model.edit(sample(model), "a").isfinite().all()


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps inside, weights aside."""

    def __init__(self):
        self.tensors = {}
        super().__init__(self.keep, lambda tensor: tensor)

    def __enter__(self):
        super().__enter__()
        return self

    def keep(self, tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            self.tensors[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    @property
    def bytes(self):
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors.values())


def gradients(model):
    """Of every trained weight, and the bytes that autograd kept for them."""
    model.zero_grad()
    torch.manual_seed(0)
    x, noise = torch.rand(2, 3, 16, 16), torch.randn(2, *model.noise_shape)
    with Kept() as kept:
        loss = model(x, model.targets("a", 2), noise=noise).loss
    loss.backward()
    return {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }, kept.bytes


def assert_same(found, expected, tolerance=1e-4):
    """Gradients are equal up to a share of each one's norm (those of a bias in front of a norm are
    zero, up to rounding).
    """
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= tolerance * value.norm() + 1e-3, name


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing_of_the_base(vae, frozen):
    model = build(vae).train()
    model.base.trainable(not frozen)
    expected, plain = gradients(model)
    vae.enable_gradient_checkpointing()
    found, kept = gradients(model)
    assert kept < plain
    assert_same(found, expected)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_base_keeps_only_what_the_adapter_needs(vae, monkeypatch, autocast):
    model = build(vae).train()
    with torch.autocast("cpu", BF16, enabled=autocast):
        _, trained = gradients(model)
        model.base.trainable(False)
        found, kept = gradients(model)
        monkeypatch.setattr(AutoencoderBase, "_lean", lambda self: nullcontext())
        plain, kept_by_autograd = gradients(model)
    assert not any(name.startswith("base.model") for name in found)
    # Where bf16 is not computed in hardware, the two ways round in different places.
    assert_same(found, plain, (0.02 if fast_bf16() else 0.1) if autocast else 1e-4)
    assert kept < kept_by_autograd < trained
    # Of the decoder alone, at least the third of it that is inputs of convolutions; of the encoder,
    # nothing at all.
    latents = torch.rand(1, 4, 8, 8, requires_grad=True)
    with Kept() as by_autograd:
        vae.decode(latents)
    with LeanConvolutions(), Kept() as lean:
        vae.decode(latents)
    assert lean.bytes < 0.75 * by_autograd.bytes
    with Kept() as encoding:
        vae.encode(torch.rand(1, 3, 16, 16))
    assert encoding.tensors == {}


def test_lora_on_convolutions_that_keep_nothing(vae, monkeypatch):
    model = build(vae, lora_rank=2).train()
    add_lora(vae, 2)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    found, _ = gradients(model)
    monkeypatch.setattr(AutoencoderBase, "_lean", lambda self: nullcontext())
    expected, _ = gradients(model)
    assert any("lora_A" in name for name in found)
    assert_same(found, expected)


# What does not fit


def test_pipelines_of_parts_that_do_not_fit(vae):
    torch.manual_seed(0)
    light = LightVAE(3, 16, (8, 8), hidden_width=16, latent_width=12)
    head, other = build(vae).head, build(light).head
    adapter = wrap_base(vae).adapter
    with pytest.raises(
        TypeError,
        match="no base is registered for Linear; the supported classes are .*register_base",
    ):
        InterventionPipeline(torch.nn.Linear(2, 2), head)
    with pytest.raises(TypeError, match="head must be an InterventionHead, not a Linear"):
        InterventionPipeline(light, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a head on AutoencoderKL needs the adapter"):
        InterventionPipeline(vae, head)
    with pytest.raises(ValueError, match="a head on LightVAE needs no adapter"):
        InterventionPipeline(light, other, adapter)
    with pytest.raises(
        ValueError, match="the head was made for feature_width 16, but this AutoencoderKL has 128"
    ):
        InterventionPipeline(vae, other, adapter)
    with pytest.raises(
        ValueError, match="the adapter is for 4 x 16.2 latents, but this AutoencoderKL makes"
    ):
        InterventionPipeline(
            AutoencoderKL(
                **CONFIG
                | {"block_out_channels": (8, 8, 16), "latent_channels": 4, "sample_size": 32}
                | {
                    "down_block_types": ("DownEncoderBlock2D",) * 3,
                    "up_block_types": ("UpDecoderBlock2D",) * 3,
                }
            ),
            head,
            wrap_base(vae, sample_size=32).adapter,
        )


def test_pipeline_loading_with_another_head(vae, tmp_path):
    InterventionPipeline.from_model(build(vae)).save_pretrained(tmp_path / "pipe")
    other = InterventionHead(
        InterventionConfig(concepts=["a", "b"], feature_width=7, embedding_shape=[128, 1, 1])
    )
    with pytest.raises(
        ValueError, match="the head was made for feature_width 7, but this AutoencoderKL has 128"
    ):
        InterventionPipeline.from_pretrained(tmp_path / "pipe", head=other)


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        (["a", "a"], "'a' is named twice"),
        (["a", "obs"], "'obs' is reserved"),
        (["a+b"], "reserved characters"),
        (["a=1"], "reserved characters"),
        ([], "concepts is empty"),
    ],
)
def test_concepts_that_clash(vae, tmp_path, concepts, message):
    trained = [p.requires_grad for p in vae.parameters()]
    with pytest.raises(ValueError, match=message):
        InterventionModel.build(vae, concepts)
    assert [p.requires_grad for p in vae.parameters()] == trained
    build(vae).save_pretrained(tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"concepts": concepts}))
    with pytest.raises(ValueError, match=message):
        InterventionModel.from_pretrained(tmp_path / "model", base=vae)


def test_bases_and_images_that_cannot_carry_a_head(vae, tmp_path):
    for base in (torch.nn.Linear(2, 2), "path/to/vae", None):
        with pytest.raises(
            TypeError,
            match="no base is registered for .*; the supported classes are .*register_base",
        ):
            InterventionModel.build(base, ["a"])
    build(vae).save_pretrained(tmp_path / "model")
    with pytest.raises(TypeError, match="no base is registered for Linear"):
        InterventionModel.from_pretrained(tmp_path / "model", base=torch.nn.Linear(2, 2))
    for size in (15, 17, 1):  # encoded, but decoded in another size; too small to encode
        with pytest.raises(
            ValueError,
            match=f"this AutoencoderKL cannot encode images of {size} pixels: choose a multiple",
        ):
            wrap_base(vae, sample_size=size)
    for size in (0, -16, 16.0, (16, 16)):
        with pytest.raises(
            ValueError, match="sample_size must be the side of a square image in pixels"
        ):
            wrap_base(vae, sample_size=size)


# The guide's family of one's own


def test_the_family_of_the_guide(tiny, tmp_path, monkeypatch):
    guide = (Path(__file__).parents[1] / "docs" / "families.md").read_text()
    (block,) = [
        block
        for block in re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
        if "@register_base" in block
    ]
    (tmp_path / "family_of_the_guide.py").write_text(block)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("family_of_the_guide")
    module.PatchCoder(sample_size=16, width=8).save_pretrained(tmp_path / "pretrained")
    for regime in ("frozen", "lora", "end-to-end"):
        options = {
            "base": str(tmp_path / "pretrained"),
            "regime": regime,
            "output_dir": str(tmp_path / regime),
        }
        result = trainer.train(trainer.TrainArguments(**tiny | options))
        model = InterventionModel.from_pretrained(result.model_dir)
        assert type(model.base) is module.PatchCoderBase
        assert (result.model_dir / "base").exists() == (regime == "end-to-end")
        images = model.sample("quad1+size", 2, torch.Generator().manual_seed(0))
        InterventionPipeline.from_model(model).save_pretrained(tmp_path / regime / "pipe")
        pipe = InterventionPipeline.from_pretrained(tmp_path / regime / "pipe", torch_dtype=BF16)
        found = pipe("quad1+size", 2, torch.Generator().manual_seed(0), output_type="pt").images
        torch.testing.assert_close(found, images, rtol=0, atol=0.05)


# The benchmarks run


@pytest.mark.parametrize("regime", ["frozen", "lora", "fine-tune", "end-to-end"])
def test_the_full_size_step(regime):
    peak, seconds = benchmark.full_size_step(regime, CONFIG, 1, torch.device("cpu"))
    assert 0.1 < peak < 16 and seconds > 0


def test_the_load_benchmark():
    assert benchmark.load(1, CONFIG)["beyond"]["seconds"] < 60


def test_the_denoise_benchmark():
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    small = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "sample_size": 8,
        "cross_attention_dim": 12,
        **blocks,
    }
    assert benchmark.denoise(1, small)["ratio"] > 0
    with torch.device("meta"):
        unet = UNet2DConditionModel(**benchmark.STABLE_DIFFUSION_UNET)
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964  # as published
