"""The trainer: resume, processes, accumulation, regimes, stopping, and bad input."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusion_models import save_pipeline, save_vision
from PIL import Image
from runs import (
    ROOT,
    assert_same,
    error_of,
    last_state,
    launch,
    options,
    run,
    stop_in_step,
    weights,
)

from hf_intervene import InterventionConfig, InterventionModel, LightVAE, trainer
from hf_intervene.bases import diffusion
from hf_intervene.trainer import TrainArguments, checkpoints, loop, parse_arguments
from hf_intervene.trainer.building import lay_out
from hf_intervene.trainer.earlier import SETTINGS_VERSION
from hf_intervene.trainer.parsing import make_parser
from hf_intervene.trainer.resuming import check_same
from hf_intervene.trainer.settings import SECTIONS


# train.py, which fails where DDP is still there when the group of processes is ended.
ENDS_IN_ORDER = """
import gc, sys
from accelerate import Accelerator
from torch.nn.parallel import DistributedDataParallel
from hf_intervene.trainer.command import main

def end_training(self, end=Accelerator.end_training):
    assert not [x for x in gc.get_objects() if type(x) is DistributedDataParallel], "DDP outlives the group"
    end(self)

Accelerator.end_training = end_training
sys.exit(main())
"""  # noqa: E501


@pytest.mark.parametrize("schedule", ["balanced", "single"])
def test_resume_goes_on_as_if_never_stopped(tiny, tmp_path, schedule, monkeypatch):
    settings = tiny | {"ema_decay": 0.9, "schedule": schedule}
    run(settings)
    stopped = settings | {"output_dir": str(tmp_path / "stopped")}

    stop_in_step(monkeypatch, 5)  # as if Ctrl-C came in it
    result = run(stopped)
    assert result.interrupted and result.step == 5
    monkeypatch.undo()
    assert run(stopped, resume="auto").step == 8
    (a, state_a), (b, state_b) = last_state(settings), last_state(stopped)
    for name in ("model", "ema", "optimizer"):
        assert_same(a[name], b[name])
    assert state_a["schedule"] == state_b["schedule"] and state_a["best"] == state_b["best"]
    assert_same(weights(tmp_path / "run" / "model"), weights(tmp_path / "stopped" / "model"))


def test_the_layout_in_memory_changes_rounding_alone(tmp_path):
    x, z = torch.rand(4, 3, 32, 32), torch.randn(4, 8, 1, 1)
    found, cpu = [], torch.device("cpu")
    for precision in ("bf16", "no"):
        torch.manual_seed(0)
        vae = LightVAE(3, 32, (8, 16), hidden_width=16, latent_width=8)
        lay_out(vae, cpu, precision)
        innermost = vae.encoder[0].weight.is_contiguous(memory_format=torch.channels_last)
        assert innermost is (precision == "no")
        (vae.encoder(x).sum() + vae.decode(z).sample.square().mean()).backward()
        found.append({name: p.grad for name, p in vae.named_parameters() if p.grad is not None})
    assert_same(*found, rtol=1e-4, atol=1e-5)
    vae.save_pretrained(tmp_path)
    assert_same(LightVAE.from_pretrained(tmp_path).state_dict(), vae.state_dict())


@pytest.mark.parametrize(
    "options",
    [{"l2": 0.1}, {"mechanism": "mlp", "l2": 0.1, "group_lasso": 0.1}],
    ids=["flow", "mlp"],
)
def test_accumulation_does_not_change_the_result(tiny, tmp_path, options):
    # No norm in the base: a bias before a norm has no gradient but rounding, which Adam blows up to
    # whole steps. So it does with some gradients of new flows, under the full weight of context
    # prediction. And the group lasso pulls on the weights among their concepts, which start at 0,
    # by the direction of next to nothing.
    settings = (
        tiny | options | {"base_norm": "none", "context_prediction": 1.0, "free_invariance": 1.0}
    )
    run(settings)
    run(settings, output_dir=str(tmp_path / "b"), gradient_accumulation_steps=4)
    assert_same(
        weights(tmp_path / "run" / "model"), weights(tmp_path / "b" / "model"), rtol=1e-2, atol=2e-4
    )


@pytest.mark.parametrize(
    ("schedule", "regime"), [("balanced", "fine-tune"), ("proportional", "end-to-end")]
)
def test_two_processes_give_the_result_of_one(tiny, tmp_path, schedule, regime):
    settings = tiny | {
        "schedule": schedule,
        "regime": regime,
        "max_steps": 6,
        "eval_every": 3,
        "base_norm": "none",
    }
    settings |= {"context_prediction": 1.0, "free_invariance": 1.0}  # see above
    run(settings)
    two = settings | {"output_dir": str(tmp_path / "two")}
    # On a machine without accelerators `accelerate launch --cpu` starts one process whatever
    # --num_processes says; torchrun starts two.
    script = tmp_path / "train.py"
    script.write_text(ENDS_IN_ORDER)
    assert (
        launch(
            ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], two, script
        ).count("trained 6 steps")
        == 1
    )
    (_, state_a), (_, state_b) = last_state(settings), last_state(two)
    assert (state_a["processes"], state_b["processes"]) == (1, 2)
    assert state_a["schedule"]["drawn"] == state_b["schedule"]["drawn"]
    assert state_a["best"] == pytest.approx(state_b["best"], rel=1e-4)
    assert_same(
        weights(tmp_path / "run" / "model"),
        weights(tmp_path / "two" / "model"),
        rtol=1e-2,
        atol=2e-4,
    )


def test_script_options_override_the_configuration(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("learning_rate: 1e-4\nbatch_size: 32\nconcepts: [a, b]\nema_decay: null\n")
    arguments = parse_arguments(
        ["--config", str(config), "--batch_size", "8", "--block_out_channels", "4", "6"]
    )
    optimization = arguments.optimization
    assert (optimization.learning_rate, optimization.batch_size) == (1e-4, 8)
    assert arguments.data.concepts == ["a", "b"] and optimization.ema_decay is None
    assert arguments.base.block_out_channels == [4, 6]


def test_settings_in_sections_are_the_same_as_by_their_names_alone(tmp_path):
    sections = {
        "data": {"dataset": "mnist"},
        "base": {"base": "a/b", "regime": "lora"},
        "head": {"free_blocks": 2},
        "optimization": {"learning_rate": "1e-4", "epochs": 3},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(sections | {"seed": 4}))
    alone = {name: value for inside in sections.values() for name, value in inside.items()}
    expected = TrainArguments(**alone, seed=4)
    assert parse_arguments(["--config", str(tmp_path / "c.yaml")]) == expected
    assert TrainArguments(**sections, seed=4) == expected and expected.data.dataset == "mnist"
    assert replace(expected, seed=5).flat() == expected.flat() | {"seed": 5}
    assert TrainArguments(**expected.flat()) == expected


def test_the_section_of_the_head_is_its_configuration():
    section = TrainArguments(free_blocks=2, ablation="head-pooled").head
    config = InterventionConfig(**section.configuration())
    assert set(section.configuration()) <= {field.name for field in fields(InterventionConfig)}
    assert (config.free_blocks, config.mechanism, config.ablation) == (2, "flow", "head-pooled")
    with pytest.raises(ValueError, match="flow_depth must be at least 1, not -1"):
        TrainArguments(flow_depth=-1)  # which the configuration checks


def test_the_help_shows_options_by_sections_each_with_a_word_about_it():
    parser = make_parser()
    shown = {group.title: group._group_actions for group in parser._action_groups}
    for section in SECTIONS.values():
        options = {action.dest: action for action in shown[section.title]}
        assert set(options) == {field.name for field in fields(section)}
        assert all(action.help for action in options.values())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "training" / "configs").glob("*.yaml")), ids=lambda p: p.name
)
def test_shipped_configurations_are_read(path):
    frozen = "regime: frozen" in path.read_text()  # of a base that the command names
    parse_arguments(["--config", str(path), *(["--base", "a/base"] if frozen else [])])


@pytest.mark.parametrize("regime", ["frozen", "fine-tune"])
def test_regimes_train_what_they_should(tiny, tmp_path, regime):
    torch.manual_seed(3)
    base = trainer.build_model(
        TrainArguments(**tiny), trainer.load_data(TrainArguments(**tiny))[0]
    ).base.model
    base.save_pretrained(tmp_path / "base")
    before = base.state_dict()
    seen = []
    original = loop.InterventionModel.forward

    def forward(self, *args, **kwargs):
        if self.training:
            seen.append(
                all(torch.equal(v, before[k]) for k, v in self.base.model.state_dict().items())
            )
        return original(self, *args, **kwargs)

    loop.InterventionModel.forward = forward
    try:
        run(tiny, base=str(tmp_path / "base"), regime=regime, max_steps=10)
    finally:
        loop.InterventionModel.forward = original
    # fine-tune: steps 0 and 1 of 10 are frozen, so the base first differs in step 3.
    assert seen == ([True] * 10 if regime == "frozen" else [True] * 3 + [False] * 7)


def test_the_base_has_a_learning_rate_of_its_own(tiny):
    """Adam's first step is as long as the learning rate."""
    rates = {"learning_rate": 1e-2, "base_learning_rate": 1e-4, "warmup_steps": 1}
    torch.manual_seed(tiny.get("seed", 0))
    before = dict(
        trainer.build_model(
            TrainArguments(**tiny), trainer.load_data(TrainArguments(**tiny))[0]
        ).named_parameters()
    )
    after = InterventionModel.from_pretrained(
        run(tiny, max_steps=1, optimizer="adamw", prior_steps=0, **rates).model_dir
    ).state_dict()
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    base, rest = (
        [v for k, v in moved.items() if k.startswith("base.model.") is kind]
        for kind in (True, False)
    )
    assert max(base) == pytest.approx(1e-4, rel=1e-2) and max(rest) == pytest.approx(1e-2, rel=1e-2)


