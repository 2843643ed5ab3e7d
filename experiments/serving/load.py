"""How fast and how fairly `gptpl serve` answers many clients, beside `transformers serve` and LitServe.

    python experiments/serving/load.py --peers PYTHON    # about 9 minutes; nothing else should run
    python experiments/serving/load.py --soak 3600       # an hour at a bounded rate: memory, leaked rows

Every server is a process of its own around the same files. One asynchronous client asks all of them; they
take turns, and those whose turn it is not are halted. PYTHON is that of an environment with gptpl and the
peers; a peer that does not start is named in the result. Tables go into README.md, all figures into
result.json and soak.json.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
import torch
from tqdm import tqdm

from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import GPT2Tokenizer
from gptpl.tokenizers.hugging_face import write_tokenizer
from gptpl.weights.hugging_face import write_files

HERE = Path(__file__).parent
COMMON = {"vocab_size": 50257, "drop_rate": 0.0, "qkv_bias": True, "tie_weights": True}
SHAPES = {
    "gpt2_small": GPTConfig(**COMMON, context_length=1024, emb_dim=768, n_heads=12, n_layers=12),
    "tiny": GPTConfig(**COMMON, context_length=64, emb_dim=64, n_heads=4, n_layers=2),
}
NEW_TOKENS = {1: 32, 8: 32, 64: 16}  # by the number of clients
PROMPT, MIXED, LONG, READERS, SHORT = 16, (8, 16, 32), 1000, 2, 10
TARGETS = {"8 clients / 1 client": 3.0, "gptpl / the better peer, 8 clients": 1.5}
LOAD, SOAK = "load", "soak"


# --- servers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A server's command, in which PORT and FOLDER are replaced, and how it is asked."""

    command: tuple[str, ...]
    path: str = "/v1/completions"
    body: dict[str, Any]
    clients: tuple[int, ...] = tuple(NEW_TOKENS)
    """Numbers of clients that it is measured with."""


def contestants(peers: str) -> dict[str, Contestant]:
    ours = (sys.executable, "-m", "gptpl", "serve", "checkpoint=FOLDER", "port=PORT")
    # Random weights could choose the end of text; the peers' files name none.
    body = {"logit_bias": {"50256": -100}, "stream_options": {"include_usage": True}}
    theirs = (peers, "-m", "transformers.cli.transformers", "serve", "FOLDER", "--device", "cpu")
    theirs += ("--host", "127.0.0.1", "--port", "PORT")
    # By default its cache takes most of the machine's memory, 14 GB for the tiny model; this is twice ours.
    pages = ("--continuous-batching", "--cb-block-size", "32", "--cb-num-blocks", "512")
    pages += ("--cb-max-batch-tokens", "256")
    lit = (peers, str(HERE / "litserve_peer.py"))
    model = {"model": "FOLDER"}
    return {
        "gptpl": Contestant(command=ours, body=body),
        "gptpl, 64 rows": Contestant(command=(*ours, "max_rows=64"), body=body, clients=(64,)),
        # It writes one text after the other: 64 clients would see what 8 do, for minutes.
        "transformers": Contestant(command=theirs, body=model, clients=(1, 8)),
        "transformers, continuous": Contestant(command=(*theirs, *pages), body=model),
        "LitServe, transformers' model": Contestant(
            command=(*lit, "transformers", "FOLDER", "PORT"), path="/predict", body={}
        ),
        "LitServe, gptpl's decoding": Contestant(
            command=(*lit, "gptpl", "FOLDER", "PORT"), path="/predict", body={}
        ),
    }


