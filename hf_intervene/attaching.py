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
from typing import Any

import torch
from diffusers import DiffusionPipeline

from . import hub
from .acting import Heads, activate, deactivate, denoisers, inner
from .attached import Attached
from .bases.adapter import DiffusionAdapter
from .contexts import Interventions
from .loaded_head import LoadedHead
from .model import InterventionModel
from .modeling_intervention import InterventionHead
from .requested import Requested


_ATTRIBUTE = "_attached_heads"  # of the pipeline: a `Heads`


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
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, not a {type(name).__name__}.")
    if torch_dtype is not None and not isinstance(torch_dtype, torch.dtype):
        raise TypeError(f"torch_dtype must be a type such as torch.bfloat16, not {torch_dtype!r}.")
    denoiser = inner(next(iter(denoisers(pipe).values())))
    options = hub.pop_options(kwargs)
    if kwargs:
        raise TypeError(f"attach() takes no {', '.join(kwargs)}.")
    if isinstance(head, (str, os.PathLike)):
        if adapter is not None:
            raise ValueError(
                "adapter goes with a head that is loaded already: leave it out, or load the head"
                " with InterventionHead.from_pretrained."
            )
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


class intervene(Requested):
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
        self.heads = _heads(pipe)
        self.name, self.attached = self.heads.named(head)
        with self.attached.evaluating():
            super().__init__(
                self.attached.head,
                interventions,
                guidance_scale,
                noise,
                generator,
                num_images,
                compose,
            )
        self.heads.thread.pending = True

    def __enter__(self) -> "intervene":
        self.heads.thread.pending = False
        if self.heads.attached.get(self.name) is not self.attached:
            raise ValueError(
                f"the head {self.name!r} was detached from this pipeline: attach it again, and "
                "call intervene anew."
            )
        self.attached.check_scheduler(self.heads.pipe)
        self.heads.hook()
        self.acted = False
        activate(self)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        deactivate(self)
        if error is None and not self.acted:
            warnings.warn(
                f"this {type(self.heads.pipe).__name__} was not called inside `with "
                "intervene(...)`, so nothing was intervened on: call the pipeline itself, "
                "pipe(...).",
                stacklevel=2,
            )


def _heads(pipe: DiffusionPipeline) -> Heads:
    heads = getattr(pipe, _ATTRIBUTE, None)
    if heads is None:
        raise ValueError(
            f"no head is attached to this {type(pipe).__name__}: attach(pipe, head) first."
        )
    return heads
