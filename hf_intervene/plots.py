"""Pictures: contexts real above generated, edits and what they changed, traversals, training
curves, distances and floors.

Every function returns a Matplotlib figure; `save` writes it as PNG or SVG. Colours are safe for the
colour-blind (those of Okabe and Ito, 2008; the maps cividis and PuOr), and no
information is given by colour alone."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from .card_metrics import shown_protocol
from .contexts import Interventions, Quantile
from .files import replacing
from .generation import GenerationMixin
from .pixels import difference, to_uint8
from .sampling_arguments import ImageInput


BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
FORMATS = (".png", ".svg")


def save(figure: Figure, path: str | os.PathLike, dpi: int = 130) -> Path:
    """Write a figure as PNG or SVG, as the suffix says, whole or not at all; the same figure gives
    the same file.

    Raises:
        ValueError: another suffix.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"pictures are written as {' or '.join(FORMATS)}, not {path.name!r}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix.lower().removeprefix(".")
    try:
        metadata = {"Date": None} if kind == "svg" else None
        with (
            matplotlib.rc_context({"svg.hashsalt": "hf-intervene", "svg.fonttype": "none"}),
            replacing(path) as partial,
        ):
            figure.savefig(partial, format=kind, dpi=dpi, bbox_inches="tight", metadata=metadata)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}).") from error
    return path