@pytest.mark.parametrize("ablation", ["base", "base-pooled", "head-pooled"])
def test_ablations_train_and_save(tiny, tmp_path, ablation):
    result = run(tiny, ablation=ablation)
    model = InterventionModel.from_pretrained(result.model_dir)
    assert model.config.ablation == ablation and (model.head is None) == (ablation != "head-pooled")
    assert model.sample("quad1", 2).shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    "options",
    [
        {"mixed_precision": "bf16"},
        {"base_norm": "batch", "norm": "batch"},
        {"tracker": "tensorboard"},
    ],
)
def test_options_train(tiny, tmp_path, options):
    result = run(tiny, **options, beta_warmup=0.5)
    history = [
        json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    ]
    assert result.validation == min(row["validation"] for row in history if "validation" in row)
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / "step-00000008.png"))
    # seven contexts and fifteen pairs, by name
    assert grid.shape[0] == 22 * 16 and grid.shape[1] > 8 * 16
    assert all((names < 128).any() for names in grid[:, : -8 * 16].reshape(22, -1))


def test_validation_is_the_same_however_many_images_at_once(tiny):
    settings = TrainArguments(**tiny)
    _, data = trainer.load_data(settings)
    model, accelerator = (
        trainer.build_model(settings, data),
        loop.new_accelerator(mixed_precision="no"),
    )
    found = [loop.validation_loss(model, data, None, 3, accelerator, size) for size in (256, 5, 1)]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)


