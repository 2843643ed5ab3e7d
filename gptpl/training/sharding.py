"""Fully sharded data parallelism (FSDP2): each process has a part of the weights, gradients and averages.

torch's part of it takes most of a second to import, and is imported where it is used.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from gptpl.errors import InputError
from gptpl.model.protocol import blocks_of, body_and_head, class_path

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class FullyShardedStrategy(ModelParallelStrategy):
    """torch's FSDP2 over all processes; its checkpoints are those of one process, and either resumes both."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **settings)

    def mesh(self) -> "DeviceMesh":
        """All processes in a row; Lightning's own mesh divides each matrix among a node's devices."""
        from torch.distributed.device_mesh import init_device_mesh

        return init_device_mesh(self.root_device.type, (self.world_size,))

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state on the first process, with parameters numbered as torch does, not as Lightning."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        if not state:  # not the first process
            return state
        return _renamed(state, {old: new for new, old in enumerate(_in_order(state["param_groups"]))})

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load each process's part of the weights and the optimizer state; returns the whole checkpoint."""
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(
            self.broadcast(checkpoint_path), weights_only=weights_only
        )
        assert self.model is not None
        whole_from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=whole_from_first)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # Lightning would number them in the order of the model.
            ours = [names[parameter] for parameter in _in_order(optimizer.param_groups)]
            named = _renamed(state, dict(enumerate(ours)))
            set_optimizer_state_dict(self.model, optimizer, named, options=whole_from_first)
        return checkpoint


def _in_order(groups: list[dict[str, Any]]) -> list[Any]:
    """The parameters of an optimizer's groups, or what its state calls them."""
    return [each for group in groups for each in group["params"]]


def _renamed(state: dict[str, Any], names: dict[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other names for its parameters."""
    return {
        "state": {names[old]: value for old, value in state["state"].items()},
        "param_groups": [
            {**group, "params": [names[old] for old in group["params"]]} for group in state["param_groups"]
        ],
    }


def shard(net: nn.Module, mesh: "DeviceMesh", dtype: torch.dtype = torch.float32) -> None:
    """Spread the parameters over the processes of `mesh`, in place; they keep names, shapes and type.

    A block's parameters are gathered when it is needed and freed after it; embeddings, last LayerNorm and
    head stay from the beginning of the forward pass to the end of the backward pass. With a `dtype` of half
    the bits they are gathered, and multiplied, in that type; gradients are summed in fp32. Frozen parameters
    are sharded, too. A net that is sharded already stays as it is.

    Raises InputError for a model without `blocks`.
    """
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    if isinstance(net, FSDPModule):
        return
    if not blocks_of(net):
        raise InputError(
            f"trainer.strategy=fsdp shards a model block by block, {class_path(net)} has no `blocks`"
            " (an nn.ModuleList): use trainer=ddp"
        )
    half = dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=dtype if half else None,
        reduce_dtype=torch.float32 if half else None,
        cast_forward_inputs=False,  # rotary positions stay in fp32, as without sharding
    )
    for block in blocks_of(net):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    if body_and_head(net)[0] is not net:
        register_fsdp_forward_method(net, "hidden")  # so that the loss finds the head gathered


def whole(tensor: Tensor) -> Tensor:
    """The full tensor where this process has a part of it; all processes have to call this together."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
