"""Checkpoints made to do harm: refused in a sentence, before anything of theirs is run, and before
memory is taken for what they announce.
"""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from diffusers import AutoencoderTiny
from diffusion_models import save_pipeline, save_vision, stable_diffusion, with_head
from fuzzing import bounds
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from shared_models import ALICE, build, frozen_on

from hf_intervene import (
    InterventionConfig,
    InterventionHead,
    InterventionModel,
    InterventionPipeline,
    load_base,
)
from hf_intervene.bases import DiffusionBase
from hf_intervene.bases.loading import load_scheduler, load_vision
from hf_intervene.cards import card_path, code, read_settings, write_card
from hf_intervene.page import Page
from hf_intervene.push import push_folder
from hf_intervene.space import export


HEAD, DIFFUSERS, LORA = "model", "diffusion_pytorch_model", "adapter_model"
PARTS = [  # kind of checkpoint, folder and stem of a part's weights
    ("model", ".", HEAD),
    ("model", "base", DIFFUSERS),
    ("frozen", "adapter", DIFFUSERS),
    ("lora", "lora", LORA),
    ("pipeline", "head", HEAD),
    ("pipeline", "base", DIFFUSERS),
]
LOADERS = {"pipeline": InterventionPipeline.from_pretrained}
HUGE = 10**9


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    model = build()
    model.save_pretrained(folder / "model")
    InterventionPipeline.from_model(model).save_pretrained(folder / "pipeline")
    torch.manual_seed(0)
    widths = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).save_pretrained(
        folder / "vae"
    )
    frozen_on(AutoencoderTiny.from_pretrained(folder / "vae")).save_pretrained(folder / "frozen")
    frozen_on(AutoencoderTiny.from_pretrained(folder / "vae"), lora_rank=2).save_pretrained(
        folder / "lora"
    )
    return folder


@pytest.fixture
def copy(originals, tmp_path):
    """A copy of a checkpoint of some kind, to be spoilt."""
    return lambda kind: shutil.copytree(originals / kind, tmp_path / kind)


class Canary:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def refused(folder, message, kind="model"):
    """That a checkpoint cannot be loaded is said in a sentence, soon and with little memory."""
    with bounds(memory=1 << 30), pytest.raises((OSError, ValueError), match=message) as error:
        LOADERS.get(kind, InterventionModel.from_pretrained)(folder)
    assert "\n" not in str(error.value)


def change(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


# Weights


@pytest.mark.parametrize("decoy", [False, True])
@pytest.mark.parametrize(("kind", "part", "stem"), PARTS)
def test_pickled_weights_are_not_opened(copy, tmp_path, kind, part, stem, decoy):
    """Not even beside a safetensors file of another name."""
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
def test_an_index_names_files_beside_it_only(copy, tmp_path, kind, part, stem, name):
    folder = copy(kind)
    weights, name = folder / part / f"{stem}.safetensors", name.format(folder=tmp_path)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), name)}
    if "else" in name:  # it is there
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
def test_a_header_that_announces_what_is_not_there(copy, kind, part, stem, content):
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
        {
            "target_modules": "((((a*)*)*)*)*$|(.*.*.*.*.*.*.*.*.*)*x"
        },  # a pattern that takes for ever
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


