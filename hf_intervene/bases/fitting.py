"""From what was seen of a pipeline's runs to a recording, and the check that it equals them."""

from typing import Any

import torch

from .observing import NotRecordable, Recorder, Run, replaced
from .replay import Placement, Recording


TOLERANCE = (
    1e-3  # of the replay, relative to the largest entry; in half precision a few of its roundings
)


class Fit:
    """From three runs to a recording."""

    def __init__(self, recorder: Recorder, one: Run, two: Run, probe: Run, entries: int):
        self.recorder, self.one, self.two, self.probe, self.entries = (
            recorder,
            one,
            two,
            probe,
            entries,
        )
        self.dtype = next(
            (p.dtype for p in recorder.denoiser.parameters() if p.is_floating_point()),
            torch.float32,
        )
        self.dtype = getattr(recorder.denoiser, "dtype", self.dtype)
        self.times = torch.stack([t.detach().double().cpu().flatten()[0] for _, t, _ in one.steps])
        self.constants: list[torch.Tensor] = []
        self.inputs: list[Placement] = []

    def recording(self, template: Any) -> Recording:
        names = self.one.arguments[0].keys()
        for run in (self.one, self.two, self.probe):
            for arguments in run.arguments:
                if arguments.keys() != names:
                    self.refuse(
                        "the denoiser", "gets other arguments in other steps or for more images"
                    )
        arguments = {
            name: self.node(
                name,
                [a[name] for a in self.one.arguments],
                [a[name] for a in self.two.arguments],
                [self.probe.arguments[1][name]],
            )
            for name in names
        }
        if not self.inputs:
            self.refuse("the noisy sample", "is in none of the denoiser's arguments")
        is_list = isinstance(template, (list, tuple))
        row = template[0]
        output = self.placed("the prediction", self.probe.steps[2][0], row.numel())
        decoded = self.probe.decoded
        assert decoded is not None
        tail = self.placed("what the autoencoder decodes", decoded, self.entries)
        if len(decoded) != len(self.probe.steps[0][2]) or not tail.is_invertible():
            self.refuse("what the autoencoder decodes", "does not hold each entry of a sample once")
        config = {
            "arguments": arguments,
            "constants": [
                {"shape": list(c.shape), "dtype": _dtype_name(c.dtype)} for c in self.constants
            ],
            "placements": {
                "inputs": [placement.config for placement in self.inputs],
                "output": output.config,
                "tail": tail.config,
            },
            "sample_shape": list(self.one.steps[0][2].shape[1:]),
            "latent_shape": list(decoded.shape[1:]),
            "output_is_list": is_list,
        }
        found = Recording(config)
        for number, value in enumerate(self.constants):
            found.constants[number].copy_(value)
        for number, placement in enumerate(self.inputs):
            found.inputs[number].load_state_dict(placement.state_dict())
        found.output.load_state_dict(output.state_dict())
        found.tail.load_state_dict(tail.state_dict())
        return found

    def refuse(self, what: str, reason: str) -> None:
        raise NotRecordable(
            f"{what} of a {type(self.recorder.pipe).__name__} {reason}: it cannot be recorded."
        )

    def placed(self, what: str, rows: torch.Tensor, entries: int) -> Placement:
        try:
            return Placement.fit(rows, entries)
        except ValueError as error:
            raise NotRecordable(
                f"{what} of a {type(self.recorder.pipe).__name__} cannot be recorded: {error}."
            ) from error

    def node(
        self, path: str, ones: list[Any], twos: list[Any], probes: list[Any], inner: bool = False
    ) -> dict[str, Any]:
        """The node of an argument.

        Args:
            path: its name.
            ones, twos: its values in the steps of the runs for one and two images.
            probes: its value under the probes; of an element of a list with one for each row, those
                of all rows.
            inner: whether it is that of one row.
        """
        one = ones[0]
        if any(type(value) is not type(one) for value in (*ones, *twos, *probes)):
            self.refuse(f"the argument {path!r}", "is of several types")
        if isinstance(one, dict):
            if any(value.keys() != one.keys() for value in (*ones, *twos, *probes)):
                self.refuse(
                    f"the argument {path!r}", "has other keys in other steps or for more images"
                )
            return {
                "dict": {
                    key: self.node(f"{path}.{key}", *_at(key, ones, twos, probes), inner)
                    for key in one
                }
            }
        if isinstance(one, (list, tuple)):
            lengths = (
                {len(value) for value in ones},
                {len(value) for value in twos},
                {len(value) for value in probes},
            )
            rows = len(self.probe.steps[0][2])
            if not inner and lengths == ({1}, {2}, {rows}):
                first = [value[0] for value in ones], [value[0] for value in twos], list(probes[0])
                return {"each": self.node(f"{path}[]", *first, True)}
            if len(set().union(*lengths)) == 1:
                parts = [
                    self.node(f"{path}[{k}]", *_at(k, ones, twos, probes), inner)
                    for k in range(len(one))
                ]
                return {"list" if isinstance(one, list) else "tuple": parts}
            self.refuse(
                f"the argument {path!r}", "is a list whose length is not that of the images"
            )
        if isinstance(one, torch.Tensor):
            return self.tensor(path, ones, twos, torch.stack(probes) if inner else probes[0], inner)
        if one is None or isinstance(one, (bool, int, str, float)):
            if any(value != one for value in (*ones, *twos, *probes)):
                if isinstance(one, float):
                    of_one, of_two = (
                        [torch.tensor(value) for value in of_run] for of_run in (ones, twos)
                    )
                    return self.tensor(path, of_one, of_two, torch.tensor(one), inner)
                self.refuse(
                    f"the argument {path!r}",
                    "changes from step to step or with the number of images",
                )
            return {"value": one}
        self.refuse(f"the argument {path!r}", f"is a {type(one).__name__}, which cannot be kept")
        raise AssertionError  # `refuse` never returns

    def tensor(
        self,
        path: str,
        ones: list[torch.Tensor],
        twos: list[torch.Tensor],
        probe: torch.Tensor,
        inner: bool,
    ) -> dict[str, Any]:
        one, two = ones[0], twos[0]
        dtype = "model" if one.dtype == self.dtype else _dtype_name(one.dtype)
        if _same(*ones) and _same(*twos):
            rows = None
            if not _same(one, two):
                rows = next(
                    (d for d in range(one.ndim) if _same(torch.cat([one, one], d), two)), None
                )
                if rows is None or inner:
                    self.refuse(
                        f"the argument {path!r}", "is not the same for two images as for one"
                    )
            self.constants.append(one.cpu())
            return {"constant": len(self.constants) - 1, "rows": rows, "dtype": dtype}
        if probe.ndim and len(probe) > 1 and not _same(probe[0], probe[1]):
            if len(probe) != len(self.probe.steps[0][2]):
                self.refuse(
                    f"the argument {path!r}", "holds the noisy samples of several images in one row"
                )
            try:
                self.inputs.append(Placement.fit(probe, self.entries))
            except ValueError:
                self.refuse(
                    f"the argument {path!r}",
                    "is computed from the noisy sample in each step, as the residuals of a"
                    " ControlNet are",
                )
            return {"input": len(self.inputs) - 1, "dtype": dtype}
        return self.time(path, ones, twos, inner) | {"dtype": dtype}

    def time(
        self, path: str, ones: list[torch.Tensor], twos: list[torch.Tensor], inner: bool
    ) -> dict[str, Any]:
        """The node of an argument that is the time."""
        values = [value.double().cpu() for value in ones]
        flat = torch.stack([value.flatten()[0] for value in values])
        if not all(bool((value == value.flatten()[0]).all()) for value in values):
            self.refuse(
                f"the argument {path!r}", "changes from step to step, and not as one time does"
            )
        found = fitted_time(self.times, flat, ones[0].dtype)
        if found is None:
            self.refuse(
                f"the argument {path!r}",
                "changes from step to step, and is no multiple of the scheduler's time",
            )
        shape = list(ones[0].shape)
        if not inner and shape and shape[0] in (1, len(twos[0])):
            shape = shape[1:]
        return {"time": list(found or ()), "shape": shape}


