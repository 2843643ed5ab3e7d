"""Settings of older runs under the names that they have now."""

from typing import Any

from gptpl.data.classification.datamodule import LabelledDataModule
from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.sources import LabelledFiles, TextFiles
from gptpl.evaluation.bias import BBQ
from gptpl.evaluation.bias_words import Occupations, Templates
from gptpl.files.run_settings import with_current_names


def qualified(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def test_older_labelled_texts() -> None:
    older: dict[str, Any] = {
        "_target_": "gptpl.data.labelled.datamodule.LabelledDataModule",
        "corpus": {"_target_": "gptpl.data.labelled.corpora.LabelledFiles", "path": "x.csv"},
        "train_share": 0.7,
        "val_share": 0.1,
        "truncate": False,
        "duplicates": "group",
    }
    assert with_current_names({"data": older, "trainer": {"train_share": 1}}) == {
        "data": {
            "_target_": qualified(LabelledDataModule),
            "corpus": {"_target_": f"gptpl.data.sources.{LabelledFiles.__name__}", "path": "x.csv"},
            "train_ratio": 0.7,
            "val_ratio": 0.1,
            "too_long": "refuse",
            "duplicates": "group",
        },
        "trainer": {"train_share": 1},
    }


def test_older_instructions_keep_a_question_of_two_splits_in_training() -> None:
    older = {
        "_target_": qualified(InstructionDataModule),
        "train_share": 0.85,
        "test_share": 0.1,
        "too_long": "drop",
    }
    assert with_current_names(older) == {
        "_target_": qualified(InstructionDataModule),
        "train_ratio": 0.85,
        "test_ratio": 0.1,
        "too_long": "drop",
        "precedence": "train",
    }


def test_older_text_files_read_json_lines_as_they_did() -> None:
    older = {"_target_": "gptpl.data.corpora.TextFiles", "path": "x.jsonl"}
    now = {"_target_": f"gptpl.data.sources.{TextFiles.__name__}", "path": "x.jsonl"}
    assert with_current_names(older) == now | {"field": None}
    assert with_current_names(now) == now


def test_probes_of_own_words_moved_and_those_beside_them_stayed() -> None:
    def suite(*targets: str) -> dict[str, Any]:
        return {"callbacks": {"asked": {"suite": {"tasks": {name: {"_target_": name} for name in targets}}}}}

    older = [f"gptpl.evaluation.bias.{kind.__name__}" for kind in (Occupations, Templates, BBQ)]
    tasks = with_current_names(suite(*older))["callbacks"]["asked"]["suite"]["tasks"]
    assert [each["_target_"] for each in tasks.values()] == [
        qualified(kind) for kind in (Occupations, Templates, BBQ)
    ]


def test_settings_of_now_stay_as_they_are() -> None:
    now = {
        "_target_": f"gptpl.data.sources.{TextFiles.__name__}",
        "path": "x",
        "truncate_me": [1, {"a": None}],
    }
    assert with_current_names(now) == now
