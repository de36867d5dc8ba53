"""What enters a denoiser: each sample its own embedding, and nothing stays."""

import copy
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import generator
from diffusion_models import KINDS, make, randn, with_head

from hf_intervene import wrap_base
from hf_intervene.bases.injection import Entries, Injection, find_sites
from hf_intervene.bases.lora import add_lora, merged


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_changes_nothing(kind):
    model, parts = make(kind)
    base = wrap_base(model, **parts)
    x, t = randn(3, *base.sample_shape), torch.tensor([900, 20, 400])
    with torch.no_grad():
        plain = base._call(x, t)[:, : x.shape[1]]
        assert torch.equal(base.denoise(x, t, 10 * randn(3, *base.embedding_shape)), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_every_sample_has_its_own_embedding(kind):
    base = with_head(kind).base
    x, t, e = (
        randn(3, *base.sample_shape),
        torch.tensor([900, 20, 400]),
        randn(3, *base.embedding_shape, seed=1),
    )
    with torch.no_grad():
        together = base.denoise(x, t, e)
        alone = torch.cat(
            [base.denoise(x[i : i + 1], t[i : i + 1], e[i : i + 1]) for i in range(3)]
        )
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        other = base.denoise(x, t, e.roll(1, 0))
    assert (together - other).abs().amax((1, 2, 3)).min() > 1e-3


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("unet", "time_embedding.linear_2"), ("sd3", "time_text_embed.timestep_embedder.linear_2")],
)
def test_a_vector_is_added_to_the_time_embedding(kind, layer):
    base = with_head(kind).base
    del base.adapter.projections.input  # the vector alone
    if kind == "unet":
        del base.adapter.projections.map
    x, t, e = (
        randn(1, *base.sample_shape),
        torch.tensor([300]),
        randn(1, *base.embedding_shape, seed=1),
    )
    with torch.no_grad():
        entered = base.denoise(x, t, e)
        base.model.get_submodule(layer).bias += base.adapter.projections.vector(e)[0]
        torch.testing.assert_close(entered, base._call(x, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("unet", "conv_in"), ("conditional", "conv_in"), ("dit", "pos_embed.proj")],
)
def test_what_is_decoded_is_added_to_the_features_of_the_sample(kind, layer, monkeypatch):
    base = with_head(kind).base
    projections = base.adapter.projections
    for name in ("vector", "map"):
        if hasattr(projections, name):
            delattr(projections, name)
    for values in projections.values:
        values.weight.data.zero_()
    x, t, e = (
        randn(2, *base.sample_shape),
        torch.tensor([300, 20]),
        randn(2, *base.embedding_shape, seed=1),
    )
    with torch.no_grad():
        entered = base.denoise(x, t, e)
        features = projections.input(base.adapter.decoder(e))
        module = base.model.get_submodule(layer)
        plain = module.forward
        monkeypatch.setattr(module, "forward", lambda x: plain(x) + features)
        expected = base._call(x, t)[:, : x.shape[1]]
    torch.testing.assert_close(entered, expected, rtol=1e-4, atol=1e-5)


def test_a_sample_is_decoded_once_for_all_steps():
    model, calls = with_head("dit"), []
    model.base.adapter.decoder.register_forward_hook(lambda *_: calls.append(1))
    model.sample("a", 2, num_inference_steps=4, guidance_scale=1.0)
    assert len(calls) == 1
    model.sample("a", 2, num_inference_steps=4)
    assert len(calls) == 1 + 2  # for guidance, that of nothing too
    model.sample(["a", "b"], 2, num_inference_steps=4, compose="scores")
    assert len(calls) == 3 + 4  # a and b together, nothing, each of the two


