"""Harmful checkpoints are refused with one sentence.

None of their code runs, and no memory is allocated for the sizes that they claim.
"""

import json
import os
import pickle
import shutil
import struct
import time

import pytest
import torch
from diffusion_models import save_pipeline, save_vision, stable_diffusion, with_head
from fuzzing import bounds
from hostile import HEAD, LOADERS, PARTS, Canary, change, refused, save_originals
from safetensors.torch import load_file

from hf_intervene import (
    InterventionHead,
    InterventionModel,
    hub,
    image_files,
    load_base,
    yaml_files,
)
from hf_intervene.bases import DiffusionBase
from hf_intervene.bases.loading import load_scheduler, load_vision


HUGE = 10**9


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return save_originals(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def copy(originals, tmp_path):
    """Copy a checkpoint of some kind, which the test may damage."""
    return lambda kind: shutil.copytree(originals / kind, tmp_path / kind)


# Weights


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize(("kind", "part", "stem"), PARTS)
def test_pickled_weights_are_not_opened(copy, tmp_path, kind, part, stem, decoy):
    """With `decoy` there is also a safetensors file of another name."""
    folder = copy(kind)
    weights = folder / part / f"{stem}.safetensors"
    weights.rename(weights.with_name("other.safetensors")) if decoy else weights.unlink()
    for suffix in ("bin", "pt", "pkl"):
        torch.save(
            Canary(tmp_path / "opened"),
            folder / part / f"{'pytorch_model' if stem == HEAD else stem}.{suffix}",
        )
    refused(
        folder,
        "no whole weights in safetensors format .*pickle files, which are never loaded",
        kind,
    )
    weights.write_bytes(pickle.dumps(Canary(tmp_path / "opened")))
    refused(folder, "weights are truncated or corrupt", kind)
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    "name",
    [
        "../else.safetensors",
        "{folder}/else.safetensors",
        "sub/else.safetensors",
        "else.bin",
        "..",
        "a\x00b",
    ],
)
@pytest.mark.parametrize(("kind", "part", "stem"), PARTS)
def test_an_index_may_name_only_files_in_its_folder(copy, tmp_path, kind, part, stem, name):
    folder = copy(kind)
    weights, name = folder / part / f"{stem}.safetensors", name.format(folder=tmp_path)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), name)}
    if "else" in name:  # the file exists
        (weights.parent / name).parent.mkdir(exist_ok=True)
        weights.rename(weights.parent / name)
    weights.with_name(f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    refused(folder, "no whole weights in safetensors format", kind)


def header(entries, length=None, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HEADERS = {
    "terabytes": header(
        {"w": {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}}
    ),
    "overflow": header(
        {"w": {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]}}, data=bytes(16)
    ),
    "length": header({}, 2**62),
    "overlap": header(
        {k: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for k in "ab"}, data=bytes(8)
    ),
    "negative": header(
        {"w": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}, data=bytes(8)
    ),
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "list": header([]),
    "empty": b"",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
@pytest.mark.parametrize(("kind", "part", "stem"), PARTS)
def test_a_header_that_claims_more_than_there_is(copy, kind, part, stem, content):
    folder = copy(kind)
    (folder / part / f"{stem}.safetensors").write_bytes(content)
    refused(folder, "weights are truncated or corrupt", kind)


# Configurations


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"free_blocks": HUGE}, "free_blocks must be at most"),
        ({"free_blocks": 10**6}, "do not fit its configuration: it asks for"),
        ({"noise_width": 10**6}, "do not fit its configuration: it asks for"),
        ({"concept_width": 10**6}, "do not fit its configuration|cannot be used"),
        ({"depth": HUGE}, "depth must be at most"),
        ({"depth": 1000}, "far more than there are weights|do not fit its configuration"),
        ({"propagation_steps": HUGE}, "propagation_steps must be at most"),
        ({"feature_width": 10**6}, "do not fit its configuration"),
        ({"embedding_shape": [HUGE, HUGE]}, "embedding_shape must hold positive sizes of at most"),
        ({"embedding_shape": [10**6] * 4}, "cannot be used|do not fit"),
        ({"concepts": [f"c{n}" for n in range(10_000)]}, "do not fit its configuration"),
        ({"concepts": ["a/../b", "c"]}, "reserved characters"),
        ({"concepts": ["a\nb", "c"]}, "cannot be printed"),
        ({"noise_width": "4"}, "an entry of a wrong type: .*'noise_width' expected int"),
        ({"dtype": "load"}, "dtype of a configuration must be one of"),
    ],
)
def test_a_head_that_asks_for_more_than_its_weights(copy, entries, message):
    folder = copy("model")
    change(folder / "config.json", **entries)
    refused(folder, message)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"block_out_channels": [HUGE]}, "names the size 1000000000, which no model has"),
        ({"block_out_channels": [8, 10**6]}, "do not fit its configuration"),
        ({"hidden_width": 10**6}, "do not fit its configuration"),
        ({"sample_size": 10**6}, "sample_size 1000000, which must be at most"),
        ({"block_out_channels": None}, "the configuration of the base of .* cannot be used"),
        ({"block_out_channels": [-8, 8]}, "the configuration of the base of .* cannot be used"),
        ({"quantization_config": {"quant_method": "bitsandbytes_8bit"}}, "is quantised"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "pipeline"])
