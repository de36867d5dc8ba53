"""Heads attached to pipelines of many kinds: unchanged before, moved inside, guided, as before
after `detach`."""

import copy
from pathlib import Path

import diffusers
import pipelines
import pytest
import torch
from conftest import generator
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin

from hf_intervene import attach, detach, intervene
from hf_intervene.acting import denoisers
from hf_intervene.bases.schedulers import DIFFUSION_SCHEDULERS, FLOW_SCHEDULERS


def generate(kind, pipe, num_images=2, **options):
    return pipelines.result(pipe(**pipelines.call(kind, num_images, **options)))


def hooks(pipe):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks)
        for denoiser in denoisers(pipe).values()
        for module in denoiser.modules()
    )


def made(kind):
    pipe = pipelines.make(kind)
    return pipe, *pipelines.head_for(pipe)


@pytest.mark.parametrize("kind", pipelines.KINDS)
def test_attach_intervene_detach(kind):
    pipe, head, adapter = made(kind)
    pipeline_class, before, hooks_before = type(pipe), generate(kind, pipe), hooks(pipe)
    attach(pipe, head, adapter)
    assert torch.equal(generate(kind, pipe), before)
    noise = torch.randn(2, 3, 4, generator=generator())

    def under(interventions, num_images=2, **options):
        with intervene(pipe, interventions, noise=noise[:num_images], **options):
            return generate(kind, pipe, num_images)

    a, b, mixed = under("a"), under("b"), under([["a"], ["b"]])
    assert (a - before).abs().max() > 1e-3 and a.isfinite().all()
    # Each image has its own interventions, whatever rows its own guidance makes of it.
    torch.testing.assert_close(mixed[0], a[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[1], b[1], rtol=1e-3, atol=1e-3)
    assert (a - b).abs().max() > 1e-3
    guided, barely = under("a", guidance_scale=3.0), under("a", guidance_scale=1 + 1e-6)
    assert (guided - a).flatten(1).abs().amax(1).min() > 1e-3
    torch.testing.assert_close(barely, a, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(under("a", compose="scores"), a, rtol=1e-2, atol=1e-2)
    assert torch.equal(generate(kind, pipe), before)
    detach(pipe)
    assert torch.equal(generate(kind, pipe), before)
    assert (
        hooks(pipe) == hooks_before
        and type(pipe) is pipeline_class
        and "step" not in vars(pipe.scheduler)
    )


def _image_to_image(name):
    def make(kind):
        pipe, call = pipelines.make(kind), pipelines.call(kind)
        other = getattr(diffusers, name)(**pipe.components)
        call |= {"image": torch.rand(2, 3, 16, 16, generator=generator(2)), "strength": 0.7}
        return other, call

    return make


def _kontext(kind):
    pipe, call = pipelines.make(kind), pipelines.call(kind)
    image = torch.rand(1, 3, 16, 16, generator=generator(2))
    call |= {"image": image, "max_area": 16**2, "_auto_resize": False}
    return diffusers.FluxKontextPipeline(**pipe.components), call


def _perturbed(kind):
    """Perturbed attention: three rows for each image."""
    pipe = diffusers.StableDiffusionPAGPipeline(
        **pipelines.make(kind).components, pag_applied_layers=["mid"]
    )
    return pipe, pipelines.call(kind) | {"pag_scale": 2.0}


def _control(kind):
    pipe, call = pipelines.make(kind), pipelines.call(kind)
    control = diffusers.ControlNetModel.from_unet(
        pipe.unet, conditioning_embedding_out_channels=(8, 8)
    )
    for parameter in control.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1)
    image = torch.rand(2, 3, 16, 16, generator=generator(2))
    pipe = diffusers.StableDiffusionControlNetPipeline(
        **pipe.components, controlnet=control.eval(), requires_safety_checker=False
    )
    return pipe, call | {"image": image}


DERIVED = {
    "sdxl image to image": ("sdxl", _image_to_image("StableDiffusionXLImg2ImgPipeline")),
    "sd3 image to image": ("sd3", _image_to_image("StableDiffusion3Img2ImgPipeline")),
    "flux image to image": ("flux", _image_to_image("FluxImg2ImgPipeline")),
    "chroma image to image": ("chroma", _image_to_image("ChromaImg2ImgPipeline")),
    "qwen image to image": ("qwen", _image_to_image("QwenImageImg2ImgPipeline")),
    "z-image image to image": ("z-image", _image_to_image("ZImageImg2ImgPipeline")),
    "kontext": ("flux", _kontext),
    "perturbed attention": ("sd", _perturbed),
    "controlnet": ("sd", _control),
}


@pytest.mark.parametrize("what", DERIVED)
def test_pipelines_made_of_the_same_parts(what):
    kind, make = DERIVED[what]
    pipe, call = make(kind)
    pipe.set_progress_bar_config(disable=True)

    def run():
        return pipelines.result(pipe(**call | {"generator": generator()}))

    before = run()
    attach(pipe, *pipelines.head_for(pipe))
    noise = torch.randn(2, 3, 4, generator=generator())

    def under(interventions, **options):
        with intervene(pipe, interventions, noise=noise, **options):
            return run()

    a, b, mixed = under("a"), under("b"), under([["a"], ["b"]])
    assert (a - before).abs().max() > 1e-3 and (a - b).abs().max() > 1e-3
    torch.testing.assert_close(mixed[0], a[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mixed[1], b[1], rtol=1e-3, atol=1e-3)
    assert (under("a", guidance_scale=3.0) - a).flatten(1).abs().amax(1).min() > 1e-3
    detach(pipe)
    assert torch.equal(run(), before)


class MadeUpDenoiser(ModelMixin, ConfigMixin):
    """Of a class that the package has never heard of."""

    @register_to_config
    def __init__(self, channels=3):
        super().__init__()
        self.proj, self.when = Timesteps(8, True, 0), TimestepEmbedding(8, 12)
        self.layer, self.scale = (
            torch.nn.Conv2d(channels, channels, 3, padding=1),
            torch.nn.Linear(12, channels),
        )

    def forward(self, latent, when):
        scale = self.scale(self.when(self.proj(when.expand(len(latent)))))
        return (self.layer(latent) * (1 + scale[..., None, None]),)


class MadeUpPipeline(diffusers.DiffusionPipeline):
    """Of one's own: guidance in one batch, latents made in its call."""

    def __init__(self, transformer, scheduler):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, count, seed=0, guidance_scale=2.0):
        x = torch.randn(count, 3, 8, 8, generator=generator(seed))
        self.scheduler.set_timesteps(3)
        for t in self.scheduler.timesteps:
            first, second = self.transformer(torch.cat([x, x]), t)[0].chunk(2)
            x = self.scheduler.step(second + guidance_scale * (first - second), t, x).prev_sample
        return (x,)


def test_a_denoiser_and_a_pipeline_that_nobody_knows():
    """The rule finds the site: no line of code for a new family."""
    torch.manual_seed(0)
    pipe = MadeUpPipeline(MadeUpDenoiser(), diffusers.FlowMatchEulerDiscreteScheduler())
    before = pipe(2)[0]
    attach(pipe, *pipelines.head_for(pipe))
    noise = torch.randn(2, 3, 4, generator=generator())
    found = []
    for interventions in ("a", "b", [["a"], ["b"]]):
        with intervene(pipe, interventions, noise=noise):
            found.append(pipe(2)[0])
    a, b, mixed = found
    assert (a - before).abs().max() > 1e-3 and (a - b).abs().max() > 1e-3
    torch.testing.assert_close(mixed, torch.stack([a[0], b[1]]))
    detach(pipe)
    assert torch.equal(pipe(2)[0], before)


class Predictions:
    """What the denoisers return to the pipeline, call by call; calls that a head makes inside of
    one are left out."""

    def __init__(self, pipe):
        self.found, self.depth = [], 0
        self.handles = [d.register_forward_pre_hook(self.enter) for d in denoisers(pipe).values()]
        self.handles += [d.register_forward_hook(self.leave) for d in denoisers(pipe).values()]

    def enter(self, module, args):
        self.depth += 1

    def leave(self, module, args, output):
        self.depth -= 1
        if not self.depth:
            predicted = output if isinstance(output, torch.Tensor) else output[0]
            self.found.append(torch.stack(list(predicted)).clone())

    def __enter__(self):
        return self.found

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def first_predictions(kind, pipe, interventions, num_images=2, **options):
    """Of the first step: all that the denoiser returns before the scheduler steps."""
    with intervene(pipe, interventions, **options):
        # the head has been seen to work: no further calls
        generate(kind, pipe, num_images, num_inference_steps=2)
        with Predictions(pipe) as found:
            generate(kind, pipe, num_images, num_inference_steps=2)
    return found[0]


@pytest.mark.parametrize(
    "kind", ["sd", "pix2pix", "flux", "z-image", "pixart", "wan", "kandinsky", "chroma"]
)
def test_guidance_acts_on_whole_predictions(kind):
    """o + w (p - o) in every token, channel and image; a learnt variance is not guided."""
    pipe, head, adapter = made(kind)
    attach(pipe, head, adapter)
    noise = torch.randn(2, 3, 4, generator=generator())
    o, a, b, both = (
        first_predictions(kind, pipe, s, noise=noise) for s in ("obs", "a", "b", ["a", "b"])
    )
    guided = first_predictions(kind, pipe, ["a", "b"], noise=noise, guidance_scale=2.5)
    scores = first_predictions(
        kind, pipe, ["a", "b"], noise=noise, guidance_scale=2.5, compose="scores"
    )
    expected, composed = o + 2.5 * (both - o), o + 2.5 * (a - o) + 2.5 * (b - o)
    assert (composed - expected).abs().max() > 1e-3
    if kind == "pixart":  # 8 channels for latents of 4
        torch.testing.assert_close(guided[:, 4:], both[:, 4:])
        guided, expected, scores, composed = (
            guided[:, :4],
            expected[:, :4],
            scores[:, :4],
            composed[:, :4],
        )
    torch.testing.assert_close(guided, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(scores, composed, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "pix2pix", "sd3", "z-image", "lumina", "wan"])
def test_one_draw_for_each_image_of_a_call(kind):
    pipe, head, adapter = made(kind)
    attach(pipe, head, adapter)
    draws, embed = [], head.forward
    head.forward = lambda z, *rest: draws.append(z) or embed(z, *rest)
    with intervene(pipe, "a"):
        generate(kind, pipe, 3 if kind != "prx" else 1)
        assert len(draws) == 1 and draws[0].shape == (3, 3, 4) and len(draws[0].unique(dim=0)) == 3
        generate(kind, pipe, 1)
    assert len(draws) == 2 and draws[1].shape == (1, 3, 4)


def test_every_denoiser_of_a_pipeline_is_hooked():
    """Wan 2.2 has one for high noise and one for low noise."""
    pipe, head, adapter = made("wan-two")
    attach(pipe, head, adapter)
    calls = {"transformer": 0, "transformer_2": 0}
    for name in calls:
        getattr(pipe, name).register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    noise = torch.randn(1, 3, 4, generator=generator())
    plain = generate("wan-two", pipe, 1)
    assert min(calls.values()) > 0
    with intervene(pipe, "a", noise=noise):
        both = generate("wan-two", pipe, 1)
    heads = pipe._attached_heads.attached["default"]
    heads.injections["transformer_2"].remove()
    heads.injections["transformer_2"].install = lambda: False
    with intervene(pipe, "a", noise=noise):
        first = generate("wan-two", pipe, 1)
    assert (both - first).abs().max() > 1e-3 and (first - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_copied_pipeline_has_heads_of_its_own(kind):
    pipe, head, adapter = made(kind)
    attach(pipe, head, adapter)
    plain = generate(kind, pipe)
    copied = copy.deepcopy(pipe)
    noise = torch.randn(2, 3, 4, generator=generator())
    with intervene(pipe, "a", noise=noise):
        acted = generate(kind, pipe)
        assert torch.equal(generate(kind, copied), plain)
    with intervene(copied, "a", noise=noise):
        assert torch.equal(generate(kind, copied), acted)
        assert torch.equal(generate(kind, pipe), plain)
    detach(copied)
    with intervene(pipe, "a", noise=noise):
        assert torch.equal(generate(kind, pipe), acted)


def test_the_guide_lists_what_is_tested_and_known():
    text = (Path(__file__).parents[1] / "docs" / "attaching.md").read_text(encoding="utf-8")
    classes = {type(pipelines.make(kind)).__name__ for kind in pipelines.KINDS}
    for name in (*classes, *DIFFUSION_SCHEDULERS, *FLOW_SCHEDULERS):
        assert f"`{name}`" in text, name
