"""Pretrained diffusers autoencoders under a head: every family, what is saved of them, LoRA, and
the trainer's regimes on them.
"""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    VQModel,
)
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_intervene import InterventionModel, InterventionPipeline, trainer, wrap_base
from hf_intervene.bases import AutoencoderBase
from hf_intervene.bases.hashes import weight_hash
from hf_intervene.bases.lora import add_lora
from hf_intervene.trainer import TrainArguments
from hf_intervene.trainer.command import main


CONCEPTS = ["a", "b"]
KL_BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
DC_BLOCKS = {
    f"{side}_{key}": value
    for side in ("encoder", "decoder")
    for key, value in {
        "block_types": "ResBlock",
        "block_out_channels": (8, 8, 16),
        "layers_per_block": (1, 1, 1),
        "qkv_multiscales": ((), (), ()),
    }.items()
}
VIDEO = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False],
}
VIDEO |= {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.1, 2.0]}
FAMILIES = {
    "kl": lambda: AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, shift_factor=0.1, **KL_BLOCKS
    ),
    "asymmetric": lambda: AsymmetricAutoencoderKL(
        down_block_out_channels=(8, 16),
        up_block_out_channels=(8, 16),
        latent_channels=4,
        **KL_BLOCKS,
    ),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ),
    "vq": lambda: VQModel(
        block_out_channels=(8, 16), latent_channels=3, num_vq_embeddings=16, **KL_BLOCKS
    ),
    "dc": lambda: AutoencoderDC(latent_channels=4, scaling_factor=0.4, **DC_BLOCKS),
    "flux2": lambda: diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), layers_per_block=1, latent_channels=4, **KL_BLOCKS
    ),
    "hunyuan-image": lambda: diffusers.AutoencoderKLHunyuanImage(
        3,
        3,
        4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=16,
    ),
    "kvae": lambda: diffusers.AutoencoderKLKVAE(
        channels=64,
        num_enc_blocks=1,
        num_dec_blocks=1,
        z_channels=4,
        ch_mult=(1, 1),
        sample_size=16,
    ),
    "qwen-image": lambda: diffusers.AutoencoderKLQwenImage(**VIDEO),
    "wan": lambda: diffusers.AutoencoderKLWan(**VIDEO),
    "rae": lambda: diffusers.AutoencoderRAE(
        encoder_hidden_size=64,  # it has a head for each 64
        encoder_patch_size=4,
        encoder_num_hidden_layers=1,
        decoder_hidden_size=8,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
        patch_size=4,
        encoder_input_size=16,
        noise_tau=0.5,
        scaling_factor=0.5,
        latents_mean=torch.full((1, 64, 4, 4), 0.1).tolist(),
        latents_std=torch.full((1, 64, 4, 4), 2.0).tolist(),
    ),
}


@pytest.fixture(params=FAMILIES)
def pretrained(request, tmp_path):
    """A model of each family, saved and loaded as a user would, and its folder."""
    return saved(request.param, tmp_path)


def saved(family, tmp_path):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    model.save_pretrained(tmp_path / "pretrained")
    return type(model).from_pretrained(tmp_path / "pretrained")


def build(model, size=16, **head):
    torch.manual_seed(1)
    head = {"noise_width": 4, "concept_width": 3, "initializer_range": 0.5} | head
    return InterventionModel.build(wrap_base(model, sample_size=size), CONCEPTS, **head).eval()


def sample(model):
    return model.sample(["a", "b"], num_images=2, generator=torch.Generator().manual_seed(0))


def train_a_little(model):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(
            torch.rand(3, *model.base.image_shape), model.targets([["a"], ["a", "b"], None])
        ).loss.backward()
        untouched = [
            name for name, p in model.named_parameters() if p.requires_grad and p.grad is None
        ]
        assert untouched == []  # or several processes would wait for gradients that never come
        optimizer.step()