def test_a_base_that_asks_for_more_than_its_weights(copy, kind, entries, message):
    folder = copy(kind)
    change(folder / "base" / "config.json", **entries)
    refused(folder, message, kind)


@pytest.mark.parametrize(
    "entries", [{"residual_layers": 10**6}, {"in_channels": 10**6}, {"latent_size": 10**6}]
)
def test_an_adapter_that_asks_for_more_than_its_weights(copy, entries):
    folder = copy("frozen")
    change(folder / "adapter" / "config.json", **entries)
    refused(
        folder,
        "the adapter of .*(cannot be used|do not fit)|latent_size 1000000, which must be at most",
    )


@pytest.mark.parametrize(
    "entries",
    [
        {"r": HUGE},
        {"r": 10**6},
        {"r": 3},
        {"r": "x"},
        # A pattern whose search never ends.
        {"target_modules": "((((a*)*)*)*)*$|(.*.*.*.*.*.*.*.*.*)*x"},
        {"target_modules": [1]},
        {"peft_type": "PROMPT_TUNING"},
        {"rank_pattern": {"decoder": 10**6}},
        {"rank_pattern": {"((a*)*)*$": 3}},
        {"modules_to_save": ["decoder.layers.0"]},
        {"use_dora": True},
        {"use_rslora": True},
        {"lora_alpha": "x"},
    ],
)
def test_a_lora_configuration_of_another_kind(copy, entries):
    folder = copy("lora")
    change(folder / "lora" / "adapter_config.json", **entries)
    refused(folder, "no configuration of the LoRA of|which no model has")


def test_a_lora_configuration_does_not_choose_what_is_imported(copy):
    folder = copy("lora")
    change(
        folder / "lora" / "adapter_config.json",
        megatron_config={"a": 1},
        megatron_core="nowhere",
        auto_mapping={"a": "b"},
    )
    InterventionModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"name_or_path": None}, "must hold a valid name_or_path"),
        ({"name_or_path": "a\nb"}, "must hold a valid name_or_path"),
        ({"name_or_path": "/etc"}, "the base that .* was trained on, /etc, cannot be loaded"),
        ({"class_name": "os.system"}, "must hold a valid class_name"),
        ({"class_name": "system"}, "which is not registered"),
        ({"subfolder": "../vae"}, "must hold a valid subfolder"),
        ({"subfolder": "/etc"}, "must hold a valid subfolder"),
        ({"revision": "../../x"}, "must hold a valid revision"),
        ({"variant": "../x"}, "must hold a valid variant"),
        ({"dtype": "load"}, "must hold a valid dtype"),
        ({"sha256": None}, "must hold a valid sha256"),
    ],
)
def test_a_reference_leads_to_a_base_and_nowhere_else(copy, entries, message):
    folder = copy("frozen")
    reference = json.loads((folder / "config.json").read_text())["base_reference"]
    change(folder / "config.json", base_reference=reference | entries)
    refused(folder, message)


JSONS = {
    "deep list": "[" * 100_000,
    "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "twice": (
        '{"model_type": "intervention", "_class_name": "LightVAE", "model_type": "x",'
        ' "_class_name": "AutoencoderKL"}'
    ),
    "list": "[]",
    "null": "null",
    "number": "1",
    "digits": '{"a": ' + "9" * 5000 + "}",
    "no text": "\ud800",
}
FILES = [
    ("model", "config.json"),
    ("model", "base/config.json"),
    ("model", "model.safetensors.index.json"),
    ("frozen", "adapter/config.json"),
    ("lora", "lora/adapter_config.json"),
    ("pipeline", "model_index.json"),
    ("pipeline", "head/config.json"),
    ("pipeline", "base/config.json"),
]


