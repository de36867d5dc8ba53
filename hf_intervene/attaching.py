"""Heads on existing diffusers pipelines, which stay as they are: `attach`, `with intervene(...)`, `detach`.

    attach(pipe, "user/faces")
    with intervene(pipe, ["smile", "glasses"]):
        images = pipe("a portrait").images
    detach(pipe)

Everything happens in hooks of the denoiser's modules (`bases/injection.py`). Outside a `with`, and after `detach`, the pipeline computes
exactly what it did before.
"""

import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from . import hub
from .bases.base import base_weights, model_class_named
from .bases.denoising import check_prediction
from .bases.diffusion import DiffusionAdapter, DiffusionBase, check_sites
from .bases.injection import Entries, Injection, PerThread, find_sites
from .bases.loading import BASE_FOLDER, LORA_FOLDER, is_referenced, load_model_config, load_part
from .contexts import Interventions, is_per_sample, parse_choices
from .model import InterventionModel
from .modeling_intervention import InterventionHead
from .sampling_arguments import check_generator, check_noise, check_options
from .values import Values, head_values


_ATTRIBUTE = "_attached_heads"  # of the pipeline: a `_Heads`


def attach(
    pipe: DiffusionPipeline,
    head: str | os.PathLike | InterventionModel | InterventionHead,
    adapter: DiffusionAdapter | None = None,
    name: str = "default",
    weight: float = 1.0,
    **kwargs: Any,
) -> DiffusionPipeline:
    """Attach a head to a pipeline, for `intervene`; several heads under several names add up.

    Args:
        pipe: a pipeline with a denoiser (`unet` or `transformer`) of a supported class; LoRA layers, attention processors, compilation and
            offloading of it stay as they are. It is not changed until `intervene`.
        head: folder or repository of a saved model or pipeline with a head on a denoiser of that kind; or the model; or a head alone.
        adapter: for a head alone, the adapter that was trained with it.
        name: what `intervene(..., head=name)` and `detach` call it.
        weight: factor of what it adds to the denoiser.
        **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as elsewhere.

    Returns:
        The pipeline.

    Raises:
        TypeError, ValueError, OSError: one sentence: no supported denoiser, a head for another one, a scheduler with another kind of
            prediction, a head whose own base was trained too, a name that is taken.
    """
    denoiser = _denoiser(pipe)
    loaded, adapter, reference = _load(denoiser, head, adapter, hub.pop_options(kwargs))
    if kwargs:
        raise TypeError(f"attach() takes no {', '.join(kwargs)}.")
    check_sites(find_sites(denoiser), adapter, type(denoiser).__name__)
    check_prediction(pipe.scheduler, adapter.config.prediction_type, "this head")
    heads: _Heads = getattr(pipe, _ATTRIBUTE, None) or _Heads(pipe)
    if name in heads.attached:
        raise ValueError(f"a head named {name!r} is attached already: detach it first, or give this one another name.")
    if reference is not None and not is_referenced(denoiser, reference):
        warnings.warn(
            f"this {type(denoiser).__name__} is not the one that the head was trained on ({reference['name_or_path']}): it fits, but how "
            "well it works is not known.",
            stacklevel=2,
        )
    heads.add(name, _Attached(loaded, adapter, weight, Injection(denoiser)))
    setattr(pipe, _ATTRIBUTE, heads)
    return pipe


def detach(pipe: DiffusionPipeline, name: str | None = None) -> DiffusionPipeline:
    """Take a head off a pipeline, or, without a name, all of them: it computes bit for bit what it did before.

    Raises:
        ValueError: no head of that name, or none at all, is attached.
    """
    heads = _heads(pipe)
    for found in [heads.named(name)[0]] if name is not None else list(heads.attached):
        heads.drop(found)
    if not heads.attached:
        heads.unhook()
        delattr(pipe, _ATTRIBUTE)
    return pipe


