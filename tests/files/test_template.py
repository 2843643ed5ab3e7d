"""Templates of strangers: what they may say, and what would take gigabytes or for ever is refused."""

import time
import tracemalloc

import jinja2
import pytest

from gptpl.errors import InputError
from gptpl.files.template import MOST_CHARACTERS, MOST_USES, SafeTemplate

TEXT = "The old keeper sang.\nAnd the sea was still.\n"


def made(source: str, text: str = TEXT) -> str:
    return SafeTemplate(source, name="data.template=own", fields=["text", "n"]).filled({"text": text, "n": 3})


@pytest.mark.parametrize(
    "source",
    [
        "{{ text }}",
        "{% if n > 2 and text is string %}{{ text | upper }}{% elif n %}x{% else %}y{% endif %}",
        "{{ 'a' if text.startswith('The') else 'b' }}{{ 'sea' in text }}{{ not text.endswith('.') }}",
        "{{ text[:8] | trim | title ~ ': ' ~ n }}{{ text[-20:-2] }}{{ (n + 1) / 4 - 1 }}{{ n // 2 }}{{ -n }}",
        "{{ text | length }}{{ text | default('none', true) }}{{ '3' | int + 1 }}{{ text | d('x') }}",
        "{# a comment #}{% raw %}{{ as it is }}{% endraw %}{{ text.removeprefix('The ').strip() }}",
    ],
)
def test_what_prompts_are_made_of_gives_what_jinja_gives(source: str) -> None:
    assert made(source) == jinja2.Template(source).render(text=TEXT, n=3)


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
        "{% for a in text %}{% endfor %}",
        "{% set a = text ~ text %}{{ a }}",
        "{{ text | replace('', text) }}",
        "{{ text.replace('', text) }}",
        "{{ text.split() }}",
        "{{ text | join(text) }}",
        "{{ text | list }}",
        "{{ n * n }}",
        "{{ n % 2 }}",
        "{{ (text, text) }}",
        f"{{{{ [{300 * 'text, '}] }}}}",
        f"{{{{ text | replace('', '{'x' * 40_000}') }}}}",
        "{{ " + 20_000 * "(" + "text" + 20_000 * ")" + " }}",
        "{{ " + 40_000 * "-" + "n }}",
        100 * "{% if n %}" + 100 * "{% endif %}",
        "{{ " + 9_000 * "9" + " }}",
        "{{ text" + MOST_USES * " ~ text" + " }}",
        "{{ text" + 2_000 * " + text" + " }}",
        "x" * (MOST_CHARACTERS + 1),
        "{{ text.upper }}",
        "{{ text.upper()() }}",
        "{{ n() }}",
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
    assert time.monotonic() - begun < 20


def test_a_long_text_is_no_reason_to_refuse() -> None:
    text = "word " * 200_000
    assert made("{{ text }}{{ text | upper }}", text) == text + text.upper()


@pytest.mark.parametrize(
    "source", ["{{ text / 2 }}", "{{ text[9999] }}", "{{ text.strip(1) }}", "{{ 1 / 0 }}"]
)
def test_an_operation_that_fails_is_one_line(source: str) -> None:
    with pytest.raises(InputError, match=r"^data\.template=own cannot be filled in \([^\n]+\): correct it$"):
        made(source)
