"""Tiny models of four other programs, each built by that program or by a class with its names."""

# B batch, T time, D model, H heads, K head width, V vocabulary, C context

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gptpl.model import GPTConfig, GPTModel, empty_model
from gptpl.weights.formats import open_model
from gptpl.weights.transfer import load_tensors

VOCAB, CONTEXT, WIDTH, HEADS, LAYERS = 61, 24, 32, 4, 3


@dataclass(frozen=True)
class Written:
    """Files that another program wrote, and the logits that it computes for `tokens`."""

    path: Path
    tokens: Tensor
    logits: Tensor


@pytest.fixture
def config() -> Callable[..., GPTConfig]:
    """`config(context_length=20)`: the shape of all models of these tests, but for the changes."""

    def shape(**changes: Any) -> GPTConfig:
        fields: dict[str, Any] = {
            "vocab_size": VOCAB,
            "context_length": CONTEXT,
            "emb_dim": WIDTH,
            "n_heads": HEADS,
            "n_layers": LAYERS,
            "drop_rate": 0.1,
            "qkv_bias": True,
            "tie_weights": True,
            "init": "gpt2",
        }
        return GPTConfig(**(fields | changes))

    return shape


@pytest.fixture
def read() -> Callable[..., GPTModel]:
    """`read(path)`, `read(path, config, crop=, dtype=)`: the model of a format's files."""

    def model(
        path: Path, wanted: GPTConfig | None = None, *, crop: Set[str] = frozenset(), **kind: Any
    ) -> GPTModel:
        files = open_model(path)
        wanted = wanted or files.config
        assert wanted is not None
        net = empty_model(wanted, **kind).eval()
        load_tensors(net, files.tensors, files.table, crop=crop)
        return net

    return model


@pytest.fixture
def logits() -> Callable[[nn.Module, Tensor], Tensor]:
    """`logits(model, tokens)` in fp32."""
    return lambda model, tokens: said_by(model, tokens).float()


# --- the book: parameter names and the order of operations of its chapter 4 ----------------------------


class BookNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.scale
            * (x - x.mean(-1, keepdim=True))
            / (x.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
            + self.shift
        )


class BookGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2


class BookFeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, 4 * width), BookGELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class BookAttention(nn.Module):
    mask: Tensor

    def __init__(self, width: int, context: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.W_query = nn.Linear(width, width, bias=qkv_bias)
        self.W_key = nn.Linear(width, width, bias=qkv_bias)
        self.W_value = nn.Linear(width, width, bias=qkv_bias)
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(context, context), diagonal=1))

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (
            layer(x).view(B, T, self.heads, -1).transpose(1, 2)
            for layer in (self.W_query, self.W_key, self.W_value)
        )  # each (B, H, T, K)
        scores = (q @ k.mT).masked_fill(self.mask[:T, :T].bool(), -torch.inf) / k.shape[-1] ** 0.5
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))


class BookBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.att = BookAttention(width, context, heads, qkv_bias)
        self.ff = BookFeedForward(width)
        self.norm1, self.norm2 = BookNorm(width), BookNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.norm1(x))
        return x + self.ff(self.norm2(x))


class BookGPTModel(nn.Module):
    def __init__(self, *, context: int = CONTEXT, qkv_bias: bool = False, layers: int = LAYERS) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(VOCAB, WIDTH)
        self.pos_emb = nn.Embedding(context, WIDTH)
        self.trf_blocks = nn.Sequential(*(BookBlock(WIDTH, context, HEADS, qkv_bias) for _ in range(layers)))
        self.final_norm = BookNorm(WIDTH)
        self.out_head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok_emb(tokens) + self.pos_emb(torch.arange(tokens.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))


# --- nanoGPT: parameter names of its model.py ----------------------------------------------------------


class NanoNorm(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class NanoAttention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (part.view(B, T, self.heads, -1).transpose(1, 2) for part in self.c_attn(x).split(D, dim=2))
        scores = q @ k.mT / k.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(T, T).tril() == 0, -torch.inf)
        return self.c_proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D))


