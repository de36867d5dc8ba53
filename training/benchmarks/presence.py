"""Processor time until pairs of concepts are as present as a conditional VAE ever has them.

Both are trained by the recipe of avatars, on the same data, in this process: first the head, then
the conditional VAE (`training/studies/baselines.py`), with the beta that its tuning chose. On the
way each is validated and kept every so many steps. After that presence is measured: the share of
samples of each pair in which both concepts are found, in the mean over all pairs. A figure is

    (time until the head first has the most that the conditional VAE ever has) / (time until that has it).

Times are this process's, from before the images are loaded; what is measured is not in them. The
most over many checkpoints is a little too high, which speaks for the conditional VAE. The prior of
the head's checkpoints is not fitted yet (`trainer/prior.py`); "finished" is the model with that, and
its time."""  # noqa: E501

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_intervene import InterventionModel
from hf_intervene.evaluation import load_model
from hf_intervene.evaluation.setup import content_options
from hf_intervene.metrics.presence import presence_shares
from hf_intervene.trainer.building import build_model, load_data
from hf_intervene.trainer.checkpoints import checkpoints, load_checkpoint
from hf_intervene.trainer.loop import train
from hf_intervene.trainer.parsing import read_config
from hf_intervene.trainer.settings import TrainArguments
from hf_intervene.training.benchmarks.tools import figure
from hf_intervene.training.studies.baselines import train_baseline


RECIPE = Path(__file__).parents[1] / "configs" / "avatars.yaml"
NEVER = 10**9
BETA = 32.0  # of the conditional VAE, chosen by its tuning
HEAD, RIVAL = "head", "conditional VAE"


@dataclass
class Moment:
    """
    Args:
        step: of the training.
        seconds: processor time until then.
        present: share of the samples of pairs in which both concepts are found.
    """

    step: int
    seconds: float
    present: float


def presence(
    rounds: int, every: int = 100, images: int = 500, detector: Any = None, **settings: Any
) -> dict:
    """The figure and what it is made of, by seed; rounds are seeds, three at most.

    Args:
        rounds: how many seeds.
        every: steps between two moments.
        images: sampled of each pair.
        detector: of the concepts; default: trained here, on true attributes.
        **settings: of train.py, in place of the recipe's.
    """
    settings = read_config(str(RECIPE)) | {"tracker": "none"} | settings
    settings |= {"eval_every": every, "sample_every": NEVER, "patience": NEVER}
    detector = _detector(TrainArguments(**settings)) if detector is None else detector
    found: dict = {"steps between": every, "images of a pair": images, "seeds": []}
    for seed in range(min(rounds, 3)):
        own = settings | {"seed": seed}
        curves = {HEAD: head(own, images, detector), RIVAL: rival(own, images, detector)}
        found["seeds"].append(compared(curves))
        found["seeds"][-1]["moments"] = {
            name: [vars(moment) for moment in moments] for name, moments in curves.items()
        }
    ratios = [row["ratio"] for row in found["seeds"]]
    if None not in ratios:  # otherwise the head never got there
        found["time"] = figure("ratio", ratios)
    return found


def compared(curves: Mapping[str, list[Moment]]) -> dict:
    """Most presence of the conditional VAE, the times until both have it, and their ratio; `None`:
    the head never has it.
    """
    most = max(moment.present for moment in curves[RIVAL])
    times = {
        name: next((moment.seconds for moment in moments if moment.present >= most), None)
        for name, moments in curves.items()
    }
    ratio = None if times[HEAD] is None else times[HEAD] / times[RIVAL]
    return {"presence to reach": most, "seconds until then": times, "ratio": ratio}


def head(settings: dict, images: int, detector: Any) -> list[Moment]:
    """The moments of a training of the head; the last one is the finished model."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"output_dir": folder, "checkpoint_every": settings["eval_every"]}
        a = TrainArguments(**settings | own | {"keep_checkpoints": NEVER})
        seconds, started = {}, time.process_time()

        def remember(row: dict) -> None:
            if "validation" in row:
                seconds[row["step"]] = time.process_time() - started

        result = train(a, on_log=remember)
        end = time.process_time() - started
        model = build_model(a, load_data(a)[0])
        moments = []
        for path in checkpoints(Path(folder) / "checkpoints"):
            tensors, state = load_checkpoint(path)
            model.load_state_dict(tensors["model"])
            moments.append(Moment(state["step"], seconds[state["step"]], 0.0))
            moments[-1].present = pairs_present(model.eval(), images, detector)
        finished = load_model(result.model_dir).eval()
        moments.append(Moment(result.step, end, pairs_present(finished, images, detector)))
    return moments


def rival(settings: dict, images: int, detector: Any) -> list[Moment]:
    """The moments of a training of the conditional VAE."""
    a = TrainArguments(**settings | {"beta": BETA})
    kept, started = [], time.process_time()

    def keep(step: int, model: InterventionModel) -> None:
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        kept.append((step, time.process_time() - started, weights))

    model = train_baseline(a, "conditional-vae", 0.0, keep)
    moments = []
    for step, seconds, weights in kept:
        model.load_state_dict(weights)
        moments.append(Moment(step, seconds, pairs_present(model.eval(), images, detector)))
    return moments


def pairs_present(model: InterventionModel, images: int, detector: Any) -> float:
    """Share of samples in which both concepts are found, in the mean over all pairs.

    Raises:
        ValueError: one sentence: the detector cannot tell a concept.
    """
    shares = []
    for pair in combinations(model.concepts, 2):
        generator = torch.Generator().manual_seed(0)
        samples = model.sample("+".join(pair), images, generator=generator, output_type="np")
        present = detector.present(samples)
        both = presence_shares(present, pair, detector.concepts, detector.usable).all_wanted
        if both is None:
            raise ValueError(f"the detector cannot tell {' or '.join(pair)} in real images.")
        shares.append(both.value)
    return float(np.mean(shares))


def _detector(a: TrainArguments) -> Any:
    data, concepts = a.data, load_data(a)[0].concepts
    size = (data.resolution, data.channels, data.variant, data.mnist_digits)
    split = (data.validation_fraction, data.data_seed, data.split_by)
    counts = {"detector_images": data.images_per_context, "twin_images": 0}
    options = content_options(data.dataset, concepts, *size, split, {}, 0, **counts)
    return options["detector"]
