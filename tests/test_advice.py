"""What messages advise is tried: each case provokes a message and then does what it says.

Options that messages name are those of the command that prints them.
"""

import ast
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image
from recipes import RECIPES

from hf_intervene import bundled, cli, evaluation, trainer
from hf_intervene.data import ContextImages, load_contexts
from hf_intervene.trainer import feeding, run_folder, stopping
from hf_intervene.trainer.parsing import make_parser as train_parser
from hf_intervene.training import pretrain, reproduce
from hf_intervene.training.studies import ablation


ROOT = Path(__file__).parents[1]


# Options


class _Parser(Exception):
    """Carries the parser of a recipe, once it is made."""


def options_of(main):
    """The options of a recipe, as its parser has them."""
    found = []

    def parse(self, *_, **__):
        found.append(self)
        raise _Parser

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_Parser):
        for name in ("parse_args", "parse_known_args"):
            patch.setattr("argparse.ArgumentParser." + name, parse)
        main([])
    return words_of(found[0])


def words_of(parser):
    found = set()
    for action in parser._actions:
        found |= {word for word in action.option_strings if word.startswith("--")}
        for inner in (
            getattr(action, "choices", None) or () if action.dest == "==SUPPRESS==" else ()
        ):
            found |= words_of(action.choices[inner])
    return found


TRAIN = words_of(train_parser()) | {"--config", "--json"}
MAINS = RECIPES | {"command": evaluation.main}
OTHERS = {  # files of functions that several commands call
    "checkpoints": [pretrain.main],
    "jobs": [reproduce.main, ablation.main],
    "reproduced": [reproduce.main],
    "setup": [evaluation.main],
    "held_out": [evaluation.main],
}


def sub_commands():
    recipes = {name: cli._recipe_parser(name) for name in ("train", "evaluate")}
    parser = cli.make_parser(recipes)
    (commands,) = (action for action in parser._actions if isinstance(action.choices, dict))
    return set().union(*(words_of(command) for command in commands.choices.values()))


def known_options(path):
    """What options a file may speak of."""
    if path.stem in MAINS:
        return options_of(MAINS[path.stem]) | (
            TRAIN if path.stem in ("baselines", "effects") else set()
        )
    if path.stem in OTHERS:
        return set.intersection(*map(options_of, OTHERS[path.stem])) | {"--resume"}
    commands = path.stem.startswith("cli") or path.stem in ("demo", "page", "space")
    return sub_commands() if commands else TRAIN


