"""Samples during training: when, what, where to, and that training does not notice."""

import html
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptpl.callbacks import samples
from gptpl.callbacks.samples import SampleText
from gptpl.errors import InputError
from gptpl.filters import Patterns
from gptpl.generation import SamplingRules, generate

Logged = Callable[[], list[str]]
HOT = SamplingRules(temperature=1.5, top_k=100)


def sampler(path: Path, **options: Any) -> SampleText:
    defaults: dict[str, Any] = {
        "prompts": ["Every effort"],
        "strategies": [SamplingRules()],
        "max_new_tokens": 5,
        "every_n_epochs": None,
    }
    return SampleText(path=path, **(defaults | options))


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


# --- filters ------------------------------------------------------------------------------------------


def test_samples_are_filtered_wherever_they_go(training: Any, tmp_path: Path, logged: Logged) -> None:
    plain, filtered = tmp_path / "plain.jsonl", tmp_path / "filtered.jsonl"
    options = {"prompts": ["Every effort", "The sea"], "max_new_tokens": 12, "strategies": [HOT]}
    unfiltered = training.fit(sampler(plain, **options), logger=False)
    count = len(logged())
    filter = Patterns(patterns={"letter": "[A-Za-z]"})
    trained = training.fit(sampler(filtered, **options, filter=filter), logger=False)
    for one, other in zip(unfiltered.model.parameters(), trained.model.parameters(), strict=True):
        assert torch.equal(one, other)
    found = 0
    for record, shown in zip(records(plain), records(filtered), strict=True):
        text, number = re.subn("[A-Za-z]", "[letter]", record["continuation"])
        expected = {"letter": number} if number else {}
        assert shown == record | {"continuation": text, "filtered": expected}
        found += number
    assert found
    line = f"samples at step 8, {HOT.name}: filter: "
    [counted] = [each for each in logged()[count:] if each.startswith(line)]
    assert counted.endswith(f"of 2 texts: letter {found}")


def test_a_filter_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="filter=words of the text samples is not a filter"):
        sampler(tmp_path / "s.jsonl", filter="words")


# --- when ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("every", "steps"),
    [
        ({"every_n_steps": 3}, [3, 6, 8]),
        ({"every_n_epochs": 1}, [4, 8]),
        ({"every_n_epochs": 2}, [8]),
        ({"every_n_steps": 4, "every_n_epochs": 1}, [4, 8]),
        ({"every_n_epochs": None}, [8]),
    ],
)
def test_samples_at_due_moments_and_once_at_the_end(
    training: Any, tmp_path: Path, every: dict[str, int], steps: list[int]
) -> None:
    path = tmp_path / "run" / "samples.jsonl"
    training.fit(sampler(path, **every))
    assert [record["step"] for record in records(path)] == steps


