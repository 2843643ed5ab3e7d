"""The processes that train one run together: who started them, which one this is, what they tell each other.

A launcher (torchrun, SLURM's `srun`, or anything that sets the same variables) starts a process for every
device. They meet at a key-value store, torch's `TCPStore`, where the first says which folder the run has, and
each what it is about to train: whatever differs ends all of them, with the rank that it was. Messages are
JSON: nothing that could run code is read. Lightning trains with the process group that is made here, or that
the launcher, such as Ray Train, has made.

Processes that Lightning starts itself, for the devices of one machine, have none of this: they are told by
the environment.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from gptpl.errors import InputError, ProcessError
from gptpl.text import count_text, one_line
from gptpl.training.run_log import RANKED, SLURM

_LAST_WORDS = timedelta(seconds=5)
"""How long a process that fails waits for the others: for what they say, or to be read by them."""
_MOST_DIFFERENCES = 3
_LOOKS_EVERY = 0.05  # seconds


@dataclass(frozen=True, kw_only=True)
class Launcher:
    """Who started the processes, and the place of this one among them.

    Attributes:
        name: for messages, such as "torchrun".
        rank, world_size: among all processes.
        local_rank, local_world_size: among those of this node.
        node_rank: the node's number.
        address, port: where the first process, or its launcher, can be reached.
        hosts_store: whether the launcher itself keeps a store at that address.
        told_places: False where it says nothing of local ranks: each process is taken for a node.
    """

    name: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    address: str
    port: int
    hosts_store: bool = False
    told_places: bool = True

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return self.world_size // self.local_world_size

    def __str__(self) -> str:
        """Such as "2 nodes x 4 processes, by torchrun"."""
        processes = "1 process" if self.local_world_size == 1 else f"{self.local_world_size} processes"
        return f"{count_text(self.nodes, 'node')} x {processes}, by {self.name}"


_PLACES = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
"""Of a process that has a node of its own."""


def find_launcher(found: Mapping[str, str] = os.environ) -> Launcher | None:
    """The launcher of this process, by its environment; None: it was started alone, or by Lightning.

    One that sets no LOCAL_RANK and no LOCAL_WORLD_SIZE, such as a PyTorchJob of Kubernetes, starts a process
    on every node. Raises InputError where nodes have different numbers of processes, where only some of the
    variables are set, and for those that are no numbers.
    """
    by_rank, by_slurm = {*RANKED} <= found.keys(), {*SLURM} <= found.keys()
    told_places, hosts_store = True, False
    is_alone = not found.get("RANK") or (found["RANK"], found.get("WORLD_SIZE", "1")) == ("0", "1")
    if not is_alone and not by_rank and not by_slurm:
        told_places = not found.keys().isdisjoint(_PLACES)
        found = dict(found) if told_places else dict(found) | _PLACES
        if missing := sorted({*RANKED} - found.keys()):
            raise InputError(
                f"the environment has RANK={found['RANK']}, but no {' and no '.join(missing)}: set it for"
                " every process, or start them with torchrun"
            )
        if not told_places and found.get("PET_NPROC_PER_NODE", "1") not in ("1", "auto"):
            raise InputError(
                f"the environment has PET_NPROC_PER_NODE={found['PET_NPROC_PER_NODE']}, but this is the only"
                " process of its node: start them with torchrun"
            )
        by_rank = True
    if by_rank:
        name = "torchrun" if "TORCHELASTIC_RUN_ID" in found else "the environment (RANK, WORLD_SIZE)"
        rank, world, local_rank, local, port = _numbers(found, RANKED[:-1])
        node_rank, address = rank // max(1, local), found["MASTER_ADDR"]
        hosts_store = found.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    elif by_slurm and found["SLURM_STEP_NUM_TASKS"] != "1":  # not a shell by srun
        name = "SLURM"
        rank, world, local_rank, nodes, node_rank = _numbers(found, SLURM)
        tasks = found.get("SLURM_STEP_TASKS_PER_NODE", "")  # such as 4(x2),3
        equal = nodes > 0 and world % nodes == 0 and len({*re.findall(r"(?:^|,)(\d+)", tasks)}) <= 1
        local = world // nodes if equal else 0
        nodes_named = found.get("SLURM_STEP_NODELIST") or found.get("SLURM_NODELIST") or "127.0.0.1"
        address = found.get("MASTER_ADDR") or SLURMEnvironment.resolve_root_node_address(nodes_named)
        if found.get("MASTER_PORT"):
            [port] = _numbers(found, ("MASTER_PORT",))
        else:
            [job] = _numbers({"SLURM_JOB_ID": "0", **found}, ("SLURM_JOB_ID",))
            port = 15_000 + job % 10_000  # as Lightning chooses it
    else:
        return None
    if not rank < world:
        raise InputError(
            f"{name} says that this is rank {rank} of {world} processes: the first one has rank 0"
        )
    if not local or world % local:
        raise InputError(
            f"{name} started {world} processes, not equally many on every node: start as many on each"
        )
    return Launcher(
        name=name,
        rank=rank,
        world_size=world,
        local_rank=local_rank,
        local_world_size=local,
        node_rank=node_rank,
        address=address,
        port=port,
        hosts_store=hosts_store,
        told_places=told_places,
    )


def _numbers(environment: Mapping[str, str], names: tuple[str, ...]) -> list[int]:
    for name in names:
        if not environment[name].isdecimal():
            raise InputError(f"the environment has {name}={environment[name]!r}: it must be a number")
    return [int(environment[name]) for name in names]


class LauncherEnvironment(TorchElasticEnvironment):
    """What Lightning asks about processes that it did not start, answered by a `Launcher`."""

    main_address, main_port = "", 0  # attributes in place of Lightning's properties

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.main_address, self.main_port = launcher.address, launcher.port

    def world_size(self) -> int:
        """See `Launcher`, as for all that follow."""
        return self._launcher.world_size

    def global_rank(self) -> int:  # noqa: D102
        return self._launcher.rank

    def local_rank(self) -> int:  # noqa: D102
        return self._launcher.local_rank

    def node_rank(self) -> int:  # noqa: D102
        return self._launcher.node_rank


@dataclass(kw_only=True)
class Processes:
    """The processes of a run, met at a store. All call the same methods, in turn, until one has `failed`."""

    launcher: Launcher
    store: Store
    timeout: timedelta
    setting: str = "trainer.timeout"  # for messages: what sets the timeout
    hosts: list[str] = field(default_factory=list)
    _messages: int = 0
    _over: bool = False  # all know that they end

    def gathered(self, value: Any) -> list[Any]:
        """The values, plain data, that the processes call this with, by rank.

        Raises ProcessError, which names a rank that is missing, and for one that has `failed` instead what it
        said, as InputError where it was bad input.
        """
        self._messages += 1
        ranks = list(range(self.launcher.world_size))
        self.store.set(f"{self._messages}/{self.launcher.rank}", json.dumps({"value": value}))
        values = []
        for rank, text in zip(ranks, self._texts(ranks, self.timeout), strict=True):
            if text is None:
                self._over = True
                raise ProcessError(
                    f"{self.named(rank)} has ended, or not come as far as this process within"
                    f" {self.timeout.total_seconds():g} s ({self.setting}): see what it says"
                )
            said = json.loads(text)
            if "error" in said:
                self._end_together()
                kind = InputError if said["input"] else ProcessError
                raise kind(f"{self.named(rank)} failed: {said['error']}")
            values.append(said["value"])
        return values

    def from_first(self, make: Callable[[], Any]) -> Any:
        """The plain data that rank 0 makes; where it fails, the others do."""
        value = make() if self.launcher.rank == 0 else None
        return self.gathered(value)[0]

    def seeing(self, folder: Path, *, seconds: float) -> list[bool]:
        """By rank, whether a file that the first process makes in its `folder` is soon in that of each."""
        first = self.launcher.rank == 0
        file = folder / self.from_first(lambda: f".shared-{uuid4().hex}.tmp")
        try:
            if first:
                with suppress(OSError):  # then nobody sees it
                    file.touch()
            self.gathered(None)  # it is there
            deadline = time.monotonic() + seconds
            # Not `Path.exists`, which fails within a folder that this user may not look into.
            while not (seen := os.path.exists(file)) and time.monotonic() < deadline:  # noqa: PTH110
                time.sleep(_LOOKS_EVERY)
            return self.gathered(seen)
        finally:
            if first:
                with suppress(OSError):
                    file.unlink()

    def failed(self, error: BaseException, *, reads: bool) -> None:
        """Tell the others, in place of the next message, why this process ends.

        `reads`: they are about to read that message; the process that has the store waits for it.
        """
        if self._over:
            return
        text = one_line(str(error)) or type(error).__name__
        said = {"error": text, "input": isinstance(error, InputError)}
        with suppress(RuntimeError):  # the store is gone, with the process that had it; or the others are
            self.store.set(f"{self._messages + 1}/{self.launcher.rank}", json.dumps(said))
        if reads:
            self._end_together()

    def _end_together(self) -> None:
        """All end, and know why: the one that has the store when the others have read it."""
        self._over = True
        with suppress(RuntimeError):
            self.store.set(f"read/{self.launcher.rank}", "")
            if self.launcher.rank == 0 and not self.launcher.hosts_store:
                others = range(1, self.launcher.world_size)
                self.store.wait([f"read/{rank}" for rank in others], _LAST_WORDS)

    def last_words(self) -> list[str]:
        """What other processes said when training failed, and which of them say nothing, by rank."""
        self._messages += 1
        others = [rank for rank in range(self.launcher.world_size) if rank != self.launcher.rank]
        said = []
        for rank, text in zip(others, self._texts(others, _LAST_WORDS), strict=True):
            words = "says nothing: its process or node is gone, or cannot be reached"
            if text is not None:
                words = f"failed: {json.loads(text).get('error')}"
            said.append(f"{self.named(rank)} {words}")
        return said

    def wait_to_end(self) -> None:
        """End no earlier than the first process can: a launcher ends all when one has ended.

        The first, which may have the store, goes last. Raises ProcessError where it has failed meanwhile.
        """
        self._messages += 1
        rank = self.launcher.rank
        if rank and self._texts([0], self.timeout) == [None]:
            raise ProcessError(f"{self.named(0)} has ended without a record of the stop: see what it says")
        with suppress(RuntimeError):  # the store is gone, with the process that had it
            self.store.set(f"{self._messages}/{rank}", "")
            if rank == 0:
                self._texts([*range(1, self.launcher.world_size)], _LAST_WORDS)

    def named(self, rank: int) -> str:
        """A rank in words, such as "rank 3 on node-b"."""
        return f"rank {rank}{f' on {self.hosts[rank]}' if rank < len(self.hosts) else ''}"

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError on every rank where the facts, by name, are not the same on all of them."""
        for rank, theirs in enumerate(every := self.gathered(dict(facts))):
            names = [name for name in {**every[0], **theirs} if every[0].get(name) != theirs.get(name)]
            if names:
                self._end_together()
                parts = [
                    f"{name} is {theirs.get(name)}, not {every[0].get(name)}"
                    for name in names[:_MOST_DIFFERENCES]
                ]
                more = f", and {len(names) - len(parts)} more" if len(names) > len(parts) else ""
                raise InputError(
                    f"{self.named(rank)} would train something else than {self.named(0)}: {'; '.join(parts)}"
                    f"{more}: start all with the same settings, packages and data"
                )

    def _texts(self, ranks: list[int], timeout: timedelta) -> list[str | None]:
        """What these ranks have written, or None; waits for all of them."""
        keys = [f"{self._messages}/{rank}" for rank in ranks]
        try:
            self.store.wait(keys, timeout)
            return [text.decode() for text in self.store.multi_get(keys)]
        except dist.DistStoreError:  # time is up
            return [self.store.get(key).decode() if self.store.check([key]) else None for key in keys]
        except dist.DistNetworkError:  # the store is gone, with the process that had it
            return [None] * len(keys)


