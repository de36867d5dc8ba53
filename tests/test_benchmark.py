"""benchmark.py: what it measures is measured in turn, what it compares is told from noise, and
every benchmark runs.
"""

import json
import time
from multiprocessing import Pipe

import numpy as np
import pytest
import torch
from benchmark_steps import STEPS

from hf_intervene.data import quad
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.training.benchmarks import benchmark
from hf_intervene.training.benchmarks import data as benchmark_data
from hf_intervene.training.benchmarks import presence as benchmark_presence
from hf_intervene.training.benchmarks import textbook as benchmark_textbook
from hf_intervene.training.benchmarks import tools as benchmark_tools
from hf_intervene.training.benchmarks.tools import (
    Turns,
    alternate,
    contest,
    figure,
    machine,
    over,
    summary,
)


TINY = {
    "resolution": 16,
    "images_per_context": 16,
    "batch_size": 8,
    "block_out_channels": [8, 8],
    "hidden_width": 16,
}


def report(values, kind="ratio", **machine_changes):
    return {
        "machine": machine() | machine_changes,
        "results": {"thing": {"training": figure(kind, values) | {"peak_gib": 2.0}}},
    }


def test_ratios_are_of_the_same_round():
    # ratios 2, 2, 3, whatever the rounds have in common
    found = summary([2.0, 4.0, 9.0], [1.0, 2.0, 3.0])
    assert found == {"ratio": 2.0, "quartiles": [2.0, 2.5], "rounds": 3}
    calls = []
    seconds = alternate([lambda: calls.append("a"), lambda: calls.append("b")], 2)
    # the first round warms up
    assert calls == ["a", "b"] * 3 and [len(s) for s in seconds] == [
        2,
        2,
    ]


def take_turns(turns: Turns, file, name, seconds, megabytes):
    held = torch.ones(megabytes * 2**18)
    while True:
        turns.next()
        with open(file, "a") as log:
            log.write(name)
        time.sleep(seconds)
        held += 1


def test_contestants_take_turns_in_processes_of_their_own(tmp_path):
    log = tmp_path / "log"
    found = contest(
        {"a": (take_turns, (log, "a", 0.02, 300)), "b": (take_turns, (log, "b", 0.2, 1))}, 2
    )
    assert log.read_text() == "ababab"
    assert all(0.02 <= s < 0.2 for s in found["a"].seconds) and all(
        s >= 0.2 for s in found["b"].seconds
    )
    assert found["a"].peak_gib - found["b"].peak_gib == pytest.approx(299 / 1024, abs=0.1)
    assert over(found, "b", "a")["ratio"] > 1
    here, there = Pipe()
    there.close()  # as that of a process that failed
    with pytest.raises(RuntimeError, match="'a' ended"):
        benchmark_tools._answer("a", here)


@pytest.mark.parametrize(
    ("kind", "before", "after", "verdict"),
    [
        ("ratio", [1.0, 1.01, 1.02], [1.2, 1.21, 1.22], "WORSE"),
        ("ratio", [1.2, 1.21, 1.22], [1.0, 1.01, 1.02], "better"),
        ("ratio", [1.0, 1.1, 1.2], [1.1, 1.2, 1.3], "same"),  # quartiles overlap
        ("ratio", [1.0, 1.0, 1.0], [1.01, 1.01, 1.01], "same"),  # less than 2 %
        ("images_per_second", [100.0, 101.0, 102.0], [80.0, 81.0, 82.0], "WORSE"),
        ("speedup", [1.0, 1.01, 1.02], [1.2, 1.21, 1.22], "better"),
    ],
)
def test_compare(tmp_path, capsys, kind, before, after, verdict):
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    for file, values in zip(files, (before, after)):
        with open(file, "w") as handle:
            json.dump(report(values, kind), handle)
    assert benchmark.main(["--compare", *files]) == (verdict == "WORSE")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if f"training, {kind}" in line][0].startswith(verdict)
    assert [line for line in lines if "peak_gib" in line][0].startswith("same")


def test_seconds_of_other_machines_are_not_compared():
    a, b = (
        report([100.0] * 3, "images_per_second"),
        report([10.0] * 3, "images_per_second", processor="another"),
    )
    text, worse = benchmark.compare(a, b)
    assert not worse and "The machines differ" in text and "images_per_second:" not in text
    assert benchmark.compare(report([1.0] * 3), report([2.0] * 3, processor="another"))[1]


def test_the_command_writes_json_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        benchmark_data, "render", lambda rounds: figure("images_per_second", [1000.0] * rounds)
    )
    file = tmp_path / "out" / "b.json"
    assert benchmark.main(["render", "--rounds", "3", "--output", str(file)]) == 0
    assert benchmark.read(str(file))["results"]["render"]["rounds"] == 3
    table = file.with_suffix(".md").read_text()
    assert (
        "| render | images per second | 1,000 | 1,000 to 1,000 |" in table
        and machine()["processor"] in table
    )
    assert "| render | images per second | 1,000 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nothing"], "no benchmark 'nothing'; the benchmarks are render"),
        (["--compare", "nowhere", "nowhere"], "cannot read nowhere"),
        (["--rounds", "0", "render"], "must be at least 1"),
    ],
)
def test_errors_are_one_sentence(capsys, argv, message):
    assert benchmark.main(argv) == 2
    assert message in capsys.readouterr().err


def test_every_benchmark_can_be_found():
    assert benchmark.main(["--list"]) == 0
    for name in ("bases", "data", "full_pipelines", "head", "presence", "textbook"):
        module = benchmark.import_module(f"hf_intervene.training.benchmarks.{name}")
        for entry in benchmark.BENCHMARKS.values():
            if entry.where.startswith(f"{name}:"):
                assert callable(getattr(module, entry.where.partition(":")[2]))


