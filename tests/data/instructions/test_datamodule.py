"""Instructions as batches: which examples, on which rank, packed or not."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptpl.data.instructions.datamodule import InstructionDataModule
from gptpl.data.instructions.records import read_instructions
from gptpl.data.sources import InstructionFile
from gptpl.data.splits import SPLITS, split_file
from gptpl.errors import InputError
from gptpl.tokenizers import BytesTokenizer, TokenIds, WordsTokenizer

Make = Callable[..., InstructionDataModule]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Data of 60 entries, each with a question of its own."""
    draw = random.Random(1)
    entries = [
        {
            "instruction": f"Count to {n}.",
            "input": "",
            "output": " ".join(map(str, range(draw.randrange(1, 9)))),
        }
        for n in range(60)
    ]

    def build(records: list[dict[str, str]] = entries, **changes: Any) -> InstructionDataModule:
        path = tmp_path / "entries.json"
        path.write_text(json.dumps(records))
        settings: dict[str, Any] = {
            "corpus": InstructionFile(path),
            "tokenizer": BytesTokenizer(),
            "template": "{{ instruction }}",
            "response_marker": "\n> ",
            "max_length": 64,
            "batch_size": 4,
            "eval_train_batches": None,
            "eval_val_batches": None,
        }
        return InstructionDataModule(**(settings | changes))

    return build


def texts_of(data: InstructionDataModule, batches: Any) -> list[str]:
    """The texts that the batches hold: of each the first token, then its targets."""
    found = []
    for batch in batches:
        for place, (inputs, targets) in enumerate(zip(batch.inputs, batch.targets, strict=True)):
            segments = (targets != -100).long() if batch.segments is None else batch.segments[place]
            for number in range(1, int(segments.max()) + 1):
                own = segments == number
                found.append(data.tokenizer.decode([inputs[own][0], *targets[own]]))
    return found


@pytest.mark.parametrize("packing", [False, True])
def test_batches_hold_every_text_once_with_its_end(make, packing):
    data = make(packing=packing, batch_size=1)
    whole = [data.template.whole(entry) + "<|endoftext|>" for entry in data.splits.train]
    assert sorted(texts_of(data, data.train_dataloader())) == sorted(whole)
    train, val = data.val_dataloader()
    assert sorted(texts_of(data, train)) == sorted(whole)
    expected = [data.template.whole(entry) + "<|endoftext|>" for entry in data.splits.val]
    assert sorted(texts_of(data, val)) == sorted(expected)
    assert len(texts_of(data, data.split_dataloader("test"))) == 6


def test_ranks_see_together_what_one_process_sees_and_padding_rows_have_no_target(make):
    def batches(rank: int, world_size: int, **changes: Any) -> list[Any]:
        data = make(**changes)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size)
        return list(data.val_dataloader()[1])

    alone = batches(0, 1)  # 3 validation entries
    both = [batches(rank, 2) for rank in (0, 1)]
    data = make()
    assert sorted(text for rank in both for text in texts_of(data, rank)) == sorted(texts_of(data, alone))
    assert [len(batch.inputs) for rank in both for batch in rank] == [2, 2]
    assert (both[1][0].targets[1] == -100).all()
    assert both[1][0].tokens == int((both[1][0].targets[0] != -100).sum())


def test_packing_and_order_depend_on_the_seed_alone_and_epochs_differ(make):
    def epoch(number: int, **changes: Any) -> list[Any]:
        data = make(packing=True, batch_size=2, **changes)
        data.start_at(epoch=number, batch=0)
        return [batch.inputs.tolist() for batch in data.train_dataloader()]

    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1)
    assert epoch(0) != epoch(0, seed=7)
    rows = [[row for batch in epoch(number) for row in batch] for number in (0, 1)]
    assert len(rows[0]) == len(rows[1]) > 4


def test_examples_that_lose_their_end_are_a_caveat(make):
    def caveat(lengths: list[int], **changes: Any) -> str:
        entries = [
            {"instruction": f"Say {n}.", "input": "", "output": "x" * m} for n, m in enumerate(lengths)
        ]
        return make(entries, max_length=40, train_ratio=0.5, test_ratio=0.25, **changes).caveat

    assert caveat([99] * 8).startswith(
        "All 4 training examples lost their end, so that the model cannot learn"
    )
    assert caveat([99] * 8).endswith("raise data.max_length=40.")
    assert caveat([99, 99, 99, 9] * 2).startswith("3 of 4 training examples lost their end, ")
    assert caveat([99, 99, 9, 9] * 2) == ""
    assert caveat([9, 99, 99, 99] * 2, too_long="drop") == ""


