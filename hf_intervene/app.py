"""The page of `hf-intervene app`, laid out with Gradio: sample under interventions, edit images,
compose pairs, read the card. What the buttons do is in `page.py`.

Nothing is fetched at run time, neither fonts nor scripts, and nothing is reported to anybody.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, signature
from typing import Any

import numpy as np

from .errors import as_ctrl_c, is_expected, sentence
from .logging import disable_progress_bars
from .page import MAX_COMPOSED, NO_GRADIO, STRANGE, Page
from .page_clients import Clients
from .page_pictures import catalogue, note, people, side_by_side, words


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported

try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError as error:
    raise ImportError(NO_GRADIO) from error

from .page_controls import (  # noqa: E402
    NO_IMAGE,
    checked,
    chosen_strengths,
    concept_controls,
    draw_number,
    guidance_slider,
    next_number,
    run_button,
    steps_slider,
    uploaded,
)
from .page_style import CSP, CSS, THEME  # noqa: E402


CLIENTS = Clients()
MAX_IMAGES = 16
MAX_WAITING = 16  # requests: who comes later is refused at once
ABOUT = {
    "avatars": "Faces in pixel art. The model saw faces with glasses, with a beard, with a hat and"
    " with a smile, but never two of these together.",
    "quad": "Four coloured quadrants and a shape. They depend on each other: quad4, top right,"
    " changes the others too. The model never saw two of its concepts changed together.",
}


def build(page: Page) -> gr.Blocks:
    """The page as Gradio blocks."""
    what = ABOUT.get(page.title, f"A model of images with {len(page.concepts)} concepts.")
    with gr.Blocks(
        title=f"{page.title}: interventions", analytics_enabled=False, delete_cache=(3600, 3600)
    ) as blocks:
        gr.Markdown(
            f"# {page.title}\n{what} Switch concepts on, alone or together, and see what changes"
            " and what stays."
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
            gr.Markdown(page.card(), elem_classes="card")
    return blocks


def _sample_tab(page: Page, blocks: gr.Blocks) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            controls = concept_controls(page)
            with gr.Row():
                other = gr.Button("Other images", size="md", min_width=120)
                button = run_button(page, "Generate")
            changed = gr.Checkbox(False, label="Show what changed")
            with gr.Accordion("More", open=page.slow):
                num_images = gr.Slider(
                    1, MAX_IMAGES, page.few, step=1, label="How many images", buttons=[]
                )
                draw = draw_number()
                denoising = [*steps_slider(page), *guidance_slider(page, page.guidance)]
        with gr.Column(scale=3, min_width=280):
            result = gr.HTML(elem_id="samples")

    def sample(*values: Any) -> str:
        strengths, (n, number, shown, *options) = chosen_strengths(page, values)
        before, after, change, name = page.sample(strengths, n, number, *options)
        rows = {"as it is": before}
        if name != "obs":
            rows[f"with {words(name)}"] = after
            rows |= {"what changed (dark)": change} if shown else {}
        return people(rows)

    inputs = [*controls, num_images, draw, changed, *denoising]
    at_once = [] if page.slow else [blocks.load, *(part.change for part in inputs)]
    _on([button.click, *at_once], sample, inputs, result, "sample")
    other.click(next_number, draw, draw, api_visibility="private")


def _edit_tab(page: Page, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            controls = concept_controls(page)
            changed = gr.Checkbox(False, label="Show what changed")
            denoising = [*steps_slider(page), *guidance_slider(page)]
            button = run_button(page, "Edit")
            came_from = gr.Dropdown(
                list(page.concepts),
                multiselect=True,
                label="What the image shows already",
                info="Only if these concepts were switched on to make it. Else leave it empty.",
            )
        with gr.Column(scale=3, min_width=280, elem_classes="result"):
            result = gr.HTML(elem_id="edited")
    with gr.Row():
        examples = gr.Gallery(
            label="Pick an image",
            columns=6,
            rows=1,
            format="png",
            allow_preview=False,
            elem_classes="examples",
            buttons=[],
            scale=3,
        )
        image = gr.Image(
            label="or upload one",
            alt_text="The image that is edited",
            type="filepath",
            sources=["upload", "clipboard"],
            format="png",
            height=200,
            elem_classes="examples",
            scale=1,
            min_width=240,
        )
    start = gr.Button("Draw some images to edit", size="md", visible=page.slow)

    def edit(file: dict[str, Any] | None, context: list[str], shown: bool, *values: Any) -> str:
        if file is None:
            raise ValueError(f"{NO_IMAGE}.")
        strengths, options = chosen_strengths(page, values)
        given, unchanged, edited, change, name = page.edit(
            uploaded(file), context, strengths, *options
        )
        shown_images = {"before": given, f"after: {words(name)}": edited}
        if shown:
            shown_images |= {"returned unedited": unchanged, "what changed (dark)": change}
        return _warning(given, unchanged) + side_by_side(shown_images)

    def pick(event: gr.SelectData) -> np.ndarray:
        return _shown(page.examples)[event.index]

    def offer() -> tuple[list[tuple[np.ndarray, str]], np.ndarray]:
        images = _shown(page.examples)
        captions = [f"image {number + 1} to edit" for number in range(len(images))]
        return list(zip(images, captions)), images[0]

    inputs = [image, came_from, changed, *controls, *denoising]
    _on([button.click], edit, inputs, result, "edit")
    if not page.slow:

        def live(file: dict[str, Any] | None, *values: Any) -> str:
            return edit(file, *values) if file else ""

        _on([part.change for part in inputs], live, inputs, result)
    _on([start.click if page.slow else tab.select], offer, None, [examples, image])
    _on([examples.select], pick, None, image)


def _compose_tab(page: Page, tab: gr.Tab) -> None:
    gr.Markdown("One image as it is, with each concept, and with every pair of them.")
    chosen = gr.CheckboxGroup(
        list(page.concepts),
        value=list(page.concepts[:6]),
        label=f"Concepts (two to {MAX_COMPOSED})",
    )
    with gr.Row():
        draw = draw_number()
        steps = steps_slider(page)
        other = gr.Button("Another image", size="md", min_width=120)
        button = run_button(page, "Compose")
    result = gr.HTML(elem_id="pairs")

    def compose(names: list[str], number: int, *options: int) -> str:
        images = page.compose(names, number, *options)
        return catalogue({words(name): image for name, image in images.items()})

    inputs: list[Any] = [chosen, draw, *steps]
    at_once = [] if page.slow else [tab.select, *(part.change for part in inputs)]
    _on([button.click, *at_once], compose, inputs, result, "compose")
    other.click(next_number, draw, draw, api_visibility="private")


def _shown(images: np.ndarray) -> list[np.ndarray]:
    """Images (n, H, W, C) as Gradio takes them: grey ones as (H, W)."""
    return [image.squeeze(-1) if image.shape[-1] == 1 else image for image in images]


def _warning(given: np.ndarray, unchanged: np.ndarray) -> str:
    """A sentence where the model does not know images like the given one, else nothing."""
    error = np.sqrt(np.mean((given / 255.0 - unchanged / 255.0) ** 2))
    if error <= STRANGE:
        return ""
    return note(
        "The model cannot draw this image: it only knows images like those that it was trained on."
        " What you see is the nearest that it can do."
    )


def _on(
    triggers: Sequence[Callable],
    function: Callable,
    inputs: Sequence[gr.components.Component] | None,
    outputs: gr.components.Component | Sequence[gr.components.Component],
    name: str | None = None,
) -> None:
    """Call a function when something happens: of what piled up meanwhile the last only, one call of
    the model at a time. What it raises is shown as a sentence.
    """

    parts = inputs or ()

    @wraps(function)
    def spoken(request: gr.Request, *values: Any) -> Any:
        if CLIENTS.left(request):
            raise gr.Error("nobody waits for this any more.", print_exception=False)
        try:
            return function(*map(checked, parts, values), *values[len(parts) :])
        except Exception as error:
            if not (is_expected(error) or isinstance(error, RuntimeError)):
                raise
            raise gr.Error(sentence(error), print_exception=False) from error

    # Gradio reads there what it is to pass beside the inputs.
    own = signature(function)
    asks = Parameter("request", Parameter.POSITIONAL_OR_KEYWORD, annotation=gr.Request)
    spoken.__signature__ = own.replace(parameters=[asks, *own.parameters.values()])  # type: ignore[attr-defined]
    spoken.__annotations__ = {"request": gr.Request} | function.__annotations__
    options: dict[str, Any] = {"api_name": name} if name else {"api_visibility": "private"}
    options |= {
        "trigger_mode": "always_last",
        "concurrency_id": "model",
        "show_progress": "minimal",
        "preprocess": False,  # or Gradio would open files and check values, and fail in its words
    }
    gr.on(triggers, spoken, inputs, outputs, **options)


def serve(blocks: gr.Blocks, host: str | None = None, port: int | None = None) -> tuple:
    """Start the server in a thread; returns what `Blocks.launch` does."""
    try:
        return blocks.queue(max_size=MAX_WAITING, api_open=False).launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            max_file_size="32mb",
            theme=THEME,
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


@as_ctrl_c(signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
def launch(
    name: str | os.PathLike,
    host: str | None = None,
    port: int | None = None,
    revision: str | None = None,
) -> None:
    """Serve the page of a pipeline until Ctrl-C.

    Args:
        name, revision: see `Page`.
        host: address to listen at; `None`: GRADIO_SERVER_NAME, or 127.0.0.1, this machine only.
        port: `None`: GRADIO_SERVER_PORT, or the first free one from 7860 on.

    Raises:
        OSError, ValueError, TypeError: one sentence: no such pipeline, the port is taken.
    """
    disable_progress_bars()
    blocks = None
    try:
        page = Page(name, revision)
        if sys.stdout.isatty():
            print(f"loading {page.title} ...", flush=True)
        page.load()
        blocks = build(page)
        _, url, _ = serve(blocks, host, port)
        print(f"{page.title}: {url}   (open it in a browser; Ctrl-C ends it)", flush=True)
        while True:
            time.sleep(0.2)
    except KeyboardInterrupt:
        print("closed.", flush=True)
    finally:
        if blocks is not None:
            blocks.close(verbose=False)
