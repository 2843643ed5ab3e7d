"""LoRA's small files against PEFT on transformers' GPT-2: the same logits, the same training."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTClassifier, GPTConfig, GPTModel
from gptpl.model.lora import add_low_rank, is_low_rank
from gptpl.tokenizers import BytesTokenizer
from gptpl.weights.adapter import Adapter, read_adapter, write_adapter
from gptpl.weights.formats import FORMATS

# peft 0.21 asks transformers >= 5.20 in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RANK, ALPHA = 3, 12.0
BLOCKS = ("qkv", "out_proj", "up_proj", "down_proj")
TOKENS = torch.arange(2 * 20).view(2, 20) * 7 % 61


@pytest.fixture
def base(config: Callable[..., GPTConfig], tmp_path: Path) -> Callable[..., tuple[GPTModel, Path]]:
    """`base(tie_weights=...)`: a model, and its folder as transformers reads it."""

    def make(**changes: Any) -> tuple[GPTModel, Path]:
        torch.manual_seed(3)
        net = GPTModel(config(drop_rate=0.0, **changes)).eval()
        folder = tmp_path / "base"
        folder.mkdir()
        FORMATS["hf"].write(net, folder, tokenizer=BytesTokenizer(), dtype="float32")
        return net, folder

    return make


def with_adapter(net: GPTModel | GPTClassifier, *targets: str) -> Adapter:
    """Adds matrices that are not zeros to the model; returns them."""
    add_low_rank(net, rank=RANK, alpha=ALPHA, dropout=0.0, targets=targets)
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(is_low_rank(name))
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.2)
    return adapter_of(net)


def adapter_of(net: GPTModel | GPTClassifier) -> Adapter:
    """Copies of what is new in the model."""
    classes = isinstance(net, GPTClassifier)
    new = {
        name: tensor.clone()
        for name, tensor in net.state_dict().items()
        if is_low_rank(name) or (classes and name.startswith("out_head."))
    }
    norm = {f"final_norm.{kind}": net.state_dict()[f"final_norm.{kind}"] for kind in ("weight", "bias")}
    return Adapter(tensors=new, rank=RANK, alpha=ALPHA, dropout=0.1, final_norm=norm)


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(adapter: Adapter, config: GPTConfig, base_folder: Path) -> Path:
        folder = tmp_path / "adapter"
        folder.mkdir()
        write_adapter(adapter, config, folder, base=str(base_folder))
        return folder

    return write


@pytest.mark.slow
@pytest.mark.parametrize(
    ("targets", "tied"), [(("qkv",), True), (BLOCKS, True), (("down_proj", "out_head"), False)]
)
def test_peft_opens_it_on_the_exported_base_with_the_same_logits(base, written, targets, tied):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    net, base_folder = base(tie_weights=tied)
    before = net(TOKENS)
    folder = written(with_adapter(net, *targets), net.config, base_folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base_folder)
    with (
        pytest.warns(UserWarning, match="fan_in_fan_out")
        if "out_head" in targets
        else contextlib.nullcontext()
    ):
        model = peft.PeftModel.from_pretrained(theirs, folder).eval()
    assert (net(TOKENS) - before).abs().max() > 0.05
    torch.testing.assert_close(model(TOKENS).logits, net(TOKENS), atol=1e-5, rtol=1e-5)
    # What PEFT writes of it is the same to us.
    model.save_pretrained(folder, save_embedding_layers=False)
    again = read_adapter(folder, net.config)
    assert (again.rank, again.alpha) == (RANK, ALPHA)
    assert again.tensors.keys() == adapter_of(net).tensors.keys()
    for name, tensor in adapter_of(net).tensors.items():
        assert torch.equal(again.tensors[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
def test_peft_opens_a_classifiers_with_its_head(base, written, bias):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    net, base_folder = base()
    classifier = GPTClassifier.on(net, ClassifierConfig(n_classes=4, head_bias=bias)).eval()
    if bias:
        torch.nn.init.normal_(classifier.out_head.bias)
    adapter = with_adapter(classifier, *BLOCKS)
    folder = written(adapter, net.config, base_folder)
    theirs = transformers.GPT2ForSequenceClassification.from_pretrained(base_folder, num_labels=4)
    theirs.config.pad_token_id = 60
    model = peft.PeftModel.from_pretrained(theirs, folder).eval()
    lengths = torch.tensor([20, 20])
    torch.testing.assert_close(model(TOKENS).logits, classifier(TOKENS, lengths), atol=1e-5, rtol=1e-5)
    again = read_adapter(folder, net.config)  # to which the norm is the base's
    assert again.tensors.keys() == adapter.tensors.keys()
    assert ("out_head.bias" in again.tensors) is bias


def test_a_bias_that_peft_cannot_have_is_said(base, written, caplog):
    net, base_folder = base()
    classifier = GPTClassifier.on(net, ClassifierConfig(n_classes=40))
    torch.nn.init.normal_(classifier.out_head.bias)
    folder = written(with_adapter(classifier, "qkv"), net.config, base_folder)
    assert "PEFT has no place for the bias of this head" in caplog.text
    assert torch.equal(
        read_adapter(folder, net.config).tensors["out_head.bias"], classifier.out_head.bias.detach()
    )


@pytest.mark.slow
def test_peft_trains_as_we_do(base, written):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    net, base_folder = base()
    folder = written(with_adapter(net, *BLOCKS), net.config, base_folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(base_folder)
    model = peft.PeftModel.from_pretrained(theirs, folder, is_trainable=True)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    losses: dict[str, list[float]] = {}
    for name, trained, logits in (("ours", net, net), ("peft", model, lambda tokens: model(tokens).logits)):
        parameters = [p for p in trained.train().parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        losses[name] = []
        for _ in range(5):
            loss = F.cross_entropy(logits(TOKENS[:, :-1]).transpose(1, 2), TOKENS[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["ours"][-1] < losses["ours"][0] - 0.05
    assert losses["ours"] == pytest.approx(losses["peft"], abs=2e-5)


# ------------------------------------------------------------------------------- files, without their program


def test_names_and_settings_are_pefts(base, written):
    net, base_folder = base()
    folder = written(with_adapter(net, "qkv", "out_proj"), net.config, base_folder)
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["target_modules"] == ["attn.c_attn", "attn.c_proj"]
    assert (said["r"], said["lora_alpha"], said["lora_dropout"], said["fan_in_fan_out"]) == (
        3,
        12.0,
        0.1,
        True,
    )
    assert (said["peft_type"], said["task_type"]) == ("LORA", "CAUSAL_LM")
    assert said["base_model_name_or_path"] == str(base_folder)
    again = read_adapter(folder, net.config)
    assert again.tensors.keys() == adapter_of(net).tensors.keys()
    for name, tensor in adapter_of(net).tensors.items():
        assert torch.equal(again.tensors[name], tensor), name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"use_dora": True}, "has use_dora=True, gptpl False: merge the adapter with PEFT"),
        ({"peft_type": "IA3"}, "has peft_type='IA3', gptpl 'LORA'"),
        ({"alpha_pattern": {"c_attn": 3}}, "has alpha_pattern="),
        ({"r": "3"}, "r must be a positive whole number, got 3: restore"),
        (
            {"r": 4},
            r"holds 'base_model.model.transformer.h.0.attn.c_attn.lora_A.weight' as \(3, 32\), the mo",
        ),
        ({"lora_alpha": None}, "lora_alpha must be a number, got None: restore"),
    ],
)
def test_settings_that_are_refused(base, written, change, message):
    net, base_folder = base()
    folder = written(with_adapter(net, "qkv"), net.config, base_folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        read_adapter(folder, net.config)


def test_tensors_that_are_refused(base, written, config):
    net, base_folder = base()
    folder = written(with_adapter(net, "qkv"), net.config, base_folder)
    with pytest.raises(InputError, match=r"holds '[^,]*h\.2\.[^,]*'.*, which the model has no place for"):
        read_adapter(folder, config(n_layers=2))
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="is damaged or cut short"):
        read_adapter(folder, net.config)


def test_a_file_in_the_way_is_one_line(base, tmp_path):
    net, base_folder = base()
    (tmp_path / "adapter/adapter_config.json").mkdir(parents=True)
    with pytest.raises(InputError, match=r"does not take the files \(.*directory"):
        write_adapter(with_adapter(net, "qkv"), net.config, tmp_path / "adapter", base=str(base_folder))


def test_a_matrix_without_its_twin_is_refused(base, written):
    net, base_folder = base()
    whole = with_adapter(net, "qkv")
    missing = "blocks.1.attn.qkv.lora_B"
    part = {name: tensor for name, tensor in whole.tensors.items() if name != missing}
    folder = written(Adapter(tensors=part, rank=RANK, alpha=ALPHA), net.config, base_folder)
    with pytest.raises(InputError, match=r"lacks 'base_model\.[^,]*h\.1\.[^,]*lora_B\.weight', which"):
        read_adapter(folder, net.config)
