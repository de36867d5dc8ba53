"""Whose calls a head acts in, and for which images: threads, tasks, shared denoisers, any order of
contexts, interrupted calls."""

import asyncio
import contextlib
import copy
import inspect
from concurrent.futures import ThreadPoolExecutor

import diffusers
import pipelines
import pytest
import torch
from conftest import generator
from PIL import Image

from hf_intervene import attach, detach, intervene
from hf_intervene.acting import denoisers
from hf_intervene.training.benchmarks.tools import HostWaits


NOISE = torch.randn(2, 3, 4, generator=generator(5))


def made(kind="sd"):
    pipe = pipelines.make(kind)
    head, adapter = pipelines.head_for(pipe)
    attach(pipe, head, adapter)
    return pipe


def generate(pipe, num_images=2, kind="sd", **options):
    return pipelines.result(pipe(**pipelines.call(kind, num_images, **options)))


def under(pipe, interventions, **options):
    with intervene(pipe, interventions, noise=NOISE, **options):
        return generate(pipe)


class Draws:
    """The noise z that a pipeline's head is given, call by call."""

    def __init__(self, pipe, name="default"):
        self.z, self.head = [], pipe._attached_heads.attached[name].head
        self.forward = self.head.forward
        self.head.forward = self.keep

    def keep(self, z, *rest):
        self.z.append(z)
        return self.forward(z, *rest)


# Contexts


def test_contexts_left_in_any_order():
    pipe = made()
    plain, b = generate(pipe), under(pipe, "b")
    first, second = (intervene(pipe, name, noise=NOISE) for name in "ab")
    first.__enter__()
    second.__enter__()
    assert torch.equal(generate(pipe), b)
    first.acted = True  # no warning: that is another test's
    first.__exit__(None, None, None)
    assert torch.equal(generate(pipe), b)
    second.__exit__(None, None, None)
    assert torch.equal(generate(pipe), plain)


def test_a_context_entered_twice_is_left_twice():
    pipe = made()
    plain, a = generate(pipe), under(pipe, "a")
    context = intervene(pipe, "a", noise=NOISE)
    with context:
        with context:
            assert torch.equal(generate(pipe), a)
        assert torch.equal(generate(pipe), a)
    assert torch.equal(generate(pipe), plain)


def test_four_contexts_of_which_the_inner_ones_end_first_and_last():
    pipe = made()
    plain, a = generate(pipe), under(pipe, "a")
    contexts = [intervene(pipe, name, noise=NOISE) for name in "abab"]
    for context in contexts:
        context.__enter__()
        context.acted = True  # no warning: that is another test's
    for left in (1, 3, 0):
        contexts[left].__exit__(None, None, None)
        assert torch.equal(generate(pipe), a) or left == 1
    contexts[2].__exit__(None, None, None)
    assert torch.equal(generate(pipe), plain)


def test_a_context_that_a_generator_holds():
    """It acts as long as the generator is not closed, as `with` does."""
    pipe = made()
    plain, b = generate(pipe), under(pipe, "b")

    def requests():
        with intervene(pipe, "b", noise=NOISE):
            yield generate(pipe)
            yield generate(pipe)

    held = requests()
    assert torch.equal(next(held), b) and torch.equal(generate(pipe), b)
    held.close()
    assert torch.equal(generate(pipe), plain)


def test_a_context_is_used_again():
    pipe = made()
    plain, a = generate(pipe), under(pipe, "a")
    context = intervene(pipe, "a", noise=NOISE)
    for _ in range(2):
        with context:
            assert torch.equal(generate(pipe), a)
        assert torch.equal(generate(pipe), plain)


def test_overlapping_tasks():
    pipe = made()
    expected = {name: under(pipe, name) for name in "ab"}
    plain, found = generate(pipe), {}

    async def request(name, wait):
        with intervene(pipe, name, noise=NOISE):
            await asyncio.sleep(wait)
            found[name] = await asyncio.to_thread(generate, pipe) if name == "a" else generate(pipe)

    async def both():
        await asyncio.gather(request("a", 0.05), request("b", 0.02))

    asyncio.run(both())
    assert all(torch.equal(found[name], expected[name]) for name in "ab")
    assert torch.equal(generate(pipe), plain)


