"""What `effects.py` writes: a table in words, and three pictures."""

from collections.abc import Sequence

import numpy as np

from hf_intervene.data import quad
from hf_intervene.evaluation.factor_tables import code_table
from hf_intervene.metrics.factors import LEVELS
from hf_intervene.plots import plot_matrices


CONTEXTS = quad.CONCEPTS + quad.HELD_OUT
QUADRANTS = quad.CONCEPTS[:4]
READINGS = (
    "weights, Frobenius",
    "weights, in the embedding",
    "weights, intervened",
    "mean of c under do",
    "distribution of c under do",
)


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
    lines += code_table(measured["codes"])
    lines += [
        "## Chosen values: a quadrant's colour taken from another image",
        "",
        (
            "| taken | error to the reference | by chance | others end from where they were:"
            f" {', '.join(QUADRANTS)} | influence of the block |"
        ),
        "| --- | --- | --- | --- | --- |",
    ]
    for name in QUADRANTS:
        row = measured["values"][name]
        kept = " / ".join(
            f"{row['kept'][rest]:.3f}" if rest in row["kept"] else "-" for rest in QUADRANTS
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
        np.array(causal["learnt"][READINGS[1]])[:, len(quad.CONCEPTS) :], axis=1
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

    shown = ("real images", READINGS[1], READINGS[4], "sampled images")
    readings = {
        "truth: total effects": causal["true"],
        "truth: shifts of means": causal["true_moves"],
    }
    readings |= {name: causal["learnt"][name] for name in shown}
    matrices = {name: padded(matrix) for name, matrix in readings.items()}
    for matrix in matrices.values():
        # what everything does to itself would be all there is to see
        np.fill_diagonal(matrix, np.nan)
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
