"""The table of docs/pipelines.md, from the tiny pipelines of the tests: `python
docs/pipelines/make.py`.

It says which pipelines are tested: `train` by tests/test_recording.py and tests/test_clips.py,
`attach` by tests/test_attach_pipelines.py. Each has diffusers' own classes, in a configuration of a
few thousand random weights. So the table says which parts fit together, not how good the images
are.
"""

import sys
import warnings
from importlib import import_module
from pathlib import Path

import diffusers
from torch import nn

from hf_intervene.bases.sites import find_sites
from hf_intervene.pipeline_support import site_text


HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))
pipelines, recorded = map(import_module, ("pipelines", "recorded"))  # which are beside the tests

PAGE = HERE.parent / "pipelines.md"
BEGIN, END = "<!-- table: docs/pipelines/make.py -->", "<!-- end of the table -->"
HEAD = ("pipeline", "denoiser", "the head enters at", "train", "attach")


def row(kind: str) -> str:
    """The line of a kind of pipeline."""
    pipe, _ = recorded.pipeline(kind)
    frames = pipelines.call(kind).get("num_frames", 1) if kind in pipelines.KINDS else 1
    names = [
        name
        for name in ("unet", "transformer", "transformer_2")
        if isinstance(pipe.components.get(name), nn.Module)
    ]
    denoiser = pipe.components[names[0]]
    cells = [
        f"`{type(pipe).__name__}`"
        + (f", {frames} frames" if frames > 1 else "")
        + (", two denoisers" if names[1:] else ""),
        f"`{type(denoiser).__name__}`",
        site_text(find_sites(denoiser))
        .split(", ")[0]
        .lstrip("0123456789 "),  # how many layers: of the tiny one
        "yes" if kind in recorded.TRAINED else "no",
        "yes" if kind in pipelines.KINDS else "not tested",
    ]
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """All lines, between the two marks."""
    kinds = (
        *pipelines.KINDS,
        *(kind for kind in recorded.TRAINED if kind not in pipelines.KINDS and kind != "sdxl-text"),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lines = [
            f"| {' | '.join(HEAD)} |",
            f"| {' | '.join('---' for _ in HEAD)} |",
            *map(row, kinds),
        ]
    return "\n".join([BEGIN, f"Made with diffusers {diffusers.__version__}.", "", *lines, END])


def main() -> None:
    text = PAGE.read_text()
    start, end = text.index(BEGIN), text.index(END) + len(END)
    PAGE.write_text(text[:start] + table() + text[end:])


if __name__ == "__main__":
    main()
