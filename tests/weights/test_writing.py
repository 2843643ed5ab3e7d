"""Every format written: its own program, or a class with its names, loads it and says the same."""

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from gptpl.errors import InputError
from gptpl.model import GPTConfig, GPTModel, empty_model
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer, Tokenizer, WordsTokenizer
from gptpl.tokenizers.hugging_face import is_gpt2_vocabulary, write_tokenizer
from gptpl.weights.formats import FORMATS, open_model
from gptpl.weights.transfer import load_tensors

ALL = ("hf", "book", "nanogpt", "openai-tf")


@pytest.fixture
def net(config: Callable[..., GPTConfig]) -> Callable[..., GPTModel]:
    """`net(tie_weights=...)`: a model with random numbers in every parameter."""

    def drawn(**changes: Any) -> GPTModel:
        torch.manual_seed(11)
        model = GPTModel(config(**changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        return model

    return drawn


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """`written(net, "hf")`: the folder of the model in that format."""

    def write(model: GPTModel, name: str) -> Path:
        if name == "openai-tf":
            pytest.importorskip("tensorflow", reason="TensorFlow is installed on Linux x86-64 only")
        folder = tmp_path / name
        folder.mkdir()
        FORMATS[name].write(model, folder, tokenizer=BytesTokenizer(), dtype="float32")
        return folder

    return write


# ------------------------------------------------------------------------------- read by the other program


@pytest.mark.parametrize(("tied", "qkv_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_transformers_opens_a_folder(net, written, tokens, logits, tied, qkv_bias):
    transformers = pytest.importorskip("transformers")
    ours = net(tie_weights=tied, qkv_bias=qkv_bias)
    folder = written(ours, "hf")
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), "nothing missing, left over or of another shape"
    assert theirs.config.tie_word_embeddings is tied
    torch.testing.assert_close(logits(theirs.eval(), tokens), logits(ours, tokens), atol=1e-5, rtol=0)


def test_transformers_generates_the_same_greedy_tokens(net, written, tokens):
    transformers = pytest.importorskip("transformers")
    from gptpl.generation import SamplingRules, generate

    ours = net()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(written(ours, "hf")).eval()
    prompt = tokens[:1, :4]
    wanted = theirs.generate(prompt, max_new_tokens=15, do_sample=False, eos_token_id=None, pad_token_id=0)
    found = generate(ours, prompt, max_new_tokens=15, rules=SamplingRules(temperature=0.0))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(("tied", "qkv_bias"), [(True, True), (False, True), (False, False)])
def test_the_books_class_loads_its_file(book_class, net, written, tokens, logits, tied, qkv_bias):
    ours = net(tie_weights=tied, qkv_bias=qkv_bias)
    theirs = book_class(qkv_bias=qkv_bias)
    theirs.load_state_dict(torch.load(written(ours, "book") / "model.pth", weights_only=True))  # strict
    torch.testing.assert_close(logits(theirs, tokens), logits(ours, tokens), atol=1e-5, rtol=0)


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_nanogpts_class_loads_its_file(nano_class, net, written, tokens, logits, qkv_bias):
    ours = net(qkv_bias=qkv_bias)
    checkpoint = torch.load(written(ours, "nanogpt") / "ckpt.pt", weights_only=True)
    args = checkpoint["model_args"]
    assert args == {
        "n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 61,
        "bias": True, "dropout": 0.1,
    }  # fmt: skip
    theirs = nano_class(vocab=args["vocab_size"], bias=args["bias"])
    theirs.load_state_dict(checkpoint["model"])  # strict
    torch.testing.assert_close(logits(theirs, tokens), logits(ours, tokens), atol=1e-5, rtol=0)


def test_tensorflow_reads_openais_variables(net, written):
    ours = net()
    folder = written(ours, "openai-tf")
    tf = pytest.importorskip("tensorflow")
    assert tf.train.latest_checkpoint(str(folder)) == str(folder / "model.ckpt")
    shapes = dict(tf.train.list_variables(str(folder)))
    assert len(shapes) == 2 + 2 + 3 * 12
    assert shapes["model/wte"] == [61, 32]
    assert shapes["model/h2/attn/c_attn/w"] == [1, 32, 96]
    assert shapes["model/h0/mlp/c_proj/w"] == [1, 128, 32]
    weight = torch.from_numpy(tf.train.load_variable(str(folder), "model/h1/mlp/c_fc/w"))
    assert torch.equal(weight[0].T, ours.state_dict()["blocks.1.ff.up_proj.weight"])
    assert json.loads((folder / "hparams.json").read_text()) == {
        "n_vocab": 61, "n_ctx": 24, "n_embd": 32, "n_head": 4, "n_layer": 3
    }  # fmt: skip


# --------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("qkv_bias", [True, False])
def test_through_all_formats_and_back_the_tensors_are_the_same_bits(net, written, config, qkv_bias):
    first = current = net(qkv_bias=qkv_bias)
    for name in ALL:
        files = open_model(written(current, name))
        current = empty_model(config(qkv_bias=qkv_bias))
        load_tensors(current, files.tensors, files.table)
    wanted, found = first.state_dict(), current.state_dict()
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("name", ["hf", "book"])
def test_an_untied_head_comes_back(net, written, config, name):
    first = net(tie_weights=False)
    files = open_model(written(first, name))
    again = empty_model(config(tie_weights=False))
    load_tensors(again, files.tensors, files.table)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("name", ["nanogpt", "openai-tf"])
def test_an_untied_head_is_refused_where_there_is_no_place_for_it(net, written, name):
    with pytest.raises(InputError, match=rf"format={name} holds tied models only.*use format=hf"):
        written(net(tie_weights=False), name)


@pytest.mark.parametrize("name", ["hf", "book", "nanogpt"])
def test_bf16_files_are_half_as_large_and_hold_the_rounded_weights(net, written, config, name):
    ours = net()
    wide = sum(tensor.numel() for tensor in ours.parameters()) * 4
    folder = written(deepcopy(ours).bfloat16(), name)
    masks = 3 * 24 * 24 * 4 if name == "book" else 0
    size = max(path.stat().st_size for path in folder.iterdir()) - masks
    assert size < 0.5 * wide + 20_000
    files = open_model(folder)
    again = empty_model(config(), dtype=torch.bfloat16)
    load_tensors(again, files.tensors, files.table)
    for a, b in zip(ours.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.bfloat16(), b)


def test_openais_variables_are_fp32(net, written):
    source = open_model(written(net().bfloat16(), "openai-tf")).tensors
    assert set(source.dtypes.values()) == {"float32"}


def test_the_models_own_weights_are_left_alone(net, written):
    ours = net()
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    for name in ALL:
        written(ours, name)
    assert all(torch.equal(before[name], tensor) for name, tensor in ours.state_dict().items())


# ----------------------------------------------------------------------------------------------- tokenizers

TEXTS = [
    "Every effort moves  you\n\nto   the sea -- isn't it?",
    "<|endoftext|>Zürich, 日本 \t🙂!",
    "a,b.c:d;e?f_g!h(i)j--k",
    "",
]


@pytest.mark.parametrize("name", ["gpt2", "bytes", "words"])
def test_transformers_tokenizer_gives_the_same_ids_and_text(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    ours: Tokenizer = {
        "gpt2": GPT2Tokenizer(),
        "bytes": BytesTokenizer(),
        "words": WordsTokenizer().fitted_to(TEXTS[:1]),
    }[name]
    write_tokenizer(ours, tmp_path, context_length=999)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.eot_id
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == ours.decode(ids)


def test_a_vocabulary_is_told_from_another(tmp_path):
    assert is_gpt2_vocabulary(tmp_path) is None
    write_tokenizer(GPT2Tokenizer(), tmp_path, context_length=9)
    assert is_gpt2_vocabulary(tmp_path) is True
    (tmp_path / "vocab.json").unlink()
    assert is_gpt2_vocabulary(tmp_path) is True, "by tokenizer.json alone"
    write_tokenizer(BytesTokenizer(), tmp_path, context_length=9)
    assert is_gpt2_vocabulary(tmp_path) is False
    for odd in (
        "{}",
        '{"model": "a"}',
        '{"model": {"vocab": [1]}}',
        '{"model": {"vocab": {}}, "added_tokens": [{}]}',
    ):
        (tmp_path / "tokenizer.json").write_text(odd)
        assert is_gpt2_vocabulary(tmp_path) is False
    (tmp_path / "tokenizer.json").write_text("[" * 10**5)
    with pytest.raises(InputError, match="is not a JSON file"):
        is_gpt2_vocabulary(tmp_path)


def test_what_is_written_is_contiguous(net, written):
    """safetensors refuses anything else; torch would save the strides."""
    content = torch.load(written(net(), "book") / "model.pth", weights_only=True)
    assert all(tensor.is_contiguous() for tensor in content.values())