@pytest.mark.parametrize("text", JSONS.values(), ids=JSONS)
@pytest.mark.parametrize(("kind", "name"), FILES)
def test_json_that_is_not_a_configuration(copy, kind, name, text):
    folder = copy(kind)
    (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    refused(
        folder, "truncated or corrupt|is not a valid JSON file|is not an intervention model", kind
    )


# Code


def test_code_of_a_checkpoint_is_not_run(copy, tmp_path):
    """The configurations name classes of files, and every folder has files of these names."""
    evil = f"import os\nos.mkdir({str(tmp_path / 'run')!r})\nclass Evil:\n    pass\n"
    for kind in ("model", "pipeline"):
        folder = copy(kind)
        for place in (folder, *(path for path in folder.iterdir() if path.is_dir())):
            for name in (
                "evil.py",
                "configuration_intervention.py",
                "modeling_intervention.py",
                "hub.py",
                "contexts.py",
            ):
                (place / name).write_text(evil)
        config = folder / ("head/config.json" if kind == "pipeline" else "config.json")
        change(
            config,
            auto_map={"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
            architectures=["Evil"],
        )
        LOADERS.get(kind, InterventionModel.from_pretrained)(folder)
        InterventionHead.from_pretrained(config.parent)
    whole = (folder / "model_index.json").read_text()
    for entry in (
        ["evil", "Evil"],
        ["os", "system"],
        ["subprocess", "Popen"],
        ["diffusers", "UNet2DModel"],
        "x",
        [1, 2],
        None,
    ):
        for part in ("head", "base"):
            (folder / "model_index.json").write_text(whole)
            change(folder / "model_index.json", **{part: entry})
            refused(folder, "model_index.json|not registered|cannot be used", "pipeline")
    assert not (tmp_path / "run").exists()


def test_code_of_a_vision_model_is_not_run(tmp_path, monkeypatch):
    """The user is not asked for permission either."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    vision = save_vision(tmp_path / "vit")
    (vision / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'run')!r})\n")
    whole = (vision / "config.json").read_text()
    for entries, message in (
        (
            {
                "model_type": "evil",
                "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"},
            },
            "is no vision model",
        ),
        ({"num_labels": HUGE}, "which no model has"),
        ({"num_hidden_layers": 10**6}, "far more than there are weights"),
    ):
        (vision / "config.json").write_text(whole)
        change(vision / "config.json", **entries)
        with bounds(), pytest.raises(ValueError, match=message):
            load_vision(vision)
    assert not (tmp_path / "run").exists()


def test_parts_of_a_pretrained_pipeline_that_ask_for_too_much(tmp_path):
    source = save_pipeline("dit", tmp_path / "dit")
    config, schedule = (
        source / "transformer" / "config.json",
        source / "scheduler" / "scheduler_config.json",
    )
    whole = config.read_text()
    for entries in ({"sample_size": 2**14}, {"num_layers": 10**6}, {"num_attention_heads": 10**6}):
        config.write_text(whole)
        change(config, **entries)
        with (
            bounds(),
            pytest.raises(
                ValueError, match="the base .*(cannot be used|do not fit)|which must be at most"
            ),
        ):
            load_base(source, 16)
    for steps, message in ((10**12, "which no model has"), ("x", "must be a positive number")):
        change(schedule, num_train_timesteps=steps)
        with bounds(), pytest.raises(ValueError, match=message):
            load_scheduler(source / "scheduler", "it")
    stable_diffusion(with_head("conditional"), tmp_path).save_pretrained(tmp_path / "sd")
    change(tmp_path / "sd" / "tokenizer" / "tokenizer_config.json", model_max_length=10**30)
    with bounds():
        assert isinstance(load_base(tmp_path / "sd", 16), DiffusionBase)


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["config.json", "training_arguments.yaml"])
def test_settings_that_never_end_are_refused(tmp_path, kind, name):
    """They would be waited for, or read until the memory is full."""
    path = tmp_path / name
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    read = hub.read_json if name.endswith("json") else yaml_files.read_yaml
    with bounds(memory=1 << 28, seconds=10), pytest.raises((OSError, ValueError)) as error:
        read(path)
    assert "not a valid JSON object" in str(error.value) or "a pipe or a device" in str(error.value)


def test_frames_are_not_counted():
    """A GIF of a few megabytes can have so many that this takes seconds."""
    block = bytes.fromhex("21f904000100 0000 2c0000000001000100 00 0202440100".replace(" ", ""))
    start = b"GIF89a" + bytes.fromhex("01000100800000000000ffffff")
    for count in (1, 2, 200_000):
        content = start + block * count + b";"
        with bounds(seconds=20):
            began = time.process_time()
            image = image_files.decode_image(content, "x")
            assert time.process_time() - began < 0.5
        assert image.info[image_files.MOVING] == (count > 1)
