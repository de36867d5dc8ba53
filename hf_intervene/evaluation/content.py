"""What evaluate.py measures of the content of images, context by context: presence, tests of real
against generated, edits with a true answer, routes, factors of quad (METHOD section 5). The
formulas are those of `hf_intervene.metrics`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..contexts import OBS, parse_context
from ..data import quad
from ..metrics import intervention_effects, read_error, read_factors
from ..metrics.counterfactual import counterfactual_error
from ..metrics.detector import Detector, Share
from ..metrics.disentanglement import MIN_SAMPLES
from ..metrics.factor_match import DEFECTS, defective_latents, match_factors
from ..metrics.factors import CHANCE, factor_changes, true_factors
from ..metrics.presence import composition_ratio, presence_shares, verdict
from ..metrics.routes import compare_routes
from ..metrics.two_sample import MIN_IMAGES, image_two_sample_test, kernel_distance
from ..model import InterventionModel
from ..trainer.simulated import HELD_OUT_SEED


ROUTE_IMAGES = 256  # at most


def wanted(context: str, concepts: Sequence[str]) -> list[str]:
    """The concepts that a context intervenes on."""
    return list(parse_context(context, concepts))


def measure_content(
    model: InterventionModel,
    name: str,
    real: Mapping[str, np.ndarray],
    others: np.ndarray,
    generated: np.ndarray,
    noise: torch.Tensor,
    generator: torch.Generator,
    detector: Detector | None,
    tests: bool,
    quad_variant: str | None,
    seed: int,
) -> dict:
    """What `evaluate` says of the content of the samples of one context; arguments as there.

    Returns:
        With a detector `presence` (see `measure_presence`) and `correlations`, the `error` of those
        between the concepts and its `floor`; with `tests` what `measure_tests` returns; with
        `quad_variant` `factors` (see `measure_factors`); of a single concept of a model with a
        head, but no denoiser, `routes` (see `measure_routes`).
    """
    found = {}
    if detector is not None:
        found["presence"] = measure_presence(detector, name, generated, real, model.concepts)
        sides = {"error": generated, "floor": others}
        found["correlations"] = {
            key: detected_correlations(detector, real[name], x) for key, x in sides.items()
        }
    if tests:
        found |= measure_tests(
            detector,
            real[name],
            others,
            generated,
            real[OBS] if name != OBS and OBS in real else None,
            seed,
        )
    if quad_variant is not None and len(generated) >= MIN_SAMPLES:
        found["factors"] = measure_factors(name, real[name], others, generated, quad_variant, seed)
    if model.head is not None and model.base.passes == 1 and len(wanted(name, model.concepts)) == 1:
        some = noise[:ROUTE_IMAGES]
        residual = model.base.draws(len(some), generator)
        found["routes"] = measure_routes(model, name, some, residual, detector)
    return found


def measure_presence(
    detector: Detector,
    context: str,
    generated: np.ndarray,
    real: Mapping[str, np.ndarray],
    concepts: Sequence[str],
) -> dict:
    """Presence in sampled and real images of a context, and in what one could pass off as them.

    Args:
        detector: of the concepts.
        context: its canonical name.
        generated: sampled images (n, H, W, C).
        real: real images of each context; those of `obs` and of the single contexts are the
            alternatives.
        concepts: of the model.

    Returns:
        A `Presence`, as a dict, of `generated`, of `real` (the floor), of `nothing` (observational
        images) and, of a composition, of `single`, the images of that one of its concepts in which
        all wanted ones are found most often; `single_context` names it.
    """
    asked = wanted(context, concepts)

    def of(images: np.ndarray) -> dict:
        return presence_shares(
            detector.present(images), asked, detector.concepts, detector.usable
        ).to_dict()

    found: dict[str, Any] = {"generated": of(generated), "real": of(real[context])}
    if asked and OBS in real:
        found["nothing"] = of(real[OBS])
    singles = {name: of(real[name]) for name in asked if name in real} if len(asked) > 1 else {}
    told = [name for name, part in singles.items() if part["all_wanted"] is not None]
    if told:
        best = max(told, key=lambda name: singles[name]["all_wanted"]["value"])
        found |= {"single": singles[best], "single_context": best}
    return found


def add_composition_ratios(
    contexts: Mapping[str, dict], concepts: Sequence[str], seed: int
) -> None:
    """Add to the presence of each composition its ratio to the product of the rates of its concepts
    in samples of their own contexts, `composition`, and of real images, `composition_floor`; see
    `hf_intervene.metrics.presence`."""
    for name, row in contexts.items():
        asked = wanted(name, concepts)
        if "presence" not in row or len(asked) < 2:
            continue
        for side, key in (("generated", "composition"), ("real", "composition_floor")):
            together = row["presence"][side]
            rates = [contexts.get(one, {}).get("presence", {}).get(side, {}) for one in asked]
            singles = [
                (part["rates"].get(one), part["images"]) for one, part in zip(asked, rates) if part
            ]
            if (
                together["all_wanted"] is None
                or len(singles) < len(asked)
                or any(rate is None for rate, _ in singles)
            ):
                continue
            pairs = [(_share(rate), images) for rate, images in singles]
            ratio = composition_ratio(
                _share(together["all_wanted"]), together["images"], pairs, seed
            )
            row["presence"][key] = None if ratio is None else vars(ratio)


def concept_verdicts(
    contexts: Mapping[str, dict], concepts: Sequence[str], detector: Detector
) -> dict[str, str]:
    """By concept, its verdict in words; see `hf_intervene.metrics.presence.verdict`. Of one that
    cannot be told, why."""
    words = {}
    for name in concepts:
        if name in detector.unusable:
            words[name] = f"not measured: {detector.unusable[name]}"
        elif all("presence" in contexts.get(context, {}) for context in (name, OBS)):
            shares = [
                _share(contexts[context]["presence"][side]["rates"][name])
                for context in (name, OBS)
                for side in ("generated", "real")
            ]
            words[name] = verdict(*shares)
    return words


def measure_tests(
    detector: Detector | None,
    real: np.ndarray,
    other: np.ndarray,
    generated: np.ndarray,
    obs: np.ndarray | None,
    seed: int,
) -> dict:
    """Tests of real against generated images of one context; nothing of fewer than 100 a side.

    Args:
        detector: for the kernel distance in its features; `None`, or one without a concept that it
            can tell: no such distance.
        real, other, generated: real images, other real ones for the floor, and sampled ones, (n, H,
            W, C).
        obs: real observational images, for what doing nothing scores; `None` for the context `obs`
            itself.
        seed: of the tests.

    Returns:
        `two_sample`: an `ImageTest` as a dict, with its `floor`, the accuracy between two real
            sets; `kernel_distance`: a
        `KernelDistance` as a dict, with its `floor` and, with `obs`, that of doing `nothing`.
    """
    if min(map(len, (real, other, generated))) < MIN_IMAGES:
        return {}
    test, floor = (image_two_sample_test(real, x, seed) for x in (generated, other))
    found = {
        "two_sample": test.to_dict() | {"floor": floor.accuracy, "floor_p_value": floor.p_value}
    }
    if detector is not None and detector.usable.any():
        features = detector.features(real)
        distance = kernel_distance(features, detector.features(generated), seed).to_dict()
        distance["floor"] = kernel_distance(features, detector.features(other), seed).value
        distance["nothing"] = (
            None if obs is None else kernel_distance(features, detector.features(obs), seed).value
        )
        found["kernel_distance"] = distance
    return found


def measure_counterfactuals(
    model: InterventionModel,
    twins: Mapping[str, np.ndarray],
    seed: int = 0,
    num_inference_steps: int = 50,
) -> dict[str, dict]:
    """Errors of edits of observational images to each other context, by context; see
    `hf_intervene.metrics.counterfactual`.

    Args:
        model: the model.
        twins: uint8 images (n, H, W, C) by context, `obs` among them; row i is the same individual
            in all.
        seed: of the intervals.
        num_inference_steps: of a denoiser.

    Raises:
        ValueError: no observational twins, or contexts with different numbers of images.
    """
    if OBS not in twins or len({len(x) for x in twins.values()}) > 1:
        raise ValueError(
            "twins are the same individuals in every context, obs among them: give as many images "
            "of each."
        )
    steps: dict[str, Any] = {"num_inference_steps": num_inference_steps}

    def abducted(context: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        x = model.preprocess(twins[context])
        return model.abduct(x, model.targets(context, len(x)), **steps)

    noise = abducted(OBS)
    returned: Any = model.predict(*noise, OBS, "np", **steps)
    errors = {}
    for name, truth in twins.items():
        if name == OBS:
            continue
        edited: Any = model.predict(*noise, name, "np", **steps)
        best: Any = model.predict(*abducted(name), name, "np", **steps)
        errors[name] = counterfactual_error(
            twins[OBS], truth, edited, returned, best, seed
        ).to_dict()
    return errors


@torch.no_grad()
def measure_routes(
    model: InterventionModel,
    context: str,
    noise: torch.Tensor,
    residual: Mapping[str, torch.Tensor],
    detector: Detector | None,
) -> dict:
    """`Routes` of one concept, as a dict: the same noise under the whole intervention and under its
    halves.

    Args:
        model: a model with a head, whose images take one pass.
        context: the concept.
        noise: (n, *noise_shape); `residual`: of `Base.draws`, each (n, ...).
        detector: of concepts, or `None`.
    """
    s = model.targets(context, len(noise))
    nothing = torch.zeros_like(s)
    targets = {
        "observational": (nothing, nothing),
        "intervened": (s, s),
        "own": (s, nothing),
        "edges": (nothing, s),
    }
    images = {}
    for name, (own, edges) in targets.items():
        parts = []
        for rows in torch.arange(len(noise)).split(model.images_at_once):
            embedding = model.embed(
                noise[rows].to(model.device), own[rows], edge_targets=edges[rows]
            )
            draws = {key: value[rows].to(model.device) for key, value in residual.items()}
            parts.append(model.base.generate(embedding, draws))
        images[name] = torch.cat(parts).permute(0, 2, 3, 1).float().cpu().numpy().clip(0, 1)
    options: dict[str, Any] = {**images, "concept": context, "detector": detector}
    return compare_routes(**options).to_dict()


def measure_factors(
    context: str,
    real: np.ndarray,
    other: np.ndarray,
    generated: np.ndarray,
    variant: str,
    seed: int,
) -> dict[str, dict]:
    """A `FactorMatch`, as a dict, of generated images of quad (`generated`), of other real ones
    (`floor`), and of real ones with one defect each (`DEFECTS`), all against real images of the
    context."""
    truth = read_factors(real)
    sets = {"generated": generated, "floor": other}
    for defect in DEFECTS:
        latents = defective_latents(context, len(generated), variant, seed, defect)
        sets[defect] = quad.render(latents, real.shape[1])
    return {
        name: match_factors(truth, read_factors(images), seed).to_dict()
        for name, images in sets.items()
    }


def factor_effects(
    model: InterventionModel,
    variant: str,
    resolution: int,
    seed: int,
    images: int = 256,
    num_inference_steps: int = 50,
) -> dict:
    """What edits of observational quad images do to the true factors; see
    `hf_intervene.metrics.factors`.

    Args:
        model: the model, its concepts those of quad.
        variant: of quad.
        resolution: of the model's images.
        seed: of held-out images.
        images: how many are edited to each context.
        num_inference_steps: of a denoiser.

    Returns:
        `read_error`: that of what is read off real images, by factor; `lost`: how far each factor
            of images that are edited to nothing is from that of the real
        ones; `visible`: the factors that are less than half as far as by chance; `contexts`: what
        `intervention_effects` returns for each single concept and held-out pair.
    """
    latents = quad.sample_latents(OBS, images, variant, HELD_OUT_SEED + 2 * seed)
    real = quad.render(latents, resolution)
    options: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    abducted = model.abduct(model.preprocess(real), model.targets(OBS, len(real)), **options)
    returned: Any = model.predict(*abducted, OBS, "np", **options)
    kinds = true_factors(latents).kinds.argmax(1)
    lost = dict(
        zip(
            quad.LATENTS, factor_changes(read_factors(real), read_factors(returned), kinds).tolist()
        )
    )
    visible = [name for name in quad.LATENTS if lost[name] < CHANCE[name] / 2]
    contexts = {}
    for name in tqdm(quad.CONCEPTS + quad.HELD_OUT, "reading edits", disable=None, delay=2):
        counterfactual = quad.counterfactual_latents(latents, name, variant)
        edited: Any = model.predict(*abducted, name, "np", **options)
        contexts[name] = intervention_effects(
            returned, edited, latents, counterfactual, name, visible
        )
    return {
        "read_error": read_error(resolution, seed=seed),
        "lost": lost,
        "visible": visible,
        "contexts": contexts,
    }


def detected_correlations(
    detector: Detector, real: np.ndarray, generated: np.ndarray
) -> float | None:
    """Mean absolute difference of the correlations between the concepts that are found in real and
    generated images of one context, over all pairs of concepts that vary in both; `None` of fewer
    than one such pair."""
    found = [
        detector.present(images)[:, detector.usable].astype(float) for images in (real, generated)
    ]
    varying = np.all([x.std(0) > 0 for x in found], axis=0)
    if varying.sum() < 2:
        return None
    a, b = (np.corrcoef(x[:, varying].T)[np.triu_indices(varying.sum(), 1)] for x in found)
    return float(np.abs(a - b).mean())


def _share(share: dict) -> Share:
    return Share(share["value"], tuple(share["interval"]))
