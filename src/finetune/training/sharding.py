"""strategy fsdp2: a model <-> one shard of every weight for each process, and whole tensors for checkpoints and outs.

torch's fully_shard (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html) puts a layer's weights
together when it runs, forward and backward, and leaves each process the sum of its shard's gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.distributed import DistributedConfig

from finetune.training.distribution import writes_files


def shard(model: Any) -> Any:
    """Leave each process a shard of every weight of `model`, in place, on its device; returns the model.

    The process group must exist, and all processes must hold the same values. What transformers 5.23 notes on a model
    that it has sharded itself is noted here too: its trainer then neither wraps nor moves it, and sums the gradients
    of an optimizer step once.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if type(module).__name__ in base._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    base._is_distributed_loading_by_transformers = base._is_fsdp_managed_module = True
    base.config.distributed_config = DistributedConfig(fsdp_size=dist.get_world_size())
    return model


def reshard(model: Any) -> None:
    """Let go of the weights that a forward pass without a backward, such as a validation, has left together."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor of which each process holds a shard; any other one as it is. All processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def as_shard(value: torch.Tensor, pattern: torch.Tensor) -> torch.Tensor:
    """`value`, whole on each process, split as `pattern` is; as it is where that is no shard. All must call it."""
    if not isinstance(pattern, DTensor) or value.shape != pattern.shape:
        return value
    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements)


def load_whole_state(optimizer: torch.optim.Optimizer, content: Mapping[str, Any]) -> None:
    """Put back a `state_dict()` of whole tensors, each process its shard."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {
            name: as_shard(value, parameters[number]) if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }
        for number, state in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": states})


@torch.no_grad()
def unshard_trained(model: Any) -> None:
    """Put whole weights, on the CPU of the process that writes, in place of its shards of trained ones, in place.

    For saving after the last step: a sharded model cannot run any more then. All processes must call it.
    """
    made: dict[torch.Tensor, Any] = {}
    reshard(model)
    for module in model.modules():
        for name, weight in list(module._parameters.items()):
            if not isinstance(weight, DTensor) or not weight.requires_grad:
                continue
            if weight not in made:
                value = weight.full_tensor()
                made[weight] = torch.nn.Parameter(value.cpu()) if writes_files() else weight
            module._parameters[name] = made[weight]
