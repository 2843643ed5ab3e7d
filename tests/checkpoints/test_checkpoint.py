"""Checkpoints of real runs read back, and files that must be refused in one line."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptpl.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from gptpl.checkpoints.format import HEADER_KEY, check_same_model, checkpoint_header, read_checkpoint
from gptpl.checkpoints.loading import load_model
from gptpl.errors import InputError
from gptpl.model import GPTModel
from gptpl.model.protocol import gpt_model
from gptpl.tokenizers import BytesTokenizer, WordsTokenizer

TOKENS = torch.arange(97, 109)[None]  # (1, 12)


def logits(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net.eval()(TOKENS)


@pytest.fixture
def save(pretraining, tmp_path) -> Callable[..., Path]:
    """Writes a checkpoint with the parts that `gptpl train` puts into one, changed as asked."""

    def write(change: Callable[[dict[str, Any]], Any] = lambda checkpoint: None, **model: Any) -> Path:
        net = pretraining.net(**model)
        checkpoint = {
            "global_step": 7,
            "state_dict": {f"net.{name}": tensor for name, tensor in net.state_dict().items()},
            HEADER_KEY: checkpoint_header(net.config, BytesTokenizer(), {"seed": 1}),
        }
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "a.ckpt")
        return tmp_path / "a.ckpt"

    return write


def refusal(path: Path) -> str:
    """What is said when the file is loaded: one line that names it."""
    with pytest.raises(InputError) as caught:
        load_model(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# --- what a run wrote -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tie_weights", [False, True])
def test_a_runs_checkpoints_give_the_same_logits(pretraining, tmp_path, tie_weights):
    module = pretraining.module(pretraining.net(tie_weights=tie_weights, drop_rate=0.1), total_steps=6)
    folder = tmp_path / "checkpoints"
    pretraining.fit(*(kept(dirpath=str(folder)) for kept in (LastCheckpoint, BestCheckpoint)), module=module)
    for name in ("last", "best"):  # the last step was the best
        loaded = load_model(folder / f"{name}.ckpt")
        assert not loaded.net.training
        assert logits(loaded.net).equal(logits(module.net))
        assert loaded.net.config == module.net.config
        assert loaded.tokenizer.state() == BytesTokenizer().state()
        assert loaded.run_config == module.run_config
        assert loaded.step == 6
        assert loaded.path == folder / f"{name}.ckpt"


def test_a_tied_head_is_still_tied_after_loading(save):
    """Two tensors with the same numbers would cost memory, and come apart in training."""
    net = gpt_model(load_model(save(tie_weights=True)).net, "")
    assert net.out_head.weight is net.tok_emb.weight
    assert len(list(net.parameters())) == len(list(GPTModel(net.config).parameters()))


def test_the_loaded_model_lives_in_memory_and_not_in_the_file(save):
    path = save()
    net = load_model(path).net
    before = logits(net)
    path.write_bytes(b"\xff" * path.stat().st_size)
    assert logits(net).equal(before)
    assert all(p.requires_grad and not p.is_meta for p in net.parameters())


def test_a_resumed_run_goes_on_from_step_and_tokens_seen(pretraining, tmp_path):
    pretraining.fit(LastCheckpoint(dirpath=str(tmp_path)), module=pretraining.module(total_steps=6))
    module = pretraining.module(total_steps=9)
    trainer = pretraining.fit(module=module, resume=tmp_path / "last.ckpt")
    assert trainer.global_step == 9
    assert module.tokens_seen == 9 * 4 * 16
    assert pretraining.column("train/tokens_seen") == {step: step * 64.0 for step in range(1, 10)}


# --- files that are no checkpoints ----------------------------------------------------------------------


def test_a_missing_file(tmp_path):
    assert "does not exist: give a run folder or a .ckpt file" in refusal(tmp_path / "none.ckpt")


def test_a_folder(tmp_path):
    assert "holds no checkpoints/last.ckpt or best.ckpt" in refusal(tmp_path)


def test_an_unreadable_file_is_said_to_be_so(save, monkeypatch):
    def denied(self: Path, *args: Any) -> None:
        raise PermissionError(13, "Permission denied")

    path = save()
    monkeypatch.setattr(Path, "open", denied)
    assert "cannot be read (Permission denied): check its permissions" in refusal(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.2, 0.5, 0.7, 0.9, 0.999])
def test_a_file_cut_short(save, share):
    """At any point; an empty file too."""
    path = save()
    content = path.read_bytes()
    size = int(share * len(content))
    path.write_bytes(content[:size])
    assert f"damaged or cut short ({size:,} bytes): use another" in refusal(path)


@pytest.mark.parametrize("content", [b"Once upon a time\n", bytes(1000), b"PK\x03\x04", b"\x80\x02", b"\n"])
def test_files_of_other_kinds(tmp_path, content):
    path = tmp_path / "a.ckpt"
    path.write_bytes(content)
    assert "use another" in refusal(path)


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_code_in_a_checkpoint_does_not_run(save, tmp_path):
    payload = Payload(tmp_path / "ran")
    function, arguments = payload.__reduce__()
    function(*arguments)
    assert payload.marker.exists()  # so it would
    payload.marker.unlink()
    path = save(lambda checkpoint: checkpoint.update(extra=payload))
    assert "it was not loaded" in refusal(path)
    assert not payload.marker.exists()


def test_everything_is_read_as_plain_data(save, monkeypatch):
    calls: list[dict[str, Any]] = []
    load = torch.load

    def noting(*args: Any, **options: Any) -> Any:
        calls.append(options)
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", noting)
    load_model(save())
    assert calls
    assert all(options["weights_only"] is True for options in calls)


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, {HEADER_KEY: {}}, {HEADER_KEY: 1, "state_dict": {}}, []]
)
def test_a_torch_file_of_another_program(tmp_path, content):
    torch.save(content, tmp_path / "a.ckpt")
    assert "was not written by gptpl train" in refusal(tmp_path / "a.ckpt")


# --- checkpoints that do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize("version", [3, 0, None, "1", torch.ones(2)])
def test_another_format_version(save, version):
    path = save(lambda checkpoint: checkpoint[HEADER_KEY].update(format_version=version))
    message = refusal(path)
    assert f"has format version {version}, this gptpl reads up to 2" in message


@pytest.mark.parametrize("part", ["model", "tokenizer", "config"])
def test_a_header_with_a_part_missing(save, part):
    assert f"{part} is missing" in refusal(save(lambda checkpoint: checkpoint[HEADER_KEY].pop(part)))


def test_a_model_described_in_unknown_fields(save):
    path = save(lambda checkpoint: checkpoint[HEADER_KEY]["model"].update(n_experts=8))
    assert "n_experts" in refusal(path)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda weights: weights.pop("net.final_norm.bias"), "holds 'final_norm.bias' as nothing"),
        (lambda weights: weights.update({"net.extra": torch.zeros(3)}), "holds 'extra' as (3,)"),
        (
            lambda weights: weights.update({"net.out_head.weight": torch.zeros(257, 8)}),
            "holds 'out_head.weight' as (257, 8), its own configuration wants (257, 16)",
        ),
    ],
)
def test_weights_that_are_not_the_configurations(save, change, expected):
    assert expected in refusal(save(lambda checkpoint: change(checkpoint["state_dict"])))


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_layers", 3), ("emb_dim", 32), ("vocab_size", 300), ("context_length", 8), ("qkv_bias", True)],
)
def test_a_checkpoint_of_another_shape(pretraining, field, value):
    config = pretraining.net().config
    header = checkpoint_header(config, BytesTokenizer(), {})
    other = dataclasses.replace(config, **{field: value})
    mine = getattr(config, field)
    with pytest.raises(
        InputError, match=rf"model\.{field}={mine}, this run wants {value}: set model\.{field}="
    ):
        check_same_model(header, other, BytesTokenizer().state())


def test_settings_that_only_steer_training_may_differ(pretraining):
    config = pretraining.net().config
    other = dataclasses.replace(config, drop_rate=0.3, init="gpt2")
    check_same_model(checkpoint_header(config, BytesTokenizer(), {}), other, BytesTokenizer().state())


def test_a_checkpoint_of_another_tokenizer(pretraining):
    config = pretraining.net().config
    words, same, others = (WordsTokenizer().fitted_to([text]) for text in ("a b", "b a", "a c"))
    header = checkpoint_header(config, words, {})
    check_same_model(header, config, same.state())
    with pytest.raises(
        InputError, match="trained with tokenizer=words, this run has bytes: set tokenizer=words"
    ):
        check_same_model(header, config, BytesTokenizer().state())
    with pytest.raises(InputError, match=f"words vocabulary .{words.sha256[:12]}. differs from this run's"):
        check_same_model(header, config, others.state())


def test_resuming_refuses_another_model_before_a_weight_is_touched(pretraining, tmp_path):
    pretraining.fit(LastCheckpoint(dirpath=str(tmp_path)), module=pretraining.module(total_steps=4))
    module = pretraining.module(pretraining.net(n_layers=1), total_steps=6)
    before = logits(module.net)
    with pytest.raises(InputError, match=r"model\.n_layers=2, this run wants 1"):
        pretraining.fit(module=module, resume=tmp_path / "last.ckpt")
    assert logits(module.net).equal(before)


def test_read_checkpoint_gives_plain_data(save):
    checkpoint = read_checkpoint(save())
    assert checkpoint["global_step"] == 7
    assert checkpoint[HEADER_KEY]["config"] == {"seed": 1}
