"""Training an intervention head, from top to bottom (METHOD section 3; arXiv:2507.04754).

Nothing depends on the state of a global random generator after initialisation: the batch of a step
and its noise are functions of the seed and the step. So the number of processes and of accumulation
steps does not change the result, and a resumed run goes on as if never stopped."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from tqdm.auto import tqdm

from ..data.identity import save_images
from ..logging import get_logger
from ..model import InterventionModel
from .checkpoints import atomic_folder, check_writable, keep_history
from .distributed import end_training, new_accelerator, warn_of_launcher
from .finishing import save_trained
from .prior import ORDERED, order_concepts
from .progress import log, log_progress, remember
from .resuming import as_resumed, trained_on
from .run_folder import PATIENCE, check_own, model_files, sole_run
from .schedules import beta_of, learning_rate_factor
from .settings import TrainArguments
from .state import TrainState, new_state, restore, save
from .stopping import Interrupted, stops_at_once
from .validation import (
    TERMS,
    loss_unit,
    quiet_writers,
    sample_grid,
    save_model,
    tracking,
    validation_loss,
)


logger = get_logger(__name__)


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


def train(arguments: TrainArguments, on_log: Callable[[dict], None] | None = None) -> TrainResult:
    """Train a model and save it under `output_dir/model`.

    Args:
        arguments: the settings.
        on_log: called with each logged row, for progress displays.

    Raises:
        OSError, ValueError, FloatingPointError: one sentence: bad settings or data, an unwritable
            folder or one that another run is writing in, a loss that is not finite.
    """
    out = Path(arguments.run.output_dir)
    check_own(arguments.run.output_dir)
    check_writable(out)
    arguments = as_resumed(arguments, out)
    run = arguments.run
    accelerator = new_accelerator(
        mixed_precision=run.precision,
        log_with=None if run.tracker == "none" else run.tracker,
        project_dir=str(out / "logs"),
    )
    if accelerator.is_main_process:
        warn_of_launcher(run.precision, arguments.optimization.gradient_accumulation_steps)
    patience = PATIENCE if run.resume == "auto" else 0
    with (
        stops_at_once(),
        sole_run(out, accelerator.is_main_process, patience) as lock,
        quiet_writers(),
    ):
        accelerator.wait_for_everyone()
        state = new_state(arguments, out, accelerator, on_log, lock)
        restore(state)
        begin(state)
        result = run_steps(state)
        del state  # what refers to the group of processes goes before the group
        with tracking(accelerator):
            end_training(accelerator)
        return result


def begin(state: TrainState) -> None:
    """What is written and said before the first step."""
    settings, accelerator = state.arguments, state.accelerator
    warmup = settings.optimization.warmup_steps
    if accelerator.is_main_process:
        if state.total < warmup:
            logger.warning(
                "the run has %d steps, fewer than its warm-up (warmup_steps %d): the learning rate"
                " stays below %.0f %% of its peak, and next to nothing is learnt; give max_steps,"
                " more epochs or fewer warmup_steps.",
                state.total,
                warmup,
                100 * state.total / warmup,
            )
        state.write_settings()
        keep_history(state.out / "history.jsonl", state.step)
    if settings.run.tracker != "none":
        with tracking(accelerator):
            config = {name: str(value) for name, value in settings.flat().items()}
            accelerator.init_trackers("run", config=config)
    if state.model.head is not None and state.model.head.is_flow:
        levels: Any = state.model.head.intervention.levels
        levels()  # asks the device, which no step should wait for


def run_steps(state: TrainState) -> TrainResult:
    """The steps of a run, and what is done between and after them."""
    order_at = steps_to_order_at(state)
    bar = tqdm(
        total=state.total,
        initial=state.step,
        disable=None if state.accelerator.is_main_process else True,
        desc="training",
    )
    with state.stop:
        try:
            with bar:
                do_owed(state)
                while state.step < state.total and state.waited < state.arguments.run.patience:
                    one_step(state, order_at, bar)
                    do_owed(state)
            return finish(state)
        except Interrupted:
            path = save(state, may_fail=False)
        finally:
            state.feed.close()
    state.accelerator.print(
        f"stopped at step {state.step}; go on with the same command and --resume auto ({path})."
    )
    unit = loss_unit(state.model)
    return TrainResult(None, state.step, state.best, unit, interrupted=True)


def one_step(state: TrainState, order_at: set[int], bar: tqdm) -> None:
    """A step, and what comes before it.

    Raises:
        Interrupted: the run is asked to stop.
    """
    if state.frozen is None or state.frozen and state.step >= state.frozen_steps:
        wrap(state)
    if state.step in order_at:
        check = partial(state.stop.check, state.accelerator, "codes")
        order_concepts(state.model, state.data, state.prepared, check)
    train_step(state)
    bar.update()
    every = (state.arguments.run.log_every, state.eval_every, state.checkpoint_every)
    if any(map(state.due, every)):
        log_progress(state, bar)
    due = {"validate": state.eval_every, "draw samples": state.sample_every}
    due |= {"checkpoint": state.checkpoint_every}
    state.owed = [name for name, every in due.items() if state.due(every)]
    state.stop.check(state.accelerator)


def do_owed(state: TrainState) -> None:
    """What is due after the step at hand, or was when the run was stopped after it.

    Raises:
        Interrupted: the run is asked to stop; what is not done is still owed.
    """
    acts: dict[str, Callable] = {
        "validate": validate,
        "draw samples": draw_samples,
        "checkpoint": save,
    }
    while state.owed:
        acts[state.owed[0]](state)
        del state.owed[0]


def steps_to_order_at(state: TrainState) -> set[int]:
    """The steps before which concepts are put in order, of a model whose concepts may cause each
    other. Not with FSDP, whose parts work in a forward pass of the whole only: there the finished
    model is ordered, by `fit_prior`.
    """
    head = state.model.head
    if head is None or not state.model.config.concept_edges or state.weights.sharded:
        return set()
    return {round(share * state.total) for share in ORDERED}


def wrap(state: TrainState) -> None:
    """The objective as steps call it; again when the base thaws, since DDP learns what is trained
    once only.
    """
    state.frozen = state.step < state.frozen_steps
    if state.arguments.base.regime in ("fine-tune", "frozen"):
        state.model.base.trainable(not state.frozen)
    state.runner = state.weights.prepared(state.objective, state.optimizer)


def train_step(state: TrainState) -> None:
    """One step of the optimiser, on the next batch."""
    a, model, accelerator = state.arguments, state.model, state.accelerator
    model.train()
    if state.frozen:
        model.base.model.eval()
    batch = state.feed.batch(state.step)
    rate = learning_rate_factor(a, state.step, state.total)
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    beta = torch.full((), beta_of(a, state.step, state.total), device=accelerator.device)
    weights = {
        name: torch.full_like(beta, weight)
        for name, weight in state.objective.weights(state.step / state.total).items()
        if weight
    }
    terms, means = [], []  # of the micro-batches, (b, 3) and (b, entries of the posterior's mean)
    parts = a.optimization.gradient_accumulation_steps
    for number, (rows, inputs) in enumerate(zip(batch.parts, batch.inputs), 1):
        with state.weights.accumulating(state.runner, number < parts):
            with accelerator.autocast():
                output = state.runner(
                    targets=batch.targets[rows],
                    weights=weights,
                    beta=beta,
                    residual_weight=a.objective.residual_weight,
                    **inputs,
                )
            # Outside: under autocast a backward pass would be in half precision where the forward
            # pass was not, too.
            accelerator.backward(output.loss / parts)
        terms.append(torch.stack([output[term] for term in TERMS], dim=1).detach().float())
        means.append(output.posterior_mean.flatten(1).detach().float())
    state.weights.step(state.optimizer, state.learnt, a.optimization.max_grad_norm)
    if state.ema is not None:
        state.ema.step(state.parameters)
    if model.head is not None and model.config.posterior == "centered":
        mean = torch.cat(means)
        mean = accelerator.gather(mean) if accelerator.num_processes > 1 else mean
        model.head.center_posterior(mean.unflatten(1, model.noise_shape), model.seen(batch.targets))
    remember(state, batch.indices, torch.cat(terms))
    state.step += 1


def validate(state: TrainState) -> None:
    """Measure the validation loss, and save the model in `best` where it is the lowest so far."""
    accelerator = state.accelerator
    with state.averaged():
        try:
            score = validation_loss(
                state.model,
                state.validation,
                state.prepared_validation,
                state.arguments.optimization.seed + 1,
                accelerator,
                state.feed.micro_batch,
                partial(state.stop.check, accelerator, "validation"),
            )
        finally:
            state.weights.release()
        saved = improved = score < state.best
        whole = state.weights.whole() if improved else None
        if whole is not None and accelerator.is_main_process:
            try:
                save_best(state, whole)
            except OSError as error:
                saved = False
                logger.warning("%s Training goes on.", error)
    state.waited = 0 if improved else state.waited + 1
    # what could not be saved is not the best there is
    failed = torch.tensor(float(not saved), device=accelerator.device)
    if improved and reduce(failed, "sum") == 0:
        state.best = score
    log(state, {"validation": score})


def save_best(state: TrainState, model: InterventionModel) -> None:
    best = state.out / "best"
    with atomic_folder(best, model_files(best)) as folder:
        save_model(model, folder, state.data)
        save_images(folder, trained_on(state.marks))


def draw_samples(state: TrainState) -> None:
    with state.averaged():
        whole: Any = state.weights.whole()  # in the main process
        rest = (state.data, state.arguments, state.out, state.step, state.accelerator)
        state.stop.by_main_process(
            state.accelerator, lambda check: sample_grid(whole, *rest, check)
        )


def finish(state: TrainState) -> TrainResult:
    """Fit the prior of the best model, and save it.

    Raises:
        Interrupted: the run is asked to stop; how far the fit has come is kept.
    """
    model_dir = state.out / "model"
    last: Any = state.weights.whole()  # in the main process
    state.stop.by_main_process(
        state.accelerator, lambda check: save_trained(state, last, model_dir, check)
    )
    return TrainResult(model_dir, state.step, state.best, loss_unit(state.model))


__all__ = ["TrainResult", "train"]