def write_model(folder: Path, config: GPTConfig) -> None:
    """Random weights and GPT-2's tokenizer, as files that all servers read."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    tokenizer, model = GPT2Tokenizer(), GPTModel(config)
    # Probabilities like a trained model's: a processor is slow with numbers below the smallest normal one.
    model.final_norm.weight.data.fill_(0.1)
    # Bytes that are no text on their own are never the likeliest: a text of nothing else would show nothing.
    whole = [piece.decode("utf-8", "replace").encode() == piece for piece in tokenizer.vocabulary_bytes()]
    model.tok_emb.weight.data[~torch.tensor(whole)] = 0.0
    write_files(model, folder, tokenizer=tokenizer, dtype="float32")
    write_tokenizer(tokenizer, folder, context_length=config.context_length)
    for name in ("config.json", "generation_config.json"):  # texts are to have their full length
        content = json.loads((folder / name).read_text("utf-8"))
        (folder / name).write_text(json.dumps(content | {"eos_token_id": None}), "utf-8")


class Server:
    """A server that runs, halted but within `awake`."""

    def __init__(self, contestant: Contestant, folder: Path, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        names = {"PORT": str(port), "FOLDER": str(folder)}

        def named(text: str) -> str:
            return re.sub("PORT|FOLDER", lambda found: names[found[0]], text)

        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [named(each) for each in contestant.command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
        self._log, self.clients = log, contestant.clients
        self.root = f"http://127.0.0.1:{port}"
        self.url = self.root + contestant.path
        self.body = {
            key: named(value) if isinstance(value, str) else value for key, value in contestant.body.items()
        }

    async def ready(self, session: aiohttp.ClientSession) -> None:
        """Wait until a text is written. Raises RuntimeError, with its last output, if it does not start."""
        until = time.monotonic() + 120
        while True:
            try:
                await ask(session, self, "The beginning", 4)
                return
            except (aiohttp.ClientError, RuntimeError) as error:
                if self._process.poll() is None and time.monotonic() < until:
                    await asyncio.sleep(0.3)
                    continue
                lines = self._log.read_text("utf-8", "replace").strip().splitlines()
                raise RuntimeError(f"{error}; its output ends: {' / '.join(lines[-3:])[-500:]}") from error

    @property
    def processes(self) -> list[psutil.Process]:
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    @property
    def megabytes(self) -> float:
        return sum(each.memory_info().rss for each in self.processes) / 2**20

    @contextmanager
    def awake(self) -> Iterator[None]:
        self.signal(signal.SIGCONT)
        try:
            yield
        finally:
            self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """To all of its processes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        self.signal(signal.SIGKILL)
        self._process.wait()


# --- a client -------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Answer:
    """When a request began, and when its pieces of text came, in seconds."""

    tokens: int
    started: float
    arrivals: list[float]

    @property
    def first(self) -> float:
        return self.arrivals[0] - self.started

    @property
    def seconds(self) -> float:
        return self.arrivals[-1] - self.started


async def ask(
    session: aiohttp.ClientSession, server: Server, prompt: str, tokens: int, **more: Any
) -> Answer:
    """A text of so many tokens. Raises RuntimeError for an error, and for a text of another length."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, "stream": True} | server.body | more
    started = time.perf_counter()
    arrivals, written = [], None
    async with session.post(server.url, json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            if any(choice.get("text") for choice in event["choices"]):
                arrivals.append(time.perf_counter())
            if event.get("usage"):
                written = event["usage"]["completion_tokens"]
    if written not in (None, tokens) or not arrivals:
        raise RuntimeError(f"{tokens} tokens were asked for, {written} written, in {len(arrivals)} pieces")
    return Answer(tokens=tokens, started=started, arrivals=arrivals)


class Prompts:
    """Prompts of words that are a token each, no two alike: no server can answer from what it has read."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        tale = (files("gptpl.data") / "texts/tale.txt").read_text("utf-8")
        encode = GPT2Tokenizer().encode
        words = sorted(set(re.findall(r"(?<= )[a-z]+", tale)))
        self._words = [word for word in words if len(encode(" " + word)) == 1]

    def of(self, tokens: int) -> str:
        return " ".join(["The", *self._random.choices(self._words, k=tokens - 1)])


# --- what is measured -----------------------------------------------------------------------------------


