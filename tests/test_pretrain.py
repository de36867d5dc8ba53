"""The recipe for a pretrained base: a plain autoencoder of diffusers, better than the mean image,
that a head can be added to.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiTPipeline,
    DiTTransformer2DModel,
    UniPCMultistepScheduler,
)

from hf_intervene import InterventionModel, trainer
from hf_intervene.bases import DiffusionBase
from hf_intervene.trainer import TrainArguments, pretraining
from hf_intervene.training import pretrain
from hf_intervene.training.studies import autoencoder as study
from hf_intervene.training.studies import denoiser_alone


OPTIONS = ["--images", "64", "--resolution", "16", "--batch-size", "16"]


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrained") / "vae"
    assert pretrain.main(["--output", str(folder), "--steps", "150", *OPTIONS]) == 0
    return folder


def test_pretrain_then_add_a_head(tiny, autoencoder):
    vae = AutoencoderKL.from_pretrained(autoencoder)
    x = pretrain.observational_images("quad", 64, 16).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mean
        error = (vae.decode(latents).sample - x).square().mean()
    assert error < 0.6 * (x - x.mean(0)).square().mean()
    assert 0.8 < vae.config.scaling_factor * latents.std() < 1.25
    result = trainer.train(
        TrainArguments(
            **tiny | {"base": str(autoencoder), "regime": "frozen", "mixed_precision": "auto"}
        )
    )
    assert not (result.model_dir / "base").exists()
    assert InterventionModel.from_pretrained(result.model_dir).sample("quad1", 2).shape == (
        2,
        3,
        16,
        16,
    )


def test_a_mosaic_has_four_pieces_of_images_of_the_batch():
    """Each image has one colour of its own, so that a piece says whose it is."""
    torch.manual_seed(0)
    colours = torch.rand(64, 3, 1, 1)
    made = pretraining.mosaic(colours.expand(64, 3, 16, 16))
    pixels = made.permute(0, 2, 3, 1)  # (64, 16, 16, 3)
    found = (pixels[..., None, :] == colours.view(64, 3)).all(-1)  # (64, 16, 16, 64)
    assert (found.sum(-1) == 1).all()
    whose = found.long().argmax(-1)
    assert all(len(image.unique()) <= 4 for image in whose)
    # Two cuts, each at one place of its axis.
    for changes in (whose[:, 1:] != whose[:, :-1], whose[..., 1:] != whose[..., :-1]):
        axis = 2 if changes.shape[1] == 15 else 1
        assert (changes.any(axis).sum(1) <= 1).all()
    assert sum(len(image.unique()) == 4 for image in whose) > 32


def test_pieces_of_a_mosaic_are_mirrored_and_turned():
    image = torch.arange(16.0).view(1, 1, 4, 4).expand(512, 1, 4, 4)
    torch.manual_seed(0)
    made = pretraining.mosaic(image)
    corners = {int(x) for x in made[:, 0, 0, 0]}
    assert corners == {0, 3, 12, 15}
    whole = [x for x in made[:, 0] if sorted(x.flatten().tolist()) == list(range(16))]
    assert any(torch.equal(x, image[0, 0].T) for x in whole)


def test_half_of_the_mosaics_are_mixed_with_another():
    """The images are black or white, so that a grey pixel says in which shares."""
    torch.manual_seed(0)
    images = (torch.arange(512) % 2.0).view(512, 1, 1, 1).expand(512, 3, 8, 8)
    made = pretraining.blended(images)
    assert 0 <= made.min() and made.max() <= 1
    grey = (made > 0) & (made < 1)
    # A mixed one is grey unless its eight pieces are black and white in the same places.
    assert 0.4 < grey.flatten(1).any(1).float().mean() < 0.5
    shares = torch.cat([x[g].unique() for x, g in zip(made, grey)])
    assert shares.min() < 0.1 and shares.max() > 0.9


def test_pretrain_a_transformer_on_latents_then_add_a_head(tiny, autoencoder, tmp_path):
    vae = AutoencoderKL.from_pretrained(autoencoder)
    x = pretraining.latents(vae, pretraining.observational_images("quad", 64, 16))
    assert x.shape == (64, 8, 8, 8) and 0.9 < x.std() < 1.1
    options = ["--model", "dit", "--autoencoder", str(autoencoder), "--steps", "120"]
    assert pretrain.main(["--output", str(tmp_path / "dit"), *options, *OPTIONS]) == 0
    pipe = DiTPipeline.from_pretrained(tmp_path / "dit")
    assert pipe.scheduler.config.prediction_type == "sample"
    images = pipe([1], guidance_scale=1.0, num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)
    for name, value in pipe.vae.state_dict().items():
        assert torch.equal(value, vae.state_dict()[name]), name
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    t, nobody = torch.full((64,), 500), torch.full((64,), pretraining.NOBODY)
    with torch.no_grad():
        found = pipe.transformer((x + noise) / 2, t, class_labels=nobody).sample
    assert (found - x).square().mean() < 0.25  # the best linear estimate leaves 0.5
    arguments = tiny | {"base": str(tmp_path / "dit"), "regime": "frozen", "mixed_precision": "no"}
    result = trainer.train(TrainArguments(**arguments))
    assert InterventionModel.from_pretrained(result.model_dir).sample(
        "quad1", 2, num_inference_steps=2
    ).shape == (2, 3, 16, 16)


def test_pretrain_a_transformer_on_pixels_then_add_a_head(tiny, tmp_path):
    options = ["--model", "dit", "--steps", "4"]
    assert pretrain.main(["--output", str(tmp_path / "dit"), *options, *OPTIONS]) == 0
    dit = DiTTransformer2DModel.from_pretrained(tmp_path / "dit", subfolder="transformer")
    assert dit.config.sample_size == 16 and dit.config.patch_size == 2  # 8 x 8 tokens
    arguments = tiny | {"base": str(tmp_path / "dit"), "mixed_precision": "no"}
    result = trainer.train(TrainArguments(**arguments))
    model = InterventionModel.from_pretrained(result.model_dir)
    assert model.base.vae is None and model.base.estimates == (3, 16, 16)
    assert model.sample("quad1", 2, num_inference_steps=2).shape == (2, 3, 16, 16)


def test_what_an_autoencoder_keeps(tmp_path, monkeypatch):
    """Images go through it batch by batch; the shares are of the context's own concept."""
    folder = tmp_path / "vae"
    vae = pretraining.new_autoencoder(16)
    vae.save_pretrained(folder)
    images = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), np.uint8)
    monkeypatch.setattr(study, "BATCH", 3)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae(x).sample.permute(0, 2, 3, 1) / 2 + 0.5
    found = study.returned(vae.eval(), images)
    np.testing.assert_allclose(found, expected.clamp(0, 1), atol=1e-5)

    def present(images):  # of the second concept, where the images are real: whole bytes
        whole = np.abs(images * 255 - np.round(images * 255)).max((1, 2, 3)) < 1e-3
        return np.stack([whole & False, whole, whole, whole], 1)

    detector = SimpleNamespace(present=present, unusable={"smile": "too few"})
    monkeypatch.setattr(study, "content_options", lambda *_, **__: {"detector": detector})
    options = ["--resolution", "16", "--images", "5", "--output", str(tmp_path / "kept.json")]
    assert study.main(["--autoencoder", str(folder), *options]) == 0
    rows = json.loads((tmp_path / "kept.json").read_text())["rows"]
    assert [row[:3] for row in rows] == [
        ["`glasses`", 0.0, 0.0],
        ["`beard`", 1.0, 0.0],
        ["`hat`", 1.0, 0.0],
        ["`smile`", "not detected", "not detected"],
    ]
    assert all(row[3] > 0.1 for row in rows)


