"""The judge's server: the two protocols it may speak, and questions over HTTP, retried where that helps."""

import email.utils
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gptpl.errors import InputError

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

_TRY_AGAIN_STATUS = frozenset({408, 429, *range(500, 600)})
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_QUOTED_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class Options:
    """How the model is to answer; None is left to the server.

    `num_ctx` is the context in tokens, of Ollama alone, `max_tokens` those of the reply, `extra` more of the
    server's own options.
    """

    temperature: float | None
    seed: int | None
    num_ctx: int | None
    max_tokens: int | None
    extra: dict[str, Any]

    def settings(self, max_tokens: str) -> dict[str, Any]:
        """Those that are given, under the server's name for `max_tokens`."""
        named = {"temperature": self.temperature, "seed": self.seed, "num_ctx": self.num_ctx}
        named[max_tokens] = self.max_tokens
        return {name: value for name, value in named.items() if value is not None} | self.extra


@dataclass(frozen=True, kw_only=True)
class ChatProtocol:
    """One kind of server: what it is asked at which path, and what to do where it does not answer.

    Attributes:
        body: the JSON that asks for one whole reply. Raises InputError for an option that it cannot hold.
        text: the reply's text in the server's JSON; None where it has none.
        how_to_start: what to do where no server listens.
        how_to_get: what to do where the server does not know the model.
    """

    name: str
    path: str
    body: Callable[[str, Sequence[Message], Options], dict[str, Any]]
    text: Callable[[Any], str | None]
    how_to_start: str
    how_to_get: str


def _ollama_body(model: str, messages: Sequence[Message], options: Options) -> dict[str, Any]:
    body = {"model": model, "messages": list(messages), "stream": False}
    # A prompt longer than the context is refused by servers that know `truncate`.
    return {**body, "truncate": False, "options": options.settings("num_predict")}


def _openai_body(model: str, messages: Sequence[Message], options: Options) -> dict[str, Any]:
    if options.num_ctx is not None:  # these servers set it when they start
        raise InputError("judge.num_ctx is Ollama's: set the context where your server starts, leave it out")
    body = {"model": model, "messages": list(messages), "stream": False}
    return {**body, **options.settings("max_tokens")}


def _content(data: Any) -> str | None:
    """The text at `message.content`."""
    message = data.get("message") if isinstance(data, dict) else None
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, str) else None


def _first_choice(data: Any) -> str | None:
    choices = data.get("choices") if isinstance(data, dict) else None
    return _content(choices[0]) if isinstance(choices, list) and choices else None


# Ollama's own API: https://github.com/ollama/ollama/blob/main/docs/api.md. OpenAI's chat completions, which
# vLLM, llama.cpp, LM Studio and many services speak too.
_OLLAMA = ChatProtocol(
    name="ollama",
    path="/api/chat",
    body=_ollama_body,
    text=_content,
    how_to_start="start it with `ollama serve`, and get the model with `ollama pull {model}`",
    how_to_get="get it with `ollama pull {model}`",
)
_OPENAI = ChatProtocol(
    name="openai",
    path="/v1/chat/completions",
    body=_openai_body,
    text=_first_choice,
    how_to_start="start the server, or give its address with judge.address=",
    how_to_get="give the name of one that it has with judge.model=",
)
PROTOCOLS = {each.name: each for each in (_OLLAMA, _OPENAI)}


class UnreadableReplyError(Exception):
    """The server answered, but not with a reply of its protocol."""