def _show(axis: matplotlib.axes.Axes, images: np.ndarray, below: np.ndarray | None = None) -> None:
    """Images (n, H, W, C) side by side, a pixel of white between them, and as many others below."""
    strip = _strip(images) if below is None else np.concatenate([_strip(images), _strip(below)])
    strip = strip.squeeze(-1) if strip.shape[-1] == 1 else strip
    axis.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _strip(images: np.ndarray) -> np.ndarray:
    padded = np.pad(np.asarray(images), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    return np.concatenate(list(padded), axis=1)


def contexts_grid(
    real: Mapping[str, np.ndarray],
    generated: Mapping[str, np.ndarray],
    unseen: Sequence[str] = (),
    columns: int = 2,
    images: int = 8,
) -> Figure:
    """For each context a strip of real images above a strip of generated ones; unseen compositions
    are marked.

    Args:
        real: uint8 images (n, H, W, C) of each context.
        generated: likewise.
        unseen: contexts that no training image came from.
        columns: contexts side by side.
        images: images in a strip.
    """
    names = list(real)
    rows = -(-len(names) // columns)
    height, width = next(iter(real.values())).shape[1:3]
    across = images * 0.55
    figure = Figure(
        figsize=(columns * (across + 0.6), rows * (2 * across / images * height / width + 0.3)),
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names):
        _show(axis, real[name][:images], generated[name][:images])
        axis.set_title(f"{name}  (never seen)" if name in unseen else name, fontsize=8, pad=3)
        axis.set_yticks([height / 2, 1.5 * height + 1], ["real", "generated"], fontsize=7)
        axis.tick_params(length=0)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    return figure


def edit_strips(
    originals: np.ndarray, edits: Mapping[str, np.ndarray], unchanged: np.ndarray | None = None
) -> Figure:
    """Original images, and below them the same images under each edit.

    Args:
        originals: uint8 images (n, H, W, C).
        edits: for each label, uint8 images of the same shape.
        unchanged: the images as the model returns them when nothing is edited: below each edit, its
            difference from them.
    """
    rows = {"original": originals}
    for label, images in edits.items():
        rows[label] = images
        if unchanged is not None and not np.array_equal(images, unchanged):
            rows[f"change: {label}"] = difference(unchanged, images)
    return strips(rows)


def strips(rows: Mapping[str, np.ndarray], columns: Sequence[str] = ()) -> Figure:
    """A labelled strip of images for each entry, one below the other.

    Args:
        rows: for each label, uint8 images (n, H, W, C).
        columns: what is said above the images of the longest strip, if anything.
    """
    count = max(len(images) for images in rows.values())
    height, width = next(iter(rows.values())).shape[1:3]
    # compress: axes are as wide as images are.
    layout = ConstrainedLayoutEngine(h_pad=0.02, hspace=0, compress=True)
    figure = Figure(
        figsize=(count * 0.75 + 1.2, len(rows) * 0.8 + 0.2 * bool(columns)), layout=layout
    )
    labelled = False
    for axis, (label, images) in zip(
        figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows.items()
    ):
        _show(axis, images)
        axis.set_xlim(-0.5, count * (width + 1) - 0.5)  # a shorter strip keeps to the left
        axis.set_ylabel(label, fontsize=7, rotation=0, ha="right", va="center")
        if columns and not labelled and len(images) == len(columns):
            for number, text in enumerate(columns):
                place = (number * (width + 1) + (width - 1) / 2, -0.05 * height)
                axis.text(*place, text, fontsize=7, ha="center", va="bottom")
            labelled = True
    return figure


def traversal(
    model: GenerationMixin,
    image: ImageInput,
    context: Interventions = None,
    quantiles: Sequence[float] = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95),
    **options: Any,
) -> Figure:
    """Edits of one image along the learnt range of each concept (see `values.py`), a strip for each
    concept, and the image above.

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
    if residual is not None:
        residual = residual.expand(len(quantiles), *residual.shape[1:])
    rows = {"image": to_uint8(x.movedim(1, -1).cpu().numpy())}
    for name in model.concepts:
        chosen = [{name: Quantile(q)} for q in quantiles]
        edits = model.predict(noise, residual, chosen, output_type="np", **options)
        rows[name] = to_uint8(np.asarray(edits))
    return strips(rows, [f"{q:g}" for q in quantiles])


def read_history(path: str | os.PathLike) -> list[dict]:
    """The rows of a run's `history.jsonl`. Of a step that a resumed run did again, its last rows
    count; an unfinished line is left out.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds no rows.
    """
    rows: dict[tuple, dict] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            rows[row["step"], "validation" in row] = row
        except (ValueError, KeyError, TypeError):
            continue
    if not rows:
        raise ValueError(f"{path} holds no rows of a training run.")
    return sorted(rows.values(), key=lambda row: row["step"])


def training_curves(history: Sequence[Mapping]) -> Figure:
    """Loss of training and validation over the steps, and its KL.

    Args:
        history: rows of `read_history`.
    """
    terms = ("reconstruction", "kl", "residual_kl")
    training = [row for row in history if "kl" in row]
    validation = [row for row in history if "validation" in row]
    totals = [(row["step"], sum(row.get(term, 0.0) for term in terms)) for row in training]
    scores = [(row["step"], row["validation"]) for row in validation]
    figure = Figure(figsize=(8.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    marker = "o" if len(training) < 3 else None
    for values, style in (
        (totals, {"color": BLUE, "marker": marker, "label": "training"}),
        (scores, {"color": ORANGE, "marker": "o", "ms": 3, "ls": "--", "label": "validation"}),
    ):
        if values:
            left.plot(*zip(*values), lw=1.2, **style)
    right.plot(
        [row["step"] for row in training],
        [row["kl"] for row in training],
        color=GREEN,
        lw=1.2,
        marker=marker,
    )
    last = max(step for step, _ in totals + scores)
    late = [value for step, value in totals + scores if step >= 0.05 * last and np.isfinite(value)]
    if late and max(late) > min(late):  # or the first steps would flatten all the rest
        margin = 0.05 * (max(late) - min(late))
        left.set_ylim(min(late) - margin, max(late) + margin)
    left.legend(fontsize=8, frameon=False)
    for axis, title in (
        (left, "loss (bits per pixel; of a denoiser, per entry)"),
        (right, "KL, a part of the loss"),
    ):
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        _plain(axis)
    return figure


def floor_chart(metrics: Mapping) -> Figure:
    """Each context's distance with its interval, and the floor that real images have between
    themselves.

    Args:
        metrics: what `training/evaluate.py` measures and writes to `metrics.json`.
    """
    protocol = shown_protocol(metrics)
    contexts = list(metrics["contexts"].items())
    styles = {
        "concept": (BLUE, "o", "one concept, or none"),
        "composition": (ORANGE, "s", "several concepts"),
    }
    figure = Figure(figsize=(7.0, 0.22 * len(contexts) + 1.1), layout="constrained")
    axis = figure.subplots()
    for place, (_, row) in enumerate(contexts):
        measured, (colour, marker, _) = row[protocol], styles[row["kind"]]
        axis.plot(
            [measured["floor"], measured["distance"]], [place, place], color="0.85", lw=1, zorder=1
        )
        axis.plot(
            measured["interval"],
            [place, place],
            color=colour,
            lw=3,
            alpha=0.45,
            solid_capstyle="butt",
            zorder=2,
        )
        axis.plot(measured["distance"], place, marker, color=colour, ms=5, zorder=3)
        axis.plot(measured["floor"], place, "|", color=BLACK, ms=9, mew=1.5, zorder=3)
    axis.set_yticks(range(len(contexts)), [name for name, _ in contexts])
    axis.set_ylim(len(contexts) - 0.4, -0.6)
    axis.set_xlim(left=0)
    axis.set_xlabel(
        f"sliced 2-Wasserstein distance to real images ({protocol} protocol)", fontsize=8
    )
    handles = [
        Line2D([], [], color=BLACK, marker="|", ls="", ms=9, mew=1.5, label="floor: real to real")
    ]
    for kind, mean in metrics["means"].items():
        colour, marker, label = styles[kind]
        text = f"{label}: mean {mean[protocol]['distance']:.3f}"
        if mean[protocol]["ratio"] is not None:
            text += f", {mean[protocol]['ratio']:.1f} x floor"
        handles.append(Line2D([], [], color=colour, marker=marker, ms=5, lw=3, label=text))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), fontsize=7, frameon=False
    )
    _plain(axis)
    return figure


def _plain(axis: matplotlib.axes.Axes) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=7)


def plot_matrices(
    matrices: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    label: str = "",
    shared: bool = True,
    per_row: int = 3,
) -> Figure:
    """Heat maps side by side, the numbers written in their cells. The colours are safe for the
    colour-blind: from yellow to dark blue, or from orange over white to purple where there are
    negative entries.

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
        image = axis.imshow(
            matrix,
            cmap="PuOr" if signed else "cividis_r",
            vmin=-top if signed else 0,
            vmax=top,
            aspect="auto",
        )
        axis.set_title(title, fontsize=9)
        axis.set_xticks(
            range(len(columns)),
            columns,
            rotation=45,
            ha="right",
            rotation_mode="anchor",
            fontsize=7,
        )
        axis.set_yticks(range(len(rows)), rows, fontsize=7)
        for i, j in np.argwhere(np.isfinite(matrix)):
            dark = abs(matrix[i, j]) > (0.65 if signed else 0.5) * top
            axis.text(
                j,
                i,
                f"{matrix[i, j]:.2f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if dark else "black",
            )
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
