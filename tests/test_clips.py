"""Heads on pipelines that make clips, and on the two denoisers of Wan 2.2: recorded, trained,
sampled, edited, saved and loaded.
"""

import diffusers
import numpy as np
import pipelines
import pytest
import recorded
import torch
import yaml
from diffusion_models import stable_diffusion
from diffusion_models import with_head as diffusion_head
from PIL import Image
from runs import error_of, options
from test_recording import generator, with_head

from hf_intervene import (
    InterventionModel,
    InterventionPipeline,
    attach,
    cli,
    detach,
    evaluation,
    intervene,
    trainer,
)
from hf_intervene.bases import PipelineBase
from hf_intervene.bases.autoencoder import latents_of
from hf_intervene.data import ContextImages, load_contexts
from hf_intervene.objective import Objective
from hf_intervene.terms import GroupLasso


STEPS = {"num_inference_steps": 2}
FRAMES = {"wan-video": 5, "ltx": 9, "cogvideox": 9}


def base(kind, **options):
    pipe, call = recorded.pipeline(kind)
    return PipelineBase.from_pipeline(pipe, call=call, **options)


def clips(base, number=2, seed=1):
    return torch.rand(number, *base.image_shape, generator=generator(seed))


@pytest.mark.parametrize("kind", FRAMES)
def test_a_head_is_trained_on_clips(kind, tmp_path):
    made = base(kind, num_frames=FRAMES[kind])
    size = made.image_shape[-1]
    assert made.image_shape == (3, FRAMES[kind], size, size)
    model, x = with_head(made), clips(made)
    objective = Objective(model, [GroupLasso(0.1)])
    targets = model.targets([["a"], ["b"]])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    draws, losses = objective.draws(2, generator()), []
    weights = {"group_lasso": torch.tensor(0.1)}
    for _ in range(3):
        loss = objective(targets, weights, pixel_values=x, **draws).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    model.eval()
    # x_0 is what the autoencoder makes of all frames.
    x0 = made.prepare(x)["x0"]
    own = latents_of(made.vae, 2 * x - 1)[0]
    assert own.ndim == 5
    torch.testing.assert_close(made.adapter.recorded.to_latents(x0), own, rtol=1e-4, atol=1e-4)
    sampled = model.sample("a", 2, generator(), **STEPS)
    assert sampled.shape == x.shape and 0 <= sampled.min() and sampled.max() <= 1
    other = model.sample("b", 2, generator(), **STEPS)
    assert (sampled - other).abs().max() > 1e-4
    edited = model.edit(x, "a", **STEPS)
    assert edited.shape == x.shape
    # As arrays and as pictures; and given as those.
    shape = (2, FRAMES[kind], size, size, 3)
    arrays = model.sample("a", 2, generator(), output_type="np", **STEPS)
    assert arrays.shape == shape
    pictures = model.sample("a", 2, generator(), output_type="pil", **STEPS)
    assert len(pictures) == 2 and len(pictures[0]) == FRAMES[kind]
    given = model.preprocess(pictures)
    torch.testing.assert_close(given, sampled, rtol=0, atol=1 / 255)
    torch.testing.assert_close(model.preprocess(arrays), sampled)
    assert torch.equal(model.preprocess(sampled), sampled)
    model.save_pretrained(tmp_path / "model")
    loaded = InterventionModel.from_pretrained(tmp_path / "model")
    assert loaded.base.image_shape == made.image_shape
    torch.testing.assert_close(loaded.sample("a", 2, generator(), **STEPS), sampled)
    InterventionPipeline.from_model(model).save_pretrained(tmp_path / "pipe")
    pipe = InterventionPipeline.from_pretrained(tmp_path / "pipe")
    again = pipe("a", 2, generator(), output_type="pt", **STEPS).images
    torch.testing.assert_close(again, sampled)


# Folders of clips


