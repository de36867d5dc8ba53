"""Values of a configuration that no weight ties down: those that nobody can mean are refused,
before anything is made or computed by them.

A side of an image or a padding decides how much memory the first use takes, a scale of 0 or NaN
makes every image black."""

import math
from collections.abc import Callable, Iterator, Mapping, Set
from inspect import signature
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import nn

from .. import hub


MAX_SIDE = 4096  # pixels, latents or frames
_MAX_WINDOW = (
    64  # of a convolution: padding, kernel, stride; and of how many pixels a latent is wide
)
_SIDES = {"sample_size", "image_size", "latent_size", "map_size", "size", "crop_size", "pad_size"}
_SIDES |= {"height", "width", "shortest_edge", "longest_edge", "max_height", "max_width"}
_SIDES |= {"num_frames"}  # of a clip, which an autoencoder takes a few at a time
_WINDOWS = {
    "downsample_padding",
    "padding",
    "kernel_size",
    "stride",
    "dilation",
    "conv_in_kernel",
    "conv_out_kernel",
}
_WINDOWS |= {"spatial_compression_ratio"}


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _share(value: Any) -> bool:
    return _number(value) and 0 < value <= 1


# What a value must be, in words and as a test; `None`, which stands for a default, is right too.
_NUMBERS: dict[str, tuple[str, Callable[[Any], bool]]] = {}
for _names, _rule in (
    (
        (
            "scaling_factor clip_sample_range sample_max_value shift flow_shift base_shift"
            " max_shift sigma_min sigma_max rescale_factor image_std latents_std"
            " num_train_timesteps init_noise_sigma use_snr_gamma sigma_data rho max_image_seq_len"
            " base_image_seq_len solver_order norm_eps layer_norm_eps batch_norm_eps"
            " mid_block_scale_factor norm_num_groups attn_norm_num_groups attention_head_dim"
            " num_attention_heads"
        ),
        ("a positive number", _positive),
    ),
    ("shift_factor image_mean latents_mean shift_terminal freq_shift", ("a number", _number)),
    # A negative step would be counted from the end.
    (
        "steps_offset downsample_padding",
        ("a number, 0 at least", lambda value: _number(value) and value >= 0),
    ),
    (
        "beta_start beta_end trained_betas dynamic_thresholding_ratio",
        ("a number above 0, and 1 at most", _share),
    ),
):
    _NUMBERS |= dict.fromkeys(_names.split(), _rule)
_LISTED = {"image_mean", "image_std", "latents_mean", "latents_std", "trained_betas"}
_LISTED |= {"attention_head_dim", "num_attention_heads"}
_NEEDED = {"clip_sample_range", "freq_shift", "mid_block_scale_factor"}  # have no such default
# Lists that must have as many entries as another value says, by the names that it may have.
_LENGTHS = {
    "trained_betas": ("num_train_timesteps",),
    "latents_mean": ("z_dim", "latent_channels"),
    "latents_std": ("z_dim", "latent_channels"),
}
_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
}
_BOUNDLESS = {"lambda_min_clipped"}  # -inf is a default of diffusers


def read_part(path: Path) -> dict:
    """The configuration of a part of a model, as `hub.read_config`, and with values that one can
    compute with.

    Raises:
        OSError, ValueError: one sentence.
    """
    found = hub.read_config(path)
    for name, others in _LENGTHS.items():
        wanted = next((found[other] for other in others if type(found.get(other)) is int), None)
        if isinstance(found.get(name), list) and wanted not in (None, len(found[name])):
            raise ValueError(
                f"{path} has {len(found[name])} entries of {name}, which must be {wanted}: it is"
                " corrupt, or made to do harm."
            )
    for name, value in entries(found):
        reason = _wrong(name, value)
        if reason:
            shown = repr(value)[:80]
            raise ValueError(
                f"{path} has {name} {shown}, which must be {reason}: it is corrupt, or made to do"
                " harm."
            )
    return found


def _wrong(name: str, value: Any) -> str | None:
    """What a value must be and is not."""
    if isinstance(value, float) and not math.isfinite(value) and name not in _BOUNDLESS:
        return "a finite number"
    counted = _number(value)
    if name in _SIDES and counted and not 0 <= value <= MAX_SIDE:
        return f"at most {MAX_SIDE}"
    if name in _WINDOWS and counted and not 0 <= value <= _MAX_WINDOW:
        return f"at most {_MAX_WINDOW}"
    if name in _SIDES and not counted and value is not None:
        right = isinstance(value, list) and all(map(_number, value)) or isinstance(value, dict)
        if not right or not value:
            return "a number, or some"
    if name in _NUMBERS and not (name in _LISTED and isinstance(value, list)):
        if (value is not None or name in _NEEDED) and not _NUMBERS[name][1](value):
            return _NUMBERS[name][0]
    return None


def check_types(made_by: Any, values: Mapping[str, Any]) -> None:
    """Refuse values of another type than a class says: some are accepted while it is built, and end
    in an error of torch at the first image.

    Lists are not looked into, nor what the class itself gives another type as default.

    Args:
        made_by: the class.
        values: arguments of its constructor, as JSON has them.

    Raises:
        ValueError: one sentence.
    """
    try:
        hints = get_type_hints(made_by.__init__)
    except (NameError, TypeError):  # it names types that are not imported
        return
    for name, argument in signature(made_by.__init__).parameters.items():
        if name not in values or name not in hints:
            continue
        value, kinds = values[name], {*(get_args(hints[name]) or (hints[name],))}
        scalars = kinds & _WORDS.keys()
        # a list, or a hint of other types than scalars
        if isinstance(value, list) or not scalars or kinds - scalars - {type(None)}:
            continue
        if not _of_kinds(value, kinds) and _of_kinds(argument.default, kinds):
            words = " or ".join(sorted(_WORDS[kind] for kind in scalars))
            raise ValueError(f"{name} must be {words}, not {value!r:.80}")


def _of_kinds(value: Any, kinds: Set[Any]) -> bool:
    """Whether a value may stand for one of some types, as those who write configurations take it:
    `null` for a text or a switch that is off, 0 and 1 for a switch, 1.0 for 1.
    """
    if value is None or value is False:
        if not kinds.isdisjoint({type(None), bool, str}):
            return True
    if bool in kinds and (isinstance(value, bool) or value in (0, 1)):
        return True
    if _number(value):
        return float in kinds or (int in kinds and value == int(value))
    return str in kinds and isinstance(value, str)


def entries(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """All values with the names they have, lists and dictionaries too; those in lists have the
    list's."""
    pending: list[tuple[str, Any]] = list(found.items())
    while pending:
        name, value = pending.pop()
        if isinstance(value, dict):
            pending += [(str(key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            pending += [(name, inner) for inner in value]
        yield name, value


def check_finite(model: nn.Module, what: str) -> None:
    """Raise a ValueError if a weight of a model is not finite, or was not there: every image would
    be black."""
    for name, value in model.state_dict().items():
        if value.is_meta:
            raise ValueError(
                f"the weights of {what} do not fit its configuration: {name} is missing."
            )
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ValueError(
                f"the weights of {what} are not finite ({name}): they are corrupt, or a training"
                " run had failed."
            )