def summary(answers: Sequence[Answer], *, began: float, in_turn: int = 1) -> dict[str, Any]:
    """Tokens per second of all, and in milliseconds how long clients wait for the first and the next tokens.

    `in_turn` texts of a client follow one another.
    """
    ended = max(answer.arrivals[-1] for answer in answers)
    gaps = [1000 * (b - a) for answer in answers for a, b in pairwise(answer.arrivals)]
    first = [1000 * answer.first for answer in answers]
    rates = [answer.tokens / answer.seconds for answer in answers]
    found = {
        "tokens_per_second": sum(answer.tokens for answer in answers) / (ended - began),
        "first_token_ms": list(np.percentile(first, (50, 95))),
        "between_tokens_ms": list(np.percentile(gaps, (50, 95))) if gaps else None,
    }
    if in_turn == 1 and len(answers) > 1:
        found["fastest_over_slowest_client"] = max(rates) / min(rates)
    return found


async def together(
    session: aiohttp.ClientSession, server: Server, texts: Sequence[Sequence[tuple[str, int]]]
) -> Any:
    """So many clients at a time, each of which asks for its texts one after the other."""

    async def client(own: Sequence[tuple[str, int]]) -> list[Answer]:
        return [await ask(session, server, *each) for each in own]

    began = time.perf_counter()
    answers = await asyncio.gather(*map(client, texts))
    in_turn = max(map(len, texts))
    return summary([each for own in answers for each in own], began=began, in_turn=in_turn)


async def short_beside_long(
    session: aiohttp.ClientSession, server: Server, prompts: Prompts
) -> dict[str, Any]:
    """Milliseconds of short requests, alone and while others have long prompts read without a pause."""

    async def shorts(number: int) -> list[Answer]:
        return [await ask(session, server, prompts.of(10), SHORT) for _ in range(number)]

    async def reader() -> None:
        while True:
            await ask(session, server, prompts.of(LONG), 8)

    alone = await shorts(3)
    async with asyncio.TaskGroup() as group:
        readers = [group.create_task(reader()) for _ in range(READERS)]
        await asyncio.sleep(0.5)
        beside = await shorts(3)
        for task in readers:
            task.cancel()
    await asyncio.sleep(0.5)
    return {
        "alone_ms": 1000 * statistics.median(each.seconds for each in alone),
        "beside_ms": 1000 * statistics.median(each.seconds for each in beside),
        "first_token_beside_ms": 1000 * statistics.median(each.first for each in beside),
        "slowest_beside_ms": 1000 * max(each.seconds for each in beside),
    }


async def turn(
    session: aiohttp.ClientSession,
    server: Server,
    prompts: Prompts,
    *,
    clients: Sequence[int],
    context: int,
) -> dict[str, Any]:
    """All that is measured of a server, once; mixed and long requests only with all numbers of clients."""
    found: dict[str, Any] = {}
    for number in sorted({*clients} & {*server.clients}):
        tokens = min(NEW_TOKENS[number], context - PROMPT - 4)
        texts = [[(prompts.of(PROMPT), tokens)] for _ in range(number)]
        found[f"{number} clients"] = await together(session, server, texts)
    if {*clients} & {*server.clients} == {*NEW_TOKENS}:
        orders = [MIXED[i % 3 :] + MIXED[: i % 3] for i in range(8)]
        texts = [[(prompts.of(PROMPT), tokens) for tokens in order] for order in orders]
        found["8 clients, mixed"] = await together(session, server, texts)
        if context > LONG:
            found["short beside long"] = await short_beside_long(session, server, prompts)
    found["megabytes"] = server.megabytes
    return found


