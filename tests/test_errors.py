"""What a command says when something goes wrong: one line, whatever the message was."""

import pytest
import torch

from hf_intervene import cli
from hf_intervene.errors import EXPECTED, is_out_of_memory, sentence
from hf_intervene.training.checkpoints import restore_optimizer


def test_a_message_is_one_line_of_bounded_length():
    assert sentence(ValueError("a\n  b")) == "a b" and sentence(ValueError()) == "ValueError"
    long = sentence(ValueError("begin " + "x" * 10**7 + " end"))
    assert len(long) < 2100 and long.startswith("begin x") and long.endswith("x end")
    sentence(ValueError("caf\udce9")).encode()
    for error in (MemoryError(), RuntimeError("could not create a primitive"), RuntimeError("CUDA out of memory. Tried ...")):
        assert sentence(error).startswith("there is not enough memory")
    assert not is_out_of_memory(ValueError("out of memory")) and not is_out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.parametrize("error", [kind("what was\nwrong " + "x" * 10**6) for kind in EXPECTED])
def test_a_command_says_it(monkeypatch, capsys, error):
    def fail(_):
        raise error

    monkeypatch.setattr(cli, "concepts", fail)
    assert cli.main(["concepts", "quad"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) < 2100


def test_an_optimisers_state_of_another_shape_is_refused():
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    right = {"0.step": torch.tensor(1.0), "0.exp_avg": torch.ones(2, 3), "1.exp_avg_sq": torch.ones(4)}
    optimizer = torch.optim.AdamW(parameters)
    restore_optimizer(optimizer, parameters, right, lambda value, _: value)
    assert torch.equal(optimizer.state[parameters[0]]["exp_avg"], torch.ones(2, 3))
    for name, value in (("0.exp_avg", torch.ones(3, 2)), ("1.exp_avg_sq", torch.ones(1)), ("0.exp_avg", torch.ones(6))):
        with pytest.raises(RuntimeError, match="optimiser's exp_avg"):
            restore_optimizer(torch.optim.AdamW(parameters), parameters, right | {name: value}, lambda value, _: value)
