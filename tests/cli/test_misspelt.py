"""A misspelt key or choice names the nearest right one, wherever it stands."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptpl.config.groups import choices, config_folder, default_choices


@pytest.mark.parametrize(
    ("given", "nearest"),
    [
        (["sed=1"], "seed"),
        (["eval_every_steps=1"], "eval_every_n_steps"),
        (["modle=tiny"], "model"),
        (["experimet=quick"], "experiment"),
        (["model.emb_dimm=8"], "model.emb_dim"),
        (["tokenizer.vocabsize=8"], "tokenizer.vocab_size"),
        (["data.batchsize=8"], "data.batch_size"),
        (["data=text_file", "data.pth=x"], "data.path"),
        (["data=the_verdict", "data.corpus.urll=x"], "data.corpus.url"),
        (["data=the_verdict", "data.filenam=x"], "data.corpus.filename"),
        (["task.target=x"], "task._target_"),
        (["optimizer.weight_dcay=1"], "optimizer.weight_decay"),
        (["optimizer=muon", "optimizer.muonlr=1"], "optimizer.muon_lr"),
        (["scheduler.warm_up_steps=1"], "scheduler.warmup_steps"),
        (["trainer.max_epoch=1"], "trainer.max_epochs"),
        (["logger.csv.savedir=x"], "logger.csv.save_dir"),
        (["logger.tensorbord.save_dir=x"], "logger.tensorboard.save_dir"),
        (["callbacks.sample_text.promts=[a]"], "callbacks.sample_text.prompts"),
        (["callbacks.sample_txt.seed=1"], "callbacks.sample_text.seed"),
        (
            ["callbacks=early_stopping", "callbacks.early_stopping.delta=1"],
            "callbacks.early_stopping.min_delta",
        ),
        (["callbacks.sample_text.strategies=[{temperatur: 1}]"], "temperature"),
        (["~callbacks.sampletext"], "callbacks.sample_text"),
        (["+sed=1"], "seed"),
        (["++optimizer.lrr=1"], "optimizer.lr"),
    ],
)
def test_a_misspelt_key_of_train(given, nearest, refused):
    line = refused("train", "model=tiny", "tokenizer=bytes", *given)
    wrong = given[-1].lstrip("+~").partition("=")[0]
    assert wrong in line
    assert f": did you mean {nearest}?" in line


@pytest.mark.parametrize(
    ("command", "given", "nearest"),
    [
        ("generate", "promt=x", "prompt"),
        ("generate", "max_tokens=1", "max_new_tokens"),
        ("generate", "chekpoint=x", "checkpoint"),
        ("evaluate", "splitt=all", "split"),
        ("evaluate", "data.batchsize=1", "data.batch_size"),
    ],
)
def test_a_misspelt_key_of_the_other_commands(command, given, nearest, refused):
    assert f"did you mean {nearest}?" in refused(command, "checkpoint=x", given)


@pytest.mark.parametrize("group", sorted(default_choices("train")))
def test_an_unknown_choice_names_the_nearest_and_all(group, refused):
    choice = choices(group)[0]
    misspelt = choice[:-2] + choice[-1] + choice[-2] if len(choice) > 3 else f"{choice}x"
    line = refused("train", f"{group}={misspelt}")
    meant, offered = f"did you mean {choice}?", ", ".join(choices(group))
    assert line == f"{group}={misspelt} is unknown: {meant}; choices: {offered}"


def test_a_choice_for_a_setting_names_the_override_that_makes_it(refused):
    line = refused("train", "experiment=quick", "callbacks.sample_text.filter=words")
    assert "to choose a YAML of conf/filter, give +filter@callbacks.sample_text.filter=words" in line


def test_a_recipe_whose_optimizer_is_replaced(refused):
    """The key is one of Muon's: the word itself is spelt right."""
    line = refused("train", "experiment=fast_recipe", "optimizer=adamw")
    assert "experiment/fast_recipe.yaml sets optimizer.muon_lr, a setting of optimizer=muon" in line
    assert "did you mean" not in line


