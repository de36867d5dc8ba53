"""The command line: words, machines' output, completion; what it says and when it is quiet."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import hf_intervene
from hf_intervene import (
    InterventionModel,
    cli,
    cli_images,
    cli_parser,
    evaluation,
    grids,
    logging,
    trainer,
)
from hf_intervene.data import avatars
from hf_intervene.page import Page


COMMANDS = [name for name in cli_parser.EXAMPLES if name is not None]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_every_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*([command] if command else []), "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "examples:\n  " in text
    if command is None:
        assert all(f"    {name}" in text for name in COMMANDS)


@pytest.mark.parametrize(
    "command", [name for name in COMMANDS if name not in ("train", "evaluate")]
)
def test_examples_are_commands(command):
    """Every example of a command is one that its parser takes."""
    for line in cli_parser.EXAMPLES[command].strip().splitlines():
        words = line.partition(" > ")[0].split()
        assert words[0] == "hf-intervene"
        assert cli.make_parser().parse_args(words[1:]).run is not None


@pytest.mark.parametrize("shell", cli_parser.SHELLS)
def test_completion(shell, capsys):
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (
        "hf-intervene",
        "sample",
        "num-images",
        "learning_rate",
        "num-inference-steps",
        "config",
    ):
        assert word in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["sample", "quad", "--seed", "1" + "0" * 30, "--output", "a.png"],
            "a whole number from 0 to 4294967295 is needed",
        ),
        (["sample", "quad", "--num-images", "-1", "--output", "a.png"], "a whole number from 1 to"),
        (["check", "quad", "--seed", "-1"], "a whole number from 0 to 4294967295"),
        (
            ["evaluate", "--model", "m", "--output", "o", "--projections", "0"],
            "a whole number from 1 to",
        ),
        (["evaluate", "--model", "m", "--output", "o", "--twins", "x"], "a whole number from 0 to"),
        (["app", "--port", "99999"], "a whole number from 0 to 65535 is needed, not 99999"),
    ],
)
def test_numbers_that_nothing_can_be_done_with(capsys, words, message):
    with pytest.raises(SystemExit):
        cli.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.xyz", "take .png, or a name without an ending"),
        ("file/x.png", "choose another --output"),
        ("folder.png", "is a folder: choose another --output"),
        ("/proc/x.png", "/proc cannot be made or written"),
    ],
)
def test_a_place_that_nothing_can_be_written_to_costs_no_images(
    tmp_path, monkeypatch, capsys, name, message
):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.setattr(cli_images, "_load", lambda name: pytest.fail("images are computed first"))
    for words in (["sample", "quad"], ["edit", "quad", "photo.png"]):
        assert cli.main([*words, "--output", str(tmp_path / name)]) == 1
        assert message in capsys.readouterr().err


def test_warnings_without_their_source_line():
    code = """if True:
        import warnings
        from hf_intervene import cli
        cli.completion = lambda arguments: warnings.warn("mind the gap")
        cli.main(["completion", "bash"])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "warning: mind the gap\n"


def test_quiet_and_light(tmp_path):
    """No terminal: no bar and no word beside the result. Nothing is imported that the command has
    no use for.
    """
    code = f"""if True:
        import sys
        import transformers.generation.candidate_generator  # older ones import scikit-learn there, for whoever uses transformers
        theirs = set(sys.modules)
        from hf_intervene import cli
        code = cli.main(["sample", "quad", "--num-images", "2", "--output", {str(tmp_path / "pair")!r}, "--json"])
        heavy = {{"datasets", "gradio", "matplotlib", "sklearn", "ot", "tensorboard", "shtab"}} & (sys.modules.keys() - theirs)
        sys.exit(code or (f"imported {{heavy}}" if heavy else 0))"""  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    files = [str(tmp_path / "pair" / f"000{number}.png") for number in range(2)]
    assert json.loads(done.stdout) == {"output": str(tmp_path / "pair"), "files": files}


