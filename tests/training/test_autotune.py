"""The choice by measured times: the clock is forced, the parts are run, the cache is torn."""

import json
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch

import gptpl
from gptpl.errors import InputError
from gptpl.files.download import cache_dir
from gptpl.model import GPTConfig, MultiHeadAttention
from gptpl.runs.trainer import PROCESS_FAST_PATH, timings_of
from gptpl.training import autotune
from gptpl.training.autotune import BF16, FP32, Candidate, Timings, Workload, read_entry, timings
from gptpl.training.performance import choose_fast_path, choose_precision

MEASURE = autotune._measure  # before tests/conftest.py replaces it
CONFIG = GPTConfig(
    vocab_size=100, context_length=32, emb_dim=16, n_heads=2, n_layers=3, drop_rate=0.1, qkv_bias=False
)
WORK = Workload(device="cpu", config=CONFIG, sequences=4, length=16, threads=1)
ALL: dict[str, Any] = {
    "precisions": (FP32, BF16),
    "kernels": ("blocked", "sdpa"),
    "heads": ("fused", "plain"),
}
TINY = ("model=tiny", "tokenizer=bytes", "experiment=quick", "trainer.precision=auto", "trainer.max_steps=4",
        "scheduler.warmup_steps=0", "trainer.max_epochs=null")  # fmt: skip


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Lets parts take a hundredth of a second, times the factors for words of their names. They do run."""
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_measure", MEASURE)
    now = [0.0]
    slow: dict[str, float] = {}
    run_part = autotune._Parts.seconds

    def seconds(parts: Any, candidate: Candidate) -> float:
        if run_part(parts, candidate) == math.inf:
            return math.inf
        taken = 0.01 * math.prod(factor for word, factor in slow.items() if word in candidate.name.split())
        now[0] += taken
        return taken

    monkeypatch.setattr(autotune._Parts, "seconds", seconds)
    monkeypatch.setattr(autotune, "perf_counter", lambda: now[0])
    monkeypatch.setattr(autotune, "_preemptions", lambda: (0, 0.0))
    return slow


@pytest.fixture
def run(clock, tmp_path):
    """Builds a run of a tiny model."""

    def build(*overrides: str, name: str = "run") -> gptpl.Run:
        return gptpl.build(*TINY, *overrides, f"run_dir={tmp_path / name}")

    return build


def kernels(net: torch.nn.Module) -> set[str]:
    return {module.kernel for module in net.modules() if isinstance(module, MultiHeadAttention)}


@pytest.mark.parametrize(
    ("slow", "precision", "kernel", "head"),
    [
        ({BF16: 2.0}, FP32, "blocked", "fused"),
        ({FP32: 2.0}, BF16, "blocked", "fused"),
        ({FP32: 1.02}, FP32, "blocked", "fused"),  # within the noise: the safe one
        ({"blocked": 3.0, "fused": 1.5}, FP32, "sdpa", "plain"),
        ({"blocked": 1.01, "fused": 1.02}, FP32, "blocked", "fused"),
        ({BF16: 1.3, FP32: 1.0, "sdpa": 0.5}, FP32, "sdpa", "fused"),
    ],
)
def test_a_run_takes_what_the_clock_says(run, clock, caplog, slow, precision, kernel, head):
    clock.update(slow)
    with caplog.at_level(logging.INFO):
        built = run("model.drop_rate=0.1")
    assert built.trainer.precision == precision
    assert kernels(built.module.net) == {kernel}
    assert built.module.head == head
    (line,) = (each for each in caplog.messages if each.startswith("device:"))
    assert f"precision {precision} (measured {precision}: " in line
    built.close()


def test_the_choice_and_the_times_are_recorded(run, clock):
    clock.update({FP32: 2.0, "blocked": 3.0, "fused": 1.5})
    built = run("model.drop_rate=0.1")
    built.fit()
    record = json.loads((built.run_dir / "run.json").read_text())
    assert record["performance"] == {
        "device": "cpu", "machine": autotune.machine_name("cpu"), "precision": BF16,
        "attention": "sdpa", "head": "plain", "compile": "off",
    }  # fmt: skip
    assert any(name.startswith(f"block {BF16} sdpa") for name in record["measured_seconds"])


def test_what_the_user_gives_is_taken(run, clock):
    clock.update({FP32: 3.0, "blocked": 3.0, "fused": 3.0})
    built = run("trainer.precision=32-true", "trainer.head=fused")
    assert built.trainer.precision == FP32
    assert built.module.head == "fused"
    assert kernels(built.module.net) == {"sdpa"}  # still auto


def test_a_resumed_run_keeps_its_choice(run, clock, caplog, monkeypatch):
    clock.update({BF16: 2.0})
    built = run("trainer.stop_at_step=2")
    built.fit()
    clock.clear()
    clock.update({FP32: 4.0, "blocked": 3.0})
    monkeypatch.setenv("GPTPL_CACHE", str(built.run_dir / "other-cache"))
    again = gptpl.resume(built.run_dir)
    assert again.trainer.precision == FP32
    assert kernels(again.module.net) == {"blocked"}
    assert "would choose" not in caplog.text
    again.close()
    monkeypatch.setattr("gptpl.runs.trainer.machine_name", lambda device: "another machine")
    again = gptpl.resume(built.run_dir)
    assert again.trainer.precision == FP32
    assert "this machine would choose trainer.precision=bf16-mixed (measured bf16-mixed" in caplog.text
    assert again.fit()["val/loss"] > 0


def test_a_further_process_takes_what_the_first_chose(run, clock, monkeypatch):
    clock.update({BF16: 2.0})
    first = run().performance
    clock.clear()
    clock.update({FP32: 4.0})
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv(PROCESS_FAST_PATH, json.dumps(first))
    assert run(name="further").performance == first


def test_a_run_from_before_choices_were_recorded_follows_the_hardware(run, clock):
    """Its bits are those of the old rule."""
    built = run("trainer.stop_at_step=2", "trainer.precision=auto")
    built.fit()
    file = built.run_dir / "run.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "performance"}))
    clock.update({FP32: 4.0, "fused": 9.0})
    rule = choose_fast_path(device_type="cpu", precision="auto", total_steps=4)
    again = gptpl.resume(built.run_dir)
    assert again.trainer.precision == rule.precision.precision
    assert again.module.head == "fused"


def test_a_resumed_run_with_a_given_precision_keeps_its_kernels(run, clock, monkeypatch):
    clock.update({"sdpa": 2.0})
    built = run("trainer.precision=32-true", "trainer.stop_at_step=2", "model.drop_rate=0.1")
    built.fit()
    clock.clear()
    clock.update({"blocked": 9.0, "fused": 9.0})
    monkeypatch.setenv("GPTPL_CACHE", str(built.run_dir / "other-cache"))
    again = gptpl.resume(built.run_dir)
    assert kernels(again.module.net) == {"blocked"}
    assert again.module.head == "fused"


def test_a_record_that_gptpl_has_not_written_is_refused(run):
    built = run("trainer.stop_at_step=2")
    built.fit()
    file = built.run_dir / "run.json"
    record = json.loads(file.read_text())
    for name, value in (
        *(("precision", 5), ("precision", "transformer-engine"), ("attention", "auto")),
        *(("head", ["a"]), ("compile", 1)),
    ):
        wrong = record | {"performance": record["performance"] | {name: value}}
        file.write_text(json.dumps(wrong))
        with pytest.raises(InputError, match=rf"run.json has performance.{name}=.*: correct it to one of"):
            gptpl.resume(built.run_dir)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_process_of_a_launcher_measures_for_all(run, clock, monkeypatch, caplog, rank):
    """A slow fp32 on the first; another process, where it would not be slow, takes what it is told."""
    clock.update({FP32: 2.0, "blocked": 3.0, "fused": 1.5} if rank == 0 else {BF16: 2.0})
    told: list[dict[str, str]] = []

    class Together:
        def from_first(self, make: Callable[[], Any]) -> Any:
            told.append(make() if rank == 0 else json.loads(json.dumps(CHOSEN)))
            return told[-1]

    monkeypatch.setattr("gptpl.runs.trainer.processes", Together)
    if rank:
        monkeypatch.setattr(autotune, "_measure", None)
    with caplog.at_level(logging.INFO):
        built = run("model.drop_rate=0.1")
    assert told == [CHOSEN]
    assert built.trainer.precision == BF16
    assert kernels(built.module.net) == {"sdpa"}
    assert built.module.head == "plain"
    assert f"precision {BF16} (as rank 0 measured)" in caplog.text


CHOSEN = {"precision": BF16, "attention": "sdpa", "head": "plain", "reason": "as rank 0 measured"}


def test_processes_that_others_started_do_not_measure(run, clock, monkeypatch):
    """They could not agree: each follows the hardware, as the others do."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(autotune, "_measure", None)
    rule = choose_fast_path(device_type="cpu", precision="auto", total_steps=4)
    assert run().trainer.precision == rule.precision.precision


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.batch_size=0", "batch_size"),
        ("data.batch_size=-3", "batch_size"),
        ("data.max_length=-5", "max_length"),
    ],
)
def test_impossible_shapes_are_refused_before_they_are_timed(run, monkeypatch, override, words):
    monkeypatch.setattr(autotune, "_measure", None)
    with pytest.raises(InputError, match=words):
        run(override)


