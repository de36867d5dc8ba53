"""How pipelines call their denoisers is recorded, and a head is trained, sampled, saved and loaded
on what was recorded.
"""

import inspect
import json
import subprocess
import sys

import diffusers
import pipelines
import pytest
import recorded
import torch
from conftest import generator
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from hf_intervene import InterventionModel, load_base
from hf_intervene.bases import PipelineBase
from hf_intervene.bases.autoencoder import images_of, latents_of
from hf_intervene.bases.fitting import fitted_time
from hf_intervene.bases.observing import without_draws
from hf_intervene.bases.replay import Placement, probe_rows, probes_of


# of the kinds of call: a map and dictionaries, tokens, lists, channels last
FEW = (
    "sdxl",
    "flux",
    "z-image",
    "kandinsky",
)
OPTIONS = {"noise_width": 4, "initializer_range": 0.5}


def with_head(base, awake=True):
    torch.manual_seed(0)
    model = InterventionModel.build(base, ["a", "b"], **OPTIONS).eval()
    if awake:  # as if trained: what enters is not zero
        for parameter in base.adapter.projections.parameters():
            parameter.data.normal_(std=0.3)
    return model


# The maps


@pytest.mark.parametrize("entries", [1, 16, 17, 300])
def test_a_placement_is_found_from_probes(entries):
    """Any permutation with scales, shifts and constants is found exactly, and inverted where it can
    be.
    """
    order, rows = torch.randperm(entries, generator=generator()), probe_rows(entries)
    scale, shift = (
        torch.rand(entries, generator=generator(1)) + 0.5,
        torch.randn(entries, generator=generator(2)),
    )
    apply = lambda x: x[:, order] * scale + shift  # noqa: E731
    found = Placement.fit(apply(probes_of(entries, rows)), entries)
    x = torch.randn(3, entries, generator=generator(3))
    assert torch.allclose(found(x), apply(x), atol=1e-5)
    assert found.is_invertible() and torch.allclose(found.inverse(apply(x)), x, atol=1e-4)
    # as the mask of inpainting
    constant = torch.cat([apply(probes_of(entries, rows)), torch.full((rows, 2), 7.0)], 1)
    found = Placement.fit(constant, entries)
    assert not found.is_invertible() and torch.equal(found(x)[:, entries:], torch.full((3, 2), 7.0))


def test_a_sum_of_entries_is_no_placement():
    probes = probes_of(40, probe_rows(40))
    with pytest.raises(ValueError, match="no scaled and shifted entry|made of several entries"):
        Placement.fit(probes + probes.roll(1, 1), 40)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("a, b", [(1.0, 0.0), (0.001, 0.0), (-0.001, 1.0)])
def test_times_are_fitted_through_rounding(dtype, a, b):
    times = torch.tensor([1000.0, 857.1, 333.3]).double()
    assert fitted_time(times, (a * times + b).to(dtype).double(), dtype) == (a, b)


def test_another_time_is_no_multiple_of_the_schedulers():
    """A second time, such as that of the next step, which a mean flow is given."""
    times = torch.tensor([1000.0, 666.0, 333.0]).double()
    assert fitted_time(times, times - 333, torch.float32) is None


# Pipelines


