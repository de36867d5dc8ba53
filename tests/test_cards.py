"""Model cards: what they say, and that what they say runs."""

import json
import os
import re
import warnings

import pytest
import torch
import yaml
from conftest import HUB
from diffusers import AutoencoderTiny
from huggingface_hub import ModelCard
from shared_models import ALICE, build, frozen_on, of_kind, outcome, put_vae

from hf_intervene import InterventionModel, InterventionPipeline, cli, trainer
from hf_intervene.card_metrics import head_mark
from hf_intervene.cards import MARKER, write_card
from hf_intervene.push import draw_samples, push_folder
from hf_intervene.trainer.earlier import SETTINGS_VERSION
from hf_intervene.trainer.parsing import parse_arguments, shared_settings
from hf_intervene.trainer.settings import TrainArguments


pytestmark = pytest.mark.usefixtures("waits")


def measured(path):
    """A metrics.json as evaluate.py writes it, with somebody's paths in its settings."""
    one = {
        "distance": 0.0791,
        "interval": [0.075, 0.083],
        "floor": 0.026,
        "ratio": 3.04,
        "ratio_interval": [2.9, 3.2],
    }
    row = {
        "kind": "concept",
        "images": 70,
        "bits_per_pixel": 0.8694,
        "bits_per_pixel_interval": [0.8, 0.9],
        "independent": one,
    }
    mean = {"contexts": 2, "bits_per_pixel": 0.8694, "independent": one}
    metrics = {
        "contexts": {"obs": row, "a": row, "a+b": row | {"kind": "composition"}},
        "means": {"concept": mean, "composition": mean | {"contexts": 1}},
        "settings": {
            "dataset": "/home/somebody/faces",
            "model": "/home/somebody/model",
            "output": "/home/somebody",
        },
    }
    (path / "metrics.json").write_text(json.dumps(metrics))
    return path


def code_blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.parametrize("kind", ["head", "model", "pipeline"])
def test_the_code_on_a_card_runs(kind):
    of_kind(kind, build()).push_to_hub("alice/thing", **ALICE)
    blocks = code_blocks(HUB.files("alice/thing")["README.md"].decode())
    assert len(blocks) == 2
    for block in blocks:
        names = {}
        exec(block, names)
        if "images" in names:
            assert len(names["images"]) == 8 and names["images"][0].size == (16, 16)
            assert [image.size for image in names["edited"]] == [(16, 16)]
        else:
            assert names["embedding"].shape == (8, 12, 1, 1)


def test_drawing_leaves_a_model_in_training_as_it_was(tmp_path):
    model = build().train()
    model.base.model.eval()
    draw_samples(model, tmp_path / "samples.png")
    assert model.training and model.head.training and not model.base.model.training


def test_what_a_full_card_says(tmp_path):
    build().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "training_arguments.yaml").write_text("seed: 3\nepochs: 5.0\n")
    (tmp_path / "m" / "samples.png").write_bytes(b"")
    path = write_card(tmp_path / "m", "alice/m", measured(tmp_path), "apache-2.0", "alice/faces")
    text, data = path.read_text(), ModelCard.load(path).data
    assert (
        data.library_name == "hf-intervene"
        and data.pipeline_tag == "unconditional-image-generation"
    )
    assert (
        data.license == "apache-2.0" and data.datasets == "alice/faces" and data.base_model is None
    )
    assert {(r.metric_type, r.metric_value, r.dataset_name) for r in data.eval_results} >= {
        ("sliced-wasserstein-2", 0.0791, "faces"),
        ("sliced-wasserstein-2-floor", 0.026, "faces"),
        ("sliced-wasserstein-2-ratio", 3.04, "faces"),
        ("bits-per-pixel", 0.8694, "faces"),
    }
    assert "| `a+b` | 0.079 [0.075, 0.083] | 0.026 | 3.0 | 0.869 |" in text
    assert "2507.04754" in text and "![Samples](samples.png)" in text and "epochs: 5.0" in text
    for heading in ("Concepts", "How to use", "Training", "Measured", "Limits", "Citation"):
        assert f"\n## {heading}\n" in text
    assert "/home" not in text and str(tmp_path) not in text and "\n\n\n" not in text