@pytest.mark.parametrize(
    "overrides, words",
    [
        (("data=text_file", "data.path=nope.txt"), "nope.txt does not exist"),
        (("data=text_file",), "data.path is not set"),
        (("task=classify", "data=labelled"), "data.path is not set"),
        (("task=classify", "data=labelled", "data.path=wrong.csv"), "line 2 has no 'text'"),
        (("task=classify", "data.path=wrong.csv"), "choose data=labelled"),
        (("task=classify", "data=tale"), "task=classify cannot train on these data"),
        (("task=instruct", "data=instruction_file", "data.path=nope.json"), "nope.json does not exist"),
    ],
)
def test_wrong_data_are_refused_before_anything_is_timed(clock, monkeypatch, tmp_path, overrides, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.csv").write_text("body,label\nhello,ham\n")
    monkeypatch.setattr(autotune, "_measure", None)
    with pytest.raises(InputError, match=words):
        gptpl.build("model=tiny", "tokenizer=bytes", "trainer=cpu", "trainer.precision=auto", *overrides)


def test_what_was_not_timed_is_not_in_the_record(run, clock):
    """run.json is JSON for any program: it has no infinities."""
    clock.update({"sdpa": 10_000.0, "blocked": 5_000.0})
    built = run()
    assert "block 32-true blocked 512" in built.measured
    assert all(math.isfinite(seconds) for seconds in built.measured.values())


def test_a_vocabulary_as_large_as_the_guess_is_a_known_one(clock):
    clock.update({"fused": 2.0})
    cfg = gptpl.compose("model=tiny", "model.vocab_size=8192", "data.batch_size=1")
    times = timings_of(cfg)
    assert times is not None
    assert times.heads == ("fused", "plain")


def test_a_batch_of_unknown_size_keeps_no_logits(run, clock, monkeypatch):
    clock.update({"fused": 9.0})
    built = run("data.batch_size=auto", "data.global_batch_size=4")
    assert built.module.head == "fused"


# --- the times ------------------------------------------------------------------------------------------


def test_no_random_number_of_the_run_is_drawn(clock):
    before = torch.get_rng_state()
    timings(WORK, **ALL)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == 1


def test_every_way_is_run_on_real_parts(clock):
    """Forward and backward, in each precision: nothing is left over in the parts."""
    found = timings(WORK, **ALL).seconds
    ways = {" ".join(name.split()[:-1]) for name in found}
    assert ways == {
        *(f"products {precision}" for precision in ALL["precisions"]),
        *(f"block {precision} {way}" for precision in ALL["precisions"] for way in ALL["kernels"]),
        *(f"head {precision} {way}" for precision in ALL["precisions"] for way in ALL["heads"]),
    }


@pytest.mark.parametrize(("norm", "position", "feed_forward"), [("rmsnorm", "rope", "swiglu")])
def test_modern_blocks_are_timed_too(clock, norm, position, feed_forward):
    config = GPTConfig(**{**vars(CONFIG), "norm": norm, "position": position, "feed_forward": feed_forward})
    work = Workload(device="cpu", config=config, sequences=1, length=8, threads=1, has_head=False)
    assert math.isfinite(timings(work, **ALL).step_seconds(FP32))


def test_a_step_is_the_blocks_and_the_head_of_the_whole_batch():
    """A head of 32 positions takes 3 + 32 s, of 256 positions 3 + 256 s: of 1,024 it takes 3 + 1,024 s."""
    work = Workload(device="cpu", config=CONFIG, sequences=64, length=16, threads=1)
    assert work.timed_positions("block") == (512,)
    assert work.timed_positions("head") == (32, 256)
    seconds = {"block 32-true sdpa 512": 10.0, "head 32-true fused 32": 35.0, "head 32-true fused 256": 259.0}
    times = Timings(work=work, seconds=seconds)
    assert times.step_seconds(FP32) == pytest.approx(3 * 2 * 10 + 3 + 1024)
    assert times.step_seconds(BF16) == math.inf
    assert times.precision() == FP32


def test_rates_of_products_are_those_of_one_block():
    """Four matrices of GPT-2: 3 D D, D D, 4 D D, 4 D D weights, two operations for each of 64 positions."""
    times = Timings(work=WORK, seconds={"products 32-true 64": 2e-6})
    assert times.gigaflops(FP32) == pytest.approx(2 * 64 * 12 * 16 * 16 / 2e-6 / 1e9)
    assert times.gigaflops(BF16) is None


def test_a_precision_whose_products_are_far_slower_is_not_timed_further(clock):
    clock.update({BF16: 4.0})
    found = timings(WORK, **ALL)
    assert [name for name in found.seconds if BF16 in name] == ["products bf16-mixed 64"]
    assert found.precision() == FP32


def test_logits_that_are_large_are_not_kept_to_find_out(clock):
    config = GPTConfig(**{**vars(CONFIG), "vocab_size": 300_000})
    work = Workload(device="cpu", config=config, sequences=4, length=16, threads=1)
    assert not any("plain" in name for name in timings(work, **ALL).seconds)


def test_what_fails_on_this_machine_is_not_chosen(clock, monkeypatch, caplog):
    """As bf16 products do on some GPUs."""
    product = torch.nn.functional.linear

    def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if x.dtype == torch.bfloat16:
            raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")
        return product(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    clock.update({FP32: 9.0})
    found = timings(WORK, **ALL)
    assert found.precision() == FP32
    assert "products bf16-mixed 64 failed, and is not used: CUBLAS_STATUS_NOT_SUPPORTED" in caplog.text
    assert timings(WORK, **ALL) == found  # from the cache


def test_what_has_no_rival_is_timed_once(clock, monkeypatch):
    """fp32's products are far slower, and logits as large leave one head: its time only estimates a step."""
    times: dict[str, int] = {}
    run_part = autotune._Parts.seconds

    def seconds(parts: Any, candidate: Candidate) -> float:
        times[candidate.name] = times.get(candidate.name, 0) + 1
        return run_part(parts, candidate)

    monkeypatch.setattr(autotune._Parts, "seconds", seconds)
    clock.update({FP32: 4.0})
    config = GPTConfig(**{**vars(CONFIG), "vocab_size": 300_000})
    timings(replace(WORK, config=config), **ALL)
    assert times["head bf16-mixed fused 64"] == 1
    assert times["block bf16-mixed sdpa 64"] >= autotune.ROUNDS


def test_gradients_that_are_off_are_on_while_parts_are_timed(clock):
    with torch.no_grad():
        assert math.isfinite(timings(WORK, **ALL).step_seconds(FP32))
        assert not torch.is_grad_enabled()


def test_when_time_is_up_only_the_safe_ways_are_timed(clock):
    clock.update({"sdpa": 10_000.0, "blocked": 5_000.0})
    found = timings(WORK, **ALL)
    assert found.seconds["block 32-true blocked 64"] == 50
    assert found.seconds["block 32-true sdpa 64"] == math.inf
    assert found.kernel(FP32, "blocked") == "blocked"


class SlowAtFirst:
    """Parts of a GPU, whose libraries take 4 seconds to load what a candidate needs."""

    work = replace(WORK, device="cuda")

    def __init__(self, now: list[float]) -> None:
        self.now = now
        self.loaded: set[str] = set()

    def seconds(self, candidate: Candidate) -> float:
        taken = 0.01 if candidate.precision == BF16 else 0.1
        if candidate.name not in self.loaded:
            self.loaded.add(candidate.name)
            taken = 4.0
        self.now[0] += taken
        return taken


def test_what_a_gpu_takes_to_load_its_kernels_does_not_count(monkeypatch):
    """bf16 would otherwise be as slow as what is loaded for it."""
    now: list[float] = [0.0]
    found: dict[str, float] = {}
    monkeypatch.setattr(autotune, "perf_counter", lambda: now[0])
    candidates = [Candidate("block", precision, "sdpa", 64) for precision in (FP32, BF16)]
    autotune._time(cast(Any, SlowAtFirst(now)), candidates, found, within=2.0)
    assert found == {"block 32-true sdpa 64": 0.1, "block bf16-mixed sdpa 64": 0.01}


def test_a_gpu_is_timed_with_enough_to_do():
    work = replace(WORK, device="cuda", sequences=64, length=1024)
    assert work.timed_positions("block") == (16_384,)
    assert work.timed_positions("head") == (2048, 8192)
    assert replace(work, sequences=2).timed_positions("block") == (2048,)


def test_where_nothing_could_be_timed_the_hardware_decides(clock, monkeypatch):
    monkeypatch.setattr(autotune._Parts, "seconds", lambda parts, candidate: math.inf)
    path = choose_fast_path(
        device_type="cpu", precision="auto", total_steps=4, timings=timings(WORK, **ALL)
    )  # fmt: skip
    assert path.precision == choose_precision("cpu")


def test_a_long_context_is_not_timed_with_the_kernel_that_keeps_its_scores(clock, monkeypatch):
    """12 heads of 8,192 x 8,192 scores would be gigabytes; without dropout none are kept."""
    seen: list[str] = []

    def measure(work: Workload, candidates: Any) -> dict[str, float]:
        seen.extend(each.way for each in candidates if each.part == "block")
        return {each.name: 1.0 for each in candidates}

    monkeypatch.setattr(autotune, "_measure", measure)
    config = GPTConfig(**{**vars(CONFIG), "context_length": 8192, "n_heads": 4})
    timings(Workload(device="cpu", config=config, sequences=1, length=8192, threads=1), **ALL)
    assert set(seen) == {"blocked"}
    config = GPTConfig(**{**vars(config), "drop_rate": 0.0})
    timings(Workload(device="cpu", config=config, sequences=1, length=8192, threads=1), **ALL)
    assert set(seen) == {"blocked", "sdpa"}


def test_ways_that_the_user_excluded_do_not_count():
    seconds = {"block 32-true sdpa 64": 3.0, "block bf16-mixed sdpa 64": 2.0, "block 32-true blocked 64": 1.0}
    times = Timings(work=replace(WORK, has_head=False), seconds=seconds, kernels=("sdpa",))
    assert times.precision() == BF16


# --- the cache ------------------------------------------------------------------------------------------


@pytest.fixture
def entry(clock, monkeypatch):
    """The cache entry of WORK, whose next measurement fails the test unless `may_measure`."""
    timings(WORK, **ALL)
    (file,) = (cache_dir() / "autotune").glob("*.json")
    measured: list[int] = []

    def measure(work: Workload, candidates: Any) -> dict[str, float]:
        measured.append(len(candidates))
        return {each.name: 1.0 for each in candidates}

    monkeypatch.setattr(autotune, "_measure", measure)
    return file, measured


def test_a_second_run_does_not_measure(entry):
    file, measured = entry
    assert timings(WORK, **ALL).seconds == read_entry(file, WORK).seconds != {}
    assert measured == []
    timings(WORK, **ALL, again=True)
    assert len(measured) == 1


@pytest.fixture
def measured(clock, monkeypatch):
    """`measured(seconds, preemptions)`: what fp32 takes in a run, which is disturbed so often in a second.

    Returns whether it was measured, and the seconds that the run goes by.
    """
    now, count = [0.0], [0]
    monkeypatch.setattr(autotune, "_preemptions", lambda: (count[0], now[0]))

    def run(seconds: float, preemptions: int) -> tuple[bool, float]:
        def measure(work: Workload, candidates: Any) -> dict[str, float]:
            now[0] += 1
            count[0] += preemptions
            return {each.name: seconds for each in candidates}

        monkeypatch.setattr(autotune, "_measure", measure)
        before, least = now[0], min(timings(WORK, **ALL).seconds.values())
        return now[0] > before, least

    return run


def test_what_others_disturbed_is_measured_again_until_they_do_not(measured):
    assert measured(9.0, 300) == (True, 9.0)
    assert measured(1.0, 20) == (True, 1.0)
    assert measured(5.0, 20) == (False, 1.0)


def test_where_others_never_rest_the_least_of_three_times_is_kept(measured):
    assert [measured(seconds, 300) for seconds in (9.0, 3.0, 5.0)] == [(True, 9.0), (True, 3.0), (True, 3.0)]
    assert measured(1.0, 300) == (False, 3.0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"seconds": {}}',
        '{"identity": {}, "seconds": {"a": 1}}',
        '{"seconds": 3, "identity": 1}',
    ],
)
def test_a_torn_or_foreign_entry_is_measured_again(entry, text):
    file, measured = entry
    file.write_text(text)
    timings(WORK, **ALL)
    assert len(measured) == 1
    timings(WORK, **ALL)
    assert len(measured) == 1