def test_an_unknown_choice_in_a_list(refused):
    assert "did you mean early_stopping?" in refused("train", "callbacks=[default,early_stoping]")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("seed=abc", ["seed=abc", "a valid integer"]),
        ("seed=", ["seed="]),
        ("seed=1.5", ["seed=1.5"]),
        ("seed=1,2", ["seed=1,2", "-m"]),
        ("seed=[1", ["seed=[1"]),
        ("tags=paper", ["tags=paper: must be a list, such as [paper]; see gptpl train --help"]),
        ("seed", ["'seed'", "KEY=VALUE"]),
        ("=1", ["=1"]),
        ("seed=${nowhere}", ["nowhere"]),
        ("model.n_layers=two", ["model.n_layers=two", "a valid integer"]),
        ("model.n_layers=null", ["model.n_layers=null"]),
        ("model.qkv_bias=perhaps", ["model.qkv_bias=perhaps", "bool"]),
        ("optimizer.betas=[a,b]", ["optimizer.betas=[a,b]", "[0] must be a valid number"]),
        (
            "callbacks.sample_text.strategies=[{temperature: hot}]",
            ["strategies[0].temperature=hot", "a valid number"],
        ),
        ("trainer.max_epochs=ten", ["trainer.max_epochs=ten"]),
        ("deterministic=7up", ["deterministic=7up"]),
        ("model=null", ["model=null"]),
        ("model=7", ["model=7"]),
        ("data.path=x.txt", ["data.path", "data=text_file"]),
        ("optimizer.muon_lr=1", ["optimizer.muon_lr", "optimizer=muon"]),
        ("optimizer._target_=no.such.thing", ["no.such.thing"]),
        ("callbacks.sample_text._target_=builtins.int", ["int"]),
        ("checkpoint=x", ["gptpl train has no setting checkpoint"]),
    ],
)
def test_a_value_that_cannot_be_taken(given, words, refused):
    base = ["model=tiny", "tokenizer=bytes"] if not given.startswith("model=") else []
    line = refused("train", *base, given)
    assert all(word in line for word in words), line


@pytest.fixture
def edit(tmp_path_factory, monkeypatch) -> Callable[[str, str, str], None]:
    """Replaces text in a YAML of a copy of conf/, which the commands then use."""
    copy = Path(shutil.copytree(config_folder(), tmp_path_factory.mktemp("conf") / "conf"))
    monkeypatch.setattr("gptpl.config.groups.config_folder", lambda: copy)

    def replace(name: str, old: str, new: str) -> None:
        text = (copy / name).read_text(encoding="utf-8")
        assert old in text
        (copy / name).write_text(text.replace(old, new), encoding="utf-8")

    return replace


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("train.yaml", "deterministic:", "determinstic:", "did you mean deterministic?"),
        (
            "train.yaml",
            "model: gpt_124m",
            "model: gpt_124",
            "model=gpt_124 is unknown",
        ),
        ("model/tiny.yaml", "emb_dim:", "embdim:", "did you mean model.emb_dim?"),
        (
            "model/tiny.yaml",
            "emb_dim: 64",
            "emb_dim: wide",
            "model.emb_dim=wide in model/tiny.yaml: must be a valid integer",
        ),
        ("tokenizer/bytes.yaml", "vocab_size:", "vocabsize:", "did you mean tokenizer.vocab_size?"),
        ("data/tale.yaml", "corpus:", "copus:", "did you mean data.corpus?"),
        ("data/text_file.yaml", "pattern:", "patern:", "did you mean data.pattern?"),
        ("data/the_verdict.yaml", "  url:", "  ulr:", "did you mean data.corpus.url?"),
        ("task/pretrain.yaml", "_target_:", "_taget_:", "did you mean task._target_?"),
        ("optimizer/adamw.yaml", "decay: mat", "decays: mat", "did you mean optimizer.decay?"),
        ("optimizer/muon.yaml", "muon_lr:", "muonlr:", "did you mean optimizer.muon_lr?"),
        ("scheduler/cosine.yaml", "min_lr:", "minlr:", "did you mean scheduler.min_lr?"),
        ("trainer/cpu.yaml", "strategy:", "stratgy:", "did you mean trainer.strategy?"),
        ("logger/csv.yaml", "_target_:", "_taget_:", "did you mean logger.csv._target_?"),
        ("callbacks/sample_text.yaml", "prompts:", "promts:", "did you mean callbacks.sample_text.prompts?"),
        ("callbacks/sample_text.yaml", "top_k:", "topk:", "did you mean top_k?"),
        ("experiment/quick.yaml", "batch_size:", "batchsize:", "did you mean data.batch_size?"),
        (
            "experiment/quick.yaml",
            "/model: tiny",
            "/modle: tiny",
            "overrides modle, but gptpl train has no such config group: did you mean model?",
        ),
        (
            "experiment/quick.yaml",
            "/model: tiny",
            "/model: tinny",
            "model=tinny is unknown",
        ),
        (
            "experiment/quick.yaml",
            "lr: 3e-3",
            "lr: fast",
            "optimizer.lr=fast in experiment/quick.yaml: must be a valid number",
        ),
        ("experiment/quick.yaml", "optimizer:", "optimizer: [", "while parsing"),
    ],
)
def test_a_mistake_in_a_yaml(name, old, new, said, edit, refused):
    edit(name, old, new)
    group, _, choice = name.removesuffix(".yaml").partition("/")
    chosen = [f"{group}={choice}"] if choice else []
    line = refused("train", *chosen, *(["data.path=x"] if name == "data/text_file.yaml" else []))
    assert said in line
    assert name in line or "is unknown: did you mean" in line
