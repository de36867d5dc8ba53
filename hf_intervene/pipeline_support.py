"""What a head can do on a pipeline of diffusers: where it enters, how the denoiser is called, and
what that keeps in memory.

print(support(pipe))
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import DiffusionPipeline

from .bases.pipelines import PipelineBase
from .bases.replay import Placement, Recording
from .bases.sites import Sites


@dataclass
class Support:
    """
    Args:
        pipeline, denoiser: names of the classes.
        site: where an embedding enters the denoiser.
        image_shape: (C, H, W) of the images.
        sample_shape: of one noisy sample, as the scheduler steps on it.
        arguments: by name how each argument of the denoiser is made.
        prediction, latents: how the prediction is made of the denoiser's output, and what is
            decoded of a clean sample.
        kept_bytes: of the arguments and maps that are kept with the adapter.
        adapter_parameters: of a new adapter: what is trained beside the head.
        denoiser_parameters, denoiser_bytes: weights of the denoiser, and what they take as they
            were loaded.
    """

    pipeline: str
    denoiser: str
    site: str
    image_shape: tuple[int, ...]
    sample_shape: tuple[int, ...]
    arguments: dict[str, str] = field(default_factory=dict)
    prediction: str = ""
    latents: str = ""
    kept_bytes: int = 0
    adapter_parameters: int = 0
    denoiser_parameters: int = 0
    denoiser_bytes: int = 0

    def __str__(self) -> str:
        rows = {
            "pipeline": self.pipeline,
            "denoiser": self.denoiser,
            "its weights": (
                f"{self.denoiser_parameters:,} parameters, {self.denoiser_bytes / 2**30:.1f} GiB"
            ),
            "the head enters at": self.site,
            "images": shape_text(self.image_shape),
            "noisy sample": shape_text(self.sample_shape),
            **{f"argument {name}": text for name, text in self.arguments.items()},
            "prediction": self.prediction,
            "decoded": self.latents,
            "kept with the adapter": f"{self.kept_bytes / 2**20:.1f} MiB",
            "trained beside the head": f"{self.adapter_parameters:,} parameters",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:{width}}  {text}" for name, text in rows.items())


def support(
    pipe: DiffusionPipeline,
    prompt: str = "",
    sample_size: int | None = None,
    call: Mapping[str, Any] | None = None,
) -> Support:
    """What a head can do on a pipeline. It is recorded for that, and left as it was; arguments and
    errors are those of `PipelineBase.from_pipeline`."""
    base = PipelineBase.from_pipeline(pipe, prompt, sample_size, call)
    recording: Recording = base.adapter.recorded
    kept = sum(value.numel() * value.element_size() for value in recording.buffers())
    return Support(
        pipeline=type(pipe).__name__,
        denoiser=type(base.model).__name__,
        site=site_text(base.injection.sites),
        image_shape=base.image_shape,
        sample_shape=base.sample_shape,
        arguments=argument_texts(recording),
        prediction=placement_text(recording.output, "the output"),
        latents=(
            f"{placement_text(recording.tail, 'the sample')}, {shape_text(recording.latent_shape)}"
        ),
        kept_bytes=kept,
        adapter_parameters=base.adapter.num_parameters(),
        denoiser_parameters=base.model.num_parameters(),
        denoiser_bytes=base.model.get_memory_footprint(return_buffers=False),
    )


def site_text(sites: Sites) -> str:
    """Where an embedding enters, in words."""
    if sites.tokens:
        return (
            f"{len(sites.tokens)} layers of cross-attention, by tokens of width {sites.cross_width}"
        )
    more = f" and {len(sites.vectors) - 1} more" if len(sites.vectors) > 1 else ""
    return f"{sites.vectors[0]}{more}, by a vector of width {sites.vector_width}"


def argument_texts(recording: Recording) -> dict[str, str]:
    """How each argument of a denoiser is made, in words; those that are always `None` or empty are
    left out.
    """
    found: dict[str, str] = {}
    for name, node in recording.config["arguments"].items():
        _describe(name, node, recording, found)
    return found


def _describe(
    name: str, node: dict[str, Any], recording: Recording, found: dict[str, str], each: str = ""
) -> None:
    if "each" in node:
        _describe(name, node["each"], recording, found, "of each image ")
    elif "dict" in node:
        for key, inner in node["dict"].items():
            _describe(f"{name}.{key}", inner, recording, found, each)
    elif "list" in node or "tuple" in node:
        for number, inner in enumerate(node["list"] if "list" in node else node["tuple"]):
            _describe(f"{name}[{number}]", inner, recording, found, each)
    elif "constant" in node:
        shared = "" if node["rows"] is not None or each else " for all images"
        shape = recording.constants[node["constant"]].shape
        found[name] = f"{each}kept{shared}, {shape_text(shape)}"
    elif "input" in node:
        placement = recording.inputs[node["input"]]
        found[name] = (
            f"{each}{placement_text(placement, 'the sample')}, {shape_text(placement.shape)}"
        )
    elif "time" in node:
        found[name] = time_text(*node["time"])
    elif node["value"] not in (None, "", 0):
        found[name] = str(node["value"])


def time_text(scale: float, shift: float) -> str:
    """The model's time of the scheduler's time t: `t`, `t / 1000`, `1 - t / 1000`."""
    size = abs(scale)
    term = "t" if size == 1 else f"t / {1 / size:g}"
    if shift:
        return f"{shift:g} {'-' if scale < 0 else '+'} {term}"
    return f"-{term}" if scale < 0 else term


def placement_text(placement: Placement, what: str) -> str:
    """What a placement does to the entries of a vector, in words."""
    scales, shifts = placement.config["scales"], placement.config["shifts"]
    parts = [what]
    if placement.size > placement.entries:
        parts.append("beside what is kept")
    elif placement.size < placement.entries:
        parts.append("in part")
    if placement.config["indexed"]:
        parts.append("in another order")
    if scales == [-1.0]:
        parts.append("negated")
    elif scales is None or len([scale for scale in scales if scale]) > 1:
        parts.append("scaled by channel")
    elif scales not in ([1.0], [0.0, 1.0]):
        parts.append(f"scaled by {scales[-1]:.4g}")
    if placement.size == placement.entries and shifts != [0.0]:
        parts.append(
            f"shifted by {shifts[0]:.4g}"
            if shifts is not None and len(shifts) == 1
            else "shifted by channel"
        )
    return ", ".join(parts)


def shape_text(shape: Any) -> str:
    """`3 x 64 x 64`."""
    return " x ".join(map(str, shape)) or "a number"


__all__ = ["Support", "support"]
