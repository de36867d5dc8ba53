"""Train an intervention head (METHOD section 3; arXiv:2507.04754).

    accelerate launch training/train.py --config training/configs/quad.yaml --output_dir outputs/quad

The settings are the fields of `TrainArguments`: a YAML file gives some, the command line overrides
them. Nothing depends on the state
of a global random generator after initialisation: the batch of a step and its noise are functions
of the seed and the step. So the number of processes and of accumulation steps does not change the
result, and a resumed run goes on as if never stopped."""  # noqa: E501

import json
import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import reduce
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..cards import SETTINGS_FILE
from ..data import ContextSchedule
from ..data.identity import save_images
from ..logging import get_logger
from ..model import InterventionModel, InterventionModelOutput
from .building import build_model, build_objective, load_data
from .checkpoints import (
    atomic_folder,
    broken,
    check_writable,
    checkpoints,
    flatten_optimizer,
    keep_history,
    restore_optimizer,
    save_checkpoint,
    write_whole,
)
from .distributed import Weights, end_training, new_accelerator
from .feeding import Feed, kept_at_hand
from .optimizer import build_optimizer
from .performance import use_channels_last
from .prepared import PreparedImages
from .prior import ORDERED, fit_prior, order_concepts
from .resuming import (
    as_resumed,
    check_same,
    image_marks,
    leave_line,
    resumed,
    trained_on,
)
from .run_folder import PATIENCE, Lock, check_own, model_files, sole_run
from .settings import (
    SETTINGS_VERSION,
    TrainArguments,
    shared_settings,
)
from .stopping import Stop, stops_at_once
from .validation import (
    TERMS,
    bad_images,
    draw_curves,
    loss_unit,
    loss_units,
    quiet_writers,
    sample_grid,
    save_model,
    tracking,
    validation_loss,
)


logger = get_logger(__name__)
FROZEN_SHARE = 0.2  # fine-tune: the base is frozen for this share of the steps
# of an image in a batch, in the mean: more is a slip of the keyboard, and takes minutes a step
MOST_REPEATS = 100
SILENT = 1.0  # nats: less than this in z is worth a warning


@dataclass
class TrainResult:
    """
    Args:
        model_dir: folder of the trained model, or `None` when the run was interrupted.
        step: optimiser steps done.
        validation: lowest validation loss: ELBO in bits per pixel, or of a denoiser see
            `loss_units`.
        unit: what that is counted in.
        interrupted: whether the run was stopped before its end.
    """

    model_dir: Path | None
    step: int
    validation: float
    unit: str
    interrupted: bool = False


def learning_rate_factor(arguments: TrainArguments, step: int, total: int) -> float:
    """Share of the peak: a cosine down to `final_learning_rate`, times a linear warm-up."""
    warmup = min(1.0, (step + 1) / max(1, arguments.warmup_steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / total))
    floor = arguments.final_learning_rate
    return warmup * (floor + (1 - floor) * cosine)


def train(arguments: TrainArguments, on_log: Callable[[dict], None] | None = None) -> TrainResult:
    """Train a model and save it under `output_dir/model`.

    Args:
        arguments: the settings.
        on_log: called with each logged row, for progress displays.

    Raises:
        OSError, ValueError, FloatingPointError: one sentence: bad settings or data, an unwritable
            folder or one that another run is writing in, a loss that is not finite.
    """
    check_own(arguments.output_dir)
    out = Path(arguments.output_dir)
    check_writable(out)
    arguments = as_resumed(arguments, out)
    accelerator = new_accelerator(
        mixed_precision=arguments.precision,
        log_with=None if arguments.tracker == "none" else arguments.tracker,
        project_dir=str(out / "logs"),
    )
    patience = PATIENCE if arguments.resume == "auto" else 0
    with (
        stops_at_once(),
        sole_run(out, accelerator.is_main_process, patience) as lock,
        quiet_writers(),
    ):
        accelerator.wait_for_everyone()
        result = _train(arguments, out, accelerator, on_log, lock)
        with tracking(accelerator):
            end_training(accelerator)
        return result


