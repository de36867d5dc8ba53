"""Energy distances of samples to images: against a slow loop, without bias, in the objective, however a batch is split."""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from diffusion_models import save_pipeline, save_vision
from test_residual import build as build_residual
from test_train import assert_same, last_state, launch, run, weights

from hf_intervene import InterventionModel
from hf_intervene.bases import LightVAE
from hf_intervene.data import ContextImages, ContextSchedule, quad
from hf_intervene.sample_matching import EVERY, GROUP, IMAGES, energy_distance
from hf_intervene.training.arguments import TrainArguments
from hf_intervene.training.feeding import Feed


MATCHED = {"sample_matching": 0.5, "moment_warmup": 0.0}


def rms(a, b):
    return (a - b).square().mean().sqrt()


def slow_distance(samples, images):
    across = sum(rms(y, x) for y in samples for x in images) / (len(samples) * len(images))
    pairs = [(i, j) for i in range(len(samples)) for j in range(len(samples)) if i != j]
    return 2 * across - sum(rms(samples[i], samples[j]) for i, j in pairs) / len(pairs)


def test_against_a_loop_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    samples = torch.rand(3, 4, 3, 6, 6, generator=generator, requires_grad=True)
    images = torch.rand(3, 5, 3, 6, 6, generator=generator)
    found = energy_distance(samples, images)
    (gradient,) = torch.autograd.grad(found.square().sum(), samples)
    expected = torch.stack([slow_distance(y, x) for y, x in zip(samples, images)])
    (slow_gradient,) = torch.autograd.grad(expected.square().sum(), samples)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, slow_gradient, rtol=1e-3, atol=1e-6)


def test_few_samples_are_enough_on_the_average_and_equal_distributions_are_nearest():
    generator = torch.Generator().manual_seed(0)

    def mean(shift, spread):
        y = torch.randn(20000, GROUP, 3, generator=generator) * spread + shift
        return energy_distance(y, torch.randn(20000, IMAGES, 3, generator=generator)).mean().item()

    x = torch.randn(2, 100000, 3, generator=generator)
    constant = (x[0] - x[1]).square().mean(1).sqrt().mean().item()  # E|x - x'|
    assert mean(0.0, 1.0) == pytest.approx(constant, abs=0.01)  # the distance is 0
    for shift, spread in ((0.5, 1.0), (0.0, 0.6), (0.0, 1.6)):
        assert mean(shift, spread) > constant + 0.03


@pytest.mark.parametrize("residual", [False, True])
def test_it_is_a_term_of_the_loss(residual):
    torch.manual_seed(0)
    model = build_residual() if residual else light()
    channels, height, width = model.base.image_shape
    concept = model.concepts[0]
    x, s = torch.rand(2, channels, height, width), model.targets([["obs"], [concept]])
    draws = model.posterior_draws(2, torch.Generator().manual_seed(1))
    samples = model.posterior_draws(2 * GROUP, torch.Generator().manual_seed(2))
    samples |= {"targets": s, "images": torch.rand(2 * 3, channels, height, width)}
    plain, matched = model(x, s, **draws), model(x, s, **draws, samples=samples, sample_weight=0.5)
    assert plain.sample_distance is None
    made = []
    for group, row in enumerate(s):
        of = slice(group * GROUP, (group + 1) * GROUP)
        rho = [samples["residual_noise"][of]] if residual else []
        made.append(model.base.to_pixels(model.decode(samples["noise"][of], row.expand(GROUP, -1), *rho)))
    distance = sum(slow_distance(y, x) for y, x in zip(made, samples["images"].split(3))) / 2
    torch.testing.assert_close(matched.sample_distance, distance)
    torch.testing.assert_close(matched.loss, plain.loss + 0.5 * channels * height * width * distance)


def light(concepts=("a", "b")):
    return InterventionModel.build(LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16), concepts, noise_width=4)


def feed(data, accumulation=1, moment_warmup=0.0):
    torch.manual_seed(0)
    model = light(quad.CONCEPTS)
    a = TrainArguments(
        batch_size=32, gradient_accumulation_steps=accumulation, sample_matching=1.0, moment_warmup=moment_warmup, max_steps=10
    )
    return Feed(model, data, None, ContextSchedule(data.context_ids, "balanced", 32, 0), a, PartialState(cpu=True))


