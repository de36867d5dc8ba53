"""`InterventionPipeline` as diffusers' pipelines are used: offloading, `from_pipe`, `to`, other
parts, composed scores."""

import copy
import pickle

import diffusers
import pytest
import torch
from conftest import generator
from diffusion_models import with_head

from hf_intervene import InterventionModel, InterventionPipeline, LightVAE, wrap_base
from hf_intervene.bases.denoising import Start, follow


KINDS = ("unet", "conditional", "sd3", "light")


def made(kind):
    if kind == "light":
        torch.manual_seed(0)
        base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
        return InterventionPipeline.from_model(
            InterventionModel.build(base, ["a", "b"], noise_width=4, initializer_range=0.5)
        )
    return InterventionPipeline.from_model(with_head(kind))


def sample(pipe, **options):
    call = {
        "num_images": 2,
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": generator(),
    }
    return pipe(["a", "b"], **call | options).images


def edit(pipe):
    images = torch.rand(1, 3, 16, 16, generator=generator(2))
    return pipe.edit(images, "a", num_inference_steps=2, output_type="pt").images


def offload(pipe, how, tmp_path):
    if how == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    elif how == "group":
        pipe.enable_group_offload(torch.device("cpu"), torch.device("cpu"), "leaf_level")
    else:
        pipe.enable_group_offload(
            torch.device("cpu"),
            offload_type="block_level",
            num_blocks_per_group=1,
            offload_to_disk_path=str(tmp_path),
            exclude_modules="vae",
        )


@pytest.mark.parametrize("how", ["model", "group", "disk"])
@pytest.mark.parametrize("kind", KINDS)
def test_offloading(kind, how, tmp_path):
    """On the CPU as the device: which parts are brought back is tested, not that two devices
    meet."""
    pipe = made(kind)
    expected = sample(pipe), edit(pipe)
    offload(pipe, how, tmp_path)
    for _ in range(2):  # after the first call everything is put away again
        torch.testing.assert_close(sample(pipe), expected[0], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(edit(pipe), expected[1], rtol=1e-3, atol=1e-4)
    if kind != "light":  # all of it stays on the device
        assert pipe.model.execution_device == pipe._execution_device


def test_offloaded_parts_are_put_away_after_each_call(monkeypatch):
    pipe = made("conditional")
    pipe.enable_model_cpu_offload(device="cpu")
    away = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: away.append(True))
    sample(pipe)
    edit(pipe)
    assert len(away) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_from_pipe_shares_the_parts(kind):
    pipe = made(kind)
    expected = sample(pipe)
    other = InterventionPipeline.from_pipe(pipe)
    assert other is not pipe and all(
        other.components[name] is part for name, part in pipe.components.items()
    )
    assert torch.equal(sample(other), expected)
    if kind == "unet":
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
        swapped = InterventionPipeline.from_pipe(pipe, scheduler=scheduler)
        assert swapped.scheduler is scheduler
        # Of few steps both start at the last one, which is the same.
        assert not torch.equal(
            *(sample(each, num_inference_steps=8) for each in (swapped, pipe)),
        )
    assert torch.equal(sample(pipe), expected)
    half = InterventionPipeline.from_pipe(copy.deepcopy(pipe), torch_dtype=torch.float64)
    assert half.head.dtype == half.base.dtype == torch.float64


def test_from_pipe_of_another_kind():
    model = with_head("unet")
    other = diffusers.DDPMPipeline(model.base.model, model.base.scheduler)
    with pytest.raises(
        TypeError, match="from_pipe needs an InterventionPipeline, not a DDPMPipeline"
    ):
        InterventionPipeline.from_pipe(other)


def test_calls_leave_no_hooks_behind():
    pipe = made("conditional")

    def hooks():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pipe.base.modules())

    before = hooks()
    for _ in range(3):
        sample(pipe)
    assert hooks() == before
    # a model of other parts
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    sample(pipe)
    assert hooks() == before