def fitted_time(
    times: torch.Tensor, values: torch.Tensor, dtype: torch.dtype
) -> tuple[float, float] | None:
    """(a, b) of values a t + b with b = 0 or b = 1, each of shape (steps,); `None`: there are none.

    Half precision rounds times; a that is nearly 1, 1/1000 or -1/1000 is that.
    """
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    for shift in (0.0, 1.0):
        scale = float((times * (values - shift)).sum() / times.square().sum())
        known = [
            k for k in (1.0, 1e-3, -1e-3, -1.0) if abs(scale / k - 1) < max(4 * rounding, 1e-4)
        ]
        scale = known[0] if known else scale
        error = (times * scale + shift - values).abs()
        if bool(
            (error <= (2 * rounding + 1e-4) * values.abs().clamp(min=1e-2 if shift else 1e-6)).all()
        ):
            return scale, shift
    return None


def check_replay(recorder: Recorder, recording: Recording, one: Run, two: Run) -> None:
    """The recording must build the arguments that were seen, and the predictions of the outputs."""
    name, dtype = type(recorder.pipe).__name__, Fit(recorder, one, two, two, 0).dtype
    for run in (one, two):
        for number, (prediction, time, sample) in enumerate(run.steps):
            rows = time.flatten()[:1].expand(len(sample))
            built = recording.call(sample, rows, dtype)
            for key, value in run.arguments[number].items():
                if not _close(built[key], value):
                    raise NotRecordable(
                        f"the replay of a {name} does not equal its run: the argument {key!r}"
                        f" differs in step {number}."
                    )
            if not _close(recording.predicted([run.outputs[number]]), prediction.float()):
                raise NotRecordable(
                    f"the replay of a {name} does not equal its run: the prediction differs in step"
                    f" {number}."
                )
    _, time, sample = one.steps[0]
    arguments = recording.call(sample, time.flatten()[:1], dtype)
    found = []
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for denoiser in recorder.denoisers.values():
            with replaced(denoiser, "_compiled_call_impl", None):
                found.append(recording.predicted(denoiser(**arguments)))
    first = found[list(recorder.denoisers).index(one.called[0])]
    # With the roundings of that type.
    if not _close(first.to(dtype), one.steps[0][0].to(dtype)):
        raise NotRecordable(
            f"the replay of a {name} does not equal its run: the denoiser returns something else."
        )


