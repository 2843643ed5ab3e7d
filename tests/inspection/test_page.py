"""The page shows the text and nothing but the text, whatever is in it, and asks no network."""

import base64
import json
import re
import shutil
import subprocess
import zlib
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.evaluation.likelihood import TokenSurprisal, surprisals
from gptpl.inspection import Inspection
from gptpl.inspection.page import TABS, merges, pack_weights
from gptpl.model import GPTConfig, GPTModel, Int8GPT
from gptpl.model.inference import can_multiply_int8
from gptpl.text import visible
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer, Tokenizer

NASTY = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!-- ]]> &amp; &lt;",
    "\"quotes' $title ${title}",
    "a\n\n\tb  c",
    "über 日本 🙂",
    "\u2028\u2029 \\u003c",
]


class Pieces(Tokenizer):
    """A tokenizer whose tokens are given texts; the last is end-of-text."""

    name = "pieces"

    def __init__(self, texts: list[str]) -> None:
        self._texts = [*texts, "<|endoftext|>"]

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    @property
    def eot_id(self) -> int:
        return len(self._texts) - 1

    def encode(self, text: str) -> Any:
        raise NotImplementedError

    def decode(self, ids: Any) -> str:
        return "".join(self._texts[each] for each in ids)

    def vocabulary_bytes(self) -> list[bytes]:
        return [text.encode("utf-8", "surrogatepass") for text in self._texts]


class Other(nn.Module):
    """A model of another class."""

    def __init__(self, V: int) -> None:
        super().__init__()
        self.table = nn.Embedding(V, V)
        self.vocab_size, self.context_length = V, 8

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens)


def model(V: int, **changes: Any) -> GPTModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "context_length": 16,
        "emb_dim": 8,
        "n_heads": 2,
        "n_layers": 3,
        "qkv_bias": False,
    }
    settings: dict[str, Any] = {"vocab_size": V, "drop_rate": 0.0, **shape, **changes}
    return GPTModel(GPTConfig(**settings)).eval()


def look(texts: list[str], values: list[float] | None = None, net: nn.Module | None = None) -> Inspection:
    """The texts as one token each, with these surprisals."""
    tokenizer = Pieces([*texts, "<u>2</u>", "<u>3</u>"])
    n = len(texts)
    tokens = [
        TokenSurprisal(token=i, surprisal=v, entropy=1.0, rank=0, alternatives=((n, 0.5), (n + 1, 0.25)))
        for i, v in enumerate(values or [1.0] * n)
    ]
    return Inspection(net or model(tokenizer.vocab_size), tokenizer, tokens)


def page(texts: list[str], values: list[float] | None = None, **settings: Any) -> str:
    return look(texts, values).page(title="T <b>", facts={"checkpoint": "<i>run</i>"}, **settings)


