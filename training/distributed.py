"""The weights of a model in several processes: whole in each (one process, DDP), or a part in each (FSDP).

Whichever it is, what leaves the processes is whole: checkpoints, samples and the saved model are the same, and a run may be resumed by
another number of processes, sharded or not. Accelerate shards on accelerators only (under `ACCELERATE_USE_CPU` it would quietly run DDP),
and nothing that has scalar parameters; so its configuration is read and torch's `fully_shard` called here.
"""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, parse_flag_from_env, reduce
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from hf_intervene.model import InterventionModel


class Weights:
    """The weights of `model`, which is sharded in place if `accelerate launch` was configured so.

    Every method but `placed` and `groups` must be called by all processes together.

    Raises:
        ValueError: one sentence: a configuration that this trainer does not follow.
    """

    def __init__(self, accelerator: Accelerator, model: InterventionModel):
        self.accelerator, self.model = accelerator, model
        self.sharded = parse_flag_from_env("ACCELERATE_USE_FSDP") and accelerator.num_processes > 1
        self._ddp = accelerator.num_processes > 1 and not self.sharded
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            raise ValueError("the trainer does not run under DeepSpeed.")
        if self.sharded:
            self._skeleton = _without_weights(model)
            _shard(accelerator, model)

    def prepared(self, module: torch.nn.Module) -> torch.nn.Module:
        """The model, or what was compiled of it, as the training step calls it."""
        return self.accelerator.prepare_model(module) if self._ddp else module

    def accumulating(self, module: torch.nn.Module, more: bool) -> AbstractContextManager:
        """Inside, a backward pass of a prepared module leaves its gradients in the process if `more` passes come before the step; those
        of sharded weights are summed in every pass, since only so they can be kept sharded."""
        return self.accelerator.no_sync(module) if more and self._ddp else nullcontext()

    def groups(self, parameters: list[torch.nn.Parameter]) -> list[dict]:
        """Parameters in groups that an optimiser can update at once: sharded ones, and the scalars, which are not."""
        groups = ([p for p in parameters if isinstance(p, DTensor) is kind] for kind in (True, False))
        return [{"params": group} for group in groups if group]

    def placed(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A whole tensor on the device of `like`, and cut as `like` is: this process's part of it."""
        value = value.to(like.device)
        if not isinstance(like, DTensor) or value.shape != like.shape:
            return value
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load whole weights."""
        now = self.model.state_dict()
        self.model.load_state_dict({name: self.placed(value, now.get(name, value)) for name, value in tensors.items()})

    def full(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors; sharded ones are gathered one by one onto the main process's CPU, and are missing from the other processes."""
        found = {}
        for name, value in tensors.items():
            if isinstance(value, DTensor):
                value = value.detach().full_tensor()
                value = value.cpu() if self.accelerator.is_main_process else None
            if value is not None:
                found[name] = value
        return found

    def whole(self) -> InterventionModel | None:
        """The model with whole weights, for sampling and saving; a copy in the main process and `None` in the others if it is sharded."""
        if not self.sharded:
            return self.model
        tensors = self.full(self.model.state_dict())
        if not self.accelerator.is_main_process:
            return None
        model = copy.deepcopy(self._skeleton)
        model.load_state_dict(tensors, assign=True)
        return model.to(self.accelerator.device)

    def release(self) -> None:
        """Let go of what a forward pass without a backward pass gathered, which later changes of the weights would not reach."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _shard(accelerator: Accelerator, model: InterventionModel) -> None:
    plugin = FullyShardedDataParallelPlugin()  # what the launcher was told
    if plugin.fsdp_version != 2 or plugin.activation_checkpointing or plugin.cpu_ram_efficient_loading or _offloads(plugin):
        raise ValueError(
            "the trainer shards with fsdp_version 2, without fsdp_offload_params, fsdp_activation_checkpointing and "
            "fsdp_cpu_ram_efficient_loading: see training/configs/accelerate/fsdp.yaml."
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("the trainer does not shard under mixed_precision fp16: use bf16 or no.")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Only the blocks the pretrained model names are gathered one at a time; of the rest, which is small, some is used from outside a
    # `forward`, where nothing would gather it: it is gathered with the first call and let go after the backward pass.
    names = plugin.transformer_cls_names_to_wrap or getattr(model.base.model, "_no_split_modules", None) or ()
    blocks = [module for module in model.base.model.modules() if type(module).__name__ in names]
    scalars = {p for p in model.parameters() if p.ndim == 0}  # cannot be cut: whole in every process, as under DDP
    frozen = {p for companion in model.base.companion_models().values() for p in companion.parameters()}
    for module in reversed(blocks):
        fully_shard(module, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward, ignored_params=scalars | frozen)
    fully_shard(model, mesh=mesh, ignored_params=scalars | frozen)
    for p in scalars:
        if p.requires_grad:
            p.register_hook(lambda gradient: reduce(gradient, "mean"))


def _offloads(plugin: FullyShardedDataParallelPlugin) -> bool:
    return type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"


def _without_weights(model: InterventionModel) -> InterventionModel:
    """A copy whose parameters have shapes but no values."""
    memo = {id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)
