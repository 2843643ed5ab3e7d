"""Exports from Python, and what a stranger's file may put into a model card."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from gptpl.checkpoints.files import write_checkpoint
from gptpl.checkpoints.format import HEADER_KEY, checkpoint_header
from gptpl.checkpoints.loading import LoadedCheckpoint, LoadedClassifier, load_foreign_classifier, load_model
from gptpl.errors import InputError
from gptpl.model import ClassifierConfig, GPTClassifier, GPTModel
from gptpl.model.parameters import TuneLowRank
from gptpl.runs.export import export
from gptpl.tokenizers import BytesTokenizer
from gptpl.weights.hugging_face import open_files

SHA256 = "7" * 64
HOSTILE = (
    "x` <script>alert(1)</script>\n\n# A heading\n[a link](http://x) ![](http://y)\n---\n```\n\x1b[2J| `` |"
)


def trained(**changes: Any) -> dict[str, Any]:
    data = {"corpus": "Tale", "sha256": SHA256}
    run = {"step": 8, "tokens_seen": 512, "data": data, "losses": {"val/loss": 2.0}}
    return run | {"start": {"init": "random"}} | changes


@pytest.fixture
def loaded(pretraining: Any) -> LoadedCheckpoint:
    """With the fixture's `text.txt` in the test's folder."""
    return LoadedCheckpoint(
        path=Path("run/checkpoints/last.ckpt"),
        net=pretraining.net(init="gpt2", tie_weights=True).eval(),
        tokenizer=BytesTokenizer(),
        run_config={},
        step=8,
        lineage=trained(),
    )


@pytest.fixture
def classifier(loaded: LoadedCheckpoint) -> LoadedClassifier:
    return LoadedClassifier(
        path=loaded.path,
        net=GPTClassifier(
            cast(GPTModel, loaded.net).config, ClassifierConfig(n_classes=2, head_bias=False)
        ).eval(),
        tokenizer=loaded.tokenizer,
        labels=("ham", "spam"),
        max_length=16,
        padded_to=None,
        run_config={},
        step=8,
        lineage=trained(),
    )


def html(folder: Path) -> str:
    """The card as a reader of Markdown shows it."""
    markdown = pytest.importorskip("markdown")  # comes with TensorBoard
    text = (folder / "README.md").read_text(encoding="utf-8")
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "http" not in front
    return str(markdown.markdown(body, extensions=["fenced_code", "tables"]))


def test_a_model_in_three_lines(loaded: LoadedCheckpoint, tmp_path: Path) -> None:
    logits = loaded.net(torch.arange(16)[None])
    folder = export(loaded, "gptpl", str(tmp_path / "own"))
    again = load_model(folder / "model.ckpt")
    assert torch.equal(again.net(torch.arange(16)[None]), logits)
    assert (again.step, again.lineage) == (8, trained())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "text.txt"]


def test_another_data_type_leaves_the_model_as_it_is(loaded: LoadedCheckpoint, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in loaded.net.state_dict().items()}
    export(loaded, "hf", tmp_path / "half", dtype="bfloat16")
    for name, tensor in loaded.net.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, before[name]), name
    source = open_files(tmp_path / "half").tensors
    assert set(source.dtypes.values()) == {"bfloat16"}
    assert torch.equal(source.read("transformer.wte.weight"), before["tok_emb.weight"].bfloat16())


def test_a_classifier(classifier: LoadedClassifier, tmp_path: Path) -> None:
    tokens, lengths = torch.arange(16)[None], torch.tensor([16])
    folder = export(classifier, "hf", tmp_path / "c")
    again = load_foreign_classifier(folder)
    torch.testing.assert_close(again.net(tokens, lengths), classifier.net(tokens, lengths))
    assert again.labels == ("ham", "spam")


def test_an_adapter(loaded: LoadedCheckpoint, tmp_path: Path) -> None:
    """The base of a run of LoRA with its adapter is what the run says; a model changed since is noticed."""

    def save(name: str, net: Any, start: Any, **header: Any) -> Path:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        path = tmp_path / name / "checkpoints/last.ckpt"
        about = checkpoint_header(net.config, BytesTokenizer(), {}, start) | header
        weights = {f"net.{key}": tensor for key, tensor in net.state_dict().items()}
        write_checkpoint({HEADER_KEY: about, "state_dict": weights, "global_step": 5}, path)
        return path

    base = save("base", loaded.net, {"init": "random"})
    start = {"init": "run", "checkpoint": str(base), "crop_context": False, "crop_vocabulary": False}
    lora = TuneLowRank(rank=2, alpha=4.0, dropout=0.0, targets=("out_proj", "qkv"))
    net = load_model(base).net
    lora.apply(net)
    for name, parameter in net.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    run = load_model(save("lora", net, start, tune=lora.state()))
    export(run, "adapter", tmp_path / "a")
    assert "rank 2, alpha 4, qkv, out_proj)" in (tmp_path / "a/README.md").read_text()
    with torch.no_grad():
        run.net.get_parameter("final_norm.bias").add_(1)
    with pytest.raises(InputError, match=r"came back with another final_norm\.bias"):
        export(run, "adapter", tmp_path / "b")
    with pytest.raises(InputError, match="is not a run of gptpl"):
        export(replace(run, path=tmp_path / "a"), "adapter", tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_a_file_says_is_text_in_the_card(
    loaded: LoadedCheckpoint, classifier: LoadedClassifier, tmp_path: Path
) -> None:
    start = {"init": HOSTILE, "path": HOSTILE, "sha256": {HOSTILE: HOSTILE}}
    lineage = trained(data={"corpus": HOSTILE, "sha256": HOSTILE}, start=start)
    cards = [
        html(export(replace(loaded, lineage=lineage), "hf", tmp_path / "m")),
        html(export(replace(classifier, lineage=lineage, labels=(HOSTILE, "b")), "hf", tmp_path / "c")),
    ]
    for card in cards:
        assert set(re.findall(r"<(\w+)", card)) <= {
            *("code", "h1", "h2", "ol", "li", "p", "pre", "table", "tbody", "td", "th", "thead", "tr")
        }
        assert card.count("<h1>") == 1
        assert "\x1b" not in card
        assert "&lt;script&gt;alert(1)" in card


def test_a_folder_with_marks_in_its_name_is_named_right(loaded: LoadedCheckpoint, tmp_path: Path) -> None:
    name = 'my_model *v2* <b>"x"'
    card = html(export(loaded, "hf", tmp_path / name))
    assert '<h1>my_model *v2* &lt;b>"x"</h1>' in card.replace("&gt;", ">").replace("&quot;", '"')
    [code] = re.findall(r"model = (GPT2LM.*)\n", (tmp_path / name / "README.md").read_text())
    assert json.loads(code.partition("(")[2].removesuffix(")")) == name


@pytest.mark.parametrize(
    "lineage",
    [
        {"step": 8, "start": {"init": "random"}},
        trained(losses={"val/loss": "nan<"}),
        trained(start={"init": "run", "parent": {"step": "many"}}),
        trained(tokens_seen=None),
    ],
)
def test_a_past_that_is_not_whole_is_one_line(
    lineage: dict[str, Any], loaded: LoadedCheckpoint, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"last\.ckpt records its past otherwise than this gptpl"):
        export(replace(loaded, lineage=lineage), "nanogpt", tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
