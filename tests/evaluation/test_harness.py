"""Tasks of the LM Evaluation Harness: answers by hand, without it, and figures beside those of its `hf`."""

import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptpl
from gptpl.errors import InputError
from gptpl.evaluation import continuations, suite
from gptpl.evaluation.harness import Generation, Harness, Requests
from gptpl.evaluation.suite import difference
from gptpl.evaluation.suite_report import page, record, result_lines
from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer, GPT2Tokenizer, WordsTokenizer
from gptpl.tokenizers.hugging_face import write_tokenizer

C, V = 48, 257
WORDS = "the a cat dog sat ran on under mat tree then it was happy all".split()  # noqa: SIM905
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'gptpl[eval]'"
)


@dataclass
class Asked:
    """As the harness's `Instance`."""

    args: tuple[Any, ...]
    task_name: str | None = "mine"
    doc_id: int | None = 0


@pytest.fixture(scope="module")
def net() -> GPTModel:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=V, context_length=C, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True
    )
    made = GPTModel(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


def log_p(net: nn.Module, tokens: list[int]) -> Tensor:
    """Of each token but the first, given those before it."""
    with torch.no_grad():
        found = net(torch.tensor([tokens[:-1]])).log_softmax(-1)[0]
    return found.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0].double()


def sentence(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(WORDS, k=words))


# --- answers, without the harness -----------------------------------------------------------------------


