"""A finished run becomes a pipeline that comes with the package, by one command."""

import json
import re

import pytest
import torch
from shared_models import build

from hf_intervene import InterventionPipeline
from hf_intervene.bases.loading import base_reference
from hf_intervene.model_cards import pack


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A run, and folders in place of the package's."""
    run, pretrained, cards = (tmp_path / name for name in ("run", "pretrained", "cards"))
    for folder in (run, pretrained, cards):
        folder.mkdir()
    model = build()
    base = model.base.model  # of a run whose base was loaded from a folder
    base.save_pretrained(tmp_path / "base")
    loaded = type(base).from_pretrained(tmp_path / "base")
    model.head.config.base_reference = base_reference(loaded)
    model.save_pretrained(run / "model", save_base=True)
    (run / "model" / "training_arguments.yaml").write_text("dataset: avatars\n")
    monkeypatch.setattr(pack, "PRETRAINED", pretrained)
    monkeypatch.setattr(pack, "HERE", cards)
    return model, run, pretrained, cards


def test_a_run_is_packed(places, capsys):
    model, run, pretrained, cards = places
    assert pack.main([str(run), "faces"]) == 0
    folder = pretrained / "faces"
    assert capsys.readouterr().out.strip() == str(folder)
    files = [path.name for path in folder.rglob("*") if path.is_file()]
    assert not [name for name in files if name.endswith(".py")]
    assert {"README.md", "samples.png", "training_arguments.yaml", "model_index.json"} <= set(files)
    pipe = InterventionPipeline.from_pretrained(folder)
    noise = torch.randn(2, *model.noise_shape)
    found, expected = (
        m.sample(model.concepts[0], noise=noise, output_type="pt")
        for m in (pipe.model, model.eval())
    )
    assert pipe.base.dtype == torch.float32 and (found - expected).abs().max() < 0.02  # fp16
    card = (folder / "README.md").read_text()
    assert 'from_pretrained(hf_intervene.bundled("faces"))' in card
    assert card == (cards / "faces.md").read_text() and "<!--" not in card
    assert not re.search(r"/tmp|/home|/root", card)
    assert "loaded from a folder, not from the Hub" in card
    head = json.loads((folder / "head" / "config.json").read_text())
    assert head["base_reference"]["name_or_path"] == "./base"
    texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(str(run.parent).encode() in text for text in texts)
    assert pack.main([str(run), "faces"]) == 0  # once more: it is replaced


def test_what_cannot_be_packed(places, monkeypatch, capsys):
    _, run, pretrained, _ = places
    assert pack.main([str(run / "model"), "faces"]) == 1
    assert "is no finished run: it has no model/training_arguments.yaml" in capsys.readouterr().err
    monkeypatch.setattr(pack, "MOST_BYTES", 1000)
    assert pack.main([str(run), "faces"]) == 1
    assert "train a smaller model" in capsys.readouterr().err
    assert list(pretrained.iterdir()) == []  # nothing is left half done
