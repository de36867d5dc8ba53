"""A simulated device other than the CPU: `DEVICE`, "elsewhere".

The CPU holds and computes its tensors, so that results are those of the CPU. As on a GPU, three
things are errors: an operation on tensors of both devices, noise from a generator of the other
device, and a fused step of an optimiser on tensors with different strides. The device needs its own
process: PyTorch takes one such backend and keeps it."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("elsewhere", _Backend())
DEVICE = torch.device("elsewhere", 0)


class ElsewhereTensor(torch.Tensor):
    """A tensor on the simulated device; `held` has its values."""

    @staticmethod
    def __new__(cls, held):
        about = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        return torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **about)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def __deepcopy__(self, memo):
        copied = ElsewhereTensor(self.held.clone()).requires_grad_(self.requires_grad)
        copied._is_param = isinstance(self, torch.nn.Parameter)
        memo[id(self)] = copied
        return copied

    def tolist(self):
        return self.held.tolist()

    def storage(self):  # whose address tells tensors that share it
        return self.held.storage()

    def untyped_storage(self):
        return self.held.untyped_storage()

    def data_ptr(self):
        return self.held.data_ptr()

    def numpy(self, *, force=False):
        raise TypeError("a tensor elsewhere is no array: use .cpu() first.")

    __array__ = numpy


class _Dispatch(TorchDispatchMode):
    """Functions that create tensors take no tensor that would determine the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Generator(torch.Generator):
    """A `torch.Generator` whose device is the simulated one."""

    elsewhere: dict[int, "Generator"] = {}  # kept, so that no other one gets its address

    def __new__(cls, device="cpu"):
        return super().__new__(cls)

    def __init__(self, device="cpu"):
        self._device = torch.device(device)
        if self._device.type == DEVICE.type:
            self.elsewhere[self._cdata] = self

    @property
    def device(self):
        return self._device


MOVES = {"aten::_to_copy", "aten::copy_", "aten::_foreach_copy_"}
WAITS = {
    f"aten::{name}"
    for name in (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "_unique2",
    )
}
waits: list = []  # operations on what is elsewhere for whose result a host has to wait
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}


def _is(value):
    return isinstance(value, ElsewhereTensor)


def _held(value):
    return value.held if _is(value) else value


def _layout(x):
    return [stride for size, stride in zip(x.shape, x.stride()) if size > 1]


def _run(func, args, kwargs):
    name, device, there = (
        func._schema.name,
        kwargs.get("device"),
        [x for x in tree_leaves((args, kwargs)) if _is(x)],
    )
    goes_there = bool(there) if device is None else torch.device(device).type == DEVICE.type
    if name == "aten::copy_":
        goes_there = _is(args[0])
    if there and name not in MOVES:
        # On the CPU there may be single numbers, and what an index is.
        beside = (args[0], args[2:]) if name in INDEXING else (args, kwargs)
        if any(isinstance(x, torch.Tensor) and not _is(x) and x.ndim for x in tree_leaves(beside)):
            raise RuntimeError(f"{func}: tensors on the CPU and elsewhere.")
    if (generator := kwargs.get("generator")) is not None and (
        generator._cdata in Generator.elsewhere
    ) != goes_there:
        raise RuntimeError(f"{func}: a generator that is not where its tensor is.")
    if there and name.startswith("aten::_fused_adam"):
        # As on CUDA. The CPU computes what is wrong instead: it takes entries in the order of
        # memory.
        for parameter, *others in zip(*args[:4]):
            if any(_layout(x) != _layout(parameter) for x in others):
                raise RuntimeError(
                    f"{func}: gradients or moments that do not lie in memory as their parameters."
                )
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu") if goes_there else device}
    if there and (name in WAITS or (not goes_there and name in MOVES)):
        waits.append(func)
    result = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if not goes_there:
        return result
    same = {id(x.held): x for x in there}  # an operation in place returns what it was given

    def back(value):
        if not isinstance(value, torch.Tensor):
            return value
        return same[id(value)] if id(value) in same else ElsewhereTensor(value)

    return tree_map(back, result)


# What `torch.tensor(..., device=...)` calls below the reach of modes.


@torch.library.impl("aten::empty_strided", "privateuseone")
def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return ElsewhereTensor(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl("aten::_copy_from", "privateuseone")
def _copy_from(source, target, non_blocking=False):
    _held(target).copy_(_held(source))
    return target


@contextmanager
def elsewhere():
    """Allow tensors on the simulated device in the body."""
    whole, torch.Generator = torch.Generator, Generator
    try:
        with _Dispatch():
            yield DEVICE
    finally:
        torch.Generator = whole
