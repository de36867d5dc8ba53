"""The Markdown tables of what evaluate.py measures: what people see first, distances after it."""

from collections.abc import Mapping

from ..card_metrics import LOSSES, loss_in
from ..metrics.transport import MIN_IMAGES, PROTOCOLS
from .cells import interval_cell, number_cell, share_cell
from .factor_tables import code_table, factor_match_table, factor_table


def table(metrics: Mapping) -> str:
    """Readable Markdown of what `evaluate` returns."""
    parts = (
        presence_table,
        test_table,
        counterfactual_table,
        route_table,
        factor_match_table,
        distance_table,
        edit_table,
    )
    lines = [line for part in parts for line in part(metrics)]
    if "factor_effects" in metrics:
        lines += factor_table(metrics["factor_effects"])
    if "codes" in metrics:
        lines += ["## Codes and true latents, observational images", ""]
        lines += code_table(metrics["codes"])
    if "leakage" in metrics:
        leakage = metrics["leakage"]
        lines += [
            (
                "Leakage: the context is told from the residual noise with a balanced accuracy of "
                f"{leakage['accuracy']:.3f} "
                f"[{leakage['interval'][0]:.3f}, {leakage['interval'][1]:.3f}]; without leakage it "
                f"would be {leakage['chance']:.3f}."
            ),
            "",
        ]
    return "\n".join(lines)


def presence_table(metrics: Mapping) -> list[str]:
    """Lines on the presence of concepts, with the verdicts and the detector's error; none without a
    detector."""
    if "detector" not in metrics:
        return []
    lines = ["## Presence", ""]
    if metrics["verdicts"]:
        lines += [*(f"- {name}: {words}" for name, words in metrics["verdicts"].items()), ""]
    lines += [
        (
            "| context | all asked for [95 %] | real | nothing else | real | unwanted | real | over"
            " product [95 %] | real | obs | single |"
        ),
        "| --- " * 11 + "|",
    ]
    for name, row in metrics["contexts"].items():
        found = row.get("presence")
        if found is None:
            continue
        generated, real = found["generated"], found["real"]
        cells = [share_cell(generated["all_wanted"], True), share_cell(real["all_wanted"])]
        cells += [
            share_cell(side[key]) for key in ("exact", "unwanted") for side in (generated, real)
        ]
        composed, floor = found.get("composition"), found.get("composition_floor")
        cells.append(
            f"{composed['ratio']:.2f} {interval_cell(composed['interval'], 2)}" if composed else ""
        )
        cells.append(f"{floor['ratio']:.2f}" if floor else "")
        cells += [
            share_cell((found.get(side) or {}).get("all_wanted")) for side in ("nothing", "single")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for kind, mean in metrics["means"].items():
        if "presence" in mean:
            of = mean["presence"]
            empty = [""] * 4
            cells = [
                number_cell(of["generated"]),
                number_cell(of["real"]),
                *empty,
                number_cell(of["composition"], 2),
                "",
            ]
            lines.append(
                f"| **mean {kind}** | "
                f"{' | '.join(cells + [number_cell(of[side]) for side in ('nothing', 'single')])} |"
            )
    lines += [
        "",
        (
            "Shares of images, by a detector of concepts. real: the same of real images of the"
            " context, the floor. over product: the share with all that was asked for over the"
            " product of the single rates; 1 is perfect composition of independent concepts. obs"
            " and single: observational images, or those of the better single context, passed off"
            " as the context."
        ),
        "",
    ]
    return lines + detector_table(metrics["detector"])


def detector_table(detector: Mapping) -> list[str]:
    """Lines on the error of a detector on held-out real images."""
    lines = []
    if detector["errors"]:
        lines += [
            "| detector | found where it is | found where it is not | balanced accuracy [95 %] | "
            "blurred: is | is not |"
        ]
        lines += ["| --- " * 6 + "|"]
    for name, error in detector["errors"].items():
        sharp, blurred = error["sharp"], error["blurred"]
        cells = [f"{sharp['true_positive']:.3f}", f"{sharp['false_positive']:.3f}"]
        cells += [f"{sharp['balanced_accuracy']:.3f} {interval_cell(sharp['interval'])}"]
        cells += [f"{blurred['true_positive']:.3f}", f"{blurred['false_positive']:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", *(f"No presence of {name}: {why}" for name, why in detector["unusable"].items())]
    if detector["kind"] == "contexts":
        lines += [
            (
                "The detector knows contexts, not attributes: it says whether an image looks like"
                " those of the concept's context rather than observational ones. Observational"
                " images that have the concept already count as its errors."
            ),
        ]
    return [*lines, ""]


def test_table(metrics: Mapping) -> list[str]:
    """Lines on whether real and generated images can be told apart; none if that was not asked."""
    rows = [(name, row) for name, row in metrics["contexts"].items() if "two_sample" in row]
    if not rows:
        return []
    lines = ["## Real or generated?", ""]
    lines += [
        "| context | accuracy [95 %] | p | floor | kernel distance [95 %] | floor | obs |",
        "| --- " * 7 + "|",
    ]
    for name, row in rows:
        test, distance = row["two_sample"], row.get("kernel_distance")
        cells = [
            f"{test['accuracy']:.3f} {interval_cell(test['interval'])}",
            f"{test['p_value']:.2g}",
            f"{test['floor']:.3f}",
        ]
        if distance:
            cells += [
                f"{distance['value']:.3f} {interval_cell(distance['interval'])}",
                number_cell(distance["floor"]),
                number_cell(distance["nothing"]),
            ]
        else:
            cells += [""] * 3
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        (
            "accuracy: of a small convolutional network that tells real from generated images, on"
            " held-out ones; 0.5 is chance, floor: between two sets of real images. kernel"
            " distance: KID in the features of the detector of concepts; floor likewise, obs: of"
            " observational images."
        ),
        "",
    ]