class intervene:
    """Inside `with intervene(pipe, interventions):` the pipeline generates under interventions of an attached head, as far as the thread
    that entered it calls the pipeline: several threads may each be in a `with` of their own.

    Args:
        pipe: the pipeline.
        interventions: in any form of `hf_intervene.contexts`, but for reference images; a list of contexts is one for each image the pipeline
            makes.
        head: name of the head, where several are attached; `with intervene(..., head="a"), intervene(..., head="b"):` uses both.
        guidance_scale: w > 1 leads further away from the observational context: in every step the denoiser is called once more, without
            the interventions but with the same z, and its prediction is o + w (p - o). The pipeline's own guidance is apart from it.
        noise: exogenous noise z of each image, (images, D, noise_width), to compare interventions under the same; `None` draws it
            whenever the pipeline begins anew.
        generator: for that draw.
        num_images: how many images the pipeline makes, where that cannot be seen from its batch (a pipeline of your own that computes
            its guidance in one batch).

    Raises:
        ValueError, TypeError: one sentence: nothing attached, unknown concepts, guidance with nothing intervened on.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        interventions: Interventions,
        head: str | None = None,
        guidance_scale: float = 1.0,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | None = None,
        num_images: int | None = None,
    ):
        self._heads = _heads(pipe)
        _, self._attached = self._heads.named(head)
        config = self._attached.head.config
        check_options(None, 1, None, "pt", guidance_scale=guidance_scale)
        if noise is not None:
            noise = check_noise("noise", noise, (config.num_blocks, config.noise_width))
            num_images = len(noise) if num_images is None else num_images
        targets, choices = parse_choices(interventions, config.concepts, num_images, config.free_blocks)
        self.targets = targets.cpu()
        if guidance_scale != 1.0 and not bool((self.targets != 0).any()):
            raise ValueError(
                "guidance_scale compares each step with an observational pass, but nothing is intervened on: leave it at 1, or intervene."
            )
        if noise is not None and len(noise) != len(self.targets):
            raise ValueError(f"noise has {len(noise)} rows for {len(self.targets)} images: give one row per image.")
        check_generator(generator, len(targets))
        self.values = head_values(self._attached.head, choices, len(targets), _no_references)
        many = num_images is not None or is_per_sample(interventions) or len(self.targets) > 1
        self.num_images = len(self.targets) if many else None
        self.guidance_scale, self.noise, self.generator = guidance_scale, noise, generator
        self._outer: intervene | None = None
        self._attached.now.pending = self

    def __enter__(self) -> "intervene":
        check_prediction(self._heads.pipe.scheduler, self._attached.adapter.config.prediction_type, "this head")
        self._attached.now.pending = None
        self._outer, self._attached.now.active = self._attached.now.active, self
        self.run: _Run | None = None
        self._heads.hook()
        return self

    def __exit__(self, *_: object) -> None:
        self._attached.now.active = self._outer
        self._attached.injection.clear()

    # What the denoiser's hooks ask for

    def advance(self, sample: torch.Tensor, timestep: Any) -> "_Run":
        """The run that a call of the denoiser with `sample` (batch, ...) belongs to."""
        t = float(timestep.flatten()[0] if isinstance(timestep, torch.Tensor) else timestep)
        only_step = len(getattr(self._heads.pipe.scheduler, "timesteps", ())) == 1
        if self.run is None or only_step or self.run.begins_anew(t, len(sample)):
            self.run = self._begin(sample)
        self.run.timestep = t
        return self.run

    def _begin(self, sample: torch.Tensor) -> "_Run":
        batch, attached = len(sample), self._attached
        images = self.num_images or self._heads.images_in(sample)
        if batch % images:
            raise ValueError(
                f"interventions for {images} images were given, but the pipeline makes {batch} in a batch (each twice under its own "
                "guidance): give one context for all, or one for each image."
            )
        config, device = attached.head.config, sample.device
        attached.head.to(device)
        attached.adapter.to(device)
        shape = (images, config.num_blocks, config.noise_width)
        noise = self.noise if self.noise is not None else randn_tensor(shape, self.generator, device, torch.float32)
        noise, targets = noise.to(device), self.targets.to(device).expand(images, -1)
        rows = torch.arange(batch, device=device) % images  # under guidance the pipeline's batch holds each image twice

        @torch.no_grad()
        def enter(s: torch.Tensor, values: Values | None = None) -> Entries:
            embedding = attached.head(noise, s, *(values or ())).embedding.to(attached.adapter.dtype)
            return attached.adapter.projections(embedding).weighted(attached.weight).rows(rows)

        guided = self.guidance_scale != 1.0
        values = self.values and Values(*(part.to(device).expand(images, *part.shape[1:]) for part in self.values))
        return _Run(batch, enter(targets, values), enter(torch.zeros_like(targets)) if guided else None)


class _Run:
    """One call of the pipeline: the entries of its batch, and how far it has come."""

    def __init__(self, batch: int, entries: Entries, observational: Entries | None):
        self.batch, self.entries, self.observational, self.timestep = batch, entries, observational, math.inf

    def begins_anew(self, timestep: float, batch: int) -> bool:
        return batch != self.batch or timestep > self.timestep  # within a call they fall


class _Now(PerThread):
    def __init__(self) -> None:
        self.active: intervene | None = None  # the innermost `with` that this thread is in
        self.pending: intervene | None = None  # made by this thread, but not entered
        self.inside = False  # whether this thread's call of the denoiser is one that a head makes itself


class _Attached:
    """One head on a pipeline."""

    def __init__(self, head: InterventionHead, adapter: DiffusionAdapter, weight: float, injection: Injection):
        self.head, self.adapter, self.weight, self.injection = head.eval(), adapter.eval(), weight, injection
        self.now = _Now()


class _Heads:
    """The heads on a pipeline, and the hooks around its denoiser's forward pass that let them act."""

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe
        self.attached: dict[str, _Attached] = {}
        self._hooked: nn.Module | None = None
        self._handles: list = []
        self._now = _Now()

    def add(self, name: str, attached: _Attached) -> None:
        self.attached[name] = attached
        self.hook()

    def drop(self, name: str) -> None:
        attached = self.attached.pop(name)
        attached.injection.clear()
        attached.injection.remove()
        _forget_compiled(_outermost(self.pipe))

    def named(self, name: str | None) -> tuple[str, _Attached]:
        if name is None and len(self.attached) == 1:
            return next(iter(self.attached.items()))
        if name not in self.attached:
            known = ", ".join(map(repr, self.attached))
            raise ValueError(
                f"{'give head=: ' if name is None else f'there is no head {name!r}: '}the heads on this pipeline are {known}."
            )
        return name, self.attached[name]

    def hook(self) -> None:
        """Put all hooks where they belong: LoRA exchanges modules, and compilation puts one around the denoiser."""
        outermost = _outermost(self.pipe)
        changed = [attached.injection.install() for attached in self.attached.values()]  # all of them, not up to the first
        if self._hooked is not outermost:
            self.unhook()
            self._handles = [
                outermost.register_forward_pre_hook(self._before, with_kwargs=True),
                outermost.register_forward_hook(self._after, with_kwargs=True),
            ]
            self._hooked = outermost
            changed.append(True)
        if any(changed):
            _forget_compiled(outermost)

    def unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], None

    def images_in(self, sample: torch.Tensor) -> int:
        """How many images a batch is of: half its rows where the pipeline computes its own guidance in one batch."""
        guided = getattr(self.pipe, "do_classifier_free_guidance", None)
        if guided is None:
            half = len(sample) // 2
            guided = half > 0 and len(sample) % 2 == 0 and torch.equal(sample[:half], sample[half:])
        return len(sample) // 2 if guided else len(sample)

    @torch.compiler.disable
    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._now.inside:
            return
        for attached in self.attached.values():
            if attached.now.pending is not None:
                attached.now.pending = None
                raise ValueError(
                    "intervene(pipe, ...) does nothing by itself: call the pipeline inside `with intervene(pipe, ...):`."
                )
        sample, timestep = _call_arguments(args, kwargs)
        for attached in self.attached.values():
            if attached.now.active is not None:
                attached.injection.set(attached.now.active.advance(sample, timestep).entries)

    @torch.compiler.disable
    def _after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if self._now.inside:
            return output
        acting = [(attached, attached.now.active) for attached in self.attached.values() if attached.now.active is not None]
        try:
            for attached, active in acting:
                if active.run is not None:
                    output = self._guided(module, args, kwargs, output, attached, active.run, active.guidance_scale)
        finally:
            for attached, _ in acting:
                attached.injection.clear()
        return output

    def _guided(
        self, module: nn.Module, args: tuple, kwargs: dict, output: Any, attached: _Attached, run: _Run, scale: float
    ) -> Any:
        """The prediction led away from the observational one: p + (w - 1) (p - o) = o + w (p - o)."""
        if run.observational is None:
            return output
        attached.injection.set(run.observational)
        self._now.inside = True
        try:
            plain = module(*args, **kwargs)[0]
        finally:
            self._now.inside = False
            attached.injection.set(run.entries)
        predicted = output[0]
        channels = min(_denoiser(self.pipe).config.in_channels, predicted.shape[1])  # a learnt variance is not guided
        led = predicted[:, :channels] + (scale - 1) * (predicted[:, :channels] - plain[:, :channels])
        led = torch.cat([led, predicted[:, channels:]], dim=1)
        return (led, *output[1:]) if isinstance(output, tuple) else type(output)(sample=led)