def test_errors_are_one_sentence(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert pretrain.main(["--output", str(file / "vae")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert pretrain.main(["--output", str(tmp_path)]) == 1  # what is there is not replaced
    assert "already holds something" in capsys.readouterr().err and file.exists()
    for wrong, message in (
        (["--resolution", "31"], "multiple of 2, not 31"),
        (["--resolution", "66"], "multiple of 4, not 66"),
        (["--resolution", "30", "--model", "unet"], "multiple of 8, not 30"),
        (["--resolution", "30", "--model", "dit"], "multiple of 8, not 30"),
        (["--batch-size", "0"], "must be at least 1"),
    ):
        assert pretrain.main(["--output", str(tmp_path / "vae"), *wrong]) == 1
        assert message in capsys.readouterr().err
    assert pretrain.main(["--output", str(tmp_path / "x"), "--autoencoder", str(tmp_path)]) == 1
    assert "--autoencoder FOLDER is for --model dit" in capsys.readouterr().err
    nowhere = ["--model", "dit", "--autoencoder", str(tmp_path / "none"), "--images", "8"]
    assert pretrain.main(["--output", str(tmp_path / "dit"), *nowhere]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_denoiser_alone_is_measured_as_diffusers_samples_it(tmp_path, monkeypatch):
    torch.manual_seed(0)
    denoiser = pretraining.new_dit(3, 16, 4)
    torch.nn.init.normal_(denoiser.proj_out_2.weight, std=0.1)  # zero in a new one
    scheduler = UniPCMultistepScheduler(
        prediction_type="sample", use_flow_sigmas=True, flow_shift=1.0
    )
    base = DiffusionBase(denoiser, scheduler, sample_size=16).eval()
    x = base.draws(3, torch.Generator().manual_seed(4))["residual_noise"]
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            labels = torch.full((3,), pretraining.NOBODY)
            clean = denoiser(x, timestep=t.expand(3), class_labels=labels).sample
            x = scheduler.step(clean, t, x).prev_sample
    expected = (x / 2 + 0.5).clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).numpy()
    found = denoiser_alone.samples(base, 3, 4, 4).astype(float)
    assert expected.std() > 10 and np.abs(found - expected).max() <= 1

    DiTPipeline(denoiser, None, scheduler).save_pretrained(tmp_path / "dit")
    monkeypatch.setattr(denoiser_alone, "samples", lambda base, n, steps, seed: real[:n])
    real = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    out, options = tmp_path / "alone.json", ["--base", str(tmp_path / "dit"), "--images", "100"]
    options += ["--resolution", "16", "--seeds", "0", "1", "--output", str(out)]
    assert denoiser_alone.main(options) == 0
    found = json.loads(out.read_text())
    assert [row[0] for row in found["rows"]] == ["seed 0", "seed 1"]
    for _, told, floor, distance, same in found["rows"]:
        assert told > 0.9 > floor and distance > 3 * same > 0  # noise is no face
