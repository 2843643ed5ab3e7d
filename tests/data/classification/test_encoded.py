"""Texts as tokens and batches: padding, truncation, and the row that stands for nothing."""

from pathlib import Path

import numpy as np
import pytest
from torch import tensor

from gptpl.data.classification.datamodule import LabelledDataModule, LabelledTexts, encode_texts, truncated
from gptpl.data.sources import LabelledFiles
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer, TokenIds, WordsTokenizer


def tokens(*texts: str) -> list[TokenIds]:
    return encode_texts(texts, BytesTokenizer())


def test_a_batch_is_as_long_as_its_longest_text() -> None:
    batch = LabelledTexts(tokens("abcd", "a", "ab"), [1, 0, 2], pad_id=256).__getitems__([2, 1])
    assert batch.tokens.tolist() == [[97, 98], [97, 256]]
    assert batch.lengths.tolist() == [2, 1]
    assert batch.labels.tolist() == [2, 0]


def test_or_as_long_as_it_was_said() -> None:
    batch = LabelledTexts(tokens("abcd", "a"), [1, 0], pad_id=256, padded_to=5).__getitems__([1])
    assert batch.tokens.tolist() == [[97, 256, 256, 256, 256]]
    assert batch.lengths.tolist() == [1]


def test_a_row_for_nothing_has_no_label() -> None:
    batch = LabelledTexts(tokens("ab", "a"), [1, 0], pad_id=256).__getitems__([1, -1])
    assert (batch.tokens == tensor([[97], [256]])).all()
    assert batch.labels.tolist() == [0, -100]
    assert batch.lengths.tolist() == [1, 1]


def test_truncation_keeps_the_beginning_and_says_what_it_took() -> None:
    kept, lost = truncated(tokens("abcd", "ab", "abc"), 2)
    assert [each.tolist() for each in kept] == [[97, 98]] * 3
    assert lost == [2, 1]


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(InputError, match="'x' has no tokens: remove it"):
        encode_texts(["x"], _Nothing())


class _Nothing(WordsTokenizer):
    def encode(self, text: str) -> TokenIds:
        return np.array([], dtype=np.uint32)


def test_a_file_that_was_cut_off_at_the_end_of_a_row_differs_by_its_rows(tmp_path: Path) -> None:
    """Such a file is valid: only the recorded number of rows shows that some are missing."""
    rows = [f"text {number},{number % 2}\n" for number in range(40)]

    def data(count: int) -> LabelledDataModule:
        (tmp_path / "texts.csv").write_text("text,label\n" + "".join(rows[:count]))
        corpus = LabelledFiles(path=str(tmp_path / "texts.csv"))
        made = LabelledDataModule(corpus=corpus, tokenizer=BytesTokenizer(), max_length=8)
        made.load()
        return made

    whole, again, cut = data(40), data(40), data(39)
    recorded = (whole.content_sha256(), whole.row_count)
    assert again.difference(*recorded) == ""
    assert cut.difference(*recorded).startswith("39 rows, not 40; SHA-256 ")
    assert cut.difference(recorded[0]).startswith("SHA-256 ")
