"""Contexts: every form of a context gives the same targets, and bad names raise clear errors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_intervene.contexts import (
    Quantile,
    context_name,
    is_per_sample,
    parse_choices,
    parse_context,
    parse_interventions,
    parse_values,
    validate_concepts,
)


CONCEPTS = ("quad1", "quad2", "size")

names = st.lists(
    st.text(
        st.characters(codec="utf-8", exclude_characters="+=,@/\\", exclude_categories=["Z", "C"]),
        min_size=1,
        max_size=8,
    ),
    min_size=1,
    max_size=6,
    unique=True,
).filter(lambda values: not any(value.lower() in ("obs", ".", "..") for value in values))


@pytest.mark.parametrize(
    ("context", "expected"),
    [
        ("obs", [0, 0, 0]),
        (None, [0, 0, 0]),
        ([], [0, 0, 0]),
        ("quad1", [1, 0, 0]),
        (["quad1", "size"], [1, 0, 1]),
        (("size", "quad1"), [1, 0, 1]),
        ("size+quad1", [1, 0, 1]),
        ({"size": 0.5}, [0, 0, 0.5]),
        ("quad2 + size=0.25", [0, 1, 0.25]),
        ({"size": 0}, [0, 0, 0]),
    ],
)
def test_every_form_of_one_context(context, expected):
    assert parse_interventions(context, CONCEPTS).tolist() == [expected]
    assert (
        parse_interventions(context, CONCEPTS, 3, free_blocks=2).tolist() == [[*expected, 0, 0]] * 3
    )


def test_one_context_per_sample():
    interventions = [["quad1", "size"], "obs", {"quad2": 0.5}, None]
    expected = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 0]]
    assert parse_interventions(interventions, CONCEPTS, 4, free_blocks=1).tolist() == expected
    assert (
        is_per_sample(interventions)
        and not is_per_sample(["quad1", "size"])
        and not is_per_sample("quad1")
    )
    with pytest.raises(ValueError, match="4 contexts were given for 3 samples"):
        parse_interventions(interventions, CONCEPTS, 3)


def test_tensors_are_checked_and_used_as_they_are():
    targets = torch.tensor([[0.0, 1.0, 0.3]])
    assert torch.equal(parse_interventions(targets, CONCEPTS, 2), targets.expand(2, -1))
    assert parse_interventions(
        torch.tensor([1.0, 0.0, 0.0, 0.0]), CONCEPTS, free_blocks=1
    ).tolist() == [[1, 0, 0, 0]]
    for bad, message in (
        (torch.tensor([[0.0, 1.5, 0.0]]), r"lie in \[0, 1\]"),
        (torch.tensor([[0.0, float("nan"), 0.0]]), r"lie in \[0, 1\]"),
        (torch.zeros(2, 5), "must have shape"),
        (torch.tensor([[0.0, 0.0, 0.0, 1.0]]), "free blocks must be 0"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_interventions(bad, CONCEPTS, free_blocks=1)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ("quad9", "unknown concept 'quad9'; the known ones are obs, quad1, quad2, size"),
        (["quad1", "quad1"], "named twice"),
        ("quad1+quad1", "named twice"),
        (["obs", "quad1"], "cannot be combined"),
        ({"size": 1.5}, r"strength of 'size' must be a number in \[0, 1\]"),
        ({"size": float("nan")}, "strength of 'size'"),
        ({"size": -0.1}, "strength of 'size'"),
        ({"size": "much"}, "strength of 'size'"),
        ("size=lots", "strength of 'size' must be .*, not 'lots'"),
        ("", "unknown concept ''"),
        ("size@lots", "quantile must be a number between 0 and 1, both excluded, not 'lots'"),
        ("size@1", "quantile must be a number between 0 and 1"),
        ("size@0", "quantile must be a number between 0 and 1"),
        ("size=0.5@0.9", "strength of 'size'"),
        ("obs@0.5", "a value was chosen for 'obs'"),
        ("quad9@0.5", "unknown concept 'quad9'; the known ones are obs, quad1, quad2, size"),
        ({"size": []}, "strength of 'size'"),
        ({"size": torch.zeros(())}, "strength of 'size'"),
        ("quad1+size@0.9", "a value was chosen for 'size', but here only names and strengths"),
        ({"quad1": torch.zeros(3, 4, 4)}, "a value was chosen for 'quad1'"),
    ],
)
def test_bad_contexts(context, message):
    with pytest.raises(ValueError, match=message):
        parse_interventions(context, CONCEPTS)


def test_chosen_values_are_carried_through():
    a, b = torch.zeros(3, 4, 4), torch.ones(3, 4, 4)
    targets, choices = parse_choices(
        {"size": Quantile(0.9), "quad1": a, "quad2": 0.5}, CONCEPTS, 2, free_blocks=1
    )
    assert targets.tolist() == [[1, 0.5, 1, 0]] * 2
    assert choices == [{"quad1": a, "size": Quantile(0.9)}] and choices[0]["quad1"] is a
    targets, choices = parse_choices([{"quad1": a}, "obs", ["quad2", "size@0.25"]], CONCEPTS)
    assert targets.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 1]]
    assert choices == [{"quad1": a}, {}, {"size": Quantile(0.25)}]
    for many in ([a, b], torch.stack([a, b])):  # one reference per sample
        for number in (None, 2):
            targets, choices = parse_choices(
                {"quad1": many, "quad2": [a], "size": Quantile(0.5)}, CONCEPTS, number
            )
            assert targets.tolist() == [[1, 1, 1]] * 2
            assert [torch.equal(row["quad1"], image) for row, image in zip(choices, (a, b))] == [
                True,
                True,
            ]
            assert all(torch.equal(row["quad2"], a) for row in choices)
    assert (
        parse_choices("quad1", CONCEPTS, 5)[1] == parse_choices(torch.zeros(3), CONCEPTS)[1] == []
    )
    for bad, number in (
        ({"quad1": [a, b]}, 3),
        ({"quad1": [a, b], "quad2": [a, b, b]}, None),
        ({"quad1": torch.zeros(0, 3, 4, 4)}, 2),
    ):
        with pytest.raises(
            ValueError,
            match=(
                "reference images of '.*' were given for . samples: give one for all, or one per"
                " sample"
            ),
        ):
            parse_choices(bad, CONCEPTS, number)
    with pytest.raises(ValueError, match="2 reference images of 'quad1' were given for 1 sample:"):
        parse_choices([{"quad1": [a, b]}, "obs"], CONCEPTS)
    with pytest.raises(ValueError, match="a reference image, here of 'quad1', has no name"):
        context_name({"quad1": a}, CONCEPTS)
    for bad in ("a", None, float("nan"), 0, 1, -0.5):
        with pytest.raises(ValueError, match="a quantile must be a number"):
            Quantile(bad)


@pytest.mark.parametrize(
    "context",
    [3, 1.5, Quantile(0.5), torch.zeros(3, 4, 4).numpy(), [["quad1", ["size"]]], object()],
)
def test_values_that_are_not_contexts(context):
    with pytest.raises(TypeError, match="as a context"):
        parse_interventions(context, CONCEPTS)


@pytest.mark.parametrize(
    "concepts",
    [
        [],
        ["a", "a"],
        ["obs"],
        ["OBS"],
        ["a+b"],
        ["a=1"],
        ["a,b"],
        ["a@b"],
        ["a/b"],
        ["..\\a"],
        ["a\nb"],
        ["a\x1bb"],
        [""],
        [" a"],
        [3],
        "quad1",
        None,
    ],
)
def test_bad_concept_names(concepts):
    with pytest.raises(ValueError):
        validate_concepts(concepts)


@settings(deadline=None)
@given(names, st.data())
def test_names_round_trip(concepts, data):
    """Any strengths give the same targets as a dict and as a name, and targets give the name."""
    concepts = validate_concepts(concepts)
    strengths = {
        name: data.draw(st.floats(0, 1))
        for name in data.draw(st.lists(st.sampled_from(concepts), unique=True))
    }
    targets = parse_interventions(strengths, concepts)
    assert targets.tolist() == [[pytest.approx(strengths.get(name, 0.0)) for name in concepts]]
    name = context_name(strengths, concepts)
    assert parse_context(name, concepts) == {
        key: value for key, value in strengths.items() if value > 0
    }
    assert context_name(name, concepts) == name
    points = st.floats(0, 1, exclude_min=True, exclude_max=True).map(Quantile)
    values = strengths | {
        name: data.draw(points)
        for name in data.draw(st.lists(st.sampled_from(concepts), unique=True))
    }
    name = context_name(values, concepts)
    assert parse_values(name, concepts) == {
        key: value for key, value in values.items() if value != 0
    }
    assert context_name(name, concepts) == name
    assert parse_choices(name, concepts)[0].equal(parse_choices(values, concepts)[0])
    full = {key: 1.0 for key in strengths}
    assert context_name(list(reversed(list(full))), concepts) == context_name(full, concepts)