def test_training_learns(tiny, capsys):
    result = run(tiny, max_steps=300, eval_every=100, images_per_context=64, learning_rate=5e-3)
    assert result.validation < 2.5  # an untrained model has 3 bits per pixel, one per channel
    assert "nats" not in capsys.readouterr().err


def test_a_silent_z_is_said(tiny, capsys):
    # The KL of flows is an estimate: it takes the mean of some steps.
    settings = {
        "eval_every": 60,
        "log_every": 20,
        "learning_rate": 5e-3,
        "beta": 1000.0,
        "initial_posterior_std": 1.0,
    }
    run(tiny, **settings, max_steps=60)
    assert "warning: z carries" in capsys.readouterr().err


def test_early_stopping_keeps_the_best(tiny, tmp_path, monkeypatch):
    scores = iter([3.0, 2.0, 2.5, 2.6, 2.7, 2.8])
    monkeypatch.setattr(loop, "validation_loss", lambda *_: next(scores))
    saved = []
    original = loop.save_model
    monkeypatch.setattr(
        loop,
        "save_model",
        lambda model, folder, data: (saved.append(model), original(model, folder, data)),
    )
    result = run(tiny, max_steps=12, eval_every=2, patience=2, prior_steps=0)
    assert result.step == 8 and result.validation == 2.0 and len(saved) == 2


