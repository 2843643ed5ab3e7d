"""Which precision, attention kernel and loss head are fastest here: measured on the model's own shapes.

A CPU's flags do not tell: of two CPUs with AVX512-BF16 one multiplies bf16 twice as fast as fp32, the other
half as fast. So one block and the head are timed, forward and backward, in every way that is allowed: all in
turn, as a machine's speed drifts, and the least of several times counts. The times are kept in the cache;
what was measured while other programs took the processors is measured again by the next runs.
"""

# B sequences, T time, D model, R positions of the head

import copy
import hashlib
import json
import logging
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any, cast, get_args

import psutil
import torch
import torch.nn.functional as F
from filelock import FileLock
from torch import Tensor, nn

from gptpl.files.download import cache_dir
from gptpl.files.durable import write_atomically
from gptpl.model.attention_kernels import FAST_KERNELS, Kernel, chosen_kernel
from gptpl.model.gpt import GPTConfig, TransformerBlock, rope_angles
from gptpl.model.loss import Head, head_loss, next_token_loss

log = logging.getLogger(__name__)

FP32, BF16 = "32-true", "bf16-mixed"
PRECISIONS = (FP32, BF16)
"""The safe one first: the other must be faster by `MARGIN`."""
MARGIN = 1.03
"""Times that differ by less are equal, for all that can be measured on a shared machine."""
CLEAR, CLEAR_SECONDS = 1.6, 5e-3
"""Where matrix products alone differ by this factor, and take so long, the slower precision is out."""
MOST_SECONDS, FEW_SECONDS, ROUNDS = 2.5, 0.3, 5
"""All are timed in turn, so often and for a few seconds at least, unless it takes too long."""
BLOCK_POSITIONS = {"cpu": 512, "cuda": 16_384}
"""Of a larger batch only so many positions are timed, in whole sequences: a GPU needs many to be busy."""
HEAD_POSITIONS = {"cpu": (32, 256), "cuda": (2048, 8192)}
"""The head is timed on so many of them, twice: its cost for each, and apart from them (casts, gradients)."""
MOST_SCORES = 2**28
"""Bytes of attention weights that torch's kernel may keep on a CPU, with dropout, to be timed there."""
SMALL_LOGITS = 2**26
"""Bytes of a batch's fp32 logits up to which the head that keeps them all is a choice."""
_INSTRUCTION_SETS = (
    *("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"),
    *("MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY"),
)
COMPILED, COMPILING = "compiled", "compiling"
"""Parts: the block when it is compiled, and the seconds that compiling took."""
LOCKED_SECONDS = 120
QUIET_PREEMPTIONS = 60
"""In a second of work: where others took the processor more often, a measurement counts as disturbed. On two
cores it was 2 to 23 without other programs, 270 to 310 with five of them."""
MOST_DISTURBED = 3
"""Disturbed measurements in a row, after which the least of their times is kept for good."""
_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What the times depend on, besides the machine: one batch of a model on one device.

    `has_head`: whether the loss is over the vocabulary, which a classifier's is not. `is_model`: whether
    `config` is the model's, or only that of a block to judge this machine by.
    """

    device: str
    config: GPTConfig
    sequences: int
    length: int
    threads: int
    has_head: bool = True
    is_model: bool = True

    @property
    def positions(self) -> int:
        """N, of one batch."""
        return self.sequences * self.length

    def timed_positions(self, part: str) -> tuple[int, ...]:
        """How many of them a part is timed on."""
        if part == "head":
            places = HEAD_POSITIONS[self.device]
            return (self.positions,) if self.positions <= places[-1] else places
        return (max(1, min(self.sequences, BLOCK_POSITIONS[self.device] // self.length)) * self.length,)

    def identity(self) -> dict[str, Any]:
        """Everything that the times depend on, as plain data."""
        config = asdict(self.config)
        for name in ("n_layers", "context_length", "tie_weights", "init"):  # the same block and head
            del config[name]
        return {
            "format": _FORMAT,
            "machine": machine_name(self.device),
            "torch": torch.__version__,
            "environment": {name: os.environ[name] for name in _INSTRUCTION_SETS if name in os.environ},
            **asdict(self),
            "config": config,
        }


@dataclass(frozen=True)
class Candidate:
    """One way to compute a part of a step for so many positions: "products", "block" or "head"."""

    part: str
    precision: str
    way: str
    positions: int

    @property
    def name(self) -> str:
        """Its name in the cache."""
        return " ".join(filter(None, (self.part, self.precision, self.way, str(self.positions))))


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Least seconds of each candidate; inf: failed, or far too slow to be timed; missing: not timed.

    `kernels` and `heads` are those to choose from.
    """

    work: Workload
    seconds: Mapping[str, float]
    kernels: Sequence[str] = FAST_KERNELS
    heads: Sequence[str] = get_args(Head)

    @property
    def measured(self) -> dict[str, float]:
        """The seconds of what was timed."""
        return {name: seconds for name, seconds in self.seconds.items() if math.isfinite(seconds)}

    @staticmethod
    def timed_as(precision: str) -> str:
        """The precision whose times stand for another's: bf16 weights are multiplied as mixed ones are."""
        return BF16 if precision == "bf16-true" else precision

    def step_seconds(self, precision: str, kernel: str | None = None, head: str | None = None) -> float:
        """Forward and backward pass of a batch; kernel and head None: the fastest. inf: not timed."""
        kernels = self.kernels if kernel is None else (kernel,)
        blocks = self.work.config.n_layers * min(self._of_batch("block", precision, way) for way in kernels)
        if not self.work.has_head:
            return blocks
        heads = self.heads if head is None else (head,)
        return blocks + min(self._of_batch("head", precision, way) for way in heads)

    def compiled_seconds(self, precision: str, kernel: str) -> tuple[float, float]:
        """Of a batch with compiled blocks, and those that compiling took; inf where it was not tried."""
        (positions,) = self.work.timed_positions(COMPILING)
        name = Candidate(COMPILING, self.timed_as(precision), kernel, positions).name
        gain = self._of_batch("block", precision, kernel) - self._of_batch(COMPILED, precision, kernel)
        step = self.step_seconds(precision, kernel) - self.work.config.n_layers * gain
        return step, self.seconds.get(name, math.inf)

    def _of_batch(self, part: str, precision: str, way: str) -> float:
        """Seconds for all positions of a batch, on the line through those that were timed."""
        places, precision = self.work.timed_positions(part), self.timed_as(precision)
        names = [Candidate(part, precision, way, place).name for place in places]
        seconds = [self.seconds.get(name, math.inf) for name in names]
        if len(places) == 1 or math.inf in seconds:
            return seconds[-1] * self.work.positions / places[-1]
        (low, high), (least, most) = places, seconds
        return most + max(0.0, most - least) * (self.work.positions - high) / (high - low)

    def precision(self) -> str:
        """The faster precision, fp32 unless bf16 gains clearly."""
        return _faster(PRECISIONS, {p: self.step_seconds(p) for p in PRECISIONS})

    def kernel(self, precision: str, safe: str) -> str:
        """The fastest attention kernel in a precision, `safe` unless another gains clearly."""
        return self._fastest("block", precision, safe, self.kernels)

    def head(self, precision: str) -> str:
        """The fastest head in a precision; "fused", which needs less memory, unless "plain" gains clearly."""
        return self._fastest("head", precision, "fused", self.heads)

    def _fastest(self, part: str, precision: str, safe: str, ways: Sequence[str]) -> str:
        ordered = (safe, *(way for way in ways if way != safe))
        return _faster(ordered, {way: self._of_batch(part, precision, way) for way in ordered})

    def gigaflops(self, precision: str) -> float | None:
        """10**9 FLOP/s of a block's matrix products, forward; None where they were not timed."""
        (positions,) = self.work.timed_positions("products")
        seconds = self.seconds.get(Candidate("products", precision, "", positions).name)
        flops = 2 * positions * self.work.config.block_matrices
        return flops / seconds / 1e9 if seconds else None

    def reason(self, precision: str) -> str:
        """Why this precision, for the log: the steps and product rates of both."""
        parts = []
        for each in sorted(PRECISIONS, key=lambda each: each != precision):
            seconds, rate = self.step_seconds(each), self.gigaflops(each)
            step = f"{seconds:.3g} s a batch" if self.work.is_model and math.isfinite(seconds) else ""
            rates = "" if rate is None else f"products at {rate:,.0f} GFLOP/s"
            parts.append(f"{each}: {', '.join(filter(None, (step, rates))) or 'not timed'}")
        measured = "measured" if self.work.is_model else "measured on a block of GPT-2,"
        return f"{measured} {'; '.join(parts)}"


