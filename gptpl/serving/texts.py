"""The texts of one request: its prompts, what its generations tell, and the choices of its answer."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gptpl.filters import Verdict
from gptpl.generation.text import prompt_ids
from gptpl.model.protocol import context_length
from gptpl.runs.models import Classifier, LanguageModel
from gptpl.serving.api import ApiError, filtered, finish_reason, usage
from gptpl.serving.engine import Delta, Engine, Event, Failure, Generation, PromptRead
from gptpl.serving.monitoring import Monitor

_STATUS_OF = {"timeout": 504, "unavailable": 503, "server_error": 500}
_LATE = 10.0  # seconds after its deadline, a request whose engine says nothing is given up


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model reads it, and what the filter found in the one that was sent."""

    given: str | list[int]
    verdict: Verdict | None = None

    def ids(self, model: LanguageModel) -> list[int]:
        """The tokens to read; end-of-text of an empty prompt."""
        return prompt_ids(self.given, model.tokenizer)

    def text(self, model: LanguageModel | Classifier) -> str:
        """The prompt as a text."""
        return self.given if isinstance(self.given, str) else model.tokenizer.decode(self.given)

    @property
    def note(self) -> dict[str, Any]:
        """What the answer says of it."""
        if self.verdict is None or not self.verdict.findings:
            return {}
        return {**filtered(self.verdict)["filter"], "text": self.verdict.text}


class Texts:
    """The generations of a request and their events; those that have not ended are cancelled at the end."""

    def __init__(self, monitor: Monitor, model: str, engine: Engine, *, most_queued: int) -> None:
        self._monitor, self._model, self._engine, self._most_queued = monitor, model, engine, most_queued
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._generations: list[Generation] = []
        self._written = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for each in self._generations:
            each.cancelled = True

    def add(self, model: LanguageModel, prompt: Sequence[int], **settings: Any) -> None:
        """A prompt more. Raises ApiError for what the context cannot hold, InputError as `Generation`."""
        number = len(self._generations)

        def deliver(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        generation = Generation(model, prompt, deliver=deliver, **settings)
        context = context_length(model.net)
        if (needed := len(prompt) + generation.max_new_tokens) > context:
            raise ApiError(
                400,
                f"this model's maximum context length is {context} tokens, the request needs {needed}:"
                f" {len(prompt)} of the prompt and {generation.max_new_tokens} to be written; shorten one",
                code="context_length_exceeded",
                room=max(0, context - len(prompt)),
            )
        self._engine.batch.check(generation)
        self._generations.append(generation)

    async def events(self) -> AsyncIterator[tuple[int, PromptRead | Delta]]:
        """The events, each with the number of its prompt. Raises ApiError where one fails or has no place."""
        check_place(self._engine.queued, len(self._generations), most=self._most_queued)
        for each in self._generations:
            self._engine.submit(each)
        last = max(each.deadline for each in self._generations) - time.monotonic() + _LATE
        end = self._loop.time() + last
        left = sum(each.num_samples if each.max_new_tokens else 1 for each in self._generations)
        written: dict[tuple[int, int], tuple[int, float]] = {}  # tokens of each text, and when they came
        while left:
            try:
                async with asyncio.timeout_at(end):
                    number, event = await self._events.get()
            except TimeoutError:
                raise ApiError(504, "the model has not answered in time", code="timeout") from None
            if isinstance(event, Failure):
                raise ApiError(_STATUS_OF[event.kind], event.message, code=event.kind)
            generation = self._generations[number]
            if isinstance(event, PromptRead):
                self._monitor.prompt(self._model, len(generation.prompt), event.shared)
                left -= not generation.max_new_tokens
            else:
                now = time.monotonic()
                key = (number, event.sample)
                before, then = written.get(key, (0, self._started))
                new = event.written - before
                seconds = now - then if not before else (now - then) / max(1, new)
                self._monitor.tokens(self._model, new, seconds, first=not before)
                written[key] = event.written, now
                self._written += new
                if event.completion is not None:
                    left -= 1
                    self._monitor.output(self._model, event.ids, event.log_probabilities)
                    if event.completion.verdict is not None:
                        self._monitor.verdict(self._model, event.completion.verdict, where="text")
            yield number, event

    def usage(self) -> dict[str, Any]:
        """Numbers of tokens."""
        prompt = sum(len(each.prompt) for each in self._generations)
        return usage(prompt=prompt, completion=self._written)


def check_place(queued: int, new: int, *, most: int) -> None:
    """Raise ApiError unless so many new prompts may wait, beside those that wait already."""
    if new > most:
        raise ApiError(400, f"a request may have up to {most} prompts, got {new}", param="prompt")
    if queued + new > most:
        raise ApiError(429, f"{queued} requests wait already: try again later", retry_after=5)


def ending(event: PromptRead | Delta, most: int) -> dict[str, Any]:
    """Whether a choice has ended with this event, and what a filter found in it."""
    if isinstance(event, PromptRead):
        return {"finish_reason": None if most else "length"}
    if event.completion is None:
        return {"finish_reason": None}
    return {"finish_reason": finish_reason(event.completion), **filtered(event.completion.verdict)}


async def by_index(choices: AsyncIterator[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The parts of each choice, in the order of choices."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    async for choice in choices:
        found[choice["index"]].append(choice)
    return [found[index] for index in sorted(found)]


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A choice of its parts, as an answer that is no stream has it."""
    whole = {name: value for name, value in parts[-1].items() if name not in ("text", "delta", "logprobs")}
    if "delta" in parts[0]:
        content = "".join(part["delta"].get("content", "") for part in parts).strip()
        whole["message"] = {"role": "assistant", "content": content, "refusal": None}
    else:
        whole["text"] = "".join(part["text"] for part in parts)
    found = [part["logprobs"] for part in parts if part["logprobs"] is not None]
    whole["logprobs"] = None
    if found:
        whole["logprobs"] = {
            name: [value for each in found for value in each[name]] if first is not None else None
            for name, first in found[0].items()
        }
    return whole