@pytest.fixture(scope="module")
def bases():
    """One base of each kind, recorded when it is first wanted."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = recorded.base(kind)
        return made[kind]

    return get


def kinds():
    return [
        kind if kind in FEW else pytest.param(kind, marks=pytest.mark.slow)
        for kind in recorded.KINDS
    ]


@pytest.mark.parametrize("kind", kinds())
def test_the_replay_denoises_as_the_pipeline(kind, bases, monkeypatch):
    """The denoiser, called by the recording, steps from noise to the latents that the pipeline
    itself comes to.
    """
    pipe, call = recorded.pipeline(kind)
    base = bases(kind)
    run, off = (
        [],
        {
            "guidance_scale": 0.0 if kind == "z-image" else 1.0,
            "image_guidance_scale": 1.0,
            "num_frames": 1,
        },
    )
    off |= {"use_resolution_binning": False, "true_cfg_scale": 1.0}
    off = {
        name: value
        for name, value in off.items()
        if name in inspect.signature(type(pipe).__call__).parameters
    }
    for part in pipe.components.values():
        if hasattr(part, "_enabled"):
            part.disable()
    pipe.scheduler = type(base.scheduler).from_config(base.scheduler.config)
    step = pipe.scheduler.step

    def watched(prediction, t, sample, *args, **kwargs):
        # as the denoiser got it
        scaled = pipe.scheduler.scale_model_input(sample, t) if kind == "sdxl-text" else sample
        run.append((prediction.clone(), t, scaled.clone()))
        return step(prediction, t, sample, *args, **kwargs)

    monkeypatch.setattr(pipe.scheduler, "step", watched)
    # of an image to be painted in
    monkeypatch.setattr(pipe.vae, "encode", without_draws(pipe.vae, pipe.vae.encode))
    text = {} if "prompt_embeds" in call or "prompt_embeds_qwen" in call else {"prompt": "a b"}
    pipe(
        **{
            **call,
            **off,
            **text,
            "num_inference_steps": 2,
            "generator": generator(),
            "output_type": "latent",
        }
    )
    assert len(run) == 2
    for prediction, t, sample in run:
        with torch.no_grad():
            found = base._predicted(sample, torch.as_tensor(t))
        assert torch.allclose(found, prediction.float(), atol=1e-4), (
            (found - prediction).abs().max()
        )


@pytest.mark.parametrize("kind", kinds())
def test_a_clean_sample_decodes_to_its_image(kind, bases):
    """x_0 of images is what the pipeline's own tail brings to the autoencoder, which has no say in
    it.
    """
    base, images = bases(kind), torch.rand(2, *bases(kind).image_shape, generator=generator())
    x0 = base.prepare(images)["x0"]
    assert x0.shape == (2, *base.sample_shape)
    latents = base.adapter.recorded.to_latents(x0)
    own = latents_of(base.vae, 2 * images - 1)[0]
    assert torch.allclose(latents.reshape_as(own), own, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(base._to_images(x0), images_of(base.vae, own), atol=1e-4)


@pytest.mark.parametrize("kind", kinds())
def test_a_head_is_trained_on_it(kind, bases):
    """The loss of one batch falls in a few steps; samples and edits of it are images, and
    interventions move them.
    """
    base = bases(kind)
    model = with_head(base, awake=False)
    parameters = [*model.head.parameters(), *base.adapter.parameters()]
    optimizer = torch.optim.Adam(parameters, 2e-4)
    images, targets = (
        torch.rand(4, *base.image_shape, generator=generator()),
        model.targets([["a"], ["b"], [], ["a", "b"]]),
    )
    draws, losses = model.posterior_draws(4, generator()), []
    for _ in range(3):
        loss = model(images, targets, **draws).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    for parameter in base.adapter.projections.parameters():
        parameter.data.normal_(std=0.3)
    options = {"num_images": 2, "num_inference_steps": 2}
    plain, moved = (model.sample(s, generator=generator(), **options) for s in ([], ["a"]))
    assert plain.shape == (2, *base.image_shape) and not torch.equal(plain, moved)
    assert model.edit(images[:2], ["a"], num_inference_steps=2).shape == plain.shape


PROGRAM = """
import json, sys, torch
from hf_intervene import InterventionModel
for folder in sys.argv[1:]:
    model = InterventionModel.from_pretrained(folder)
    g = torch.Generator().manual_seed(0)
    images = model.sample(["a"], num_images=1, num_inference_steps=2, generator=g)
    print(json.dumps([type(model.base).__name__, images.flatten().tolist()]))
