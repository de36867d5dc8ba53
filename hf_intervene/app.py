"""The page of `hf-intervene app`, laid out with Gradio: sample under interventions, edit images,
compose pairs, read the card. Thin: what the buttons do is in `page.py`, and torch is not imported
here.

Nothing is fetched at run time, neither fonts nor scripts, and nothing is reported to anybody.
"""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import numpy as np
from PIL import Image

from .errors import is_expected, sentence
from .page import MAX_COMPOSED, NO_GRADIO, STEPS, Page
from .page_clients import Clients


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported

try:
    import gradio as gr
    from gradio.utils import get_upload_folder
    from starlette.middleware import Middleware
except ImportError as error:
    raise ImportError(NO_GRADIO) from error


CLIENTS = Clients()
MAX_IMAGES, MAX_SEED = 16, 2**31 - 1
MAX_WAITING = 16  # requests: who comes later is told so, and not made to wait for minutes
NO_IMAGE = "give an image first: upload one, or pick one of those below"

# The browser itself refuses whatever a card or a library may want to fetch from elsewhere.
CSP = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'self\' data: blob:'
    " 'unsafe-inline' 'unsafe-eval'"
)
CSP += "; form-action 'self'; base-uri 'none'\">"
CSS = """
.gradio-container { --font: system-ui, sans-serif; --font-mono: ui-monospace, monospace; max-width: 1280px !important; }
.pixels img { image-rendering: pixelated; }
.pixels .image-frame { width: 100%; height: 100%; padding-top: 2rem; }
.pixels .image-frame img { width: 100%; height: 100%; object-fit: contain; }
.pixels .grid-wrap { min-height: 0; max-height: none; }
.pixels .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; padding-top: 2rem; }
.pixels .grid-container { grid-template-rows: none !important; grid-auto-rows: auto !important; }
.pixels .thumbnail-item { height: auto; aspect-ratio: 1; }
.picture .image-frame { padding-top: 2rem; }
.concept { align-items: center; gap: 8px; flex-wrap: nowrap; }
.concept .block { border-width: 0 !important; padding: 2px; background: none; }
.concept .block:has(> .checkbox-container) { flex: 1 1 36%; overflow-wrap: anywhere; }
.concept .wrap:has(> .head) { flex-direction: row-reverse; align-items: center; gap: 8px; }
.concept .head { width: auto; margin: 0; align-items: center !important; }
.concept .head label { display: none; }
.concept input[type="range"] { width: 100%; min-width: 0; }
.concept .tab-like-container { margin: 0; }
.concept .head input { width: 4.5em; }
.concept .slider_input_container { flex: 1; min-width: 0; }
.concept .min_value, .concept .max_value { display: none; }
.prose table { display: block; width: max-content; max-width: 100%; overflow-x: auto; border: none; }
.prose :is(td, th) { word-break: normal; }
.prose pre { overflow-x: auto; }
@media (max-width: 640px) {
  .main.app { padding: 12px !important; }
  .compare .grid-container { --grid-cols: 2 !important; }
  .prose :is(td, th) { white-space: nowrap; padding: 4px 6px; }
}
"""  # noqa: E501


