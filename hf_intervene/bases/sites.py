"""Where an embedding enters a denoiser of diffusers.

- UNets with cross-attention (`UNet2DConditionModel`) take tokens.
- All other denoisers take a vector. It is added to the output of the time embedding, which all
  their blocks read.
- `UNet2DModel` takes a map in its middle block too.
- Denoisers that read their sample by a convolution take features of the decoded embedding there.

The module of the time embedding is found by a rule, so a new class needs no code here: the
shallowest `TimestepEmbedding` that is not part of a numbered block and does not embed something
else. `_EXCEPTIONS` names the module of those classes whose time embedding is of another kind.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding
from torch import nn


@dataclass(frozen=True)
class Sites:
    """Where an embedding enters a denoiser.

    Args:
        vectors: names of the modules whose output a vector is added to; see `spread` for the shapes
        of that output.
        vector_width: width of that output; 0: there are none.
        map: name of the module whose output, (B, C, h, w), a map is added to, if there is one.
        map_channels: C.
        tokens: names of the cross-attention layers that attend to its tokens.
        token_widths: inner width of each of them.
        cross_width: width of the tokens that they attend to already, such as a text's.
        input: name of the convolution that reads the noisy sample, if there is one; its output is
            (B, C, h, w).
        input_channels, input_stride: C, and the stride of that convolution.
    """

    vectors: tuple[str, ...] = ()
    vector_width: int = 0
    map: str | None = None
    map_channels: int = 0
    tokens: tuple[str, ...] = ()
    token_widths: tuple[int, ...] = ()
    cross_width: int = 0
    input: str | None = None
    input_channels: int = 0
    input_stride: int = 1


# Class name -> the module, and the linear map in it whose `out_features` is the width of its
# output. Names, not classes: a version of diffusers that lacks a class must not fail here.
_EXCEPTIONS: dict[str, tuple[str, str]] = {
    "BriaFibo2Transformer2DModel": ("t_embedder", "mlp.2"),
    "ChromaTransformer2DModel": ("distilled_guidance_layer", "out_proj"),
    "CosmosTransformer3DModel": ("time_embed.t_embedder", "linear_2"),
    # Time and text are one sum in Flux and SD3. The whole of it is the site of the heads that are
    # there already.
    "FluxTransformer2DModel": ("time_text_embed", "timestep_embedder.linear_2"),
    "Ideogram4Transformer2DModel": ("t_embedding", "mlp_out"),
    "Kandinsky5Transformer3DModel": ("time_embeddings", "out_layer"),
    "Kandinsky6Transformer3DModel": ("video_time_embeddings.timestep_embedder", "linear_2"),
    "Krea2Transformer2DModel": ("time_embed", "linear_2"),
    "PRXTransformer2DModel": ("time_in", "out_layer"),
    "SD3Transformer2DModel": ("time_text_embed", "timestep_embedder.linear_2"),
    "WanAnimate2Transformer3DModel": ("time_embedding", "2"),
    "ZImageTransformer2DModel": ("t_embedder", "mlp.2"),
}
# Parts of the name of a `TimestepEmbedding` that embeds something else than the time of the image.
_OTHERS = (
    *(
        "guidance",
        "audio",
        "target",
        "add_",
        "resolution",
        "aspect",
        "pooled",
        "delta",
        "time_token",
    ),
    *("cond_embed", "time_pos"),
)


def find_sites(denoiser: nn.Module) -> Sites:
    """The sites of a denoiser.

    Raises:
        TypeError: one sentence: it has no site.
    """
    return replace(_conditioned(denoiser), **_input(denoiser))


def _conditioned(denoiser: nn.Module) -> Sites:
    """The sites but for that of the sample."""
    if isinstance(denoiser, UNet2DConditionModel):
        layers = {
            name: m
            for name, m in denoiser.named_modules()
            if isinstance(m, Attention) and name.endswith("attn2")
        }
        layers = {name: m for name, m in layers.items() if m.is_cross_attention}
        if layers:
            widths = tuple(m.inner_dim for m in layers.values())
            cross_width = next(iter(layers.values())).cross_attention_dim
            return Sites(tokens=tuple(layers), token_widths=widths, cross_width=cross_width)
    if isinstance(denoiser, DiTTransformer2DModel):  # each block has a time embedding of its own
        names = tuple(
            f"transformer_blocks.{i}.norm1.emb" for i in range(len(denoiser.transformer_blocks))
        )
        return Sites(names, denoiser.inner_dim)
    name, width = _time_embedding(denoiser)
    if isinstance(denoiser, UNet2DModel) and denoiser.mid_block is not None:
        return Sites((name,), width, "mid_block", denoiser.config.block_out_channels[-1])
    return Sites((name,), width)


def _input(denoiser: nn.Module) -> dict[str, Any]:
    """Name, channels and stride of the convolution that reads the sample, if there is one."""
    channels = getattr(denoiser, "config", {}).get("in_channels")
    for name, module in denoiser.named_modules():
        layer = _plain(module)
        numbered = any(part.isdigit() for part in name.split("."))
        if isinstance(layer, nn.Conv2d) and layer.in_channels == channels and not numbered:
            stride = layer.stride[0]
            return {"input": name, "input_channels": layer.out_channels, "input_stride": stride}
    return {}


def _time_embedding(denoiser: nn.Module) -> tuple[str, int]:
    """Name of the module whose output is the time embedding that all blocks read, and the width of
    that output."""
    for class_ in type(denoiser).__mro__:  # of a sub-class too
        name, linear = _EXCEPTIONS.get(class_.__name__, ("", ""))
        if name:
            try:
                return name, _plain(denoiser.get_submodule(f"{name}.{linear}")).out_features
            except AttributeError:
                break  # another version of diffusers; perhaps the rule finds it
    found = [
        (name, m)
        for name, m in denoiser.named_modules()
        if isinstance(m, TimestepEmbedding) and _is_time(name)
    ]
    if not found:
        raise TypeError(
            f"a {type(denoiser).__name__} has no site that a head can enter by: no time embedding "
            "was found that all its blocks read."
        )
    # of several that are equally deep, the first
    name, module = min(found, key=lambda item: item[0].count("."))
    return name, _plain(module.linear_2).out_features


def _is_time(name: str) -> bool:
    parts = name.split(".")
    return (
        not any(part.isdigit() for part in parts)
        and "context_embedder" not in parts
        and not any(other in parts[-1] for other in _OTHERS)
    )


def _plain(linear: Any) -> Any:
    """A linear map without a LoRA layer around it."""
    return getattr(linear, "base_layer", linear)


def for_rows(entered: torch.Tensor, rows: int) -> torch.Tensor:
    """What enters, (B, ...), for so many rows of a denoiser's batch: where each sample has several,
    such as the frames of a clip, one after the other."""
    several = rows // len(entered)
    return entered.repeat_interleave(several, 0) if several > 1 else entered


def spread(vector: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """A vector (B, W) in a shape that can be added to the output of a site, and in its dtype and on
    its device.

    Args:
        vector: one row for each row of the denoiser's batch.
        output: (B, W), (B, 1, W), (B, M, W); (B k, W), where each sample has k times, sample by
            sample; or one row for all.

    Raises:
        ValueError: one sentence: the output has another shape.
    """
    rows, width = vector.shape
    if output.shape[-1] != width or (output.shape[0] != 1 and output.shape[0] % rows):
        raise ValueError(
            f"a vector of shape {tuple(vector.shape)} cannot be added to the time embedding of "
            f"shape {tuple(output.shape)}: this denoiser is called with another number of samples "
            "than of times."
        )
    vector = for_rows(vector, output.shape[0])
    return vector.view(len(vector), *[1] * (output.ndim - 2), width).to(output)


@torch.no_grad()
def check_moves(denoiser: nn.Module, sites: Sites, call: Callable[[], Any]) -> None:
    """Make sure that what enters at the vector sites of a denoiser reaches its output.

    Args:
        denoiser: the module itself, not compiled code around it.
        sites: of `find_sites`.
        call: calls the denoiser, twice with the same arguments, and returns its prediction: a
            tensor or a list of tensors.

    Raises:
        ValueError: one sentence: a random vector does not change the prediction.
    """
    if not sites.vectors:
        return
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(1, sites.vector_width, generator=generator)
    here = threading.get_ident()

    def add(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        # Another thread may be calling the denoiser, for images of its own.
        return output + spread(vector, output) if threading.get_ident() == here else output

    # compiled code does not notice hooks that come and go
    with torch.compiler.set_stance("force_eager"):
        before = call()
        handles = [
            denoiser.get_submodule(name).register_forward_hook(add) for name in sites.vectors
        ]
        try:
            after = call()
        finally:
            for handle in handles:
                handle.remove()
    pairs = zip(before, after) if isinstance(before, (list, tuple)) else [(before, after)]
    if all(torch.equal(a, b) for a, b in pairs):
        raise ValueError(
            f"what is added to {sites.vectors[0]} of this {type(denoiser).__name__} does not "
            "change its prediction: a head has no effect on it."
        )


__all__ = ["Sites", "check_moves", "find_sites", "spread"]