def write_clips(folder, contexts=("obs", "a"), number=8, frames=6, size=16):
    """Clips of `frames` frames in the form of GIFs, WebPs and folders of frames, in turns; what
    they are, uint8 (T, H, W, C), by context."""
    rng, written = np.random.default_rng(0), {}
    for context in contexts:
        written[context] = []
        (folder / context).mkdir(parents=True)
        for n in range(number):
            # Few colours, which a GIF keeps.
            array = 85 * rng.integers(0, 4, (frames, size, size, 3), dtype=np.uint8)
            images = [Image.fromarray(frame) for frame in array]
            target = folder / context / f"{n}"
            if n % 3 == 2:
                target.mkdir()
                for t, image in enumerate(images):
                    image.save(target / f"frame{t + 8}.png")  # frame8, frame9, frame10, ...
            else:
                more = {"save_all": True, "append_images": images[1:]}
                kind = ({"format": "GIF"}, {"format": "WEBP", "lossless": True})[n % 3]
                images[0].save(target.with_suffix((".gif", ".webp")[n % 3]), **kind, **more)
            written[context].append(array)
    return written


@pytest.mark.parametrize("cached", [False, True])
def test_folders_of_clips_are_read(tmp_path, cached):
    written = write_clips(tmp_path / "clips")
    data = load_contexts(tmp_path / "clips", frames=3)
    cache = {"cache_dir": tmp_path / "cache"} if cached else {}
    found = ContextImages.from_dataset(data, None, frames=3, **cache)
    assert found.image_shape == (3, 3, 16, 16) and len(found) == 16
    for context, clips in found.by_context().items():
        for clip, array in zip(clips, written[context]):
            np.testing.assert_array_equal(clip, array[[0, 2, 5]])  # the first to the last
    # Each is known by its file, or by all of its frames.
    assert len(set(found.fingerprints().tolist())) == 16
    train, validation = found.split(0.25)
    assert validation.images(torch.arange(2)).shape == (2, 3, 3, 16, 16)
    assert len(train) + len(validation) == 16
    if cached:  # and not taken for clips of other lengths
        again = ContextImages.from_dataset(data, None, frames=6, **cache)
        assert again.image_shape == (3, 6, 16, 16)
    # Without frames they are images, as before.
    assert len(load_contexts(tmp_path / "clips")) == 2 * (6 + 2 * 6)


def test_clips_that_cannot_be_read(tmp_path):
    write_clips(tmp_path / "clips")
    data = load_contexts(tmp_path / "clips", frames=7)
    with pytest.raises(ValueError, match="clip 0 .*0.gif.* of context 'a' has 6 frames, and 7 are"):
        ContextImages.from_dataset(data, None, frames=7)
    with pytest.raises(ValueError, match="holds lists of images: give frames"):
        ContextImages.from_dataset(data, None)
    (tmp_path / "clips" / "a" / "2" / "more.gif").write_bytes(
        (tmp_path / "clips" / "a" / "0.gif").read_bytes()
    )
    data = load_contexts(tmp_path / "clips", frames=7)
    only = data.select([row for row, item in enumerate(data.with_format(None)["context"])])
    with pytest.raises(ValueError, match="files with several frames each|has 6 frames"):
        ContextImages.from_dataset(only, None, frames=7)
    for wrong in (0, -1, "x"):
        with pytest.raises((ValueError, TypeError), match="frames must be"):
            ContextImages.from_dataset(data, None, frames=wrong)


