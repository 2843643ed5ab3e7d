"""The bodies of requests and answers, as OpenAI's API has them.

Source: https://platform.openai.com/docs/api-reference (completions, chat completions, errors).
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from gptpl.data.instructions.records import PromptTemplate
from gptpl.errors import InputError
from gptpl.filters import Verdict
from gptpl.generation import Completion, SamplingRules
from gptpl.serving.engine import TokenText
from gptpl.tokenizers.base import END_OF_TEXT

MOST_STOPS = 16
MOST_LOGPROBS = 20
_MOST_PROMPTS = 128
_MOST_TEXTS = 256
_MOST_PARAMETERS = 64
_NOTHING: tuple[Any, ...] = (None, False, [], {})


class ApiError(Exception):
    """An error with the status and the body that a client gets.

    `room`, gptpl's own, is how many tokens could be written after a prompt that leaves too few.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
        room: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after, self.room = retry_after, room

    @property
    def body(self) -> dict[str, Any]:
        """The error as a body."""
        kind = _ERROR_TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        error: dict[str, Any] = {
            "message": self.message,
            "type": kind,
            "param": self.param,
            "code": self.code,
        }
        return {"error": error if self.room is None else error | {"room": self.room}}


_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout"}


# --- requests -------------------------------------------------------------------------------------------