def _at(
    key: Any, ones: list[Any], twos: list[Any], probes: list[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    first, second, third = ([value[key] for value in of_run] for of_run in (ones, twos, probes))
    return first, second, third


def _same(*tensors: torch.Tensor) -> bool:
    first = tensors[0]
    return all(first.shape == other.shape and torch.equal(first, other) for other in tensors[1:])


def _close(built: Any, seen: Any) -> bool:
    """Whether two arguments are the same, up to rounding."""
    if isinstance(seen, torch.Tensor):
        built = torch.as_tensor(built, device=seen.device)
        if built.shape != seen.shape and built.numel() != seen.numel() and seen.numel() != 1:
            return False  # one time for all rows may be built as one for each
        if not seen.numel():
            return True
        rounding = torch.finfo(seen.dtype).eps if seen.dtype.is_floating_point else 0.0
        difference = (built.double() - seen.double()).abs().max()
        return bool(
            difference <= max(TOLERANCE, 4 * rounding) * seen.double().abs().max().clamp(min=1e-3)
        )
    if isinstance(seen, dict):
        return built.keys() == seen.keys() and all(
            _close(built[key], value) for key, value in seen.items()
        )
    if isinstance(seen, (list, tuple)):
        return len(built) == len(seen) and all(map(_close, built, seen))
    if isinstance(seen, float):
        built = float(built.flatten()[0]) if isinstance(built, torch.Tensor) else built
        return abs(built - seen) <= TOLERANCE * max(abs(seen), 1e-3)
    return bool(built == seen)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
