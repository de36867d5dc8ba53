"""Settings that earlier versions saved, in `training_arguments.yaml` and in checkpoints."""

from collections.abc import Mapping
from typing import Any

from .settings import FORMER, flat


# Of saved settings, which may leave out what is a default. It is raised when a default changes, or
# a setting goes. Files before the first one that was written down count as 0.
SETTINGS_VERSION = 7
# EARLIER[v]: defaults of version v, and what settings stood for that it did not have, where that is
# not today's default.
EARLIER: tuple[dict[str, object], ...] = (
    {"moment_matching": 100.0, "initial_posterior_std": 1.0, "posterior": "centered"},
    {"prior_matching": 0.0},
    {"split_by": "position"},
    {
        "mechanism": "mlp",
        "likelihood": "bernoulli",
        "free_blocks": 1,
        "concept_width": 8,
        "posterior": None,  # whitened, or centered where there were many concepts
        "beta": 4.0,
        "beta_warmup": 0.0,
        "moment_matching": 10.0,
        "prior_matching": 1.0,
        "sample_matching": 0.0,
        "context_prediction": 0.0,
        "moment_warmup": 0.5,
        "edit_consistency": 0.0,
    },
    {"free_invariance": 0.0, "prior_steps": 0, "optimizer": "adamw"},
    {},
    {},
)
# Weights of terms that only versions before 4 trained with. The context prediction of then was
# another term.
TERMS_OF_THEN = ("moment_matching", "prior_matching", "sample_matching", "context_prediction")


def earlier_defaults(version: object, source: str) -> dict[str, object]:
    """Today's defaults as they differ from those of an earlier version of the settings.

    Raises:
        ValueError: one sentence: no version, or a later one than is known here.
    """
    if not isinstance(version, int) or version < 0:
        raise ValueError(f"{source}: settings_version must be a whole number, not {version!r}.")
    if version > SETTINGS_VERSION:
        raise ValueError(
            f"{source} was written by a later version of hf-intervene (settings_version {version},"
            f" known here are those up to {SETTINGS_VERSION}): upgrade with `pip install --upgrade"
            " hf-intervene`."
        )
    return {name: value for older in reversed(EARLIER[version:]) for name, value in older.items()}


def of_today(saved: Mapping[str, Any], version: int, source: str) -> dict[str, Any]:
    """Settings as a run saved them, by their names alone, with the defaults of their version and
    without those that there are no more.

    Raises:
        ValueError: one sentence: no version, a later one, a setting that there never was, or a run
            that was trained with what there is no more.
    """
    settings = earlier_defaults(version, source) | dict(saved)
    if version == SETTINGS_VERSION:
        return flat(settings, source)
    if settings.get("mechanism", "flow") == "flow":
        raise ValueError(
            f"{source} is of a run with flows of affine couplings, which this version of"
            " hf-intervene no longer has: start anew in another output_dir with settings of today."
        )
    gone = []
    if version < 4:
        gone = [f"{name} {settings[name]}" for name in TERMS_OF_THEN if settings[name]]
        if settings["posterior"] in (None, "whitened"):
            gone.append("a whitened posterior")
    if settings.get("schedule") == "adaptive":
        gone.append("the schedule adaptive")
    if gone:
        raise ValueError(
            f"{source} is of a run with {', '.join(gone)}, which this version of hf-intervene no"
            " longer trains with: its model can be used, but to train, start anew in another"
            " output_dir with settings of today."
        )
    return flat({name: value for name, value in settings.items() if name not in FORMER}, source)