def test_a_context_of_a_head_that_was_detached():
    pipe = made()
    context, hooks = (
        intervene(pipe, "a"),
        [len(m._forward_hooks) for m in pipelines.make("sd").unet.modules()],
    )
    detach(pipe)
    with pytest.raises(ValueError, match="the head 'default' was detached from this pipeline"):
        with context:
            pass
    assert [len(module._forward_hooks) for module in pipe.unet.modules()] == hooks


def test_detached_inside_a_context():
    pipe = made()
    with intervene(pipe, "a", noise=NOISE):
        generate(pipe)
        detach(pipe)
        assert torch.equal(generate(pipe), generate(pipelines.make("sd")))
    assert torch.equal(generate(pipe), generate(pipelines.make("sd")))


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_detached_in_the_middle_of_a_call(kind):
    pipe = made(kind)
    plain = generate(pipe, kind=kind)

    def leave(pipe, step, t, kwargs):
        if step == 0:
            detach(pipe)
        return kwargs

    with intervene(pipe, "a", noise=NOISE):
        a = generate(pipe, kind=kind)
        half = generate(pipe, kind=kind, callback_on_step_end=leave)
    assert (half - a).abs().max() > 1e-4 and (half - plain).abs().max() > 1e-4
    assert torch.equal(generate(pipe, kind=kind), plain)
    denoiser = next(iter(denoisers(pipe).values()))
    assert not any(module._forward_hooks for module in denoiser.modules())


def test_a_context_in_which_nothing_happens_says_so():
    pipe = made()
    with pytest.warns(UserWarning, match="was not called inside `with intervene"):
        with intervene(pipe, "a"):
            pipe.unet(torch.zeros(1, 4, 8, 8), 1, torch.zeros(1, 5, 12))


# Pipelines and denoisers


def test_only_the_named_pipeline_is_intervened_on():
    pipe = made()
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline
    same = type(pipe).from_pipe(pipe)  # of the class that an attached pipeline has

    def edit():
        call = pipelines.call("sd") | {"image": Image.new("RGB", (16, 16), (90, 30, 60))}
        return other(**{k: v for k, v in call.items() if k not in ("height", "width")}).images

    plain, edited = generate(pipe), edit()
    with intervene(pipe, "a", noise=NOISE):
        generate(pipe)
        assert torch.equal(edit(), edited) and torch.equal(generate(same), plain)
    with ThreadPoolExecutor(1) as pool, intervene(pipe, "a", noise=NOISE):
        generate(pipe)
        assert torch.equal(pool.submit(edit).result(), edited)


def test_heads_of_two_pipelines_on_one_denoiser():
    pipe = made()
    other = diffusers.StableDiffusionPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    attach(other, *pipelines.head_for(other, seed=1))
    plain, a, b = generate(pipe), under(pipe, "a"), under(other, "b")
    assert not torch.equal(a, b)
    with intervene(pipe, "a", noise=NOISE), intervene(other, "b", noise=NOISE):
        assert torch.equal(generate(pipe), a) and torch.equal(generate(other), b)
    detach(pipe)  # takes its own hooks only, and the scheduler is the other's too
    assert torch.equal(under(other, "b"), b) and torch.equal(generate(pipe), plain)
    detach(other)
    assert torch.equal(generate(other), plain) and "step" not in vars(pipe.scheduler)


def test_threads_on_one_denoiser():
    pipe = made()
    pipes = [pipe]
    for _ in range(2):
        other = diffusers.StableDiffusionPipeline(
            **pipe.components | {"scheduler": diffusers.DDIMScheduler(clip_sample=False)}
        )
        other.set_progress_bar_config(disable=True)
        pipes.append(other)
    attach(pipes[1], *pipelines.head_for(pipe))
    work = [
        lambda: under(pipes[0], "a"),
        lambda: under(pipes[1], "b", guidance_scale=2.0),
        lambda: generate(pipes[2]),
    ]
    expected = [job() for job in work]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            for found, wanted in zip(pool.map(lambda job: job(), work), expected):
                torch.testing.assert_close(found, wanted)