class Reader(HTMLParser):
    """Collects the tags, the text of every token, and the JSON."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[tuple[str, str]] = []
        self.data = ""
        self.path: list[str] = []
        self.feed(source)
        [first, *_] = self.models = json.loads(self.data)
        self.first: dict[str, Any] = first

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "rect"):
            self.path.append(f"{tag}#{dict(attrs).get('id', '')}.{dict(attrs).get('class', '')}")
        if tag == "span" and "div#.text surprisals" in self.path:
            self.tokens.append(("", str(dict(attrs)["class"])))

    def handle_endtag(self, tag: str) -> None:
        if tag != "rect":
            self.path.pop()

    def handle_data(self, data: str) -> None:
        if "script#data." in self.path:
            self.data += data
        elif "div#.text surprisals" in self.path and "i#." not in self.path:
            text, colour = self.tokens[-1]
            self.tokens[-1] = (text + data, colour)


# --- the surprisal --------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", NASTY)
def test_texts_are_shown_and_never_act(text: str) -> None:
    read = Reader(page(["plain ", text, " end"]))
    plain, shown, _ = [text for text, _ in read.tokens]
    assert plain == "plain "
    assert shown == re.sub("[\u2028\u2029]", "\ufffd", text)
    rows = read.first["surprisal"]
    assert rows[1][0] == visible(text)
    assert rows[1][5] == [["<u>2</u>", 3, 0.5], ["<u>3</u>", 4, 0.25]]
    harmless = Reader(page(["plain ", "x", " end"]))
    tags, expected = ([tag for tag, _ in each.tags if tag != "i"] for each in (read, harmless))
    assert tags == expected  # but for our own signs of line breaks


def test_nothing_is_loaded_from_anywhere_and_nothing_is_made_of_html() -> None:
    source = page(["a", "b"])
    assert "https://" not in source
    assert re.findall(r"http://[\w./]+", source) == ["http://www.w3.org/2000/svg"]  # the name of a language
    assert not re.search(r"\b(src|href|url|import|fetch|XMLHttpRequest)\s*[=(]", source)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", source)
    (policy,) = [attrs for tag, attrs in Reader(source).tags if attrs.get("http-equiv")]
    assert "default-src 'none'" in str(policy["content"])


def test_colours_rise_with_the_loss_and_agree_with_the_legend() -> None:
    values = [0.0, 0.49, 0.5, 1.5, 2.5, 4.0, 5.0, 7.0, 8.0, 30.0]
    read = Reader(page(["x"] * len(values), values, tabs=["surprisal"]))
    assert [int(colour[1:]) for _, colour in read.tokens] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 7]
    legend = page(["x"]).partition("nats per token: ")[2].partition("</div>")[0]
    labels = [unescape(label) for label in re.findall(r'class="c\d">([^<]*)</span>', legend)]
    assert labels == ["< 0.5", "0.5 to 1", "1 to 2", "2 to 3", "3 to 4.5", "4.5 to 6", "6 to 8", "≥ 8"]


def test_parts_of_a_character_and_line_breaks_have_signs() -> None:
    source = page(["", "é", "a\nb"])
    assert '<span class="c2"><i>·</i></span><span class="c2">é</span>' in source
    assert '<span class="c2">a<i>↵</i>\nb</span>' in source


def test_summary_is_that_of_the_tokens() -> None:
    source = page(["low", "high", "mid"], [1.0, 6.0, 2.0])
    assert "<dt>tokens</dt><dd>3</dd>" in source
    assert "<dt>loss</dt><dd>3.0000 nats per token</dd>" in source
    assert "<dt>perplexity</dt><dd>20.09</dd>" in source
    table = source.partition('<table class="list">')[2].partition("</table>")[0]
    found = re.findall(r"<tr><td>(\w+)</td><td>(\d)</td>", table)
    assert found == [("high", "2"), ("mid", "3"), ("low", "1")]
    bars = re.findall(r'height="([\d.]+)"', source)
    assert [float(bar) for bar in bars] == pytest.approx([1 / 6, 1, 1 / 3], abs=1e-3)


def test_white_space_and_control_characters_can_be_seen() -> None:
    assert visible(" a\n\t\x00\x1b\x7f") == "␣a↵→␀␛\ufffd"


# --- the other tabs -------------------------------------------------------------------------------------

TEXT = "The sea, the sea: über 🙂"


def inspected(net: nn.Module, text: str = TEXT, **settings: Any) -> Inspection:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text).tolist()
    return Inspection(net, tokenizer, list(surprisals(net, ids, eot_id=256)), **settings)


def unpacked(data: dict[str, Any]) -> Any:
    """(L, H, T, T) of the levels in the page, as the page's script reads them."""
    L, H, T = len(data["kinds"]), len(data["kinds"][0]), data["size"]
    packed = np.frombuffer(zlib.decompress(base64.b64decode(data["weights"])), dtype=np.uint8)
    found, place = np.zeros((L, H, T, T)), 0
    for layer in range(L):
        for head in range(H):
            for row in range(T):
                for column in range(row + 1):
                    byte = int(packed[place >> 1])
                    found[layer, head, row, column] = ((byte & 15 if place & 1 else byte >> 4) / 15) ** 2
                    place += 1
    return found


