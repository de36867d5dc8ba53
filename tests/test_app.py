"""The page: what its buttons do, how it is served, exported, and used in a real browser (where
there is a Chromium).
"""

import ast
import base64
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from diffusion_models import with_head
from PIL import Image

from hf_intervene import InterventionModel, InterventionPipeline, LightVAE, cli


pytest.importorskip("gradio", reason="the page needs the extra `app`")

import gradio as gr  # noqa: E402
import httpx  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402

from hf_intervene import app, page_clients, page_controls, page_pictures  # noqa: E402
from hf_intervene.data import avatars  # noqa: E402
from hf_intervene.page import Page  # noqa: E402
from hf_intervene.space import export  # noqa: E402


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CHROMIUM_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
)
CHROMIUM_OPTIONS += " --disable-component-update --disable-sync"


def save(model, folder):
    InterventionPipeline.from_model(model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def quad():
    return Page("quad")


@pytest.fixture(scope="module")
def grey(tmp_path_factory):
    torch.manual_seed(0)
    base = LightVAE(1, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    model = InterventionModel.build(base, ["thin", "wide"], noise_width=4, initializer_range=0.5)
    return Page(save(model, tmp_path_factory.mktemp("saved") / "digits"))


# What the buttons do


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


def drawn(html):
    """The pictures in HTML, by their texts for screen readers: int arrays (H, W, 3)."""
    found = {}
    for data, text in re.findall(r'src="data:image/png;base64,([^"]+)" alt="([^"]*)"', html):
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        found[text] = np.asarray(image).astype(int)
    return found


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


# The page as it is served


@pytest.fixture(scope="module")
def client(grey):
    blocks = app.build(grey)
    url = app.serve(blocks)[1]
    yield Client(url, verbose=False, download_files=False)
    blocks.close(verbose=False)


def test_grey_images_over_the_wire(client, tmp_path):
    Image.new("L", (40, 30), 128).save(tmp_path / "photo.png")
    asked = (True, False, 1.0, 1.0, 3, 5, True)  # switches, strengths, images, draw, what changed
    found = drawn(client.predict(*asked, api_name="/sample"))
    assert len(found) == 9 and found["Image 3, with thin"].shape == (16, 16, 3)
    # No pictures of the change unless they are asked for.
    assert len(drawn(client.predict(*asked[:-1], False, api_name="/sample"))) == 6
    photo = handle_file(tmp_path / "photo.png")
    options = (False, True, 1.0, 0.5)
    compared = drawn(client.predict(photo, [], True, *options, api_name="/edit"))
    assert list(compared) == [
        "before",
        "after: wide (50%)",
        "returned unedited",
        "what changed (dark)",
    ]
    assert len(drawn(client.predict(photo, [], False, *options, api_name="/edit"))) == 2
    assert len(drawn(client.predict(["thin", "wide"], 0, api_name="/compose"))) == 4


def test_what_goes_wrong_is_said_in_a_sentence(client, tmp_path):
    (tmp_path / "photo.png").write_text("no picture")
    for message, call in {
        "Draw number: give a whole number from 0 to 9999": (
            (True, False, 1.0, 1.0, 3, None, False),
            "/sample",
        ),
        "How many images: give a whole number from 1 to 16": (
            (True, False, 1.0, 1.0, None, 0, False),
            "/sample",
        ),
        "how strong: wide: give a number from 0 to 1": (
            (True, False, 1.0, "1", 3, 0, False),
            "/sample",
        ),
        "give an image first": ((None, [], False, False, True, 1.0, 1.0), "/edit"),
        "photo.png cannot be read as an image": (
            (handle_file(tmp_path / "photo.png"), [], False, True, True, 1.0, 1.0),
            "/edit",
        ),
        "choose two to 8 concepts to compose, not 1": ((["thin"], 0), "/compose"),
        "Concepts .two to 8.: choose among thin, wide": (("thin", 0), "/compose"),
    }.items():
        with pytest.raises(Exception, match=message):
            client.predict(*call[0], api_name=call[1])


@pytest.mark.parametrize(
    "number, values",
    [
        (gr.Slider(1, 100, step=1), (None, 101, 0, 1000, 2.5, "5", [5], math.nan, 10**400)),
        (gr.Slider(1, 10, step=0.1), (None, -5, 1e300, math.nan, math.inf, {})),
        (gr.Number(0, precision=0, minimum=0, maximum=9), (None, -1, 10, 1.5, "x")),
    ],
    ids=["steps", "guidance", "draw"],
)
def test_a_control_takes_what_it_shows_and_nothing_else(number, values):
    """Also from a program: a thousand steps keep the model from everybody else for an hour."""
    for value in values:
        with pytest.raises(ValueError, match="give a (whole )?number from"):
            page_controls.checked(number, value)
    assert page_controls.checked(number, number.minimum + 1) == number.minimum + 1


def edited(url, file):
    """What the page answers to an edit of a file that was named and not uploaded, without Gradio's
    own client.
    """
    body = json.dumps({"data": [file, [], False, True, False, 1, 1]}).encode()
    request = urllib.request.Request(
        f"{url}gradio_api/call/edit", body, {"Content-Type": "application/json"}
    )
    event = json.load(urllib.request.urlopen(request, timeout=20))["event_id"]
    return urllib.request.urlopen(f"{url}gradio_api/call/edit/{event}", timeout=20).read().decode()


def test_no_file_of_the_servers_is_read(client, tmp_path):
    """Nor is it said whether it is there."""
    Image.new("L", (16, 16), 128).save(tmp_path / "private.png")
    os.mkfifo(tmp_path / "pipe")
    uploads = Path(get_upload_folder())
    uploads.mkdir(exist_ok=True)
    (link := uploads / "link.png").unlink(missing_ok=True)
    link.symlink_to(tmp_path / "private.png")
    (inside := uploads / "pipe.png").unlink(missing_ok=True)
    os.mkfifo(inside)
    paths = [
        tmp_path / "private.png",
        tmp_path / "nothing.png",
        tmp_path,
        tmp_path / "pipe",
        "/dev/stdin",
        link,
        inside,
    ]
    paths += [
        uploads,
        uploads / os.path.relpath(tmp_path / "private.png", uploads),
        "private.png",
        "a\x00b",
    ]
    try:
        answers = {edited(client.src, {"path": str(path)}) for path in paths}
    finally:
        link.unlink()
        inside.unlink()
    assert len(answers) == 1 and "was not uploaded here" in answers.pop()


def test_nobody_passes_the_queue_by(client):
    for way in ("run", "api"):
        answer = httpx.post(f"{client.src}gradio_api/{way}/sample", json={"data": []})
        assert answer.status_code == 404 and "join the queue" in answer.text


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(grey, tmp_path):
    Image.new("1", (13_300, 13_300)).save(tmp_path / "large.png")
    assert (tmp_path / "large.png").stat().st_size < 100_000
    began = time.monotonic()
    with pytest.raises(
        ValueError,
        match="large.png has 13300x13300 pixels, 177 megapixels, and at most 32 are read",
    ):
        grey.edit(str(tmp_path / "large.png"), [], {})
    assert time.monotonic() - began < 1


def waiting_room(page, monkeypatch):
    """A page whose first grid takes until it is let go: its address, the seeds of those that were
    drawn, and what lets it go.
    """
    asked_for, go = [], threading.Event()

    def slow(names, seed, *options):
        asked_for.append(seed)
        go.wait(120)
        return {"obs": np.zeros((4, 4, 3), np.uint8)}

    monkeypatch.setattr(page, "compose", slow)
    blocks = app.build(page)
    return blocks, app.serve(blocks)[1] + "gradio_api/call/compose", asked_for, go


def asked(url, seed):
    """The event of a call, to which nobody listens yet."""
    return httpx.post(url, json={"data": [["thin", "wide"], seed]}, timeout=60)


def test_what_nobody_waits_for_is_not_computed(grey, monkeypatch):
    """Calls whose clients never listened, or left, while an earlier one was computed."""
    blocks, url, asked_for, go = waiting_room(grey, monkeypatch)
    monkeypatch.setattr(page_clients, "PATIENCE", 60)
    monkeypatch.setattr(page_clients, "RETURN", 0.1)
    try:
        asked(url, 0)
        while not asked_for:
            time.sleep(0.05)
        monkeypatch.setattr(page_clients, "PATIENCE", 0.5)
        for seed in range(1, 6):
            event = asked(url, seed).json()["event_id"]
            if seed > 3:
                with (
                    pytest.raises(httpx.ReadTimeout),
                    httpx.stream("GET", f"{url}/{event}", timeout=0.3) as answer,
                ):
                    answer.read()
        time.sleep(1)
        event = asked(url, 99).json()["event_id"]
        threading.Timer(0.2, go.set).start()
        with httpx.stream("GET", f"{url}/{event}", timeout=60) as answer:
            assert "event: complete" in answer.read().decode()
        assert asked_for == [0, 99]
    finally:
        blocks.close(verbose=False)


def test_who_comes_when_the_queue_is_full_is_told(grey, monkeypatch):
    monkeypatch.setattr(app, "MAX_WAITING", 2)
    blocks, url, _, go = waiting_room(grey, monkeypatch)
    try:
        answers = [asked(url, 0) for _ in range(8)]
        assert {answer.status_code for answer in answers} == {200, 503}
        assert any("Queue is full" in answer.text for answer in answers)
    finally:
        go.set()
        blocks.close(verbose=False)


def test_who_waits_is_known():
    """By the connections: of a session that left and came back, of one that never came."""

    class Request:
        session_hash = "s"

        def __init__(self, came, **call):
            self.request = SimpleNamespace(scope={"hf_intervene.call": {"came": came, **call}})

    clients, now = page_clients.Clients(), time.monotonic()
    assert not clients.left(None) and not clients.left(SimpleNamespace(request=None))
    assert not clients.left(Request(now)) and clients.left(Request(now - 60))
    clients._waiting["s"] += 1
    assert not clients.left(Request(now - 60))
    clients._waiting["s"] -= 1
    clients._left_at["s"] = now  # only now: a browser may come back
    assert not clients.left(Request(now - 60))
    clients._left_at["s"] = now - 30
    # asked for after that
    assert clients.left(Request(now - 60)) and not clients.left(Request(now - 1))


def test_nothing_is_fetched_from_elsewhere(client):
    html = urllib.request.urlopen(client.src).read().decode()
    style = urllib.request.urlopen(f"{client.src}theme.css").read().decode()
    fetched = re.findall(r"""(?:<script[^>]+src|<link[^>]+href)\s*=\s*["'](https?:[^"']+)""", html)
    fetched += re.findall(r"(?:@import|url\()[\s\"']*(https?:[^\"')]+)", style + html)
    assert fetched == []
    assert "Content-Security-Policy" in html
    assert client.config["analytics_enabled"] is False


def test_a_card_covers_nothing_of_the_page(client):
    """Whatever position a link in it asks for, as a browser shows it."""
    (card,) = (
        part
        for part in client.config["components"]
        if part["type"] == "markdown" and "has no card" in str(part["props"].get("value"))
    )
    assert card["props"]["elem_classes"] == ["card"]
    style = urllib.request.urlopen(f"{client.src}config").read().decode()
    assert ".card { contain: layout paint; }" in style


def test_a_denoiser_has_its_own_controls(tmp_path):
    page = Page(save(with_head(), tmp_path / "pipe"))
    before, after, *_ = page.sample({"a": 1.0}, 2, 0, 2, 3.0)
    assert not np.array_equal(before, after)
    assert page.denoises and len(page.edit(Image.fromarray(before[0]), [], {"a": 1.0}, 2, 1.5)) == 5
    functions = {function.api_name: function for function in app.build(page).fns.values()}
    for name in ("sample", "edit", "compose"):
        labels = [part.label or "" for part in functions[name].inputs]
        assert any(label.startswith("Denoising steps") for label in labels)


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "hf_intervene.app")
    assert cli.main(["app"]) == 1
    assert 'pip install "hf-intervene[app]"' in capsys.readouterr().err


def test_no_such_pipeline(tmp_path, capsys):
    assert cli.main(["app", str(tmp_path)]) == 1
    assert "is not an intervention pipeline" in capsys.readouterr().err


def test_a_port_that_is_taken(client, grey, capsys):
    port = client.src.rstrip("/").rpartition(":")[2]
    assert cli.main(["app", str(grey.folder), "--port", port]) == 1
    assert (
        capsys.readouterr().err
        == f"error: cannot listen at port {port}: it is taken, or not allowed; choose another"
        " one.\n"
    )


# As a Space


@pytest.fixture(scope="module")
def space(tmp_path_factory):
    """The exported page of the bundled pipeline, served by `python app.py` as on the Hub. Returns
    the folder and the URL.
    """
    folder = export("quad", tmp_path_factory.mktemp("space") / "quad")
    environment = os.environ | {
        "PYTHONPATH": "",
        "PYTHONUNBUFFERED": "1",
        "GRADIO_TEMP_DIR": str(folder.parent / "files"),
    }
    command = [sys.executable, "app.py"]
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if found := re.search(r"http://\S+", line):
            break
    else:
        pytest.fail(f"the exported app did not start: {''.join(lines)}")
    yield folder, found[0]
    process.terminate()
    process.wait(30)


def test_an_exported_space(space):
    folder, url = space
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert metadata["sdk"] == "gradio" and (folder / metadata["app_file"]).exists()
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().splitlines())
    assert pins["gradio"] == metadata["sdk_version"]
    assert pins["torch"] == torch.__version__.partition("+")[0]
    assert not any("hf-intervene" in name for name in pins)  # its sources are there
    html = Client(url, verbose=False, download_files=False).predict(
        *[False] * 6, *[1.0] * 6, 2, 0, False, api_name="/sample"
    )
    assert len(drawn(html)) == 2
    with pytest.raises(ValueError, match="already holds something"):
        export("quad", folder)
    served = {path.suffix for path in (folder / "pipelines" / "quad").rglob("*") if path.is_file()}
    assert served == {".json", ".safetensors", ".md", ".png", ".yaml"}