def test_continuations_are_scored_in_the_order_of_the_requests(net):
    args = [
        ("ab", " cd"),
        ("ab", " ce"),
        ("", "xy"),
        ("q" * 60, " z"),
        ("ab ", "cd"),
        ("", "<|endoftext|>xy"),
    ]
    requests = [Asked(each, doc_id=number // 3) for number, each in enumerate(args)]
    answers = Requests(net, BytesTokenizer())
    found = answers.loglikelihood(requests)
    for (context, continuation), (value, is_greedy) in zip(args, found, strict=True):
        whole = [*(context or "\0").encode(), *continuation.replace("<|endoftext|>", "").encode()]
        if not context:
            whole[0] = 256
        n = len(continuation.replace("<|endoftext|>", "").encode()) + (context[-1:] == " ")
        assert value == pytest.approx(log_p(net, whole[-C - 1 :])[-n:].sum().item(), abs=1e-4)
        assert not is_greedy
    assert answers.cut == {"mine": 1}
    [(_, is_greedy)] = answers.loglikelihood([Asked(("ab", greedy(net, "ab", 1)))])
    assert is_greedy


def greedy(net: nn.Module, text: str, count: int) -> str:
    tokens = [*text.encode()]
    for _ in range(count):
        with torch.no_grad():
            tokens.append(int(net(torch.tensor([tokens[-C:]]))[0, -1].argmax()))
    return bytes(tokens[len(text.encode()) :]).decode("latin-1")


@needs_lm_eval
def test_each_token_of_a_text_is_scored_once_with_the_longest_context(net):
    draw = random.Random(0)
    lengths = [0, 1, 5, C - 1, C, C + 1, 2 * C, 2 * C + 7]
    texts = [sentence(draw, 40)[:length] for length in lengths]
    found = Requests(net, BytesTokenizer()).loglikelihood_rolling([Asked((text,)) for text in texts])
    expected = []
    for text in texts:
        whole, total = [256, *text.encode()], 0.0
        for start in range(1, len(whole), C):
            end = min(start + C, len(whole))
            total += log_p(net, whole[max(0, end - C - 1) : end])[start - end :].sum().item()
        expected.append(total)
    assert found == pytest.approx(expected, rel=1e-5)


def test_texts_are_generated_up_to_their_stop_strings(net):
    prompt = "the cat"
    free = greedy(net, prompt, 12)
    stop = free[5]
    long = sentence(random.Random(3), 30)
    requests = [
        Asked((prompt, {"until": [stop], "max_gen_toks": 12}), doc_id=0),
        Asked((long, {"until": [], "max_gen_toks": 8, "do_sample": False, "temperature": 0.7}), doc_id=1),
        Asked((prompt, {"until": [], "max_gen_toks": 12}), doc_id=2),
    ]
    answers = Requests(net, BytesTokenizer())
    first, second, third = answers.generate_until(requests)
    assert first.encode() == third.encode()[: len(first.encode())]
    assert stop not in first
    assert third == BytesTokenizer().decode(free.encode("latin-1"))
    assert second == BytesTokenizer().decode(greedy(net, long[-(C - 8) :], 8).encode("latin-1"))
    assert answers.cut == {"mine": 1}
    with pytest.raises(InputError, match=r"mine: it asks for texts of 256 tokens, the model's context of 48"):
        answers.generate_until([Asked((prompt, {"until": ["\n"]}))])


@pytest.mark.parametrize(
    ("settings", "temperature", "tokens"),
    [
        ({}, 0.0, 256),
        ({"do_sample": True}, 1.0, 256),
        ({"temperature": 0.8, "max_new_tokens": 3}, 0.8, 3),
        ({"do_sample": False, "temperature": 0.8, "max_tokens": 4}, 0.0, 4),
        ({"do_sample": True, "temperature": 0.0, "max_gen_toks": 5, "max_tokens": 6}, 0.0, 5),
    ],
)
def test_settings_of_generation_are_those_of_the_harness(settings, temperature, tokens):
    found = Generation.of(settings, BytesTokenizer())
    assert (found.rules.temperature, found.max_new_tokens) == (temperature, tokens)


def test_stop_strings_and_rules_of_generation():
    words = WordsTokenizer(["a", "b", "<|endoftext|>", "<|unk|>"])
    found = Generation.of({"until": ["\n\n", "a", "", "a"], "top_k": 0, "top_p": 0.9}, words)
    assert found.stop == ("a",)
    assert (found.rules.top_k, found.rules.top_p) == (None, 0.9)
    assert Generation.of({"until": "b"}, words).stop == ("b",)
    with pytest.raises(InputError, match="generation_kwargs has guidance, unknown"):
        Generation.of({"guidance": 2}, words)
    with pytest.raises(InputError, match="generation_kwargs has num_beams, unknown"):
        Generation.of({"num_beams": 2}, words)


def test_texts_that_are_drawn_are_the_same_after_an_interruption(net, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_KEPT_EVERY", 1)
    monkeypatch.setattr(continuations, "BATCH", 2)
    draw = random.Random(1)
    settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 6, "until": []}
    prompt = sentence(draw, 2)  # the same: a task may ask several times
    requests = [Asked((prompt, settings), doc_id=number) for number in range(6)]
    whole = Requests(net, BytesTokenizer()).generate_until(requests)

    def interrupted(found: Iterator[Any], *, total: int, desc: str) -> Iterator[Any]:
        yield next(iter(found))
        raise KeyboardInterrupt

    kept: dict[str, Any] = {"folder": tmp_path, "sha256": "m"}
    with pytest.raises(KeyboardInterrupt):
        Requests(net, BytesTokenizer(), progress=interrupted, **kept).generate_until(requests)
    assert Requests(net, BytesTokenizer(), **kept).generate_until(requests) == whole
    assert len(set(whole)) == 6


def test_what_was_answered_is_not_asked_again(net, tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "_KEPT_EVERY", 2)
    draw = random.Random(0)
    requests = [
        Asked((sentence(draw, 3), f" {draw.choice(WORDS)}"), task_name=task, doc_id=number // 2)
        for task in ("one", "two/a")
        for number in range(8)
    ]
    whole = Requests(net, BytesTokenizer()).loglikelihood(requests)

    def interrupted(found: Iterator[Any], *, total: int, desc: str) -> Iterator[Any]:
        for number, each in enumerate(found):
            if desc == "two/a" and number == 2:
                raise KeyboardInterrupt
            yield each

    kept: dict[str, Any] = {"folder": tmp_path, "sha256": "m", "batch_tokens": 1}
    with pytest.raises(KeyboardInterrupt):
        Requests(net, BytesTokenizer(), progress=interrupted, **kept).loglikelihood(requests)
    asked = {}

    def counted(found: Iterator[Any], *, total: int, desc: str) -> Iterator[Any]:
        asked[desc] = total
        return found

    again = Requests(net, BytesTokenizer(), progress=counted, **kept)
    found = again.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole])
    assert asked == {"two/a": 2}
    asked.clear()
    again = Requests(net, BytesTokenizer(), progress=counted, **kept)
    found = again.loglikelihood(requests)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in whole])
    assert asked == {}
    assert again.seconds.keys() == {"one", "two/a"}
    with pytest.raises(InputError, match="is of another model"):
        Requests(net, BytesTokenizer(), **(kept | {"sha256": "other"})).loglikelihood(requests)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "suite.tasks is empty"),
        ({"limit": 0}, r"suite\.limit must be 1 or more, or null, got 0"),
        ({"num_fewshot": -1}, r"suite\.num_fewshot must be 0 or more, or null, got -1"),
        ({"include_path": "nowhere"}, "include_path=nowhere is not a folder"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        Harness(**({"tasks": ["a"]} | settings))


def test_a_missing_package_is_named(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(InputError, match=r"pip install 'gptpl\[eval\]'"):
        Harness(tasks=["hellaswag"]).run(net, BytesTokenizer())


# --- beside the harness's own model ---------------------------------------------------------------------


COMMON = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}}}
test_split: test
fewshot_split: test
"""
TASKS = {
    "choices": """
