"""Rows and batches against the book's own collate function, written anew from its description."""

# B rows in a batch, T tokens in its longest row

import numpy as np
import pytest
import torch
from torch import Tensor

from gptpl.data.instructions.datamodule import InstructionExamples, TokenRow, collate, encode_instructions
from gptpl.data.instructions.records import Instruction, PromptTemplate
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer

EOT = 50256
ENTRIES = [
    Instruction(instruction="Name a colour.", input="", output="Red."),
    Instruction(instruction="Correct it.", input="He go home.", output="\n\nHe goes home, he went home."),
    Instruction(instruction="Count.", input="", output="One, two, three, four, five, six, seven."),
]


def books_collate(
    batch: list[list[int]], max_length: int | None = None, ignored: int = -100
) -> tuple[Tensor, Tensor]:
    """The book's: one end-of-text added, padded to the longest and one more, shifted, all but one masked."""
    longest = max(len(item) + 1 for item in batch)
    inputs, targets = [], []
    for item in batch:
        padded = [*item, EOT] + [EOT] * (longest - len(item) - 1)
        row, aims = torch.tensor(padded[:-1]), torch.tensor(padded[1:])
        padding = torch.nonzero(aims == EOT).squeeze(-1)
        aims[padding[1:]] = ignored
        inputs.append(row[:max_length])
        targets.append(aims[:max_length])
    return torch.stack(inputs), torch.stack(targets)


def row(tokens: list[int]) -> TokenRow:
    return TokenRow(np.array(tokens), np.array([*tokens[1:], EOT]), np.ones(len(tokens), dtype=np.int64))


def test_the_books_example():
    batch = collate([row([0, 1, 2, 3, 4]), row([5, 6]), row([7, 8, 9])], eot_id=EOT)
    assert batch.inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, EOT, EOT, EOT], [7, 8, 9, EOT, EOT]]
    expected = [[1, 2, 3, 4, EOT], [6, EOT, -100, -100, -100], [8, 9, EOT, -100, -100]]
    assert batch.targets.tolist() == expected
    assert (batch.segments, batch.tokens) == (None, 10)
    inputs, targets = books_collate([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])
    assert batch.inputs.equal(inputs)
    assert batch.targets.equal(targets)


@pytest.mark.parametrize("max_length", [1024, 40, 30])
@pytest.mark.parametrize("name", ["alpaca", "phi3"])
def test_batches_are_the_books(name, max_length):
    tokenizer, template = GPT2Tokenizer(), PromptTemplate.named(name)
    made = encode_instructions(ENTRIES, tokenizer, template, max_length=max_length)
    batch = collate(made.rows, eot_id=EOT)
    tokens = [tokenizer.encode(template.whole(entry)).tolist() for entry in ENTRIES]
    inputs, targets = books_collate(tokens, max_length)
    assert batch.inputs.equal(inputs)
    assert batch.targets.equal(targets)
    assert made.truncated == sum(len(each) > max_length for each in tokens)
    assert made.dropped == 0


def test_a_masked_instruction_leaves_the_answer_and_its_end():
    tokenizer, template = GPT2Tokenizer(), PromptTemplate.named("alpaca")
    made = encode_instructions(ENTRIES, tokenizer, template, max_length=1024, mask_instruction=True)
    for entry, each in zip(ENTRIES, made.rows, strict=True):
        aims = each.targets[each.targets != -100]
        assert aims[-1] == EOT
        learned = tokenizer.decode(aims[:-1])
        # The answer that begins with line ends shares a token with the marker before it.
        assert learned == ("\n" * (entry.output[0] == "\n") + entry.output)
        assert (each.targets[-len(aims) :] == aims).all()


def test_an_example_without_anything_to_learn_is_left_out_and_counted():
    tokenizer, template = BytesTokenizer(), PromptTemplate.named("{{ instruction }}", "\n> ")
    lengths = [len(template.whole(entry)) for entry in ENTRIES]
    assert lengths == [21, 43, 49]
    made = encode_instructions(ENTRIES, tokenizer, template, max_length=15, mask_instruction=True)
    # Prompts have 17, 14 and 9 bytes.
    assert (len(made.rows), made.truncated, made.dropped, made.unanswered) == (2, 2, 1, 1)
    assert [len(each) for each in made.rows] == [15, 15]
    dropped = encode_instructions(ENTRIES, tokenizer, template, max_length=45, too_long="drop")
    assert [len(each) for each in dropped.rows] == [21, 43]
    assert (dropped.truncated, dropped.dropped, dropped.unanswered) == (0, 1, 0)


def test_a_long_example_refused():
    tokenizer, template = BytesTokenizer(), PromptTemplate.named("{{ instruction }}", "\n> ")
    with pytest.raises(InputError, match=r"^the example 'Correct it.' has 43 tokens, more than [^\n]*=40: "):
        encode_instructions(ENTRIES, tokenizer, template, max_length=40, too_long="refuse")
    with pytest.raises(InputError, match=r"^data.too_long=cut is unknown: choose one of truncate, drop, re"):
        encode_instructions(ENTRIES, tokenizer, template, max_length=40, too_long="cut")  # type: ignore[arg-type]


def test_the_number_minus_one_is_a_row_without_a_target():
    examples = InstructionExamples([row([1, 2, 3]), row([4])], eot_id=EOT)
    assert len(examples) == 2
    batch = examples.__getitems__([1, -1])
    assert batch.inputs.tolist() == [[4], [EOT]]
    assert batch.targets.tolist() == [[EOT], [-100]]
    assert batch.tokens == 1
    alone = examples.__getitems__([-1])
    assert (alone.inputs.tolist(), alone.targets.tolist(), alone.tokens) == ([[EOT]], [[-100]], 0)