def test_what_is_not_known_is_left_out(tmp_path):
    build().save_pretrained(tmp_path / "m")
    text = write_card(tmp_path / "m").read_text()
    data = ModelCard(text).data.to_dict()
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    for heading in ("Training", "Measured", "Base"):
        assert f"## {heading}" not in text
    assert (
        "samples.png" not in text
        and "ore information" not in text
        and "None" not in text
        and "\n\n\n" not in text
    )


@pytest.mark.parametrize(
    ("regime", "relation", "words"),
    [
        ("frozen", "adapter", "not changed"),
        ("lora", "adapter", "LoRA layers of rank 2"),
        ("fine-tune", "finetune", "trained further"),
    ],
)
def test_the_base_of_a_model(tmp_path, regime, relation, words):
    commit = put_vae(tmp_path=tmp_path)
    model = frozen_on(
        AutoencoderTiny.from_pretrained("org/vae"), lora_rank=2 if regime == "lora" else 0
    )
    model.save_pretrained(tmp_path / "m", save_base=regime == "fine-tune")
    text = write_card(tmp_path / "m").read_text()
    data = ModelCard(text).data
    assert (data.base_model, data.base_model_relation) == ("org/vae", relation)
    assert words in text and commit in text and "AutoencoderTiny" in text


def test_a_base_from_a_folder_is_said_and_not_named(tmp_path):
    put_vae(tmp_path=tmp_path)
    frozen_on(AutoencoderTiny.from_pretrained(tmp_path / "org/vae")).save_pretrained(tmp_path / "m")
    text = write_card(tmp_path / "m").read_text()
    assert ModelCard(text).data.base_model is None and str(tmp_path) not in text
    assert (
        "loaded from a folder, not from the Hub: pass `base=`" in text
        and "base=base)" in code_blocks(text)[0]
    )


def test_a_card_that_somebody_wrote_is_not_overwritten(tmp_path):
    build().save_pretrained(tmp_path)
    path = write_card(tmp_path)
    write_card(tmp_path, license="mit")  # a generated one is
    assert "license: mit" in path.read_text()
    path.write_text(path.read_text().replace(MARKER, "").replace("## Limits", "## My limits"))
    with pytest.raises(FileExistsError, match="README.md was not generated, or was edited"):
        write_card(tmp_path)
    assert "My limits" in path.read_text()


def test_metrics_that_are_none(tmp_path):
    build().save_pretrained(tmp_path / "m")
    (tmp_path / "metrics.json").write_text("{}")
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no metrics"):
            write_card(tmp_path / "m", metrics=source)
    assert not (tmp_path / "m" / "README.md").exists()


# The command


@pytest.mark.parametrize("kind", ["model", "pipeline"])
def test_the_command_writes_and_pushes(tmp_path, capsys, monkeypatch, kind):
    of_kind(kind, build()).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "diary.txt").write_text("private")
    assert (
        cli.main(
            ["card", str(tmp_path / "m"), "--metrics", str(measured(tmp_path)), "--license", "mit"]
        )
        == 0
    )
    assert (tmp_path / "m" / "README.md").exists() and (
        tmp_path / "m" / "samples.png"
    ).stat().st_size > 1000
    assert HUB.repos == {}
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    argv = ["card", str(tmp_path / "m"), "--push", "thing", "--private", "--revision", "dev"]
    assert cli.main(argv) == 0
    repo = HUB.repos["alice/thing"]
    assert repo.private and set(HUB.files("alice/thing", "dev")) == {".gitattributes"} | {
        path.relative_to(tmp_path / "m").as_posix()
        for path in (tmp_path / "m").rglob("*")
        if path.is_file()
    } - {"diary.txt"}
    assert repo.refs["dev"] in capsys.readouterr().out
    # An edited card, without its marker as the marker says, is pushed as it is, also by Python and
    # over what was there.
    for number, words in enumerate(("my own", "better words")):
        text = f"---\nlibrary_name: hf-intervene\n---\n{words}"
        (tmp_path / "m" / "README.md").write_text(text)
        samples = (tmp_path / "m" / "samples.png").stat().st_mtime_ns
        assert cli.main(argv) == 0
        assert (
            (tmp_path / "m" / "README.md").read_text()
            == text
            == HUB.files("alice/thing", "dev")["README.md"].decode()
        )
        assert (tmp_path / "m" / "samples.png").stat().st_mtime_ns == samples
        load = InterventionPipeline if kind == "pipeline" else InterventionModel
        load.from_pretrained(tmp_path / "m").push_to_hub(f"alice/other{number}", **ALICE)
        assert HUB.files(f"alice/other{number}")["README.md"].decode() == text
    assert cli.main(argv[:2]) == 1  # without a push there is nothing to do
    assert "was not generated" in capsys.readouterr().err
    assert cli.main(["card", str(tmp_path / "m"), "--private"]) == 1
    assert "need --push" in capsys.readouterr().err


