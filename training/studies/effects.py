"""What a trained model does to the true factors of quad, what its codes say of them, whether values
that are chosen for concepts are theirs, and how its causal layer reads (METHOD section 5).

    python training/studies/effects.py --model outputs/quad/model --variant dependent --output outputs/quad/effects

Writes `effects.json`, `effects.md` and three pictures: `effects.png` (contexts x factors, real and
generated), `codes.png` (blocks x factors) and `causal.png` (concepts x concepts, the truth beside
what is read off the model)."""  # noqa: E501

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_intervene.contexts import OBS, Interventions
from hf_intervene.data import quad
from hf_intervene.errors import spoken
from hf_intervene.evaluation import load_model
from hf_intervene.evaluation.codes import CONCEPTS, code_scores
from hf_intervene.metrics import effects, read_error, read_factors
from hf_intervene.metrics.causal import (
    agreement,
    block_effects,
    head_draws,
    head_readout,
    intervention_moves,
    single_interventions_operator,
    total_effect_operator,
)
from hf_intervene.metrics.disentanglement import MIN_SAMPLES
from hf_intervene.metrics.leakage import check_installed
from hf_intervene.model import InterventionModel
from hf_intervene.pixels import to_uint8
from hf_intervene.plots import save
from hf_intervene.trainer.checkpoints import check_writable, write_whole
from hf_intervene.trainer.parsing import RecipeParser
from hf_intervene.trainer.sections import DataSettings
from hf_intervene.trainer.simulated import HELD_OUT_SEED
from hf_intervene.training.studies.effects_report import (
    CONTEXTS,
    QUADRANTS,
    READINGS,
    pictures,
    table,
)
from hf_intervene.values import influence
from hf_intervene.yaml_files import read_settings


_DRAWS = 4096  # of the concepts under the prior
_EDITED = 256  # images at most that take a value


def check_model(model: InterventionModel, folder: str, variant: str) -> None:
    """Raise a ValueError of one sentence for a model whose effects on quad cannot be measured."""
    if model.head is None:
        raise ValueError(
            "this model has no intervention head (an ablation without one): it has no effects to"
            " measure."
        )
    if model.concepts != quad.CONCEPTS:
        raise ValueError(
            f"effects are measured on quad, whose concepts are {', '.join(quad.CONCEPTS)}; the"
            f" model's are {', '.join(model.concepts)}."
        )
    channels, height, width = model.base.image_shape
    if channels != 3 or height != width or height % 2:
        raise ValueError(
            "quad images are square, of an even side and in colour; the model's are"
            f" {height}x{width}x{channels}."
        )
    settings = read_settings(folder)
    trained = settings.get("variant", DataSettings.variant)
    if settings and trained != variant:
        raise ValueError(
            f"the model was trained on the {trained} variant of quad: measure it with --variant"
            f" {trained}."
        )