def test_the_weights_in_the_page_are_those_of_the_model() -> None:
    # 3 x 1 triangles of 6 weights: an odd number of bytes.
    parts = torch.rand(3, 1, 3, 3, generator=torch.Generator().manual_seed(0)).tril()
    weights = (parts / parts.sum(-1, keepdim=True)).numpy()
    packed = {"kinds": [[""]] * 3, "size": 3, "weights": pack_weights(weights)}
    assert np.abs(np.sqrt(unpacked(packed)) - np.sqrt(weights)).max() <= 0.5 / 15 + 1e-6
    look = inspected(model(257, context_length=32))
    data = Reader(look.page(tabs=["attention"])).first["attention"]
    for found, block in zip(unpacked(data), look.recording.blocks, strict=True):
        assert np.abs(np.sqrt(found) - block.weights.sqrt().numpy()).max() <= 0.5 / 15 + 1e-6


def test_a_page_has_as_many_weights_as_it_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptpl.inspection.page._ATTENTION_BYTES", 3 * 2 * 5 * 6 // 4)
    look = inspected(model(257))
    assert Reader(look.page(tabs=["attention"])).first["attention"]["size"] == 5
    two = Reader(look.page(tabs=["attention"], beside=(look, {})))
    assert [each["attention"]["size"] for each in two.models] == [3, 3]


def test_every_tab_has_the_numbers_of_the_measures() -> None:
    look = inspected(model(257), "ab cd", max_tokens=4, ablation_tokens=3)
    first = Reader(look.page()).first
    assert list(first) == [*TABS, "read"]
    assert first["read"] == ["<|endoftext|>", "a", "b", "␣"]
    assert first["lens"]["best"] == look.lens.best.tolist()
    assert first["lens"]["rank"] == look.lens.rank.tolist()
    last = look.lens.surprisal[-1, :-1].tolist()
    assert last == pytest.approx([each.surprisal for each in look.tokens[:3]], abs=1e-4)
    assert first["ablation"]["tokens"] == 3
    assert first["ablation"]["heads"] == [
        pytest.approx(row, abs=1e-4) for row in look.ablation.heads.tolist()
    ]
    assert [row[:3] for row in first["tokens"]["rows"]][:2] == [["a", 97, "61"], ["b", 98, "62"]]
    for each, block in zip(first["activations"]["blocks"], look.recording.blocks, strict=True):
        assert each["attention"] == pytest.approx(
            float(block.attention.square().mean(-1).sqrt().mean()), abs=1e-3
        )
        assert each["after norm"] == pytest.approx([0, 1], abs=1e-2)
    positions, net = first["embeddings"]["positions"], model(257)
    rows = net.pos_emb.weight.detach().numpy()[positions["places"]]
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.array(positions["similarity"]) == pytest.approx(unit @ unit.T, abs=0.00501)
    steps = [each["name"] for each in first["steps"] if "name" in each]
    assert steps[:4] == ["token ids", "token embedding", "position embedding", "hidden state"]
    assert steps.count("attention") == 3
    with torch.no_grad():
        logits = look.gpt(torch.tensor([[256, 97, 98, 32]]))[0, -1]
    assert [row[1] for row in first["steps"][-1]["next"]] == logits.topk(10).indices.tolist()


def test_two_models_stand_side_by_side() -> None:
    looks = [inspected(model(257)), inspected(model(257, n_heads=4))]
    source = looks[0].page(beside=(looks[1], {"checkpoint": "other"}))
    assert [len(each["attention"]["kinds"][0]) for each in Reader(source).models] == [2, 4]
    assert source.count('class="text surprisals"') == 2
    assert "<dd>other</dd>" in source


def test_a_model_with_rotary_positions_has_no_table_of_them() -> None:
    changes = {"position": "rope", "norm": "rmsnorm", "feed_forward": "swiglu", "linear_bias": False}
    first = Reader(inspected(model(257, **changes)).page()).first
    assert first["embeddings"]["positions"] is None
    assert "position embedding" not in [each.get("name") for each in first["steps"]]