class NanoMLP(nn.Module):
    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class NanoBlock(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = NanoNorm(width, bias), NanoNorm(width, bias)
        self.attn, self.mlp = NanoAttention(width, heads, bias), NanoMLP(width, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, *, vocab: int = VOCAB, bias: bool = True) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab, WIDTH),
                "wpe": nn.Embedding(CONTEXT, WIDTH),
                "h": nn.ModuleList(NanoBlock(WIDTH, HEADS, bias) for _ in range(LAYERS)),
                "ln_f": NanoNorm(WIDTH, bias),
            }
        )
        self.lm_head = nn.Linear(WIDTH, vocab, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

    def forward(self, tokens: Tensor) -> Tensor:
        table, positions = self.transformer["wte"], self.transformer["wpe"]
        x = table(tokens) + positions(torch.arange(tokens.shape[1]))
        for block in self.transformer["h"]:  # type: ignore[attr-defined]
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


# --- writing them --------------------------------------------------------------------------------------


def shaken(model: nn.Module) -> nn.Module:
    """The model with weights of its own everywhere, biases and norms too, in evaluation mode."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15 + (parameter.dim() == 1) * 0.05)
    return model.eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, VOCAB, (2, 20), generator=torch.Generator().manual_seed(3))


def said_by(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(tokens)
    return getattr(logits, "logits", logits)


@pytest.fixture
def book(tmp_path: Path, tokens: Tensor) -> Callable[..., Written]:
    """`book(qkv_bias=, with_optimizer=)`: a `model.pth` of the book's class."""

    def write(*, with_optimizer: bool = False, **shape: Any) -> Written:
        model = shaken(BookGPTModel(**shape))
        path = tmp_path / "model.pth"
        content: Any = model.state_dict()
        if with_optimizer:
            optimizer = torch.optim.AdamW(model.parameters())
            said_by_training = model(tokens).sum()
            said_by_training.backward()
            logits = said_by(model, tokens)
            content = {"model_state_dict": content, "optimizer_state_dict": optimizer.state_dict()}
            torch.save(content, path)
            return Written(path, tokens, logits)
        torch.save(content, path)
        return Written(path, tokens, said_by(model, tokens))

    return write


@pytest.fixture
def book_class() -> type[nn.Module]:
    """The book's model, of the tests' shape."""
    return BookGPTModel


@pytest.fixture
def nano_class() -> type[nn.Module]:
    """nanoGPT's model, of the tests' shape."""
    return NanoGPT


@pytest.fixture
def nano(tmp_path: Path, tokens: Tensor) -> Callable[..., Written]:
    """`nano(bias=, compiled=)`: a `ckpt.pt` as nanoGPT's train.py writes it."""

    def write(*, bias: bool = True, vocab: int = VOCAB, compiled: bool = False) -> Written:
        model = shaken(NanoGPT(vocab=vocab, bias=bias))
        prefix = "_orig_mod." if compiled else ""
        checkpoint = {
            "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
            "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
            "model_args": {
                "n_layer": LAYERS,
                "n_head": HEADS,
                "n_embd": WIDTH,
                "block_size": CONTEXT,
                "bias": bias,
                "vocab_size": vocab,
                "dropout": 0.0,
            },
            "iter_num": 5,
            "best_val_loss": torch.tensor(1.5),
            "config": {"dataset": "openwebtext"},
        }
        torch.save(checkpoint, tmp_path / "ckpt.pt")
        return Written(tmp_path / "ckpt.pt", tokens, said_by(model, tokens))

    return write


@pytest.fixture
def hugging_face(tmp_path: Path, tokens: Tensor) -> Callable[..., Written]:
    """`hugging_face(tied=, dtype=, max_shard_size=)`: a folder of `GPT2LMHeadModel.save_pretrained`."""
    transformers = pytest.importorskip("transformers")

    def write(
        *, tied: bool = True, dtype: torch.dtype = torch.float32, shard: str = "1GB", **settings: Any
    ) -> Written:
        config = transformers.GPT2Config(
            vocab_size=VOCAB,
            n_positions=CONTEXT,
            n_embd=WIDTH,
            n_head=HEADS,
            n_layer=LAYERS,
            tie_word_embeddings=tied,
            **settings,
        )
        model = shaken(transformers.GPT2LMHeadModel(config)).to(dtype)
        model.save_pretrained(tmp_path / "hf", max_shard_size=shard)  # type: ignore[operator]
        return Written(tmp_path / "hf", tokens, said_by(model, tokens).float())

    return write


@pytest.fixture
def openai(tmp_path: Path, tokens: Tensor, hugging_face: Callable[..., Written]) -> Callable[..., Written]:
    """`openai(without=, hparams=)`: a TensorFlow checkpoint under OpenAI's variable names and shapes.

    TensorFlow 1's `Saver` writes it, as OpenAI's did. The numbers are a Hugging Face model's, whose logits
    are the oracle: its layers are OpenAI's, but for a first axis of length one.
    """
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is installed on Linux x86-64 only")
    from safetensors.torch import load_file

    names = {
        "ln_1.weight": "ln_1/g",
        "ln_1.bias": "ln_1/b",
        "ln_2.weight": "ln_2/g",
        "ln_2.bias": "ln_2/b",
        "attn.c_attn": "attn/c_attn",
        "attn.c_proj": "attn/c_proj",
        "mlp.c_fc": "mlp/c_fc",
        "mlp.c_proj": "mlp/c_proj",
    }

    def variable(name: str) -> str:
        name = name.removeprefix("transformer.")
        if name in ("wte.weight", "wpe.weight"):
            return f"model/{name.removesuffix('.weight')}"
        if name.startswith("ln_f"):
            return f"model/ln_f/{'g' if name.endswith('weight') else 'b'}"
        _, i, rest = name.split(".", 2)
        if rest in names:
            return f"model/h{i}/{names[rest]}"
        layer, _, kind = rest.rpartition(".")
        return f"model/h{i}/{names[layer]}/{'w' if kind == 'weight' else 'b'}"

    def write(*, without: str = "", hparams: dict[str, int] | None = None) -> Written:
        import json

        theirs = hugging_face()
        folder = tmp_path / "124M"
        folder.mkdir()
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            variables = []
            for name, tensor in load_file(theirs.path / "model.safetensors").items():
                if (called := variable(name)) == without:
                    continue
                value = tensor[None] if called.endswith("/w") else tensor
                variables.append(tf.compat.v1.get_variable(called, initializer=value.numpy()))
            session.run([v.initializer for v in variables])
            saver = tf.compat.v1.train.Saver(variables)
            saver.save(session, str(folder / "model.ckpt"))
        sizes = {
            "n_vocab": VOCAB,
            "n_ctx": CONTEXT,
            "n_embd": WIDTH,
            "n_head": HEADS,
            "n_layer": LAYERS,
        }
        (folder / "hparams.json").write_text(json.dumps(sizes | (hparams or {})))
        return Written(folder, tokens, theirs.logits)

    return write