@pytest.mark.parametrize("value", [0, -1, "NaN", None, "x"])
def test_an_entry_with_an_impossible_time_is_measured_again(entry, value):
    file, measured = entry
    content = json.loads(file.read_text())
    content["seconds"]["block 32-true sdpa 64"] = value
    file.write_text(json.dumps(content))
    timings(WORK, **ALL)
    assert len(measured) == 1


def test_another_machine_threads_shape_or_instruction_set_has_an_entry_of_its_own(entry, monkeypatch):
    _, measured = entry
    timings(Workload(**{**vars(WORK), "threads": 2}), **ALL)
    timings(Workload(**{**vars(WORK), "sequences": 5}), **ALL)
    assert len(measured) == 2
    timings(Workload(**{**vars(WORK), "config": GPTConfig(**{**vars(CONFIG), "n_layers": 9})}), **ALL)
    assert len(measured) == 2  # the same block, more often
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    timings(WORK, **ALL)
    assert len(measured) == 3
    monkeypatch.setattr(autotune, "machine_name", lambda device: "another")
    timings(WORK, **ALL)
    assert len(measured) == 4


def test_a_cache_that_cannot_be_written_is_said(clock, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "file"))
    assert timings(WORK, **ALL).seconds
    assert "cannot be kept" in caplog.text


