"""Several hosts on one machine: what their network costs a step, and a hundred kills of a process or a host.

    python experiments/data_parallel/hosts.py overhead [--rounds 3] [--steps 12]
    python experiments/data_parallel/hosts.py kills [--kills 100] [--steps 6000]

Hosts are network namespaces joined by a switch, or by a wire with a delay; torchrun starts a process on each.
Needs root, and Linux with the program `ip`. Writes overhead.json or kills.json next to this file, or into
--output.
"""

import argparse
import csv
import fcntl
import heapq
import json
import os
import platform
import random
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from tqdm import tqdm

from gptpl.checkpoints.files import CheckpointFolder, verify
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.resume_state import state_digest

HERE = Path(__file__).parent
PORT = 29500
MODELS = {
    "gpt2_small, 4 x 256": ("model=gpt2_small", "model.context_length=256", "data=tale"),
    "tiny, 4 x 64": ("experiment=quick",),
}
"""Shapes of a global batch, 2 sequences on each of two processes."""
SMALL = (
    *("experiment=quick", "model.drop_rate=0.1", "data.batch_size=4", "eval_every_n_steps=100"),
    *("~callbacks.sample_text", "callbacks.checkpoint_last.every_n_steps=1", "trainer.max_epochs=1000"),
)
"""The run that is killed."""


# --- hosts ----------------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    """Run the program `ip`."""
    subprocess.run(["ip", *arguments], check=True, timeout=20, capture_output=True)


class Wire(threading.Thread):
    """Carries packets between two TUN devices, each `delay` seconds after it came."""

    def __init__(self, names: Sequence[str], delay: float) -> None:
        super().__init__(daemon=True)
        self._delay, self._ends = delay, []
        for name in names:
            end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            fcntl.ioctl(end, 0x400454CA, struct.pack("16sH", name.encode(), 0x1001))  # TUNSETIFF, TUN | NO_PI
            self._ends.append(end)

    def run(self) -> None:
        """Forward until a device is gone."""
        other = dict(zip(self._ends, reversed(self._ends), strict=True))
        under_way: list[tuple[float, int, int, bytes]] = []
        number = 0
        while True:
            wait = max(0.0, under_way[0][0] - time.monotonic()) if under_way else 1.0
            try:
                for end in select.select(self._ends, [], [], wait)[0]:
                    with suppress(BlockingIOError):
                        while packet := os.read(end, 65_535):
                            number += 1
                            due = time.monotonic() + self._delay
                            heapq.heappush(under_way, (due, number, other[end], packet))
                while under_way and under_way[0][0] <= time.monotonic():
                    *_, end, packet = heapq.heappop(under_way)
                    with suppress(BlockingIOError):  # the queue is full: TCP sends it again
                        os.write(end, packet)
            except OSError:
                for end in self._ends:
                    os.close(end)
                return


class Hosts(ExitStack):
    """`count` network namespaces that reach each other alone, until the end of a `with`.

    What still runs on them is then killed, however the `with` ends.
    """

    def __init__(self, count: int, *, delay_ms: float = 0) -> None:
        super().__init__()
        self.names = [f"gptpl-{os.getpid()}-{number}" for number in range(count)]
        self.ends = [f"gp{os.getpid()}h{number}" for number in range(count)]
        self._delay = delay_ms / 1000
        if delay_ms and count != 2:
            raise ValueError("a wire has two ends")

    def __enter__(self) -> "Hosts":
        """Make them. Raises CalledProcessError or OSError without the rights."""
        with ExitStack() as made:
            switch = f"gptpl-{os.getpid()}-switch"
            for name in (*self.names, switch):
                ip("netns", "add", name)
                made.callback(ip, "netns", "delete", name)
                made.callback(kill_host, name)
            if self._delay:
                Wire(self.ends, self._delay).start()
            else:
                ip("-n", switch, "link", "add", "switch", "type", "bridge")
                ip("-n", switch, "link", "set", "switch", "up")
                for number, end in enumerate(self.ends):
                    ip("link", "add", end, "type", "veth", "peer", "name", f"port{number}", "netns", switch)
                    ip("-n", switch, "link", "set", f"port{number}", "master", "switch", "up")
            for number, (name, end) in enumerate(zip(self.names, self.ends, strict=True)):
                ip("link", "set", end, "netns", name)
                ip("-n", name, "addr", "add", f"{self.address(number)}/24", "dev", end)
                ip("-n", name, "link", "set", end, "up")
                ip("-n", name, "link", "set", "lo", "up")
            self.push(made.pop_all())
        return self

    def command(self, number: int) -> list[str]:
        """What stands before a command that is to run on a host."""
        device = f"GLOO_SOCKET_IFNAME={self.ends[number]}"
        return ["ip", "netns", "exec", self.names[number], "env", device]

    @staticmethod
    def address(number: int) -> str:
        """The address of a host."""
        return f"10.201.9.{number + 1}"

    def torchrun(
        self, number: int, command: Sequence[str], log: Path, *, restarts: int = 0
    ) -> subprocess.Popen[bytes]:
        """Start torchrun on a host, with one process and a cache of its own."""
        environment = os.environ | {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # else a host that comes later is not told the address
            "OMP_NUM_THREADS": "1",
            "GPTPL_CACHE": str(log.with_suffix(".cache")),
        }
        with log.open("ab") as output:
            return subprocess.Popen(
                [
                    *(*self.command(number), sys.executable, "-m", "torch.distributed.run"),
                    *("--nnodes", str(len(self.names)), "--nproc-per-node", "1"),
                    *("--max-restarts", str(restarts), "--rdzv-backend", "c10d", "--rdzv-id", "hosts"),
                    *("--rdzv-endpoint", f"{self.address(0)}:{PORT}", "--local-addr", self.address(number)),
                    f"--rdzv-conf=is_host={int(number == 0)},last_call_timeout=1,read_timeout=20",
                    *("-m", "gptpl", "train", *command),
                ],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def processes_of(agent: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The processes that an agent has started, which train."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(agent.pid).children(recursive=True)
        return [each for each in below if "torch.distributed.run" not in each.cmdline()]
    return []


def kill_host(namespace: str) -> None:
    """Kill all that runs in a network namespace, until nothing does.

    torchrun starts its processes in sessions of their own, which end later than it does.
    """
    find = ["ip", "netns", "pids", namespace]
    while found := subprocess.run(find, check=True, timeout=20, capture_output=True).stdout.split():
        for process in map(int, found):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)


def kill_all(agent: subprocess.Popen[bytes]) -> None:
    """Kill an agent and what it started, as a host that loses its power."""
    doomed = processes_of(agent)
    agent.kill()
    for process in doomed:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    agent.wait()


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "versions": {name: version(name) for name in ("torch", "lightning")},
        "hardware": f"{os.cpu_count()} CPU cores, {platform.processor() or platform.machine()}",
        "load before": os.getloadavg()[0],
    }