def session(store: Store, launcher: Launcher, timeout: timedelta, *, setting: str = "trainer.timeout") -> str:
    """A name that all processes of this start have, and none of an earlier one at the same store.

    torchrun keeps its store when it starts processes again, and counts restarts on every node by itself. So
    each leaves a number of its own; the first collects them under a new name, until all have found theirs.
    """
    rank, ranks, own = launcher.rank, range(launcher.world_size), uuid4().hex
    name, numbers, deadline = "", [""], time.monotonic() + timeout.total_seconds()
    store.set(f"hello/{rank}", own)
    while time.monotonic() < deadline:
        if rank == 0 and store.check([f"hello/{each}" for each in ranks]):
            found = [text.decode() for text in store.multi_get([f"hello/{each}" for each in ranks])]
            if found != numbers:  # one of them was still that of an earlier start
                name, numbers = uuid4().hex, found
                store.set("session", json.dumps([name, numbers]))
            if store.check([f"found/{name}/{each}" for each in ranks[1:]]):
                store.set(f"begin/{name}", "")
                return name
        elif rank and store.check(["session"]):
            name, numbers = json.loads(store.get("session"))
            if numbers[rank : rank + 1] == [own]:
                store.set(f"found/{name}/{rank}", "")
                if store.check([f"begin/{name}"]):
                    return name
        time.sleep(_LOOKS_EVERY)
    missing = [each for each in ranks if not store.check([f"found/{name}/{each}"])] if rank == 0 else [0]
    raise ProcessError(
        f"rank {rank} has waited {timeout.total_seconds():g} s ({setting}) for rank"
        f" {', '.join(str(each) for each in missing if each != rank)} of {len(ranks)}: see what it says, or"
        " whether it was started"
    )


