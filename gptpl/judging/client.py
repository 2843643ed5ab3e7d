"""The judge's server: the two protocols it may speak, and requests over HTTP with retries."""

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from gptpl.errors import InputError
from gptpl.files.download import TRY_AGAIN_STATUS
from gptpl.judging.settings import JudgeModel
from gptpl.text import count_text, one_line

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)

Message = dict[str, str]
"""`role` (system, user or assistant) and `content`."""

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
_QUOTED_CHARACTERS = 300


@dataclass(frozen=True, kw_only=True)
class _ChatProtocol:
    """An API for chats.

    Attributes:
        path: where requests are posted.
        text_at: keys that lead to the reply's text in the server's JSON.
        max_tokens: name of the option that limits the reply.
        how_to_start: what to do if no server listens.
        how_to_get: what to do if the server does not have the model.
    """

    path: str
    text_at: tuple[str | int, ...]
    max_tokens: str
    how_to_start: str
    how_to_get: str


# Ollama's own API: https://github.com/ollama/ollama/blob/main/docs/api.md. OpenAI's chat completions, which
# vLLM, llama.cpp, LM Studio and many services offer too.
_PROTOCOLS = {
    "ollama": _ChatProtocol(
        path="/api/chat",
        text_at=("message", "content"),
        max_tokens="num_predict",
        how_to_start="start it with `ollama serve`, and get the model with `ollama pull {model}`",
        how_to_get="get it with `ollama pull {model}`",
    ),
    "openai": _ChatProtocol(
        path="/v1/chat/completions",
        text_at=("choices", 0, "message", "content"),
        max_tokens="max_tokens",
        how_to_start="start the server, or give its address with judge.address=",
        how_to_get="give the name of one that it has with judge.model=",
    ),
}


class UnreadableReplyError(Exception):
    """The server answered, but not with a reply of its protocol."""


