import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gptpl.data.pretraining.datamodule import TextDataModule
from gptpl.data.pretraining.token_cache import CorpusStats, EncodedCorpus
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer

STATS = CorpusStats(
    documents=1,
    train_documents=1,
    val_documents=1,
    train_characters=18_431,
    val_characters=2_048,
    train_tokens=4_612,
    val_tokens=533,
    duplicate_blocks=0,
    compared_blocks=16,
    content_sha256="0" * 64,
)


def report(
    parameters: int = 162_419_712, batch_size: int = 2, world_size: int = 1, **changes: Any
) -> list[str]:
    stats = dataclasses.replace(STATS, **changes)
    encoded = EncodedCorpus(
        train=np.zeros(stats.train_tokens, np.uint16),
        val=np.zeros(stats.val_tokens, np.uint16),
        tokenizer=BytesTokenizer(),
        stats=stats,
    )
    corpus: Any = SimpleNamespace(name="the_verdict")
    data = TextDataModule(
        corpus=corpus, tokenizer=BytesTokenizer(), max_length=256, batch_size=batch_size // world_size
    )
    data.encoded = encoded
    return data.report(parameters=parameters, world_size=world_size)


def test_the_report_of_the_published_experiment():
    assert report() == [
        "data: the_verdict, 1 document, bytes tokenizer (257 tokens)",
        "                                          training  validation",
        "  documents                                      1           1",
        "  characters                                18,431       2,048",
        "  tokens                                     4,612         533",
        "  sequences of 256 tokens, one every 256        18           2",
        "  batches of 2 sequences                         9           1",
        "  a token stands for 1.00 bytes of the validation text",
        "  1 training token for every 35,217 parameters: "
        "the model can learn the text by heart, so watch the validation loss",
        "  0 of 16 blocks of 32 validation tokens also occur verbatim in the training text (0.0%): "
        "the validation loss is a fair test",
    ]


def test_columns_grow_with_the_numbers():
    lines = report(train_characters=1_234_567_890_123)
    table = lines[1:-3]
    assert len({len(line) for line in table}) == 1
    assert "1,234,567,890,123" in table[2]


def test_training_drops_the_short_batch_and_validation_keeps_it():
    assert report(batch_size=4, world_size=2)[6].split()[-2:] == ["4", "1"]


@pytest.mark.parametrize(
    ("tokens", "parameters", "figure", "meaning"),
    [
        (1000, 1_000_000, "1 training token for every 1,000 parameters", "by heart"),
        (1000, 200, "5.0 training tokens for every parameter", "about 20"),
        (100_000, 100, "1,000.0 training tokens for every parameter", "enough"),
    ],
)
def test_tokens_per_parameter(tokens: int, parameters: int, figure: str, meaning: str):
    line = report(parameters, train_tokens=tokens)[-2]
    assert line.strip().startswith(figure + ":")
    assert meaning in line


def test_duplicates_are_told_with_what_they_mean():
    few, many = (
        report(duplicate_blocks=8, compared_blocks=1000),
        report(duplicate_blocks=400, compared_blocks=1000),
    )
    assert "8 of 1,000" in few[-1]
    assert "(0.8%)" in few[-1]
    assert "fair test" in few[-1]
    assert "(40.0%)" in many[-1]
    assert "too low" in many[-1]
    assert "too short to look for duplicates" in report(compared_blocks=0)[-1]


def test_a_split_without_a_window_is_refused():
    with pytest.raises(InputError, match="validation split has 100 tokens"):
        report(val_tokens=100)
