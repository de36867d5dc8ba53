"""Pictures: contexts with real images above generated ones, edits, and one image along the range of each concept."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from .contexts import Interventions, Quantile
from .model import ImageInput, InterventionModel


def _show(axis: matplotlib.axes.Axes, images: np.ndarray) -> None:
    """Images (n, H, W, C) side by side, a pixel of white between them."""
    padded = np.pad(np.asarray(images), ((0, 0), (0, 0), (0, 1), (0, 0)), constant_values=255)
    strip = np.concatenate(list(padded), axis=1)
    axis.imshow(strip.squeeze(-1) if strip.shape[-1] == 1 else strip, cmap="gray", vmin=0, vmax=255)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [0, 1] as uint8."""
    return (images * 255).round().astype("uint8")


def contexts_grid(
    real: Mapping[str, np.ndarray],
    generated: Mapping[str, np.ndarray],
    unseen: Sequence[str] = (),
    columns: int = 2,
    images: int = 8,
) -> Figure:
    """For each context a strip of real images above a strip of generated ones; unseen compositions are marked.

    Args:
        real: uint8 images (n, H, W, C) of each context.
        generated: likewise.
        unseen: contexts that no training image came from.
        columns: contexts side by side.
        images: images in a strip.
    """
    names = list(real)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(columns * (images * 0.55 + 0.9), rows * 1.55), layout="constrained")
    outer = figure.subfigures(rows, columns, squeeze=False)
    for position, (row, column) in enumerate(np.ndindex(rows, columns)):
        if position >= len(names):
            continue
        name = names[position]
        axes = outer[row, column].subplots(2, 1)
        outer[row, column].suptitle(f"{name}  (never seen)" if name in unseen else name, fontsize=9)
        for axis, label, source in zip(axes, ("real", "generated"), (real, generated)):
            _show(axis, source[name][:images])
            axis.set_ylabel(label, fontsize=7)
    return figure


def edit_strips(originals: np.ndarray, edits: Mapping[str, np.ndarray]) -> Figure:
    """Original images, and below them the same images under each edit.

    Args:
        originals: uint8 images (n, H, W, C).
        edits: for each label, uint8 images of the same shape.
    """
    return strips({"original": originals} | dict(edits))


def strips(rows: Mapping[str, np.ndarray]) -> Figure:
    """A labelled strip of images for each entry, one below the other.

    Args:
        rows: for each label, uint8 images (n, H, W, C).
    """
    width = max(len(images) for images in rows.values())
    figure = Figure(figsize=(width * 0.75 + 1.2, len(rows) * 0.8), layout="constrained")
    for axis, (label, images) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items()):
        _show(axis, images)
        axis.set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
    return figure


def traversal(
    model: InterventionModel,
    image: ImageInput,
    context: Interventions = None,
    quantiles: Sequence[float] = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95),
    **options: Any,
) -> Figure:
    """Edits of one image along the learnt range of each concept (see `values.py`), a strip for each concept, and the image above.

    Args:
        model: an `InterventionModel`, or the `model` of a pipeline.
        image: one image.
        context: the context that it came from.
        quantiles: of the range, from left to right.
        **options: of `InterventionModel.predict`, such as `num_inference_steps` of a denoiser.
    """
    x = model.preprocess(image)[:1]
    steps = {key: value for key, value in options.items() if key == "num_inference_steps"}
    noise, residual = model.abduct(x, model.targets(context, 1), **steps)
    noise = noise.expand(len(quantiles), *noise.shape[1:])
    residual = None if residual is None else residual.expand(len(quantiles), *residual.shape[1:])
    rows = {"image": to_uint8(x.movedim(1, -1).cpu().numpy())}
    for name in model.concepts:
        edits = model.predict(noise, residual, [{name: Quantile(q)} for q in quantiles], output_type="np", **options)
        rows[name] = to_uint8(np.asarray(edits))
    return strips(rows)


def plot_matrices(
    matrices: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str = "",
    shared: bool = True,
    per_row: int = 3,
) -> Figure:
    """Heat maps side by side, the numbers written in their cells. The colours are safe for the colour-blind: from yellow to dark blue, or
    from orange over white to purple where there are negative entries.

    Args:
        matrices: for each title a matrix (rows, columns); NaN is left blank.
        rows: names of the rows.
        columns: names of the columns.
        label: what the numbers are.
        shared: whether all have one scale; otherwise each has its own, and no colour bar.
        per_row: heat maps in a row.
    """
    across = min(per_row, len(matrices))
    down = -(-len(matrices) // across)
    size = (across * (0.5 * len(columns) + 0.3) + 1.7, down * (0.34 * len(rows) + 1.2) + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for axis in axes[len(matrices) :]:
        axis.set_visible(False)
    tops = [float(np.nanmax(np.abs(matrix), initial=1e-12)) for matrix in matrices.values()]
    signed = any(np.nanmin(matrix, initial=0) < 0 for matrix in matrices.values())
    for axis, (title, matrix), own in zip(axes, matrices.items(), tops):
        top = max(tops) if shared else own
        image = axis.imshow(matrix, cmap="PuOr" if signed else "cividis_r", vmin=-top if signed else 0, vmax=top, aspect="auto")
        axis.set_title(title, fontsize=9)
        axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor", fontsize=7)
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        for i, j in np.argwhere(np.isfinite(matrix)):
            dark = abs(matrix[i, j]) > (0.65 if signed else 0.5) * top
            axis.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=6, color="white" if dark else "black")
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
    if shared:
        bar = figure.colorbar(image, ax=axes.tolist(), aspect=25)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=7)
    else:
        figure.supxlabel(label, fontsize=8)
    return figure


__all__ = ["contexts_grid", "edit_strips", "traversal"]
