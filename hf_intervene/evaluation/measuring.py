"""What is measured of a model on held-out real images of every context (METHOD section 5;
arXiv:2507.04754).

First comes what people see: whether every concept that was asked for is there, by a detector;
whether a network tells real from generated images; what edits do, and by which route. Then come the
sliced 2-Wasserstein distance, with floor, ratio and interval, and the negative ELBO in bits per
pixel."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from ..card_metrics import loss_in
from ..contexts import OBS
from ..metrics import context_leakage, entropy_bits, mean_interval
from ..metrics.detector import Detector
from ..metrics.leakage import FOLDS, check_installed
from ..metrics.transport import (
    PROTOCOLS,
    compare_projected,
    directions,
    project,
    sliced_w2,
    times_floor,
)
from ..model import InterventionModel
from ..trainer.distributed import process_state
from ..trainer.validation import loss_units
from .content import (
    add_composition_ratios,
    concept_verdicts,
    measure_content,
    measure_counterfactuals,
    measure_presence,
    wanted,
)


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
    compose: str = "head",
    detector: Detector | None = None,
    tests: bool = False,
    twins: Mapping[str, np.ndarray] | None = None,
    quad_variant: str | None = None,
    guidance_scale: float | None = None,
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
        compose: of `InterventionModel.sample`, of the samples.
        detector: of the concepts, for their presence; `None`: no presence.
        tests: whether to ask a network to tell real from generated images (about 15 seconds a
            context).
        twins: the same individuals in every context, for the error of edits (of a denoiser with
            `edits` only).
        quad_variant: of images of quad, the variant, for the measures of its factors.
        guidance_scale: of `InterventionModel.sample`, of samples under interventions.

    Returns:
        `detector`: its kind and error, and `verdicts`: by concept, in words; both with a detector
        only. `contexts`, for each context:
            `kind`: `"concept"` or `"composition"`; `images`: how many. `bits_per_pixel` with its
            interval: the negative ELBO of images of bytes, a code length. Of a light VAE with the
            paper's Bernoulli likelihood, which is not normalised, also its
            `bernoulli_bits_per_pixel`, and how far they are above the entropy of the images,
            `bits_above_entropy`. Of a denoiser, which has no likelihood, `denoising_loss`: squared
            error and KL per entry of what it denoises. For each protocol a `TransportResult`.
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
    steps: dict[str, Any] = {"num_inference_steps": num_inference_steps}
    contexts: dict[str, dict] = {}
    residuals: dict[str, np.ndarray] = {}
    abducted: tuple[Any, Any] = (None, None)  # of the observational images
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
        samples: Any = model.sample(
            name,
            noise=noise,
            generator=generator,
            batch_size=batch_size,
            compose=compose,
            guidance_scale=None if name == OBS else guidance_scale,
            **steps,
        )
        generated = samples.permute(0, 2, 3, 1).float().cpu().numpy()  # (n, H, W, C)
        axes = directions(generated[0].size, num_projections, seed)
        others = other_real[name]
        projected = project(images, axes), project(others, axes), project(generated, axes)
        draws = [
            model.posterior_draws(len(x), generator) for x in _batches(images, batch_size, model)
        ]
        nats = _negative_elbo(model, images, name, draws, batch_size, code_length=True)
        loss, interval = mean_interval(loss_units(model, nats), seed=seed)
        contexts[name] = {
            "kind": "composition" if len(wanted(name, model.concepts)) > 1 else "concept",
            "images": len(images),
            _loss_name(model): loss,
            f"{_loss_name(model)}_interval": interval,
        }
        if model.base.unnormalised is not None:
            found = _negative_elbo(model, images, name, draws, batch_size, code_length=False)
            bits = float(loss_units(model, found).mean())
            contexts[name] |= {
                "bernoulli_bits_per_pixel": bits,
                "bits_above_entropy": bits - entropy_bits(images),
            }
        contexts[name] |= {
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
            images_edited: Any = model.predict(*abducted, name, "np", batch_size, **steps)
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
            own: Any = model.abduct(x, model.targets(name, len(x)), generator, batch_size, **steps)[
                1
            ]
            residuals[name] = own.cpu().numpy()
        if model.base.passes == 1 or edits:
            x = model.preprocess(others[: len(images)])
            coded = model.abduct(x, model.targets(name, len(x)), generator, batch_size, **steps)
            decoded: Any = model.predict(*coded, name, "np", batch_size, **steps)
            distance = sliced_w2(projected[0], project(decoded, axes))
            contexts[name]["reconstruction"] = {"distance": distance}
    contexts, residuals = (_of_all_processes(own, real) for own in (contexts, residuals))
    metrics: dict[str, Any] = {}
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
    if model.base.loss_name == "bits_per_pixel":
        metrics["code_length"] = True  # older files have a density, or a Bernoulli that is none
    if edits:
        returned: Any = model.predict(*abducted, OBS, "np", batch_size, **steps)
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
    found: dict[str, Any] = {"nothing": sliced_w2(projected, project(real[OBS], axes))}
    singles = {
        one: sliced_w2(projected, project(real[one], axes))
        for one in wanted(name, concepts)
        if one in real and one != name
    }
    if singles:
        nearest = min(singles, key=singles.__getitem__)
        found |= {"single_context": nearest, "single": singles[nearest]}
    return found


def _of_all_processes(own: dict, order: Iterable[str]) -> dict:
    """What the processes found of their contexts, in this order."""
    found = {name: value for part in gather_object([own]) for name, value in part.items()}
    return {name: found[name] for name in order if name in found}


def _loss_name(model: InterventionModel) -> str:
    return model.base.loss_name


def _batches(
    images: np.ndarray, batch_size: int | None, model: InterventionModel
) -> tuple[torch.Tensor, ...]:
    pixel_values = torch.from_numpy(images).permute(0, 3, 1, 2)
    return pixel_values.split(batch_size or model.images_at_once)


def _negative_elbo(
    model: InterventionModel,
    images: np.ndarray,
    context: str,
    draws: Sequence[Mapping[str, torch.Tensor]],
    batch_size: int | None,
    code_length: bool,
) -> np.ndarray:
    """Of each image, in nats, (n,), by these draws of each batch."""
    nats = []
    for batch, noise in zip(_batches(images, batch_size, model), draws):
        drawn = {key: value.to(model.device) for key, value in noise.items()}
        x, targets = batch.to(model.device).float() / 255, model.targets(context, len(batch))
        output = model(x, targets, code_length=code_length, **drawn)
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
OF_BERNOULLI = ("bernoulli_bits_per_pixel", "bits_above_entropy")
_SIDES = ("generated", "real", "nothing", "single")  # of presence


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _means(contexts: Mapping[str, dict], protocols: Sequence[str]) -> dict:
    means: dict[str, dict[str, Any]] = {}
    for kind in ("concept", "composition"):
        rows = [row for row in contexts.values() if row["kind"] == kind]
        if not rows:
            continue
        loss = loss_in(rows[0])
        losses = (loss, *(name for name in OF_BERNOULLI if name in rows[0]))
        means[kind] = {"contexts": len(rows)} | {
            name: float(np.mean([row[name] for row in rows])) for name in losses
        }
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