def _shown(images: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Images (H, W, C) as Gradio takes them: grey ones as (H, W)."""
    return [image.squeeze(-1) if image.shape[-1] == 1 else image for image in images]


def build(page: Page) -> gr.Blocks:
    """The page as Gradio blocks."""
    with gr.Blocks(
        title=f"{page.title}: interventions", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as blocks:
        gr.Markdown(
            f"# {page.title}\nSwitch concepts on, alone or together, and see what changes and what"
            " stays as it was."
        )
        with gr.Tab("Sample"):
            _sample_tab(page, blocks)
        with gr.Tab("Edit") as tab:
            _edit_tab(page, tab)
        with gr.Tab("Compose") as tab:
            _compose_tab(page, tab)
        with gr.Tab("About"):
            for path, caption in page.pictures():
                gr.Image(
                    path,
                    label=caption,
                    alt_text=caption,
                    interactive=False,
                    elem_classes="picture",
                    buttons=["fullscreen"],
                )
            gr.Markdown(page.card())
    return blocks


def _sample_tab(page: Page, blocks: gr.Blocks) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            controls = _concept_controls(page)
            num_images = gr.Slider(1, MAX_IMAGES, page.few, step=1, label="Images", buttons=[])
            seed = _seed()
            denoising = [*_steps(page), *_guidance(page)]
            with gr.Row():
                other = gr.Button(
                    "Other seed" if page.denoises else "Other images", size="md", min_width=120
                )
                button = gr.Button("Generate", variant="primary", size="md", min_width=120)
        with gr.Column(scale=3, min_width=280):
            with gr.Row():
                before, after, change = (
                    gr.Gallery(
                        label=label,
                        columns=4,
                        format="png",
                        elem_classes="pixels",
                        min_width=220,
                        buttons=["fullscreen"],
                    )
                    for label in ("Observational", "Intervened on", "Changed")
                )
            gr.Markdown(
                "All three have the same noise, image by image. *Changed*: white where the first"
                " two are the same, black from half of the range on."
            )

    def sample(*values: Any) -> tuple[list[np.ndarray], gr.Gallery, list[np.ndarray]]:
        strengths, (n, chosen_seed, *options) = _strengths(page, values)
        observational, intervened, change, name = page.sample(
            strengths, int(n), _checked(chosen_seed), *options
        )
        label = "Nothing is intervened on" if name == "obs" else name
        return _shown(observational), gr.Gallery(_shown(intervened), label=label), _shown(change)

    inputs, outputs = [*controls, num_images, seed, *denoising], [before, after, change]
    at_once = (
        []
        if page.denoises
        else [blocks.load, *(part.change for part in (*controls, num_images, seed))]
    )
    _on([button.click, *at_once], sample, inputs, outputs, "sample")
    other.click(lambda: random.randint(0, MAX_SEED), None, seed, api_visibility="private")


def _edit_tab(page: Page, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            image = gr.Image(
                label="An image",
                type="filepath",
                sources=["upload", "clipboard"],
                format="png",
                height=220,
                elem_classes="pixels",
            )
            examples = gr.Gallery(
                label="or one of these",
                columns=4,
                format="png",
                allow_preview=False,
                elem_classes="pixels",
                buttons=[],
            )
            draw = gr.Button("Draw some", size="md", visible=page.denoises)
            came_from = gr.Dropdown(
                list(page.concepts),
                multiselect=True,
                label="What had been intervened on in it",
                info="Empty: nothing, or unknown",
            )
            controls = _concept_controls(page)
            denoising = [*_steps(page), *_guidance(page)]
            button = gr.Button("Edit", variant="primary", size="md")
        with gr.Column(scale=3, min_width=280):
            result = gr.Gallery(
                label="Compare",
                columns=4,
                format="png",
                elem_classes="pixels compare",
                object_fit="contain",
                buttons=["fullscreen"],
            )
            gr.Markdown(
                "The noise behind the image is kept, the interventions are replaced. *Unchanged* is"
                " what the model returns when nothing is edited: what is lost there is not the"
                " edit's doing. *Change* compares it with the edited image (white: nothing)."
            )

    def edit(file: dict[str, Any] | None, context: list[str] | None, *values: Any) -> gr.Gallery:
        if file is None:
            raise ValueError(f"{NO_IMAGE}.")
        strengths, options = _strengths(page, values)
        *pictures, name = page.edit(_uploaded(file), context or [], strengths, *options)
        captions = ["given", "unchanged", "edited", "change"]
        return gr.Gallery(list(zip(_shown(pictures), captions)), label=f"Edited: {name}")

    def pick(event: gr.SelectData) -> np.ndarray:
        return _shown(page.examples())[event.index]

    inputs = [image, came_from, *controls, *denoising]
    _on(
        [button.click], edit, inputs, result, "edit", preprocess=False
    )  # Gradio would open the file, and fail in its own words
    if not page.denoises:

        def live(file: dict[str, Any] | None, *values: Any) -> gr.Gallery | list:
            return edit(file, *values) if file else []

        _on(
            [part.change for part in (image, came_from, *controls)],
            live,
            inputs,
            result,
            preprocess=False,
        )
    _on(
        [draw.click if page.denoises else tab.select],
        lambda: _shown(page.examples()),
        None,
        examples,
    )
    _on([examples.select], pick, None, image)


def _compose_tab(page: Page, tab: gr.Tab) -> None:
    chosen = gr.CheckboxGroup(
        list(page.concepts),
        value=list(page.concepts[:6]),
        label=f"Concepts (two to {MAX_COMPOSED})",
    )
    with gr.Row():
        seed = _seed()
        steps = _steps(page)
        button = gr.Button("Compose", variant="primary", size="md", min_width=120)
    picture = gr.Image(
        label="Every pair",
        interactive=False,
        format="png",
        buttons=["fullscreen", "download"],
        elem_classes="picture",
        alt_text="A grid of all pairs of concepts",
    )
    gr.Markdown(
        "One draw of noise. Below the diagonal: under the interventions of row and column together."
        " Above it: how that differs from the observational image in the corner."
    )

    def compose(names: list[str], chosen_seed: int | None, *options: int) -> Image.Image:
        return page.compose(names, _checked(chosen_seed), *options)

    _on(
        [button.click, *([] if page.denoises else [tab.select])],
        compose,
        [chosen, seed, *steps],
        picture,
        "compose",
    )


def _concept_controls(page: Page) -> list:
    """A switch for each concept, then a strength for each; moving a strength turns its switch on."""  # noqa: E501
    switches, strengths = [], []
    for name in page.concepts:
        with gr.Row(elem_classes="concept"):
            on = name == page.concepts[0]  # so that the first picture shows what the page is about
            switches.append(gr.Checkbox(on, label=name, container=False, min_width=120, scale=1))
            strengths.append(
                gr.Slider(
                    0,
                    1,
                    1,
                    step=0.05,
                    label=f"strength of {name}",
                    show_label=False,
                    container=False,
                    min_width=140,
                    scale=2,
                    buttons=[],
                )
            )
        strengths[-1].input(None, None, switches[-1], js="() => true", api_visibility="private")
    return switches + strengths


def _uploaded(file: dict[str, Any]) -> str:
    """The path of an image that Gradio has received or made, and of no other file of this machine.

    Raises:
        ValueError: one sentence, the same whether there is such a file or not.
    """
    path, folder = str(file.get("path")), os.path.realpath(get_upload_folder())
    try:
        received = os.path.realpath(path).startswith(folder + os.sep) and os.path.isfile(path)
    except (OSError, ValueError):  # no path of this system
        received = False
    if not received:
        raise ValueError(f"this image was not uploaded here: {NO_IMAGE}.")
    return path


def _strengths(page: Page, values: tuple) -> tuple[dict[str, float], tuple]:
    """What the concepts' controls say, and the values after them."""
    d = len(page.concepts)
    chosen = {
        name: strength
        for name, on, strength in zip(page.concepts, values[:d], values[d : 2 * d])
        if on
    }
    return chosen, values[2 * d :]


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)


