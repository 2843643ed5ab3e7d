"""`model=gpt_modern` through the library: trained, stopped and resumed, tuned, exported, refused."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

import gptpl
from gptpl.checkpoints.files import CheckpointFolder
from gptpl.checkpoints.format import read_checkpoint
from gptpl.checkpoints.loading import load_model
from gptpl.errors import InputError
from gptpl.generation import generate
from gptpl.model import GPTConfig, GPTModel, parameters_of
from gptpl.runs.export import export
from gptpl.runs.resume import resume_plan
from gptpl.tokenizers import BytesTokenizer
from gptpl.weights.hugging_face import write_files

SMALL = ("model.context_length=32", "model.emb_dim=24", "model.n_heads=2", "model.n_layers=2")
COMMON = (
    *("trainer=cpu", "trainer.precision=32-true", "tokenizer=bytes", "scheduler.warmup_steps=1"),
    *("optimizer.lr=1e-2", "eval_every_n_steps=2", "logger=csv"),
)
MODERN = ("model=gpt_modern", *SMALL)


def weights(run: Path) -> dict[str, torch.Tensor]:
    good = CheckpointFolder(run / "checkpoints", keep=1).newest_good()
    assert good is not None
    tensors: dict[str, torch.Tensor] = read_checkpoint(good.path)["state_dict"]
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `whole`, a run of 5 steps, and `stopped`, the same after 3 of them."""
    folder: Path = tmp_path_factory.mktemp("modern")
    draw = random.Random(0)
    (folder / "text.txt").write_text("".join(draw.choice("abcdefgh ") for _ in range(2000)))
    data = ("data=text_file", f"data.path={folder / 'text.txt'}", "trainer.max_steps=5")
    for name, more in (("whole", ()), ("stopped", ("trainer.stop_at_step=3",))):
        gptpl.build(*COMMON, *MODERN, *data, f"run_dir={folder / name}", *more).fit()
    return folder


def test_a_stopped_run_ends_with_the_bits_of_the_whole_one(folder):
    with pytest.raises(
        InputError, match=r"^model\.norm cannot change .* it was rmsnorm, asked for is layern"
    ):
        resume_plan(folder / "stopped", ["model.norm=layernorm"])
    run = gptpl.resume(folder / "stopped", "trainer.stop_at_step=null")
    run.fit()
    resumed, whole = weights(folder / "stopped"), weights(folder / "whole")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert "net.pos_emb.weight" not in whole


def test_it_is_loaded_writes_what_it_writes_uncached_and_is_counted(folder):
    net: Any = load_model(folder / "whole").net
    assert parameters_of(net) == sum(parameter.numel() for parameter in net.parameters())
    prompt = torch.tensor([[97, 98, 99]])
    written = generate(net, prompt, max_new_tokens=40)  # beyond the context
    tokens = prompt
    with torch.no_grad():
        for _ in range(40):
            tokens = torch.cat([tokens, net(tokens[:, -32:])[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(written, tokens)


def test_gptpls_own_format_holds_it_and_the_others_name_what_they_have_no_place_for(folder):
    loaded = load_model(folder / "whole")
    for format in ("hf", "book", "nanogpt"):
        with pytest.raises(
            InputError, match=f"^format={format} holds GPT-2 models, .*position=learned, got ro"
        ):
            export(loaded, format, folder / format)
        assert not (folder / format).exists()
    export(loaded, "gptpl", folder / "own")
    again = load_model(folder / "own/model.ckpt").net
    assert all(
        torch.equal(again.state_dict()[name], tensor) for name, tensor in loaded.net.state_dict().items()
    )


@pytest.mark.parametrize("change", [{"linear_bias": False}, {"hidden_dim": 100}])
def test_a_gpt2_of_other_layers_is_refused_too(change, tmp_path):
    settings: dict[str, Any] = {
        "vocab_size": 9,
        "context_length": 4,
        "emb_dim": 8,
        "n_heads": 2,
        "n_layers": 1,
    }
    (name, value), *_ = change.items()
    with pytest.raises(
        InputError, match=rf"which have model\.{name}=\w+, got {str(value).lower()}: use format"
    ):
        write_files(
            GPTModel(GPTConfig(**settings, qkv_bias=True, **change)),
            tmp_path,
            tokenizer=BytesTokenizer(),
            dtype="float32",
        )


def test_gpt2s_weights_are_refused_by_name(tmp_path):
    model = ("model=gpt2_small", "model.position=rope", "model.linear_bias=false", "init=gpt2_hf")
    with pytest.raises(
        InputError, match=r"position=rope, they have learned; model\.linear_bias=false, they have t"
    ):
        gptpl.build(*COMMON[:2], *model, f"run_dir={tmp_path}")


@pytest.mark.parametrize("tune", ["lora", "last_block"])
def test_a_part_of_it_is_tuned_and_lora_leaves_no_adapter_for_peft(folder, tune, caplog):
    caplog.set_level("INFO")
    run_dir = folder / tune
    base = ("init=run", f"init.checkpoint={folder / 'whole'}", "model.tie_weights=true")
    text = ("data=text_file", f"data.path={folder / 'text.txt'}", "trainer.max_steps=2", f"run_dir={run_dir}")
    more = ("tune.targets=[qkv,gate_proj,down_proj]",) if tune == "lora" else ()
    gptpl.build(*COMMON, *MODERN, *base, *text, f"tune={tune}", *more).fit()
    before, after = weights(folder / "whole"), weights(run_dir)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if tune == "last_block":
        assert changed == {name for name in before if name.startswith(("net.blocks.1.", "net.final_norm"))}
        return
    assert not changed
    assert {name.split(".")[-2] for name in after.keys() - before.keys()} == {"qkv", "gate_proj", "down_proj"}
    assert "no adapter: format=adapter holds GPT-2 models" in caplog.text
    assert load_model(run_dir).net.state_dict().keys() == load_model(folder / "whole").net.state_dict().keys()