# --- compilation ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "is_model", "compiled"), [(10, True, False), (100_000, True, True), (100_000, False, False)]
)
def test_compiling_is_tried_in_a_long_run_and_pays_there(clock, monkeypatch, steps, is_model, compiled):
    """Not for a model of another class, which may not compile at all."""
    monkeypatch.setattr("gptpl.training.performance.missing_tool", lambda device_type: None)
    monkeypatch.setattr(autotune._Parts, "compiled", property(lambda parts: parts.block))
    clock.update({"compiled": 0.5})
    path = choose_fast_path(
        device_type="cpu", precision="auto", drop_rate=0.1, total_steps=steps,
        timings=timings(replace(WORK, is_model=is_model), **ALL), tries_compiling=True,
    )  # fmt: skip
    assert path.compile.compiled == compiled
    assert path.compile.reason.startswith("measured" if compiled else "not measured")


def test_a_given_precision_is_compiled_although_the_other_is_far_faster(clock, monkeypatch):
    """Its times are in the cache entry, too."""
    monkeypatch.setattr("gptpl.training.performance.missing_tool", lambda device_type: None)
    monkeypatch.setattr(autotune._Parts, "compiled", property(lambda parts: parts.block))
    clock.update({FP32: 4.0, "compiled": 0.5})
    timings(WORK, **ALL)
    path = choose_fast_path(
        device_type="cpu", precision=FP32, total_steps=10**6, tries_compiling=True,
        timings=timings(WORK, **ALL | {"precisions": (FP32,)}),
    )  # fmt: skip
    assert path.compile.compiled
    assert path.compile.reason.startswith("measured")