def test_a_model_of_another_class_has_the_tabs_that_apply() -> None:
    look = inspected(Other(257))
    read = Reader(look.page())
    assert list(read.first) == ["surprisal", "tokens"]
    with pytest.raises(
        InputError, match=r"only a GPTModel has more than surprisal and tokens, this model is a .*Other"
    ):
        look.page(tabs=["attention"])
    beside = inspected(model(257)).page(beside=(look, {}))
    assert [list(each) for each in Reader(beside).models] == [["surprisal", "tokens"]] * 2


def test_an_int8_model_has_the_tabs_that_apply() -> None:
    if not can_multiply_int8():
        pytest.skip("needs an x86 processor with AVX2")
    look = inspected(Int8GPT(model(257)))
    assert list(Reader(look.page()).first) == ["surprisal", "tokens"]
    with pytest.raises(InputError, match="Int8GPT"):
        _ = look.lens


def test_one_token_is_enough() -> None:
    first = Reader(inspected(model(257), "a").page()).first
    assert first["read"] == ["<|endoftext|>", "a"]
    assert first["ablation"]["loss"] == pytest.approx(first["surprisal"][0][2], abs=1e-3)


@pytest.mark.parametrize(
    ("tabs", "words"), [(["attenton"], "tabs has no attenton: choose of surprisal"), ([], "tabs is empty")]
)
def test_wrong_tabs_are_refused(tabs: list[str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        inspected(model(257)).page(tabs=tabs)
    for name in ("max_tokens", "ablation_tokens"):
        with pytest.raises(InputError, match=f"{name} must be at least 2, got 1"):
            inspected(model(257), TEXT, **{name: 1})


def test_a_token_is_put_together_as_the_tokenizer_does() -> None:
    tokenizer = GPT2Tokenizer()
    ranks = {piece: number for number, piece in enumerate(tokenizer.vocabulary_bytes())}
    assert merges(b" the", ranks) == [
        [b" ", b"t", b"h", b"e"],
        [b" t", b"h", b"e"],
        [b" t", b"he"],
        [b" the"],
    ]
    for token in (464, 22216, 36036, 50255, 42, 50256):
        piece = list(ranks)[token]
        *_, last = merges(piece, ranks)
        assert b"".join(last) == piece
        assert len(last) == 1 or token == tokenizer.eot_id


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_every_tab_is_drawn_in_a_browser(tmp_path: Path) -> None:
    looks = [inspected(model(257, context_length=32)), inspected(model(257, n_heads=4))]
    source = looks[0].page(beside=(looks[1], {}))
    open_all = "<script>tabs.forEach(tab => tab.click())</script></body>"
    (tmp_path / "page.html").write_text(source.replace("</body>", open_all), encoding="utf-8")
    given = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}")
    more = ("--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri())
    drawn = subprocess.run((str(CHROMIUM), *given, *more), check=True, capture_output=True, timeout=120)
    panels = re.split(r'<section role="tabpanel" id="panel-', drawn.stdout.decode())[1:]
    assert [panel.partition('"')[0] for panel in panels] == list(TABS)
    for panel in panels:  # both models
        assert all(part.strip() for part in panel.split('<div class="model">')[1:])
        assert len(panel.split('<div class="model">')) == 3
    cells = [panel.count("<td") for panel in panels]
    T = [len(each.recording.tokens) for each in looks]
    assert [1 + len(TEXT.encode()), 16] == T
    assert cells[1] == 3 * 2 + 3 * 4  # a score for each head
    assert cells[2] == 4 * sum(T)  # a word at each depth after each token
    assert cells[6] == 3 * (2 + 4) + 3 * 3 * 2  # heads; attention, feed-forward network and both
    readouts = re.findall(r'<div class="readout">([^<]*)</div>', panels[1])
    assert [text.partition(" looks at ")[0] for text in readouts] == ["Token 28 🙂", "Token 15 e"]
    assert panels[7].count("<b>attention</b>") == 6
