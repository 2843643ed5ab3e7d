"""Checkpoints that anybody may have made: every wrong entry ends in one line, and takes no memory or time."""

import copy
import random
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.checkpoints.files import CheckpointFolder, write_checkpoint
from gptpl.checkpoints.format import (
    HEADER_KEY,
    check_resumable,
    checkpoint_header,
    read_checkpoint,
)
from gptpl.checkpoints.loading import classifier_task, load_classifier, load_model
from gptpl.checkpoints.resume_state import RESUME_KEY, digest
from gptpl.errors import InputError
from gptpl.files.durable import record_file
from gptpl.files.plain import read_plain
from gptpl.generation import SamplingRules, complete
from gptpl.model import ClassifierConfig, GPTClassifier
from gptpl.tokenizers import BytesTokenizer, WordsTokenizer

LORA = {"name": "lora", "rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": ["qkv"]}
TRAINING = {"world_size": 1, "total_steps": 9, "lr_ceiling": None}


@pytest.fixture
def checkpoint(pretraining) -> Callable[[str], dict[str, Any]]:
    """What `gptpl train` writes: of a "model", of one "tuned" by LoRA, or of a "classifier"."""

    def make(kind: str = "model") -> dict[str, Any]:
        words = WordsTokenizer(["a", "b", "<|endoftext|>", "<|unk|>"])
        tokenizer = words if kind == "model" else BytesTokenizer()
        net = pretraining.net(vocab_size=tokenizer.vocab_size, tie_weights=kind == "model")
        config = {"seed": 1, "data": {"corpus": {"_target_": "a.B", "path": "x"}, "train_ratio": 0.9}}
        header = checkpoint_header(net.config, tokenizer, config)
        header |= {"tokens_seen": 8, "data_sha256": "0" * 64, "global_batch": 4, **TRAINING}
        if kind == "classifier":
            classifier = ClassifierConfig(n_classes=2)
            net = GPTClassifier.on(net, classifier)
            header["task"] = classifier_task(classifier, ("ham", "spam"), 16, None)
        weights = {f"net.{name}": tensor for name, tensor in net.state_dict().items()}
        if kind == "tuned":
            header |= {"tune": dict(LORA), "task": {"name": "pretrain"}}
            weights["net.blocks.0.attn.qkv.lora_A"] = torch.zeros(2, 16)
            weights["net.blocks.0.attn.qkv.lora_B"] = torch.zeros(48, 2)
            header["lineage"] = {"step": 1, "tokens_seen": 1, "data": {}, "losses": {}, "start": {}}
        made = {"global_step": 7, "state_dict": weights, HEADER_KEY: header}
        return made | {RESUME_KEY: {"step": 7}, "optimizer_states": []}

    return make


def use(path: Path) -> None:
    """All that the commands do with a checkpoint."""
    read = read_checkpoint(path)
    check_resumable(read, path)
    if read[HEADER_KEY].get("task", {}).get("name") == "classify":
        load_classifier(path)
        return
    loaded = load_model(path)
    complete(loaded.net, loaded.tokenizer, ["a b"], rules=SamplingRules(), max_new_tokens=2)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from places(item, (*path, key))


VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1,
        2,
        17,
        10**9,
        10**18,
        10**30,
        1.5,
        float("nan"),
        float("inf"),
        "",
        "lora",
        "classify",
    ),
    *("../x", "x" * 10_000, [], [1], ["a"], {}, {"a": 1}, {1: 2}, {"name": "words"}, {"name": None}),
)


def shared(levels: int) -> dict[str, Any]:
    nested: list[Any] = []
    for _ in range(levels):
        nested = [nested, nested]
    return {"data": nested}


def circular() -> dict[str, Any]:
    nested: dict[str, Any] = {}
    nested["data"] = nested
    return nested


@pytest.mark.parametrize("config", [shared(35), circular()], ids=["2^35 entries", "in a circle"])
def test_a_small_file_of_endless_settings_is_refused(config, checkpoint, tmp_path):
    made, path = checkpoint("model"), tmp_path / "a.ckpt"
    made[HEADER_KEY]["config"] = config
    torch.save(made, path)
    begun = time.monotonic()
    with pytest.raises(InputError, match="config"):
        read_checkpoint(path)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("kind", ["model", "tuned", "classifier"])