def test_workers_make_the_same_batches(make):
    alone, worked = (list(make(num_workers=n, packing=True).train_dataloader()) for n in (0, 1))
    for ours, theirs in zip(alone, worked, strict=True):
        assert ours.tokens == theirs.tokens
        assert all(a.equal(b) for a, b in zip(ours[:3], theirs[:3], strict=True))


def test_the_report_says_what_was_done_to_the_examples(make):
    entries = [{"instruction": f"Say {n}.", "input": "", "output": "x" * n} for n in range(1, 41)]
    entries[38]["instruction"] = entries[0]["instruction"]
    lines = make(entries, max_length=40, packing=True).report(parameters=1, world_size=2)
    prompts = [len(entry["instruction"]) + 3 for entry in entries]
    long = [n for n, prompt in enumerate(prompts) if prompt + len(entries[n]["output"]) > 40 and n != 0]
    assert lines[0] == "data: instruction_file, 40 instructions, template own, bytes tokenizer"
    assert lines[2].split() == ["instructions", "33", "2", "4"]
    assert f"  {len(long)} examples longer than data.max_length=40 lost the end" in lines[6]
    assert (
        lines[7]
        == "  1 example with the question of another split: removed, so that the test stays as it was"
    )
    used = sum(min(40, prompts[n] + n + 1) for n in range(1, 34))
    rows = int(lines[5].split()[-3])
    assert f"{used / (40 * rows):.1%} of the places" in lines[8]


class Counting(BytesTokenizer):
    """Keeps every text that it encodes."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, text: str) -> TokenIds:
        self.texts.append(text)
        return super().encode(text)


@pytest.mark.parametrize("masked", [False, True])
def test_every_text_is_encoded_once(make, masked):
    """And its prompt only where its end has to be known."""
    tokenizer = Counting()
    data = make(tokenizer=tokenizer, mask_instruction=masked)
    data.setup()
    data.report(parameters=1, world_size=1)
    for loader in (data.train_dataloader(), *data.val_dataloader(), data.split_dataloader("test")):
        list(loader)
    whole = {data.template.whole(each) for split in SPLITS for each in data.splits.of(split)}
    prompts = {data.template.prompt(each.instruction) for split in SPLITS for each in data.splits.of(split)}
    assert sorted(tokenizer.texts) == sorted([*whole, *(prompts if masked else ())])


def test_nothing_to_say_is_not_said(make):
    assert len(make().report(parameters=1, world_size=1)) == 5


def test_the_splits_are_left_in_the_runs_folder(make, tmp_path):
    data = make()
    data.write_record(tmp_path)
    for split in SPLITS:
        assert read_instructions(split_file(tmp_path, split, ".json")) == data.splits.of(split)
    assert [path.name for path in sorted((tmp_path / "data").iterdir())] == [
        "test.json",
        "train.json",
        "validation.json",
    ]


def test_the_hash_is_that_of_file_and_template(make):
    same = make().content_sha256()
    assert make().content_sha256() == same
    assert make(template="{{ instruction }}!").content_sha256() != same
    assert make([{"instruction": "a", "input": "", "output": "b"}]).content_sha256() != same


def test_a_vocabulary_is_made_of_the_training_examples_alone(make):
    entries = [{"instruction": f"word{n}", "input": "", "output": "yes"} for n in range(20)]
    data = make(entries, tokenizer=WordsTokenizer())
    words = [data.tokenizer.decode(data.tokenizer.encode(f"word{n}")) for n in (0, 16, 17, 19)]
    assert words == ["word0", "word16", words[2], words[2]]
    assert words[2] not in ("word17", "word19")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"batch_size": 99},
            r"the training split has 51 examples, which do not fill one batch of data.batch",
        ),
        (
            {"batch_size": 50, "packing": True},
            r"the training split has \d+ rows, which do not[^\n]*packing=fal",
        ),
        ({"max_length": 1}, "data.max_length must be at least 2, got 1"),
        ({"max_length": 8, "mask_instruction": True}, r"the train split has no example to learn from within"),
        ({"corpus": InstructionFile(None)}, "data.path is not set"),
        ({"corpus": InstructionFile("no.json")}, r"data.path=no.json does not exist \(relative to "),
        ({"corpus": InstructionFile("/")}, "data.path=/ is a folder: name a JSON"),
    ],
)
def test_bad_settings(make, changes, said):
    with pytest.raises(InputError, match=f"^{said}[^\n]*$"):
        make(**changes).train_dataloader()


def test_no_test_split(make):
    data = make(test_ratio=0.0)
    assert data.report(parameters=1, world_size=1)[1].split() == ["training", "validation"]
    with pytest.raises(InputError, match=r"^the test split has no example to learn from"):
        data.examples("test")