class _Body(BaseModel):
    """What a request may have; a name that is not here is refused, as it would change nothing."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str | None = None
    # They are for OpenAI's own service, and change no text.
    user: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


Body = TypeVar("Body", bound=_Body)


class StreamOptions(BaseModel):
    """Whether a stream ends with the number of tokens."""

    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool = False


_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Stop = Annotated[str, Field(max_length=500)]
_Item = TypeVar("_Item")
# Of a wrong list the first error is enough: all of them could be a million.
_List = Annotated[list[_Item], Field(max_length=100_000, fail_fast=True)]


class TextsBody(_Body):
    """What completions and chats have in common. top_k to repetition_penalty are not OpenAI's, but usual."""

    n: Annotated[int | None, Field(ge=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float | None, Field(ge=0, le=10)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    typical_p: Annotated[float | None, Field(gt=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None

    @property
    def stops(self) -> list[str]:
        """The texts that end a text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def samples(self) -> int:
        """Texts of each prompt."""
        return 1 if self.n is None else self.n

    @property
    def seed32(self) -> int | None:
        """The seed as a number of 32 bits, which every generator of random numbers takes."""
        return None if self.seed is None else (self.seed ^ (self.seed >> 32)) % 2**32

    def rules(self, vocab_size: int) -> SamplingRules:
        """The sampling rules; the default temperature is 1."""
        top_k = None if self.top_k in (None, -1, 0) else min(self.top_k or 0, vocab_size)
        given: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": top_k,
            "min_p": self.min_p,
            "typical_p": self.typical_p,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
        }
        return SamplingRules(**{name: value for name, value in given.items() if value is not None})

    def biases(self) -> dict[int, float]:
        """Added logits by token id."""
        try:
            return {int(token): bias for token, bias in (self.logit_bias or {}).items()}
        except ValueError as error:
            raise ApiError(
                400, f"logit_bias must have token ids as keys: {error}", param="logit_bias"
            ) from error


class CompletionBody(TextsBody):
    """POST /v1/completions."""

    prompt: str | _List[str] | _List[int] | _List[_List[int]] | None = ""
    max_tokens: Annotated[int | None, Field(ge=0)] = None
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """A text or token ids each."""
        prompt: Any = "" if self.prompt is None else self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        if not 1 <= len(prompt) <= _MOST_PROMPTS:
            raise ApiError(
                400,
                f"prompt must be one text or 1 to {_MOST_PROMPTS} of them, or their token ids",
                param="prompt",
            )
        return prompt


class Part(BaseModel):
    """A part of a message; only texts are read."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[Part], Field(max_length=100, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a message of {self.role} has no content")
        return self

    @property
    def text(self) -> str:
        """The message's text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatBody(TextsBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1000, fail_fast=True)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tool_choice: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None

    @property
    def most_tokens(self) -> int | None:
        """To be written; None: as many as the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class ClassifyBody(_Body):
    """POST /classify, gptpl's own."""

    texts: Annotated[list[str], Field(min_length=1, max_length=_MOST_TEXTS, fail_fast=True)]


class FeedbackBody(_Body):
    """POST /feedback, gptpl's own."""

    rating: Literal["up", "down", "report"]
    prompt: Annotated[str, Field(max_length=100_000)] = ""
    text: Annotated[str, Field(max_length=100_000)] = ""
    comment: Annotated[str, Field(max_length=5_000)] = ""


def parsed(body: type[Body], data: bytes) -> Body:
    """A request's body. Raises ApiError for what is not JSON, and for a field that is unknown or wrong."""
    try:
        content = from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {error}") from error
    if isinstance(content, dict) and len(content) > _MOST_PARAMETERS:
        raise ApiError(400, f"the body has {len(content)} parameters, at most {_MOST_PARAMETERS} are known")
    if isinstance(content, dict):  # what asks for nothing, such as `tools: []`, changes nothing
        known = body.model_fields
        content = {name: value for name, value in content.items() if name in known or value not in _NOTHING}
    try:
        return body.model_validate(content)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # Of a field that may have several types, what is wrong with the one that was given says more.
        first = next((each for each in errors if not each["type"].endswith("_type")), errors[0])
        param = str(first["loc"][0]) if first["loc"] else None
        unknown = first["type"] == "extra_forbidden"
        message = f"unknown parameter {param!r}" if unknown else f"{param or 'body'}: {first['msg']}"
        given = "" if unknown or len(shown := repr(first["input"])) > 80 else f", got {shown}"
        raise ApiError(400, message + given, param=param) from error


# --- answers --------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Head:
    """What all parts of an answer begin with."""

    id: str
    object: str
    created: int
    model: str

    @classmethod
    def new(cls, kind: str, object: str, model: str) -> "Head":
        """A new answer's, `kind` such as "cmpl"."""
        return cls(id=f"{kind}-{uuid.uuid4().hex}", object=object, created=int(time.time()), model=model)


def usage(*, prompt: int, completion: int) -> dict[str, Any]:
    """Numbers of tokens; how many were known from earlier prompts would tell what others wrote."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def finish_reason(completion: Completion) -> str:
    """Why a text has ended."""
    if completion.verdict is not None and completion.verdict.action == "withhold":
        return "content_filter"
    return "length" if completion.finish == "length" else "stop"


def filtered(verdict: Verdict | None) -> dict[str, Any]:
    """What a filter found, as `filter` of a choice, gptpl's own; empty where it found nothing."""
    if verdict is None or not verdict.findings:
        return {}
    return {"filter": {"action": verdict.action, "counts": verdict.counts}}


def completion_logprobs(tokens: Sequence[TokenText], *, alternatives: int, offset: int) -> dict[str, Any]:
    """The `logprobs` of a completion's tokens, the first of which begins at character `offset`."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [
            None if token.details is None else token.details.log_probability for token in tokens
        ],
        "top_logprobs": [_top(token) for token in tokens] if alternatives else None,
        "text_offset": offsets,
    }


def _top(token: TokenText) -> dict[str, float] | None:
    if token.details is None:
        return None
    best: dict[str, float] = {}
    for text, log_probability in token.alternatives:  # parts of characters may have the same text
        best.setdefault(text, log_probability)
    return best | {token.text: token.details.log_probability}


def chat_logprobs(tokens: Sequence[TokenText]) -> dict[str, Any]:
    """The `logprobs` of a message's tokens."""

    def entry(text: str, log_probability: float) -> dict[str, Any]:
        return {"token": text, "logprob": log_probability, "bytes": list(text.encode("utf-8", "replace"))}

    content = [
        entry(token.text, token.details.log_probability)
        | {"top_logprobs": [entry(*alternative) for alternative in token.alternatives]}
        for token in tokens
        if token.details is not None
    ]
    return {"content": content, "refusal": None}


# --- conversations --------------------------------------------------------------------------------------


def turns(messages: Sequence[Message]) -> tuple[str, list[tuple[str, str]], str]:
    """The system's text, earlier turns as questions and answers, and the question to answer.

    Raises ApiError unless user and assistant take turns, and the user is last.
    """
    system = "\n\n".join(each.text for each in messages if each.role in ("system", "developer"))
    rest = [each for each in messages if each.role in ("user", "assistant")]
    roles = [each.role for each in rest]
    if (
        not roles
        or roles != ["user" if i % 2 == 0 else "assistant" for i in range(len(roles))]
        or len(roles) % 2 == 0
    ):
        raise ApiError(
            400,
            "messages must alternate between user and assistant, starting and ending with user",
            param="messages",
        )
    pairs = zip(rest[:-1:2], rest[1::2], strict=True)
    return system, [(question.text, answer.text) for question, answer in pairs], rest[-1].text


ChatPrompt = Callable[[Sequence[Message]], str]
"""The text that a model is given to answer a conversation."""


def tuned_prompt(template: PromptTemplate) -> ChatPrompt:
    """That of a model tuned to single instructions: the template of each question, earlier ones with answers.

    What the system says stands before all.
    """

    def prompt(messages: Sequence[Message]) -> str:
        system, earlier, question = turns(messages)
        parts = [system] if system else []
        parts += [template.prompt(asked) + answer.strip() for asked, answer in earlier]
        return "\n\n".join([*parts, template.prompt(question)])

    return prompt


def jinja_prompt(source: str, *, name: str) -> ChatPrompt:
    """That of a Jinja template as Hugging Face has them, of `messages`, each with `role` and `content`.

    The template is the server's owner's; it runs in Jinja's sandbox. Raises InputError for one that is not
    Jinja.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )

    def refuse(message: str) -> NoReturn:
        raise ApiError(400, str(message), param="messages")

    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise InputError(f"{name} is not a Jinja template: {error}") from error

    def prompt(messages: Sequence[Message]) -> str:
        plain = [{"role": each.role, "content": each.text} for each in messages]
        try:
            return template.render(
                messages=plain,
                add_generation_prompt=True,
                raise_exception=refuse,
                bos_token="",
                eos_token=END_OF_TEXT,
            )
        except jinja2.TemplateError as error:
            raise ApiError(
                400, f"the server's chat template refuses it: {error}", param="messages"
            ) from error

    return prompt