async def compare(
    shape: str, options: argparse.Namespace, scratch: Path, done: Callable[[dict[str, Any]], None]
) -> None:
    """Every contestant in turn, so many turns: medians of all figures, and ratios within each turn.

    After each turn `done` is given those so far.
    """
    folder = scratch / shape
    write_model(folder, SHAPES[shape])
    prompts = Prompts(seed=0)
    turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    failed: dict[str, str] = {}
    timeout = aiohttp.ClientTimeout(total=900)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        with ExitStack() as stack:
            servers = {}
            for name, contestant in contestants(options.peers).items():
                if not {*contestant.clients} & {*options.clients}:
                    continue
                log = scratch / f"{shape}-{len(servers) + len(failed)}.log"
                server = Server(contestant, folder, log)
                stack.callback(server.end)
                try:
                    await server.ready(session)
                except RuntimeError as error:
                    failed[name] = str(error)
                    print(f"{name} is left out: {error}", file=sys.stderr)
                    continue
                server.signal(signal.SIGSTOP)
                servers[name] = server
            with tqdm(total=options.turns * len(servers), desc=shape, unit="turn") as bar:
                for _ in range(options.turns):
                    for name, server in servers.items():
                        bar.set_postfix_str(name)
                        with server.awake():
                            await ask(session, server, prompts.of(PROMPT), 8)
                            measured = await turn(
                                session,
                                server,
                                prompts,
                                clients=options.clients,
                                context=SHAPES[shape].context_length,
                            )
                        turns[name].append(measured)
                        bar.update()
                    done(
                        {
                            "contestants": {name: medians(each) for name, each in turns.items()},
                            "ratios": ratios(turns),
                            "failed": failed,
                            "turns": turns,
                        }
                    )


def medians(turns: Sequence[Any]) -> Any:
    """The median of each number over the turns."""
    if isinstance(turns[0], dict):
        return {name: medians([each[name] for each in turns]) for name in turns[0]}
    if isinstance(turns[0], list):
        return [medians(each) for each in zip(*turns, strict=True)]
    return turns[0] if turns[0] is None else round(statistics.median(turns), 2)


def ratios(turns: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Ratios of tokens per second within a turn: median, least, most."""

    def rates(name: str, load: str) -> list[float]:
        return [each[load]["tokens_per_second"] for each in turns[name]]

    def of(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
        each = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        return [round(number, 2) for number in (statistics.median(each), each[0], each[-1])]

    found = {"8 clients / 1 client": of(rates("gptpl", "8 clients"), rates("gptpl", "1 clients"))}
    for name in turns:
        if not name.startswith("gptpl"):
            for load in sorted({"8 clients", "8 clients, mixed"} & turns[name][0].keys()):
                found[f"gptpl / {name}, {load}"] = of(rates("gptpl", load), rates(name, load))
    if "gptpl, 64 rows" in turns:
        found["64 rows / 8 rows, 64 clients"] = of(
            *(rates(each, "64 clients") for each in ("gptpl, 64 rows", "gptpl"))
        )
    return found


# --- soak -----------------------------------------------------------------------------------------------


async def soak(seconds: float, options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Requests of all kinds at a bounded rate, one in eight by a client that leaves; what is left of them."""
    folder = scratch / options.soak_shape
    write_model(folder, SHAPES[options.soak_shape])
    ours = contestants(options.peers)["gptpl"]
    server = Server(
        Contestant(command=(*ours.command, "kept_mb=16"), body=ours.body), folder, scratch / "soak.log"
    )
    counts: dict[str, int] = defaultdict(int)
    samples: list[dict[str, float]] = []
    draw, prompts = random.Random(1), Prompts(seed=1)
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)

    async def request(session: aiohttp.ClientSession) -> None:
        kind = draw.choices(("whole", "several", "stays", "leaves"), (3, 1, 3, 1))[0]
        tokens = draw.choice((1, 8, 16, 32))
        more: dict[str, Any] = {"temperature": draw.choice((0.0, 1.0)), "n": 2 if kind == "several" else 1}
        body = {"prompt": prompts.of(draw.randint(2, 30)), "max_tokens": tokens} | server.body | more
        body["stream"] = kind in ("stays", "leaves")
        if not body["stream"]:
            del body["stream_options"]
        try:
            async with session.post(server.url, json=body) as response:
                if kind == "leaves":
                    await response.content.readline()
                    response.close()  # the connection, too
                else:
                    await response.read()
                counts[f"{kind}, status {response.status}"] += 1
        except aiohttp.ClientError as error:
            counts[f"{kind}, {type(error).__name__}"] += 1

    async def sample(session: aiohttp.ClientSession) -> dict[str, float]:
        async with session.get(server.root + "/metrics") as response:
            metrics = await response.text()
        async with session.get(server.root + "/monitor/data") as response:
            data = await response.json()
        gauges = {
            name: float(re.findall(rf"^gptpl_{name}{{.*}} (\S+)$", metrics, re.M)[0])
            for name in ("running_rows", "queued_requests", "cache_use_ratio")
        }
        main = server.processes[0]
        files_open, threads = main.num_fds(), main.num_threads()
        monitored = {"tokens": data["totals"]["tokens"], "errors": data["totals"]["errors"]}
        monitored["running_in_monitor"] = data["points"][-1]["running"] if data["points"] else 0
        own = {"minutes": round((time.monotonic() - began) / 60, 2), "megabytes": round(server.megabytes, 1)}
        return own | {"files": files_open, "threads": threads} | gauges | monitored

    try:
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            await server.ready(session)
            began = time.monotonic()
            running: set[asyncio.Task[None]] = set()
            with tqdm(total=round(seconds), desc="soak", unit="s") as bar:
                number = 0
                while (elapsed := time.monotonic() - began) < seconds:
                    if elapsed >= 5 * len(samples):
                        samples.append(await sample(session))
                        bar.update(round(elapsed) - bar.n)
                    running.add(task := asyncio.create_task(request(session)))
                    task.add_done_callback(running.discard)
                    number += 1
                    await asyncio.sleep(max(0.0, began + number / options.rate - time.monotonic()))
            await asyncio.gather(*running)
            await asyncio.sleep(6)  # a point of the monitor's series
            samples.append(await sample(session))
    finally:
        server.end()
    later = [each for each in samples if each["minutes"] >= seconds / 120]
    slope = np.polyfit([each["minutes"] / 60 for each in later], [each["megabytes"] for each in later], 1)[0]
    return {
        "seconds": seconds,
        "shape": options.soak_shape,
        "requests_per_second": options.rate,
        "counts": dict(sorted(counts.items())),
        "megabytes_an_hour_in_the_second_half": round(float(slope), 1),
        "after_all_have_ended": samples[-1],
        "samples": samples,
    }


