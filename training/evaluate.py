"""Evaluate a trained model: presence of concepts, composition, edits, distances, reconstruction (METHOD section 5; arXiv:2507.04754).

    python training/evaluate.py --model outputs/quad/model --dataset quad --output outputs/quad/metrics

Held-out real images of every context against generated ones. First what people see: whether every concept that was asked for is there, by
a detector; whether a network tells real from generated; what edits do, and by which route. Then the sliced 2-Wasserstein distance, with floor,
ratio and interval, and the negative ELBO in bits per pixel. Writes `metrics.json` and `metrics.md`. Started as several processes (`accelerate launch`, `torchrun`), these
share out the contexts; the result is the same.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from hf_intervene import pipeline
from hf_intervene.cards import FLOORS_FILE, loss_in, read_settings
from hf_intervene.contexts import OBS
from hf_intervene.data import ContextImages, load_contexts, quad
from hf_intervene.data.digits import BUNDLED
from hf_intervene.logging import bars_on_terminals_only, get_logger
from hf_intervene.metrics import context_leakage, intervention_effects, mean_interval, read_error, read_factors
from hf_intervene.metrics.detector import Detector, train_context_detector, train_detector
from hf_intervene.metrics.factors import CHANCE, factor_changes, true_factors
from hf_intervene.metrics.leakage import FOLDS, check_installed
from hf_intervene.metrics.transport import PROTOCOLS, compare_projected, directions, project, sliced_w2
from hf_intervene.model import InterventionModel
from hf_intervene.plots import floor_chart, save
from hf_intervene.training.arguments import RecipeParser, TrainArguments
from hf_intervene.training.checkpoints import check_writable, write_whole
from hf_intervene.training.distributed import process_state
from hf_intervene.training.evaluate_content import (
    ROUTE_IMAGES,
    add_composition_ratios,
    concept_verdicts,
    detected_correlations,
    measure_counterfactuals,
    measure_factors,
    measure_presence,
    measure_routes,
    measure_tests,
    wanted,
)
from hf_intervene.training.evaluate_tables import table
from hf_intervene.training.simulated import HELD_OUT_SEED, SIMULATED, held_out_on_demand
from hf_intervene.training.validation import loss_units


logger = get_logger("hf_intervene.training")

FEW_IMAGES = 100  # a side of a context: the floor of quad, 32x32, is 0.1 there; a base without a head has 0.15 over many
DETECTOR_IMAGES, TWIN_IMAGES = 4000, 256  # of each context, unless said otherwise


@torch.no_grad()
def evaluate(
    model: InterventionModel,
    real: Mapping[str, np.ndarray],
    other_real: Mapping[str, np.ndarray],
    protocols: Sequence[str] = PROTOCOLS,
    num_projections: int = 500,
    seed: int = 0,
    batch_size: int | None = None,
    edits: bool = False,
    num_inference_steps: int = 50,
    detector: Detector | None = None,
    tests: bool = False,
    twins: Mapping[str, np.ndarray] | None = None,
    quad_variant: str | None = None,
) -> dict:
    """Measure a model on held-out images. Several processes call this together, with the same arguments, and get the same result.

    Args:
        model: the model.
        real: held-out uint8 images (n, H, W, C) of each context, by canonical name; several concepts in a name make it a composition.
        other_real: as many further ones, for the floor.
        protocols: see `hf_intervene.metrics.transport`.
        num_projections: random directions of the distance.
        seed: of noise, directions and resampling.
        batch_size: images at once; `None`: the model's `images_at_once`.
        edits: whether to measure edits too: the real observational images, edited to each other context.
        num_inference_steps: of a denoiser.
        detector: of the concepts, for their presence; `None`: no presence.
        tests: whether to ask a network to tell real from generated images (about 15 seconds a context).
        twins: the same individuals in every context, for the error of edits (of a denoiser with `edits` only); see `hf_intervene.metrics.counterfactual`.
        quad_variant: of images of quad, the variant, for the measures of its factors.

    Returns:
        `detector`: its kind and error; `verdicts`: by concept, in words; `contexts`: for each context its kind (`"concept"` or `"composition"`); with a
        detector its `presence` (see `measure_presence` and `add_composition_ratios`) and `correlations`; with `tests` what `measure_tests` returns;
        with `twins` its `counterfactual` error; of a single concept of a model with a head, but no denoiser, its `routes`; with `quad_variant` its `factors`;
        a `TransportResult` per protocol, `alternatives`, the distances of observational images (`nothing`) and, of a composition, of the nearest single context (`single`); and `bits_per_pixel`
        with its interval (of a denoiser, which has no likelihood, `denoising_loss`: squared error and KL per entry of what it denoises);
        `reconstruction`: the `distance` of reconstructions of the further images from the real ones, by draws of their posteriors (of a
        denoiser with `edits` only); with `edits` their `distance`, beside that of images left as they are (`unedited`), and, with a detector, the share in
        which all wanted concepts are found (`presence`); `means`: the same averaged over each kind; `reconstruction_psnr`: with `edits`, of observational images that are edited to nothing, in dB;
        `leakage`: how well the context can be told from the residual noise, for a model that has it (of a denoiser with `edits` only: it
        takes longer than all the rest).
    """
    model.eval()
    leaks = model.base.residual_shape is not None and (edits or not model.base.denoises)
    if leaks:
        check_installed()  # now, not after all the rest
    steps = {"num_inference_steps": num_inference_steps}
    contexts: dict[str, dict] = {}
    residuals, abducted = {}, None  # the last: of the observational images
    if edits:
        x = model.preprocess(real[OBS])
        abducted = model.abduct(x, model.targets(OBS, len(x)), None, batch_size, **steps)
    process = process_state()
    for name in tqdm(list(real)[process.process_index :: process.num_processes], desc="evaluating", disable=None):
        images = real[name]
        # Of each context its own, so that it does not matter which contexts are measured before.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + list(real).index(name))
        noise = torch.randn(len(images), *model.noise_shape, generator=generator)
        generated = model.sample(name, noise=noise, generator=generator, batch_size=batch_size, **steps)
        generated = generated.permute(0, 2, 3, 1).float().cpu().numpy()  # (n, H, W, C)
        axes = directions(generated[0].size, num_projections, seed)
        others = other_real[name]
        projected = [project(x, axes) for x in (images, others, generated)]
        loss = _negative_elbo(model, images, name, generator, batch_size)
        loss, interval = mean_interval(loss_units(model, loss), seed=seed)
        contexts[name] = {
            "kind": "composition" if len(wanted(name, model.concepts)) > 1 else "concept",
            "images": len(images),
            _loss_name(model): loss,
            f"{_loss_name(model)}_interval": interval,
        } | {protocol: compare_projected(*projected, protocol, seed=seed).to_dict() for protocol in protocols}
        if OBS in real and name != OBS:
            contexts[name]["alternatives"] = _alternatives(name, projected[0], real, model.concepts, axes)
        contexts[name] |= measure_content(model, name, real, others, generated, noise, generator, detector, tests, quad_variant, seed)
        if edits and name != OBS:
            images_edited = model.predict(*abducted, name, "np", batch_size, **steps)
            edit = {
                "distance": sliced_w2(projected[0], project(images_edited, axes)),
                "unedited": contexts[name]["alternatives"]["nothing"],
            }
            if detector is not None:
                edit["presence"] = measure_presence(detector, name, images_edited, real, model.concepts)["generated"]["all_wanted"]
            contexts[name]["edit"] = edit
        if leaks and contexts[name]["kind"] == "concept":
            x = model.preprocess(images)
            residuals[name] = model.abduct(x, model.targets(name, len(x)), generator, batch_size, **steps)[1].cpu().numpy()
        if not model.base.denoises or edits:
            others = model.preprocess(others[: len(images)])
            noise, residual = model.abduct(others, model.targets(name, len(others)), generator, batch_size, **steps)
            returned = project(model.predict(noise, residual, name, "np", batch_size, **steps), axes)
            contexts[name]["reconstruction"] = {"distance": sliced_w2(projected[0], returned)}
    contexts, residuals = (_of_all_processes(own, real) for own in (contexts, residuals))
    metrics = {}
    if twins is not None and (edits or not model.base.denoises):
        for name, error in measure_counterfactuals(model, twins, seed, num_inference_steps).items():
            if name in contexts:
                contexts[name]["counterfactual"] = error
    if detector is not None:
        add_composition_ratios(contexts, model.concepts, seed)
        metrics = {"detector": detector.to_dict(), "verdicts": concept_verdicts(contexts, model.concepts, detector)}
    metrics |= {"contexts": contexts, "means": _means(contexts, protocols)}
    if edits:
        returned = model.predict(*abducted, OBS, "np", batch_size, **steps)
        metrics["reconstruction_psnr"] = float(-10 * np.log10(np.square(returned - real[OBS] / 255).mean()))
    if residuals and min(map(len, residuals.values())) >= FOLDS:
        labels = np.repeat(list(residuals), [len(rho) for rho in residuals.values()])
        metrics["leakage"] = context_leakage(np.concatenate(list(residuals.values())), labels, seed).to_dict()
    return metrics


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
    """What `evaluate` says of the content of the samples of one context; arguments as there."""
    found = {}
    if detector is not None:
        found["presence"] = measure_presence(detector, name, generated, real, model.concepts)
        sides = {"error": generated, "floor": others}
        found["correlations"] = {key: detected_correlations(detector, real[name], x) for key, x in sides.items()}
    if tests:
        found |= measure_tests(detector, real[name], others, generated, real[OBS] if name != OBS and OBS in real else None, seed)
    if quad_variant is not None:
        found["factors"] = measure_factors(name, real[name], others, generated, quad_variant, seed)
    if model.head is not None and not model.base.denoises and len(wanted(name, model.concepts)) == 1:
        some = noise[:ROUTE_IMAGES]
        shape = model.base.residual_shape
        residual = None if shape is None else torch.randn(len(some), *shape, generator=generator)
        found["routes"] = measure_routes(model, name, some, residual, detector)
    return found


def _alternatives(name: str, projected: np.ndarray, real: Mapping[str, np.ndarray], concepts: Sequence[str], axes: np.ndarray) -> dict:
    """Distances of what one could pass off as a context: observational images and, of a composition, its nearest single context."""
    found = {"nothing": sliced_w2(projected, project(real[OBS], axes))}
    singles = {one: sliced_w2(projected, project(real[one], axes)) for one in wanted(name, concepts) if one in real and one != name}
    if singles:
        found["single_context"] = min(singles, key=singles.__getitem__)
        found["single"] = singles[found["single_context"]]
    return found


def _of_all_processes(own: dict, order: Iterable[str]) -> dict:
    """What the processes found of their contexts, in this order."""
    found = {name: value for part in gather_object([own]) for name, value in part.items()}
    return {name: found[name] for name in order if name in found}


def _loss_name(model: InterventionModel) -> str:
    return "denoising_loss" if model.base.denoises else "bits_per_pixel"


def _negative_elbo(model, images: np.ndarray, context: str, generator: torch.Generator, batch_size: int | None) -> np.ndarray:
    pixel_values = torch.from_numpy(images).permute(0, 3, 1, 2)
    nats = []
    for batch in pixel_values.split(batch_size or model.images_at_once):
        noise = {key: value.to(model.device) for key, value in model.posterior_draws(len(batch), generator).items()}
        x = batch.to(model.device).float() / 255
        output = model(x, model.targets(context, len(batch)), **noise)
        nats.append((output.reconstruction_loss + output.kl + output.residual_kl).double().cpu())
    return torch.cat(nats).numpy()


# What is averaged over contexts, where it was measured.
_MEANS = {
    "reconstruction": ("distance",),
    "edit": ("distance", "unedited"),
    "alternatives": ("nothing", "single"),
    "two_sample": ("accuracy", "floor"),
    "kernel_distance": ("value", "floor", "nothing"),
    "counterfactual": ("edited", "unedited", "reconstructed"),
    "routes": ("own", "edges", "outside"),
}
_SIDES = ("generated", "real", "nothing", "single")  # of presence


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _means(contexts: Mapping[str, dict], protocols: Sequence[str]) -> dict:
    means = {}
    for kind in ("concept", "composition"):
        rows = [row for row in contexts.values() if row["kind"] == kind]
        if not rows:
            continue
        loss = loss_in(rows[0])
        means[kind] = {"contexts": len(rows), loss: float(np.mean([row[loss] for row in rows]))}
        for protocol in protocols:
            mean = {
                key: float(np.mean([row[protocol][key] for row in rows]))
                for key in ("distance", "floor", "mean_shift", "mean_shift_floor")
            }
            distance, floor = mean["distance"], mean["floor"]
            # Contexts are drawn independently: the variance of their mean is the sum of theirs over the square of their number.
            margins = [(row[protocol]["interval"][1] - row[protocol]["distance"]) for row in rows]
            margin = float(np.sqrt(np.sum(np.square(margins))) / len(rows))
            means[kind][protocol] = mean | {"interval": (distance - margin, distance + margin)}
            few = any(row[protocol]["ratio"] is None for row in rows)
            means[kind][protocol]["ratio"] = None if few else distance / floor
        for what, keys in _MEANS.items():
            if found := [row[what] for row in rows if row.get(what)]:
                means[kind][what] = {key: _mean([row.get(key) for row in found]) for key in keys}
        if found := [row["presence"] for row in rows if row.get("presence")]:
            shares = {side: [(row.get(side) or {}).get("all_wanted") for row in found] for side in _SIDES}
            means[kind]["presence"] = {side: _mean([x and x["value"] for x in of]) for side, of in shares.items()}
            ratios = [row.get("composition") for row in found]
            means[kind]["presence"]["composition"] = _mean([x and x["ratio"] for x in ratios])
    return means


def factor_effects(
    model: InterventionModel,
    variant: str,
    resolution: int,
    seed: int,
    images: int = 256,
    num_inference_steps: int = 50,
) -> dict:
    """What edits of observational quad images do to the true factors; see `hf_intervene.metrics.factors`.

    Args:
        model: the model, its concepts those of quad.
        variant: of quad.
        resolution: of the model's images.
        seed: of held-out images.
        images: how many are edited to each context.
        num_inference_steps: of a denoiser.

    Returns:
        `read_error`: that of what is read off real images, by factor; `lost`: how far each factor of images that are edited to nothing is from that of the real
        ones; `visible`: the factors that are less than half as far as by chance; `contexts`: what `intervention_effects` returns for each single concept and held-out pair.
    """
    latents = quad.sample_latents(OBS, images, variant, HELD_OUT_SEED + 2 * seed)
    real = quad.render(latents, resolution)
    options = {"num_inference_steps": num_inference_steps}
    abducted = model.abduct(model.preprocess(real), model.targets(OBS, len(real)), **options)
    returned = model.predict(*abducted, OBS, "np", **options)
    kinds = true_factors(latents).kinds.argmax(1)
    lost = dict(zip(quad.LATENTS, factor_changes(read_factors(real), read_factors(returned), kinds).tolist()))
    visible = [name for name in quad.LATENTS if lost[name] < CHANCE[name] / 2]
    contexts = {}
    for name in tqdm(quad.CONCEPTS + quad.HELD_OUT, "reading edits", disable=None, delay=2):
        counterfactual = quad.counterfactual_latents(latents, name, variant)
        edited = model.predict(*abducted, name, "np", **options)
        contexts[name] = intervention_effects(returned, edited, latents, counterfactual, name, visible)
    return {"read_error": read_error(resolution, seed=seed), "lost": lost, "visible": visible, "contexts": contexts}


def held_out_images(
    dataset: str,
    concepts: Sequence[str],
    images: int,
    seed: int,
    resolution: int,
    channels: int,
    variant: str,
    split: tuple[float, int] | None = None,
    mnist_digits: str = BUNDLED,
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Held-out real images of each context, and as many further ones for the floor.

    quad, ident3d: fresh draws, held-out pairs included. mnist: so too, of test digits, each at most once in a context. Own data: each context's
    images in two halves (at most `images` each), of those only that training held out, by the fraction and seed of its `split`; `None`:
    all, of data that training did not see.

    Warns of own data with few images of a context.

    Raises:
        ValueError: own data that lack a concept, or a context with fewer than two images.
    """
    if dataset in SIMULATED:
        simulated = SIMULATED[dataset](resolution, channels, variant, mnist_digits)
        if process_state().num_processes > 1:
            return held_out_on_demand(simulated, images, seed)
        return simulated.held_out_images(images, seed)
    # The model's concepts, as in training: the split depends on the order of the contexts, and it may know but some of the data's.
    data = ContextImages.from_dataset(load_contexts(dataset), concepts, resolution, channels)
    by_context = (data if split is None else data.split(*split)[1]).by_context()
    few = [name for name, a in by_context.items() if len(a) < 2]
    if few:
        raise ValueError(f"two held-out images of {', '.join(few)} are needed at least: hold out more (validation_fraction).")
    smallest = min(by_context, key=lambda name: len(by_context[name]))
    side = min(len(by_context[smallest]) // 2, images)
    if side < FEW_IMAGES and process_state().is_main_process:
        logger.warning(
            "%d held-out images of %s a side: the floor of so few hides most of what models differ in; use more (--images), or hold out more "
            "(validation_fraction).",
            side,
            smallest,
        )
    return tuple({name: a[k::2][:images] for name, a in by_context.items()} for k in (0, 1))


def content_options(
    dataset: str,
    concepts: Sequence[str],
    resolution: int,
    channels: int,
    variant: str,
    mnist_digits: str,
    split: tuple[float, int] | None,
    other_real: Mapping[str, np.ndarray],
    seed: int,
    detector_images: int = DETECTOR_IMAGES,
    twin_images: int | None = None,
) -> dict:
    """The arguments of `evaluate` for the content of images: a detector, trained here, twins, and the variant of quad.

    The detector learns on training images: with their true attributes where the data set knows them, otherwise "do k or obs" from the
    contexts. Of own data that training did not see (`split=None`) it learns on `other_real`, which the presence in real images does
    not use.

    Args:
        dataset, concepts, resolution, channels, variant, mnist_digits, split: see `held_out_images`.
        other_real: what that returned second.
        seed: of the detector.
        detector_images: of each context, at most; 0: no detector.
        twin_images: of each context; `None`: some where the data set has twins; 0: none.

    Raises:
        ValueError: one sentence: twins asked of data that have none.
    """
    simulated = SIMULATED[dataset](resolution, channels, variant, mnist_digits) if dataset in SIMULATED else None
    twins = None
    if twin_images != 0:
        twins = None if simulated is None else simulated.twins(twin_images or TWIN_IMAGES, seed)
        if twins is None and twin_images:
            raise ValueError(
                f"{dataset} has no twins, the same individuals in several contexts, so edits have no true answer: leave --twins out."
            )
    detector = None
    if detector_images:
        labelled = None if simulated is None else simulated.labelled(detector_images)
        if labelled is not None:
            detector = train_detector(*labelled, concepts, seed)
        else:
            if simulated is not None:
                images = simulated.training(detector_images, 1, TrainArguments.validation_fraction, 0)[0]
            elif split is None:
                images = other_real
            else:
                data = ContextImages.from_dataset(load_contexts(dataset), concepts, resolution, channels)
                images = data.split(*split)[0].by_context()
            detector = train_context_detector({name: x[:detector_images] for name, x in images.items()}, concepts, seed)
    return {"detector": detector, "twins": twins, "quad_variant": variant if dataset == "quad" else None}


def training_split(folder: str) -> tuple[float, int]:
    """The fraction and seed by which the training of a model held images out, as `training_arguments.yaml` beside it says."""
    saved = read_settings(folder)
    return tuple(saved.get(name, getattr(TrainArguments, name)) for name in ("validation_fraction", "data_seed"))


def load_model(folder: str) -> InterventionModel:
    """The model in a folder; see `hf_intervene.pipeline.load_model`."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}.")
    return pipeline.load_model(folder)


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on."""
    return {name: version(name) for name in ("torch", "transformers", "diffusers", "POT")}


def write(metrics: dict, folder: str | Path) -> None:
    """Write `metrics.json`, `metrics.md` and, of distances and their floors, `floors.png`, each whole or not at all."""
    for name, text in (("metrics.json", json.dumps(metrics, indent=1)), ("metrics.md", table(metrics))):
        write_whole(Path(folder, name), text)
    save(floor_chart(metrics), Path(folder, FLOORS_FILE))


def make_parser() -> argparse.ArgumentParser:
    examples = """examples:
  python training/evaluate.py --model outputs/quad/model --dataset quad --output outputs/quad/metrics
  hf-intervene evaluate --model outputs/mine/model --dataset my-images --output outputs/mine/metrics --edits
  hf-intervene evaluate --model outputs/quad/model --output outputs/quad/metrics --json | jq .means"""
    options = {"epilog": examples, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = RecipeParser(description=__doc__.splitlines()[0], **options)
    parser.add_argument("--model", required=True, help="folder of a trained model or pipeline")
    parser.add_argument("--output", required=True, help="folder for metrics.json, metrics.md and floors.png")
    parser.add_argument("--dataset", default="quad", help="quad, mnist, ident3d, an image folder, a saved data set or a Hub name")
    parser.add_argument("--variant", default="dependent", choices=quad.VARIANTS, help="quad and ident3d")
    parser.add_argument("--mnist-digits", default=BUNDLED, help="mnist: bundled, a folder, or a Hub name, as in training")
    parser.add_argument("--all", action="store_true", help="own data: use all images, where training did not see them")
    parser.add_argument("--images", type=int, default=1280, help="images a side, of each context (default 1280)")
    parser.add_argument("--projections", type=int, default=500)
    parser.add_argument("--num-inference-steps", type=int, default=50, help="of a denoiser (default 50)")
    parser.add_argument("--protocol", default="independent", choices=[*PROTOCOLS, "both"])
    parser.add_argument("--edits", action="store_true", help="measure edits of observational images too")
    parser.add_argument(
        "--detector-images",
        type=int,
        default=DETECTOR_IMAGES,
        help=f"training images of each context, at most, for the detector of concepts (default {DETECTOR_IMAGES}); 0: no presence",
    )
    parser.add_argument("--no-tests", action="store_true", help="train no networks to tell real from generated images")
    parser.add_argument("--twins", type=int, help="twins for the error of edits (default 256 where the data have twins); 0: none")
    parser.add_argument("--seed", type=int, default=0, help="of held-out images, detector, noise and directions")
    parser.add_argument("--json", action="store_true", help="print the metrics as JSON, for machines")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    process = process_state()
    bars_on_terminals_only()
    try:
        check_writable(arguments.output)
        model = load_model(arguments.model).to(process.device)
        channels, height, _ = model.base.image_shape
        split = None if arguments.all else training_split(arguments.model)
        data = (height, channels, arguments.variant)
        real, other_real = held_out_images(
            arguments.dataset, model.concepts, arguments.images, arguments.seed, *data, split, arguments.mnist_digits
        )
        content = content_options(
            arguments.dataset,
            model.concepts,
            *data,
            arguments.mnist_digits,
            split,
            other_real,
            arguments.seed,
            arguments.detector_images,
            arguments.twins,
        ) | {"tests": not arguments.no_tests}
        protocols = PROTOCOLS if arguments.protocol == "both" else (arguments.protocol,)
        options = content | {"edits": arguments.edits, "num_inference_steps": arguments.num_inference_steps}
        metrics = evaluate(model, real, other_real, protocols, arguments.projections, arguments.seed, **options)
        if not process.is_main_process:
            return 0
        if arguments.edits and arguments.dataset == "quad":
            options = {"images": min(256, arguments.images), "num_inference_steps": arguments.num_inference_steps}
            metrics["factor_effects"] = factor_effects(model, arguments.variant, height, arguments.seed, **options)
        metrics["settings"] = vars(arguments)
        metrics["versions"] = versions()
        # Before writing: what a full disk cannot take is at least on the screen.
        print(json.dumps(metrics) if arguments.json else table(metrics))
        write(metrics, arguments.output)
    except (OSError, ValueError, TypeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
