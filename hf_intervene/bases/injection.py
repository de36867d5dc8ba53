"""How an embedding enters a denoiser: by forward hooks on a few of its modules, so that a
pretrained denoiser is used unchanged.

    embedding (B, *embedding_shape) --Projections--> Entries --Injection's hooks--> the denoiser's own activations

- a vector, added to the time embedding that all its blocks read (`sites.py` finds it in almost any
  denoiser);
- a map, added to the output of the middle block: UNet2DModel;
- features of what the adapter decodes of the embedding, added to those of the noisy sample: every
  denoiser that reads its sample by a convolution. Where in the image something is, is given there;
- tokens, which every cross-attention layer attends to beside its own, with keys and values of their
  own: UNet2DConditionModel (a branch of its own as in IP-Adapter, Ye et al., arXiv:2308.06721, but
  by hooks: whatever attention processor, LoRA or adapter the layer has stays in place).

The last map of each is zero at first: a new head changes nothing of what the denoiser does.
"""  # noqa: E501

import copy
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from torch import nn

from .lora_layers import LoraLayers
from .sites import Sites, find_sites, for_rows, spread


_ADDED = ("vector", "map", "input")


@dataclass(frozen=True)
class Entries:
    """What enters at the sites: `vector` (B, vector_width), `map` and `input` (B, C, h, w), and of
    each cross-attention layer `keys` and `values` (B, tokens, inner width). All of it adds, so
    entries can be weighted."""

    vector: torch.Tensor | None = None
    map: torch.Tensor | None = None
    input: torch.Tensor | None = None
    keys: tuple[torch.Tensor, ...] = ()
    values: tuple[torch.Tensor, ...] = ()

    def weighted(self, weight: float) -> "Entries":
        scaled: dict[str, Any] = {
            name: None if (x := getattr(self, name)) is None else weight * x for name in _ADDED
        }
        return replace(self, values=tuple(weight * v for v in self.values), **scaled)

    def rows(self, index: torch.Tensor) -> "Entries":
        """The entries of some rows, an index (n,)."""
        picked: dict[str, Any] = {
            name: None if (x := getattr(self, name)) is None else x[index] for name in _ADDED
        }
        return Entries(
            keys=tuple(k[index] for k in self.keys),
            values=tuple(v[index] for v in self.values),
            **picked,
        )


_WIDTH = 128  # channels between what is decoded and the sample's features


class Projections(nn.Module):
    """From an embedding to what enters at each site: (B, *embedding_shape), and what is decoded
    of it, (B, c, h, h), to `Entries`; all zero at first.

    Args:
        sites: of the denoiser.
        embedding_shape: (width,) for vectors, (tokens, width) for cross-attention.
        map_size: side of the map at the base's own image size; it is resized where another one
            comes by.
        decoded_channels: c of what the adapter decodes of an embedding; 0: it has no decoder.
    """

    def __init__(
        self,
        sites: Sites,
        embedding_shape: Sequence[int],
        map_size: int = 0,
        decoded_channels: int = 0,
    ):
        super().__init__()
        width = embedding_shape[-1]
        if sites.vector_width:
            last = nn.Linear(sites.vector_width, sites.vector_width)
            self.vector = nn.Sequential(
                nn.Linear(width, sites.vector_width), nn.SiLU(), _zero(last)
            )
        if sites.map_channels:
            last = nn.Linear(width, sites.map_channels * map_size**2)
            self.map = nn.Sequential(
                _zero(last), nn.Unflatten(1, (sites.map_channels, map_size, map_size))
            )
        if sites.input_channels and decoded_channels:
            stride = sites.input_stride
            first = (
                nn.Conv2d(decoded_channels, _WIDTH, 3, padding=1)
                if stride == 1
                else nn.Conv2d(decoded_channels, 2 * _WIDTH, stride, stride)  # a token each
            )
            enters = nn.Conv2d(first.out_channels, sites.input_channels, 1)
            self.input = nn.Sequential(first, nn.SiLU(), _zero(enters))
        self.keys = nn.ModuleList(
            nn.Linear(width, inner, bias=False) for inner in sites.token_widths
        )
        self.values = nn.ModuleList(
            _zero(nn.Linear(width, inner, bias=False)) for inner in sites.token_widths
        )

    def forward(self, embedding: torch.Tensor, decoded: torch.Tensor | None = None) -> Entries:
        return Entries(
            vector=self.vector(embedding) if hasattr(self, "vector") else None,
            map=self.map(embedding) if hasattr(self, "map") else None,
            input=self.input(decoded) if hasattr(self, "input") else None,
            keys=tuple(layer(embedding) for layer in self.keys),
            values=tuple(layer(embedding) for layer in self.values),
        )


def _zero(layer: Any) -> Any:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class PerThread(threading.local):
    """Attributes that each thread has for itself: what enters belongs to a call of the denoiser,
    and threads may call it at once.

    Sub-classes set them in `__init__`, which runs once in each thread: compiled code does not see
    those of a class."""

    def __deepcopy__(self, memo: dict) -> "PerThread":
        return type(self)()  # what was set for a call of the original is none of the copy's

    def __reduce__(self) -> tuple:
        return type(self), ()  # likewise in a pickle, for another process


class _Call(PerThread):
    def __init__(self) -> None:
        self.entries: Entries | None = None


