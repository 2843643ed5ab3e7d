"""`gptpl generate -i`: typed lines are continued, rules change, mistakes end nothing."""

import re

import pytest


@pytest.fixture
def talk(gptpl, quick, monkeypatch):
    """Types lines into `gptpl generate -i`; returns what it printed."""

    def run(*lines: str | type[BaseException], arguments: tuple[str, ...] = ()) -> str:
        rest = iter([*lines, EOFError])

        def typed(prompt: str) -> str:
            line = next(rest)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", typed)
        outcome = gptpl("generate", f"checkpoint={quick.run.path}", "-i", "max_new_tokens=6", *arguments)
        assert outcome.status == 0, outcome.err
        return str(outcome.out)

    return run


def test_a_conversation_continues_lines_and_changes_rules(talk, gptpl, quick):
    generate = ("generate", f"checkpoint={quick.run.path}", "prompt=The sea")
    greedy = gptpl(*generate, "temperature=0", "max_new_tokens=6").out
    hot = gptpl(*generate, "temperature=3", "top_k=7", "max_new_tokens=9", "seed=4").out
    out = talk(
        "/temperature 0", "The sea", "/temperature 3", "/top_k 7", "/seed 4", "/max_new_tokens 9", "The sea"
    )
    assert greedy in out
    assert hot in out
    assert "temperature 3, top-k 7; max_new_tokens 9; seed 4" in out


def test_a_conversation_goes_on_after_mistakes_and_ctrl_c(talk):
    out = talk(
        "/temperature -1", "/temperature hot", "/wild", "/sampling wild", "/top_k x y", KeyboardInterrupt,
        "/banned_tokens [x]", "/banned_tokens {",
        "/banned_tokens [1,2]", "/sampling creative", "/help", "/show", "",
    )  # fmt: skip
    for words in (
        "temperature must be 0 (greedy) or a positive number, got -1",
        "sampling.temperature=hot: must be a valid number",
        "/wild is unknown",
        "sampling=wild is unknown",
        "sampling.banned_tokens=[x]: [0] must be a valid integer",
        "'sampling.banned_tokens={' is not an override",
    ):
        assert f"error: {words}" in out
    assert "banned tokens 1 2" in out
    assert "\ntemperature 1, top-k 60; max_new_tokens 6; seed None\n" in out
    assert "/sampling creative   take a preset" in out


def test_a_conversation_is_filtered(talk, gptpl, quick):
    rules = ("temperature=2", "seed=1")
    hot = gptpl("generate", f"checkpoint={quick.run.path}", "prompt=", "max_new_tokens=6", *rules).out
    marked = re.sub("[a-z]", "[letter]", hot)
    assert marked != hot
    assert marked in talk("", arguments=(*rules, "filter=patterns", 'filter.patterns.letter="[a-z]"'))


def test_quit_ends_a_conversation(talk):
    assert "never" not in talk("/quit", "never")
