"""GGUF: read back number for number, and opened by llama.cpp where it is installed."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gptpl.checkpoints.loading import LoadedCheckpoint
from gptpl.errors import InputError
from gptpl.generation import generate
from gptpl.model import GPTConfig, GPTModel
from gptpl.model.protocol import body_and_head
from gptpl.runs.export import export
from gptpl.runs.loaded import load_language_model
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer, Tokenizer, WordsTokenizer
from gptpl.weights.gguf_file import STORED_DTYPES
from gptpl.weights.model_files import POSITIONS

gguf = pytest.importorskip("gguf")
TEXTS = ("Every effort moves you", "  two spaces,\n\nI'm 1984's naive café 赤い 🙂", "<|endoftext|> x")


def loaded(tokenizer: Tokenizer, **changes: Any) -> LoadedCheckpoint:
    torch.manual_seed(2)
    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": 48, "emb_dim": 64, "n_heads": 4}
    config = GPTConfig(**{**sizes, "n_layers": 2, "qkv_bias": True, "tie_weights": True} | changes)
    net = GPTModel(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    start = {"step": 3, "tokens_seen": 9, "data": {}, "losses": {}, "start": {"init": "random"}}
    path = Path("run/checkpoints/last.ckpt")
    return LoadedCheckpoint(path=path, net=net, tokenizer=tokenizer, run_config={}, step=3, lineage=start)


def logits(net: Any) -> Tensor:
    with torch.inference_mode():
        result: Tensor = net(torch.arange(3, 43)[None])
    return result


def q8_0(matrix: Tensor) -> Tensor:
    """By a loop over blocks of 32, each with the scale that a float16 holds."""
    rows = matrix.detach().double().reshape(-1, 32)
    out = torch.empty_like(rows)
    for block, result in zip(rows, out, strict=True):
        largest = np.float32(block.abs().max())
        scale = largest / np.float32(127)
        result[:] = torch.round(block / float(scale)) * float(np.float16(scale))
    return out.reshape(matrix.shape).float()


@pytest.mark.parametrize("dtype", [None, *STORED_DTYPES])
@pytest.mark.parametrize("changes", [{}, {"tie_weights": False, "qkv_bias": False}], ids=["gpt2", "book"])
def test_a_file_gives_back_the_rounded_model(
    tmp_path: Path, dtype: str | None, changes: dict[str, Any]
) -> None:
    model = loaded(BytesTokenizer(), **changes)
    expected = GPTModel(model.net.config).eval()  # type: ignore[arg-type]
    expected.load_state_dict(model.net.state_dict())
    for name, parameter in expected.named_parameters():
        if parameter.dim() == 2 and name != POSITIONS and dtype:
            plain = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
            rounded = parameter.to(plain[dtype]) if dtype in plain else q8_0(parameter)
            parameter.data = rounded.float()
    folder = export(model, "gguf", tmp_path / "out", dtype=dtype)
    again = load_language_model(folder, device="cpu")
    torch.testing.assert_close(logits(again.net), logits(expected), rtol=1e-5, atol=1e-5)
    assert isinstance(again.tokenizer, BytesTokenizer)
    assert again.step == 3
    assert f"| data type | {dtype or 'float32'} |" in (folder / "README.md").read_text()
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(folder / "model.gguf").tensors
    }
    names = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
    assert kinds["blk.1.attn_qkv.weight"] == names.get(dtype or "", "F32")
    assert (
        kinds["position_embd.weight"] == kinds["blk.0.attn_qkv.bias"] == kinds["output_norm.weight"] == "F32"
    )
    assert ("output.weight" in kinds) == ("tie_weights" in changes)


def padded() -> LoadedCheckpoint:
    """With more rows than GPT-2 has tokens."""
    return loaded(GPT2Tokenizer(), vocab_size=50304, emb_dim=32, n_layers=1)


@pytest.fixture(scope="module")
def padded_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(padded(), "gguf", tmp_path_factory.mktemp("padded") / "out", verify=False) / "model.gguf"


@pytest.fixture(scope="module")
def padded_reader(padded_file: Path) -> Any:
    """What the package makes of that file: it takes a second for its 50,000 tokens and as many merges."""
    return gguf.GGUFReader(padded_file, "c")  # what is changed in it is not in the file


def test_the_vocabulary_is_gpt2s_padded_to_the_models(padded_reader: Any) -> None:
    def content(name: str) -> Any:
        return padded_reader.get_field(f"tokenizer.ggml.{name}").contents()

    tokens, kinds, merges = content("tokens"), content("token_type"), content("merges")
    assert len(tokens) == len(kinds) == 50304
    assert tokens[:2] == ["!", '"']
    assert tokens[50256:50258] == ["<|endoftext|>", "[PAD50257]"]
    assert kinds[50255:50258] == [1, 3, 5]
    assert len(merges) == 50000
    assert merges[0] == "Ġ t"
    assert (content("eos_token_id"), content("model"), content("pre")) == (50256, "gpt2", "gpt-2")


@pytest.mark.parametrize(
    ("tokenizer", "changes", "dtype", "said"),
    [
        (WordsTokenizer(["a", "<|unk|>", "<|endoftext|>"]), {}, None, "not tokenizer=words: use format=hf"),
        (BytesTokenizer(), {"feed_forward": "swiglu"}, None, "model.feed_forward=gelu, got swiglu"),
        (BytesTokenizer(), {"emb_dim": 40}, "q8_0", r"model\.emb_dim=40 is no multiple.*use dtype=float16"),
        (BytesTokenizer(), {}, "q4_0", "dtype=q4_0: format=gguf has float32, float16, bfloat16, q8_0 only"),
    ],
)
def test_what_a_file_cannot_hold_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, changes: dict[str, Any], dtype: str | None, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        export(loaded(tokenizer, **changes), "gguf", tmp_path / "out", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = export(loaded(BytesTokenizer()), "gguf", tmp_path / "out") / "model.gguf"
    whole = path.read_bytes()
    for content in (
        b"",
        b"GGUF",
        b"x" * 999,
        whole[:2000],
        whole[:-5000],
        whole[:40] + b"\xff" * 99 + whole[139:],
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"model\.gguf"):
            load_language_model(path.parent, device="cpu")


def test_another_epsilon_would_give_other_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpl.weights.gguf_file.NORM_EPS", 1e-6)
    folder = export(loaded(BytesTokenizer()), "gguf", tmp_path / "out", verify=False)
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"has gpt2\.attention\.layer_norm_epsilon=9\.99.*e-07, gptpl 9\.99"):
        load_language_model(folder, device="cpu")


def test_a_file_alone_must_have_gpt2s_tokenizer(tmp_path: Path) -> None:
    folders = [
        export(loaded(tokenizer, emb_dim=32, n_layers=1), "gguf", tmp_path / tokenizer.name, verify=False)
        for tokenizer in (GPT2Tokenizer(), BytesTokenizer())
    ]
    for folder in folders:
        (folder / "gptpl.json").unlink()
    assert isinstance(load_language_model(folders[0] / "model.gguf", device="cpu").tokenizer, GPT2Tokenizer)
    with pytest.raises(InputError, match="has another tokenizer than GPT-2's"):
        load_language_model(folders[1], device="cpu")


def test_a_file_alone_may_have_more_rows_than_gpt2_has_tokens(
    padded_file: Path, padded_reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(padded_file, tmp_path)
    monkeypatch.setattr(gguf, "GGUFReader", {tmp_path / "model.gguf": padded_reader}.__getitem__)
    again = load_language_model(tmp_path / "model.gguf", device="cpu")
    assert isinstance(again.tokenizer, GPT2Tokenizer)
    torch.testing.assert_close(logits(again.net), logits(padded().net), rtol=1e-5, atol=1e-5)
    prompt = again.tokenizer.encode("a").tolist()
    likely = int(again.net(torch.tensor([prompt]))[0, -1].argmax())
    _, head = body_and_head(again.net)
    with torch.no_grad():  # what no token has is the most likely, and never written
        head.weight[50257:] = 2 * head.weight[likely]  # type: ignore[index,operator]
    assert int(again.net(torch.tensor([prompt]))[0, -1].argmax()) >= 50257
    [written] = again.complete(["a"], max_new_tokens=1, temperature=0.0)
    assert written.tokens == (likely,)
    field = padded_reader.get_field("tokenizer.ggml.token_type")
    last = field.parts[field.data[50303]]
    last[0] = 1  # as of a token that is used
    try:
        assert field.contents()[50302:] == [5, 1]
        with pytest.raises(InputError, match="has another tokenizer than GPT-2's"):
            load_language_model(tmp_path, device="cpu")
    finally:
        last[0] = 5


@pytest.mark.parametrize("dtype", ["float32", "float16", "q8_0"])
@pytest.mark.parametrize("tokenizer", [GPT2Tokenizer(), BytesTokenizer()], ids=["gpt2", "bytes"])
def test_llama_cpp_reads_the_same_tokens_and_writes_the_same_text(
    tmp_path: Path, tokenizer: Tokenizer, dtype: str
) -> None:
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama.cpp is built from source: pip install llama-cpp-python"
    )
    model = loaded(tokenizer)
    folder = export(model, "gguf", tmp_path / "out", dtype=dtype)
    llama = llama_cpp.Llama(str(folder / "model.gguf"), n_ctx=48, logits_all=True, verbose=False, n_threads=1)
    for text in TEXTS:
        ids = llama.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == [int(token) for token in tokenizer.encode(text)]
        assert llama.detokenize(ids, special=True).decode() == text
    prompt = [int(token) for token in tokenizer.encode("Every effort")]
    ours = load_language_model(folder, device="cpu").net
    expected = generate(ours, torch.tensor([prompt]), max_new_tokens=16)[0].tolist()
    written = []
    for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
        written.append(token)
        if len(written) == 16:
            break
    assert [*prompt, *written] == expected
    theirs = torch.from_numpy(np.array(llama.scores[len(prompt) - 1]))
    with torch.inference_mode():
        own = ours(torch.tensor([prompt]))[0, -1]
    assert (theirs - own).abs().max() < 0.02 * own.abs().max()
