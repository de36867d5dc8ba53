"""Checkpoints: whole or not at all."""

import pytest
import torch

from hf_intervene.trainer import checkpoints as c


TENSORS = {"model": {"w": torch.arange(4.0)}, "optimizer": {"0.step": torch.tensor(3.0)}}


def save(folder, step, keep=2):
    return c.save_checkpoint(folder, step, TENSORS, {"best": 1.5}, keep)


def test_round_trip_and_pruning(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert [path.name for path in c.checkpoints(tmp_path)] == ["step-00000002", "step-00000010"]
    path, tensors, state = c.newest_checkpoint(tmp_path)
    assert path.name == "step-00000010" and state == {
        "step": 10,
        "files": ["model", "optimizer"],
        "best": 1.5,
    }
    assert torch.equal(tensors["model"]["w"], TENSORS["model"]["w"])
    assert all(
        file.suffix in (".json", ".safetensors") for file in tmp_path.rglob("*") if file.is_file()
    )


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path, monkeypatch, error):
    save(tmp_path, 1)

    def fail(*_):
        raise error

    monkeypatch.setattr(c, "save_file", fail)
    with pytest.raises(type(error)):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    with pytest.raises(type(error)):
        with c.atomic_folder(tmp_path / "step-00000001"):
            raise error
    assert c.newest_checkpoint(tmp_path)[2]["step"] == 1


def test_broken_checkpoints_are_named_and_passed_over(tmp_path):
    save(tmp_path, 1)
    weights = save(tmp_path, 2) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])
    with pytest.raises(OSError, match="step-00000002 is incomplete or corrupt"):
        c.load_checkpoint(tmp_path / "step-00000002")
    assert c.newest_checkpoint(tmp_path)[0].name == "step-00000001"
    (save(tmp_path, 3, keep=9) / "optimizer.safetensors").unlink()
    assert c.newest_checkpoint(tmp_path)[0].name == "step-00000001"
    (tmp_path / "step-00000001" / "state.json").write_text("{")
    assert c.newest_checkpoint(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        c.load_checkpoint(tmp_path / "step-00000009")


def test_a_crash_between_the_renames_is_mended(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000001").rename(tmp_path / ".step-00000001.previous")
    with pytest.raises(ValueError):
        with c.atomic_folder(tmp_path / "step-00000001"):
            raise ValueError
    assert c.load_checkpoint(tmp_path / "step-00000001")[1]["step"] == 1


def test_optimizer_state_round_trip():
    def make():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), 0.1)

    def step(layer, optimizer):
        layer(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    layer, optimizer = make()
    step(layer, optimizer)
    other, resumed = make()
    other.load_state_dict(layer.state_dict())
    saved = {
        k: v.clone() for k, v in c.flatten_optimizer(optimizer.state, [*layer.parameters()]).items()
    }
    c.restore_optimizer(resumed, [*other.parameters()], saved, lambda value, parameter: value)
    for pair in ((layer, optimizer), (other, resumed)):
        step(*pair)
    assert torch.equal(layer.weight, other.weight)