# --- what a step costs ----------------------------------------------------------------------------------


def seconds_a_step(run_dir: Path, tokens: int) -> float:
    """The average of a run's last steps, as its throughput says."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        speeds = [row["train/tokens_per_second"] for row in csv.DictReader(file)]
    return tokens / float([speed for speed in speeds if speed][-1])


def overhead(rounds: int, steps: int) -> dict[str, Any]:
    """Seconds a step of two processes, on one host and on two, in turns."""
    result: dict[str, Any] = machine()
    ways = {"one host": 1, "two hosts": 2, "two hosts, 50 ms apart": 2}
    with tempfile.TemporaryDirectory() as folder, tqdm(total=rounds * (2 * len(ways) - 1)) as bar:
        for shape, model in MODELS.items():
            tokens = 4 * int(shape.rpartition(" ")[2])
            # A wire in Python carries GPT-2's gradients for most of a minute.
            found: dict[str, list[float]] = {way: [] for way in ways if "50 ms" not in way or "tiny" in shape}
            for turn in range(rounds):
                for way in found:
                    count = ways[way]
                    run_dir = Path(folder, f"{shape}_{way}_{turn}".replace(" ", "_").replace(",", ""))
                    command = (
                        *(*model, "data.batch_size=2", "trainer=cpu", "model.drop_rate=0", "callbacks=none"),
                        *("eval_every_n_steps=1000", "eval_val_batches=1", "eval_train_batches=1"),
                        *("trainer.max_epochs=1000", "scheduler=constant"),
                        *(f"run_dir={run_dir}", f"trainer.max_steps={steps}", "trainer.precision=32-true"),
                        *("trainer.compile=off", "trainer.attention=sdpa", "trainer.head=fused"),
                        *("+callbacks.throughput._target_=gptpl.callbacks.metrics.Throughput",),
                    )
                    log = Path(folder, f"{count}.log")
                    with Hosts(2, delay_ms=50 if "50 ms" in way else 0) as hosts:
                        if count == 1:
                            agents = [start_alone(hosts, command, log)]
                        else:
                            agents = [hosts.torchrun(n, command, log) for n in range(2)]
                        if any(agent.wait() for agent in agents):
                            raise SystemExit(f"training failed: {log.read_text()[-3000:]}")
                    found[way].append(seconds_a_step(run_dir, tokens))
                    bar.update()
            result[shape] = {
                way: {
                    "seconds a step": {
                        "median": statistics.median(times), "least": min(times), "most": max(times),
                    },
                    "of one host": statistics.median(
                        time / alone for time, alone in zip(times, found["one host"], strict=True)
                    ),
                }
                for way, times in found.items()
            }  # fmt: skip
    return result


def start_alone(hosts: Hosts, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Both processes on one host, by torchrun."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "GPTPL_CACHE": str(log.with_suffix(".cache")),
    }  # fmt: skip
    with log.open("ab") as output:
        return subprocess.Popen(
            [
                *("ip", "netns", "exec", hosts.names[0], sys.executable, "-m", "torch.distributed.run"),
                *("--standalone", "--nproc-per-node", "2", "--local-addr", "127.0.0.1"),
                *("-m", "gptpl", "train", *command),
            ],
            env=environment,
            stdout=output,
            stderr=output,
        )


# --- kills ----------------------------------------------------------------------------------------------


def newest(run_dir: Path) -> int:
    """The newest step that is saved; 0: none."""
    return max(CheckpointFolder(run_dir / "checkpoints", keep=2).steps(), default=0)


def train_with_kills(folder: Path, hosts: Hosts, kills: int, steps: int, seed: int) -> dict[str, Any]:
    """Kill a process, or a host, at random moments, and start hosts again as a cluster does, to the end."""
    draw, run_dir = random.Random(seed), folder / "killed"
    command = (*SMALL, f"run_dir={run_dir}", f"trainer.max_steps={steps}", "resume=auto")

    def start(number: int) -> subprocess.Popen[bytes]:
        return hosts.torchrun(number, command, folder / f"host_{number}.log", restarts=1000)

    agents = [start(number) for number in range(2)]
    hit: list[str] = []
    seconds: dict[str, list[float]] = {"process": [], "host": []}
    with tqdm(total=kills, unit="kill") as bar:
        while True:
            deadline = time.monotonic() + (draw.uniform(0, 12) if len(hit) < kills else 1)
            while time.monotonic() < deadline:
                for number, agent in enumerate(agents):
                    if agent.poll() is not None and agent.returncode:  # lost its partner: started again
                        agents[number] = start(number)
                time.sleep(0.05)
            if all(agent.poll() == 0 for agent in agents):
                break
            if len(hit) == kills:
                continue
            what, number = draw.choice(("process", "host")), draw.randrange(2)
            training, before = processes_of(agents[number]), newest(run_dir)
            if what == "process" and not training:
                continue  # between two starts
            killed = time.monotonic()
            if what == "host":
                kill_all(agents[number])
                agents[number] = start(number)
            else:
                training[0].kill()
            hit.append(f"{what} {number}")
            bar.update()
            if draw.random() < 0.5:  # the others hit a start as well
                while newest(run_dir) <= before + 1:  # that step may have been under way
                    for other, agent in enumerate(agents):
                        if agent.poll() is not None and agent.returncode:
                            agents[other] = start(other)
                    if time.monotonic() - killed > 300:
                        raise SystemExit(f"training did not continue after {what} {number}: see {folder}")
                    time.sleep(0.02)
                seconds[what].append(time.monotonic() - killed)
    damaged = [path.name for path in (run_dir / "checkpoints").glob("*.ckpt") if verify(path.resolve())]
    return {
        "kills": len(hit),
        "hit": dict(Counter(hit)),
        "checkpoints that did not verify": damaged,
        "times that training was resumed": len(json.loads((run_dir / "run.json").read_text())["resumed"]),
        "seconds from a kill to the next step": {
            what: {
                "median": round(statistics.median(each), 1), "least": round(min(each), 1),
                "most": round(max(each), 1), "of": len(each),
            }
            for what, each in seconds.items()
            if each
        },
    }  # fmt: skip


def kills(count: int, steps: int, seed: int) -> dict[str, Any]:
    """An unbroken run of two hosts, one with kills, and whether they end with the same bits."""
    folder = Path(tempfile.mkdtemp(prefix="gptpl-hosts-"))
    began = time.monotonic()
    with Hosts(2) as hosts:
        command = (*SMALL, f"run_dir={folder / 'unbroken'}", f"trainer.max_steps={steps}")
        agents = [hosts.torchrun(number, command, folder / f"unbroken_{number}.log") for number in range(2)]
        if any(agent.wait() for agent in agents):
            raise SystemExit(f"the unbroken run failed: see {folder}")
        print(f"unbroken: {steps} steps in {time.monotonic() - began:.0f} s", flush=True)
        found = train_with_kills(folder, hosts, count, steps, seed)
    states = [
        state_digest(read_checkpoint((folder / run / "checkpoints/last.ckpt").resolve()))
        for run in ("unbroken", "killed")
    ]
    same = {part: states[0][part] == states[1][part] for part in states[0]}
    result = machine() | found | {"steps": steps, "same as the unbroken run": same}
    if all(same.values()):
        shutil.rmtree(folder)
    return result | {"seconds": round(time.monotonic() - began)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=("overhead", "kills"))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each arrangement (default 3)")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, help="of a run (default 12, and 6000 for kills)")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of the record (default: here)")
    options = parser.parse_args()
    if options.study == "overhead":
        result = overhead(options.rounds, options.steps or 12)
    else:
        result = kills(options.kills, options.steps or 6000, options.seed)
    (options.output / f"{options.study}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    sys.exit(0 if all(result.get("same as the unbroken run", {}).values()) else 1)


if __name__ == "__main__":
    main()