def test_export_on_the_command_line(grey, tmp_path, capsys):
    assert cli.main(["app", str(grey.folder), "--export", str(tmp_path / "space")]) == 0
    assert "a Space" in capsys.readouterr().out
    assert (tmp_path / "space" / "pipelines" / "digits" / "model_index.json").exists()
    assert (tmp_path / "space" / "hf_intervene" / "app.py").exists()


def test_a_full_disk_leaves_no_half_of_a_space(grey, tmp_path, monkeypatch):
    """So that the same command can be given again."""
    (tmp_path / "there").mkdir()
    copy = shutil.copyfile
    for name in ("new", "there"):
        left = iter(range(5))

        def full(*arguments, left=left):
            if next(left, None) is None:
                raise OSError(errno.ENOSPC, "No space left on device")
            return copy(*arguments)

        monkeypatch.setattr(shutil, "copyfile", full)
        with pytest.raises(OSError, match="No space left"):
            export(str(grey.folder), tmp_path / name)
        monkeypatch.undo()
        assert [path.name for path in tmp_path.iterdir()] == ["there"]
        assert not list((tmp_path / "there").iterdir())
        export(str(grey.folder), tmp_path / name)
        shutil.rmtree(tmp_path / name)
        (tmp_path / "there").mkdir(exist_ok=True)


