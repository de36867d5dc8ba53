"""What a run says of its progress: rows of the history, and whether its losses are finite."""

import json
import math

import torch
from accelerate.utils import reduce
from tqdm.auto import tqdm

from ..logging import get_logger
from .checkpoints import checkpoints
from .state import TrainState
from .validation import bad_images, loss_units, tracking


logger = get_logger(__name__)
SILENT = 1.0  # nats: less than this in z is worth a warning


def remember(state: TrainState, indices: torch.Tensor, terms: torch.Tensor) -> None:
    """Keep, on the device, what is logged of a step.

    Args:
        state: the run.
        indices: the images of the global batch, (B,).
        terms: of the ELBO, of this process's share, (b, 3).
    """
    elbo = terms.sum(1)
    state.bad_step = torch.where(
        torch.isfinite(elbo).all(), state.bad_step, state.bad_step.clamp(max=state.step)
    )
    state.sums += terms.sum(0)
    state.recent.append((state.step, indices, elbo))
    state.unlogged += 1


def log_progress(state: TrainState, bar: tqdm) -> None:
    """A row of the history: means of the terms since the last one.

    Raises:
        FloatingPointError: one sentence: a loss was not finite.
    """
    check_finite(state)
    images = state.unlogged * state.arguments.optimization.batch_size
    means = reduce(state.sums, "sum") / images
    reconstruction, kl, residual_kl = loss_units(state.model, means).tolist()
    row = {"reconstruction": reconstruction, "kl": kl}
    if "residual_kl" in state.model.base.loss_terms:
        row["residual_kl"] = residual_kl
    state.recent.clear()
    state.sums.zero_()
    state.unlogged = 0
    bar.set_postfix(loss=f"{sum(row.values()):.4f}", kl=f"{row['kl']:.4f}")
    log(state, row | {"learning_rate": state.optimizer.param_groups[0]["lr"]})
    silent = state.model.head is not None and means[1].item() < SILENT
    if state.finished and silent and state.accelerator.is_main_process:
        logger.warning(
            "z carries %.2f nats of an image, next to nothing, and what interventions do rests on"
            " it: train for longer, or lower beta.",
            means[1].item(),
        )


def check_finite(state: TrainState) -> None:
    """
    Raises:
        FloatingPointError: one sentence: the loss of a step was not finite, of which images, and
            what to do.
    """
    accelerator, out = state.accelerator, state.out
    first = accelerator.gather(state.bad_step[None]).min().item()
    if math.isinf(first):
        return
    rows, losses = next((i, e) for number, i, e in state.recent if number == int(first))
    whose = bad_images(state.data, rows, accelerator.gather(losses), out, accelerator)
    change = "a lower learning_rate or max_grad_norm, or mixed_precision=no"
    written = checkpoints(out / "checkpoints")
    way_on = (
        f"the last good state is {written[-1]}: go on from it with --resume {written[-1]} and"
        f" {change}"
        if written
        else f"begin anew, in another output_dir, with {change}; no checkpoint had been written yet"
    )
    raise FloatingPointError(
        f"the loss of step {int(first)} is not finite {whose}: unless the images are wrong,"
        f" {way_on}."
    )


def log(state: TrainState, row: dict) -> None:
    """Add a row to the history, and tell trackers and `on_log` of it."""
    accelerator, path = state.accelerator, state.out / "history.jsonl"
    if accelerator.is_main_process:
        state.keep_folder()
        try:
            with open(path, "a") as file:
                file.write(json.dumps({"step": state.step, **row}) + "\n")
        except OSError as error:
            logger.warning("cannot write %s: %s.", path, error.strerror)
        if state.on_log is not None:
            state.on_log({"step": state.step, "total": state.total, **row})
    if state.arguments.run.tracker != "none":
        with tracking(accelerator):
            accelerator.log(row, step=state.step)
