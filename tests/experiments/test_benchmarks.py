"""The benchmark's records, tables and choices, without its measurements of other libraries."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "experiments/benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of the folder as its neighbours do."""
    monkeypatch.syspath_prepend(FOLDER)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load


def contestant(*seconds: float, own: float = 2.0) -> dict[str, Any]:
    return {
        "first_step_seconds": 1.0, "peak_gb": 3.0, "seconds": list(seconds),
        "ratios": [each / own for each in seconds], "parts": {},
    }  # fmt: skip


def one_shape(**contestants: dict[str, Any]) -> dict[str, Any]:
    return {
        "products_seconds": {"fp32": [4.0, 4.0], "bf16": [1.0, 1.8]},
        "screening": {},
        "contestants": {"gptpl": contestant(2.0, 2.0, 2.0), **contestants},
    }


def test_readme_and_tables_show_the_records(script: Any) -> None:
    tables = script("tables")
    found = tables.records(FOLDER / "records")
    assert found
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert tables.filled(readme, found) == readme
    for name, record in found.items():
        assert (FOLDER / "records" / name / "table.md").read_text(encoding="utf-8") == tables.table(record)


def test_the_ratio_is_against_the_fastest_of_all_peers_and_the_bound_is_the_faster_precision(
    script: Any,
) -> None:
    tables = script("tables")
    measured = one_shape(
        # `gptpl bare` is no peer; the median decides, not the fastest step.
        **{
            "gptpl bare": contestant(1.5, 1.5, 1.5),
            "litgpt fp32": contestant(1.0, 3.0, 3.0),
            "book bf16": contestant(2.2, 2.2, 9.0),
        }
    )
    record = {"rule": "", "size": "124M", "machine": {}, "shapes": {"2x256": measured}}
    assert tables.fastest_peer(measured) == "book bf16"
    assert tables.reach(record) == pytest.approx({"fastest_peer_2x256": 1.1, "bound_2x256": 1.4 / 2})


@pytest.mark.parametrize(
    ("value", "target", "more", "verdict"),
    [
        (1.06, 1.05, True, "1.06, reached"),
        (1.04, 1.05, True, "1.04, not reached"),
        (0.5, 0.7, False, "0.50, reached"),
        (0.8, 0.7, False, "0.80, not reached"),
        (None, 0.7, False, "not measured"),
    ],
)
def test_verdict(script: Any, value: float | None, target: float, more: bool, verdict: str) -> None:
    assert script("tables").verdict(value, target, more=more) == verdict


def test_a_loss_is_measured_in_other_turns_than_the_best_is_found_in_and_counts_compiling(
    script: Any,
) -> None:
    choices = script("choices")
    eager = choices.Choice("32-true", "off", "sdpa", "fused")
    lucky = choices.Choice("32-true", "off", "sdpa", "plain")  # fast in one half of the turns only
    compiled = choices.Choice("32-true", "on", "sdpa", "plain")
    shares = choices.Choice("32-true", "on", "sdpa", "fused")  # the blocks, which it compiled
    timed = {
        eager: {"first": 1.0, "once": 1.0, "turns": [1.0, 1.0, 1.0, 1.0]},
        lucky: {"first": 1.0, "once": 1.0, "turns": [0.9, 1.1, 0.9, 1.1]},
        compiled: {"first": 0.8, "once": 0.8, "turns": [0.8, 0.8, 0.8, 0.8]},
        shares: {"first": 20.8, "once": 2.0, "turns": []},
    }
    short, long = (choices.row(eager, timed, steps) for steps in (50, 1_000))
    assert (short["best"], long["best"]) == (str(lucky), str(compiled))
    assert short["loss_percent"] == pytest.approx(100 * (1 / 1.1 - 1))
    assert long["loss_percent"] == pytest.approx(100 * (1_000 / 820 - 1))


def test_hopeless_choices_and_precisions_do_not_take_turns(script: Any) -> None:
    choices = script("choices")
    taken: list[Any] = []

    def step(choice: Any, seconds: float) -> Any:
        def take() -> float:
            taken.append(choice)
            return seconds

        return take

    slow = choices.Choice("32-true", "off", "blocked", "plain")
    steps = {
        choice: step(choice, 0.5 if choice == slow else 0.35)
        for choice in choices.ALL
        if choice.compile == "off"
    }
    timed = choices.screened(steps, {"fp32": 0.2, "bf16": 0.4}, keep=set())
    assert {choice.precision for choice in timed} == {"32-true"}  # the bf16 products alone take longer
    assert timed[slow]["turns"] == []
    assert taken.count(slow) == 2
    assert len(timed[choices.Choice("32-true", "off", "sdpa", "fused")]["turns"]) == choices.TURNS


def test_a_record_keeps_what_was_measured_by_the_same_rule(script: Any, tmp_path: Path) -> None:
    benchmark = script("benchmark")
    path = tmp_path / "records/x/result.json"
    first = benchmark.Record(path, {"device": "a"}, "124M")
    first.keep(busy=[{"alone": [1.23456789, 2.0], "beside": [1e-9]}])
    again = benchmark.Record(path, {"device": "a"}, "124M")
    assert again.content["busy"] == [{"alone": [1.2346, 2.0], "beside": [0.0]}]
    assert '"alone": [1.2346, 2.0]' in path.read_text(encoding="utf-8")
    assert "busy" not in benchmark.Record(path, {"device": "a"}, "355M").content


def test_screening_drops_slow_variants_at_the_next_shape_and_the_fastest_takes_part(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = script("benchmark")
    seconds = {"fp32": 1.0, "fp32 compiled": 1.1, "bf16": 2.0, "bf16 compiled": 1.3}
    asked: list[tuple[str, ...]] = []

    def screen(peer: str, variants: Any, work: Any, *, label: str) -> dict[str, list[float]]:
        asked.append(tuple(variants))
        return {one: [seconds[one], 5.0] for one in variants}

    def heat(names: list[str], work: Any, turns: int, label: str) -> dict[str, Any]:
        return {name: contestant(2.0) for name in names}

    monkeypatch.setattr(benchmark, "screen", screen)
    monkeypatch.setattr(benchmark, "run_heat", heat)
    monkeypatch.setattr(benchmark, "product_seconds", lambda *shape: {"fp32": 1.0, "bf16": 1.0})
    monkeypatch.setattr(benchmark, "free_gb", lambda: 1000.0)
    monkeypatch.setattr(benchmark, "others_load", lambda: 0.0)
    record = benchmark.Record(tmp_path / "x/result.json", {}, "124M")
    work = benchmark.Work(tokens="", text="", batch=0, context=0)
    benchmark.measure_speed(record, work, ["8x256", "2x256"], ["litgpt"], turns=1)
    assert asked == [benchmark.VARIANTS, ("fp32", "fp32 compiled")]  # the smaller shape first
    for shape in record.content["shapes"].values():
        assert set(shape["contestants"]) == {"gptpl", "gptpl bare", "litgpt fp32", "book loop fp32"}