def counterfactual_table(metrics: Mapping) -> list[str]:
    """Lines on edits whose true answers are known; none without twins."""
    rows = [
        (name, row["counterfactual"])
        for name, row in metrics["contexts"].items()
        if "counterfactual" in row
    ]
    if not rows:
        return []
    lines = ["## Edits against their true answers", ""]
    lines += [
        (
            "| context | edited [95 %] | unedited | another's change | reconstruction | edited /"
            " unedited [95 %] | outside | best |"
        ),
        "| --- " * 8 + "|",
    ]
    for name, error in rows:
        cells = [f"{error['edited']:.3f} {interval_cell(error['edited_interval'])}"]
        cells += [f"{error[key]:.3f}" for key in ("unedited", "another", "reconstructed")]
        cells.append(
            ""
            if error["ratio"] is None
            else f"{error['ratio']:.2f} {interval_cell(error['ratio_interval'], 2)}"
        )
        cells += [number_cell(error["outside"], 2), number_cell(error["outside_floor"], 2)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        (
            "Observational images edited to each context: root mean square distance to the true"
            " answer; unedited: of the image as it is; another's change: of the image with what the"
            " true answer of another one changes, since nobody can know which glasses were drawn;"
            " reconstruction: of the model's own reconstruction of the true answer. outside: share"
            " of the change on pixels that the true answer leaves alone; best: the same of the"
            " change between the two reconstructions."
        ),
        "",
    ]


def route_table(metrics: Mapping) -> list[str]:
    """Lines on the ways by which interventions reach the image; none of a model without a head."""
    rows = [(name, row["routes"]) for name, row in metrics["contexts"].items() if "routes" in row]
    if not rows:
        return []
    lines = ["## Routes", ""]
    lines += [
        (
            "| concept | change [95 %] | own noise | cut edges | found: obs / whole / own / edges |"
            " outside |"
        ),
        "| --- " * 6 + "|",
    ]
    for name, found in rows:
        rates = found["rates"]
        cells = [
            f"{found['change']:.3f} {interval_cell(found['change_interval'])}",
            number_cell(found["own"], 2),
            number_cell(found["edges"], 2),
        ]
        sides = ("observational", "intervened", "own", "edges")
        cells.append(" / ".join(f"{rates[side]['value']:.2f}" for side in sides) if rates else "")
        lines.append(f"| {name} | {' | '.join([*cells, number_cell(found['outside'], 2)])} |")
    return [
        *lines,
        "",
        (
            "Mean absolute change of samples by the intervention; what its own noise alone (A_int, "
            "edges kept) and its cut edges alone (A_obs) make "
            "of it. found: share in which the detector finds the concept. outside: share of the "
            "change of the detector's probabilities that falls on other concepts."
        ),
        "",
    ]


