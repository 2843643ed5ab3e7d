"""Checkpoints of LoRA: merged where a model is wanted, apart in an adapter, whole again with its base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptpl.checkpoints.adapter import adapter_checkpoint, export_adapter
from gptpl.checkpoints.files import write_checkpoint
from gptpl.checkpoints.format import HEADER_KEY, NET_PREFIX, checkpoint_header, net_weights, read_checkpoint
from gptpl.checkpoints.loading import RunWeights, load_model, model_of
from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTBackbone, GPTClassifier, GPTModel
from gptpl.model.parameters import TuneLowRank
from gptpl.model.protocol import gpt_model
from gptpl.tokenizers import BytesTokenizer
from gptpl.weights.formats import FORMATS
from gptpl.weights.starting import FileWeights

LORA = TuneLowRank(rank=3, alpha=6.0, dropout=0.1, targets=("qkv", "out_proj", "up_proj", "down_proj"))
TOKENS = torch.arange(2 * 16).view(2, 16) * 7 % 257


def save(net: GPTBackbone, path: Path, **header: Any) -> Path:
    """A checkpoint as training writes it, without the state of the training."""
    path.parent.mkdir(parents=True)
    start = header.pop("start", {"init": "random"})
    whole = checkpoint_header(net.config, BytesTokenizer(), {"seed": 7}, start) | header
    state = {f"{NET_PREFIX}{name}": tensor for name, tensor in net.state_dict().items()}
    write_checkpoint({HEADER_KEY: whole, "state_dict": state, "global_step": 5}, path)
    return path


class Runs:
    """A base run, and a run of LoRA that began with it."""

    def __init__(self, net: GPTModel, folder: Path) -> None:
        self.base = save(net, folder / "base/checkpoints/last.ckpt")
        self.folder = folder
        start = {"init": "run", "checkpoint": str(self.base), "crop_context": False, "crop_vocabulary": False}
        self.start: dict[str, Any] = start | {"parent": {"step": 5, "start": {"init": "random"}}}

    def low_rank(
        self, *, task: str = "pretrain", dtype: torch.dtype = torch.float32, start: Any = None
    ) -> tuple[GPTBackbone, Path]:
        """The model as the training had it, in evaluation mode, and its checkpoint."""
        net: GPTBackbone = gpt_model(load_model(self.base).net, "")
        if task == "classify":
            net = GPTClassifier.on(net, ClassifierConfig(n_classes=3))
        LORA.apply(net)
        for name, parameter in net.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.3)
        net.to(dtype).eval()
        about: dict[str, Any] = {"tune": LORA.state(), "task": {"name": task, "n_classes": 3}}
        path = self.folder / f"{task} {str(dtype)[-4:]} {bool(start)}/checkpoints/last.ckpt"
        return net, save(net, path, start=start or self.start, **about)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def runs(request: pytest.FixtureRequest, pretraining: Any, tmp_path: Path) -> Runs:
    return Runs(pretraining.net(tie_weights=request.param, init="gpt2"), tmp_path)


@pytest.fixture
def untied(pretraining: Any, tmp_path: Path) -> Runs:
    return Runs(pretraining.net(), tmp_path)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs) or set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def test_a_model_loads_merged_and_computes_what_was_trained(runs):
    net, path = runs.low_rank()
    loaded = load_model(path)
    assert list(loaded.net.state_dict()) == list(load_model(runs.base).net.state_dict())
    torch.testing.assert_close(loaded.net(TOKENS), net(TOKENS), atol=1e-5, rtol=0)
    assert (loaded.net(TOKENS) - load_model(runs.base).net(TOKENS)).abs().max() > 0.05
    config = gpt_model(loaded.net, "").config
    started, origin = RunWeights(checkpoint=str(path)).make_model(config)
    same(started.state_dict(), loaded.net.state_dict())
    assert origin["parent"]["start"]["checkpoint"] == str(runs.base)


def test_an_adapter_with_its_base_is_the_merged_model_bit_for_bit(runs):
    _, path = runs.low_rank()
    folder = runs.folder / "adapter"
    export_adapter(path, folder)
    assert {file.name for file in folder.iterdir()} == {
        "adapter_model.safetensors", "adapter_config.json", "gptpl.json"
    }  # fmt: skip
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        runs.base
    )
    again, loaded = model_of(adapter_checkpoint(folder), folder), load_model(path)
    same(again.net.state_dict(), loaded.net.state_dict())
    assert (again.step, again.run_config, again.tokenizer.state()) == (
        5,
        {"seed": 7},
        loaded.tokenizer.state(),
    )
    assert again.lineage == loaded.lineage
    # Far less than the model: the matrices alone.
    assert (folder / "adapter_model.safetensors").stat().st_size < path.stat().st_size / 2


def test_writing_it_again_replaces_it(untied):
    _, path = untied.low_rank()
    folder = untied.folder / "adapter"
    export_adapter(path, folder)
    before = (folder / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(path.parent)
    export_adapter(untied.low_rank()[1], folder)  # other numbers
    assert (folder / "adapter_model.safetensors").read_bytes() != before
    assert len(list(folder.iterdir())) == 3
    adapter_checkpoint(folder)


def test_a_classifiers_adapter_has_its_head(runs):
    _, path = runs.low_rank(task="classify")
    folder = runs.folder / "adapter"
    export_adapter(path, folder)
    again = adapter_checkpoint(folder)
    same(net_weights(again), net_weights(read_checkpoint(path)))
    assert "out_head.bias" in net_weights(again)
    assert again[HEADER_KEY]["task"] == {"name": "classify", "n_classes": 3}


def test_weights_in_bf16_are_merged_in_fp32(untied):
    net, path = untied.low_rank(dtype=torch.bfloat16)
    folder = untied.folder / "adapter"
    export_adapter(path, folder)
    again, loaded = model_of(adapter_checkpoint(folder), folder), load_model(path)
    same(again.net.state_dict(), loaded.net.state_dict())
    torch.testing.assert_close(loaded.net(TOKENS), net.float()(TOKENS), atol=1e-5, rtol=0)


def test_a_base_that_has_moved_is_asked_for_and_can_be_given(untied):
    _, path = untied.low_rank()
    folder = untied.folder / "adapter"
    export_adapter(path, folder)
    hf = untied.folder / "hf"
    hf.mkdir()
    FORMATS["book"].write(
        gpt_model(load_model(untied.base).net, ""), hf, tokenizer=BytesTokenizer(), dtype="float32"
    )
    moved = untied.base.rename(untied.base.with_name("elsewhere.ckpt"))
    with pytest.raises(
        InputError, match=r"is an adapter, and its base weights cannot be used \(.*last\.ckpt.*\)"
    ):
        adapter_checkpoint(folder)
    expected = load_model(path).net.state_dict()
    for base in (RunWeights(checkpoint=str(moved)), FileWeights(path=str(hf))):
        same(model_of(adapter_checkpoint(folder, base=base), folder).net.state_dict(), expected)


def test_another_base_is_refused(untied, pretraining):
    _, path = untied.low_rank()
    folder = untied.folder / "adapter"
    export_adapter(path, folder)
    net = gpt_model(load_model(untied.base).net, "")
    with torch.no_grad():
        net.final_norm.weight[3] += 1e-6
    shutil.rmtree(untied.base.parent)
    save(net, untied.base)
    with pytest.raises(InputError, match=r"is an adapter of other weights \(SHA-256 .*last\.ckpt has .*: g"):
        adapter_checkpoint(folder)


def test_an_adapter_that_was_changed_is_refused(untied):
    _, path = untied.low_rank()
    folder = untied.folder / "adapter"
    export_adapter(path, folder)
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(InputError, match="does not name the base weights of its adapter"):
        adapter_checkpoint(folder)
    data[-1] ^= 1
    file.write_bytes(data)
    config = folder / "adapter_config.json"
    text = config.read_text()
    config.write_text(text.replace('"lora_alpha": 6.0', '"lora_alpha": 60.0'))
    with pytest.raises(InputError, match=r"has another lora_alpha or r .*: restore .* lora_alpha=6\)$"):
        adapter_checkpoint(folder)
    config.write_text(text)
    adapter_checkpoint(folder)
    record = json.loads((folder / "gptpl.json").read_text())
    (folder / "gptpl.json").write_text(json.dumps(record | {"base": {"sha256": "0" * 64}}))
    with pytest.raises(InputError, match=r"gptpl\.json lacks base\.dtype: export the adapter again"):
        adapter_checkpoint(folder)
    (folder / "gptpl.json").unlink()
    with pytest.raises(InputError, match="does not name the base weights of its adapter"):
        adapter_checkpoint(folder)


def test_what_leaves_no_adapter(untied):
    with pytest.raises(InputError, match=r"was trained with tune=all, which leaves no adapter: give a run"):
        export_adapter(untied.base, untied.folder / "adapter")
    _, path = untied.low_rank(start={"init": "random"})
    with pytest.raises(InputError, match=r"began with random weights, which no file holds .*: convert it"):
        export_adapter(path, untied.folder / "adapter")
    assert not (untied.folder / "adapter").exists()


def test_a_run_does_not_begin_with_an_adapter_alone(untied):
    _, path = untied.low_rank()
    folder = untied.folder / "adapter"
    export_adapter(path, folder)
    with pytest.raises(InputError, match=r"^init\.checkpoint=.*adapter is an adapter: add it to its base"):
        _ = RunWeights(checkpoint=str(folder)).file


def test_checkpoints_from_before_there_was_a_choice_are_whole(untied):
    checkpoint = read_checkpoint(untied.base)
    assert "tune" not in checkpoint[HEADER_KEY]
    assert net_weights(checkpoint).keys() == load_model(untied.base).net.state_dict().keys()


def test_an_adapter_fetches_no_base_on_its_own(untied, tmp_path, monkeypatch):
    """Who made the folder does not decide what this machine downloads."""
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("gptpl.weights.starting.fetch", lambda *args, **kwargs: pytest.fail("it fetched"))
    _, path = untied.low_rank()
    folder = untied.folder / "adapter"
    export_adapter(path, folder)
    record = json.loads((folder / "gptpl.json").read_text())
    record["lineage"]["start"] = {"init": "gpt2_hf", "size": "124M", "path": None, "crop_context": True}
    (folder / "gptpl.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=r"cannot be used \(GPT-2 124M is not in the cache\).*init=gpt2_hf"):
        adapter_checkpoint(folder)
