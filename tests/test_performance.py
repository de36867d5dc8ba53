"""What keeps a training step fast: nothing waits for the device, nothing is compiled twice, batches
are the same wherever images lie.
"""

import json

import numpy as np
import pytest
import torch
from accelerate import PartialState
from datasets import Dataset
from PIL import Image
from runs import assert_same, launch, run, weights

from hf_intervene import InterventionModel, LightVAE, mechanisms, posterior
from hf_intervene.data import ContextImages, ContextSchedule, decoding, load_contexts, quad
from hf_intervene.objective import Objective
from hf_intervene.trainer.feeding import Feed
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.training.benchmarks.tools import HostWaits


METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def test_no_step_waits_for_the_device(tiny, monkeypatch):
    """From the moment a batch is on the device to the next batch, for steps without a log."""
    if torch.cuda.is_available():
        monkeypatch.setattr(
            torch.cuda, "synchronize", lambda *_: pytest.fail("a step waits for the device")
        )
    waiting, active = HostWaits(), []
    for name in METHODS:
        original = getattr(torch.Tensor, name)

        def noted(self, *args, _name=name, _original=original, **kwargs):
            if active:
                waiting.seen.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, noted)
    # What is done on CPUs only, where nothing has to be waited for: to look where targets are not
    # 0, and at the greatest index.
    for module in (mechanisms, posterior):
        monkeypatch.setattr(module, "is_readable", lambda x: False)
    monkeypatch.setattr(
        torch.nn.functional, "one_hot", lambda ids, n: (ids[..., None] == torch.arange(n)).long()
    )
    original_batch = Feed.batch

    def batch(self, step):
        if active:
            active.pop().__exit__(None, None, None)
        found = original_batch(self, step)
        if 2 <= step <= 6:
            active.append(waiting)
            waiting.__enter__()
        return found

    monkeypatch.setattr(Feed, "batch", batch)
    settings = {
        "log_every": 1000,
        "eval_every": 1000,
        "ema_decay": 0.9,
        "gradient_accumulation_steps": 2,
        "l2": 0.1,
    }
    run(
        tiny,
        **settings
        | {
            "max_steps": 9,
            "mixed_precision": "bf16",
            "beta_warmup": 0.5,
        },
    )
    assert not active and waiting.seen == []
    with waiting:
        _ = torch.ones(1).item()
    assert "_local_scalar_dense" in waiting.seen  # it would have been seen


def drawn(mapped=None):
    found = ContextImages.from_arrays(
        quad.images_by_context(images_per_context=20, resolution=16), quad.CONCEPTS
    )
    if mapped is not None:
        np.save(mapped, found.stored.numpy())
        found.stored, found.mapped = torch.from_numpy(np.load(mapped, mmap_mode="c")), True
    return found


def feed(data, schedule="balanced", accumulation=1):
    torch.manual_seed(0)
    base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    model = InterventionModel.build(base, quad.CONCEPTS, noise_width=4)
    a = TrainArguments(batch_size=8, schedule=schedule, gradient_accumulation_steps=accumulation)
    return Feed(
        Objective(model),
        data,
        None,
        ContextSchedule(data.context_ids, schedule, 8, a.optimization.seed),
        a,
        PartialState(cpu=True),
    )


def test_batches_are_the_same_out_of_memory_and_ahead_out_of_a_file(tmp_path):
    data = drawn()
    parts = [data.split(0.25)[0], drawn(tmp_path / "images.npy").split(0.25)[0]]
    assert parts[0].stored.data_ptr() == data.stored.data_ptr()  # a part is no copy
    feeds = [feed(part, accumulation=2) for part in parts]
    assert feeds[0].pool is None and feeds[1].pool is not None
    schedule = ContextSchedule(parts[0].context_ids, "balanced", 8, 0)
    for step in range(12):
        indices = schedule.next_batch()
        assert feeds[0].state_dict() == feeds[1].state_dict()  # what was drawn ahead does not count
        for found in (f.batch(step) for f in feeds):
            pixels = torch.cat([inputs["pixel_values"] for inputs in found.inputs])
            torch.testing.assert_close(pixels, parts[0].pixels[indices] / 255, rtol=0, atol=0)
            assert torch.equal(found.ids, parts[0].context_ids[indices]) and found.parts == [
                slice(0, 4),
                slice(4, 8),
            ]
    resumed = feed(parts[1])
    resumed.load_state_dict(json.loads(json.dumps(feeds[1].state_dict())))
    assert torch.equal(resumed.batch(12).ids, feeds[1].batch(12).ids)
    for f in (*feeds, resumed):
        f.close()


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for context in ("obs", "hat"):
        (tmp_path / "images" / context).mkdir(parents=True)
        for number in range(10):
            Image.fromarray(rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)).save(
                tmp_path / "images" / context / f"{number}.png"
            )
    return tmp_path / "images"


