"""The recipe for a pretrained base: a plain autoencoder of diffusers, better than the mean image, that a head can be added to."""

import torch
from diffusers import AutoencoderKL

from hf_intervene import InterventionModel
from hf_intervene.training import pretrain, train
from hf_intervene.training.train import TrainArguments


def test_pretrain_then_add_a_head(tiny, tmp_path):
    folder = tmp_path / "vae"
    options = {"output": folder, "images": 64, "resolution": 16, "steps": 150, "batch-size": 16}
    assert pretrain.main([word for key, value in options.items() for word in (f"--{key}", str(value))]) == 0
    vae = AutoencoderKL.from_pretrained(folder)
    x = pretrain.observational_images("quad", 64, 16).float() / 127.5 - 1
    with torch.no_grad():
        latents = vae.encode(x).latent_dist.mean
        error = (vae.decode(latents).sample - x).square().mean()
    assert error < 0.6 * (x - x.mean(0)).square().mean()
    assert 0.8 < vae.config.scaling_factor * latents.std() < 1.25
    result = train.train(TrainArguments(**tiny | {"base": str(folder), "regime": "frozen", "mixed_precision": "auto"}))
    assert not (result.model_dir / "base").exists()
    assert InterventionModel.from_pretrained(result.model_dir).sample("quad1", 2).shape == (2, 3, 16, 16)


def test_errors_are_one_sentence(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert pretrain.main(["--output", str(file / "vae")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert pretrain.main(["--output", str(tmp_path)]) == 1  # what is there is not replaced
    assert "already holds something" in capsys.readouterr().err and file.exists()
    for wrong in (["--resolution", "30"], ["--batch-size", "0"]):
        assert pretrain.main(["--output", str(tmp_path / "vae"), *wrong]) == 1
        assert "multiple of 4" in capsys.readouterr().err
