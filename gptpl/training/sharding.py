"""Fully sharded data parallelism: every process keeps its share of the weights, gradients and averages."""

from pathlib import Path
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from gptpl.errors import InputError
from gptpl.model.protocol import blocks_of, body_and_head, class_path


class FullyShardedStrategy(ModelParallelStrategy):
    """torch's FSDP2 over all processes, with the checkpoints of one process: both go on from each other's."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(save_distributed_checkpoint=False, **settings)

    def setup_environment(self) -> None:
        """Lightning would divide the data among the nodes, and each matrix among a node's devices."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @property
    def mesh(self) -> DeviceMesh:
        """All processes in a row."""
        return self.device_mesh["data_parallel"]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state, on the first process, its parameters numbered as torch does, not as Lightning."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        if not state:  # not the first process
            return state
        return _renamed(state, {old: new for new, old in enumerate(_in_order(state["param_groups"]))})

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Gives every process its share of weights and optimizer state; returns the whole checkpoint."""
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(
            self.broadcast(checkpoint_path), weights_only=weights_only
        )
        assert self.model is not None
        whole_from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=whole_from_first)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            # Lightning would take them to be numbered in the order of the model.
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


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Spreads the parameters over the processes of `mesh`, in place; they keep names and shapes.

    A block's are gathered when it is needed and let go after it; embeddings, last LayerNorm and head stay
    from the beginning of the forward pass to the end of the backward pass. Sharding again changes nothing.

    Raises InputError for a model that does not say which its blocks are.
    """
    if isinstance(net, FSDPModule):
        return
    if not blocks_of(net):
        raise InputError(
            f"trainer.strategy=fsdp divides a model block by block, {class_path(net)} has no blocks"
            " (an nn.ModuleList): use trainer=ddp"
        )
    for block in blocks_of(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    if body_and_head(net)[0] is not net:
        register_fsdp_forward_method(net, "hidden")  # after it the head is there for the loss


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this process may have a share only; all processes have to ask for it."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
