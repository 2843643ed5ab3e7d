"""Prompts as the book writes them, and templates of the user's own."""

import pytest
import torch

from gptpl.data.instructions.records import Instruction, PromptTemplate
from gptpl.errors import InputError

PLAIN = Instruction(instruction="Name a colour.", input="", output="Red.")
WITH_INPUT = Instruction(
    instruction="Correct it.", input="He go <home> & {{ instruction }}.", output="He goes."
)


def book_alpaca(entry: Instruction) -> str:
    text = (
        "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{entry.instruction}"
    )
    text += f"\n\n### Input:\n{entry.input}" if entry.input else ""
    return text + f"\n\n### Response:\n{entry.output}"


def book_phi3(entry: Instruction) -> str:
    text = f"<|user|>\n{entry.instruction}"
    text += f"\n{entry.input}" if entry.input else ""
    return text + f"\n<|assistant|>:\n{entry.output}"


@pytest.mark.parametrize("entry", [PLAIN, WITH_INPUT])
@pytest.mark.parametrize(("name", "book"), [("alpaca", book_alpaca), ("phi3", book_phi3)])
def test_the_books_templates(name, book, entry):
    template = PromptTemplate.named(name)
    assert template.whole(entry) == book(entry)
    assert template.prompt(entry.instruction, entry.input) == book(entry).removesuffix(entry.output)


def test_a_users_own_from_a_file_and_as_text(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("Q: {{ instruction | upper }}{% if input %} ({{ input }}){% endif %}\n")
    template = PromptTemplate.named(str(path), "\nA: ")
    assert template.whole(WITH_INPUT) == "Q: CORRECT IT. (He go <home> & {{ instruction }}.)\nA: He goes."
    assert PromptTemplate.named("{{ instruction }}").prompt("a") == "a\n\n### Response:\n"


def test_its_state_is_plain_data_that_makes_it_again(tmp_path):
    template = PromptTemplate.named("{{ instruction }}?", "\n> ")
    torch.save(template.state(), tmp_path / "state.pt")
    again = PromptTemplate.from_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert again == template
    assert again.whole(PLAIN) == "Name a colour.?\n> Red."


@pytest.mark.parametrize(
    ("template", "marker", "said"),
    [
        ("alpacca", None, "data.template=alpacca is neither alpaca nor phi3 nor a file"),
        ("{{ instruction", None, r"data.template=own is not a Jinja template \(line 1: "),
        ("{{ input }}", None, r"data.template=own does not use \{\{ instruction \}\}"),
        ("{{ instruction }}{{ answer }}", None, r"data.template=own uses \{\{ answer \}\}: the fields are"),
        ("alpaca", " \n", r"data.response_marker=' \\n' is empty"),
    ],
)
def test_bad_templates(template, marker, said):
    with pytest.raises(InputError, match=f"^{said}[^\n]*$"):
        PromptTemplate.named(template, marker)


@pytest.mark.parametrize(
    "source",
    [
        "{{ instruction.__class__.__mro__ }}",
        "{{ instruction }}{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ instruction.missing }}",
        "{{ instruction }}{{ 1 / 0 }}",
        "{{ instruction + 1 }}",
    ],
)
def test_a_template_reaches_nothing_but_its_texts(source):
    with pytest.raises(InputError, match=r"^data.template=own[^\n]*$"):
        PromptTemplate.named(source).prompt("Name a colour.")