def test_a_replaced_denoiser_is_noticed():
    pipe = made()
    before, a = pipe.unet, under(pipe, "a")
    plain = generate(pipe)
    pipe.unet = pipelines.make("sd", seed=3).unet
    expected = pipelines.make("sd")
    expected.unet = pipelines.make("sd", seed=3).unet
    attach(expected, *pipelines.head_for(expected))
    assert torch.equal(under(pipe, "a"), under(expected, "a"))
    # the one before is left alone
    assert not any(module._forward_hooks for module in before.modules())
    pipe.unet = before
    assert torch.equal(under(pipe, "a"), a) and torch.equal(generate(pipe), plain)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(before.config, cross_attention_dim=20)
    with pytest.raises(ValueError, match="the head was trained for another denoiser"):
        under(pipe, "a")


def test_inside_a_callback_another_scheduler_is_checked_at_the_next_call():
    pipe = made()
    with intervene(pipe, "a", noise=NOISE):
        generate(pipe)
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ValueError, match="takes the denoiser's for 'flow'"):
            generate(pipe)


# Images


def test_prompts_and_images_per_prompt():
    """Images are counted in the order in which the pipeline returns them: all of the first prompt,
    then all of the second."""
    pipe = made()
    noise = torch.randn(4, 3, 4, generator=generator())

    def make(interventions):
        with intervene(pipe, interventions, noise=noise):
            return generate(pipe, num_images_per_prompt=2)

    mixed, a, b = make([["a"], ["b"], ["b"], ["a"]]), make("a"), make("b")
    for row, expected in enumerate((a, b, b, a)):
        torch.testing.assert_close(mixed[row], expected[row], rtol=1e-4, atol=1e-4)
    assert min((a[row] - b[row]).abs().max() for row in range(4)) > 1e-3


@pytest.mark.parametrize(
    "images, per_prompt, contexts", [(1, 1, 2), (2, 2, 2), (2, 2, 8), (2, 1, 1), (2, 1, 4)]
)
def test_wrong_numbers_of_contexts(images, per_prompt, contexts):
    pipe = made()
    plain = generate(pipe, images)
    made_here = images * per_prompt
    with pytest.raises(
        ValueError,
        match=f"interventions are for {contexts} images?, but this call makes {made_here}",
    ):
        with intervene(pipe, [["a"]] * contexts):
            generate(pipe, images, num_images_per_prompt=per_prompt)
    assert torch.equal(generate(pipe, images), plain)


