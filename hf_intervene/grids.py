"""Labelled grids of images, large enough to see. Pillow only: a command that writes one has no
other use for Matplotlib.
"""

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont


LEAST = 128  # pixels: an image is enlarged by a whole number until its shorter side has these
MOST = 2048  # pixels: a row of images is not enlarged beyond this width
GAP = 4  # pixels between two images
_FONT = 18


def labelled_grid(rows: Mapping[str, Sequence[Image.Image]], columns: int = 8) -> Image.Image:
    """Rows of images of one size, each row with its label on the left.

    Images are enlarged by a whole number, nearest neighbour, so that every pixel stays as it is.
    Rows longer than `columns` go on below: first the first images of every row, then the next.

    Args:
        rows: for each label, images of one size; every row has as many.
        columns: images side by side.

    Raises:
        ValueError: there is no row, or rows have different lengths.
    """
    counts = {len(images) for images in rows.values()}
    if len(counts) != 1 or 0 in counts:
        raise ValueError("a grid needs rows of images, and as many images in each row.")
    (count,) = counts
    columns = min(columns, count)
    width, height = next(iter(rows.values()))[0].size
    scale = max(1, min(-(-LEAST // min(width, height)), MOST // (columns * width)))
    width, height = width * scale, height * scale
    font = ImageFont.load_default(_FONT)
    left = max(int(font.getlength(label)) for label in rows) + 3 * GAP
    bands = -(-count // columns)
    step_x, step_y = width + GAP, height + GAP
    band = len(rows) * step_y + 2 * GAP
    grid = Image.new("RGB", (left + columns * step_x, bands * band - GAP), "white")
    draw = ImageDraw.Draw(grid)
    for number in range(bands):
        for row, (label, images) in enumerate(rows.items()):
            top = number * band + GAP + row * step_y
            draw.text(
                (left - 2 * GAP, top + height // 2), label, fill="black", font=font, anchor="rm"
            )
            for column, image in enumerate(images[number * columns : (number + 1) * columns]):
                large = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
                grid.paste(large, (left + column * step_x, top))
    return grid