def _train(
    arguments: TrainArguments,
    out: Path,
    accelerator: Accelerator,
    on_log: Callable[[dict], None] | None,
    lock: Lock | None,
) -> TrainResult:
    a = arguments
    world = accelerator.num_processes
    if a.batch_size % (world * a.gradient_accumulation_steps):
        raise ValueError(
            f"batch_size {a.batch_size} does not divide by {world} processes x"
            f" {a.gradient_accumulation_steps} accumulation steps."
        )

    data, validation = load_data(a, accelerator)
    if a.batch_size > MOST_REPEATS * len(data):
        raise ValueError(
            f"batch_size {a.batch_size} is more than {MOST_REPEATS} times the {len(data)} training"
            " images: lower it."
        )
    logger.info(
        "training on %d images of %s, on %s, %d processes",
        len(data),
        data.contexts,
        accelerator.device,
        world,
    )
    torch.manual_seed(a.seed)
    model = build_model(a, data)
    model.to(accelerator.device)
    if a.channels_last:
        use_channels_last(model.base)
    weights = Weights(accelerator, model)
    prepared = prepared_validation = None
    if model.base.companion_models():  # frozen: what they make of the images is computed once
        prepared = PreparedImages(out / "prepared" / "train", model.base, data, accelerator)
        prepared_validation = PreparedImages(
            out / "prepared" / "validation", model.base, validation, accelerator
        )
    else:
        data, validation = kept_at_hand(data, validation, accelerator.device)
    schedule = ContextSchedule(data.context_ids, a.schedule, a.batch_size, a.seed)
    objective = build_objective(a, model, data, weights.sharded)
    feed = Feed(objective, data, prepared, schedule, a, accelerator)
    per_epoch = len(schedule)
    total = a.total_steps(len(data))
    if total < a.warmup_steps and accelerator.is_main_process:
        logger.warning(
            "the run has %d steps, fewer than its warm-up (warmup_steps %d): the learning rate"
            " stays below %.0f %% of its peak, and next to nothing is learnt; give max_steps, more"
            " epochs or fewer warmup_steps.",
            total,
            a.warmup_steps,
            100 * total / a.warmup_steps,
        )
    eval_every = a.eval_every or per_epoch
    sample_every, checkpoint_every = a.sample_every or eval_every, a.checkpoint_every or eval_every
    frozen_steps = {
        "end-to-end": 0,
        "fine-tune": round(FROZEN_SHARE * total),
        "frozen": total,
        "lora": 0,
    }[a.regime]

    of_base = (
        set() if a.regime == "lora" else set(model.base.model.parameters())
    )  # LoRA layers are as new as the head
    parameters = [
        p
        for p in model.parameters()
        if p.requires_grad and not (a.regime == "frozen" and p in of_base)
    ]
    learnt = [
        *parameters,
        *objective.terms.parameters(),
    ]  # those of the terms are no part of the model
    optimizer = accelerator.prepare_optimizer(build_optimizer(a, weights, learnt, of_base))
    options = {
        "use_ema_warmup": True,
        "foreach": not weights.sharded,
    }  # sharded and whole ones cannot be averaged at once
    ema = None if a.ema_decay is None else EMAModel(parameters, decay=a.ema_decay, **options)
    if ema is not None:
        ema.to(accelerator.device)

    step, best, waited = 0, math.inf, 0
    settings = json.loads(json.dumps(asdict(a)))
    restored, marks = resumed(a, out), image_marks(a, data, validation)
    if restored is not None:
        path, tensors, state = restored
        try:
            check_same(a, settings, state, tensors.get("images"), marks, path)
            step, best, waited = (
                state["step"],
                float(state["best"] or math.inf),
                int(state["waited"]),
            )
            weights.load(tensors["model"] | _companion_state(model))
            objective.terms.load_state_dict(tensors.get("terms", {}))
            restore_optimizer(optimizer, learnt, tensors["optimizer"], weights.placed)
            feed.load_state_dict(state)
            if accelerator.scaler is not None and state.get("scaler"):
                accelerator.scaler.load_state_dict(state["scaler"])
            if ema is not None:
                ema.shadow_params = [
                    weights.placed(tensors["ema"][str(i)], p) for i, p in enumerate(parameters)
                ]
                ema.optimization_step = step
        except (
            LookupError,
            TypeError,
            AttributeError,
            RuntimeError,
        ) as error:  # it is whole, but not of this model
            raise broken(path) from error
        accelerator.print(f"resuming from {path}, step {step}")
        if a.resume != "auto" and accelerator.is_main_process:
            leave_line(out, path, step)
    elif accelerator.is_main_process and checkpoints(out / "checkpoints"):
        raise ValueError(
            f"{out} already holds a run: resume it with --resume auto, or choose another"
            " output_dir."
        )
    accelerator.wait_for_everyone()

    def write_settings() -> None:
        write_whole(
            out / SETTINGS_FILE,
            yaml.safe_dump({"settings_version": SETTINGS_VERSION} | settings, sort_keys=False),
        )

    if accelerator.is_main_process:
        write_settings()
        keep_history(out / "history.jsonl", step)
    if a.tracker != "none":
        with tracking(accelerator):
            accelerator.init_trackers("run", config={k: str(v) for k, v in settings.items()})

    def wrapped(frozen: bool):
        """The objective as the step calls it; again when the base thaws, since DDP learns what is
        trained once only.
        """
        if a.regime in ("fine-tune", "frozen"):
            model.base.trainable(not frozen)
        module = torch.compile(objective, mode=a.compile_mode) if a.compile else objective
        return weights.prepared(module, optimizer)

    def keep_folder() -> None:
        """Notice that somebody removed the folder: what is written from now on is in a new one."""
        if lock is not None and lock.lost():
            write_settings()

    def save(kind: str) -> Path | None:
        """A checkpoint; a failure to write one leaves the run going."""
        keep_folder()
        state = {
            "best": None if math.isinf(best) else best,
            "waited": waited,
            **feed.state_dict(),
            "processes": world,
            "scaler": (
                accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            ),  # of fp16
        }
        tensors = {
            "model": model.state_dict(),
            "optimizer": flatten_optimizer(weights.optimizer_state(optimizer), learnt),
        }
        tensors["terms"] = objective.terms.state_dict()
        for name in _companion_state(
            model
        ):  # frozen models beside a denoiser: they are elsewhere already
            del tensors["model"][name]
        if ema is not None:
            tensors["ema"] = {str(i): p for i, p in enumerate(ema.shadow_params)}
        tensors = {name: weights.full(values) for name, values in tensors.items()}
        if marks:
            tensors["images"] = marks
        if not accelerator.is_main_process:
            return None
        if not all(bool(torch.isfinite(value).all()) for value in tensors["model"].values()):
            logger.warning("weights of step %d are not finite and are not saved.", step)
            return None
        try:
            state |= {
                "settings": settings,
                "settings_version": SETTINGS_VERSION,
                "precision": a.precision,
            }
            return save_checkpoint(out / "checkpoints", step, tensors, state, a.keep_checkpoints)
        except OSError as error:
            if kind == "last":
                raise
            logger.warning("%s Training goes on.", error)
            return None

    def log(row: dict) -> None:
        if accelerator.is_main_process:
            keep_folder()
            try:
                with open(out / "history.jsonl", "a") as file:
                    file.write(json.dumps({"step": step, **row}) + "\n")
            except OSError as error:
                logger.warning("cannot write %s: %s.", out / "history.jsonl", error.strerror)
            if on_log is not None:
                on_log({"step": step, "total": total, **row})
        if a.tracker != "none":
            with tracking(accelerator):
                accelerator.log(row, step=step)

    if model.head is not None and model.head.is_flow:
        model.head.intervention.levels()  # asks the device, which no step should wait for
    # Not with FSDP, whose parts work in a forward pass of the whole only: there the finished model
    # is ordered, by `fit_prior`.
    ordered = model.head is not None and model.config.concept_edges and not weights.sharded
    order_at = {round(share * total) for share in ORDERED if ordered}
    frozen = step < frozen_steps
    runner = wrapped(frozen)
    centred = model.head is not None and model.config.posterior == "centered"
    sums, unlogged = torch.zeros(len(TERMS), device=accelerator.device), 0
    bad_step = torch.tensor(
        math.inf, device=accelerator.device
    )  # first step whose loss was not finite
    # steps since that was looked at: number, rows of the global batch, losses of this process's
    # share
    recent = []
    bar = tqdm(
        total=total,
        initial=step,
        disable=None if accelerator.is_main_process else True,
        desc="training",
    )
    with Stop() as stop:
        while step < total and waited < a.patience:
            if frozen and step >= frozen_steps:
                frozen = False
                runner = wrapped(frozen)
            if step in order_at:
                order_concepts(model, data, prepared)
            model.train()
            if frozen:
                model.base.model.eval()
            batch = feed.batch(step)
            # As a number it would be compiled in.
            beta = torch.full(
                (), a.beta * ramp(step, a.beta_warmup * total), device=accelerator.device
            )
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * learning_rate_factor(a, step, total)
            weights_of = {
                name: torch.full_like(beta, w)
                for name, w in objective.weights(step / total).items()
                if w
            }
            seen = []
            for rows, inputs in zip(batch.parts, batch.inputs):
                last = len(seen) + 1 == a.gradient_accumulation_steps
                with weights.accumulating(runner, not last):
                    with accelerator.autocast():
                        output = runner(
                            targets=batch.targets[rows],
                            weights=weights_of,
                            beta=beta,
                            residual_weight=a.residual_weight,
                            **inputs,
                        )
                    # Outside: under autocast a backward pass would be in half precision where the
                    # forward pass was not, too.
                    loss = output.loss
                    accelerator.backward(loss / a.gradient_accumulation_steps)
                seen.append(packed(output))
            weights.step(optimizer, learnt, a.max_grad_norm)
            if ema is not None:
                ema.step(parameters)

            own = torch.cat(seen)
            elbo = own[:, : len(TERMS)].sum(1)
            bad_step = torch.where(torch.isfinite(elbo).all(), bad_step, bad_step.clamp(max=step))
            sums += own[:, : len(TERMS)].sum(0)  # on the device: fetched when logged
            if centred or a.schedule == "adaptive":
                terms, mean = unpacked(accelerator.gather(own) if world > 1 else own)
                if centred:
                    model.head.center_posterior(
                        mean.unflatten(1, model.noise_shape), model.seen(batch.targets)
                    )
                feed.learn(terms.sum(1))
            recent.append((step, batch.indices, elbo))
            unlogged += 1
            step += 1
            bar.update()

            finished = step == total
            if (
                step % a.log_every == 0
                or step % eval_every == 0
                or step % checkpoint_every == 0
                or finished
            ):
                first_bad = accelerator.gather(bad_step[None]).min().item()
                if math.isfinite(first_bad):
                    newest = checkpoints(out / "checkpoints")
                    rows, losses = next(
                        (i, e) for number, i, e in recent if number == int(first_bad)
                    )
                    raise FloatingPointError(
                        f"the loss of step {int(first_bad)} is not finite"
                        f" {bad_images(data, rows, accelerator.gather(losses), out, accelerator)}:"
                        f" unless the images are wrong, {_way_on(newest[-1] if newest else None)}."
                    )
                recent.clear()
                means = reduce(sums, "sum") / (unlogged * a.batch_size)
                reconstruction, kl, residual_kl = loss_units(model, means).tolist()
                row = {"reconstruction": reconstruction, "kl": kl}
                if model.base.residual_shape is not None and not model.base.denoises:
                    row["residual_kl"] = residual_kl
                sums.zero_()
                unlogged = 0
                bar.set_postfix(loss=f"{sum(row.values()):.4f}", kl=f"{row['kl']:.4f}")
                log(row | {"learning_rate": optimizer.param_groups[0]["lr"]})
                silent = model.head is not None and means[1].item() < SILENT
                if finished and silent and accelerator.is_main_process:
                    logger.warning(
                        "z carries %.2f nats of an image, next to nothing, and what interventions"
                        " do rests on it: train for longer, or lower beta.",
                        means[1].item(),
                    )
            stopping = stop.agreed(accelerator)
            if stopping and not finished and step % eval_every == 0:
                save(
                    "last"
                )  # what is validated now may take longer than whoever ends the run is willing to wait  # noqa: E501
            if step % eval_every == 0 or finished:
                with _averaged(ema, parameters):
                    score = validation_loss(
                        model,
                        validation,
                        prepared_validation,
                        a.seed + 1,
                        accelerator,
                        feed.micro_batch,
                    )
                    weights.release()
                    saved = improved = score < best
                    whole = weights.whole() if improved else None
                    if whole is not None and accelerator.is_main_process:
                        try:
                            with atomic_folder(out / "best", model_files(out / "best")) as folder:
                                save_model(whole, folder, data)
                                save_images(folder, trained_on(marks))
                        except OSError as error:
                            saved = False
                            logger.warning("%s Training goes on.", error)
                waited = 0 if improved else waited + 1
                if improved and _agreed(
                    saved, accelerator
                ):  # what could not be saved is not the best there is
                    best = score
                log({"validation": score})
            if step % sample_every == 0 or finished:
                with _averaged(ema, parameters):
                    whole = weights.whole()
                    if accelerator.is_main_process:
                        sample_grid(whole, data, a, out, step, accelerator)
            if step % checkpoint_every == 0 or finished:
                save("periodic")
            if stopping and not finished:
                path = save("last")
                bar.close()
                feed.close()
                accelerator.print(
                    f"stopped at step {step}; go on with the same command and --resume auto"
                    f" ({path})."
                )
                return TrainResult(None, step, best, loss_unit(model), interrupted=True)
    bar.close()
    feed.close()
    model_dir, last = out / "model", weights.whole()
    if accelerator.is_main_process:
        draw_curves(out)
        trained = (
            InterventionModel.from_pretrained(out / "best") if (out / "best").exists() else last
        )
        prior_steps = round(4 / 3 * total) if a.prior_steps is None else a.prior_steps
        if fitted := prior_steps and trained.head is not None and trained.head.is_flow:
            fit_prior(trained.to(accelerator.device), data, prepared, prior_steps, a.seed)
            sample_grid(trained, data, a, out, step, accelerator)
        with atomic_folder(model_dir, model_files(model_dir)) as folder:
            if fitted:
                save_model(
                    trained, folder, data
                )  # batch norm's statistics are of samples of the prior
            else:
                trained.save_pretrained(folder)
            (folder / SETTINGS_FILE).write_text(shared_settings(a))
            save_images(folder, trained_on(marks))
    accelerator.wait_for_everyone()
    return TrainResult(model_dir, step, best, loss_unit(model))