"""


def same_in_a_new_process(models, tmp_path):
    wanted = []
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        assert not [
            file
            for file in (tmp_path / str(number)).rglob("*")
            if file.suffix in (".bin", ".pt", ".pkl")
        ]
        wanted.append(
            model.sample(["a"], num_images=1, num_inference_steps=2, generator=generator())
        )
    folders = [str(tmp_path / str(number)) for number in range(len(models))]
    done = subprocess.run([sys.executable, "-c", PROGRAM, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, images in zip(done.stdout.splitlines()[-len(models) :], wanted, strict=True):
        family, found = json.loads(line)
        assert family == "PipelineBase" and torch.allclose(
            torch.tensor(found), images.flatten(), atol=1e-5
        )


def test_saved_and_loaded_in_a_new_process(bases, tmp_path):
    """Without the pipeline: its text encoders are not there, what they said is in the adapter."""
    same_in_a_new_process([with_head(bases(kind)) for kind in FEW], tmp_path)


@pytest.mark.slow
def test_all_saved_and_loaded_in_a_new_process(bases, tmp_path):
    same_in_a_new_process([with_head(bases(kind)) for kind in recorded.KINDS], tmp_path)


def test_the_pipeline_is_left_as_it_was():
    pipe, call = recorded.pipeline("flux")
    before = {
        name: vars(part).copy()
        for name, part in pipe.components.items()
        if isinstance(part, nn.Module)
    }
    scheduler, classes = pipe.scheduler, {name: type(pipe.components[name]) for name in before}
    PipelineBase.from_pipeline(pipe, call=call)
    own = {"_diffusers_hook"}  # which the pipeline puts on its denoiser at its first call
    assert pipe.scheduler is scheduler
    for name, values in before.items():
        part = pipe.components[name]
        assert type(part) is classes[name] and vars(part).keys() - own == values.keys() - own, name
        assert all(vars(part)[key] is value for key, value in values.items())


# Two denoisers that are not of diffusers: what is found is found by the rule


class Unheard(ModelMixin, ConfigMixin):
    """Takes its samples as keyword arguments in a dictionary, counts time upwards, and returns the
    negated prediction.
    """

    @register_to_config
    def __init__(self, channels: int = 4, width: int = 16):
        super().__init__()
        self.times, self.time_embed = Timesteps(width, True, 0), TimestepEmbedding(width, width)
        self.into, self.out = nn.Conv2d(channels, width, 1), nn.Conv2d(width, channels, 1)

    def forward(self, inputs: dict, progress: torch.Tensor, words: list):
        entered = self.time_embed(self.times(1000 * (1 - progress)).to(self.dtype))  # (B, W)
        told = torch.stack([word.mean() for word in words])[:, None, None, None]
        return (
            self.out(torch.tanh(self.into(inputs["latent"]) + entered[..., None, None]) + told),
        )


class UnheardPipeline(diffusers.DiffusionPipeline):
    def __init__(self, transformer, vae, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt=None, num_images_per_prompt=1, num_inference_steps=10, generator=None
    ):
        x = torch.randn(num_images_per_prompt, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            # longer for longer prompts
            words = [torch.full((max(1, len(prompt)),), float(len(prompt)))] * len(x)
            shown = x.flip(-1) * 1.0
            found = self.denoise({"latent": shown}, 1 - (t / 1000).expand(len(x)), words=words)[0]
            x = self.scheduler.step(-found.flip(-1), t, x).prev_sample
        return self.decode(3 * x.transpose(2, 3) + 0.5)

    def denoise(self, *args, **kwargs):
        return self.transformer(*args, **kwargs)

    def decode(self, x):
        return self.vae.decode(x).sample


def unheard():
    torch.manual_seed(0)
    return UnheardPipeline(
        Unheard().eval(),
        pipelines._vae().eval(),
        diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
    )


def test_a_denoiser_that_nobody_has_heard_of(tmp_path):
    """No line of code knows its class, its arguments or its layouts."""
    base = PipelineBase.from_pipeline(unheard(), "abc")
    kept = base.adapter.config.recording
    assert kept["arguments"]["progress"]["time"] == [
        -0.001,
        1.0,
    ] and base.injection.sites.vectors == ("time_embed",)
    x = torch.randn(2, 4, 8, 8, generator=generator())
    with torch.no_grad():
        wanted = -base.model(
            {"latent": x.flip(-1)}, torch.tensor([0.75, 0.75]), [torch.full((3,), 3.0)] * 2
        )[0].flip(-1)
        found = base._predicted(x, torch.tensor(250.0))
    assert torch.allclose(found, wanted, atol=1e-5)
    assert torch.allclose(
        base.adapter.recorded.to_latents(x), 3 * x.transpose(2, 3) + 0.5, atol=1e-5
    )
    model = with_head(base)
    model.save_pretrained(tmp_path)
    loaded = InterventionModel.from_pretrained(tmp_path)
    options = {"num_images": 1, "num_inference_steps": 2}
    both = [m.sample(["a"], generator=generator(), **options) for m in (model, loaded)]
    assert torch.allclose(*both, atol=1e-5)


def test_load_base_records_a_pipeline_of_a_folder(tmp_path):
    pipe, _ = recorded.sdxl_with_text()
    pipe.save_pretrained(tmp_path)
    base = load_base(tmp_path, 16, prompt="a b")
    assert isinstance(base, PipelineBase) and base.image_shape == (3, 16, 16)
    own = PipelineBase.from_pipeline(pipe, "a b")
    for a, b in zip(base.adapter.recorded.constants, own.adapter.recorded.constants, strict=True):
        assert torch.allclose(a, b)
    x, t = torch.randn(2, *base.sample_shape, generator=generator()), torch.tensor(500)
    with torch.no_grad():
        assert torch.allclose(base._predicted(x, t), own._predicted(x, t), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_is_recorded_without_its_roundings(dtype, bases):
    """Maps are those of float32: nothing of what is probed is rounded."""
    pipe, call = recorded.pipeline("flux")
    pipe.to(dtype)
    call = {
        name: value.to(dtype) if isinstance(value, torch.Tensor) else value
        for name, value in call.items()
    }
    base = PipelineBase.from_pipeline(pipe, call=call)
    kept, other = (b.adapter.config.recording for b in (base, bases("flux")))
    assert kept["placements"] == other["placements"] and kept["arguments"] == other["arguments"]


def test_a_shift_of_times_for_the_size_of_the_images_is_kept():
    """Trained and sampled with the times that the pipeline has for such images: a saved scheduler
    says so.
    """
    pipe, call = recorded.pipeline("flux")
    base = PipelineBase.from_pipeline(pipe, call=call)
    assert not base.scheduler.config.use_dynamic_shifting
    pipe(**call, num_inference_steps=5, output_type="latent")
    base.scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / 5, 5).tolist())
    assert torch.allclose(base.scheduler.timesteps, pipe.scheduler.timesteps, rtol=1e-4)


# What cannot be recorded, each in one sentence


def _refused(match, pipe, **options):
    before = (
        {name: len(m._forward_hooks) for name, m in pipe.transformer.named_modules()}
        if hasattr(pipe, "transformer")
        else {}
    )
    with pytest.raises((ValueError, TypeError), match=match) as caught:
        PipelineBase.from_pipeline(pipe, **options)
    assert "\n" not in str(caught.value)
    if before:
        assert before == {
            name: len(m._forward_hooks) for name, m in pipe.transformer.named_modules()
        }


def test_pipelines_that_cannot_be_recorded():
    pipe = pipelines.make("wan-two")
    pipe.register_to_config(boundary_ratio=None)
    _refused("has 2 denoisers", pipe)
    with pytest.raises(TypeError, match="a pipeline of diffusers was expected"):
        PipelineBase.from_pipeline("a name")
    pipe, call = recorded.pipeline("sana")
    pipe.scheduler = diffusers.SCMScheduler()
    _refused("SCMScheduler", pipe, call=call)
    pipe, call = recorded.pipeline("sd")
    pipe.scheduler = diffusers.LCMScheduler()
    _refused("is a distilled model", pipe, call=call)
    pipe = unheard()
    pipe.vae = None
    _refused("no autoencoder", pipe)
    _refused("makes images of 16 pixels where 32 were asked for", unheard(), sample_size=32)


class Residuals(UnheardPipeline):
    """An argument is computed of each noisy sample by something else, as a ControlNet's residuals
    are.
    """

    @torch.no_grad()
    def __call__(
        self, prompt=None, num_images_per_prompt=1, num_inference_steps=10, generator=None
    ):
        x = torch.randn(num_images_per_prompt, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            shown = {"latent": x, "residual": torch.tanh(x) + x.roll(1, 1)}
            found = self.denoise(shown, (t / 1000).expand(len(x)), words=[torch.zeros(3)] * len(x))[
                0
            ]
            x = self.scheduler.step(found, t, x).prev_sample
        return self.decode(x)


class Squared(UnheardPipeline):
    """What it decodes is no affine map of the sample."""

    def decode(self, x):
        return self.vae.decode(x**2).sample


class Twice(UnheardPipeline):
    """Its denoiser is called twice in each step, whatever the guidance."""

    def denoise(self, *args, **kwargs):
        self.transformer(*args, **kwargs)
        return self.transformer(*args, **kwargs)


@pytest.mark.parametrize(
    "pipeline_class, match",
    [
        (Residuals, r"'inputs.residual' .* as the residuals of a ControlNet are"),
        (Squared, "what the autoencoder decodes"),
        (Twice, "calls its denoiser 6 times in 3 steps"),
    ],
)
def test_what_cannot_be_replayed_is_named(pipeline_class, match):
    _refused(match, pipeline_class(**unheard().components))


def test_a_replay_that_does_not_equal_its_run_is_named(monkeypatch):
    """A denoiser that keeps count of its calls does not return the same twice."""
    pipe = unheard()
    forward = Unheard.forward
    calls = []

    def counting(self, *args, **kwargs):
        calls.append(1)
        return (forward(self, *args, **kwargs)[0] * len(calls),)

    counting.__signature__ = inspect.signature(forward)
    monkeypatch.setattr(Unheard, "forward", counting)
    _refused(
        "the replay of a UnheardPipeline does not equal its run: the denoiser returns something"
        " else",
        pipe,
    )


def test_a_denoiser_without_a_site():
    pipe = unheard()
    pipe.transformer.time_embed = nn.Identity()
    _refused("has no site that a head can enter by", pipe)


def test_a_corrupt_recording_is_refused(bases, tmp_path):
    model = with_head(bases("flux"))
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter" / "config.json"
    whole = json.loads(file.read_text())
    for change in (
        {"arguments": {"x": {"run": "rm"}}},
        {"arguments": {"x": {"constant": 99, "rows": None}}},
        {"latent_shape": [1]},
    ):
        file.write_text(json.dumps(whole | {"recording": whole["recording"] | change}))
        with pytest.raises(ValueError, match="corrupt"):
            InterventionModel.from_pretrained(tmp_path)
