"""Heads on existing diffusers pipelines, which stay as they are: `attach`, `with intervene(...)`,
`detach`.

    attach(pipe, "user/faces")
    with intervene(pipe, ["smile", "glasses"]):
        images = pipe("a portrait").images
    detach(pipe)

A head acts in calls of that pipeline inside the `with`, in the thread or asyncio task that is in
it. Another pipeline that shares the denoiser is not changed. Everything happens in hooks of the
denoiser's modules (`acting.py`, `bases/injection.py`). Outside a `with`, and after `detach`, the
pipeline computes exactly what it did before.
"""

import math
import os
import warnings
from contextvars import ContextVar
from typing import Any

import torch
from diffusers import DiffusionPipeline

from . import hub
from .acting import Heads, denoisers, inner
from .attached import Attached
from .bases.adapter import DiffusionAdapter
from .contexts import Interventions, is_per_sample, parse_choices
from .loaded_head import LoadedHead
from .model import InterventionModel
from .modeling_intervention import InterventionHead
from .sampling_arguments import check_composition, check_generator, check_noise, check_options
from .values import Values, each_alone, head_values


_ATTRIBUTE = "_attached_heads"  # of the pipeline: a `Heads`
_Pass = tuple[
    torch.Tensor, Values | None
]  # targets (images, D) and chosen values of one call of the denoiser