@pytest.mark.parametrize(
    "options",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.5},
        {"latents": torch.zeros(2, 4, 8, 8)},
        {"seeds": (0, 1)},
    ],
)
def test_images_are_counted_whatever_the_call_is_given(options):
    pipe = made()

    def make(interventions):
        given = dict(options)
        if "seeds" in given:
            given["generator"] = [generator(seed) for seed in given.pop("seeds")]
        with intervene(pipe, interventions, noise=NOISE):
            return generate(pipe, **given)

    mixed, a, b = make([["a"], ["b"]]), make("a"), make("b")
    torch.testing.assert_close(mixed, torch.stack([a[0], b[1]]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="are for 3 images, but this call makes 2"):
        with intervene(pipe, [["a"], ["b"], ["a"]]):
            generate(pipe)


@pytest.mark.parametrize("rows", [1, 2])
def test_wrong_numbers_of_noise(rows):
    pipe = made()
    with pytest.raises(ValueError, match=f"the noise is for {rows} images?, but this call makes 4"):
        with intervene(pipe, "a", noise=NOISE[:rows]):
            generate(pipe, num_images_per_prompt=2)
    with pytest.raises(ValueError, match="2 generators were given for 4 samples"):
        with intervene(pipe, "a", generator=[generator(), generator()]):
            generate(pipe, num_images_per_prompt=2)


@pytest.mark.parametrize("images", [1, 2])
def test_skipped_layers_of_sd3(images):
    """Its guidance by skipped layers calls the transformer once more with half the rows."""
    pipe = made("sd3")
    draws = Draws(pipe)
    plain = generate(pipe, images, "sd3", skip_guidance_layers=[1], num_inference_steps=4)
    with intervene(pipe, "a"):
        acted = generate(pipe, images, "sd3", skip_guidance_layers=[1], num_inference_steps=4)
    assert len(draws.z) == 1 and len(draws.z[0]) == images and (acted - plain).abs().max() > 1e-3


def test_guidance_that_stops_half_way():
    pipe = made()
    draws = Draws(pipe)

    def stop(pipe, step, t, kwargs):
        if step == 1:
            pipe._guidance_scale = 1.0
            kwargs["prompt_embeds"] = kwargs["prompt_embeds"].chunk(2)[-1]
        return kwargs

    with intervene(pipe, "a"):
        generate(
            pipe,
            num_inference_steps=4,
            callback_on_step_end=stop,
            callback_on_step_end_tensor_inputs=["prompt_embeds"],
        )
    assert len(draws.z) == 1


def test_calls_of_one_step_interrupted_calls_and_failed_calls_draw_anew():
    pipe = made()
    draws = Draws(pipe)

    def interrupt(pipe, step, t, kwargs):
        pipe._interrupt = True
        return kwargs

    def fail(*_):
        raise KeyboardInterrupt

    with intervene(pipe, "a"):
        for _ in range(3):
            generate(pipe, num_inference_steps=1)
        generate(pipe, callback_on_step_end=interrupt)
        with contextlib.suppress(KeyboardInterrupt):
            generate(pipe, callback_on_step_end=fail)
        generate(pipe)
    assert len(draws.z) == 6 and len(torch.cat(draws.z).unique(dim=0)) == 12


def pixels():
    """A denoiser of pixels."""
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.parametrize("seeds", [(0, 1), (0, 0)])
def test_a_list_of_generators_without_guidance(seeds):
    """DDIM without text has no guidance: as many images as rows, also where all begin with the same
    noise."""
    pipe = diffusers.DDIMPipeline(pixels(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    attach(pipe, *pipelines.head_for(pipe))
    draws = Draws(pipe)
    with intervene(pipe, "a"):
        pipe(batch_size=2, generator=[generator(seed) for seed in seeds], num_inference_steps=2)
    assert len(draws.z) == 1 and len(draws.z[0].unique(dim=0)) == 2


def test_images_that_begin_with_the_same_noise():
    pipe = made()
    draws = Draws(pipe)
    with intervene(pipe, [["a"], ["b"]], noise=NOISE):
        generate(
            pipe,
            latents=torch.randn(1, 4, 8, 8, generator=generator())
            .expand(2, -1, -1, -1)
            .contiguous(),
        )
    assert len(draws.z[0]) == 2


def test_rows_that_cannot_be_told_apart_are_refused():
    pipe = made()
    with intervene(pipe, "a"):
        generate(pipe)

    def halves(module, args, kwargs):
        return (torch.cat([args[0], args[0] + 1])[:3], *args[1:]), kwargs

    pipe.unet.register_forward_pre_hook(halves, with_kwargs=True, prepend=True)
    with pytest.raises(ValueError, match="makes 2 images and calls its denoiser with 3 rows"):
        with intervene(pipe, "a"):
            generate(pipe)


def test_the_user_knows_better():
    """A pipeline of one's own that steps both halves of its guidance, and says nothing of images."""  # noqa: E501
    pipe = diffusers.DDIMPipeline(pixels(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    attach(pipe, *pipelines.head_for(pipe))
    draws = Draws(pipe)
    call = {"batch_size": 4, "num_inference_steps": 2}

    def twice(module, args, kwargs):
        return (torch.cat([args[0][:2], args[0][:2]]), *args[1:]), kwargs

    pipe.unet.register_forward_pre_hook(twice, with_kwargs=True, prepend=True)
    with intervene(pipe, [["a"], ["b"]], num_images=2):
        pipe(**call)
    assert draws.z[0].shape[0] == 2
    with pytest.raises(
        ValueError, match="the interventions are for 2 images, but this call makes 4"
    ):
        with intervene(pipe, [["a"], ["b"]]):
            pipe(**call)


def test_the_scheduler_has_the_last_word():
    pipe = made()
    step = pipe.scheduler.step

    def fewer(prediction, t, sample, **options):
        return step(prediction[:1], t, sample[:1], **options)

    pipe.scheduler.step = fewer
    with pytest.raises(ValueError, match="seemed to make 2 images, but its scheduler steps 1"):
        with intervene(pipe, "a"):
            generate(pipe)


# The scheduler, modes and arguments


@pytest.mark.parametrize(
    "name",
    [
        "EDMEulerScheduler",
        "CMStochasticIterativeScheduler",
        "SCMScheduler",
        "KarrasVeScheduler",
        "IPNDMScheduler",
    ],
)
def test_schedulers_that_are_not_known_are_refused(name):
    pipe = pipelines.make("sd")
    head, adapter = pipelines.head_for(pipe)
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(
        ValueError, match=f"a {name} has a noise that is not known here: use one that is in the"
    ):
        attach(pipe, head, adapter)


def test_a_scheduler_of_ones_own_by_its_parent():
    class Mine(diffusers.DDIMScheduler):
        pass

    pipe = pipelines.make("sd")
    pipe.scheduler = Mine(clip_sample=False)
    attach(pipe, *pipelines.head_for(pipe))
    under(pipe, "a")


def test_modes_stay_as_they_are():
    pipe = pipelines.make("sd")
    head, adapter = pipelines.head_for(pipe)
    head.train()
    adapter.train()
    head.unpool.eval()
    modes = [module.training for part in (head, adapter) for module in part.modules()]
    assert any(modes) and not all(modes)
    attach(pipe, head, adapter)
    trained = under(pipe, "a")
    detach(pipe)
    assert [module.training for part in (head, adapter) for module in part.modules()] == modes
    attach(pipe, head.eval(), adapter.eval())
    assert torch.equal(under(pipe, "a"), trained)


@pytest.mark.parametrize("weight", ["0.5", None, float("nan"), True])
def test_a_weight_is_a_number(weight):
    pipe = pipelines.make("sd")
    with pytest.raises(TypeError, match="weight must be a finite number"):
        attach(pipe, *pipelines.head_for(pipe), weight=weight)


def test_a_pipeline_without_a_site():
    pipe = pipelines.make("sd")
    head, adapter = pipelines.head_for(pipe)
    pipe.unet = diffusers.AutoencoderTiny()
    with pytest.raises(TypeError, match="a AutoencoderTiny has no site that a head can enter by"):
        attach(pipe, head, adapter)
    assert type(pipe) is diffusers.StableDiffusionPipeline and not hasattr(pipe, "_attached_heads")


def test_a_head_that_does_not_reach_the_output():
    """Verified once, in the first step."""
    pipe = pipelines.make("flux")
    head, adapter = pipelines.head_for(pipe)
    pipe.transformer.register_forward_hook(
        lambda module, args, output: (torch.zeros_like(output[0]),)
    )
    attach(pipe, head, adapter)
    with pytest.raises(
        ValueError, match="does not change its prediction: a head has no effect on it"
    ):
        with intervene(pipe, "a"):
            generate(pipe, kind="flux")
    assert torch.isfinite(generate(pipe, kind="flux")).all()


@pytest.mark.parametrize("kind", ["sd", "flux", "z-image"])
def test_nothing_waits_for_the_device_in_a_step(kind):
    """The rows of a batch are compared once in a call. Steps add nothing to what the pipeline does."""  # noqa: E501
    pipe = made(kind)
    options = {"noise": NOISE, "guidance_scale": 2.0, "compose": "scores"}

    def waits(steps, act):
        context = intervene(pipe, ["a", "b"], **options) if act else contextlib.nullcontext()
        with context, HostWaits() as counted:
            generate(pipe, kind=kind, num_inference_steps=steps)
        return counted.count

    waits(2, True)
    few, many = (waits(steps, True) - waits(steps, False) for steps in (2, 8))
    assert 0 < few == many


def test_blocks_that_were_compiled_alone():
    """`compile_repeated_blocks` compiles what is around the sites of some denoisers."""
    pipe = pipelines.make("sd")
    plain = generate(pipe)
    attach(pipe, *pipelines.head_for(pipe))
    expected = under(pipe, "a")
    detach(pipe)
    pipe.unet.down_blocks[0].attentions[0].compile(backend="eager")
    torch.testing.assert_close(generate(pipe), plain, rtol=1e-4, atol=1e-4)
    attach(pipe, *pipelines.head_for(pipe))
    torch.testing.assert_close(under(pipe, "a"), expected, rtol=1e-4, atol=1e-4)
    detach(pipe)
    torch.testing.assert_close(generate(pipe), plain, rtol=1e-4, atol=1e-4)


def test_an_attached_pipeline_is_saved_and_turned_into_others_as_before(tmp_path):
    pipe = made()
    names = sorted(vars(pipelines.make("sd")))
    pipe.register_modules(
        **{k: v for k, v in pipe.components.items() if k in ("unet", "vae", "scheduler")}
    )
    assert sorted(set(vars(pipe)) - set(names)) == [
        "_attached_heads",
        "_call_watcher",
        "_unwatched_class",
    ]
    assert (
        repr(pipe).startswith("StableDiffusionPipeline")
        and type(pipe).__name__ == "StableDiffusionPipeline"
    )
    other = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other) is diffusers.StableDiffusionImg2ImgPipeline
    pipe.unet.save_pretrained(tmp_path)
    assert isinstance(pipe, diffusers.StableDiffusionPipeline)
    plain = diffusers.StableDiffusionPipeline
    assert inspect.signature(type(pipe).__call__) == inspect.signature(plain.__call__)
    assert inspect.signature(pipe.scheduler.step) == inspect.signature(
        diffusers.DDIMScheduler().step
    )
    detach(pipe)
    assert type(pipe) is plain and sorted(vars(pipe)) == names


@pytest.mark.parametrize(
    "order", ["compiled first", pytest.param("attached first", marks=pytest.mark.slow)]
)
def test_denoisers_that_were_compiled_in_place(order):
    """`module.compile(fullgraph=True)`: hooks of the module would break its graph."""
    expected = made("flux")

    def acted(pipe, kind="flux"):
        with intervene(pipe, "a", noise=NOISE, guidance_scale=2.0):
            return generate(pipe, kind=kind)

    plain, a = generate(expected, kind="flux"), acted(expected)
    pipe = pipelines.make("flux")
    if order == "compiled first":
        pipe.transformer.compile(backend="eager", fullgraph=True)
        generate(pipe, kind="flux")
    attach(pipe, *pipelines.head_for(pipe))
    if order == "attached first":
        acted(pipe)
        pipe.transformer.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(acted(pipe), a, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(generate(pipe, kind="flux"), plain, rtol=1e-3, atol=1e-3)
    copied = copy.deepcopy(pipe)  # what was compiled does not go along
    torch.testing.assert_close(acted(copied), a, rtol=1e-3, atol=1e-3)
    other = diffusers.FluxPipeline(**pipe.components)
    other.set_progress_bar_config(disable=True)
    attach(other, *pipelines.head_for(other))
    detach(pipe)  # of two around the compiled call the inner one goes
    torch.testing.assert_close(acted(other), a, rtol=1e-3, atol=1e-3)
    detach(other)
    assert "_CompiledCall" not in repr(pipe.transformer._compiled_call_impl)
    torch.testing.assert_close(generate(pipe, kind="flux"), plain, rtol=1e-3, atol=1e-3)


def test_caches_of_a_denoiser_are_not_mistaken():
    pipe = made("flux")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.0))
    acting = []
    pipe.transformer.register_forward_hook(lambda *_: acting.append(1))
    with intervene(pipe, "a", noise=NOISE):
        found = generate(pipe, kind="flux")
    assert len(acting) == 6  # two in each of three steps: none of our own
    with pytest.raises(ValueError, match="call the transformer more than once in a step"):
        with intervene(pipe, "a", noise=NOISE, guidance_scale=2.0):
            generate(pipe, kind="flux")
    pipe.transformer.disable_cache()
    with intervene(pipe, "a", noise=NOISE):
        torch.testing.assert_close(generate(pipe, kind="flux"), found, rtol=1e-3, atol=1e-3)
