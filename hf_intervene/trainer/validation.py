"""What a run does at every validation: its loss, a grid of samples, the model as it is saved."""

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import reduce
from diffusers.utils import make_image_grid, numpy_to_pil
from PIL import Image, ImageDraw, ImageFont

from ..data import ContextImages
from ..files import replacing
from ..logging import get_logger
from ..metrics.reconstruction import Array
from ..model import InterventionModel
from ..plots import read_history, save, training_curves
from .prepared import PreparedImages
from .settings import TrainArguments
from .simulated import SIMULATED


logger = get_logger(__name__)
MOST_PAIRS = 6  # that were never seen, in a grid of samples
TERMS = ("reconstruction_loss", "kl", "residual_kl")  # together the negative ELBO


def step_generator(seed: int, step: int) -> torch.Generator:
    """Of the draws of a step, on the CPU: the same in every process."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def step_noise(
    model: InterventionModel, seed: int, step: int, batch_size: int
) -> dict[str, torch.Tensor]:
    """Posterior noise of the whole global batch of a step, as arguments of the model's `forward`."""  # noqa: E501
    return model.posterior_draws(batch_size, step_generator(seed, step))


def to_unit(images: torch.Tensor) -> torch.Tensor:
    """Images of bytes as float32 in [0, 1]."""
    return images.float().div_(255)


def model_inputs(
    data: ContextImages, prepared: PreparedImages | None, rows: torch.Tensor, device: torch.device
) -> dict:
    """Images (b, C, H, W) in [0, 1], or what was prepared of them, as arguments of the model's
    `forward`.
    """
    if prepared is None:
        return {"pixel_values": to_unit(data.images(rows).to(device))}
    return {
        "pixel_values": None,
        "prepared": {name: value.to(device) for name, value in prepared[rows].items()},
    }


def loss_units(model: InterventionModel, loss: Array) -> Array:
    """A sum of terms of the loss of an image in bits per pixel; of a denoiser, which has no
    likelihood, per entry of what it denoises.
    """
    return model.base.per_unit(loss)


def loss_unit(model: InterventionModel) -> str:
    """What `loss_units` counts in, in words."""
    return model.base.loss_unit