def test_to_moves_what_is_computed_with():
    pipe = made("conditional")
    expected = sample(pipe)
    model = pipe.model
    assert model.execution_device is None and model.device == torch.device("cpu")
    pipe.to(torch.float64)
    assert pipe.model is model and {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(sample(pipe).float(), expected, rtol=1e-3, atol=1e-3)


# Composed scores


@pytest.mark.parametrize("w", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["unet", "sd3"])
def test_composed_scores_are_the_sum_of_what_each_concept_changes(kind, w):
    pipe = made(kind)
    model, base = pipe.model, pipe.model.base
    z, x = (
        torch.randn(2, 3, 4, generator=generator()),
        torch.randn(2, *base.sample_shape, generator=generator(1)),
    )
    o, a, b = (model.embed(z, model.targets(s, 2)) for s in ("obs", {"a": 0.5}, "b"))

    @torch.no_grad()
    def predict(x, t):
        plain = base.denoise(x, t, o)
        return plain + w * (base.denoise(x, t, a) - plain) + w * (base.denoise(x, t, b) - plain)

    with torch.no_grad():
        o_mean, a_mean, b_mean = (base.adapter.decode(e) for e in (o, a, b))
        mean = a_mean + b_mean - o_mean
        spread = base.adapter.log_variance.exp().sqrt()
        start = Start(mean, base.adapter.config.start, spread)
        x0 = follow(predict, base.scheduler, x, 6, start)
        expected = (base._to_images(x0) / 2 + 0.5).clamp(0, 1)
    call = {"noise": z, "num_inference_steps": 6, "guidance_scale": w, "output_type": "pt"}
    found = model.predict(
        z, x, {"a": 0.5, "b": 1.0}, num_inference_steps=6, guidance_scale=w, compose="scores"
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    together = sample(pipe, **call, residual_noise=x)
    scores = sample(pipe, **call, residual_noise=x, compose="scores")
    assert (together - scores).abs().max() > 1e-3
    alone = pipe("a", num_images=2, residual_noise=x, **call, compose="scores").images
    torch.testing.assert_close(
        alone, pipe("a", num_images=2, residual_noise=x, **call).images, rtol=1e-3, atol=1e-3
    )


def test_each_row_has_its_own_concepts():
    pipe = made("unet")
    z = torch.randn(2, 3, 4, generator=generator())
    x = torch.randn(2, 3, 16, 16, generator=generator(1))
    call = {
        "noise": z,
        "residual_noise": x,
        "num_inference_steps": 2,
        "output_type": "pt",
        "compose": "scores",
    }
    mixed, a, b = (pipe(s, num_images=2, **call).images for s in ([["a"], "b"], "a", "b"))
    torch.testing.assert_close(mixed[0], a[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[1], b[1], rtol=1e-4, atol=1e-4)


def test_one_sentence_for_a_composition_that_is_not_there():
    with pytest.raises(ValueError, match="compose must be one of head, scores, not 'sum'"):
        sample(made("unet"), compose="sum")
    with pytest.raises(
        ValueError, match="compose='scores' is for denoisers; a LightVAE has no scores"
    ):
        sample(made("light"), compose="scores")


def test_images_to_edit_are_named_as_in_diffusers(tmp_path):
    """`image=`: PIL images, names of files, lists of either; the former names still work."""
    pipe = made("light")
    model = pipe.model
    pictures = pipe("obs", 2, torch.Generator().manual_seed(0)).images
    files = [tmp_path / f"{number}.png" for number in range(2)]
    for file, picture in zip(files, pictures):
        picture.save(file)
    expected = pipe.edit(pictures, "a", output_type="pt").images
    for given in (pictures, files, list(map(str, files)), (pictures[0], files[1])):
        assert torch.equal(
            pipe.edit(image=given, interventions="a", output_type="pt").images, expected
        )
    one = pipe.edit(image=str(files[0]), interventions="a", output_type="pt").images
    torch.testing.assert_close(one, expected[:1])
    torch.testing.assert_close(model.reconstruct(files[0]), model.reconstruct(pictures[0]))
    with pytest.warns(FutureWarning, match="images is called image now"):
        former = pipe.edit(images=pictures, interventions="a", output_type="pt").images
    assert torch.equal(former, expected)
    with pytest.warns(FutureWarning, match="num_samples is called num_images now"):
        assert len(model.sample("a", num_samples=3)) == 3
    with pytest.raises(FileNotFoundError, match="there is no file"):
        pipe.edit(tmp_path / "none.png", "a")
    with pytest.raises(TypeError, match="unexpected keyword argument 'picture'"):
        pipe.edit(picture=pictures, interventions="a")


def test_a_denoiser_is_built_with_its_scheduler():
    unet = with_head("unet").base.model
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    model = InterventionModel.build(unet, concepts=["a"], scheduler=scheduler)
    assert model.base.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    with pytest.raises(ValueError, match="pass scheduler="):
        InterventionModel.build(with_head("unet").base.model, concepts=["a"])
    for base in (made("light").base, wrap_base(made("light").base)):
        with pytest.raises(ValueError, match="takes no scheduler: leave it out"):
            InterventionModel.build(base, concepts=["a"], scheduler=scheduler)


@pytest.mark.parametrize("kind", ["unet", "conditional", "light"])
def test_a_pipeline_is_pickled(kind):
    """As for another process; what enters in calls of the original stays there."""
    pipe = made(kind)
    expected = sample(pipe)
    copied = pickle.loads(pickle.dumps(pipe.model))
    for _ in range(2):
        found = copied.sample(["a", "b"], 2, generator(), num_inference_steps=2)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(sample(pipe), expected)


@pytest.mark.parametrize("kind", ["unet", "light"])
def test_pickle_files_are_not_written(kind, tmp_path):
    """They would not be loaded again."""
    pipe = made(kind)
    for saved in (pipe, pipe.model):
        with pytest.raises(ValueError, match="would write pickle files, which are never loaded"):
            saved.save_pretrained(tmp_path / "x", safe_serialization=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", ["unet", "light"])
@pytest.mark.parametrize("options", [{"variant": "fp16"}, {"max_shard_size": "1KB"}])
def test_pipelines_are_saved_as_in_diffusers(kind, options, tmp_path):
    pipe = made(kind)
    pipe.save_pretrained(tmp_path, **options)
    loaded = InterventionPipeline.from_pretrained(tmp_path, variant=options.get("variant"))
    assert torch.equal(sample(loaded), sample(pipe))


@pytest.mark.parametrize("part", ["base", "head"])
def test_a_compiled_copy_is_refused_and_one_in_place_is_not(part):
    pipe = made("unet")
    expected, own = sample(pipe), getattr(pipe, part)
    setattr(pipe, part, torch.compile(own, backend="eager"))
    name = type(own).__name__
    with pytest.raises(TypeError, match=f"copy of a {name}, .*: compile it in place"):
        sample(pipe)
    setattr(pipe, part, own)
    own.compile(backend="eager")
    assert torch.equal(sample(pipe), expected)