def test_a_hundred_wrong_entries_end_in_one_line_each(kind, checkpoint, tmp_path):
    draw = random.Random(18)
    path = tmp_path / "a.ckpt"
    good = checkpoint(kind)
    torch.save(good, path)
    use(path)
    everywhere = list(places(good))
    refused = 0
    for _ in range(35):
        changed = copy.copy(good)
        place = draw.choice(everywhere)
        holder: Any = changed
        for key in place[:-1]:
            holder[key] = copy.copy(holder[key])
            holder = holder[key]
        if draw.random() < 0.2:
            del holder[place[-1]]
        else:
            holder[place[-1]] = draw.choice((*VALUES, torch.zeros(2), torch.zeros(2, dtype=torch.int64)))
        torch.save(changed, path)
        begun = time.monotonic()
        said = None
        try:
            use(path)
        except InputError as error:
            said = str(error)
        refused += said is not None
        assert "\n" not in (said or ""), place
        assert time.monotonic() - begun < 20, place
    assert refused > 20


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_model(path)
    return str(caught.value)


def test_more_blocks_than_the_file_has(checkpoint, tmp_path):
    path = tmp_path / "a.ckpt"
    for layers, words in (
        (3_000_000, "at most 10,000, got 3000000"),
        (9_999, "holds 2 blocks, its own"),
    ):
        made = checkpoint()
        made[HEADER_KEY]["model"]["n_layers"] = layers
        torch.save(made, path)
        begun = time.monotonic()
        assert words in refusal(path)
        assert time.monotonic() - begun < 20


def test_weights_that_claim_more_numbers_than_the_file_holds(checkpoint, tmp_path):
    """A trillion numbers that are all the same one; and one matrix for every block."""
    path = tmp_path / "a.ckpt"
    made = checkpoint()
    made[HEADER_KEY]["model"]["vocab_size"] = 10**10
    made["state_dict"] |= dict.fromkeys(
        ("net.tok_emb.weight", "net.out_head.weight"), torch.zeros(1).expand(10**10, 16)
    )
    torch.save(made, path)
    assert "lacks numbers of a tensor of shape (10000000000, 16)" in refusal(path)
    made = checkpoint()
    del made["state_dict"]["net.out_head.weight"]
    shared = {name: tensor for name, tensor in made["state_dict"].items() if ".blocks.0." in name}
    made[HEADER_KEY]["model"]["n_layers"] = 40
    for block in range(40):
        made["state_dict"] |= {name.replace(".0.", f".{block}."): t for name, t in shared.items()}
    torch.save(made, path)
    assert "stores the same numbers for several weights" in refusal(path)


@pytest.mark.parametrize("tensor", [torch.zeros(4, 16, device="meta"), torch.zeros(4, 16).to_sparse()])
def test_tensors_without_numbers(checkpoint, tmp_path, tensor):
    made = checkpoint()
    made["state_dict"]["net.tok_emb.weight"] = tensor
    torch.save(made, tmp_path / "a.ckpt")
    assert "lacks numbers of a tensor of shape (4, 16)" in refusal(tmp_path / "a.ckpt")


def test_low_rank_matrices_whose_product_would_fill_the_memory(checkpoint, tmp_path):
    made = checkpoint("tuned")
    made["state_dict"]["net.blocks.0.attn.qkv.lora_A"] = torch.zeros(2, 10**6)
    made["state_dict"]["net.blocks.0.attn.qkv.lora_B"] = torch.zeros(10**6, 2)
    torch.save(made, tmp_path / "a.ckpt")
    assert "is not of the shape of its low-rank matrices" in refusal(tmp_path / "a.ckpt")


def test_a_file_that_is_packed(checkpoint, tmp_path):
    """A packed pickle of a few MB may be of as many GB."""
    path, packed = tmp_path / "a.ckpt", tmp_path / "packed.ckpt"
    torch.save(checkpoint(), path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for part in stored.infolist():
            archive.writestr(part.filename, stored.read(part))
    assert "is compressed, as torch.save never does" in refusal(packed)


# --- what is named instead, and the SHA-256 beside a file -------------------------------------------------


@pytest.fixture
def folder(checkpoint, tmp_path) -> Path:
    """A run's checkpoints: a best one, steps 1 and 2, and a link to the newest."""
    there = tmp_path / "checkpoints"
    write_checkpoint(checkpoint(), there / "best.ckpt")
    for step in (1, 2):
        write_checkpoint(checkpoint(), there / f"step-{step:08d}.ckpt")
    CheckpointFolder(there, keep=2).settle(2)
    return there


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2000])