def test_pictures_of_somebodys_stay(tmp_path, capsys):
    build().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "samples.png").write_text("mine")
    assert cli.main(["card", str(tmp_path / "m")]) == 1
    assert "samples.png is not a picture of a generated card" in capsys.readouterr().err
    assert (tmp_path / "m" / "samples.png").read_text() == "mine"
    (tmp_path / "m" / "samples.png").unlink()
    assert cli.main(["card", str(tmp_path / "m"), "--metrics", str(tmp_path)]) == 1
    assert not (tmp_path / "m" / "samples.png").exists()  # or the next one would be refused
    for _ in range(2):
        assert cli.main(["card", str(tmp_path / "m")]) == 0


def test_metrics_of_another_model_are_said(tmp_path, capsys):
    """Those of a model are right for the pipeline that was made of it."""
    models = [build(), build(seed=1)]
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / f"m{number}")
    InterventionPipeline.from_model(models[0]).save_pretrained(tmp_path / "p")
    file = measured(tmp_path) / "metrics.json"
    mark = head_mark(tmp_path / "m0")
    assert mark == head_mark(tmp_path / "p") != head_mark(tmp_path / "m1")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"head": mark}))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for name in ("m0", "p"):
            write_card(tmp_path / name, metrics=tmp_path)
    with pytest.warns(UserWarning, match="were measured on other weights than those of this model"):
        write_card(tmp_path / "m1", metrics=tmp_path)


def test_options_of_a_card_that_change_nothing(tmp_path, capsys, monkeypatch):
    """That of a pipeline which comes with the package is shown, an edited one pushed, as it is."""
    for option in ("--metrics", "--license", "--dataset-id"):
        assert cli.main(["card", "quad", option, "x"]) == 1
        assert "comes with the package, and its card is not written" in capsys.readouterr().err
    build().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text("---\nlibrary_name: hf-intervene\n---\nmy own")
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    argv = ["card", str(tmp_path / "m"), "--push", "thing", "--license", "mit"]
    with pytest.warns(UserWarning, match="was edited by hand and is pushed as it is"):
        assert cli.main(argv) == 0


@pytest.mark.parametrize("regime", ["frozen", "lora"])
def test_no_folder_of_this_machine_is_pushed(tmp_path, regime):
    """Of a base that was loaded from a folder the last part of its name is."""
    put_vae(tmp_path=tmp_path)
    vae = AutoencoderTiny.from_pretrained(tmp_path / "org/vae")
    model = frozen_on(vae, lora_rank=2 if regime == "lora" else 0)
    model.save_pretrained(tmp_path / "m")
    InterventionModel.from_pretrained(tmp_path / "m")  # here it is found by its folder
    for saved, name in ((model, "m"), (InterventionPipeline.from_model(model), "p")):
        saved.push_to_hub(f"alice/{name}", **ALICE)
        files = HUB.files(f"alice/{name}")
        assert not [name for name, content in files.items() if str(tmp_path).encode() in content]
    config = json.loads(HUB.files("alice/m")["config.json"])
    assert config["base_reference"]["name_or_path"] == "./vae"
    with pytest.raises(OSError, match=r"trained on, ./vae, cannot be loaded .*pass base="):
        InterventionModel.from_pretrained("alice/m")
    copy = AutoencoderTiny.from_pretrained(tmp_path / "org/vae")
    loaded = InterventionModel.from_pretrained("alice/m", base=copy)
    assert torch.equal(outcome(loaded), outcome(model))