def test_images_are_decoded_into_a_cache_once(folder, tmp_path, monkeypatch):
    expected = ContextImages.from_dataset(load_contexts(folder), None, 8)

    def cached(**options):
        return ContextImages.from_dataset(
            load_contexts(folder),
            None,
            **{"resolution": 8, "cache_dir": tmp_path / "cache"} | options,
        )

    first = cached()
    assert (
        first.mapped
        and torch.equal(first.pixels, expected.pixels)
        and torch.equal(first.context_ids, expected.context_ids)
    )
    (file,) = (tmp_path / "cache").glob("*.npy")
    assert np.array_equal(np.load(file), expected.pixels.numpy())
    part = first.split(0.2, seed=1)[0]
    assert part.stored.data_ptr() == first.stored.data_ptr()
    assert torch.equal(part.pixels, expected.split(0.2, seed=1)[0].pixels)
    with monkeypatch.context() as patched:
        patched.setattr(decoding, "decode_image", lambda *_: pytest.fail("decoded again"))
        assert torch.equal(cached().pixels, expected.pixels)
    assert cached(resolution=4).pixels.shape == (20, 3, 4, 4)
    # another image in the same file
    Image.new("RGB", (9, 12), (255, 0, 0)).save(folder / "hat" / "0.png")
    assert not torch.equal(cached().pixels, expected.pixels)
    saved = Dataset.from_dict(
        {
            "image": [str(p) for p in sorted((folder / "obs").iterdir())] * 2,
            "context": ["obs"] * 10 + ["hat"] * 10,
        }
    )
    assert ContextImages.from_dataset(
        saved, resolution=8, cache_dir=tmp_path / "cache"
    ).pixels.shape == (20, 3, 8, 8)


def test_a_cache_that_cannot_be_written_is_one_sentence(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be kept in .*file.*choose another folder"):
        ContextImages.from_dataset(load_contexts(folder), None, 8, cache_dir=tmp_path / "file")
    (folder / "hat" / "3.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match="3.png.* cannot be read"):
        ContextImages.from_dataset(load_contexts(folder), None, 8, cache_dir=tmp_path / "cache")
    # nothing half written
    assert not list((tmp_path / "cache").glob("*.npy")) and not list(
        (tmp_path / "cache").glob("*.part")
    )


def test_training_out_of_a_cache(tiny, folder, tmp_path):
    options = {"dataset": str(folder), "max_steps": 4}
    run(tiny, **options)
    run(
        tiny,
        **options | {"output_dir": str(tmp_path / "b"), "image_cache": str(tmp_path / "cache")},
    )
    scores = [(tmp_path / name / "history.jsonl").read_text() for name in ("run", "b")]
    assert scores[0] == scores[1]


@pytest.mark.slow
def test_two_processes_train_out_of_a_cache(tiny, folder, tmp_path):
    settings = tiny | {"dataset": str(folder), "max_steps": 4, "base_norm": "none"}
    run(settings)
    two = settings | {"output_dir": str(tmp_path / "two"), "image_cache": str(tmp_path / "cache")}
    launch(["torch.distributed.run", "--standalone", "--nproc_per_node", "2"], two)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert_same(
        weights(tmp_path / "run" / "model"),
        weights(tmp_path / "two" / "model"),
        rtol=1e-2,
        atol=2e-4,
    )
