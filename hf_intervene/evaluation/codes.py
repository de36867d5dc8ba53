"""What a model's codes say of the true latents of quad, beside an untrained model's (METHOD section
5).
"""

import copy

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm

from ..contexts import OBS
from ..data import quad
from ..metrics.block_scores import block_correlations, measure_blocks
from ..model import InterventionModel
from ..trainer.simulated import HELD_OUT_SEED


CONCEPTS = [quad.LATENTS.index(name) for name in quad.CONCEPTS]
PARTS = ("z", "z, noise", "c")
CODE_IMAGES = 1000  # at most, in evaluate.py


def untrained_model(model: InterventionModel, seed: int = 0) -> InterventionModel:
    """A new model of the same configuration: head and base drawn anew, on the same device.

    Frozen models beside the base, such as the VAE of a denoiser, stay as they are, and so do
    parameters of modules without `reset_parameters`.

    Args:
        model: a model with a head.
        seed: of the weights.
    """

    def reset(module: nn.Module) -> None:
        if callable(again := getattr(module, "reset_parameters", None)):
            again()

    base = copy.deepcopy(model.base)
    on_gpu = model.device.type == "cuda"
    with torch.random.fork_rng(devices=[model.device] if on_gpu else []):
        torch.manual_seed(seed)
        base.model.apply(reset)
        if base.adapter is not None:
            base.adapter.apply(reset)
        untrained = InterventionModel(copy.deepcopy(model.config), base)
    nn.Module.to(untrained, model.device)  # transformers wraps its own in a way without a type
    return untrained.eval()


@torch.no_grad()
def code_scores(
    model: InterventionModel,
    variant: str,
    images: int,
    seed: int,
    resamples: int = 20,
    parts: tuple[str, ...] = PARTS,
) -> dict:
    """What the codes of held-out observational images say of their true latents: posterior means z,
    and the concepts c.

    Observational images only: an encoder may be told of an intervention, and c is a function of it.
    All scores are of whole blocks, see `hf_intervene.metrics.block_scores`.

    Args:
        model: a model with a head, of the concepts of quad.
        variant: of quad.
        images: how many.
        seed: of the images.
        resamples: random halves for the intervals.
        parts: which of `PARTS`: `z` and `c` with the latents, and `z, noise`, z with the exogenous
            noise behind them, which it should be.

    Returns:
        By part each `Score` as a dict, `untrained` that of `untrained_model`, by measure; and
        `blocks`, the correlation of each factor with its prediction from each block, by kernel
        regression, (D, 8).
    """
    latents = quad.sample_latents(OBS, images, variant, HELD_OUT_SEED + 2 * seed)
    noise = quad.exogenous_noise(latents, variant)
    pixels = quad.render(latents, model.base.image_shape[1])
    trained, untrained = (_codes(x, pixels) for x in (model, untrained_model(model, seed)))
    scores = {}
    for name in tqdm(parts, "scoring codes", disable=None, delay=2):
        factors = noise if name == "z, noise" else latents
        blocks, beside = (codes[name[0]] for codes in (trained, untrained))
        measured = measure_blocks(blocks, factors, CONCEPTS, resamples, seed, beside)
        scores[name] = {key: score.to_dict() for key, score in measured.items()}
        scores[name]["blocks"] = block_correlations(blocks, factors, "kernel").tolist()
    return scores


def _codes(model: InterventionModel, pixels: np.ndarray) -> dict[str, np.ndarray]:
    """z and c of observational images, each (n, D, width)."""
    assert model.head is not None
    targets = model.targets(OBS, len(pixels))
    z, _ = model.abduct(model.preprocess(pixels), targets)
    c = model.head(z, targets).concepts
    return {"z": z.double().cpu().numpy(), "c": c.double().cpu().numpy()}
