"""Base and head together: the objective, sampling, editing, saving."""

import numpy as np
import pytest
import torch
from conftest import generator
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from PIL import Image

from hf_intervene import Base, Encoded, InterventionModel, LightVAE, register_base, wrap_base


CONCEPTS = ["a", "b"]


def tiny_vae(size=16, channels=3, norm="group", seed=0):
    torch.manual_seed(seed)
    return LightVAE(
        channels, size, block_out_channels=(8, 8), hidden_width=16, latent_width=12, norm=norm
    )


def tiny_model(ablation=None, norm="group", seed=0, **head):
    base = tiny_vae(norm=norm, seed=seed)
    head = {"noise_width": 4, "concept_width": 3, "initializer_range": 0.5} | head
    return InterventionModel.build(base, CONCEPTS, ablation=ablation, **head)


@pytest.mark.parametrize(("size", "channels"), [(28, 1), (32, 3), (64, 3), (30, 3)])
def test_light_vae_returns_images_of_its_size(size, channels):
    vae = LightVAE(channels, size)
    x = torch.rand(2, channels, size, size)
    assert vae(x).sample.shape == x.shape
    assert vae.encode(x).latent_dist.mean.shape == (2, 128, 1, 1)


def test_light_vae_round_trips_through_plain_diffusers(tmp_path):
    vae = tiny_vae(norm="batch").eval()
    vae.save_pretrained(tmp_path)
    loaded = LightVAE.from_pretrained(tmp_path)
    assert loaded.config.norm == "batch"
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(vae(x, generator(1)).sample, loaded(x, generator(1)).sample)


@pytest.mark.parametrize("options", [{"sample_size": 8}, {"norm": "instance"}])
def test_light_vae_refuses_what_it_cannot_build(options):
    with pytest.raises(ValueError):
        LightVAE(**options)


