"""What is kept of how a pipeline calls its denoiser, and how the denoiser is called by it without
the pipeline.

A `Recording` is made by `recording.py`. It holds

- `arguments`: the arguments of a call, as a tree of small dictionaries that JSON can write;
- three objects of `Placement`: where the entries of a noisy sample are in the arguments, where
  those of the prediction are in the denoiser's output, and where those of a clean sample are in
  what the autoencoder decodes.

A sample is a row of what the pipeline's scheduler steps on, such as packed tokens (S, c) or a map
(c, h, w)."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn


# different scales or shifts of a placement that are kept as a table of numbers; more are kept one
# by one
_TABLE = 256
_ROUNDING = 0.1  # of a digit of at most 15 in half precision
_DEEPEST = 8  # levels of a tree of arguments


class Placement(nn.Module):
    """A map from vectors of n entries to arrays, each of whose entries is a scaled and shifted
    entry of the vector, or a constant.

        y[i] = scale[i] * x[index[i]] + shift[i]

    Args:
        shape: of y, without the batch dimension.
        entries: n.
        indexed: whether there is an index; without one, y[i] is of x[i].
        scales, shifts: the different values of scale and shift. `None`: they are kept one by one,
            as a buffer.
    """

    index: torch.Tensor

    def __init__(
        self,
        shape: Sequence[int],
        entries: int,
        indexed: bool = False,
        scales: Sequence[float] | None = (1.0,),
        shifts: Sequence[float] | None = (0.0,),
    ):
        super().__init__()
        self.shape, self.entries, self.size = tuple(shape), entries, math.prod(shape)
        self._columns: dict[tuple[str, torch.device, torch.dtype], torch.Tensor] = {}
        self.config: dict[str, Any] = {
            "shape": list(shape),
            "entries": entries,
            "indexed": indexed,
            "scales": None if scales is None else list(scales),
            "shifts": None if shifts is None else list(shifts),
        }
        if indexed:
            self.register_buffer("index", torch.zeros(self.size, dtype=torch.int32))
        for name, values in (("scale", scales), ("shift", shifts)):
            if values is None:
                self.register_buffer(name, torch.zeros(self.size))
            elif len(values) > 1:
                self.register_buffer(f"{name}_number", torch.zeros(self.size, dtype=torch.uint8))

    @classmethod
    def fit(cls, probes: torch.Tensor, entries: int) -> "Placement":
        """The placement that maps the rows of `probes_of(entries, k)` to these, (k, *shape).

        Raises:
            ValueError: there is none.
        """
        y = probes.detach().double().cpu().flatten(1)  # (k, size)
        shift, scale = y[0], y[1] - y[0]
        moves = scale != 0
        safe = torch.where(moves, scale, 1.0)
        index, place = torch.zeros(y.shape[1], dtype=torch.int64), 1
        for row in y[2:]:
            found = (row - shift) / safe * moves
            digit = found.round().long()
            if bool(((digit < 0) | (digit > 15) | ((found - digit).abs() > _ROUNDING)).any()):
                raise ValueError("an entry of it is no scaled and shifted entry of what was given")
            index, place = index + digit * place, place * 16
        if bool((index >= entries).any()):
            raise ValueError("an entry of it is made of several entries of what was given")
        scales, scale_number = _table(scale)
        shifts, shift_number = _table(shift)
        indexed = y.shape[1] != entries or not torch.equal(index, torch.arange(entries))
        placement = cls(probes.shape[1:], entries, indexed, scales, shifts)
        if indexed:
            placement.index.copy_(index)
        for name, values, number, column in (
            ("scale", scales, scale_number, scale),
            ("shift", shifts, shift_number, shift),
        ):
            if values is None:
                getattr(placement, name).copy_(column)
            elif len(values) > 1:
                getattr(placement, f"{name}_number").copy_(number)
        return placement

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *shape) of x (B, ...) with n entries a row; in the type of x."""
        x = self.arranged(x).flatten(1)
        scale, shift = self._column("scale", x), self._column("shift", x)
        if not (isinstance(scale, float) and scale == 1.0):
            x = x * scale
        if not (isinstance(shift, float) and shift == 0.0):
            x = x + shift
        return x.unflatten(1, self.shape)

    def arranged(self, x: torch.Tensor) -> torch.Tensor:
        """(B, *shape) of x (B, ...): its entries where they belong, neither scaled nor shifted."""
        x = x.flatten(1)
        if self.config["indexed"]:
            x = x.index_select(1, self.index.to(x.device, torch.int64))
        return x.unflatten(1, self.shape)

    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """x (B, n) of y (B, *shape). Only of a placement that `is_invertible`."""
        x = (y.flatten(1) - self._column("shift", y)) / self._column("scale", y)
        if not self.config["indexed"]:
            return x
        found = torch.empty_like(x)
        found[:, self.index.to(x.device, torch.int64)] = x
        return found

    def is_invertible(self) -> bool:
        """Whether each entry of x is exactly once in y."""
        if self.size != self.entries:
            return False
        if self.config["indexed"] and len(self.index.unique()) != self.entries:
            return False
        scale = self._column("scale", torch.zeros(1))
        return scale != 0 if isinstance(scale, float) else bool((scale != 0).all())

    def _column(self, name: str, like: torch.Tensor) -> Any:
        """Scale or shift of each entry, (size,), in the type of `like`; a number where all are the
        same.
        """
        values = self.config[f"{name}s"]
        if values is None:
            return getattr(self, name).to(like.device, like.dtype)
        if len(values) == 1:
            return values[0]
        key = name, like.device, like.dtype
        # once: a table on the host would be copied to the device in each step
        if key not in self._columns:
            table = torch.tensor(values, dtype=like.dtype, device=like.device)
            self._columns[key] = table[getattr(self, f"{name}_number").to(like.device, torch.int64)]
        return self._columns[key]


