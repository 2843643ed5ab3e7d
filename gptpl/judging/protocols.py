"""How a question is put to the two kinds of servers, and where their replies hold the text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gptpl.errors import InputError
from gptpl.judging.prompts import Message


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the model is to answer; None is left to the server.

    Attributes:
        temperature: 0 is always the most likely token.
        seed: of the draws.
        num_ctx: context in tokens, of Ollama alone.
        max_tokens: of the reply.
        extra: more of the server's own options.
    """

    temperature: float | None
    seed: int | None
    num_ctx: int | None
    max_tokens: int | None
    extra: dict[str, Any]


class ChatProtocol(Protocol):
    """One kind of server."""

    name: str
    path: str

    def body(self, model: str, messages: Sequence[Message], options: Options) -> dict[str, Any]:
        """The JSON that asks for one whole reply."""

    def text(self, data: Any) -> str | None:
        """The reply's text in the server's JSON; None where it has none."""

    def how_to_start(self, model: str) -> str:
        """What to do where no server listens."""

    def how_to_get(self, model: str) -> str:
        """What to do where the server does not know the model."""


class Ollama:
    """Ollama's own API, /api/chat: https://github.com/ollama/ollama/blob/main/docs/api.md."""

    name = "ollama"
    path = "/api/chat"

    def body(self, model: str, messages: Sequence[Message], options: Options) -> dict[str, Any]:
        """As in ChatProtocol; a prompt longer than the context is refused by servers that know `truncate`."""
        named = {
            "temperature": options.temperature,
            "seed": options.seed,
            "num_ctx": options.num_ctx,
            "num_predict": options.max_tokens,
        }
        given = {name: value for name, value in named.items() if value is not None} | options.extra
        return {
            "model": model,
            "messages": list(messages),
            "stream": False,
            "truncate": False,
            "options": given,
        }

    def text(self, data: Any) -> str | None:
        """As in ChatProtocol: `message.content`."""
        return _text_at(data, "message", "content")

    def how_to_start(self, model: str) -> str:
        """As in ChatProtocol."""
        return f"start it with `ollama serve`, and get the model with `ollama pull {model}`"

    def how_to_get(self, model: str) -> str:
        """As in ChatProtocol."""
        return f"get it with `ollama pull {model}`"


class OpenAI:
    """OpenAI's chat completions, which vLLM, llama.cpp, LM Studio and many services speak too."""

    name = "openai"
    path = "/v1/chat/completions"

    def body(self, model: str, messages: Sequence[Message], options: Options) -> dict[str, Any]:
        """As in ChatProtocol. Raises InputError for num_ctx, which these servers set when they start."""
        if options.num_ctx is not None:
            raise InputError(
                "judge.num_ctx is Ollama's: set the context where your server starts, leave it out"
            )
        named = {
            "temperature": options.temperature,
            "seed": options.seed,
            "max_tokens": options.max_tokens,
        }
        given = {name: value for name, value in named.items() if value is not None} | options.extra
        return {"model": model, "messages": list(messages), "stream": False, **given}

    def text(self, data: Any) -> str | None:
        """As in ChatProtocol: `choices[0].message.content`."""
        choices = data.get("choices") if isinstance(data, dict) else None
        return _text_at(choices[0], "message", "content") if isinstance(choices, list) and choices else None

    def how_to_start(self, model: str) -> str:
        """As in ChatProtocol."""
        return "start the server, or give its address with judge.address="

    def how_to_get(self, model: str) -> str:
        """As in ChatProtocol."""
        return "give the name of one that it has with judge.model="


PROTOCOLS: dict[str, ChatProtocol] = {"ollama": Ollama(), "openai": OpenAI()}


def _text_at(data: Any, *keys: str) -> str | None:
    for key in keys:
        data = data.get(key) if isinstance(data, dict) else None
    return data if isinstance(data, str) else None
