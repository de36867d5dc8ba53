"""What runs on the CPU runs on another device too, to the same results. Run by `test_elsewhere.py`,
in a process of its own; on a real device by `TEST_DEVICE=cuda python -m pytest -m ""
tests/elsewhere_cases.py`."""

import json
import os
from contextlib import nullcontext

import numpy as np
import pytest
import test_autoencoders
import torch
from accelerate.state import AcceleratorState
from benchmark_steps import STEPS
from conftest import TINY
from diffusion_models import KINDS, save_pipeline, with_head
from PIL import Image
from test_posterior import covariances, whitened_by

from hf_intervene import InterventionModel, InterventionPipeline, LightVAE, Quantile, pipeline
from hf_intervene.bases.lora import add_lora
from hf_intervene.evaluation.measuring import evaluate
from hf_intervene.page import Page
from hf_intervene.trainer import feeding
from hf_intervene.trainer.loop import train
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.training import pretrain
from hf_intervene.training.benchmarks import data as benchmark_data
from hf_intervene.training.benchmarks import head as benchmark_head
from hf_intervene.training.benchmarks import textbook as benchmark_textbook
from hf_intervene.training.benchmarks.tools import Conditions


REAL = os.environ.get("TEST_DEVICE")
if REAL is None:  # PyTorch has no room for it beside a real one
    from elsewhere import DEVICE, elsewhere, waits


def assert_near(found, expected, what):
    """As near as other ways to the same numbers come: the CPU takes some that a device does not,
    and convolutions pick theirs.
    """
    error, size = (found - expected).abs().max(), expected.abs().max()
    assert error <= 1e-3 * size + 1e-4, f"{what} of up to {size} is off by {error}"


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", REAL or str(DEVICE))
    if REAL is not None:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # the CPU has no such thing
        yield torch.device(REAL)
        return
    with elsewhere() as device:
        yield device


def light(posterior="centered", concepts=("a", "b"), likelihood="bernoulli", **head):
    torch.manual_seed(0)
    base = LightVAE(
        3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12, likelihood=likelihood
    )
    model = InterventionModel.build(
        base, concepts, noise_width=4, initializer_range=0.5, posterior=posterior, **head
    )
    if model.head.is_flow:  # whose weights among concepts start at 0
        torch.nn.init.normal_(model.head.intervention.weight, std=0.2)
    if model.head.whitening is not None:
        whitened_by(model.head, covariances(3, model.head.whitening.matrix.shape[-1]))
    return model


def autoencoder(family, regime="end-to-end"):
    torch.manual_seed(0)
    model = test_autoencoders.build(test_autoencoders.FAMILIES[family]())
    if regime == "lora":
        add_lora(model.base.model, 4)
    model.base.trainable(regime == "end-to-end")
    return model


MODELS = {
    "light VAE, flow": lambda: light(mechanism="flow", concept_width=4, likelihood="gaussian"),
    **{
        f"light VAE, {kind}": lambda kind=kind: light(kind)
        for kind in ("whitened", "centered", "conditional", "unconditional")
    },
    "reduced form, soft": lambda: light(propagation_steps=1, intervention="soft", norm="batch"),
    "many concepts, low rank": lambda: light(
        "centered", [*"ab", *(f"c{j}" for j in range(40))], intervention_rank=2
    ),
    **{
        f"{family} autoencoder": lambda family=family: autoencoder(family)
        for family in test_autoencoders.FAMILIES
    },
    **{
        f"kl autoencoder, {regime}": lambda regime=regime: autoencoder("kl", regime)
        for regime in ("frozen", "lora")
    },
    **{kind: lambda kind=kind: with_head(kind) for kind in KINDS},
}
QUICK = (
    "light VAE, flow",
    "light VAE, whitened",
    "many concepts, low rank",
    "kl autoencoder, frozen",
    "unet",
    "sd3",
)
CONTEXTS = [["obs"], ["a"], ["a", "b"], {"b": 0.5}]


def passed(model, place):
    """Loss, gradients, samples and edits."""
    torch.manual_seed(0)
    images = torch.rand(4, *model.base.image_shape)
    noise = torch.randn(4, *model.noise_shape)
    draws = model.posterior_draws(4, torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 2} if model.base.passes > 1 else {}
    model.to(place).train()
    given = {name: value.to(place) for name, value in draws.items()}
    loss = model(images.to(place), model.targets(CONTEXTS), **given).loss
    loss.backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None} | {
        "loss": loss.detach().cpu()
    }
    model.eval()
    options |= model.base.draws(4)
    found["samples"] = model.sample(CONTEXTS, 4, noise=noise, output_type="pt", **options).cpu()
    options.pop("residual_noise", None)
    edited = (
        InterventionPipeline.from_model(model)
        .edit(images, {"a": 1.0}, context="b", output_type="np", **options)
        .images
    )
    return found | {"edits": torch.from_numpy(np.asarray(edited))}


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_models(device, name):
    expected, found = (passed(MODELS[name](), place) for place in ("cpu", device))
    assert set(expected) == set(found)
    for part, value in expected.items():
        assert_near(found[part], value, part)


def test_samples_of_one_seed_and_chosen_values(device):
    model = light().eval().to(device)
    pipe = InterventionPipeline.from_model(model)
    chosen = {"a": Quantile(0.9), "b": np.random.default_rng(0).random((16, 16, 3))}
    for generator in (torch.Generator(), torch.Generator(device)):
        pipe.set_progress_bar_config(disable=True)
        first, second = (
            pipe(chosen, 3, generator.manual_seed(0), output_type="np").images for _ in range(2)
        )
        np.testing.assert_array_equal(first, second)
    assert len(pipe("obs", 2).images) == 2


