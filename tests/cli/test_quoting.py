"""What a user writes is what Hydra and OmegaConf hand to the command."""

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gptpl.cli.quoting import flags_first, quoted, readable_by_hydra, without_interpolation
from gptpl.errors import InputError

# What an argument of a process can hold: no NUL, and no half of a surrogate pair.
ARGUMENTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
AWKWARD = st.text(st.sampled_from("a \\'\"${},:=[]()\n"))


def value_behind(override: str) -> object:
    """The value that the task finds in its config."""
    [parsed] = OverridesParser.create().parse_overrides([override])
    return OmegaConf.create({parsed.key_or_group: parsed.value()})[parsed.key_or_group]


@given(ARGUMENTS | AWKWARD)
@example("\\\\${a}")
@example("${oc.env:HOME}")
@example("\\'")
def test_a_prompt_is_text_to_the_last_character(text):
    if text != "???":  # how OmegaConf says "missing"; `gptpl generate` knows
        assert value_behind(readable_by_hydra(f"prompt={text}")) == text


@given(ARGUMENTS | AWKWARD)
def test_quoted_text_is_one_value_of_hydras_grammar(text):
    [parsed] = OverridesParser.create().parse_overrides([f"key={quoted(text)}"])
    assert parsed.value() == text


@given(AWKWARD)
def test_text_without_interpolation_stands_for_itself(text):
    assert OmegaConf.create({"key": without_interpolation(text)})["key"] == text


@pytest.mark.parametrize("key", ["checkpoint", "data.path", "resume", "run_dir"])
@pytest.mark.parametrize(
    "path", ["a, b.txt", "it's.txt", "x=y/(1) [2].txt", "{a}", "C:\\texts\\", "**/*.txt", "~/a"]
)
def test_a_path_may_hold_any_character(key, path):
    [parsed] = OverridesParser.create().parse_overrides([readable_by_hydra(f"{key}={path}")])
    assert parsed.value() == path


@pytest.mark.parametrize(
    "override",
    [
        "data.path=null",
        "data.path='a, b'",
        'data.path="a"',
        "resume=",
        "data.path",
        "optimizer.lr=1e-4,4e-4",
        "model=tiny",
        "callbacks=[default,early_stopping]",
        "~callbacks.sample_text",
        "+callbacks.mine._target_=a.B",
        "+logger.mine._target_=a.B",
        "name=a b",
    ],
)
def test_other_overrides_are_left_to_hydra(override):
    assert readable_by_hydra(override) == override


def test_interpolation_works_in_paths():
    override = readable_by_hydra("data.path=${name}, part 1.txt")
    [parsed] = OverridesParser.create().parse_overrides([override])
    assert OmegaConf.create({"name": "a", "path": parsed.value()})["path"] == "a, part 1.txt"


@pytest.mark.parametrize("override", ["+seed=1", "++seed=1", "+model.foo=1"])
def test_a_plus_cannot_smuggle_in_unknown_keys(override):
    assert readable_by_hydra(override) == override.lstrip("+")


def test_flags_may_stand_anywhere():
    assert flags_first(["seed=1,2", "-m", "name=x"]) == ["-m", "seed=1,2", "name=x"]
    assert flags_first(["seed=1", "--cfg", "job", "--resolve"]) == ["--cfg", "job", "--resolve", "seed=1"]
    assert flags_first(["--cfg=job", "seed=1"]) == ["--cfg", "job", "seed=1"]


@pytest.mark.parametrize(
    "arguments", [["--cgf", "job"], ["--cfg"], ["--cfg", "jobs"], ["-x"], ["--config-dir"]]
)
def test_wrong_flags_are_refused(arguments):
    with pytest.raises(InputError, match=arguments[0]):
        flags_first(arguments)
