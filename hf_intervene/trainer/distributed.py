"""The weights of a model in several processes: whole in each (one process, DDP, ZeRO-2), or a part
in each (FSDP).

Whichever it is, what leaves the processes is whole: checkpoints, samples and the saved model are
the same, and a run may be resumed by another number of processes, sharded or not. Accelerate shards
on accelerators only (under `ACCELERATE_USE_CPU` it would quietly run DDP), and nothing that has
scalar parameters; under DeepSpeed it would cast the weights to bf16. So its configuration is read,
and torch's `fully_shard` or DeepSpeed called here."""

import copy
import gc
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    is_deepspeed_available,
    parse_flag_from_env,
    patch_environment,
    reduce,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..logging import get_logger
from ..model import InterventionModel


logger = get_logger(__name__)
MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of every weight, beside the number of steps
# of processes that wait while one decodes or encodes all images; NCCL's own is ten minutes
PATIENCE = timedelta(hours=6)
ZERO_BUCKET = 2**25  # gradients that ZeRO sums at once: 128 MiB of memory


def new_accelerator(**options: Any) -> Accelerator:
    """An `Accelerator` that takes ZeRO for plain data parallelism and leaves DeepSpeed to
    `Weights`.
    """
    # of a former run in this process, which may have had another precision
    AcceleratorState._reset_state()
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
        handlers = [
            InitProcessGroupKwargs(timeout=PATIENCE),
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True
            ),  # one copy of the gradients, not two
        ]
        return Accelerator(kwargs_handlers=handlers, **options)


def warn_of_launcher(precision: str, accumulation_steps: int) -> None:
    """Warn of what a launcher was told and the trainer does not do.

    Args:
        precision: that the run has.
        accumulation_steps: micro-batches of a step.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto")
    wrong = {
        f"mixed_precision {told}": (told not in ("no", precision), f"it is {precision}"),
        f"gradient_accumulation_steps {steps}": (
            steps not in ("auto", "1", str(accumulation_steps)),
            f"it is {accumulation_steps}",
        ),
        "dynamo_backend": (
            os.environ.get("ACCELERATE_DYNAMO_BACKEND", "NO").upper() != "NO",
            "nothing is compiled",
        ),
    }
    for option, (is_wrong, instead) in wrong.items():
        if is_wrong:
            logger.warning(
                "the launcher was told %s, and settings of the run say otherwise: %s.",
                option,
                instead,
            )


def end_training(accelerator: Accelerator) -> None:
    """End trackers and the group of processes, when nothing outside refers to what `accelerator`
    prepared any more.

    DDP goes first: where it is the last that holds the group, it ends it with Python's lock held,
    for which a thread of the group may be waiting to let go of a tensor, and neither ever goes on.
    """
    if accelerator.num_processes > 1:
        accelerator.free_memory()
        gc.collect()  # the modules, which refer to themselves
    accelerator.end_training()


def process_state() -> PartialState:
    """This process among the others, for what needs no more of Accelerate than that."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