def _faster(ordered: Sequence[str], seconds: Mapping[str, float]) -> str:
    """The fastest; the first of them unless another is faster by `MARGIN`."""
    safe, *others = ordered
    best = min(others, key=lambda each: seconds[each], default=safe)
    return best if seconds[best] * MARGIN < seconds[safe] else safe


# --- measuring ------------------------------------------------------------------------------------------


def can_time(device_type: str) -> bool:
    """Whether there is more than one way to choose from on such a device."""
    return device_type in ("cpu", "cuda")


def timings(
    work: Workload,
    *,
    precisions: Sequence[str],
    kernels: Sequence[str],
    heads: Sequence[str],
    again: bool = False,
) -> Timings:
    """The times of all allowed ways, from the cache or, if some are missing or `again`, measured now.

    Of several processes that ask at once one measures, the others wait for it. A cache entry that is torn, or
    of another machine, is replaced, and so is one that other programs disturbed; where the cache cannot be
    written, each run measures anew.
    """
    if 4 * work.positions * work.config.vocab_size > SMALL_LOGITS and "fused" in heads:
        heads = ("fused",)
    scores = 6 * 4 * work.config.n_heads * work.length * work.timed_positions("block")[0]
    if work.device == "cpu" and work.config.drop_rate and scores > MOST_SCORES and "blocked" in kernels:
        kernels = ("blocked",)
    ways = {"products": ("",), "block": kernels, "head": heads if work.has_head else ()}
    wanted = [
        Candidate(part, precision, way, positions)
        for part in ways
        for way in ways[part]
        for positions in work.timed_positions(part)
        for precision in precisions
    ]
    seconds = _cached(work, wanted, again=again)
    return Timings(work=work, seconds=seconds, kernels=kernels, heads=heads)


