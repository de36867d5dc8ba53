"""The state of a run: what its settings made, how far it has come, and how that is written to a
checkpoint and read from one."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from ..data import ContextImages, ContextSchedule
from ..logging import get_logger
from ..model import InterventionModel
from ..objective import Objective
from ..yaml_files import SETTINGS_FILE
from .building import build_model, build_objective, lay_out, load_data
from .checkpoints import (
    broken,
    checkpoints,
    flatten_optimizer,
    restore_optimizer,
    save_checkpoint,
    write_whole,
)
from .distributed import Weights
from .earlier import SETTINGS_VERSION
from .feeding import Feed, kept_at_hand
from .optimizer import build_optimizer
from .parsing import saved_settings
from .prepared import PreparedImages
from .resuming import beside, check_beside, check_same, image_marks, leave_line, resumed
from .run_folder import Lock
from .settings import TrainArguments
from .stopping import Stop
from .validation import TERMS, loss_unit


logger = get_logger(__name__)
FROZEN_SHARE = 0.2  # fine-tune: the base is frozen for this share of the steps
# of an image in a batch, in the mean: more is a slip of the keyboard, and takes minutes a step
MOST_REPEATS = 100
# What is done after some steps and was not, where a checkpoint was written in the middle of it.
OWED = ("validate", "draw samples")


@dataclass
class TrainState:
    """
    Args:
        arguments: the settings.
        out: the folder of the run.
        accelerator: its processes.
        on_log: called with each row of the history.
        lock: of the folder, in the main process.
        data, validation: the images.
        prepared, prepared_validation: what a denoiser's frozen parts made of them.
        model, objective: what is trained, and what is minimised.
        weights: of the model, maybe cut by FSDP.
        feed: the batches.
        parameters: of the model, those that are trained.
        learnt: the same and those of the terms, which are no part of the model.
        optimizer: of `learnt`.
        ema: averages of `parameters`.
        marks: fingerprints of the images.
        beside: what else comes from files; see `resuming.beside`.
        total: steps of the whole run.
        eval_every, sample_every, checkpoint_every: steps between them.
        frozen_steps: for so many the base is not trained.
        runner: the objective as a step calls it: maybe wrapped by DDP.
        frozen: whether it was wrapped while the base is not trained.
        step: how many are done.
        best: the lowest validation loss so far.
        waited: validations since then.
        sums: of the terms of the ELBO since the last row of the history, on the device.
        unlogged: steps since then.
        recent: of these steps the number, the images of the global batch and the losses of this
            process's share.
        bad_step: the first step whose loss was not finite, on the device; inf: none.
        owed: what is still to be done before the next step, in order: `OWED`, or a checkpoint.
        stop: whether the run is asked to stop.
    """

    arguments: TrainArguments
    out: Path
    accelerator: Accelerator
    on_log: Callable[[dict], None] | None
    lock: Lock | None
    data: ContextImages
    validation: ContextImages
    prepared: PreparedImages | None
    prepared_validation: PreparedImages | None
    model: InterventionModel
    objective: Objective
    weights: Weights
    feed: Feed
    parameters: list[torch.nn.Parameter]
    learnt: list[torch.nn.Parameter]
    optimizer: Any
    ema: EMAModel | None
    marks: dict[str, torch.Tensor]
    beside: dict[str, Any]
    total: int
    eval_every: int
    sample_every: int
    checkpoint_every: int
    frozen_steps: int
    runner: Any = None
    frozen: bool | None = None
    step: int = 0
    best: float = math.inf
    waited: int = 0
    sums: torch.Tensor = field(default_factory=lambda: torch.zeros(len(TERMS)))
    unlogged: int = 0
    recent: list[tuple[int, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    bad_step: torch.Tensor = field(default_factory=lambda: torch.tensor(math.inf))
    owed: list[str] = field(default_factory=list)
    stop: Stop = field(default_factory=Stop)

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.step == self.total

    def due(self, every: int) -> bool:
        """Whether something that is done after every so many steps, and after the last one, is to
        be done now.
        """
        return self.step % every == 0 or self.finished

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, if there are any."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def write_settings(self) -> None:
        write_whole(self.out / SETTINGS_FILE, saved_settings(self.arguments))

    def keep_folder(self) -> None:
        """Notice that somebody removed the folder: what is written from now on is in a new one."""
        if self.lock is not None and self.lock.lost():
            self.write_settings()


def new_state(
    arguments: TrainArguments,
    out: Path,
    accelerator: Accelerator,
    on_log: Callable[[dict], None] | None,
    lock: Lock | None,
) -> TrainState:
    """The state of a run before its first step; arguments as of `TrainState`.

    Raises:
        OSError, ValueError: one sentence: bad settings or data.
    """
    a, world = arguments, accelerator.num_processes
    batch_size = a.optimization.batch_size
    if batch_size % (world * a.optimization.gradient_accumulation_steps):
        raise ValueError(
            f"batch_size {batch_size} does not divide by {world} processes x"
            f" {a.optimization.gradient_accumulation_steps} accumulation steps."
        )
    data, validation = load_data(a, accelerator)
    if batch_size > MOST_REPEATS * len(data):
        raise ValueError(
            f"batch_size {batch_size} is more than {MOST_REPEATS} times the {len(data)} training"
            " images: lower it."
        )
    logger.info(
        "training on %d images of %s, on %s, %d processes",
        len(data),
        data.contexts,
        accelerator.device,
        world,
    )
    torch.manual_seed(a.optimization.seed)
    model = build_model(a, data)
    model.to(accelerator.device)
    weights = Weights(accelerator, model)
    if a.base.is_new and not weights.partitioned:
        lay_out(model.base.model, accelerator.device, a.run.precision)
    prepared = prepared_validation = None
    base: Any = model.base
    if a.base.regime not in ("frozen", "lora"):  # a base that is trained is no pipeline's
        base.train_for_samples()
    if base.companion_models():  # frozen: what they make of the images is computed once
        folder = out / "prepared"
        prepared = PreparedImages(folder / "train", base, data, accelerator)
        prepared_validation = PreparedImages(folder / "validation", base, validation, accelerator)
    else:
        data, validation = kept_at_hand(data, validation, accelerator.device)
    schedule = ContextSchedule(data.context_ids, a.data.schedule, batch_size, a.optimization.seed)
    objective = build_objective(a, model, data, weights.sharded)
    feed = Feed(objective, data, prepared, schedule, a, accelerator)
    # LoRA layers are as new as the head
    of_base = set() if a.base.regime == "lora" else set(model.base.model.parameters())
    held = of_base if a.base.regime == "frozen" else set()
    parameters = [p for p in model.parameters() if p.requires_grad and p not in held]
    learnt = [*parameters, *objective.terms.parameters()]
    of_adapter = set() if base.adapter is None else set(base.adapter.parameters())
    optimizer = build_optimizer(a, weights, learnt, of_base, of_adapter)
    optimizer = accelerator.prepare_optimizer(optimizer)
    total = a.optimization.total_steps(len(data))
    eval_every = a.run.eval_every or len(schedule)
    frozen_steps = {"fine-tune": round(FROZEN_SHARE * total), "frozen": total}
    device = accelerator.device
    return TrainState(
        a,
        out,
        accelerator,
        on_log,
        lock,
        data,
        validation,
        prepared,
        prepared_validation,
        model,
        objective,
        weights,
        feed,
        parameters,
        learnt,
        optimizer,
        _averages(a, weights, parameters, device),
        image_marks(a, data, validation),
        beside(model, data, validation),
        total,
        eval_every,
        sample_every=a.run.sample_every or eval_every,
        checkpoint_every=a.run.checkpoint_every or eval_every,
        frozen_steps=frozen_steps.get(a.base.regime, 0),
        sums=torch.zeros(len(TERMS), device=device),
        bad_step=torch.tensor(math.inf, device=device),
    )


def _averages(
    arguments: TrainArguments,
    weights: Weights,
    parameters: list[torch.nn.Parameter],
    device: torch.device,
) -> EMAModel | None:
    decay = arguments.optimization.ema_decay
    if decay is None:
        return None
    # sharded and whole ones cannot be averaged at once
    ema = EMAModel(parameters, decay=decay, use_ema_warmup=True, foreach=not weights.sharded)
    ema.to(device)
    return ema


def save(state: TrainState, may_fail: bool = True) -> Path | None:
    """Write a checkpoint; all processes together.

    Args:
        state: the run.
        may_fail: whether a failure to write it is a warning, and the run goes on.

    Returns:
        Its folder; `None` where there is none: it could not be written, or this is not the main
            process.
    """
    state.keep_folder()
    accelerator, weights = state.accelerator, state.weights
    # frozen models beside a denoiser are elsewhere already
    companions = _companion_state(state.model)
    tensors = {
        "model": {k: v for k, v in state.model.state_dict().items() if k not in companions},
        "optimizer": flatten_optimizer(weights.optimizer_state(state.optimizer), state.learnt),
        "terms": state.objective.terms.state_dict(),
    }
    if state.ema is not None:
        tensors["ema"] = {str(i): p for i, p in enumerate(state.ema.shadow_params)}
    tensors = {name: weights.full(values) for name, values in tensors.items()}
    if state.marks:
        tensors["images"] = state.marks
    if not accelerator.is_main_process:
        return None
    if not all(bool(torch.isfinite(value).all()) for value in tensors["model"].values()):
        logger.warning("weights of step %d are not finite and are not saved.", state.step)
        return None
    scaler = accelerator.scaler  # of fp16
    found = {
        "best": None if math.isinf(state.best) else state.best,
        "waited": state.waited,
        "loss_unit": loss_unit(state.model),
        "owed": [name for name in state.owed if name in OWED],
        **state.feed.state_dict(),
        "processes": accelerator.num_processes,
        "scaler": None if scaler is None else scaler.state_dict(),
        "settings": state.arguments.flat(),
        "settings_version": SETTINGS_VERSION,
        "precision": state.arguments.run.precision,
        "beside": state.beside,
    }
    try:
        folder, keep = state.out / "checkpoints", state.arguments.run.keep_checkpoints
        return save_checkpoint(folder, state.step, tensors, found, keep)
    except OSError as error:
        if not may_fail:
            raise
        logger.warning("%s Training goes on.", error)
        return None


def restore(state: TrainState) -> None:
    """Go on from the checkpoint that the settings ask for, if they do; all processes together.

    Raises:
        OSError, ValueError: one sentence: there is none, it cannot be read, or it is of other
            settings or images; or there is a run already that is not to go on.
    """
    a, accelerator = state.arguments, state.accelerator
    found = resumed(a, state.out)
    if found is not None:
        path, tensors, saved = found
        try:
            check_same(a, saved, tensors.get("images"), state.marks, path)
            check_beside(saved.get("beside", {}), state.beside, path)
            _take(state, tensors, saved)
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise broken(path) from error  # it is whole, but not of this model
        accelerator.print(f"resuming from {path}, step {state.step}")
        if a.run.resume != "auto" and accelerator.is_main_process:
            leave_line(state.out, path, state.step)
    elif accelerator.is_main_process and checkpoints(state.out / "checkpoints"):
        raise ValueError(
            f"{state.out} already holds a run: resume it with --resume auto, or choose another"
            " output_dir."
        )
    accelerator.wait_for_everyone()


def _take(state: TrainState, tensors: dict[str, dict[str, torch.Tensor]], saved: dict) -> None:
    """Bring a run to where a checkpoint was written."""
    weights, scaler = state.weights, state.accelerator.scaler
    state.step = saved["step"]
    # A best loss in another unit, of an earlier version, is none. Likelihoods kept theirs.
    if saved.get("loss_unit", "bits per pixel") == loss_unit(state.model):
        state.best, state.waited = float(saved["best"] or math.inf), int(saved["waited"])
    state.owed = [name for name in OWED if name in saved.get("owed", ())]
    state.owed += ["checkpoint"] * bool(state.owed)  # in which nothing is owed
    weights.load(tensors["model"] | _companion_state(state.model))
    state.objective.terms.load_state_dict(tensors.get("terms", {}))
    restore_optimizer(state.optimizer, state.learnt, tensors["optimizer"], weights.placed)
    state.feed.load_state_dict(saved)
    if scaler is not None and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
    if state.ema is not None:
        state.ema.shadow_params = [
            weights.placed(tensors["ema"][str(i)], p) for i, p in enumerate(state.parameters)
        ]
        state.ema.optimization_step = state.step


def _companion_state(model: InterventionModel) -> dict[str, torch.Tensor]:
    mine = tuple(f"base.{name}." for name in model.base.companion_models())
    return {
        name: value for name, value in model.state_dict().items() if mine and name.startswith(mine)
    }