class Injection:
    """The hooks on one denoiser through which entries enter, and the entries at hand.

    Hooks of modules, not wrappers: what others put around a forward pass (offloading, compilation,
    LoRA, attention processors) goes on working, and `remove` leaves the denoiser as it was. Several
    injections on one denoiser add up. What a thread sets enters in its own calls of the denoiser
    and in no other's.

    Args:
        denoiser: the denoiser.
        lora: LoRA layers that act where entries enter, and nowhere else.
    """

    def __init__(self, denoiser: nn.Module, lora: LoraLayers | None = None):
        self.denoiser, self.sites, self.lora = denoiser, find_sites(denoiser), lora
        self._reset()

    def _reset(self) -> None:
        self._call = _Call()
        self._left: Entries | None = None  # see `clear`
        self.layers = [_CrossAttention(self, number) for number in range(len(self.sites.tokens))]
        self._handles: list = []
        self._hooked: list[nn.Module] = []

    def __deepcopy__(self, memo: dict) -> "Injection":
        # A copied denoiser carries copies of the hooks, which must not go on acting for what was
        # set before.
        copied = memo[id(self)] = object.__new__(Injection)
        copied.denoiser, copied.sites = copy.deepcopy(self.denoiser, memo), self.sites
        copied.lora = self.lora
        copied._reset()
        # of the copied hooks, which `install` takes away
        copied._handles = copy.deepcopy(self._handles, memo)
        return copied

    def install(self) -> bool:
        """Put the hooks where they belong, unless they are there; returns whether anything was
        changed.

        Loading or unloading LoRA exchanges modules, hence the look at each time.
        """
        # Bound methods, not closures: a copy of the denoiser then has hooks of a copied injection.
        plan: list[tuple[str, str, Callable]] = []
        if self.lora is not None:  # first: the other hooks see what LoRA makes of a layer's output
            plan += [
                (name, "register_forward_hook", partial(self._add_lora, name))
                for name in self.lora.names
            ]
        plan += [(name, "register_forward_hook", self._add_vector) for name in self.sites.vectors]
        if self.sites.map is not None:
            plan += [(self.sites.map, "register_forward_hook", partial(self._add_map, "map"))]
        if self.sites.input is not None:
            plan += [(self.sites.input, "register_forward_hook", partial(self._add_map, "input"))]
        for name, layer in zip(self.sites.tokens, self.layers):
            layer.attention = self.denoiser.get_submodule(name)
            plan += [(f"{name}.to_q", "register_forward_hook", layer.keep_query)]
            plan += [(f"{name}.to_out.0", "register_forward_pre_hook", layer.add_branch)]
        modules = [self.denoiser.get_submodule(name) for name, *_ in plan]
        if len(modules) == len(self._hooked) and all(a is b for a, b in zip(modules, self._hooked)):
            return False
        with _INSTALLING:
            self.remove()
            self._handles = [
                getattr(module, register)(hook)
                for module, (_, register, hook) in zip(modules, plan)
            ]
            self._hooked = modules
        return True

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], []

    @property
    def entries(self) -> Entries | None:
        """What enters in calls of this thread, if anything."""
        if (
            self._call.entries is None
            and self._left is not None
            and torch._C._current_graph_task_id() != -1
        ):
            return self._left  # this is a backward pass
        return self._call.entries

    def set(self, entries: Entries) -> None:
        """Let entries, of as many rows as the denoiser's batch, enter in this thread's calls from
        now on.
        """
        self._call.entries = entries

    def clear(self, leave: bool = False) -> None:
        """Let nothing enter from now on.

        Args:
            leave: whether what entered must still enter in the backward pass: gradient
                checkpointing computes blocks again there, on a thread of autograd's own.
        """
        if leave:
            self._left = self._call.entries
        self._call.entries = None

    def _add_lora(
        self, name: str, module: nn.Module, args: tuple, output: torch.Tensor
    ) -> torch.Tensor:
        if self.entries is None or self.lora is None:
            return output
        return self.lora.add(name, module, args[0], output)

    def _add_vector(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        entries = self.entries
        if entries is None or entries.vector is None:
            return output
        return output + spread(entries.vector, output)

    def _add_map(
        self, which: str, module: nn.Module, args: tuple, output: torch.Tensor
    ) -> torch.Tensor:
        entries = self.entries
        if entries is None or (entered := getattr(entries, which)) is None:
            return output
        entered = for_rows(entered.to(output), len(output))
        if entered.shape[-2:] != output.shape[-2:]:
            entered = nn.functional.interpolate(entered, output.shape[-2:], mode="bilinear")
        return output + entered


_INSTALLING = threading.RLock()


class _Query(PerThread):
    def __init__(self) -> None:
        self.value: torch.Tensor | None = None


class _CrossAttention:
    """The branch of one cross-attention layer: its own queries, taken as they come, attend to the
    tokens of the embedding; what they find is added before the layer's output projection."""

    def __init__(self, injection: Injection, number: int):
        # of the layer among those of the injection's sites
        self.injection, self.number = (
            injection,
            number,
        )
        self.attention: Attention | None = None
        self._query = _Query()

    def keep_query(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        if self.injection.entries is not None:
            self._query.value = output

    def add_branch(self, module: nn.Module, args: tuple) -> tuple | None:
        entries, query = self.injection.entries, self._query.value
        self._query.value = None
        if entries is None or not entries.keys or query is None or self.attention is None:
            return None
        heads, tokens = (
            self.attention.heads,
            (entries.keys[self.number], entries.values[self.number]),
        )
        q, k, v = (x.to(query).unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, *tokens))
        if self.attention.norm_q is not None:
            q = self.attention.norm_q(q)
        branch = nn.functional.scaled_dot_product_attention(q, k, v)  # (B, heads, N, width)
        return (args[0] + branch.transpose(1, 2).flatten(2), *args[1:])
