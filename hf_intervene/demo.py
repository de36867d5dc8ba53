"""The demonstrations of `hf-intervene demo`: everything from images to a saved pipeline, its
pictures and its measures.

`run` trains light VAE and head together. `run_pretrained` adds heads to a pretrained autoencoder:
one that diffusers alone trained on observational images, since none can be counted on without
network."""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import evaluation, trainer
from .model import InterventionModel
from .pipeline import InterventionPipeline
from .pixels import to_uint8
from .plots import contexts_grid, edit_strips, save
from .trainer import pretraining
from .trainer.checkpoints import check_empty
from .trainer.simulated import SIMULATED
from .yaml_files import SETTINGS_FILE


# As in training/configs/reproduce/quad.yaml.
SETTINGS = dict(
    resolution=32,
    validation_images=100,
    learning_rate=0.002,
    log_every=100,
    tracker="none",
)
PRETRAINED = SETTINGS | dict(images_per_context=1500, max_steps=600, eval_every=200)
PRETRAINING_STEPS = 800
MEASURED_IMAGES = 640  # a side of a distance
_STRIP = 8  # images in a strip of a picture


@dataclass(frozen=True)
class Demonstration:
    """What is particular to one data set.

    Args:
        data: what it is, in a few words.
        light: settings of the training of light VAE and head together.
        pretrained: settings of the training of a head on a pretrained autoencoder.
        edits: contexts of the picture of edits, the observational one first: reconstructions.
        pair: two interventions that were never seen together.
        better: a recipe that gives a better model, and why it does.
    """

    data: str
    light: dict
    pretrained: dict
    edits: tuple[str, ...]
    pair: str
    better: tuple[str, str]


DEMONSTRATIONS = {
    "avatars": Demonstration(
        "avatars (faces in pixel art, 32x32)",
        SETTINGS | dict(dataset="avatars", images_per_context=3600, max_steps=2000, eval_every=250),
        PRETRAINED | dict(dataset="avatars"),
        ("obs", "glasses", "beard", "hat", "smile", "glasses+hat", "beard+smile"),
        "glasses+hat",
        ("avatars.yaml", "more steps"),
    ),
    "quad": Demonstration(
        "quad (dependent, 32x32)",
        SETTINGS | dict(dataset="quad", images_per_context=3000, epochs=5, concept_edges=True),
        PRETRAINED | dict(dataset="quad", concept_edges=True),
        ("obs", "quad1", "quad2", "quad4", "size", "quad1+size", "quad2+quad4"),
        "quad1+size",
        ("quad.yaml", "64x64"),
    ),
}


def run(out: Path, dataset: str) -> int:
    """Train on a data set of `DEMONSTRATIONS`, save a pipeline, measure it, draw it. Returns an
    exit code."""
    start = time.perf_counter()
    shown, data = DEMONSTRATIONS[dataset], SIMULATED[dataset]
    # or it was interrupted, and goes on
    if not (out / "run").is_dir() or (out / "pipeline").exists():
        check_empty(out)
    print(
        f"Training on {shown.data}: {shown.light['images_per_context']} images in each of "
        f"{', '.join(data.contexts)}.\n"
        "No image ever carries two interventions. This takes some minutes."
    )
    model = _train(out / "run", shown.light | {"resume": "auto"})
    if model is None:
        print("The same command, in the same folder, goes on from there.")
        return 130
    _save(model, out / "run", out / "pipeline")
    print(f"\n{_measure_and_draw(model, out, dataset)}")
    print(
        f"Done in {time.perf_counter() - start:.0f} s. Look at:\n  {out / 'contexts.png'}   every"
        f" context and {len(data.held_out)} that were never seen, real above generated\n "
        f" {out / 'edits.png'}      images edited by one and by two interventions, and what that"
        f" changed\n  {out / 'floors.png'}     how far each context is from real images\n "
        f" {out / 'metrics.md'}     the table above\nTry next:\n  hf-intervene app"
        f" {out / 'pipeline'}   (a page to play with)\n  hf-intervene sample {out / 'pipeline'}"
        f" --interventions {shown.pair} --num-images 8 --output pair.png\n  hf-intervene demo"
        f" --pretrained --dataset {dataset}   (heads on a pretrained autoencoder, frozen and with"
        f" LoRA)\n  accelerate launch training/train.py --config training/configs/{shown.better[0]}"
        f"   ({shown.better[1]}, a better model)\n  docs/own-images.md   (the same with your own"
        " images)"
    )
    return 0