class _TryAgainError(Exception):
    """A failure that may pass; the server asks to wait `after_seconds`, None if it does not say."""

    def __init__(self, reason: str, *, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


class JudgeClient:
    """A judge's server, for any number of threads; `retried` counts the attempts repeated so far.

    Raises InputError for a wrong address or a missing key.
    """

    def __init__(self, settings: JudgeModel, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.settings, self.sleep = settings, sleep
        self.protocol = _PROTOCOLS[settings.protocol]
        self.address = checked_address(settings.address, settings.protocol)
        self.retried = 0
        self._api_key = api_key(settings.api_key_env)
        self._answered = False
        self._lock = threading.Lock()

    def body(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The JSON of a request for one whole reply."""
        asked = self.settings
        options: dict[str, Any] = {
            "temperature": asked.temperature,
            "seed": asked.seed,
            "num_ctx": asked.num_ctx,
            self.protocol.max_tokens: asked.max_tokens,
        }
        options = {name: value for name, value in options.items() if value is not None} | asked.options
        if asked.protocol == "ollama":
            # Servers that know `truncate` then reject a prompt longer than the context.
            options = {"truncate": False, "options": options}
        return {"model": asked.model, "messages": list(messages), "stream": False, **options}

    def reply(self, body: dict[str, Any]) -> str:
        """The text of the model's reply; time-outs, lost connections, HTTP 408, 429 and 5xx are retried.

        Raises UnreadableReplyError for a reply that is not JSON, or has no text where the protocol has it,
        and InputError if there is no server, every attempt failed, the server asks for too long a wait, or it
        rejects the request.
        """
        # urllib3's Retry under requests would not repeat a reply that is cut off midway, nor tell a server
        # that was never there from one that is restarting.
        settings, attempts = self.settings, 0
        while True:
            try:
                return self._attempt(body)
            except _TryAgainError as error:
                wait_seconds = error.after_seconds
                if wait_seconds is None:
                    wait_seconds = min(settings.backoff_seconds * 2**attempts, settings.max_wait_seconds)
                attempts += 1
                if attempts > settings.retries:
                    raise InputError(
                        f"the judge at {self.address} failed {count_text(attempts, 'time')} ({error}):"
                        " check the server, then run the same command again to continue"
                    ) from error
                if wait_seconds > settings.max_wait_seconds:
                    raise InputError(
                        f"the judge at {self.address} asks to wait {wait_seconds:,.0f} s ({error}): run the"
                        " same command again then to continue, or raise judge.max_wait_seconds"
                    ) from error
                with self._lock:
                    self.retried += 1
                log.warning("judge at %s: %s; trying again in %g s", self.address, error, wait_seconds)
                self.sleep(wait_seconds)

    def _attempt(self, body: dict[str, Any]) -> str:
        import requests

        url = f"{self.address}{self.protocol.path}"
        try:
            response = requests.post(
                url,
                json=body,
                timeout=self.settings.timeout_seconds,
                auth=self._authorise,
                allow_redirects=False,  # a redirected POST loses its body
                # A server on this machine is not behind the proxy that the environment may name.
                proxies={"http": "", "https": ""} if urlsplit(url).hostname in _LOOPBACK else None,
            )
        except requests.Timeout as error:
            raise _TryAgainError(f"no answer for {self.settings.timeout_seconds:g} s") from error
        except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
            if not self._answered and _nobody_listens(error):
                remedy = self.protocol.how_to_start.format(model=self.settings.model)
                raise InputError(f"no judge answers at {self.address}: {remedy}") from error
            raise _TryAgainError("the connection was lost") from error
        except requests.RequestException as error:
            message = f"cannot send a request to {self.address} ({one_line(str(error))}): check judge.address"
            raise InputError(message) from error
        self._answered = True
        self._check_status(response)
        try:
            text = response.json()
            for key in self.protocol.text_at:
                text = text[key]
        except ValueError as error:
            raise UnreadableReplyError(f"not JSON: {response.text[:_QUOTED_CHARACTERS]}") from error
        except (LookupError, TypeError):
            text = None
        if not isinstance(text, str):
            raise UnreadableReplyError(f"JSON without a text: {response.text[:_QUOTED_CHARACTERS]}")
        return text

    def _authorise(self, request: "requests.PreparedRequest") -> "requests.PreparedRequest":
        # As `auth`, because requests would replace a header by what ~/.netrc has for the host.
        if self._api_key is not None:
            request.headers["Authorization"] = f"Bearer {self._api_key}"
        return request

    def _check_status(self, response: "requests.Response") -> None:
        if response.status_code == 200:
            return
        words = _error_text(response)
        reason = f"HTTP {response.status_code} {response.reason}{f': {words}' if words else ''}"
        if response.status_code in TRY_AGAIN_STATUS:
            raise _TryAgainError(reason, after_seconds=_retry_after(response))
        if response.status_code == 404 and "model" in words:
            remedy = self.protocol.how_to_get.format(model=self.settings.model)
            raise InputError(
                f"the judge at {self.address} has no model {self.settings.model} ({words}): {remedy}"
            )
        remedy = "check judge.address, judge.protocol and judge.model"
        if response.status_code in (401, 403):
            remedy = "name the variable that holds a valid key with judge.api_key_env="
        elif "context" in words:
            remedy = "raise judge.num_ctx, or the server's context"
        raise InputError(f"the judge at {self.address} rejected the request ({reason}): {remedy}")


def checked_address(address: str, protocol: str) -> str:
    """The address without a slash or OpenAI's /v1 at its end.

    Raises InputError if it is not an http or https URL, or contains a password.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise InputError(
            f"judge.address must be an http(s) address such as http://localhost:11434, got {address!r}"
        )
    if parts.username is not None or parts.password is not None:
        raise InputError(
            f"judge.address of {parts.hostname} contains a user or password, which would be recorded:"
            " leave it out, and name the variable that holds the key with judge.api_key_env="
        )
    address = address.rstrip("/")
    return address.removesuffix("/v1") if protocol == "openai" else address


def api_key(variable: str | None) -> str | None:
    """The key in an environment variable; None if no variable is named. Raises InputError without a key."""
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(
            f"the environment variable {variable} of judge.api_key_env"
            f" {'is not a key of printable ASCII' if key else 'is not set'}:"
            " set it, or give judge.api_key_env=null for a server without keys"
        )
    return key


def _nobody_listens(error: BaseException | None) -> bool:
    """Whether a connection was refused, or the host is unknown."""
    while error is not None and not isinstance(error, (ConnectionRefusedError, socket.gaierror)):
        error = error.__cause__ or error.__context__
    return error is not None


def _error_text(response: "requests.Response") -> str:
    """The server's own words in one line: Ollama's `error`, OpenAI's `error.message`, or the body."""
    try:
        error = response.json()["error"]
    except (ValueError, LookupError, TypeError):
        error = None
    if isinstance(error, dict):
        error = error.get("message")
    return one_line(str(error or response.text))[:_QUOTED_CHARACTERS]


def _retry_after(response: "requests.Response") -> float | None:
    """Seconds of the Retry-After header, a number or a date; None without a valid one."""
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    try:
        return Retry().parse_retry_after(response.headers["Retry-After"])
    except (KeyError, InvalidHeader):
        return None
