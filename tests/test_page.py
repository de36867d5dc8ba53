"""The page: what its buttons do."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import drawn
from PIL import Image

from hf_intervene import cli


pytest.importorskip("gradio", reason="the page needs the extra `app`")

from hf_intervene import app, page_pictures  # noqa: E402
from hf_intervene.data import avatars  # noqa: E402
from hf_intervene.page import Page  # noqa: E402


@pytest.fixture(scope="module")
def quad():
    return Page("quad")


def test_samples_share_their_noise(quad):
    before, after, *_ = quad.sample({"quad1": 1.0}, 4, 3)
    again, half, *_ = quad.sample({"quad1": 0.5}, 4, 3)
    assert before.shape == after.shape == (4, 64, 64, 3) and before.dtype == np.uint8
    assert np.array_equal(before, again) and not np.array_equal(before, quad.sample({}, 4, 4)[0])
    change = abs(after.astype(int) - before).mean((0, 3))  # (64, 64)
    # the first quadrant, and not the second
    assert change[56:, :8].mean() > 3 * change[56:, 56:].mean()
    assert 0 < abs(half.astype(int) - before).mean() < change.mean()
    before, after, difference, name = quad.sample({"quad1": 0.0}, 4, 3)
    assert np.array_equal(before, after) and (difference == 255).all() and name == "obs"


def test_an_edit_of_any_image(quad):
    photo = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (90, 140, 4), dtype=np.uint8), "RGBA"
    )
    given, unchanged, edited, change, name = quad.edit(photo, [], {"quad1": 1.0})
    assert change.shape == (64, 64, 1) and name == "quad1"
    assert given.shape == unchanged.shape == edited.shape == (64, 64, 3)
    example = quad.examples[0]
    given, unchanged, edited, *_ = quad.edit(Image.fromarray(example), [], {})
    assert np.array_equal(given, example) and np.array_equal(unchanged, edited)
    # it depends on where it came from
    assert not np.array_equal(unchanged, quad.edit(Image.fromarray(example), ["quad3"], {})[1])


def test_all_pairs(quad):
    three = quad.compose(["quad1", "quad2", "size"], 0)
    assert list(three) == [
        "obs",
        "quad1",
        "quad2",
        "size",
        "quad1+quad2",
        "quad1+size",
        "quad2+size",
    ]
    assert np.array_equal(three["obs"], quad.sample({}, 1, 0)[0][0])
    pair = quad.sample({"quad1": 1.0, "size": 1.0}, 1, 0)[1]
    assert np.array_equal(three["quad1+size"], pair[0])
    for number in (1, 9):
        with pytest.raises(ValueError, match=f"two to 8 concepts to compose, not {number}"):
            quad.compose([f"c{k}" for k in range(number)], 0)


def test_the_card_is_shown(quad, grey):
    card = quad.card()
    assert "## Measured" in card and "| `quad1+quad2` |" in card
    assert "![" not in card and "library_name" not in card and "<!--" not in card
    assert [Path(path).name for path, _ in quad.pictures()][0] == "samples.png"
    assert "has no card" in grey.card() and "thin, wide" in grey.card() and grey.pictures() == []


def test_the_layout_waits_for_no_model(grey):
    """What is laid out is read from the files: torch is not imported for it, nor by the layout
    itself; Matplotlib not for samples either.
    """
    code = f"""if True:
        import sys
        from hf_intervene import app, page
        shown = page.Page({str(grey.folder)!r})
        app.build(shown)
        assert "matplotlib" not in sys.modules
        from hf_intervene.logging import disable_progress_bars
        disable_progress_bars()
        shown.sample({{"thin": 1.0}}, 1, 0)
        assert "matplotlib" not in sys.modules"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("obs", "as it is"),
        ("quad1+size", "quad1 + size"),
        ("quad1+size=0.5", "quad1 + size (50%)"),
    ],
)
def test_contexts_in_words(name, said):
    assert page_pictures.words(name) == said


def test_pictures_are_what_they_say():
    """Every pixel of every image is there, and nothing of a name is taken for HTML."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 2, 8, 8, 3), dtype=np.uint8)
    html = page_pictures.people({"as it is": images[0], "<b>&": images[1]})
    assert "<b>" not in html.replace("<br>", "")
    found = drawn(html)
    assert list(found) == [
        "Image 1, as it is",
        "Image 1, &lt;b&gt;&amp;",
        "Image 2, as it is",
        "Image 2, &lt;b&gt;&amp;",
    ]
    assert np.array_equal(found["Image 2, as it is"], images[0, 1])
    grey = page_pictures.catalogue({"x": images[0, 0, ..., :1]})
    assert np.array_equal(drawn(grey)["x"][..., 0], images[0, 0, ..., 0])


def test_examples_of_a_model_of_avatars_are_held_out_faces(grey):
    page = Page("avatars")
    assert np.array_equal(page.examples, avatars.twins(["obs"], 64)["obs"][: len(page.examples)])
    assert grey.examples.shape == (6, 16, 16, 1)  # its own samples


def test_an_image_unlike_those_of_the_training_comes_with_a_warning():
    page = Page("avatars")
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    given, unchanged, *_ = page.edit(Image.fromarray(noise), [], {})
    assert "only knows images like those" in app._warning(given, unchanged)
    for face in page.examples:
        given, unchanged, *_ = page.edit(Image.fromarray(face), [], {})
        assert app._warning(given, unchanged) == ""


def test_weights_that_cannot_be_read(grey, tmp_path, capsys):
    shutil.copytree(grey.folder, tmp_path / "digits")
    (tmp_path / "digits" / "head" / "model.safetensors").write_bytes(b"nothing")
    assert cli.main(["app", str(tmp_path / "digits")]) == 1
    assert "its weights are truncated or corrupt" in capsys.readouterr().err
