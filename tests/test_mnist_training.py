"""Training and evaluation on MNIST concepts."""

import json

import numpy as np
import pytest
from idx_files import write_idx
from PIL import Image

from hf_intervene.data import load_digits, mnist
from hf_intervene.training import evaluate, pretrain, simulated, train
from hf_intervene.training.arguments import shared_settings


ALL = mnist.TRAIN_CONTEXTS + mnist.HELD_OUT
SETTINGS = {"dataset": "mnist", "resolution": 28, "channels": 1, "validation_images": 16}


@pytest.fixture
def used(monkeypatch):
    """Return a list of the digits of each request for images, as bytes."""
    used, draw = [], mnist.load_mnist

    def spy(contexts, images_per_context, digits, **options):
        used.append({image.tobytes() for image in digits.images})
        return draw(contexts, images_per_context, digits, **options)

    monkeypatch.setattr(mnist, "load_mnist", spy)
    return used


def test_training_validation_and_held_out_digits_are_never_mixed(tiny, used):
    data, validation = train.load_data(train.TrainArguments(**tiny | SETTINGS))
    assert data.pixels.shape == (7 * 32, 1, 28, 28) and len(validation) == 7 * 16
    assert data.contexts == list(mnist.TRAIN_CONTEXTS)
    real, other = evaluate.held_out_images("mnist", mnist.CONCEPTS, 12, 0, 28, 1, "dependent")
    training, validating, held_out = used
    assert (len(training), len(validating), len(held_out)) == (360, 40, 400)
    assert not training & validating and not (training | validating) & held_out
    assert list(real) == list(other) == list(ALL) and {
        len(x) for x in (*real.values(), *other.values())
    } == {12}
    for name in ALL:  # all distinct, the floor's images too
        assert len({image.tobytes() for image in (*real[name], *other[name])}) == 24


def test_few_digits_give_few_held_out_images(monkeypatch):
    monkeypatch.setattr(simulated.Mnist, "contexts", ("obs",))
    monkeypatch.setattr(simulated.Mnist, "held_out", ("scale+thin",))
    real, other = evaluate.held_out_images("mnist", mnist.CONCEPTS, 1280, 0, 28, 3, "dependent")
    assert {x.shape for x in (*real.values(), *other.values())} == {(200, 28, 28, 3)}
    other_seed = simulated.Mnist(28, 1).held_out_images(200, 1)[0]
    assert not np.array_equal(other_seed["obs"], real["obs"][..., :1])


def test_held_out_images_are_drawn_once(monkeypatch):
    monkeypatch.setattr(simulated.Mnist, "held_out", ("scale+thin",))
    drawn = simulated.Mnist(28, 1).held_out_images(3, 5)
    digits = load_digits(split="test")
    expected = mnist.images_by_context(
        (*mnist.TRAIN_CONTEXTS, "scale+thin"), 6, digits, simulated.HELD_OUT_SEED + 5
    )
    monkeypatch.setattr(mnist, "render", lambda *_: pytest.fail("drawn again"))
    for images in (drawn, simulated.Mnist(28, 1).held_out_images(3, 5)):
        assert list(images[0]) == list(expected)
        for name, x in expected.items():
            assert np.array_equal(np.concatenate([part[name] for part in images]), x)


def test_training_and_evaluation_end_to_end(tiny, tmp_path, capsys):
    folder = write_idx(tmp_path / "digits", gzipped=True)
    settings = tiny | SETTINGS | {"mnist_digits": str(folder)}
    result = train.train(train.TrainArguments(**settings))
    grids = sorted((tmp_path / "run" / "samples").glob("*.png"))
    width, height = Image.open(grids[-1]).size
    assert width > 8 * 28 and height == len(ALL) * 28  # names, and held-out pairs
    argv = ["--model", str(result.model_dir), "--output", str(tmp_path / "m"), "--dataset", "mnist"]
    argv += ["--images", "20", "--projections", "10", "--detector-images", "0", "--mnist-digits"]
    assert evaluate.main([*argv, str(folder), "--edits"]) == 0
    metrics = json.loads((tmp_path / "m" / "metrics.json").read_text())
    assert set(metrics["contexts"]) == set(ALL) and metrics["means"]["composition"]["contexts"] == 9
    assert "factor_effects" not in metrics  # those of quad
    assert evaluate.main([*argv, str(tmp_path / "nowhere")]) == 1
    assert f"error: there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 64}, "28 x 28 pixels: give the resolution 28, not 64"),
        ({"channels": 2}, "1 channel"),
        ({"mnist_digits": "./nowhere"}, "no folder ./nowhere"),
        ({"validation_fraction": 0.0}, "cannot be held out"),
        ({"images_per_context": 0}, "at least 1"),
    ],
)
def test_bad_settings(tiny, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        train.load_data(train.TrainArguments(**tiny | SETTINGS | change))


def test_a_published_model_names_no_folder_of_this_machine(tiny, tmp_path):
    (tmp_path / "digits").mkdir()
    text = shared_settings(
        train.TrainArguments(**tiny | SETTINGS | {"mnist_digits": str(tmp_path / "digits")})
    )
    assert "mnist_digits: digits" in text and str(tmp_path) not in text


def test_a_base_is_pretrained_on_observational_digits():
    pixels = pretrain.observational_images("mnist", 6, 28)
    assert pixels.shape == (6, 3, 28, 28)
    digits = load_digits().images
    rows = mnist.sample_rows("obs", 6, 400, simulated.PRETRAINING_SEED)
    assert np.array_equal(
        pixels[:, 0].numpy(), mnist.render(digits[rows], mnist.sample_latents("obs", 6))[..., 0]
    )