NAMES = [
    'a""" + open("hacked", "w").name + """',
    "back\\slash",
    'it\'s "quoted"',
    "new\nline",
    "{braces}",
    "snapshots/abc",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_exported(grey, tmp_path, name):
    """As text and as nothing else; one whose parent happens to have the name of a folder of the
    Hub's cache is copied too.
    """
    source = tmp_path / name
    shutil.copytree(grey.folder, source)
    folder = export(str(source), tmp_path / "space")
    text = (folder / "app.py").read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree) == "The page of a pipeline; see README.md."
    (call,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "launch"
    ]
    path = folder / call.args[0].right.value  # HERE / "..."
    assert (path / "model_index.json").exists() and str(tmp_path) not in text
    metadata = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert metadata["title"] == path.name and "models" not in metadata


def test_a_folder_whose_name_is_no_text(grey, tmp_path):
    source = tmp_path / "byte\udce9"
    shutil.copytree(grey.folder, source)
    with pytest.raises(OSError, match=r"byte\\udce9 has bytes that are not UTF-8: rename it"):
        export(str(source), tmp_path / "space")


def test_no_path_of_this_machine_is_saved_or_exported(tmp_path):
    """Neither of the base, the adapter, the head and the frozen models, nor of what was loaded and
    is saved again.
    """
    here = str(tmp_path).encode()
    with_head("dit").save_pretrained(tmp_path / "model", save_base=True)
    model = InterventionModel.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "again", save_base=True)
    InterventionPipeline.from_model(model).save_pretrained(tmp_path / "pipe")
    InterventionPipeline.from_pretrained(tmp_path / "pipe").save_pretrained(tmp_path / "pipe again")
    for folder in ("pipe", "pipe again"):
        index = tmp_path / folder / "base" / "config.json"
        # an older version's
        index.write_text(
            json.dumps(json.loads(index.read_text()) | {"_name_or_path": f"{tmp_path}/x"})
        )
        export(str(tmp_path / folder), tmp_path / "space" / folder)
        index.write_text(
            json.dumps(
                {k: v for k, v in json.loads(index.read_text()).items() if k != "_name_or_path"}
            )
        )
    leaks = [file for file in tmp_path.rglob("*") if file.is_file() and here in file.read_bytes()]
    assert leaks == []
    assert InterventionModel.from_pretrained(tmp_path / "again").concepts == model.concepts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it(grey, number):
    command = [sys.executable, "-m", "hf_intervene.cli", "app", str(grey.folder)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    url = re.search(r"http://\S+", process.stdout.readline())[0]
    client = Client(url, verbose=False, download_files=False)
    client.submit(["thin", "wide"], 1, api_name="/compose")
    process.send_signal(number)
    said, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "") and "closed." in said


