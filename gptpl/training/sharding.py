"""Fully sharded data parallelism (FSDP2): each process has a part of the weights, gradients and averages.

torch's part of it takes most of a second to import, and is imported where it is used.
"""

import math
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from gptpl.checkpoints.files import parts_of
from gptpl.checkpoints.resume_state import one_state
from gptpl.checkpoints.sharded import Parts, Place, Share
from gptpl.errors import InputError
from gptpl.files.plain import read_plain
from gptpl.model.protocol import blocks_of, body_and_head, class_path

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


SHARDED = ("fsdp", "hsdp")
"""The names of the strategies that shard a model, over all processes or over those of each node."""


class FullyShardedStrategy(ModelParallelStrategy):
    """torch's FSDP2 over all processes, or with `per_node` over those of each node, which average.

    A checkpoint is that of one process, or with `sharded_checkpoints` in parts of which each process writes
    one; any number of processes, with any strategy, resumes either.
    """

    def __init__(
        self,
        *,
        per_node: bool = False,
        sharded_checkpoints: bool = False,
        timeout: timedelta = timedelta(minutes=30),
        **settings: Any,
    ) -> None:
        super().__init__(save_distributed_checkpoint=sharded_checkpoints, timeout=timeout, **settings)
        self._per_node = per_node
        self._sharded_checkpoints = sharded_checkpoints
        self._wait = timeout
        self._mesh: DeviceMesh | None = None

    def mesh(self) -> "DeviceMesh":
        """All processes in a row, or a row for each node; Lightning's divides each matrix among devices."""
        from torch.distributed.device_mesh import init_device_mesh

        if self._mesh is None:
            nodes = {"replicate": self.num_nodes} if self._per_node else {}
            sizes = nodes | {"shard": self.world_size // math.prod(nodes.values())}
            self._mesh = init_device_mesh(
                self.root_device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes)
            )
        return self._mesh

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state with parameters numbered as torch does, not as Lightning.

        The whole on the first process and nothing on others, or with `sharded_checkpoints` a part on each.
        """
        state: dict[str, Any] = super().optimizer_state(optimizer)
        if not state:  # not the first process
            return state
        return _renamed(state, {old: new for new, old in enumerate(in_order(state["param_groups"]))})

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Save the checkpoint, or this process's part of it."""
        if not self._sharded_checkpoints:
            super().save_checkpoint(checkpoint, filepath, storage_options)
            return
        token: str = self.broadcast(secrets.token_hex(4))
        mesh = self.mesh()
        if self._per_node and mesh.get_local_rank("replicate"):
            return  # another process has the same part
        number, of = mesh.get_local_rank("shard") + 1, mesh["shard"].size()
        share = Share(number=number, of=of, token=token, timeout=self._wait)
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=share)

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load each process's part of the weights and the optimizer state; returns the rest as well.

        Of a sharded checkpoint only the rows of this process are read, and returned with nothing sharded.
        """
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        path = Path(self.broadcast(checkpoint_path))
        if parts_of(sharded := read_plain(path), path):
            self._load_parts(sharded, path)
            return sharded
        checkpoint: dict[str, Any] = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        assert self.model is not None
        whole_from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        # A parameter that never had a gradient has no state.
        state_from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
        set_model_state_dict(self.model, checkpoint["state_dict"], options=whole_from_first)
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        states = map(one_state, checkpoint["optimizer_states"])
        for optimizer, state in zip(self.optimizers, states, strict=True):
            # Lightning would number them in the order of the model.
            ours = [names[parameter] for parameter in in_order(optimizer.param_groups)]
            named = _renamed(state, dict(enumerate(ours)))
            set_optimizer_state_dict(self.model, optimizer, named, options=state_from_first)
        return checkpoint

    def _load_parts(self, checkpoint: dict[str, Any], path: Path) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            set_optimizer_state_dict,
        )
        from torch.distributed.tensor import DTensor

        assert self.model is not None
        parts = Parts(checkpoint, path)

        def own_rows(place: Place, like: DTensor) -> Tensor:
            dim, length = _sharded_over(like), parts.length(place)
            counts = _row_counts(length, like.device_mesh.size(dim))
            before = sum(counts[: (rank := like.device_mesh.get_local_rank(dim))])
            return parts.rows(place, before, before + counts[rank]).to(self.root_device)

        with torch.no_grad():
            for name, tensor in get_model_state_dict(self.model).items():
                assert isinstance(tensor, Tensor)
                if isinstance(tensor, DTensor):
                    tensor.to_local().copy_(own_rows(("state_dict", name), tensor))
                else:
                    tensor.copy_(checkpoint["state_dict"][name])
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        states: list[dict[str, Any]] = checkpoint["optimizer_states"]
        for index, (optimizer, state) in enumerate(zip(self.optimizers, states, strict=True)):
            parameters = in_order(optimizer.param_groups)
            for place in parts.places:
                if place[:2] != ("optimizer_states", index):
                    continue
                _, _, _, number, entry = place
                like: DTensor = parameters[number]
                local = own_rows(place, like)
                shape = torch.Size([parts.length(place), *local.shape[1:]])
                stride = torch.empty(shape, device="meta").stride()
                state["state"][number][entry] = DTensor.from_local(
                    local, like.device_mesh, like.placements, shape=shape, stride=stride
                )
            named = _renamed(state, {number: names[each] for number, each in enumerate(parameters)})
            set_optimizer_state_dict(self.model, optimizer, named, options=StateDictOptions(strict=False))


def in_order(groups: Iterable[Mapping[str, Any]]) -> list[Any]:
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


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may have a part of it alone (a DTensor)."""
    return hasattr(tensor, "full_tensor")