@torch.no_grad()
def sampled_effects(
    model: InterventionModel, variant: str, images: int, seed: int, num_inference_steps: int = 50
) -> dict:
    """Effect matrices of sampled images, of real ones and of other real ones, and what they agree
    in.

    Args:
        model: the model.
        variant: of quad.
        images: of each context and set.
        seed: of noise and held-out images.
        num_inference_steps: of a denoiser.

    Returns:
        `generated`, `real` and `other`: an `EffectMatrix` each, as a dict; `moving`: what moves in
        truth; `agreement` with `real` of `generated` and, as its floor, of `other`, by single
        interventions and pairs; `shifts` of means by single interventions, `true`, and of each set
        with their standard errors.
    """
    generator = torch.Generator().manual_seed(seed)
    read = {}

    def real(context: str, set_number: int) -> np.ndarray:
        latents = quad.sample_latents(
            context, images, variant, HELD_OUT_SEED + 2 * seed + set_number
        )
        return quad.render(latents, model.base.image_shape[1])

    def generated(context: str) -> np.ndarray:
        options = {
            "generator": generator,
            "output_type": "np",
            "num_inference_steps": num_inference_steps,
        }
        return to_uint8(model.sample(context, images, **options))

    for context in tqdm((OBS, *CONTEXTS), desc="sampling", disable=None):
        sets = {
            "generated": generated(context),
            "real": real(context, 0),
            "other": real(context, 1),
        }
        read[context] = {name: read_factors(x) for name, x in sets.items()}
    seconds = {
        "generated": read_factors(generated(OBS)),
        "real": read[OBS]["other"],
        "other": read[OBS]["real"],
    }
    matrices = {
        name: effects.effect_matrix(
            read[OBS][name], second, {c: read[c][name] for c in CONTEXTS}, seed=seed
        )
        for name, second in seconds.items()
    }
    result = {name: matrix.to_dict() for name, matrix in matrices.items()} | {
        "moving": effects.true_moves(CONTEXTS, variant).tolist(),
        "agreement": {
            f"{label}, {kind}": effects.compare_effects(
                matrices[name].rows(rows),
                matrices["real"].rows(rows),
                effects.true_moves(rows, variant),
            )
            for kind, rows in (("single", quad.CONCEPTS), ("pairs", quad.HELD_OUT))
            for label, name in (("model", "generated"), ("other real images", "other"))
        },
    }
    result["shifts"] = {"true": effects.true_mean_shifts(quad.CONCEPTS, variant).tolist()}
    for name in seconds:
        shifts = effects.mean_shifts(read[OBS][name], {c: read[c][name] for c in quad.CONCEPTS})
        result["shifts"][name], result["shifts"][f"{name}_error"] = (x.tolist() for x in shifts)
    return result


