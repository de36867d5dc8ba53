"""Evaluate a trained model on held-out real images of every context (METHOD section 5;
arXiv:2507.04754).

    python training/evaluate.py --model outputs/quad/model --dataset quad --output outputs/quad/metrics

First comes what people see: whether every concept that was asked for is there, by a detector;
whether a network tells real from generated images; what edits do, and by which route. Then come the
sliced 2-Wasserstein distance, with floor, ratio and interval, and the negative ELBO in bits per
pixel. Writes `metrics.json` and `metrics.md`. Started as several processes (`accelerate launch`,
`torchrun`), these share out the contexts; the result is the same."""  # noqa: E501

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
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
from hf_intervene.data.identity import load_images
from hf_intervene.errors import spoken
from hf_intervene.logging import bars_on_terminals_only, get_logger
from hf_intervene.metrics import context_leakage, mean_interval
from hf_intervene.metrics.detector import Detector
from hf_intervene.metrics.leakage import FOLDS, check_installed
from hf_intervene.metrics.transport import (
    PROTOCOLS,
    compare_projected,
    directions,
    project,
    sliced_w2,
    times_floor,
)
from hf_intervene.model import InterventionModel
from hf_intervene.options import READING, add_reading_options, seed, whole_number
from hf_intervene.plots import floor_chart, save
from hf_intervene.training.arguments import (
    RecipeParser,
    TrainArguments,
    check_reading,
    earlier_defaults,
)
from hf_intervene.training.checkpoints import check_writable, write_whole
from hf_intervene.training.distributed import process_state
from hf_intervene.training.evaluate_content import (
    add_composition_ratios,
    concept_verdicts,
    factor_effects,
    measure_content,
    measure_counterfactuals,
    measure_presence,
    wanted,
)
from hf_intervene.training.evaluate_setup import DETECTOR_IMAGES, content_options
from hf_intervene.training.evaluate_tables import table
from hf_intervene.training.simulated import SIMULATED, held_out_on_demand
from hf_intervene.training.stopping import stops_at_once
from hf_intervene.training.validation import loss_units


logger = get_logger("hf_intervene.training")