def each_whole(
    parameters: "Sequence[DTensor]",
    rows_of: "Callable[[DTensor], Tensor]",
    function: "Callable[[DTensor, Tensor], Tensor]",
) -> "Iterator[tuple[DTensor, Tensor]]":
    """Sharded parameters, largest first, with this process's rows of a function of whole tensors.

    Each process has its rows of a tensor, `rows_of`, as it has of the parameter. The processes take turns:
    of as many tensors as there are processes each gets one, whole, applies `function`, which keeps the shape,
    and gives the others their rows. So a process sends two tensors' size at most for each that it gets, and
    has room for few. All that share a parameter have to do this together.
    """
    from torch.distributed import all_to_all_single

    left = sorted(parameters, key=torch.Tensor.numel, reverse=True)  # in a turn all do about as much
    while left:
        mesh, dim = left[0].device_mesh, _sharded_over(left[0])
        rank, ways = mesh.get_local_rank(dim), mesh.size(dim)
        turn, left = left[:ways], left[ways:]
        rows = [rows_of(parameter) for parameter in turn]
        sizes = [each.numel() for each in rows] + [0] * (ways - len(turn))  # of mine, in each tensor
        own = turn[rank] if rank < len(turn) else None
        got = [0] * ways if own is None else [n * own.shape[1:].numel() for n in _row_counts(len(own), ways)]
        flat = torch.cat([each.flatten() for each in rows])
        exchange = partial(all_to_all_single, group=mesh.get_group(dim))
        found = flat.new_empty(sum(got))
        exchange(found, flat, got, sizes)
        if own is not None:
            found = function(own, found.view(own.shape)).flatten()
        exchange(flat := torch.empty_like(flat), found, sizes, got)
        for parameter, of_it, part in zip(turn, rows, torch.split(flat, sizes), strict=False):
            yield parameter, part.view_as(of_it)


def _sharded_over(tensor: "DTensor") -> int:
    """The dimension of its mesh over which it is sharded; over others, if any, it has copies."""
    [dim] = [dim for dim, placement in enumerate(tensor.placements) if placement.is_shard()]
    return dim


def _row_counts(length: int, ways: int) -> list[int]:
    """The rows of each process, as torch.chunk divides them."""
    each = -(-length // ways)
    return [max(0, min(each, length - rank * each)) for rank in range(ways)]