def test_a_head_on_every_family(pretrained):
    model = build(pretrained)
    assert isinstance(model.base, AutoencoderBase)
    x, s = torch.rand(3, 3, 16, 16), model.targets([["a"], ["a", "b"], None])
    noise = torch.randn(3, *model.noise_shape)
    out = model(x, s, noise=noise)
    e = model.embed(out.posterior_mean + (0.5 * out.posterior_logvar).exp() * noise, s)
    decoded = model.base._pixels(model.base._asked_for(e))  # not clamped, as an image is
    normal = torch.distributions.Normal(decoded, (0.5 * model.base.adapter.log_variance).exp())
    torch.testing.assert_close(
        out.reconstruction_loss, -normal.log_prob(x).flatten(1).sum(1), rtol=1e-4, atol=1e-2
    )
    torch.testing.assert_close(model.base.generate(e, {}), decoded.clamp(0, 1))
    model.base.trainable(True)
    train_a_little(model)


def test_scale_and_shift_are_those_of_the_model(tmp_path):
    vae = saved("kl", tmp_path)
    base = wrap_base(vae, sample_size=16)
    seen = []
    base.adapter.network.encoder.register_forward_pre_hook(
        lambda module, args: seen.append(args[0])
    )
    x = torch.rand(2, 3, 16, 16)
    base.encode(x)
    latents = vae.encode(2 * x - 1).latent_dist.mean
    torch.testing.assert_close(seen[0], (latents - 0.1) * vae.config.scaling_factor)
    e = torch.randn(2, *base.embedding_shape)
    expected = vae.decode(base.adapter.network.decoder(e) / vae.config.scaling_factor + 0.1).sample
    torch.testing.assert_close(base.generate(e, {}), (expected / 2 + 0.5).clamp(0, 1))


def test_a_video_autoencoder_gets_an_image_as_one_frame(tmp_path):
    """With the statistics of its channels, as the pipelines of Qwen-Image and Wan scale their
    latents.
    """
    vae = saved("wan", tmp_path).eval()
    base = wrap_base(vae, sample_size=16)
    x = torch.rand(2, 3, 16, 16)
    mean, deviation = (
        torch.tensor(VIDEO[f"latents_{name}"])[:, None, None] for name in ("mean", "std")
    )
    frame = vae.encode((2 * x - 1)[:, :, None]).latent_dist.mean[:, :, 0]
    torch.testing.assert_close(base._latent_posterior(x)[0], (frame - mean) / deviation)
    torch.testing.assert_close(
        base._pixels((frame - mean) / deviation),
        vae.decode(frame[:, :, None]).sample[:, :, 0] / 2 + 0.5,
    )


def test_a_representation_autoencoder_has_its_own_range_and_scale(tmp_path):
    """AutoencoderRAE takes and returns pixels in [0, 1] and scales its latents itself, without the
    noise of its training.
    """
    rae = saved("rae", tmp_path)
    base = wrap_base(rae, sample_size=16).train()
    x = torch.rand(2, 3, 16, 16)
    latents = rae.eval().encode(x).latent
    base.train()
    torch.testing.assert_close(base._latent_posterior(x)[0], latents)
    torch.testing.assert_close(
        base._pixels(latents), rae.decode(latents).sample, rtol=1e-4, atol=1e-5
    )