def _way_on(newest: Path | None) -> str:
    """What to do about a loss that is not finite."""
    change = "a lower learning_rate or max_grad_norm, or mixed_precision=no"
    if newest is None:
        return (
            f"begin anew, in another output_dir, with {change}; no checkpoint had been written yet"
        )
    return f"the last good state is {newest}: go on from it with --resume {newest} and {change}"


def packed(output: InterventionModelOutput) -> torch.Tensor:
    """What the step needs of a batch after its backward pass, float32 (b, terms + entries of the
    posterior's mean): processes exchange it in one go."""
    terms = torch.stack([output[term] for term in TERMS], dim=1)  # (b, 3)
    return torch.cat([terms, output.posterior_mean.flatten(1)], dim=1).detach().float()


def unpacked(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms of the loss, (B, 3), and means of the posterior, (B, entries), of what `packed`
    returned.
    """
    return values[:, : len(TERMS)], values[:, len(TERMS) :]


def ramp(step: int, steps: float) -> float:
    """From 0 to 1 over so many steps."""
    return min(1.0, step / steps) if steps > 0 else 1.0


def _companion_state(model: InterventionModel) -> dict[str, torch.Tensor]:
    mine = tuple(f"base.{name}." for name in model.base.companion_models())
    return {
        name: value for name, value in model.state_dict().items() if mine and name.startswith(mine)
    }


@contextmanager
def _averaged(ema: EMAModel | None, parameters: list[torch.nn.Parameter]):
    """Inside, the model has the averaged weights."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


def _agreed(value: bool, accelerator: Accelerator) -> bool:
    """Whether it is so in all processes."""
    return bool(reduce(torch.tensor(float(not value), device=accelerator.device), "sum") == 0)


__all__ = ["TrainResult", "train"]