# The settings of a run


def test_the_trainer_puts_its_settings_beside_the_model(tiny, tmp_path):
    result = trainer.train(TrainArguments(**tiny | {"max_steps": 2, "seed": 0}))
    file = result.model_dir / "training_arguments.yaml"
    settings = yaml.safe_load(file.read_text())
    assert settings["max_steps"] == 2 and settings["seed"] == 0 and "epochs" not in settings
    assert str(tmp_path) not in file.read_text() and not {
        "output_dir",
        "tracker",
        "log_every",
    } & set(settings)
    again = parse_arguments(["--config", str(file)])
    assert again.optimization.max_steps == 2 and again.base.hidden_width == 16
    assert again.objective == TrainArguments().objective
    assert "max_steps: 2" in write_card(result.model_dir).read_text()


def test_of_a_folder_only_its_name_is_shared(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    shared = yaml.safe_load(
        shared_settings(
            TrainArguments(dataset=str(folder), base="org/vae", output_dir=os.fspath(tmp_path))
        )
    )
    assert shared == {
        "settings_version": SETTINGS_VERSION,
        "dataset": "faces",
        "base": "org/vae",
        "seed": 0,
    }


def test_presence_comes_before_distances(tmp_path):
    build().save_pretrained(tmp_path / "m")
    path = measured(tmp_path) / "metrics.json"
    metrics = json.loads(path.read_text())
    share = {"value": 0.49, "interval": [0.45, 0.53]}
    sides = {
        side: {"all_wanted": share | {"value": value}}
        for side, value in (("real", 0.96), ("nothing", 0.05))
    }
    metrics["contexts"]["a"]["presence"] = {"generated": {"all_wanted": share}} | sides
    metrics["contexts"]["obs"]["presence"] = {"generated": {"all_wanted": None}}
    metrics["means"]["concept"]["presence"] = {"generated": 0.49, "real": 0.96}
    metrics["verdicts"], metrics["detector"] = {"a": "partly (49 % of 96 %)"}, {"kind": "contexts"}
    metrics["codes"] = {"c": {"own_block": {"value": 0.9, "untrained": 0.7, "floor": 0.01}}}
    for row in (metrics["contexts"]["a+b"], metrics["means"]["composition"]):
        row["independent"] |= {"ratio": None}
    path.write_text(json.dumps(metrics))
    card = write_card(tmp_path / "m", "alice/m", tmp_path)
    text, data = card.read_text(), ModelCard.load(card).data
    assert text.index("- `a`: partly (49 % of 96 %)") < text.index(
        "| `a` | 0.49 [0.45, 0.53] | 0.96 | 0.05 |"
    )
    assert (
        text.index("0.49 [0.45") < text.index("Sliced 2-Wasserstein")
        and "so concepts that those have count as errors" in text
    )
    assert "| `a+b` | 0.079 [0.075, 0.083] | 0.026 |  | 0.869 |" in text
    own = "a concept's true value and its prediction from its own block, correlation"
    assert f"| {own} | 0.90 | 0.70 | 0.01 |" in text
    found = {(r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results}
    assert (
        "presence",
        "share of samples with all concepts that were asked for, concept",
        0.49,
    ) in found
    assert sum(kind == "sliced-wasserstein-2-ratio" for kind, _, _ in found) == 1


@pytest.mark.parametrize("front", ["x: y", "a: [b", "!!python/object:os.system x", ""])
def test_metadata_that_the_hub_refuses_leave_no_repository(tmp_path, waits, front):
    build().save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "README.md").write_text(f"---\n{front}\n---\nmy own")
    with pytest.raises(
        ValueError, match="the metadata at the top of README.md are refused: .*nothing was pushed"
    ) as error:
        push_folder(tmp_path / "m", "alice/new", **ALICE)
    assert "\n" not in str(error.value) and HUB.repos == {}