def attach(
    pipe: DiffusionPipeline,
    head: str | os.PathLike | InterventionModel | InterventionHead,
    adapter: DiffusionAdapter | None = None,
    name: str = "default",
    weight: float = 1.0,
    subfolder: str | None = None,
    variant: str | None = None,
    torch_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> DiffusionPipeline:
    """Attach a head to a pipeline, for `intervene`; several heads under several names add up.

    Args:
        pipe: a pipeline with one or more denoisers (`unet`, `transformer`, `transformer_2`...);
            LoRA layers, attention processors, compilation and offloading stay as they are. It is
            not changed until `intervene`.
        head: folder or repository of a saved model or pipeline with a head on a denoiser of that
            kind; or the model; or a head alone. LoRA that was trained with it acts inside `with
            intervene(...)` only, and leaves with it.
        adapter: for a head alone, the adapter that was trained with it.
        name: what `intervene(..., head=name)` and `detach` call it.
        weight: factor of what it adds to the denoiser. It does not change the LoRA.
        subfolder: of a folder or repository, where the saved model is.
        variant: of the saved weights, such as `"fp16"`.
        torch_dtype: precision of head and adapter that are loaded; `None`: float32.
        **kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, as elsewhere.

    Returns:
        The pipeline.

    Raises:
        TypeError, ValueError, OSError: one sentence: no denoiser that a head can enter, a head for
            another one, a scheduler that is not known or has another kind of prediction, a head
            whose own base was trained too, a name that is taken.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"attach needs a diffusers pipeline, not a {type(pipe).__name__}.")
    if (
        isinstance(weight, bool)
        or not isinstance(weight, (int, float))
        or not math.isfinite(weight)
    ):
        raise TypeError(f"weight must be a finite number, not {weight!r}.")
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise TypeError(f"torch_dtype must be a type such as torch.bfloat16, not {torch_dtype!r}.")
    denoiser = inner(next(iter(denoisers(pipe).values())))
    options = hub.pop_options(kwargs)
    if kwargs:
        raise TypeError(f"attach() takes no {', '.join(kwargs)}.")
    if isinstance(head, (str, os.PathLike)):
        loaded = LoadedHead.from_folder(denoiser, head, subfolder, variant, torch_dtype, options)
    else:
        for option, value in (
            ("subfolder", subfolder),
            ("variant", variant),
            ("torch_dtype", torch_dtype),
        ):
            if value is not None:
                raise ValueError(
                    f"{option} says how to load a head, and this one is loaded already: leave it "
                    "out."
                )
        loaded = LoadedHead.from_object(denoiser, head, adapter)
    heads: Heads = getattr(pipe, _ATTRIBUTE, None) or Heads(pipe)
    if name in heads.attached:
        raise ValueError(
            f"a head named {name!r} is attached already: detach it first, or give this one another "
            "name."
        )
    attached = Attached(loaded.head, loaded.adapter, weight, loaded.lora)
    attached.check(denoiser, True)
    attached.check_scheduler(pipe)
    heads.add(name, attached)
    setattr(pipe, _ATTRIBUTE, heads)
    loaded.warn_unless_known(denoiser)
    return pipe


def detach(pipe: DiffusionPipeline, name: str | None = None) -> DiffusionPipeline:
    """Take a head off a pipeline, or, without a name, all of them: it computes bit for bit what it
    did before.

    Raises:
        ValueError: no head of that name, or none at all, is attached.
    """
    heads = _heads(pipe)
    for found in [heads.named(name)[0]] if name is not None else list(heads.attached):
        heads.drop(found)
    if not heads.attached:
        delattr(pipe, _ATTRIBUTE)
    return pipe


class intervene:
    """Inside `with intervene(pipe, interventions):` calls of the pipeline generate under
    interventions of an attached head. That holds for the thread or asyncio task that entered it;
    others may each be in a `with` of their own.

    A call of the pipeline draws z once for each of its images. Only calls of the pipeline itself
    count, `pipe(...)`: a denoiser that is called alone, or by another pipeline, is not intervened
    on.

    Args:
        pipe: the pipeline.
        interventions: in any form of `hf_intervene.contexts`, but for reference images; a list of
            contexts is one for each image that a call makes, in the order in which it returns them.
        head: name of the head, where several are attached; `with intervene(..., head="a"),
            intervene(..., head="b"):` uses both.
        guidance_scale: w > 1 leads further away from the observational context: in every step the
            denoiser is called once more, without the interventions but with the same z, and its
            prediction is o + w (p - o). The pipeline's own guidance is apart from it.
        noise: exogenous noise z of each image, (images, D, noise_width), to compare interventions
            under the same; `None` draws it in each call of the pipeline.
        generator: for that draw; or a list of one for each image.
        num_images: how many images a call makes, where a pipeline does not say it (see `calls.py`).
        compose: how several concepts are put together. `"head"`: the head is given all of them at
            once, as it was trained to be for one. `"scores"`: o + w sum_k (p_k - o), where p_k is
            the prediction under concept k alone (Liu et al., arXiv:2206.01714); it is right for
            concepts that are independent of each other, and calls the denoiser once more for each
            concept.

    Raises:
        ValueError, TypeError: one sentence: nothing attached, unknown concepts, guidance with
            nothing intervened on.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        interventions: Interventions,
        head: str | None = None,
        guidance_scale: float = 1.0,
        noise: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images: int | None = None,
        compose: str = "head",
    ):
        self._heads = _heads(pipe)
        self._name, self._attached = self._heads.named(head)
        config = self._attached.head.config
        check_options(None, 1, None, "pt", guidance_scale=guidance_scale)
        check_composition(compose)
        if noise is not None:
            noise = check_noise("noise", noise, (config.num_blocks, config.noise_width))
        targets, choices = parse_choices(
            interventions, config.concepts, num_images, config.free_blocks
        )
        self.targets = targets.cpu()
        if guidance_scale != 1.0 and not bool((self.targets != 0).any()):
            raise ValueError(
                "guidance_scale compares each step with an observational pass, but nothing is "
                "intervened on: leave it at 1, or intervene."
            )
        #: Number of images that the interventions are for; `None`: one context for any number.
        self.contexts = len(targets) if is_per_sample(interventions) or len(targets) > 1 else None
        self.noise_rows = None if noise is None else len(noise)
        if self.contexts is not None and self.noise_rows not in (None, self.contexts):
            raise ValueError(
                f"noise has {self.noise_rows} rows for {self.contexts} images: give one row per "
                "image."
            )
        check_generator(generator, len(generator) if isinstance(generator, list) else 1)
        with self._attached.evaluating():
            self.values = head_values(self._attached.head, choices, len(targets), _no_references)
        self.guidance_scale, self.noise, self.generator, self.num_images = (
            guidance_scale,
            noise,
            generator,
            num_images,
        )
        self.compose = compose
        self.acted = False  # whether a call of the pipeline was intervened on
        self._heads.thread.pending = True

    def __enter__(self) -> "intervene":
        self._heads.thread.pending = False
        if self._heads.attached.get(self._name) is not self._attached:
            raise ValueError(
                f"the head {self._name!r} was detached from this pipeline: attach it again, and "
                "call intervene anew."
            )
        self._attached.check_scheduler(self._heads.pipe)
        self._heads.hook()
        self.acted = False
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        active = list(_ACTIVE.get())
        # Contexts are left in any order: this one alone goes, the last of it if entered twice.
        if self in active:
            del active[len(active) - 1 - active[::-1].index(self)]
            _ACTIVE.set(tuple(active))
        if error is None and not self.acted:
            warnings.warn(
                f"this {type(self._heads.pipe).__name__} was not called inside `with "
                "intervene(...)`, so nothing was intervened on: call the pipeline itself, "
                "pipe(...).",
                stacklevel=2,
            )

    @property
    def further_calls(self) -> bool:
        """Whether the denoiser is called more than once in a step."""
        return self.compose != "head" or self.guidance_scale != 1.0

    def passes(
        self, targets: torch.Tensor, values: Values | None
    ) -> tuple[_Pass, list[tuple[_Pass, float]]]:
        """What the head is given in each call of the denoiser in a step: that of the first call,
        and of further ones with weights.

        The prediction is p + sum of w (p_other - p), where p is that of the first call.

        Args:
            targets: of each image, (images, D).
            values: the chosen values of each image, if there are any.
        """
        observational: _Pass = (torch.zeros_like(targets), None)
        if self.compose == "head":
            w = self.guidance_scale
            return (targets, values), [] if w == 1.0 else [(observational, 1 - w)]
        alone = each_alone(targets, values)
        return observational, [(one, self.guidance_scale) for one in alone]


_ACTIVE: ContextVar[tuple[intervene, ...]] = ContextVar("hf_intervene_active", default=())


def active_on(heads: Heads) -> dict[Attached, intervene]:
    """Under what each head of a pipeline acts in this context: the innermost `with` of that
    head."""
    return {
        active._attached: active
        for active in _ACTIVE.get()
        if active._heads is heads and heads.attached.get(active._name) is active._attached
    }


def _no_references(rows: list[int], names: list[str], images: list[Any]) -> torch.Tensor:
    raise ValueError(
        f"a reference image, here of {names[0]!r}, needs the encoder that the head was trained "
        "with, which this pipeline does not have: choose a Quantile, or use InterventionModel."
    )


def _heads(pipe: DiffusionPipeline) -> Heads:
    heads = getattr(pipe, _ATTRIBUTE, None)
    if heads is None:
        raise ValueError(
            f"no head is attached to this {type(pipe).__name__}: attach(pipe, head) first."
        )
    return heads