def with_compiled(times: Timings, precision: str, kernel: str) -> Timings:
    """The timings, and those of the block when it is compiled: it may take a minute to compile it."""
    wanted = [Candidate(COMPILED, times.timed_as(precision), kernel, *times.work.timed_positions(COMPILED))]
    return replace(times, seconds={**times.seconds, **_cached(times.work, wanted)})


def _cached(work: Workload, wanted: Sequence[Candidate], *, again: bool = False) -> dict[str, float]:
    """All seconds in the cache entry, with those wanted."""
    name = hashlib.sha256(json.dumps(work.identity(), sort_keys=True).encode()).hexdigest()[:32]
    file = cache_dir() / "autotune" / f"{name}.json"

    def known() -> dict[str, float] | None:
        entry = Entry() if again else read_entry(file, work)
        is_settled = entry.disturbed in (0, MOST_DISTURBED)
        return entry.seconds if is_settled and not _unknown(work, wanted, entry.seconds) else None

    if (found := known()) is not None:
        return found
    entry: Entry | None = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{file}.lock", timeout=LOCKED_SECONDS):
            if (found := known()) is not None:
                return found
            entry = _measured(file, work, wanted)
            write_atomically(file, json.dumps({"identity": work.identity(), **asdict(entry)}, indent=1))
    except OSError as error:  # also a lock that another process has for too long
        log.warning("%s cannot be kept (%s): what is fastest is measured at every start", file, error)
    return (entry or _measured(file, work, wanted)).seconds


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A cache entry: seconds by candidate; `disturbed` measurements in a row have led to them."""

    seconds: dict[str, float] = field(default_factory=dict)
    disturbed: int = 0


def read_entry(file: Path, work: Workload) -> Entry:
    """A cache entry; an empty one where it is missing, torn or of another machine or workload."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        seconds = {str(name): float(value) for name, value in content["seconds"].items()}
        disturbed = int(content.get("disturbed", 0))
        same = content["identity"] == json.loads(json.dumps(work.identity()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Entry()
    usable = same and all(value > 0 for value in seconds.values()) and 0 <= disturbed <= MOST_DISTURBED
    return Entry(seconds=seconds, disturbed=disturbed) if usable else Entry()


def _preemptions() -> tuple[int, float]:
    """How often other programs have taken the processor from this thread, and its seconds of work."""
    return psutil.Process().num_ctx_switches().involuntary, thread_time()


def _measured(file: Path, work: Workload, wanted: Sequence[Candidate]) -> Entry:
    """The entry after a measurement: an undisturbed one replaces, of disturbed ones the least counts."""
    preemptions, worked = _preemptions()
    seconds = _measure(work, wanted)
    more, until = _preemptions()
    before = read_entry(file, work)
    if more - preemptions <= QUIET_PREEMPTIONS * max(until - worked, 0.2):
        return Entry(seconds=seconds if before.disturbed else before.seconds | seconds)
    log.info("other programs took the processor meanwhile: a later run measures again")
    if before.disturbed:
        seconds = {name: min(value, before.seconds.get(name, value)) for name, value in seconds.items()}
    return Entry(seconds=before.seconds | seconds, disturbed=min(before.disturbed + 1, MOST_DISTURBED))


def _unknown(work: Workload, wanted: Sequence[Candidate], seconds: Mapping[str, float]) -> list[Candidate]:
    """Those still to be timed: not where of the precisions wanted another multiplies far faster (`CLEAR`)."""
    (positions,) = work.timed_positions("products")
    names = {each.precision: Candidate("products", each.precision, "", positions).name for each in wanted}
    products = {each: seconds[name] for each, name in names.items() if name in seconds}
    most = max(CLEAR * min(products.values(), default=0.0), CLEAR_SECONDS)
    return [
        each
        for each in wanted
        if each.name not in seconds and (each.part == "products" or products.get(each.precision, 0.0) <= most)
    ]


def _measure(work: Workload, candidates: Sequence[Candidate]) -> dict[str, float]:
    started = perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(work.threads)
    devices = [torch.cuda.current_device()] if work.device == "cuda" else []
    found: dict[str, float] = {}
    try:
        # Weights and dropout draw none of the run's numbers.
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            parts = _Parts(work)
            products = [each for each in candidates if each.part == "products"]
            _time(parts, products, found, within=MOST_SECONDS / 4)
            rest = _unknown(work, candidates, found)
            for each in rest:
                if each.part == COMPILED:
                    compiling = Candidate(COMPILING, each.precision, each.way, each.positions)
                    found[compiling.name] = parts.seconds(each)
            rest.sort(key=lambda each: not _is_safe(work, each))
            _time(parts, rest, found, within=3 * MOST_SECONDS / 4)
    finally:
        torch.set_num_threads(threads)
    if devices:
        torch.cuda.empty_cache()  # which counts as taken where free memory is asked for
    log.info("measured for %.1f s what is fastest here for this model and batch", perf_counter() - started)
    return found


def _is_safe(work: Workload, candidate: Candidate) -> bool:
    """Whether it is what is chosen where times do not differ, which is timed in any case."""
    dtype = torch.bfloat16 if candidate.precision == BF16 else torch.float32
    kernel = chosen_kernel(work.device, dtype, work.config.drop_rate)
    return candidate.part != "block" or candidate.way == kernel


def _time(
    parts: "_Parts", candidates: Sequence[Candidate], found: dict[str, float], *, within: float
) -> None:
    """Time all in turn, several times, and keep the least; what fails, or has no rival, is timed once.

    A first time that does not count warms up; on a GPU, where libraries load every kernel at its first call,
    one of each, and its seconds do not count either. After `within` seconds only what is safe is still timed,
    once.
    """
    started, rounds, left = perf_counter(), 0, list(candidates)
    on_gpu = parts.work.device == "cuda"
    for each in left if on_gpu else left[:1]:
        parts.seconds(each)
    if on_gpu:
        started = perf_counter()
    while left and (rounds < ROUNDS or perf_counter() - started < FEW_SECONDS):
        for each in left:
            late = perf_counter() - started > within
            if late and rounds:
                return
            skipped = late and not _is_safe(parts.work, each)
            seconds = math.inf if skipped else parts.seconds(each)
            found[each.name] = min(seconds, found.get(each.name, math.inf))
        left = [each for each in left if math.isfinite(found[each.name]) and _has_rival(each, left)]
        rounds += 1


def _has_rival(candidate: Candidate, others: Sequence[Candidate]) -> bool:
    """Whether a time decides something: for lack of another way it is only an estimate of the step."""
    return candidate.part == COMPILED or any(
        other.part == candidate.part and (other.precision, other.way) != (candidate.precision, candidate.way)
        for other in others
    )


class _Parts:
    """One block and the head with inputs, to be run forward and backward in every way."""

    def __init__(self, work: Workload) -> None:
        self.work, config, self.device = work, work.config, torch.device(work.device)
        D, W, T = config.emb_dim, config.ff_width, work.length
        (positions,) = work.timed_positions("block")
        with torch.device(self.device):
            self.block = TransformerBlock(config).train()
            self.x = torch.randn(positions // T, T, D, requires_grad=True)  # (B, T, D)
            self.grad = torch.randn(positions // T, T, D)
            self.rope = None
            if config.position == "rope":
                self.rope = rope_angles(torch.arange(T), D // config.n_heads, config.rope_base)
            ups = 2 if config.feed_forward == "swiglu" else 1
            shapes = [(D, 3 * D), (D, D), *[(D, W)] * ups, (W, D)]
            factors = [(torch.randn(positions, i), torch.randn(o, i)) for i, o in shapes]
            low = [(x.bfloat16(), weight.bfloat16()) for x, weight in factors]
            self.factors = {FP32: factors, BF16: low}
            if work.has_head:
                rows = work.timed_positions("head")[-1]
                self.head = nn.Linear(D, config.vocab_size, bias=False)
                self.hidden = torch.randn(1, rows, D, requires_grad=True)  # (1, R, D)
                self.targets = torch.randint(config.vocab_size, (1, rows))

    @cached_property
    def compiled(self) -> TransformerBlock:
        """Another block, compiled."""
        block = copy.deepcopy(self.block)
        block.compile()
        return block

    def seconds(self, candidate: Candidate) -> float:
        """Seconds that it takes once; inf where this machine cannot compute it."""
        run = {"products": self._products, "head": self._head}.get(candidate.part, self._block)
        self._wait()
        started = perf_counter()
        try:
            run(candidate)
            self._wait()
        except RuntimeError as error:  # such as bf16 products on an old GPU, or what cannot be compiled
            log.warning("%s failed, and is not used: %s", candidate.name, str(error).split("\n", 1)[0])
            return math.inf
        return perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _autocast(self, candidate: Candidate) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=candidate.precision == BF16)

    def _products(self, candidate: Candidate) -> None:
        with torch.no_grad():
            for x, weight in self.factors[candidate.precision]:
                F.linear(x, weight)

    def _block(self, candidate: Candidate) -> None:
        block = self.compiled if candidate.part == COMPILED else self.block
        block.attn.kernel = cast(Kernel, candidate.way)
        with self._autocast(candidate):
            y = block(self.x, rope=self.rope)
        y.backward(self.grad.to(y.dtype))
        self._forget(block.parameters(), self.x)

    def _head(self, candidate: Candidate) -> None:
        rows = slice(candidate.positions)
        hidden, targets = self.hidden[:, rows], self.targets[:, rows]
        with self._autocast(candidate):
            if candidate.way == "fused":
                loss = head_loss(hidden, self.head.weight, targets)
            else:
                loss = next_token_loss(self.head(hidden), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        self._forget(self.head.parameters(), self.hidden)

    @staticmethod
    def _forget(parameters: Iterable[Tensor], inputs: Tensor) -> None:
        for each in (*parameters, inputs):
            each.grad = None


@cache
def machine_name(device: str) -> str:
    """The model of the GPU or CPU, with its number of cores."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        facts = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
        facts = {key.strip(): value.strip() for key, value in facts.items()}
        known = ("model name", "cpu family", "model", "CPU implementer", "CPU part")  # the last two: ARM
        name = " ".join(filter(None, (facts.get(key, "") for key in known)))
    return f"{name or platform.machine()}, {os.cpu_count()} cores"