output_type: multiple_choice
num_fewshot: 1
doc_to_text: "{{context}}"
doc_to_target: "{{gold}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: "{{word}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
""",
    "documents": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
""",
    "written": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{written}}"
generation_kwargs: {until: [" the", "."], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}

GROUP = """
group: both
task: [choices, last_word]
aggregate_metric_list: [{metric: acc, weight_by_size: false}]
"""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of Hugging Face with a small GPT-2, random but opinionated, and its tokenizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_positions=C, n_embd=32, n_head=2, n_layer=2, bos_token_id=50256, eos_token_id=50256)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.25)
        model.transformer.wpe.weight.normal_(std=1.0)  # so that texts are not one word
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    write_tokenizer(GPT2Tokenizer(), folder, context_length=C)
    return folder


@pytest.fixture
def tasks(tmp_path: Path, gpt2: Path) -> Path:
    """A folder of four tasks with 15 documents each, a third of them answered right, and a group of two."""
    draw, model = random.Random(1), gptpl.load(gpt2)
    rows: list[dict[str, Any]] = []
    for _ in range(15):
        context = sentence(draw, draw.randint(2, 40))
        read = torch.tensor([model.tokenizer.encode(context).tolist()[-C:]])
        with torch.no_grad():
            likely = model.tokenizer.decode([int(model.net(read)[0, -1].argmax())])
        written = model.generate(context, temperature=0, max_new_tokens=6, stop=[" the", "."])
        is_right = len(rows) % 3 == 0
        rows.append(
            {
                "context": context,
                "choices": [sentence(draw, draw.randint(1, 5)) for _ in range(4)],
                "gold": draw.randrange(4),
                "word": likely if is_right else f" {draw.choice(WORDS)}",
                "written": written if is_right else "something else",
                "text": sentence(draw, draw.randint(1, 90)),
            }
        )
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = tmp_path / "rows.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = COMMON.format(file=file, cache=tmp_path / "cache")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}{common}{text}")
    (folder / "both.yaml").write_text(GROUP)
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packages that another test may have imported before: they read the environment only then."""
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness and what it imports
@pytest.mark.usefixtures("offline")
def test_every_figure_is_that_of_the_harness(tasks, gpt2, tmp_path, monkeypatch):
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)  # seconds
    theirs = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(gpt2), "device": "cpu"},
        batch_size=8,
        tasks=list(TASKS),
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
    )
    model = gptpl.load(gpt2)
    suite = Harness(tasks=list(TASKS), include_path=str(tasks))
    ours = suite.run(model.net, model.tokenizer, folder=tmp_path / "scores")
    assert list(ours.tasks) == list(TASKS)
    for name, task in ours.tasks.items():
        figures = theirs["results"][name]
        assert {f"{metric},none" for metric in task.metrics} == {
            key for key in figures if key.endswith(",none") and "_stderr" not in key
        }
        for metric, found in task.metrics.items():
            if metric in ("acc", "acc_norm", "exact_match"):
                assert found.value == figures[f"{metric},none"], (name, metric)
            else:
                assert found.value == pytest.approx(figures[f"{metric},none"], rel=1e-5), (name, metric)
            assert found.low <= found.value <= found.high
        assert task.questions == 15
    assert 0 < ours.tasks["last_word"].metrics["acc"].value < 1
    assert 0 < ours.tasks["written"].metrics["exact_match"].value < 1
    assert ours.tasks["choices"].shortened > 0
    texts = [each["filtered_resps"] for each in theirs["samples"]["written"]]
    [file] = (tmp_path / "scores").glob("written-*.json")
    kept = {row[0]: row[1] for row in json.loads(file.read_text())[1:]}
    assert [[kept[str(number)][0]] for number in range(15)] == texts
    assert len({text for [text] in texts}) > 7


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("offline")
def test_a_suite_of_the_harness_is_one_as_all_others(tasks, gpt2, monkeypatch):
    import lm_eval.tasks

    model = gptpl.load(gpt2)
    choices: dict[str, Any] = {"include_path": str(tasks), "limit": 10}
    result = model.benchmark("harness", tasks=["both", "documents"], **choices)
    assert list(result.tasks) == ["both", "documents"]
    both = result.tasks["both"]
    assert list(both.groups) == ["choices", "last_word"]
    means = [metric.value for _, metric in both.groups.values()]
    assert both.metrics["acc"].value == pytest.approx(sum(means) / 2)
    assert result.tasks["documents"].questions == 10
    single = Harness(tasks=["choices"], num_fewshot=0, **choices).run(model.net, model.tokenizer)
    again = Harness(tasks=["choices"], num_fewshot=0, **choices).run(model.net, model.tokenizer)
    found = single.tasks["choices"]
    assert found.metrics["acc"].chance == 0.25
    assert difference(found, again.tasks["choices"]).value == 0
    assert "choices" in "\n".join(result_lines([single, again]))
    assert "LM Evaluation Harness, both: 2 tasks" in page([result])
    json.dumps(record([result]), allow_nan=False)

    own = lm_eval.tasks.TaskManager
    monkeypatch.setattr(  # without its 14,000 tasks, which take 10 seconds
        lm_eval.tasks, "TaskManager", lambda **given: own(**(given | {"include_defaults": False}))
    )
    with pytest.raises(
        InputError, match=r"suite\.tasks has choice, no task of the harness.*: did you mean choices"
    ):
        Harness(tasks=["choice"], **choices).run(model.net, model.tokenizer)
    with pytest.raises(InputError, match="has choices twice, once in a group"):
        Harness(tasks=["both", "choices"], **choices).run(model.net, model.tokenizer)
    text = (tasks / "choices.yaml").read_text()
    (tasks / "far.yaml").write_text(
        "task: far\ndataset_path: nobody/nothing\n" + TASKS["choices"] + "test_split: test\n"
    )
    with pytest.raises(InputError, match="the data of far are not on this machine, and cannot be fetched"):
        Harness(tasks=["far"], **choices).run(model.net, model.tokenizer)
    (tasks / "gone.yaml").write_text(text.replace("rows.json", "none.json").replace("choices", "gone", 1))
    with pytest.raises(InputError, match="the harness cannot read gone"):
        Harness(tasks=["gone"], **choices).run(model.net, model.tokenizer)


@needs_lm_eval
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("bad", {}),
        ("some", {"some.yaml": "group: some\ntask: [{group: inner, task: [bad]}]\n"}),
        ("tagged", {}),
        ("over", {"over.yaml": "include: bad.yaml\ntask: over\n"}),
        ("put", {"put.yaml": "group: put\ntask: [{task: fine, doc_to_image: x}]\n"}),
    ],
)
def test_a_task_that_is_not_taken_is_refused_before_its_code_is_loaded(name, files, net, tmp_path):
    ran = tmp_path / "ran"
    (tmp_path / "utils.py").write_text(f"open({str(ran)!r}, 'w').close()\ndef score(*given): return 0.0\n")
    task = "dataset_path: json\noutput_type: generate_until\nmetric_list: [{metric: !function utils.score}]\n"
    (tmp_path / "fine.yaml").write_text(f"task: fine\n{task}")
    (tmp_path / "bad.yaml").write_text(f"task: bad\ntag: tagged\nunsafe_code: true\n{task}")
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match="which suite=harness does not take: leave it out"):
        Harness(tasks=[name], include_path=str(tmp_path)).run(net, BytesTokenizer())
    assert not ran.exists()