def test_a_model_that_cannot_be_compiled_is_not(clock, monkeypatch):
    def fail(parts: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr("gptpl.training.performance.missing_tool", lambda device_type: None)
    monkeypatch.setattr(autotune._Parts, "compiled", property(fail))
    path = choose_fast_path(
        device_type="cpu",
        precision="auto",
        drop_rate=0.1,
        total_steps=10**6,
        timings=timings(WORK, **ALL),
        tries_compiling=True,
    )
    assert not path.compile.compiled
    assert path.compile.reason == "torch could not compile it"


# --- the command ----------------------------------------------------------------------------------------


def test_the_command_lists_every_way_and_marks_the_chosen_one(clock):
    clock.update({FP32: 2.0, "blocked": 2.0})
    gptpl.autotune(*TINY)
    lines = gptpl.autotune(*TINY)
    rows = [line.split() for line in lines if line.startswith((FP32, BF16))]
    assert len(rows) == 4  # fp32's products are far slower
    assert [row[:3] for row in rows if row[-1] == "chosen"] == [[BF16, "sdpa", "fused"]]


def test_the_command_refuses_what_leaves_no_choice(clock):
    with pytest.raises(InputError, match=r"trainer.precision=16-mixed on cpu: give trainer.precision=auto"):
        gptpl.autotune(*TINY, "trainer.precision=16-mixed")
