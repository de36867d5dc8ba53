"""The pipelines that come with the package: small, safe to load, and good."""

from pathlib import Path

import numpy as np
import pytest
import torch

import hf_intervene
from hf_intervene import InterventionModel, InterventionPipeline
from hf_intervene.data import avatars, quad
from hf_intervene.metrics import sliced_wasserstein
from hf_intervene.metrics.detector import train_detector
from hf_intervene.pretrained import bundled_names


@pytest.fixture(scope="module")
def pipe():
    return InterventionPipeline.from_pretrained(hf_intervene.bundled("quad"))


@pytest.mark.parametrize("name", bundled_names())
def test_small_and_safe(name):
    files = [path for path in Path(hf_intervene.bundled(name)).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".yaml"}
    text = "".join(path.read_text() for path in files if path.suffix in (".json", ".md", ".yaml"))
    assert "/tmp" not in text and "/home" not in text and "/root" not in text  # of nobody's machine


def test_samples_of_avatars_show_what_was_asked_for():
    """A detector of the concepts, trained on real faces, finds both of a pair never seen."""
    pipe = InterventionPipeline.from_pretrained(hf_intervene.bundled("avatars"))
    assert pipe.base.dtype == pipe.head.dtype == torch.float32 and pipe.concepts == avatars.CONCEPTS
    real = avatars.images_by_context(images_per_context=500, resolution=64)
    drawn = avatars.attributes_by_context(images_per_context=500)
    labels = np.concatenate([avatars.concepts_present(drawn[name]) for name in real])
    faces = np.concatenate(list(real.values()))
    detector = train_detector(faces, labels, avatars.CONCEPTS, steps=200)

    def shares(images):
        """Share with glasses, with a hat, with both."""
        found = detector.present(images)
        glasses, hat = (found[:, avatars.CONCEPTS.index(name)] for name in ("glasses", "hat"))
        return glasses.mean(), hat.mean(), (glasses & hat).mean()

    def samples(name):
        noise = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 10, "output_type": "np"}
        return pipe(name, num_images=200, generator=noise, **options).images

    assert shares(avatars.twins(["glasses+hat"], 64)["glasses+hat"])[2] > 0.9  # it sees real ones
    assert max(shares(samples("obs"))) < 0.25
    assert shares(samples("glasses"))[0] > 0.85 and shares(samples("hat"))[1] > 0.85
    assert shares(samples("glasses+hat"))[2] > 0.85


def test_interventions_and_pairs_reach_their_contexts(pipe):
    """Samples of a context are nearer to its images than any other context's images are: an unseen
    pair carries both interventions.
    """
    assert pipe.base.dtype == pipe.head.dtype == torch.float32
    names = ("obs", "quad1", "quad2", "quad1+quad2")
    real = quad.images_by_context(names, 256, 64, "dependent", seed=9_000_000)
    for name in names:
        samples = pipe(
            name, num_images=256, generator=torch.Generator().manual_seed(0), output_type="np"
        ).images
        distance = sliced_wasserstein(real[name], samples, num_projections=200)
        assert distance < min(
            sliced_wasserstein(real[name], real[other], 200) for other in names if other != name
        )


def test_an_edit_changes_its_quadrant_and_keeps_the_others(pipe):
    image = quad.images_by_context(("obs",), 64, 64, "dependent", seed=9_000_001)["obs"]
    before = pipe.edit(image, "obs", output_type="np").images
    change = abs(pipe.edit(image, "quad1", output_type="np").images - before).mean(
        (0, 3)
    )  # (64, 64)
    corners = {
        "quad1": change[56:, :8],
        "quad2": change[56:, 56:],
        "quad3": change[:8, :8],
        "quad4": change[:8, 56:],
    }
    means = {name: corner.mean() for name, corner in corners.items()}
    assert means["quad1"] > 2 * max(value for name, value in means.items() if name != "quad1")


def test_unknown_name():
    with pytest.raises(
        ValueError, match="no pipeline 'cube' comes with the package; there is avatars, quad"
    ):
        hf_intervene.bundled("cube")


@pytest.mark.parametrize("load", [InterventionPipeline, InterventionModel])
def test_a_name_alone_is_no_folder(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=r"from_pretrained\(hf_intervene.bundled\('quad'\)\)"):
        load.from_pretrained("quad")