def _no_references(rows: list[int], names: list[str], images: list[Any]) -> torch.Tensor:
    raise ValueError(
        f"a reference image, here of {names[0]!r}, needs the encoder that the head was trained with, which this pipeline does not have: "
        "choose a Quantile, or use InterventionModel."
    )


def _heads(pipe: DiffusionPipeline) -> _Heads:
    heads = getattr(pipe, _ATTRIBUTE, None)
    if heads is None:
        raise ValueError(f"no head is attached to this {type(pipe).__name__}: attach(pipe, head) first.")
    return heads


def _outermost(pipe: DiffusionPipeline) -> Any:
    """The denoiser as the pipeline calls it, compiled or not."""
    for name in ("unet", "transformer"):
        found = getattr(pipe, name, None)
        if found is not None:
            return found
    raise TypeError(f"a {type(pipe).__name__} has no denoiser (unet or transformer): a head cannot be attached to it.")


def _denoiser(pipe: DiffusionPipeline) -> Any:
    """The denoiser itself.

    Raises:
        TypeError: there is none, or its class is not supported.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"attach needs a diffusers pipeline, not a {type(pipe).__name__}.")
    found = _outermost(pipe)
    found = getattr(found, "_orig_mod", found)
    return found


def _forget_compiled(outermost: nn.Module) -> None:
    # Compiled code does not notice hooks that come and go.
    inner = getattr(outermost, "_orig_mod", outermost)
    if inner is not outermost or getattr(outermost, "_compiled_call_impl", None) is not None:
        torch.compiler.reset()


def _call_arguments(args: tuple, kwargs: dict) -> tuple[torch.Tensor, Any]:
    """Sample and timestep of a denoiser's call; the transformers call the former hidden_states."""
    sample = args[0] if args else kwargs["sample" if "sample" in kwargs else "hidden_states"]
    return sample, kwargs["timestep"] if "timestep" in kwargs else args[1]