def trained(folder, on_log=None, **settings):
    AcceleratorState._reset_state(reset_partial_state=True)
    result = train(
        TrainArguments(**TINY | {"dataset": "quad", "output_dir": str(folder)} | settings), on_log
    )
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return InterventionModel.from_pretrained(result.model_dir).eval(), rows


@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.9},
        *(
            pytest.param(more, marks=pytest.mark.slow)
            for more in (
                {"gradient_accumulation_steps": 2, "group_lasso": 0.1},
                {"mechanism": "mlp", "l2": 0.1},
                {
                    "mechanism": "mlp",
                    "schedule": "single",
                    "norm": "batch",
                    "image_cache": "cache",
                    "channels_last": True,
                },
                {"ablation": "head-pooled"},
                {"ablation": "base-pooled"},
            )
        ),
    ],
)
def test_training(device, tmp_path, monkeypatch, settings):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(feeding, "resident", lambda size, place: place.type != "cpu")
    model_elsewhere, found = trained(tmp_path / "elsewhere", **settings)
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
    model, expected = trained(tmp_path / "here", **settings)
    assert len(found) == len(expected) > 4
    for row, other in zip(found, expected):
        assert row == pytest.approx(other, rel=1e-3)
    noise = torch.randn(4, *model.noise_shape)
    assert_near(
        *(m.sample("quad1", noise=noise, output_type="pt") for m in (model_elsewhere, model)),
        "samples",
    )


@pytest.mark.skipif(REAL is not None, reason="waits are counted on the tests' own device")
def test_no_step_waits_for_the_device(device, tmp_path, monkeypatch):
    waited, batch = [], feeding.Feed.batch
    monkeypatch.setattr(feeding, "resident", lambda size, place: place.type != "cpu")
    monkeypatch.setattr(
        feeding.Feed, "batch", lambda self, step: waited.append(len(waits)) or batch(self, step)
    )
    never = dict.fromkeys(("log_every", "eval_every", "sample_every", "checkpoint_every"), 1000)
    trained(tmp_path, **never, gradient_accumulation_steps=2)
    assert len(waited) == 8 and waited[-1] == waited[0] < len(waits)


def test_a_run_stopped_elsewhere_goes_on(device, tmp_path):
    whole, rows = trained(tmp_path / "whole")
    run = tmp_path / "parted"

    def stop(row):
        if row["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(run, stop, checkpoint_every=2)
    parted, found = trained(run, checkpoint_every=2, resume="auto")
    assert found == rows
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parted.state_dict()[name]), name


@pytest.mark.slow
def test_training_a_denoiser(device, tmp_path):
    save_pipeline("unet", tmp_path / "base")
    model, rows = trained(
        tmp_path / "run", base=str(tmp_path / "base"), regime="fine-tune", max_steps=4
    )
    assert model.base.loss_name == "denoising_loss" and len(rows) > 1


@pytest.mark.slow
def test_pretraining(device):
    pixels = pretrain.observational_images("quad", 16, 16)
    assert pretrain.pretrain(pixels, 2, 4).device == device
    assert pretrain.pretrain_diffusion(pixels, 2, 4).device == device


def test_the_page(device, tmp_path, monkeypatch):
    InterventionPipeline.from_model(light()).save_pretrained(tmp_path / "pair")
    found = []
    for place in (device, "cpu"):
        monkeypatch.setattr(
            pipeline, "load_for_use", lambda name, place=place: pipeline.load_model(name).to(place)
        )
        page = Page(tmp_path / "pair")
        before, after, *_ = page.sample({"a": 1.0}, 2, 0)
        found.append(
            np.stack(
                [*before, *after, *page.edit(Image.fromarray(before[0]), [], {"b": 1.0})[:3]]
            ).astype(int)
        )
    assert np.abs(found[0] - found[1]).max() <= 1 < np.ptp(found[1])


def test_evaluation(device):
    rng = np.random.default_rng(0)
    sets = [
        {
            name: rng.integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
            for name in ("obs", "a", "a+b")
        }
        for _ in range(2)
    ]
    found, expected = (
        evaluate(light().to(place), *sets, ("independent",), edits=True)
        for place in (device, "cpu")
    )
    for name, measured in expected["contexts"].items():
        for part in ("independent", "reconstruction"):
            assert found["contexts"][name][part]["distance"] == pytest.approx(
                measured[part]["distance"], rel=1e-3
            )
    assert found["reconstruction_psnr"] == pytest.approx(expected["reconstruction_psnr"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("make", STEPS)
def test_benchmarks(device, monkeypatch, make):
    monkeypatch.setattr(Conditions, "device", device)
    monkeypatch.setattr(Conditions, "autocast", nullcontext)  # this device has none
    with device:
        step = make()
    step()


@pytest.mark.slow
def test_benchmarks_of_heads_and_data(device, monkeypatch):
    monkeypatch.setattr(Conditions, "device", device)
    monkeypatch.setattr(Conditions, "autocast", nullcontext)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    assert benchmark_head.concepts(1, (2, 3), 8)["full"]["3 concepts"]["milliseconds"] > 0
    assert benchmark_head.contexts(1, 64, 16)["head, 7 contexts"]["speedup"] > 0
    assert benchmark_data.data(1, 8, 16, 16)["file"]["share"]["ratio"] > 0
    loop = benchmark_textbook.Textbook(
        benchmark_textbook.training_images(TrainArguments(**TINY | {"output_dir": "x"}))[0], 8, 1.0
    )
    loop.step()
    assert loop.model.sample("quad1", 2).shape == (2, 16, 16, 3)
