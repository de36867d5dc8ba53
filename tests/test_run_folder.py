"""The folder of a run: what is the user's in it stays."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_intervene import cli
from hf_intervene.cards import MARKER
from hf_intervene.trainer import run_folder
from hf_intervene.trainer.checkpoints import atomic_folder, check_writable
from hf_intervene.trainer.loop import train
from hf_intervene.trainer.run_folder import remove
from hf_intervene.trainer.settings import TrainArguments


def write(file, text="mine"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize(
    "name",
    [
        "model/thesis.txt",
        "best/thesis.txt",
        "checkpoints/step-00000001/x",
        "samples/step-00000002.png",
        "prepared/train/x.npy",
        "drawn/train.bin",
        ".old.previous/x",
        ".thesis.writing",
        "history.jsonl",
        "curves.png",
        "training_arguments.yaml",
        "model",
    ],
)
def test_a_folder_with_files_of_somebodys_is_refused(tiny, tmp_path, name):
    """Each time, and nothing is touched."""
    out = tmp_path / "run"
    write(out / name)
    write(out / "notes.txt")
    before = contents(out)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"was not written by a run, .*choose another output_dir"
        ):
            train(TrainArguments(**tiny))
        assert contents(out) == before and len(list(out.iterdir())) == 2


def test_what_a_user_puts_into_the_folder_of_a_run_stays(tiny, tmp_path):
    out, settings = tmp_path / "run", tiny | {"max_steps": 4}
    write(out / "notes.txt")
    train(TrainArguments(**settings))
    kept = [
        "notes.txt",
        "model/thesis.txt",
        "best/figures/a.txt",
        ".old.previous/x",
        "model/README.md",
        ".thesis.writing",
    ]
    for name in kept:
        write(out / name)
    write(out / "best" / "README.md", MARKER)  # a card of the weights that were there
    train(TrainArguments(**settings | {"resume": "auto"}))
    assert all((out / name).read_text() == "mine" for name in kept)
    assert (out / "model" / "model.safetensors").exists()


def test_a_new_best_model_keeps_what_is_not_the_models(tmp_path):
    folder = tmp_path / "best"
    for name, text in (
        ("adapter/notes.txt", "mine"),
        ("adapter/config.json", "old"),
        ("README.md", MARKER),
        ("a/b.txt", "mine"),
    ):
        write(folder / name, text)
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "link").symlink_to(tmp_path / "nowhere")
    with atomic_folder(folder, run_folder.model_files(folder)) as new:
        write(new / "config.json", "new")
    assert contents(folder) == {
        "adapter/notes.txt": "mine",
        "a/b.txt": "mine",
        "config.json": "new",
    }
    assert (folder / "link").is_symlink() and not (tmp_path / ".best.previous").exists()


def test_a_link_in_the_place_of_a_folder_is_replaced_and_not_followed(tmp_path):
    write(tmp_path / "elsewhere" / "thesis.txt")
    (tmp_path / "model").symlink_to(tmp_path / "elsewhere")
    with atomic_folder(tmp_path / "model") as new:
        write(new / "config.json", "new")
    assert (
        not (tmp_path / "model").is_symlink() and (tmp_path / "elsewhere" / "thesis.txt").exists()
    )
    (tmp_path / ".best.previous").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "best").mkdir()
    run_folder.tidy(tmp_path)
    assert (tmp_path / "elsewhere" / "thesis.txt").exists() and not (
        tmp_path / ".best.previous"
    ).is_symlink()


@pytest.mark.parametrize("name", ["", " "])
def test_a_folder_without_a_name_is_not_the_one_we_are_in(
    tiny, tmp_path, monkeypatch, capsys, name
):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match="the output folder is an empty text"):
        train(TrainArguments(**tiny | {"output_dir": name}))
    with pytest.raises(ValueError, match="the output folder is an empty text"):
        check_writable(name)
    for command in (["sample", "quad"], ["edit", "quad", "a.png"], ["demo"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--output", name])
        assert "an empty text is no name" in capsys.readouterr().err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "cannot be made .File name too long.: give another one"),
        ("x\0y", "holds a character that no name may have"),
        ("o\udce9", "has bytes that are not UTF-8"),
    ],
)
def test_names_that_no_folder_can_have(tiny, tmp_path, name, message):
    """They are refused before anything is trained."""
    with pytest.raises((OSError, ValueError), match=message):
        train(TrainArguments(**tiny | {"output_dir": str(tmp_path / name)}))
    assert not list(tmp_path.iterdir())


def test_trying_to_write_touches_no_file(tmp_path):
    write(tmp_path / ".writable")
    check_writable(tmp_path)
    assert contents(tmp_path) == {".writable": "mine"}


def test_nothing_is_written_through_a_link(tiny, tmp_path):
    """Links in the folder of somebody else's run, whose next files have known names."""
    out, thesis = tmp_path / "run", tmp_path / "thesis.txt"
    train(TrainArguments(**tiny | {"checkpoint_every": 4}))
    remove(out / "checkpoints" / "step-00000008")
    thesis.write_text("mine")
    names = [".curves.png.writing", "samples/step-00000008.png"]
    names += ["samples/.step-00000008.png.writing", "history.jsonl", "training_arguments.yaml"]
    names += [".history.jsonl.writing", ".training_arguments.yaml.writing"]
    for name in names:
        (out / name).unlink(missing_ok=True)
        (out / name).symlink_to(thesis)
    train(TrainArguments(**tiny | {"checkpoint_every": 4, "resume": "auto"}))
    assert thesis.read_text() == "mine"
    assert not any(path.is_symlink() for path in out.rglob("*"))
