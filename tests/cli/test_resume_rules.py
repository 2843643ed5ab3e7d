"""Which settings may change when a run is resumed: the contract, key by key."""

from pathlib import Path

import pytest

from gptpl.config.compose import compose, plain
from gptpl.config.slots import resume_of
from gptpl.errors import InputError
from gptpl.runs.resume_rules import Change, changes_between, check_changes
from gptpl.settings import FREE, INEXACT, NEVER, NEXT_STEP

RUN = Path("runs/tale")


KINDS = {
    FREE: """name resume tags trainer.max_time trainer.log_every_n_steps trainer.profiler data.num_workers
        data.pin_memory data.persistent_workers data.path data.corpus.path data.field
        data.corpus.field callbacks.sample_text.prompts callbacks.mine.path logger.csv.save_dir""",
    INEXACT: """trainer.accelerator trainer.devices trainer.num_nodes trainer.strategy trainer.precision
        trainer.compile deterministic data.batch_size""",
    NEXT_STEP: """optimizer.lr optimizer.muon_lr optimizer.weight_decay optimizer.betas optimizer.eps
        optimizer.momentum scheduler._target_ scheduler.warmup_steps scheduler.min_lr trainer.max_epochs
        trainer.max_steps trainer.gradient_clip_val eval_every_n_steps eval_train_batches eval_val_batches
        model.drop_rate on_nonfinite skip_steps tune.dropout""",
    NEVER: """seed run_dir experiment task._target_ tokenizer._target_ tokenizer.vocab_size model.emb_dim
        model.n_layers model.init model.tie_weights data.max_length data.stride data.train_ratio data.pattern
        data.corpus._target_ data.corpus.pattern optimizer._target_ optimizer.decay tune.rank
        trainer.accumulate_grad_batches trainer.limit_train_batches trainer.something_new something_new
        data.corpus.something_new""",
}


@pytest.mark.parametrize(("kind", "keys"), KINDS.items())
def test_the_class_of_a_setting_says_what_may_become_of_it(kind, keys):
    settings = plain(compose("experiment=quick", "data=text_file", "optimizer=muon", "tune=lora"))
    assert {key: resume_of(key, settings) for key in keys.split()} == dict.fromkeys(keys.split(), kind)


def test_a_class_of_the_users_says_it_too():
    settings = {
        "optimizer": {"_target_": "torch.optim.SGD", "lr": 1},
        "model": {"_target_": "torch.nn.Linear"},
    }
    assert resume_of("optimizer.lr", settings) == NEXT_STEP
    assert resume_of("model.in_features", settings) == NEVER


def test_only_what_differs_is_a_change():
    callbacks = {"a": {"x": 1}, "b": {"y": 2}}
    old = {
        "seed": 1,
        "optimizer": {"lr": 1, "betas": [0.9, 0.999]},
        "callbacks": callbacks,
    }
    same = {"seed": 1, "optimizer": {"lr": 1.0, "betas": [0.9, 0.999]}, "callbacks": callbacks}
    assert changes_between(old, same) == []
    new = {"seed": True, "optimizer": {"lr": 1, "betas": [0.9, 0.9]}, "callbacks": {"a": None, "c": {"z": 3}}}
    found = {change.key: (change.old, change.new, change.kind) for change in changes_between(old, new)}
    assert found == {
        "seed": (1, True, NEVER),
        "optimizer.betas": ([0.9, 0.999], [0.9, 0.9], NEXT_STEP),
        "callbacks.a": ({"x": 1}, None, FREE),
        "callbacks.b": ({"y": 2}, None, FREE),
        "callbacks.c": (None, {"z": 3}, FREE),
    }


def test_what_is_not_there_is_the_same_as_null():
    assert changes_between({"callbacks": {"a": None}}, {"callbacks": {}}) == []


def test_a_setting_that_a_class_did_not_have_yet_has_its_default():
    model = {"vocab_size": 9, "emb_dim": 8}
    optimizer = {"_target_": "gptpl.training.optimizers.adamw", "lr": 1e-3}
    old = {"model": model, "optimizer": optimizer}
    same = {"model": model | {"norm": "layernorm"}, "optimizer": optimizer | {"betas": [0.9, 0.999]}}
    assert changes_between(old, same) == changes_between(same, old) == []
    [change] = changes_between(old, {"model": model | {"norm": "rmsnorm"}, "optimizer": optimizer})
    assert (change.key, change.old, change.new, change.kind) == ("model.norm", "layernorm", "rmsnorm", NEVER)


def line(key, old, new):
    group, _, name = key.rpartition(".")
    before, after = ({group: {name: value}} if group else {name: value} for value in (old, new))
    [change] = changes_between(before, after)
    return change.line(50)


def test_a_change_says_from_when_it_counts():
    inexact = ", from step 51 (no longer bit-identical with the uninterrupted run)"
    assert line("optimizer.lr", 0.003, 0.001) == "  optimizer.lr: 0.003 -> 0.001, from step 51"
    assert (
        line("trainer.precision", "32-true", "16-mixed")
        == f"  trainer.precision: 32-true -> 16-mixed{inexact}"
    )
    assert line("deterministic", False, True) == f"  deterministic: false -> true{inexact}"
    assert line("trainer.max_time", None, "1:0:0") == "  trainer.max_time: null -> 1:0:0 (from now on)"
    assert line("callbacks.a", {"x": 1}, None) == "  callbacks.a: {...} -> null (from now on)"
    assert line("skip_steps", [], [7, 8]) == "  skip_steps: [] -> [7, 8], from step 51"
    assert (
        line("scheduler._target_", "a.b.Cosine", "c.Constant")
        == "  scheduler: Cosine -> Constant, from step 51"
    )


def refusal(key: str, old: object, new: object, given: dict[str, str]) -> str:
    change = Change(key=key, old=old, new=new, kind=NEVER)
    with pytest.raises(InputError) as caught:
        check_changes([change], given, RUN)
    return str(caught.value)


def test_a_fatal_change_names_the_override_that_asked_for_it():
    text = refusal("model.n_layers", 2, 12, {"seed": "seed=1", "model": "model=gpt_124m"})
    assert text.startswith("model.n_layers cannot change when a run is resumed: it was 2, asked for is 12; ")
    assert "leave model=gpt_124m out, or start a new run" in text


def test_one_that_no_override_asked_for_names_the_file():
    text = refusal("seed", 1, 2, {"data.path": "data.path=x"})
    assert text.startswith("seed=1 ")
    assert str(RUN / "config.yaml") in text
    assert "has 2: restore it" in text


def test_what_was_asked_for_is_named_before_what_followed_it():
    old = {"data": {"corpus": {"pattern": 1}, "pattern": 1}}
    new = {"data": {"corpus": {"pattern": 2}, "pattern": 2}}
    with pytest.raises(InputError, match=r"^data\.pattern cannot change"):
        check_changes(changes_between(old, new), {"data.pattern": "data.pattern=2"}, RUN)


def test_other_changes_are_not_refused():
    changes = changes_between({"optimizer": {"lr": 1}, "name": "a"}, {"optimizer": {"lr": 2}, "name": "b"})
    check_changes(changes, {}, RUN)
    assert len(changes) == 2
