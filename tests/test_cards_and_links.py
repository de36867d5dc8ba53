"""Cards and links of harmful checkpoints."""

import os
import shutil
import time

import pytest
from hostile import save_originals
from huggingface_hub import ModelCard
from shared_models import ALICE

from hf_intervene import InterventionConfig, InterventionModel, InterventionPipeline
from hf_intervene.card_metrics import code
from hf_intervene.cards import card_path, card_text, write_card
from hf_intervene.page import Page
from hf_intervene.push import push_folder
from hf_intervene.space import export
from hf_intervene.yaml_files import read_settings


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return save_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def copy(originals, tmp_path):
    """Copy a checkpoint of some kind, which the test may damage."""
    return lambda kind: shutil.copytree(originals / kind, tmp_path / kind)


# Cards

NAMES = [
    "<script>alert(1)",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "a`b",
    "`",
    "``x``",
    "a|b",
    "<!-- x",
    "[a](b)",
    "*a*",
    "---",
]


def test_names_of_concepts_on_a_card(copy):
    folder = copy("model")
    config = InterventionConfig.from_pretrained(folder)
    config.concepts = NAMES
    config.save_pretrained(folder)
    (folder / "training_arguments.yaml").write_text(
        "seed: 0\nx: |\n  ```\n  <script>alert(2)</script>\n"
    )
    card = ModelCard.load(write_card(folder, "user/name"))
    assert (
        "hf-intervene" in card.data.tags
        and "{{ 7 * 7 }}" in card.text
        and "\n````yaml\n" in card.text
    )
    rows = [line for line in card.text.splitlines() if line.endswith(" alone |")]
    assert rows == [f"| {code(name)} | {code(name)} alone |" for name in NAMES]


@pytest.mark.parametrize("text", NAMES)
def test_code_in_markdown_is_that_text(text):
    markdown = pytest.importorskip("markdown_it")
    row = (
        markdown.MarkdownIt("commonmark")
        .enable("table")
        .render(f"| a |\n| --- |\n| {code(text)} |\n")
    )
    assert f"<td><code>{markdown.common.utils.escapeHtml(text)}</code></td>" in row


@pytest.mark.parametrize("name", ["README.md", "samples.png", "floors.png"])
def test_a_card_is_not_written_through_a_link(copy, tmp_path, name):
    folder = copy("model")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=f"{name} is a link"):
        card_path(folder)


@pytest.mark.usefixtures("waits")
def test_a_link_out_of_the_folder_is_not_pushed(copy, tmp_path):
    folder = copy("model")
    (tmp_path / "secret").write_text("{}")
    (folder / "base" / "token.json").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="token.json is a link to outside of the folder"):
        push_folder(folder, "alice/model", **ALICE)


@pytest.mark.parametrize(
    "front", ["a: [b", "!!python/object:os.system x", "[" * 20_000, "a: b", "a: &x [*x]"]
)
def test_the_front_matter_of_a_card_is_not_parsed(tmp_path, front):
    (tmp_path / "README.md").write_text(
        f"---\n{front}\n---\n# Title\n<!-- gone --> text ![x](y.png) end"
    )
    assert card_text(tmp_path) == "# Title\n text  end"


@pytest.mark.parametrize("piece", ["![", "![](", "<!--", "---\n", "![a]", "<!-- -->", "![x" * 999])
def test_a_long_card_is_read_quickly(tmp_path, piece):
    (tmp_path / "README.md").write_text(piece * (200_000 // len(piece)))
    began = time.perf_counter()
    card_text(tmp_path)
    assert time.perf_counter() - began < 3


def test_a_mark_of_the_encoding_before_a_card_is_no_text(tmp_path):
    (tmp_path / "README.md").write_text("---\na: b\n---\n# Title", encoding="utf-8-sig")
    assert card_text(tmp_path) == "# Title"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("concepts: [" + "1," * 100_000 + "1]", "more than 20000 names and values"),
        ("".join(f"k{number}: 1\n" for number in range(30_000)), "more than 20000 names"),
        ('x: "' + "x" * (1 << 21) + '"', "it is no such file"),
        ('dataset: "\\ud800"', "surrogates not allowed"),
        ("a: &a [x, x]\nb: [*a, *a]", "nested deeply or has aliases"),
    ],
)
def test_settings_that_nobody_writes(tmp_path, text, message):
    (tmp_path / "training_arguments.yaml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        read_settings(tmp_path)
    assert time.perf_counter() - began < 5 and "\n" not in str(error.value)


def test_a_card_that_is_not_text(tmp_path):
    (tmp_path / "README.md").write_bytes(b"# caf\xe9")
    assert card_text(tmp_path).startswith("# caf")


# Links


@pytest.mark.parametrize("use", ["load", "page", "export", "card", "settings"])
@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "samples.png",
        "config.json",
        "base/token.json",
        "head/config.json",
        "base",
        "more/x.json",
        "training_arguments.yaml",
    ],
)
def test_links_out_of_the_folder_are_not_followed(copy, tmp_path, use, name):
    folder, secret = copy("pipeline"), tmp_path / "secret"
    entry = folder / name
    if entry.is_dir():
        shutil.copytree(entry, secret)
        shutil.rmtree(entry)
    else:
        secret.write_text("{}")
        entry.parent.mkdir(exist_ok=True)
        entry.unlink(missing_ok=True)
    entry.symlink_to(os.path.relpath(secret, entry.parent))
    picture, settings = name.endswith((".md", ".png")), name.endswith(".yaml")
    if {
        "load": picture or settings,
        "page": settings,
        "card": picture,
        "settings": not settings,
    }.get(use):
        return  # this use does not read the file, or does not write a card through a link
    calls = {
        "load": InterventionPipeline.from_pretrained,
        "page": Page,
        "card": write_card,
        "settings": read_settings,
    }
    calls["export"] = lambda path: export(path, tmp_path / "space")
    with pytest.raises(OSError, match="is a link to outside of its folder"):
        calls[use](folder)
    assert not (tmp_path / "space").exists()


def test_links_within_a_folder_and_those_of_the_hubs_cache_are_followed(copy, tmp_path):
    folder = copy("pipeline")
    (folder / "base").rename(folder / "elsewhere")
    (folder / "base").symlink_to("elsewhere")
    (tmp_path / "linked").symlink_to(folder)
    (folder / "data.bin").symlink_to("/etc/hostname")  # not read
    InterventionPipeline.from_pretrained(tmp_path / "linked")
    repository = tmp_path / "models--user--name"
    (repository / "blobs").mkdir(parents=True)
    shutil.copytree(copy("model"), repository / "snapshots" / "0123")
    for number, file in enumerate(
        path for path in (repository / "snapshots").rglob("*") if path.is_file()
    ):
        blob = repository / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    InterventionModel.from_pretrained(repository / "snapshots" / "0123")


@pytest.mark.parametrize(
    "name", ["config.json", "model_index.json", "base/config.json", "README.md"]
)
def test_a_pipe_instead_of_a_file_is_refused(copy, name):
    folder = copy("pipeline")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(OSError, match="is a pipe or a device, not a file"):
        Page(folder)
