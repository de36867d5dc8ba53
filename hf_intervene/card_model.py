"""What a model card shows of a saved head, model or pipeline: its words and its code."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .card_metrics import code
from .hub import check_links
from .origins import is_on_hub
from .yaml_files import SETTINGS_FILE, read_settings


if TYPE_CHECKING:
    from .configuration_intervention import InterventionConfig


PIPELINE, MODEL, HEAD = "InterventionPipeline", "InterventionModel", "InterventionHead"


@dataclass
class Saved:
    """What the files in the folder of a saved model say."""

    folder: Path
    kind: str
    config: "InterventionConfig"
    settings_text: str

    @classmethod
    def read(cls, folder: Path, head_only: bool) -> "Saved":
        # here, or whoever shows a card would wait for transformers
        from .configuration_intervention import InterventionConfig

        check_links(folder, ["*.json", SETTINGS_FILE])  # parts of them are copied to the card
        kind = PIPELINE if (folder / "model_index.json").exists() else HEAD if head_only else MODEL
        config = InterventionConfig.from_pretrained(folder / "head" if kind == PIPELINE else folder)
        settings = folder / SETTINGS_FILE
        return cls(
            folder,
            kind,
            config,
            settings.read_text(encoding="utf-8").strip() if settings.exists() else "",
        )

    @property
    def base_id(self) -> str | None:
        """Name on the Hub of the base that the head was added to."""
        reference = self.config.base_reference
        return (
            reference["name_or_path"]
            if reference and is_on_hub(str(reference["name_or_path"]), reference["revision"])
            else None
        )

    @property
    def has_base(self) -> bool:
        return (self.folder / "base").is_dir()

    @property
    def has_residual(self) -> bool:
        file = self.folder / "adapter" / "config.json"
        return file.exists() and bool(json.loads(file.read_text()).get("residual_layers"))

    @property
    def is_denoiser(self) -> bool:
        return (self.folder / "scheduler").is_dir()

    @property
    def base_is_elsewhere(self) -> bool:
        """Whether whoever loads it must have a copy of the base."""
        return self.kind == MODEL and not self.has_base and self.base_id is None

    @property
    def regime(self) -> str | None:
        """How the base was treated, as the trainer's setting names it; `None`: that is not known."""  # noqa: E501
        if self.config.base_reference is None:
            return "end-to-end"
        if self.config.lora_rank:
            return "lora"
        if self.kind == PIPELINE:  # its base is saved whatever became of it
            if not self.settings_text:
                return None
            return read_settings(self.folder).get("regime", "end-to-end")
        return "fine-tune" if self.has_base else "frozen"

    @property
    def relation(self) -> str | None:
        if self.base_id is None or self.regime is None:
            return None
        return "adapter" if self.regime in ("frozen", "lora") else "finetune"


def summary_of(saved: Saved) -> str:
    """What it is and what it intervenes on, in a sentence or two."""
    names = ", ".join(map(code, saved.config.concepts))
    if saved.kind == HEAD:
        return (
            "An intervention head: from noise and a set of interventions, the embedding that a"
            f" pretrained decoder makes an image of. It intervenes on {names}."
        )
    whole = {PIPELINE: "pipeline", MODEL: "model"}[saved.kind]
    if saved.config.ablation is not None:
        return (
            f"A generative {whole} of images with the concepts {names}; an ablation"
            f" (`{saved.config.ablation}`)."
        )
    return (
        f"A generative {whole} of images that can be intervened on: {names}. It was trained on"
        " images in which one concept at a time was changed, and composes interventions that it"
        " never saw together."
    )


def blocks_of(config: "InterventionConfig") -> str:
    """The blocks of the latent space, and the kind of interventions."""
    free = (
        f" and {config.free_blocks} free block{'s' * (config.free_blocks != 1)} for everything else"
        if config.free_blocks
        else ""
    )
    kind = {
        "perfect": "perfect (they cut a concept's incoming edges)",
        "soft": "soft (they keep a concept's incoming edges)",
    }
    return (
        f"One block of the latent space for each concept{free}; noise of width {config.noise_width}"
        f" a block. Interventions are {kind[config.intervention]}."
    )


