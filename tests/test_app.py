"""The page as it is served."""

import json
import math
import os
import re
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
from diffusion_models import with_head
from pages import drawn
from PIL import Image

from hf_intervene import InterventionPipeline, cli


pytest.importorskip("gradio", reason="the page needs the extra `app`")

import gradio as gr  # noqa: E402
import httpx  # noqa: E402
from gradio.utils import get_upload_folder  # noqa: E402
from gradio_client import Client, handle_file  # noqa: E402

from hf_intervene import app, page_clients, page_controls  # noqa: E402
from hf_intervene.page import Page  # noqa: E402


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
    InterventionPipeline.from_model(with_head()).save_pretrained(tmp_path / "pipe")
    page = Page(str(tmp_path / "pipe"))
    before, after, *_ = page.sample({"a": 1.0}, 2, 0, 2, 3.0)
    assert not np.array_equal(before, after)
    assert page.denoises and len(page.edit(Image.fromarray(before[0]), [], {"a": 1.0}, 2, 1.5)) == 5
    functions = {function.api_name: function for function in app.build(page).fns.values()}
    assert not page.slow  # this one is small; of a base that is not there nobody knows
    (tmp_path / "pipe" / "base" / "diffusion_pytorch_model.safetensors").unlink()
    assert Page(str(tmp_path / "pipe")).slow
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
    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    assert cli.main(["app", str(grey.folder), "--port", port]) == 1
    assert [signal.getsignal(number) for number in numbers] == before
    assert (
        capsys.readouterr().err
        == f"error: cannot listen at port {port}: it is taken, or not allowed; choose another"
        " one.\n"
    )


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