def test_a_lora_configuration_does_not_say_what_is_imported(copy):
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
        ({"name_or_path": None}, "must hold a name_or_path"),
        ({"name_or_path": "a\nb"}, "must hold a name_or_path"),
        ({"name_or_path": "/etc"}, "the base that .* was trained on, /etc, cannot be loaded"),
        ({"class_name": "os.system"}, "must hold a class_name"),
        ({"class_name": "system"}, "which is not registered"),
        ({"subfolder": "../vae"}, "must hold a subfolder"),
        ({"subfolder": "/etc"}, "must hold a subfolder"),
        ({"revision": "../../x"}, "must hold a revision"),
        ({"variant": "../x"}, "must hold a variant"),
        ({"dtype": "load"}, "must hold a dtype"),
        ({"sha256": None}, "must hold a sha256"),
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
def test_json_that_is_no_configuration(copy, kind, name, text):
    folder = copy(kind)
    (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    refused(
        folder, "truncated or corrupt|is not a valid JSON file|is not an intervention model", kind
    )


# Code


def test_code_that_came_with_a_checkpoint_is_not_run(copy, tmp_path):
    """`auto_map` and classes by name, with files of those names everywhere."""
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


def test_code_that_came_with_a_vision_model_is_not_run(tmp_path, monkeypatch):
    """And nobody is asked whether it may be."""
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


# Cards

NAMES = [
    "<script>alert(1)",
    "{{ 7 * 7 }}",
    "{% for x in y %}",
    "a`b",
    "`",
    "``x``",
    "a|b",
    "<!-- x",
    "[a](b)",
    "*a*",
    "---",
]


def test_names_of_concepts_on_a_card(copy):
    folder = copy("model")
    config = InterventionConfig.from_pretrained(folder)
    config.concepts = NAMES
    config.save_pretrained(folder)
    (folder / "training_arguments.yaml").write_text(
        "seed: 0\nx: |\n  ```\n  <script>alert(2)</script>\n"
    )
    card = ModelCard.load(write_card(folder, "user/name"))
    assert (
        "hf-intervene" in card.data.tags
        and "{{ 7 * 7 }}" in card.text
        and "\n````yaml\n" in card.text
    )
    rows = [line for line in card.text.splitlines() if line.endswith(" alone |")]
    assert rows == [f"| {code(name)} | {code(name)} alone |" for name in NAMES]


@pytest.mark.parametrize("text", NAMES)
def test_code_in_markdown_is_that_text(text):
    markdown = pytest.importorskip("markdown_it")
    row = (
        markdown.MarkdownIt("commonmark")
        .enable("table")
        .render(f"| a |\n| --- |\n| {code(text)} |\n")
    )
    assert f"<td><code>{markdown.common.utils.escapeHtml(text)}</code></td>" in row


@pytest.mark.parametrize("name", ["README.md", "samples.png", "floors.png"])
def test_a_card_is_not_written_through_a_link(copy, tmp_path, name):
    folder = copy("model")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match=f"{name} is a link"):
        card_path(folder)


@pytest.mark.usefixtures("waits")
def test_a_link_out_of_the_folder_is_not_pushed(copy, tmp_path):
    folder = copy("model")
    (tmp_path / "secret").write_text("{}")
    (folder / "base" / "token.json").symlink_to(tmp_path / "secret")
    with pytest.raises(OSError, match="token.json is a link to outside of the folder"):
        push_folder(folder, "alice/model", **ALICE)


# Links


@pytest.mark.parametrize("use", ["load", "page", "export", "card", "settings"])
@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "samples.png",
        "config.json",
        "base/token.json",
        "head/config.json",
        "base",
        "more/x.json",
        "training_arguments.yaml",
    ],
)
def test_nothing_is_read_through_a_link_out_of_the_folder(copy, tmp_path, use, name):
    folder, secret = copy("pipeline"), tmp_path / "secret"
    entry = folder / name
    if entry.is_dir():
        shutil.copytree(entry, secret)
        shutil.rmtree(entry)
    else:
        secret.write_text("{}")
        entry.parent.mkdir(exist_ok=True)
        entry.unlink(missing_ok=True)
    entry.symlink_to(os.path.relpath(secret, entry.parent))
    picture, settings = name.endswith((".md", ".png")), name.endswith(".yaml")
    if {
        "load": picture or settings,
        "page": settings,
        "card": picture,
        "settings": not settings,
    }.get(use):
        return  # it is not read there, or is a card that is not written through a link
    calls = {
        "load": InterventionPipeline.from_pretrained,
        "page": Page,
        "card": write_card,
        "settings": read_settings,
    }
    calls["export"] = lambda path: export(path, tmp_path / "space")
    with pytest.raises(OSError, match="is a link to outside of its folder"):
        calls[use](folder)
    assert not (tmp_path / "space").exists()


def test_links_within_a_folder_and_those_of_the_hubs_cache_are_followed(copy, tmp_path):
    folder = copy("pipeline")
    (folder / "base").rename(folder / "elsewhere")
    (folder / "base").symlink_to("elsewhere")
    (tmp_path / "linked").symlink_to(folder)
    (folder / "data.bin").symlink_to("/etc/hostname")  # nobody reads it
    InterventionPipeline.from_pretrained(tmp_path / "linked")
    repository = tmp_path / "models--user--name"
    (repository / "blobs").mkdir(parents=True)
    shutil.copytree(copy("model"), repository / "snapshots" / "0123")
    for number, file in enumerate(
        path for path in (repository / "snapshots").rglob("*") if path.is_file()
    ):
        blob = repository / "blobs" / str(number)
        file.rename(blob)
        file.symlink_to(os.path.relpath(blob, file.parent))
    InterventionModel.from_pretrained(repository / "snapshots" / "0123")


@pytest.mark.parametrize(
    "name", ["config.json", "model_index.json", "base/config.json", "README.md"]
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(copy, name):
    folder = copy("pipeline")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(OSError, match="is a pipe or a device, not a file"):
        Page(folder)
