"""What the buttons of the page do. Its layout is in `app.py`. Torch is imported with the model
only.
"""

import os
from functools import cached_property, lru_cache
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from . import cards, hub
from .image_files import check_size, open_image
from .pixels import difference, to_uint8
from .pretrained import concepts_of, located
from .yaml_files import SETTINGS_FILE, read_settings


if TYPE_CHECKING:
    from .contexts import Context
    from .model import InterventionModel

# Of a repository on the Hub, what the page shows.
FILES = (*hub.SAVED_FILES, cards.CARD_FILE, SETTINGS_FILE, "*.png")
MAX_PIXELS = 32 * 10**6  # of an image to edit: a few seconds
MAX_COMPOSED = 8  # concepts in the grid of pairs
NO_GRADIO = 'the page needs Gradio, which is not installed: pip install "hf-intervene[app]".'
# Weights of a denoiser that draws as soon as anything changes: eight images of one of 5 MB take a
# tenth of a second in ten steps on two cores.
MOST_BYTES_AT_ONCE = 20_000_000
MAX_GUIDANCE = 10  # that the page offers
STEPS = 20  # of a denoiser: fewer than the pipeline's own, or a processor takes minutes
EXAMPLES = 6  # images to edit that the page offers
STRANGE = 0.12  # root mean square change of an image by an edit to nothing; above, it is unlike
# the images of the training (held-out faces of avatars: 0.03)


