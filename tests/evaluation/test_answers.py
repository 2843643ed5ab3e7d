"""Answers to instructions: the same tokens as decoding by hand, and what counts as well-formed."""

import pytest
import torch

from gptpl.data.instructions.records import PromptTemplate
from gptpl.errors import InputError
from gptpl.evaluation.answers import Answerer
from gptpl.generation import Completion, SamplingRules
from gptpl.model import GPTConfig, GPTModel
from gptpl.tokenizers import BytesTokenizer

TEMPLATE = PromptTemplate.named("Q {{ instruction }}{% if input %} {{ input }}{% endif %}", "\nA ")


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    torch.manual_seed(3)
    config = GPTConfig(
        vocab_size=257,
        context_length=24,
        emb_dim=16,
        n_heads=2,
        n_layers=1,
        drop_rate=0.0,
        qkv_bias=False,
    )
    return Answerer(
        net=GPTModel(config).eval(),
        tokenizer=BytesTokenizer(),
        template=TEMPLATE,
        rules=SamplingRules(),
        max_new_tokens=6,
    )


def by_hand(answerer: Answerer, prompt: str) -> str:
    ids = answerer.tokenizer.encode(prompt).astype(int).tolist()
    start = len(ids)
    assert isinstance(answerer.net, GPTModel)
    for _ in range(6):
        token = int(answerer.net(torch.tensor([ids]))[0, -1].argmax())
        if token == 256:
            break
        ids.append(token)
    return answerer.tokenizer.decode(ids[start:]).strip()


def test_answers_together_are_those_by_hand_each_alone(answerer):
    prompts = [answerer.prompt("one"), answerer.prompt("two", "more"), answerer.prompt("3")]
    assert prompts[1] == "Q two more\nA "
    answers = answerer.answers(prompts)
    assert [answer.text for answer in answers] == [by_hand(answerer, prompt) for prompt in prompts]
    pieces = list(answerer.stream(prompts[1]))
    assert "".join(piece.text for piece in pieces).strip() == answers[1].text


@pytest.mark.parametrize(
    ("text", "finish", "expected"),
    [
        (" Red.\n", "end_of_text", True),
        ("Red.", "length", False),
        (" \n", "end_of_text", False),
        ("Red. A blue one.", "end_of_text", True),
        ("Red.\nA blue one.", "end_of_text", False),
    ],
)
def test_what_is_well_formed(answerer, text, finish, expected):
    completion = Completion(prompt=0, sample=0, text=text, tokens=(), finish=finish, details=None)
    answer = answerer.answer(completion)
    assert (answer.text, answer.well_formed) == (text.strip(), expected)


def test_a_prompt_that_leaves_no_room_is_refused(answerer):
    assert answerer.prompt("x" * 18)  # 23 tokens
    with pytest.raises(InputError, match=r"^entry 7 has 24 tokens with its template, [^\n]* is 24: shorten"):
        answerer.prompt("x" * 19, place="entry 7")
