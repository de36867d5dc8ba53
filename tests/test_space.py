"""The page exported as a Space, and used in a real browser (where there is a Chromium)."""

import ast
import errno
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from diffusion_models import with_head
from pages import drawn
from PIL import Image

from hf_intervene import InterventionModel, InterventionPipeline, cli


pytest.importorskip("gradio", reason="the page needs the extra `app`")

from gradio_client import Client  # noqa: E402

from hf_intervene.space import export  # noqa: E402


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
CHROMIUM_OPTIONS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
)
CHROMIUM_OPTIONS += " --disable-component-update --disable-sync"


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
    source = page.get_by_alt_text("Image 1, as it is").get_attribute("src")  # before the click
    page.get_by_role("button", name="Other images").click()
    page.wait_for_function("src => document.querySelector('.pictures img').src !== src", arg=source)
    assert abs(pixels(page, "Image 1, as it is") - first).mean() > 2


def test_an_image_is_picked_and_edited(page):
    page.get_by_role("tab", name="Edit").click()
    start = pixels(page, "before")  # there is one from the start
    source = page.locator("#edited img").first.get_attribute("src")
    page.locator(".examples button.thumbnail-item").nth(2).click()
    page.wait_for_function("src => document.querySelector('#edited img').src !== src", arg=source)
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
