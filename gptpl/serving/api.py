"""The bodies of requests and answers, as OpenAI's API has them.

Source: https://platform.openai.com/docs/api-reference (completions, chat completions, errors).
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import accumulate
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from gptpl.data.instructions.records import PromptTemplate
from gptpl.errors import InputError
from gptpl.generation import SamplingRules
from gptpl.serving.engine import TokenText
from gptpl.tokenizers.base import END_OF_TEXT

MOST_STOPS = 16
MOST_LOGPROBS = 20
_MOST_PROMPTS = 128
_MOST_TEXTS = 256
_MOST_PARAMETERS = 64
_NOTHING: tuple[Any, ...] = (False, [], {})


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

    n: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=MOST_STOPS, fail_fast=True)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: Annotated[float, Field(ge=0, le=10)] = 1.0
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    typical_p: Annotated[float | None, Field(gt=0, le=1)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    frequency_penalty: _Penalty | None = None
    presence_penalty: _Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = {}

    @property
    def stops(self) -> list[str]:
        """The texts that end a text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def seed32(self) -> int | None:
        """The seed as a number of 32 bits, which every generator of random numbers takes."""
        return None if self.seed is None else (self.seed ^ (self.seed >> 32)) % 2**32

    def rules(self, vocab_size: int) -> SamplingRules:
        """The sampling rules."""
        names = {field.name for field in fields(SamplingRules)}
        given = self.model_dump(include=names, exclude_none=True)
        if (top_k := given.pop("top_k", 0)) > 0:  # -1 and 0: all tokens
            given["top_k"] = min(top_k, vocab_size)
        return SamplingRules(**given)

    def biases(self) -> dict[int, float]:
        """Added logits by token id."""
        try:
            return {int(token): bias for token, bias in self.logit_bias.items()}
        except ValueError as error:
            raise ApiError(
                400, f"logit_bias must have token ids as keys: {error}", param="logit_bias"
            ) from error


class CompletionBody(TextsBody):
    """POST /v1/completions."""

    prompt: str | _List[str] | _List[int] | _List[_List[int]] = ""
    max_tokens: Annotated[int, Field(ge=0)] = 16
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    echo: bool = False
    best_of: int | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """A text or token ids each."""
        prompt: Any = self.prompt
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
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tool_choice: Literal["none"] | None = None
    modalities: list[Literal["text"]] | None = None


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
        content = {
            name: value
            for name, value in content.items()
            if value is not None and (name in known or value not in _NOTHING)
        }
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


def head(kind: str, object: str, model: str) -> dict[str, Any]:
    """What all parts of an answer begin with; `kind` is such as "cmpl"."""
    return {
        "id": f"{kind}-{uuid.uuid4().hex}",
        "object": object,
        "created": int(time.time()),
        "model": model,
    }


def completion_logprobs(tokens: Sequence[TokenText], *, alternatives: int, offset: int) -> dict[str, Any]:
    """The `logprobs` of a completion's tokens, the first of which begins at character `offset`."""
    offsets = accumulate((len(token.text) for token in tokens), initial=offset)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [
            None if token.details is None else token.details.log_probability for token in tokens
        ],
        "top_logprobs": [_top(token) for token in tokens] if alternatives else None,
        "text_offset": list(offsets)[:-1],
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


ChatPrompt = Callable[[Sequence[Message]], str]
"""The text that a model is given to answer a conversation. Raises ApiError for one that it cannot answer."""


def tuned_prompt(template: PromptTemplate) -> ChatPrompt:
    """That of a model tuned to single instructions: the template of each question, earlier ones with answers.

    What the system says stands before all. User and assistant must take turns, the user is last.
    """

    def prompt(messages: Sequence[Message]) -> str:
        system = "\n\n".join(each.text for each in messages if each.role in ("system", "developer"))
        turns = [each for each in messages if each.role in ("user", "assistant")]
        if [each.role for each in turns] != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
            raise ApiError(
                400,
                "messages must alternate between user and assistant, starting and ending with user",
                param="messages",
            )
        parts = [system] if system else []
        for question, answer in zip(turns[:-1:2], turns[1::2], strict=True):
            parts.append(template.prompt(question.text) + answer.text.strip())
        return "\n\n".join([*parts, template.prompt(turns[-1].text)])

    return prompt


def jinja_prompt(source: str) -> ChatPrompt:
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
        raise InputError(f"chat_template is not a Jinja template: {error}") from error

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
