"""What the main process does after the last step: the prior of the best model is fitted, and the
model is saved."""

from collections.abc import Callable
from pathlib import Path

from ..data.identity import save_images
from ..model import InterventionModel
from ..yaml_files import SETTINGS_FILE
from .checkpoints import atomic_folder, remove_whole
from .parsing import shared_settings
from .prior import fit_prior
from .resuming import trained_on
from .run_folder import model_files
from .state import TrainState
from .validation import draw_curves, sample_grid, save_model


def save_trained(
    state: TrainState, last: InterventionModel, model_dir: Path, check: Callable[[], None]
) -> None:
    """
    Args:
        state: the run.
        last: the model as it is now, with whole weights.
        model_dir: where the best one is saved.
        check: called after each piece of the fit.
    """
    accelerator, out, a = state.accelerator, state.out, state.arguments
    draw_curves(out)
    best, kept = out / "best", out / "checkpoints" / "prior"
    trained = InterventionModel.from_pretrained(best) if best.exists() else last
    steps = a.optimization.prior_steps
    steps = round(2 / 3 * state.total) if steps is None else steps
    fitted = bool(steps) and trained.head is not None and trained.head.is_flow
    if fitted:
        trained.to(accelerator.device)
        fit_prior(trained, state.data, state.prepared, steps, a.optimization.seed, check, kept)
        sample_grid(trained, state.data, a, out, state.step, accelerator, check)
    with atomic_folder(model_dir, model_files(model_dir)) as folder:
        if fitted:
            # batch norm's statistics are of samples of the prior
            save_model(trained, folder, state.data)
        else:
            trained.save_pretrained(folder)
        (folder / SETTINGS_FILE).write_text(shared_settings(a))
        save_images(folder, trained_on(state.marks))
    remove_whole(kept)