def validation_loss(
    model: InterventionModel,
    data: ContextImages,
    prepared: PreparedImages | None,
    seed: int,
    accelerator: Accelerator,
    batch_size: int = 256,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Loss (see `loss_units`) of validation images, with noise fixed by the seed; all processes
    together, each so many images at once, and after each batch they call `check`.
    """
    rank, world, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    model.eval()
    targets = data.targets(model.config.free_blocks).to(device)  # (contexts, D)
    sums = torch.zeros(2, device=device, dtype=torch.float64)
    for number, rows in enumerate(torch.arange(len(data)).split(256)):
        noise = step_noise(model, seed, number, len(rows))
        # The rows from `rank` on, `world` apart. Where they end, some from the beginning: processes
        # call the model together.
        places = torch.arange(rank, rank + world * -(-len(rows) // world), world)
        for part in places.split(batch_size):
            picks, own = part % len(rows), int((part < len(rows)).sum())
            inputs = model_inputs(data, prepared, rows[picks], device)
            inputs |= {name: value[picks].to(device) for name, value in noise.items()}
            with torch.no_grad(), accelerator.autocast():
                output = model(targets=targets[data.context_ids[rows[picks]].to(device)], **inputs)
            sums[0] += sum(output[term] for term in TERMS)[:own].double().sum()
            sums[1] += own
            check()
    sums = reduce(sums, "sum")
    return loss_units(model, sums[0] / sums[1]).item()


def save_model(model: InterventionModel, folder: Path, data: ContextImages) -> None:
    """Save the model for sampling: batch-norm statistics, if there are any, are gathered anew on a
    copy.
    """
    if any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        model = copy.deepcopy(model).eval()
        model.reestimate_batch_norm(data.contexts)
    model.save_pretrained(folder)


def bad_images(
    data: ContextImages,
    rows: torch.Tensor,
    losses: torch.Tensor,
    out: Path,
    accelerator: Accelerator,
) -> str:
    """Words for the images of a batch whose losses (batch,) are not finite; the first ones are
    drawn, to be looked at.
    """
    bad = rows[~torch.isfinite(losses).cpu()]
    shown, picture = bad[:8], out / "not_finite.png"
    names = [f"{row} ({data.contexts[data.context_ids[row]]!r})" for row in shown.tolist()]
    names += [f"{len(bad) - len(shown)} more"] * (len(bad) > len(shown))
    if accelerator.is_main_process:
        images = _stills(data.images(shown).cpu().movedim(1, -1).numpy())
        images = numpy_to_pil(np.stack(images) / 255)
        grid = make_image_grid([image.convert("RGB") for image in images], 1, len(images))
        with suppress(OSError), replacing(picture) as partial:
            grid.save(partial, "PNG")
    return (
        f"for {len(bad)} of its {len(rows)} images (training images {', '.join(names)}; see"
        f" {picture})"
    )


def draw_curves(out: Path) -> None:
    """The picture of the run's history.jsonl."""
    try:
        save(training_curves(read_history(out / "history.jsonl")), out / "curves.png")
    except (OSError, ValueError) as error:
        logger.warning("cannot draw %s: %s", out / "curves.png", error)


def sample_grid(
    model: InterventionModel,
    data: ContextImages,
    a: TrainArguments,
    out: Path,
    step: int,
    accelerator: Accelerator,
    check: Callable[[], None] = lambda: None,
) -> None:
    """A row of samples for each context, its name before it, and for pairs that were never seen;
    always of the same noise. `check` is called after each row.
    """
    model.eval()
    pairs = ["+".join(pair) for pair in combinations(model.concepts, 2)]
    unseen = [pair for pair in pairs if pair not in data.contexts][:MOST_PAIRS]
    held_out = SIMULATED[a.data.dataset].held_out if a.data.dataset in SIMULATED else unseen
    contexts = [*data.contexts, *(held_out if len(data.contexts) > 1 else ())]
    noise = torch.randn(8, *model.noise_shape, generator=step_generator(a.optimization.seed, 0)).to(
        accelerator.device
    )

    def samples(context: str) -> Any:
        generator = torch.Generator().manual_seed(a.optimization.seed)
        found = model.sample(
            context, noise=noise, generator=generator, output_type="pil", num_inference_steps=20
        )
        check()
        return found

    try:
        with accelerator.autocast():
            images = [image for name in contexts for image in _stills(samples(name))]
    except ValueError as error:
        logger.warning("no samples of step %d are drawn: %s", step, error)
        return
    grid = _with_names(
        make_image_grid([image.convert("RGB") for image in images], len(contexts), 8), contexts
    )
    path = out / "samples" / f"step-{step:08d}.png"
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as partial:
            grid.save(partial, "PNG")
    except OSError as error:
        logger.warning("cannot write %s: %s. Training goes on.", path, error.strerror)
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            with tracking(accelerator):
                tracker.log_images(
                    {"samples": np.asarray(grid)[None]}, step=step, dataformats="NHWC"
                )


def _stills(images: Any) -> list[Any]:
    """Images as they are; of clips, whose frames come first, the middle frames."""
    clips = isinstance(images[0], list) or getattr(images[0], "ndim", 3) == 4
    return [image[len(image) // 2] if clips else image for image in images]


def _with_names(grid: Image.Image, names: Sequence[str]) -> Image.Image:
    """A grid of as many rows with their names to the left."""
    height = grid.height / len(names)
    font = ImageFont.load_default(min(14, height))
    margin = 8 + max(round(font.getlength(name)) for name in names)
    whole = Image.new("RGB", (margin + grid.width, grid.height), "white")
    whole.paste(grid, (margin, 0))
    draw = ImageDraw.Draw(whole)
    for row, name in enumerate(names):
        draw.text((4, (row + 0.5) * height), name, fill="black", anchor="lm", font=font)
    return whole


@contextmanager
def tracking(accelerator: Accelerator) -> Iterator[None]:
    """Inside, a tracker that fails is given up with a warning: a run is not lost for its logs."""
    try:
        yield
    except (
        Exception
    ) as error:  # each tracker has errors of its own: no login, no connection, a full disk
        accelerator.trackers = []
        reason = (
            getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
        )
        logger.warning("the tracker cannot write (%s) and is left out. Training goes on.", reason)


@contextmanager
def quiet_writers() -> Iterator[None]:
    """Inside, what a tracker's own thread cannot write is said in a sentence and not in a
    traceback.
    """
    previous = threading.excepthook

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if isinstance(arguments.exc_value, OSError):
            logger.warning(
                "a tracker cannot write (%s).", arguments.exc_value.strerror or arguments.exc_value
            )
        else:
            previous(arguments)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = previous