# In a browser


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    with playwright.sync_playwright() as started:
        running = started.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS.split())
        yield running
        running.close()


@pytest.fixture
def page(browser, space):
    """The page in a fresh tab; no request of it may leave this machine, and nothing may fail in it."""  # noqa: E501
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(60_000)
    requests, errors = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(space[1])
    tab.locator(".pictures img").first.wait_for(timeout=180_000)
    yield tab
    elsewhere = [url for url in requests if not url.startswith((space[1], "data:", "blob:"))]
    tab.close()
    assert elsewhere == [] and errors == []


def pixels(page, text):
    """The picture of that text for screen readers which is on the screen."""
    image = page.get_by_alt_text(text, exact=True).locator("visible=true")
    image.wait_for()
    return drawn(image.evaluate('e => `<img src="${e.src}" alt="${e.alt}">`'))[text]


def test_two_concepts_are_switched_on(page):
    first = pixels(page, "Image 1, as it is")
    page.get_by_label("quad1", exact=True).first.uncheck()
    page.get_by_label("quad4", exact=True).first.check()
    page.get_by_label("size", exact=True).first.check()
    both = pixels(page, "Image 1, with quad4 + size")
    assert np.array_equal(pixels(page, "Image 1, as it is"), first) and abs(both - first).mean() > 2
    assert page.locator(".pictures img").count() == 8
    page.get_by_label("Show what changed").first.check()
    assert pixels(page, "Image 1, what changed (dark)").min() < 128
    page.get_by_role("button", name="Other images").click()
    source = page.get_by_alt_text("Image 1, as it is").get_attribute("src")
    page.wait_for_function("src => document.querySelector('.pictures img').src !== src", arg=source)
    assert abs(pixels(page, "Image 1, as it is") - first).mean() > 2


