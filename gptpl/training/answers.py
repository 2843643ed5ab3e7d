"""Answers of an instruction-tuned model: prompts made, continued, and judged by their form alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gptpl.data.instructions.template import PromptTemplate
from gptpl.data.tokenizers import Tokenizer
from gptpl.errors import InputError
from gptpl.generation import Completion, Piece, SamplingRules, complete, stream_text
from gptpl.model import CachedGPT, GPTModel


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered; `text` is without the white space around it, as the book has it."""

    text: str
    well_formed: bool


@dataclass(frozen=True, kw_only=True)
class Answerer:
    """A model with all that it needs to answer.

    Attributes:
        net: the model; for many questions a `CachedGPT`.
        tokenizer: the model's.
        template: what the model was tuned with.
        rules: how tokens are chosen.
        max_new_tokens: after which an answer is broken off.
    """

    net: GPTModel | CachedGPT
    tokenizer: Tokenizer
    template: PromptTemplate
    rules: SamplingRules
    max_new_tokens: int

    def prompt(self, instruction: str, input: str = "", *, place: str = "the prompt") -> str:
        """What the model is given. Raises InputError for one that leaves no room in the model's context."""
        text = self.template.prompt(instruction, input)
        tokens, context = len(self.tokenizer.encode(text)), self.net.config.context_length
        if tokens >= context:
            raise InputError(
                f"{place} has {tokens:,} tokens with its template, the model's context_length is {context}:"
                " shorten instruction or input"
            )
        return text

    def stream(self, prompt: str, generator: torch.Generator | None = None) -> Iterator[Piece]:
        """One answer, piece by piece."""
        return stream_text(
            self.net,
            self.tokenizer,
            [prompt],
            rules=self.rules,
            max_new_tokens=self.max_new_tokens,
            generator=generator,
        )

    def answers(self, prompts: Sequence[str], generator: torch.Generator | None = None) -> list[Answer]:
        """The answers to several prompts, made together."""
        completions = complete(
            self.net,
            self.tokenizer,
            prompts,
            rules=self.rules,
            max_new_tokens=self.max_new_tokens,
            generator=generator,
        )
        return [self.answer(completion) for completion in completions]

    def answer(self, completion: Completion) -> Answer:
        """What the model wrote, as an answer.

        It is well-formed where the model ended it by itself, said something, and began no other answer: no
        line begins with the template's marker.
        """
        text = completion.text.strip()
        marker = self.template.response_marker.strip()
        again = any(line.lstrip().startswith(marker) for line in text.splitlines())
        ended = completion.finish == "end_of_text"
        return Answer(text=text, well_formed=ended and bool(text) and not again)