def test_beside_a_damaged_checkpoint_a_whole_one_is_named(folder):
    last = folder / "last.ckpt"
    cut(last)
    assert refusal(last).endswith(f": use {folder / 'best.ckpt'}, which is whole")
    cut(folder / "best.ckpt")
    assert refusal(last).endswith(f": use {folder / 'step-00000001.ckpt'}, which is whole")
    cut(folder / "step-00000001.ckpt")
    assert refusal(last).endswith(": use another one")


def test_a_run_whose_steps_are_all_damaged_may_begin_anew_from_its_best(folder):
    for step in (1, 2):
        cut(folder / f"step-{step:08d}.ckpt")
    with pytest.raises(InputError, match=r"start a new run from init=run init\.checkpoint=.*best\.ckpt$"):
        CheckpointFolder(folder, keep=2).newest_good()


@pytest.mark.parametrize("record", [b"", b"\x00\xff\x00", b"not a hash\n", b"0" * 63, b"\n" * 100_000, None])
def test_a_record_of_the_hash_that_is_none(folder, record):
    """The checkpoint is then checked by the CRC-32 of its parts, as without a record."""
    path = folder / "best.ckpt"
    if record is None:
        record_file(path).unlink()
        record_file(path).mkdir()
    else:
        record_file(path).write_bytes(record)
    read_checkpoint(path)
    flip(path, path.read_bytes().index(b"net."))
    assert "best.ckpt is damaged (" in refusal(path)


@pytest.mark.parametrize("refused", [False, True])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(checkpoint, tmp_path, monkeypatch, refused):
    """What is given is the content that was verified; torch opens the file a second time for its tensors."""
    path, count = tmp_path / "best.ckpt", 0
    old, new = (checkpoint() | {"global_step": step} for step in (1, 2))
    write_checkpoint(old, path)

    def replaced(file: Path, **settings: Any) -> Any:
        nonlocal count
        count += 1
        content = read_plain(file, **settings)
        if count == 1:
            write_checkpoint(new, path)
            if refused:
                raise InputError("damaged, as it was read from both files")
        return content

    monkeypatch.setattr("gptpl.checkpoints.format.read_plain", replaced)
    assert read_checkpoint(path)["global_step"] == 2
    assert count == 2


# --- a file that is alone ---------------------------------------------------------------------------------


def flip(path: Path, *positions: int) -> None:
    content = bytearray(path.read_bytes())
    for position in positions:
        content[position] ^= 1 << position % 8
    path.write_bytes(content)


def test_a_flipped_bit_in_any_tensor_of_a_lone_checkpoint_is_found(checkpoint, tmp_path):
    """One or several, in every tensor of model and optimizer; torch loads such a file without a word."""
    path, damaged = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    made = checkpoint()
    made["optimizer_states"] = [{"state": {0: {"exp_avg": torch.randn(50)}}}]
    write_checkpoint(made, path)
    record_file(path).unlink()
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        tensors = [part for part in archive.infolist() if "/data/" in part.filename]
        places = [whole.index(archive.read(part), part.header_offset) for part in tensors]
    assert len(tensors) == len(made["state_dict"])  # the tied head has none of its own, the optimizer has one
    draw = random.Random(61)
    for part, start in zip(tensors, places, strict=True):
        for bits in (1, 1, 2, 30):
            shutil.copy(path, damaged)
            flip(damaged, *draw.sample(range(start, start + part.file_size), bits))
            torch.load(damaged, weights_only=True)
            assert f"b.ckpt is damaged ({part.filename} does not have its CRC-32)" in refusal(damaged)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol", "ignore:TypedStorage is deprecated")
def test_flipped_bits_anywhere_change_nothing_that_is_loaded(checkpoint, tmp_path):
    """In the pickle, the zip's directory, or between the parts, where they do no harm."""
    path, damaged = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    write_checkpoint(checkpoint(), path)
    record_file(path).unlink()
    whole, size, draw = digest(read_checkpoint(path)), path.stat().st_size, random.Random(19)
    refused = 0
    for number in range(150):
        shutil.copy(path, damaged)
        flip(damaged, draw.randrange((3000, size, size)[number % 3]))
        try:
            assert digest(read_checkpoint(damaged)) == whole
        except InputError:
            refused += 1
    assert refused > 50