def test_an_image_is_picked_and_edited(page):
    page.get_by_role("tab", name="Edit").click()
    start = pixels(page, "before")  # there is one from the start
    page.locator(".examples button.thumbnail-item").nth(2).click()
    page.wait_for_function(
        "src => document.querySelector('#edited img').src !== src",
        arg=page.locator("#edited img").first.get_attribute("src"),
    )
    assert abs(pixels(page, "before") - start).mean() > 2
    page.get_by_label("quad1", exact=True).nth(1).uncheck()
    unchanged = pixels(page, "after: as it is")
    page.get_by_label("quad4", exact=True).nth(1).check()
    assert abs(pixels(page, "after: quad4") - unchanged).mean() > 2
    page.get_by_role("tab", name="Compose").click()
    pixels(page, "quad1 + size")
    page.get_by_role("tab", name="About").click()
    page.get_by_role("heading", name="Measured").wait_for()


def test_an_image_is_uploaded(page, tmp_path):
    Image.new("RGB", (100, 80), (200, 40, 40)).save(tmp_path / "photo.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.get_by_role("tab", name="Edit").click()
    pixels(page, "before")
    page.get_by_role("button", name="Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "photo.png")
    page.get_by_text("only knows images like those", exact=False).wait_for()
    assert pixels(page, "before").shape == (64, 64, 3)
    assert abs(pixels(page, "before") - (200, 40, 40)).max() <= 2
    page.get_by_role("button", name="Remove Image").click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "broken.png")
    page.get_by_text("broken.png cannot be read as an image", exact=False).wait_for()


def test_with_the_keyboard_alone(page):
    page.get_by_role("tab", name="Sample").focus()
    for _ in range(30):  # to the switch of the second concept
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('label')?.innerText") == "quad2":
            break
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    page.keyboard.press("Space")
    pixels(page, "Image 1, with quad1 + quad2")
    page.keyboard.press("Tab")
    while page.evaluate("document.activeElement.type") != "range":
        page.keyboard.press("Tab")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineWidth") == "3px"
    page.keyboard.press("ArrowLeft")
    pixels(page, "Image 1, with quad1 + quad2 (95%)")


def open_tab(page, tab):
    button = page.get_by_role("tab", name=tab)
    if not button.is_visible():
        page.locator(".overflow-menu > button").click()
        button = page.locator(".overflow-dropdown button", has_text=tab)
    button.click()
    page.wait_for_timeout(300)


def test_at_the_width_of_a_phone(page):
    page.set_viewport_size({"width": 375, "height": 700})
    for tab in ("Sample", "Edit", "Compose", "About"):
        open_tab(page, tab)
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
    open_tab(page, "Edit")  # switches and result in one view
    assert page.locator("#edited img").first.bounding_box()["y"] < 700
    assert page.get_by_label("quad1", exact=True).nth(1).bounding_box()["y"] < 700


# Texts with less contrast than 4.5 to 1 (WCAG 2, AA), as "contrast text"; images without a text.
HARD_TO_READ = """() => {
    const light = c => { const a = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92
        : Math.pow((v + 0.055) / 1.055, 2.4)); return 0.2126 * a[0] + 0.7152 * a[1] + 0.0722 * a[2]; };
    const read = s => (s.match(/[\\d.]+/g) || []).map(Number);
    const behind = e => { for (; e; e = e.parentElement) { const b = read(getComputedStyle(e).backgroundColor);
        if (b.length == 3 || b[3] > 0.5) return b.slice(0, 3); } return [255, 255, 255]; };
    const found = [];
    for (const e of document.querySelectorAll('*')) {
        const box = e.getBoundingClientRect();
        if (![...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim())) continue;
        if (!box.width || getComputedStyle(e).visibility == 'hidden') continue;
        const [a, b] = [read(getComputedStyle(e).color).slice(0, 3), behind(e)].map(light);
        const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (contrast < 4.5) found.push(contrast.toFixed(2) + ' ' + e.textContent.trim().slice(0, 30));
    }
    const silent = [...document.querySelectorAll('img')].filter(i => i.offsetParent && !i.alt);
    return [...found, ...silent.map(i => 'no alt: ' + i.src.slice(0, 60))];
}"""  # noqa: E501


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_can_be_read_and_is_large(page, space, scheme):
    page.emulate_media(color_scheme=scheme)
    page.goto(space[1])
    page.locator(".pictures img").first.wait_for()
    for tab, area in (("Sample", "#samples"), ("Edit", "#edited"), ("Compose", "#pairs")):
        open_tab(page, tab)
        page.locator(f"{area} img").first.wait_for()
        assert page.locator(f"{area} img").first.bounding_box()["width"] >= 192
        assert page.evaluate(HARD_TO_READ) == []
    open_tab(page, "About")
    assert page.evaluate(HARD_TO_READ) == []


@pytest.mark.slow  # a matter of the machine: on two quiet cores
def test_speed(browser):
    """From the command to the first picture in the browser within fifteen seconds; other images
    within two.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "hf_intervene.cli", "app"]
    process = subprocess.Popen(
        command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True
    )
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]
        served = time.perf_counter() - start
        tab = browser.new_page()
        tab.set_default_timeout(120_000)
        tab.goto(url)
        tab.get_by_alt_text("Image 1, with glasses + hat").wait_for()
        first = time.perf_counter() - start
        source = tab.locator(".pictures img").first.get_attribute("src")
        start = time.perf_counter()
        tab.get_by_role("button", name="Other images").click()
        tab.wait_for_function(
            "src => document.querySelector('.pictures img').src !== src", arg=source
        )
        other = time.perf_counter() - start
    finally:
        process.terminate()
        process.wait(30)
    print(
        f"served after {served:.1f} s, first picture after {first:.1f} s; other images after"
        f" {other:.2f} s"
    )
    assert first < 15 and other < 2
