"""The cards of the data sets agree with the modules."""

import re
from importlib.resources import as_file, files

import pytest
from huggingface_hub import DatasetCard

from hf_intervene.data import avatars, ident3d, mnist, quad


MODULES = {"quad": quad, "mnist": mnist, "ident3d": ident3d, "avatars": avatars}
LICENSES = {
    "quad": "apache-2.0",
    "mnist": "cc-by-sa-3.0",
    "ident3d": "apache-2.0",
    "avatars": "cc0-1.0",
}


@pytest.fixture(params=MODULES)
def card(request):
    with as_file(files("hf_intervene.model_cards") / "datasets" / f"{request.param}.md") as path:
        return request.param, DatasetCard.load(path)


def table(text, heading, columns):
    """Return the cells of the first table below a heading whose header starts with a text."""
    rows = (
        text.split(heading)[1].split(f"| {columns} |")[1].split("\n\n")[0].strip().split("\n")[1:]
    )
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_contexts_licence_and_columns(card):
    name, card = card
    module = MODULES[name]
    data = card.data.to_dict()
    assert data["contexts"] == {
        "train": list(module.TRAIN_CONTEXTS),
        "held_out": list(module.HELD_OUT),
    }
    assert data["license"] == LICENSES[name] and data["pretty_name"]
    assert (
        data["task_categories"][0] == "unconditional-image-generation"
        and "hf-intervene" in data["tags"]
    )
    images = 4000 * len(module.TRAIN_CONTEXTS)
    assert data["size_categories"] == ["10K<n<100K"] and 10_000 < images < 100_000
    truth = "Latents" if hasattr(module, "LATENTS") else "Attributes"
    for heading in ("Columns", "Contexts", truth, "How it was made", "Limits", "Citation"):
        assert f"\n## {heading}\n" in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    scope = {}
    exec(code.replace("images_per_context=100", "images_per_context=2, streaming=True"), scope)
    row = next(iter(scope["data"]))
    assert list(row) == re.findall(
        r"^\| `(\w+)` \|", card.text.split("## Columns")[1].split("##")[0], re.MULTILINE
    )
    if truth == "Attributes":
        return
    assert f"{len(row['latents'])} float32" in card.text
    assert all(
        f"`{latent}`" in card.text for latent in module.LATENTS if not latent.startswith("quad")
    )


def test_numbers_of_the_tables(card):
    name, card = card
    if name == "avatars":
        check_attributes(card.text)
        return
    if name == "mnist":
        rows = {
            row[0].split("`")[1]: row[1:]
            for row in table(card.text, "## Latents", "latent | concept | from | to | otherwise")
        }
        assert tuple(rows) == mnist.LATENTS
        for latent, (concept, neutral, low, high) in mnist._PARAMETERS.items():
            assert rows[latent][0] == f"`{concept}`" and [float(x) for x in rows[latent][1:]] == [
                low,
                high,
                neutral,
            ]
        return
    module = MODULES[name]
    edges = {
        (a.strip("`"), b.strip("`")): float(weight)
        for a, b, weight in table(card.text, "## Latents", "from | to | weight")
    }
    assert edges == module._EDGES
    if name == "ident3d":
        rows = table(card.text, "## Latents", "latent | from | to")
        assert tuple(row[0].split("`")[1] for row in rows) == ident3d.LATENTS
        ranges = [[float(re.match(r"-?[\d.]+", cell)[0]) for cell in row[1:]] for row in rows]
        assert ranges == ident3d.RANGES.tolist()


def check_attributes(text):
    """Rates and numbers of kinds agree with the attributes of the training images."""
    columns = avatars.attributes_by_context()
    natural = avatars.concepts_present(columns["obs"]).mean(0)
    rows = table(text, "## Attributes", "concept | column | in `obs` | under an intervention")
    assert [row[0].strip("`") for row in rows] == list(avatars.CONCEPTS)
    for (concept, column, rate, kinds), share in zip(rows, natural):
        drawn = columns[concept.strip("`")][column.strip("`")]
        assert int(re.search(r"one of (\d+)", kinds)[1]) == len(set(drawn))
        if percent := re.match(r"(\d+) %", rate):
            assert abs(int(percent[1]) / 100 - share) < 0.01
        else:
            assert share == 0 and f"one of {len(set(columns['obs']['mouth']))} sad" in rate