def run_pretrained(out: Path, dataset: str) -> int:
    """Pretrain an autoencoder with diffusers alone on a data set of `DEMONSTRATIONS`, add heads to
    it in two regimes, load one in a new process. Returns an exit code."""
    start = time.perf_counter()
    shown, data = DEMONSTRATIONS[dataset], SIMULATED[dataset]
    settings = shown.pretrained
    check_empty(out)
    print(
        f"1. A plain AutoencoderKL of diffusers, {PRETRAINING_STEPS} steps on observational images "
        f"of {shown.data} (all four steps: 36 minutes of one core without bf16 on quad)."
    )
    images = pretraining.observational_images(dataset, 10_000, settings["resolution"])
    pretraining.pretrain(images, PRETRAINING_STEPS).save_pretrained(out / "vae")
    for number, regime in enumerate(("frozen", "lora"), start=2):
        print(
            f"{number}. A head on the saved autoencoder, regime {regime}: {settings['max_steps']} "
            "steps on all contexts."
        )
        options = {"base": str(out / "vae"), "regime": regime}
        model = _train(out / regime / "run", settings | options)
        if model is None:
            print(
                f"The demo itself starts from the beginning: remove {out}, or choose another folder"
                " with --output."
            )
            return 130
        _save(model, out / regime / "run", out / regime / "pipeline")
        print(f"\n{_measure_and_draw(model, out / regime, dataset)}")
    print("4. Loaded in a new process: an unseen pair.")
    pair = out / "pair.png"
    sample = ["sample", out / "frozen" / "pipeline", "--interventions", shown.pair]
    sample += ["--num-images", 8, "--output", pair]
    subprocess.run([sys.executable, "-m", "hf_intervene.cli", *map(str, sample)], check=True)
    head = out / "frozen" / "run" / "model"
    size = sum(file.stat().st_size for file in head.rglob("*.safetensors")) / 1e6
    print(
        f"Done in {time.perf_counter() - start:.0f} s. The frozen head and its adapter are"
        f" {size:.1f} MB, without the base. Look at:\n  {out}/frozen/contexts.png,"
        f" {out}/lora/contexts.png   every context and {len(data.held_out)} that were never seen,"
        f" real above generated\n  {out}/frozen/edits.png, {out}/lora/edits.png         edited"
        f" images\nTry next:\n  hf-intervene card {out}/frozen/pipeline --metrics {out}/frozen"
        " --push user/name   (share it on the Hub)\n  accelerate launch training/train.py --base"
        f" {out}/vae --regime frozen --residual_layers 8 ...   (sharper edits)"
    )
    return 0


def _train(out: Path, settings: dict) -> InterventionModel | None:
    """Train a model; `None` if interrupted."""
    on_log = None if sys.stderr.isatty() else _print_progress
    result = trainer.train(trainer.TrainArguments(output_dir=str(out), **settings), on_log=on_log)
    return None if result.model_dir is None else evaluation.load_model(result.model_dir)


def _save(model: InterventionModel, run: Path, folder: Path) -> None:
    InterventionPipeline.from_model(model).save_pretrained(folder)
    shutil.copy(run / "model" / SETTINGS_FILE, folder)  # for its model card


def _measure_and_draw(model: InterventionModel, out: Path, dataset: str) -> str:
    """Write metrics.json, metrics.md, floors.png, contexts.png and edits.png; returns the table."""
    channels, size, _ = model.base.image_shape
    what = (dataset, model.concepts, MEASURED_IMAGES, 0, size, channels, "dependent")
    real, other = evaluation.held_out_images(*what)
    metrics = evaluation.evaluate(
        model, real, other, protocols=("independent",), num_projections=200
    )
    evaluation.write(metrics, out)
    noise = torch.randn(_STRIP, *model.noise_shape, generator=torch.Generator().manual_seed(0))
    generated = {
        name: to_uint8(np.asarray(model.sample(name, noise=noise, output_type="np")))
        for name in real
    }
    save(contexts_grid(real, generated, unseen=SIMULATED[dataset].held_out), out / "contexts.png")
    originals = real["obs"][:_STRIP]
    edits = {
        name: to_uint8(np.asarray(model.edit(originals, name, output_type="np")))
        for name in DEMONSTRATIONS[dataset].edits
    }
    edits = {
        ("reconstruction" if name == "obs" else name): images for name, images in edits.items()
    }
    save(edit_strips(originals, edits, edits["reconstruction"]), out / "edits.png")
    return evaluation.table(metrics)


def _print_progress(row: dict) -> None:
    if "validation" in row:
        print(
            f"step {row['step']}/{row['total']}: validation {row['validation']:.3f} bits per pixel",
            flush=True,
        )
