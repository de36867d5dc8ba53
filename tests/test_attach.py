"""Heads on existing pipelines: unchanged outside a `with`, intervened on inside, as before after
`detach`.
"""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from conftest import generator
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusion_models import (
    conditional,
    dit,
    save_pipeline,
    stable_diffusion,
    stable_diffusion_3,
    with_head,
)
from peft import LoraConfig
from PIL import Image

from hf_intervene import (
    InterventionModel,
    InterventionPipeline,
    LightVAE,
    Quantile,
    attach,
    detach,
    intervene,
    load_base,
)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe, num_images=2, **options):
    """What any of the pipelines makes, (num_images, H, W, 3), of the same noise at each call."""
    call = {"num_inference_steps": 3, "generator": generator(), "output_type": "np"} | options
    picture, mask = Image.new("RGB", (16, 16), (100, 50, 20)), Image.new("L", (16, 16), 255)
    if isinstance(pipe, (DDPMPipeline, DDIMPipeline)):
        call["batch_size"] = num_images
    elif isinstance(pipe, DiTPipeline):
        call["class_labels"] = list(range(num_images))
    elif isinstance(pipe, StableDiffusion3Pipeline):
        sizes = pipe.transformer.config
        tokens, pooled = (
            torch.randn(2, num_images, *shape, generator=generator(1))
            for shape in ((5, sizes.joint_attention_dim), (sizes.pooled_projection_dim,))
        )
        call |= {
            "prompt_embeds": tokens[0],
            "negative_prompt_embeds": tokens[1],
            "height": 16,
            "width": 16,
        }
        call |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    else:
        call["prompt"] = ["a", "b"][:num_images]
    if isinstance(pipe, StableDiffusionImg2ImgPipeline):
        call |= {"image": picture, "strength": 0.9}
    if isinstance(pipe, StableDiffusionInpaintPipeline):
        call |= {"image": picture, "mask_image": mask, "height": 16, "width": 16, "strength": 1.0}
    return pipe(**call).images