def base_of(saved: Saved) -> str | None:
    """Which pretrained model the head was added to; `None`: there was none."""
    reference, regime = saved.config.base_reference, saved.regime
    if reference is None:
        return None
    what = f"`{reference['class_name']}`"
    if saved.base_id is None:
        text = (
            f"The head was added to a pretrained {what} that was loaded from a folder, not from"
            " the Hub"
        )
        hint = (
            f": pass `base=` with it (SHA-256 of its weights: `{reference['sha256']}`)."
            if saved.base_is_elsewhere
            else "."
        )
        return text + hint
    place = f" (`{reference['subfolder']}`)" if reference["subfolder"] else ""
    at = f", at revision `{reference['revision']}`" if reference["revision"] else ""
    done = {
        "frozen": " Its weights were not changed",
        "lora": f" LoRA layers of rank {saved.config.lora_rank} were trained on it",
        "fine-tune": " It was trained further",
        "end-to-end": " It was trained further",
        None: "",
    }[regime]
    here = (
        " and are not in this repository; loading fetches them."
        if regime == "frozen" and not saved.has_base
        else "."
        if done
        else ""
    )
    return (
        f"The head was added to the {what} of"
        f" [{saved.base_id}](https://huggingface.co/{saved.base_id}){place}{at}.{done}{here}"
    )


def usage_of(saved: Saved, name: str, bundled: bool) -> str:
    """Code that loads it, samples and edits."""
    concepts, base_class = (
        saved.config.concepts,
        (saved.config.base_reference or {}).get("class_name"),
    )
    together, one = json.dumps(concepts[:2]), json.dumps(concepts[0])
    if saved.kind == HEAD:
        imports = ["import torch", f"from hf_intervene import {HEAD}"]
        load = [f"head = {HEAD}.from_pretrained({json.dumps(name)})"]
        return "\n".join([*imports, "", *load, *_head_call(f"head.targets({together}, 8)")])
    if saved.kind == PIPELINE:
        place = f"hf_intervene.bundled({json.dumps(name)})" if bundled else json.dumps(name)
        load = [f"pipe = {PIPELINE}.from_pretrained({place})"]
        sample = f"images = pipe({together}, num_images=8, generator=g).images"
        edit = f"edited = pipe.edit(images[0], {{{one}: 0.5}}, context={together}).images"
    else:
        load = [f"model = {MODEL}.from_pretrained({json.dumps(name)})"]
        if saved.base_is_elsewhere:
            load = [f'base = {base_class}.from_pretrained("path/to/the/base")']
            load += [f"model = {MODEL}.from_pretrained({json.dumps(name)}, base=base)"]
        sample = f'images = model.sample({together}, num_images=8, generator=g, output_type="pil")'
        edit = (
            f'edited = model.edit(images[0], {{{one}: 0.5}}, context={together}, output_type="pil")'
        )
    imports = ["import hf_intervene"] * bundled + ["import torch"]
    if saved.base_is_elsewhere:
        imports += [f"from diffusers import {base_class}"]
    imports += [f"from hf_intervene import {saved.kind}"]
    sample += "  # together" if len(concepts) > 1 else ""
    lines = [*imports, "", *load, "g = torch.Generator().manual_seed(0)", sample]
    return "\n".join([*lines, f"# From there to {concepts[0]} at half strength.", edit])


def _head_call(targets: str) -> list[str]:
    return [
        "z = torch.randn(8, head.config.num_blocks, head.config.noise_width)",
        (
            f"embedding = head(z, {targets}).embedding  # (8, *head.config.embedding_shape): the"
            " decoder's input"
        ),
    ]


def remote_code_of(saved: Saved, name: str) -> str | None:
    """Code that loads the head without this package; `None`: there is no head."""
    if saved.config.ablation in ("base", "base-pooled"):
        return None
    subfolder = ', subfolder="head"' if saved.kind == PIPELINE else ""
    load = (
        f"head = AutoModel.from_pretrained({json.dumps(name)}{subfolder}, trust_remote_code=True)"
    )
    targets = f"head.targets({json.dumps(saved.config.concepts[:2])}, 8)"
    return "\n".join(
        ["import torch", "from transformers import AutoModel", "", load, *_head_call(targets)]
    )


def limits_of(saved: Saved) -> list[str]:
    """What a user should not expect of it."""
    limits = [
        (
            "It knows no other concepts than these. A concept is what its training images show: if"
            " something else changed with it, that is part of the concept."
        ),
        (
            "Nothing guarantees that interventions compose as they would in the real world. Look at"
            " the pairs that you use."
        ),
        (
            "Distances are on pixels: one near its floor says that pixel statistics agree, not that"
            " every image is right. A concept of few pixels can be missing from all of them."
        ),
    ]
    if saved.is_denoiser:
        limits.append(
            "The noise that a denoiser starts from carries what the concepts leave open, and may"
            " carry some of the concepts past the interventions."
        )
    elif saved.has_residual:
        limits.append(
            "Residual latents carry what the concepts leave open, and may carry some of the"
            " concepts past the interventions."
        )
    elif (saved.folder / "adapter").is_dir():
        limits.append(
            "The head reaches the base through one vector an image: what that cannot hold is"
            " blurred."
        )
    return limits[:1] if saved.kind == HEAD else limits