def distance_table(metrics: Mapping) -> list[str]:
    """Lines on distances of pixels, a table for each protocol."""
    lines = []
    first = next(iter(metrics["contexts"].values()))
    loss = loss_in(first)
    rows = list(metrics["contexts"].items())
    rows += [(f"**mean {kind}**", row) for kind, row in metrics["means"].items()]
    for protocol in (name for name in PROTOCOLS if name in first):
        lines += [f"## Sliced 2-Wasserstein distance, {protocol} protocol", ""]
        lines += [
            f"| context | distance [95 %] | floor | ratio | obs | single | {LOSSES[loss]} |",
            "| --- " * 7 + "|",
        ]
        for name, row in rows:
            of, other = (
                row[protocol],
                (row.get("alternatives") or {}) if protocol == "independent" else {},
            )
            cells = [
                f"{of['distance']:.3f} {interval_cell(of['interval'])}",
                f"{of['floor']:.3f}",
                number_cell(of["ratio"], 1),
            ]
            cells += [
                number_cell(other.get("nothing")),
                number_cell(other.get("single")),
                f"{row[loss]:.3f}",
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        if any(row[protocol]["ratio"] is None for _, row in rows):
            lines += [
                "",
                (
                    f"No ratio to the floor below {MIN_IMAGES} distinct images a side: the floor is"
                    " so high there that the ratio is near 1 whatever was generated."
                ),
            ]
        shifts = [
            f"{mean[protocol]['mean_shift']:.3f} ({kind}; floor "
            f"{mean[protocol]['mean_shift_floor']:.3f})"
            for kind, mean in metrics["means"].items()
            if "mean_shift" in mean[protocol]  # not in older files
        ]
        if shifts:
            lines += ["", f"Of it, the mean images alone make {', '.join(shifts)}; squares add up."]
        lines.append("")
    bernoulli = [
        f"{mean['bernoulli_bits_per_pixel']:.3f} bits per pixel, of them"
        f" {mean['bits_above_entropy']:.3f} above the entropy of the images ({kind})"
        for kind, mean in metrics["means"].items()
        if "bernoulli_bits_per_pixel" in mean
    ]
    if bernoulli:
        lines += [
            (
                "By the paper's Bernoulli likelihood, which is not normalised and no code length:"
                f" {'; '.join(bernoulli)}."
            ),
            "",
        ]
    returned = [
        f"{mean['reconstruction']['distance']:.3f} ({kind})"
        for kind, mean in metrics["means"].items()
        if "reconstruction" in mean
    ]
    if returned:
        lines += [
            (
                f"Reconstructions of other real images are at {', '.join(returned)}, under the "
                "independent protocol: what they are above the floor "
                "is the decoder's; what samples are above them, if anything, the prior's."
            ),
            "",
        ]
    return lines


def edit_table(metrics: Mapping) -> list[str]:
    """Lines on edits of observational images, where no true answer is known."""
    rows = [(name, row["edit"]) for name, row in metrics["contexts"].items() if "edit" in row]
    if not rows:
        return []
    lines = ["## Observational images edited to each context", ""]
    lines += ["| context | all asked for | distance | of the unedited |", "| --- " * 4 + "|"]
    lines += [
        f"| {name} | {share_cell(edit.get('presence'))} | {edit['distance']:.3f} | "
        f"{edit['unedited']:.3f} |"
        for name, edit in rows
    ]
    return [
        *lines,
        "",
        (
            f"Observational images come back with a PSNR of {metrics['reconstruction_psnr']:.1f} dB"
            " when nothing is changed."
        ),
        "",
    ]