# a side of a context: the floor of quad, 32x32, is 0.1 there; a base without a head has 0.15 over
# many
FEW_IMAGES = 100


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
    """Measure a model on held-out images. Several processes call this together, with the same
    arguments, and get the same result.

    Args:
        model: the model.
        real: held-out uint8 images (n, H, W, C) of each context, by canonical name; several
            concepts in a name make it a composition.
        other_real: as many further ones, for the floor.
        protocols: see `hf_intervene.metrics.transport`.
        num_projections: random directions of the distance.
        seed: of noise, directions and resampling.
        batch_size: images at once; `None`: the model's `images_at_once`.
        edits: whether to measure edits too: the real observational images, edited to each other
            context.
        num_inference_steps: of a denoiser.
        detector: of the concepts, for their presence; `None`: no presence.
        tests: whether to ask a network to tell real from generated images (about 15 seconds a
            context).
        twins: the same individuals in every context, for the error of edits (of a denoiser with
            `edits` only).
        quad_variant: of images of quad, the variant, for the measures of its factors.

    Returns:
        `detector`: its kind and error, and `verdicts`: by concept, in words; both with a detector
        only. `contexts`, for each context:
            `kind`: `"concept"` or `"composition"`; `images`: how many. `bits_per_pixel` with its
            interval; of a denoiser, which has no likelihood, `denoising_loss`: squared error and KL
            per entry of what it denoises. For each protocol a `TransportResult`.
            `alternatives`: the distances of observational images (`nothing`) and, of a composition,
            of the nearest single context (`single`).
            `presence`, `correlations`, `two_sample`, `kernel_distance`, `factors`, `routes`: see
            `measure_content`. `counterfactual`, with twins: see `measure_counterfactuals`.
            `reconstruction`: the `distance` of reconstructions of the further images from the real
            ones, by draws of their posteriors (of a denoiser with `edits` only).
            `edit`, with `edits`: their `distance`, beside that of images left as they are
            (`unedited`), and, with a detector, the share in which all wanted concepts are found
            (`presence`).
        `means`: the same averaged over each kind.
        `reconstruction_psnr`: with `edits`, of observational images that are edited to nothing, in
            dB.
        `leakage`: how well the context can be told from the residual noise, for a model that has it
        (of a denoiser with `edits` only: it takes longer than all the rest).
    """
    model.eval()
    leaks = bool(model.base.noise_shapes) and (edits or model.base.passes == 1)
    if leaks:
        check_installed()  # now, not after all the rest
    steps = {"num_inference_steps": num_inference_steps}
    contexts: dict[str, dict] = {}
    residuals, abducted = {}, None  # the last: of the observational images
    if edits:
        x = model.preprocess(real[OBS])
        abducted = model.abduct(x, model.targets(OBS, len(x)), None, batch_size, **steps)
    process = process_state()
    for name in tqdm(
        list(real)[process.process_index :: process.num_processes], desc="evaluating", disable=None
    ):
        images = real[name]
        # Of each context its own, so that it does not matter which contexts are measured before.
        generator = torch.Generator().manual_seed(seed * 1_000_003 + list(real).index(name))
        noise = torch.randn(len(images), *model.noise_shape, generator=generator)
        generated = model.sample(
            name, noise=noise, generator=generator, batch_size=batch_size, **steps
        )
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
        } | {
            protocol: compare_projected(*projected, protocol, seed=seed).to_dict()
            for protocol in protocols
        }
        if OBS in real and name != OBS:
            contexts[name]["alternatives"] = _alternatives(
                name, projected[0], real, model.concepts, axes
            )
        contexts[name] |= measure_content(
            model,
            name,
            real,
            others,
            generated,
            noise,
            generator,
            detector,
            tests,
            quad_variant,
            seed,
        )
        if edits and name != OBS:
            images_edited = model.predict(*abducted, name, "np", batch_size, **steps)
            edit = {
                "distance": sliced_w2(projected[0], project(images_edited, axes)),
                "unedited": contexts[name]["alternatives"]["nothing"],
            }
            if detector is not None:
                edit["presence"] = measure_presence(
                    detector, name, images_edited, real, model.concepts
                )["generated"]["all_wanted"]
            contexts[name]["edit"] = edit
        if leaks and contexts[name]["kind"] == "concept":
            x = model.preprocess(images)
            residuals[name] = (
                model.abduct(x, model.targets(name, len(x)), generator, batch_size, **steps)[1]
                .cpu()
                .numpy()
            )
        if model.base.passes == 1 or edits:
            others = model.preprocess(others[: len(images)])
            noise, residual = model.abduct(
                others, model.targets(name, len(others)), generator, batch_size, **steps
            )
            returned = project(
                model.predict(noise, residual, name, "np", batch_size, **steps), axes
            )
            contexts[name]["reconstruction"] = {"distance": sliced_w2(projected[0], returned)}
    contexts, residuals = (_of_all_processes(own, real) for own in (contexts, residuals))
    metrics = {}
    if twins is not None and (edits or model.base.passes == 1):
        for name, error in measure_counterfactuals(model, twins, seed, num_inference_steps).items():
            if name in contexts:
                contexts[name]["counterfactual"] = error
    if detector is not None:
        add_composition_ratios(contexts, model.concepts, seed)
        metrics = {
            "detector": detector.to_dict(),
            "verdicts": concept_verdicts(contexts, model.concepts, detector),
        }
    metrics |= {"contexts": contexts, "means": _means(contexts, protocols)}
    if edits:
        returned = model.predict(*abducted, OBS, "np", batch_size, **steps)
        metrics["reconstruction_psnr"] = float(
            -10 * np.log10(np.square(returned - real[OBS] / 255).mean())
        )
    if residuals and min(map(len, residuals.values())) >= FOLDS:
        labels = np.repeat(list(residuals), [len(rho) for rho in residuals.values()])
        metrics["leakage"] = context_leakage(
            np.concatenate(list(residuals.values())), labels, seed
        ).to_dict()
    return metrics


