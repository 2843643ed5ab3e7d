"""Templates of strangers: what they may say, and what would take gigabytes or for ever is refused."""

import time
import tracemalloc

import jinja2
import pytest

from gptpl.errors import InputError
from gptpl.files.template import MOST_MADE, MOST_SOURCE, SafeTemplate

TEXT = "The old keeper sang.\nAnd the sea was still.\n"


def made(source: str, text: str = TEXT) -> str:
    return SafeTemplate(source, name="data.template=own", fields=["text", "n"]).filled({"text": text, "n": 3})


@pytest.mark.parametrize(
    "source",
    [
        "{{ text }}",
        "{% if n > 2 and text is string %}{{ text | upper }}{% elif n %}x{% else %}y{% endif %}",
        "{% for line in text.splitlines() %}{{ loop.index }}/{{ loop.length }}. {{ line }}"
        "{{ ',' if not loop.last else '.' }}\n{% endfor %}",
        "{% for a in text.split() if a != 'sea' %}{% for b in 'xy' %}{{ a ~ b }} {% endfor %}{% endfor %}",
        "{% set title = text[:8] | trim | title %}{{ title ~ ': ' ~ n }}{{ (n + 1) * 2 / 4 - 1 }}{{ n % 2 }}",
        "{{ text | replace('sea', 'lake') }}{{ ['a', 'b', n] | join(' + ') }}{{ text | length }}",
        "{{ text | default('none', true) }}{{ '3' | int + 1 }}{{ 'sea' in text }}{{ text.split(' ')[1] }}",
        "{% set all = ['a'] + text.split() %}{{ all | join('-') }}{{ -n }}{{ not text.startswith('The') }}",
        "{# a comment #}{% raw %}{{ as it is }}{% endraw %}{{ text.removeprefix('The ').strip() }}",
    ],
)
def test_what_prompts_are_made_of_gives_what_jinja_gives(source: str) -> None:
    assert made(source) == jinja2.Template(source).render(text=TEXT, n=3)


DOUBLED = "{% set a = 'aaaaaaaaaa' %}" + 60 * "{% set a = a ~ a %}"
NESTED = "{% set a = ['x', 'x'] %}{% set b = ['x', 'x'] %}" + 60 * "{% set a = [a, a] %}{% set b = [b, b] %}"
LOOPS = "".join(f"{{% for a{i} in text %}}" for i in range(12))
ENDS = 12 * "{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ text * 1000000000 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a' | indent(1000000000) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '\\t'.expandtabs(1000000000) }}",
        "{{ lipsum(n=1000000000) }}",
        "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% set n = namespace(a='a') %}{{ n.a }}",
        "{% set a %}{{ text }}{% endset %}{{ a }}",
        "{% include 'x' %}",
        "{% filter upper %}x{% endfilter %}",
        "{{ {'a': text} }}",
        f"{LOOPS}{ENDS}",
        f"{LOOPS}{{{{ a0 }}}}{ENDS}",
        f"{LOOPS}{{% if text in text %}}{{% endif %}}{ENDS}",
        f"{LOOPS}{{% if text | upper == text | lower %}}{{% endif %}}{ENDS}",
        f"{LOOPS}{{% set a = text[1:].strip() %}}{ENDS}",
        f"{DOUBLED}{{{{ a }}}}",
        DOUBLED.replace("a ~ a", "a + a"),
        DOUBLED.replace("a ~ a", "a | replace('a', 'aa')"),
        DOUBLED.replace("a ~ a", "[a, a] | join(a)"),
        DOUBLED.replace("a ~ a", "a.split('a') + a.split('a')"),
        "{% set a = 3 %}" + 60 * "{% set a = a * a %}",
        f"{NESTED}{{{{ a == b }}}}",
        f"{NESTED}{{{{ a }}}}",
        f"{{{{ [{300 * 'text, '}] }}}}",
        f"{{{{ text | replace('', '{'x' * 40_000}') }}}}",
        "{{ " + 20_000 * "(" + "text" + 20_000 * ")" + " }}",
        "{{ " + 40_000 * "-" + "n }}",
        100 * "{% if n %}" + 100 * "{% endif %}",
        "{{ " + 9_000 * "9" + " }}",
        "{{ text" + 9_000 * " ~ text" + " }}",
        "x" * (MOST_SOURCE + 1),
        "{{ text._budget }}",
        "{{ _budget }}",
        "{{ text | _weighed }}",
        "{{ self }}",
        "{{ text.__class__ }}",
        "{{ text.upper.__self__ }}",
    ],
)
def test_what_would_take_gigabytes_or_for_ever_or_lead_out(source: str) -> None:
    text = (TEXT * 2000)[:40_000]
    begun = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"^data\.template=own[^\n]*$") as refused:
            made(source, text)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(str(refused.value)) < 600
    assert most < 2e8
    assert time.monotonic() - begun < 20  # under tracemalloc; a tenth of it without


def test_a_long_text_is_no_reason_to_refuse() -> None:
    """The limit is for what the template makes of a text, not for the text."""
    text = "word " * MOST_MADE
    assert made("{{ text }}{{ text | upper }}", text) == text + text.upper()