@pytest.mark.parametrize("ablation", [None, "base", "head-pooled"])
def test_loss_is_the_negative_elbo(ablation):
    model = tiny_model(ablation).eval()
    x, s = torch.rand(5, 3, 16, 16), model.targets([["a"], ["b"], ["a", "b"], None, {"a": 0.5}])
    noise = torch.randn(5, *model.noise_shape)
    out = model(x, s, beta=3.0, noise=noise)
    mean, logvar = model.posterior(x, s)
    z = mean + logvar.exp().sqrt() * noise
    pixels = model.decode(z, s)
    expected = -(x * pixels.log() + (1 - x) * (1 - pixels).log()).flatten(1).sum(1)
    torch.testing.assert_close(out.reconstruction_loss, expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(out.loss, (expected + 3.0 * out.kl).mean(), rtol=1e-4, atol=1e-3)
    out.loss.backward()
    untouched = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert untouched == []  # or several processes would wait for gradients that never come


def test_a_mixed_batch_equals_one_context_at_a_time():
    model = tiny_model(free_blocks=1).eval()
    contexts = [["a"], ["b"], ["a", "b"], None]
    x, s, noise = (
        torch.rand(4, 3, 16, 16),
        model.targets(contexts),
        torch.randn(4, *model.noise_shape),
    )
    together = model(x, s, noise=noise)
    for row in range(4):
        alone = model(x[row : row + 1], s[row : row + 1], noise=noise[row : row + 1])
        torch.testing.assert_close(together.reconstruction_loss[row], alone.reconstruction_loss[0])
        torch.testing.assert_close(together.kl[row], alone.kl[0])


def test_pooled_head_ignores_the_context():
    model, x = tiny_model("head-pooled").eval(), torch.rand(2, 3, 16, 16)
    noise = torch.randn(2, *model.noise_shape)
    losses = [
        model(x, model.targets(context, 2), noise=noise).loss for context in ("obs", ["a", "b"])
    ]
    assert torch.equal(*losses)
    assert torch.equal(model.sample("a", noise=noise), model.sample("obs", noise=noise))


def test_sampling_is_reproducible_and_composes_per_sample():
    model = tiny_model().eval()
    first = model.sample(["a", "b"], num_images=4, generator=generator())
    assert first.shape == (4, 3, 16, 16) and first.min() >= 0 and first.max() <= 1
    assert torch.equal(first, model.sample(["b", "a"], num_images=4, generator=generator()))
    assert not torch.equal(first, model.sample("a", num_images=4, generator=generator()))
    noise = torch.randn(3, *model.noise_shape)
    mixed = model.sample([["a"], None, ["a", "b"]], noise=noise)
    for row, context in enumerate(["a", "obs", "a+b"]):
        torch.testing.assert_close(
            mixed[row : row + 1], model.sample(context, noise=noise[row : row + 1])
        )
    torch.testing.assert_close(
        mixed, model.sample([["a"], None, ["a", "b"]], noise=noise, batch_size=2)
    )
    assert isinstance(model.sample("a", 2, output_type="pil")[1], Image.Image)


def test_fewer_images_at_once_where_they_are_large(monkeypatch):
    model, decoded = tiny_model().eval(), []
    whole = model.sample("a", 5, torch.Generator().manual_seed(0))
    for side, number in ((28, 256), (64, 256), (128, 64), (512, 4), (2048, 1)):
        monkeypatch.setattr(model.base, "image_shape", (3, side, side))
        assert model.images_at_once == number
    generate = model.base.generate
    monkeypatch.setattr(model.base, "image_shape", (3, 512, 512))
    monkeypatch.setattr(
        model.base, "generate", lambda e, *a, **k: decoded.append(len(e)) or generate(e, *a, **k)
    )
    torch.testing.assert_close(model.sample("a", 5, torch.Generator().manual_seed(0)), whole)
    assert decoded == [4, 1]


def test_edit_keeps_the_noise_and_replaces_the_targets():
    model = tiny_model().eval()
    x = torch.rand(3, 3, 16, 16)
    mean, _ = model.posterior(x, model.targets("a", 3))
    torch.testing.assert_close(
        model.edit(x, ["a", "b"], context="a"), model.sample("a+b", noise=mean)
    )
    torch.testing.assert_close(model.reconstruct(x, "a"), model.sample("a", noise=mean))


def test_images_in_every_form_are_the_same_image():
    model = tiny_model().eval()
    array = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255
    pil = [Image.fromarray(image) for image in array]
    for images in (array, tensor, pil):
        torch.testing.assert_close(model.preprocess(images), tensor)
    torch.testing.assert_close(model.preprocess(pil[0]), tensor[:1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.full((1, 3, 16, 16), float("nan")), "or are NaN"),
        (torch.full((1, 3, 16, 16), 1.5), r"in \[0, 1\]"),
        (torch.rand(1, 3, 8, 16), "3x16x16"),
        (torch.rand(1, 1, 16, 16), "3x16x16"),
        (Image.new("RGB", (17, 16)), "3x16x16"),
    ],
)
def test_bad_images(images, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().edit(images, "a")


def test_bad_noise_and_batches():
    model = tiny_model()
    with pytest.raises(ValueError, match="noise must have shape"):
        model.sample("a", noise=torch.randn(2, 3, 3))
    with pytest.raises(ValueError, match="one row per sample"):
        model.sample([["a"], None], num_images=2, noise=torch.randn(3, *model.noise_shape))
    with pytest.raises(ValueError, match="pixel_values must have shape"):
        model(torch.rand(2, 3, 8, 8), model.targets("a", 2))


@pytest.mark.parametrize("ablation", [None, "base", "base-pooled", "head-pooled"])
def test_save_and_load_is_bit_equal(tmp_path, ablation):
    model = tiny_model(ablation, norm="batch", free_blocks=1).eval()
    model.save_pretrained(tmp_path)
    loaded = InterventionModel.from_pretrained(tmp_path)
    assert loaded.config.ablation == ablation
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    sample = {"interventions": ["a", "b"], "num_images": 3}
    assert torch.equal(
        model.sample(generator=generator(), **sample),
        loaded.sample(generator=generator(), **sample),
    )
    assert all(
        path.suffix in (".json", ".safetensors", ".py")
        for path in tmp_path.rglob("*")
        if path.is_file()
    )


def test_bad_checkpoints(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    weights = tmp_path / "base" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match="the base of .* truncated or corrupt"):
        InterventionModel.from_pretrained(tmp_path)
    weights.write_bytes(whole)
    LightVAE(3, 16, (8, 8), hidden_width=16, latent_width=10).save_config(tmp_path / "base")
    with pytest.raises(ValueError, match="do not fit its configuration"):
        InterventionModel.from_pretrained(tmp_path)
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(OSError, match="holds no base model"):
        InterventionModel.from_pretrained(tmp_path)
    assert InterventionModel.from_pretrained(tmp_path, base=tiny_vae()).num_blocks == 3
    with pytest.raises(ValueError, match="the head was made for"):
        InterventionModel.from_pretrained(
            tmp_path, base=LightVAE(3, 16, (8, 8), hidden_width=16, latent_width=10)
        )
    with pytest.raises(NotADirectoryError, match="it is a file"):
        model.save_pretrained(weights)
    with pytest.raises(OSError):
        InterventionModel.from_pretrained(tmp_path / "nowhere")


def test_freezing_the_base_leaves_the_head():
    model = tiny_model()
    model.base.trainable(False)
    x = torch.rand(2, 3, 16, 16)
    model(x, model.targets("a", 2)).loss.backward()
    assert all(p.grad is None for p in model.base.parameters())
    assert all(p.grad is not None for p in model.head.parameters())
    model.base.trainable(True)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == {
        "base.model.quant.weight",
        "base.model.quant.bias",
    }


def test_reestimated_batch_norm_fits_prior_samples():
    model = tiny_model(norm="batch").train()
    for _ in range(20):
        x = torch.rand(32, 3, 16, 16)
        model(x, model.targets("a", 32))
    layer = model.base.model.decoder[5]
    encoder = {k: v.clone() for k, v in model.base.model.encoder.state_dict().items()}
    seen = []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.eval().reestimate_batch_norm(["obs", "a", "b"], num_batches=20, batch_size=64)
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, values.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.running_var, values.var(1), rtol=0.05, atol=1e-4)
    assert all(torch.equal(v, encoder[k]) for k, v in model.base.model.encoder.state_dict().items())
    assert not layer.training and layer.momentum == 0.1