def test_a_head_is_trained_on_a_folder_of_clips(tiny, tmp_path, capsys, monkeypatch):
    """From the folder to clips that the model makes, by commands alone."""
    write_clips(tmp_path / "clips", number=10)
    recorded.wan_with_text(tmp_path / "text").save_pretrained(tmp_path / "pipe")
    wanted = {"dataset": str(tmp_path / "clips"), "base": str(tmp_path / "pipe")}
    wanted |= {"frames": 5, "regime": "frozen", "max_steps": 2, "eval_every": 2, "sample_every": 2}
    config = tmp_path / "clips.yaml"
    config.write_text(yaml.safe_dump(tiny | wanted))
    assert trainer.main(["--config", str(config)]) == 0
    model = tmp_path / "run" / "model"
    assert InterventionModel.from_pretrained(model).base.image_shape == (3, 5, 16, 16)
    assert list((tmp_path / "run" / "samples").iterdir())
    few = ["--num-inference-steps", "2"]
    sample = ["sample", str(model), "--interventions", "a", "--num-images", "2", *few]
    edit = ["edit", str(model), str(tmp_path / "clips" / "obs" / "0.gif"), "--interventions", "a"]
    for words, output in ((sample, "a.gif"), (edit + few, "b.webp"), (sample, "several")):
        assert cli.main([*words, "--output", str(tmp_path / output)]) == 0
    for made in ("a.gif", "b.webp", "several/0000.png", "several/0001.png"):
        assert Image.open(tmp_path / made).n_frames == 5
    capsys.readouterr()
    assert cli.main([*sample, "--output", str(tmp_path / "a.jpg")]) == 1
    assert "cannot hold a clip" in capsys.readouterr().err
    measure = ["--model", str(model), "--output", str(tmp_path / "metrics")]
    measure += ["--dataset", str(tmp_path / "clips")]
    assert evaluation.command.main(measure) == 1
    assert "makes clips, and images are measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": "light-vae"}, "a light VAE takes images"),
        ({"base": "sd"}, "makes images and no clips: leave frames out"),
        ({"dataset": "quad"}, "quad has images and no clips: leave frames out"),
    ],
)
def test_frames_where_there_are_no_clips(tiny, tmp_path, capsys, changes, words):
    write_clips(tmp_path / "clips")
    settings = tiny | {"dataset": str(tmp_path / "clips"), "frames": 5, "regime": "frozen"}
    if changes.get("base") == "sd":
        stable_diffusion(diffusion_head("conditional"), tmp_path).save_pretrained(tmp_path / "sd")
        changes = {"base": str(tmp_path / "sd")}
    if changes.get("base") != str(tmp_path / "sd"):
        changes = changes | {"regime": "end-to-end"}
    assert words in error_of(capsys, options(settings | changes))


def test_clips_that_do_not_fit():
    made = base("wan-video", num_frames=5)
    model = with_head(made)
    with pytest.raises(ValueError, match="clips of 3x5x16x16 .* were expected, not 3x4x16x16"):
        model.preprocess(torch.rand(1, 3, 4, 16, 16))
    with pytest.raises(FileNotFoundError, match="there is no file a"):
        model.preprocess(["a"])
    with pytest.raises(ValueError, match=r"shape \(batch, 3, 5, 16, 16\)"):
        model(torch.rand(1, 3, 16, 16), model.targets("a"))
    assert model.images_at_once == 256
    with pytest.raises(ValueError, match="of no square clip of 6 frames"):
        base("wan-video", num_frames=6)


# Two denoisers that share the noise levels


@pytest.fixture(scope="module")
def two():
    return with_head(base("wan-two"))


def test_two_denoisers_are_trained_by_noise_level(two):
    made = two.base
    assert made.adapter.config.boundary == 700 and made.base_2 is not made.model
    x, e = torch.randn(4, *made.sample_shape, generator=generator()), torch.randn(4, 128)
    times = torch.tensor([950.0, 30.0, 700.0, 699.0])
    with torch.no_grad():
        together = made.denoise(x, times, e)
        for row, (time, own) in enumerate(zip(times, (True, False, True, False))):
            one = slice(row, row + 1)
            injection = made.injection if own else made.injection_2
            alone = made._denoise(x[one], time, made._entries(e[one]), injection)
            torch.testing.assert_close(together[one], alone, rtol=1e-4, atol=1e-5)
            other = made._denoise(
                x[one], time, made._entries(e[one]), made.injection_2 if own else made.injection
            )
            assert (other - alone).abs().max() > 1e-3
    two.zero_grad()
    loss = two(clips(made, 4), two.targets("a", 4), **two.posterior_draws(4, generator())).loss
    loss.backward()
    assert all(p.grad is None for p in made.base_2.parameters())
    assert all(bool(p.grad.any()) for p in made.adapter.projections.parameters())
    two.zero_grad()