def _table(column: torch.Tensor) -> tuple[list[float] | None, torch.Tensor | None]:
    """The different values of a column and which of them each entry is; of a column with many of
    them, `None`.
    """
    values, number = column.float().unique(return_inverse=True)
    return (None, None) if len(values) > _TABLE else (values.tolist(), number)


def probes_of(entries: int, rows: int) -> torch.Tensor:
    """What is put in to find a `Placement`, (rows, entries): zeros, ones, and the base-16 digits of
    each entry's number.
    """
    number = torch.arange(entries)
    digits = [number // 16**place % 16 for place in range(rows - 2)]
    return torch.stack(
        [torch.zeros(entries), torch.ones(entries), *(digit.float() for digit in digits)]
    )


def probe_rows(*entries: int) -> int:
    """How many rows `probes_of` needs to tell so many entries apart."""
    digits = 1
    while 16**digits < max(entries):
        digits += 1
    return 2 + digits


class Recording(nn.Module):
    """How a pipeline calls its denoiser.

    Args:
        config: what JSON can write of it: `arguments` (by name a node, see below), `constants`
            (shape and dtype of each tensor among them), `placements` (configurations of `inputs`,
            `output` and `tail`), `sample_shape`, `latent_shape` (of what the autoencoder decodes),
            `output_is_list`.

    A node is a dictionary of one of these kinds:

    - `{"value": v}`: v itself;
    - `{"constant": k, "rows": d}`: the tensor k; along its dimension d it is repeated for each row,
      `None`: it is shared;
    - `{"input": k}`: the noisy sample, as placement k has it;
    - `{"time": [a, b], "shape": s}`: a t + b in each entry, (B, *s);
    - `{"each": node}`: a list with one element for each row;
    - `{"list": [...]}`, `{"tuple": [...]}`, `{"dict": {...}}`: these.

    Nodes of tensors have a `dtype`; `"model"` is that of the denoiser.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.sample_shape, self.latent_shape = (
            tuple(config["sample_shape"]),
            tuple(config["latent_shape"]),
        )
        for number, constant in enumerate(config["constants"]):
            self.register_buffer(
                _name(number),
                torch.zeros(constant["shape"], dtype=getattr(torch, constant["dtype"])),
            )
        found = config["placements"]
        self.inputs = nn.ModuleList(Placement(**entry) for entry in found["inputs"])
        self.output, self.tail = Placement(**found["output"]), Placement(**found["tail"])

    @property
    def constants(self) -> list[torch.Tensor]:
        """The recorded tensors, in the order in which the tree of arguments numbers them."""
        return [getattr(self, _name(number)) for number in range(len(self.config["constants"]))]

    def check(self) -> None:
        """Refuse a recording that was loaded and cannot be one.

        Raises:
            ValueError: one sentence.
        """
        placements = [*self.inputs, self.output, self.tail]
        numbers = [(p, "index", p.entries) for p in placements]
        numbers += [
            (p, f"{name}_number", len(p.config[f"{name}s"] or ()))
            for p in placements
            for name in ("scale", "shift")
        ]
        for placement, name, bound in numbers:
            index = getattr(placement, name, None)
            if (
                index is not None
                and index.numel()
                and not (0 <= int(index.min()) and int(index.max()) < bound)
            ):
                raise ValueError(
                    "the recording of the pipeline has entries that are out of range: it is"
                    " corrupt."
                )
        if not self.tail.is_invertible() or self.tail.shape != self.latent_shape:
            raise ValueError("the recording of the pipeline cannot be inverted: it is corrupt.")
        for node in self.config["arguments"].values():
            self._check_node(node, 0)

    def _check_node(self, node: Any, depth: int) -> None:
        kind = next((name for name in _KINDS if isinstance(node, dict) and name in node), None)
        counts = {"constant": len(self.constants), "input": len(self.inputs)}
        number = node[kind] if kind in counts else 0
        if (
            kind is None
            or depth > _DEEPEST
            or not (isinstance(number, int) and 0 <= number < counts.get(kind, 1))
        ):
            raise ValueError(
                "the recording of the pipeline has arguments of an unknown kind: it is corrupt."
            )
        for inner in _inner(node, kind):
            self._check_node(inner, depth + 1)

    def call(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        dtype: torch.dtype,
        text: Sequence[dict[int, torch.Tensor]] | None = None,
    ) -> dict[str, Any]:
        """The arguments of the denoiser.

        Args:
            x: noisy samples, (B, *sample_shape).
            t: times as the scheduler counts them, (B,).
            dtype: of the denoiser.
            text: for each row the constants that it has of its own, by number; all rows of a call
                have them in the same shapes. `None`: those of the recording.
        """
        rows = _Rows(x, t, dtype, text, len(x))
        return {name: self._build(node, rows) for name, node in self.config["arguments"].items()}

    def _build(self, node: dict[str, Any], rows: "_Rows", inner: bool = False) -> Any:
        if "value" in node:
            return node["value"]
        if "each" in node:
            return [self._build(node["each"], rows.row(i), True) for i in range(rows.count)]
        if "constant" in node:
            tensor = self._constant(node, rows)
        elif "input" in node:
            tensor = self.inputs[node["input"]](rows.x)
            tensor = tensor[0] if inner else tensor
        elif "time" in node:
            scale, shift = node["time"]
            time = rows.t.to(torch.float64) * scale + shift if (scale, shift) != (1, 0) else rows.t
            shape = node["shape"]
            tensor = time.view(-1, *[1] * len(shape)).expand(-1, *shape)
            tensor = tensor[0] if inner else tensor
        else:
            kind = next(name for name in ("list", "tuple", "dict") if name in node)
            if kind == "dict":
                return {key: self._build(value, rows, inner) for key, value in node["dict"].items()}
            found = [self._build(value, rows, inner) for value in node[kind]]
            return tuple(found) if kind == "tuple" else found
        return tensor.to(
            rows.x.device, rows.dtype if node["dtype"] == "model" else getattr(torch, node["dtype"])
        )

    def _constant(self, node: dict[str, Any], rows: "_Rows") -> torch.Tensor:
        number, dim = node["constant"], node["rows"]
        if rows.text is None or not rows.text or number not in rows.text[0]:
            value = self.constants[number]
            return value if dim is None else torch.cat([value] * rows.count, dim)
        own = [text[number] for text in rows.text]
        return on_device(own[0] if dim is None else torch.cat(own, dim), rows.x.device)

    def predicted(self, output: Any) -> torch.Tensor:
        """The prediction, (B, *sample_shape), float32, of what the denoiser returned."""
        found = output[0]
        found = torch.stack(list(found)) if self.config["output_is_list"] else found
        return self.output(found.float())

    def to_latents(self, x0: torch.Tensor) -> torch.Tensor:
        """What the autoencoder decodes, (B, *latent_shape), of clean samples (B, *sample_shape)."""
        return self.tail(x0)

    def from_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Clean samples (B, *sample_shape) of latents as the autoencoder has them, (B,
        *latent_shape).
        """
        return self.tail.inverse(latents).unflatten(1, self.sample_shape)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on a device; from the host to a GPU without waiting for what the GPU is at."""
    if tensor.device.type == "cpu" and device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class _Rows:
    """The rows that arguments are built for."""

    def __init__(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        dtype: torch.dtype,
        text: Sequence[dict[int, torch.Tensor]] | None,
        count: int,
    ):
        self.x, self.t, self.dtype, self.text, self.count = x, t, dtype, text, count

    def row(self, i: int) -> "_Rows":
        text = None if self.text is None else self.text[i : i + 1]
        return _Rows(self.x[i : i + 1], self.t[i : i + 1], self.dtype, text, 1)


_KINDS = ("value", "constant", "input", "time", "each", "list", "tuple", "dict")


def _name(number: int) -> str:
    return f"constant_{number}"


def _inner(node: dict[str, Any], kind: str) -> Iterator[Any]:
    """The nodes in a node."""
    if kind == "each":
        yield node["each"]
    elif kind in ("list", "tuple"):
        yield from node[kind]
    elif kind == "dict":
        yield from node["dict"].values()


__all__ = ["Placement", "Recording", "on_device", "probe_rows", "probes_of"]