def test_json_and_pictures_of_a_run(tiny, tmp_path, capsys):
    settings = [f"--{name}={value}" for name, value in tiny.items() if not isinstance(value, list)]
    settings += ["--block_out_channels", "8", "8"]
    assert cli.main(["train", *settings, "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["step"] == 8 and result["interrupted"] is False
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    options = ["--images", "16", "--projections", "10", "--output", str(tmp_path / "metrics")]
    assert cli.main(["evaluate", "--model", result["model_dir"], *options, "--json"]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics == json.loads((tmp_path / "metrics" / "metrics.json").read_text())
    assert (tmp_path / "metrics" / "floors.png").stat().st_size > 1000
    assert (
        cli.main(["card", result["model_dir"], "--metrics", str(tmp_path / "metrics"), "--json"])
        == 0
    )
    card = json.loads(capsys.readouterr().out)["card"]
    assert (
        "](floors.png)" in open(card).read()
        and (tmp_path / "run" / "model" / "floors.png").exists()
    )
    assert cli.main(["card", result["model_dir"]]) == 0  # without metrics there is nothing to show
    assert "](floors.png)" not in open(card).read()


def test_a_gpu_is_used_if_there_is_one(monkeypatch, tmp_path):
    moved = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(InterventionModel, "cuda", lambda self: moved.append("cuda") or self)
    assert cli.main(["sample", "avatars", "--num-images", "1", "--output", str(tmp_path)]) == 0
    assert Page("quad").model.concepts and moved == ["cuda", "cuda"]


def test_parsers_of_the_recipes():
    assert trainer.parse_arguments(["--epochs", "3"]).optimization.epochs == 3
    assert evaluation.make_parser().parse_args(["--model", "m", "--output", "o"]).json is False


@pytest.fixture
def verbosity():
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


def test_verbosity(verbosity, capsys):
    logger = logging.get_logger("hf_intervene.some.module")
    assert logging.get_verbosity() == logging.WARNING
    logger.info("hidden"), logger.warning("shown %d", 1)
    logging.set_verbosity_info()
    logger.info("as asked for"), logger.debug("hidden")
    logging.set_verbosity("error")
    logger.warning("hidden")
    captured = capsys.readouterr()
    assert captured.err == "warning: shown 1\ninfo: as asked for\n" and captured.out == ""
    with pytest.raises(
        ValueError, match="one of debug, info, warning, error, critical, not 'loud'"
    ):
        logging.set_verbosity("loud")


def test_verbosity_of_the_environment(verbosity, monkeypatch, capsys):
    root = logging.get_logger()
    for value, level in (
        ("debug", logging.DEBUG),
        ("", logging.WARNING),
        ("loud", logging.WARNING),
    ):
        monkeypatch.setattr(root, "handlers", [])
        monkeypatch.setenv("HF_INTERVENE_VERBOSITY", value)
        assert logging.get_verbosity() == level
    assert capsys.readouterr().err.startswith(
        "warning: HF_INTERVENE_VERBOSITY: verbosity must be one of"
    )


def test_bare_and_version(capsys):
    assert cli.main([]) == 0
    assert "examples:" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert hf_intervene.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(("typed", "near"), [("smaple", "sample"), ("evaluat", "evaluate")])
def test_an_unknown_command_proposes_the_nearest(capsys, typed, near):
    with pytest.raises(SystemExit):
        cli.main([typed])
    assert f"Did you mean '{near}'?" in capsys.readouterr().err


def test_a_picture_shows_the_same_noise_with_and_without(tmp_path, capsys):
    """The grid's lower row holds the images that the folder holds, its upper row obs."""
    picture, folder, plain = tmp_path / "pair.png", tmp_path / "pair", tmp_path / "obs"
    words = ["sample", "avatars", "--num-images", "2", "--seed", "5", "--interventions"]
    for context, output in (("glasses+hat", picture), ("glasses+hat", folder), ("obs", plain)):
        assert cli.main([*words, context, "--output", str(output)]) == 0
    grid = np.asarray(Image.open(picture))
    side, step = 128, 128 + grids.GAP  # images of 64 pixels, twice as large
    for row, shown in enumerate((plain, folder)):
        top, left = grids.GAP + row * step, grid.shape[1] - 2 * step
        for number in range(2):
            cell = grid[top : top + side, left + number * step :][:, :side]
            image = np.asarray(Image.open(shown / f"000{number}.png"))
            assert np.array_equal(cell, image.repeat(2, 0).repeat(2, 1))


def test_a_terminal_shows_what_to_try_next(monkeypatch, capsys):
    """What it proposes is a command; whoever reads by a pipe gets the names alone."""
    assert cli.main(["concepts", "avatars"]) == 0
    assert capsys.readouterr().out.split() == list(avatars.CONCEPTS)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert cli.main(["concepts", "avatars"]) == 0
    words = capsys.readouterr().out.partition("try next:\n")[2].split()
    assert words[0] == "hf-intervene" and cli.make_parser().parse_args(words[1:]).run is not None


def test_a_grid_goes_on_below():
    images = [Image.new("RGB", (32, 32), (number, 0, 0)) for number in range(5)]
    grid = np.asarray(grids.labelled_grid({"a": images, "b": images[::-1]}, columns=3))
    colours = [c for c in range(5) if (grid == (c, 0, 0)).all(-1).any()]
    assert colours == list(range(5))  # none is left out
    assert grid.shape[0] > 4 * 128 and grid.shape[1] < 4 * 140
    with pytest.raises(ValueError, match="as many images in each row"):
        grids.labelled_grid({"a": images, "b": images[1:]})


def test_an_edit_shows_before_and_after(tmp_path):
    face = avatars.twins(["obs"], 64)["obs"][0]
    Image.fromarray(face).save(tmp_path / "face.png")
    words = ["edit", "avatars", str(tmp_path / "face.png"), "--interventions", "glasses"]
    assert cli.main([*words, "--output", str(tmp_path / "edited.png")]) == 0
    grid = np.asarray(Image.open(tmp_path / "edited.png"))
    first = grid[grids.GAP :][:128, -128 - grids.GAP :][:, :128]
    assert np.array_equal(first, face.repeat(2, 0).repeat(2, 1))


def test_check_says_at_once_what_is_missing_and_then_what_it_does(tmp_path, monkeypatch, capsys):
    for context in ("obs", "hat"):
        (tmp_path / context).mkdir()
        for number in range(24):
            Image.new("RGB", (16, 16), (9 * number, 0, 0)).save(
                tmp_path / context / f"{number}.png"
            )
    words = ["check", str(tmp_path), "--resolution", "16"]
    cli.main(words)
    captured = capsys.readouterr()
    assert "reading the images" in captured.err and "testing 48 images of 2" in captured.err
    assert f"hf-intervene train --dataset {tmp_path} --resolution 16" in captured.out
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert cli.main(["check", "no-such-folder"]) == 1  # before it looks for images
    assert 'pip install "hf-intervene[eval]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("contexts", "message"),
    [
        ({"obs": 9, "hat": 9, "cap": 1}, "context 'cap' has 1 images; at least 8 are needed."),
        ({"hat": 9, "cap": 9}, "there are no observational images"),
        ({"obs": 9, "a+b": 9}, "concept 'a' has no context in which it alone"),
        ({"obs": 9, "hat": 9}, None),
    ],
)
def test_check_advises_a_training_that_is_not_refused(tmp_path, capsys, contexts, message):
    folder = tmp_path / "my $images"
    rows = ["file_name,kind"]
    for context, count in contexts.items():
        (folder / context).mkdir(parents=True)
        for number in range(count):
            shade = (9 * number, 20 * len(rows) % 256, 0)
            Image.new("RGB", (16, 16), shade).save(folder / context / f"{number}.png")
            rows.append(f"{context}/{number}.png,{context}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    cli.main(["check", str(folder), "--resolution", "16", "--context-column", "kind"])
    printed = capsys.readouterr().out
    advised = re.search("hf-intervene train (.*)", printed)
    if message is not None:
        assert f"It cannot be trained on as it is: {message}" in printed and advised is None
        return
    words = shlex.split(advised.group(1))
    words[words.index("--output_dir") + 1] = str(tmp_path / "run")
    settings = {name: value for name, value in TINY.items() if isinstance(value, (int, str))}
    del settings["resolution"], settings["images_per_context"], settings["validation_images"]
    for name, value in (settings | {"max_steps": 1}).items():
        words += [f"--{name}", str(value)]
    assert cli.main(["train", *words]) == 0, capsys.readouterr().err


@pytest.mark.parametrize("dataset", ["folder", "quad"])
def test_check_says_that_images_are_too_small_for_the_base(tmp_path, capsys, dataset):
    for context in ("obs", "hat"):
        (tmp_path / context).mkdir()
        for number in range(24):
            shade = (9 * number, 99 * (context == "hat"), 0)
            Image.new("RGB", (16, 16), shade).save(tmp_path / context / f"{number}.png")
    name = str(tmp_path) if dataset == "folder" else dataset
    assert cli.main(["check", name, "--resolution", "8", "--images", "24"]) == 1
    printed = capsys.readouterr().out
    assert "It cannot be trained on as it is: images of 8 pixels cannot be halved" in printed
    assert "hf-intervene train" not in printed


@pytest.mark.parametrize("separator", [",", " ", ";"])
def test_several_concepts_are_joined_with_plus(tmp_path, capsys, separator):
    words = ["--interventions", f"glasses{separator}hat", "--output", str(tmp_path / "a.png")]
    assert cli.main(["sample", "avatars", *words]) == 1
    assert "several are joined with +" in capsys.readouterr().err


def test_a_card_of_what_comes_with_the_package(capsys):
    assert cli.main(["card", "avatars"]) == 0
    card = Path(capsys.readouterr().out.strip())
    assert card.name == "README.md" and "glasses+hat" in card.read_text()


LIGHT = [
    ["--help"],
    ["sample", "--help"],
    ["completion", "--help"],
    ["--version"],
    [],
    ["concepts", "avatars"],
    ["card", "avatars"],
    ["sample", "avatars", "--interventions", "monocle", "--output", "none.png"],
    ["edit", "avatars", "photo.png", "--interventions", "hat@2", "--output", "none.png"],
    ["edit", "avatars", "none.png", "--interventions", "hat", "--output", "none.png"],
    ["sample", "./none", "--output", "none.png"],
    ["concepts", "./none"],
    ["card", "./none"],
    ["check", "./none"],
    ["support", "./none"],
    ["app", "./none"],
]


@pytest.mark.parametrize("words", LIGHT)
def test_names_and_words_come_at_once(words):
    """What lists names or refuses a word imports nothing that takes seconds."""
    code = f"""if True:
        import sys
        sys.argv[0] = "bin/hf-intervene"
        from hf_intervene import cli
        try:
            cli.main({words})
        except SystemExit:
            pass
        heavy = {{"torch", "transformers", "diffusers", "datasets", "peft", "gradio"}}
        heavy &= sys.modules.keys()
        sys.exit(f"imported {{heavy}}" if heavy else 0)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import hf_intervene, transformers, diffusers",
        "import transformers, diffusers, hf_intervene",
        "import transformers, diffusers; from hf_intervene.contexts import OBS",
    ],
)
def test_the_import_registers_all_classes(imports):
    """In any order, and of any part of the package."""
    code = f"""if True:
        {imports}
        import hf_intervene
        assert diffusers.InterventionPipeline is hf_intervene.InterventionPipeline
        config = transformers.AutoConfig.for_model("intervention", concepts=["a"])
        assert type(config) is hf_intervene.InterventionConfig
        assert not hasattr(hf_intervene, "nothing")"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no such device here")
def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """A picture of before is still there after the disk was full."""
    out = tmp_path / "pair.png"
    out.write_text("of before")
    save = Image.Image.save

    def full(self, fp, *arguments, **options):
        save(self, "/dev/full", "PNG")

    monkeypatch.setattr(Image.Image, "save", full)
    assert cli.main(["sample", "quad", "--num-images", "1", "--output", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"{out} cannot be written (No space left on device): choose another --output" in said
    assert out.read_text() == "of before" and len(list(tmp_path.iterdir())) == 1


def test_support_of_what_is_no_pipeline_of_diffusers(tmp_path, capsys):
    for name, message in (
        (str(tmp_path), "is no pipeline of diffusers: it has no model_index.json"),
        ("quad", "quad is an intervention pipeline, and has its head already"),
    ):
        assert cli.main(["support", name]) == 1
        assert message in capsys.readouterr().err
