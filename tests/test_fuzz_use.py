"""Fuzzing of what a user does: own data, commands, arguments of sampling, requests to the page.

As in `test_fuzz.py`, which says how to run it for an hour.
"""

import os
import time
from types import SimpleNamespace

import datasets
import gradio as gr
import numpy as np
import pytest
import torch
from diffusion_models import with_head
from fuzzing import fuzz_for, harmed, mutations, numbers, only_ours, scalars, spoken, values, words
from hypothesis import strategies as st
from PIL import Image
from shared_models import build

from hf_intervene import InterventionPipeline, app, cli
from hf_intervene.data import ContextImages, load_contexts
from hf_intervene.page import Page


SECONDS = float(os.environ.get("FUZZ_SECONDS", 15))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data in each form, and a saved pipeline of images and one of a denoiser."""
    folder = tmp_path_factory.mktemp("made")
    rng = np.random.default_rng(0)
    contexts = ["obs"] * 9 + ["hat"] * 9
    pictures = [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)) for _ in contexts]
    for number, (context, picture) in enumerate(zip(contexts, pictures)):
        for form in ("folders", "metadata"):
            place = folder / form / (context if form == "folders" else "")
            place.mkdir(parents=True, exist_ok=True)
            kind = ("png", "jpg", "gif", "webp")[number % 4]
            picture.save(place / f"{number}.{kind}")
        with open(folder / "metadata" / "metadata.csv", "a") as file:
            file.write("file_name,context\n" * (number == 0) + f"{number}.{kind},{context}\n")
    data = datasets.Dataset.from_dict({"image": pictures, "context": contexts})
    data.save_to_disk(str(folder / "arrow"))
    (folder / "parquet").mkdir()
    data.to_parquet(str(folder / "parquet" / "metadata.parquet"))
    InterventionPipeline.from_model(build()).save_pretrained(folder / "pipeline")
    with_head("unet").save_pretrained(folder / "denoiser")
    pictures[0].resize((16, 16)).save(folder / "photo.png")
    return folder


# Data

harms = st.tuples(st.floats(0, 1), mutations)
how = st.fixed_dictionaries(
    {},
    optional={
        "split": words,
        "image_column": words | st.just("context"),
        "context_column": words | st.just("image"),
        "frames": scalars,
    },
)
reading = st.fixed_dictionaries(
    {
        "concepts": st.none() | values,
        "resolution": st.none() | numbers | st.just(8),
        "channels": st.just(3) | scalars,
    }
)


def check_data(example, made, folder):
    form, harm, loading, decoding = example
    source = harmed(made / form, folder / "data", harm)
    data = only_ours(lambda: load_contexts(source, **loading))
    if data is not None and (decoding["resolution"] or 8) < 100:
        frames = {name: loading[name] for name in ("frames",) if name in loading}
        only_ours(lambda: ContextImages.from_dataset(data, **decoding, **frames))


data = st.tuples(st.sampled_from(["folders", "metadata", "arrow", "parquet"]), harms, how, reading)


# Commands

_OPTIONS = [
    *("--interventions", "--num-images", "--seed", "--output", "--resize", "--json", "--context"),
    *("--reference", "--reference-context", "--num-inference-steps", "--guidance-scale", "--size"),
    *("--resolution", "--images", "--split", "--image-column", "--metrics", "--model", "--dataset"),
    *("--protocol", "--edits", "--config", "--license", "--help", "--version", "--lang", "-x"),
]
_WORDS = [
    "pipeline",
    "denoiser",
    "folders",
    "photo.png",
    "obs",
    "quad1",
    "size=0.5",
    "out.png",
    "3",
]
some_words = st.lists(
    st.sampled_from(_OPTIONS)
    | st.sampled_from(_WORDS)
    | words
    | numbers.map(str)
    | st.text(max_size=5),
    max_size=7,
)
commands = st.tuples(
    # `app` and `demo` serve pages and train, which takes minutes where it is not refused.
    st.sampled_from(
        [
            "sample",
            "edit",
            "concepts",
            "check",
            "support",
            "card",
            "completion",
            "evaluate",
            "",
            "x",
        ]
    ),
    some_words,
)


def check_command(example, made, folder):
    command, given = example
    names = {path.name: str(path) for path in made.iterdir()}
    if (given or [""])[0] in ("demo", "train", "app") and not command:
        return  # as above
    given = [names.get(word, word).replace("out.png", str(folder / "out.png")) for word in given]
    if any(word.isdecimal() and int(word) > 64 for word in given):
        return  # so many images take long
    os.chdir(folder)  # where names without a folder are written
    # A check that finds something wrong with the data ends with 1 and no error.
    spoken(
        cli.main, *[command] * bool(command), *given, statuses=(0, 1, 2), silent=command == "check"
    )


# Arguments of sampling

tensors = st.sampled_from(
    [
        torch.zeros(2, 4, 4),
        torch.full((1, 4, 4), float("nan")),
        torch.zeros(()),
        np.zeros((2, 3, 16, 16)),
        np.zeros((1, 16, 16, 3), np.uint8),
        torch.zeros(1, 3, 16, 16),
        torch.zeros(2, 3, 16, 16, dtype=torch.int64),
        Image.new("RGB", (16, 16)),
        Image.new("I;16", (16, 16)),
        [Image.new("L", (16, 16)), "photo.png"],
        torch.Generator().manual_seed(0),
    ]
)
anything = tensors | values
SAMPLING = ("num_images", "generator", "noise", "output_type", "residual_scale", "residual_noise")
SHARED = ("num_inference_steps", "guidance_scale", "batch_size", "reference_context", "compose")
some = {name: anything for name in (*SAMPLING, *SHARED)}
interventions = st.sampled_from([None, "obs", "quad1", ["a"], {"size": 0.5}]) | anything
arguments = st.tuples(
    st.sampled_from(["pipeline", "denoiser"]),
    st.sampled_from(["sample", "edit", "reconstruct", "predict", "targets"]),
    interventions,
    anything,
    st.fixed_dictionaries({}, optional=some),
)


def check_arguments(example, models):
    kind, method, asked, image, options = example
    kind = "pipeline" if method == "reconstruct" else kind  # of a denoiser it takes all its steps
    count = options.get("num_images")
    if isinstance(count, (int, float)) and abs(count) > 16:
        options = options | {"num_images": 2}
    steps = options.get("num_inference_steps")
    if isinstance(steps, (int, float)) and not isinstance(steps, bool) and steps > 3:
        options = options | {"num_inference_steps": 2}
    own = {"sample": (*SAMPLING, *SHARED), "edit": SHARED, "predict": SHARED}.get(method, ())
    given = {name: options[name] for name in own if name in options}
    if "num_inference_steps" in own:
        given.setdefault("num_inference_steps", 1)
    first = {"sample": (asked,), "targets": (asked,), "predict": (image, image, asked)}
    only_ours(lambda: getattr(models[kind], method)(*first.get(method, (image, asked)), **given))


# Requests to the page


def check_request(example, blocks):
    name, raw = example
    function = next(f for f in blocks.fns.values() if f.api_name == name)
    try:
        parts = zip(function.inputs, (raw * 8)[: len(function.inputs)])
        given = [part.preprocess(value) if name != "edit" else value for part, value in parts]
    except Exception:  # Gradio itself refuses the value
        return
    try:
        function.fn(SimpleNamespace(), *given)
    except gr.Error as error:
        text = error.message
        assert text and "\n" not in text and "Traceback" not in text, text


requests = st.tuples(
    st.sampled_from(["sample", "edit", "compose"]),
    st.lists(values | st.sampled_from([True, 1, 0.5, ["quad1", "size"]]), min_size=1, max_size=12),
)


TARGETS = {
    "data": (data, check_data, ("made", "folder")),
    "commands": (commands, check_command, ("made", "folder")),
    "arguments": (arguments, check_arguments, ("models",)),
    "requests": (requests, check_request, ("blocks",)),
}


def run_target(name, seconds, first_seed, made, folder, monkeypatch, examples):
    strategy, check, needs = TARGETS[name]
    monkeypatch.chdir(folder)  # and back again
    monkeypatch.setattr(app.CLIENTS, "left", lambda request: False)
    have = {"made": made, "folder": folder}
    if "models" in needs:
        have["models"] = {
            "pipeline": InterventionPipeline.from_pretrained(made / "pipeline").model,
            "denoiser": with_head("unet"),
        }
    if "blocks" in needs:
        have["blocks"] = app.build(Page(made / "pipeline"))
    given = [have[need] for need in needs]
    return fuzz_for(strategy, lambda e: check(e, *given), seconds, first_seed, examples)


@pytest.mark.parametrize("name", TARGETS)
def test_a_little_of_everything(name, made, tmp_path, monkeypatch):
    run_target(name, 1.0, 0, made, tmp_path, monkeypatch, 4)


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_for_as_long_as_asked(name, made, tmp_path, monkeypatch, capsys):
    seed = int(os.environ.get("FUZZ_SEED", time.time()))
    tried = run_target(name, SECONDS / len(TARGETS), seed, made, tmp_path, monkeypatch, 100)
    with capsys.disabled():
        print(f"\n{name}: {tried} examples, seeds from {seed}")