class _TryAgainError(Exception):
    """A try that failed for a reason which may pass; the server wants the next one `after_seconds`."""

    def __init__(self, reason: str, *, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


@dataclass(kw_only=True)
class JudgeClient:
    """One server, asked by any number of threads; `model` is for messages, `api_key` goes as a bearer token.

    Attributes:
        timeout_seconds: longest silence of the server.
        retries: tries after the first, of one question.
        backoff_seconds: wait after the first failed try, doubled after each further one.
        max_wait_seconds: longest wait that a server may ask for.
        retried: tries that failed and were made again, so far.
    """

    address: str
    protocol: ChatProtocol
    model: str
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float
    retries: int
    backoff_seconds: float
    max_wait_seconds: float
    sleep: Callable[[float], None] = time.sleep
    retried: int = 0
    _answered: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def reply(self, body: dict[str, Any]) -> str:
        """The text of the model's reply; time-outs, lost connections, HTTP 408, 429 and 5xx are tried again.

        Raises UnreadableReplyError for a reply that is no JSON, or holds no text where the protocol has it,
        and InputError where there is no connection, all tries failed, a longer wait is asked for, or the
        server refuses the question, in its own words.
        """
        for failures in range(1, self.retries + 2):
            try:
                return self._try(body)
            except _TryAgainError as error:
                if failures > self.retries:
                    tries = "once" if failures == 1 else f"{failures} times"
                    raise InputError(
                        f"the judge at {self.address} failed {tries} ({error}): see what is wrong there;"
                        " the same command then goes on from here"
                    ) from error
                wait_seconds = self._wait_seconds(error, failures)
                with self._lock:
                    self.retried += 1
                log.warning("judge at %s: %s; trying again in %g s", self.address, error, wait_seconds)
                self.sleep(wait_seconds)
        raise AssertionError("the last try returns or raises")

    def _wait_seconds(self, error: _TryAgainError, failures: int) -> float:
        if error.after_seconds is None:
            return min(self.backoff_seconds * 2 ** (failures - 1), self.max_wait_seconds)
        if error.after_seconds > self.max_wait_seconds:
            raise InputError(
                f"the judge at {self.address} asks to wait {error.after_seconds:,.0f} s ({error}): run the"
                " same command again then, which goes on from here, or raise judge.max_wait_seconds"
            ) from error
        return error.after_seconds

    def _try(self, body: dict[str, Any]) -> str:
        import requests

        url = f"{self.address}{self.protocol.path}"
        try:
            response = requests.post(
                url,
                json=body,
                timeout=self.timeout_seconds,
                auth=self._authorised,
                allow_redirects=False,  # the question would be sent again without its body
                # A server on this machine is not behind the proxy that the environment may name.
                proxies={"http": "", "https": ""} if urlsplit(url).hostname in _LOOPBACK else None,
            )
        except requests.Timeout as error:
            raise _TryAgainError(f"no answer for {self.timeout_seconds:g} s") from error
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            if not self._answered and _nobody_listens(error):
                remedy = self.protocol.how_to_start.format(model=self.model)
                raise InputError(f"no judge answers at {self.address}: {remedy}") from error
            raise _TryAgainError("the connection was lost") from error
        except requests.RequestException as error:
            said = " ".join(str(error).split())
            message = f"the judge at {self.address} cannot be asked ({said}): mend judge.address"
            raise InputError(message) from error
        self._answered = True
        return self._text(response)

    def _authorised(self, request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        # As `auth`, for requests would put what ~/.netrc says of the host over a header.
        if self.api_key is not None:
            request.headers["Authorization"] = f"Bearer {self.api_key}"
        return request

    def _text(self, response: "requests.Response") -> str:
        status = f"HTTP {response.status_code} {response.reason}"
        if response.status_code in _TRY_AGAIN_STATUS:
            said, after_seconds = _said(response), _asked_wait(response.headers.get("Retry-After"))
            raise _TryAgainError(f"{status}: {said}" if said else status, after_seconds=after_seconds)
        if response.status_code != 200:
            raise self._refusal(response, status)
        try:
            data = response.json()
        except ValueError as error:
            raise UnreadableReplyError(f"no JSON: {response.text[:_QUOTED_CHARACTERS]}") from error
        text = self.protocol.text(data)
        if text is None:
            raise UnreadableReplyError(f"JSON without a text: {response.text[:_QUOTED_CHARACTERS]}")
        return text

    def _refusal(self, response: "requests.Response", status: str) -> InputError:
        said = _said(response)
        if response.status_code == 404 and "model" in said:
            remedy = self.protocol.how_to_get.format(model=self.model)
            return InputError(f"the judge at {self.address} has no model {self.model} ({said}): {remedy}")
        if response.status_code in (401, 403):
            remedy = "name the variable that holds a valid key with judge.api_key_env="
        elif "context" in said:
            remedy = "raise judge.num_ctx, or the server's context"
        else:
            remedy = "mend what it names, or judge.address, judge.protocol, judge.model"
        return InputError(
            f"the judge at {self.address} refuses the question ({status}: {said or 'nothing more'}): {remedy}"
        )


def checked_address(address: str, protocol: ChatProtocol) -> str:
    """The address without a slash or the protocol's /v1 at its end.

    Raises InputError where it is none of http or https, or holds a password.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(f"judge.address={address} is no address: give one such as http://localhost:11434")
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"judge.address of {parts.hostname} holds a user or password, which would be recorded:"
            " leave it out, and name the variable that holds the key with judge.api_key_env="
        )
    address = address.rstrip("/")
    return address.removesuffix("/v1") if protocol.name == "openai" else address


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable; None where none is named. Raises InputError if it is empty."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        state = "holds no key" if key else "is not set"
        raise InputError(
            f"the environment variable {variable} of judge.api_key_env {state}:"
            f" set it, or give judge.api_key_env=null for a server without keys"
        )
    return key


def _nobody_listens(error: BaseException | None) -> bool:
    """Whether a connection was refused, or the host is unknown."""
    while error is not None and not isinstance(error, (ConnectionRefusedError, socket.gaierror)):
        error = error.__cause__ or error.__context__
    return error is not None


def _said(response: "requests.Response") -> str:
    """The server's own words, as one line: Ollama's `error`, OpenAI's `error.message`, or the text."""
    try:
        data = response.json()
    except ValueError:
        data = None
    said = data.get("error") if isinstance(data, dict) else None
    if isinstance(said, dict):
        said = said.get("message")
    return " ".join(str(said or response.text).split())[:_QUOTED_CHARACTERS]


def _asked_wait(header: str | None) -> float | None:
    """Seconds of a Retry-After header, which is a number or a date; None without one that can be read."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        then = email.utils.parsedate_to_datetime(header)
    except ValueError:
        return None
    if then.tzinfo is None:
        then = then.replace(tzinfo=UTC)
    return max(0.0, (then - datetime.now(UTC)).total_seconds())