def test_groups_are_compared_with_images_of_their_own_context_however_the_batch_is_split(tmp_path):
    data = ContextImages.from_arrays(quad.images_by_context(images_per_context=30, resolution=16), quad.CONCEPTS)
    for number, pixels in enumerate(data.stored):  # the first value of an image tells its context
        pixels[0, 0, 0] = data.context_ids[number]
    file = ContextImages(data.stored, data.context_ids, data.contexts, data.concepts, mapped=True)
    np.save(tmp_path / "images.npy", data.stored.numpy())
    file.stored = torch.from_numpy(np.load(tmp_path / "images.npy", mmap_mode="c"))
    whole, parts = feed(data), feed(file, accumulation=2)
    seen = set()
    for step in range(6):
        one, two = whole.batch(step), parts.batch(step)
        (samples,), halves = [i["samples"] for i in one.inputs], [i["samples"] for i in two.inputs]
        assert len(halves) == 2
        for name, value in samples.items():
            assert torch.equal(value, torch.cat([half[name] for half in halves])), name
        assert torch.equal(samples["targets"], one.targets[::EVERY]) and samples["noise"].shape == (32 // EVERY * GROUP, 7, 4)
        told = (samples["images"][:, 0, 0, 0] * 255).view(-1, IMAGES)
        assert (told == one.ids[::EVERY, None]).all()
        seen |= {image.numpy().tobytes() for image in samples["images"]}
    assert len(seen) > 150  # of 210, in 768 draws
    parts.close()
    late = feed(data, moment_warmup=0.5)
    assert ["samples" in next(late.batch(step).inputs) for step in range(10)] == [False] * 5 + [True] * 5


def test_accumulation_processes_and_a_resume_do_not_change_the_result(tiny, tmp_path):
    settings = tiny | MATCHED | {"base_norm": "none", "max_steps": 6, "eval_every": 3}
    run(settings)
    first = str(tmp_path / "run" / "checkpoints" / "step-00000003")
    others = {
        "parts": {"gradient_accumulation_steps": 2},
        "two": {},
        "resumed": {"resume": first},
        "without": {"sample_matching": 0.0},
    }
    for name, changes in others.items():
        other = settings | changes | {"output_dir": str(tmp_path / name)}
        if name == "two":
            launch(["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], other)
        else:
            run(other)
    expected, *found = (weights(tmp_path / name / "model") for name in ("run", "parts", "two", "resumed", "without"))
    for other in found[:2]:
        assert_same(other, expected, rtol=1e-2, atol=2e-4)
    assert_same(found[2], expected)
    assert_same(
        last_state(settings)[0]["optimizer"], last_state(settings | {"output_dir": str(tmp_path / "resumed")})[0]["optimizer"]
    )
    assert max((expected[name] - value).abs().max().item() for name, value in found[3].items()) > 1e-3


def test_samples_come_nearer(tiny):
    """An untrained decoder under this term alone: it learns what the contexts look like."""
    torch.manual_seed(0)
    model = light()
    dark, bright = torch.rand(64, 3, 16, 16) * 0.3, torch.rand(64, 3, 16, 16) * 0.3 + 0.7
    targets = model.targets([["obs"], ["a"]])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(200):
        draws = model.posterior_draws(2 * GROUP, torch.Generator().manual_seed(step))
        pick = torch.randint(64, (IMAGES,), generator=torch.Generator().manual_seed(step))
        loss = model.sample_distance(**draws, targets=targets, images=torch.cat([dark[pick], bright[pick]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.sample("obs", 32).mean().item() < 0.4 and model.sample("a", 32).mean().item() > 0.6


def test_what_it_cannot_do_is_one_sentence(tiny, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a multiple of 8, not 20"):
        run(tiny | MATCHED, batch_size=20, gradient_accumulation_steps=2)
    denoiser = {"base": str(save_pipeline("unet", tmp_path / "ddpm")), "image_encoder": str(save_vision(tmp_path / "vision"))}
    with pytest.raises(ValueError, match="not for denoisers.*set sample_matching to 0"):
        run(tiny | MATCHED | denoiser, output_dir=str(tmp_path / "denoiser"))
    with pytest.raises(ValueError, match="sample_matching must not be negative"):
        run(tiny, sample_matching=-1.0)
