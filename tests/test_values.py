"""Chosen values of concepts, do(c_j = v): quantiles of the learnt range and reference images, from
what a user says to the image.
"""

import json
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusion_models import with_head
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import hf_intervene
from hf_intervene import InterventionModel, InterventionPipeline, LightVAE, Quantile, cli
from hf_intervene.data import quad
from hf_intervene.plots import traversal
from hf_intervene.training.studies.effects import chosen_values, corner_colours
from hf_intervene.values import influence, learnt_range, quantile_value


pytestmark = pytest.mark.filterwarnings("ignore:the block of")


def tiny_model(ablation=None, **head):
    torch.manual_seed(0)
    base = LightVAE(3, 16, block_out_channels=(8, 8), hidden_width=16, latent_width=12)
    head = {"noise_width": 4, "concept_width": 3, "initializer_range": 0.5} | head
    return InterventionModel.build(base, ["a", "b"], ablation=ablation, **head).eval()


def images(number, seed=0):
    return torch.rand(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def concepts(model, x, context="obs", *clamp):
    s = model.targets(context, len(x))
    return model.head(model.posterior(x, s)[0], s, *clamp).concepts


@pytest.mark.parametrize("intervention", ["perfect", "soft"])
@torch.no_grad()
def test_edit_with_a_reference_is_the_head_at_its_value(intervention):
    model, x, other = tiny_model(intervention=intervention), images(3), images(3, 1)
    for context in ("obs", "b"):
        c = concepts(model, other, context)
        chosen = torch.tensor([True, False, False]).expand(3, -1)
        z = model.posterior(x, model.targets("obs", 3))[0]
        e = model.head(z, model.targets("a", 3), c, chosen).embedding
        expected = model.base.generate(e, {})
        torch.testing.assert_close(model.edit(x, {"a": other}, reference_context=context), expected)
        torch.testing.assert_close(
            model.edit(x, {"a": list(other)}, reference_context=context, batch_size=2), expected
        )
        per_sample = [{"a": image} for image in other]
        torch.testing.assert_close(
            model.edit(x, per_sample, reference_context=[[context]] * 3), expected
        )
        torch.testing.assert_close(
            model.sample({"a": other}, noise=z, reference_context=context), expected
        )
    one = model.edit(x, {"a": other[0]}, reference_context=["b"])  # one reference for all
    torch.testing.assert_close(
        one, model.edit(x, {"a": other[:1].expand(3, -1, -1, -1)}, reference_context=[["b"]] * 3)
    )


@torch.no_grad()
def test_the_images_own_value_leaves_the_concept_as_it_is():
    model, x = tiny_model(), images(4)
    # no path longer than 2
    model.head.intervention.weight.data *= torch.ones(3, 3).tril(-1)[:, None, None, :, None]
    c = concepts(model, x)
    for j in range(2):
        chosen = (torch.arange(3) == j).expand(4, -1)
        torch.testing.assert_close(concepts(model, x, "obs", c, chosen), c)
    torch.testing.assert_close(model.edit(x, {"a": x}), model.reconstruct(x))


@torch.no_grad()
def test_mixed_contexts_equal_one_at_a_time():
    model, x, other = tiny_model(), images(5), images(2, 1)
    contexts = [
        {"a": other[0]},
        "obs",
        {"a": Quantile(0.3), "b": other[1]},
        {"b": 0.5},
        ["a@0.9", "b"],
    ]
    mixed = model.edit(x, contexts)
    torch.testing.assert_close(mixed, model.edit(x, contexts, batch_size=2))
    for row, context in enumerate(contexts):
        torch.testing.assert_close(mixed[row : row + 1], model.edit(x[row : row + 1], context))
    noise = torch.randn(5, *model.noise_shape)
    torch.testing.assert_close(
        model.sample(contexts, noise=noise)[1], model.sample("obs", noise=noise)[1]
    )
    assert (
        model.sample({"a": other}).shape[0] == 2 and model.sample({"a": other[0]}, 3).shape[0] == 3
    )


@given(st.integers(0, 5), st.lists(st.floats(0.001, 0.999), min_size=2, max_size=8))
@settings(max_examples=20, deadline=None)
def test_quantiles_rise_along_the_component(seed, points):
    torch.manual_seed(seed)
    head = tiny_model(initializer_range=1.0).head
    ordered = learnt_range(head, "b", draws=512, seed=seed)
    centred = (ordered - ordered.mean(0)).double()
    component = torch.linalg.svd(centred, full_matrices=False).Vh[0]
    component *= component[component.abs().argmax()].sign()
    assert bool(((centred @ component).diff() >= -1e-6).all())
    values = torch.stack([quantile_value(ordered, q) for q in sorted(points)])
    assert bool(((values.double() @ component).diff() >= -1e-6).all())
    assert torch.equal(ordered, learnt_range(head, "b", draws=512, seed=seed))


@torch.no_grad()
def test_a_quantile_is_a_mean_of_its_neighbours_under_the_own_intervention():
    head = tiny_model(concept_width=1, free_blocks=0, norm="none").head
    ordered = learnt_range(head, "a")
    z = torch.randn(4096, 2, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ordered[:, 0], head(z, head.targets("a", 4096)).concepts[:, 0, 0].sort().values
    )
    torch.testing.assert_close(quantile_value(ordered, 0.5), ordered[2016:2080].mean(0))
    torch.testing.assert_close(quantile_value(ordered, 0.001), ordered[:64].mean(0))
    assert quantile_value(ordered, 0.5).sub(ordered.quantile(0.5)).abs() < 0.02 * ordered.std()


def test_strings_dicts_and_all_kinds_of_images_are_the_same():
    model = tiny_model()
    pipe, noise = InterventionPipeline.from_model(model), torch.randn(2, *model.noise_shape)
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    call = {"noise": noise, "output_type": "pt"}
    expected = pipe({"a": tensor, "b": Quantile(0.9)}, **call).images
    for image in (
        array,
        Image.fromarray(array),
        array[None],
        [array],
        tensor[None],
        [Image.fromarray(array)] * 2,
    ):
        torch.testing.assert_close(pipe({"a": image, "b": Quantile(0.9)}, **call).images, expected)
    assert torch.equal(
        pipe("a+b@0.9", **call).images, pipe({"a": 1.0, "b": Quantile(0.9)}, **call).images
    )
    edited = pipe.edit(Image.fromarray(array), {"a": array}, reference_context="a").images
    assert edited[0].size == (16, 16)


@pytest.mark.parametrize("ablation", ["base", "head-pooled"])
def test_models_without_values(ablation):
    with pytest.raises(
        ValueError, match=f"a model with ablation='{ablation}' has no values of concepts to choose"
    ):
        tiny_model(ablation).edit(images(1), "a@0.5")


@pytest.mark.parametrize(
    ("interventions", "options", "message"),
    [
        (
            {"a": torch.rand(3, 8, 16)},
            {},
            "the reference image of 'a': images of 3x16x16 .* were expected, not 3x8x16",
        ),
        (
            {"a": torch.full((3, 16, 16), 2.0)},
            {},
            r"the reference image of 'a': pixel values must lie in \[0, 1\]",
        ),
        ({"a": images(3)}, {}, "3 reference images of 'a' were given for 2 samples"),
        ({"c": Quantile(0.5)}, {}, "unknown concept 'c'; the known ones are obs, a, b"),
        ({"c": images(1)[0]}, {}, "unknown concept 'c'; the known ones are obs, a, b"),
        ({"a": images(1)[0]}, {"reference_context": "c"}, "unknown concept 'c'"),
        (
            {"a": images(1)[0]},
            {"reference_context": [["a"], ["b"], ["a"]]},
            "3 contexts were given for 2 samples",
        ),
        ({"a": images(1)[0]}, {"reference_context": "a@0.5"}, "here only names and strengths"),
        (
            {"a": Quantile(0.5)},
            {"reference_context": "a"},
            "reference_context is the context of reference images, but none is given",
        ),
        ("a@0.5", {"context": "b@0.5"}, "here only names and strengths"),
        ("a@0.5", {"guidance_scale": 2.0}, "guidance_scale is for denoisers"),
    ],
)
def test_errors(interventions, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().edit(images(2), interventions, **options)


def test_an_empty_block_is_warned_of():
    model = tiny_model()
    model.head.unpool.weight.data[:, :3] *= 10
    assert influence(model.head, "a") > 0.05
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.sample("a@0.5")
    model.head.exogenous.slices.weight.data[0] = 0
    assert influence(model.head, "a") == 0
    with pytest.warns(UserWarning, match="the block of 'a' decides next to nothing in this model"):
        model.sample("a@0.5")


@torch.no_grad()
def test_a_denoiser_takes_values_with_guidance_and_references():
    model, x = with_head("unet"), images(2)
    steps = {"num_inference_steps": 2}
    c = concepts(model, images(2, 1))
    chosen = torch.tensor([True, False, False]).expand(2, -1)
    noise, residual = model.abduct(x, model.targets("obs", 2), **steps)
    embedding = model.head(noise, model.targets("a", 2), c, chosen).embedding
    options = {
        "observational": model.embed(noise, model.targets("obs", 2)),
        "guidance_scale": 2.0,
        "along_path": True,
    } | steps
    expected = model.base.generate(embedding, {"residual_noise": residual}, **options)
    found = model.edit(x, {"a": images(2, 1)}, guidance_scale=2.0, **steps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - model.edit(x, "a", guidance_scale=2.0, **steps)).abs().max() > 1e-4


def test_command_line(tmp_path, capsys):
    pipe = InterventionPipeline.from_model(tiny_model())
    pipe.save_pretrained(tmp_path / "pipe")
    image, other = (
        Image.fromarray((x.permute(1, 2, 0).numpy() * 255).astype("uint8")) for x in images(2)
    )
    image.save(tmp_path / "image.png")
    other.save(tmp_path / "other.png")
    edit = [
        "edit",
        str(tmp_path / "pipe"),
        str(tmp_path / "image.png"),
        "--output",
        str(tmp_path / "out"),
    ]
    reference = ["--reference", f"a={tmp_path / 'other.png'}"]
    assert (
        cli.main([*edit, "--interventions", "b@0.9", *reference, "--reference-context", "a"]) == 0
    )
    expected = pipe.edit(image, {"a": other, "b": Quantile(0.9)}, reference_context="a").images[0]
    written = Image.open(tmp_path / "out" / "0000.png")
    assert np.array_equal(np.asarray(written), np.asarray(expected))
    assert cli.main([*edit, *reference]) == 0
    sample = [
        "sample",
        str(tmp_path / "pipe"),
        "--num-images",
        "2",
        "--output",
        str(tmp_path / "s.png"),
    ]
    assert cli.main([*sample, *reference, "--interventions", "b"]) == 0
    # The row of images as they are has no reference, so no context of one.
    assert cli.main([*sample, *reference, "--reference-context", "b"]) == 0
    for bad, message in (
        (edit, "nothing is intervened on: give --interventions or --reference"),
        ([*edit, "--reference", "a"], "--reference takes CONCEPT=IMAGE, not 'a'"),
        ([*edit, *reference, "--interventions", "a"], "concept 'a' is named twice"),
        ([*edit, "--reference", f"c={tmp_path / 'other.png'}"], "unknown concept 'c'"),
        ([*edit, "--interventions", "a@2"], "a quantile must be"),
        ([*edit, "--reference", "a=nowhere.png"], "error: there is no file nowhere.png."),
        (
            [*edit, "--reference", f"a={tmp_path / 'pipe' / 'model_index.json'}"],
            "cannot be read as an image",
        ),
    ):
        assert cli.main(bad) == 1
        assert message in capsys.readouterr().err


def test_traversal_draws_a_strip_for_each_concept():
    figure = traversal(tiny_model(), images(1), quantiles=(0.1, 0.9))
    assert [axis.get_ylabel() for axis in figure.axes] == ["image", "a", "b"]


def test_bundled_colours_follow_a_reference():
    """The block of quad4 holds its colour, those of quad1 and quad2 much of theirs, that of quad3
    little. `pytest -s` prints all of it.
    """
    model = InterventionPipeline.from_pretrained(hf_intervene.bundled("quad")).model
    found = chosen_values(model, "dependent", images=256, seed=0)
    print(json.dumps(found, indent=1))
    ratios = {name: found[name]["reference"] / found[name]["chance"] for name in quad.CONCEPTS[:4]}
    assert (
        ratios["quad4"] < 0.2
        and ratios["quad2"] < 0.7
        and ratios["quad1"] < 0.8
        and ratios["quad3"] < 0.95
    )
    assert all(value < 0.25 for name in ratios for value in found[name]["kept"].values())
    assert found["reconstructed"] < 0.02


@pytest.mark.parametrize("taken", ["own", "the next"])
def test_what_is_measured_of_chosen_values(taken):
    """A model that takes the right quadrant from another image, or in place of quad1 the one beside
    it, quad2.
    """

    def edit(own, choice, **_):
        edited = own / 255
        if choice != "obs":
            ((name, other),) = choice.items()
            right = name in ("quad2", "quad4") or (name == "quad1" and taken == "the next")
            rows = slice(16, None) if name in ("quad1", "quad2") else slice(16)
            columns = slice(16, None) if right else slice(16)
            edited[:, rows, columns] = other[:, rows, columns] / 255
        return edited

    model = SimpleNamespace(edit=edit, head=None, base=SimpleNamespace(image_shape=(3, 32, 32)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_intervene.training.studies.effects.influence", lambda head, name: 0.5)
        found = chosen_values(model, "independent", images=64, seed=0)
    assert found["reconstructed"] == 0
    for name in ("quad2", "quad3", "quad4"):
        assert (
            found[name]["reference"] == 0
            and found[name]["chance"] > 0.4
            and found[name]["influence"] == 0.5
        )
        assert max(found[name]["kept"].values()) == 0
    if taken == "own":
        assert found["quad1"]["reference"] == 0
    else:
        assert found["quad1"]["reference"] == pytest.approx(found["quad1"]["chance"], abs=0.1)
        assert found["quad1"]["kept"]["quad2"] > 0.4 and found["quad1"]["kept"]["quad3"] == 0


def test_a_value_of_its_own_changes_nothing():
    model = InterventionPipeline.from_pretrained(hf_intervene.bundled("quad")).model
    own = quad.render(quad.sample_latents("obs", 256, seed=11))
    returned = corner_colours(model.reconstruct(own, output_type="np"))
    edited = corner_colours(model.edit(own, {"quad1": own}, output_type="np"))
    assert all(np.abs(edited[name] - returned[name]).mean() < 0.02 for name in returned)
