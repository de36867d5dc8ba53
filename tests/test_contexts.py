"""The vocabulary: every way to name a context ends in the same targets, and bad names are said clearly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_intervene.contexts import (
    context_name,
    context_names,
    is_per_sample,
    parse_context,
    parse_interventions,
    validate_concepts,
)


CONCEPTS = ("quad1", "quad2", "size")

names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="+=,", exclude_categories=["Z", "C"]), min_size=1, max_size=8),
    min_size=1,
    max_size=6,
    unique=True,
).filter(lambda values: not any(value.lower() == "obs" for value in values))


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
    assert parse_interventions(context, CONCEPTS, 3, free_blocks=2).tolist() == [[*expected, 0, 0]] * 3


def test_one_context_per_sample():
    interventions = [["quad1", "size"], "obs", {"quad2": 0.5}, None]
    expected = [[1, 0, 1, 0], [0, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0, 0]]
    assert parse_interventions(interventions, CONCEPTS, 4, free_blocks=1).tolist() == expected
    assert is_per_sample(interventions) and not is_per_sample(["quad1", "size"]) and not is_per_sample("quad1")
    with pytest.raises(ValueError, match="4 contexts were given for 3 samples"):
        parse_interventions(interventions, CONCEPTS, 3)


def test_tensors_are_checked_and_used_as_they_are():
    targets = torch.tensor([[0.0, 1.0, 0.3]])
    assert torch.equal(parse_interventions(targets, CONCEPTS, 2), targets.expand(2, -1))
    assert parse_interventions(torch.tensor([1.0, 0.0, 0.0, 0.0]), CONCEPTS, free_blocks=1).tolist() == [[1, 0, 0, 0]]
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
        ("size=lots", "strength of 'size'"),
        ("", "unknown concept ''"),
    ],
)
def test_bad_contexts(context, message):
    with pytest.raises(ValueError, match=message):
        parse_interventions(context, CONCEPTS)


@pytest.mark.parametrize("context", [3, 1.5, [["quad1", ["size"]]], object()])
def test_what_is_no_context(context):
    with pytest.raises(TypeError, match="as a context"):
        parse_interventions(context, CONCEPTS)


@pytest.mark.parametrize(
    "concepts", [[], ["a", "a"], ["obs"], ["OBS"], ["a+b"], ["a=1"], ["a,b"], [""], [" a"], [3], "quad1", None]
)
def test_bad_concept_names(concepts):
    with pytest.raises(ValueError):
        validate_concepts(concepts)


@given(names, st.data())
def test_names_round_trip(concepts, data):
    """Any set of strengths, written as a dict or as its canonical name, gives the same targets, and the name comes back."""
    concepts = validate_concepts(concepts)
    strengths = {name: data.draw(st.floats(0, 1)) for name in data.draw(st.lists(st.sampled_from(concepts), unique=True))}
    targets = parse_interventions(strengths, concepts)
    assert targets.tolist() == [[pytest.approx(strengths.get(name, 0.0)) for name in concepts]]
    name = context_name(strengths, concepts)
    assert parse_context(name, concepts) == {key: value for key, value in strengths.items() if value > 0}
    assert context_name(name, concepts) == name
    full = {key: 1.0 for key in strengths}
    assert context_names(parse_interventions(full, concepts), concepts) == [context_name(full, concepts)]
    assert context_name(list(reversed(list(full))), concepts) == context_name(full, concepts)
