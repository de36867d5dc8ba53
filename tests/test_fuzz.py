"""Fuzzing of all input: contexts, settings, checkpoints, configurations, cards.

For any input the package raises only documented errors with one sentence. It does not hang,
allocates no memory for sizes that a file only claims, and runs no code. `FUZZ_SECONDS` is the time
of all targets of a file together; for an hour, with those of `test_fuzz_use.py`:

    FUZZ_SECONDS=1800 python -m pytest -q -m slow tests/test_fuzz.py tests/test_fuzz_use.py
"""

import json
import os
import re
import shutil
import time

import numpy as np
import pytest
import torch
import yaml
from conftest import TINY
from diffusers import AutoencoderTiny
from diffusion_models import stable_diffusion, with_head
from fuzzing import (
    fuzz_for,
    harmed,
    mutations,
    numbers,
    only_ours,
    scalars,
    spoken,
    values,
    words,
)
from huggingface_hub import ModelCard
from hypothesis import strategies as st
from shared_models import build, frozen_on

from hf_intervene import (
    InterventionHead,
    InterventionModel,
    InterventionPipeline,
    Quantile,
    load_base,
    trainer,
)
from hf_intervene.cards import write_card
from hf_intervene.contexts import (
    context_name,
    parse_choices,
    parse_interventions,
    parse_values,
    validate_concepts,
)
from hf_intervene.trainer import checkpoints
from hf_intervene.trainer.parsing import read_config
from hf_intervene.trainer.settings import KIND_OF, SECTION_OF, SECTIONS, TrainArguments


CONCEPTS = ("quad1", "quad2", "size")
SECONDS = float(os.environ.get("FUZZ_SECONDS", 15))


# Contexts

names = st.sampled_from(
    [
        *CONCEPTS,
        "obs",
        "",
        "quad1+size",
        "size=0.5",
        "size@0.9",
        "quad1=",
        "@",
        "+",
        "size=nan",
        "size@2",
    ]
)
tensors = st.lists(numbers.filter(lambda n: abs(n) < 2**60), max_size=5).map(
    lambda row: torch.tensor(row, dtype=torch.float64)
)
images = st.sampled_from(
    [
        np.zeros((4, 4, 3), np.uint8),
        torch.zeros(2, 3, 4, 4),
        np.zeros(()),
        torch.tensor(0.5),
        np.float32(1),
    ]
)
atoms = st.one_of(
    names,
    scalars,
    images,
    tensors,
    st.floats(0, 1, exclude_min=True, exclude_max=True).map(Quantile),
)
contexts = st.recursive(
    atoms,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(names | words, inner, max_size=3)
    ),
)


def check_contexts(example):
    context, samples = example
    targets = only_ours(parse_interventions, context, CONCEPTS, samples, 1)
    if targets is not None:
        assert targets.shape[1] == 4 and ((targets >= 0) & (targets <= 1)).all()
    only_ours(parse_choices, context, CONCEPTS, samples, 1)
    only_ours(parse_values, context, CONCEPTS)
    name = only_ours(context_name, context, CONCEPTS)
    if name is not None:
        assert context_name(name, CONCEPTS) == name
    if (concepts := only_ours(validate_concepts, context)) is not None:
        assert all(name.isprintable() and "/" not in name for name in concepts)


# Settings

fields = st.sampled_from(sorted([*SECTIONS, *SECTION_OF]))
lines = st.one_of(
    st.tuples(fields, values).map(lambda pair: yaml.safe_dump({pair[0]: pair[1]})),
    st.tuples(fields | words, words).map(": ".join),
    st.sampled_from(
        [
            "a: &a [1]",
            "b: *a",
            "- x",
            "? y",
            "!!python/object/apply:os.system ['true']",
            "x: !!timestamp y",
            "z: !!int q",
            "d: 2020-99-99",
        ]
        + [
            "o: !!bool maybe",
            "t: !!binary ///",
            "<<: {a: 1}",
            "%YAML 9.9",
            "---",
            "...",
            "{a: [" * 20,
            "'",
            "\t",
            "k: |",
            "s: !!set {a, b}",
        ]
    ),
    st.text(max_size=30),
)
laughs = (
    "a0: &a0 [x, x]\n"
    + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    + "concepts: *a39\n"
)
documents = st.one_of(
    st.lists(lines, max_size=5).map("\n".join),
    st.binary(max_size=60),
    st.just(laughs),
    st.just("[" * 10_000),
)


