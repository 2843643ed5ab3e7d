"""A judge model: a question, asked again until its reply can be read, or given up."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from gptpl.judging.cache import ReplyCache, question_key
from gptpl.judging.client import JudgeClient, UnreadableReplyError
from gptpl.judging.prompts import Message, asked_again
from gptpl.judging.protocols import Options

log = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True)
class Verdict(Generic[Value]):
    """What the judge said of one thing.

    Attributes:
        value: what was read from its last reply; None: no reply could be read.
        replies: all of them, as they came; those that were no reply at all with the reason in brackets.
    """

    value: Value | None
    replies: tuple[str, ...]


@dataclass(kw_only=True)
class Judge:
    """Asks one model, and keeps what it says.

    Attributes:
        client: the server.
        options: how the model answers.
        cache: replies of earlier questions, which are not put again.
        asks: times a question is put, with a reminder of the form from the second time on, until its reply
            can be read.
        asked: questions put to the server so far.
        remembered: questions that the cache answered so far.
    """

    client: JudgeClient
    options: Options
    cache: ReplyCache
    asks: int
    asked: int = 0
    remembered: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def verdict(
        self, messages: list[Message], parse: Callable[[str], Value | None], *, reminder: str
    ) -> Verdict[Value]:
        """What `parse` reads from the reply, for any number of threads.

        A reply that is none (no JSON, no text in it) is not kept: the same question is put again.

        Raises InputError as `JudgeClient.reply` does.
        """
        replies: list[str] = []
        for _ in range(self.asks):
            try:
                reply = self._reply(messages)
            except UnreadableReplyError as error:
                replies.append(f"({error})")
                continue
            replies.append(reply)
            value = parse(reply)
            if value is not None:
                return Verdict(value, tuple(replies))
            messages = asked_again(messages, reply, reminder)
        return Verdict(None, tuple(replies))

    def _reply(self, messages: list[Message]) -> str:
        protocol = self.client.protocol
        body = protocol.body(self.client.model, messages, self.options)
        key = question_key(protocol.name, body)
        known = self.cache.get(key)
        with self._lock:
            if known is None:
                self.asked += 1
            else:
                self.remembered += 1
        if known is not None:
            return known
        reply = self.client.reply(body)
        self.cache.add(key, reply)
        return reply