def test_accumulated_batches_are_one_step(training: Any, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    training.fit(sampler(path, every_n_steps=1), max_steps=4, accumulate_grad_batches=2)
    assert [(record["step"], record["epoch"]) for record in records(path)] == [
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
        (4, 2.0),
    ]


# --- what ---------------------------------------------------------------------------------------------


def test_record_of_each_prompt_and_strategy(training: Any, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    module = training.module()
    training.fit(
        sampler(path, prompts=["one", "two"], strategies=[SamplingRules(), HOT], seed=7), module=module
    )
    greedy = {"temperature": 0.0, "top_k": None}
    hot = {"temperature": 1.5, "top_k": 100}
    found = records(path)
    assert [(record["prompt"], record["strategy"]) for record in found] == [
        ("one", greedy),
        ("two", greedy),
        ("one", hot),
        ("two", hot),
    ]
    for record in found:
        assert record["step"] == 8
        assert record["epoch"] == 2.0
        assert record["tokens_seen"] == 8 * 2 * 16
        assert record["seed"] == 7


def test_greedy_continuation_is_that_of_the_trained_model(training: Any, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    module = training.module()
    training.fit(sampler(path, max_new_tokens=9), module=module)
    prompt = torch.tensor([list(b"Every effort")])
    whole = generate(module.net, prompt, max_new_tokens=9, eot_id=256)[0].tolist()
    (record,) = records(path)
    assert "Every effort" + record["continuation"] == module.tokenizer.decode(whole)


def test_a_sample_depends_on_seed_and_step_but_not_on_its_neighbours(training: Any, tmp_path: Path) -> None:
    def run(name: str, module: Any = None, **options: Any) -> dict[int, str]:
        path = tmp_path / name
        training.fit(sampler(path, every_n_steps=4, max_new_tokens=12, **options), module=module)
        return {
            record["step"]: record["continuation"]
            for record in records(path)
            if record["prompt"] == "Every effort" and record["strategy"]["temperature"] > 0
        }

    alone = run("alone", strategies=[HOT])
    assert alone == run("again", strategies=[HOT])
    assert alone == run("beside", strategies=[SamplingRules(), HOT], prompts=["Other", "Every effort"])
    other = run("other", strategies=[HOT], seed=124)
    assert alone[4] != other[4]
    assert alone[8] != other[8]
    frozen = run("frozen", strategies=[HOT], module=training.module(lr=0.0))
    assert frozen[4] != frozen[8]


# --- training does not notice -------------------------------------------------------------------------


def test_sampling_changes_no_bit_of_the_training(training: Any, tmp_path: Path) -> None:
    with_samples, without = training.module(), training.module()
    torch.manual_seed(5)
    training.fit(sampler(tmp_path / "s", every_n_steps=1, strategies=[HOT]), module=with_samples)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    training.fit(module=without)
    assert with_samples.train_losses == without.train_losses  # dropout is on
    assert torch.equal(state, torch.get_rng_state())
    for ours, theirs in zip(with_samples.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Watch(L.Callback):
    """Compares, right around the sampling, what it must leave alone."""

    def __init__(self) -> None:
        self.before: Any = None
        self.seen = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        state = (torch.get_rng_state().tolist(), pl_module.training, torch.is_grad_enabled())
        metrics = dict(trainer.callback_metrics)
        if self.before is None:
            self.before = (state, metrics)
        else:
            assert state == self.before[0]
            assert state[1:] == (True, True)
            assert metrics == self.before[1]
            assert all(module.training for module in pl_module.modules())
            self.before = None
            self.seen += 1


def test_sampling_leaves_modes_metrics_and_random_state(training: Any, tmp_path: Path) -> None:
    watch = Watch()
    training.fit(watch, sampler(tmp_path / "s", every_n_steps=1, strategies=[HOT]), _Second(watch))
    assert watch.seen == 8


class _Second(L.Callback):
    """Asks the watch again behind the sampler."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_train_batch_end(self, *args: Any) -> None:
        self.watch.on_train_batch_end(*args)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_sampling_compiles_nothing(training: Any, tmp_path: Path) -> None:
    compiled = []

    def backend(graph: torch.fx.GraphModule, example_inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    module = training.module()
    module.net.blocks[0].compile(backend=backend)
    sampling = sampler(tmp_path / "s", every_n_steps=1, max_new_tokens=4)
    training.fit(sampling, module=module, limit_val_batches=0)
    assert len(compiled) == 1  # the training graph


def test_failing_generation_is_not_swallowed(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no logits today")

    monkeypatch.setattr("gptpl.callbacks.samples.complete", fail)
    with pytest.raises(RuntimeError, match="no logits today"):
        training.fit(sampler(tmp_path / "s"))


# --- where to -----------------------------------------------------------------------------------------


def test_log_line_separates_prompt_from_continuation(training: Any, tmp_path: Path, logged: Logged) -> None:
    path = tmp_path / "samples.jsonl"
    training.fit(sampler(path, prompts=["Every\n\neffort"], strategies=[HOT], max_new_tokens=30))
    (line,) = logged()
    assert line.startswith("sample at step 8 (epoch 2), temperature 1.5, top-k 100: [Every effort] ")
    # An untrained byte model writes control characters; none may reach the terminal.
    assert not records(path)[0]["continuation"].isprintable()
    assert line.isprintable()


NASTY = [
    "</code></pre><script>alert(1)</script>",
    "``` \n```python\n# heading\n* list\n> quote",
    "a\n\n\n    indented\n\nb\tc",
    "<!-- comment",
    "<div>\n\n<b>bold</b>\n",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "[link](http://x) ![i](y) &amp; &lt; <http://auto> **bold** \\* _em_",
    "\x85line\u2028sep\x0cform\x1cfs",
    "[^1]: note\n[ref]: http://x\n",
    "<?php <![CDATA[ x ]]>",
    "",
]


@pytest.mark.filterwarnings("ignore:html5lib's sanitizer is deprecated:DeprecationWarning")
@pytest.mark.parametrize("text", NASTY)
def test_tensorboard_shows_generated_text_literally(
    training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    def nasty(*args: Any, **kwargs: Any) -> list[Any]:
        return [SimpleNamespace(text=text, verdict=None)]

    monkeypatch.setattr("gptpl.callbacks.samples.complete", nasty)
    board = TensorBoardLogger(tmp_path, name="", version="tb")
    training.fit(
        sampler(tmp_path / "s", prompts=["<i>hello</i>"]), logger=board, max_steps=1, val_check_interval=1
    )
    assert records(tmp_path / "s")[0]["continuation"] == text
    from tensorboard.plugin_util import markdown_to_safe_html

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    (event,) = events.Tensors("sample/greedy/text_summary")
    assert event.step == 1
    rendered = markdown_to_safe_html(event.tensor_proto.string_val[0].decode())
    # All that is not in a code block is our own headings; the blocks hold the very lines of the texts.
    blocks = re.findall(r"<pre><code>(.*?)</code></pre>", rendered, flags=re.DOTALL)
    rest = re.sub(r"<pre><code>.*?</code></pre>", "", rendered, flags=re.DOTALL)
    assert re.sub(r"</?(p|strong)>|\s", "", rest) == "promptcontinuation"
    shown = [html.unescape(block) for block in blocks]
    assert shown[0].strip() == "<i>hello</i>"

    def lines(part: str) -> list[list[str]]:
        return [line.expandtabs(4).split() for line in part.splitlines() if line.strip()]

    assert lines("\n".join(shown[1:])) == lines(text)


def test_no_tensorboard_and_no_run_folder_is_fine(training: Any, tmp_path: Path) -> None:
    training.fit(sampler(tmp_path / "a" / "b" / "samples.jsonl"), logger=False)
    assert len(records(tmp_path / "a" / "b" / "samples.jsonl")) == 1


# --- resume -------------------------------------------------------------------------------------------


def test_resumed_run_doubles_and_loses_no_line(training: Any, tmp_path: Path) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "samples.jsonl"
    options = {"every_n_steps": 2, "every_n_epochs": 1, "strategies": [SamplingRules(), HOT]}
    training.fit(sampler(whole, **options))

    checkpoint = tmp_path / "at_4.ckpt"
    first = training.fit(sampler(path, **options), max_steps=4)
    first.save_checkpoint(checkpoint)
    torn = json.dumps({**records(path)[0], "step": 6})
    with path.open("a", encoding="utf-8") as file:  # an earlier attempt went on, and was cut off in a line
        file.write(torn + "\n" + torn[:30])
    training.fit(sampler(path, **options), resume=checkpoint)

    def keys(file: Path) -> list[tuple[int, str]]:
        return [(record["step"], str(record["strategy"])) for record in records(file)]

    assert keys(path) == keys(whole)
    assert [step for step, _ in keys(path)] == [2, 2, 4, 4, 6, 6, 8, 8]
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"


def test_a_new_run_replaces_the_lines_of_an_old_one(training: Any, tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    training.fit(sampler(path, every_n_steps=2))
    training.fit(sampler(path, every_n_steps=4))
    assert [record["step"] for record in records(path)] == [4, 8]


def test_text_survives_the_cut_back_at_a_resume(tmp_path: Path) -> None:
    from gptpl.callbacks.records import RecordFile

    path = tmp_path / "samples.jsonl"
    strange = {"step": 1, "prompt": "p", "strategy": {}, "continuation": "é\u2028\x85\r\n\0 \ufffd 日本"}
    file = RecordFile(path)
    file.start(step=0)
    file.append([strange, {**strange, "step": 2}])
    file = RecordFile(path)
    file.start(step=1)
    assert records(path) == [strange]


# --- bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"every_n_steps": -3}, "every_n_steps of the text samples must be 1 or more, got -3"),
        ({"every_n_epochs": 0}, "every_n_epochs of the text samples must be 1 or more, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens of the text samples must be 1 or more, got 0"),
        ({"seed": -1}, "seed of the text samples must be 0 or more, got -1"),
        ({"prompts": []}, "a list of one or more texts, none empty, got []"),
        ({"prompts": "Every effort"}, "a list of one or more texts, none empty, got 'Every effort'"),
        ({"prompts": [""]}, "a list of one or more texts, none empty, got ['']"),
        ({"prompts": [3]}, "a list of one or more texts, none empty, got [3]"),
        ({"strategies": []}, "strategies must be one or more"),
        ({"strategies": ["greedy"]}, "'greedy'"),
        (
            {"strategies": [{"temprature": 1.0}]},
            "unknown sampling rule 'temprature': choose from temp",
        ),
        (
            {"strategies": [{"temperature": -1}]},
            "temperature must be 0 (greedy) or a positive",
        ),
        ({"strategies": [{"temperature": float("nan")}]}, "got nan"),
        ({"strategies": [{"temperature": float("inf")}]}, "got inf"),
        ({"strategies": [{"temperature": "hot"}]}, "positive number, got 'hot'"),
        ({"strategies": [{"top_k": 0}]}, "top_k must be a positive whole number or null, got 0"),
        ({"strategies": [{"top_k": 1.5}]}, "or null, got 1.5"),
    ],
)
def test_bad_arguments_are_one_line_that_names_the_value(
    tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError) as error:
        sampler(tmp_path / "s", **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"), [({"strategies": [{"banned_tokens": [257]}]}, "ids from 0 to 256, got 257")]
)
def test_what_does_not_fit_the_model_is_refused_before_training(
    training: Any, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    module = training.module()
    with pytest.raises(InputError, match=words):
        training.fit(sampler(tmp_path / "s", **options), module=module)
    assert not module.train_losses
    assert not (tmp_path / "s").exists()


def test_a_top_k_above_the_vocabulary_keeps_all_of_it_and_says_so_once(
    training: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def continuation(name: str, top_k: int | None) -> str:
        rules = SamplingRules(temperature=1.5, top_k=top_k)
        training.fit(sampler(tmp_path / name, strategies=[rules], every_n_steps=2))
        return str(records(tmp_path / name)[-1]["continuation"])

    caplog.set_level(logging.INFO)
    assert continuation("above", 1000) == continuation("all", None)
    said = [line for line in caplog.messages if "top_k" in line]
    assert said == ["top_k=1000 exceeds the vocabulary of 257 tokens: all are kept"]


def test_prompt_without_a_token_is_refused_before_training(training: Any, tmp_path: Path) -> None:
    module = training.module()
    module.tokenizer = SimpleNamespace(encode=lambda text: [])
    with pytest.raises(InputError, match=r"prompt ' ' has no tokens: give"):
        training.fit(sampler(tmp_path / "s", prompts=[" "]), module=module)


def test_strategies_of_a_config_are_taken(tmp_path: Path) -> None:
    config = OmegaConf.create([{"temperature": 0.0}, {"temperature": 0.8, "top_k": 40}])
    callback = sampler(tmp_path / "s", strategies=config, prompts=OmegaConf.create(["a", "b"]))
    assert callback.strategies == [SamplingRules(), SamplingRules(temperature=0.8, top_k=40)]
    assert [strategy.name for strategy in callback.strategies] == ["greedy", "temperature 0.8, top-k 40"]
    assert callback.prompts == ["a", "b"]


def test_sharded_models_are_skipped_with_one_warning(
    training: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The strategy stands for one that shards; tests/training/test_fsdp.py has one that does."""
    strategy = L.pytorch.strategies.SingleDeviceStrategy(device=torch.device("cpu"))
    monkeypatch.setattr(samples, "FullyShardedStrategy", type(strategy))
    training.fit(sampler(tmp_path / "s", every_n_steps=1), strategy=strategy)
    warnings = [record for record in caplog.records if record.levelname == "WARNING"]
    assert [record.getMessage() for record in warnings] == [
        "No text samples: the strategy fsdp divides the model among the processes."
    ]
    assert not (tmp_path / "s").exists()
