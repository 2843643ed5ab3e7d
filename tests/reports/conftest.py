"""Runs made by writing their files."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptpl.files.run_record import RunRecord, read_run

MakeRun = Callable[..., RunRecord]

RECORD = {
    "data": {"name": "tale", "sha256": "a" * 64},
    "tokenizer": {"name": "bytes", "vocab_size": 257, "sha256": "b" * 64},
    "parameters": 120256,
    "finished": "2026-01-01T00:00:00+00:00",
    "seconds": 65.2,
    "tokens_seen": 15360,
    "peak_memory_bytes": 512345678,
}


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """`make_run("a", [5.5, 3.0], {"optimizer.lr": 0.1})`: a run that ended with these validation losses.

    The training loss is 0.5 lower, and with `csv=False` there is no metrics.csv, but the run's own record of
    its evaluations, with `val/f1`: a tenth of the loss. An evaluation comes every 10 steps of 100 tokens.
    `record` changes `run.json`: a value of None takes an entry out.
    """

    def make(
        name: str,
        losses: Sequence[float],
        settings: Mapping[str, Any] | None = None,
        *,
        samples: Sequence[Mapping[str, Any]] = (),
        record: Mapping[str, Any] | None = None,
        csv: bool = True,
        bits: Sequence[float] | None = None,
    ) -> RunRecord:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(yaml.safe_dump(_nested({"seed": 1, **(settings or {})})))
        kept = {key: value for key, value in {**RECORD, **(record or {})}.items() if value is not None}
        (folder / "run.json").write_text(json.dumps(kept))
        rows = ["step,eval/train_loss,val/loss,train/tokens_seen,train/tokens_per_second"]
        rows += [f"{10 * i},{loss - 0.5},{loss},{1000 * i},2000.4" for i, loss in enumerate(losses)]
        if bits is not None:
            columns = ["val/bits_per_byte", *map(str, bits)]
            rows = [f"{row},{cell}" for row, cell in zip(rows, columns, strict=True)]
        if csv:
            (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
        else:
            evaluations = [
                {
                    "step": 10 * i,
                    "tokens_seen": 1000 * i,
                    "metrics": {"eval/train_loss": loss - 0.5, "val/loss": loss, "val/f1": loss / 10},
                }
                for i, loss in enumerate(losses)
            ]
            lines = "".join(json.dumps(each) + "\n" for each in evaluations)
            (folder / "evaluations.jsonl").write_text(lines)
        (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in samples))
        return read_run(folder)

    return make


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for name, value in settings.items():
        *parts, last = name.split(".")
        inner = nested
        for part in parts:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return nested