def test_a_frozen_base_is_not_saved_but_known_by_its_hash(pretrained, tmp_path):
    model = build(pretrained)
    model.base.trainable(False)
    before = weight_hash(pretrained)
    train_a_little(model.train())
    assert weight_hash(pretrained) == before
    model.eval().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "base").exists()
    assert (
        sum(file.stat().st_size for file in (tmp_path / "model").rglob("*") if file.is_file()) < 5e6
    )
    loaded = InterventionModel.from_pretrained(tmp_path / "model")
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    torch.testing.assert_close(sample(loaded), sample(model), rtol=0, atol=1e-5)
    # With a base at hand, and with one that is not the one the head was trained on.
    copy = type(pretrained).from_pretrained(tmp_path / "pretrained")
    torch.testing.assert_close(
        sample(InterventionModel.from_pretrained(tmp_path / "model", base=copy)), sample(model)
    )
    with torch.no_grad():
        next(copy.parameters()).view(-1)[0] += 1
    with pytest.raises(ValueError, match="is not the base that the head was trained on"):
        InterventionModel.from_pretrained(tmp_path / "model", base=copy)
    copy.save_pretrained(tmp_path / "pretrained")
    with pytest.raises(ValueError, match="is not the base that the head was trained on"):
        InterventionModel.from_pretrained(tmp_path / "model")
    (tmp_path / "pretrained").rename(tmp_path / "moved")
    with pytest.raises(OSError, match="cannot be loaded .* pass base="):
        InterventionModel.from_pretrained(tmp_path / "model")


def test_no_other_base_is_taken_for_a_frozen_one(tmp_path):
    model = build(saved("tiny", tmp_path))
    model.save_pretrained(tmp_path / "model", save_base=True)
    with pytest.raises(FileExistsError, match="holds the base of another model"):
        model.save_pretrained(tmp_path / "model")


def test_a_changed_base_is_saved_whole(pretrained, tmp_path):
    model = build(pretrained)
    model.base.trainable(True)
    train_a_little(model.train())
    model.eval().save_pretrained(tmp_path / "model")
    plain = type(pretrained).from_pretrained(tmp_path / "model" / "base")  # plain diffusers
    assert weight_hash(plain) == weight_hash(pretrained)
    torch.testing.assert_close(
        sample(InterventionModel.from_pretrained(tmp_path / "model")),
        sample(model),
        rtol=0,
        atol=1e-5,
    )


def test_lora_is_saved_as_peft_does(pretrained, tmp_path):
    before = weight_hash(pretrained)
    model = build(pretrained, lora_rank=2)
    add_lora(pretrained, 2)
    assert {name for name, p in pretrained.named_parameters() if p.requires_grad} == {
        name for name, _ in pretrained.named_parameters() if ".lora_" in name
    }
    train_a_little(model.train())
    assert weight_hash(pretrained) == before
    model.eval().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model" / "base").exists()
    loaded = InterventionModel.from_pretrained(tmp_path / "model")
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    images = sample(model)
    torch.testing.assert_close(sample(loaded), images, rtol=0, atol=1e-5)
    # Plain PEFT on a plain base gives the same images; so does a pipeline, whose base is a plain
    # model again.
    plain = type(pretrained).from_pretrained(tmp_path / "pretrained")
    PeftModel.from_pretrained(plain, tmp_path / "model" / "lora")
    by_peft = InterventionModel(
        model.config, wrap_base(plain, adapter=model.base.adapter), model.head
    ).eval()
    torch.testing.assert_close(sample(by_peft), images, rtol=0, atol=1e-5)
    InterventionPipeline.from_model(model).save_pretrained(tmp_path / "pipeline")
    pipe = InterventionPipeline.from_pretrained(tmp_path / "pipeline")
    assert not any(".lora_" in name for name in pipe.base.state_dict())
    torch.testing.assert_close(sample(pipe.model), images, rtol=0, atol=1e-4)
    assert torch.equal(sample(model), images)  # making the pipeline left the model as it was


@pytest.mark.parametrize("family", ["kl", "dc"])
@pytest.mark.parametrize("regime", ["frozen", "fine-tune", "end-to-end", "lora"])
def test_regimes_from_the_trainer(tiny, tmp_path, family, regime):
    saved(family, tmp_path)
    settings = tiny | {
        "base": str(tmp_path / "pretrained"),
        "max_steps": 6,
        "eval_every": 3,
        "lora_rank": 2,
    }
    result = trainer.train(TrainArguments(**settings | {"regime": regime}))
    folder = Path(result.model_dir)
    assert (folder / "base").exists() == (regime in ("fine-tune", "end-to-end"))
    assert (folder / "lora").exists() == (regime == "lora")
    images = InterventionModel.from_pretrained(folder).sample(["quad1", "size"], num_images=2)
    assert images.shape == (2, 3, 16, 16) and images.isfinite().all()