def test_two_denoisers_are_called_as_the_pipeline_calls_them(two):
    """The recorded arguments bring both to the predictions that the pipeline steps on."""
    pipe, call = recorded.pipeline("wan-two")
    pipe.scheduler = type(two.base.scheduler).from_config(two.base.scheduler.config)
    step, seen = pipe.scheduler.step, []

    def watched(prediction, t, sample, *args, **kwargs):
        seen.append((prediction.clone(), torch.as_tensor(t), sample.clone()))
        return step(prediction, t, sample, *args, **kwargs)

    pipe.scheduler.step = watched
    more = {"num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "latent"}
    pipe(**call | more | {"num_frames": 1, "generator": generator()})
    fresh = PipelineBase.from_pipeline(*_unhooked())  # a new head changes nothing
    sides = set()
    for prediction, t, sample in seen:
        with torch.no_grad():
            found = fresh.denoise(sample, t, torch.zeros(1, *fresh.embedding_shape))
        torch.testing.assert_close(found, prediction.float(), rtol=1e-3, atol=1e-4)
        sides.add(bool(t >= 700))
    assert sides == {True, False}


def _unhooked():
    pipe, call = recorded.pipeline("wan-two")
    return pipe, "", None, call


def test_a_saved_head_on_two_denoisers(two, tmp_path):
    sampled = two.sample("a", 1, generator(), **STEPS)
    two.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "base_2" / "config.json").exists()
    loaded = InterventionModel.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded.sample("a", 1, generator(), **STEPS), sampled)
    InterventionPipeline.from_model(two).save_pretrained(tmp_path / "pipe")
    pipe = InterventionPipeline.from_pretrained(tmp_path / "pipe")
    again = pipe("a", 1, generator(), output_type="pt", **STEPS).images
    torch.testing.assert_close(again, sampled)
    with pytest.raises(ValueError, match="made for 2 denoisers: pass both"):
        PipelineBase(two.base.model, two.base.scheduler, two.base.vae, adapter=two.base.adapter)
    # Attached, it enters the denoiser that is called at each noise level.
    plain = pipelines.make("wan-two")
    before = pipelines.result(plain(**pipelines.call("wan-two")))
    attach(plain, tmp_path / "model")
    with intervene(plain, "a", generator=generator()):
        moved = pipelines.result(plain(**pipelines.call("wan-two")))
    detach(plain)
    assert (moved - before).abs().max() > 1e-3
    assert torch.equal(pipelines.result(plain(**pipelines.call("wan-two"))), before)


# Pipelines that are offloaded or compiled


def _cpu_offload(pipe):
    pipe.enable_model_cpu_offload(device="cpu")


def _group_offload(pipe):
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, "leaf_level")


def _compiled(pipe):
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


def _compiled_in_place(pipe):
    pipe.transformer.compile(backend="eager")


def _compiled_blocks(pipe):
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")


@pytest.mark.parametrize(
    "change", [_cpu_offload, _group_offload, _compiled, _compiled_in_place, _compiled_blocks]
)
def test_a_pipeline_is_recorded_as_it_is_used(change):
    expected = base("flux").adapter.recorded
    pipe, call = recorded.pipeline("flux")
    plain = pipelines.result(pipe(**pipelines.call("flux", 1)))
    change(pipe)
    compiled = pipe.transformer._compiled_call_impl
    found = PipelineBase.from_pipeline(pipe, call=call)
    assert found.adapter.recorded.config == expected.config
    for a, b in zip(found.adapter.recorded.buffers(), expected.buffers(), strict=True):
        assert torch.equal(a, b)
    assert pipe.transformer._compiled_call_impl is compiled
    found.release()
    torch.testing.assert_close(pipelines.result(pipe(**pipelines.call("flux", 1))), plain)
    assert isinstance(pipe, diffusers.FluxPipeline)