def hooks(pipe):
    """How many there are on the denoiser: those of the model itself, which shares it, stay."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in denoiser.modules()
    )


def pipeline(kind, tmp_path):
    """A pipeline and a model with a head on its denoiser."""
    if kind in ("ddpm", "ddim"):
        model = with_head("unet")
        return quiet(
            {"ddpm": DDPMPipeline, "ddim": DDIMPipeline}[kind](
                model.base.model, model.base.scheduler
            )
        ), model
    if kind == "dit":
        model = with_head("dit")
        return quiet(DiTPipeline(model.base.model, model.base.vae, model.base.scheduler)), model
    if kind == "sd3":
        model = with_head("sd3")
        return quiet(stable_diffusion_3(model)), model
    kinds = {
        "text": StableDiffusionPipeline,
        "image": StableDiffusionImg2ImgPipeline,
        "inpaint": StableDiffusionInpaintPipeline,
    }
    model = with_head("conditional")
    return stable_diffusion(model, tmp_path, kinds[kind]), model


@pytest.mark.parametrize("kind", ["ddpm", "ddim", "dit", "sd3", "text", "image", "inpaint"])
def test_attach_intervene_detach(kind, tmp_path):
    pipe, model = pipeline(kind, tmp_path)
    before, hooks_before = images(pipe), hooks(pipe)
    assert attach(pipe, model) is pipe
    assert np.array_equal(images(pipe), before)
    with intervene(pipe, ["a", "b"], generator=generator()):
        together = images(pipe)
    with intervene(pipe, ["a", "b"], generator=generator(), guidance_scale=3.0):
        guided = images(pipe)
    with intervene(pipe, ["a", "b"], generator=generator(), guidance_scale=1.0000001):
        barely = images(pipe)
    assert np.abs(together - before).max() > 1e-3 and np.abs(guided - together).max() > 1e-3
    np.testing.assert_allclose(barely, together, atol=1e-4)
    assert np.array_equal(images(pipe), before)
    assert detach(pipe) is pipe
    assert np.array_equal(images(pipe), before)
    assert hooks(pipe) == hooks_before


@pytest.mark.parametrize("kind", ["ddim", "text", "dit", "sd3"])
def test_each_image_has_its_own_interventions(kind, tmp_path):
    pipe, model = pipeline(kind, tmp_path)
    attach(pipe, model)
    noise = torch.randn(2, 3, 4, generator=generator())

    def under(interventions):
        with intervene(pipe, interventions, noise=noise):
            return images(pipe)

    mixed, a, b = under([["a"], {"b": 0.5}]), under("a"), under({"b": 0.5})
    np.testing.assert_allclose(mixed[0], a[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], b[1], atol=1e-5)
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.filterwarnings("ignore:the block of")
@pytest.mark.parametrize("interventions", [["a"], {"a": Quantile(0.9)}, [["a@0.1", "b"], "obs"]])
def test_the_pipeline_generates_what_the_model_does(interventions, tmp_path):
    """DDIM by the library's pipeline, with a head attached, and by `InterventionModel`: the same
    images of the same noise, where the model starts from noise alone too.
    """
    pipe, model = pipeline("ddim", tmp_path)
    model.base.adapter.register_to_config(start=1.0, guidance=1.0)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    noise, x = (
        torch.randn(2, 3, 4, generator=generator()),
        torch.randn(2, 3, 16, 16, generator=generator()),
    )
    expected = model.sample(interventions, noise=noise, residual_noise=x, num_inference_steps=5)
    attach(pipe, model)
    with intervene(pipe, interventions, noise=noise):
        found = pipe(
            batch_size=2, generator=generator(), num_inference_steps=5, output_type="np"
        ).images
    torch.testing.assert_close(
        torch.from_numpy(found).movedim(-1, 1), expected, rtol=1e-3, atol=1e-3
    )


def test_guidance_is_led_away_from_the_observational_pass(tmp_path):
    pipe, model = pipeline("ddim", tmp_path)
    attach(pipe, model)
    noise, found = torch.randn(2, 3, 4, generator=generator()), []
    step = pipe.scheduler.step

    def keep(prediction, *args, **options):
        found.append(prediction)
        return step(prediction, *args, **options)

    pipe.scheduler.step = keep

    def predict(interventions, **options):
        found.clear()
        with intervene(pipe, interventions, noise=noise, **options):
            images(pipe)
        return found[0]

    obs, plain, guided = predict("obs"), predict("a"), predict("a", guidance_scale=2.5)
    assert (plain - obs).abs().max() > 1e-3
    torch.testing.assert_close(guided, obs + 2.5 * (plain - obs), rtol=1e-4, atol=1e-4)


def test_several_heads_add_up_with_their_weights(tmp_path):
    pipe, first = pipeline("ddim", tmp_path)
    second = with_head("unet", seed=1)
    attach(pipe, first, name="faces")
    attach(pipe, second, name="style", weight=0.0)
    noise = torch.randn(2, 3, 4, generator=generator())
    with intervene(pipe, "a", head="faces", noise=noise):
        one = images(pipe)
        with intervene(pipe, "b", head="style", noise=noise):
            both = images(pipe)
    np.testing.assert_allclose(one, both, atol=1e-5)  # of weight 0
    detach(pipe, "style")
    attach(pipe, second, name="style", weight=0.7)
    with (
        intervene(pipe, "a", head="faces", noise=noise),
        intervene(pipe, "b", head="style", noise=noise),
    ):
        assert np.abs(images(pipe) - one).max() > 1e-3
    with intervene(pipe, "a", head="faces", noise=noise):
        assert np.array_equal(images(pipe), one)
    with pytest.raises(
        ValueError, match="give head=: the heads on this pipeline are 'faces', 'style'"
    ):
        intervene(pipe, "a")
    with pytest.raises(ValueError, match="there is no head 'hair'"):
        intervene(pipe, "a", head="hair")
    with pytest.raises(ValueError, match="attached already"):
        attach(pipe, second, name="style")


@pytest.mark.parametrize("steps", [1, 3])
def test_each_call_draws_anew_and_a_generator_repeats(steps, tmp_path):
    pipe, model = pipeline("text", tmp_path)
    attach(pipe, model)
    steps = {"num_inference_steps": steps}
    with intervene(pipe, "a", generator=generator()):
        first, second = images(pipe, **steps), images(pipe, **steps)
    with intervene(pipe, "a", generator=generator()):
        assert np.array_equal(images(pipe, **steps), first)
    assert np.abs(first - second).max() > 1e-4
    assert np.abs(first[0] - first[1]).max() > 1e-4


def test_inner_with_takes_the_place_of_the_outer(tmp_path):
    pipe, model = pipeline("ddim", tmp_path)
    attach(pipe, model)
    noise = torch.randn(2, 3, 4, generator=generator())
    with intervene(pipe, "a", noise=noise):
        outer = images(pipe)
        with intervene(pipe, "b", noise=noise):
            inner = images(pipe)
        assert np.array_equal(images(pipe), outer)
    with intervene(pipe, "b", noise=noise):
        assert np.array_equal(images(pipe), inner)


def test_attention_slicing_lora_and_offloading_go_on_working(tmp_path):
    pipe, model = pipeline("text", tmp_path)
    before = images(pipe)
    attach(pipe, model)

    def under():
        with intervene(pipe, ["a", "b"], generator=generator()):
            return images(pipe)

    expected = under()
    pipe.enable_attention_slicing(1)
    np.testing.assert_allclose(under(), expected, atol=1e-4)
    pipe.disable_attention_slicing()
    # LoRA of the pipeline, loaded after the head was attached, exchanges modules that the head has
    # its hooks on.
    pipe.unet.add_adapter(
        LoraConfig(r=2, target_modules=["to_q", "to_out.0", "to_v"], init_lora_weights=False)
    )
    styled = images(pipe)
    with_lora = under()
    assert np.abs(styled - before).max() > 1e-4 and np.abs(with_lora - styled).max() > 1e-3
    pipe.unet.delete_adapters("default")
    pipe.unet.unload_lora()
    assert np.array_equal(images(pipe), before)
    np.testing.assert_allclose(under(), expected, atol=1e-5)
    # As `enable_model_cpu_offload` does it, which itself wants an accelerator.
    cpu_offload_with_hook(pipe.unet, "cpu")
    np.testing.assert_allclose(under(), expected, atol=1e-5)
    detach(pipe)
    assert np.array_equal(images(pipe), before)
    remove_hook_from_module(pipe.unet)
    assert np.array_equal(pipe.to(torch.float64).to(torch.float32) and images(pipe), before)


@pytest.mark.parametrize("order", ["compiled first", "attached first"])
def test_compiled_pipelines(order, tmp_path):
    pipe, model = pipeline("text", tmp_path)
    before = images(pipe)
    attach(pipe, model)
    with intervene(pipe, ["a", "b"], generator=generator()):
        expected = images(pipe)
    detach(pipe)

    def compile():
        pipe.unet = torch.compile(pipe.unet, backend="eager", fullgraph=True)

    if order == "compiled first":
        compile()
        images(pipe)
        attach(pipe, model)
    else:
        attach(pipe, model)
        compile()
    np.testing.assert_allclose(images(pipe), before, atol=1e-5)
    with intervene(pipe, ["a", "b"], generator=generator()):
        np.testing.assert_allclose(images(pipe), expected, atol=1e-5)
    with (
        intervene(pipe, ["a"], generator=generator()),
        torch.compiler.set_stance("fail_on_recompile"),
    ):
        assert np.abs(images(pipe) - expected).max() > 1e-3  # other interventions, the same code
    detach(pipe)
    np.testing.assert_allclose(images(pipe), before, atol=1e-5)


def test_from_a_saved_model_or_pipeline(tmp_path):
    source = save_pipeline("unet", tmp_path / "ddpm")
    pipe = quiet(DDPMPipeline.from_pretrained(source))
    model = InterventionModel.build(
        load_base(source, 16), ["a", "b"], noise_width=4, initializer_range=0.5
    ).eval()
    for parameter in model.base.adapter.projections.parameters():
        parameter.data.normal_(std=0.3)
    model.save_pretrained(tmp_path / "model")  # the frozen base is not in it
    InterventionPipeline.from_model(model).save_pretrained(tmp_path / "pipe")
    found = []
    for number, head in enumerate((model, tmp_path / "model", str(tmp_path / "model"))):
        attach(pipe, head, name=str(number))
        with intervene(pipe, "a", head=str(number), generator=generator()):
            found.append(images(pipe))
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])
    attach(pipe, tmp_path / "pipe", name="pipe")
    with intervene(pipe, "a", head="pipe", generator=generator()):
        assert np.array_equal(images(pipe), found[0])
    # A base that was trained too must be the pipeline's.
    model.base.model.conv_in.bias.data += 0.1
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(
        ValueError, match="has a base of its own, which is not the denoiser of this pipeline"
    ):
        attach(pipe, tmp_path / "trained", name="trained")
    attach(quiet(DDPMPipeline(model.base.model, pipe.scheduler)), tmp_path / "trained")
    model.base.train_for_samples()
    model.save_pretrained(tmp_path / "samples")
    with pytest.warns(UserWarning, match="at the noise that samples of their own model"):
        attach(quiet(DDPMPipeline(model.base.model, pipe.scheduler)), tmp_path / "samples")
    # Another denoiser of the same shape fits, with a warning.
    other = DDPMPipeline.from_pretrained(save_pipeline("unet", tmp_path / "other", seed=1))
    with pytest.warns(UserWarning, match="not the one that the head was trained on"):
        attach(other, tmp_path / "model")


def test_one_sentence_for_what_does_not_fit(tmp_path):
    pipe, model = pipeline("text", tmp_path)
    before = images(pipe)
    with pytest.raises(ValueError, match="no head is attached to this StableDiffusionPipeline"):
        intervene(pipe, "a")
    with pytest.raises(ValueError, match="no head is attached"):
        detach(pipe)
    attach(pipe, model)
    for refused in (lambda: intervene(pipe, "a", head=["x"]), lambda: detach(pipe, ["x"])):
        with pytest.raises(ValueError, match=r"there is no head \['x'\]: the heads on this"):
            refused()
    with intervene(pipe, "a", num_images=True, guidance_scale=1):  # a whole number, too
        images(pipe)
    detach(pipe)
    with pytest.raises(TypeError, match="needs a diffusers pipeline, not a UNet2DConditionModel"):
        attach(pipe.unet, model)
    light = InterventionModel.build(LightVAE(3, 16, block_out_channels=(8, 8)), ["a"])
    with pytest.raises(ValueError, match="on a LightVAE, not on a denoiser"):
        attach(pipe, light)
    with pytest.raises(TypeError, match="has no denoiser"):
        attach(InterventionPipeline.from_model(light), model)
    with pytest.raises(ValueError, match="does not say how it enters"):
        attach(pipe, model.head)
    with pytest.raises(TypeError, match="head must be a folder"):
        attach(pipe, 3)
    light.save_pretrained(tmp_path / "light")
    with pytest.raises(ValueError, match="not a head on a denoiser"):
        attach(pipe, tmp_path / "light")
    wide = stable_diffusion(model, tmp_path)
    wide.unet = conditional(cross_attention_dim=20)
    with pytest.raises(
        ValueError, match="its cross-attention width is 12, that of this UNet2DConditionModel is 20"
    ):
        attach(wide, model)
    with pytest.raises(ValueError, match="another denoiser"):
        attach(DiTPipeline(dit(), model.base.vae, model.base.scheduler), model)
    flow = stable_diffusion(model, tmp_path)
    flow.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="takes the denoiser's for 'flow'"):
        attach(flow, model)
    attach(pipe, model)
    with pytest.raises(ValueError, match="known ones are obs, a, b"):
        intervene(pipe, "smile")
    with pytest.raises(ValueError, match="a reference image, here of 'b', needs the encoder"):
        intervene(pipe, {"b": Image.new("RGB", (16, 16))})
    with pytest.raises(ValueError, match="observational pass"):
        intervene(pipe, "obs", guidance_scale=2.0)
    with pytest.raises(ValueError, match="noise must have shape"):
        intervene(pipe, "a", noise=torch.zeros(2, 3))
    with pytest.raises(
        ValueError, match="the interventions are for 3 images, but this call makes 2"
    ):
        with intervene(pipe, [["a"], ["b"], "obs"]):
            images(pipe)
    intervene(pipe, "a")
    with pytest.raises(ValueError, match="inside `with intervene"):
        images(pipe)
    assert np.array_equal(images(pipe), before)  # nothing is left behind
    scheduler = pipe.scheduler
    pipe.scheduler = DDIMScheduler(prediction_type="v_prediction")
    with pytest.raises(ValueError, match="takes the denoiser's for 'v_prediction'"):
        with intervene(pipe, "a"):
            images(pipe)
    pipe.scheduler = scheduler
    detach(pipe)
    assert np.array_equal(images(pipe), before)


def test_threads_intervene_each_for_itself(tmp_path):
    """On two pipelines that share a denoiser; one thread does not intervene at all."""
    model = with_head("unet")
    pipes = [
        quiet(DDIMPipeline(model.base.model, copy.deepcopy(model.base.scheduler))) for _ in range(3)
    ]
    for pipe in pipes:
        attach(pipe, model)

    def make(number):
        if number == 2:
            return images(pipes[2])
        with intervene(pipes[number], "ab"[number], generator=generator()):
            return images(pipes[number])

    expected, interval = [make(number) for number in range(3)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(3) as pool:
            found = [list(pool.map(make, range(3))) for _ in range(3)]
    finally:
        sys.setswitchinterval(interval)
    for round in found:
        for made, same in zip(round, expected):
            np.testing.assert_allclose(made, same, rtol=0, atol=1e-5)
    assert (
        abs(expected[0] - expected[1]).max() > 1e-3 and abs(expected[0] - expected[2]).max() > 1e-3
    )


def test_a_copy_made_while_intervening_is_not_intervened_on(tmp_path):
    pipe, model = pipeline("ddim", tmp_path)
    attach(pipe, model)
    plain = images(pipe)
    with intervene(pipe, "a", generator=generator()):
        images(pipe)
        copied = quiet(DDIMPipeline(copy.deepcopy(pipe.unet), copy.deepcopy(pipe.scheduler)))
    np.testing.assert_array_equal(images(copied), plain)
    with intervene(pipe, "a", generator=generator()):
        assert abs(images(pipe) - plain).max() > 1e-3
        np.testing.assert_array_equal(images(copied), plain)
