"""The page of `hf-intervene app`: sample under interventions, edit images, compose pairs, read the card. Thin: `Page` holds what the
buttons do, by the pipeline and the pictures of `plots.py`; `build` lays it out with Gradio.

Nothing is fetched at run time, neither fonts nor scripts, and nothing is reported to anybody.
"""

import os
import random
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, wraps
from io import BytesIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from . import cards, hub
from .contexts import OBS, Context, context_name
from .pipeline import InterventionPipeline, open_image
from .plots import difference, pairs_grid, to_uint8
from .pretrained import located


os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # Gradio reads it when it is imported

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the page needs Gradio, which is not installed: pip install "hf-intervene[app]".') from error


FILES = (*hub.SAVED_FILES, cards.CARD_FILE, "*.png")  # of a repository on the Hub, what the page shows
MAX_IMAGES, MAX_SEED = 16, 2**31 - 1
MAX_COMPOSED = 8  # concepts in the grid of pairs
STEPS = 20  # of a denoiser: fewer than the pipeline's own, or a processor takes minutes

# The browser itself refuses whatever a card or a library may want to fetch from elsewhere.
CSP = "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'\">"
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
"""


class Page:
    """What the buttons of the page do, for one pipeline.

    Args:
        name: folder or Hub name of a saved pipeline, or of one that comes with the package.
        revision: of a repository on the Hub: branch, tag or commit.
    """

    def __init__(self, name: str | os.PathLike, revision: str | None = None):
        self.name, self.folder = name, hub.folder(located(name), FILES, revision=revision)
        self.model = InterventionPipeline.from_pretrained(self.folder).model
        self.concepts, self.denoises = self.model.concepts, self.model.base.denoises
        self._observational = lru_cache(maxsize=4)(self._draw_observational)  # of a denoiser it takes as long as the rest

    @property
    def title(self) -> str:
        return Path(self.name).resolve().name

    def sample(
        self, strengths: dict[str, float], num_images: int, seed: int, steps: int = STEPS, guidance: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Observational samples and, of the same noise, samples under interventions, each uint8 (n, H, W, C)."""
        before = self._observational(num_images, seed, steps)
        if context_name(strengths, self.concepts) == OBS:
            return before, before
        return before, self._draw(strengths, num_images, seed, num_inference_steps=int(steps), guidance_scale=guidance)

    def edit(
        self, image: Image.Image, came_from: list[str], strengths: dict[str, float], steps: int = STEPS, guidance: float = 1.0
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """An image as the model takes it (cropped and resized), as it returns it unchanged, and edited, each uint8 (H, W, C)."""
        channels, height, width = self.model.base.image_shape
        image = ImageOps.fit(ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB"), (width, height))
        x = self.model.preprocess(image)
        options: dict[str, Any] = {"num_inference_steps": int(steps)} if self.denoises else {}
        noise = self.model.abduct(x, self.model.targets(came_from, 1), **options)
        same = self.model.predict(*noise, came_from, "np", **options)
        other = self.model.predict(*noise, strengths, "np", guidance_scale=guidance, **options)
        given, unchanged, edited = (to_uint8(np.asarray(images)[0]) for images in (x.movedim(1, -1).cpu(), same, other))
        return given, unchanged, edited

    def compose(self, concepts: list[str], seed: int, steps: int = STEPS) -> Image.Image:
        """A picture of all pairs of some concepts, of one draw of noise; see `plots.pairs_grid`."""
        if not 1 < len(concepts) <= MAX_COMPOSED:
            raise ValueError(f"choose two to {MAX_COMPOSED} concepts to compose, not {len(concepts)}.")
        contexts = [[], *([name] for name in concepts), *map(list, combinations(concepts, 2))]
        images = [self._draw(context, 1, seed, num_inference_steps=int(steps))[0] for context in contexts]
        names = [context_name(context, self.concepts) for context in contexts]
        figure = pairs_grid(dict(zip(names, images)), [name for name in self.concepts if name in concepts])
        return _drawn(figure)

    @property
    def few(self) -> int:
        """Images at once, unless more are asked for: of a denoiser each takes a while."""
        return 2 if self.denoises else 8

    def examples(self) -> np.ndarray:
        """Observational samples to edit, uint8 (few, H, W, C)."""
        return self._observational(self.few, 1, STEPS)

    def card(self) -> str:
        """The pipeline's card as Markdown, its pictures left out; a sentence where there is none."""
        return cards.card_text(self.folder) or (
            f"This pipeline has no card; `hf-intervene card {self.name}` writes one. Its concepts are {', '.join(self.concepts)}."
        )

    def pictures(self) -> list[tuple[str, str]]:
        """The pictures of the card, with captions."""
        captions = {
            cards.FLOORS_FILE: "Distances to real images, and their floors",
            cards.SAMPLES_FILE: "Samples of every context",
        }
        return [(str(self.folder / name), text) for name, text in captions.items() if (self.folder / name).exists()]

    def _draw_observational(self, num_images: int, seed: int, steps: int) -> np.ndarray:
        return self._draw(OBS, num_images, seed, num_inference_steps=int(steps))

    def _draw(self, context: Context, num_images: int, seed: int, **options: Any) -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)  # so that every context has the same noise
        return to_uint8(np.asarray(self.model.sample(context, num_images, generator, output_type="np", **options)))


def _shown(images: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Images (H, W, C) as Gradio takes them: grey ones as (H, W)."""
    return [image.squeeze(-1) if image.shape[-1] == 1 else image for image in images]


def _drawn(figure: Figure) -> Image.Image:
    """A Matplotlib figure as an image."""
    with BytesIO() as file:
        figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
        return Image.open(file).convert("RGB")


def build(page: Page) -> gr.Blocks:
    """The page as Gradio blocks."""
    with gr.Blocks(title=f"{page.title}: interventions", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# {page.title}\nSwitch concepts on, alone or together, and see what changes and what stays as it was.")
        with gr.Tab("Sample"):
            _sample_tab(page, blocks)
        with gr.Tab("Edit") as tab:
            _edit_tab(page, tab)
        with gr.Tab("Compose") as tab:
            _compose_tab(page, tab)
        with gr.Tab("About"):
            for path, caption in page.pictures():
                gr.Image(path, label=caption, alt_text=caption, interactive=False, elem_classes="picture", buttons=["fullscreen"])
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
                other = gr.Button("Other seed" if page.denoises else "Other images", size="md", min_width=120)
                button = gr.Button("Generate", variant="primary", size="md", min_width=120)
        with gr.Column(scale=3, min_width=280):
            with gr.Row():
                before, after, change = (
                    gr.Gallery(label=label, columns=4, format="png", elem_classes="pixels", min_width=220, buttons=["fullscreen"])
                    for label in ("Observational", "Intervened on", "Changed")
                )
            gr.Markdown(
                "All three have the same noise, image by image. *Changed*: white where the first two are the same, black from half of "
                "the range on."
            )

    def sample(*values: Any) -> tuple[list[np.ndarray], gr.Gallery, list[np.ndarray]]:
        strengths, (n, chosen_seed, *options) = _strengths(page, values)
        observational, intervened = page.sample(strengths, int(n), _checked(chosen_seed), *options)
        name = context_name(strengths, page.concepts)
        label = "Nothing is intervened on" if name == OBS else name
        change = _shown(difference(observational, intervened))
        return _shown(observational), gr.Gallery(_shown(intervened), label=label), change

    inputs, outputs = [*controls, num_images, seed, *denoising], [before, after, change]
    at_once = [] if page.denoises else [blocks.load, *(part.change for part in (*controls, num_images, seed))]
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
                label="or one of these", columns=4, format="png", allow_preview=False, elem_classes="pixels", buttons=[]
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
                "The noise behind the image is kept, the interventions are replaced. *Unchanged* is what the model returns when nothing is "
                "edited: what is lost there is not the edit's doing. *Change* compares it with the edited image (white: nothing)."
            )

    def edit(file: dict[str, Any] | None, context: list[str] | None, *values: Any) -> gr.Gallery:
        if file is None:
            raise ValueError("give an image first: upload one, or pick one of those below.")
        strengths, options = _strengths(page, values)
        given, unchanged, edited = page.edit(open_image(file["path"]), context or [], strengths, *options)
        pictures = [given, unchanged, edited, *difference(unchanged[None], edited[None])]
        captions = ["given", "unchanged", "edited", "change"]
        return gr.Gallery(list(zip(_shown(pictures), captions)), label=f"Edited: {context_name(strengths, page.concepts)}")

    def pick(event: gr.SelectData) -> np.ndarray:
        return _shown(page.examples())[event.index]

    inputs = [image, came_from, *controls, *denoising]
    _on([button.click], edit, inputs, result, "edit", preprocess=False)  # Gradio would open the file, and fail in its own words
    if not page.denoises:

        def live(file: dict[str, Any] | None, *values: Any) -> gr.Gallery | list:
            return edit(file, *values) if file else []

        _on([part.change for part in (image, came_from, *controls)], live, inputs, result, preprocess=False)
    _on([draw.click if page.denoises else tab.select], lambda: _shown(page.examples()), None, examples)
    _on([examples.select], pick, None, image)


def _compose_tab(page: Page, tab: gr.Tab) -> None:
    chosen = gr.CheckboxGroup(list(page.concepts), value=list(page.concepts[:6]), label=f"Concepts (two to {MAX_COMPOSED})")
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
        "One draw of noise. Below the diagonal: under the interventions of row and column together. Above it: how that differs from the "
        "observational image in the corner."
    )

    def compose(names: list[str], chosen_seed: int | None, *options: int) -> Image.Image:
        return page.compose(names, _checked(chosen_seed), *options)

    _on([button.click, *([] if page.denoises else [tab.select])], compose, [chosen, seed, *steps], picture, "compose")


def _concept_controls(page: Page) -> list:
    """A switch for each concept, then a strength for each; moving a strength turns its switch on."""
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


def _strengths(page: Page, values: tuple) -> tuple[dict[str, float], tuple]:
    """What the concepts' controls say, and the values after them."""
    d = len(page.concepts)
    chosen = {name: strength for name, on, strength in zip(page.concepts, values[:d], values[d : 2 * d]) if on}
    return chosen, values[2 * d :]


def _seed() -> gr.Number:
    return gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=120)


def _checked(seed: int | None) -> int:
    if seed is None:
        raise ValueError("give a seed: a whole number, 0 or larger.")
    return int(seed)


def _steps(page: Page) -> list[gr.Slider]:
    return [gr.Slider(1, 100, STEPS, step=1, label="Denoising steps", buttons=[])] if page.denoises else []


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
    """Call a function when something happens: of what piled up meanwhile the last only, one call of the model at a time. What it raises is
    shown as a sentence."""

    @wraps(function)
    def spoken(*values: Any) -> Any:
        try:
            return function(*values)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    options |= {"api_name": name} if name else {"api_visibility": "private"}
    options |= {"trigger_mode": "always_last", "concurrency_id": "model", "show_progress": "minimal"}
    gr.on(triggers, spoken, inputs, outputs, **options)


def launch(name: str | os.PathLike, host: str | None = None, port: int | None = None, revision: str | None = None) -> None:
    """Serve the page of a pipeline until Ctrl-C.

    Args:
        name, revision: see `Page`.
        host: address to listen at; `None`: GRADIO_SERVER_NAME, or 127.0.0.1, this machine only.
        port: `None`: GRADIO_SERVER_PORT, or the first free one from 7860 on.

    Raises:
        OSError, ValueError: one sentence: no such pipeline, the port is taken.
    """
    page = Page(name, revision)
    blocks = build(page)
    _, url, _ = serve(blocks, host, port)
    print(f"{page.title}: {url}   (Ctrl-C ends it)", flush=True)
    blocks.block_thread()


def serve(blocks: gr.Blocks, host: str | None = None, port: int | None = None) -> tuple:
    """Start the server in a thread; returns what `Blocks.launch` does."""
    try:
        return blocks.launch(
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
            css=CSS,
            head=CSP,
        )
    except OSError as error:
        if port is None:
            raise
        raise OSError(f"cannot listen at port {port}: it is taken, or not allowed; choose another one.") from error