def corner_colours(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """Mean colours, (n, 3), in the corner of each quadrant of images of quad, (n, H, W, 3), in [0,
    1].
    """
    near, far = slice(None, pixels.shape[1] // 8), slice(-(pixels.shape[1] // 8), None)
    corners = {
        "quad1": (far, near),
        "quad2": (far, far),
        "quad3": (near, near),
        "quad4": (near, far),
    }
    return {
        name: pixels[:, rows, columns].mean((1, 2), dtype=np.float64)
        for name, (rows, columns) in corners.items()
    }


def chosen_values(
    model: InterventionModel, variant: str, images: int, seed: int, num_inference_steps: int = 50
) -> dict:
    """Whether a chosen value is the concept's: observational images take a quadrant's colour from
    others, `edit(x, {"quad1": other})`.

    Returns:
        By quadrant: `reference`, the mean absolute error of its corner's colour to that of the
        reference; `chance`, to those of the references of other images; `kept`, for each other
        quadrant, how far its colour ends from where it was; `influence` of the block.
        And `reconstructed`: the error of all four in images that are encoded and decoded.
    """
    latents = (
        quad.sample_latents(OBS, images, variant, HELD_OUT_SEED + 2 * seed + half)
        for half in (0, 1)
    )
    own, other = (quad.render(half, model.base.image_shape[1]) for half in latents)

    def edited_colours(interventions: Interventions) -> dict[str, np.ndarray]:
        edited = model.edit(
            own, interventions, output_type="np", num_inference_steps=num_inference_steps
        )
        return corner_colours(np.asarray(edited))

    before, reference, returned = (
        corner_colours(own / 255),
        corner_colours(other / 255),
        edited_colours(OBS),
    )
    found: dict[str, Any] = {
        "reconstructed": np.mean(
            [np.abs(returned[name] - before[name]).mean() for name in QUADRANTS]
        )
    }
    for name in tqdm(QUADRANTS, "choosing values", disable=None, delay=2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a block without influence, which is reported
            edited = edited_colours({name: other})
        apart = np.abs(edited[name][:, None] - reference[name]).mean(2)  # (image, reference)
        found[name] = {
            "reference": apart.diagonal().mean(),
            "chance": apart[~np.eye(images, dtype=bool)].mean(),
            "kept": {
                rest: np.abs(edited[rest] - before[rest]).mean()
                for rest in QUADRANTS
                if rest != name
            },
            "influence": influence(model.head, name),
        }
    return found


def causal_reading(model: InterventionModel, variant: str, sampled: dict, seed: int) -> dict:
    """What may be read of the effects among concepts, beside the truth; see
    `hf_intervene.metrics.causal`.

    Args:
        model: the model.
        variant: of quad.
        sampled: what `sampled_effects` returned.
        seed: of the draws.

    Returns:
        `true`: total effects among the six concepts (6, 6), [effect, cause]; `true_moves`: by how
        many standard deviations each single intervention moves each mean; `learnt`: matrices (D, D)
        or (D, 6) by reading; `agreement` with the truth, by reading.
    """
    head = model.head
    total = quad.total_effects(variant)[np.ix_(CONCEPTS, CONCEPTS)]
    shifts = np.column_stack(
        [np.abs(quad.moments(name, variant)[0])[CONCEPTS] for name in quad.CONCEPTS]
    )
    eps, c = head_draws(head, [OBS, *quad.CONCEPTS], _DRAWS, seed)
    readout = head_readout(head)
    means, distances = intervention_moves(c[0], c[1:], readout)
    learnt = {READINGS[3]: means, READINGS[4]: distances}
    if not head.is_flow:  # linear in eps
        learnt |= {
            READINGS[0]: block_effects(total_effect_operator(head.intervention), eps[0]),
            READINGS[1]: block_effects(total_effect_operator(head.intervention), eps[0], readout),
            READINGS[2]: block_effects(single_interventions_operator(head), eps[1], readout),
        }
    true = dict.fromkeys(learnt, shifts) | {name: total for name in READINGS[:3] if name in learnt}
    for label, name in (("sampled images", "generated"), ("real images", "real")):
        learnt[label] = np.nan_to_num(
            np.array(sampled[name]["values"])[: len(quad.CONCEPTS), CONCEPTS].T
        )
        true[label] = shifts
    d = len(quad.CONCEPTS)
    return {
        "true": total.tolist(),
        "true_moves": shifts.tolist(),
        "learnt": {name: matrix.tolist() for name, matrix in learnt.items()},
        "agreement": {
            name: asdict(agreement(matrix[:d, :d], true[name], seed))
            for name, matrix in learnt.items()
        },
    }


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = RecipeParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        required=True,
        help="folder of a trained model or pipeline, of the concepts of quad",
    )
    parser.add_argument(
        "--output", required=True, help="folder for effects.json, effects.md and the pictures"
    )
    parser.add_argument(
        "--variant",
        default="dependent",
        help=f"of quad: {' or '.join(quad.VARIANTS)} (default dependent)",
    )
    parser.add_argument(
        "--images", type=int, default=1000, help="images of each context and set (default 1000)"
    )
    parser.add_argument(
        "--resamples",
        type=int,
        default=20,
        help="random halves for the intervals of the codes' scores (default 20)",
    )
    parser.add_argument(
        "--num-inference-steps", type=int, default=50, help="of a denoiser (default 50)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of held-out images and noise")
    return parser.parse_args(argv)


@spoken
def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
    variant, images, seed = arguments.variant, arguments.images, arguments.seed
    quad.weights(variant)  # complains of another variant
    check_installed()  # now, not after all the rest
    if images < 2 * MIN_SAMPLES:
        raise ValueError(
            f"at least {2 * MIN_SAMPLES} images of every context are needed, not {images}."
        )
    if arguments.resamples < 2:
        raise ValueError(
            f"an interval needs at least two random halves, not {arguments.resamples}."
        )
    check_writable(arguments.output)
    model = load_model(arguments.model).eval()
    check_model(model, arguments.model, variant)
    sampled = sampled_effects(model, variant, images, seed, arguments.num_inference_steps)
    measured = {
        "effects": sampled,
        "codes": code_scores(model, variant, images, seed, arguments.resamples),
        "values": chosen_values(
            model, variant, min(images, _EDITED), seed, arguments.num_inference_steps
        ),
        "causal": causal_reading(model, variant, sampled, seed),
        "read_error": read_error(model.base.image_shape[1], seed=seed),
        "settings": vars(arguments),
    }
    text = table(measured)
    print(text)
    write_whole(Path(arguments.output, "effects.json"), json.dumps(measured, indent=1))
    write_whole(Path(arguments.output, "effects.md"), text)
    for name, figure in pictures(measured, model.config.free_blocks).items():
        save(figure, Path(arguments.output, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
