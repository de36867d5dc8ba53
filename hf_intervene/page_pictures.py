"""The pictures of the page as HTML: figures with captions and texts for screen readers."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from io import BytesIO

import numpy as np
from PIL import Image


SMALL = 128  # pixels: images up to this side are shown with their pixels


def words(name: str) -> str:
    """The name of a context in words: `obs` as "as it is", `a+b=0.5` as "a + half b"."""
    if name == "obs":
        return "as it is"
    parts = []
    for part in name.split("+"):
        concept, equals, strength = part.partition("=")
        parts.append(f"{concept} ({float(strength):.0%})" if equals else concept)
    return " + ".join(parts)


def picture(image: np.ndarray, text: str) -> str:
    """An image (H, W, C), uint8, with its text for screen readers."""
    shown = image.squeeze(-1) if image.shape[-1] == 1 else image
    with BytesIO() as file:
        Image.fromarray(shown).save(file, format="png")
        data = base64.b64encode(file.getvalue()).decode()
    kind = "small" if max(image.shape[:2]) <= SMALL else "large"
    return f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{escape(text)}">'


def figure(image: np.ndarray, caption: str, text: str) -> str:
    """An image with a caption below it."""
    return f"<figure>{picture(image, text)}<figcaption>{escape(caption)}</figcaption></figure>"


def people(rows: Mapping[str, np.ndarray]) -> str:
    """A card for each image number: that image of every row, one below the other.

    Args:
        rows: for each caption, images (n, H, W, C), the same number in each.
    """
    count = len(next(iter(rows.values())))
    cards = [
        "".join(
            figure(images[number], caption, f"Image {number + 1}, {caption}")
            for caption, images in rows.items()
        )
        for number in range(count)
    ]
    return _grid("people", [f'<div class="person">{card}</div>' for card in cards])


def side_by_side(images: Mapping[str, np.ndarray]) -> str:
    """Images (H, W, C) beside each other, by their captions."""
    return _grid("pair", [figure(image, caption, caption) for caption, image in images.items()])


def catalogue(images: Mapping[str, np.ndarray]) -> str:
    """Images (H, W, C) by their captions, as many in a row as there is room for."""
    return _grid("people", [figure(image, caption, caption) for caption, image in images.items()])


def note(text: str) -> str:
    """A sentence that must be seen."""
    return f'<p class="note" role="status">{escape(text)}</p>'


def _grid(kind: str, parts: Sequence[str]) -> str:
    return f'<div class="pictures {kind}">{"".join(parts)}</div>'