class Weights:
    """The weights of `model`, which is sharded in place if `accelerate launch` was configured so.

    Every method but `placed` and `groups` must be called by all processes together.

    Raises:
        ValueError: one sentence: a configuration that this trainer does not follow.
    """

    def __init__(self, accelerator: Accelerator, model: InterventionModel):
        self.accelerator, self.model = accelerator, model
        several = accelerator.num_processes > 1
        self.sharded = parse_flag_from_env("ACCELERATE_USE_FSDP") and several
        self._zero = parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and several
        self.partitioned = self.sharded or self._zero
        self._ddp = several and not self.partitioned
        # of ZeRO: DeepSpeed's engine, and all groups of the optimiser
        self._engine: Any = None
        self._groups: list[dict[str, Any]] = []
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
            _check_deepspeed(accelerator)
        if self.sharded:
            self._skeleton = _without_weights(model)
            _shard(accelerator, model)

    def prepared(self, module: torch.nn.Module, optimizer: AcceleratedOptimizer) -> torch.nn.Module:
        """The model, or what was compiled of it, as the training step calls it; again when other
        parameters are trained than before.
        """
        if self._zero:
            self._engine = self._partitioned(module, optimizer.optimizer)
            return self._engine
        return self.accelerator.prepare_model(module) if self._ddp else module

    def accumulating(self, module: torch.nn.Module, more: bool) -> AbstractContextManager:
        """Inside, a backward pass of a prepared module leaves its gradients in the process if
        `more` passes come before the step; those of sharded weights and of ZeRO are summed in every
        pass, since only so they can be kept sharded."""
        if self._zero:
            self._engine.set_gradient_accumulation_boundary(not more)
        return self.accelerator.no_sync(module) if more and self._ddp else nullcontext()

    def step(
        self, optimizer: AcceleratedOptimizer, parameters: list[torch.nn.Parameter], max_norm: float
    ) -> None:
        """A step of the optimiser on gradients of at most this norm, which are then forgotten."""
        if self._zero:
            self._engine.optimizer.clip_grad = max_norm
            self._engine.step()
            return
        self.accelerator.clip_grad_norm_(parameters, max_norm)
        optimizer.step()
        optimizer.zero_grad()

    def optimizer_state(
        self, optimizer: torch.optim.Optimizer, everywhere: bool = False
    ) -> Mapping[Any, dict[str, torch.Tensor]]:
        """Adam's state by parameter; that of ZeRO is gathered whole onto the CPU of the main
        process, or of every one.
        """
        if self._engine is None:
            return optimizer.state
        from deepspeed.utils import safe_get_full_optimizer_state

        zero, found = self._engine.optimizer, {}
        for flat, parameters in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups):
            for p in parameters:
                values = {"step": zero.optimizer.state[flat]["step"]}
                values |= {name: safe_get_full_optimizer_state(p, name) for name in MOMENTS}
                if everywhere or self.accelerator.is_main_process:
                    found[p] = {name: value.to("cpu", copy=True) for name, value in values.items()}
        return found

    def groups(self, parameters: list[torch.nn.Parameter]) -> list[dict]:
        """Parameters in groups that an optimiser can update at once: sharded ones, and the scalars,
        which are not.
        """
        groups = (
            [p for p in parameters if isinstance(p, DTensor) is kind] for kind in (True, False)
        )
        return [{"params": group} for group in groups if group]

    def placed(self, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """A whole tensor on the device of `like`, and cut as `like` is: this process's part of it."""  # noqa: E501
        value = value.to(like.device)
        if not isinstance(like, DTensor) or value.shape != like.shape:
            return value
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Load whole weights."""
        now = self.model.state_dict()
        self.model.load_state_dict(
            {name: self.placed(value, now.get(name, value)) for name, value in tensors.items()}
        )

    def full(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors; sharded ones are gathered one by one onto the main process's CPU, and are
        missing from the other processes.
        """
        found = {}
        for name, value in tensors.items():
            if isinstance(value, DTensor):
                whole = cast(DTensor, value.detach()).full_tensor()
                if self.accelerator.is_main_process:
                    found[name] = whole.cpu()
            else:
                found[name] = value
        return found

    def whole(self) -> InterventionModel | None:
        """The model with whole weights, for sampling and saving; a copy in the main process and
        `None` in the others if it is sharded.
        """
        if not self.sharded:
            return self.model
        tensors = self.full(self.model.state_dict())
        if not self.accelerator.is_main_process:
            return None
        model = copy.deepcopy(self._skeleton)
        model.load_state_dict(tensors, assign=True)
        return model.to(self.accelerator.device)

    def release(self) -> None:
        """Let go of what a forward pass without a backward pass gathered, which later changes of
        the weights would not reach.
        """
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _partitioned(
        self, module: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> torch.nn.Module:
        """An engine of DeepSpeed that trains what requires gradients now, with the state that the
        optimiser has so far.

        It takes the place of the one before: what is trained, and so what is partitioned, is fixed
        once for an engine."""
        import deepspeed
        from deepspeed.utils import safe_set_full_optimizer_state

        state = dict(self.optimizer_state(optimizer, everywhere=True))
        if self._engine is None:
            self._groups = [dict(group) for group in optimizer.param_groups]
        else:
            self._engine.destroy()
        groups = [
            group | {"params": [p for p in group["params"] if p.requires_grad]}
            for group in self._groups
        ]
        optimizer.param_groups[:] = [group for group in groups if group["params"]]
        optimizer.state.clear()
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = (
            False  # on CPUs it would compile a substitute for gloo
        )
        config = {
            # must be given; only DeepSpeed's own logs depend on it
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": ZERO_BUCKET},
            "zero_allow_untested_optimizer": True,
            # DeepSpeed turns off an autocast that it is not told of; by its own list it would sum
            # gradients of many layers in bf16.
            "torch_autocast": {
                "enabled": self.accelerator.mixed_precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            },
        }
        for p in self.model.parameters():
            if p.ndim == 0:
                # not to be sent to the others, which have the same: DeepSpeed cannot send scalars
                cast(Any, p).ds_optim_param = True
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        # they take times, and would keep an engine that was replaced
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        zero = engine.optimizer
        for flat, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups):
            steps = next((state[p]["step"] for p in group if p in state), torch.zeros(()))
            optimizer.state[flat] = {"step": steps.to(flat.device)} | {
                name: torch.zeros_like(flat) for name in MOMENTS
            }
        zero._lazy_init_hp_params_optimizer_state()
        for p, values in state.items():
            for name in MOMENTS:
                safe_set_full_optimizer_state(p, values[name], name)
        return engine


def _check_deepspeed(accelerator: Accelerator) -> None:
    if not is_deepspeed_available():
        raise ValueError("DeepSpeed is not installed: pip install 'hf-intervene[deepspeed]'.")
    # what the launcher was told, a file of DeepSpeed's own aside
    plugin = DeepSpeedPlugin(hf_ds_config="none")
    asked = (
        plugin.zero_stage,
        plugin.offload_optimizer_device,
        plugin.offload_param_device,
        plugin.gradient_clipping,
    )
    # this and clipping are settings of the trainer
    accumulates = plugin.gradient_accumulation_steps not in (
        "auto",
        1,
    )
    if (
        asked != (2, "none", "none", "auto")
        or accumulates
        or "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ
    ):
        raise ValueError(
            "the trainer runs DeepSpeed with zero_stage 2, without offloading,"
            " gradient_accumulation_steps, gradient_clipping and deepspeed_config_file: see"
            " training/configs/accelerate/zero2.yaml."
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError(
            "the trainer does not run DeepSpeed under mixed_precision fp16: use bf16 or no."
        )


def _shard(accelerator: Accelerator, model: InterventionModel) -> None:
    plugin = FullyShardedDataParallelPlugin()  # what the launcher was told
    if (
        plugin.fsdp_version != 2
        or plugin.activation_checkpointing
        or plugin.cpu_ram_efficient_loading
        or _offloads(plugin)
    ):
        raise ValueError(
            "the trainer shards with fsdp_version 2, without fsdp_offload_params,"
            " fsdp_activation_checkpointing and fsdp_cpu_ram_efficient_loading: see"
            " training/configs/accelerate/fsdp.yaml."
        )
    if accelerator.mixed_precision == "fp16":
        raise ValueError("the trainer does not shard under mixed_precision fp16: use bf16 or no.")
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    # Only the blocks the pretrained model names are gathered one at a time; of the rest, which is
    # small, some is used from outside a `forward`, where nothing would gather it: it is gathered
    # with the first call and let go after the backward pass.
    names = (
        plugin.transformer_cls_names_to_wrap
        or getattr(model.base.model, "_no_split_modules", None)
        or ()
    )
    blocks = [module for module in model.base.model.modules() if type(module).__name__ in names]
    # cannot be cut: whole in every process, as under DDP
    scalars = {p for p in model.parameters() if p.ndim == 0}
    frozen = {
        p for companion in model.base.companion_models().values() for p in companion.parameters()
    }
    for module in reversed(blocks):
        fully_shard(
            module,
            mesh=mesh,
            reshard_after_forward=plugin.reshard_after_forward,
            ignored_params=scalars | frozen,
        )
    fully_shard(model, mesh=mesh, ignored_params=scalars | frozen)
    for p in scalars:
        if p.requires_grad:
            p.register_hook(lambda gradient: reduce(gradient, "mean"))


def _offloads(plugin: FullyShardedDataParallelPlugin) -> bool:
    return type(plugin.cpu_offload).__name__ == "CPUOffloadPolicy"


def _without_weights(model: InterventionModel) -> InterventionModel:
    """A copy whose parameters have shapes but no values."""
    memo = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)
