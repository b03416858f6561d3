"""Full fine-tuning with the weights shared out between processes: FSDP2, as `accelerate launch` asks for it.

Each process holds a part of every weight, of its gradient and of what the optimiser keeps; a block's weights are
brought together while the block runs (ZeRO-3), or from the forward to the backward pass (ZeRO-2).

Checkpoints hold whole tensors all the same, written by the main process: they
are the same files as those of one process, and any number of processes can go on from them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, str_to_bool
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffalign.errors import UserError


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether this launch shares weights out.

    accelerate knows FSDP on accelerators only; its settings are taken on a CPU too.
    """
    asked = accelerator.distributed_type == DistributedType.FSDP or _is_set("ACCELERATE_USE_FSDP")
    return asked and accelerator.num_processes > 1


def check_launch() -> None:
    """Look at what `accelerate launch` asks for, before accelerate does.

    Raises:
        UserError: DeepSpeed, FSDP1, or weights that only one process loads.
    """
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise UserError(
            "DeepSpeed is asked for, whose engine takes the optimiser's step inside the backward pass, so that a step "
            "that is not finite could not be left out, and keeps its state in pickles. The same saving is there by "
            "FSDP2: `diffalign recipes accelerate zero2` prints its configuration (gradients and optimiser shared "
            "out), `... fsdp2` one that shares out the weights too."
        )
    if not _is_set("ACCELERATE_USE_FSDP"):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise UserError(
            "FSDP1 is asked for, and diffalign shares weights out by FSDP2: set fsdp_version: 2 in accelerate's "
            "configuration. `diffalign recipes accelerate fsdp2` prints one."
        )
    if _is_set("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        raise UserError(
            "fsdp_cpu_ram_efficient_loading leaves the text encoders empty on all processes but one, and diffalign "
            "encodes on all: set it to false in accelerate's configuration."
        )


def _is_set(name: str) -> bool:
    return bool(str_to_bool(os.environ.get(name, "false")))


def check_sharded(config: Any) -> None:
    """Raise a UserError for settings that make no sense with weights that are shared out."""
    if config.train_mode == "lora":
        raise UserError(
            "FSDP shares out the weights that train, and a LoRA has few: run it by DDP (`diffalign recipes accelerate "
            "ddp` prints a configuration), or set train_mode: full."
        )
    if getattr(config, "heldout_prompts", None):
        raise UserError(
            "heldout_prompts: the best weights are kept by one process, which has only a part of them under FSDP. "
            "Leave heldout_prompts out, or run by DDP, and judge checkpoints with `diffalign eval`."
        )


def shard(module: nn.Module, accelerator: Accelerator, blocks: Iterable[str], *, trains: bool) -> nn.Module:
    """Share a module's weights out between the processes, in place.

    Args:
        module: on the device, whole and the same on every process.
        accelerator: of the run.
        blocks: names of the classes whose weights are brought together at once.
        trains: it has a backward pass, until which its weights may stay together.
    """
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    short = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    # Weights travel in the type that they are used in, gradients are added up in float32.
    policy = MixedPrecisionPolicy(param_dtype=short, reduce_dtype=torch.float32)
    apart = not trains or bool(str_to_bool(os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true")))
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": apart}
    names = set(blocks)
    for child in reversed(list(module.modules())[1:]):
        if type(child).__name__ in names:
            fully_shard(child, **options)
    fully_shard(module, **options)
    return module


def take_apart(*modules: nn.Module) -> None:
    """Let go of weights that are together, before and after other values are put into the parts: the next pass would
    run on the values of before."""
    for module in modules:
        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of it, or its part; the same memory."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part.detach()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, detached, on every process: where it is shared out, all of them must ask at the same place."""
    full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach()


def part_of(full: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, shared out as another one is; nothing is exchanged."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(tree: Any, keep: bool) -> Any:
    """A tree of lists and mappings with every tensor that is shared out made whole, on the CPU.

    Args:
        tree: such as the state of an optimiser; the same on every process.
        keep: whether this process wants the result; the others take part, and get None for tensors.
    """
    if isinstance(tree, Mapping):
        return {name: gathered(value, keep) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [gathered(value, keep) for value in tree]
    if not isinstance(tree, Tensor):
        return tree
    full = whole(tree)
    return full.cpu() if keep else None


def scattered(state: dict[str, Any], parameters: Iterable[Tensor]) -> dict[str, Any]:
    """The state of an optimiser with what belongs to shared-out parameters shared out like them.

    Args:
        state: ``optimizer.state_dict()`` with whole tensors.
        parameters: in the order of the optimiser.
    """
    shared = {
        index: {
            name: part_of(value, parameter) if isinstance(value, Tensor) and value.shape == parameter.shape else value
            for name, value in state["state"][index].items()
        }
        for index, parameter in enumerate(parameters)
        if index in state["state"]
    }
    return {**state, "state": shared}


def gradient_norm(norm: Tensor | float) -> Tensor:
    """The norm of a gradient as a plain tensor."""
    return whole(torch.as_tensor(norm))
