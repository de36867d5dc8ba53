"""Errors of commands: one line for every message."""

import errno
from pathlib import Path

import pytest
import torch
import yaml
from datasets.exceptions import DatasetsError
from recipes import RECIPES
from safetensors import SafetensorError

from hf_intervene import cli, evaluation, trainer
from hf_intervene.errors import EXPECTED, is_out_of_memory, sentence
from hf_intervene.trainer.checkpoints import restore_optimizer


ROOT = Path(__file__).parents[1]


def test_a_message_is_one_line_of_bounded_length():
    assert sentence(ValueError("a\n  b")) == "a b" and sentence(ValueError()) == "ValueError"
    long = sentence(ValueError("begin " + "x" * 10**7 + " end"))
    assert len(long) < 2100 and long.startswith("begin x") and long.endswith("x end")
    sentence(ValueError("caf\udce9")).encode()
    for error in (
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("CUDA out of memory. Tried ..."),
    ):
        assert sentence(error).startswith("there is not enough memory")
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(
        RuntimeError("size mismatch")
    )


@pytest.mark.parametrize("error", [kind("what was\nwrong " + "x" * 10**6) for kind in EXPECTED])
def test_a_command_prints_the_message(monkeypatch, capsys, error):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "concepts", fail)
    assert cli.main(["concepts", "quad"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 2100


def test_an_error_of_the_system_names_the_file_and_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("")
    said = []
    for path in (tmp_path / "none", tmp_path / "file" / "x"):
        with pytest.raises(OSError) as error:
            path.read_text()
        said.append(sentence(error.value).removeprefix(str(path)))
    assert said == [
        " cannot be read or written: No such file or directory.",
        " cannot be read or written: Not a directory.",
    ]
    no_space = OSError(errno.ENOSPC, "No space left on device")
    assert sentence(no_space) == "a file cannot be read or written: No space left on device."
    assert sentence(FileNotFoundError("there is no x.")) == "there is no x."


def test_words_that_are_not_understood_are_printed_in_one_line(capsys):
    for main in (lambda words: cli.main(["concepts", "quad", *words]), evaluation.main):
        with pytest.raises(SystemExit):
            main(["\r0", "\x1b]0;x\x07", "--output", "x", "--model", "y"])
        last = capsys.readouterr().err.splitlines()[-1]
        assert r"error: unrecognized arguments: \r0 \x1b]0;x\x07" in last


# Every command


def lost_process():
    return RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer")


# An error like that of httpx, which older versions of the Hub's client do not use.
CONNECTION = type("ConnectError", (type("HTTPError", (Exception,), {"__module__": "httpx"}),), {})
UNEXPECTED = RuntimeError("size mismatch")
LIBRARIES = [
    SafetensorError("truncated\nheader"),
    DatasetsError("x"),
    yaml.YAMLError("x"),
    CONNECTION("no\nroute"),
]
MEMORY = [
    RuntimeError("could not create a primitive"),
    RuntimeError("can't start new thread"),
    MemoryError(),
]
MAINS = RECIPES | {
    "hf-intervene": cli.main,
    "train": trainer.main,
    "evaluate": evaluation.main,
}


def failing(monkeypatch, error):
    """Make every command fail when it parses its arguments."""

    def fail(*_, **__):
        raise error

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(f"argparse.ArgumentParser.{name}", fail)


def test_a_message_holds_nothing_that_acts_on_the_terminal():
    assert sentence(ValueError("a\x1b]0;b\x07 \u202ec\udce9")) == r"a\x1b]0;b\x07 \u202ec\udce9"
    assert sentence(ValueError("1\u202fPM caf\u00e9")) == "1 PM caf\u00e9"


@pytest.mark.parametrize(
    "error",
    [*LIBRARIES, *MEMORY, lost_process(), OSError("a\nb")],
    ids=lambda error: str(error)[:12],
)
@pytest.mark.parametrize("name", MAINS)
def test_every_command_prints_errors_in_one_line(monkeypatch, capsys, name, error):
    failing(monkeypatch, error)
    assert MAINS[name]([]) == (2 if name == "benchmark" else 1)
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and said.endswith("\n")


@pytest.mark.parametrize("name", MAINS)
def test_every_command_shows_other_exceptions_and_ends_quietly_when_stopped(
    monkeypatch, capsys, name
):
    failing(monkeypatch, UNEXPECTED)
    with pytest.raises(RuntimeError, match="size mismatch"):
        MAINS[name]([])
    failing(monkeypatch, KeyboardInterrupt())
    assert MAINS[name]([]) == 130 and capsys.readouterr().err.startswith("stopped: ")


def test_no_command_has_its_own_list_of_exceptions():
    for room in ("hf_intervene", "training"):
        for path in (ROOT / room).rglob("*.py"):
            if path.name != "errors.py":
                assert "EXPECTED" not in path.read_text(), path
    mains = [
        path.stem for path in (ROOT / "training").rglob("*.py") if "\ndef main(" in path.read_text()
    ]
    assert set(mains) <= set(MAINS)


def test_an_optimisers_state_of_another_shape_is_refused():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    right = {
        "0.step": torch.tensor(1.0),
        "0.exp_avg": torch.ones(2, 3),
        "1.exp_avg_sq": torch.ones(4),
    }
    optimizer = torch.optim.AdamW(parameters)
    restore_optimizer(optimizer, parameters, right, lambda value, _: value)
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], torch.ones(2, 3))
    for name, value in (
        ("0.exp_avg", torch.ones(3, 2)),
        ("1.exp_avg_sq", torch.ones(1)),
        ("0.exp_avg", torch.ones(6)),
    ):
        with pytest.raises(RuntimeError, match="optimiser's exp_avg"):
            restore_optimizer(
                torch.optim.AdamW(parameters),
                parameters,
                right | {name: value},
                lambda value, _: value,
            )
