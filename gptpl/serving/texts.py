"""The texts of one request: its prompts, what its generations tell, and the choices of its answer."""

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from gptpl.runs.models import Classifier, LanguageModel
from gptpl.serving.api import ApiError
from gptpl.serving.engine import Delta, Engine, Event, Failure, Generation, PromptRead
from gptpl.serving.monitoring import Monitor

_STATUS_OF = {"timeout": 504, "unavailable": 503, "server_error": 500}
_LATE = 10.0  # seconds after its deadline, a request whose engine says nothing is given up


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt as the model reads it, and what the answer says of the filter's findings in the one sent."""

    given: str | list[int]
    note: dict[str, Any] = field(default_factory=dict)

    def text(self, model: LanguageModel | Classifier) -> str:
        """The prompt as a text."""
        return self.given if isinstance(self.given, str) else model.tokenizer.decode(self.given)


class Texts:
    """The generations of a request and their events; those that have not ended are cancelled at the end."""

    def __init__(self, monitor: Monitor, model: str, engine: Engine, *, most_queued: int) -> None:
        self._monitor, self._model, self._engine, self._most_queued = monitor, model, engine, most_queued
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._generations: list[Generation] = []
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for each in self._generations:
            each.cancelled = True

    def add(self, prompt: Sequence[int], **settings: Any) -> None:
        """A prompt more. Raises ApiError for what the context cannot hold, InputError as `Generation`."""
        number = len(self._generations)

        def deliver(event: Event) -> None:
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

        generation = Generation(self._engine.model, prompt, deliver=deliver, **settings)
        context = self._engine.batch.context_length
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
        end = max(each.deadline for each in self._generations) + _LATE  # the loop's time is `monotonic`, too
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
                new = event.tokens - before
                seconds = now - then if not before else (now - then) / max(1, new)
                self._monitor.tokens(self._model, new, seconds, first=not before)
                written[key] = event.tokens, now
                if event.completion is not None:
                    left -= 1
                    sample = generation.samples[event.sample]
                    chosen = [each.log_probability for each in sample.details or ()]
                    self._monitor.output(self._model, sample.tokens, chosen)
                    if event.completion.verdict is not None:
                        self._monitor.verdict(self._model, event.completion.verdict, where="text")
            yield number, event

    def usage(self) -> dict[str, int]:
        """Numbers of tokens; how many were known from earlier prompts would tell what others wrote."""
        prompt = sum(len(each.prompt) for each in self._generations)
        written = sum(len(sample.tokens) for each in self._generations for sample in each.samples)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def check_place(queued: int, new: int, *, most: int) -> None:
    """Raise ApiError unless so many new prompts may wait, beside those that wait already."""
    if new > most:
        raise ApiError(400, f"a request may have up to {most} prompts, got {new}", param="prompt")
    if queued + new > most:
        raise ApiError(429, f"{queued} requests wait already: try again later", retry_after=5)


def ending(event: PromptRead | Delta, most: int) -> dict[str, Any]:
    """Whether a choice has ended with this event, and why, and what a filter found in it."""
    if isinstance(event, PromptRead):
        return {"finish_reason": None if most else "length"}
    if event.completion is None:
        return {"finish_reason": None}
    verdict = event.completion.verdict
    end: dict[str, Any] = {"finish_reason": "length" if event.completion.finish == "length" else "stop"}
    if verdict is not None and verdict.findings:
        end["filter"] = {"action": verdict.action, "counts": verdict.counts}  # gptpl's own
        if verdict.action == "withhold":
            end["finish_reason"] = "content_filter"
    return end


async def by_index(choices: AsyncIterator[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The parts of each choice, in the order of choices."""
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    async for choice in choices:
        found[choice["index"]].append(choice)
    return [found[index] for index in sorted(found)]


def merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A choice of its parts, as an answer that is no stream has it."""
    whole = parts[-1] | {"logprobs": None}
    if whole.pop("delta", None) is not None:
        content = "".join(part["delta"].get("content", "") for part in parts).strip()
        whole["message"] = {"role": "assistant", "content": content, "refusal": None}
    else:
        whole["text"] = "".join(part["text"] for part in parts)
    if found := [part["logprobs"] for part in parts if part["logprobs"] is not None]:
        whole["logprobs"] = {
            name: [value for each in found for value in each[name]] if first is not None else None
            for name, first in found[0].items()
        }
    return whole