def test_own_images(tiny, tmp_path):
    from PIL import Image

    for context in ("obs", "hat"):
        (tmp_path / "images" / context).mkdir(parents=True)
        for number in range(20):
            Image.new("L", (20, 16), 10 * number).save(
                tmp_path / "images" / context / f"{number}.png"
            )
    result = run(tiny, dataset=str(tmp_path / "images"), channels=1)
    assert InterventionModel.from_pretrained(result.model_dir).concepts == ("hat",)


def test_a_signal_ends_the_run_with_a_checkpoint_and_exit_code_130(tiny, tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump(tiny | {"max_steps": 100_000, "log_every": 1}))
    process = subprocess.Popen(
        [sys.executable, "training/train.py", "--config", str(config)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    history = tmp_path / "run" / "history.jsonl"
    for _ in range(600):
        if history.exists() and len(history.read_text().splitlines()) > 5:
            break
        try:
            process.wait(0.1)
        except subprocess.TimeoutExpired:
            continue
        break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "--resume auto" in out and "Traceback" not in err
    path, _, state = checkpoints.newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert state["step"] > 5 and path.name == f"step-{state['step']:08d}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 1000.0, "max_steps": 6, "max_grad_norm": 1e30}, "is not finite"),
        ({"batch_size": 15, "gradient_accumulation_steps": 2}, "does not divide"),
        ({"batch_size": 2**20}, "more than 100 times the 224 training images: lower it"),
        ({"concepts": ["quad1", "sise"]}, "orientation, all of them: leave concepts out"),
        ({"lerning_rate": 1.0}, "unknown option --lerning_rate: did you mean --learning_rate"),
        ({"regime": "lora2"}, "regime must be one of"),
        ({"max_steps": 0}, "max_steps must be at least 1"),
        ({"ema_decay": 1.5}, "ema_decay must lie in"),
        ({"learning_rate": 4e38}, "learning_rate must lie in (0, 1000]"),
        ({"base_learning_rate": 4e38}, "learning_rate must lie in (0, 1000]"),
        ({"beta": -1.0}, "beta must not be negative"),
        ({"base": "nowhere"}, "no pretrained base 'nowhere'"),
        ({"dataset": "./nowhere"}, "no folder ./nowhere"),
        ({"resume": "nowhere"}, "no checkpoint nowhere"),
        ({"block_out_channels": [8] * 6}, "cannot be halved"),
        ({"norm": "group"}, "norm must be one of"),
        ({"posterior": "whitened"}, "posterior whitened is no longer trained with"),
        ({"moment_matching": 1.0}, "unknown option --moment_matching: versions before 0.2 had it"),
        ({"intervention_rank": 2}, 'choose mechanism="mlp"'),
        ({"compile": True}, "unknown option --compile: versions before 0.2 had it"),
    ],
)
def test_bad_settings_are_one_sentence(tiny, capsys, changes, message):
    assert message in error_of(capsys, options(tiny | changes))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown setting 'learning_rat': did you mean learning_rate"),
        ("batch_size: many", "batch_size must be of type int"),
        ("max_steps: soon", "max_steps must be of type int, not"),
        (f"beta: 1{'0' * 400}", "beta must be of type float, not"),
        ("block_out_channels: 32", "block_out_channels must be of type list[int]"),
        ("block_out_channels: [32, wide]", "block_out_channels must be of type list[int]"),
        ("concepts: smile", "concepts must be of type"),
        ("sample_matching: 0.4", "unknown setting 'sample_matching': versions before 0.2 had it"),
        ("head: {beta: 2}", "beta is a setting of the section objective, not of head"),
        ("head: {beta_: 2}", "unknown setting 'beta_': did you mean beta"),
        ("head: 2", "head is a section, and must hold settings"),
        ("- a", "must hold"),
        ("a: [", "not valid YAML"),
        ("max_steps: 3\nmax_steps: 4", "not valid YAML: max_steps is given twice"),
        ("head: {depth: 1, depth: 2}", "depth is given twice"),
        (f"max_steps: {':'.join(['59'] * 20_000)}", "it has a value of 59999 characters"),
    ],
)
def test_bad_configurations_are_one_sentence(tmp_path, capsys, text, message):
    (tmp_path / "c.yaml").write_text(text)
    assert message in error_of(capsys, ["--config", str(tmp_path / "c.yaml")])