@pytest.mark.parametrize("regime", ["frozen", "lora"])
def test_a_base_out_of_a_pipelines_folder(tiny, tmp_path, monkeypatch, regime):
    saved("kl", tmp_path / "pipeline")
    (tmp_path / "pipeline" / "pretrained").rename(tmp_path / "pipeline" / "vae")
    monkeypatch.chdir(tmp_path)
    settings = tiny | {
        "base": "pipeline",
        "base_subfolder": "vae",
        "max_steps": 4,
        "lora_rank": 2,
        "regime": regime,
    }
    folder = trainer.train(TrainArguments(**settings)).model_dir
    monkeypatch.chdir("/")  # a relative path is known again from elsewhere
    assert InterventionModel.from_pretrained(folder).sample("size", 2).shape == (2, 3, 16, 16)


def test_lora_is_not_lost(tmp_path):
    vae = saved("kl", tmp_path)
    model = build(vae)  # without lora_rank
    add_lora(vae, 2)
    train_a_little(model.train())
    model.eval().save_pretrained(tmp_path / "model")
    fresh = AutoencoderKL.from_pretrained(tmp_path / "pretrained")
    loaded = InterventionModel.from_pretrained(tmp_path / "model", base=fresh)
    torch.testing.assert_close(sample(loaded), sample(model), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="carries LoRA layers of another head"):
        InterventionModel.from_pretrained(tmp_path / "model", base=fresh)
    file = tmp_path / "model" / "lora" / "adapter_model.safetensors"
    weights = load_file(file)
    weights.pop(next(iter(weights)))
    save_file(weights, file)
    with pytest.raises(
        OSError, match="the LoRA of .* does not fit the base: weights of .* are missing"
    ):
        InterventionModel.from_pretrained(tmp_path / "model")


def test_lora_on_a_frozen_base_is_one_sentence(tmp_path):
    vae = saved("kl", tmp_path).requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=(
            "this AutoencoderKL has no linear map or convolution that is not frozen: thaw it before"
        ),
    ):
        add_lora(vae, 2)
    assert not hasattr(vae, "peft_config")


@pytest.mark.parametrize("regime", ["frozen", "fine-tune", "end-to-end"])
def test_an_ablation_without_a_head_trains_the_posterior_it_has(tiny, tmp_path, regime):
    saved("kl", tmp_path)
    base = {
        "base": str(tmp_path / "pretrained"),
        "ablation": "base-pooled",
        "regime": regime,
        "output_dir": str(tmp_path / "run"),
    }
    before = trainer.build_model(
        TrainArguments(**tiny | base), trainer.load_data(TrainArguments(**tiny | base))[0]
    )
    after = InterventionModel.from_pretrained(
        trainer.train(TrainArguments(**tiny | base)).model_dir
    )
    assert not torch.equal(
        before.base.adapter.network.quant.weight, after.base.adapter.network.quant.weight
    )


def test_what_does_not_fit(tmp_path, tiny, capsys):
    vae = saved("kl", tmp_path)
    with pytest.raises(
        ValueError,
        match="the adapter is for 4 x 8.2 latents, but this AutoencoderKL makes 4 x 16.2",
    ):
        wrap_base(vae, sample_size=32, adapter=wrap_base(vae, sample_size=16).adapter)
    with pytest.raises(ValueError, match="does not say what size of image"):
        wrap_base(FAMILIES["tiny"]())
    assert (
        main(
            [
                word
                for key, value in (tiny | {"regime": "lora"}).items()
                for word in options(key, value)
            ]
        )
        == 1
    )
    assert "regime lora needs a pretrained base" in capsys.readouterr().err
    with pytest.raises(ValueError, match="regime frozen needs a pretrained base"):
        TrainArguments(**tiny | {"regime": "frozen"})


def options(key, value):
    return [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