class Toy(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, width: int = 6):
        super().__init__()
        self.down, self.up = torch.nn.Linear(48, width), torch.nn.Linear(width, 48)


def test_an_unsupported_base_and_how_to_register_it(tmp_path):
    with pytest.raises(
        TypeError,
        match="no base is registered for Toy; the supported classes are .*LightVAE.*register_base",
    ):
        wrap_base(Toy())

    @register_base(Toy)
    class ToyBase(Base):
        feature_width, embedding_shape, image_shape = 6, (6,), (3, 4, 4)

        def encode(self, pixel_values):
            return Encoded(self.model.down(pixel_values.flatten(1)), {"x": pixel_values})

        def loss(self, embedding, encoded, draws):
            error = self.generate(embedding, draws) - encoded.kept["x"]
            return {"reconstruction_loss": error.square().flatten(1).sum(1)}

        def generate(self, embedding, draws, **options):
            return self.model.up(embedding).unflatten(1, self.image_shape).clamp(0, 1)

    model = InterventionModel.build(Toy(), CONCEPTS).eval()
    model.save_pretrained(tmp_path)
    loaded = InterventionModel.from_pretrained(tmp_path)
    args = {"interventions": "a", "num_images": 2}
    assert torch.equal(
        model.sample(generator=generator(), **args), loaded.sample(generator=generator(), **args)
    )


def test_a_saved_base_of_an_unknown_class(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text().replace('"LightVAE"', '"os.system"'))
    with pytest.raises(ValueError, match="not registered"):
        InterventionModel.from_pretrained(tmp_path)