# --- tables ---------------------------------------------------------------------------------------------


def load_tables(result: dict[str, Any]) -> str:
    lines = []
    for shape, measured in result["shapes"].items():
        number = len(measured["turns"]["gptpl"])
        loads = ("1 clients", "8 clients", "8 clients, mixed", "64 clients")
        lines += [
            f"**{shape}**, medians of {number} turns, tokens per second:",
            "",
            "| | 1 client | 8 | 8, mixed lengths | 64 | MB |",
        ]
        lines += ["|---|---|---|---|---|---|"]
        for name, each in measured["contestants"].items():
            cells = [f"{each[load]['tokens_per_second']:,.0f}" if load in each else "" for load in loads]
            lines.append(f"| {name} | {' | '.join(cells)} | {each['megabytes']:,.0f} |")
        lines += [
            "",
            "| milliseconds, median and 95 % | first token: 1 client | 8 | 64 | between tokens: 1 | 8 | 64 |",
        ]
        lines += ["|---|---|---|---|---|---|---|"]
        for name, each in measured["contestants"].items():
            cells = [
                "{:,.0f}, {:,.0f}".format(*each[load][key]) if load in each and each[load][key] else ""
                for key in ("first_token_ms", "between_tokens_ms")
                for load in ("1 clients", "8 clients", "64 clients")
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines += [
            "",
            "| fairness | fastest / slowest of 8 clients | of 64 | short request alone | beside long ones |",
        ]
        lines[-1] += " its first token | the slowest |"
        lines += ["|---|---|---|---|---|---|---|"]
        for name, each in measured["contestants"].items():
            spread = [
                f"{each[load]['fastest_over_slowest_client']:.2f}" if load in each else ""
                for load in ("8 clients", "64 clients")
            ]
            short = each.get("short beside long", {})
            keys = ("alone_ms", "beside_ms", "first_token_beside_ms", "slowest_beside_ms")
            cells = [f"{short[key]:,.0f} ms" if short else "" for key in keys]
            lines.append(f"| {name} | {' | '.join([*spread, *cells])} |")
        lines += ["", "| ratio of tokens per second | median (least - most) | wanted |", "|---|---|---|"]
        better = best_peer(measured)
        for name, (middle, least, most) in measured["ratios"].items():
            target = TARGETS.get(
                name, TARGETS["gptpl / the better peer, 8 clients"] if name == better else None
            )
            wanted = (
                "" if target is None else f"{target:g}, {'reached' if middle >= target else 'not reached'}"
            )
            lines.append(f"| {name} | {middle:.2f} ({least:.2f} - {most:.2f}) | {wanted} |")
        lines += ["", *(f"Not measured: {name}: {why}" for name, why in measured["failed"].items()), ""]
    return "\n".join(lines)


def best_peer(measured: dict[str, Any]) -> str:
    """The ratio over the fastest peer at 8 clients; that with gptpl's decoding counts, too."""
    peers = {name: each[0] for name, each in measured["ratios"].items() if name.endswith(", 8 clients")}
    return min(peers, key=peers.__getitem__, default="")


def soak_table(result: dict[str, Any]) -> str:
    samples = result["samples"]
    marks = np.unique(np.linspace(0, len(samples) - 1, 9).round().astype(int))
    names = {
        "minutes": "minute", "megabytes": "MB", "files": "open files", "threads": "threads",
        "running_rows": "rows", "queued_requests": "queued", "tokens": "tokens so far", "errors": "errors",
    }  # fmt: skip
    lines = [f"| {' | '.join(names.values())} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(f'{samples[mark][key]:,g}' for key in names)} |" for mark in marks]
    counts = ", ".join(f"{number:,} {name}" for name, number in result["counts"].items())
    minutes = result["seconds"] / 60
    lines += ["", f"{minutes:g} minutes of {result['requests_per_second']:g} requests a second: {counts}."]
    return "\n".join(lines)


def fill(mark: str, text: str) -> None:
    """Put tables into README.md, between the marks of their kind."""
    readme = HERE / "README.md"
    begin, end = f"<!-- {mark}, written by load.py: begin -->", f"<!-- {mark}: end -->"
    before, _, rest = readme.read_text("utf-8").partition(begin)
    readme.write_text(f"{before}{begin}\n\n{text.strip()}\n\n{end}{rest.partition(end)[2]}", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", default=sys.executable, help="a Python with fastapi, uvicorn and litserve")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clients", type=int, nargs="+", default=list(NEW_TOKENS), choices=list(NEW_TOKENS))
    parser.add_argument("--soak", type=float, metavar="SECONDS", help="the soak instead of the comparison")
    parser.add_argument("--soak-shape", default="tiny", choices=list(SHAPES))
    parser.add_argument("--rate", type=float, default=8.0, help="requests a second of the soak")
    parser.add_argument(
        "--output", type=Path, default=HERE, help="folder; tables are written only for its own"
    )
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # servers are ended, too
    with tempfile.TemporaryDirectory() as folder:
        if options.soak:
            record(SOAK, asyncio.run(soak(options.soak, options, Path(folder))), options.output)
            return
        result = machine() | {"shapes": {}}
        for shape in options.shapes:

            def done(measured: dict[str, Any], shape: str = shape) -> None:
                result["shapes"][shape] = measured
                record(LOAD, result, options.output)

            asyncio.run(compare(shape, options, Path(folder), done))


def record(name: str, result: dict[str, Any], output: Path) -> None:
    text = soak_table(result) if name == SOAK else load_tables(result)
    output.mkdir(parents=True, exist_ok=True)
    file = {SOAK: "soak.json", LOAD: "result.json"}[name]
    (output / file).write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    if output == HERE:
        fill(name, text)
    print(text, flush=True)


def machine() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    found = {name: version(name) for name in ("torch", "transformers", "aiohttp")}
    return {
        "cpu": cpu or platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **found,
    }


if __name__ == "__main__":
    main()
