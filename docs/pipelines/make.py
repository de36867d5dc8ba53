"""The table of docs/pipelines.md, from the tiny pipelines of the tests: `python docs/pipelines/make.py` (about a minute).

Each pipeline has diffusers' own classes, in a configuration of a few thousand random weights. So the table says which parts
fit together, not how good the images are.
"""

import sys
import warnings
from importlib import import_module
from pathlib import Path

import diffusers
import torch

from hf_intervene import InterventionModel, PipelineBase, attach, intervene
from hf_intervene.pipeline_support import argument_texts, placement_text, site_text


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
pipelines, recorded = map(import_module, ("pipelines", "recorded"))  # which are beside the tests

PAGE = HERE.parent / "pipelines.md"
BEGIN, END = "<!-- table: docs/pipelines/make.py -->", "<!-- end of the table -->"
HEAD = ("pipeline", "denoiser", "the head enters at", "noisy sample", "time", "train", "attach")
KINDS = (*pipelines.KINDS, *(kind for kind in recorded.KINDS if kind not in pipelines.KINDS and kind != "sdxl-text"))


def row(kind: str) -> str:
    """The line of a kind of pipeline."""
    pipe, call = recorded.pipeline(kind)
    name, frames = f"`{type(pipe).__name__}`", pipelines.call(kind).get("num_frames", 1) if kind in pipelines.KINDS else 1
    name += f", {frames} frames" if frames > 1 else ""
    try:
        base = PipelineBase.from_pipeline(pipe, call=call | ({"num_frames": frames} if frames > 1 else {}))
    except ValueError as error:
        denoiser, reason = type(pipe.transformer).__name__, str(error).split(": ")[0].removeprefix(f"a {type(pipe).__name__} ")
        return f"| {name} | `{denoiser}` | | | | no: {reason} | {attaches(kind, recorded.base('wan'))} |"
    texts = argument_texts(base.adapter.recorded)
    sample = next(text for text in texts.values() if text.removeprefix("of each image ").startswith("the sample"))
    time = next(text for text in texts.values() if text in ("t", "t / 1000", "1 - t / 1000"))
    prediction = placement_text(base.adapter.recorded.output, "")
    shape = sample.rpartition(", ")[0].replace("the sample", "").removeprefix(", ").strip() or "as it is"
    shape += f"; prediction{prediction.removeprefix(',')}" if prediction else ""
    cells = [name, f"`{type(base.model).__name__}`", site_text(base.injection.sites).split(", ")[0]]
    return "| " + " | ".join([*cells, shape, time, trains(base), attaches(kind, base)]) + " |"


def model_on(base: PipelineBase) -> InterventionModel:
    """A new head, as if it were trained."""
    torch.manual_seed(0)
    model = InterventionModel.build(base, ["a", "b"], noise_width=4, initializer_range=0.5)
    for parameter in base.adapter.projections.parameters():
        parameter.data.normal_(std=0.3)
    return model


def trains(base: PipelineBase) -> str:
    """Whether gradients of a step reach all of the projections, and samples are finite."""
    model = model_on(base)
    targets = model.targets([["a"], ["b"], []])
    model(torch.rand(3, *base.image_shape), targets).loss.backward()
    reached = all(parameter.grad is not None for parameter in base.adapter.projections.parameters())
    images = model.eval().sample(["a"], num_samples=1, num_inference_steps=1)
    return "yes" if reached and bool(torch.isfinite(images).all()) else "no"


def attaches(kind: str, base: PipelineBase) -> str:
    """Whether an intervention of an attached head moves what the pipeline makes, and nothing moves without one."""
    if kind not in pipelines.KINDS:
        return ""
    pipe = pipelines.make(kind)
    before = pipelines.result(pipe(**pipelines.call(kind, 1)))
    model = model_on(base)
    attach(pipe, model.head, adapter=base.adapter)
    unmoved = pipelines.result(pipe(**pipelines.call(kind, 1)))
    with intervene(pipe, ["a"]):
        moved = pipelines.result(pipe(**pipelines.call(kind, 1)))
    return "yes" if torch.equal(before, unmoved) and not torch.equal(before, moved) else "no"


def table() -> str:
    """All lines, between the two marks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [f"| {' | '.join(HEAD)} |", f"| {' | '.join('---' for _ in HEAD)} |", *map(row, KINDS)]
    return "\n".join([BEGIN, f"Made with diffusers {diffusers.__version__}.", "", *lines, END])


def main() -> None:
    text = PAGE.read_text()
    start, end = text.index(BEGIN), text.index(END) + len(END)
    PAGE.write_text(text[:start] + table() + text[end:])


if __name__ == "__main__":
    main()