def _checked(seed: int | None) -> int:
    if seed is None:
        raise ValueError("give a seed: a whole number, 0 or larger.")
    return int(seed)


def _steps(page: Page) -> list[gr.Slider]:
    return (
        [gr.Slider(1, 100, STEPS, step=1, label="Denoising steps", buttons=[])]
        if page.denoises
        else []
    )


def _guidance(page: Page) -> list[gr.Slider]:
    label = "Guidance away from no interventions"
    return [gr.Slider(1, 10, 1, step=0.1, label=label, buttons=[])] if page.denoises else []


def _on(
    triggers: Sequence[Callable],
    function: Callable,
    inputs: Sequence[gr.components.Component] | None,
    outputs: gr.components.Component | Sequence[gr.components.Component],
    name: str | None = None,
    **options: Any,
) -> None:
    """Call a function when something happens: of what piled up meanwhile the last only, one call of
    the model at a time. What it raises is shown as a sentence."""

    @wraps(function)
    def spoken(request: gr.Request, *values: Any) -> Any:
        if CLIENTS.left(request):
            raise gr.Error("nobody waits for this any more.", print_exception=False)
        try:
            return function(*values)
        except Exception as error:
            if not (is_expected(error) or isinstance(error, RuntimeError)):
                raise
            raise gr.Error(sentence(error), print_exception=False) from error

    # Gradio reads there what it is to pass beside the inputs.
    own = signature(function)
    asks = Parameter("request", Parameter.POSITIONAL_OR_KEYWORD, annotation=gr.Request)
    spoken.__signature__ = own.replace(parameters=[asks, *own.parameters.values()])  # type: ignore[attr-defined]
    spoken.__annotations__ = {"request": gr.Request} | function.__annotations__
    options |= {"api_name": name} if name else {"api_visibility": "private"}
    options |= {
        "trigger_mode": "always_last",
        "concurrency_id": "model",
        "show_progress": "minimal",
    }
    gr.on(triggers, spoken, inputs, outputs, **options)


def serve(blocks: gr.Blocks, host: str | None = None, port: int | None = None) -> tuple:
    """Start the server in a thread; returns what `Blocks.launch` does."""
    try:
        return blocks.queue(max_size=MAX_WAITING).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            max_file_size="32mb",
            theme=gr.themes.Default(primary_hue="blue", font="sans-serif", font_mono="monospace"),
            app_kwargs={"middleware": [Middleware(CLIENTS.middleware)]},
            css=CSS,
            head=CSP,
        )
    except OSError as error:
        if port is None:
            raise
        raise OSError(
            f"cannot listen at port {port}: it is taken, or not allowed; choose another one."
        ) from error