def messages(path):
    """The texts of a file that are neither docstrings nor options that are added."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for child in ast.iter_child_nodes(node):
            child.parent = node
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and not isinstance(node.parent, ast.Expr)
        ):
            call = node.parent
            while not isinstance(call, (ast.Call, ast.stmt)):
                call = call.parent
            if getattr(getattr(call, "func", None), "attr", "") not in (
                "add_argument",
                "startswith",
                "replace",
                "removeprefix",
            ):
                yield node.value


@pytest.mark.parametrize("room", ["hf_intervene", "training"])
def test_options_that_messages_name_exist(room):
    tried = 0
    for path in sorted((ROOT / room).rglob("*.py")):
        named = {
            word
            for text in messages(path)
            if " " in text.strip()
            for word in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)
        }
        if named and path.name not in ("distributed.py", "page_style.py"):  # of DeepSpeed, of CSS
            wrong = {
                word
                for word in named
                if word not in known_options(path) and word not in {"--help", "--upgrade"}
            }
            assert not wrong, f"{path} names {wrong}"
            tried += len(named)
    assert tried > 10


# Cases


class Work:
    """What a case has: a folder of images, settings of a run, and the commands."""

    def __init__(self, folder, capsys, monkeypatch):
        self.folder, self.capsys, self.monkeypatch = folder, capsys, monkeypatch
        self.data, self.out = folder / "data", folder / "run"
        self.settings = TINY | {
            "output_dir": str(self.out),
            "max_steps": 4,
            "eval_every": 2,
            "warmup_steps": 1,
        }
        self.own = {"dataset": str(self.data), "validation_fraction": 0.3}

    def fill(self, context, count=12, size=16, seed=0, name=""):
        folder = self.data / context
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng([seed, len(list(self.data.iterdir())), count])
        for number in range(count):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{number}.png")

    def images(self):
        for context in ("obs", "hat", "shoe"):
            self.fill(context)
        return self

    def train(self, *words, expect=0, **changed):
        """What a run prints on standard error."""
        config = self.folder / "settings.yaml"
        config.write_text(yaml.safe_dump(self.settings | changed))
        status = trainer.main(["--config", str(config), *words])
        error = self.capsys.readouterr().err
        assert status == expect, error
        return error

    def command(self, main, *words, expect=0):
        status = main([str(word) for word in words])
        said = self.capsys.readouterr()
        assert status == expect, said.err
        return said.err

    def read(self, **options):
        return ContextImages.from_dataset(
            load_contexts(self.data), None, options.pop("resolution", None), **options
        )

    def newest(self):
        return sorted((self.out / "checkpoints").iterdir())[-1]


@pytest.fixture
def work(tmp_path, capsys, monkeypatch):
    return Work(tmp_path, capsys, monkeypatch)


def test_a_folder_with_another_run(work):
    work.train()
    assert "resume it with --resume auto, or choose another output_dir" in work.train(expect=1)
    work.train("--resume", "auto")
    work.train(output_dir=str(work.folder / "another"))


def test_a_run_shorter_than_its_warm_up(work):
    short = {
        "output_dir": str(work.folder / "a"),
        "max_steps": None,
        "epochs": 0.2,
        "images_per_context": 16,
        "warmup_steps": 5,
    }
    assert "give max_steps, more epochs or fewer warmup_steps" in work.train(**short)
    for number, change in enumerate(({"max_steps": 5}, {"epochs": 0.8}, {"warmup_steps": 1})):
        assert "fewer than its warm-up" not in work.train(
            **short | change | {"output_dir": str(work.folder / f"b{number}")}
        )


def test_a_loss_that_is_not_finite(work):
    original = feeding.Feed._fetch

    def overflow(self, step, indices):
        host = original(self, step, indices)
        return host if step < 2 else host | {"noise": host["noise"] * float("inf")}

    work.monkeypatch.setattr(feeding.Feed, "_fetch", overflow)
    error = work.train(checkpoint_every=1, log_every=1, expect=1)
    path = re.search(
        r"go on from it with --resume (\S+) and a lower learning_rate or max_grad_norm, or"
        r" mixed_precision=no",
        error,
    )[1]
    work.monkeypatch.undo()
    for number, way in enumerate(
        (["--learning_rate", "1e-4"], ["--max_grad_norm", "1"], ["--mixed_precision", "no"])
    ):
        work.train("--resume", path, *way, "--output_dir", str(work.folder / f"way-{number}"))
    work.train("--resume", path, "--learning_rate", "1e-4")  # in the same folder too
    work.monkeypatch.setattr(
        feeding.Feed,
        "_fetch",
        lambda *a: original(*a) | {"noise": original(*a)["noise"] * float("inf")},
    )
    error = work.train(output_dir=str(work.folder / "first"), expect=1)
    assert "begin anew, in another output_dir, with a lower learning_rate" in error
    work.monkeypatch.undo()
    work.train(output_dir=str(work.folder / "anew"), learning_rate=1e-4)


def test_settings_that_do_not_fit_the_data(work):
    assert "lower it" in work.train(batch_size=2**20, expect=1)
    assert "leave concepts out" in work.train(concepts=["quad1"], expect=1)
    assert "leave split out" in work.train(split="test", expect=1)
    work.train()


def test_a_checkpoint_that_is_broken(work):
    work.train(checkpoint_every=2)
    broken = work.newest()
    (broken / "model.safetensors").write_bytes(b"x")
    other = sorted((work.out / "checkpoints").iterdir())[0]
    error = work.train("--resume", str(broken), expect=1)
    assert "is incomplete or corrupt: remove it, or resume from another one" in error
    elsewhere = ["--output_dir", str(work.folder / "b")]
    work.train("--resume", str(other), *elsewhere)
    shutil.rmtree(broken)
    work.train("--resume", "auto")


def test_other_settings_and_other_images(work):
    work.images().train(**work.own)
    error = work.train("--resume", "auto", **work.own, learning_rate=1e-4, expect=1)
    assert "use the same ones, or another output_dir" in error
    work.train("--resume", "auto", **work.own)
    work.train(**work.own, learning_rate=1e-4, output_dir=str(work.folder / "b"))
    (work.data / "hat" / "0.png").rename(work.folder / "0.png")
    error = work.train("--resume", "auto", **work.own, expect=1)
    assert "go on with the data as they were, or begin anew in another output_dir" in error
    work.train(**work.own, output_dir=str(work.folder / "c"))
    (work.folder / "0.png").rename(work.data / "hat" / "0.png")
    work.train("--resume", "auto", **work.own)


def test_a_folder_with_files_of_somebodys(work):
    (work.out / "model").mkdir(parents=True)
    (work.out / "model" / "thesis.txt").write_text("mine")
    assert "choose another output_dir, or move it away" in work.train(expect=1)
    work.train(output_dir=str(work.folder / "another"))
    shutil.move(work.out / "model", work.folder / "moved")
    work.train()


def test_another_run_in_the_folder(work):
    work.out.mkdir()
    with run_folder.sole_run(work.out):
        assert "wait for its end, or choose another output_dir" in work.train(expect=1)
        work.train(output_dir=str(work.folder / "another"))
    work.train()


def test_a_cache_that_is_cut_while_a_run_reads_it(work):
    work.images()
    own = work.own | {
        "image_cache": str(work.folder / "cache"),
        "checkpoint_every": 1,
        "log_every": 1,
    }
    original = feeding.Feed.batch

    def cut(self, step):
        if step == 3:
            (file,) = (work.folder / "cache").glob("*.npy")
            file.write_bytes(file.read_bytes()[:300])
        return original(self, step)

    work.monkeypatch.setattr(feeding.Feed, "batch", cut)
    error = work.train(**own, max_steps=12, expect=1)
    assert (
        "was cut while it was being read: do not change the image cache while it is in use; go on"
        " with --resume auto" in error
    )
    work.monkeypatch.undo()
    assert work.newest().name >= "step-00000003"
    work.train("--resume", "auto", **own, max_steps=12)


def test_a_run_that_was_stopped(work):
    work.monkeypatch.setattr(
        stopping.Stop, "asked", property(lambda self: True, lambda self, value: None)
    )
    assert trainer.main([*arguments(work)]) == 130
    assert "go on with the same command and --resume auto" in work.capsys.readouterr().out
    work.monkeypatch.undo()
    assert trainer.main([*arguments(work), "--resume", "auto"]) == 0


def arguments(work):
    config = work.folder / "settings.yaml"
    config.write_text(yaml.safe_dump(work.settings))
    return ["--config", str(config)]


# Images


def fails(call, message):
    with pytest.raises((OSError, ValueError), match=message):
        call()


def test_images_of_several_sizes(work):
    work.images().fill("hat", 1, size=20, name="large")
    fails(work.read, "give a resolution to crop and resize all images to")
    work.read(resolution=16)


def test_an_image_that_is_too_large_or_too_deep(work):
    work.images().fill("hat", 1, size=40, name="large")
    work.monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    fails(lambda: work.read(resolution=16), "make it smaller")
    Image.open(work.data / "hat" / "large0.png").resize((20, 20)).save(
        work.data / "hat" / "large0.png"
    )
    work.read(resolution=16)
    deep = Image.new("I;16", (16, 16), 40_000)
    deep.save(work.data / "hat" / "deep.png")
    fails(lambda: work.read(resolution=16), "scale it to 8 bits first")
    Image.fromarray((np.asarray(deep) // 256).astype(np.uint8)).save(work.data / "hat" / "deep.png")
    work.read(resolution=16)


@pytest.mark.parametrize("way", ["replace", "remove"])
def test_an_image_that_is_damaged(work, way):
    file = work.images().data / "hat" / "0.png"
    file.write_bytes(b"no image")
    fails(work.read, "replace or remove it")
    shutil.copy(work.data / "hat" / "1.png", file) if way == "replace" else file.unlink()
    work.read()


def test_contexts_that_lack_something(work):
    for context in ("obs", "hat", "hat+shoe"):
        work.fill(context)
    fails(work.read, "add such images, or leave the concept out")
    ContextImages.from_dataset(load_contexts(work.data), ["hat"], None)
    work.fill("shoe", 5)
    fails(work.read, "context 'shoe' has 5 images; at least 8 are needed")
    work.fill("shoe", 8)
    work.read()
    shutil.rmtree(work.data / "obs")
    fails(work.read, "add images whose context is 'obs'")
    work.fill("obs")
    work.read()


def test_a_folder_without_contexts(work):
    work.fill(".", 20)
    fails(
        work.read,
        r"make one sub-folder for each context .*, or add a metadata.csv with the columns file_name"
        r" and context",
    )
    names = [f"{n}.png,{'obs' if n < 10 else 'hat' if n < 19 else ''}" for n in range(20)]
    (work.data / "metadata.csv").write_text("\n".join(["file_name,context", *names]))
    fails(work.read, "image 19 has no context: give a name")
    (work.data / "metadata.csv").write_text(
        "\n".join(["file_name,context", *names[:19], "19.png,hat"])
    )
    work.read()
    shutil.rmtree(work.data)
    work.images().read()


# Other commands


def test_too_few_images_to_measure_on(work):
    position = work.own | {"split_by": "position"}
    work.images().train(**position | {"validation_fraction": 0.05})
    out = [
        "--dataset",
        work.data,
        "--output",
        work.folder / "m",
        "--detector-images",
        "0",
        "--no-tests",
        "--projections",
        "5",
    ]
    error = work.command(evaluation.main, "--model", work.out / "model", *out, expect=1)
    assert "hold out more (validation_fraction)" in error
    held_out = work.folder / "more"
    work.train(**position | {"validation_fraction": 0.4, "output_dir": str(held_out)})
    work.command(evaluation.main, "--model", held_out / "model", *out)


def test_files_beside_a_model_and_options_of_evaluate(work):
    work.images().train(**work.own)
    model = work.out / "model"
    words = [
        "--model",
        model,
        "--dataset",
        work.data,
        "--output",
        work.folder / "m",
        "--detector-images",
        "0",
        "--no-tests",
    ]
    words += ["--projections", "5"]
    assert "leave --twins out" in work.command(evaluation.main, *words, "--twins", "4", expect=1)
    (model / "training_images.safetensors").write_bytes(b"x")
    assert "take it from where the model was trained, or remove it" in work.command(
        evaluation.main, *words, expect=1
    )
    shutil.copy(work.out / "best" / "training_images.safetensors", model)
    work.command(evaluation.main, *words)
    (model / "training_images.safetensors").unlink()
    work.command(evaluation.main, *words)
    card = ["card", model, "--metrics", work.folder / "settings.yaml"]
    assert (
        "give the metrics.json that `hf-intervene evaluate` writes, or its folder"
        in work.command(cli.main, *card, expect=1)
    )
    work.command(cli.main, *card[:3], work.folder / "m")
    work.command(cli.main, *card[:3], work.folder / "m" / "metrics.json")
    assert "--private and --revision need --push" in work.command(
        cli.main, *card[:2], "--private", expect=1
    )


def test_options_of_sample_and_edit(work):
    Image.new("RGB", (40, 30), "red").save(work.folder / "photo.png")
    edit = ["edit", "quad", work.folder / "photo.png", "--output", work.folder / "edited.png"]
    concept = ["--interventions", "quad1"]
    assert "--resize crops and resizes it" in work.command(cli.main, *edit, *concept, expect=1)
    work.command(cli.main, *edit, *concept, "--resize")
    assert "give --interventions or --reference" in work.command(
        cli.main, *edit, "--resize", expect=1
    )
    work.command(cli.main, *edit, "--resize", "--reference", f"quad1={work.folder / 'photo.png'}")
    assert "--reference takes CONCEPT=IMAGE" in work.command(
        cli.main, *edit, "--resize", "--reference", "quad1", expect=1
    )
    assert "there is not enough memory: ask for fewer or smaller images" in work.command(
        cli.main,
        "sample",
        "quad",
        "--num-images",
        10**9,
        "--output",
        work.folder / "a.png",
        expect=1,
    )
    work.command(cli.main, "sample", "quad", "--num-images", 1, "--output", work.folder / "a.png")


def test_pretraining(work):
    out = work.folder / "vae"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    words = ["--images", "16", "--resolution", "16", "--steps", "1", "--batch-size", "4"]
    error = work.command(pretrain.main, *words, "--output", out, expect=1)
    assert "choose another folder with --output, or remove it" in error
    work.command(pretrain.main, *words, "--output", work.folder / "other")
    shutil.rmtree(out)
    other = ("--autoencoder", work.folder / "other")
    error = work.command(pretrain.main, *words, "--output", out, *other, expect=1)
    assert "--autoencoder FOLDER is for --model dit: leave it out" in error
    work.command(pretrain.main, *words, "--output", out)
    shutil.rmtree(out)
    work.command(
        pretrain.main,
        *words,
        "--output",
        out / "dit",
        "--model",
        "dit",
        *other,
    )
    shutil.rmtree(work.out, ignore_errors=True)
    error = work.train(regime="frozen", expect=1)
    assert "regime frozen needs a pretrained base (--base)" in error
    work.train("--base", str(work.folder / "other"), regime="frozen")
    assert "regime lora needs a pretrained base (--base) and a lora_rank" in work.train(
        regime="lora", expect=1
    )
    lora = [
        "--base",
        str(work.folder / "other"),
        "--lora_rank",
        "2",
        "--output_dir",
        str(work.folder / "lora"),
    ]
    work.train(*lora, regime="lora")


def test_values_in_code(tmp_path):
    """Errors of Python functions: what they say to write works as it stands."""
    from hf_intervene import InterventionPipeline

    pipe = InterventionPipeline.from_pretrained(bundled("quad"))
    with pytest.raises(TypeError, match=r"torch.Generator\(\).manual_seed\(0\) makes one"):
        pipe("quad1", generator=5)
    pipe("quad1", generator=torch.Generator().manual_seed(0))
    noise = np.zeros((1, *pipe.model.noise_shape), np.float32) if hasattr(pipe, "model") else None
    if noise is not None:
        with pytest.raises(TypeError, match=r"torch.as_tensor\(noise\) makes one from an array"):
            pipe("quad1", noise=noise)
        pipe("quad1", noise=torch.as_tensor(noise))