_met: Processes | None = None


def processes() -> Processes | None:
    """The processes that this one has met; None: it trains alone, or Lightning started the others."""
    return _met


def meet(timeout: timedelta, device: str = "cpu") -> Processes | None:
    """Meet the processes of the launcher, once, and make torch's process group; None without a launcher.

    The group is for training on such a `device`; one that is there already is used. Raises ProcessError,
    which says who is missing, and what helps, and InputError for processes that would share a device.
    """
    global _met
    launcher = find_launcher()
    has_group = dist.is_initialized() and dist.get_world_size() > 1
    if launcher is None and has_group and _met is None and "LOCAL_RANK" not in os.environ:  # not Lightning's
        raise InputError(
            f"torch has a process group of {dist.get_world_size()}, but the environment does not say which of"
            f" them this is: set {', '.join(RANKED)} for every process"
        )
    if _met is not None or launcher is None or launcher.world_size == 1:
        return _met
    first_store: TCPStore | None = None
    if has_group:  # whose own store may be at the launcher's port: this one is at a port that was free
        if launcher.rank == 0:
            first_store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False, timeout=timeout)
        on = f"cuda:{launcher.local_rank}" if dist.get_backend() == "nccl" else "cpu"
        told = torch.tensor([0 if first_store is None else first_store.port], device=on)
        dist.broadcast(told, src=0)
        launcher = replace(launcher, port=int(told.item()), hosts_store=False)
    at = f"{launcher.address}:{launcher.port}"
    hosts = launcher.rank == 0 and not launcher.hosts_store
    try:
        server = first_store or TCPStore(
            launcher.address, launcher.port, is_master=hosts, wait_for_workers=False, timeout=timeout
        )
        store = PrefixStore(f"gptpl/{session(server, launcher, timeout)}", server)
    except dist.DistError as error:
        if hosts and "EADDRINUSE" in str(error):
            raise ProcessError(
                f"port {launcher.port} of this machine is in use: give the launcher another (MASTER_PORT)"
            ) from error
        raise ProcessError(
            f"rank {launcher.rank} cannot reach rank 0 at {at} within {timeout.total_seconds():g} s"
            f" ({one_line(str(error))[:100]}): is it running, is the address that of the first node, does a"
            " firewall close the port?"
        ) from error
    met = Processes(launcher=launcher, store=store, timeout=timeout)
    met.hosts = met.gathered(socket.gethostname())
    for rank, host in enumerate(met.hosts):
        if not launcher.told_places and (first := met.hosts.index(host)) != rank:
            met._end_together()
            raise InputError(
                f"{met.named(first)} and {met.named(rank)} share a machine, but the environment has no"
                " LOCAL_RANK and no LOCAL_WORLD_SIZE: set them for every process, or start them with torchrun"
            )
    if has_group:
        _met = met
        return met
    backend = "nccl" if device == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=PrefixStore("group", store), rank=launcher.rank,
            world_size=launcher.world_size, timeout=timeout,
        )  # fmt: skip
    except RuntimeError as error:
        raise ProcessError(
            f"{met.named(launcher.rank)} met the others at {at}, but cannot connect to them by {backend}"
            f" ({one_line(str(error))[:200]}): name the network interface that joins them, in"
            f" {'NCCL' if backend == 'nccl' else 'GLOO'}_SOCKET_IFNAME"
        ) from error
    _met = met
    return met