def _load(
    denoiser: nn.Module, head: Any, adapter: DiffusionAdapter | None, options: dict
) -> tuple[InterventionHead, DiffusionAdapter, dict[str, str | None] | None]:
    """Head, adapter and the reference of the base they were trained on."""
    if isinstance(head, InterventionModel):
        if not isinstance(head.base, DiffusionBase) or head.head is None:
            raise ValueError(
                f"this head is on a {type(head.base.model).__name__}, not on a denoiser: it cannot enter a pipeline's."
            )
        known = head.base.model is denoiser or head.config.base_reference is None
        return head.head, head.base.adapter, None if known else head.config.base_reference
    if isinstance(head, InterventionHead):
        if not isinstance(adapter, DiffusionAdapter):
            raise ValueError("a head alone does not say how it enters a denoiser: pass adapter= too, or the folder of both.")
        return head, adapter, head.config.base_reference
    if not isinstance(head, (str, os.PathLike)):
        raise TypeError(
            f"head must be a folder, a Hub name, an InterventionModel or an InterventionHead, not a {type(head).__name__}."
        )
    path = hub.folder(head, **options)
    loaded = InterventionHead.from_pretrained(path, subfolder="head" if (path / "model_index.json").exists() else "")
    if loaded.config.lora_rank and (path / LORA_FOLDER).is_dir():
        raise ValueError(
            f"{head} was trained with LoRA on its base, which a pipeline does not have: use InterventionModel.from_pretrained."
        )
    saved = load_model_config(path / "adapter")
    if (saved or {}).get("_class_name") != DiffusionAdapter.__name__:
        raise ValueError(f"{head} is not a head on a denoiser: it has no adapter of one.")
    adapter = load_part(DiffusionAdapter, path / "adapter", f"the adapter of {head}")
    reference = loaded.config.base_reference
    if (path / BASE_FOLDER).is_dir():
        _check_own_base(denoiser, path, head)
        reference = None
    return loaded, adapter, reference


def _check_own_base(denoiser: nn.Module, path: Path, name: Any) -> None:
    """Raise a ValueError unless a denoiser has the weights of the base saved with a head, which was trained too or made anew."""
    model_class = model_class_named((load_model_config(path / BASE_FOLDER) or {}).get("_class_name", ""))
    own = load_part(model_class, path / BASE_FOLDER, f"the base of {name}").state_dict()
    here = base_weights(denoiser)
    same = own.keys() == here.keys() and all(torch.equal(own[k].to(here[k].dtype), here[k].cpu()) for k in own)
    if not same:
        raise ValueError(
            f"{name} has a base of its own, which is not the denoiser of this pipeline: make the pipeline with that one, "
            f"{model_class.__name__}.from_pretrained({str(name)!r}, subfolder={BASE_FOLDER!r})."
        )
