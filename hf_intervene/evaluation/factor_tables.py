"""The Markdown tables of true factors: in samples, in edits, and in codes."""

from collections.abc import Mapping

from ..data import quad
from ..metrics.factor_match import DEFECTS
from .cells import number_cell


def factor_match_table(metrics: Mapping) -> list[str]:
    """Lines on the factors of quad in samples; none of other data."""
    rows = [(name, row["factors"]) for name, row in metrics["contexts"].items() if "factors" in row]
    if not rows:
        return []
    sides = ("generated", "floor", *DEFECTS)
    lines = [
        "## Factors",
        "",
        "Of generated images / of other real ones / of real images with one defect each: "
        + ", ".join(DEFECTS)
        + ".",
    ]
    lines += [
        "",
        "| context | slope of correlations | shapes | size | told apart | triangles (real) |",
        "| --- " * 6 + "|",
    ]
    for name, found in rows:
        cells = [
            " / ".join(number_cell(found[side][key], digits) or "-" for side in sides)
            for key, digits in (("slope", 2), ("shape_distance", 2), ("size_distance", 3))
        ]
        cells.append(" / ".join(f"{found[side]['two_sample']['accuracy']:.2f}" for side in sides))
        cells.append(f"{found['generated']['triangles']:.3f} ({found['floor']['triangles']:.3f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        (
            "slope: of the correlations of factors on those in real images, 1 is right; shapes:"
            " total variation distance of their shares; size: Wasserstein-1 distance of u; told"
            " apart: accuracy of boosted trees on the factors. Intervals are in metrics.json."
        ),
        "",
    ]


def factor_table(effects: Mapping) -> list[str]:
    """Lines of the Markdown table of what `factor_effects` returns."""
    lines = ["## Edits and the true factors: mean change by the edit / in truth", ""]
    lines += [
        f"| context | {' | '.join(quad.LATENTS)} | moved | leak (floor) |",
        "| --- " * 11 + "|",
    ]
    for name, row in effects["contexts"].items():
        cells = [f"{x['change']:.2f} / {x['true_change']:.2f}" for x in row["factors"].values()]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {row['moved']:.2f} | {row['leak']:.3f} "
            f"({row['leak_floor']:.3f}) |"
        )
    for label, values in (("lost", effects["lost"]), ("read error", effects["read_error"])):
        lines.append(
            f"| *{label}* | {' | '.join(f'{values[name]:.2f}' for name in quad.LATENTS)} | | |"
        )
    return [
        *lines,
        "",
        (
            "Changes are between an image as the model returns it and the same edited. moved:"
            " change over true change of the intervened factors (1 is right); leak: mean change of"
            " the factors that truth leaves as they are (floor: the reader's own error). lost: how"
            " far returned images are from real ones; read error: of what is read off real images."
            " Counted are the factors that the model returns:"
            f" {', '.join(effects['visible']) or 'none'}."
        ),
        "",
    ]


def code_table(codes: Mapping) -> list[str]:
    """Lines of the Markdown table of what `code_scores` returns."""
    measures = [key for key in next(iter(codes.values())) if key != "blocks"]
    lines = [f"| | {' | '.join(measures)} |", "| --- " * (1 + len(measures)) + "|"]
    for name, scores in codes.items():
        cells = []
        for found in (scores[measure] for measure in measures):
            half = found["interval"][1] - found["value"]
            cell = f"{found['value']:.2f} ± {half:.2f} ({found['floor']:.2f}; "
            cells.append(f"{cell}{found['untrained']:.2f})")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        (
            "In brackets the floor, of codes in another order, and the score of an untrained model"
            " of the same configuration. All scores are of whole blocks: a factor is predicted from"
            " each by kernel regression, on held-out images (mcc_linear: linearly), and mcc, mig,"
            " sap and the importances of DCI are of the predictions. own_block: correlation of a"
            " concept's latent with its prediction from its own block; other_block: from the best"
            " other one. z beside the latents and beside the exogenous noise behind them; c beside"
            " the latents. Latents of the dependent variant are correlated, so that a block which"
            " knows one tells something of others."
        ),
        "",
    ]