class Page:
    """What the buttons of the page do, for one pipeline or model. What the layout needs is read
    from its files; the model is loaded when it is first used.

    Args:
        name: folder or Hub name of a saved pipeline or model, or of a pipeline that comes with the
            package.
        revision: of a repository on the Hub: branch, tag or commit.

    Raises:
        OSError, ValueError: one sentence: there is none.
    """

    def __init__(self, name: str | os.PathLike, revision: str | None = None):
        self.name, self.folder = name, hub.folder(located(name), FILES, revision=revision)
        self.concepts = concepts_of(self.folder)
        self.denoises = (self.folder / "scheduler").is_dir()
        weights = sum(file.stat().st_size for file in (self.folder / "base").glob("*.safetensors"))
        # Of a denoiser that is elsewhere nothing is known.
        self.slow = self.denoises and not 0 < weights <= MOST_BYTES_AT_ONCE
        # Of a denoiser the observational images take as long as the rest.
        self._observational = lru_cache(maxsize=4)(self._draw_observational)

    @property
    def title(self) -> str:
        return Path(self.name).resolve().name

    @property
    def guidance(self) -> float:
        """How strongly concepts act in samples, unless asked otherwise."""
        adapter = self.folder / "adapter" / "config.json"
        value = hub.read_config(adapter).get("guidance") if adapter.is_file() else None
        return value if isinstance(value, float | int) and 1 <= value <= MAX_GUIDANCE else 1.0

    @cached_property
    def model(self) -> "InterventionModel":
        from . import pipeline

        model = pipeline.load_for_use(self.folder)
        if len(model.base.image_shape) != 3:
            raise ValueError(f"{self.title} makes clips, and the page shows images: use sample.")
        return model

    def load(self) -> None:
        """Load the model now.

        Raises:
            OSError, ValueError, TypeError: one sentence: it cannot be loaded.
        """
        _ = self.model

    def sample(
        self,
        strengths: dict[str, float],
        num_images: int,
        seed: int,
        steps: int = STEPS,
        guidance: float | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
        """Observational samples; of the same noise, samples under interventions; how they differ,
        see `pixels.difference`, each uint8 (n, H, W, channels); and the name of the context.
        """
        from .contexts import OBS, context_name

        before = self._observational(num_images, seed, steps)
        name = context_name(strengths, self.concepts)
        options = {"num_inference_steps": int(steps), "guidance_scale": guidance}
        after = before if name == OBS else self._draw(strengths, num_images, seed, **options)
        return before, after, difference(before, after), name

    def edit(
        self,
        image: Image.Image | str,
        came_from: list[str],
        strengths: dict[str, float],
        steps: int = STEPS,
        guidance: float = 1.0,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, str]:
        """An image (or its file) as the model takes it, cropped and resized; as it returns it
        unchanged; edited; how the last two differ, each uint8 (H, W, channels); and the name of the
        context.
        """
        from .contexts import context_name
        from .pipeline import fit_image

        image = open_image(image, MAX_PIXELS) if isinstance(image, str) else image
        check_size(image, "the image", MAX_PIXELS)
        image = fit_image(image, self.model)
        x = self.model.preprocess(image)
        options: dict[str, Any] = {"num_inference_steps": int(steps)} if self.denoises else {}
        noise = self.model.abduct(x, self.model.targets(came_from, 1), **options)
        same = self.model.predict(*noise, came_from, "np", **options)
        other = self.model.predict(*noise, strengths, "np", guidance_scale=guidance, **options)
        given, unchanged, edited = (
            to_uint8(np.asarray(images)[:1]) for images in (x.movedim(1, -1).cpu(), same, other)
        )
        change = difference(unchanged, edited)
        return given[0], unchanged[0], edited[0], change[0], context_name(strengths, self.concepts)

    def compose(self, concepts: list[str], seed: int, steps: int = STEPS) -> dict[str, np.ndarray]:
        """One image as it is, under each of some concepts, and under each pair of them: uint8 (H,
        W, channels) by the name of the context, all of the same noise.

        Raises:
            ValueError: one sentence: too few or too many concepts.
        """
        if not 1 < len(concepts) <= MAX_COMPOSED:
            raise ValueError(
                f"choose two to {MAX_COMPOSED} concepts to compose, not {len(concepts)}."
            )
        from .contexts import context_name

        contexts = [[], *([name] for name in concepts), *map(list, combinations(concepts, 2))]
        return {
            context_name(context, self.concepts): self._draw(
                context, 1, seed, num_inference_steps=int(steps)
            )[0]
            for context in contexts
        }

    @property
    def few(self) -> int:
        """Images at once, unless more are asked for: of a large denoiser each takes a while."""
        return 2 if self.slow else 4

    @cached_property
    def examples(self) -> np.ndarray:
        """Images to edit, uint8 (EXAMPLES, H, W, C): held-out faces for a model of avatars,
        otherwise observational samples.
        """
        if read_settings(self.folder).get("dataset") == "avatars":
            from .data import avatars

            side = self.model.base.image_shape[-1]
            if self.model.base.image_shape[0] == 3 and side % 16 == 0:
                return avatars.twins(["obs"], side)["obs"][:EXAMPLES]
        return self._observational(EXAMPLES, 1, STEPS)

    def card(self) -> str:
        """The pipeline's card as Markdown, its pictures left out; a sentence where there is none."""  # noqa: E501
        return cards.card_text(self.folder) or (
            f"This pipeline has no card; `hf-intervene card {self.name}` writes one. Its concepts"
            f" are {', '.join(self.concepts)}."
        )

    def pictures(self) -> list[tuple[str, str]]:
        """The pictures of the card, with captions."""
        captions = {
            cards.SAMPLES_FILE: "Samples of every context",
            cards.FLOORS_FILE: "Distances to real images, and their floors",
        }
        return [
            (str(self.folder / name), text)
            for name, text in captions.items()
            if (self.folder / name).exists()
        ]

    def _draw_observational(self, num_images: int, seed: int, steps: int) -> np.ndarray:
        return self._draw("obs", num_images, seed, num_inference_steps=int(steps))

    def _draw(self, context: "Context", num_images: int, seed: int, **options: Any) -> np.ndarray:
        import torch

        generator = torch.Generator().manual_seed(seed)  # so that every context has the same noise
        return to_uint8(
            np.asarray(
                self.model.sample(context, num_images, generator, output_type="np", **options)
            )
        )
