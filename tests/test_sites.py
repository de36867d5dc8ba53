"""Where a vector enters a denoiser: the rule, its exceptions, and the shapes of what it is added
to."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import nn

from hf_intervene.bases.sites import Sites, check_moves, find_sites, spread


# Class -> site and width at the class's own defaults, read in diffusers' source. One block of each
# is enough.
KNOWN = {
    "AuraFlowTransformer2DModel": ("time_step_proj", 3072),
    "BriaFibo2Transformer2DModel": ("t_embedder", 256),
    "BriaTransformer2DModel": ("time_embed.timestep_embedder", 3072),
    "ChromaTransformer2DModel": ("distilled_guidance_layer", 3072),
    "CogView4Transformer2DModel": ("time_condition_embed.timestep_embedder", 512),
    "Flux2Transformer2DModel": ("time_guidance_embed.timestep_embedder", 6144),
    "FluxTransformer2DModel": ("time_text_embed", 3072),
    "HunyuanImageTransformer2DModel": ("time_guidance_embed.timestep_embedder", 3584),
    "Ideogram4Transformer2DModel": ("t_embedding", 4608),
    "Kandinsky3UNet": ("time_embedding", 1536),
    "Kandinsky5Transformer3DModel": ("time_embeddings", 512),
    "Kandinsky6Transformer3DModel": ("video_time_embeddings.timestep_embedder", 1024),
    "Krea2Transformer2DModel": ("time_embed", 6144),
    "LTXVideoTransformer3DModel": ("time_embed.emb.timestep_embedder", 2048),
    "LTX2VideoTransformer3DModel": ("time_embed.emb.timestep_embedder", 4096),
    "Lumina2Transformer2DModel": ("time_caption_embed.timestep_embedder", 1024),
    "OvisImageTransformer2DModel": ("timestep_embedder", 3072),
    "PRXTransformer2DModel": ("time_in", 1792),
    "PixArtTransformer2DModel": ("adaln_single.emb.timestep_embedder", 1152),
    "QwenImageTransformer2DModel": ("time_text_embed.timestep_embedder", 3072),
    "SD3Transformer2DModel": ("time_text_embed", 1152),
    "SanaTransformer2DModel": ("time_embed.emb.timestep_embedder", 2240),
    "UNet3DConditionModel": ("time_embedding", 1280),
    "WanTransformer3DModel": ("condition_embedder.time_embedder", 5120),
    "ZImageTransformer2DModel": ("t_embedder", 256),
}


# The convolution that reads the sample, its channels and its stride.
INPUTS = {
    "HunyuanImageTransformer2DModel": ("x_embedder.proj", 3584, 1),
    "Kandinsky3UNet": ("conv_in", 192, 1),
    "PixArtTransformer2DModel": ("pos_embed.proj", 1152, 2),
    "SD3Transformer2DModel": ("pos_embed.proj", 1152, 2),
    "SanaTransformer2DModel": ("patch_embed.proj", 2240, 1),
    "UNet3DConditionModel": ("conv_in", 320, 1),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_classes(name):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    options = (
        {"num_layers": 1}
        if "num_layers" in getattr(diffusers, name).__init__.__wrapped__.__code__.co_varnames
        else {}
    )
    with torch.device("meta"):
        denoiser = getattr(diffusers, name)(**options)
    found = find_sites(denoiser)
    assert (found.vectors, found.vector_width) == ((KNOWN[name][0],), KNOWN[name][1])
    assert (found.input, found.input_channels, found.input_stride) == INPUTS.get(name, (None, 0, 1))


class MadeUp(nn.Module):
    """A denoiser that no library knows. Only `time.embedder` is what its blocks read."""

    def __init__(self, width=8, reaches=True):
        super().__init__()
        self.reaches = reaches
        self.proj = Timesteps(4, True, 0)
        self.blocks = nn.ModuleList([TimestepEmbedding(4, 5)])
        self.context_embedder = nn.ModuleDict({"emb": TimestepEmbedding(4, 6)})
        self.guidance_embedder = TimestepEmbedding(4, 7)
        self.time = nn.ModuleDict({"embedder": TimestepEmbedding(4, width)})

    def forward(self, x, t):
        e = self.time["embedder"](self.proj(t))
        return x * e.mean(-1, keepdim=True) if self.reaches else x


def test_a_class_that_nobody_knows():
    denoiser, x, t = MadeUp(), torch.ones(2, 3), torch.tensor([1.0, 2.0])
    sites = find_sites(denoiser)
    assert sites == Sites(("time.embedder",), 8)
    check_moves(denoiser, sites, lambda: denoiser(x, t))
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_the_check_changes_nothing_for_another_thread():
    denoiser, x, t = MadeUp(), torch.ones(2, 3), torch.tensor([1.0, 2.0])
    with ThreadPoolExecutor(1) as elsewhere:

        def call():
            found.append(elsewhere.submit(denoiser, x, t).result())
            return denoiser(x, t)

        found = [denoiser(x, t)]
        check_moves(denoiser, find_sites(denoiser), call)
    assert len(found) == 3 and all(torch.equal(found[0], other) for other in found)


def test_a_site_that_does_not_reach_the_output_is_refused():
    denoiser = MadeUp(reaches=False)
    with pytest.raises(
        ValueError, match="time.embedder of this MadeUp does not change its prediction"
    ):
        check_moves(
            denoiser, find_sites(denoiser), lambda: denoiser(torch.ones(2, 3), torch.ones(2))
        )


def test_no_site():
    with pytest.raises(TypeError, match="a Linear has no site that a head can enter by"):
        find_sites(nn.Linear(2, 2))


@pytest.mark.parametrize("shape", [(2, 4), (2, 1, 4), (2, 3, 4), (1, 4), (1, 3, 4)])
def test_spread_adds_each_row_to_its_own(shape):
    vector, output = torch.randn(2, 4), torch.randn(shape, dtype=torch.float64)
    found = output + spread(vector, output)
    assert found.dtype == torch.float64
    for row in range(2):
        expected = output[row % shape[0]] + vector[row].double()
        torch.testing.assert_close(found[row], expected)


def test_spread_over_several_times_a_sample():
    vector = torch.randn(2, 4)
    found = spread(vector, torch.zeros(6, 4))
    assert torch.equal(found, vector[[0, 0, 0, 1, 1, 1]])


@pytest.mark.parametrize("shape", [(3, 4), (2, 5)])
def test_spread_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="another number of samples than of times"):
        spread(torch.zeros(2, 4), torch.zeros(shape))
