"""Every YAML of conf/ composes, and what it describes can really be built."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig, OmegaConf

import gptpl
from gptpl.callbacks.checkpoints import DurableCheckpointIO, ExactResume
from gptpl.callbacks.records import RecordEvaluations
from gptpl.callbacks.stopping import StopAtBoundary
from gptpl.config.compose import plain
from gptpl.config.groups import choices, config_folder, default_choices, when_to_choose
from gptpl.config.instantiate import instantiate, partial_of
from gptpl.data.instructions.records import PromptTemplate
from gptpl.data.pretraining.mixture import sources_of
from gptpl.data.sources import Corpus, LabelledCorpus
from gptpl.errors import InputError
from gptpl.filters import Filter
from gptpl.generation import SamplingRules
from gptpl.model import GPTConfig, GPTModel, count_parameters
from gptpl.runs.parts import build_datamodule
from gptpl.runs.trainer import build_trainer
from gptpl.tokenizers import Tokenizer
from gptpl.training.module import TrainingModule
from gptpl.weights.starting import StartingWeights

Compose = Callable[..., DictConfig]

CONF = config_folder()
YAMLS = sorted(
    path.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml") if not path.name.startswith("_")
)
ROOTS = (
    *("train", "generate", "respond", "serve", "classify", "inspect", "evaluate", "judge"),
    *("weights_fetch", "weights_convert"),
    *("sweep", "plan", "find_lr", "find_batch_size", "autotune", "data_encode", "data_show", "verify_resume"),
    *("tokenizer_train", "doctor", "submit", "card"),
)
GROUPS = tuple(default_choices("train"))
WITHOUT_DEFAULT = {
    "train": (),
    "sweep": (),
    "judge": ("responses",),
    "weights_fetch": (),
    "weights_convert": ("checkpoint", "format", "output"),
    **dict.fromkeys(("tokenizer_train", "doctor", "submit"), ()),
    **dict.fromkeys(("plan", "find_lr", "find_batch_size", "autotune", "verify_resume"), ()),
    **dict.fromkeys(("data_encode", "data_show"), ()),
}
"""What the user must give; elsewhere it is the checkpoint."""
CHEAP = ("model=tiny", "tokenizer=bytes")


def target_of(node: DictConfig) -> Any:
    module, _, name = node._target_.rpartition(".")
    return getattr(importlib.import_module(module), name)


# --- what is there --------------------------------------------------------------------------------------


def test_every_file_is_a_root_or_a_choice_of_a_group_that_a_root_names():
    groups = {group for root in ROOTS for group in default_choices(root)}
    expected = {f"{root}.yaml" for root in ROOTS}
    expected |= {f"{group}/{choice}.yaml" for group in groups for choice in choices(group)}
    assert set(YAMLS) == expected


@pytest.mark.parametrize("name", YAMLS)
def test_every_yaml_says_in_a_line_when_to_choose_it(name):
    comment = when_to_choose(CONF / name)
    assert len(comment) > 20
    assert "choose" in comment or name.removesuffix(".yaml") in ROOTS
    first, second = (CONF / name).read_text(encoding="utf-8").splitlines()[:2]
    assert (second if "@package" in first else first) == f"# {comment}"


BUILT = {
    *("sampling", "init", "tokenizer", "data", "optimizer", "scheduler", "task", "logger", "callbacks"),
    *("trainer", "experiment"),
}
"""Groups of which a test below builds every choice."""


TOGETHER = {
    "train": ("callbacks", "data", "model", "init", "tune", "trainer", "scheduler", "logger"),
    "evaluate": ("data", "init", "suite"),
}
"""Groups that know nothing of each other: one config has a choice of each of them."""


@pytest.fixture(scope="module")
def shared() -> dict[tuple[str, int], DictConfig]:
    """The configs of `with_choice`, by command and place of the choices in their groups."""
    return {}


@pytest.fixture
def with_choice(compose: Compose, shared: dict[tuple[str, int], DictConfig]) -> Callable[..., DictConfig]:
    """`with_choice("train", "init", "run")`: a config in which that is chosen, and something of other groups.

    Without a missing value. Its run folder is not the test's own.
    """

    def found(command: str, group: str, choice: str) -> DictConfig:
        place = choices(group).index(choice)
        if (command, place) not in shared:
            chosen = {each: choices(each)[place] for each in TOGETHER[command] if place < len(choices(each))}
            if command == "train":
                chosen = {"model": "tiny", "tokenizer": "bytes"} | chosen
            config = compose(command, *(f"{name}={each}" for name, each in chosen.items()))
            shared[command, place] = resolved(config, command)
        return shared[command, place].copy()

    return found


def resolved(config: DictConfig, command: str) -> DictConfig:
    """The config; fails where a value is missing, but for what the user must give, or cannot be resolved."""
    whole = config.copy()
    for key in WITHOUT_DEFAULT.get(command, ("checkpoint",)):
        whole[key] = "given"
    OmegaConf.to_container(whole, resolve=True, throw_on_missing=True)
    return config


@pytest.mark.parametrize("name", [each for each in YAMLS if each.partition("/")[0] not in BUILT])
def test_every_yaml_composes_to_settings_that_its_class_takes(name, compose, with_choice):
    group, _, choice = name.removesuffix(".yaml").rpartition("/")
    command = next(root for root in ROOTS if group in default_choices(root)) if group else choice
    if group in TOGETHER.get(command, ()):
        with_choice(command, group, choice)
    else:
        resolved(compose(command, *([f"{group}={choice}"] if group else [])), command)


@pytest.mark.parametrize("choice", choices("init"))
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_starting_weights_are_built(command, choice, with_choice):
    node = with_choice(command, "init", choice).init
    weights = instantiate(node)
    assert isinstance(weights, StartingWeights)
    assert isinstance(weights, target_of(node))
    if choice.startswith("gpt2"):
        assert weights.name == choice


@pytest.mark.parametrize("choice", choices("sampling"))
def test_sampling_presets_are_rules_and_have_every_one(choice, compose):
    node = resolved(compose("generate", f"sampling={choice}"), "generate").sampling
    assert set(node) == {field.name for field in dataclasses.fields(SamplingRules)}
    rules = SamplingRules(**node)
    assert (rules.name == "greedy") == (choice == "greedy")


@pytest.mark.parametrize("choice", [each for each in choices("filter") if each != "classifier"])
def test_filters_are_built(choice, compose, tmp_path):
    (tmp_path / "words.txt").write_text("ham")
    needed = {
        "words": ["filter.path=words.txt"],
        "patterns": ["filter.patterns.number='[0-9]'"],
        "several": ["filter.filters.words.path=words.txt"],
    }
    given = [each.replace("='", "=\"'").replace("]'", "]'\"") for each in needed.get(choice, [])]
    node = compose("respond", f"filter={choice}", *given).filter
    filter = instantiate(node)
    assert isinstance(filter, Filter)
    assert isinstance(filter, target_of(node))
    assert bool(filter.rules) == (choice != "none")
    if choice == "several":
        assert [rule.action for rule in filter.rules] == ["mark", "withhold"]


# --- data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", choices("tokenizer"))
def test_tokenizers_are_built(choice, compose):
    node = resolved(compose("train", "model=tiny", f"tokenizer={choice}"), "train").tokenizer
    if choice == "tiktoken":
        assert issubclass(target_of(node), Tokenizer)
        pytest.skip("fetched once")
    tokenizer = instantiate({key: value for key, value in node.items() if key != "vocab_size"})
    assert isinstance(tokenizer, Tokenizer)
    assert isinstance(tokenizer, target_of(node))
    assert tokenizer.name == choice
    fitted = tokenizer.fitted_to(["a few words"])
    assert fitted.decode(fitted.encode("a few words")) == "a few words"
    assert node.vocab_size in (None, fitted.vocab_size)


@pytest.mark.parametrize("choice", choices("data"))
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_corpora_are_built(command, choice, with_choice):
    node = with_choice(command, "data", choice).data
    if choice == "mixture":
        corpora = [source.corpus for source in sources_of(plain(node)["sources"]).values()]
        assert [corpus.files()[0].name for corpus in corpora] == ["text.txt", "text.txt"]
        return
    corpus = instantiate(node.corpus)
    assert isinstance(corpus, Corpus | LabelledCorpus)
    assert isinstance(corpus, target_of(node.corpus))
    assert corpus.name == choice
    if isinstance(corpus, Corpus) and choice not in (
        "the_verdict",
        "instructions",
        "hub",
    ):  # not on this machine
        assert all(path.is_file() for path in corpus.files())


@pytest.mark.parametrize("choice", ["tale", "text_file"])
def test_data_is_loaded_in_batches(choice, compose):
    config = compose("train", *CHEAP, f"data={choice}")
    datamodule = build_datamodule(config)
    inputs, targets = next(iter(datamodule.train_dataloader()))
    assert inputs.shape == targets.shape == (config.data.batch_size, 64)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


@pytest.mark.parametrize("task", choices("task"))
def test_settings_of_the_loaders_reach_the_data_of_every_task(task, compose):
    entry = '{{"instruction": "Say {0}", "input": "", "output": "{0}"}}\n'
    data, text = {
        "pretrain": ("text_file", "A text of the user's own. " * 200),
        "classify": ("labelled", "text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(40))),
        "instruct": ("instruction_file", "".join(entry.format(i) for i in range(40))),
    }[task]
    given = ("num_workers=2", "pin_memory=false", "persistent_workers=false", "batch_size=3", "max_length=60")
    config = compose(
        "train", *CHEAP, f"task={task}", f"data={data}", *(f"data.{each}" for each in given), "seed=7"
    )
    file = Path({"classify": "texts.csv", "instruct": "texts.jsonl"}.get(task, "texts.txt"))
    file.write_text(text)
    config.data.path = str(file)
    made = build_datamodule(config)
    assert (made.num_workers, made.pin_memory, made.persistent_workers) == (2, False, False)
    assert (made.batch_size, made.seed) == (3, 7)


# --- training -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_net() -> GPTModel:
    config = GPTConfig(
        vocab_size=10, context_length=4, emb_dim=8, n_heads=2, n_layers=1, drop_rate=0.0, qkv_bias=False
    )
    return GPTModel(config)


@pytest.mark.parametrize("choice", choices("optimizer"))
def test_optimizers_are_built(choice, compose, tiny_net):
    config = compose("train", *CHEAP, f"optimizer={choice}", "optimizer.lr=2e-4")
    node = resolved(config, "train").optimizer
    optimizer = partial_of(node)(tiny_net)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(
        map(id, tiny_net.parameters())
    )
    assert 2e-4 in {group["lr"] for group in optimizer.param_groups}


@pytest.mark.parametrize("choice", choices("scheduler"))
def test_schedules_are_built(choice, with_choice):
    node = with_choice("train", "scheduler", choice).scheduler
    schedule = instantiate(node)
    assert isinstance(schedule, target_of(node))
    factors = [schedule.factor(step, total_steps=50, peak_lr=1e-3) for step in range(50)]
    assert max(factors) == 1.0
    assert factors[-1] == pytest.approx(1.0 if choice == "constant" else 1e-3)


SETTINGS_FROM_THE_DATA: dict[str, dict[str, Any]] = {
    "instruct": {"template": PromptTemplate.named("alpaca")},
    "classify": {"labels": ("ham", "spam"), "max_length": 4},
}


@pytest.mark.parametrize("choice", choices("task"))
def test_tasks_are_built(choice, compose, tiny_net):
    node = resolved(compose("train", *CHEAP, f"task={choice}"), "train").task
    module = partial_of(node)(
        tiny_net,
        tokenizer=None,
        make_optimizer=None,
        lr_factor=None,
        total_steps=1,
        run_config={},
        eval_every_n_steps=1,
        **SETTINGS_FROM_THE_DATA.get(choice, {}),
    )
    assert isinstance(module, TrainingModule)
    assert module.task == choice
    assert module.net.blocks is tiny_net.blocks


@pytest.mark.parametrize("choice", choices("logger"))
def test_loggers_are_built_below_the_run_folder(choice, with_choice):
    config = with_choice("train", "logger", choice)
    nodes = config.logger
    if choice in ("wandb", "mlflow"):
        pytest.importorskip(choice, reason=f"{choice} is not installed")
    loggers = [instantiate(node) for node in nodes.values()]
    assert loggers
    assert all(isinstance(logger, Logger) and logger.save_dir == config.run_dir for logger in loggers)
    assert not Path(config.run_dir).exists()


@pytest.mark.parametrize("choice", choices("callbacks"))
def test_callbacks_are_built(choice, with_choice):
    config = with_choice("train", "callbacks", choice)
    nodes = config.callbacks
    for node in nodes.values():
        callback = instantiate(node)
        assert isinstance(callback, L.Callback)
        assert isinstance(callback, target_of(node))
    assert bool(nodes) == (choice != "none")
    assert not Path(config.run_dir).exists()


OF_TASKS = {"instruct", "sample_responses", "classify", "classification_report", "final_scores"}
"""Callbacks, and lists of them, that belong to certain tasks."""


TO_ADD = {"early_stopping", "benchmarks", "diagnostics"}
"""Callbacks that a user adds."""


def test_the_default_callbacks_are_all_but_those_of_tasks_and_those_to_add(compose):
    alone = set(choices("callbacks")) - {"default", "none"} - TO_ADD - OF_TASKS
    assert set(compose("train", *CHEAP).callbacks) == alone
    both = compose("train", *CHEAP, "callbacks=[default,early_stopping]").callbacks
    assert set(both) == alone | {"early_stopping"}


@pytest.mark.parametrize("choice", choices("trainer"))
def test_trainers_are_built_or_refused_in_a_line(choice, with_choice, tmp_path):
    needed = {"gpu": torch.cuda.is_available(), "fsdp": torch.cuda.is_available()}
    needed["mps"] = torch.backends.mps.is_available()
    cfg = with_choice("train", "trainer", choice)

    def build() -> L.Trainer:
        return build_trainer(cfg, precision="32-true", callbacks=[], default_root_dir=tmp_path, logger=False)

    if needed.get(choice, True):
        trainer = build()
        assert trainer.max_epochs == 10
        kinds = [type(callback) for callback in trainer.callbacks[:3]]  # type: ignore[attr-defined]
        assert kinds == [ExactResume, RecordEvaluations, StopAtBoundary]
        assert isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO)
    else:
        with pytest.raises(
            InputError, match=f"trainer.accelerator={cfg.trainer.accelerator}.*use trainer.accelerator=cpu"
        ):
            build()


# --- recipes and commands -------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", choices("experiment"))
def test_everything_an_experiment_names_is_built(choice, compose):
    config = resolved(compose("train", f"experiment={choice}"), "train")
    nodes = [config.data.corpus, config.scheduler]
    # null: the recipe leaves that callback out
    kept = [node for node in config.callbacks.values() if node is not None]
    for node in (*nodes, *kept, *config.logger.values()):
        assert instantiate(node) is not None
    assert partial_of(config.optimizer)
    assert partial_of(config.task)
    assert count_parameters(GPTConfig(**config.model)).total > 0
    differences: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"experiment/{choice}.yaml"))
    for override in differences.pop("defaults"):
        [(group, chosen)] = override.items()
        assert chosen in choices(group.removeprefix("override /"))
    assert OmegaConf.merge(config, differences) == config


def test_classification_has_the_published_setting_unless_something_else_is_asked_for(compose):
    config = compose("train", "task=classify", "data=sms_spam", "init=gpt2_hf", "model=gpt2_small")
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (5e-5, 0.1)
    assert (config.trainer.max_epochs, config.data.batch_size, config.eval_val_batches) == (5, 8, None)
    assert config.tune._target_.endswith("TuneLastBlock")
    # Random weights that never train are nothing to classify by.
    assert compose("train", "task=classify").tune._target_.endswith("TuneAll")
    assert (config.data.balance, config.data.train_ratio, config.data.val_ratio) == ("undersample", 0.7, 0.1)
    assert {"early_stopping", "classification_report", "final_scores"} <= set(config.callbacks)
    assert "sample_text" not in config.callbacks
    other = compose(
        "train",
        *("callbacks=none", "optimizer.lr=1e-3", "task=classify", "task.pooling=last_position", "tune=all"),
        *("data=labelled", "data.padding=longest", "trainer.max_epochs=2"),
    )
    assert (dict(other.callbacks), other.optimizer.lr, other.trainer.max_epochs) == ({}, 1e-3, 2)
    assert (other.task.pooling, other.data.corpus.path) == ("last_position", None)
    assert other.tune._target_.endswith("TuneAll")


def test_the_default_run_is_the_published_setting_with_a_schedule(compose):
    config = compose("train")
    assert (config.seed, config.trainer.max_epochs, config.data.batch_size) == (123, 10, 2)
    assert (config.data.max_length, config.data.stride, config.data.train_ratio) == (256, 256, 0.9)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (4e-4, 0.1)
    assert list(config.optimizer.betas) == [0.9, 0.999]
    assert (config.trainer.gradient_clip_val, config.trainer.accumulate_grad_batches) == (1.0, 1)
    assert config.scheduler._target_.endswith("CosineSchedule")
    assert config.scheduler.warmup_steps == "auto"
    assert config.scheduler.min_lr == 1e-6
    assert (config.eval_train_batches, config.eval_val_batches) == (5, 5)
    assert config.data.corpus._target_.endswith("Tale")


def test_the_verdict_is_the_published_run(compose):
    config = compose("train", "experiment=the_verdict")
    assert config.trainer.precision == "32-true"
    assert config.trainer.gradient_clip_val is None
    assert config.scheduler._target_.endswith("ConstantSchedule")
    assert config.scheduler.warmup_steps == 0
    assert (config.optimizer.lr, config.optimizer.weight_decay, config.optimizer.decay) == (4e-4, 0.1, "all")
    assert (config.data.batch_size, config.data.max_length, config.seed) == (2, 256, 123)
    assert config.eval_every_n_steps == 5
    assert config.data.corpus.filename == "the-verdict.txt"
    assert GPTConfig(**config.model) == GPTConfig(**compose("train", "model=gpt_124m").model)


def test_a_value_flows_to_where_it_is_needed(compose):
    config = compose("train", *CHEAP, "model.context_length=32", "seed=7")
    assert (config.model.vocab_size, config.data.max_length, config.data.stride) == (257, 32, 32)
    assert config.callbacks.sample_text.seed == 7
    assert Path(config.callbacks.loss_curve.path).parent == Path(config.run_dir)


def test_instruction_tuning_has_the_published_setting_unless_something_else_is_asked_for(compose):
    config = compose("train", "task=instruct")
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (5e-5, 0.1)
    assert (config.trainer.max_epochs, config.data.batch_size, config.eval_val_batches) == (2, 8, None)
    assert (config.data.train_ratio, config.data.test_ratio, config.data.template) == (0.85, 0.1, "alpaca")
    assert "sample_responses" in config.callbacks
    assert "sample_text" not in config.callbacks
    asked = ("optimizer.lr=1e-3", "data=tale", "callbacks=none", "scheduler=cosine", "trainer.max_epochs=7")
    other = compose("train", "task=instruct", *asked)
    assert (other.optimizer.lr, other.trainer.max_epochs, other.scheduler.min_lr) == (1e-3, 7, 1e-6)
    assert (dict(other.callbacks), "corpus" in other.data, "template" in other.data) == ({}, True, False)


@pytest.mark.parametrize("key", ["data.seed", "data.eval_val_batches", "scheduler.warmup_steps"])
def test_a_reference_to_nothing_is_refused(key: str) -> None:
    with pytest.raises(InputError, match=rf"{key}.*nothing\.at_all"):
        gptpl.compose(f"{key}=${{nothing.at_all}}")
