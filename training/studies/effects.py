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

from hf_intervene.cards import read_settings
from hf_intervene.contexts import OBS, Interventions
from hf_intervene.data import quad
from hf_intervene.errors import spoken
from hf_intervene.evaluation import load_model
from hf_intervene.metrics import disentanglement, effects, read_error, read_factors
from hf_intervene.metrics.causal import (
    agreement,
    block_effects,
    head_draws,
    head_readout,
    intervention_moves,
    single_interventions_operator,
    total_effect_operator,
)
from hf_intervene.metrics.factors import LEVELS
from hf_intervene.metrics.leakage import check_installed
from hf_intervene.model import InterventionModel
from hf_intervene.pixels import to_uint8
from hf_intervene.plots import plot_matrices, save
from hf_intervene.trainer.checkpoints import check_writable, write_whole
from hf_intervene.trainer.parsing import RecipeParser
from hf_intervene.trainer.sections import DataSettings
from hf_intervene.trainer.simulated import HELD_OUT_SEED
from hf_intervene.values import influence


CONTEXTS = quad.CONCEPTS + quad.HELD_OUT
_QUADRANTS = quad.CONCEPTS[:4]
_CONCEPTS = [quad.LATENTS.index(name) for name in quad.CONCEPTS]
_READINGS = (
    "weights, Frobenius",
    "weights, in the embedding",
    "weights, intervened",
    "mean of c under do",
    "distribution of c under do",
)
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


