"""The pipeline that comes with the package: small, safe to load, and good."""

from pathlib import Path

import pytest
import torch

import hf_intervene
from hf_intervene import InterventionPipeline
from hf_intervene.data import quad
from hf_intervene.metrics import sliced_wasserstein


@pytest.fixture(scope="module")
def pipe():
    return InterventionPipeline.from_pretrained(hf_intervene.bundled("quad"))


def test_small_and_safe():
    files = [path for path in Path(hf_intervene.bundled("quad")).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md", ".png", ".yaml"}


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
        ValueError, match="no pipeline 'cube' comes with the package; there is quad"
    ):
        hf_intervene.bundled("cube")
