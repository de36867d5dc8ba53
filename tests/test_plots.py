"""Pictures: what they show, and that nothing overlaps, with few contexts and with many."""

import json
from itertools import combinations

import numpy as np
import pytest
from matplotlib.colors import to_hex
from PIL import Image

from hf_intervene import plots


RNG = np.random.default_rng(0)


def images(count, side=8, channels=3):
    return RNG.integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def measured(names):
    one = {"distance": 0.08, "interval": [0.07, 0.1], "floor": 0.03, "ratio": 2.7}
    rows = {
        name: {
            "kind": "composition" if "+" in name else "concept",
            "independent": one | {"distance": 0.05 + 0.01 * number},
        }
        for number, name in enumerate(names)
    }
    return {
        "contexts": rows,
        "means": {kind: {"independent": one} for kind in {row["kind"] for row in rows.values()}},
    }


def check_texts(figure):
    """No text of a figure lies over another one, or is cut off at the figure's sides."""
    figure.draw_without_rendering()
    texts = [axis.title for axis in figure.axes] + [axis.yaxis.label for axis in figure.axes]
    texts += [text for axis in figure.axes for text in axis.texts]
    for ruler in (ruler for axis in figure.axes for ruler in (axis.xaxis, axis.yaxis)):
        low, high = sorted(ruler.get_view_interval())  # labels beyond it exist, but are not drawn
        texts += [tick.label1 for tick in ruler.get_major_ticks() if low <= tick.get_loc() <= high]
        texts += [tick.label2 for tick in ruler.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in texts
        if text.get_text() and text.get_visible()
    ]
    assert len(boxes) > 2
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 for _, box in boxes)
    for (name, box), (other, other_box) in combinations(boxes, 2):
        width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
        height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
        assert width < 1 or height < 1, (name, other)


def shown(axis):
    return np.asarray(axis.images[0].get_array())


@pytest.mark.parametrize("count", [1, 3, 40])
def test_layouts(count):
    names = [f"concept{n}" if n % 2 else f"concept{n}+another_one{n}" for n in range(count)]
    strips = {name: images(8) for name in names}
    check_texts(plots.contexts_grid(strips, strips, unseen=names[::2]))
    check_texts(plots.strips(strips, columns=[str(n) for n in range(8)]))
    check_texts(plots.floor_chart(measured(names)))


def test_a_picture_is_written_as_its_suffix_says(tmp_path):
    figure = plots.strips({"a": images(2)})
    plots.save(figure, tmp_path / "new" / "a.png")
    assert Image.open(tmp_path / "new" / "a.png").format == "PNG"
    for name in ("a.svg", "b.SVG"):
        plots.save(figure, tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.SVG").read_bytes()
    assert "<text" in (tmp_path / "a.svg").read_text()  # words stay words
    with pytest.raises(ValueError, match="written as .png or .svg, not 'a.jpg'"):
        plots.save(figure, tmp_path / "a.jpg")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "b.SVG", "new"]


def test_real_above_generated():
    real, generated = images(3), images(3)
    grid = shown(
        plots.contexts_grid({"obs": real}, {"obs": generated}, columns=1, images=3).axes[0]
    )
    assert np.array_equal(grid[:8, 9:17], real[1]) and np.array_equal(
        grid[9:17, 18:26], generated[2]
    )


def test_differences():
    before = np.full((1, 2, 2, 3), 100, dtype=np.uint8)
    after = before.copy()
    after[0, 0, 0] = (130, 100, 70)  # 20 on the mean, either way
    after[0, 1, 1] = 240
    assert plots.difference(before, after)[0, ..., 0].tolist() == [[215, 255], [255, 0]]
    assert np.array_equal(plots.difference(after, before), plots.difference(before, after))
    unchanged = images(3)
    figure = plots.edit_strips(images(3), {"reconstruction": unchanged, "a": images(3)}, unchanged)
    assert [axis.get_ylabel() for axis in figure.axes] == [
        "original",
        "reconstruction",
        "a",
        "change: a",
    ]


def test_the_history_of_a_resumed_run(tmp_path):
    rows = [{"step": step, "reconstruction": 2.0 - step / 100, "kl": 0.5} for step in (10, 20, 30)]
    # step 20 done again
    rows += [
        {"step": 20, "validation": 1.9},
        {"step": 20, "reconstruction": 1.0, "kl": 0.25},
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"step": 40, "recon'
    (tmp_path / "history.jsonl").write_text(text)
    history = plots.read_history(tmp_path / "history.jsonl")
    left, right = plots.training_curves(history).axes
    training, validation = left.lines
    assert training.get_xydata().tolist() == [[10, 2.4], [20, 1.25], [30, 2.2]]
    assert validation.get_xydata().tolist() == [[20, 1.9]]
    assert right.lines[0].get_ydata().tolist() == [0.5, 0.25, 0.5]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no rows"):
        plots.read_history(tmp_path / "empty.jsonl")


def test_curves_of_a_run_that_only_began():
    for rows in ([{"step": 1, "reconstruction": 1.0, "kl": 0.0}], [{"step": 1, "validation": 1.0}]):
        plots.training_curves(rows).draw_without_rendering()


def test_a_chart_of_floors():
    axis = plots.floor_chart(measured(["obs", "a", "a+b"])).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["obs", "a", "a+b"]
    points = {
        to_hex(line.get_color()): line.get_xdata().tolist()
        for line in axis.lines
        if line.get_marker() in "os"
    }
    assert points[plots.BLUE.lower()] == pytest.approx([0.06]) and points[
        plots.ORANGE.lower()
    ] == pytest.approx([0.07])
    assert [line.get_xdata().tolist() for line in axis.lines if line.get_marker() == "|"] == [
        [0.03]
    ] * 3