def test_output_that_cannot_be_written(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of(
        capsys, options(tiny | {"output_dir": str(tmp_path / "file" / "run")})
    )


def test_a_folder_with_another_run(tiny, capsys):
    run(tiny)
    assert "already holds a run" in error_of(capsys, options(tiny))
    assert "other settings (beta was 1.0, is 2.0)" in error_of(
        capsys, options(tiny | {"resume": "auto", "beta": 2.0})
    )


def test_a_checkpoint_from_before_there_was_a_setting_had_its_default():
    now = TrainArguments().flat()
    before = {name: value for name, value in now.items() if name != "mnist_digits"}
    state = {"settings": before, "settings_version": SETTINGS_VERSION}
    check_same(TrainArguments(resume="auto"), state, None, {}, Path("step-1"))
    with pytest.raises(ValueError, match="mnist_digits was 'bundled', is 'elsewhere'"):
        changed = TrainArguments(resume="auto", mnist_digits="elsewhere")
        check_same(changed, state, None, {}, Path("step-1"))


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(tiny, tmp_path, monkeypatch, capsys):
    original = checkpoints.save_file

    def full(tensors, path):
        if "step-00000004" in str(path):
            raise OSError(28, "No space left on device")
        return original(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", full)
    result = run(tiny)
    assert "No space left on device" in capsys.readouterr().err
    assert result.step == 8 and InterventionModel.from_pretrained(result.model_dir)
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["step-00000008"]


def test_a_denoiser_is_resumed_and_its_latents_are_kept(tiny, tmp_path, monkeypatch):
    source = save_pipeline("dit", tmp_path / "dit")
    settings = tiny | {
        "base": str(source),
        "regime": "frozen",
        "ema_decay": 0.9,
        "min_snr_gamma": 5.0,
    }
    settings |= {
        "image_encoder": str(save_vision(tmp_path / "vit")),
        "gradient_checkpointing": True,
    }
    run(settings)
    assert {path.name for path in (tmp_path / "run" / "prepared" / "train").iterdir()} == {
        "x0.npy",
        "features.npy",
        "key.json",
    }
    stopped = settings | {"output_dir": str(tmp_path / "stopped")}
    stop_in_step(monkeypatch, 5)
    assert run(stopped).step == 5
    monkeypatch.undo()
    written = (tmp_path / "stopped" / "prepared" / "train" / "x0.npy").stat().st_mtime_ns
    assert run(stopped, resume="auto").step == 8
    assert (
        tmp_path / "stopped" / "prepared" / "train" / "x0.npy"
    ).stat().st_mtime_ns == written  # read, not made again
    (a, _), (b, _) = last_state(settings), last_state(stopped)
    for name in ("model", "ema", "optimizer"):
        assert_same(a[name], b[name])
    # frozen, and elsewhere already
    assert not any(".vae." in name or ".image_encoder." in name for name in a["model"])
    assert (
        not (tmp_path / "run" / "model" / "base").exists()
        and not (tmp_path / "run" / "model" / "vae").exists()
    )
    assert (
        InterventionModel.from_pretrained(tmp_path / "run" / "model")
        .sample("quad1", 1, num_inference_steps=2)
        .shape[0]
        == 1
    )


@pytest.mark.parametrize(("regime", "share"), [("frozen", 1.0), ("lora", 1.0), ("fine-tune", 0.5)])
def test_only_a_base_that_stays_is_trained_at_all_noise_levels(
    tiny, tmp_path, monkeypatch, regime, share
):
    original, shares = diffusion.noised, set()

    def noised(*args):
        shares.add(args[-1])
        return original(*args)

    monkeypatch.setattr(diffusion, "noised", noised)
    source = save_pipeline("unet", tmp_path / "ddpm")
    run(tiny, base=str(source), regime=regime, max_steps=2)
    assert shares == {share}