def test_features_of_what_is_decoded_are_resized_with_the_sample():
    base = with_head("dit").base
    e = randn(1, *base.embedding_shape)
    with torch.no_grad():
        base.injection.set(base.adapter.entries(e))
        for side in (8, 12):
            x = randn(1, 4, side, side)
            plain = torch.nn.functional.conv2d(
                x, base.model.pos_embed.proj.weight, base.model.pos_embed.proj.bias, stride=2
            )
            found = base.model.pos_embed.proj(x) - plain
            features = base.adapter.entries(e).input
            size = (side // 2,) * 2
            expected = torch.nn.functional.interpolate(features, size, mode="bilinear")
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        base.injection.set(base.adapter.entries(randn(2, *base.embedding_shape)))
        frames = base.model.pos_embed.proj(torch.zeros(6, 4, 8, 8))  # three of each of two clips
        assert all(torch.equal(frames[3 * n], frames[3 * n + 2]) for n in range(2))
        assert not torch.equal(frames[0], frames[3])
    base.injection.clear()


def test_tokens_are_attended_to_beside_the_text():
    """The branch of one cross-attention layer against loops over heads and queries."""
    model, _ = make("conditional")
    injection, name = Injection(model), find_sites(model).tokens[0]
    layer = model.get_submodule(name)
    hidden, text = randn(2, 5, layer.query_dim), randn(2, 3, 12, seed=1)
    keys, values = randn(2, 4, layer.inner_dim, seed=2), randn(2, 4, layer.inner_dim, seed=3)
    with torch.no_grad():
        plain = layer(hidden, encoder_hidden_states=text)
        injection.install()
        injection.set(
            Entries(keys=(keys,) * len(injection.layers), values=(values,) * len(injection.layers))
        )
        entered = layer(hidden, encoder_hidden_states=text)
        injection.remove()
        assert torch.equal(layer(hidden, encoder_hidden_states=text), plain)
        query, width = layer.to_q(hidden), layer.inner_dim // layer.heads
        branch = torch.zeros_like(query)
        for b in range(2):
            for n in range(5):
                for h in range(layer.heads):
                    part = slice(h * width, (h + 1) * width)
                    scores = torch.stack(
                        [query[b, n, part] @ keys[b, k, part] / math.sqrt(width) for k in range(4)]
                    )
                    branch[b, n, part] = sum(
                        w * values[b, k, part] for k, w in enumerate(scores.softmax(0))
                    )
        expected = (
            plain + (layer.to_out[0](branch) - layer.to_out[0].bias) / layer.rescale_output_factor
        )
        torch.testing.assert_close(entered, expected, rtol=1e-4, atol=1e-5)


def test_entries_add_up_and_are_weighted():
    entries = with_head("conditional").base.adapter.entries(randn(2, 4, 12))
    doubled = entries.weighted(2.0)
    assert all(torch.equal(2 * a, b) for a, b in zip(entries.values, doubled.values))
    # the softmax is not a weight
    assert all(torch.equal(a, b) for a, b in zip(entries.keys, doubled.keys))
    assert torch.equal(
        entries.rows(torch.tensor([1, 1, 0])).values[0], entries.values[0][[1, 1, 0]]
    )


def test_a_copy_of_a_denoiser_does_not_keep_what_entered():
    model = with_head("unet")
    x, t, e = randn(2, 3, 16, 16), torch.tensor([5, 500]), randn(2, 128, seed=1)
    with torch.no_grad():
        plain = model.base._call(x, t)
        entered = model.base.denoise(x, t, e)
        model.base.injection.set(model.base.adapter.entries(e))
        copied = copy.deepcopy(model)
        assert torch.equal(copied.base.model(x, t).sample, plain)
        assert torch.equal(copied.base.denoise(x, t, e), entered)
    model.base.injection.clear()


@pytest.mark.parametrize("kind", ["unet", "conditional"])
def test_lora_added_later_is_entered_too(kind):
    model = with_head(kind)
    base = model.base
    x, t, e = (
        randn(2, *base.sample_shape),
        torch.tensor([5, 500]),
        randn(2, *base.embedding_shape, seed=1),
    )
    with torch.no_grad():
        entered, plain = base.denoise(x, t, e), base._call(x, t)
    add_lora(base.model, 2)
    with torch.no_grad():
        torch.testing.assert_close(base.denoise(x, t, e), entered)  # LoRA layers start at zero
        for name, parameter in base.model.named_parameters():
            parameter.data += 0.1 * (".lora_" in name)
        assert not torch.allclose(base.denoise(x, t, e), entered)
        whole = merged(base.model)
        again = wrap_base(whole, **base.companions(), adapter=base.adapter)
        torch.testing.assert_close(
            again.denoise(x, t, e), base.denoise(x, t, e), rtol=1e-4, atol=1e-5
        )
    assert not torch.equal(entered, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    model = with_head(kind)
    draws = model.posterior_draws(3, generator())
    x, s = (
        torch.rand(3, 3, 16, 16, generator=generator(1)),
        model.targets([["a"], "obs", ["a", "b"]]),
    )

    def gradients():
        model.zero_grad()
        model(x, s, **draws).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    model.train()
    model.base.model.enable_gradient_checkpointing()
    found = gradients()
    assert plain.keys() == found.keys() and any("exogenous" in name for name in plain)
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-4, msg=name)
    # Another wrapper of the same denoiser is not disturbed by what the checkpointed one has left.
    fresh = with_head(kind)
    other = wrap_base(model.base.model, **model.base.companions(), adapter=model.base.adapter)
    e = randn(3, *other.embedding_shape)
    with torch.no_grad():
        noisy, t = randn(3, *other.sample_shape), torch.tensor([3, 30, 300])
        torch.testing.assert_close(
            other.eval().denoise(noisy, t, e), fresh.base.denoise(noisy, t, e)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_denoiser(kind):
    """Each call has what it was given, whatever another thread does meanwhile."""
    model = with_head(kind)
    noise = torch.randn(4, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    residual = torch.randn(4, *model.base.sample_shape, generator=torch.Generator().manual_seed(1))

    def sample(row):
        context, part = ("obs", "a", "b", "a+b")[row], slice(row, row + 1)
        return model.sample(
            context, noise=noise[part], residual_noise=residual[part], num_inference_steps=4
        )

    expected, interval = [sample(row) for row in range(4)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(sample, list(range(4)) * 2))
    finally:
        sys.setswitchinterval(interval)
    for image, same in zip(found, expected * 2):
        torch.testing.assert_close(image, same, rtol=0, atol=1e-5)
    assert not torch.allclose(expected[0], expected[1], atol=1e-3)  # or it would not matter