def _alternatives(
    name: str,
    projected: np.ndarray,
    real: Mapping[str, np.ndarray],
    concepts: Sequence[str],
    axes: np.ndarray,
) -> dict:
    """Distances of what one could pass off as a context: observational images, or the nearest
    single context.
    """
    found = {"nothing": sliced_w2(projected, project(real[OBS], axes))}
    singles = {
        one: sliced_w2(projected, project(real[one], axes))
        for one in wanted(name, concepts)
        if one in real and one != name
    }
    if singles:
        found["single_context"] = min(singles, key=singles.__getitem__)
        found["single"] = singles[found["single_context"]]
    return found


def _of_all_processes(own: dict, order: Iterable[str]) -> dict:
    """What the processes found of their contexts, in this order."""
    found = {name: value for part in gather_object([own]) for name, value in part.items()}
    return {name: found[name] for name in order if name in found}


def _loss_name(model: InterventionModel) -> str:
    return model.base.loss_name


def _negative_elbo(
    model, images: np.ndarray, context: str, generator: torch.Generator, batch_size: int | None
) -> np.ndarray:
    pixel_values = torch.from_numpy(images).permute(0, 3, 1, 2)
    nats = []
    for batch in pixel_values.split(batch_size or model.images_at_once):
        noise = {
            key: value.to(model.device)
            for key, value in model.posterior_draws(len(batch), generator).items()
        }
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
            # Contexts are drawn independently: the variance of their mean is the sum of theirs over
            # the square of their number.
            margins = [(row[protocol]["interval"][1] - row[protocol]["distance"]) for row in rows]
            margin = float(np.sqrt(np.sum(np.square(margins))) / len(rows))
            means[kind][protocol] = mean | {"interval": (distance - margin, distance + margin)}
            few = any(row[protocol]["ratio"] is None for row in rows)
            means[kind][protocol]["ratio"] = None if few else times_floor(distance, floor)
        for what, keys in _MEANS.items():
            if found := [row[what] for row in rows if row.get(what)]:
                means[kind][what] = {key: _mean([row.get(key) for row in found]) for key in keys}
        if found := [row["presence"] for row in rows if row.get("presence")]:
            shares = {
                side: [(row.get(side) or {}).get("all_wanted") for row in found] for side in _SIDES
            }
            means[kind]["presence"] = {
                side: _mean([x and x["value"] for x in of]) for side, of in shares.items()
            }
            ratios = [row.get("composition") for row in found]
            means[kind]["presence"]["composition"] = _mean([x and x["ratio"] for x in ratios])
    return means


