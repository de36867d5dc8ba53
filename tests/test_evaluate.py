"""evaluate.py and the command line, end to end on tiny models."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import hf_intervene
from hf_intervene import (
    InterventionModel,
    InterventionPipeline,
    LightVAE,
    cli,
    cli_parser,
    demo,
    evaluation,
    trainer,
)
from hf_intervene.data import quad
from hf_intervene.evaluation import setup as evaluation_setup
from hf_intervene.evaluation.content import measure_counterfactuals
from hf_intervene.metrics import bits_per_pixel, sliced_wasserstein
from hf_intervene.metrics.detector import train_context_detector
from hf_intervene.trainer.earlier import SETTINGS_VERSION
from hf_intervene.trainer.simulated import SIMULATED, held_out_on_demand
from hf_intervene.training.studies import ablation


ROOT = Path(__file__).parents[1]


@pytest.fixture
def model():
    torch.manual_seed(0)
    base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    return InterventionModel.build(base, quad.CONCEPTS, noise_width=4, initializer_range=0.5).eval()


@pytest.fixture
def saved(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_evaluate_measures_what_it_says(model):
    contexts = ("obs", "quad1", "quad1+quad2")
    real, other = (quad.images_by_context(contexts, 24, 16, seed=seed) for seed in (1, 2))
    metrics = evaluation.evaluate(model, real, other, ("independent",), num_projections=30)
    assert [row["kind"] for row in metrics["contexts"].values()] == [
        "concept",
        "concept",
        "composition",
    ]
    for name, row in metrics["contexts"].items():
        assert row["independent"]["floor"] == pytest.approx(
            sliced_wasserstein(real[name], other[name], 30), rel=1e-4
        )
        x = torch.from_numpy(real[name]).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            noise = torch.zeros(24, *model.noise_shape)
            output = model(x, model.targets(name, 24), noise=noise, code_length=True)
        near = bits_per_pixel((output.reconstruction_loss + output.kl).mean().item(), 16, 16)
        assert row["bits_per_pixel"] == pytest.approx(near, rel=0.05)
    distances = [metrics["contexts"][name]["independent"]["distance"] for name in ("obs", "quad1")]
    mean = metrics["means"]["concept"]["independent"]
    assert (
        mean["distance"] == pytest.approx(np.mean(distances))
        and 0 < mean["mean_shift"] < mean["distance"]
    )
    assert (
        f"make {mean['mean_shift']:.3f} (concept; floor {mean['mean_shift_floor']:.3f}), "
        in evaluation.table(metrics)
    )
    assert evaluation.evaluate(model, real, other, ("independent",), num_projections=30) == metrics


def test_real_images_in_place_of_generated_ones_score_the_floor(model, monkeypatch):
    real, other, third = (
        quad.images_by_context(("quad1",), 200, 16, seed=seed) for seed in (1, 2, 3)
    )
    tensor = torch.from_numpy(third["quad1"]).permute(0, 3, 1, 2).float() / 255
    monkeypatch.setattr(model, "sample", lambda *args, **kwargs: tensor)
    row = evaluation.evaluate(model, real, other, num_projections=100)["contexts"]["quad1"]
    assert row["independent"]["ratio"] == pytest.approx(1, abs=0.4)


def test_reconstructions_of_further_images_are_compared_with_the_real_ones(model, monkeypatch):
    real, other = (quad.images_by_context(("obs", "quad1"), 40, 16, seed=seed) for seed in (1, 2))
    seen = []
    abduct, predict = model.abduct, model.predict

    def remembered(pixel_values, targets, generator, *rest, **options):
        seen.append((pixel_values, targets, generator is None))
        return abduct(pixel_values, targets, generator, *rest, **options)

    def perfect(noise, residual, name, *rest, **options):
        assert (
            noise.std() > 0
            and predict(noise, residual, name, *rest, **options).shape == other[name].shape
        )
        return other[name] / 255

    monkeypatch.setattr(model, "abduct", remembered)
    monkeypatch.setattr(model, "predict", perfect)
    metrics = evaluation.evaluate(model, real, other, ("independent",), num_projections=50)
    for (x, targets, mean), (name, row) in zip(seen, metrics["contexts"].items(), strict=True):
        assert (
            torch.equal(x, model.preprocess(other[name]))
            and torch.equal(targets, model.targets(name, 40))
            and not mean
        )
        assert row["reconstruction"]["distance"] == pytest.approx(
            row["independent"]["floor"], rel=1e-5
        )
    mean = metrics["means"]["concept"]["reconstruction"]["distance"]
    assert f"at {mean:.3f} (concept), " in evaluation.table(metrics)


@pytest.mark.parametrize("name", ["metrics.json", "metrics.md", "floors.png"])
def test_files_of_somebodys_are_not_replaced(saved, tmp_path, capsys, name):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / name).write_text("mine")
    argv = ["--model", str(saved), "--output", str(tmp_path / "m"), "--images", "70"]
    assert evaluation.main(argv) == 1
    said = capsys.readouterr().err
    assert f"{name} was not written by hf-intervene evaluate, and would be replaced" in said
    assert (tmp_path / "m" / name).read_text() == "mine"


def test_command_writes_metrics_and_table(saved, tmp_path, capsys, monkeypatch):
    argv = [
        "--model",
        str(saved),
        "--output",
        str(tmp_path / "m"),
        "--images",
        "70",
        "--projections",
        "10",
        "--protocol",
        "both",
    ]
    argv += ["--detector-images", "110", "--twins", "6"]
    monkeypatch.setattr(
        evaluation_setup, "train_context_detector", partial(train_context_detector, steps=10)
    )
    assert evaluation.main(argv) == 0
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert set(metrics["contexts"]) == {*quad.TRAIN_CONTEXTS, *quad.HELD_OUT}
    assert metrics["settings"]["images"] == 70
    # a package may leave out "+cu130"
    assert torch.__version__.startswith(metrics["versions"]["torch"])
    text = (tmp_path / "m" / "metrics.md").read_text()
    assert text.strip() in capsys.readouterr().out
    assert (
        "| **mean composition** |" in text
        and "independent protocol" in text
        and "paper protocol" in text
    )
    row = metrics["contexts"]["quad1+quad2"]
    assert row["counterfactual"]["images"] == 6 and row["independent"]["ratio"] is None
    assert row["alternatives"]["single_context"] in ("quad1", "quad2")
    assert row["alternatives"]["single"] < row["alternatives"]["nothing"]
    assert set(row["factors"]) == {"generated", "floor", "no triangles", "one size", "circles only"}
    assert "two_sample" not in row  # of 70 images a side
    assert {name for name, row in metrics["contexts"].items() if "routes" in row} == set(
        quad.CONCEPTS
    )
    assert list(metrics["verdicts"]) == list(quad.CONCEPTS)
    assert {"value", "floor", "untrained"} <= set(metrics["codes"]["c"]["own_block"])
    assert "| c | " in text and "score of an untrained model" in text
    assert "No ratio to the floor below 200 distinct images a side" in text


def test_twins_of_data_that_have_none():
    with pytest.raises(ValueError, match="ident3d has no twins.*leave --twins out"):
        evaluation_setup.content_options(
            "ident3d", ("a",), 16, 3, "dependent", "bundled", None, {}, 0, 0, 4
        )
    with pytest.raises(ValueError, match="obs among them"):
        measure_counterfactuals(None, {"quad1": np.zeros((2, 16, 16, 3), np.uint8)})


class Seen:
    """A detector of images whose corner pixels were marked: red says quad1, green says quad2."""

    concepts, unusable, usable, kind = quad.CONCEPTS, {}, np.ones(6, bool), "attributes"

    def logits(self, images):
        marks = np.zeros((len(images), 6))
        marks[:, :2] = images[:, 0, 0, :2] / (255 if images.dtype == np.uint8 else 1)
        return marks - 0.5

    def present(self, images):
        return self.logits(images) > 0

    def features(self, images):
        return images[:, 0, 0].astype(np.float32)

    def to_dict(self):
        return {"kind": self.kind, "errors": {}, "unusable": {}}


def test_presence_beside_its_floor_and_the_alternatives(model, monkeypatch):
    rng = np.random.default_rng(0)

    def marked(quad1, quad2):
        images = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
        images[:, 0, 0] = 0
        images[: round(40 * quad1), 0, 0, 0] = 255
        images[40 - round(40 * quad2) :, 0, 0, 1] = 255
        return images

    contexts = {"obs": (0.1, 0), "quad1": (1, 0), "quad2": (0.5, 1), "quad1+quad2": (1, 1)}
    real, other = ({name: marked(*rates) for name, rates in contexts.items()} for _ in range(2))
    made = {"obs": (0, 0), "quad1": (0.5, 0), "quad2": (0, 0.8), "quad1+quad2": (0.6, 0.6)}
    samples = {
        name: torch.from_numpy(marked(*rates)).permute(0, 3, 1, 2) / 255
        for name, rates in made.items()
    }
    monkeypatch.setattr(model, "sample", lambda name, **options: samples[name])
    metrics = evaluation.evaluate(model, real, other, ("independent",), 10, detector=Seen())
    assert (
        metrics["verdicts"]["quad1"] == "partly (50 % of 100 %)"
        and metrics["verdicts"]["quad2"] == "partly (80 % of 100 %)"
    )
    pair = metrics["contexts"]["quad1+quad2"]["presence"]
    assert (
        pair["generated"]["all_wanted"]["value"] == 0.2 and pair["real"]["all_wanted"]["value"] == 1
    )
    assert pair["nothing"]["all_wanted"]["value"] == 0
    assert pair["single_context"] == "quad2" and pair["single"]["all_wanted"]["value"] == 0.5
    assert (
        pair["composition"]["ratio"] == pytest.approx(0.2 / (0.5 * 0.8))
        and pair["composition_floor"]["ratio"] == 1
    )
    alone = metrics["contexts"]["quad2"]["presence"]
    assert alone["real"]["unwanted"]["value"] == 0.5 and alone["generated"]["exact"]["value"] == 0.8
    assert metrics["means"]["composition"]["presence"]["generated"] == 0.2
    text = evaluation.table(metrics)
    assert text.index("## Presence") < text.index("## Sliced")
    assert "- quad1: partly (50 % of 100 %)" in text and "| quad1+quad2 | 0.200 [0.1" in text


def numbers(value):
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif value is not None and not isinstance(value, str):
        yield value


def test_two_processes_share_out_the_contexts(saved, tmp_path):
    options = [
        "--images",
        "70",
        "--projections",
        "10",
        "--protocol",
        "both",
        "--detector-images",
        "0",
        "--twins",
        "8",
    ]
    assert (
        evaluation.main(["--model", str(saved), "--output", str(tmp_path / "one"), *options]) == 0
    )
    launcher = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "training/evaluate.py",
    ]
    done = subprocess.run(
        [
            sys.executable,
            *launcher,
            "--model",
            str(saved),
            "--output",
            str(tmp_path / "two"),
            *options,
        ],
        cwd=ROOT,
        env=os.environ | {"ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    # one table of distances for each protocol, of one process
    assert done.stdout.count("mean composition") == 2
    one, two = (
        json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two")
    )
    assert list(one["contexts"]) == list(two["contexts"])
    assert list(numbers(one["contexts"])) == pytest.approx(list(numbers(two["contexts"])), rel=1e-5)
    assert list(numbers(one["means"])) == pytest.approx(list(numbers(two["means"])), rel=1e-5)


def test_what_is_drawn_on_demand_is_what_is_drawn_at_once():
    for simulated in (SIMULATED["quad"](16, 3), SIMULATED["mnist"](28, 1)):
        at_once, on_demand = (
            simulated.held_out_images(6, 1),
            held_out_on_demand(simulated, 6, 1, simulated.contexts + simulated.held_out),
        )
        for a, b in zip(at_once, on_demand):
            assert list(a) == list(b) and len(b) == len(a)
            assert all(np.array_equal(a[name], b[name]) for name in a)
    with pytest.raises(KeyError):
        on_demand[0]["quad1"]


def test_own_images(saved, model, tmp_path, capsys):
    for name, images in quad.images_by_context(quad.TRAIN_CONTEXTS, 12, 16).items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / "images" / name / f"{number}.png")
    argv = [
        "--model",
        str(saved),
        "--output",
        str(tmp_path / "m"),
        "--dataset",
        str(tmp_path / "images"),
    ]
    assert evaluation.main([*argv, "--all"]) == 0
    assert "6 held-out images of obs a side" in capsys.readouterr().err
    rows = json.loads((tmp_path / "m" / "metrics.json").read_text())["contexts"]
    assert {row["images"] for row in rows.values()} == {6} and len(rows) == 7
    (saved / "training_arguments.yaml").write_text("settings_version: 2\n")
    assert evaluation.main(argv) == 1  # the tenth that training held out by position is one image
    assert "two held-out images of obs" in capsys.readouterr().err
    # What is measured is what the trainer held out.
    settings = {
        "dataset": str(tmp_path / "images"),
        "validation_fraction": 0.5,
        "data_seed": 3,
        "resolution": 16,
        "concepts": list(quad.CONCEPTS),
    }
    (saved / "training_arguments.yaml").write_text(
        yaml.safe_dump({"settings_version": SETTINGS_VERSION} | settings)
    )
    assert evaluation.main(argv) == 0
    _, validation = trainer.load_data(trainer.TrainArguments(output_dir="unused", **settings))
    split = evaluation.training_split(saved)
    halves = evaluation.held_out_images(
        str(tmp_path / "images"), model.concepts, 99, 0, 16, 3, "dependent", split
    )
    for name, expected in validation.by_context().items():
        measured, held_out = (
            {x.tobytes() for half in halves for x in half[name]},
            {x.tobytes() for x in expected},
        )
        # in two halves of one size
        assert measured <= held_out and len(measured) == len(held_out) // 2 * 2
    for path in (tmp_path / "images" / "size").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="no context names the concept 'size'"):
        evaluation.held_out_images(
            str(tmp_path / "images"), model.concepts, 5, 0, 16, 3, "dependent"
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--model": "nowhere"}, "no model folder nowhere"),
        ({"--output": "file/out"}, "cannot be written"),
        ({"--dataset": "./nowhere"}, "no folder ./nowhere"),
    ],
)
def test_bad_input_is_one_sentence(saved, tmp_path, capsys, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    options = {"--model": str(saved), "--output": "out"} | change
    assert evaluation.main([word for pair in options.items() for word in pair]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


@pytest.mark.parametrize("kind", ["pipeline", "model"])
def test_sample_edit_and_concepts_commands(model, kind, tmp_path, capsys):
    pipe = str(tmp_path / "pipe")
    (InterventionPipeline.from_model(model) if kind == "pipeline" else model).save_pretrained(pipe)
    argv = ["sample", pipe, "--interventions", "quad1+size=0.5", "--num-images", "3", "--output"]
    assert cli.main([*argv, str(tmp_path / "row.png")]) == 0
    width, height = Image.open(tmp_path / "row.png").size  # obs above, 128 pixels an image
    assert 3 * 128 < width < 4 * 128 + 100 and 2 * 128 < height < 3 * 128
    assert cli.main([*argv, str(tmp_path / "many")]) == 0
    assert len(list((tmp_path / "many").glob("*.png"))) == 3
    image = str(tmp_path / "many" / "0000.png")
    assert (
        cli.main(
            [
                "edit",
                pipe,
                image,
                "--interventions",
                "quad1",
                "--output",
                str(tmp_path / "edited.png"),
            ]
        )
        == 0
    )
    Image.new("RGB", (40, 30), (200, 40, 40)).save(photo := str(tmp_path / "photo.png"))
    resized = [
        "edit",
        pipe,
        photo,
        "--reference",
        f"quad1={photo}",
        "--output",
        str(tmp_path / "photo-edited"),
    ]
    assert cli.main([*resized, "--resize"]) == 0
    assert Image.open(Path(resized[-1], "0000.png")).size == (16, 16)
    assert cli.main(resized) == 1
    assert (
        "is 40x30, and the model's images are 16x16: --resize crops and resizes it."
        in capsys.readouterr().err
    )
    assert cli.main(["concepts", pipe]) == 0
    assert capsys.readouterr().out.split() == list(quad.CONCEPTS)
    assert cli.main(["concepts", pipe, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "concepts": list(quad.CONCEPTS),
        "contexts": ["obs", *quad.CONCEPTS],
    }
    assert cli.main(["sample", pipe, "--interventions", "quad9", "--output", image]) == 1
    assert "unknown concept 'quad9'" in capsys.readouterr().err


@pytest.fixture
def quick_demo(tiny, monkeypatch):
    settings = {key: value for key, value in tiny.items() if key != "output_dir"} | {
        "max_steps": 4,
        "mixed_precision": "auto",
    }
    for name, shown in demo.DEMONSTRATIONS.items():
        quick = settings | {"dataset": name}
        quick = replace(shown, light=quick, pretrained=quick)
        monkeypatch.setitem(demo.DEMONSTRATIONS, name, quick)
    monkeypatch.setattr(demo, "MEASURED_IMAGES", 16)
    monkeypatch.setattr(demo, "PRETRAINING_STEPS", 2)


def test_the_demo_knows_the_data_sets_of_its_option():
    assert tuple(demo.DEMONSTRATIONS) == cli_parser.DEMO_DATASETS
    for name, shown in demo.DEMONSTRATIONS.items():
        data = SIMULATED[name]
        for settings in (shown.light, shown.pretrained):
            assert trainer.TrainArguments(**settings).data.dataset == name
        assert shown.edits[0] == "obs" and shown.pair in data.held_out
        assert set(shown.edits) <= {*data.contexts, *data.held_out}
        assert (ROOT / "training" / "configs" / shown.better[0]).exists()


@pytest.mark.parametrize("dataset", cli_parser.DEMO_DATASETS)
def test_demo_makes_everything_it_names(quick_demo, dataset, tmp_path, capsys):
    out = tmp_path / "demo"
    argv = ["demo", "--dataset", dataset, "--output", str(out)]
    assert cli.main(argv) == 0
    for name in (
        "contexts.png",
        "edits.png",
        "metrics.md",
        "metrics.json",
        "pipeline/model_index.json",
    ):
        assert (out / name).stat().st_size > 100
    printed = capsys.readouterr().out
    assert "mean composition" in printed and "Try next" in printed
    assert f"--interventions {demo.DEMONSTRATIONS[dataset].pair} " in printed
    metrics = json.loads((out / "metrics.json").read_text())
    assert set(metrics["contexts"]) == {*SIMULATED[dataset].contexts, *SIMULATED[dataset].held_out}
    assert cli.main(argv) == 1
    assert "already holds something" in capsys.readouterr().err


def test_an_interrupted_demo_goes_on(quick_demo, tmp_path, monkeypatch, capsys):
    argv = ["demo", "--output", str(tmp_path)]

    def interrupted(arguments, **options):
        Path(arguments.run.output_dir).mkdir()
        return trainer.TrainResult(None, 1, float("inf"), "bits per pixel", interrupted=True)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train", interrupted)
        assert cli.main(argv) == 130
    assert "goes on from there" in capsys.readouterr().out and not (tmp_path / "pipeline").exists()
    assert cli.main(argv) == 0
    assert (tmp_path / "pipeline").exists()


def test_pretrained_demo(quick_demo, tmp_path, capsys):
    out = tmp_path / "demo"
    assert cli.main(["demo", "--pretrained", "--output", str(out)]) == 0
    for name in (
        "pair.png",
        "frozen/contexts.png",
        "lora/edits.png",
        "frozen/metrics.json",
        "vae/config.json",
    ):
        assert (out / name).stat().st_size > 100
    assert (
        not (out / "frozen" / "run" / "model" / "base").exists()
        and (out / "lora" / "run" / "model" / "lora").exists()
    )
    assert "without the base" in capsys.readouterr().out
    assert (
        cli.main(["card", str(out / "frozen" / "pipeline"), "--metrics", str(out / "frozen")]) == 0
    )
    settings = (out / "frozen" / "pipeline" / "training_arguments.yaml").read_text()
    # what is published names no folder of this machine
    assert "output_dir" not in settings and str(tmp_path) not in settings
    assert "regime: frozen" in (out / "frozen" / "pipeline" / "README.md").read_text()


def test_ablation_table(tmp_path, monkeypatch):
    folder = tmp_path / "default-seed0" / "metrics"
    for seed, value in ((0, 0.1), (1, 0.2)):
        folder = tmp_path / f"default-seed{seed}" / "metrics"
        folder.mkdir(parents=True)
        mean = {"bits_per_pixel": 1.0, "independent": {"distance": value, "floor": 0.025}}
        (folder / "metrics.json").write_text(
            json.dumps({"means": {"concept": mean, "composition": mean}})
        )
    assert ablation.main(["--output", str(tmp_path), "--seeds", "2", "--variants", "default"]) == 0
    # Two values 0.1 apart: the t-interval's half width is 12.706 * 0.0707 / sqrt(2).
    assert (
        "| default | 0.150 ± 0.635 | 0.150 ± 0.635 | 1.000 ± 0.000 |"
        in (tmp_path / "ablation.md").read_text()
    )


@pytest.mark.parametrize("option", ["--num-inference-steps", "--num_inference_steps"])
def test_options_are_spelled_as_those_of_training_may_be(option):
    assert (
        evaluation.make_parser()
        .parse_args(["--model", "m", "--output", "o", option, "7"])
        .num_inference_steps
        == 7
    )


def test_evaluation_knows_the_data_of_the_training(tmp_path):
    def asked(*words):
        words = ["--output", "o", "--model", *words]
        found = evaluation.command.as_trained(evaluation.command.make_parser().parse_args(words))
        return found.model, found.dataset, found.variant

    folder = hf_intervene.bundled("avatars")
    assert asked("avatars") == (folder, "avatars", "dependent")
    assert asked("avatars", "--dataset", "quad") == (folder, "quad", "dependent")
    (tmp_path / "training_arguments.yaml").write_text("dataset: quad\nvariant: independent\n")
    assert asked(str(tmp_path))[1:] == ("quad", "independent")
    (tmp_path / "training_arguments.yaml").write_text("dataset: faces-that-moved\n")
    with pytest.raises(ValueError, match="trained on 'faces-that-moved', .*: give --dataset"):
        asked(str(tmp_path))
    assert asked(str(tmp_path), "--dataset", "elsewhere")[1] == "elsewhere"
    assert asked("no-such-folder")[1] == "quad"  # which loading the model refuses
