"""What a user writes is what Hydra and OmegaConf hand to the command."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gptpl.cli.arguments import parse
from gptpl.config.groups import is_group
from gptpl.config.overrides import quoted, readable, without_interpolation
from gptpl.errors import InputError

# What an argument of a process can hold: no NUL, and no half of a surrogate pair.
ARGUMENTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
AWKWARD = st.text(st.sampled_from("a \\'\"${},:=[]()\n"))


def readable_by_hydra(override: str) -> str:
    return readable(override, is_group=is_group)


def value_behind(override: str) -> object:
    """The value that the task finds in its config."""
    [parsed] = OverridesParser.create().parse_overrides([override])
    return OmegaConf.create({parsed.key_or_group: parsed.value()})[parsed.key_or_group]


@given(ARGUMENTS | AWKWARD)
@example("\\\\${a}")
@example("${oc.env:HOME}")
@example("\\'")
@example('it\'s "quoted"')
@example("'quoted'")
@example('"quoted"')
@example("'one,' she said, 'two'")
@example("a, b=c: {d}")
@example("f(x) = [1, {2: 3}]")
@example("back\\slash \\' and \\\\")
@example("ends in a backslash\\")
@example("ends in a quote'")
@example("\ttab")
@example("cost $5 {or} so")
@example("<tag> & | ; * ?")
def test_a_prompt_is_text_to_the_last_character(text):
    # "null" is no text here, and "???" how OmegaConf says "missing".
    if text not in ("???", "null"):
        assert value_behind(readable_by_hydra(f"prompt={text}")) == text


@given(ARGUMENTS | AWKWARD)
def test_quoted_text_is_one_value_of_hydras_grammar(text):
    [parsed] = OverridesParser.create().parse_overrides([f"key={quoted(text)}"])
    assert parsed.value() == text


@given(AWKWARD)
def test_text_without_interpolation_stands_for_itself(text):
    assert OmegaConf.create({"key": without_interpolation(text)})["key"] == text


@pytest.mark.parametrize("key", ["checkpoint", "data.path", "data.train_path", "resume", "run_dir"])
@pytest.mark.parametrize(
    "path", ["a, b.txt", "it's.txt", "x=y/(1) [2].txt", "{a}", "C:\\texts\\", "**/*.txt", "~/a"]
)
def test_a_path_may_hold_any_character(key, path):
    [parsed] = OverridesParser.create().parse_overrides([readable_by_hydra(f"{key}={path}")])
    assert parsed.value() == path


@pytest.mark.parametrize(
    "override",
    [
        "resume=",
        "data.path",
        "model=tiny",
        "callbacks=[default,early_stopping]",
        "~callbacks.sample_text",
        "+callbacks.mine._target_=a.B",
        "name=a b",
    ],
)
def test_other_overrides_are_left_to_hydra(override):
    assert readable_by_hydra(override) == override


def test_interpolation_works_in_paths():
    override = readable_by_hydra("data.path=${name}, part 1.txt")
    [parsed] = OverridesParser.create().parse_overrides([override])
    assert OmegaConf.create({"name": "a", "path": parsed.value()})["path"] == "a, part 1.txt"


@pytest.mark.parametrize("key", ["template", "data.response_marker", "prompt"])
def test_null_is_no_text(key):
    assert value_behind(f"{key}=null") is None


@pytest.mark.parametrize("override", ["optimizer.lr=1", "trainer.limit_val_batches=2", "data.mine=x"])
def test_a_setting_of_a_class_is_added_where_no_yaml_has_it(override):
    assert readable_by_hydra(override) == f"++{override}"


@pytest.mark.parametrize("override", ["+seed=1", "++model.foo=1", "~callbacks.sample_text", "model=tiny"])
def test_signs_and_choices_are_left_alone(override):
    assert readable_by_hydra(override) == override


def test_flags_may_stand_anywhere():
    given = parse("train", ["seed=1,2", "-m", "name=x"], sweeps=True)
    assert (given.multirun, given.overrides) == (True, ["seed=1,2", "name=x"])
    given = parse("train", ["seed=1", "--cfg", "job", "--resolve", "~callbacks.sample_text"])
    assert (given.cfg, given.resolve) == ("job", True)
    assert given.overrides == ["seed=1", "~callbacks.sample_text"]
    assert parse("train", ["--cfg=job", "seed=1"]).cfg == "job"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cgf", "job"], "gptpl train has no flag --cgf: did you mean --cfg"),
        (["--cfg"], "--cfg: expected one argument"),
        (["--cfg", "jobs"], "invalid choice: 'jobs'"),
        (["-x"], "gptpl train has no flag -x: its flags are"),
        (["--config-dir"], "--config-dir: expected one argument"),
        (["--config-dir", "missing"], None),
        (["--checkpoint", "X"], "did you mean init.checkpoint=VALUE?"),
        (["--lr", "3"], "gptpl train has no flag --lr: did you mean optimizer.lr=VALUE?"),
        (["--hydra-help"], "gptpl train has no flag --hydra-help"),
    ],
)
def test_wrong_flags_are_refused(arguments, said):
    if said is None:
        assert str(parse("train", arguments).config_dir).endswith("missing")
        return
    with pytest.raises(InputError, match=re.escape(said)):
        parse("train", arguments)
