"""The controls of the page, and what their values say."""

import os
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.utils import get_upload_folder

from .page import MAX_GUIDANCE, STEPS, Page


MAX_SEED = 9999
NO_IMAGE = "give an image first: upload one, or pick one of those below"
SHOWN = {"avatars": ("glasses", "hat")}  # concepts that are switched on at first; else the first


def concept_controls(page: Page) -> list:
    """A switch for each concept, then a strength for each; moving a strength turns its switch on."""  # noqa: E501
    switches, strengths = [], []
    gr.Markdown("**Concepts**, and how strong (1 is all of it)")
    for name in page.concepts:
        with gr.Row(elem_classes="concept"):
            on = name in SHOWN.get(page.title, page.concepts[:1])  # or nothing would be seen
            switches.append(gr.Checkbox(on, label=name, container=False, min_width=120, scale=1))
            strengths.append(
                gr.Slider(
                    0,
                    1,
                    1,
                    step=0.05,
                    label=f"how strong: {name}",
                    show_label=False,
                    container=False,
                    min_width=140,
                    scale=2,
                    buttons=[],
                )
            )
        strengths[-1].input(None, None, switches[-1], js="() => true", api_visibility="private")
    return switches + strengths


def uploaded(file: Any) -> str:
    """The path of an image that Gradio has received or made, and of no other file of this machine.

    Raises:
        ValueError: one sentence, the same whether there is such a file or not.
    """
    path = str(file.get("path")) if isinstance(file, dict) else ""
    folder = os.path.realpath(get_upload_folder())
    try:
        received = os.path.realpath(path).startswith(folder + os.sep) and os.path.isfile(path)
    except (OSError, ValueError):  # no path of this system
        received = False
    if not received:
        raise ValueError(f"this image was not uploaded here: {NO_IMAGE}.")
    return path


def chosen_strengths(page: Page, values: tuple) -> tuple[dict[str, float], tuple]:
    """What the concepts' controls say, and the values after them."""
    d = len(page.concepts)
    chosen = {
        name: strength
        for name, on, strength in zip(page.concepts, values[:d], values[d : 2 * d])
        if on
    }
    return chosen, values[2 * d :]


def run_button(page: Page, label: str) -> gr.Button:
    """What draws, for a large denoiser, which takes a while; others draw when anything changes."""
    return gr.Button(label, variant="primary", size="md", min_width=120, visible=page.slow)


def draw_number() -> gr.Number:
    """Which images are drawn."""
    return gr.Number(
        0,
        label="Draw number",
        info="Another number draws other images.",
        precision=0,
        minimum=0,
        maximum=MAX_SEED,
        min_width=120,
    )


def next_number(number: int | None) -> int:
    """The draw number after this one."""
    return (int(number or 0) + 1) % (MAX_SEED + 1)


def checked(part: Component, value: Any) -> Any:
    """What a component of the page was set to. Gradio's own checks end in raw errors, for one where
    a number was deleted.

    Raises:
        ValueError: one sentence: no number, one out of range, or a name that is not offered.
    """
    if isinstance(part, (gr.Slider, gr.Number)):
        whole = part.step == 1 or getattr(part, "precision", None) == 0
        low: Any = part.minimum
        high: Any = part.maximum
        if not isinstance(value, (int, float)) or not low <= value <= high or whole and value % 1:
            kind = "whole number" if whole else "number"
            raise ValueError(f"{part.label}: give a {kind} from {low} to {high}.")
        return int(value) if whole else float(value)
    if isinstance(part, (gr.CheckboxGroup, gr.Dropdown)):
        offered: list[Any] = [name for _, name in part.choices]
        if not isinstance(value or [], list) or any(name not in offered for name in value or []):
            raise ValueError(f"{part.label}: choose among {', '.join(offered)}.")
        return value or []
    return value


def steps_slider(page: Page) -> list[gr.Slider]:
    """Of a denoiser how many steps it takes; otherwise nothing."""
    label = "Denoising steps (more take longer and give finer images)"
    return [gr.Slider(1, 100, STEPS, step=1, label=label, buttons=[])] if page.denoises else []


def guidance_slider(page: Page, value: float = 1) -> list[gr.Slider]:
    """Of a denoiser how strongly concepts act; otherwise nothing."""
    label = "Effect of the concepts (1 is as trained)"
    return (
        [gr.Slider(1, MAX_GUIDANCE, value, step=0.1, label=label, buttons=[])]
        if page.denoises
        else []
    )


__all__ = [
    "NO_IMAGE",
    "checked",
    "chosen_strengths",
    "concept_controls",
    "draw_number",
    "guidance_slider",
    "next_number",
    "run_button",
    "steps_slider",
    "uploaded",
]