@pytest.mark.parametrize("make", STEPS)
def test_what_takes_turns_runs(make):
    step = make()
    step()
    step()


def test_the_textbook_is_the_same_method():
    """A block that is intervened on hears no other, and the others hear it."""
    torch.manual_seed(0)
    head = benchmark_textbook.DenseMaskedHead(3, 4, 2, 6)
    z = torch.randn(1, 12).requires_grad_()
    for context, heard in ((torch.zeros(3), True), (torch.tensor([1.0, 0.0, 0.0]), False)):
        head.unpool.weight.data.zero_()[:, :2] = 1.0  # only what comes out of the first block
        (gradient,) = torch.autograd.grad(head(z, context).sum(), z)
        assert (gradient[:, 4:].abs().sum() > 0) == heard and gradient[:, :4].abs().sum() > 0


def test_the_textbook_sees_one_context_a_batch():
    images = quad.images_by_context(("obs", "quad1", "size"), 20, 16)
    data = benchmark_textbook.ImageDataset(images)
    batches = benchmark_textbook.batches(data, 8)
    rows = [next(batches) for _ in range(6)]
    assert all(len({data.contexts[i] for i in batch}) == 1 and len(batch) == 8 for batch in rows)
    assert sorted(data.contexts[batch[0]] for batch in rows) == sorted(("obs", "quad1", "size") * 2)
    torch.testing.assert_close(
        data[21][0], torch.from_numpy(images["quad1"][1]).permute(2, 0, 1) / 255
    )


def test_the_data_benchmark():
    found = benchmark_data.data(1, 8, 16, 16)
    assert {name: sorted(row) for name, row in found.items()} == dict.fromkeys(
        ("memory", "file"), ["share", "speed"]
    )
    assert found["memory"]["share"]["ratio"] > 0


def test_the_quality_benchmark():
    found = benchmark_textbook.quality(1, 4, 8, **TINY, mixed_precision="no")
    assert found["images"] == 32
    shown = {f.name: f.value for f in benchmark.figures({"quality": found})}
    for who in ("textbook", "trainer", "trainer, half of the images"):
        assert (
            0 < shown[f"quality, {who}, likelihood"] < 12
            and 0 < shown[f"quality, {who}, compositions"] < 1
        )
    assert 0 < shown["quality, trainer, half of the images, time over the loop's"]


class Bright:
    """In place of a detector: a concept is there where one of four parts of the image is bright."""

    def __init__(self, concepts):
        self.concepts, self.usable = tuple(concepts), np.ones(len(concepts), bool)

    def present(self, images):
        parts = [x.mean((1, 2, 3)) for x in np.array_split(images, len(self.concepts), axis=1)]
        return np.stack(parts, axis=1) > 0.5


def test_the_presence_benchmark():
    settings = TINY | {"images_per_context": 40, "validation_images": 8, "prior_steps": 3}
    detector = Bright(["glasses", "beard", "hat", "smile"])
    found = benchmark_presence.presence(1, 2, 8, detector, **settings, max_steps=4)
    (seed,) = found["seeds"]
    head, rival = (seed["moments"][name] for name in ("head", "conditional VAE"))
    assert [m["step"] for m in head] == [2, 4, 4] and [m["step"] for m in rival] == [2, 4]
    for moments in (head, rival):
        assert 0 < moments[0]["seconds"] < moments[-1]["seconds"]
        assert all(0 <= m["present"] <= 1 for m in moments)
    assert seed["presence to reach"] == max(m["present"] for m in rival)


def test_the_first_time_that_reaches_the_most_of_the_other_counts():
    def curve(*points):
        return [benchmark_presence.Moment(0, *point) for point in points]

    rival = curve((10.0, 0.2), (20.0, 0.5), (30.0, 0.4))
    found = benchmark_presence.compared(
        {"head": curve((1.0, 0.1), (5.0, 0.5), (9.0, 0.9)), "conditional VAE": rival}
    )
    assert found["ratio"] == 0.25 and found["presence to reach"] == 0.5
    never = {"head": curve((1.0, 0.4)), "conditional VAE": rival}
    assert benchmark_presence.compared(never)["ratio"] is None


def test_operations_are_counted():
    """Twice those of the forward pass again for the backward pass, but for what meets the images,
    which need no gradient.
    """
    a = TrainArguments(dataset="quad", resolution=16)
    convolutions = [(3, 32, 8), (32, 64, 4), (64, 128, 2), (128, 256, 1)]
    # multiplied and added, by 4 x 4 weights
    forward = sum(2 * 16 * before * after * side**2 for before, after, side in convolutions)
    found = benchmark_textbook._operations(a)
    least = 3 * 2 * forward - 2 * 16 * 3 * 32 * 8**2  # encoder and decoder
    assert least < found < 1.6 * least  # and linear layers, the head among them


@pytest.mark.slow
def test_the_benchmarks_of_the_trainer():
    found = benchmark_textbook.textbook(1, 2, **TINY)
    assert found["gain"]["speedup"] > 0 and found["gain, defaults"]["speedup"] > 0
    assert found["trainer"]["peak_gib"] > 0.1
    found = benchmark_textbook.utilisation(1, 2, 64, **TINY)
    assert 0 < found["share"]["utilisation"] and found["trainer"]["images_per_second"] > 0
    found = benchmark_data.processes(1, 2, **TINY | {"resolution": 16})
    assert found["two, gain"]["speedup"] > 0 and found["two, twice the batch, gain"]["speedup"] > 0