@torch.no_grad()
def code_scores(
    model: InterventionModel, variant: str, images: int, seed: int, resamples: int = 20
) -> dict:
    """What the posterior means z and the concepts c of held-out observational images say of their
    true latents.

    Observational images only: in other contexts the encoder is told of the intervention, and c is a
    function of it. A block's code for the measures of single codes is its first principal
    component; `block_mcc` and the correlations take whole blocks.

    Returns:
        For `z` and `c` with the latents, and for `z, noise` with the exogenous noise behind them,
        which z should be: each `Score` as a dict, by measure, and `blocks`, the correlation of each
        factor with its linear prediction from each block, (D, 8).
    """
    latents = quad.sample_latents(OBS, images, variant, HELD_OUT_SEED + 2 * seed)
    noise = quad.exogenous_noise(latents, variant)
    targets = model.targets(OBS, images)
    z, _ = model.abduct(model.preprocess(quad.render(latents, model.base.image_shape[1])), targets)
    c = model.head(z, targets).concepts
    scores = {}
    parts = (("z", z, latents), ("z, noise", z, noise), ("c", c, latents))
    for name, blocks, factors in tqdm(parts, "scoring codes", disable=None, delay=2):
        blocks = blocks.double().cpu().numpy()  # (n, D, width)
        codes = np.column_stack(
            [
                disentanglement.principal_components(block, 1, seed)
                for block in blocks.transpose(1, 0, 2)
            ]
        )
        measured = disentanglement.measure(codes, factors, resamples, seed)
        measured["block_mcc"] = disentanglement.scored(
            disentanglement.block_mcc, blocks, factors, resamples, seed
        )
        scores[name] = {key: score.to_dict() for key, score in measured.items()}
        scores[name]["blocks"] = disentanglement.block_correlations(blocks, factors).tolist()
    return scores


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
            [np.abs(returned[name] - before[name]).mean() for name in _QUADRANTS]
        )
    }
    for name in tqdm(_QUADRANTS, "choosing values", disable=None, delay=2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a block without influence, which is reported
            edited = edited_colours({name: other})
        apart = np.abs(edited[name][:, None] - reference[name]).mean(2)  # (image, reference)
        found[name] = {
            "reference": apart.diagonal().mean(),
            "chance": apart[~np.eye(images, dtype=bool)].mean(),
            "kept": {
                rest: np.abs(edited[rest] - before[rest]).mean()
                for rest in _QUADRANTS
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
    total = quad.total_effects(variant)[np.ix_(_CONCEPTS, _CONCEPTS)]
    shifts = np.column_stack(
        [np.abs(quad.moments(name, variant)[0])[_CONCEPTS] for name in quad.CONCEPTS]
    )
    eps, c = head_draws(head, [OBS, *quad.CONCEPTS], _DRAWS, seed)
    readout = head_readout(head)
    means, distances = intervention_moves(c[0], c[1:], readout)
    learnt = {_READINGS[3]: means, _READINGS[4]: distances}
    if not head.is_flow:  # linear in eps
        learnt |= {
            _READINGS[0]: block_effects(total_effect_operator(head.intervention), eps[0]),
            _READINGS[1]: block_effects(total_effect_operator(head.intervention), eps[0], readout),
            _READINGS[2]: block_effects(single_interventions_operator(head), eps[1], readout),
        }
    true = dict.fromkeys(learnt, shifts) | {name: total for name in _READINGS[:3] if name in learnt}
    for label, name in (("sampled images", "generated"), ("real images", "real")):
        learnt[label] = np.nan_to_num(
            np.array(sampled[name]["values"])[: len(quad.CONCEPTS), _CONCEPTS].T
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


def table(measured: dict) -> str:
    """Readable Markdown of everything that `main` measures."""
    sampled, causal, names = measured["effects"], measured["causal"], " | ".join(quad.LATENTS)
    generated, real = (sampled[name] for name in ("generated", "real"))
    lines = [
        "## Effects on the true factors, in sampled images",
        "",
        "How far each context moves each factor: generated / real.",
        "",
    ]
    lines += [f"| context | {names} |", "| --- " * 9 + "|"]
    for name, row, interval, truth, moving in zip(
        CONTEXTS, generated["values"], generated["intervals"], real["values"], sampled["moving"]
    ):
        cells = [
            f"{'**' * moves}{a:.2f} ± {high - a:.2f} / {b:.2f}{'**' * moves}"
            for a, (_, high), b, moves in zip(row, interval, truth, moving)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for key in ("floor", "noise"):
        cells = [f"{a:.2f} / {b:.2f}" for a, b in zip(generated[key], real[key])]
        lines.append(f"| *{key}* | {' | '.join(cells)} |")
    errors = [f"{measured['read_error'][name]:.3f}" for name in quad.LATENTS]
    lines += [
        f"| *read error* | {' | '.join(errors)} |",
        "",
        (
            "Bold: moves by the causal model. ±: half the 95 % interval. floor: mean distance of"
            " two observational sets; noise: its 99 % quantile. Wasserstein-1 distance of u in [0,"
            " 1]; shape: total variation; orientation: periods of its symmetry, up to which alone"
            " it can be seen. read error: mean error of what is read off real images, in the same"
            " units (shape: share of wrong kinds)."
        ),
        "",
        f"| | {' | '.join(next(iter(sampled['agreement'].values())))} |",
        "| --- " * 9 + "|",
    ]
    for label, row in sampled["agreement"].items():
        cells = [str(x) if isinstance(x, int) else f"{x:.2f}" for x in row.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    lines += [
        "",
        (
            "size: sum of moves over that of the real ones, where truth moves visibly; found: share"
            " of those that are made by half at least; spurious: share of the factors at rest that"
            " move above the noise (0.01 by chance), spurious_size: by how much, over the mean"
            " visible true move. Floors are subtracted. Distances are blind to direction: see the"
            " shifts."
        ),
    ]
    shifts = {name: np.array(x) for name, x in sampled["shifts"].items()}
    lines += [
        "",
        (
            "Shift of the mean of u by single interventions: generated ± 1.96 standard errors / by"
            " the causal model."
        ),
        "",
    ]
    lines += [f"| do | {' | '.join(LEVELS)} |", "| --- " * (1 + len(LEVELS)) + "|"]
    for j, name in enumerate(quad.CONCEPTS):
        triples = zip(shifts["generated"][j], shifts["generated_error"][j], shifts["true"][j])
        lines.append(
            f"| {name} |"
            f" {' | '.join(f'{a:+.2f} ± {1.96 * e:.2f} / {b:+.2f}' for a, e, b in triples)} |"
        )
    errors = [np.abs(shifts[name] - shifts["true"]).mean() for name in ("generated", "real")]
    lines += [
        "",
        f"Mean absolute error: {errors[0]:.3f}; of real images, the reader's own: {errors[1]:.3f}.",
        "",
    ]
    lines += [
        "## Codes and true latents, observational images",
        "",
    ]
    measures = [key for key in measured["codes"]["z"] if key != "blocks"]
    lines += [f"| | {' | '.join(measures)} |", "| --- " * (1 + len(measures)) + "|"]
    for name, scores in measured["codes"].items():
        cells = [
            f"{scores[m]['value']:.2f} ± {scores[m]['interval'][1] - scores[m]['value']:.2f}"
            f" ({scores[m]['floor']:.2f})"
            for m in measures
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        (
            "In brackets the floor, of codes in another order. A block's code is its first"
            " principal component; block_mcc takes whole blocks. z beside the latents and beside"
            " the exogenous noise behind them; c beside the latents. Latents of the dependent"
            " variant are correlated, so that a block which knows one tells something of others."
            " The lasso gives unrelated codes few weights, or none: disentanglement and"
            " completeness have high floors, and mean little by themselves."
        ),
        "",
        "## Chosen values: a quadrant's colour taken from another image",
        "",
        (
            "| taken | error to the reference | by chance | others end from where they were:"
            f" {', '.join(_QUADRANTS)} | influence of the block |"
        ),
        "| --- | --- | --- | --- | --- |",
    ]
    for name in _QUADRANTS:
        row = measured["values"][name]
        kept = " / ".join(
            f"{row['kept'][rest]:.3f}" if rest in row["kept"] else "-" for rest in _QUADRANTS
        )
        lines.append(
            f"| {name} | {row['reference']:.3f} | {row['chance']:.3f} | {kept} |"
            f" {row['influence']:.3f} |"
        )
    lines += [
        "",
        (
            "Mean absolute errors of colours in [0, 1], in the corners; reconstructions have"
            f" {measured['values']['reconstructed']:.3f}. By chance: to the reference of another"
            " image, so that it does not count that an intervention moves all colours alike."
            " Quadrants that the taken one causes should move too."
        ),
        "",
        "## Causal reading",
        "",
        "| reading | AUROC (p) | rank correlation (p) | direction |",
        "| --- | --- | --- | --- |",
    ]
    for name, row in causal["agreement"].items():
        cells = (
            f"{row['auroc']:.2f} ({row['auroc_p']:.3f}) | {row['rank']:.2f} ({row['rank_p']:.3f}) |"
            f" {row['direction']:.2f}"
        )
        lines.append(f"| {name} | {cells} |")
    shares = np.linalg.norm(
        np.array(causal["learnt"][_READINGS[1]])[:, len(quad.CONCEPTS) :], axis=1
    )
    free = ", ".join(f"{name} {share:.2f}" for name, share in zip(quad.CONCEPTS, shares))
    lines += [
        "",
        (
            "From the free blocks come, as shares of the standard deviation of c in the embedding:"
            f" {free}."
        ),
    ]
    return "\n".join([*lines, "", *_ACCOUNT, ""])


_ACCOUNT = (
    (
        "Agreement of the effects among the six concepts with those of the causal model. AUROC: a"
        " true effect has the larger entry than a pair without one (floor 0.5); rank correlation of"
        " magnitudes (floor 0); p: share of the relabellings of the concepts that agree as well;"
        " direction: larger the true way round (chance 0.5)."
    ),
    "",
    "What may be read of it, and what not:",
    "",
    (
        "- What images show in the training contexts, the data determine: every model that fits"
        " them moves the factors in the same way, whatever its parameters. The row of sampled"
        " images says what the model learnt of the causal effects, as far as factors can be read"
        " off images; orientation hardly can. Of pairs the data show nothing: there it is"
        " composition that is measured."
    ),
    (
        "- The rows of weights and of c are statements about one of many sets of parameters with"
        " one distribution of images. Blocks are determined up to maps within a block; the norms"
        " here are scaled by the spread of eps and, in the embedding, measured where the decoder"
        " reads them, so that they do not depend on the basis. They do depend on how the work is"
        " shared between the layer and the decoder, which mixes blocks: an effect may be there in"
        " images and not in W, and the other way round."
    ),
    (
        "- color and shape are never intervened on and have no block of their own. As common causes"
        " of concepts they make effects that are none, or they sit in a free block (its column:"
        " what comes from there), from which no edge among the concepts follows."
    ),
    (
        "- Entries are total effects in the observational context, not edges. A group lasso"
        " (`--group_lasso`) pushes blocks to zero, true ones too, and changes magnitudes; without"
        " it none is exactly zero."
    ),
    "- p does not cover the training: another seed is another matrix.",
)


def pictures(measured: dict, free_blocks: int) -> dict:
    """The three figures by file name; see the module docstring."""
    sampled, causal = measured["effects"], measured["causal"]
    blocks = [*quad.CONCEPTS, *(f"free {k + 1}" for k in range(free_blocks))]

    def padded(matrix: Sequence) -> np.ndarray:
        matrix = np.abs(matrix)
        return np.pad(matrix, [(0, len(blocks) - n) for n in matrix.shape], constant_values=np.nan)

    shown = ("real images", _READINGS[1], _READINGS[4], "sampled images")
    readings = {
        "truth: total effects": causal["true"],
        "truth: shifts of means": causal["true_moves"],
    }
    readings |= {name: causal["learnt"][name] for name in shown}
    matrices = {name: padded(matrix) for name, matrix in readings.items()}
    for matrix in matrices.values():
        np.fill_diagonal(
            matrix, np.nan
        )  # what everything does to itself would be all there is to see
    scales = {name: np.array(scores["blocks"]) for name, scores in measured["codes"].items()}
    return {
        "effects.png": plot_matrices(
            {name: np.array(sampled[name]["values"]) for name in ("real", "generated")},
            CONTEXTS,
            quad.LATENTS,
            "distance from observational images",
        ),
        "codes.png": plot_matrices(
            {
                "z and latents": scales["z"],
                "z and their noise": scales["z, noise"],
                "c and latents": scales["c"],
            },
            blocks,
            quad.LATENTS,
            "correlation with the prediction from a block",
        ),
        "causal.png": plot_matrices(
            matrices,
            blocks,
            blocks,
            "cause (column) and effect (row); each matrix on its own scale",
            False,
        ),
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
    if images < 2 * disentanglement.MIN_SAMPLES:
        raise ValueError(
            f"at least {2 * disentanglement.MIN_SAMPLES} images of every context are needed, not"
            f" {images}."
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