def check_documents(document, folder):
    path = folder / "config.yaml"
    path.write_bytes(
        document if isinstance(document, bytes) else document.encode("utf-8", "surrogatepass")
    )
    settings = only_ours(read_config, str(path))
    if settings is not None:
        only_ours(lambda: TrainArguments(**settings))


_HARMLESS = (
    "output_dir",
    "dataset",
    "base",
    "resume",
    "tracker",
    "mnist_digits",
    "image_encoder",
    "base_subfolder",
)
_BY_TYPE = {
    "int": st.one_of(st.integers(-2, 20), st.sampled_from([2**20, 2**31, 2**63, 2**70, -(2**70)])),
    "float": st.floats(),
    "str": words
    | st.sampled_from(
        [
            "dependent",
            "none",
            "no",
            "bf16",
            "fp16",
            "batch",
            "layer",
            "single",
            "obs",
            "quad1",
        ]
    ),
    "bool": st.booleans(),
}
_TYPED = {}
for _name, _kind in KIND_OF.items():
    _inner = next((key for key in _BY_TYPE if key in str(_kind)), None)
    if _name not in _HARMLESS and _inner is not None:
        _values = _BY_TYPE[_inner]
        _TYPED[_name] = st.lists(_values, max_size=3) if "list" in str(_kind) else _values
some_settings = st.lists(
    st.sampled_from(sorted(_TYPED)), min_size=1, max_size=3, unique=True
).flatmap(lambda chosen: st.fixed_dictionaries({name: _TYPED[name] for name in chosen}))


def check_settings(changes, folder):
    """Make a run of at most two steps."""
    settings = (
        TINY
        | {"images_per_context": 8, "max_steps": 2, "output_dir": str(folder / "run")}
        | changes
    )
    if (
        settings["max_steps"] not in (1, 2)
        or settings["images_per_context"] > 100
        or settings["validation_images"] > 100
        or (settings["prior_steps"] or 0) > 100
    ):
        only_ours(lambda: TrainArguments(**settings))  # more would only take time
        return
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    run_trainer(folder / "config.yaml")


def run_trainer(config, *options):
    """Run the trainer as a command."""
    spoken(trainer.main, "--config", str(config), *options)


# Checkpoints

KINDS = {
    "model": InterventionModel.from_pretrained,
    "frozen": InterventionModel.from_pretrained,
    "lora": InterventionModel.from_pretrained,
    "pipeline": InterventionPipeline.from_pretrained,
    "head": InterventionHead.from_pretrained,
    "denoiser": InterventionModel.from_pretrained,
    "source": lambda folder: load_base(folder, 16),
}
harms = st.tuples(st.floats(0, 1), mutations)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Save a model of each kind, and make a run of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    model = build()
    model.save_pretrained(folder / "model")
    model.head.save_pretrained(folder / "head")
    InterventionPipeline.from_model(model).save_pretrained(folder / "pipeline")
    with_head("dit").save_pretrained(folder / "denoiser")
    stable_diffusion(with_head("conditional"), folder).save_pretrained(folder / "source")
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
        folder / "vae"
    )
    frozen_on(AutoencoderTiny.from_pretrained(folder / "vae")).save_pretrained(folder / "frozen")
    frozen_on(AutoencoderTiny.from_pretrained(folder / "vae"), lora_rank=2).save_pretrained(
        folder / "lora"
    )
    run = TINY | {
        "images_per_context": 8,
        "max_steps": 2,
        "eval_every": 2,
        "ema_decay": 0.9,
        "schedule": "single",
    }
    trainer.train(TrainArguments(**run, output_dir=str(folder / "run")))
    return folder