def held_out_images(
    dataset: str,
    concepts: Sequence[str],
    images: int,
    seed: int,
    resolution: int,
    channels: int,
    variant: str,
    split: tuple[float, int, str] | None = None,
    mnist_digits: str = BUNDLED,
    trained: Mapping[str, torch.Tensor] | None = None,
    reading: Mapping[str, str] | None = None,
) -> tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """Held-out real images of each context, and as many further ones for the floor.

    quad, ident3d: fresh draws, held-out pairs included. mnist: so too, of test digits, each at most
    once in a context. avatars: two halves of the held-out persons, the same persons in every
    context of a half, in the same order. Own data: each context's images in two halves (at most
    `images` each), of those only that training held out, by the fraction, seed and way of its
    `split`; `None`: all, of data that training did not see. Images whose fingerprints are among
    those of `trained` are left out in any case.

    Warns of own data with few images of a context, and of images that are left out: those trained
    on, and those of concepts that the model does not have. `reading`: how own data are read,
    arguments of `load_contexts`.

    Raises:
        ValueError: own data that lack a concept, or a context with fewer than two images.
    """
    if dataset in SIMULATED:
        simulated = SIMULATED[dataset](resolution, channels, variant, mnist_digits)
        if process_state().num_processes > 1:
            return held_out_on_demand(simulated, images, seed)
        return simulated.held_out_images(images, seed)
    # The model's concepts, as in training: the split depends on the order of the contexts, and it
    # may know but some of the data's.
    data = ContextImages.from_dataset(
        load_contexts(dataset, **reading or {}), concepts, resolution, channels
    )
    data = _unseen(data if split is None else data.split(*split)[1], trained or {})
    by_context = data.by_context()
    few = [name for name, a in by_context.items() if len(a) < 2]
    if few:
        raise ValueError(
            f"two held-out images of {', '.join(few)} are needed at least: hold out more"
            " (validation_fraction)."
        )
    smallest = min(by_context, key=lambda name: len(by_context[name]))
    side = min(len(by_context[smallest]) // 2, images)
    if side < FEW_IMAGES and process_state().is_main_process:
        logger.warning(
            "%d held-out images of %s a side: the floor of so few hides most of what models differ"
            " in; use more (--images), or hold out more (validation_fraction).",
            side,
            smallest,
        )
    return tuple(
        {name: a[k::2][: min(images, len(a) // 2)] for name, a in by_context.items()}
        for k in (0, 1)
    )


def _unseen(data: ContextImages, trained: Mapping[str, torch.Tensor]) -> ContextImages:
    """The images that a model was not trained on, by their fingerprints."""
    if not trained:
        return data
    unseen = ~torch.isin(data.fingerprints(), torch.cat(list(trained.values())))
    if bool(unseen.all()):
        return data
    names = [
        name
        for number, name in enumerate(data.contexts)
        if bool((~unseen & (data.context_ids == number)).any())
    ]
    logger.warning(
        "%d images of %s were trained on and are left out: the data or their split are not those of"
        " training time.",
        int((~unseen).sum()),
        ", ".join(names),
    )
    return data.subset(torch.nonzero(unseen)[:, 0])


def training_split(folder: str) -> tuple[float, int, str]:
    """The fraction, the seed and the way by which the training of a model held images out, as
    `training_arguments.yaml` beside it says.
    """
    saved = _trained_with(folder)
    return tuple(saved[name] for name in ("validation_fraction", "data_seed", "split_by"))


def _trained_with(folder: str) -> dict:
    """The settings of the run that a model is of, as far as they are beside it; otherwise the
    defaults.
    """
    saved = read_settings(folder)
    if saved:
        saved = earlier_defaults(saved.get("settings_version", 0), folder) | saved
    return asdict(TrainArguments()) | saved


def reading_of(arguments: argparse.Namespace) -> tuple[dict[str, str], bool]:
    """How own data are to be read: as options say, and otherwise as in training; and whether they
    are another split than the training's."""
    trained = {name: _trained_with(arguments.model)[name] for name in READING}
    given = {
        name: getattr(arguments, name) for name in READING if getattr(arguments, name) is not None
    }
    if arguments.dataset in SIMULATED:
        check_reading(arguments.dataset, given)
        return {}, False
    reading = trained | given
    return reading, reading["split"] != trained["split"]


def load_model(folder: str) -> InterventionModel:
    """The model in a folder; see `hf_intervene.pipeline.load_model`."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"there is no model folder {folder}.")
    return pipeline.load_model(folder)


def versions() -> dict[str, str]:
    """Of the libraries that figures depend on."""
    return {name: version(name) for name in ("torch", "transformers", "diffusers", "POT")}


def write(metrics: dict, folder: str | Path) -> None:
    """Write `metrics.json`, `metrics.md` and, of distances and their floors, `floors.png`, each
    whole or not at all.
    """
    for name, text in (
        ("metrics.json", json.dumps(metrics, indent=1)),
        ("metrics.md", table(metrics)),
    ):
        write_whole(Path(folder, name), text)
    save(floor_chart(metrics), Path(folder, FLOORS_FILE))


def make_parser() -> argparse.ArgumentParser:
    examples = """examples:
  python training/evaluate.py --model outputs/quad/model --dataset quad --output outputs/quad/metrics
  hf-intervene evaluate --model outputs/mine/model --dataset my-images --output outputs/mine/metrics --edits
  hf-intervene evaluate --model outputs/quad/model --output outputs/quad/metrics --json | jq .means"""  # noqa: E501
    options = {"epilog": examples, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = RecipeParser(description=__doc__.splitlines()[0], **options)
    parser.add_argument("--model", required=True, help="folder of a trained model or pipeline")
    parser.add_argument(
        "--output", required=True, help="folder for metrics.json, metrics.md and floors.png"
    )
    parser.add_argument(
        "--dataset",
        default="quad",
        help="quad, mnist, ident3d, avatars, an image folder, a saved data set or a Hub name",
    )
    add_reading_options(parser, "as in training")
    parser.add_argument(
        "--variant", default="dependent", choices=quad.VARIANTS, help="quad and ident3d"
    )
    parser.add_argument(
        "--mnist-digits",
        default=BUNDLED,
        help="mnist: bundled, a folder, or a Hub name, as in training",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="own data: use all images, where training did not see them; so with another split",
    )
    parser.add_argument(
        "--images",
        type=whole_number(1),
        default=1280,
        help="images a side, of each context (default 1280)",
    )
    parser.add_argument("--projections", type=whole_number(1), default=500)
    parser.add_argument(
        "--num-inference-steps",
        type=whole_number(1, 10**6),
        default=50,
        help="of a denoiser (default 50)",
    )
    parser.add_argument("--protocol", default="independent", choices=[*PROTOCOLS, "both"])
    parser.add_argument(
        "--edits", action="store_true", help="measure edits of observational images too"
    )
    parser.add_argument(
        "--detector-images",
        type=whole_number(0),
        default=DETECTOR_IMAGES,
        help=(
            "training images of each context, at most, for the detector of concepts "
            f"(default {DETECTOR_IMAGES}); 0: no presence"
        ),
    )
    parser.add_argument(
        "--no-tests",
        action="store_true",
        help="train no networks to tell real from generated images",
    )
    parser.add_argument(
        "--twins",
        type=whole_number(0),
        help="twins for the error of edits (default 256 where the data have twins); 0: none",
    )
    parser.add_argument(
        "--seed", type=seed, default=0, help="of held-out images, detector, noise and directions"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the metrics as JSON, for machines"
    )
    return parser


@spoken
@stops_at_once()
def main(argv: Sequence[str] | None = None) -> int:
    arguments = make_parser().parse_args(sys.argv[1:] if argv is None else argv)
    process = process_state()
    bars_on_terminals_only()
    check_writable(arguments.output)
    model = load_model(arguments.model).to(process.device)
    channels, height, _ = model.base.image_shape
    reading, other_split = reading_of(arguments)
    split = None if arguments.all or other_split else training_split(arguments.model)
    data = (height, channels, arguments.variant)
    real, other_real = held_out_images(
        arguments.dataset,
        model.concepts,
        arguments.images,
        arguments.seed,
        *data,
        split,
        arguments.mnist_digits,
        load_images(Path(arguments.model)),
        reading,
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
        reading,
    ) | {"tests": not arguments.no_tests}
    protocols = PROTOCOLS if arguments.protocol == "both" else (arguments.protocol,)
    options = content | {
        "edits": arguments.edits,
        "num_inference_steps": arguments.num_inference_steps,
    }
    metrics = evaluate(
        model, real, other_real, protocols, arguments.projections, arguments.seed, **options
    )
    if not process.is_main_process:
        return 0
    if arguments.edits and arguments.dataset == "quad":
        options = {
            "images": min(256, arguments.images),
            "num_inference_steps": arguments.num_inference_steps,
        }
        metrics["factor_effects"] = factor_effects(
            model, arguments.variant, height, arguments.seed, **options
        )
    metrics["settings"] = vars(arguments)
    metrics["versions"] = versions()
    # Before writing: what a full disk cannot take is at least on the screen.
    print(json.dumps(metrics) if arguments.json else table(metrics))
    write(metrics, arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
