"""What earlier versions saved loads with the meaning that it had then, or it is said what to do;
what later ones saved is refused.

The checkpoints in `fixtures/` were written by the commits in their names (see `make_checkpoints.py`
there)."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from hf_intervene import (
    InterventionConfig,
    InterventionHead,
    InterventionModel,
    InterventionPipeline,
    trainer,
)
from hf_intervene.bases.loading import check_reference
from hf_intervene.configuration_intervention import FORMAT_VERSION
from hf_intervene.trainer.earlier import SETTINGS_VERSION, earlier_defaults, of_today
from hf_intervene.trainer.parsing import read_config, shared_settings
from hf_intervene.trainer.settings import TrainArguments


FIXTURES = Path(__file__).with_name("fixtures")


def assert_does_what_it_did(model, folder):
    expected = load_file(folder / "expected.safetensors")
    sampled = model.sample([["a"], None, ["a", "b"]], noise=expected["noise"])
    torch.testing.assert_close(sampled, expected["sampled"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        model.edit(expected["images"], ["b"]), expected["edited"], rtol=1e-5, atol=1e-6
    )


def test_a_model_of_the_first_commit():
    folder = FIXTURES / "model-0a66273"
    model = InterventionModel.from_pretrained(folder)
    assert_does_what_it_did(model, folder)
    assert model.config.posterior == "conditional" and model.config.propagation_steps == 1
    assert model.config.initial_posterior_std == 1.0, (
        "what there was before it was a setting, not today's default"
    )
    assert model.config.mechanism == "mlp" and model.base.model.config.likelihood == "bernoulli"


def test_a_whitened_posterior():
    folder = FIXTURES / "whitened-51a1a79"
    model = InterventionModel.from_pretrained(folder)
    assert model.config.posterior == "whitened"
    assert_does_what_it_did(model, folder)


def test_a_pipeline_of_before_the_posterior_started_sure(tmp_path):
    folder = FIXTURES / "pipeline-874628a"
    pipe = InterventionPipeline.from_pretrained(folder)
    assert_does_what_it_did(pipe.model, folder)
    pipe.save_pretrained(tmp_path)  # and saved again it is one of today's
    saved = json.loads((tmp_path / "head" / "config.json").read_text())
    assert saved["format_version"] == FORMAT_VERSION and saved["initial_posterior_std"] == 1.0
    assert_does_what_it_did(InterventionPipeline.from_pretrained(tmp_path).model, folder)


@pytest.mark.parametrize("load", [InterventionHead.from_pretrained, AutoModel.from_pretrained])
def test_a_head_however_it_is_loaded(load):
    assert load(FIXTURES / "model-0a66273").config.initial_posterior_std == 1.0


def test_a_base_is_known_by_its_first_kind_of_hash():
    folder = FIXTURES / "frozen-5a52867"
    reference = InterventionConfig.from_pretrained(folder).base_reference
    base = AutoencoderTiny.from_pretrained(folder / "the-base")
    check_reference(base, reference)
    next(base.parameters()).data += 0.1
    with pytest.raises(ValueError, match="is not the base that the head was trained on"):
        check_reference(base, reference)


@pytest.mark.parametrize(
    "load",
    [
        InterventionConfig.from_pretrained,
        AutoConfig.from_pretrained,
        InterventionModel.from_pretrained,
    ],
)
def test_a_later_format_is_refused(load, tmp_path):
    shutil.copytree(FIXTURES / "model-0a66273", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "format_version": FORMAT_VERSION + 1
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError,
        match=f"has format {FORMAT_VERSION + 1}, .*pip install --upgrade hf-intervene",
    ):
        load(tmp_path)


@pytest.mark.parametrize("version", ["1", -1, 1.5, None])
def test_a_format_that_is_none(version):
    with pytest.raises(ValueError, match="format_version must be a whole number"):
        InterventionConfig.from_dict({"concepts": ["a"], "format_version": version})


def test_defaults_change_with_the_version_alone():
    """Whoever changes a default raises FORMAT_VERSION or SETTINGS_VERSION, and gives EARLIER the
    former value.
    """
    listed = json.loads((FIXTURES / "defaults-1.json").read_text())
    config = InterventionConfig.from_dict({"concepts": ["concept"], "format_version": 1}).to_dict()
    assert {name: config[name] for name in listed["configuration"]} == listed["configuration"]
    for version in (1, 3):
        then = json.loads((FIXTURES / f"defaults-{version}.json").read_text())["settings"]
        settings = TrainArguments().flat() | earlier_defaults(version, "settings")
        for gone in ("compile", "compile_mode", "channels_last"):  # what they were changed nothing
            then.pop(gone, None)
        assert {name: settings[name] for name in then} == then


def read(path):
    return read_config(str(path))


def test_settings_of_an_older_run_keep_the_defaults_of_then(tmp_path):
    without = {"moment_matching": 0.0, "seed": 3}  # names what differed from the defaults
    settings = of_today(without, 0, "settings")
    assert settings["initial_posterior_std"] == 1.0 and settings["posterior"] == "centered"
    assert settings["mechanism"] == "mlp" and settings["likelihood"] == "bernoulli"
    assert settings["beta"] == 4.0 and settings["context_prediction"] == 0.0
    assert "moment_matching" not in settings and settings["seed"] == 3
    (tmp_path / "mine.yaml").write_text("epochs: 6\n")  # written by hand, for today
    assert read(tmp_path / "mine.yaml") == {"epochs": 6.0}


def test_settings_that_there_are_no_more_are_dropped_from_what_runs_saved(tmp_path):
    saved = (
        FIXTURES / "run-a2902fc" / "training_arguments.yaml"
    ).read_text()  # names every setting
    (tmp_path / "run.yaml").write_text(saved.replace("mechanism: flow", "mechanism: mlp"))
    settings = read(tmp_path / "run.yaml")
    assert settings["max_steps"] == 8 and not {"compile", "channels_last"} & set(settings)
    later = {"frames", "flow_components"}
    assert set(TrainArguments(**settings).flat()) == set(settings) | later
    (tmp_path / "mine.yaml").write_text("compile: true\n")
    with pytest.raises(ValueError, match="unknown setting 'compile': versions before 0.2 had it"):
        read(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        (
            {"settings_version": 3},
            "moment_matching 10.0, prior_matching 1.0, a whitened posterior, which",
        ),
        ({"settings_version": 0}, "moment_matching 100.0, which"),
        (
            {"settings_version": 3, "moment_matching": 0.0, "prior_matching": 0.0},
            "a whitened posterior, which",
        ),
        (
            {
                "settings_version": 2,
                "posterior": "centered",
                "moment_matching": 0.0,
                "prior_matching": 0.0,
            }
            | {"context_prediction": 0.1},
            "context_prediction 0.1, which",
        ),
        (
            {"settings_version": 5, "mechanism": "mlp", "schedule": "adaptive"},
            "the schedule adaptive, which",
        ),
    ],
)
def test_settings_with_terms_that_there_are_no_more(saved, words, tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match=f"a run with {words} .* start anew in another output_dir"):
        read(tmp_path / "s.yaml")


def test_settings_of_today_and_of_later_ones(tmp_path):
    arguments = TrainArguments(epochs=3.0, seed=4)
    (tmp_path / "s.yaml").write_text(shared_settings(arguments))
    assert TrainArguments(**read(tmp_path / "s.yaml")) == arguments
    for version, words in (
        (SETTINGS_VERSION + 1, "pip install --upgrade hf-intervene"),
        ("new", "must be a whole number"),
    ):
        (tmp_path / "s.yaml").write_text(f"settings_version: {version}\nepochs: 3\n")
        with pytest.raises(ValueError, match=words):
            read(tmp_path / "s.yaml")


def test_a_run_with_flows_of_couplings_does_not_go_on(tmp_path):
    with pytest.raises(ValueError, match="flows of affine couplings, which .* start anew"):
        read(FIXTURES / "run-a2902fc" / "training_arguments.yaml")


def test_a_head_with_flows_of_couplings_says_what_to_do():
    saved = InterventionConfig(mechanism="flow").to_dict() | {"format_version": 2}
    with pytest.raises(ValueError, match="flows of format 2, affine couplings, .* train it anew"):
        InterventionConfig.from_dict(saved)
    assert InterventionConfig.from_dict(saved | {"mechanism": "mlp"}).mechanism == "mlp"


def test_a_run_with_terms_that_there_are_no_more_does_not_go_on(tmp_path):
    shutil.copytree(FIXTURES / "run-874628a", tmp_path / "run")
    small = {
        "resolution": 8,
        "channels": 1,
        "images_per_context": 16,
        "validation_images": 8,
        "block_out_channels": [2],
    }
    small |= {
        "hidden_width": 4,
        "latent_width": 4,
        "concept_width": 2,
        "tracker": "none",
        "resume": "auto",
    }
    with pytest.raises(
        ValueError,
        match="moment_matching 100.0, the schedule adaptive, which .* start anew in another",
    ):
        trainer.train(TrainArguments(**small, output_dir=str(tmp_path / "run")))
    best = InterventionModel.from_pretrained(tmp_path / "run" / "best")  # its model is of use
    assert best.sample([["quad1"]]).isfinite().all()


def test_a_run_of_a_later_version(tmp_path):
    state = FIXTURES / "run-874628a/checkpoints/step-00000004/state.json"
    shutil.copytree(state.parents[2], tmp_path / "later")
    later = json.loads(state.read_text()) | {"settings_version": SETTINGS_VERSION + 1}
    (tmp_path / "later/checkpoints/step-00000004/state.json").write_text(json.dumps(later))
    with pytest.raises(ValueError, match="written by a later version of hf-intervene"):
        settings = {"output_dir": str(tmp_path / "later"), "tracker": "none"}
        resume = str(tmp_path / "later/checkpoints/step-00000004")
        trainer.train(TrainArguments(**settings, resume=resume))