def check_checkpoint(example, saved, folder):
    kind, harm = example
    only_ours(KINDS[kind], harmed(saved / kind, folder / "harmed", harm))


def check_resumed(harm, saved, folder):
    run = harmed(saved / "run", folder / "run", harm, "checkpoints/*/*")
    only_ours(checkpoints.newest_checkpoint, run / "checkpoints")
    run_trainer(
        saved / "run" / "training_arguments.yaml", "--output_dir", str(run), "--resume", "auto"
    )


# Cards

METRICS = {
    "settings": {"dataset": "quad", "variant": "dependent"},
    "contexts": {
        "obs": {
            "images": 9,
            "bits_per_pixel": 1.0,
            "paper": {"distance": 2.0, "interval": [1.0, 3.0], "floor": 1.0, "ratio": 2.0},
        }
    },
    "means": {
        "training": {
            "contexts": 1,
            "bits_per_pixel": 1.0,
            "paper": {"distance": 2.0, "interval": [1.0, 3.0], "floor": 1.0, "ratio": 2.0},
        }
    },
}
card_parts = st.fixed_dictionaries(
    {"concept": words, "settings": lines, "metrics": mutations, "config": harms}
)


def check_card(example, saved, folder):
    target = harmed(saved / "model", folder / "card", example["config"], "config.json")
    metrics = folder / "metrics.json"
    metrics.write_text(json.dumps(METRICS))
    harmed_metrics = folder / "metrics"
    harmed_metrics.mkdir(exist_ok=True)
    (harmed_metrics / "metrics.json").write_text(json.dumps(METRICS))
    only_ours(lambda: harmed(harmed_metrics, folder / "harmed-metrics", (0.0, example["metrics"])))
    (target / "training_arguments.yaml").write_text(
        example["settings"], encoding="utf-8", errors="replace"
    )
    config = target / "config.json"
    try:
        found = json.loads(config.read_text())
        config.write_text(json.dumps(found | {"concepts": ["a", example["concept"]]}))
    except (OSError, ValueError, TypeError, RecursionError):
        pass
    card = only_ours(lambda: write_card(target, "user/name", folder / "harmed-metrics"))
    if card is not None:
        # code is shown as it is
        text = re.sub(r"^```.*?^```", "", ModelCard.load(card).text, flags=re.M | re.S)
        assert "<script>" not in text.replace("`<script>`", "") and "\n| 49" not in text


TARGETS = {
    "contexts": (st.tuples(contexts, st.none() | st.integers(-1, 4)), check_contexts, ()),
    "documents": (documents, check_documents, ("folder",)),
    "settings": (some_settings, check_settings, ("folder",)),
    "checkpoints": (
        st.tuples(st.sampled_from(sorted(KINDS)), harms),
        check_checkpoint,
        ("saved", "folder"),
    ),
    "resumed": (harms, check_resumed, ("saved", "folder")),
    "cards": (card_parts, check_card, ("saved", "folder")),
}


def run_target(name, seconds, first_seed, saved, folder, examples):
    """Run rounds of examples until the time is up. Return their number."""
    strategy, check, needs = TARGETS[name]
    arguments = [{"saved": saved, "folder": folder}[need] for need in needs]
    return fuzz_for(
        strategy, lambda example: check(example, *arguments), seconds, first_seed, examples
    )


@pytest.mark.parametrize("name", TARGETS)
def test_a_little_of_everything(name, saved, tmp_path):
    run_target(name, SECONDS / len(TARGETS), 0, saved, tmp_path, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_for_as_long_as_asked(name, saved, tmp_path, capsys):
    seed = int(os.environ.get("FUZZ_SEED", time.time()))
    tried = run_target(name, SECONDS / len(TARGETS), seed, saved, tmp_path, 100)
    with capsys.disabled():
        print(f"\n{name}: {tried} examples, seeds from {seed}")
